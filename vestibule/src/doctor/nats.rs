//! NATS: the server, the stream, the consumers, the users and the clock.

use std::time::{Duration, Instant};

use serde_json::Value;
use time::OffsetDateTime;
use tokio::time::timeout;
use vestibule_events::{
    ConsumerFacts, ConsumerSpec, Inspector, LogError, Misfit, Role, ServerFacts, StreamFacts,
};
use vestibule_workers::consumer_spec;

use super::{Finding, about, ahead, clock, mebibytes};
use crate::{
    config::{Config, NatsConfig},
    wiring,
};

/// For each look at the server.
const LIMIT: Duration = Duration::from_secs(5);

/// An event with everything doubled and escaped.
const EVENT_BYTES_MAX: usize = 256 * 1024;

/// In the order in which they see most.
const ROLES: [Role; 4] = [Role::Auditor, Role::Provisioner, Role::Relay, Role::Worker];

pub(super) async fn findings(
    config: &Config,
    nats: &NatsConfig,
    monitoring: Option<&str>,
) -> Vec<Finding> {
    let specs: Vec<_> =
        config.all_workers().map(|it| consumer_spec(it.name(), &it.settings)).collect();
    let names: Vec<_> = specs.iter().map(|it| it.name.clone()).collect();
    let mut findings = judge_privacy(nats);
    let mut eyes = None;
    for role in ROLES {
        let login = login(nats, role);
        if !login && eyes.is_some() {
            findings.push(judge_nameless(role, nats));
            continue;
        }
        match connect(config, nats, role).await {
            Ok(mut inspector) => {
                findings.push(match login {
                    true => judge_user(role, timely(inspector.misfits(&names)).await),
                    false => judge_nameless(role, nats),
                });
                eyes = eyes.or(Some(inspector));
            }
            Err(LogError::Refused(error)) => findings.push(Finding::critical(
                user(role),
                format!("{error:#}"),
                format!("compare nats.{}.user and its password with nats.conf", role.as_str()),
            )),
            Err(LogError::Unavailable(error)) => {
                findings.push(away(nats, &error));
                return findings;
            }
        }
    }
    let Some(inspector) = eyes else { return findings };
    let server = inspector.server();
    findings.extend(judge_server(&server));
    let monitoring = match monitoring {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None => usual_monitoring(&nats.url),
    };
    findings.push(judge_sync(&sync(&monitoring, &server.id).await, server.is_clustered));
    let (now, asked) = (OffsetDateTime::now_utc(), Instant::now());
    let stream = match timely(inspector.stream()).await {
        Ok(Some(stream)) => stream,
        Ok(None) => {
            let found = format!("there is no stream {}", nats.stream);
            findings.push(Finding::critical("stream", found, "vestibule migrate"));
            return findings;
        }
        Err(error) => {
            let remedy =
                "see whether JetStream is up (`/healthz` of its monitoring), and what it logs";
            findings.push(Finding::critical("stream", text(&error), remedy));
            return findings;
        }
    };
    let took = asked.elapsed();
    findings.extend(judge_stream(&stream, config.log.retention, server.is_clustered, now));
    let clock_ahead = stream.server_time.map(|it| ahead(it, now, took));
    findings.extend(clock_ahead.map(|it| clock("clock.nats", "the NATS server", it)));
    for spec in &specs {
        let consumer = timely(inspector.consumer(spec)).await;
        findings.push(judge_consumer(spec, consumer, stream.max_age, now));
    }
    findings
}

fn user(role: Role) -> String {
    format!("nats.{}", role.as_str())
}

/// Whether the role has a user.
fn login(nats: &NatsConfig, role: Role) -> bool {
    match role {
        Role::Relay => &nats.relay,
        Role::Worker => &nats.worker,
        Role::Auditor => &nats.auditor,
        Role::Provisioner => &nats.provisioner,
    }
    .is_some()
}

async fn connect(config: &Config, nats: &NatsConfig, role: Role) -> Result<Inspector, LogError> {
    let stream = wiring::stream_config(config, nats, role).map_err(LogError::Refused)?;
    timely(Inspector::connect(stream)).await
}

async fn timely<T>(look: impl Future<Output = Result<T, LogError>>) -> Result<T, LogError> {
    let late = |_| LogError::Unavailable(anyhow::anyhow!("no answer within {}", about(LIMIT)));
    timeout(LIMIT, look).await.map_err(late)?
}

fn text(error: &LogError) -> String {
    match error {
        LogError::Unavailable(error) | LogError::Refused(error) => format!("{error:#}"),
    }
}

fn away(nats: &NatsConfig, error: &anyhow::Error) -> Finding {
    Finding::critical(
        "nats",
        format!(
            "{} does not answer: {error}; sign-ups are answered, their events wait in the local log",
            nats.url
        ),
        "start nats-server, or mend `nats.url` or the network",
    )
}

/// The host of the first server that is named.
fn host(url: &str) -> &str {
    let first = url.split(',').next().unwrap_or_default().trim();
    let authority = first.split_once("://").map_or(first, |(_, it)| it);
    let authority = authority.split('/').next().unwrap_or_default();
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|it| it.is_ascii_digit()) => host,
        _ => authority,
    }
}

fn is_loopback(url: &str) -> bool {
    let here = |url: &str| {
        let host = host(url).trim_matches(['[', ']']);
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|it| it.is_loopback())
    };
    url.split(',').all(here)
}

fn usual_monitoring(url: &str) -> String {
    format!("http://{}:8222", host(url))
}

fn judge_privacy(nats: &NatsConfig) -> Vec<Finding> {
    let is_plain = |url: &str| !url.trim().starts_with("tls://");
    if is_loopback(&nats.url) || !nats.url.split(',').any(is_plain) {
        return vec![];
    }
    vec![Finding::warning(
        "nats.tls",
        "personal data goes to another machine, and `nats.url` does not insist on TLS",
        "give the server a certificate (tls {} in nats.conf) and begin `nats.url` with tls://",
    )]
}

/// A role without a user of its own, on a server that lets anybody in.
fn judge_nameless(role: Role, nats: &NatsConfig) -> Finding {
    let found = "has no user: whoever reaches the server may read, change and delete events";
    let remedy = format!(
        "run nats-server with nats.conf and set nats.{} = {{ user, password }}",
        role.as_str()
    );
    if is_loopback(&nats.url) {
        Finding::warning(user(role), found, remedy)
    } else {
        Finding::critical(user(role), found, remedy)
    }
}

fn judge_user(role: Role, misfits: Result<Vec<Misfit>, LogError>) -> Finding {
    let name = user(role);
    let misfits = match misfits {
        Ok(misfits) => misfits,
        Err(error) => {
            let found = format!("could not learn what it may do: {}", text(&error));
            return Finding::warning(
                name,
                found,
                "run this again; if it lasts, see the server's log",
            );
        }
    };
    let list = |is_allowed| {
        let chosen = misfits.iter().filter(|it| it.is_allowed == is_allowed);
        let mut said: Vec<_> = chosen.clone().map(|it| it.what).collect();
        said.dedup();
        let subjects: Vec<_> = chosen.map(|it| it.subject.as_str()).collect();
        (said.join(", "), subjects.join(" "))
    };
    let (lacking, of_lacking) = list(false);
    let (exceeding, of_exceeding) = list(true);
    if !lacking.is_empty() {
        return Finding::critical(
            name,
            format!("may not {lacking}, and must be able to"),
            format!("allow it in nats.conf: {of_lacking}"),
        );
    }
    if !exceeding.is_empty() {
        return Finding::critical(
            name,
            format!("may {exceeding}, and must not"),
            format!(
                "give this user the permissions of the shipped nats.conf; tried: {of_exceeding}"
            ),
        );
    }
    Finding::ok(name, "may do what it must, and no more")
}

fn judge_server(server: &ServerFacts) -> Vec<Finding> {
    let mut findings = vec![judge_version(&server.version)];
    if !server.has_jetstream {
        findings.push(Finding::critical(
            "nats.jetstream",
            "JetStream is off: there is no stream",
            "run nats-server with the `jetstream {}` section of nats.conf",
        ));
    }
    if server.max_payload < EVENT_BYTES_MAX {
        findings.push(Finding::warning(
            "nats.max_payload",
            format!(
                "messages of {} KiB at most; the largest events are refused",
                server.max_payload >> 10
            ),
            "max_payload: 256KB in nats.conf",
        ));
    }
    findings
}

fn judge_version(version: &str) -> Finding {
    let name = "nats.version";
    let found = format!("nats-server {version}");
    let remedy = "run nats-server 2.15.1 or later";
    let mut numbers = version.split(['.', '-', '+']).map_while(|it| it.parse::<u64>().ok());
    let (Some(major), Some(minor), Some(patch)) = (numbers.next(), numbers.next(), numbers.next())
    else {
        return Finding::warning(name, format!("{found} cannot be compared"), remedy);
    };
    match (major, minor, patch) {
        (2, 12, 0..=2) => {
            Finding::critical(name, format!("{found} is known to lose acknowledged events"), remedy)
        }
        (0 | 1, ..) | (2, 0..=10, _) => {
            Finding::critical(name, format!("{found} lacks what reading past events needs"), remedy)
        }
        // The last of 2.14 have what was mended for 2.15.
        (2, 14, 7..) | (2, 15, 1..) | (2, 16.., _) | (3.., ..) => Finding::ok(name, found),
        _ => Finding::warning(name, format!("{found}; later ones lose less"), remedy),
    }
}

/// When the server brings to the disk what it acknowledges.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Sync {
    Always,
    Every(Duration),
    Unseen(String),
}

/// Clients cannot ask for it; the monitoring tells.
async fn sync(monitoring: &str, server: &str) -> Sync {
    let url = format!("{monitoring}/varz");
    let ask = async {
        let client = reqwest::Client::builder().timeout(LIMIT).build()?;
        client.get(&url).send().await?.error_for_status()?.json::<Value>().await
    };
    match ask.await {
        Ok(varz) => read_sync(&varz, server, &url),
        Err(_) => Sync::Unseen(format!("nobody answers at {url}")),
    }
}

fn read_sync(varz: &Value, server: &str, url: &str) -> Sync {
    if varz["server_id"].as_str() != Some(server) {
        return Sync::Unseen(format!("{url} is another server's"));
    }
    let jetstream = &varz["jetstream"]["config"];
    if jetstream["sync_always"] == true {
        return Sync::Always;
    }
    match jetstream["sync_interval"].as_u64() {
        Some(nanoseconds) => Sync::Every(Duration::from_nanos(nanoseconds)),
        None => Sync::Unseen(format!("{url} does not say")),
    }
}

fn judge_sync(sync: &Sync, is_clustered: bool) -> Finding {
    let name = "nats.sync_interval";
    let remedy = "sync_interval: always in the `jetstream {}` section of nats.conf, and restart it";
    match sync {
        Sync::Always => Finding::ok(name, "what is acknowledged is on the disk"),
        Sync::Every(interval) if is_clustered => Finding::warning(
            name,
            format!(
                "synced every {}: a power cut that takes most of the cluster loses acknowledged events",
                about(*interval)
            ),
            remedy,
        ),
        Sync::Every(interval) => Finding::critical(
            name,
            format!("synced every {}: a power cut loses acknowledged events", about(*interval)),
            remedy,
        ),
        Sync::Unseen(why) => Finding::warning(
            name,
            format!("cannot be seen by clients, and {why}"),
            "see yourself: `sync_interval: always` must stand in nats.conf; or name the monitoring \
             with --monitoring http://HOST:8222",
        ),
    }
}

fn judge_stream(
    stream: &StreamFacts,
    retention: Duration,
    is_clustered: bool,
    now: OffsetDateTime,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for it in &stream.losing {
        findings.push(Finding::critical(
            format!("stream.{}", it.setting),
            format!("{it}: the stream would lose events, so nothing is published to it"),
            "nats stream edit, as an administrator; a storage or a persist_mode needs a new stream",
        ));
    }
    for it in &stream.otherwise {
        findings.push(Finding::warning(
            format!("stream.{}", it.setting),
            it.to_string(),
            "nats stream edit, as an administrator, or set the configuration to what is there",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok("stream.settings", "loses nothing, and is as configured"));
    }
    findings.extend(judge_retention(stream.max_age, retention));
    findings.push(judge_room(stream, retention, now));
    if stream.duplicate_window < stream.duplicate_window_wanted {
        findings.push(Finding::warning(
            "stream.duplicate_window",
            format!(
                "recognises repetitions for {}, and should for {}: a late relay may store a repeated \
                 call twice",
                about(stream.duplicate_window),
                about(stream.duplicate_window_wanted)
            ),
            "vestibule migrate; limits.duplicate_window in nats.conf must allow it",
        ));
    }
    findings.push(judge_replicas(stream, is_clustered));
    findings
}

fn judge_retention(max_age: Option<Duration>, retention: Duration) -> Option<Finding> {
    let max_age = max_age.filter(|it| *it < retention)?;
    Some(Finding::critical(
        "stream.max_age",
        format!(
            "deletes events after {}, and log.retention promises {}",
            about(max_age),
            about(retention)
        ),
        "vestibule migrate",
    ))
}

/// How full the stream is, and when it will refuse events if that can be told.
fn judge_room(stream: &StreamFacts, retention: Duration, now: OffsetDateTime) -> Finding {
    let name = "stream.max_bytes";
    let remedy = "raise nats.max_bytes (and max_file_store, max_file in nats.conf), then `vestibule \
                  migrate`; a full stream refuses events, which then wait in the local log";
    let Some(limit) = stream.max_bytes else {
        return Finding::warning(
            name,
            "has no limit: it can fill the disk, and then every stream stops",
            "set nats.max_bytes and run `vestibule migrate`",
        );
    };
    let share = stream.bytes as f64 / limit as f64;
    let found = format!(
        "{} of {} used ({:.0} %)",
        mebibytes(stream.bytes),
        mebibytes(limit),
        (share * 100.0).floor()
    );
    let age = Duration::try_from(now - stream.first).unwrap_or_default();
    let kept = stream.max_age.unwrap_or(retention);
    // In the first days everything is a guess; once events leave by age it grows no more.
    let is_telling = stream.messages > 0 && age >= Duration::from_secs(86_400) && age < kept;
    let rate = stream.bytes as f64 / age.as_secs_f64().max(1.0);
    let full_in = ((limit.saturating_sub(stream.bytes)) as f64 / rate.max(1e-9)).min(1e10);
    let full_in = Duration::from_secs_f64(full_in);
    if share >= 0.95 || (is_telling && full_in < Duration::from_secs(7 * 86_400)) {
        let when = if is_telling { format!("; full in {}", about(full_in)) } else { String::new() };
        return Finding::critical(name, format!("{found}{when}"), remedy);
    }
    if share >= 0.8 {
        return Finding::warning(name, found, remedy);
    }
    if is_telling && full_in + age < kept {
        let found =
            format!("{found}; at this rate full in {}, before events grow old", about(full_in));
        return Finding::warning(name, found, remedy);
    }
    Finding::ok(name, found)
}

fn judge_replicas(stream: &StreamFacts, is_clustered: bool) -> Finding {
    let name = "stream.replicas";
    let (replicas, behind) = (stream.replicas, stream.replicas_behind);
    if !stream.has_leader {
        return Finding::critical(
            name,
            "the stream has no leader: it takes no events now",
            "see that most servers of the cluster run and reach each other",
        );
    }
    if behind > 0 {
        return Finding::warning(
            name,
            format!("{behind} of {replicas} replicas are away or behind"),
            "see the servers that hold them (`nats stream report`)",
        );
    }
    match (replicas, is_clustered) {
        (1, true) => Finding::warning(
            name,
            "one copy, on a cluster: with its server the stream stops, with its disk events are lost",
            "set nats.replicas = 3 and run `vestibule migrate`",
        ),
        (1, false) => Finding::warning(
            name,
            "one copy: with its disk events are lost; after a crash workers are given again what they \
             had acknowledged",
            "back the stream up (`nats stream backup`), or run three servers and set nats.replicas = 3",
        ),
        _ => Finding::ok(name, format!("{replicas} copies, all up to date")),
    }
}

fn judge_consumer(
    spec: &ConsumerSpec,
    consumer: Result<Option<ConsumerFacts>, LogError>,
    max_age: Option<Duration>,
    now: OffsetDateTime,
) -> Finding {
    let name = format!("consumer.{}", spec.name);
    let it = match consumer {
        Ok(Some(it)) => it,
        Ok(None) => {
            let found = "does not exist: the worker cannot start";
            return Finding::critical(name, found, "vestibule migrate");
        }
        Err(error) => {
            return Finding::warning(name, text(&error), "run this again; see the server's log");
        }
    };
    if !it.otherwise.is_empty() {
        let differences: Vec<_> = it.otherwise.iter().map(ToString::to_string).collect();
        return Finding::critical(
            name,
            format!("{}: the worker does not start with it", differences.join("; ")),
            "vestibule migrate; what it refuses, change as an administrator: nats consumer edit",
        );
    }
    let lag = it.oldest.and_then(|oldest| Duration::try_from(now - oldest).ok());
    let behind = format!(
        "{} waiting, {} in progress{}",
        it.waiting,
        it.in_flight,
        lag.map(|lag| format!(", the oldest for {}", about(lag))).unwrap_or_default()
    );
    // Events leave the stream by age, whether this worker has had them or not.
    if let (Some(lag), Some(max_age)) = (lag, max_age)
        && lag >= max_age.mul_f64(0.8)
    {
        return Finding::critical(
            name,
            format!("{behind}: the stream deletes events after {}", about(max_age)),
            "let the worker catch up, or raise log.retention and run `vestibule migrate`",
        );
    }
    if it.in_flight >= it.in_flight_max {
        return Finding::warning(
            name,
            format!("{behind}: it is given no more before some are acknowledged"),
            "see why the worker does not finish what it has (its log, `vestibule dead list`)",
        );
    }
    if it.is_paused {
        return Finding::warning(
            name,
            format!("{behind}: the consumer is paused on the server"),
            "nats consumer resume",
        );
    }
    if it.waiting > 0 && it.pulls == 0 && it.in_flight == 0 {
        return Finding::warning(
            name,
            format!("{behind}, and nobody asks for them"),
            format!(
                "start `vestibule worker {0}`, or resume it: vestibule worker resume {0}",
                spec.name
            ),
        );
    }
    Finding::ok(name, behind)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use time::macros::datetime;
    use vestibule_events::{Difference, Filter, Start};

    use super::super::finding::State::{self, Critical, Ok as Fine, Warning};
    use super::*;

    const NOW: OffsetDateTime = datetime!(2026-11-22 10:00 UTC);
    const DAY: Duration = Duration::from_secs(86_400);

    fn nats(url: &str) -> NatsConfig {
        NatsConfig {
            url: url.to_owned(),
            stream: "SIGNUPS".to_owned(),
            max_bytes: 1 << 30,
            replicas: 1,
            relay: None,
            worker: None,
            auditor: None,
            provisioner: None,
        }
    }

    #[test]
    fn versions_that_lose_are_critical_and_old_ones_doubtful() {
        for (version, expected) in [
            ("2.15.1", Fine),
            ("2.16.0-RC.1", Fine),
            ("2.15.0", Warning),
            ("2.14.7", Fine),
            ("2.14.6", Warning),
            ("2.12.3", Warning),
            ("2.12.2", Critical),
            ("2.12.0", Critical),
            ("2.10.22", Critical),
            ("dev", Warning),
        ] {
            assert_eq!(judge_version(version).state, expected, "{version}");
        }
    }

    #[test]
    fn a_server_without_jetstream_or_room_for_an_event_is_found() {
        let server = ServerFacts {
            id: "A".into(),
            version: "2.15.1".into(),
            has_jetstream: false,
            is_clustered: false,
            max_payload: 65_536,
        };
        let states: Vec<_> = judge_server(&server).iter().map(|it| it.state).collect();
        assert_eq!(states, [Fine, Critical, Warning]);
    }

    #[test]
    fn syncing_now_and_then_loses_on_one_server() {
        let every = Sync::Every(Duration::from_secs(120));
        assert_eq!(judge_sync(&Sync::Always, false).state, Fine);
        assert_eq!(judge_sync(&every, false).state, Critical);
        assert_eq!(judge_sync(&every, true).state, Warning);
        assert_eq!(judge_sync(&Sync::Unseen("it hides".into()), false).state, Warning);
    }

    #[test]
    fn only_the_monitoring_of_this_server_counts() {
        let varz = |config: Value| json!({ "server_id": "A", "jetstream": { "config": config } });
        let read = |varz: &Value| read_sync(varz, "A", "url");
        let interval = json!({ "sync_interval": 120_000_000_000_u64 });
        let always = json!({ "sync_interval": 120_000_000_000_u64, "sync_always": true });
        assert_eq!(read(&varz(always)), Sync::Always);
        assert_eq!(read(&varz(interval)), Sync::Every(Duration::from_secs(120)));
        assert!(matches!(read(&varz(json!({}))), Sync::Unseen(_)));
        assert!(matches!(read(&json!({ "server_id": "B" })), Sync::Unseen(_)));
    }

    #[test]
    fn personal_data_travels_encrypted_between_machines() {
        let state = |url| judge_privacy(&nats(url)).first().map(|it| it.state);
        assert_eq!(state("nats://127.0.0.1:4222"), None);
        assert_eq!(state("nats://[::1]:4222,localhost"), None);
        assert_eq!(state("tls://nats.example.com:4222"), None);
        assert_eq!(state("nats://nats.example.com:4222"), Some(Warning));
        assert_eq!(
            usual_monitoring("tls://nats.example.com:4222,other"),
            "http://nats.example.com:8222"
        );
        let nameless = |url| judge_nameless(Role::Relay, &nats(url)).state;
        assert_eq!([nameless("nats://127.0.0.1"), nameless("tls://far")], [Warning, Critical]);
    }

    #[test]
    fn a_user_with_other_rights_is_critical_and_told_by_what_it_can_do() {
        let misfit = |what, is_allowed| Misfit {
            subject: "$JS.X".into(),
            is_subscription: false,
            is_allowed,
            what,
        };
        assert_eq!(judge_user(Role::Relay, Ok(vec![])).state, Fine);
        let more = judge_user(Role::Relay, Ok(vec![misfit("delete streams", true)]));
        assert_eq!(more.state, Critical);
        assert_eq!(more.found, "may delete streams, and must not");
        let less = judge_user(Role::Relay, Ok(vec![misfit("publish events", false)]));
        assert_eq!((less.state, less.remedy.contains("$JS.X")), (Critical, true));
        let unknown = judge_user(Role::Relay, Err(LogError::Unavailable(anyhow::anyhow!("slow"))));
        assert_eq!(unknown.state, Warning);
    }

    fn stream() -> StreamFacts {
        StreamFacts {
            losing: vec![],
            otherwise: vec![],
            max_age: Some(400 * DAY),
            max_bytes: Some(1000 << 20),
            duplicate_window: Duration::from_secs(3600),
            duplicate_window_wanted: Duration::from_secs(3600),
            replicas: 3,
            replicas_behind: 0,
            has_leader: true,
            messages: 10,
            bytes: 100 << 20,
            first: NOW - 100 * DAY,
            last: NOW,
            server_time: None,
        }
    }

    fn states(stream: &StreamFacts) -> Vec<(String, State)> {
        let judged = judge_stream(stream, 400 * DAY, true, NOW);
        judged.into_iter().map(|it| (it.check, it.state)).collect()
    }

    fn state(stream: &StreamFacts, check: &str) -> State {
        states(stream).into_iter().find(|(it, _)| it == check).unwrap().1
    }

    #[test]
    fn a_good_stream_has_nothing_wrong_with_it() {
        assert!(
            states(&stream()).iter().all(|(_, state)| *state == Fine),
            "{:?}",
            states(&stream())
        );
    }

    #[test]
    fn each_setting_that_loses_is_critical_and_others_are_not() {
        let differs = |setting| Difference { setting, found: "a".into(), wanted: "b".into() };
        let it = StreamFacts {
            losing: vec![differs("discard")],
            otherwise: vec![differs("deny_purge")],
            max_age: Some(399 * DAY),
            duplicate_window: Duration::from_secs(120),
            ..stream()
        };
        assert_eq!(state(&it, "stream.discard"), Critical);
        assert_eq!(state(&it, "stream.deny_purge"), Warning);
        assert_eq!(state(&it, "stream.max_age"), Critical);
        assert_eq!(state(&it, "stream.duplicate_window"), Warning);
    }

    #[test]
    fn a_stream_is_told_of_before_it_is_full() {
        let used = |mebibytes: u64, days| {
            let first = NOW - days * DAY;
            state(&StreamFacts { bytes: mebibytes << 20, first, ..stream() }, "stream.max_bytes")
        };
        assert_eq!(used(240, 100), Fine, "960 MiB after 400 days");
        assert_eq!(used(260, 100), Warning, "full before they grow old");
        assert_eq!(used(810, 1000), Warning, "grows no more, and is nearly full");
        assert_eq!([used(960, 1000), used(500, 2)], [Critical; 2], "full, and full in two days");
        assert_eq!(used(500, 0), Fine, "nothing can be told on the first day");
        let unlimited = StreamFacts { max_bytes: None, ..stream() };
        assert_eq!(state(&unlimited, "stream.max_bytes"), Warning);
    }

    #[test]
    fn copies_that_are_missing_are_told_of() {
        let judged = |change: fn(&mut StreamFacts), is_clustered| {
            let mut it = stream();
            change(&mut it);
            judge_replicas(&it, is_clustered).state
        };
        assert_eq!(judged(|it| it.replicas = 1, false), Warning);
        assert_eq!(judged(|it| it.replicas = 1, true), Warning);
        assert_eq!(judged(|it| it.replicas_behind = 1, true), Warning);
        assert_eq!(judged(|it| it.has_leader = false, true), Critical);
        assert_eq!(judged(|_| (), true), Fine);
    }

    #[test]
    fn consumers_that_are_stuck_or_missing_are_told_of() {
        let spec = ConsumerSpec {
            name: "notify".into(),
            start: Start::Beginning,
            filter: Filter::default(),
            ack_wait: Duration::from_secs(30),
            max_in_flight: 1000,
        };
        let fine = ConsumerFacts {
            otherwise: vec![],
            waiting: 5,
            in_flight: 3,
            in_flight_max: 1000,
            pulls: 1,
            is_paused: false,
            oldest: Some(NOW - DAY),
        };
        let state = |facts| judge_consumer(&spec, Ok(facts), Some(400 * DAY), NOW).state;
        let judged = |change: fn(&mut ConsumerFacts)| {
            let mut it = fine.clone();
            change(&mut it);
            state(Some(it))
        };
        assert_eq!(judged(|_| ()), Fine);
        assert_eq!(state(None), Critical);
        assert_eq!(judged(|it| it.in_flight = 1000), Warning);
        assert_eq!(judged(|it| it.is_paused = true), Warning);
        assert_eq!(judged(|it| (it.pulls, it.in_flight) = (0, 0)), Warning);
        assert_eq!(judged(|it| it.oldest = Some(NOW - 321 * DAY)), Critical);
        let unlike = Difference { setting: "max_deliver", found: "3".into(), wanted: "-1".into() };
        let differs = ConsumerFacts { otherwise: vec![unlike], ..fine.clone() };
        assert_eq!(state(Some(differs)), Critical);
    }
}
