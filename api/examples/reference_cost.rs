//! What a list look-up and a remembered answer of a lookup cost, and how long a long list loads.
//!
//! `cargo run --release -p vestibule-api --example reference_cost`

use std::{
    fmt::Write as _,
    hint::black_box,
    io::{Read, Write},
    net::TcpListener,
    time::{Duration, Instant},
};

use serde_json::json;
use vestibule_api::{
    BreakerSettings, CacheSettings, HttpMethod, HttpSettings, List, ListSettings, ListSource,
    Lookup, LookupMetrics, LookupSettings, LookupSource,
};

const ENTRIES: u32 = 1_000_000;
const ASKED: u32 = 1_000_000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let path = std::env::temp_dir().join(format!("reference-cost-{}.txt", std::process::id()));
    let mut text = String::new();
    for n in 0..ENTRIES {
        writeln!(text, "person{n}@example.com")?;
    }
    std::fs::write(&path, text)?;
    let settings = ListSettings {
        name: "people".into(),
        source: ListSource::File(path.clone()),
        ignore_case: true,
    };
    let (before, began) = (resident_kib()?, Instant::now());
    let list = List::load(&settings).await?;
    let (took, after) = (began.elapsed(), resident_kib()?);
    std::fs::remove_file(path)?;
    println!(
        "a list of {} entries: loaded in {took:.1?}, {} MiB",
        list.len(),
        (after - before) / 1024
    );

    // Spread over the list, so that the processor's caches do not know the answer.
    let entries: Vec<String> = (0..ASKED)
        .map(|n| format!("Person{}@example.com", n.wrapping_mul(2_654_435_761) % (2 * ENTRIES)))
        .collect();
    let mut found = 0;
    let each = cost(|n| found += u32::from(list.contains(black_box(&entries[n]))));
    println!("a list look-up: {each:.0?} ({found} of {ASKED} found)");

    let lookup = Lookup::new(settings_of_lookup(serve()?), &LookupMetrics::unregistered())?;
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    let arguments: Vec<_> =
        (0..1000).map(|n| [json!(format!("Ada {n}")), json!("1815-12-10")]).collect();
    for arguments in &arguments {
        lookup.fetch(arguments, deadline).await?;
    }
    let mut answered = 0;
    let each = cost(|n| {
        answered += u32::from(lookup.peek(black_box(&arguments[n % arguments.len()])).is_some());
    });
    println!("a remembered answer: {each:.0?} ({answered} of {ASKED} given)");
    Ok(())
}

fn cost(mut once: impl FnMut(usize)) -> Duration {
    let began = Instant::now();
    for n in 0..ASKED as usize {
        once(n);
    }
    began.elapsed() / ASKED
}

fn settings_of_lookup(url: String) -> LookupSettings {
    LookupSettings {
        name: "idv".into(),
        source: LookupSource::Http(HttpSettings {
            url,
            method: HttpMethod::Get,
            arguments: vec!["name".into(), "birth_date".into()],
            headers: Vec::new(),
            fields: [("verified".to_owned(), "/verified".to_owned())].into(),
            allow_private: true,
            ca_file: None,
            answer_bytes_max: HttpSettings::ANSWER_BYTES_MAX,
        }),
        arguments: 2,
        time_limit: Duration::from_secs(10),
        cache: CacheSettings {
            fresh: Duration::from_secs(600),
            stale: Duration::ZERO,
            entries: 10_000,
        },
        concurrency: 4,
        breaker: BreakerSettings { failures: 5, pause: Duration::from_secs(1) },
    }
}

/// The least that is an HTTP service.
fn serve() -> anyhow::Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let url = format!("http://{}/", listener.local_addr()?);
    std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let mut connection = connection;
            let _ = connection.read(&mut [0; 4096]);
            let head = "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 17\r\n\r\n";
            let _ = write!(connection, "{head}{{\"verified\":true}}");
        }
    });
    Ok(url)
}

fn resident_kib() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    kib.ok_or_else(|| anyhow::anyhow!("/proc does not say how much memory we use"))
}
