//! Who may call a connector.

mod basic;

pub use basic::BasicCredential;
pub(crate) use basic::{BasicCredentials, Denied};
