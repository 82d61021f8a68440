//! The endpoint from the outside: calls go through the router, events into a real local log.

mod admin;
mod answers;
mod auth;
mod bad_input;
mod custom_extension;
mod custom_policy;
mod dialects;
mod entra;
mod logging;
mod payloads;
mod serving;
mod storage;
mod support;
mod tls;
