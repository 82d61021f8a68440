use vestibule_events::{
    Decision, Email, LocalLog, LocalLogConfig, Outcome, Protocol, PseudonymKey, Retention, SignUp,
};
use vestibule_store::{StoreOptions, StoreUrl};

use super::*;

const DONE: Effects =
    Effects { sign_ups: 1, person_changes: 1, grant_sets: 1, notifications: 1, dead_letters: 0 };

fn key(number: u64) -> (String, String) {
    (format!("ada+run-{number}@contoso.example"), "London".to_owned())
}

fn seen(id: u128, number: u64) -> Seen {
    Seen {
        id: Uuid::from_u128(id),
        person: Person::from_pseudonym(format!("p{number}")),
        is_accepted: true,
        form: Some(key(number)),
        wanted: DONE,
    }
}

/// One form with this answer, these events and these effects of each of them.
fn differences(accepted: bool, unanswered: bool, found: &[Effects]) -> Vec<Difference> {
    let mut forms = Forms::default();
    let (email, city) = key(1);
    *forms.form(1, &email, &city) = Form { sign_up: 1, accepted, unanswered };
    let events: Vec<_> = (1..).map(|id| seen(id, 1)).take(found.len()).collect();
    let effects = events.iter().map(|it| it.id).zip(found.iter().copied()).collect();
    let verified = compare(&forms, &events, &effects);
    assert_eq!(verified.accepted_events, found.len());
    verified.differences
}

#[test]
fn an_acceptance_with_one_event_acted_on_once_is_right() {
    assert_eq!(differences(true, false, &[DONE]), []);
    assert_eq!(differences(true, true, &[DONE]), []);
}

#[test]
fn an_acceptance_without_its_event_is_found() {
    let missing = [Difference::MissingEvent { sign_up: 1 }];
    assert_eq!(differences(true, false, &[]), missing);
    assert_eq!(differences(true, true, &[]), missing);
}

#[test]
fn a_lost_answer_may_have_an_event_and_need_not() {
    assert_eq!(differences(false, true, &[]), []);
    assert_eq!(differences(false, true, &[DONE]), []);
    let undone = differences(false, true, &[Effects::default()]);
    assert_eq!(undone.len(), 4, "where there is an event, it must be acted on: {undone:?}");
}

#[test]
fn a_refusal_with_an_accepted_event_is_found() {
    assert_eq!(differences(false, false, &[]), []);
    let found = differences(false, false, &[DONE]);
    assert!(matches!(found[..], [Difference::AgainstTheAnswer { sign_up: 1, .. }]), "{found:?}");
}

#[test]
fn a_second_event_is_found() {
    let found = differences(true, true, &[DONE, DONE]);
    let [Difference::SeveralEvents { events, .. }] = &found[..] else { panic!("{found:?}") };
    assert_eq!(*events, [Uuid::from_u128(1), Uuid::from_u128(2)]);
}

#[test]
fn every_effect_that_is_missing_or_doubled_is_found() {
    type Set = fn(&mut Effects, u32);
    let set: [(&str, Set); 5] = [
        ("recorded sign-up", |it, count| it.sign_ups = count),
        ("person change", |it, count| it.person_changes = count),
        ("set of grants", |it, count| it.grant_sets = count),
        ("notification", |it, count| it.notifications = count),
        ("dead letter", |it, count| it.dead_letters = count),
    ];
    for (name, set) in set {
        let right = u32::from(name != "dead letter");
        for wrong in [0, 1, 2].into_iter().filter(|count| *count != right) {
            let mut effects = DONE;
            set(&mut effects, wrong);
            let expected = Difference::Effect {
                event: Uuid::from_u128(1),
                person: Person::from_pseudonym("p1"),
                effect: name,
                wanted: right,
                found: wrong,
            };
            assert_eq!(differences(true, false, &[effects]), [expected], "{name} {wrong}");
        }
    }
}

#[test]
fn an_event_that_nobody_should_act_on_and_somebody_did_is_found() {
    let screened =
        Seen { is_accepted: false, form: None, wanted: Effects::default(), ..seen(1, 1) };
    let effects =
        HashMap::from([(screened.id, Effects { notifications: 1, ..Effects::default() })]);
    let verified = compare(&Forms::default(), &[screened], &effects);
    assert!(
        matches!(
            verified.differences[..],
            [Difference::Effect { effect: "notification", wanted: 0, found: 1, .. }]
        ),
        "{:?}",
        verified.differences
    );
    assert_eq!(verified.accepted_events, 0);
}

#[test]
fn two_forms_of_a_person_are_two_sign_ups() {
    let mut forms = Forms::default();
    let (email, _) = key(1);
    forms.form(1, &email, "London").accepted = true;
    forms.form(1, &email, "Leeds").accepted = true;
    let leeds = Seen { form: Some((email, "Leeds".into())), ..seen(2, 1) };
    let effects = HashMap::from([(Uuid::from_u128(1), DONE), (Uuid::from_u128(2), DONE)]);
    let both = compare(&forms, &[seen(1, 1), leeds], &effects);
    assert_eq!((both.accepted_events, both.differences), (2, vec![]));
    let one = compare(&forms, &[seen(1, 1)], &effects);
    assert_eq!(one.differences, [Difference::MissingEvent { sign_up: 1 }]);
}

#[test]
fn an_event_of_a_form_that_was_never_sent_is_found() {
    let effects = HashMap::from([(Uuid::from_u128(1), DONE)]);
    let verified = compare(&Forms::default(), &[seen(1, 1)], &effects);
    assert!(
        matches!(verified.differences[..], [Difference::EventOfNoCall { .. }]),
        "{:?}",
        verified.differences
    );
}

/// Over a real log and a real store: waits for what is still to be done, and says what is not.
#[tokio::test]
async fn log_and_store_are_compared_with_the_answers() -> anyhow::Result<()> {
    let folder = tempfile::tempdir()?;
    let log = LocalLog::open(LocalLogConfig {
        path: folder.path().join("events.db"),
        duplicate_window: Duration::from_secs(600),
        refusal_window: Duration::from_secs(30),
        retention: Retention::For(Duration::from_secs(3600)),
    })
    .await?;
    let url = StoreUrl::Sqlite(folder.path().join("store.db"));
    let store = Store::open(&url, StoreOptions::default()).await?;
    store.migrate().await?;
    let mut forms = Forms::default();
    let now = OffsetDateTime::now_utc();
    for number in 0..3 {
        let email = format!("ada+run-{number}@contoso.example");
        forms.form(number, &email, "London").accepted = true;
        let event = event(&email, now);
        // The last one is not acted on yet.
        if number < 2 {
            store.record_sign_up("database", &event, now).await?;
        }
        log.append(event).await?;
    }
    let stranger = event("ada+other-1@contoso.example", now);
    log.append(stranger).await?;
    let verifier = || Verifier {
        log: Arc::new(log.clone()),
        store: store.clone(),
        workers: vec![Acting {
            name: "database".to_owned(),
            filter: Filter { kinds: vec![Kind::Accepted], connectors: vec![] },
            does: Does::Record,
        }],
        place: String::new(),
        next: Start::Beginning,
        seen: Vec::new(),
        outcomes: Outcomes::default(),
    };
    let hidden = ProgressBar::hidden();

    let early = verifier().verify("run", &forms, Duration::ZERO, &hidden).await?;
    assert_eq!((early.accepted_events, early.acted_on["database"]), (3, 2));
    assert_eq!(early.differences.len(), 3, "{:?}", early.differences);

    let open = verifier();
    let late = async {
        let events: Vec<_> = log.replay(everything()).await?.try_collect().await?;
        let event = &events[2].event;
        store.record_sign_up("database", event, now).await?;
        anyhow::Ok(())
    };
    let wait = Duration::from_secs(60);
    let (verified, late) = tokio::join!(open.verify("run", &forms, wait, &hidden), late);
    late?;
    let verified = verified?;
    assert_eq!((verified.accepted_events, verified.acted_on["database"]), (3, 3));
    assert_eq!(verified.differences, []);

    forms.form(9, "ada+run-9@contoso.example", "London").accepted = true;
    let missing = verifier().verify("run", &forms, Duration::ZERO, &hidden).await?;
    assert_eq!(missing.differences, [Difference::MissingEvent { sign_up: 9 }]);
    log.close().await?;
    Ok(())
}

fn everything() -> Replay {
    Replay {
        start: Start::Beginning,
        until: None,
        filter: Filter::default(),
        person: None,
        follow: false,
    }
}

fn event(email: &str, now: OffsetDateTime) -> SignUpEvent {
    let sign_up = SignUp {
        connector: "partners".parse().unwrap(),
        protocol: Protocol::ApiConnector,
        step: Step::BeforeCreate,
        email: Some(Email::new(email)),
        identities: vec![],
        claims: serde_json::json!({ "city": "London" }).as_object().unwrap().clone(),
        client: None,
        locale: None,
        ip: None,
        object_id: None,
        correlation_id: None,
    };
    let key = PseudonymKey::new(vec![7; 32]);
    let person = key.person(&sign_up);
    let fingerprint = key.fingerprint(&sign_up, &person);
    let decision = Decision::new(Outcome::unchanged());
    SignUpEvent::decided(Uuid::now_v7(), now, person, fingerprint, sign_up, decision).unwrap()
}

#[test]
fn differences_hold_no_address() {
    let differences = [
        Difference::MissingEvent { sign_up: 1 },
        differences(true, true, &[DONE, DONE]).remove(0),
        differences(false, false, &[DONE]).remove(0),
    ];
    for difference in differences {
        let json = serde_json::to_string(&difference).unwrap();
        assert!(!format!("{difference} {json}").contains('@'), "{json}");
    }
}
