//! Each platform, as it calls: its credentials, its calls and the answers it gets.

use std::net::Ipv4Addr;

use anyhow::{Context, ensure};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use serde_json::{Value, json};
use vestibule_testkit::{Issuer, eventually};

use crate::support::{LIMIT, Site, Up, http};

const LISTEN: &str = r#"
[listen]
connector = "127.0.0.1:0"
admin = "127.0.0.1:0"
"#;

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority(name: &str) -> anyhow::Result<Authority> {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    Ok(CertifiedIssuer::self_signed(params, KeyPair::generate()?)?)
}

fn named(name: &str) -> DistinguishedName {
    let mut names = DistinguishedName::new();
    names.push(DnType::CommonName, name);
    names
}

/// A certificate and its key in PEM, and the certificate as it is presented.
struct Identity {
    certificate: String,
    key: String,
    der: Vec<u8>,
}

fn identity(
    issuer: &Authority,
    name: &str,
    usage: ExtendedKeyUsagePurpose,
) -> anyhow::Result<Identity> {
    let mut params = CertificateParams::default();
    params.distinguished_name = named(name);
    params.subject_alt_names = vec![SanType::IpAddress(Ipv4Addr::LOCALHOST.into())];
    params.extended_key_usages = vec![usage];
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, issuer)?;
    Ok(Identity {
        certificate: certificate.pem(),
        key: key.serialize_pem(),
        der: certificate.der().to_vec(),
    })
}

/// A client that trusts one authority and may have a certificate.
fn client(trusted: &Authority, own: Option<&Identity>) -> anyhow::Result<reqwest::Client> {
    // Somebody else in the process may have been first.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let trusted = reqwest::Certificate::from_pem(trusted.pem().as_bytes())?;
    let mut client = reqwest::Client::builder().tls_certs_only([trusted]).tls_info(true);
    if let Some(Identity { certificate, key, .. }) = own {
        let pem = format!("{certificate}{key}");
        client = client.identity(reqwest::Identity::from_pem(pem.as_bytes())?);
    }
    Ok(client.build()?)
}

#[tokio::test]
async fn over_tls_certificates_and_keys_change_without_an_interruption() -> anyhow::Result<()> {
    let (servers, clients) = (authority("Server CA")?, authority("Client CA")?);
    let server = || identity(&servers, "vestibule", ExtendedKeyUsagePurpose::ServerAuth);
    let (first, second) = (server()?, server()?);
    let site = Site::with_config(&format!(
        r#"{LISTEN}
[listen.tls]
certificate = "tls.crt"
key = "tls.key"

[connectors.partners]
deadline = "10s"

[[connectors.partners.credentials]]
kind = "api-key"
name = "old-key"
header = "x-functions-key"
key = "example:old-secret"

[[connectors.partners.credentials]]
kind = "api-key"
name = "new-key"
header = "x-functions-key"
key = "example:new-secret"

[[connectors.partners.credentials]]
kind = "certificate"
name = "certificate"
roots = "clients.pem"
names = [{{ issuer = "CN=Client CA", subject = "CN=entra" }}]
"#
    ))?;
    site.write("tls.crt", &first.certificate)?;
    site.write("tls.key", &first.key)?;
    site.write("clients.pem", &clients.pem())?;
    let up = site.up().await?;
    ensure!(up.base.starts_with("https://"), "{}", up.base);
    let url = format!("{}/connectors/partners/before-create", up.base);
    let person = json!({ "email": "ada@example.com" });
    let plain = client(&servers, None)?;
    let call = async |key: &str| {
        let call = plain.post(&url).header("x-functions-key", key).json(&person);
        Ok::<_, reqwest::Error>(call.send().await?.status().as_u16())
    };
    let last_used = async |credential: &str| {
        let name = "vestibule_connector_credential_last_used_seconds";
        let labels = format!("{{connector=\"partners\",credential=\"{credential}\"}}");
        up.metric(&format!("{name}{labels}")).await
    };

    // Both keys are valid; the one that nobody uses any more is seen to fall silent.
    assert_eq!(call("wrong").await?, 401);
    assert_eq!(call("old-secret").await?, 200);
    let old = last_used("old-key").await?;
    assert!(old > 1.7e9 && last_used("new-key").await? == 0.0);
    assert_eq!(call("new-secret").await?, 200);
    assert!(last_used("new-key").await? >= old);
    assert_eq!(last_used("old-key").await?, old);

    // A certificate is as good as a key, if it is of the right person and vouched for.
    let usage = ExtendedKeyUsagePurpose::ClientAuth;
    for (issuer, name, status) in
        [(&clients, "entra", 200), (&clients, "eve", 401), (&authority("Client CA")?, "entra", 401)]
    {
        let own = identity(issuer, name, usage.clone())?;
        let answer = client(&servers, Some(&own))?.post(&url).json(&person).send().await?;
        assert_eq!(answer.status(), status, "{name}");
    }
    assert!(last_used("certificate").await? >= old);

    let presented = async || {
        // Another client each time: one that resumes a session presents what it saw at first.
        let answer = client(&servers, None)?.get(&url).send().await?;
        let tls = answer.extensions().get::<reqwest::tls::TlsInfo>().context("TLS")?;
        anyhow::Ok(tls.peer_certificate().context("a certificate")?.to_vec())
    };
    assert!(presented().await? == first.der);
    site.write("tls.key", &second.key)?;
    site.write("tls.crt", &second.certificate)?;
    eventually(LIMIT, "the new certificate is presented", async || {
        assert_eq!(call("new-secret").await?, 200, "nobody notices");
        anyhow::Ok(presented().await? == second.der)
    })
    .await?;

    // Without TLS nobody is answered.
    let http_url = url.replace("https://", "http://");
    assert!(http().post(http_url).json(&person).send().await.is_err());
    Ok(())
}

const START: &str =
    include_str!("../api/tests/payloads/extid-attributecollectionstart-request.json");
const SUBMIT: &str =
    include_str!("../api/tests/payloads/extid-attributecollectionsubmit-request.json");
const TOKEN: &str = include_str!("../api/tests/payloads/extid-tokenissuancestart-request.json");
const ONE_TIME_CODE: &str = include_str!("../api/tests/payloads/extid-emailotpsend-request.json");

/// An answer of External ID: exactly one action.
fn action(event: &str, action: &str, inputs: Value) -> Value {
    let mut only = inputs;
    let upper = format!("{}{}", event[..1].to_uppercase(), &event[1..]);
    only["@odata.type"] = json!(format!("microsoft.graph.{event}.{action}"));
    json!({ "data": {
        "@odata.type": format!("microsoft.graph.on{upper}ResponseData"), "actions": [only],
    } })
}

#[tokio::test]
async fn external_id_is_let_in_by_its_tokens_and_gets_its_actions() -> anyhow::Result<()> {
    let issuer = Issuer::start().await?;
    issuer.be_away(true);
    let site = Site::with_config(&format!(
        r#"{LISTEN}
[connectors.customers]
deadline = "10s"
protocol = "custom-extension"
block_title = "Hold on"

[[connectors.customers.credentials]]
kind = "bearer"
name = "entra"
metadata = "{}"
audiences = ["{}"]
tenants = ["{}"]

[[connectors.customers.rules]]
name = "no-throwaway-addresses"
when = "signup.email_domain == 'mailinator.com'"
block = "Please use another address."

[[connectors.customers.rules]]
name = "companies-have-names"
steps = ["before-create"]
when = "signup.claims.companyName == 'Nobody'"
reject = "Please name your company."
field = "companyName"

[[connectors.customers.rules]]
name = "prefill"
steps = ["after-federation"]
set = {{ companyName = "'Contoso'" }}

[[connectors.customers.rules]]
name = "graduation"
steps = ["before-create"]
set = {{ extension_graduationYear = "string(signup.claims['extension_<appid>_graduationYear'] + 1)" }}

[[connectors.customers.rules]]
name = "tier"
steps = ["before-token"]
set = {{ tier = "'gold'" }}
"#,
        issuer.metadata_url(),
        Issuer::AUDIENCE,
        Issuer::TENANT,
    ))?;
    let mut up = site.up().await?;
    let url = format!("{}/connectors/customers", up.base);
    let client = http();
    let call = async |token: &str, body: &str| {
        let call = client.post(&url).bearer_auth(token).header("content-type", "application/json");
        let answer = call.body(body.to_owned()).send().await?;
        let status = answer.status().as_u16();
        anyhow::Ok((status, answer.json::<Value>().await?))
    };
    let token = issuer.token(|_| {})?;

    // Nobody can tell a right token while the keys were never had.
    eventually(LIMIT, "the keys were asked for", async || issuer.fetches() > 0).await?;
    assert_eq!(call(&token, START).await?.0, 401);
    issuer.be_away(false);
    let start = eventually(LIMIT, "the keys are there", async || {
        let (status, answer) = call(&token, START).await?;
        anyhow::Ok((status == 200).then_some(answer))
    })
    .await?;
    // From now on without the issuer: its keys hold.
    issuer.be_away(true);
    let prefilled = json!({ "inputs": { "companyName": "Contoso" } });
    assert_eq!(start, action("attributeCollectionStart", "setPrefillValues", prefilled));

    let submit = "attributeCollectionSubmit";
    let changed = json!({ "attributes": { "extension_<appid>_graduationYear": 2011 } });
    let modify = action(submit, "modifyAttributeValues", changed);
    assert_eq!(call(&token, SUBMIT).await?, (200, modify.clone()));
    assert_eq!(call(&token, SUBMIT).await?, (200, modify), "the platform's retry");

    let nobody = SUBMIT.replace("Contoso University", "Nobody");
    let message = "Please name your company.";
    let errors = json!({ "message": message, "attributeErrors": { "companyName": message } });
    assert_eq!(call(&token, &nobody).await?, (200, action(submit, "showValidationError", errors)));

    let throwaway = SUBMIT.replace("larissa.price@contoso.onmicrosoft.com", "l@mailinator.com");
    let page = json!({ "title": "Hold on", "message": "Please use another address." });
    assert_eq!(call(&token, &throwaway).await?, (200, action(submit, "showBlockPage", page)));

    let gold = json!({ "claims": { "tier": "gold" } });
    let for_token = action("tokenIssuanceStart", "provideClaimsForToken", gold);
    assert_eq!(call(&token, TOKEN).await?, (200, for_token));

    let (status, refused) = call(&token, ONE_TIME_CODE).await?;
    assert_eq!((status, &refused["error"]["code"]), (422, &json!("event-not-answered")));

    for (what, token) in [
        ("another audience", issuer.token(|it| it["aud"] = json!("somebody else"))?),
        ("another caller", issuer.token(|it| it["azp"] = json!(Issuer::AUDIENCE))?),
        ("another tenant", issuer.token(|it| it["tid"] = json!(Issuer::AUDIENCE))?),
        ("long ago", issuer.token(|it| it["exp"] = json!(1_700_000_000))?),
        ("no token", "a.b.c".to_owned()),
    ] {
        assert_eq!(call(&token, SUBMIT).await?.0, 401, "{what}");
    }
    let strange = SUBMIT.replace(Issuer::TENANT, "bbbbbbbb-0000-cccc-1111-dddd2222eeee");
    assert_eq!(call(&token, &strange).await?.0, 401, "a call about another tenant");

    let events = site.replay(&[]).await?;
    let kinds: Vec<_> = events.iter().filter_map(|it| it["type"].as_str()).collect();
    let kinds: Vec<_> = kinds.iter().filter_map(|it| it.rsplit('.').next()).collect();
    assert_eq!(kinds[..4], ["screened", "accepted", "rejected", "blocked"], "{kinds:?}");
    let stopped = up.process.terminate(LIMIT).await?;
    for secret in [&token[..], "larissa.price", "12345678"] {
        assert!(!stopped.stderr.contains(secret), "{secret} is in the log");
    }
    Ok(())
}

/// A call of a custom policy, with its credential.
async fn policy_call(call: reqwest::RequestBuilder) -> anyhow::Result<(u16, Value)> {
    let answer = call.basic_auth("b2c", Some("try-me")).send().await?;
    Ok((answer.status().as_u16(), answer.json().await?))
}

#[tokio::test]
async fn a_custom_policy_is_answered_however_it_sends_its_claims() -> anyhow::Result<()> {
    let site = Site::with_config(&format!(
        r#"{LISTEN}
[connectors.policies]
deadline = "10s"
protocol = "custom-policy"
claim_headers = ["email", "city", "correlationId"]

[[connectors.policies.credentials]]
user = "b2c"
password = "example:try-me"

[[connectors.policies.rules]]
name = "no-throwaway-addresses"
when = "signup.email_domain == 'mailinator.com'"
block = "Please use another address."

[[connectors.policies.rules]]
name = "towns-have-names"
when = "has(signup.claims.city) && signup.claims.city.matches('[0-9]')"
reject = "A town is written without numbers."
field = "city"

[[connectors.policies.rules]]
name = "towns-in-title-case"
when = "has(signup.claims.city)"
set = {{ city = "title_case(signup.claims.city)" }}
"#
    ))?;
    let up = site.up().await?;
    let url = format!("{}/connectors/policies/before-create", up.base);
    let client = http();

    let claims = json!({ "email": "ada@example.com", "city": "vienna", "correlationId": "c-1" });
    let pairs = "email=ada%40example.com&city=vienna&correlationId=c-1";
    let form_type = "application/x-www-form-urlencoded";
    let headers = client.get(&url).header("email", "ada@example.com").header("city", "vienna");
    let in_path = format!("{url}/email/ada%40example.com/city/vienna?correlationId=c-1");
    for (way, call) in [
        ("Body", client.post(&url).json(&claims)),
        ("Form", client.post(&url).header("content-type", form_type).body(pairs)),
        ("QueryString", client.get(format!("{url}?{pairs}"))),
        ("Url", client.get(in_path)),
        ("Header", headers.header("correlationId", "c-1")),
    ] {
        assert_eq!(policy_call(call).await?, (200, json!({ "city": "Vienna" })), "{way}");
    }
    assert_eq!(site.replay(&[]).await?.len(), 1, "it was the same sign-up five times");

    for (claims, code, message) in [
        (json!({ "email": "a@mailinator.com" }), "blocked", "Please use another address."),
        (
            json!({ "email": "ada@example.com", "city": "4711" }),
            "rejected",
            "A town is written without numbers.",
        ),
    ] {
        let (status, answer) = policy_call(client.post(&url).json(&claims)).await?;
        let events = site.replay(&[]).await?;
        let event = events.last().context("an event")?;
        assert_eq!(status, 409, "{answer}");
        assert_eq!((&answer["status"], &answer["code"]), (&json!(409), &json!(code)));
        assert_eq!(answer["userMessage"], message);
        assert_eq!(answer["requestId"], event["id"], "what B2C shows leads to the event");
    }
    let wrong = client.post(&url).json(&claims).basic_auth("b2c", Some("wrong")).send().await?;
    assert_eq!(wrong.status(), 401);
    Ok(())
}

/// The same rules in each dialect; TOML knows no rules that connectors share.
fn rules_of(connector: &str, protocol: &str) -> String {
    format!(
        r#"
[connectors.{connector}]
deadline = "10s"
protocol = "{protocol}"

[[connectors.{connector}.credentials]]
user = "platform"
password = "example:try-me"

[[connectors.{connector}.rules]]
name = "no-throwaway-addresses"
when = "signup.email_domain in lists.throwaway"
block = "message:throwaway"

[[connectors.{connector}.rules]]
name = "towns-have-names"
steps = ["before-create"]
when = "signup.claims.city.matches('[0-9]')"
reject = "message:town"
field = "city"

[[connectors.{connector}.rules]]
name = "towns-in-title-case"
steps = ["before-create"]
set = {{ city = "title_case(signup.claims.city)" }}
"#
    )
}

/// What each dialect says for the same decision.
struct Person {
    email: &'static str,
    city: &'static str,
    locale: &'static str,
    api_connector: Value,
    custom_policy: (u16, Value),
    custom_extension: Value,
}

fn people() -> [Person; 3] {
    let submit = "attributeCollectionSubmit";
    [
        Person {
            email: "ada@example.com",
            city: "bad ischl",
            locale: "en",
            api_connector: json!({ "version": "1.0.0", "action": "Continue", "city": "Bad Ischl" }),
            custom_policy: (200, json!({ "city": "Bad Ischl" })),
            custom_extension: action(
                submit,
                "modifyAttributeValues",
                json!({ "attributes": { "city": "Bad Ischl" } }),
            ),
        },
        Person {
            email: "bob@example.com",
            city: "4711",
            locale: "de-AT",
            api_connector: json!({
                "version": "1.0.0", "action": "ValidationError", "status": 400,
                "userMessage": "Ohne Ziffern.",
            }),
            custom_policy: (409, json!({ "code": "rejected", "userMessage": "Ohne Ziffern." })),
            custom_extension: action(
                submit,
                "showValidationError",
                json!({
                    "message": "Ohne Ziffern.", "attributeErrors": { "city": "Ohne Ziffern." },
                }),
            ),
        },
        Person {
            email: "eve@mail.invalid",
            city: "Linz",
            locale: "fr",
            api_connector: json!({
                "version": "1.0.0", "action": "ShowBlockPage", "userMessage": "Another address.",
            }),
            custom_policy: (409, json!({ "code": "blocked", "userMessage": "Another address." })),
            custom_extension: action(
                submit,
                "showBlockPage",
                json!({ "message": "Another address." }),
            ),
        },
    ]
}

async fn call_as(up: &Up, path: &str, body: &Value) -> anyhow::Result<(u16, Value)> {
    let call = http().post(format!("{}/connectors/{path}", up.base)).json(body);
    let answer = call.basic_auth("platform", Some("try-me")).send().await?;
    Ok((answer.status().as_u16(), answer.json().await?))
}

#[tokio::test]
async fn the_same_rules_answer_the_same_person_on_every_platform() -> anyhow::Result<()> {
    let connectors = [
        rules_of("entra", "api-connector"),
        rules_of("policies", "custom-policy"),
        rules_of("customers", "custom-extension"),
    ];
    let shared = "[messages]\n\n[lists.throwaway]\nentries = [\"mail.invalid\"]\n";
    let site = Site::with_config(&format!("{LISTEN}\n{shared}{}", connectors.concat()))?;
    let english = "throwaway = \"Another address.\"\ntown = \"No digits.\"\n";
    site.write("messages/en.toml", english)?;
    site.write("messages/de.toml", "town = \"Ohne Ziffern.\"\n")?;
    let up = site.up().await?;

    for person in people() {
        let Person { email, city, locale, .. } = person;
        let flat = json!({ "email": email, "city": city, "ui_locales": locale });
        let answer = call_as(&up, "entra/before-create", &flat).await?;
        let status = if person.api_connector["status"] == 400 { 400 } else { 200 };
        assert_eq!(answer, (status, person.api_connector));

        let (status, answer) = call_as(&up, "policies/before-create", &flat).await?;
        let (expected_status, expected) = person.custom_policy;
        assert_eq!(status, expected_status, "{answer}");
        for (member, value) in expected.as_object().context("an object")? {
            assert_eq!(&answer[member], value);
        }

        let mut submit: Value = serde_json::from_str(SUBMIT)?;
        submit["data"]["authenticationContext"]["client"]["locale"] = json!(locale);
        submit["data"]["userSignUpInfo"] = json!({
            "attributes": {
                "email": { "value": email, "attributeType": "builtIn" },
                "city": {
                    "@odata.type": "microsoft.graph.stringDirectoryAttributeValue",
                    "value": city, "attributeType": "builtIn",
                },
            },
        });
        assert_eq!(call_as(&up, "customers", &submit).await?, (200, person.custom_extension));

        let events = site.replay(&[]).await?;
        let [.., first, second, third] = &events[..] else {
            anyhow::bail!("{} events", events.len())
        };
        let decided = |event: &Value| {
            let mut decision = event["data"]["decision"].clone();
            for reason in decision["reasons"].as_array_mut().into_iter().flatten() {
                // Nothing but how long it took tells them apart.
                reason.as_object_mut().map(|it| it.remove("took_us"));
            }
            (event["type"].clone(), event["subject"].clone(), decision)
        };
        assert_eq!(decided(first), decided(second));
        assert_eq!(decided(second), decided(third));
    }
    assert_eq!(site.replay(&[]).await?.len(), 9);
    Ok(())
}
