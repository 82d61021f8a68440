//! Short names for a message, the same each time it is sent, for services that know by them what
//! they have seen. They tell nothing of the event.

use data_encoding::BASE64URL_NOPAD;
use ring::digest::{SHA256, digest};
use uuid::Uuid;

/// 32 letters, digits, hyphens and underscores: what is allowed as a web push topic (RFC 8030), and
/// as the id of an ntfy message or of a notification on a phone.
pub(super) fn id(idempotency_key: &str) -> String {
    BASE64URL_NOPAD.encode(&hash(idempotency_key)[..24])
}

/// The same as a UUID, of the version that is for hashes of one's own.
pub(super) fn uuid(idempotency_key: &str) -> Uuid {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&hash(idempotency_key)[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

fn hash(idempotency_key: &str) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, idempotency_key.as_bytes()).as_ref());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_one_name_and_another_one_another() {
        assert_eq!(id("a"), id("a"));
        assert_ne!(id("a"), id("b"));
        assert_eq!(id("a").len(), 32);
        assert!(id("a").bytes().all(|it| it.is_ascii_alphanumeric() || b"-_".contains(&it)));
        assert_eq!(uuid("a"), uuid("a"));
        assert_ne!(uuid("a"), uuid("b"));
        assert_eq!(uuid("a").get_version_num(), 8);
    }
}
