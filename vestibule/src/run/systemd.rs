//! What passes between a process and its service manager, in the ways of systemd: the sockets that
//! it hands over, and what we tell it.
//!
//! A socket that was handed over outlives us. While one process ends and the next one starts, calls
//! wait in its queue instead of being refused.

use std::{
    env, io,
    net::{SocketAddr, TcpListener},
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr as UnixAddress, UnixDatagram},
        },
    },
};

use anyhow::{Context, bail, ensure};
use listenfd::ListenFd;
use tracing::warn;

/// The listening sockets that were handed over to us.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    pub(super) connector: Option<TcpListener>,
    pub(super) admin: Option<TcpListener>,
}

const NAMES: [&str; 2] = ["connector", "admin"];

impl Sockets {
    /// Takes them out of the environment, so that no child of ours thinks that they are its own.
    /// Before there are threads: others could read the environment meanwhile.
    pub(crate) fn from_environment() -> anyhow::Result<Self> {
        let mut passed = ListenFd::from_env();
        let mut sockets = Self::default();
        for (index, name) in
            names(passed.len(), env::var("LISTEN_FDNAMES").ok())?.iter().enumerate()
        {
            let taken = passed.take_tcp_listener(index);
            let taken = taken.and_then(|it| it.ok_or_else(|| io::ErrorKind::NotFound.into()));
            let socket =
                taken.and_then(|it| it.set_nonblocking(true).map(|()| it)).with_context(|| {
                    format!("could not use the socket `{name}` that was handed over")
                })?;
            let place = if *name == "admin" { &mut sockets.admin } else { &mut sockets.connector };
            *place = Some(socket);
        }
        Ok(sockets)
    }
}

/// What each of `count` sockets is for. Without names they are what they have always been in
/// examples: the connector first.
fn names(count: usize, given: Option<String>) -> anyhow::Result<Vec<&'static str>> {
    ensure!(count <= NAMES.len(), "{count} sockets were handed over; there is use for two at most");
    let Some(given) = given.filter(|it| !it.is_empty()) else {
        return Ok(NAMES[..count].to_vec());
    };
    let given: Vec<&str> = given.split(':').take(count).collect();
    let mut names = Vec::new();
    for name in given {
        let Some(known) = NAMES.into_iter().find(|it| *it == name) else {
            bail!(
                "a socket was handed over as `{name}`: name it `connector` or `admin` \
                 (FileDescriptorName= in the socket's unit)"
            );
        };
        ensure!(!names.contains(&known), "two sockets were handed over as `{name}`");
        names.push(known);
    }
    ensure!(names.len() == count, "{count} sockets were handed over, with fewer names");
    Ok(names)
}

/// The example credential is for this machine only, and that was judged by the configuration.
pub(super) fn is_as_near(handed_over: SocketAddr, configured: SocketAddr) -> bool {
    handed_over.ip().is_loopback() || !configured.ip().is_loopback()
}

/// Tells the service manager, where there is one that wants to know.
pub(super) fn notify(state: &str) {
    let Some(address) = env::var_os("NOTIFY_SOCKET").filter(|it| !it.is_empty()) else { return };
    let send = || {
        let address = match address.as_bytes() {
            [b'@', name @ ..] => UnixAddress::from_abstract_name(name)?,
            _ => UnixAddress::from_pathname(&address)?,
        };
        UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address)
    };
    if let Err(error) = send() {
        warn!(%error, state, "could not tell the service manager");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(count: usize, given: &str) -> Result<Vec<&'static str>, String> {
        names(count, Some(given.to_owned())).map_err(|error| error.to_string())
    }

    #[test]
    fn sockets_are_known_by_name_and_else_by_place() {
        assert_eq!(named(0, ""), Ok(vec![]));
        assert_eq!(named(1, ""), Ok(vec!["connector"]));
        assert_eq!(names(2, None).ok(), Some(vec!["connector", "admin"]));
        assert_eq!(named(1, "admin"), Ok(vec!["admin"]));
        assert_eq!(named(2, "admin:connector"), Ok(vec!["admin", "connector"]));
    }

    #[test]
    fn a_socket_that_nobody_can_place_is_refused() {
        let refused = |count, given| named(count, given).unwrap_err();
        assert!(refused(1, "vestibule.socket").contains("FileDescriptorName="));
        assert!(refused(2, "admin:admin").contains("two sockets"));
        assert!(refused(2, "admin").contains("fewer names"));
        assert!(refused(3, "").contains("two at most"));
    }

    #[test]
    fn a_socket_that_others_reach_is_no_socket_for_this_machine_only() {
        let near: SocketAddr = "127.0.0.1:7171".parse().unwrap();
        let far: SocketAddr = "0.0.0.0:7171".parse().unwrap();
        assert!(is_as_near(near, near) && is_as_near(near, far) && is_as_near(far, far));
        assert!(!is_as_near(far, near));
    }
}
