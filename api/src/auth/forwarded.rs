//! Client certificates that a proxy forwards in a header.
//!
//! Whoever can set the header is whoever it says, so it counts only on a connection from a network
//! that was named, and only on one without TLS: a connection whose TLS ends here was opened by the
//! caller itself, through whatever address it seems to come.

use std::{borrow::Cow, fmt, net::IpAddr, str::FromStr};

use axum::http::HeaderName;
use data_encoding::BASE64;
use ipnet::IpNet;
use percent_encoding::percent_decode;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};

use super::{Caller, Denied, certificate::CertificateChain, single};

/// How and from whom a forwarded certificate comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForwardedCertificate {
    pub header: HeaderName,
    pub encoding: CertificateEncoding,
    /// Where the proxies call from. From elsewhere the header counts for nothing.
    pub peers: Vec<Network>,
}

/// What the header holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateEncoding {
    /// The certificate in base64: `X-ARR-ClientCert` of Azure App Service.
    Base64Der,
    /// PEM, percent-encoded: `$ssl_client_escaped_cert` of nginx.
    UrlEscapedPem,
    /// `X-Forwarded-Client-Cert` of Envoy and what is built on it, with its `Cert` or `Chain`. Of
    /// several elements the last one is the nearest proxy's, and the only one that counts.
    Xfcc,
}

/// A network (`10.0.0.0/8`) or a single address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Network(IpNet);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is neither an address nor a network such as 10.0.0.0/8 or fd00::/8")]
pub struct NetworkError(String);

/// Longer than any chain of certificates that somebody would put into a header.
const HEADER_BYTES_MAX: usize = 64 * 1024;
/// As long as what the TLS library takes in a handshake.
const CHAIN_MAX: usize = 10;

impl ForwardedCertificate {
    pub(super) fn chain(&self, caller: &Caller<'_>) -> Result<CertificateChain, Denied> {
        let mut values = caller.headers.get_all(&self.header).iter().peekable();
        if values.peek().is_none() {
            return Err(Denied::Missing);
        }
        let peer = caller.connection.filter(|it| !it.tls).map(|it| it.peer.ip());
        if !peer.is_some_and(|peer| self.peers.iter().any(|it| it.contains(peer))) {
            return Err(Denied::ForwardedByStranger);
        }
        let value = match self.encoding {
            // Another line is another element, which stands behind the first ones.
            CertificateEncoding::Xfcc => values.next_back().ok_or(Denied::Missing)?,
            _ => single(caller.headers, &self.header)?,
        };
        let value = value.as_bytes().trim_ascii();
        // What nginx sends for a connection without a certificate.
        if value.is_empty() {
            return Err(Denied::Missing);
        }
        let certificates = match value.len() {
            0..=HEADER_BYTES_MAX => self.encoding.decode(value),
            _ => None,
        };
        certificates.and_then(CertificateChain::read).ok_or(Denied::Malformed)
    }
}

impl CertificateEncoding {
    /// The certificates in the value of a header, the caller's own first.
    fn decode(self, value: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
        match self {
            Self::Base64Der => BASE64.decode(value).ok().map(|der| vec![der.into()]),
            Self::UrlEscapedPem => from_pem(&percent_decode(value).collect::<Vec<_>>()),
            Self::Xfcc => from_xfcc(std::str::from_utf8(value).ok()?),
        }
    }
}

fn from_pem(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let certificates: Vec<_> =
        CertificateDer::pem_slice_iter(pem).take(CHAIN_MAX + 1).collect::<Result<_, _>>().ok()?;
    (1..=CHAIN_MAX).contains(&certificates.len()).then_some(certificates)
}

/// Elements are separated by commas, their fields by semicolons, and neither within quotes.
///
/// What stands before the last element may be the caller's own, to which the proxy has added. So the
/// whole value must be as proxies write it: with a quotation left open, the caller could have the
/// proxy's element taken for text, and be whoever its own element says.
fn from_xfcc(value: &str) -> Option<Vec<CertificateDer<'static>>> {
    let (mut certificate, mut chain) = (None, None);
    let mut rest = value;
    loop {
        let (name, value, separator, behind) = next_field(rest)?;
        let place = match name.trim() {
            name if name.eq_ignore_ascii_case("cert") => Some(&mut certificate),
            name if name.eq_ignore_ascii_case("chain") => Some(&mut chain),
            _ => None,
        };
        if let Some(place) = place
            && place.replace(value).is_some()
        {
            return None;
        }
        match separator {
            Some(';') => {}
            // Only the last element counts, and here another one begins.
            Some(_) => (certificate, chain) = (None, None),
            None => break,
        }
        rest = behind;
    }
    let decoded =
        |value: Cow<'_, str>| from_pem(&percent_decode(value.as_bytes()).collect::<Vec<_>>());
    match (certificate, chain) {
        (Some(certificate), Some(chain)) => {
            let leaf = decoded(certificate)?.into_iter().next()?;
            let above = decoded(chain)?.into_iter().filter(|it| *it != leaf).collect::<Vec<_>>();
            Some([leaf].into_iter().chain(above).collect())
        }
        (certificate, chain) => certificate.or(chain).and_then(decoded),
    }
}

/// A field's name and value, the separator behind it, and what comes after that; `None` where it is
/// not `name=value` or `name="value"` with nothing between the quotation and the separator.
fn next_field(text: &str) -> Option<(&str, Cow<'_, str>, Option<char>, &str)> {
    let is_separator = |letter: char| matches!(letter, ',' | ';');
    let (name, text) = text.split_once('=')?;
    if name.contains(|letter| is_separator(letter) || letter == '"') {
        return None;
    }
    let text = text.trim_start();
    let (value, behind) = match text.strip_prefix('"') {
        Some(quoted) => {
            let (value, behind) = quoted.split_at(closing_quote(quoted)?);
            (without_escapes(value), behind[1..].trim_start())
        }
        None => {
            let (value, behind) = text.split_at(text.find(is_separator).unwrap_or(text.len()));
            if value.contains('"') {
                return None;
            }
            (value.trim_end().into(), behind)
        }
    };
    let mut letters = behind.chars();
    match letters.next() {
        Some(letter) if !is_separator(letter) => None,
        separator => Some((name, value, separator, letters.as_str())),
    }
}

fn closing_quote(quoted: &str) -> Option<usize> {
    let mut escaped = false;
    quoted.find(|letter| {
        let closes = letter == '"' && !escaped;
        escaped = letter == '\\' && !escaped;
        closes
    })
}

fn without_escapes(quoted: &str) -> Cow<'_, str> {
    if quoted.contains('\\') { quoted.replace('\\', "").into() } else { quoted.into() }
}

impl Network {
    fn contains(&self, address: IpAddr) -> bool {
        // On a socket that serves both, an IPv4 peer looks like ::ffff:10.0.0.1.
        self.0.contains(&address.to_canonical())
    }
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let network = text.parse::<IpNet>().ok();
        let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
        network.or_else(address).map(Self).ok_or_else(|| NetworkError(text.to_owned()))
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
    use proptest::prelude::*;

    use super::*;

    /// Reading certificates is the next step's; here any bytes will do.
    fn pem(content: u8) -> String {
        let body = BASE64.encode(&[content; 40]);
        format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
    }

    fn escaped(text: &str) -> String {
        utf8_percent_encode(text, NON_ALPHANUMERIC).to_string()
    }

    fn decode(encoding: CertificateEncoding, value: &str) -> Option<Vec<u8>> {
        Some(encoding.decode(value.as_bytes())?.iter().map(|it| it[0]).collect())
    }

    #[test]
    fn each_proxy_is_understood() {
        let base64 = BASE64.encode(&[1; 40]);
        assert_eq!(decode(CertificateEncoding::Base64Der, &base64), Some(vec![1]));
        let pem_header = escaped(&pem(1));
        assert_eq!(decode(CertificateEncoding::UrlEscapedPem, &pem_header), Some(vec![1]));
        let both = escaped(&(pem(1) + &pem(2)));
        assert_eq!(decode(CertificateEncoding::UrlEscapedPem, &both), Some(vec![1, 2]));
        // A plus is a letter of base64 here, and no space.
        let loosely = pem(0xfb).replace('\n', "%0A").replace(' ', "%20");
        assert!(loosely.contains('+'));
        assert_eq!(decode(CertificateEncoding::UrlEscapedPem, &loosely), Some(vec![0xfb]));
    }

    #[test]
    fn of_forwarded_client_certs_the_last_is_the_nearest_proxys() {
        let xfcc = |value: &str| decode(CertificateEncoding::Xfcc, value);
        let certificate = |content| escaped(&pem(content));
        let one = format!(
            r#"By=http://frontend.test;Hash=468ed3;Cert="{}";Subject="CN=a\",b;c=d,O=x";URI="#,
            certificate(1)
        );
        assert_eq!(xfcc(&one), Some(vec![1]));
        assert_eq!(xfcc(&format!("{one},By=x;Cert={}", certificate(2))), Some(vec![2]));
        let chain = escaped(&(pem(1) + &pem(2) + &pem(3)));
        assert_eq!(xfcc(&format!("Chain={chain}")), Some(vec![1, 2, 3]));
        assert_eq!(xfcc(&format!("{one};Chain=\"{chain}\"")), Some(vec![1, 2, 3]));
        // The last proxy says that there was none, whatever the caller claims.
        assert_eq!(xfcc(&format!("{one},By=x;Hash=1")), None);
        assert_eq!(xfcc(&format!("Cert={0};Cert={0}", certificate(1))), None);
        // What is said of an earlier element is of no account, as long as it can be told apart.
        assert_eq!(xfcc(&format!("Cert=\"?\",{one}")), Some(vec![1]));
    }

    #[test]
    fn no_caller_can_have_the_nearest_proxys_element_overlooked() {
        let xfcc = |value: &str| decode(CertificateEncoding::Xfcc, value);
        let certificate = |content| escaped(&pem(content));
        let others = format!("Cert=\"{}\"", certificate(1));
        let proxys = [
            format!("By=x;Hash=1;Cert=\"{}\"", certificate(2)),
            format!("By=x;Hash=1;Cert=\"{}\";Subject=\"CN=a\\\",b\";URI=", certificate(2)),
            format!("Hash=1;Cert={}", certificate(2)),
        ];
        for begun in ["", ";x=\"", ";x=\"\\", ";x=\"\\\\", ";\"", ";x=y\"", "\"", ";x=\"y\"z", "\\"]
        {
            for proxys in &proxys {
                let value = format!("{others}{begun},{proxys}");
                let found = xfcc(&value);
                assert!(found.is_none() || found == Some(vec![2]), "{value}");
            }
        }
        assert_eq!(xfcc(&format!("{others},{}", proxys[0])), Some(vec![2]));
    }

    #[test]
    fn what_holds_no_certificate_is_none() {
        for value in ["", "x", "%", "-----BEGIN CERTIFICATE-----", "=;,\"\\"] {
            for encoding in [CertificateEncoding::UrlEscapedPem, CertificateEncoding::Xfcc] {
                assert_eq!(decode(encoding, value), None, "{encoding:?} {value}");
            }
        }
        assert_eq!(decode(CertificateEncoding::Base64Der, "****"), None);
        let long = escaped(&pem(1).repeat(CHAIN_MAX + 1));
        assert_eq!(decode(CertificateEncoding::UrlEscapedPem, &long), None);
    }

    #[test]
    fn a_network_holds_its_addresses_in_both_notations() {
        let network: Network = "10.1.0.0/16".parse().unwrap();
        let contains = |address: &str| network.contains(address.parse().unwrap());
        assert!(contains("10.1.2.3") && contains("::ffff:10.1.2.3"));
        assert!(!contains("10.2.0.1") && !contains("::1"));
        let single: Network = "192.0.2.7".parse().unwrap();
        assert!(single.contains("192.0.2.7".parse().unwrap()));
        assert!(!single.contains("192.0.2.8".parse().unwrap()));
        assert!("10.1.0.0/33".parse::<Network>().is_err());
        assert!("proxy.test".parse::<Network>().is_err());
    }

    proptest! {
        #[test]
        fn whatever_a_caller_sends_the_proxys_certificate_counts(
            begun in r#"([,;="\\ ]|Cert|x){0,16}"#,
            subject in r#"CN=([,;="\\ ]|x){0,8}"#,
        ) {
            let certificate = |content| escaped(&pem(content));
            let subject = subject.replace('\\', "\\\\").replace('"', "\\\"");
            let (others, proxys) = (certificate(1), certificate(2));
            let value =
                format!("Cert=\"{others}\"{begun},By=x;Cert=\"{proxys}\";Subject=\"{subject}\";URI=y");
            let found = decode(CertificateEncoding::Xfcc, &value);
            prop_assert!(found.is_none() || found == Some(vec![2]), "{}", value);
        }

        #[test]
        fn no_header_is_too_much(value in prop::collection::vec(any::<u8>(), 0..200)) {
            for encoding in [
                CertificateEncoding::Base64Der,
                CertificateEncoding::UrlEscapedPem,
                CertificateEncoding::Xfcc,
            ] {
                let _ = encoding.decode(&value);
            }
        }
    }
}
