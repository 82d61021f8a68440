//! Which cryptography TLS uses: ring, and nothing else in the whole build.

use std::sync::Once;

/// Makes ring the provider of this process, once; what was installed before stays.
///
/// HTTP clients look it up when they are built, and fail without one.
pub(crate) fn install_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // An error only says that the process has one already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}
