//! `[webhook]`: a subscriber that is called over HTTP.

use std::{path::PathBuf, time::Duration};

use anyhow::Context;
use data_encoding::BASE64;
use secrecy::SecretString;
use vestibule_workers::{
    SettingError, WebhookAuth, WebhookMode, WebhookSettings, WebhookSubscriber,
};

use super::{Place, Text};
use crate::config::{SecretSource, reader::Section, secret};

/// Where events are posted to, and how.
#[derive(Debug)]
pub(crate) struct WebhookConfig {
    pub(crate) url: Text,
    keys: Vec<SecretSource>,
    mode: WebhookMode,
    template: Option<String>,
    headers: Vec<(String, Text)>,
    auth: Option<AuthConfig>,
    pub(super) authorities: Option<PathBuf>,
    networks: Vec<ipnet::IpNet>,
}

#[derive(Debug)]
enum AuthConfig {
    ClientCredentials {
        token_url: String,
        client_id: String,
        client_secret: SecretSource,
        scope: Option<String>,
    },
    Certificate(SecretSource),
}

impl WebhookConfig {
    /// What the worker needs. `timeout` is of an attempt.
    pub(super) fn settings(
        &self,
        name: &str,
        timeout: Duration,
    ) -> anyhow::Result<WebhookSettings> {
        let mut settings = self.settings_with(name, timeout, SecretSource::fetch)?;
        if let Some(file) = &self.authorities {
            let authorities = std::fs::read_to_string(file);
            settings.authorities = Some(authorities.with_context(|| {
                format!("could not read the authorities in {}", file.display())
            })?);
        }
        Ok(settings)
    }

    /// What is wrong with it as far as can be told without its secrets.
    fn complaints(&self, name: &str) -> Vec<SettingError> {
        let stand_in = |_: &SecretSource| Ok(SecretString::from("https://stand-in.invalid/"));
        let settings = self.settings_with(name, Duration::from_secs(20), stand_in);
        let mut settings = settings.expect("a stand-in is always there");
        settings.keys = vec![format!("whsec_{}", BASE64.encode(&[7; 32])).into()];
        settings.auth = settings.auth.filter(|it| !matches!(it, WebhookAuth::Certificate(_)));
        WebhookSubscriber::check(&settings).err().unwrap_or_default()
    }

    /// With the secrets that `fetch` brings, and without further files.
    fn settings_with(
        &self,
        name: &str,
        timeout: Duration,
        fetch: impl Fn(&SecretSource) -> anyhow::Result<SecretString>,
    ) -> anyhow::Result<WebhookSettings> {
        let header = |(name, value): &(String, Text)| Ok((name.clone(), value.fetch(&fetch)?));
        let auth = match &self.auth {
            None => None,
            Some(AuthConfig::Certificate(source)) => Some(WebhookAuth::Certificate(fetch(source)?)),
            Some(AuthConfig::ClientCredentials { token_url, client_id, client_secret, scope }) => {
                Some(WebhookAuth::ClientCredentials {
                    token_url: token_url.clone(),
                    client_id: client_id.clone(),
                    client_secret: fetch(client_secret)?,
                    scope: scope.clone(),
                })
            }
        };
        Ok(WebhookSettings {
            name: name.to_owned(),
            url: self.url.fetch(&fetch)?,
            keys: self.keys.iter().map(&fetch).collect::<anyhow::Result<_>>()?,
            mode: self.mode,
            template: self.template.clone(),
            headers: self.headers.iter().map(header).collect::<anyhow::Result<_>>()?,
            auth,
            authorities: None,
            // The rest of an attempt is for a token, and for us to say what became of it.
            timeout: timeout * 3 / 4,
            networks: self.networks.clone(),
        })
    }

    pub(super) fn secrets(&self) -> Vec<&SecretSource> {
        let texts = [&self.url].into_iter().chain(self.headers.iter().map(|(_, it)| it));
        let mut secrets: Vec<_> = texts.filter_map(Text::source).chain(&self.keys).collect();
        match &self.auth {
            Some(AuthConfig::ClientCredentials { client_secret: it, .. }) => secrets.push(it),
            Some(AuthConfig::Certificate(it)) => secrets.push(it),
            None => {}
        }
        secrets
    }
}

const KEYS_EXPECTED: &str = "at least one secret, each \"env:NAME\" or \"file:PATH\"";

/// The webhook that the table asks for, unless something in it is missing.
pub(super) fn read(section: &mut Section<'_>, place: Place<'_>) -> Option<WebhookConfig> {
    let url = section.private("url", Text::URL_EXPECTED, Text::url);
    let keys = section.value("keys", KEYS_EXPECTED, |value| {
        // A wrong one may be the key itself.
        let hidden = || "something else, not repeated here".to_owned();
        let items = value.as_array().filter(|it| !it.is_empty()).ok_or_else(hidden)?;
        let keys = items.iter().map(|it| it.get_ref().as_str().and_then(SecretSource::parse));
        keys.collect::<Option<_>>().ok_or_else(hidden)
    });
    let keys: Vec<_> = keys.unwrap_or_default();
    let modes = [("structured", WebhookMode::Structured), ("binary", WebhookMode::Binary)];
    let mode = section.choice("mode", &modes, WebhookMode::Structured);
    let template = section.string("template");
    let headers = section.strings("headers").into_iter().map(|(name, it)| (name, Text::of(&it)));
    let headers = headers.collect();
    let auth = section.section("auth", read_auth);
    let authorities = section.string("authorities").map(|it| place.folder.join(it));
    let networks =
        section.list("networks", "networks such as \"10.1.0.0/16\"", |it| it.parse().ok());
    for key in ["url", "keys"] {
        if !section.has(key) && !section.has_unknown() {
            section.complain("", format!("needs the key `{key}`"));
        }
    }
    let config =
        WebhookConfig { url: url?, keys, mode, template, headers, auth, authorities, networks };
    if section.has("keys") {
        for complaint in config.complaints(place.name) {
            section.complain(complaint.key, complaint.message);
        }
    }
    Some(config)
}

fn read_auth(section: &mut Section<'_>) -> Option<AuthConfig> {
    if !section.is_present() {
        return None;
    }
    if section.has("certificate") {
        return secret(section, "certificate").map(AuthConfig::Certificate);
    }
    if !section.has("client_secret") {
        section.complain(
            "",
            "needs either `certificate`, or `token_url`, `client_id` and `client_secret`",
        );
    }
    let token_url = section.required("token_url");
    let client_id = section.required("client_id");
    let client_secret = secret(section, "client_secret");
    let scope = section.string("scope");
    let client_secret = client_secret?;
    Some(AuthConfig::ClientCredentials { token_url, client_id, client_secret, scope })
}
