//! Behaviour, end to end: the real binary against real servers, as a user drives it.

mod approvals;
mod care;
mod commands;
mod confirm;
mod contracts;
mod crash;
mod decisions;
mod doctor;
mod embedded;
mod examples;
mod exec;
mod letters;
mod monitoring;
mod notify;
mod permissions;
mod platforms;
mod rolling;
mod scaled_out;
mod statements;
mod storm;
mod subscribers;
mod support;
mod tools;
mod webhook;
