//! What HTTP Basic looks like on the wire.

use data_encoding::BASE64;

/// User and password of what follows the scheme; the first colon ends the user (RFC 7617), so a
/// password may hold more of them.
pub(super) fn decode(encoded: &[u8]) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut user = BASE64.decode(encoded.trim_ascii()).ok()?;
    let colon = user.iter().position(|byte| *byte == b':')?;
    let password = user.split_off(colon + 1);
    user.truncate(colon);
    Some((user, password))
}
