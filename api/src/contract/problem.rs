//! What a call gets that never becomes a sign-up.

use axum::http::StatusCode;

/// Why a call was not taken. The caller is told no more than it says here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Problem {
    Unauthorized,
    NotFound,
    MethodNotAllowed,
    NotJsonContentType,
    BodyTooLarge,
    BodyTooSlow,
    BodyUnreadable,
    NotJson,
    NotAnObject,
    /// A form or a URL that says something else than text in UTF-8.
    NotText,
    /// A path that goes on after the step, and not in pairs of name and value.
    NotInPairs,
    MissingStep,
    UnknownStep,
    /// A custom extension's call that does not say what happens.
    MissingEventType,
    /// A custom extension's call about something that is not ours to answer.
    EventNotAnswered,
    /// A custom extension's call in the format of before its release.
    LegacyFormat,
}

impl Problem {
    pub const ALL: [Self; 16] = [
        Self::Unauthorized,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::NotJsonContentType,
        Self::BodyTooLarge,
        Self::BodyTooSlow,
        Self::BodyUnreadable,
        Self::NotJson,
        Self::NotAnObject,
        Self::NotText,
        Self::NotInPairs,
        Self::MissingStep,
        Self::UnknownStep,
        Self::MissingEventType,
        Self::EventNotAnswered,
        Self::LegacyFormat,
    ];

    #[must_use]
    pub const fn status(self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::NotJsonContentType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::EventNotAnswered => StatusCode::UNPROCESSABLE_ENTITY,
            Self::BodyUnreadable
            | Self::NotJson
            | Self::NotAnObject
            | Self::NotText
            | Self::NotInPairs
            | Self::MissingStep
            | Self::UnknownStep
            | Self::MissingEventType
            | Self::LegacyFormat => StatusCode::BAD_REQUEST,
        }
    }

    /// Stable, for programs and metrics.
    #[must_use]
    pub const fn code(self) -> &'static str {
        match self {
            Self::Unauthorized => "unauthorized",
            Self::NotFound => "not-found",
            Self::MethodNotAllowed => "method-not-allowed",
            Self::NotJsonContentType => "not-json-content-type",
            Self::BodyTooLarge => "body-too-large",
            Self::BodyTooSlow => "body-too-slow",
            Self::BodyUnreadable => "body-unreadable",
            Self::NotJson => "not-json",
            Self::NotAnObject => "not-an-object",
            Self::NotText => "not-text",
            Self::NotInPairs => "not-in-pairs",
            Self::MissingStep => "missing-step",
            Self::UnknownStep => "unknown-step",
            Self::MissingEventType => "missing-event-type",
            Self::EventNotAnswered => "event-not-answered",
            Self::LegacyFormat => "legacy-format",
        }
    }

    /// For whoever sets the connector up.
    #[must_use]
    pub const fn message(self) -> &'static str {
        match self {
            Self::Unauthorized => "The user or the password of this connector is wrong.",
            Self::NotFound => "There is no such connector or step.",
            Self::MethodNotAllowed => {
                "A connector is called with POST, and with GET only where its protocol is \
                 custom-policy."
            }
            Self::NotJsonContentType => {
                "The content type must be application/json; a connector of the protocol \
                 custom-policy takes application/x-www-form-urlencoded as well."
            }
            Self::BodyTooLarge => {
                "The body, or what the URL and headers say in its place, is too large."
            }
            Self::BodyTooSlow => "The body took too long to arrive.",
            Self::BodyUnreadable => "The body could not be read to its end.",
            Self::NotJson => "The body is not JSON, or is nested too deeply.",
            Self::NotAnObject => "The body must be a JSON object.",
            Self::NotText => "The claims must be text in UTF-8, escaped as in any form or URL.",
            Self::NotInPairs => {
                "What follows the step in the path must be pairs of segments: the name of a claim \
                 and its value."
            }
            Self::MissingStep => {
                "The call names no step. Send step, or call the URL of a step: this one followed \
                 by /after-federation, /before-create or /before-token."
            }
            Self::MissingEventType => "The call does not say in `type` which event it is about.",
            Self::EventNotAnswered => {
                "This endpoint answers attributeCollectionStart, attributeCollectionSubmit and \
                 tokenIssuanceStart. Register it for no other event."
            }
            Self::LegacyFormat => {
                "The call has the format 10-01-2021-preview, with an apiSchemaVersion. Register the \
                 custom authentication extension anew, so that calls have `type`, `source` and \
                 `data`."
            }
            Self::UnknownStep => {
                "The step in the call is not known. Call the URL of a step: this one followed by \
                 /after-federation, /before-create or /before-token."
            }
        }
    }
}
