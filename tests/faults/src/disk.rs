//! A disk of our own that can be full.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::Context as _;

/// A small file system in memory at a folder; gone when dropped, and when this process ends otherwise.
#[derive(Debug)]
pub(crate) struct Disk {
    /// Unmounts when its standard input ends, so also when we are killed.
    guard: Child,
    folder: PathBuf,
}

impl Disk {
    /// `None` where this user or machine may not mount.
    pub(crate) fn mount(folder: &Path, megabytes: u64) -> anyhow::Result<Option<Self>> {
        std::fs::create_dir_all(folder)?;
        let script = format!(
            "mount -t tmpfs -o size={megabytes}m,mode=700 tmpfs \"$0\" || exit\n\
             echo mounted; exec >&-; read -r _; umount -l \"$0\""
        );
        // In a session of its own, so that nothing that is meant for us ends it.
        let mut guard = Command::new("setsid")
            .args(["sh", "-c", &script])
            .arg(folder)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("could not start setsid of util-linux")?;
        let stdout = guard.stdout.take().context("its output was not captured")?;
        let mut said = String::new();
        BufReader::new(stdout).read_line(&mut said)?;
        let disk = Self { guard, folder: folder.to_owned() };
        Ok((said == "mounted\n").then_some(disk))
    }

    /// Leaves no room on it.
    pub(crate) fn fill(&self) -> anyhow::Result<()> {
        let mut filler = File::create(self.filler()).context("could not fill the disk")?;
        // First by much, then by little, so that nothing is left in the end.
        for size in [1 << 20, 1 << 12] {
            let zeros = vec![0; size];
            while filler.write_all(&zeros).is_ok() {}
        }
        Ok(())
    }

    pub(crate) fn clear(&self) -> anyhow::Result<()> {
        std::fs::remove_file(self.filler()).context("could not make room on the disk again")
    }

    fn filler(&self) -> PathBuf {
        self.folder.join("filler")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_takes_nothing_until_it_is_cleared_and_leaves_nothing() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        let place = folder.path().join("data");
        let Some(disk) = Disk::mount(&place, 2)? else { return Ok(()) };
        let write = || std::fs::write(place.join("file"), [1; 8192]);
        write()?;

        std::fs::remove_file(place.join("file"))?;
        disk.fill()?;
        assert!(write().is_err());
        disk.clear()?;
        write()?;

        drop(disk);
        assert_eq!(std::fs::read_dir(&place)?.count(), 0, "still mounted");
        Ok(())
    }
}
