//! Ports for servers that must keep theirs over a restart.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
    net::TcpListener,
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener},
    },
    sync::{Mutex, PoisonError},
};

/// Below the range from which Linux takes ports of outgoing connections: while a killed server is away,
/// no connection of a neighbouring test can be sitting on its port.
const PORTS: std::ops::Range<u64> = 10_000..32_000;

/// What keeps neighbouring tests from our ports while nobody listens there: names that are nowhere in the
/// file system and end with the process.
static OURS: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

/// A port of 127.0.0.1 on which nobody listens at this moment, and that no other test is given while this
/// process lives.
///
/// Who is no test may still take it first. A server that is never restarted had better choose its port
/// itself.
pub fn free_port() -> u16 {
    loop {
        let chance = RandomState::new().build_hasher().finish();
        let port = PORTS.start + chance % (PORTS.end - PORTS.start);
        let port = u16::try_from(port).expect("the range ends below 65536");
        let Some(ours) = claim(port) else { continue };
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            OURS.lock().unwrap_or_else(PoisonError::into_inner).push(ours);
            return port;
        }
    }
}

fn claim(port: u16) -> Option<UnixListener> {
    let name = format!("vestibule-test-port-{port}");
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_given_once() {
        let port = free_port();
        assert!(claim(port).is_none(), "another test could be given {port}");
    }
}
