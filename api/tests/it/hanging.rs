//! Everything behind the connector hangs at once, and every call has its answer in time: lookups
//! that connect and hear nothing, approvals and a log that never return. The answer is the one that
//! the policies of the rules and of the storage name.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use axum::{body::Body, http::StatusCode};
use futures_util::future::join_all;
use proptest::{prelude::*, strategy::ValueTree as _, test_runner::TestRunner};
use serde_json::{Map, Value, json};
use tokio::{net::TcpListener, time::Instant};
use vestibule_api::{
    ApprovalSettings, Approvals, BreakerSettings, CacheSettings, ConnectorSettings, DatabaseUrl,
    Decider, HttpMethod, HttpSettings, Lookup, LookupMetrics, LookupSettings, LookupSource,
    LookupWithArguments, Messages, OnError, OnStorageFailure, Received, ReferenceData, Reply,
    RuleOutcome, RuleSettings, Rules, Standing, TRY_AGAIN, Text,
};
use vestibule_events::{ConnectorName, Kind, Mode, Outcome, Person, Protocol, Step};

use crate::{
    dialects::any_value,
    support::{BadLog, Endpoint, Misbehaviour, partners, request},
};

const DEADLINE: Duration = Duration::from_millis(300);

/// For a machine that does much else. What hangs here hangs for a minute and more.
const MARGIN: Duration = Duration::from_secs(20);

/// No limit but the connector's deadline comes first.
const LONG: Duration = Duration::from_secs(60);

const CALLS: usize = 120;
const AT_ONCE: usize = 12;

/// What a rule does that waits for something, or has nothing to wait for.
#[derive(Clone, Copy, Debug)]
enum Waits {
    /// Its condition asks this lookup.
    Condition(&'static str),
    /// What it sets comes from this lookup.
    Claim(&'static str),
    Approval,
    Nothing,
}

#[derive(Clone, Copy, Debug)]
enum Policy {
    Continue,
    Reject,
    Block,
}

type RuleCase = (Waits, Policy, Mode);

#[derive(Clone, Debug)]
struct Case {
    protocol: Protocol,
    step: Step,
    claims: Map<String, Value>,
    rules: Vec<RuleCase>,
    lets_through: bool,
}

fn any_case() -> impl Strategy<Value = Case> {
    let lookup = || prop::sample::select(vec!["http", "postgres", "mysql"]);
    let waits = prop_oneof![
        4 => lookup().prop_map(Waits::Condition),
        2 => lookup().prop_map(Waits::Claim),
        1 => Just(Waits::Approval),
        1 => Just(Waits::Nothing),
    ];
    let policy = prop_oneof![3 => Just(Policy::Continue), 1 => Just(Policy::Reject), 1 => Just(Policy::Block)];
    let mode = prop_oneof![3 => Just(Mode::Enforce), 1 => Just(Mode::Warn), 1 => Just(Mode::Audit)];
    let protocols = vec![Protocol::ApiConnector, Protocol::CustomPolicy, Protocol::CustomExtension];
    (
        prop::sample::select(protocols),
        prop::sample::select(Step::ALL.to_vec()),
        prop::collection::btree_map("[a-e]{4,6}", any_value(), 0..6),
        prop::collection::vec((waits, policy, mode), 1..8),
        any::<bool>(),
    )
        .prop_map(|(protocol, step, claims, rules, lets_through)| Case {
            protocol,
            step,
            claims: claims.into_iter().collect(),
            rules,
            lets_through,
        })
}

impl Case {
    fn rules(&self) -> Vec<RuleSettings> {
        let rule = |(number, &(waits, policy, mode)): (usize, &RuleCase)| {
            let set = |value: String| RuleOutcome::Set { claims: [("note".into(), value)].into() };
            let (when, outcome) = match waits {
                Waits::Condition(lookup) => {
                    (format!("lookups.{lookup}.found"), RuleOutcome::Accept)
                }
                Waits::Claim(lookup) => ("true".into(), set(format!("lookups.{lookup}.name"))),
                Waits::Approval => {
                    ("true".into(), RuleOutcome::RequireApproval { message: WAIT.into() })
                }
                Waits::Nothing => ("true".into(), set("'set'".into())),
            };
            RuleSettings {
                name: format!("{number}"),
                steps: vec![],
                when,
                outcome,
                on_error: match policy {
                    Policy::Continue => OnError::Continue,
                    Policy::Reject => OnError::Reject { message: NO.into() },
                    Policy::Block => OnError::Block { message: NO.into() },
                },
                mode,
            }
        };
        self.rules.iter().enumerate().map(rule).collect()
    }

    /// What is decided where nothing answers.
    fn outcome(&self) -> Outcome {
        let mut claims = Map::new();
        let enforced = self.rules.iter().filter(|(_, _, mode)| *mode == Mode::Enforce);
        for (waits, policy, _) in enforced {
            match (waits, policy) {
                (Waits::Nothing, _) => drop(claims.insert("note".into(), "set".into())),
                (Waits::Approval, _) => return Outcome::Pending { message: WAIT.into(), claims },
                (_, Policy::Continue) => {}
                (_, Policy::Reject) => return Outcome::Reject { message: NO.into(), field: None },
                (_, Policy::Block) => return Outcome::Block { message: NO.into() },
            }
        }
        Outcome::Continue { claims }
    }

    fn path(&self) -> String {
        match self.protocol {
            Protocol::CustomExtension => "/connectors/partners".to_owned(),
            _ => format!("/connectors/partners/{}", self.step),
        }
    }

    fn body(&self) -> Value {
        if self.protocol != Protocol::CustomExtension {
            let mut flat = self.claims.clone();
            flat.insert("email".to_owned(), "ada@example.com".into());
            return flat.into();
        }
        let mut data = json!({
            "authenticationContext": {
                "clientServicePrincipal": { "appId": "app" },
                "user": { "id": "o-1", "mail": "ada@example.com" },
            },
        });
        let event = match self.step {
            Step::AfterFederation => "attributeCollectionStart",
            Step::BeforeCreate => "attributeCollectionSubmit",
            Step::BeforeToken => "tokenIssuanceStart",
        };
        if self.step != Step::BeforeToken {
            let attribute = |value: &Value| {
                json!({
                    "@odata.type": "microsoft.graph.stringDirectoryAttributeValue",
                    "value": value,
                })
            };
            let claims = self.claims.iter().map(|(name, value)| (name.clone(), attribute(value)));
            let mut attributes: Map<_, _> = claims.collect();
            attributes.insert("email".to_owned(), attribute(&"ada@example.com".into()));
            data["userSignUpInfo"] = json!({ "attributes": attributes });
        }
        json!({ "type": format!("microsoft.graph.authenticationEvent.{event}"), "data": data })
    }

    fn settings(&self, lookups: &[LookupWithArguments]) -> ConnectorSettings {
        let reference = ReferenceData::new(HashMap::new(), lookups.to_vec());
        let rules = Rules::compile_with(self.rules(), &reference.known(), &Messages::default());
        let approvals = ApprovalSettings {
            approvals: Arc::new(Hangs),
            time_limit: LONG,
            reapply_after: None,
            denied: Text::plain(NO),
        };
        ConnectorSettings {
            protocol: self.protocol,
            deadline: DEADLINE,
            decider: Decider {
                rules: Arc::new(rules.expect("the rules compile")),
                reference: Arc::new(reference),
                approvals: Some(Arc::new(approvals)),
            },
            on_storage_failure: if self.lets_through {
                OnStorageFailure::LetThrough
            } else {
                OnStorageFailure::Refuse { message: NOT_STORED.into() }
            },
            ..partners()
        }
    }

    /// Calls, and holds the answer to what it should be and when. Tells how long it took, and whether the
    /// machine was too busy to ask all rules.
    async fn try_it(&self, lookups: &[LookupWithArguments]) -> anyhow::Result<(Duration, bool)> {
        let (settings, expected) = (self.settings(lookups), self.settings(lookups));
        let endpoint = Endpoint::over(BadLog(Misbehaviour::Hangs), settings);
        let body = self.body().to_string();
        let call = request(&self.path()).body(Body::from(body.clone()))?;
        let sent = Instant::now();
        let answer = endpoint.call(call).await?;
        let took = sent.elapsed();

        let dialect = expected.dialect();
        let received = Received::json(&expected.name, Some(self.step), body.as_bytes());
        let read = dialect.read(&received).map_err(|why| anyhow::anyhow!("{why:?}"))?;
        let written = |outcome: &Outcome| -> anyhow::Result<(StatusCode, Value)> {
            let has_event = Kind::of(self.step, outcome).is_some();
            let not_stored = Outcome::Block { message: NOT_STORED.into() };
            let reply = if has_event && !self.lets_through {
                Reply::without_storage(&not_stored)
            } else {
                Reply::new(outcome, None)
            };
            let written = dialect.write(&read.shape, &reply);
            Ok((written.status, serde_json::from_slice(&written.body)?))
        };
        let outcome = self.outcome();
        let has_event = Kind::of(self.step, &outcome).is_some();
        let (answered, expected) = ((answer.status, answer.body), written(&outcome)?);
        let is_too_busy = answered != expected;
        if is_too_busy {
            let too_much = written(&Outcome::Block { message: TRY_AGAIN.to_owned() })?;
            assert_eq!(answered, too_much, "{self:?} should be answered {expected:?}");
        }
        assert!(took <= DEADLINE + MARGIN, "{self:?} took {took:?}");
        // The log was waited for until the end, or all this would try nothing.
        assert!(took >= DEADLINE || !has_event, "{self:?} took only {took:?}");
        Ok((took, is_too_busy))
    }
}

const WAIT: &str = "Somebody has to agree first.";
const NO: &str = "This cannot be found out now.";
const NOT_STORED: &str = "Please try again later.";

struct Hangs;

#[async_trait]
impl Approvals for Hangs {
    async fn standing(&self, _: &Person, _: &ConnectorName) -> Option<Standing> {
        std::future::pending().await
    }
}

/// Takes every connection and what comes over it, and never says anything.
async fn silence() -> anyhow::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    // The task ends with the runtime of the test.
    tokio::spawn(async move {
        loop {
            if let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(
                    async move { tokio::io::copy(&mut stream, &mut tokio::io::sink()).await },
                );
            }
        }
    });
    Ok(address.to_string())
}

fn lookups(address: &str) -> anyhow::Result<Vec<LookupWithArguments>> {
    let sql = |scheme: &str, query: &str| -> anyhow::Result<LookupSource> {
        let database = DatabaseUrl::parse(&format!("{scheme}://ada@{address}/crm").into())?;
        Ok(LookupSource::Sql { database, query: query.to_owned() })
    };
    let http = LookupSource::Http(HttpSettings {
        url: format!("http://{address}/{{who}}"),
        method: HttpMethod::Get,
        arguments: vec!["who".to_owned()],
        headers: vec![],
        fields: BTreeMap::new(),
        allow_private: true,
        ca_file: None,
        answer_bytes_max: HttpSettings::ANSWER_BYTES_MAX,
    });
    let lookup = |name: &str, source| -> anyhow::Result<LookupWithArguments> {
        let settings = LookupSettings {
            name: name.to_owned(),
            source,
            arguments: 1,
            time_limit: LONG,
            cache: CacheSettings { fresh: LONG, stale: LONG, entries: 100 },
            // Fewer than there are calls, so that some wait for a place and others for an answer.
            concurrency: 2,
            breaker: BreakerSettings { failures: 0, pause: LONG },
        };
        let lookup = Lookup::new(settings, &LookupMetrics::unregistered())?;
        let asked = ["signup.email".to_owned()];
        LookupWithArguments::new(lookup, &asked).map_err(|faults| anyhow::anyhow!("{faults:?}"))
    };
    Ok(vec![
        lookup("http", http)?,
        lookup("postgres", sql("postgres", "SELECT name FROM people WHERE email = $1")?)?,
        lookup("mysql", sql("mysql", "SELECT name FROM people WHERE email = ?")?)?,
    ])
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_hangs_every_call_has_its_answer_in_time() -> anyhow::Result<()> {
    let lookups = lookups(&silence().await?)?;
    let mut runner = TestRunner::default();
    let mut cases = Vec::new();
    for _ in 0..CALLS {
        let case = any_case().new_tree(&mut runner).map_err(|why| anyhow::anyhow!("{why}"))?;
        cases.push(case.current());
    }
    let (mut waited, mut too_busy) = (0, 0);
    for some in cases.chunks(AT_ONCE) {
        for tried in join_all(some.iter().map(|case| case.try_it(&lookups))).await {
            let (took, is_too_busy) = tried?;
            waited += usize::from(took >= DEADLINE);
            too_busy += usize::from(is_too_busy);
        }
    }
    // Rules that come much too late are not asked any more; other programs may cause it now and then.
    assert!(too_busy < CALLS / 4, "in {too_busy} of {CALLS} not all rules were asked");
    assert!(waited > CALLS / 3, "only {waited} of {CALLS} had anything to wait for");
    Ok(())
}
