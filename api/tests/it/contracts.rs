//! The OpenAPI document agrees with the program, and is served with the other contracts.

use std::collections::BTreeSet;

use axum::http::StatusCode;
use serde_json::{Value, json};
use vestibule_api::{Check, Problem};
use vestibule_events::Step;

use crate::admin::{admin, get};

async fn document(path: &str) -> anyhow::Result<(String, Value)> {
    let (status, media_type, body) = get(admin(Check::Ok), path).await?;
    anyhow::ensure!(status == StatusCode::OK, "{path}: {status}");
    Ok((media_type, serde_json::from_str(&body)?))
}

#[tokio::test]
async fn every_contract_is_listed_and_served_as_what_it_is() -> anyhow::Result<()> {
    let (_, index) = document("/schemas/").await?;
    let listed = index["contracts"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut versions = BTreeSet::new();
    for contract in listed {
        let (media_type, document) =
            document(contract["path"].as_str().unwrap_or_default()).await?;
        assert_eq!(contract["mediaType"], media_type);
        versions
            .insert(["$schema", "asyncapi", "openapi"].map(|it| document[it].to_string()).concat());
    }
    let versions: Vec<_> = versions.iter().map(|it| it.replace("null", "")).collect();
    assert_eq!(
        versions,
        [r#""https://json-schema.org/draft/2020-12/schema""#, r#""3.0.0""#, r#""3.1.0""#]
    );
    Ok(())
}

/// So that it resolves for whoever fetches the one and for whoever has the other checked out.
#[tokio::test]
async fn the_asyncapi_document_refers_to_the_schema_beside_it() -> anyhow::Result<()> {
    let (_, asyncapi) = document("/asyncapi.json").await?;
    let payload = &asyncapi["components"]["messages"]["signUpEvent"]["payload"]["$ref"];
    let path = payload.as_str().and_then(|it| it.strip_prefix('.')).unwrap_or_default();
    assert_eq!(document(path).await?.1["title"], "SignUpEvent");
    Ok(())
}

#[tokio::test]
async fn the_openapi_document_knows_each_problem_and_step() -> anyhow::Result<()> {
    let (_, openapi) = document("/openapi.json").await?;
    let schemas = &openapi["components"]["schemas"];

    assert_eq!(schemas["ProblemCode"]["enum"], json!(Problem::ALL.map(Problem::code)));
    assert_eq!(schemas["Step"]["enum"], json!(Step::ALL.map(Step::as_str)));
    let responses = &openapi["paths"]["/connectors/{connector}/{step}"]["post"]["responses"];
    for problem in Problem::ALL {
        let status = problem.status().as_u16().to_string();
        assert!(responses[&status].is_object(), "{status} of {problem:?}");
    }
    Ok(())
}

#[tokio::test]
async fn the_openapi_document_has_every_path_of_the_admin_listener() -> anyhow::Result<()> {
    let (_, openapi) = document("/openapi.json").await?;
    let mut paths = vec!["/healthz".to_owned(), "/readyz".to_owned(), "/metrics".to_owned()];
    let (_, index) = document("/schemas/").await?;
    paths.push("/schemas/".to_owned());
    let contracts = index["contracts"].as_array().into_iter().flatten();
    paths.extend(contracts.filter_map(|it| it["path"].as_str().map(str::to_owned)));
    for path in paths {
        let content = &openapi["paths"][&path]["get"]["responses"]["200"]["content"];
        let (status, media_type, _) = get(admin(Check::Ok), &path).await?;
        assert_eq!(status, StatusCode::OK, "{path}");
        assert!(
            content[&media_type].is_object(),
            "{path} is {media_type}, and in the document {content}"
        );
    }
    Ok(())
}
