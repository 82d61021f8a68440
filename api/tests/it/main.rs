//! The endpoint from the outside: calls go through the router, events into a real local log.

mod admin;
mod answers;
mod auth;
mod bad_input;
mod contracts;
mod custom_extension;
mod custom_policy;
mod dialects;
mod entra;
mod fuzz;
mod hanging;
mod lists;
mod logging;
mod lookups_http;
mod lookups_sql;
mod payloads;
mod serving;
mod storage;
mod support;
mod tls;
