//! The `[[connectors.NAME.credentials]]` tables: who may call.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use vestibule_api::{
    BearerSettings, BearerVerifier, CertificateEncoding, CertificateSettings, CertificateSource,
    Credential, CredentialKind, DistinguishedName, ForwardedCertificate, HeaderName, NamePair,
    Network, Thumbprint,
};

use super::{SecretSource, reader::Section, secret};

/// One way to be let in; several are valid at once, so that they can be rotated.
#[derive(Debug)]
pub(crate) struct CredentialConfig {
    /// For metrics: which credential is still in use.
    pub(crate) name: String,
    kind: KindConfig,
}

#[derive(Debug)]
enum KindConfig {
    Basic { user: String, password: SecretSource },
    ApiKey { header: HeaderName, key: SecretSource },
    Token { token: SecretSource },
    Certificate(CertificateConfig),
    Bearer(BearerSettings),
}

#[derive(Debug)]
struct CertificateConfig {
    source: CertificateSource,
    thumbprints: Vec<Thumbprint>,
    names: Vec<NamePair>,
    roots: Option<PathBuf>,
}

impl CredentialConfig {
    /// What the endpoint needs, with the secrets, and for a bearer token who fetches its keys.
    pub(crate) fn credential(&self) -> anyhow::Result<(Credential, Option<Arc<BearerVerifier>>)> {
        let mut verifier = None;
        let kind = match &self.kind {
            KindConfig::Basic { user, password } => {
                CredentialKind::Basic { user: user.clone(), password: password.fetch()? }
            }
            KindConfig::ApiKey { header, key } => {
                CredentialKind::ApiKey { header: header.clone(), key: key.fetch()? }
            }
            KindConfig::Token { token } => CredentialKind::Token { token: token.fetch()? },
            KindConfig::Certificate(config) => CredentialKind::Certificate(config.settings()?),
            KindConfig::Bearer(settings) => {
                let bearer = Arc::new(BearerVerifier::new(settings.clone(), client_for_keys()?)?);
                verifier = Some(Arc::clone(&bearer));
                CredentialKind::Bearer(bearer)
            }
        };
        Ok((Credential { name: self.name.clone(), kind }, verifier))
    }

    /// The secret that it is, with its key in the file.
    pub(crate) fn secret(&self) -> Option<(&'static str, &SecretSource)> {
        match &self.kind {
            KindConfig::Basic { password, .. } => Some(("password", password)),
            KindConfig::ApiKey { key, .. } => Some(("key", key)),
            KindConfig::Token { token } => Some(("token", token)),
            KindConfig::Certificate(_) | KindConfig::Bearer(_) => None,
        }
    }

    /// The header in which it comes, where that is one of its own.
    pub(crate) fn header(&self) -> Option<&HeaderName> {
        match &self.kind {
            KindConfig::ApiKey { header, .. } => Some(header),
            KindConfig::Certificate(CertificateConfig {
                source: CertificateSource::Forwarded(forwarded),
                ..
            }) => Some(&forwarded.header),
            _ => None,
        }
    }

    /// Whether the listener has to ask callers for a certificate.
    pub(crate) fn is_certificate_of_connection(&self) -> bool {
        matches!(
            &self.kind,
            KindConfig::Certificate(CertificateConfig {
                source: CertificateSource::Connection,
                ..
            })
        )
    }

    /// What `simulate` calls with, which knows Basic only.
    pub(crate) fn basic(&self) -> Option<(&str, &SecretSource)> {
        match &self.kind {
            KindConfig::Basic { user, password } => Some((user, password)),
            _ => None,
        }
    }
}

impl CertificateConfig {
    fn settings(&self) -> anyhow::Result<CertificateSettings> {
        let roots = self.roots.as_ref().map(|path| {
            std::fs::read(path)
                .with_context(|| format!("could not read the roots in {}", path.display()))
        });
        let roots = roots.transpose()?;
        let Self { source, thumbprints, names, .. } = self;
        let (thumbprints, names) = (thumbprints.clone(), names.clone());
        Ok(CertificateSettings::new(source.clone(), thumbprints, names, roots.as_deref())?)
    }
}

/// Fetches the keys of bearer tokens: an issuer that redirects or hangs is of no use.
fn client_for_keys() -> anyhow::Result<reqwest::Client> {
    reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .timeout(KEYS_TIME_LIMIT)
        .build()
        .context("could not make an HTTP client")
}

const KEYS_TIME_LIMIT: Duration = Duration::from_secs(10);

#[derive(Clone, Copy)]
enum KindWord {
    Basic,
    ApiKey,
    Token,
    Certificate,
    Bearer,
}

pub(super) fn read(
    section: &mut Section<'_>,
    listen: SocketAddr,
    folder: &Path,
) -> Vec<CredentialConfig> {
    let mut index = 0;
    let credentials = section.sections("credentials", |credential| {
        index += 1;
        read_credential(credential, index, listen, folder)
    });
    if !section.has("credentials") {
        section.complain("", "needs at least one [[credentials]] table with `user` and `password`");
    }
    credentials.into_iter().flatten().collect()
}

fn read_credential(
    section: &mut Section<'_>,
    index: usize,
    listen: SocketAddr,
    folder: &Path,
) -> Option<CredentialConfig> {
    let kinds = [
        ("basic", KindWord::Basic),
        ("api-key", KindWord::ApiKey),
        ("token", KindWord::Token),
        ("certificate", KindWord::Certificate),
        ("bearer", KindWord::Bearer),
    ];
    let word = section.choice("kind", &kinds, KindWord::Basic);
    let name = section.string("name");
    let (default_name, kind) = match word {
        KindWord::Basic => {
            let user = section.required("user");
            if user.contains(':') {
                let message = "a colon ends the user in a Basic credential: leave it out";
                section.complain("user", message);
            }
            let password = required_secret(section, "password", listen);
            (user.clone(), password.map(|password| KindConfig::Basic { user, password }))
        }
        KindWord::ApiKey => {
            let header = parsed::<HeaderName>(section, "header", "the name of a header");
            let key = required_secret(section, "key", listen);
            let kind = header.zip(key).map(|(header, key)| KindConfig::ApiKey { header, key });
            (format!("api-key-{index}"), kind)
        }
        KindWord::Token => {
            let token = required_secret(section, "token", listen);
            (format!("token-{index}"), token.map(|token| KindConfig::Token { token }))
        }
        KindWord::Certificate => {
            let kind = read_certificate(section, folder).map(KindConfig::Certificate);
            (format!("certificate-{index}"), kind)
        }
        KindWord::Bearer => {
            (format!("bearer-{index}"), Some(KindConfig::Bearer(read_bearer(section))))
        }
    };
    Some(CredentialConfig { name: name.unwrap_or(default_name), kind: kind? })
}

fn required_secret(
    section: &mut Section<'_>,
    key: &'static str,
    listen: SocketAddr,
) -> Option<SecretSource> {
    let source = secret(section, key);
    if !section.has(key) {
        section.complain("", format!("needs the key `{key}`"));
    }
    if matches!(source, Some(SecretSource::Example(_))) && !listen.ip().is_loopback() {
        section.complain(
            key,
            format!(
                "an example {key} is only for trying out on loopback, and `listen.connector` is \
                 {listen}; set a real one: \"env:NAME\" or \"file:PATH\""
            ),
        );
    }
    source
}

fn parsed<T: FromStr>(section: &mut Section<'_>, key: &'static str, expected: &str) -> Option<T> {
    if !section.has(key) {
        section.complain("", format!("needs the key `{key}`"));
    }
    section.parsed(key, expected, |text| text.parse().ok())
}

fn read_certificate(section: &mut Section<'_>, folder: &Path) -> Option<CertificateConfig> {
    let thumbprints = section.list(
        "thumbprints",
        "thumbprints: 40 (SHA-1) or 64 (SHA-256) hexadecimal digits",
        |text| text.parse().ok(),
    );
    let names = section.sections("names", |pair| {
        let expected = "a distinguished name such as \"CN=api.contoso.onmicrosoft.com\"";
        let issuer = parsed::<DistinguishedName>(pair, "issuer", expected);
        let subject = parsed::<DistinguishedName>(pair, "subject", expected);
        issuer.zip(subject).map(|(issuer, subject)| NamePair { issuer, subject })
    });
    let roots = section.string("roots").map(|file| folder.join(file));
    let has_forwarded = section.has("forwarded");
    let forwarded = section.section("forwarded", |it| {
        if !it.is_present() {
            return None;
        }
        let header = parsed::<HeaderName>(it, "header", "the name of a header");
        let encodings = [
            ("base64-der", CertificateEncoding::Base64Der),
            ("url-escaped-pem", CertificateEncoding::UrlEscapedPem),
            ("xfcc", CertificateEncoding::Xfcc),
        ];
        let encoding = it.choice("encoding", &encodings, CertificateEncoding::Base64Der);
        let peers = it
            .list("peers", "networks such as \"10.0.0.0/8\"", |text| text.parse::<Network>().ok());
        Some(ForwardedCertificate { header: header?, encoding, peers })
    });
    if thumbprints.is_empty() && names.is_empty() {
        section.complain("", "needs `thumbprints`, or [[names]] with `issuer` and `subject`");
        return None;
    }
    if !names.is_empty() && roots.is_none() {
        section.complain(
            "names",
            "anybody can make a certificate with these names: add `roots`, a PEM file of those \
             who vouch for it",
        );
    }
    if let Some(forwarded) = &forwarded
        && forwarded.peers.is_empty()
    {
        section.complain("forwarded", "needs `peers`: the networks that the proxies call from");
    }
    let source = match (has_forwarded, forwarded) {
        (false, _) => CertificateSource::Connection,
        (true, forwarded) => CertificateSource::Forwarded(forwarded?),
    };
    let names = names.into_iter().flatten().collect();
    Some(CertificateConfig { source, thumbprints, names, roots })
}

fn read_bearer(section: &mut Section<'_>) -> BearerSettings {
    let metadata_url = section.required("metadata");
    let is_safe = metadata_url.starts_with("https://")
        || ["http://127.0.0.1", "http://localhost", "http://[::1]"]
            .iter()
            .any(|it| metadata_url.starts_with(it));
    if section.has("metadata") && !is_safe {
        section.complain(
            "metadata",
            "expected an https address, such as \
             \"https://contoso.ciamlogin.com/TENANT/v2.0/.well-known/openid-configuration\"",
        );
    }
    let mut list = |key| section.list(key, "texts", |text| Some(text.to_owned()));
    let (audiences, issuers, callers) = (list("audiences"), list("issuers"), list("callers"));
    let tenants = list("tenants");
    if audiences.is_empty() {
        section.complain("", "needs `audiences`: the id of your app registration");
    }
    let mut settings = BearerSettings::new(metadata_url, audiences);
    settings.issuers = issuers;
    settings.tenants = tenants;
    if section.has("callers") {
        settings.callers = callers;
    }
    if settings.callers.is_empty() {
        section.complain("callers", "tokens of any application would do: name at least one");
    }
    settings.leeway = section.duration("leeway", settings.leeway);
    settings.refresh_every = section.duration("refresh", settings.refresh_every);
    settings
}

#[cfg(test)]
mod tests {
    use crate::config::Config;

    const BEGINNING: &str = "[connectors.c]\nprotocol = \"custom-extension\"\n";

    fn parse(credential: &str) -> Result<Config, String> {
        let source = format!("{BEGINNING}[[connectors.c.credentials]]\n{credential}\n");
        Config::parse(std::path::Path::new("c.toml"), &source).map_err(|error| error.to_string())
    }

    #[test]
    fn each_kind_of_credential_has_its_keys() {
        for (credential, name) in [
            ("user = \"u\"\npassword = \"env:P\"", "u"),
            ("name = \"n\"\nkind = \"basic\"\nuser = \"u\"\npassword = \"file:p\"", "n"),
            ("kind = \"api-key\"\nheader = \"x-functions-key\"\nkey = \"env:K\"", "api-key-1"),
            ("kind = \"token\"\ntoken = \"env:T\"", "token-1"),
            (
                "kind = \"certificate\"\nthumbprints = [\"0123456789abcdef0123456789ABCDEF01234567\"]\n\
                 forwarded = { header = \"X-ARR-ClientCert\", encoding = \"base64-der\", peers = [\"10.0.0.0/8\"] }",
                "certificate-1",
            ),
            (
                "kind = \"certificate\"\nroots = \"roots.pem\"\n[[connectors.c.credentials.names]]\n\
                 issuer = \"CN=ca\"\nsubject = \"CN=api\"",
                "certificate-1",
            ),
            (
                "kind = \"bearer\"\nmetadata = \"https://login.example/.well-known/openid-configuration\"\n\
                 audiences = [\"app\"]\ntenants = [\"t\"]\nleeway = \"10s\"",
                "bearer-1",
            ),
        ] {
            let config = parse(credential).unwrap_or_else(|it| panic!("{credential}: {it}"));
            assert_eq!(config.connectors[0].credentials[0].name, name, "{credential}");
        }
    }

    #[test]
    fn what_lets_in_nobody_or_anybody_is_a_mistake() {
        for (credential, complaint) in [
            ("kind = \"api-key\"\nkey = \"env:K\"", "needs the key `header`"),
            ("kind = \"api-key\"\nheader = \"a b\"\nkey = \"env:K\"", "the name of a header"),
            ("kind = \"token\"", "needs the key `token`"),
            ("kind = \"token\"\ntoken = \"hunter2\"", "where the secret is"),
            ("kind = \"certificate\"", "needs `thumbprints`"),
            ("kind = \"certificate\"\nthumbprints = [\"12\"]", "40 (SHA-1) or 64"),
            (
                "kind = \"certificate\"\n[[connectors.c.credentials.names]]\nissuer = \"CN=a\"\nsubject = \"CN=b\"",
                "add `roots`",
            ),
            ("kind = \"bearer\"\naudiences = [\"a\"]", "needs the key `metadata`"),
            (
                "kind = \"bearer\"\nmetadata = \"http://login.example\"\naudiences = [\"a\"]",
                "https",
            ),
            ("kind = \"bearer\"\nmetadata = \"https://login.example\"", "needs `audiences`"),
            ("kind = \"oauth\"", "expected one of \"basic\""),
        ] {
            let complaints = parse(credential).expect_err(credential);
            assert!(complaints.contains(complaint), "{credential}: {complaints}");
            assert!(!complaints.contains("hunter2"), "{complaints}");
        }
    }

    #[test]
    fn a_credential_is_no_claim() {
        let forwarded = "kind = \"certificate\"\nthumbprints = [\"0123456789abcdef0123456789ABCDEF01234567\"]\n\
             forwarded = { header = \"X-ARR-ClientCert\", peers = [\"10.0.0.0/8\"] }";
        let key = "kind = \"api-key\"\nheader = \"x-functions-key\"\nkey = \"env:K\"";
        for (credential, header) in [(forwarded, "x-arr-clientcert"), (key, "X-Functions-Key")] {
            let claims = |header: &str| {
                let source = format!(
                    "[connectors.c]\nprotocol = \"custom-policy\"\nclaim_headers = [\"{header}\"]\n\
                     [[connectors.c.credentials]]\n{credential}\n"
                );
                Config::parse(std::path::Path::new("c.toml"), &source)
                    .map(drop)
                    .map_err(|error| error.to_string())
            };
            assert_eq!(claims("x-email"), Ok(()), "{credential}");
            let complaints = claims(header).expect_err(credential);
            assert!(complaints.contains("c.claim_headers: "), "{complaints}");
            assert!(complaints.contains("holds a credential"), "{complaints}");
        }
    }
}
