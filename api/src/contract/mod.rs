//! The wire dialects: a call is read, an answer is written; no I/O.
//!
//! Everything that only one dialect knows stays in its module: names of members, legal answers,
//! status codes. What comes out of a call is a [`SignUp`](vestibule_events::SignUp), whatever the
//! dialect; nothing in here panics or refuses because of what a claim holds.

mod api_connector;
mod problem;

pub use api_connector::{Action, Answer};
pub(crate) use api_connector::{Call, parse};
pub use problem::Problem;
