//! Wall clocks that jump: a library of our own, loaded into each process, adds what a file says.

use std::{
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, ensure};

const SOURCE: &str = include_str!("clock.c");

/// The clocks of the processes of one run.
#[derive(Debug)]
pub(crate) struct Clocks {
    folder: PathBuf,
    library: PathBuf,
}

impl Clocks {
    /// Builds the library, with the C compiler that the product is built with too.
    pub(crate) fn build(folder: &Path) -> anyhow::Result<Self> {
        let (source, library) = (folder.join("clock.c"), folder.join("clock.so"));
        std::fs::write(&source, SOURCE)?;
        let mut compiler = Command::new("cc");
        compiler.args(["-O2", "-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
        let built = compiler.output().context("could not start the C compiler")?;
        let said = String::from_utf8_lossy(&built.stderr);
        ensure!(built.status.success(), "the library for clocks could not be built: {said}");
        Ok(Self { folder: folder.to_owned(), library })
    }

    /// Has a process go by the clock of this name.
    pub(crate) fn give(&self, name: &str, command: &mut Command) -> anyhow::Result<()> {
        let file = self.file(name);
        if !file.exists() {
            self.set(name, 0)?;
        }
        command.env("LD_PRELOAD", &self.library).env("FAULTS_CLOCK", file);
        Ok(())
    }

    /// From now on it is off by so many seconds.
    pub(crate) fn set(&self, name: &str, seconds: i64) -> anyhow::Result<()> {
        // In place: who has mapped the file sees it.
        let mut options = std::fs::File::options();
        let options = options.create(true).write(true).truncate(false);
        let file = options.open(self.file(name)).context("could not set a clock")?;
        Ok(file.write_all_at(&seconds.to_ne_bytes(), 0)?)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.clock"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_off_by_what_was_set_and_only_where_it_was_given() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let clocks = Clocks::build(folder.path())?;
        let seconds = |command: &mut Command| -> anyhow::Result<i64> {
            let said = command.args(["-u", "+%s"]).output()?;
            Ok(String::from_utf8(said.stdout)?.trim().parse()?)
        };
        let mut jumping = Command::new("date");
        clocks.give("ours", &mut jumping)?;

        let before = seconds(&mut Command::new("date"))?;
        clocks.set("ours", 3600)?;
        let ahead = seconds(&mut jumping)?;
        clocks.set("ours", -3600)?;
        let mut behind = Command::new("date");
        clocks.give("ours", &mut behind)?;
        let behind = seconds(&mut behind)?;
        let after = seconds(&mut Command::new("date"))?;

        assert!((before..=after).contains(&(ahead - 3600)), "{before} {ahead} {after}");
        assert!((before..=after).contains(&(behind + 3600)), "{before} {behind} {after}");
        Ok(())
    }
}
