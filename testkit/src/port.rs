//! Ports for servers that must keep theirs over a restart.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::net::TcpListener;

/// Below the range from which Linux takes ports of outgoing connections: while a killed server is away,
/// no connection of a neighbouring test can be sitting on its port.
const PORTS: std::ops::Range<u64> = 10_000..32_000;

/// A port of 127.0.0.1 on which nobody listens at this moment.
///
/// Another process may still take it first, so the caller must notice that and try again, as the servers
/// here do. A server that is never restarted had better choose its port itself.
pub fn free_port() -> u16 {
    loop {
        let chance = RandomState::new().build_hasher().finish();
        let port = PORTS.start + chance % (PORTS.end - PORTS.start);
        let port = u16::try_from(port).expect("the range ends below 65536");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}
