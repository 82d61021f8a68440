//! The endpoint from the outside: calls go through the router, events into a real local log.

mod admin;
mod answers;
mod bad_input;
mod logging;
mod payloads;
mod serving;
mod storage;
mod support;
