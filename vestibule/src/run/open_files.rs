//! How many connections the limit of open files bears.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

/// More than any platform opens, and little memory.
const CONNECTIONS_MAX: usize = 10_000;

/// Raises the limit of open files as far as it may be, and says how many connections the connector
/// can take within it. The low default is for programs that count files in bits; we do not.
pub(super) fn connections() -> usize {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        warn!(%error, "could not raise the limit of open files");
    }
    let open_files = getrlimit(Resource::Nofile).current;
    let connections = within(open_files);
    if connections < CONNECTIONS_MAX {
        warn!(
            connections,
            open_files, "the limit of open files allows fewer connections than usual"
        );
    }
    connections
}

/// A quarter is left for the log, the store, and what workers and lookups talk to.
fn within(open_files: Option<u64>) -> usize {
    let files = open_files.map_or(usize::MAX, |it| usize::try_from(it).unwrap_or(usize::MAX));
    CONNECTIONS_MAX.min(files / 4 * 3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_stay_within_the_limit_of_open_files() {
        assert_eq!(within(None), 10_000);
        assert_eq!(within(Some(1_048_576)), 10_000);
        assert_eq!(within(Some(1024)), 768);
    }

    #[test]
    fn the_limit_is_raised_as_far_as_it_may_be() {
        connections();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
