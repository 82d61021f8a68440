//! The contracts of this version, for whoever calls it or reads its events: what is checked in is
//! what is served.

use axum::{Router, http::header, response::IntoResponse, routing::get};
use serde::Serialize;

/// A document that others rely on.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Contract {
    name: &'static str,
    path: &'static str,
    media_type: &'static str,
    about: &'static str,
    #[serde(skip)]
    text: &'static str,
}

/// Where the documents are listed.
pub(crate) const INDEX: &str = "/schemas/";

const CONTRACTS: [Contract; 3] = [
    Contract {
        name: "signup-event.v1",
        path: "/schemas/signup-event.v1.json",
        media_type: "application/schema+json",
        about: "JSON Schema of the events of sign-ups",
        text: include_str!("../../events/schemas/signup-event.v1.json"),
    },
    // It refers to the schema by a path that holds here and where it is checked in.
    Contract {
        name: "asyncapi",
        path: "/asyncapi.json",
        media_type: "application/vnd.aai.asyncapi+json;version=3.0.0",
        about: "the events on NATS: subjects, headers, permissions (AsyncAPI)",
        text: include_str!("../../events/asyncapi.json"),
    },
    Contract {
        name: "openapi",
        path: "/openapi.json",
        media_type: "application/vnd.oai.openapi+json;version=3.1",
        about: "the connector and this listener over HTTP (OpenAPI)",
        text: include_str!("../openapi.json"),
    },
];

#[derive(Serialize)]
struct Index {
    contracts: [Contract; 3],
}

pub(crate) fn router() -> Router {
    let index =
        Router::new().route(INDEX, get(|| async { axum::Json(Index { contracts: CONTRACTS }) }));
    CONTRACTS.into_iter().fold(index, |router, contract| {
        let Contract { path, media_type, text, .. } = contract;
        let document =
            move || async move { ([(header::CONTENT_TYPE, media_type)], text).into_response() };
        router.route(path, get(document))
    })
}
