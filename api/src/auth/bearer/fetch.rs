//! Where an issuer publishes its name and its keys.

use std::time::Duration;

use reqwest::{Client, StatusCode, Url};
use serde::Deserialize;
use tokio::time::timeout;

use super::keys::Keys;

/// Why the keys could not be fetched; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("could not reach {0}")]
    Unreachable(Url, #[source] reqwest::Error),
    #[error("{0} did not answer in time")]
    Late(Url),
    #[error("{0} answered with status {1}")]
    Status(Url, StatusCode),
    #[error("{0} redirects, which is not followed")]
    Redirected(Url),
    #[error("the answer of {0} is too long")]
    TooLong(Url),
    #[error("{0} does not answer with the metadata of an issuer")]
    NotMetadata(Url),
    #[error("{0} is about every tenant; its address must name one")]
    EveryTenant(Url),
    #[error("the metadata names {0} as the place of the keys, which must begin with https")]
    NotPrivate(Url),
    #[error("{0} has no key that could be used")]
    NoKeys(Url),
}

#[derive(Deserialize)]
struct Metadata {
    issuer: String,
    jwks_uri: String,
}

const TIME_MAX: Duration = Duration::from_secs(10);
/// Entra's are at 2 and 20 KB.
const BYTES_MAX: usize = 512 * 1024;

/// The issuer, letter by letter as it will be in tokens, and its keys.
pub(super) async fn fetch(client: &Client, metadata: &Url) -> Result<(String, Keys), FetchError> {
    let body = get(client, metadata).await?;
    let read = serde_json::from_slice::<Metadata>(&body).ok();
    let parsed = read.and_then(|it| Some((it.issuer, Url::parse(&it.jwks_uri).ok()?)));
    let (issuer, jwks_uri) = parsed.ok_or_else(|| FetchError::NotMetadata(metadata.clone()))?;
    // A template, `https://login.microsoftonline.com/{tenantid}/v2.0`, is the issuer of no token.
    if issuer.contains('{') {
        return Err(FetchError::EveryTenant(metadata.clone()));
    }
    if !is_private(&jwks_uri) {
        return Err(FetchError::NotPrivate(jwks_uri));
    }
    let keys = Keys::read(&get(client, &jwks_uri).await?);
    Ok((issuer, keys.ok_or(FetchError::NoKeys(jwks_uri))?))
}

/// Whether nobody on the way can put in keys of their own.
pub(super) fn is_private(url: &Url) -> bool {
    url.scheme() == "https"
        || url.scheme() == "http"
            && match url.host_str() {
                Some("localhost" | "[::1]") => true,
                Some(host) => {
                    host.parse::<std::net::Ipv4Addr>().is_ok_and(|address| address.is_loopback())
                }
                None => false,
            }
}

async fn get(client: &Client, url: &Url) -> Result<Vec<u8>, FetchError> {
    // Without the address in the error of the library: ours has it already.
    let unreachable =
        |error: reqwest::Error| FetchError::Unreachable(url.clone(), error.without_url());
    let fetch = async {
        let mut answer = client.get(url.clone()).send().await.map_err(unreachable)?;
        // The client may be one that follows: where it ends up is not where we wanted to go.
        if answer.url() != url || answer.status().is_redirection() {
            return Err(FetchError::Redirected(url.clone()));
        }
        if answer.status() != StatusCode::OK {
            return Err(FetchError::Status(url.clone(), answer.status()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(unreachable)? {
            if body.len() + chunk.len() > BYTES_MAX {
                return Err(FetchError::TooLong(url.clone()));
            }
            body.extend_from_slice(&chunk);
        }
        Ok(body)
    };
    timeout(TIME_MAX, fetch).await.unwrap_or_else(|_| Err(FetchError::Late(url.clone())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_needs_no_tls() {
        let private = |url: &str| is_private(&url.parse().unwrap());
        for url in
            ["https://login.test/x", "http://127.0.0.1:1/", "http://localhost/", "http://[::1]/"]
        {
            assert!(private(url), "{url}");
        }
        for url in ["http://login.test/", "http://127.0.0.1.test/", "http://10.0.0.1/", "file:///x"]
        {
            assert!(!private(url), "{url}");
        }
    }
}
