//! Which account an approved sign-up gets. Pure.

use serde_json::{Map, Value, json};
use vestibule_events::{Claims, Identity, SignUpEvent};

use crate::claims::claims_in_force;

/// How the account comes to be; it depends on how the person signs in.
#[derive(PartialEq)]
pub(super) enum Plan {
    /// Google, Facebook and one-time codes by mail: such an account can be created as it is.
    Create { identity: Identity, user: Value },
    /// Entra and Microsoft accounts: the directory must be told of them by an invitation.
    Invite { mail: String, invitation: Value, attributes: Map<String, Value> },
}

/// The sign-up holds no address, without which there is no account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the sign-up holds no usable mail address, and without one no account can be made")]
pub(super) struct NoAddress;

/// What the plan depends on besides the event.
#[derive(Clone, Debug)]
pub(super) struct House {
    /// The directory's first domain, `contoso.onmicrosoft.com`.
    pub(super) domain: String,
    pub(super) invite_redirect_url: String,
    pub(super) send_invitation_message: bool,
}

/// Attributes that people may be asked for, under their Graph names. Nothing else of a form gets
/// into the account: a claim called `userType` must not make anybody a member.
const ATTRIBUTES: [&str; 16] = [
    "ageGroup",
    "city",
    "companyName",
    "consentProvidedForMinor",
    "country",
    "department",
    "displayName",
    "faxNumber",
    "givenName",
    "jobTitle",
    "mobilePhone",
    "officeLocation",
    "postalCode",
    "state",
    "streetAddress",
    "surname",
];

/// Custom attributes, named by the directory's own application.
const CUSTOM: &str = "extension_";

/// Graph's limits for what it makes a key of.
const UPN_LOCAL_CHARS_MAX: usize = 64;
const DISPLAY_NAME_CHARS_MAX: usize = 256;

/// Ends the first half of the name of a guest we create. An invited guest has `#EXT#` there, which
/// is Entra's own doing.
const GUEST: &str = "#EXT";

impl Plan {
    pub(super) fn of(event: &SignUpEvent, house: &House) -> Result<Self, NoAddress> {
        let identities = &event.sign_up.identities;
        let identity = identities.iter().find(|it| is_creatable(it));
        let mail = address(event, identity).ok_or(NoAddress)?;
        let attributes = attributes(&claims_in_force(event));
        Ok(match identity {
            Some(identity) => Self::Create {
                identity: identity.clone(),
                user: user(event, house, mail, attributes),
            },
            None => Self::Invite {
                invitation: invitation(event, house, mail, &attributes),
                mail: mail.to_owned(),
                attributes,
            },
        })
    }
}

/// Whether Graph creates accounts with an identity. Issuers are written with and without `.com`.
fn is_creatable(identity: &Identity) -> bool {
    let issuer = identity.issuer.trim().to_ascii_lowercase();
    let name = issuer.strip_suffix(".com").unwrap_or(&issuer);
    matches!(name, "google" | "facebook" | "mail")
}

/// Who signs in with codes by mail may have their address in the identity alone.
fn address<'a>(event: &'a SignUpEvent, identity: Option<&'a Identity>) -> Option<&'a str> {
    let email = event.sign_up.email.as_ref().map(vestibule_events::Email::expose);
    let assigned = identity.map(|it| it.issuer_assigned_id.as_str());
    [email, assigned].into_iter().flatten().map(str::trim).find(|it| {
        let halves = it.rsplit_once('@');
        halves.is_some_and(|(local, domain)| !local.is_empty() && !domain.is_empty())
            && !it.contains(|c: char| c.is_whitespace() || c.is_control())
    })
}

fn user(event: &SignUpEvent, house: &House, mail: &str, attributes: Map<String, Value>) -> Value {
    let mut user = attributes;
    let local = local_part(mail, event.person.as_str());
    let name = display_name(&user, mail);
    user.insert("displayName".into(), name.into());
    user.insert("userPrincipalName".into(), format!("{local}{GUEST}@{}", house.domain).into());
    user.insert("mailNickname".into(), local.into());
    user.insert("accountEnabled".into(), true.into());
    user.insert("mail".into(), mail.into());
    user.insert("userType".into(), "Guest".into());
    // No other ones: an account with an identity of our own directory would want a password.
    let identities: Vec<_> =
        event.sign_up.identities.iter().filter(|it| is_creatable(it)).collect();
    user.insert("identities".into(), json!(identities));
    user.into()
}

fn invitation(
    event: &SignUpEvent,
    house: &House,
    mail: &str,
    attributes: &Map<String, Value>,
) -> Value {
    let mut invitation = json!({
        "invitedUserEmailAddress": mail,
        "inviteRedirectUrl": house.invite_redirect_url,
        "sendInvitationMessage": house.send_invitation_message,
    });
    if let Some(name) = attributes.get("displayName") {
        invitation["invitedUserDisplayName"] = name.clone();
    }
    if house.send_invitation_message
        && let Some(language) = event.sign_up.locale.as_deref().and_then(language)
    {
        invitation["invitedUserMessageInfo"] = json!({ "messageLanguage": language });
    }
    invitation
}

/// The first of the languages that the person's browser asked for.
fn language(locale: &str) -> Option<&str> {
    let first = locale.split([' ', ',', ';']).next()?.trim();
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    (!first.is_empty() && first.len() <= 35 && first.chars().all(plain)).then_some(first)
}

/// The claims that become attributes of the account.
///
/// Custom attributes go as they came. Graph refuses empty text and null, which say nothing anyway;
/// a number where text belongs becomes text.
fn attributes(claims: &Claims) -> Map<String, Value> {
    let mut attributes = Map::new();
    for (name, value) in claims {
        if name.starts_with(CUSTOM) {
            if !value.is_null() {
                attributes.insert(name.clone(), value.clone());
            }
        } else if let Some(attribute) = attribute(name)
            && let Some(text) = text(value)
        {
            // Its own name wins over one that platforms use for it as well.
            if attribute == name || !attributes.contains_key(attribute) {
                attributes.insert(attribute.to_owned(), text.into());
            }
        }
    }
    attributes
}

/// The Graph name of a claim. Some steps send `lastName`, or `surName`, for `surname`.
fn attribute(claim: &str) -> Option<&'static str> {
    let claim = match claim {
        "lastName" | "surName" => "surname",
        other => other,
    };
    ATTRIBUTES.into_iter().find(|it| *it == claim)
}

fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.trim().to_owned()).filter(|it| !it.is_empty()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(_) | Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// Graph wants a name, and a form may not have asked for one.
fn display_name(attributes: &Map<String, Value>, mail: &str) -> String {
    let text = |name| attributes.get(name).and_then(Value::as_str).unwrap_or_default();
    let both = format!("{} {}", text("givenName"), text("surname"));
    let local = mail.rsplit_once('@').map_or(mail, |(local, _)| local);
    let name = [text("displayName"), both.trim(), local].into_iter().find(|it| !it.is_empty());
    name.unwrap_or(mail).chars().take(DISPLAY_NAME_CHARS_MAX).collect()
}

/// The address with `_` for `@`.
///
/// A name in the directory takes fewer characters than an address does, and not as many. Where some
/// had to go, the end of the pseudonym keeps two people apart whose addresses differ only there.
fn local_part(mail: &str, person: &str) -> String {
    let swap = |c: char| match c {
        '@' => '_',
        c if c.is_ascii_alphanumeric() || "'.-_!^~".contains(c) => c,
        _ => '_',
    };
    let local: String = mail.chars().map(swap).collect();
    let longest = UPN_LOCAL_CHARS_MAX - GUEST.len();
    if local.len() <= longest && local == mail.replace('@', "_") {
        return local;
    }
    let tail: String = person.chars().take(12).collect();
    let kept: String = local.chars().take(longest - tail.len() - 1).collect();
    format!("{kept}_{tail}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vestibule_events::{Email, Outcome};

    use super::*;
    use crate::claims::sample;

    fn house() -> House {
        House {
            domain: "contoso.onmicrosoft.com".into(),
            invite_redirect_url: "https://myapp.contoso.com".into(),
            send_invitation_message: true,
        }
    }

    fn identity(issuer: &str) -> Identity {
        Identity {
            sign_in_type: "federated".into(),
            issuer: issuer.into(),
            issuer_assigned_id: "0123456789".into(),
        }
    }

    fn event(issuer: Option<&str>, claims: Value) -> SignUpEvent {
        let mut event = sample();
        event.sign_up.email = Some(Email::new("johnsmith@outlook.com"));
        event.sign_up.identities = issuer.into_iter().map(identity).collect();
        event.sign_up.claims = claims.as_object().unwrap().clone();
        event
    }

    fn user_of(event: &SignUpEvent) -> Value {
        match Plan::of(event, &house()) {
            Ok(Plan::Create { user, .. }) => user,
            _ => panic!("an account that is created"),
        }
    }

    #[test]
    fn an_account_gets_no_identity_but_those_of_others() {
        let mut event = event(Some("google.com"), json!({}));
        event.sign_up.identities.push(Identity {
            sign_in_type: "emailAddress".into(),
            issuer: "contoso.onmicrosoft.com".into(),
            issuer_assigned_id: "ceo@contoso.com".into(),
        });
        let user = user_of(&event);
        assert_eq!(user["identities"], json!([identity("google.com")]));
    }

    #[test]
    fn an_account_that_is_created_is_the_documented_one() {
        let mut event = event(
            Some("facebook.com"),
            json!({ "displayName": "John Smith", "city": "redmond", "extension_1a_Custom": "x" }),
        );
        event.decision.outcome =
            Outcome::Continue { claims: json!({ "city": "Redmond" }).as_object().unwrap().clone() };
        assert_eq!(
            user_of(&event),
            json!({
                "userPrincipalName": "johnsmith_outlook.com#EXT@contoso.onmicrosoft.com",
                "mailNickname": "johnsmith_outlook.com",
                "accountEnabled": true,
                "mail": "johnsmith@outlook.com",
                "userType": "Guest",
                "identities": [{
                    "signInType": "federated",
                    "issuer": "facebook.com",
                    "issuerAssignedId": "0123456789",
                }],
                "displayName": "John Smith",
                "city": "Redmond",
                "extension_1a_Custom": "x",
            })
        );
    }

    #[test]
    fn who_signs_in_with_google_facebook_or_mail_is_created_and_others_are_invited() {
        for issuer in
            ["google.com", "google", "Facebook.com", "facebook", "mail", "MAIL", "mail.com"]
        {
            assert!(is_creatable(&identity(issuer)), "{issuer}");
        }
        for issuer in ["", "contoso.onmicrosoft.com", "https://sts.example.com", "google.org"] {
            assert!(!is_creatable(&identity(issuer)), "{issuer}");
        }
        assert!(matches!(Plan::of(&event(None, json!({})), &house()), Ok(Plan::Invite { .. })));
    }

    #[test]
    fn an_invitation_speaks_the_language_of_the_person() {
        let mut event = event(None, json!({ "displayName": "John", "city": "Redmond" }));
        event.sign_up.locale = Some("pt-BR en".into());
        let Ok(Plan::Invite { mail, invitation, attributes }) = Plan::of(&event, &house()) else {
            panic!("an invitation");
        };
        assert_eq!(mail, "johnsmith@outlook.com");
        assert_eq!(
            invitation,
            json!({
                "invitedUserEmailAddress": "johnsmith@outlook.com",
                "inviteRedirectUrl": "https://myapp.contoso.com",
                "sendInvitationMessage": true,
                "invitedUserDisplayName": "John",
                "invitedUserMessageInfo": { "messageLanguage": "pt-BR" },
            })
        );
        assert_eq!(Value::from(attributes), json!({ "displayName": "John", "city": "Redmond" }));
        assert_eq!(language("en\"US"), None);
    }

    #[test]
    fn only_what_a_form_may_ask_for_becomes_an_attribute() {
        let claims = json!({
            "userType": "Member", "accountEnabled": false, "passwordProfile": {}, "mail": "x@y.z",
            "identities": [], "id": "1", "userPrincipalName": "x",
            "lastName": "Smith", "postalCode": 98052, "city": " ", "state": null, "country": ["US"],
            "extension_1a_Yes": true, "extension_1a_None": null, "extension_1a_Empty": "",
        });
        assert_eq!(
            Value::from(attributes(claims.as_object().unwrap())),
            json!({
                "surname": "Smith", "postalCode": "98052",
                "extension_1a_Yes": true, "extension_1a_Empty": "",
            })
        );
        let both = json!({ "surname": "Right", "lastName": "Wrong", "surName": "Wrong" });
        assert_eq!(attributes(both.as_object().unwrap())["surname"], "Right");
    }

    #[test]
    fn there_is_always_a_name() {
        let name = |claims| user_of(&event(Some("google"), claims))["displayName"].clone();
        assert_eq!(name(json!({ "givenName": "Ada", "surname": "Lovelace" })), "Ada Lovelace");
        assert_eq!(name(json!({ "surname": "Lovelace" })), "Lovelace");
        assert_eq!(name(json!({ "displayName": "" })), "johnsmith");
        let long = name(json!({ "displayName": "ä".repeat(1000) }));
        assert_eq!(long.as_str().unwrap().chars().count(), DISPLAY_NAME_CHARS_MAX);
    }

    #[test]
    fn without_an_address_there_is_no_account() {
        let with = |address: Option<&str>, assigned: &str, issuer: &str| {
            let mut event = event(Some(issuer), json!({}));
            event.sign_up.email = address.map(Email::new);
            event.sign_up.identities[0].issuer_assigned_id = assigned.into();
            Plan::of(&event, &house()).map(drop)
        };
        assert_eq!(with(None, "ada@example.com", "mail"), Ok(()));
        for address in [None, Some(""), Some("ada"), Some("@x"), Some("ada@"), Some("a b@c")] {
            assert_eq!(with(address, "12345", "google.com"), Err(NoAddress), "{address:?}");
        }
    }

    #[test]
    fn what_a_name_cannot_hold_is_replaced_and_still_tells_people_apart() {
        let plain = local_part("ada.o'neil-x_y@example.com", "0123456789abcdef");
        assert_eq!(plain, "ada.o'neil-x_y_example.com");
        let plus = local_part("ada+x@example.com", "0123456789abcdef");
        assert_eq!(plus, "ada_x_example.com_0123456789ab");
        assert_ne!(plus, local_part("ada/x@example.com", "fedcba9876543210"));
    }

    fn value() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "\\PC{0,20}".prop_map(Value::from),
            Just(json!([])),
            Just(json!({ "a": 1 })),
        ]
    }

    fn name() -> impl Strategy<Value = String> {
        let known = proptest::sample::select(ATTRIBUTES.to_vec()).prop_map(str::to_owned);
        prop_oneof![
            known,
            "(userType|accountEnabled|identities|mail|lastName|surName|id)",
            "extension_[a-z0-9]{1,8}_[A-Z]{1,3}",
            "\\PC{0,12}",
        ]
    }

    proptest! {
        #[test]
        fn whatever_a_form_holds_the_account_is_a_guest_that_graph_takes(
            claims in proptest::collection::btree_map(name(), value(), 0..20),
        ) {
            let claims: Map<String, Value> = claims.into_iter().collect();
            let event = event(Some("google.com"), claims.into());
            let user = user_of(&event);
            prop_assert_eq!(&user["userType"], "Guest");
            prop_assert_eq!(&user["accountEnabled"], true);
            prop_assert_eq!(&user["mail"], "johnsmith@outlook.com");
            prop_assert_eq!(&user["identities"], &json!(event.sign_up.identities));
            for (name, value) in user.as_object().unwrap() {
                let fits = match name.as_str() {
                    "userType" | "accountEnabled" | "identities" => true,
                    "mail" | "mailNickname" | "userPrincipalName" => true,
                    name if name.starts_with(CUSTOM) => !value.is_null(),
                    name => {
                        ATTRIBUTES.contains(&name) && value.as_str().is_some_and(|it| !it.is_empty())
                    }
                };
                prop_assert!(fits, "{name}: {value}");
            }
        }

        #[test]
        fn a_name_in_the_directory_is_always_one(mail in "\\PC{1,80}@\\PC{1,80}") {
            let local = local_part(&mail, "0123456789abcdef0123456789abcdef");
            let fits = local.chars().all(|c| c.is_ascii_alphanumeric() || "'.-_!^~".contains(c));
            prop_assert!(fits && local.len() + GUEST.len() <= UPN_LOCAL_CHARS_MAX, "{local}");
        }
    }
}
