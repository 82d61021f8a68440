//! The logs against real files and servers.

#[macro_use]
mod contract;
mod compatibility;
mod jetstream;
mod local;
mod relay;
mod roles;
mod sample;
mod schemas;
