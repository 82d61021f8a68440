//! Temporary directories that do not outlive the tests, however these end.

use std::path::Path;
use std::sync::Once;

use anyhow::Context as _;
use tempfile::TempDir;

const PREFIX: &str = "vestibule-test-";

/// A directory of our own, removed when dropped.
///
/// Its name carries our process id, so that a later test can tell whether its owner still lives.
pub(crate) fn create() -> anyhow::Result<TempDir> {
    static SWEEP: Once = Once::new();
    SWEEP.call_once(|| sweep(&std::env::temp_dir()));

    tempfile::Builder::new()
        .prefix(&format!("{PREFIX}{}-", std::process::id()))
        .tempdir()
        .context("could not create a temporary directory for a test server")
}

/// Removes directories whose test process was killed before it could.
fn sweep(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next());
        let Some(owner) = owner.and_then(|owner| owner.parse::<u32>().ok()) else { continue };
        if !Path::new("/proc").join(owner.to_string()).exists() {
            // Another test may be sweeping the same directory: whoever comes second finds nothing.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_whose_owner_is_gone_is_swept_and_others_are_kept() {
        let parent = tempfile::tempdir().unwrap();
        let path = |name: &str| parent.path().join(name);
        let kept = [format!("{PREFIX}{}-a", std::process::id()), "somebody-elses".to_owned()];
        // Linux has no process ids beyond 2^22.
        let orphan = format!("{PREFIX}4194305-a");
        for name in kept.iter().chain([&orphan]) {
            std::fs::create_dir(path(name)).unwrap();
        }

        sweep(parent.path());

        assert!(kept.iter().all(|name| path(name).exists()));
        assert!(!path(&orphan).exists());
    }
}
