//! Whether databases take the statements that are to run in them.

use crate::{
    config::{Config, EffectConfig, SecretSource},
    wiring::listed,
};

/// What their databases say against statements, a line each. The store is asked at a start: here it
/// may not be there yet.
pub(super) async fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    for worker in &config.workers {
        let EffectConfig::Statements(statements) = &worker.effect else { continue };
        let said = match statements.settings(worker.settings.timeout, SecretSource::fetch) {
            Ok(settings) => vestibule_workers::Statements::verify(&settings).await,
            // That a secret is missing is said where all secrets are looked at.
            Err(_) => continue,
        };
        match said {
            Ok(said) if said.is_empty() => {}
            Ok(said) => warnings.push(format!("{}: {:#}", worker.place(), listed(said))),
            Err(error) => warnings.push(format!("{}: {error:#}", worker.place())),
        }
    }
    warnings
}
