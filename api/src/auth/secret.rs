//! Secrets to compare with, none of which the time of a comparison gives away.
//!
//! How long it takes says nothing about how much of a guess was right, nor about which or how many
//! secrets there are to match: digests of one length are compared, all of them, every time.

use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};

/// Of one length whatever it was made from.
pub(super) type Digest = [u8; 32];

/// The digest of one secret.
pub(super) fn digest(secret: &[u8]) -> Digest {
    Sha256::digest(secret).into()
}

/// The digest of two texts, unlike for any two different pairs.
pub(super) fn digest_pair(first: &[u8], second: &[u8]) -> Digest {
    let mut hash = Sha256::new();
    hash.update((first.len() as u64).to_be_bytes());
    hash.update(first);
    hash.update(second);
    hash.finalize().into()
}

/// Digests, each with the place of its credential.
#[derive(Default)]
pub(super) struct SecretSet(Vec<(u64, Digest)>);

impl SecretSet {
    pub(super) fn insert(&mut self, place: usize, digest: Digest) {
        self.0.push((place as u64, digest));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The place of the credential that was presented.
    pub(super) fn find(&self, presented: &Digest) -> Option<usize> {
        let mut found = Choice::from(0);
        let mut place = 0_u64;
        for (of, valid) in &self.0 {
            let equal = valid.ct_eq(presented);
            place.conditional_assign(of, equal);
            found |= equal;
        }
        bool::from(found).then_some(place as usize)
    }
}
