//! What a message says: templates, compiled and tried once, rendered with each event.
//!
//! Templates see `event` (id, kind, time, person), `signup` as rules do, `decision` (action,
//! message, rules), and `approval`: of an event that waits for an approver where they decide and
//! until when (link, expires_at), of a decision who decided and why (approver, reason). What the
//! platform did not send, and what an event does not have, renders as nothing.

use minijinja::{AutoEscape, Environment, UndefinedBehavior, value::Serde};
use serde::Serialize;
use time::format_description::well_known::Rfc3339;
use vestibule_events::{Kind, SignUpEvent, expression, for_languages, normal_language};

use super::{
    channels::Fault,
    settings::{ApprovalPages, ChannelSettings, LocaleSettings},
};
use crate::claims::{SignUpView, sample};

const SUBJECT: &str = "subject";
const BODY: &str = "body";
const LOCALES: &str = "locales";
const VARIABLES: [&str; 4] = ["event", "signup", "decision", "approval"];

/// The one member that we cannot make without knowing where approvers decide.
const LINK: &str = "approval.link";

/// Mail programs show less, and some servers refuse more.
const SUBJECT_CHARS_MAX: usize = 200;

/// What Teams takes, with room for the card around it. Claims may be long; messages are not.
const BODY_CHARS_MAX: usize = 16 * 1024;

/// A subject and a body that can be rendered, in one or more languages.
#[derive(Debug)]
pub(super) struct Templates {
    /// The language of the channel itself is the first.
    languages: Vec<(String, Environment<'static>)>,
    pages: Option<ApprovalPages>,
}

/// Rendered. Holds personal data, so it has no `Debug`.
pub(super) struct Message {
    /// One line, never empty.
    pub(super) subject: String,
    pub(super) body: String,
}

/// A template that failed with an event. Says where, and nothing of the event.
#[derive(Debug, thiserror::Error)]
#[error("could not render the template `{template}`, line {line}: {what:?}")]
pub(super) struct RenderFailed {
    template: &'static str,
    line: usize,
    what: minijinja::ErrorKind,
}

impl Templates {
    pub(super) fn compile(
        settings: &ChannelSettings,
        pages: Option<ApprovalPages>,
        faults: &mut Vec<Fault>,
    ) -> Option<Self> {
        let mut languages: Vec<(String, Environment<'static>)> = Vec::new();
        let before = faults.len();
        let ChannelSettings { subject, body, language, locales, .. } = settings;
        if let Some(environment) = compile(subject, body, pages.as_ref(), faults) {
            languages.push((normal_language(language), environment));
        }
        for LocaleSettings { language, subject, body } in locales {
            let mut wrong = Vec::new();
            let tag = normal_language(language);
            if languages.iter().any(|(it, _)| *it == tag) {
                wrong.push(("language", "is there already".to_owned()));
            }
            let compiled = compile(subject, body, pages.as_ref(), &mut wrong);
            languages.extend(compiled.map(|it| (tag, it)));
            let told = |(key, fault)| (LOCALES, format!("`{language}`: {key}: {fault}"));
            faults.extend(wrong.into_iter().map(told));
        }
        (faults.len() == before).then_some(Self { languages, pages })
    }

    /// In the language that the sign-up asks for, or else in the channel's own.
    pub(super) fn render(&self, event: &SignUpEvent) -> Result<Message, RenderFailed> {
        self.render_in(self.language_for(event), event)
    }

    /// Which of the languages, from 0, a sign-up is addressed in.
    pub(super) fn language_for(&self, event: &SignUpEvent) -> usize {
        let position = |tag: &str| self.languages.iter().position(|(it, _)| it == tag);
        for_languages(event.sign_up.locale.as_deref(), position).unwrap_or_default()
    }

    pub(super) fn languages(&self) -> impl Iterator<Item = &str> {
        self.languages.iter().map(|(language, _)| language.as_str())
    }

    pub(super) fn render_in(
        &self,
        language: usize,
        event: &SignUpEvent,
    ) -> Result<Message, RenderFailed> {
        let view = View::of(event, self.pages.as_ref());
        let (_, environment) = &self.languages[language];
        let subject = render(environment, SUBJECT, &view)?;
        let body = render(environment, BODY, &view)?;
        Ok(Message {
            subject: one_line(&subject, event),
            body: clip(body.trim_end(), BODY_CHARS_MAX),
        })
    }
}

fn compile(
    subject: &str,
    body: &str,
    pages: Option<&ApprovalPages>,
    faults: &mut Vec<Fault>,
) -> Option<Environment<'static>> {
    let mut environment = Environment::new();
    // With `debug`, errors would quote the variables around them: personal data.
    environment.set_debug(false);
    environment.set_undefined_behavior(UndefinedBehavior::Chainable);
    // Messages are plain text; each format sees to its own quoting.
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    let before = faults.len();
    for (name, source) in [(SUBJECT, subject), (BODY, body)] {
        if let Err(error) = environment.add_template_owned(name, source.to_owned()) {
            faults.push((name, in_words(&error)));
        } else if let Err(fault) = try_out(&environment, name, pages) {
            faults.push((name, fault));
        }
    }
    (faults.len() == before).then_some(environment)
}

fn render(
    environment: &Environment<'_>,
    template: &'static str,
    view: &View<'_>,
) -> Result<String, RenderFailed> {
    let failed = |error: minijinja::Error| RenderFailed {
        template,
        line: error.line().unwrap_or_default(),
        what: error.kind(),
    };
    environment.get_template(template).and_then(|it| it.render(Serde(view))).map_err(failed)
}

/// Finds what would fail, or say nothing, with every event.
fn try_out(
    environment: &Environment<'_>,
    name: &str,
    pages: Option<&ApprovalPages>,
) -> Result<(), String> {
    let template = environment.get_template(name).map_err(|error| in_words(&error))?;
    let globals: Vec<_> = environment.globals().map(|(name, _)| name.to_owned()).collect();
    let mentioned = template.undeclared_variables(true);
    if pages.is_none_or(|it| !it.has_links()) && mentioned.iter().any(|path| path == LINK) {
        return Err(format!(
            "`{LINK}` needs `approvals.link_base`, the address under which approvers decide, and \
             never goes to the person who waits"
        ));
    }
    let mut unknown: Vec<_> = mentioned
        .into_iter()
        .filter(|path| {
            let mut parts = path.split('.');
            let variable = parts.next().unwrap_or_default();
            let member = parts.next();
            let known = VARIABLES.contains(&variable) || globals.iter().any(|it| it == variable);
            let member_known = match (variable, member) {
                ("signup", Some(member)) => expression::MEMBERS.contains(&member),
                ("event", Some(member)) => EventView::MEMBERS.contains(&member),
                ("decision", Some(member)) => DecisionView::MEMBERS.contains(&member),
                ("approval", Some(member)) => ApprovalView::MEMBERS.contains(&member),
                _ => true,
            };
            !known || !member_known
        })
        .collect();
    unknown.sort_unstable();
    if !unknown.is_empty() {
        return Err(format!(
            "there is no `{}`; templates know event, signup, decision and approval",
            unknown.join("`, `")
        ));
    }
    let sample = sample();
    let view = View { approval: ApprovalView::sample(), ..View::of(&sample, pages) };
    template.render(Serde(&view)).map(drop).map_err(|error| in_words(&error))
}

/// Only for errors with the sample: they may quote it.
fn in_words(error: &minijinja::Error) -> String {
    let detail = error.detail().map(|it| format!(": {it}")).unwrap_or_default();
    match error.line() {
        Some(line) => format!("line {line}: {}{detail}", error.kind()),
        None => format!("{}{detail}", error.kind()),
    }
}

/// No header can be broken out of, and no list of messages looks empty.
fn one_line(subject: &str, event: &SignUpEvent) -> String {
    let plain: String = subject.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let words: Vec<_> = plain.split_whitespace().collect();
    if words.is_empty() {
        return format!("Sign-up {}", event.kind);
    }
    clip(&words.join(" "), SUBJECT_CHARS_MAX)
}

/// The first `chars_max` characters, with a sign that there was more.
pub(super) fn clip(text: &str, chars_max: usize) -> String {
    match text.char_indices().nth(chars_max) {
        None => text.to_owned(),
        Some(_) => text.chars().take(chars_max.saturating_sub(1)).chain(['…']).collect(),
    }
}

/// The first `bytes_max` bytes, or somewhat less, with a sign that there was more.
pub(super) fn clip_bytes(text: &str, bytes_max: usize) -> String {
    const MORE: &str = "…";
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let end = text.floor_char_boundary(bytes_max.saturating_sub(MORE.len()));
    format!("{}{MORE}", &text[..end])
}

/// What `write` makes of as much of a body as `bytes_max` bytes have room for, escaped as it may be.
pub(super) fn fitting(body: &str, bytes_max: usize, write: impl Fn(&str) -> String) -> String {
    let mut written = write(body);
    let mut room = body.len();
    while written.len() > bytes_max && room > 0 {
        // A byte takes up to six once it is escaped.
        room = room.saturating_sub((written.len() - bytes_max).div_ceil(6));
        written = write(&clip_bytes(body, room));
    }
    written
}

#[derive(Serialize)]
struct View<'a> {
    event: EventView<'a>,
    signup: SignUpView<'a>,
    decision: DecisionView<'a>,
    approval: ApprovalView<'a>,
}

#[derive(Serialize)]
struct EventView<'a> {
    id: uuid::Uuid,
    kind: &'static str,
    time: String,
    person: &'a str,
}

#[derive(Serialize)]
struct DecisionView<'a> {
    action: &'static str,
    message: &'a str,
    rules: Vec<&'a str>,
}

#[derive(Default, Serialize)]
struct ApprovalView<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    link: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires_at: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    approver: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

impl EventView<'_> {
    const MEMBERS: [&'static str; 4] = ["id", "kind", "time", "person"];
}

impl DecisionView<'_> {
    const MEMBERS: [&'static str; 3] = ["action", "message", "rules"];
}

impl<'a> View<'a> {
    fn of(event: &'a SignUpEvent, pages: Option<&ApprovalPages>) -> Self {
        Self {
            event: EventView {
                id: event.id,
                kind: event.kind.as_str(),
                time: event.time.format(&Rfc3339).unwrap_or_default(),
                person: event.person.as_str(),
            },
            signup: SignUpView::of(event),
            decision: DecisionView {
                action: event.decision.outcome.as_str(),
                message: event.decision.outcome.message().unwrap_or_default(),
                rules: event.decision.reasons.iter().map(|it| it.rule.as_str()).collect(),
            },
            approval: ApprovalView::of(event, pages),
        }
    }
}

impl<'a> ApprovalView<'a> {
    const MEMBERS: [&'static str; 4] = ["link", "expires_at", "approver", "reason"];

    fn of(event: &'a SignUpEvent, pages: Option<&ApprovalPages>) -> Self {
        let approval = event.approval.as_ref();
        let pages = pages.filter(|_| event.kind == Kind::Pending);
        Self {
            link: pages.and_then(|it| it.link(event)),
            expires_at: pages.and_then(|it| it.expires_at(event).format(&Rfc3339).ok()),
            approver: approval.map(|it| it.approver.as_str()),
            reason: approval.and_then(|it| it.reason.as_deref()),
        }
    }

    fn sample() -> Self {
        Self {
            link: Some("https://example.com/approvals/sample".to_owned()),
            expires_at: Some("2026-01-15T00:00:00Z".to_owned()),
            approver: Some("sample"),
            reason: Some("sample"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::{
        notify::settings::ChannelKind,
        testing::{approved, pending},
    };

    fn compile(subject: &str, body: &str) -> Result<Templates, Vec<Fault>> {
        compile_all(subject, body, &[], None)
    }

    fn compile_all(
        subject: &str,
        body: &str,
        locales: &[[&str; 3]],
        pages: Option<&ApprovalPages>,
    ) -> Result<Templates, Vec<Fault>> {
        let locale = |[language, subject, body]: &[&str; 3]| LocaleSettings {
            language: (*language).to_owned(),
            subject: (*subject).to_owned(),
            body: (*body).to_owned(),
        };
        let settings = ChannelSettings {
            name: "sample".to_owned(),
            filter: vestibule_events::Filter::default(),
            subject: subject.to_owned(),
            body: body.to_owned(),
            language: "en".to_owned(),
            locales: locales.iter().map(locale).collect(),
            kind: ChannelKind::Record,
        };
        let mut faults = Vec::new();
        Templates::compile(&settings, pages.cloned(), &mut faults).ok_or(faults)
    }

    #[test]
    fn a_channel_speaks_the_language_that_a_sign_up_asks_for() {
        let locales = [["de", "Hallo", "Guten Tag"], ["pt-BR", "Oi", "Bom dia"]];
        let templates = compile_all("Hello", "Good day", &locales, None).unwrap();
        let mut event = sample();
        for (locale, subject, body) in [
            (None, "Hello", "Good day"),
            (Some("fr"), "Hello", "Good day"),
            (Some("en-GB de"), "Hello", "Good day"),
            (Some("de-AT en"), "Hallo", "Guten Tag"),
            (Some("pt_br"), "Oi", "Bom dia"),
            (Some("pt"), "Hello", "Good day"),
        ] {
            event.sign_up.locale = locale.map(str::to_owned);
            let message = templates.render(&event).unwrap();
            assert_eq!((&*message.subject, &*message.body), (subject, body), "{locale:?}");
        }
        assert_eq!(templates.languages().collect::<Vec<_>>(), ["en", "de", "pt-br"]);

        let locales = [["de", "{{ nobody }}", ""], ["EN", "Hello", ""]];
        let faults = compile_all("Hello", "", &locales, None).unwrap_err();
        let seen: Vec<_> = faults.iter().map(|(key, fault)| format!("{key}: {fault}")).collect();
        assert!(seen[0].starts_with("locales: `de`: subject: there is no `nobody`"), "{seen:?}");
        assert_eq!(seen[1], "locales: `EN`: language: is there already");
    }

    #[test]
    fn what_has_no_room_is_cut_between_letters_and_says_so() {
        assert_eq!(clip_bytes("äöü", 6), "äöü");
        assert_eq!(clip_bytes("äöüa", 6), "ä…");
        let written = |body: &str, max| fitting(body, max, |it| json!({ "b": it }).to_string());
        assert_eq!(written("short", 100), r#"{"b":"short"}"#);
        for body in ["a".repeat(10_000), "\u{1}".repeat(10_000), "ä\"".repeat(5_000)] {
            let cut = written(&body, 400);
            assert!(cut.len() <= 400 && cut.len() > 300, "{}", cut.len());
            assert!(cut.ends_with("…\"}"), "{cut}");
        }
        assert_eq!(written("does not fit", 1), r#"{"b":"…"}"#);
    }

    #[test]
    fn a_message_is_rendered_from_the_event() {
        let templates = compile(
            "{{ event.kind }}: {{ signup.claims.displayName }}",
            "{% for it in signup.identities %}{{ it.issuer }} {% endfor %}{{ signup.claims.city.name }}\
             <{{ signup.email }}> at {{ event.time }} via {{ signup.connector | upper }}{{ decision.rules | join }}",
        )
        .unwrap();
        let message = templates.render(&sample()).unwrap();
        assert_eq!(message.subject, "accepted: Sample");
        assert_eq!(
            message.body,
            "example.com <sample@example.com> at 2026-01-01T00:00:00Z via SAMPLE"
        );
    }

    #[test]
    fn what_cannot_work_is_found_before_the_first_event() {
        for (subject, message) in [
            ("{{ signup.emial }}", "signup.emial"),
            ("{{ user }}", "user"),
            ("{{ event.id", "line 1"),
            ("{{ event.id | shout }}", "shout"),
            ("{{ event.id / 2 }}", "line 1"),
            ("{{ approval.by }}", "approval.by"),
        ] {
            let faults = compile(subject, "{{ event.idd }}").unwrap_err();
            assert_eq!((faults[0].0, faults[1].0), ("subject", "body"));
            assert!(faults[0].1.contains(message), "{faults:?}");
        }
    }

    #[test]
    fn a_message_says_where_and_until_when_to_decide_and_who_decided() {
        let pages = ApprovalPages::sample();
        let text = "{{ approval.link }}|{{ approval.expires_at }}|{{ approval.approver }}|{{ approval.reason }}";
        let templates = |pages| compile_all("s", text, &[], pages);
        let render =
            |event: &SignUpEvent| templates(Some(&pages)).unwrap().render(event).unwrap().body;
        let pending = pending("ada");
        let expires = pending.time.replace_nanosecond(0).unwrap() + Duration::from_secs(3600);

        let body = render(&pending);
        let [link, expires_at, "", ""] = body.split('|').collect::<Vec<_>>()[..] else {
            panic!("{body}");
        };
        let token = link.strip_prefix("https://sign-up.example.com/approvals/").unwrap();
        let links = pages.links();
        assert_eq!(links.check(token, pending.time), Ok(pending.id));
        assert!(links.check(token, expires).is_err(), "the link ends with the request");
        let told =
            Templates { pages: Some(pages.without_links()), ..templates(Some(&pages)).unwrap() };
        let told = told.render(&pending).unwrap().body;
        assert_eq!(told, body.replace(link, ""), "others learn when, and not where");
        assert_eq!(expires_at, expires.format(&Rfc3339).unwrap());
        assert_eq!(render(&approved("ada")), "||grace|known to us");
        assert_eq!(render(&sample()), "|||");
        let faults = templates(None).unwrap_err();
        assert!(faults[0].0 == "body" && faults[0].1.contains("approval.link"), "{faults:?}");
    }

    #[test]
    fn a_subject_stays_one_line_and_nothing_is_endless() {
        let templates = compile("Hi {{ signup.claims.name }}", "{{ signup.claims.name }}").unwrap();
        let mut event = sample();
        event.sign_up.claims.insert("name".into(), json!("x\r\nBcc: eve@example.com\0"));
        assert_eq!(templates.render(&event).unwrap().subject, "Hi x Bcc: eve@example.com");
        event.sign_up.claims.insert("name".into(), json!("ä".repeat(100_000)));
        let message = templates.render(&event).unwrap();
        assert_eq!(message.subject.chars().count(), SUBJECT_CHARS_MAX);
        assert_eq!(message.body.chars().count(), BODY_CHARS_MAX);

        let empty = compile("{{ signup.claims.none }}", "").unwrap();
        assert_eq!(empty.render(&event).unwrap().subject, "Sign-up accepted");
    }

    #[test]
    fn a_failure_with_an_event_says_nothing_of_it() {
        let templates = compile("s", "{{ signup.claims.age | int }}").unwrap();
        let mut event = sample();
        event.sign_up.claims.insert("age".into(), json!("secret"));
        let error = templates.render(&event).err().unwrap().to_string();
        assert!(error.contains("`body`, line 1") && !error.contains("secret"), "{error}");
    }
}
