//! The published contracts, by validators that others use: the documents are what they say they are, and what the
//! binary really answers and stores is as they say.

use std::{path::Path, process::Command};

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use vestibule_testkit::{Process, eventually, node, packages, python};

use crate::support::{LIMIT, Site, Up, http};

const OPENAPI: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../api/openapi.json");
const ASYNCAPI: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../events/asyncapi.json");
const DEVICES_TOKEN: &str = "let-the-app-in";
const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/contracts");

/// What a validator has against a document. They take their time to start on a busy machine.
async fn complaints(command: &Command) -> anyhow::Result<String> {
    let stopped = Process::spawn(command)?.wait(2 * LIMIT).await?;
    Ok(stopped.stdout + &stopped.stderr)
}

fn python_with_validators() -> anyhow::Result<Command> {
    let mut command = Command::new(python()?);
    command.env("PYTHONPATH", packages("openapi")?).env("PYTHONDONTWRITEBYTECODE", "1");
    Ok(command)
}

async fn openapi_complaints(file: &Path) -> anyhow::Result<String> {
    let mut command = python_with_validators()?;
    complaints(command.args(["-m", "openapi_spec_validator"]).arg(file)).await
}

async fn asyncapi_complaints(file: &Path) -> anyhow::Result<String> {
    let mut command = Command::new(node()?);
    command.arg(format!("{FOLDER}/asyncapi.mjs")).arg(packages("node/tests/contracts")?).arg(file);
    complaints(&command).await
}

fn read(file: &str) -> anyhow::Result<Value> {
    Ok(serde_json::from_slice(&std::fs::read(file).with_context(|| file.to_owned())?)?)
}

/// The document with one value changed, as a file beside what it refers to.
fn spoiled(folder: &Path, file: &str, pointer: &str, value: Value) -> anyhow::Result<String> {
    let mut document = read(file)?;
    *document.pointer_mut(pointer).context("no such place")? = value;
    let name = Path::new(file).file_name().context("a file has a name")?;
    let schemas = folder.join("schemas");
    if !schemas.exists() {
        std::fs::create_dir(&schemas)?;
        let schema = "signup-event.v1.json";
        std::fs::copy(
            Path::new(ASYNCAPI).with_file_name("schemas").join(schema),
            schemas.join(schema),
        )?;
    }
    let path = folder.join(name);
    std::fs::write(&path, document.to_string())?;
    path.into_os_string().into_string().ok().context("a path of text")
}

#[tokio::test]
async fn the_openapi_document_is_one() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let bad = spoiled(folder.path(), OPENAPI, "/paths/~1readyz/get/responses", json!([]))?;

    let good = openapi_complaints(Path::new(OPENAPI)).await?;
    let bad = openapi_complaints(Path::new(&bad)).await?;

    assert!(good.trim_end().ends_with(": OK"), "{good}");
    assert!(bad.contains("responses"), "{bad}");
    Ok(())
}

#[tokio::test]
async fn the_asyncapi_document_is_one() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let action = "/operations/publishSignUps/action";
    let bad = spoiled(folder.path(), ASYNCAPI, action, json!("shout"))?;

    assert_eq!(asyncapi_complaints(Path::new(ASYNCAPI)).await?, "");
    let bad = asyncapi_complaints(Path::new(&bad)).await?;

    assert!(bad.contains("operations.publishSignUps.action"), "{bad}");
    Ok(())
}

/// Something to hold against the schema at a place of a document.
#[derive(Clone)]
struct Instance {
    name: String,
    document: &'static str,
    pointer: String,
    instance: Value,
}

/// What is wrong with instances.
async fn wrong(instances: &[Instance]) -> anyhow::Result<Vec<String>> {
    let schema = Path::new(ASYNCAPI).with_file_name("schemas").join("signup-event.v1.json");
    let schema = read(schema.to_str().context("a path of text")?)?;
    let list: Vec<_> = instances
        .iter()
        .map(|it| {
            json!({
                "name": it.name, "document": it.document, "pointer": it.pointer,
                "instance": it.instance,
            })
        })
        .collect();
    let task = json!({
        "documents": { "openapi": read(OPENAPI)?, "event": schema }, "instances": list,
    });
    let mut command = python_with_validators()?;
    let mut validator = Process::spawn(command.arg(format!("{FOLDER}/validate.py")))?;
    validator.write_line(&task.to_string())?;
    let stopped = validator.wait(2 * LIMIT).await?;
    ensure!(stopped.status.success(), "{}", stopped.stderr);
    Ok(serde_json::from_str(&stopped.stdout)?)
}

/// A connector for each dialect; its rules do one of each that there is.
fn site() -> anyhow::Result<Site> {
    let connectors =
        [("partners", "api-connector"), ("policy", "custom-policy"), ("extid", "custom-extension")];
    let sections = connectors.map(|(name, protocol)| {
        format!(
            r#"
[connectors.{name}]
protocol = "{protocol}"
[[connectors.{name}.credentials]]
user = "entra"
password = "example:try-me"
[[connectors.{name}.rules]]
name = "not-wanted"
when = "signup.email == 'blocked@example.com'"
block = "No."
[[connectors.{name}.rules]]
name = "to-correct"
when = "signup.email == 'rejected@example.com'"
reject = "Please correct it."
field = "givenName"
[[connectors.{name}.rules]]
name = "all-alike"
when = "true"
set = {{ givenName = "'Ada'" }}
"#
        )
    });
    Site::with_config(&format!(
        "[listen]\nconnector = \"127.0.0.1:0\"\nadmin = \"127.0.0.1:0\"\n\
         [devices]\ntoken = \"env:DEVICES_TOKEN\"\n{}",
        sections.concat()
    ))
}

const EMAILS: [Option<&str>; 3] = [None, Some("blocked@example.com"), Some("rejected@example.com")];

/// Puts an address where the dialect has it.
fn with_email(mut call: Value, email: Option<&str>) -> Value {
    let Some(email) = email else { return call };
    if call["data"].is_null() {
        call["email"] = json!(email);
    } else if !call["data"]["authenticationContext"]["user"].is_null() {
        call["data"]["authenticationContext"]["user"]["mail"] = json!(email);
    } else {
        call["data"]["userSignUpInfo"]["attributes"]["email"] = json!({
            "@odata.type": "microsoft.graph.stringDirectoryAttributeValue", "value": email,
        });
    }
    call
}

/// Calls, and turns each answer into what has to hold of it.
struct Caller<'a> {
    up: &'a Up,
    openapi: Value,
    instances: Vec<Instance>,
}

impl Caller<'_> {
    /// `path` is as the document has it, `url` as it is called.
    async fn call(
        &mut self,
        path: &str,
        url: &str,
        request: impl FnOnce(reqwest::RequestBuilder) -> reqwest::RequestBuilder,
        method: reqwest::Method,
    ) -> anyhow::Result<(u16, Value)> {
        let base = if path.starts_with("/connectors/") { &self.up.base } else { &self.up.admin };
        let operation = method.as_str().to_lowercase();
        let call = http().request(method, format!("{base}{url}"));
        let answer = request(call).send().await?;
        let status = answer.status().as_u16();
        let media_type = answer.headers()["content-type"].to_str()?.to_owned();
        let text = answer.text().await?;
        let body =
            if media_type.contains("json") { serde_json::from_str(&text)? } else { json!(text) };

        let escaped = |it: &str| it.replace('~', "~0").replace('/', "~1");
        let mut pointer = format!("/paths/{}/{operation}/responses/{status}", escaped(path));
        let response = self.openapi.pointer(&pointer);
        let response = response.with_context(|| format!("{pointer} is not documented"))?;
        if let Some(reference) = response["$ref"].as_str() {
            pointer = reference.trim_start_matches('#').to_owned();
        }
        let pointer = format!("{pointer}/content/{}/schema", escaped(&media_type));
        ensure!(self.openapi.pointer(&pointer).is_some(), "{pointer} is not documented");
        self.hold(&format!("{operation} {url}: {status}"), pointer, &body);
        Ok((status, body))
    }

    fn hold(&mut self, name: &str, pointer: String, instance: &Value) {
        let (name, instance) = (name.to_owned(), instance.clone());
        self.instances.push(Instance { name, document: "openapi", pointer, instance });
    }

    /// A call with everything right but what the platform says.
    async fn post(
        &mut self,
        connector: &str,
        step: Option<&str>,
        body: &Value,
    ) -> anyhow::Result<()> {
        let (path, url) = match step {
            Some(step) => {
                ("/connectors/{connector}/{step}", format!("/connectors/{connector}/{step}"))
            }
            None => ("/connectors/{connector}", format!("/connectors/{connector}")),
        };
        let (call, answer, error) = match connector {
            "partners" => ("ApiConnectorCall", "ApiConnectorAnswer", "ApiConnectorValidationError"),
            "policy" => ("CustomPolicyCall", "CustomPolicyClaims", "CustomPolicyError"),
            _ => ("CustomExtensionCall", "CustomExtensionAnswer", "Problem"),
        };
        let request =
            |it: reqwest::RequestBuilder| it.basic_auth("entra", Some("try-me")).json(body);
        let (status, said) = self.call(path, &url, request, reqwest::Method::POST).await?;
        let schema = |name: &str| format!("/components/schemas/{name}");
        let name = format!("{url}: {status}");
        self.hold(&format!("the call of {name}"), schema(call), body);
        // The response allows each dialect; the connector speaks one.
        let spoken = match status {
            200 => answer,
            409 => error,
            400 if said["action"].is_string() => error,
            _ => "Problem",
        };
        self.hold(&name, schema(spoken), &said);
        Ok(())
    }
}

/// All calls that the platforms' owners have published, at every step, and let past, blocked and
/// rejected in each dialect.
async fn recorded_calls(caller: &mut Caller<'_>) -> anyhow::Result<()> {
    let payloads = Path::new(env!("CARGO_MANIFEST_DIR")).join("../api/tests/payloads");
    let mut calls = 0;
    for entry in std::fs::read_dir(payloads)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|it| it.to_str()).context("a name")?.to_owned();
        if !name.ends_with("-request.json") {
            continue;
        }
        let payload = read(path.to_str().context("a path of text")?)?;
        let connector = match name.split('-').next() {
            Some("extid") => "extid",
            _ if name.starts_with("b2c-custompolicy") => "policy",
            _ => "partners",
        };
        let steps: &[_] = match connector {
            "extid" => &[None],
            _ => &[Some("after-federation"), Some("before-create"), Some("before-token"), None],
        };
        for email in EMAILS {
            let body = with_email(payload.clone(), email);
            for step in steps {
                caller.post(connector, *step, &body).await?;
                calls += 1;
            }
        }
    }
    ensure!(calls > 100, "{calls}");
    Ok(())
}

/// What never becomes a sign-up, and how policies call without a body.
async fn other_calls(caller: &mut Caller<'_>) -> anyhow::Result<()> {
    use reqwest::{Method, RequestBuilder};
    const STEP: &str = "/connectors/{connector}/{step}";
    let login = |it: RequestBuilder| it.basic_auth("entra", Some("try-me"));
    let text = |it: RequestBuilder, kind: &str, body: String| {
        it.basic_auth("entra", Some("try-me")).header("content-type", kind).body(body)
    };
    let mut statuses = Vec::new();
    for connector in ["partners", "policy", "extid"] {
        let url = format!("/connectors/{connector}/before-create");
        let json = "application/json";
        let big = format!("{{\"a\":\"{}\"}}", "x".repeat(70_000));
        for (status, body) in [(400, "{".to_owned()), (400, "[]".to_owned()), (413, big)] {
            let request = |it| text(it, json, body);
            statuses.push((status, caller.call(STEP, &url, request, Method::POST).await?.0));
        }
        let request = |it| text(it, "text/plain", "{}".to_owned());
        statuses.push((415, caller.call(STEP, &url, request, Method::POST).await?.0));
        let nobody = |it: RequestBuilder| it.json(&json!({}));
        statuses.push((401, caller.call(STEP, &url, nobody, Method::POST).await?.0));
    }
    let nowhere =
        caller.call(STEP, "/connectors/nobody/before-create", login, Method::POST).await?;
    statuses.push((404, nowhere.0));
    let get = caller.call(STEP, "/connectors/partners/before-create", login, Method::GET).await?;
    statuses.push((405, get.0));
    for (status, email) in [(200, "ada"), (409, "blocked")] {
        let url = format!("/connectors/policy/before-create?email={email}%40example.com");
        statuses.push((status, caller.call(STEP, &url, login, Method::GET).await?.0));
        let path = format!("{STEP}/{{claims}}");
        let url = format!("/connectors/policy/before-create/email/{email}%40example.com");
        statuses.push((status, caller.call(&path, &url, login, Method::GET).await?.0));
        let url = format!("/connectors/policy?step=before-create&email={email}%40example.com");
        let path = "/connectors/{connector}";
        statuses.push((status, caller.call(path, &url, login, Method::GET).await?.0));
        let url = "/connectors/policy/before-create";
        let form = format!("email={email}%40example.com&city=London");
        let request = |it| text(it, "application/x-www-form-urlencoded", form);
        statuses.push((status, caller.call(STEP, url, request, Method::POST).await?.0));
    }
    for path in [
        "/healthz",
        "/readyz",
        "/metrics",
        "/schemas/",
        "/schemas/signup-event.v1.json",
        "/asyncapi.json",
        "/openapi.json",
    ] {
        statuses.push((200, caller.call(path, path, |it| it, Method::GET).await?.0));
    }
    for (place, (expected, status)) in statuses.into_iter().enumerate() {
        ensure!(expected == status, "call {place}: {status} instead of {expected}");
    }
    Ok(())
}

/// On the admin listener, as the back end of an app calls it.
async fn devices(caller: &mut Caller<'_>) -> anyhow::Result<()> {
    use reqwest::{Method, RequestBuilder};
    const PATH: &str = "/devices";
    let login = |it: RequestBuilder| it.bearer_auth(DEVICES_TOKEN);
    let list = "/devices?person=nobody";
    let url = format!("{}{list}", caller.up.admin);
    eventually(LIMIT, "the store is there", async || -> anyhow::Result<bool> {
        Ok(login(http().get(&url)).send().await?.status() == 200)
    })
    .await?;
    let device = json!({ "person": { "email": "ada@example.com" }, "kind": "fcm", "token": "abc" });

    let refused = caller.call(PATH, list, |it| it, Method::GET).await?;
    let bad = caller.call(PATH, PATH, |it| login(it).json(&json!({})), Method::POST).await?;
    let made = caller.call(PATH, PATH, |it| login(it).json(&device), Method::POST).await?;
    caller.hold("a registration", "/components/schemas/DeviceRegistration".to_owned(), &device);
    let person = made.1["person"].as_str().context("no person")?;
    let list = format!("/devices?person={person}");
    let listed = caller.call(PATH, &list, login, Method::GET).await?;

    ensure!([refused.0, bad.0, made.0, listed.0] == [401, 400, 201, 200], "{listed:?}");
    ensure!(listed.1.as_array().is_some_and(|it| it.len() == 1), "{listed:?}");
    Ok(())
}

#[tokio::test]
async fn what_is_answered_and_what_is_stored_is_as_documented() -> anyhow::Result<()> {
    let mut site = site()?;
    site.set("DEVICES_TOKEN", DEVICES_TOKEN);
    let up = site.up().await?;
    let mut caller = Caller { up: &up, openapi: read(OPENAPI)?, instances: Vec::new() };

    recorded_calls(&mut caller).await?;
    other_calls(&mut caller).await?;
    devices(&mut caller).await?;
    let mut instances = caller.instances;
    let events = site.replay(&[]).await?;
    assert!(events.len() > 20, "{}", events.len());
    // The parser does not look into examples.
    let example = "/components/messages/signUpEvent/examples/0/payload";
    let example = read(ASYNCAPI)?.pointer(example).cloned().context("no example")?;
    let events = std::iter::once(example).chain(events);
    instances.extend(events.enumerate().map(|(number, instance)| Instance {
        name: format!("event {number}"),
        document: "event",
        pointer: String::new(),
        instance,
    }));

    assert_eq!(wrong(&instances).await?, Vec::<String>::new());
    // The schemas do say something: nothing that was answered passes once it is spoiled.
    let answered = |end: &str, has: &str| {
        let fits = |it: &&Instance| it.pointer.ends_with(end) && it.instance.pointer(has).is_some();
        instances.iter().find(fits).cloned().with_context(|| format!("no {end} with {has}"))
    };
    let spoiled = [
        ("/ApiConnectorAnswer", "/action", json!("Allow")),
        ("/ApiConnectorValidationError", "/status", json!(409)),
        ("/CustomPolicyClaims", "/givenName", json!(null)),
        ("/CustomPolicyError", "/code", json!("ok")),
        ("/CustomExtensionAnswer", "/data/actions", json!([])),
        ("/Problem", "/code", json!("oops")),
    ];
    let mut bad = Vec::new();
    for (end, pointer, value) in &spoiled {
        let mut instance = answered(end, pointer)?;
        *instance.instance.pointer_mut(pointer).with_context(|| format!("{end} {pointer}"))? =
            value.clone();
        bad.push(Instance { name: (*end).to_owned(), ..instance });
    }
    let mut event = instances.into_iter().last().context("no event")?;
    event.instance["id"] = json!("not a UUID");
    bad.push(Instance { name: "/event".to_owned(), ..event });
    let wrong = wrong(&bad).await?;
    for it in bad {
        assert!(
            wrong.iter().any(|complaint| complaint.starts_with(&it.name)),
            "{}: {wrong:?}",
            it.name
        );
    }
    Ok(())
}
