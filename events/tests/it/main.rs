//! The logs against real files and servers.

#[macro_use]
mod contract;
mod jetstream;
mod local;
mod relay;
mod roles;
mod sample;
