//! Statements of the user's own, run in a database for each event.

mod named;

pub(crate) use self::named::{Dialect, NamedStatement};
