//! The encryption of a message for one browser: RFC 8291 over RFC 8188, in a single record.
//!
//! Only the browser can read it; the push service in between sees how long it is.

use ring::{
    aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    agreement::{ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey, agree_ephemeral},
    error::Unspecified,
    hkdf::{HKDF_SHA256, KeyType, Salt},
    rand::{SecureRandom, SystemRandom},
};

/// What push services take, whose limit is 4096 bytes in all: 86 are the header of the record, 16
/// its tag and one its end.
pub(super) const PLAIN_BYTES_MAX: usize = 4096 - 86 - 16 - 1;

const RECORD_SIZE: u32 = 4096;

/// Whom a message is for.
pub(super) struct Browser<'a> {
    /// Its public key, an uncompressed point on P-256.
    pub(super) public_key: &'a [u8],
    pub(super) auth: &'a [u8],
}

/// Encrypts with a key of our own that is used this once. Fails where the browser's key is none.
pub(super) fn encrypt(plain: &[u8], browser: &Browser<'_>) -> Result<Vec<u8>, Unspecified> {
    let random = SystemRandom::new();
    let mut salt = [0; 16];
    random.fill(&mut salt)?;
    let ours = EphemeralPrivateKey::generate(&ECDH_P256, &random)?;
    let our_public_key = ours.compute_public_key()?;
    let theirs = UnparsedPublicKey::new(&ECDH_P256, browser.public_key);
    agree_ephemeral(ours, &theirs, |shared| {
        seal(plain, shared, our_public_key.as_ref(), &salt, browser)
    })?
}

/// The part without chance.
fn seal(
    plain: &[u8],
    shared: &[u8],
    our_public_key: &[u8],
    salt: &[u8; 16],
    browser: &Browser<'_>,
) -> Result<Vec<u8>, Unspecified> {
    let both_keys = [b"WebPush: info\0".as_slice(), browser.public_key, our_public_key];
    let mut secret = [0; 32];
    derive(browser.auth, shared, &both_keys, &mut secret)?;
    let (mut key, mut nonce) = ([0; 16], [0; 12]);
    derive(salt, &secret, &[b"Content-Encoding: aes128gcm\0"], &mut key)?;
    derive(salt, &secret, &[b"Content-Encoding: nonce\0"], &mut nonce)?;

    let mut record = plain.to_vec();
    record.push(2); // This record is the last one, and has no padding.
    let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &key)?);
    let nonce = Nonce::assume_unique_for_key(nonce);
    key.seal_in_place_append_tag(nonce, Aad::empty(), &mut record)?;

    let key_length = u8::try_from(our_public_key.len()).map_err(|_| Unspecified)?;
    let mut message = Vec::with_capacity(16 + 4 + 1 + our_public_key.len() + record.len());
    message.extend_from_slice(salt);
    message.extend_from_slice(&RECORD_SIZE.to_be_bytes());
    message.push(key_length);
    message.extend_from_slice(our_public_key);
    message.extend_from_slice(&record);
    Ok(message)
}

/// HKDF (RFC 5869) with SHA-256, from end to end.
fn derive(
    salt: &[u8],
    secret: &[u8],
    info: &[&[u8]],
    derived: &mut [u8],
) -> Result<(), Unspecified> {
    let extracted = Salt::new(HKDF_SHA256, salt).extract(secret);
    extracted.expand(info, Length(derived.len()))?.fill(derived)
}

struct Length(usize);

impl KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// What a browser does with it.
#[cfg(test)]
pub(super) mod browser {
    use ring::aead::Aad;

    use super::*;

    /// A browser that can read one message.
    pub(crate) struct Receiver {
        key: EphemeralPrivateKey,
        pub(crate) public_key: Vec<u8>,
        pub(crate) auth: [u8; 16],
    }

    impl Receiver {
        pub(crate) fn new() -> Self {
            let random = SystemRandom::new();
            let mut auth = [0; 16];
            random.fill(&mut auth).unwrap();
            let key = EphemeralPrivateKey::generate(&ECDH_P256, &random).unwrap();
            let public_key = key.compute_public_key().unwrap().as_ref().to_vec();
            Self { key, public_key, auth }
        }

        pub(crate) fn open(self, message: &[u8]) -> Result<Vec<u8>, Unspecified> {
            let (salt, rest) = message.split_at(16);
            assert_eq!(rest[..5], [0, 0, 16, 0, 65], "the size of the record and of the key");
            let (sender, record) = rest[5..].split_at(65);
            let theirs = UnparsedPublicKey::new(&ECDH_P256, sender);
            agree_ephemeral(self.key, &theirs, |shared| {
                let both_keys = [b"WebPush: info\0".as_slice(), &self.public_key, sender];
                let (mut secret, mut key, mut nonce) = ([0; 32], [0; 16], [0; 12]);
                derive(&self.auth, shared, &both_keys, &mut secret)?;
                derive(salt, &secret, &[b"Content-Encoding: aes128gcm\0"], &mut key)?;
                derive(salt, &secret, &[b"Content-Encoding: nonce\0"], &mut nonce)?;
                let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &key)?);
                let nonce = Nonce::assume_unique_for_key(nonce);
                let mut record = record.to_vec();
                let plain = key.open_in_place(nonce, Aad::empty(), &mut record)?.to_vec();
                plain.strip_suffix(&[2]).map(<[u8]>::to_vec).ok_or(Unspecified)
            })?
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::keys::decode, browser::Receiver, *};

    #[test]
    fn the_example_of_the_rfc_comes_out_as_it_stands_there() {
        // RFC 8291, section 5 and appendix A.
        let of = |text: &str| decode(text).unwrap();
        let ours = of(
            "BP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A8",
        );
        let theirs = of(
            "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4",
        );
        let shared = of("kyrL1jIIOHEzg3sM2ZWRHDRB62YACZhhSlknJ672kSs");
        let salt = of("DGv6ra1nlYgDCS1FRnbzlw").try_into().unwrap();
        let browser = Browser { public_key: &theirs, auth: &of("BTBZMqHH6r4Tts7J_aSIgg") };
        let plain = b"When I grow up, I want to be a watermelon";

        let message = seal(plain, &shared, &ours, &salt, &browser).unwrap();

        assert_eq!(
            message,
            of(
                "DGv6ra1nlYgDCS1FRnbzlwAAEABBBP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmY\
                 WAmS6TlzAC8wEqKK6PBru3jl7A_yl95bQpu6cVPTpK4Mqgkf1CXztLVBSt2Ks3oZwbuwXPXLWyouBWLVWGNWQexS\
                 gSxsj_Qulcy4a-fN"
            )
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn only_the_browser_that_a_message_is_for_reads_it(
            plain in prop::collection::vec(any::<u8>(), 0..=PLAIN_BYTES_MAX),
        ) {
            let (receiver, other) = (Receiver::new(), Receiver::new());
            let browser = Browser { public_key: &receiver.public_key, auth: &receiver.auth };
            let message = encrypt(&plain, &browser).unwrap();
            prop_assert_eq!(message.len(), 86 + plain.len() + 1 + 16);
            prop_assert!(other.open(&message).is_err());
            prop_assert_eq!(receiver.open(&message), Ok(plain));
        }
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for public_key in [vec![], vec![4; 65], vec![0; 65]] {
            let browser = Browser { public_key: &public_key, auth: &[0; 16] };
            assert!(encrypt(b"x", &browser).is_err());
        }
    }
}
