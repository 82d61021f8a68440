//! The write-ahead log after a crash, seen before SQLite takes it up.
//!
//! SQLite uses what was committed up to the first frame that is not as it was written, and drops all
//! behind it without a word: behind a write that was interrupted there is nothing of worth. But where
//! whole commits follow, the disk has lost something in the middle. That is said, and the file kept.

use std::{fs, path::Path};

use tracing::error;

use super::file;

const HEADER: usize = 32;
const FRAME_HEADER: usize = 24;

/// Says so and keeps a copy where commits in the write-ahead log cannot be used.
pub(super) fn look_for_damage(log: &Path) {
    let wal = file::beside(log, "-wal");
    let Ok(bytes) = fs::read(&wal) else { return };
    let commits = unusable_commits(&bytes);
    if commits == 0 {
        return;
    }
    let kept = file::beside(log, "-wal.damaged");
    let copied = fs::copy(&wal, &kept).is_ok();
    error!(
        log = %log.display(),
        commits,
        kept = copied.then(|| kept.display().to_string()),
        "the write-ahead log is damaged: what was written after the damage is lost; after a power \
         cut nothing that was answered is among it, otherwise compare with the stream or the store"
    );
}

/// How many commits lie behind the first frame that is damaged.
fn unusable_commits(wal: &[u8]) -> usize {
    let Some((header, frames)) = wal.split_at_checked(HEADER) else { return 0 };
    // The lowest bit says in which order of bytes the sums were taken.
    let big_endian = number(header, 0) & 1 == 1;
    let page = number(header, 8) as usize;
    if number(header, 0) >> 1 != 0x377f_0682 >> 1 || page == 0 {
        return 0;
    }
    let salts = &header[16..24];
    let mut sum = summed((0, 0), &header[..24], big_endian);
    let mut frames = frames.chunks_exact(FRAME_HEADER + page);
    // Frames of another round have other salts: what was written before the log last started over.
    let of_this_round = |frame: &&[u8]| frame[8..16] == *salts;
    for frame in frames.by_ref().take_while(of_this_round) {
        sum = summed(sum, &frame[..8], big_endian);
        sum = summed(sum, &frame[FRAME_HEADER..], big_endian);
        if sum != (number(frame, 16), number(frame, 20)) {
            break;
        }
    }
    // A frame that ends a commit says how large the file is then.
    frames.take_while(of_this_round).filter(|frame| number(frame, 4) != 0).count()
}

fn number(bytes: &[u8], place: usize) -> u32 {
    u32::from_be_bytes(bytes[place..place + 4].try_into().expect("four bytes"))
}

/// The running sum of SQLite's write-ahead log.
fn summed((mut one, mut two): (u32, u32), bytes: &[u8], big_endian: bool) -> (u32, u32) {
    let word = |four: &[u8]| {
        let four = four.try_into().expect("four bytes");
        if big_endian { u32::from_be_bytes(four) } else { u32::from_le_bytes(four) }
    };
    for eight in bytes.chunks_exact(8) {
        one = one.wrapping_add(word(&eight[..4])).wrapping_add(two);
        two = two.wrapping_add(word(&eight[4..])).wrapping_add(one);
    }
    (one, two)
}

#[cfg(test)]
mod tests {
    use sqlx::{Connection, SqliteConnection};

    use super::*;
    use crate::local::file::Sync;

    /// The write-ahead log of some commits, as SQLite writes it.
    async fn wal(commits: usize) -> anyhow::Result<Vec<u8>> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("a.db");
        fs::File::create(&path)?;
        let mut connection: SqliteConnection = file::writer(&path, Sync::Lazy).await?;
        sqlx::raw_sql("create table a (a)").execute(&mut connection).await?;
        for _ in 1..commits {
            sqlx::raw_sql("insert into a values (zeroblob(9000))").execute(&mut connection).await?;
        }
        let wal = fs::read(file::beside(&path, "-wal"))?;
        connection.close().await?;
        Ok(wal)
    }

    #[tokio::test]
    async fn only_commits_behind_a_damaged_frame_count() -> anyhow::Result<()> {
        let whole = wal(10).await?;
        assert_eq!(unusable_commits(&whole), 0);
        for cut in [0, 31, 32, 500, whole.len() - 5000, whole.len() - 1] {
            assert_eq!(unusable_commits(&whole[..cut]), 0, "cut at {cut}, as by a crash");
        }

        let mut damaged = whole.clone();
        let last = damaged.len() - 100;
        damaged[last] ^= 1;
        assert_eq!(unusable_commits(&damaged), 0, "in the last frame, as by a crash");
        let first = HEADER + FRAME_HEADER + 200;
        damaged[first] ^= 1;
        let found = unusable_commits(&damaged);
        assert!((9..=10).contains(&found), "{found}");
        assert_eq!(unusable_commits(&vec![0; 9000]), 0, "no write-ahead log at all");
        Ok(())
    }

    #[tokio::test]
    async fn what_is_left_of_an_earlier_round_is_no_damage() -> anyhow::Result<()> {
        let (whole, other) = (wal(10).await?, wal(20).await?);
        let joined = [&whole[..], &other[HEADER + (FRAME_HEADER + 4096) * 12..]].concat();
        assert_eq!(unusable_commits(&joined), 0);
        Ok(())
    }
}
