//! The machine that tries to break it.
//!
//! `plan` makes faults out of a seed; `system` runs the real binary with real servers and does to them
//! what the plan says; `platform` plays the identity platform and keeps a journal of every call and
//! answer; `target` plays who is notified. When all is over, healed and settled, `readings` looks at
//! what is left, and `checker` compares. Neither of these shares code with what they judge.
//!
//! A run is repeatable as far as a machine is: the same seed gives the same people, calls and faults at
//! the same sign-ups; which thread comes first is not ours to say.

mod checker;
mod clock;
mod disk;
mod journal;
mod plan;
mod platform;
mod readings;
mod report;
mod run;
mod system;
mod target;

pub use checker::{Difference, Verdict, check};
pub use journal::{Answer, Entry, Moment, Step};
pub use plan::{Fault, Kind, Link, Mood, Part, Plan, Planned, Topology, Worker};
pub use readings::{Effect, Event, Readings};
pub use report::Report;
pub use run::{Mutation, Settings, binary, run};
