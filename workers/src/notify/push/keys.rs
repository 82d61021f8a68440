//! Keys that we sign with, and the tokens (RFC 7519) that they make.

use data_encoding::BASE64URL_NOPAD;
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, RSA_PKCS1_SHA256, RsaKeyPair},
};
use rustls::pki_types::{PrivatePkcs8KeyDer, pem::PemObject};
use serde_json::Value;

/// A key for signatures.
pub(super) enum SigningKey {
    Es256(Box<EcdsaKeyPair>),
    Rs256(Box<RsaKeyPair>),
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SigningKey({})", self.algorithm())
    }
}

impl SigningKey {
    /// An elliptic key (P-256) in PEM, PKCS #8.
    pub(super) fn es256(pem: &str) -> Option<Self> {
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).ok()?;
        let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let key = key.secret_pkcs8_der();
        let key = EcdsaKeyPair::from_pkcs8(algorithm, key, &SystemRandom::new()).ok()?;
        Some(Self::Es256(Box::new(key)))
    }

    /// The two halves of an elliptic key (P-256) as Web Push writes them; `None` where they are no
    /// pair.
    pub(super) fn vapid(private: &str, public: &str) -> Option<Self> {
        let [private, public] = [private, public].map(decode);
        let key = EcdsaKeyPair::from_private_key_and_public_key(
            &ECDSA_P256_SHA256_FIXED_SIGNING,
            &private?,
            &public?,
            &SystemRandom::new(),
        );
        Some(Self::Es256(Box::new(key.ok()?)))
    }

    /// An RSA key in PEM, PKCS #8.
    pub(super) fn rs256(pem: &str) -> Option<Self> {
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).ok()?;
        let key = RsaKeyPair::from_pkcs8(key.secret_pkcs8_der()).ok()?;
        Some(Self::Rs256(Box::new(key)))
    }

    const fn algorithm(&self) -> &'static str {
        match self {
            Self::Es256(_) => "ES256",
            Self::Rs256(_) => "RS256",
        }
    }

    /// A signed token that says `claims`; `id` names the key to whoever knows several.
    pub(super) fn token(&self, id: Option<&str>, claims: &Value) -> String {
        let mut header = serde_json::json!({ "alg": self.algorithm(), "typ": "JWT" });
        if let Some(id) = id {
            header["kid"] = id.into();
        }
        let part = |value: &Value| BASE64URL_NOPAD.encode(value.to_string().as_bytes());
        let signed = format!("{}.{}", part(&header), part(claims));
        let signature = self.sign(signed.as_bytes());
        format!("{signed}.{}", BASE64URL_NOPAD.encode(&signature))
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match self {
            Self::Es256(key) => {
                key.sign(&random, message).expect("the system gives random bytes").as_ref().to_vec()
            }
            Self::Rs256(key) => {
                let mut signature = vec![0; key.public().modulus_len()];
                key.sign(&RSA_PKCS1_SHA256, &random, message, &mut signature)
                    .expect("the signature is as long as the key");
                signature
            }
        }
    }
}

/// Base64url, as browsers write it; some libraries add padding.
pub(super) fn decode(text: &str) -> Option<Vec<u8>> {
    BASE64URL_NOPAD.decode(text.trim().trim_end_matches('=').as_bytes()).ok()
}
