//! Questions to an HTTP service: one request, and what its JSON answer means.
//!
//! No redirects, which would carry the arguments to somebody nobody configured; no proxies but
//! those configured, and none are; no more of an answer than was said. Unless it is allowed, no
//! connection to a private address: an argument must not turn a lookup into a way to the machines
//! behind it. Faults never quote a URL, since arguments stand in it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    sync::Once,
    time::Duration,
};

use reqwest::{
    Certificate, Client, Response, StatusCode,
    header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue},
    redirect,
};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Map, Value};

use super::{
    Failed, Found, LookupFailure, SettingFault,
    address::{self, PublicOnly},
    template::Template,
};

/// How an HTTP service is asked.
#[derive(Clone)]
pub struct HttpSettings {
    /// An argument goes where its name stands in braces (`https://crm.example/people/{id}`), in the
    /// path or the query.
    pub url: String,
    pub method: HttpMethod,
    /// Names of the arguments, in the order in which they are given. Those that the URL does not
    /// name become parameters of the query (GET) or members of a JSON object (POST).
    pub arguments: Vec<String>,
    pub headers: Vec<(String, SecretString)>,
    /// What is taken from the answer: a name, and a JSON pointer to its value. Empty: the answer is
    /// an object, and is taken as it is.
    pub fields: BTreeMap<String, String>,
    /// Allows connections to private addresses.
    pub allow_private: bool,
    /// Certificate authorities (PEM) to be trusted besides those of the system.
    pub ca_file: Option<PathBuf>,
    pub answer_bytes_max: usize,
}

impl HttpSettings {
    pub const ANSWER_BYTES_MAX: usize = 64 * 1024;
}

/// Leaves URL and headers out: keys may stand in them.
impl fmt::Debug for HttpSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpSettings")
            .field("method", &self.method)
            .field("arguments", &self.arguments)
            .field("fields", &self.fields)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HttpMethod {
    #[default]
    Get,
    Post,
}

pub(super) struct Http {
    client: Client,
    method: HttpMethod,
    template: Template,
    headers: HeaderMap,
    /// Which arguments are members of the body.
    members: Vec<(usize, String)>,
    fields: Vec<(String, String)>,
    answer_bytes_max: usize,
}

/// Set by us or by HTTP itself.
const OURS: [&str; 6] =
    ["accept", "connection", "content-length", "content-type", "host", "transfer-encoding"];

impl Http {
    pub(super) fn new(
        settings: HttpSettings,
        time_limit: Duration,
        faults: &mut Vec<SettingFault>,
    ) -> Option<Self> {
        let before = faults.len();
        let HttpSettings { url, method, arguments, headers, fields, allow_private, .. } = settings;
        let headers = parse_headers(&headers, faults);
        check_fields(&fields, faults);

        let mut names = BTreeSet::new();
        for name in &arguments {
            if name.is_empty() || !names.insert(name) {
                faults.push(("arguments", format!("the name `{name}` is empty or given twice")));
            }
        }
        let in_query = method == HttpMethod::Get;
        let template = Template::parse(&url, &arguments, in_query)
            .map_err(|fault| faults.push(("url", fault)))
            .ok();
        let literal = template.as_ref().and_then(|it| address::literal(it.host()));
        if !allow_private && literal.is_some_and(|it| !address::is_public(it)) {
            let fault = "must not be a private address, unless `allow_private` is set".to_owned();
            faults.push(("url", fault));
        }
        let members = match (&template, method) {
            (Some(template), HttpMethod::Post) => {
                let names = arguments.into_iter().enumerate();
                names.filter(|(place, _)| !template.holds(*place)).collect()
            }
            _ => Vec::new(),
        };
        let roots = settings.ca_file.map_or_else(|| Ok(Vec::new()), read_roots);
        let client = roots
            .map_err(|fault| faults.push(("ca_file", fault)))
            .and_then(|roots| {
                client(roots, allow_private, time_limit).map_err(|error| {
                    // The configuration of a client, and not yet a URL.
                    let error = error.without_url();
                    faults.push(("url", format!("no HTTPS client can be made: {error}")));
                })
            })
            .ok();
        if faults.len() > before {
            return None;
        }
        Some(Self {
            client: client?,
            method,
            template: template?,
            headers,
            members,
            fields: fields.into_iter().collect(),
            answer_bytes_max: settings.answer_bytes_max,
        })
    }

    pub(super) async fn ask(&self, arguments: &[Value]) -> Result<Option<Found>, Failed> {
        let url = self.template.fill(arguments).ok_or_else(Failed::arguments)?;
        let request = match self.method {
            HttpMethod::Get => self.client.get(url),
            HttpMethod::Post => {
                let request = self.client.post(url);
                if self.members.is_empty() {
                    request
                } else {
                    let members = self.members.iter();
                    let body: Map<String, Value> = members
                        .map(|(place, name)| (name.clone(), arguments[*place].clone()))
                        .collect();
                    request
                        .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
                        .body(Value::Object(body).to_string())
                }
            }
        };
        let answer = request
            .headers(self.headers.clone())
            .header(ACCEPT, HeaderValue::from_static("application/json"))
            .send()
            .await
            .map_err(|error| not_answered(&error))?;

        match answer.status() {
            StatusCode::NOT_FOUND => return Ok(None),
            status if !status.is_success() => return Err(refused(status)),
            _ => {}
        }
        let body = self.read(answer).await?;
        let unreadable = || Failed::bad_answer("its answer is not the JSON that was expected");
        let answer: Value = serde_json::from_slice(&body).map_err(|_| unreadable())?;
        let answer = pick(answer, &self.fields).ok_or_else(unreadable)?;
        Ok(Some(Found { answer, bytes: body.len() }))
    }

    async fn read(&self, mut answer: Response) -> Result<Vec<u8>, Failed> {
        let too_large = || Failed::bad_answer("its answer is too large");
        let mut body = Vec::new();
        while let Some(piece) = answer.chunk().await.map_err(|error| not_answered(&error))? {
            if body.len() + piece.len() > self.answer_bytes_max {
                return Err(too_large());
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }
}

/// The fields of the answer; without any, the answer itself. What is null or not there is left out.
fn pick(answer: Value, fields: &[(String, String)]) -> Option<Map<String, Value>> {
    if fields.is_empty() {
        return match answer {
            Value::Object(members) => Some(members),
            _ => None,
        };
    }
    let found = fields.iter().filter_map(|(name, pointer)| {
        let value = answer.pointer(pointer).filter(|it| !it.is_null())?;
        Some((name.clone(), value.clone()))
    });
    Some(found.collect())
}

fn check_fields(fields: &BTreeMap<String, String>, faults: &mut Vec<SettingFault>) {
    for (name, pointer) in fields {
        if name.is_empty() || name == super::FOUND {
            faults.push(("fields", format!("`{name}` cannot be the name of a field")));
        }
        if !pointer.is_empty() && !pointer.starts_with('/') {
            let fault = format!("`{pointer}` is no JSON pointer: these begin with a slash");
            faults.push(("fields", fault));
        }
    }
}

fn parse_headers(headers: &[(String, SecretString)], faults: &mut Vec<SettingFault>) -> HeaderMap {
    let mut parsed = HeaderMap::new();
    for (name, value) in headers {
        if OURS.contains(&name.to_ascii_lowercase().as_str()) {
            faults.push(("headers", format!("`{name}` is set by Vestibule itself")));
            continue;
        }
        let header = (HeaderName::try_from(name), HeaderValue::try_from(value.expose_secret()));
        if let (Ok(name), Ok(mut value)) = header {
            value.set_sensitive(true);
            parsed.append(name, value);
        } else {
            faults.push(("headers", format!("`{name}` is no header, or its value cannot be one")));
        }
    }
    parsed
}

fn read_roots(file: PathBuf) -> Result<Vec<Certificate>, String> {
    let file_name = file.display();
    let pem = std::fs::read(&file).map_err(|error| format!("cannot read {file_name}: {error}"))?;
    match Certificate::from_pem_bundle(&pem) {
        Ok(roots) if !roots.is_empty() => Ok(roots),
        _ => Err(format!("{file_name} holds no certificate that can be read")),
    }
}

fn client(
    roots: Vec<Certificate>,
    allow_private: bool,
    time_limit: Duration,
) -> reqwest::Result<Client> {
    install_tls_provider();
    let client = Client::builder()
        .user_agent(concat!("vestibule/", env!("CARGO_PKG_VERSION")))
        .redirect(redirect::Policy::none())
        .no_proxy()
        .tls_certs_merge(roots)
        .connect_timeout(time_limit)
        .timeout(time_limit);
    if allow_private { client } else { client.dns_resolver(PublicOnly) }.build()
}

/// Makes ring the provider of TLS in this process, once; what was installed before stays.
fn install_tls_provider() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // An error only says that the process has one already, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}

fn not_answered(error: &reqwest::Error) -> Failed {
    if address::is_refusal(error) {
        return Failed::source(
            LookupFailure::PrivateAddress,
            "its name stands for private addresses only",
        );
    }
    if error.is_timeout() {
        return Failed::source(LookupFailure::Late, "it did not answer in time");
    }
    let cause = if error.is_connect() { "it cannot be reached" } else { "the connection broke" };
    Failed::source(LookupFailure::Unavailable, cause)
}

/// What a status means that is no success. A service that dislikes the arguments is not ill; one
/// that dislikes us, or has too much to do, is left alone for a while.
fn refused(status: StatusCode) -> Failed {
    let cause = format!("it answered with status {}", status.as_u16());
    match status {
        StatusCode::UNAUTHORIZED
        | StatusCode::FORBIDDEN
        | StatusCode::REQUEST_TIMEOUT
        | StatusCode::TOO_MANY_REQUESTS => Failed::source(LookupFailure::Unavailable, cause),
        _ if status.is_client_error() => Failed::bad_answer(cause),
        _ => Failed::source(LookupFailure::Unavailable, cause),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn picked(answer: Value, fields: &[(&str, &str)]) -> Option<Value> {
        let fields: Vec<_> =
            fields.iter().map(|(name, at)| ((*name).to_owned(), (*at).to_owned())).collect();
        pick(answer, &fields).map(Value::Object)
    }

    #[test]
    fn an_answer_is_taken_whole_or_field_by_field() {
        let answer = json!({ "verified": true, "who": { "age": 36, "tags": ["a", null] } });
        assert_eq!(picked(answer.clone(), &[]), Some(answer.clone()));
        assert_eq!(picked(json!([1]), &[]), None, "only an object has names");
        let fields =
            [("ok", "/verified"), ("tag", "/who/tags/0"), ("no", "/who/tags/1"), ("gone", "/x")];
        assert_eq!(picked(answer, &fields), Some(json!({ "ok": true, "tag": "a" })));
        assert_eq!(picked(json!(7), &[("all", "")]), Some(json!({ "all": 7 })));
    }

    #[test]
    fn all_mistakes_are_told_at_once_and_no_secret_is() {
        let settings = HttpSettings {
            url: "http://127.0.0.1/x?key=hunter2".into(),
            method: HttpMethod::Get,
            arguments: vec!["a".into(), "a".into()],
            headers: vec![
                ("host".into(), "hunter2".into()),
                ("x y".into(), "hunter2".into()),
                ("x-key".into(), "hunter2\n".into()),
            ],
            fields: BTreeMap::from([("found".into(), "x".into())]),
            allow_private: false,
            ca_file: Some("/nowhere/ca.pem".into()),
            answer_bytes_max: 10,
        };
        assert!(!format!("{settings:?}").contains("hunter2"));
        let mut faults = Vec::new();
        assert!(Http::new(settings, Duration::from_secs(1), &mut faults).is_none());
        let keys: Vec<_> = faults.iter().map(|(key, _)| *key).collect();
        let expected =
            ["headers", "headers", "headers", "fields", "fields", "arguments", "url", "ca_file"];
        assert_eq!(keys, expected, "{faults:#?}");
        assert!(!format!("{faults:?}").contains("hunter2"));
    }

    #[test]
    fn who_dislikes_the_arguments_is_not_ill() {
        for (status, failure, is_ill) in [
            (400, LookupFailure::BadAnswer, false),
            (422, LookupFailure::BadAnswer, false),
            (301, LookupFailure::Unavailable, true),
            (401, LookupFailure::Unavailable, true),
            (429, LookupFailure::Unavailable, true),
            (500, LookupFailure::Unavailable, true),
        ] {
            let failed = refused(StatusCode::from_u16(status).unwrap());
            assert_eq!((failed.failure, failed.is_ill), (failure, is_ill), "{status}");
        }
    }
}
