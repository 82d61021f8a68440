//! A long list from a file.

use std::fmt::Write as _;

use prometheus_client::registry::Registry;
use vestibule_api::{List, ListMetrics, ListSettings, ListSource};

#[tokio::test]
async fn a_million_entries_are_all_found_and_nothing_else() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("partners.txt");
    let mut text = String::new();
    for n in 0..1_000_000 {
        writeln!(text, "Person{n}@example.com")?;
    }
    std::fs::write(&path, text)?;
    let settings =
        ListSettings { name: "partners".into(), source: ListSource::File(path), ignore_case: true };

    let list = List::load(&settings).await?;

    assert_eq!(list.len(), 1_000_000);
    for n in (0..1_000_000).step_by(997) {
        assert!(list.contains(&format!("person{n}@EXAMPLE.com")), "{n}");
        assert!(!list.contains(&format!("person{n}@example.org")), "{n}");
    }
    let mut registry = Registry::default();
    ListMetrics::register(&mut registry).record(&list);
    let mut encoded = String::new();
    prometheus_client::encoding::text::encode(&mut encoded, &registry)?;
    assert!(encoded.contains("vestibule_list_entries{list=\"partners\"} 1000000"), "{encoded}");
    Ok(())
}
