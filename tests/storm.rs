//! Every sort of channel, target and subscriber at once, over NATS and PostgreSQL, while the stream
//! delivers each event up to twenty times: everybody is told, entered and let in once.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use async_nats::{ConnectOptions, HeaderMap, jetstream};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use vestibule_testkit::{Graph, GraphCall, PushCall, PushServices, Scim, Smtp, eventually};

use crate::{
    notify::{Receiver, channel, push_channels, register_for, set_push_secrets},
    permissions::{GROUP, group, scim_and_sql, sorted},
    scaled_out::Stack,
    support::{LIMIT, sign_up},
    webhook::Customers,
};

/// The event of the first of them comes once, that of the last so many times.
const PEOPLE: usize = 20;

const STATEMENTS: &str = r#"
[workers.statements.crm]
database = "env:CRM_URL"

[[workers.statements.crm.run]]
sql = "INSERT INTO partners (email) VALUES (:email)"
parameters = { email = "/data/email" }
"#;

fn address(n: usize) -> String {
    format!("ada-{n}@example.com")
}

/// Channels that are called over HTTP or mail, each with a path of its own.
fn channels(mail: &Smtp) -> String {
    let webhook = |name: &str, format: &str| {
        let key = if format == "json" { "signing_key = \"env:CRM_KEY\"\n" } else { "" };
        channel(
            name,
            &format!("kind = \"webhook\"\nurl = \"env:URL_{name}\"\nformat = \"{format}\"\n{key}"),
        )
    };
    [
        webhook("slack", "slack"),
        webhook("teams", "teams"),
        webhook("json", "json"),
        channel("ntfy", "kind = \"ntfy\"\nurl = \"env:URL_ntfy\"\n"),
        channel(
            "mail",
            &format!(
                "kind = \"mail\"\nserver = \"{}\"\ntls = \"none\"\n\
                 from = \"us@example.com\"\nto = [\"person\"]\n",
                mail.url()
            ),
        ),
    ]
    .concat()
}

/// Puts each event into the stream again, the nth so that it stands there n times.
async fn storm(stack: &Stack, events: &[Value]) -> anyhow::Result<()> {
    let options = ConnectOptions::with_user_and_password("relay".into(), "relay-secret".into())
        .custom_inbox_prefix("_INBOX_relay");
    let stream = jetstream::new(options.connect(stack.nats.url()).await?);
    let mut last = 0;
    for (n, event) in events.iter().enumerate() {
        for copy in 0..n {
            let mut headers = HeaderMap::new();
            headers.insert(async_nats::header::NATS_MESSAGE_ID, format!("{n}-{copy}"));
            let stored = stream
                .publish_with_headers(
                    "signups.partners.accepted",
                    headers,
                    event.to_string().into(),
                )
                .await?
                .await?;
            last = stored.sequence;
        }
    }
    ensure!(last == (1..=events.len() as u64).sum::<u64>(), "the stream holds {last}");
    Ok(())
}

/// Waits until no worker has anything to do, and nothing was given up.
async fn idle(stack: &Stack) -> anyhow::Result<()> {
    eventually(LIMIT, "the workers have nothing left to do", async || {
        // More than once: between the looks at stream and store an event may go from one to the other.
        for _ in 0..3 {
            let list = stack.site.run(&["worker", "list", "--output", "json"]).await?;
            let workers: Vec<Value> = serde_json::from_str(&list.stdout)?;
            let is_idle = |it: &Value| {
                ["waiting", "in_hand", "retries"].iter().all(|key| it[key] == json!(0))
            };
            if workers.len() < 6 || !workers.iter().all(is_idle) {
                return Ok(false);
            }
            let given_up = workers.iter().find(|it| it["dead_letters"] != json!(0));
            ensure!(given_up.is_none(), "{given_up:?}");
        }
        anyhow::Ok(true)
    })
    .await
}

#[tokio::test]
async fn whatever_comes_up_to_twenty_times_has_each_effect_once() -> anyhow::Result<()> {
    let services = PushServices::start().await?;
    let mail = Smtp::start().await?;
    let (receiver, url) = Receiver::start(&[]).await?;
    let graph = Graph::start().await?;
    graph.add_group(GROUP);
    let mut scim = Scim::start().await?;
    let guests = scim.add_group("guests").await?;
    let customers = Customers::start().await?;
    let config = [
        &push_channels(&services),
        &channels(&mail),
        &group(&graph),
        &scim_and_sql(&scim, &guests),
        STATEMENTS,
    ];
    let mut stack = Stack::start_bare(&config.concat()).await?;
    let site = &mut stack.site;
    set_push_secrets(site, &services);
    for channel in ["slack", "teams", "json", "ntfy"] {
        site.set(&format!("URL_{channel}"), &format!("{url}/{channel}"));
    }
    site.set("GRAPH_SECRET", Graph::CLIENT_SECRET);
    site.set("SCIM_TOKEN", Scim::TOKEN);
    site.set("CRM_URL", &stack.postgres.url());
    site.set("ERP", &stack.postgres.url());
    customers.subscribe(site, "")?;
    site.write(
        "subscribers/journal.toml",
        "[exec]\ncommand = [\"sh\", \"-c\", \"cat >/dev/null; echo $VESTIBULE_EVENT_ID >>done\"]\n\
         directory = \".\"\n",
    )?;
    let mut database = PgConnection::connect(&stack.postgres.url()).await?;
    // Without keys: whoever came twice would stand there twice.
    let tables = "CREATE TABLE partners (email text); CREATE TABLE access (email text, role text)";
    sqlx::raw_sql(tables).execute(&mut database).await?;
    stack.migrate().await?;

    // Each has a browser and two telephones.
    let mut up = stack.site.up().await?;
    let people: BTreeSet<_> = (0..PEOPLE).map(address).collect();
    let mut accounts = Vec::new();
    for email in &people {
        accounts.push(graph.add_user(&json!({ "mail": email })));
        for device in [
            json!({ "kind": "web-push", "subscription": services.subscribe()? }),
            json!({ "kind": "fcm", "token": format!("android-{}", accounts.len()) }),
            json!({ "kind": "apns", "token": format!("{:04x}", accounts.len()) }),
        ] {
            register_for(&up.admin, email, device).await?;
        }
    }
    up.process.terminate(LIMIT).await?;

    let (_api, base) = stack.api(&[]).await?;
    for email in &people {
        let person = json!({ "email": email, "surname": "Lovelace" });
        let (status, answer) = sign_up(&base, "before-create", &person).await?;
        ensure!((status, &answer["action"]) == (200, &json!("Continue")), "{status} {answer}");
    }
    let events = eventually(LIMIT, "all are in the stream", async || {
        let events = stack.site.replay(&[]).await?;
        anyhow::Ok((events.len() == PEOPLE).then_some(events))
    })
    .await?;
    storm(&stack, &events).await?;
    // Stopped in the middle, it hands back what it has not begun.
    let mut workers = stack.worker(&[]).await?;
    customers.wait_for(PEOPLE / 2).await?;
    let stopped = workers.terminate(LIMIT).await?;
    ensure!(stopped.status.success(), "{}", stopped.stderr);
    let _workers = stack.worker(&[]).await?;
    idle(&stack).await?;

    // ntfy is called at its root, with the topic in the message.
    let paths = BTreeMap::from(["/slack", "/teams", "/json", "/"].map(|it| (it, PEOPLE)));
    let mut called = BTreeMap::new();
    let calls = receiver.calls();
    for call in &calls {
        *called.entry(call.path.as_str()).or_insert(0) += 1;
    }
    assert_eq!(called, paths);
    let mails: Vec<_> = mail.mails().into_iter().flat_map(|it| it.recipients).collect();
    assert_eq!(sorted(mails), Vec::from_iter(people.clone()));
    for service in [PushCall::Browser, PushCall::Firebase, PushCall::Apple] {
        assert_eq!(services.requests(service).len(), PEOPLE, "{service:?}");
    }
    for sql in ["SELECT email FROM partners ORDER BY 1", "SELECT email FROM access ORDER BY 1"] {
        let rows: Vec<String> = sqlx::query_scalar(sql).fetch_all(&mut database).await?;
        assert_eq!(rows, Vec::from_iter(people.clone()), "{sql}");
    }
    assert_eq!(sorted(graph.members(GROUP)), sorted(accounts));
    assert_eq!(graph.requests_of(GraphCall::AddMember).len(), PEOPLE);
    assert_eq!(scim.members(&guests).await?, Vec::from_iter(people));
    assert_eq!(scim.users().await?.len(), PEOPLE);
    assert_eq!(customers.times(), [1; PEOPLE]);
    let journal = std::fs::read_to_string(stack.site.path().join("subscribers/done"))?;
    let ids = events.iter().map(|it| it["id"].as_str().map(str::to_owned).context("no id"));
    let ids = ids.collect::<anyhow::Result<Vec<_>>>()?;
    assert_eq!(sorted(journal.lines().map(str::to_owned).collect()), sorted(ids));
    Ok(())
}
