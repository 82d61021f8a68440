//! What HTTP Basic looks like on the wire.

use data_encoding::BASE64;

/// A user and a password, not yet compared.
pub(super) struct Pair {
    text: Vec<u8>,
    colon: usize,
}

impl Pair {
    /// Reads what follows the scheme. The first colon ends the user (RFC 7617), so a password may
    /// hold more of them.
    pub(super) fn read(encoded: &[u8]) -> Option<Self> {
        let text = BASE64.decode(encoded.trim_ascii()).ok()?;
        let colon = text.iter().position(|byte| *byte == b':')?;
        Some(Self { text, colon })
    }

    pub(super) fn user(&self) -> &[u8] {
        &self.text[..self.colon]
    }

    pub(super) fn password(&self) -> &[u8] {
        &self.text[self.colon + 1..]
    }
}
