//! What the benchmarks decide by: few rules, many rules, a long list, a lookup.
//!
//! All of them run for the sample and none turns it away or changes it. Some take hold and set a
//! claim to what it is already, so that the event tells of them and the answer stays the same.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    io::{BufWriter, Write},
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::anyhow;
use axum::{Json, Router, routing::get};
use serde::Serialize;
use serde_json::json;
use tokio::net::TcpListener;
use vestibule_api::{
    BreakerSettings, CacheSettings, Decider, HttpMethod, HttpSettings, List, ListSettings,
    ListSource, Lookup, LookupMetrics, LookupSettings, LookupSource, LookupWithArguments, Messages,
    OnError, ReferenceData, RuleOutcome, RuleSettings, Rules,
};
use vestibule_events::{Mode, Step};

use crate::sample;

/// How much is decided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Extent {
    NoRules,
    Rules,
    /// One rule more, which asks the long list.
    AndList,
    /// And another, which asks a lookup.
    AndLookup,
}

impl Extent {
    pub(crate) const EACH: [Self; 4] = [Self::NoRules, Self::Rules, Self::AndList, Self::AndLookup];

    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::NoRules => "no rules",
            Self::Rules => "25 rules",
            Self::AndList => "and a long list",
            Self::AndLookup => "and a cached lookup",
        }
    }

    fn rules(self) -> Vec<RuleSettings> {
        let mut rules = if self == Self::NoRules { vec![] } else { many() };
        if matches!(self, Self::AndList | Self::AndLookup) {
            // Whoever is not on the list is found by the domain.
            rules.push(block(
                "by-invitation",
                "!(signup.email in lists.invited || signup.email_domain in lists.invited)",
            ));
        }
        if self == Self::AndLookup {
            rules.push(block(
                "suspended-partners",
                "lookups.crm.found && lookups.crm.status == 'suspended'",
            ));
        }
        rules
    }
}

/// The lists, and the lookup with the service that it asks.
pub(crate) struct Facts {
    reference: Arc<ReferenceData>,
}

impl Facts {
    /// The list has so many entries.
    pub(crate) async fn prepare(folder: &Path, entries: u64) -> anyhow::Result<Self> {
        let mut lists = vec![long_list(folder, entries)?];
        for (name, entries) in SHORT_LISTS {
            let entries = entries.split(' ').map(str::to_owned).collect();
            lists.push(list(name, ListSource::Inline(entries)));
        }
        let mut loaded = HashMap::new();
        for settings in lists {
            let list = Arc::new(List::load(&settings).await?);
            loaded.insert(settings.name, Some(list));
        }
        let domain = ["signup.email_domain".to_owned()];
        let crm = LookupWithArguments::new(crm(partners().await?)?, &domain)
            .map_err(|faults| anyhow!("could not compile what the lookup is asked: {faults:?}"))?;
        Ok(Self { reference: Arc::new(ReferenceData::new(loaded, vec![crm])) })
    }

    pub(crate) fn decider(&self, extent: Extent) -> anyhow::Result<Decider> {
        let known = self.reference.known();
        let rules = Rules::compile_with(extent.rules(), &known, &Messages::default())
            .map_err(|errors| anyhow!("could not compile the rules: {errors:?}"))?;
        Ok(Decider {
            rules: Arc::new(rules),
            reference: Arc::clone(&self.reference),
            approvals: None,
        })
    }
}

pub(crate) fn compiled(rules: Vec<RuleSettings>) -> anyhow::Result<Rules> {
    Rules::compile(rules).map_err(|errors| anyhow!("could not compile the rules: {errors:?}"))
}

/// The long list, in a file as somebody would keep it: a domain, and people from number 1 on.
pub(crate) fn long_list(folder: &Path, entries: u64) -> anyhow::Result<ListSettings> {
    let path = folder.join("invited.txt");
    if !path.exists() {
        let mut file = BufWriter::new(fs::File::create(&path)?);
        writeln!(file, "# Who may sign up\nexample.com")?;
        for person in 1..entries {
            writeln!(file, "{}", sample::email(person))?;
        }
        file.into_inner()?.sync_all()?;
    }
    Ok(list("invited", ListSource::File(path)))
}

fn list(name: &str, source: ListSource) -> ListSettings {
    ListSettings { name: name.to_owned(), source, ignore_case: true }
}

const SHORT_LISTS: [(&str, &str); 3] = [
    ("throwaway", "mailinator.com guerrillamail.com yopmail.com trashmail.com sharklasers.com"),
    ("served", "US CA MX GB IE FR DE AT CH NL BE LU ES PT IT DK SE NO FI PL CZ JP KR AU NZ"),
    (
        "roles",
        "abuse admin billing hostmaster info noreply office postmaster sales support webmaster",
    ),
];

/// Asked once by all that follows, and remembered.
fn crm(service: SocketAddr) -> anyhow::Result<Lookup> {
    let settings = LookupSettings {
        name: "crm".to_owned(),
        source: LookupSource::Http(HttpSettings {
            url: format!("http://{service}/partners/{{domain}}"),
            method: HttpMethod::Get,
            arguments: vec!["domain".to_owned()],
            headers: vec![],
            fields: BTreeMap::new(),
            allow_private: true,
            ca_file: None,
            answer_bytes_max: HttpSettings::ANSWER_BYTES_MAX,
        }),
        arguments: 1,
        time_limit: Duration::from_secs(10),
        cache: CacheSettings {
            fresh: Duration::from_secs(24 * 60 * 60),
            stale: Duration::ZERO,
            entries: 10_000,
        },
        concurrency: 10,
        breaker: BreakerSettings { failures: 0, pause: Duration::from_secs(1) },
    };
    Ok(Lookup::new(settings, &LookupMetrics::unregistered())?)
}

/// Stands in for a service that knows partners; serves as long as the runtime runs.
async fn partners() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let partner = || async {
        Json(json!({ "id": 4711, "name": "Example", "status": "active", "tier": "gold" }))
    };
    let router = Router::new().route("/partners/{domain}", get(partner));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(address)
}

/// The rules of the example configuration.
pub(crate) fn few() -> Vec<RuleSettings> {
    vec![
        block(
            "no-throwaway-addresses",
            "signup.email_domain in ['mailinator.com', 'guerrillamail.com', 'yopmail.com']",
        ),
        before_create(reject(
            "postal-code-of-the-united-states",
            "postalCode",
            "has(signup.claims.country) && signup.claims.country == 'United States'
               && has(signup.claims.postalCode)
               && !string(signup.claims.postalCode).matches('^[0-9]{5}(-[0-9]{4})?$')",
        )),
        before_create(set(
            "fill-in-the-display-name",
            "!has(signup.claims.displayName) && has(signup.claims.givenName)
               && has(signup.claims.surname)",
            &[("displayName", "signup.claims.givenName + ' ' + signup.claims.surname")],
        )),
    ]
}

/// Twenty-five of every kind, as a company with partners in several countries may have them.
fn many() -> Vec<RuleSettings> {
    vec![
        block("no-throwaway-addresses", "signup.email_domain in lists.throwaway"),
        block("no-employees", "in_domain(signup.email, ['contoso.com', 'contoso.test'])"),
        block("no-social-network", "signup.identities.exists(i, i.issuer == 'facebook.com')"),
        block("not-from-the-lab", "has(signup.ip) && ip_in(signup.ip, ['192.0.2.0/24'])"),
        block("registration-is-over", "today() > date('2099-12-31')"),
        block(
            "not-for-this-application",
            "has(signup.client) && signup.client == '00000000-0000-0000-0000-000000000000'",
        ),
        reject("an-address-that-works", "email", "!is_email(signup.email)"),
        reject("no-shared-mailboxes", "email", "email_local(signup.email) in lists.roles"),
        reject("no-tags", "email", "email_local(signup.email).contains('+')"),
        reject(
            "country-is-served",
            "country",
            "has(signup.claims.country) && !(country_code(signup.claims.country) in lists.served)",
        ),
        reject(
            "postal-code-of-the-united-states",
            "postalCode",
            "has(signup.claims.country) && signup.claims.country == 'United States'
               && has(signup.claims.postalCode)
               && !string(signup.claims.postalCode).matches('^[0-9]{5}(-[0-9]{4})?$')",
        ),
        reject(
            "postal-code-of-canada",
            "postalCode",
            "has(signup.claims.country) && signup.claims.country == 'Canada'
               && has(signup.claims.postalCode)
               && !signup.claims.postalCode.matches('^[A-Z][0-9][A-Z] ?[0-9][A-Z][0-9]$')",
        ),
        reject(
            "state-is-a-state",
            "state",
            "has(signup.claims.state) && !(signup.claims.state in
               ['Arizona', 'California', 'Idaho', 'Nevada', 'Oregon', 'Utah', 'Washington'])",
        ),
        reject(
            "no-post-office-boxes",
            "streetAddress",
            r"has(signup.claims.streetAddress)
               && signup.claims.streetAddress.matches(r'(?i)\bp\.? ?o\.? ?box\b')",
        ),
        reject(
            "a-street-in-the-city",
            "streetAddress",
            "has(signup.claims.city) && !has(signup.claims.streetAddress)",
        ),
        reject(
            "a-real-title",
            "jobTitle",
            r"has(signup.claims.jobTitle)
               && signup.claims.jobTitle.lowerAscii().matches(r'^(test|none|n/?a|x+)$')",
        ),
        reject(
            "a-short-title",
            "jobTitle",
            "has(signup.claims.jobTitle) && signup.claims.jobTitle.size() > 100",
        ),
        reject(
            "no-digits-in-names",
            "surname",
            "[signup.claims.givenName, signup.claims.surname].exists(it, it.matches('[0-9]'))",
        ),
        reject(
            "no-links-in-names",
            "displayName",
            r"signup.claims.displayName.matches(r'(?i)https?://|www\.')",
        ),
        reject(
            "two-different-names",
            "surname",
            "has(signup.claims.givenName) && has(signup.claims.surname)
               && signup.claims.givenName == signup.claims.surname",
        ),
        reject(
            "old-enough",
            "birthday",
            "has(signup.claims.birthday) && years_since(signup.claims.birthday) < 16",
        ),
        set(
            "fill-in-the-display-name",
            "!has(signup.claims.displayName) && has(signup.claims.givenName)
               && has(signup.claims.surname)",
            &[("displayName", "signup.claims.givenName + ' ' + signup.claims.surname")],
        ),
        set(
            "tidy-names",
            "has(signup.claims.givenName) && has(signup.claims.surname)",
            &[
                ("givenName", "title_case(collapse_spaces(signup.claims.givenName))"),
                ("surname", "title_case(collapse_spaces(signup.claims.surname))"),
            ],
        ),
        set(
            "tidy-postal-code",
            "has(signup.claims.postalCode)",
            &[("postalCode", "signup.claims.postalCode.trim().upperAscii()")],
        ),
        set(
            "tidy-phone-number",
            "has(signup.claims.mobile) && is_phone(signup.claims.mobile, 'US')",
            &[("mobile", "phone(signup.claims.mobile, 'US')")],
        ),
    ]
}

fn block(name: &str, when: &str) -> RuleSettings {
    let message = "Please sign up with the address of your organisation.".to_owned();
    rule(name, when, RuleOutcome::Block { message })
}

fn reject(name: &str, field: &str, when: &str) -> RuleSettings {
    let message = "Please look at this once more.".to_owned();
    rule(name, when, RuleOutcome::Reject { message, field: Some(field.to_owned()) })
}

fn set(name: &str, when: &str, claims: &[(&str, &str)]) -> RuleSettings {
    let claims = claims.iter().map(|(name, it)| ((*name).to_owned(), (*it).to_owned()));
    rule(name, when, RuleOutcome::Set { claims: claims.collect() })
}

fn rule(name: &str, when: &str, outcome: RuleOutcome) -> RuleSettings {
    RuleSettings {
        name: name.to_owned(),
        steps: vec![],
        when: when.to_owned(),
        outcome,
        on_error: OnError::Continue,
        mode: Mode::Enforce,
    }
}

fn before_create(rule: RuleSettings) -> RuleSettings {
    RuleSettings { steps: vec![Step::BeforeCreate], ..rule }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;
    use vestibule_api::Question;
    use vestibule_events::{Decision, Effect, Outcome};

    use super::*;

    async fn decided(decider: &Decider, person: u64) -> Decision {
        let event = sample::event(&sample::key(), person);
        let question = Question {
            sign_up: &event.sign_up,
            person: &event.person,
            deadline: Instant::now() + Duration::from_secs(60),
            now: None,
        };
        decider.decide(question).await
    }

    #[tokio::test]
    async fn all_rules_run_and_nothing_comes_of_them() -> anyhow::Result<()> {
        let few = Decider::new(compiled(few())?);
        let decision = decided(&few, 1).await;
        assert_eq!(decision, Decision::new(Outcome::unchanged()));

        assert_eq!(many().len(), 25);
        let folder = tempfile::tempdir()?;
        let all = Facts::prepare(folder.path(), 100).await?.decider(Extent::AndLookup)?;
        // One is on the list, and the other is not.
        for (person, from) in [(1, "source"), (100, "cache")] {
            let decision = decided(&all, person).await;
            assert_eq!(decision.outcome, Outcome::unchanged());
            let effects: Vec<_> =
                decision.reasons.iter().map(|it| (it.rule.as_str(), it.effect)).collect();
            let set = |rule| (rule, Effect::Set);
            assert_eq!(effects, [set("tidy-names"), set("tidy-postal-code")]);
            let lookup = &decision.lookups[0];
            assert_eq!((&*lookup.answer, lookup.from.as_deref()), ("found", Some(from)));
        }
        Ok(())
    }
}
