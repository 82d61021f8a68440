//! The SQLite file: made for us alone, and still the one that we opened.

use std::{
    io::{self, ErrorKind},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use crate::{StoreError, error::Cause};

/// Creates the file so that only we may read it: people's data will be in it. SQLite gives the
/// files beside it (`-wal`, `-shm`) the same permissions.
pub(crate) fn create_private(path: &Path) -> Result<(), StoreError> {
    match std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let folder = path.parent().unwrap_or(path).display();
            Err(StoreError::Misconfigured(Cause::new(format!("there is no folder {folder}"))))
        }
        Err(error) => Err(StoreError::Unavailable(Cause::new(error.to_string()))),
    }
}

/// Which file a path named when it was opened. A file that is deleted takes writes as before, and
/// loses all of them with the process: whoever promises that something is stored has to look.
#[derive(Debug)]
pub(crate) struct Identity {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Identity {
    pub(crate) fn of(path: &Path) -> Result<Self, StoreError> {
        let (device, inode) = place_of(path).map_err(|error| {
            StoreError::Unavailable(Cause::new(format!("{}: {error}", path.display())))
        })?;
        Ok(Self { path: path.to_owned(), device, inode })
    }

    /// Whether the path still names this file.
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        let path = self.path.display();
        let what = match place_of(&self.path) {
            Ok(place) if place == (self.device, self.inode) => return Ok(()),
            Ok(_) => format!("{path} was replaced by another file; start again to use that one"),
            Err(error) if error.kind() == ErrorKind::NotFound => {
                format!("{path} is gone; bring it back and start again")
            }
            Err(error) => format!("{path}: {error}"),
        };
        Err(StoreError::Unavailable(Cause::new(what)))
    }
}

fn place_of(path: &Path) -> io::Result<(u64, u64)> {
    let about = std::fs::metadata(path)?;
    Ok((about.dev(), about.ino()))
}
