//! The page that a link in a notification leads to.
//!
//! Looking decides nothing: programs that check mail open links. Only the form's button does, once.
//! Whoever has the link may decide, so it is signed, holds for a limited time, and is never logged.

use std::{sync::LazyLock, time::Duration};

use axum::{
    Router,
    body::{Body, to_bytes},
    extract::{Path, Request, State},
    http::{HeaderValue, StatusCode, header},
    response::Response,
    routing::get,
};
use minijinja::{Environment, value::Serde};
use serde::Serialize;
use time::{OffsetDateTime, UtcOffset};
use tokio::time::timeout;
use tracing::{info, warn};
use vestibule_events::{Effect, LinkError, Verdict};
use vestibule_store::{ApprovalRequest, Decided, RequestState, StoreError};

use super::{ApprovalDesk, DeskError};

/// What a form may hold; the reason is the longest of it.
const FORM_BYTES_MAX: usize = 16 * 1024;
const APPROVER_CHARS_MAX: usize = 100;

/// An approver waits longer than a platform does, but not for ever.
const PATIENCE: Duration = Duration::from_secs(10);

static TEMPLATES: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut page = Environment::new();
    // The name ends in .html, so whatever is put in is escaped.
    page.add_template("page.html", include_str!("page.html")).expect("the page is a template");
    page
});

/// `GET` and `POST /approvals/<token>`.
pub fn approvals_router(desk: ApprovalDesk) -> Router {
    Router::new().route("/approvals/{token}", get(show).post(decide)).with_state(desk)
}

async fn show(State(desk): State<ApprovalDesk>, Path(token): Path<String>) -> Response {
    match timeout(PATIENCE, desk.request(&token)).await {
        Ok(Ok(request)) => page_of(StatusCode::OK, "A request for approval", None, &request),
        Ok(Err(error)) => failed(&error),
        Err(_elapsed) => failed(&DeskError::Away(None)),
    }
}

async fn decide(
    State(desk): State<ApprovalDesk>,
    Path(token): Path<String>,
    request: Request,
) -> Response {
    let form = match timeout(PATIENCE, to_bytes(request.into_body(), FORM_BYTES_MAX)).await {
        Ok(Ok(form)) => form,
        Ok(Err(_)) => {
            return page(StatusCode::PAYLOAD_TOO_LARGE, "That was too much", "Please write less.");
        }
        Err(_elapsed) => {
            let what = "Nothing was decided. Please try again.";
            return page(StatusCode::REQUEST_TIMEOUT, "That took too long", what);
        }
    };
    let Some(form) = Form::read(&form) else {
        let what = "Please go back, enter your name and choose one of the two buttons.";
        return page(StatusCode::BAD_REQUEST, "Something is missing", what);
    };
    let request = match timeout(PATIENCE, desk.request(&token)).await {
        Ok(Ok(request)) => request,
        Ok(Err(error)) => return failed(&error),
        Err(_elapsed) => return failed(&DeskError::Away(None)),
    };
    let decided = async {
        let Form { verdict, approver, reason } = form;
        let decided = desk.decide(&request, verdict, &approver, reason).await?;
        // Read again: it says who decided and when.
        Ok::<_, DeskError>((decided, desk.request(&token).await?))
    };
    let (decided, request) = match timeout(PATIENCE, decided).await {
        Ok(Ok(decided)) => decided,
        Ok(Err(DeskError::Away(cause))) => return uncertain(cause.as_ref()),
        Ok(Err(error)) => return failed(&error),
        Err(_elapsed) => return uncertain(None),
    };
    match decided {
        Decided::Now => {
            info!(request = %request.id, state = %request.state, "a request was decided by link");
            let text = "Thank you. The decision is kept, and what follows from it is on its way.";
            page_of(StatusCode::OK, "Decided", Some(text), &request)
        }
        Decided::Already(_) => {
            // By somebody else, or by the first half of a double click.
            let text =
                "This request had been decided before, as you see here. Nothing has changed.";
            page_of(StatusCode::CONFLICT, "Already decided", Some(text), &request)
        }
        Decided::Expired => {
            let text = "Nobody decided in time, so the request has expired.";
            page_of(StatusCode::GONE, "Too late", Some(text), &request)
        }
        Decided::NotFound => failed(&DeskError::NotFound),
    }
}

/// What an approver has filled in.
struct Form {
    verdict: Verdict,
    approver: String,
    reason: Option<String>,
}

impl Form {
    fn read(body: &[u8]) -> Option<Self> {
        let field = |name: &str| {
            let found = form_urlencoded::parse(body).find(|(it, _)| it == name);
            found.map(|(_, value)| value.trim().to_owned()).filter(|value| !value.is_empty())
        };
        let cut = |text: String, chars| text.chars().take(chars).collect::<String>();
        Some(Self {
            verdict: field("verdict")?.parse().ok()?,
            approver: cut(field("approver")?, APPROVER_CHARS_MAX),
            reason: field("reason").map(|it| cut(it, ApprovalDesk::REASON_CHARS_MAX)),
        })
    }
}

fn failed(error: &DeskError) -> Response {
    match error {
        DeskError::Link(LinkError::Expired) => {
            let text =
                "The request was open as long as the link. Whoever waits may sign up once more.";
            page(StatusCode::GONE, "This link has expired", text)
        }
        DeskError::Link(LinkError::Malformed | LinkError::Forged) => {
            let text = "Perhaps it was cut off: copy it whole from the notification.";
            page(StatusCode::NOT_FOUND, "This link leads nowhere", text)
        }
        // The notification can be faster than the worker that opens the request.
        DeskError::NotFound => {
            let text = "It may take a moment to arrive. Please try again in a minute.";
            page(StatusCode::NOT_FOUND, "There is no such request yet", text)
        }
        DeskError::Away(cause) => {
            let text = "Nothing was decided. Please try again in a minute.";
            away(cause.as_ref(), "Not possible right now", text)
        }
    }
}

/// The store was asked to keep the decision and did not say that it has; it may have.
fn uncertain(cause: Option<&StoreError>) -> Response {
    let text = "It took too long, so we do not know whether your decision is kept. Open the link \
                again in a minute: it says so, or asks once more.";
    away(cause, "Not certain", text)
}

fn away(cause: Option<&StoreError>, title: &str, text: &str) -> Response {
    let error = cause.map_or("it does not answer".to_owned(), ToString::to_string);
    warn!(error, "an approver could not be served, for want of the store");
    page(StatusCode::SERVICE_UNAVAILABLE, title, text)
}

/// What the page shows.
#[derive(Serialize)]
struct Page<'a> {
    title: &'a str,
    text: Option<&'a str>,
    request: Option<Shown>,
}

/// A request as the page shows it.
#[derive(Serialize)]
struct Shown {
    open: bool,
    rows: Vec<(String, String)>,
}

impl Shown {
    fn of(request: &ApprovalRequest) -> Self {
        let sign_up = &request.event.sign_up;
        let mut rows = vec![("Connector".to_owned(), request.connector.to_string())];
        let mut row = |name: &str, value: Option<String>| {
            rows.extend(value.map(|value| (name.to_owned(), value)));
        };
        row("E-mail", sign_up.email.as_ref().map(|it| it.expose().to_owned()));
        for identity in &sign_up.identities {
            row("Signs in with", Some(identity.issuer.clone()));
        }
        for (name, value) in &sign_up.claims {
            let changed = request.event.decision.outcome.changed_claims();
            let value = changed.and_then(|it| it.get(name)).unwrap_or(value);
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            row(name, Some(text));
        }
        row("Requested", Some(minute(request.requested_at)));
        row("Attempts", Some(request.attempts.to_string()));
        let reasons = request.event.decision.reasons.iter();
        for reason in reasons.filter(|it| it.effect == Effect::RequireApproval) {
            row("Asked for by", Some(reason.rule.clone()));
        }
        let open = request.state == RequestState::Pending
            && request.expires_at > OffsetDateTime::now_utc();
        if open {
            row("Expires", Some(minute(request.expires_at)));
        } else {
            row("State", Some(request.state.to_string()));
            row("Decided by", request.decided_by.clone());
            row("Decided at", request.decided_at.map(minute));
            row("Reason", request.reason.clone());
        }
        Self { open, rows }
    }
}

/// As people write times; nobody decides by the second.
fn minute(at: OffsetDateTime) -> String {
    let at = at.to_offset(UtcOffset::UTC);
    format!("{} {:02}:{:02} UTC", at.date(), at.hour(), at.minute())
}

fn page_of(
    status: StatusCode,
    title: &str,
    text: Option<&str>,
    request: &ApprovalRequest,
) -> Response {
    respond(status, &Page { title, text, request: Some(Shown::of(request)) })
}

fn page(status: StatusCode, title: &str, text: &str) -> Response {
    respond(status, &Page { title, text: Some(text), request: None })
}

fn respond(status: StatusCode, page: &Page<'_>) -> Response {
    let template = TEMPLATES.get_template("page.html").expect("it was added above");
    let text = template.render(Serde(page)).expect("all its values are there");
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; \
             frame-ancestors 'none'; base-uri 'none'",
        ),
        // The address is as good as a key, so no other site may learn it.
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enter_in_a_line_of_text_presses_no_button_that_decides() {
        let page = include_str!("page.html");
        let form = page.split("<form").nth(1).unwrap();
        let first = form.split("<button").nth(1).unwrap();
        assert!(first.starts_with(" hidden disabled>"), "{first}");
    }

    #[test]
    fn times_are_told_to_the_minute_in_utc() {
        let at = time::macros::datetime!(2026-11-22 23:05:59.5 -1);
        assert_eq!(minute(at), "2026-11-23 00:05 UTC");
    }

    #[test]
    fn a_form_needs_a_name_and_a_verdict() {
        let form = |body: &str| Form::read(body.as_bytes());
        let whole = form("approver=Grace+H%C3%B6pper&reason=known+to+us&verdict=approve").unwrap();
        assert_eq!(whole.approver, "Grace Höpper");
        assert_eq!(
            (whole.verdict, whole.reason.as_deref()),
            (Verdict::Approve, Some("known to us"))
        );
        assert!(form("approver=Grace&verdict=deny").unwrap().reason.is_none());
        for lacking in
            ["", "approver=&verdict=deny", "verdict=deny", "approver=Grace", "approver=G&verdict=x"]
        {
            assert!(form(lacking).is_none(), "{lacking}");
        }
    }
}
