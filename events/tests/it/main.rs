//! The logs against real files and servers.

#[macro_use]
mod contract;
mod local;
mod sample;
