//! Subscribers that are called over HTTP, through the binary: what they get, however often they get
//! it, and what their answers do.

use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use anyhow::{Context, ensure};
use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse as _, Response},
    routing::post,
};
use data_encoding::BASE64;
use ring::hmac;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinHandle};
use vestibule_testkit::eventually;

use crate::support::{LIMIT, Site, Up, sign_up};

const KEY: [u8; 32] = [7; 32];

/// A customer database behind a webhook: it verifies each message and keeps it once, by its id.
pub(crate) struct Customers {
    address: String,
    ledger: Arc<Mutex<Ledger>>,
    server: JoinHandle<()>,
}

#[derive(Default)]
struct Ledger {
    /// By `webhook-id`.
    came: BTreeMap<String, Came>,
    /// Messages whose signature is not ours.
    forged: u32,
    mood: Mood,
}

/// A message.
struct Came {
    /// How many others were there before it.
    after: usize,
    times: usize,
    /// Whose event it is.
    person: String,
}

/// What it answers.
#[derive(Clone, Copy, Default)]
enum Mood {
    #[default]
    Takes,
    /// Takes each message, and says so of the first one at once, of the next one when it has come
    /// twice, and so on: its answers get lost.
    Storm,
    /// Always this.
    Says(StatusCode),
}

impl Customers {
    pub(crate) async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?.to_string();
        let ledger = Arc::<Mutex<Ledger>>::default();
        let routes = Router::new().route("/hook", post(take)).with_state(Arc::clone(&ledger));
        let server = tokio::spawn(async move {
            // Ends with the task.
            let _ = axum::serve(listener, routes).await;
        });
        Ok(Self { address, ledger, server })
    }

    /// A site with it as the subscriber `crm`.
    fn site(&self, more: &str) -> anyhow::Result<Site> {
        let mut site = Site::new("")?;
        site.set("USER", "grace");
        // Nothing here goes where the environment says.
        for proxy in ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"] {
            site.set(proxy, "http://127.0.0.1:9");
        }
        self.subscribe(&mut site, more)?;
        Ok(site)
    }

    pub(crate) fn subscribe(&self, site: &mut Site, more: &str) -> anyhow::Result<()> {
        site.set("CRM_KEY", &format!("whsec_{}", BASE64.encode(&KEY)));
        let file = format!(
            "retry = {{ initial = \"10ms\", multiplier = 1, jitter = 0.0, tries = 30 }}\n\
             breaker = {{ failures = 1000000 }}\nack_wait = \"5s\"\n{more}\n\
             [webhook]\nurl = \"http://{}/hook\"\nkeys = [\"env:CRM_KEY\"]\n\
             networks = [\"127.0.0.0/8\"]\n",
            self.address
        );
        site.write("subscribers/crm.toml", &file)
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }

    /// How often each message came.
    pub(crate) fn times(&self) -> Vec<usize> {
        self.ledger().came.values().map(|it| it.times).collect()
    }

    fn turns(&self, mood: Mood) {
        self.ledger().mood = mood;
    }

    /// Waits until messages about so many people, at least, have come.
    pub(crate) async fn wait_for(&self, people: usize) -> anyhow::Result<()> {
        eventually(LIMIT, &format!("{people} messages came"), async || {
            anyhow::Ok(self.ledger().came.len() >= people)
        })
        .await
    }
}

impl Drop for Customers {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn lock(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn take(
    State(ledger): State<Arc<Mutex<Ledger>>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let mut ledger = lock(&ledger);
    let Some((id, person)) = verified(&headers, &body) else {
        ledger.forged += 1;
        return StatusCode::UNAUTHORIZED.into_response();
    };
    let after = ledger.came.len();
    let came = ledger.came.entry(id).or_insert(Came { after, times: 0, person });
    came.times += 1;
    let Came { after, times, .. } = *came;
    match ledger.mood {
        Mood::Takes => StatusCode::NO_CONTENT.into_response(),
        Mood::Says(status) => status.into_response(),
        Mood::Storm if times > after => StatusCode::OK.into_response(),
        Mood::Storm => match times % 3 {
            0 => (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, "0")]).into_response(),
            1 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
            _ => StatusCode::BAD_GATEWAY.into_response(),
        },
    }
}

/// The id and the address in a message, if it is signed as agreed.
fn verified(headers: &HeaderMap, body: &[u8]) -> Option<(String, String)> {
    let header = |name: &str| headers.get(name)?.to_str().ok();
    let (id, at) = (header("webhook-id")?, header("webhook-timestamp")?);
    let signature = header("webhook-signature")?.strip_prefix("v1,")?;
    let signature = BASE64.decode(signature.as_bytes()).ok()?;
    let signed = [format!("{id}.{at}.").as_bytes(), body].concat();
    hmac::verify(&hmac::Key::new(hmac::HMAC_SHA256, &KEY), &signed, &signature).ok()?;
    let event: Value = serde_json::from_slice(body).ok()?;
    Some((id.to_owned(), event["data"]["email"].as_str()?.to_owned()))
}

/// Starts `up` and waits until the subscriber is given events: it begins with those of then.
async fn started(site: &Site) -> anyhow::Result<Up> {
    let up = site.up().await?;
    eventually(LIMIT, "the subscriber runs", async || {
        anyhow::Ok(up.metric("vestibule_subscribers_running").await? == 1.0)
    })
    .await?;
    Ok(up)
}

async fn accept(up: &Up, people: std::ops::Range<usize>) -> anyhow::Result<()> {
    for n in people {
        let person = json!({ "email": format!("ada-{n}@example.com") });
        let (status, answer) = sign_up(&up.base, "before-create", &person).await?;
        ensure!((status, &answer["action"]) == (200, &json!("Continue")), "{status} {answer}");
    }
    Ok(())
}

async fn json_of(site: &Site, arguments: &[&str]) -> anyhow::Result<Value> {
    let finished = site.run(&[arguments, &["--output", "json"]].concat()).await?;
    ensure!(finished.code == 0, "{arguments:?}: {finished:?}");
    Ok(serde_json::from_str(&finished.stdout)?)
}

/// How much of the subscriber's is not done.
async fn undone(site: &Site) -> anyhow::Result<u64> {
    let lag = json_of(site, &["subscriber", "lag", "crm"]).await?;
    let counts = ["waiting", "in_hand", "retries"].map(|it| lag[0][it].as_u64());
    counts.into_iter().sum::<Option<u64>>().context("no counts")
}

async fn parked(site: &Site) -> anyhow::Result<Vec<Value>> {
    let list = ["dead", "list", "--letters", "--limit", "500", "--state", "parked"];
    Ok(json_of(site, &list).await?.as_array().context("no list")?.clone())
}

#[tokio::test]
async fn each_message_counts_once_however_often_it_comes() -> anyhow::Result<()> {
    let customers = Customers::start().await?;
    customers.turns(Mood::Storm);
    let site = customers.site("")?;
    let mut up = started(&site).await?;

    accept(&up, 0..8).await?;
    // Whatever was in hand then comes again.
    customers.wait_for(3).await?;
    up.process.kill();
    let up = started(&site).await?;
    accept(&up, 8..20).await?;
    customers.wait_for(20).await?;
    eventually(LIMIT, "all is done", async || anyhow::Ok(undone(&site).await? == 0)).await?;

    {
        let ledger = customers.ledger();
        let mut people: Vec<_> = ledger.came.values().map(|it| it.person.clone()).collect();
        people.sort_unstable();
        people.dedup();
        assert_eq!((ledger.came.len(), people.len()), (20, 20), "each once, by its id");
        assert_eq!(ledger.forged, 0);
        let times: usize = ledger.came.values().map(|it| it.times).sum();
        assert!(times >= (1..=20).sum(), "there was a storm: {times}");
    }
    assert!(parked(&site).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn what_is_refused_for_good_is_parked_and_delivered_once_that_is_mended() -> anyhow::Result<()>
{
    let customers = Customers::start().await?;
    customers.turns(Mood::Says(StatusCode::BAD_REQUEST));
    let site = customers.site("")?;
    let up = started(&site).await?;
    accept(&up, 0..3).await?;
    eventually(LIMIT, "all are parked", async || anyhow::Ok(parked(&site).await?.len() == 3))
        .await?;
    assert!(customers.ledger().came.values().all(|it| it.times == 1), "tried again in vain");
    let letters = parked(&site).await?;
    assert!(letters.iter().all(|it| it["cause"] == "refused"), "{letters:?}");

    customers.turns(Mood::Takes);
    let retry = site.run(&["dead", "retry", "--worker", "crm", "--yes"]).await?;
    ensure!(retry.code == 0, "{retry:?}");
    eventually(LIMIT, "all are delivered", async || {
        let ledger = customers.ledger();
        anyhow::Ok(ledger.came.values().all(|it| it.times == 2))
    })
    .await?;
    assert_eq!(customers.ledger().came.len(), 3, "under the same ids");
    Ok(())
}

#[tokio::test]
async fn who_is_gone_is_sent_no_more_and_misses_nothing_once_back() -> anyhow::Result<()> {
    let customers = Customers::start().await?;
    customers.turns(Mood::Says(StatusCode::GONE));
    let site = customers.site("concurrency = 1")?;
    let mut up = started(&site).await?;
    accept(&up, 0..1).await?;
    let said =
        up.process.wait_for_line(LIMIT, |line| line.contains("the worker is paused")).await?;
    assert!(said.contains("410 Gone") && said.contains("crm"), "{said}");
    eventually(LIMIT, "it shows", async || {
        anyhow::Ok(up.metric("vestibule_worker_paused{worker=\"crm\"}").await? == 1.0)
    })
    .await?;

    accept(&up, 1..5).await?;
    let lag = json_of(&site, &["subscriber", "lag", "crm"]).await?;
    assert_eq!(lag[0]["paused"]["by"], "vestibule", "{lag}");
    customers.turns(Mood::Takes);
    assert_eq!(customers.ledger().came.len(), 1, "it was left alone");
    let resumed = site.run(&["subscriber", "resume", "crm"]).await?;
    ensure!(resumed.code == 0, "{resumed:?}");
    customers.wait_for(5).await?;
    eventually(LIMIT, "all is done", async || anyhow::Ok(undone(&site).await? == 0)).await?;
    assert!(parked(&site).await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn nothing_is_sent_to_this_machine_unless_its_operators_say_so() -> anyhow::Result<()> {
    let customers = Customers::start().await?;
    let site = customers.site("")?;
    let port = customers.address.rsplit(':').next().context("no port")?;
    let file = |host: &str| {
        format!("[webhook]\nurl = \"https://{host}:{port}/hook\"\nkeys = [\"env:CRM_KEY\"]\n")
    };
    for host in ["127.0.0.1", "2130706433", "[::ffff:127.0.0.1]", "169.254.169.254"] {
        site.write("subscribers/crm.toml", &file(host))?;
        let check = site.run(&["check"]).await?;
        assert_eq!(check.code, 1, "{host}: {check:?}");
        assert!(check.stderr.contains("`networks`"), "{host}: {}", check.stderr);
    }

    // A name shows only when it is called.
    site.write("subscribers/crm.toml", &file("localhost"))?;
    let test = site.run(&["subscriber", "test", "crm"]).await?;
    assert_eq!(test.code, 1, "{test:?}");
    let said = format!("{}{}", test.stdout, test.stderr);
    assert!(said.contains("this machine") && said.contains("`networks`"), "{said}");
    assert!(customers.ledger().came.is_empty() && customers.ledger().forged == 0);
    Ok(())
}
