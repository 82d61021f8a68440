//! `[exec]`: a subscriber that is a command.

use std::{path::PathBuf, time::Duration};

use secrecy::SecretString;
use vestibule_workers::{ExecMode, ExecSettings};

use super::{Place, Text};
use crate::config::{SecretSource, reader::Section};

/// What is run, and how.
#[derive(Debug)]
pub(crate) struct ExecConfig {
    pub(crate) command: Vec<String>,
    mode: ExecMode,
    environment: Vec<(String, Text)>,
    directory: Option<PathBuf>,
    output_bytes_max: usize,
}

impl ExecConfig {
    /// What the worker needs. `timeout` is of an attempt.
    pub(super) fn settings(&self, name: &str, timeout: Duration) -> anyhow::Result<ExecSettings> {
        self.settings_with(name, timeout, SecretSource::fetch)
    }

    fn settings_with(
        &self,
        name: &str,
        timeout: Duration,
        fetch: impl Fn(&SecretSource) -> anyhow::Result<SecretString>,
    ) -> anyhow::Result<ExecSettings> {
        let variable = |(name, value): &(String, Text)| Ok((name.clone(), value.fetch(&fetch)?));
        Ok(ExecSettings {
            name: name.to_owned(),
            command: self.command.clone(),
            mode: self.mode,
            timeout: timeout.saturating_sub(ExecSettings::STOPPING),
            environment: self.environment.iter().map(variable).collect::<anyhow::Result<_>>()?,
            directory: self.directory.clone(),
            output_bytes_max: self.output_bytes_max,
        })
    }

    pub(super) fn secrets(&self) -> Vec<&SecretSource> {
        self.environment.iter().filter_map(|(_, it)| it.source()).collect()
    }
}

/// The command that the table asks for.
pub(super) fn read(section: &mut Section<'_>, place: Place<'_>) -> ExecConfig {
    let command = section.list("command", "words, the program first", |it| Some(it.to_owned()));
    let modes = [("per-event", ExecMode::PerEvent), ("long-running", ExecMode::LongRunning)];
    let mode = section.choice("mode", &modes, ExecMode::PerEvent);
    let environment = section.strings("environment").into_iter();
    let environment = environment.map(|(name, it)| (name, Text::of(&it))).collect();
    let directory = section.string("directory").map(|it| place.folder.join(it));
    let default = u64::try_from(ExecSettings::OUTPUT_BYTES_MAX).unwrap_or(u64::MAX);
    let output_bytes_max = section.bytes("output_bytes_max", default);
    let output_bytes_max = usize::try_from(output_bytes_max).unwrap_or(usize::MAX);
    if !section.has("command") && !section.has_unknown() {
        section.complain("", "needs the key `command`");
    }
    let config = ExecConfig { command, mode, environment, directory, output_bytes_max };
    let stand_in = |_: &SecretSource| Ok("stand-in".into());
    let settings = config.settings_with(place.name, ExecSettings::STOPPING * 2, stand_in);
    let settings = settings.expect("a stand-in is always there");
    if section.has("command") {
        for complaint in settings.check().err().into_iter().flatten() {
            section.complain(complaint.key, complaint.message);
        }
    }
    config
}
