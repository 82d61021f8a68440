//! Makes up people: who they are, what they type, and how they and the platform go about it.
//!
//! The same seed gives the same people, whatever the order in which they are asked for; only the
//! addresses differ between runs, so that a check can tell this run's people from all others. Every
//! call is one that the documented contract allows. How calls travel is left to `platform`.

use std::time::Duration;

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Map, Value, json};
use vestibule_events::Step;

/// The body of a call: a flat object of claims.
pub(super) type Body = Map<String, Value>;

/// Everybody of one run.
#[derive(Clone, Debug)]
pub(super) struct Crowd {
    pub(super) seed: u64,
    /// Stands in every address.
    pub(super) run: String,
    /// So many of those who are accepted never come back; `None` plays nothing after the form.
    pub(super) abandon: Option<f64>,
}

/// Somebody who signs up, call by call. A call that is not answered with `Continue` is the last,
/// unless it can be corrected.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Person {
    pub(super) number: u64,
    pub(super) journey: Vec<Call>,
    pub(super) afterwards: Afterwards,
}

/// What somebody does who was accepted.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Afterwards {
    Nothing,
    NeverComesBack { email: String },
    SignsIn { email: String, call: Call },
}

/// One call of the platform.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Call {
    pub(super) step: Step,
    pub(super) route: Route,
    pub(super) body: Body,
    /// What the person types instead when asked to correct the form.
    pub(super) correction: Option<Body>,
    pub(super) delivery: Delivery,
}

/// Which URL the platform was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// One for each step. The only way for B2B, whose calls do not say the step.
    Step,
    /// The connector's own; the body says the step.
    Combined,
}

/// How the platform delivers a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    Once,
    /// Again, although it was answered: the answer got lost on the way.
    Again,
    /// The platform hangs up after so long and calls again.
    HangUp(Duration),
}

/// What sets a form of a person apart from another form of the same person.
pub(super) fn form_of(claims: &Body) -> Option<&str> {
    claims.get("city").and_then(Value::as_str)
}

/// The documented name of the platform that calls.
#[derive(Clone, Copy, PartialEq)]
enum Dialect {
    /// Entra B2B: says neither the step nor the application.
    B2b,
    /// B2C user flows: says both.
    B2c,
}

/// Where somebody's account is.
#[derive(Clone, Copy, PartialEq)]
enum Account {
    Google,
    Facebook,
    /// A one-time code by mail: nothing but the address is known before the form.
    MailCode,
    Entra,
    Microsoft,
    /// An address and a password with the platform itself; there is no federation then.
    Local,
}

/// What somebody does. The numbers are shares of a hundred.
#[derive(Clone, Copy, PartialEq)]
enum Story {
    SignsUp,
    /// Never comes back from the form.
    Abandons,
    /// Begins again before the form is sent.
    Restarts,
    /// Has signed up, goes back and sends another form.
    SendsAnotherForm,
    /// Mistypes the postal code.
    Mistypes,
    /// Comes with an address that is thrown away afterwards.
    Throwaway,
}

const STORIES: [(Story, u32); 6] = [
    (Story::SignsUp, 72),
    (Story::Abandons, 10),
    (Story::Restarts, 4),
    (Story::SendsAnotherForm, 2),
    (Story::Mistypes, 7),
    (Story::Throwaway, 5),
];

impl Crowd {
    /// The person with this number.
    pub(super) fn person(&self, number: u64) -> Person {
        // An odd factor takes neighbouring numbers to seeds far apart.
        let seed = self.seed ^ number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut rng = StdRng::seed_from_u64(seed);
        let story = weighted(&mut rng, &STORIES);
        let writer = Writer::new(&mut rng, story, &self.run, number);
        let journey = writer.journey(&mut rng, story);
        // Dice of their own: the same people sign up, whatever the share.
        let mut dice = StdRng::seed_from_u64(!seed);
        let email = writer.email.clone();
        let afterwards = match self.abandon {
            None => Afterwards::Nothing,
            Some(share) if dice.random_bool(share) => Afterwards::NeverComesBack { email },
            Some(_) => Afterwards::SignsIn { email, call: writer.token(&self.run, number) },
        };
        Person { number, journey, afterwards }
    }
}

/// Writes the calls of one person.
#[derive(Clone)]
struct Writer {
    dialect: Dialect,
    account: Account,
    route: Route,
    place: &'static Place,
    email: String,
    given_name: &'static str,
    surname: &'static str,
    locale: String,
    identity: Option<Value>,
    /// Members of every form, besides the names and the address of the house.
    extras: Body,
    has_display_name: bool,
}

impl Writer {
    fn new(rng: &mut StdRng, story: Story, run: &str, number: u64) -> Self {
        let dialect = weighted(rng, &[(Dialect::B2b, 60), (Dialect::B2c, 40)]);
        let account = account(rng, dialect);
        let place = if story == Story::Mistypes { &PLACES[0] } else { choose(rng, &PLACES) };
        let given_name = *choose(rng, place.given_names);
        let surname = *choose(rng, place.surnames);
        let mailbox = if given_name.bytes().all(|b| b.is_ascii_alphabetic()) {
            given_name.to_ascii_lowercase()
        } else {
            "guest".to_owned()
        };
        let domain =
            choose(rng, if story == Story::Throwaway { &THROWAWAY } else { account.domains() });
        let email = format!("{mailbox}+{run}-{number}@{domain}");
        let identity = account.issuer().map(|issuer| {
            let id = match account {
                Account::MailCode => email.clone(),
                _ => format!("1{:020}", rng.random_range(0..10_u128.pow(20))),
            };
            json!({ "signInType": "federated", "issuer": issuer, "issuerAssignedId": id })
        });
        // Documented as one or several tags.
        let locale = if rng.random_ratio(1, 10) {
            format!("{} en-US", place.locale)
        } else {
            place.locale.to_owned()
        };
        let route = if dialect == Dialect::B2c && rng.random_ratio(1, 2) {
            Route::Combined
        } else {
            Route::Step
        };
        let has_display_name = account != Account::MailCode || rng.random_ratio(1, 2);
        let extras = extras(rng, dialect);
        Self {
            dialect,
            account,
            route,
            place,
            email,
            given_name,
            surname,
            locale,
            identity,
            extras,
            has_display_name,
        }
    }

    fn journey(&self, rng: &mut StdRng, story: Story) -> Vec<Call> {
        let mut journey = Vec::new();
        // Whoever has no federation is not seen before the form.
        if self.account != Account::Local {
            let body = self.federation();
            journey.push(self.call(rng, Step::AfterFederation, body.clone(), None));
            if story == Story::Abandons {
                return journey;
            }
            if story == Story::Restarts {
                journey.push(self.call(rng, Step::AfterFederation, body, None));
            }
        }
        let city = rng.random_range(0..self.place.cities.len());
        let postal_code = (self.place.postal_code)(rng);
        let form = self.form(city, &postal_code);
        let (first, correction) = if story == Story::Mistypes {
            let mistyped = mistyped(rng, &postal_code);
            (self.form(city, &mistyped), Some(form))
        } else {
            (form, None)
        };
        journey.push(self.call(rng, Step::BeforeCreate, first, correction));
        if story == Story::SendsAnotherForm {
            let elsewhere = (city + 1) % self.place.cities.len();
            let postal_code = (self.place.postal_code)(rng);
            let form = self.form(elsewhere, &postal_code);
            journey.push(self.call(rng, Step::BeforeCreate, form, None));
        }
        journey
    }

    fn call(&self, rng: &mut StdRng, step: Step, body: Body, correction: Option<Body>) -> Call {
        let hang_up = Delivery::HangUp(Duration::from_micros(rng.random_range(50..3000)));
        let delivery = weighted(rng, &[(Delivery::Once, 88), (Delivery::Again, 8), (hang_up, 4)]);
        Call { step, route: self.route, body, correction, delivery }
    }

    /// The account is there, and about to get a token. Only B2C has such a call.
    fn token(&self, run: &str, number: u64) -> Call {
        let b2c = Self { dialect: Dialect::B2c, ..self.clone() };
        let mut body = b2c.envelope(Step::BeforeToken);
        body.insert("objectId".into(), format!("{run}-0000-4000-8000-{number:012x}").into());
        let (route, delivery) = (Route::Step, Delivery::Once);
        Call { step: Step::BeforeToken, route, body, correction: None, delivery }
    }

    /// What an identity provider says.
    fn federation(&self) -> Body {
        let mut body = self.envelope(Step::AfterFederation);
        if self.account != Account::MailCode {
            body.insert("displayName".into(), self.display_name().into());
            body.insert("givenName".into(), self.given_name.into());
            // B2B's documented examples call it so at this step and `surname` at the next.
            let surname = if self.dialect == Dialect::B2b { "lastName" } else { "surname" };
            body.insert(surname.into(), self.surname.into());
        }
        body
    }

    /// What the person typed, on top of it.
    fn form(&self, city: usize, postal_code: &str) -> Body {
        let mut body = self.envelope(Step::BeforeCreate);
        if self.has_display_name {
            body.insert("displayName".into(), self.display_name().into());
        }
        body.insert("givenName".into(), self.given_name.into());
        body.insert("surname".into(), self.surname.into());
        body.insert("city".into(), self.place.cities[city].into());
        body.insert("postalCode".into(), postal_code.into());
        body.insert("country".into(), self.place.country.into());
        body.extend(self.extras.clone());
        body
    }

    fn envelope(&self, step: Step) -> Body {
        let mut body = Body::new();
        body.insert("email".into(), self.email.clone().into());
        if let Some(identity) = &self.identity {
            body.insert("identities".into(), json!([identity]));
        }
        if self.dialect == Dialect::B2c {
            let step = match step {
                Step::AfterFederation => "PostFederationSignup",
                Step::BeforeCreate => "PostAttributeCollection",
                Step::BeforeToken => "PreTokenIssuance",
            };
            body.insert("step".into(), step.into());
            body.insert("client_id".into(), "93fd07aa-333c-409d-955d-96008fd08dd9".into());
        }
        body.insert("ui_locales".into(), self.locale.clone().into());
        body
    }

    fn display_name(&self) -> String {
        match self.place.locale {
            "ja-JP" | "zh-Hant-TW" => format!("{}{}", self.surname, self.given_name),
            _ => format!("{} {}", self.given_name, self.surname),
        }
    }
}

impl Account {
    /// What stands in `identities`; Entra and Microsoft accounts are not told there.
    const fn issuer(self) -> Option<&'static str> {
        match self {
            Self::Google => Some("google.com"),
            Self::Facebook => Some("facebook.com"),
            Self::MailCode => Some("mail"),
            Self::Entra | Self::Microsoft | Self::Local => None,
        }
    }

    /// Domains that nobody can own, so that a message to a made-up person goes nowhere.
    const fn domains(self) -> &'static [&'static str] {
        match self {
            Self::Entra => &["contoso.example", "fabrikam.example", "northwind.example"],
            Self::Microsoft => &["outlook.example"],
            Self::Google => &["gmail.example", "tailspin.example"],
            Self::Facebook => &["mail.example"],
            Self::MailCode | Self::Local => &["adatum.example", "post.example"],
        }
    }
}

/// Those that the example configuration blocks. They exist, which is why nobody else gets one.
const THROWAWAY: [&str; 3] = ["mailinator.com", "guerrillamail.com", "yopmail.com"];

fn account(rng: &mut StdRng, dialect: Dialect) -> Account {
    let local = if dialect == Dialect::B2c { 20 } else { 0 };
    let shares = [
        (Account::Google, 22),
        (Account::Facebook, 12),
        (Account::MailCode, 22),
        (Account::Entra, 30),
        (Account::Microsoft, 14),
        (Account::Local, local),
    ];
    weighted(rng, &shares)
}

/// What some forms ask for and others do not.
fn extras(rng: &mut StdRng, dialect: Dialect) -> Body {
    let mut extras = Body::new();
    if rng.random_ratio(2, 3) {
        let title = choose(rng, &["Supplier", "Buyer", "Engineer", "Accountant", "Händler"]);
        extras.insert("jobTitle".into(), (*title).into());
    }
    if rng.random_ratio(1, 2) {
        let street = choose(rng, &["1000 Microsoft Way", "Große Bleichen 3", "12 Rue de l'Étoile"]);
        extras.insert("streetAddress".into(), (*street).into());
    }
    // Attributes of the directory carry the id of the application that defines them.
    let application = match dialect {
        Dialect::B2b => "3f6a1c0d9b2e4d7f8a5b6c7d8e9f0a1b",
        Dialect::B2c => "0b1c2d3e4f5a69788796a5b4c3d2e1f0",
    };
    let mut custom = |name: &str, value: Value| {
        extras.insert(format!("extension_{application}_{name}"), value);
    };
    if rng.random_ratio(1, 2) {
        custom("PartnerNumber", format!("P-{:06}", rng.random_range(0..1_000_000)).into());
    }
    if rng.random_ratio(1, 3) {
        custom("AcceptsTerms", true.into());
    }
    if rng.random_ratio(1, 4) {
        custom("Employees", rng.random_range(1..5000).into());
    }
    extras
}

/// What the example's rule for postal codes of the United States objects to.
fn mistyped(rng: &mut StdRng, postal_code: &str) -> String {
    match rng.random_range(0..3) {
        0 => postal_code[..4].to_owned(),
        1 => format!("{postal_code}9"),
        _ => format!("WA {postal_code}"),
    }
}

/// Where people come from, and what they are called there.
struct Place {
    locale: &'static str,
    country: &'static str,
    /// At least two, so that another form can name another.
    cities: &'static [&'static str],
    given_names: &'static [&'static str],
    surnames: &'static [&'static str],
    postal_code: fn(&mut StdRng) -> String,
}

/// The first is the one with a rule for postal codes in the example configuration.
const PLACES: [Place; 12] = [
    Place {
        locale: "en-US",
        country: "United States",
        cities: &["Seattle", "Redmond", "Winston-Salem", "Coeur d'Alene"],
        given_names: &["Ada", "John", "Grace", "Mary-Jane", "DeShawn"],
        surnames: &["Smith", "O'Neill", "Hopper", "van der Berg", "Nguyen"],
        postal_code: |rng| format!("{:05}", rng.random_range(501..99951)),
    },
    Place {
        locale: "en-GB",
        country: "United Kingdom",
        cities: &["London", "Stratford-upon-Avon", "Llanfairpwllgwyngyll"],
        given_names: &["Alan", "Niamh", "Siân", "Oluwaseun"],
        surnames: &["Turing", "Fitz-Gerald", "Ó Súilleabháin", "Adeyemi"],
        postal_code: |rng| format!("SW{}A {}AA", rng.random_range(1..10), rng.random_range(1..10)),
    },
    Place {
        locale: "de-DE",
        country: "Germany",
        cities: &["Köln", "Weißenfels", "Berlin"],
        given_names: &["Jörg", "Änne", "Lena", "Karl-Heinz"],
        surnames: &["Müller", "Groß", "von und zu Öttingen", "Yıldız"],
        postal_code: |rng| format!("{:05}", rng.random_range(1067..99999)),
    },
    Place {
        locale: "fr-CA",
        country: "Canada",
        cities: &["Montréal", "Trois-Rivières"],
        given_names: &["Zoé", "François", "Chloé"],
        surnames: &["L'Écuyer", "Saint-Pierre", "Tremblay"],
        postal_code: |rng| format!("H{}X {}Y{}", digit(rng), digit(rng), digit(rng)),
    },
    Place {
        locale: "es-ES",
        country: "Spain",
        cities: &["A Coruña", "Donostia / San Sebastián", "Madrid"],
        given_names: &["María José", "Íñigo", "Lucía"],
        surnames: &["García Márquez", "Núñez de Balboa", "Etxeberria"],
        postal_code: |rng| format!("{:05}", rng.random_range(1001..52007)),
    },
    Place {
        locale: "pt-BR",
        country: "Brazil",
        cities: &["São Paulo", "Brasília"],
        given_names: &["João", "Conceição", "Thaís"],
        surnames: &["Gonçalves", "dos Santos", "Araújo"],
        postal_code: |rng| format!("{:05}-{:03}", rng.random_range(1000..99999), digit(rng)),
    },
    Place {
        locale: "pl-PL",
        country: "Poland",
        cities: &["Łódź", "Kraków"],
        given_names: &["Łukasz", "Małgorzata"],
        surnames: &["Wiśniewski", "Źdźbło"],
        postal_code: |rng| {
            format!("{:02}-{:03}", rng.random_range(1..99), rng.random_range(0..999))
        },
    },
    Place {
        locale: "tr-TR",
        country: "Türkiye",
        cities: &["İstanbul", "Iğdır"],
        given_names: &["İpek", "Işıl", "Çağrı"],
        surnames: &["Şahin", "Öztürk"],
        postal_code: |rng| format!("{:05}", rng.random_range(1000..81999)),
    },
    Place {
        locale: "ja-JP",
        country: "Japan",
        cities: &["東京", "大阪"],
        given_names: &["さくら", "太郎"],
        surnames: &["山田", "渡邊"],
        postal_code: |rng| {
            format!("{:03}-{:04}", rng.random_range(1..999), rng.random_range(0..9999))
        },
    },
    Place {
        locale: "zh-Hant-TW",
        country: "Taiwan",
        cities: &["臺北市", "高雄市"],
        given_names: &["怡君", "志明"],
        surnames: &["陳", "歐陽"],
        postal_code: |rng| format!("{:03}", rng.random_range(100..983)),
    },
    Place {
        locale: "ar-EG",
        country: "Egypt",
        cities: &["القاهرة", "الإسكندرية"],
        given_names: &["محمد", "فاطمة"],
        surnames: &["السيد", "عبد الرحمن"],
        postal_code: |rng| format!("{:05}", rng.random_range(11111..89999)),
    },
    Place {
        locale: "el-GR",
        country: "Greece",
        cities: &["Αθήνα", "Θεσσαλονίκη"],
        given_names: &["Γιώργος", "Ελένη"],
        surnames: &["Παπαδόπουλος", "Καζαντζάκης"],
        postal_code: |rng| {
            format!("{:03} {:02}", rng.random_range(104..857), rng.random_range(10..99))
        },
    },
];

fn digit(rng: &mut StdRng) -> u32 {
    rng.random_range(0..10)
}

fn choose<'a, T>(rng: &mut StdRng, from: &'a [T]) -> &'a T {
    from.choose(rng).expect("there is something to choose from")
}

/// One of them, each with its share.
fn weighted<T: Copy>(rng: &mut StdRng, shares: &[(T, u32)]) -> T {
    let mut point = rng.random_range(0..shares.iter().map(|(_, share)| share).sum());
    for (item, share) in shares {
        if point < *share {
            return *item;
        }
        point -= share;
    }
    unreachable!("the point lies within the sum of the shares")
}

#[cfg(test)]
mod tests;
