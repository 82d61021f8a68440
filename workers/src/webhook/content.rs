//! What is posted: the event as a CloudEvent, or what a template makes of it.
//!
//! Templates see `event`, the CloudEvent as it is published (`event.id`, `event.data.email`), and
//! `signup` as rules do. Every value is written as JSON, quotes included, so that nothing that a
//! person typed can become more than a value. What an event does not have is `null`.

use minijinja::{AutoEscape, Environment, UndefinedBehavior, value::Serde};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use serde::{Serialize, de::IgnoredAny};
use serde_json::{Map, Value};
use vestibule_events::{SignUpEvent, expression};

use super::WebhookMode;
use crate::{
    Cause, HandleError,
    claims::{SignUpView, sample},
};

const CLOUD_EVENT: HeaderValue = HeaderValue::from_static("application/cloudevents+json");
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// What a value of a `ce-…` header cannot hold as it is; beyond ASCII nothing can.
const NOT_IN_A_HEADER: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');

/// How an event becomes a message.
#[derive(Debug)]
pub(super) struct Content {
    mode: WebhookMode,
    template: Option<Template>,
}

/// Holds personal data, so it has no `Debug`.
pub(super) struct Message {
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

impl Content {
    pub(super) fn new(mode: WebhookMode, template: Option<&str>) -> Result<Self, String> {
        Ok(Self { mode, template: template.map(Template::compile).transpose()? })
    }

    pub(super) fn of(&self, event: &SignUpEvent) -> Result<Message, TemplateFailed> {
        let rendered = self.template.as_ref().map(|it| it.render(event)).transpose()?;
        let is_rendered = rendered.is_some();
        let (mut headers, data) = match self.mode {
            WebhookMode::Structured => (HeaderMap::new(), serde_json::to_vec(event)),
            WebhookMode::Binary => {
                let mut envelope = envelope(event);
                let data = envelope.remove("data").unwrap_or_default();
                envelope.remove("datacontenttype");
                if is_rendered {
                    // It is the schema of our data, and not of the template's.
                    envelope.remove("dataschema");
                }
                (attributes(&envelope), serde_json::to_vec(&data))
            }
        };
        let is_cloud_event = self.mode == WebhookMode::Structured && !is_rendered;
        headers.insert(CONTENT_TYPE, if is_cloud_event { CLOUD_EVENT } else { JSON });
        let body = rendered.unwrap_or_else(|| data.expect("an event serialises"));
        Ok(Message { headers, body })
    }
}

fn envelope(event: &SignUpEvent) -> Map<String, Value> {
    match serde_json::to_value(event) {
        Ok(Value::Object(envelope)) => envelope,
        _ => unreachable!("an event serialises as an object"),
    }
}

/// The context attributes, each as a header.
fn attributes(envelope: &Map<String, Value>) -> HeaderMap {
    let header = |(name, value): (&String, &Value)| {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let text = utf8_percent_encode(&text, NOT_IN_A_HEADER).to_string();
        let name = HeaderName::try_from(format!("ce-{name}"));
        let name = name.expect("names of attributes are lower-case letters and digits");
        (name, HeaderValue::try_from(text).expect("what is left is printable ASCII"))
    };
    envelope.iter().map(header).collect()
}

/// Made once, rendered with each event.
#[derive(Debug)]
struct Template(Environment<'static>);

/// A template that failed with an event. Says where, and nothing of the event.
#[derive(Debug, thiserror::Error)]
pub(super) enum TemplateFailed {
    #[error("could not render the template, line {line}: {what:?}")]
    Render { line: usize, what: minijinja::ErrorKind },
    #[error("what the template makes of this event is no JSON")]
    NoJson,
}

impl From<TemplateFailed> for HandleError {
    fn from(failed: TemplateFailed) -> Self {
        Self::park(Cause::InvalidTemplate, failed)
    }
}

#[derive(Serialize)]
struct View<'a> {
    event: &'a SignUpEvent,
    signup: SignUpView<'a>,
}

const NAME: &str = "template";

impl Template {
    /// Finds what would fail with every event.
    fn compile(source: &str) -> Result<Self, String> {
        let mut environment = Environment::new();
        // With `debug`, errors would quote the variables around them: personal data.
        environment.set_debug(false);
        environment.set_undefined_behavior(UndefinedBehavior::Chainable);
        environment.set_auto_escape_callback(|_| AutoEscape::Json);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|error| in_words(&error))?;
        let it = Self(environment);
        it.knows_its_names()?;
        // Nobody's event, so that what is wrong may be told.
        let rendered = it.write(&sample()).map_err(|error| in_words(&error))?;
        serde_json::from_str::<IgnoredAny>(&rendered).map_err(|error| {
            format!(
                "makes no JSON of a sample ({error}); values are written with their quotes: \
                 {{{{ event.id }}}}, not \"{{{{ event.id }}}}\""
            )
        })?;
        Ok(it)
    }

    fn knows_its_names(&self) -> Result<(), String> {
        let template = self.0.get_template(NAME).map_err(|error| in_words(&error))?;
        let traceparent =
            Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned());
        let of_event = envelope(&SignUpEvent { traceparent, ..sample() });
        let is_known = |path: &String| {
            let mut parts = path.split('.');
            match (parts.next().unwrap_or_default(), parts.next()) {
                ("event", Some(member)) => of_event.contains_key(member),
                ("signup", Some(member)) => expression::MEMBERS.contains(&member),
                ("event" | "signup", None) => true,
                (name, _) => self.0.globals().any(|(global, _)| global == name),
            }
        };
        let mentioned = template.undeclared_variables(true);
        let mut unknown: Vec<_> = mentioned.into_iter().filter(|path| !is_known(path)).collect();
        unknown.sort_unstable();
        if unknown.is_empty() {
            return Ok(());
        }
        Err(format!(
            "there is no `{}`; templates know the event (event.id, event.data.email) and signup",
            unknown.join("`, `")
        ))
    }

    fn render(&self, event: &SignUpEvent) -> Result<Vec<u8>, TemplateFailed> {
        let rendered = self.write(event).map_err(|error| TemplateFailed::Render {
            line: error.line().unwrap_or_default(),
            what: error.kind(),
        })?;
        serde_json::from_str::<IgnoredAny>(&rendered).map_err(|_| TemplateFailed::NoJson)?;
        Ok(rendered.into_bytes())
    }

    fn write(&self, event: &SignUpEvent) -> Result<String, minijinja::Error> {
        let view = View { event, signup: SignUpView::of(event) };
        self.0.get_template(NAME)?.render(Serde(view))
    }
}

/// Only for errors with the sample: they may quote it.
fn in_words(error: &minijinja::Error) -> String {
    let detail = error.detail().map(|it| format!(": {it}")).unwrap_or_default();
    match error.line() {
        Some(line) => format!("line {line}: {}{detail}", error.kind()),
        None => format!("{}{detail}", error.kind()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn made(mode: WebhookMode, template: Option<&str>, event: &SignUpEvent) -> (HeaderMap, Value) {
        let Message { headers, body } = Content::new(mode, template).unwrap().of(event).unwrap();
        (headers, serde_json::from_slice(&body).unwrap())
    }

    #[test]
    fn a_structured_message_is_the_event() {
        let (headers, body) = made(WebhookMode::Structured, None, &sample());
        assert_eq!(headers[CONTENT_TYPE], "application/cloudevents+json");
        assert_eq!(headers.len(), 1);
        assert_eq!(body, serde_json::to_value(sample()).unwrap());
    }

    #[test]
    fn a_binary_message_has_the_attributes_in_headers_and_the_data_in_the_body() {
        let event = SignUpEvent { traceparent: Some("00-0a-0b-01".into()), ..sample() };
        let (headers, body) = made(WebhookMode::Binary, None, &event);
        let mut whole = envelope(&event);
        assert_eq!(body, whole.remove("data").unwrap());
        assert_eq!(
            headers[CONTENT_TYPE],
            whole.remove("datacontenttype").unwrap().as_str().unwrap()
        );
        assert_eq!(headers["ce-specversion"], "1.0");
        assert_eq!(headers["ce-type"], "dev.vestibule.signup.accepted");
        for (name, value) in &whole {
            assert_eq!(headers[format!("ce-{name}")], value.as_str().unwrap(), "{name}");
        }
        assert_eq!(headers.len(), whole.len() + 1);
    }

    #[test]
    fn what_cannot_stand_in_a_header_is_encoded() {
        let attribute = |value: &str| {
            let envelope = json!({ "subject": value }).as_object().unwrap().clone();
            attributes(&envelope)["ce-subject"].to_str().unwrap().to_owned()
        };
        // The example of the specification.
        assert_eq!(attribute("Euro € 😀"), "Euro%20%E2%82%AC%20%F0%9F%98%80");
        assert_eq!(attribute("a \"b\" 100%\r\nx: y\u{7f}"), "a%20%22b%22%20100%25%0D%0Ax:%20y%7F");
        assert_eq!(attribute("/connectors/x?y=z&a=b'~"), "/connectors/x?y=z&a=b'~");
    }

    #[test]
    fn a_template_makes_the_body_and_values_stay_values() {
        let template = r#"{"id": {{ event.id }}, "who": {{ signup.email }}, "to": {{ event.data.claims.displayName }},
            "none": {{ event.data.claims.nothing.at.all }}, "all": {{ event.data.claims }},
            "trace": {{ event.traceparent }}{% if signup.locale %}, "locale": {{ signup.locale | upper }}{% endif %}}"#;
        let mut event = sample();
        let hostile = "x\", \"admin\": true, \"y\": \"</script>\n{{ event.id }}";
        event.sign_up.claims.insert("displayName".into(), json!(hostile));
        let (headers, body) = made(WebhookMode::Structured, Some(template), &event);
        assert_eq!(headers[CONTENT_TYPE], "application/json");
        assert_eq!(body["id"], event.id.to_string());
        assert_eq!(body["who"], "sample@example.com");
        assert_eq!(body["to"], hostile);
        assert_eq!(body["none"], Value::Null);
        assert_eq!(body["trace"], Value::Null);
        assert_eq!(body["all"]["givenName"], "Sam");
        assert_eq!(body.get("admin"), None);

        let (headers, body) = made(WebhookMode::Binary, Some("[{{ event.type }}]"), &event);
        assert_eq!(body, json!(["dev.vestibule.signup.accepted"]));
        assert_eq!(headers["ce-id"], event.id.to_string());
        assert!(!headers.contains_key("ce-dataschema"), "it is not of this body");
    }

    #[test]
    fn what_cannot_work_is_found_before_the_first_event() {
        for (template, message) in [
            ("{{ signup.emial }}", "signup.emial"),
            ("{{ event.kind }}", "event.kind"),
            ("{{ user }}", "`user`"),
            ("{{ event.id", "line 1"),
            ("{{ event.id | shout }}", "shout"),
            ("\"{{ event.id }}\"", "not \"{{ event.id }}\""),
            ("", "no JSON"),
            ("{} {}", "no JSON"),
        ] {
            let fault = Content::new(WebhookMode::Structured, Some(template)).unwrap_err();
            assert!(fault.contains(message), "{template}: {fault}");
        }
    }

    #[test]
    fn a_failure_with_an_event_parks_it_and_says_nothing_of_it() {
        let mut event = sample();
        event.sign_up.claims.insert("displayName".into(), json!("secret"));
        for (template, message) in [
            (
                "{% if signup.claims.displayName == 'secret' %}{{ signup.claims.displayName | int }}{% endif %}1",
                "line 1",
            ),
            ("1 {% if signup.claims.displayName == 'secret' %}secret{% endif %}", "no JSON"),
        ] {
            let content = Content::new(WebhookMode::Structured, Some(template)).unwrap();
            let failed = content.of(&event).err().unwrap();
            let text = failed.to_string();
            assert!(text.contains(message) && !text.contains("secret"), "{text}");
            let error = HandleError::from(failed);
            assert!(matches!(error, HandleError::Park { cause: Cause::InvalidTemplate, .. }));
        }
    }
}
