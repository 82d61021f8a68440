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
    MissingStep,
    UnknownStep,
}

impl Problem {
    pub const ALL: [Self; 11] = [
        Self::Unauthorized,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::NotJsonContentType,
        Self::BodyTooLarge,
        Self::BodyTooSlow,
        Self::BodyUnreadable,
        Self::NotJson,
        Self::NotAnObject,
        Self::MissingStep,
        Self::UnknownStep,
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
            Self::BodyUnreadable
            | Self::NotJson
            | Self::NotAnObject
            | Self::MissingStep
            | Self::UnknownStep => StatusCode::BAD_REQUEST,
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
            Self::MissingStep => "missing-step",
            Self::UnknownStep => "unknown-step",
        }
    }

    /// For whoever sets the connector up.
    #[must_use]
    pub const fn message(self) -> &'static str {
        match self {
            Self::Unauthorized => "The user or the password of this connector is wrong.",
            Self::NotFound => "There is no such connector or step.",
            Self::MethodNotAllowed => "A connector is called with POST.",
            Self::NotJsonContentType => "The content type must be application/json.",
            Self::BodyTooLarge => "The body is too large.",
            Self::BodyTooSlow => "The body took too long to arrive.",
            Self::BodyUnreadable => "The body could not be read to its end.",
            Self::NotJson => "The body is not JSON, or is nested too deeply.",
            Self::NotAnObject => "The body must be a JSON object.",
            Self::MissingStep => {
                "The body names no step. Send step, or call the URL of a step: this one followed \
                 by /after-federation, /before-create or /before-token."
            }
            Self::UnknownStep => {
                "The step in the body is not known. Call the URL of a step: this one followed by \
                 /after-federation, /before-create or /before-token."
            }
        }
    }
}
