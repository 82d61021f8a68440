use axum::http::HeaderMap;
use data_encoding::BASE64;
use proptest::prelude::*;

use super::*;

fn credential(name: &str, kind: CredentialKind) -> Credential {
    Credential { name: name.to_owned(), kind }
}

fn basic_pair(user: &str, password: &str) -> Credential {
    let (user, password) = (user.to_owned(), password.into());
    credential("basic", CredentialKind::Basic { user, password })
}

fn api_key(header: &'static str, key: &str) -> Credential {
    let header = HeaderName::from_static(header);
    credential("key", CredentialKind::ApiKey { header, key: key.into() })
}

fn token(token: &str) -> Credential {
    credential("token", CredentialKind::Token { token: token.into() })
}

fn pairs() -> Vec<Credential> {
    vec![
        basic_pair("entra", "try-me"),
        basic_pair("entra", "a:b:c"),
        basic_pair("jürgen", "geheim ü"),
        basic_pair("nobody", ""),
    ]
}

fn call(credentials: &[Credential], headers: &[(&'static str, &[u8])]) -> Result<usize, Denied> {
    let headers: HeaderMap = headers
        .iter()
        .map(|(name, value)| {
            (HeaderName::from_static(name), HeaderValue::from_bytes(value).unwrap())
        })
        .fold(HeaderMap::new(), |mut headers, (name, value)| {
            headers.append(name, value);
            headers
        });
    let caller = Caller { headers: &headers, connection: None, now: OffsetDateTime::UNIX_EPOCH };
    Credentials::new(credentials).authenticate(&caller).map(|it| it.place)
}

fn authorization(value: &[u8]) -> Result<usize, Denied> {
    call(&pairs(), &[("authorization", value)])
}

fn encoded(pair: &str) -> String {
    format!("Basic {}", BASE64.encode(pair.as_bytes()))
}

fn basic(pair: &str) -> Result<usize, Denied> {
    authorization(encoded(pair).as_bytes())
}

#[test]
fn every_configured_pair_is_valid_at_the_same_time() {
    assert_eq!(basic("entra:try-me"), Ok(0));
    assert_eq!(basic("entra:a:b:c"), Ok(1), "a password may hold colons");
    assert_eq!(basic("jürgen:geheim ü"), Ok(2), "UTF-8, as the challenge announces");
    assert_eq!(basic("nobody:"), Ok(3));
}

#[test]
fn what_is_not_a_configured_pair_is_wrong() {
    for pair in [
        "entra:try-me ",
        "entra:try-m",
        "Entra:try-me",
        "entra:",
        ":try-me",
        ":",
        "entra:a",
        "entra:a:b",
        "entra:a:b:c:",
        "nobody: ",
        "entr:atry-me",
        "entra::try-me",
    ] {
        assert_eq!(basic(pair), Err(Denied::Wrong), "{pair:?}");
    }
}

#[test]
fn what_is_not_basic_is_malformed() {
    let pair = BASE64.encode(b"entra:try-me");
    for value in [
        "",
        "Basic",
        "Basic ",
        "Bearer x",
        "Basic ****",
        "Basic ZW50cmE=",
        &pair,
        &format!("Basic{pair}"),
        &format!("Basic {pair}=="),
        &format!("Basic {pair} x"),
    ] {
        assert_eq!(authorization(value.as_bytes()), Err(Denied::Malformed), "{value:?}");
    }
    assert_eq!(authorization(b"Basic \xff\xfe"), Err(Denied::Malformed));
}

#[test]
fn the_scheme_has_no_case_and_may_be_followed_by_spaces() {
    let pair = BASE64.encode(b"entra:try-me");
    for scheme in ["Basic ", "basic ", "BASIC ", "Basic   "] {
        assert_eq!(authorization(format!("{scheme}{pair}").as_bytes()), Ok(0), "{scheme:?}");
    }
}

#[test]
fn none_or_two_headers_are_not_one() {
    assert_eq!(call(&pairs(), &[]), Err(Denied::Missing));
    let value = encoded("entra:try-me");
    let twice = [("authorization", value.as_bytes()); 2];
    assert_eq!(call(&pairs(), &twice), Err(Denied::Malformed));
    let keys = [api_key("x-api-key", "secret")];
    let twice: [(_, &[u8]); 2] = [("x-api-key", b"secret"); 2];
    assert_eq!(call(&keys, &twice), Err(Denied::Malformed));
}

#[test]
fn without_credentials_nobody_gets_in() {
    assert_eq!(call(&[], &[("authorization", b"Basic Og==")]), Err(Denied::Wrong));
    assert_eq!(call(&[], &[("authorization", b"Bearer x")]), Err(Denied::Malformed));
    assert_eq!(call(&[], &[]), Err(Denied::Missing));
}

#[test]
fn a_key_counts_only_in_its_own_header() {
    let keys = [
        api_key("x-functions-key", "old"),
        api_key("x-functions-key", "new"),
        api_key("x-api-key", "other"),
    ];
    assert_eq!(call(&keys, &[("x-functions-key", b"old")]), Ok(0));
    assert_eq!(call(&keys, &[("x-functions-key", b"new")]), Ok(1));
    assert_eq!(call(&keys, &[("x-api-key", b"other")]), Ok(2));
    assert_eq!(call(&keys, &[("x-api-key", b"old")]), Err(Denied::Wrong));
    assert_eq!(call(&keys, &[("x-api-key", b"")]), Err(Denied::Wrong));
    assert_eq!(call(&keys, &[("authorization", b"Bearer old")]), Err(Denied::Malformed));
}

#[test]
fn a_fixed_token_is_compared_as_it_is() {
    let tokens = [token("abc.def"), token("äh")];
    assert_eq!(call(&tokens, &[("authorization", b"Bearer abc.def")]), Ok(0));
    assert_eq!(call(&tokens, &[("authorization", b"bearer  abc.def")]), Ok(0));
    assert_eq!(call(&tokens, &[("authorization", "Bearer äh".as_bytes())]), Ok(1));
    assert_eq!(call(&tokens, &[("authorization", b"Bearer abc")]), Err(Denied::Wrong));
    assert_eq!(call(&tokens, &[("authorization", b"Bearer ")]), Err(Denied::Wrong));
    assert_eq!(call(&tokens, &[("authorization", b"Basic abc.def")]), Err(Denied::Malformed));
}

#[test]
fn kinds_stand_side_by_side_and_one_that_fits_is_enough() {
    let all = [basic_pair("entra", "try-me"), api_key("x-api-key", "secret"), token("abc")];
    let pair = encoded("entra:try-me");
    assert_eq!(call(&all, &[("authorization", pair.as_bytes())]), Ok(0));
    assert_eq!(call(&all, &[("x-api-key", b"secret")]), Ok(1));
    assert_eq!(call(&all, &[("authorization", b"Bearer abc")]), Ok(2));
    let wrong_and_right: [(_, &[u8]); 2] =
        [("authorization", b"Basic Og=="), ("x-api-key", b"secret")];
    assert_eq!(call(&all, &wrong_and_right), Ok(1));
    let right_and_wrong: [(_, &[u8]); 2] =
        [("authorization", pair.as_bytes()), ("x-api-key", b"guess")];
    assert_eq!(call(&all, &right_and_wrong), Ok(0));
    let both_wrong: [(_, &[u8]); 2] = [("authorization", b"Digest x"), ("x-api-key", b"guess")];
    assert_eq!(call(&all, &both_wrong), Err(Denied::Malformed));
}

#[test]
fn a_challenge_names_what_would_be_accepted() {
    let challenges = |credentials: &[Credential]| {
        let challenges = Credentials::new(credentials).challenges();
        challenges.iter().map(|it| it.to_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let basic = r#"Basic realm="vestibule", charset="UTF-8""#;
    let bearer = r#"Bearer realm="vestibule""#;
    assert_eq!(challenges(&[]), [basic]);
    assert_eq!(challenges(&pairs()), [basic]);
    assert_eq!(challenges(&[token("a"), token("b")]), [bearer]);
    assert_eq!(challenges(&[token("a"), basic_pair("a", "b")]), [basic, bearer]);
    assert_eq!(challenges(&[api_key("x-api-key", "a")]), [r#"ApiKey realm="vestibule""#]);
}

#[test]
fn the_particular_reason_is_the_one_that_is_counted() {
    use Denied::{CertificateUnknown, Malformed, Missing, TokenExpired, TokenIssuer, Wrong};
    assert_eq!(Missing.or(Wrong), Wrong);
    assert_eq!(Wrong.or(Missing), Wrong);
    assert_eq!(TokenIssuer.or(TokenExpired), TokenExpired);
    assert_eq!(TokenExpired.or(TokenIssuer), TokenExpired);
    assert_eq!(Malformed.or(CertificateUnknown), Malformed, "the first of two alike");
}

#[test]
fn every_reason_has_a_name_of_its_own() {
    let names: std::collections::HashSet<_> = Denied::ALL.map(Denied::as_str).into();
    assert_eq!(names.len(), Denied::ALL.len());
}

#[test]
fn secrets_are_in_no_debug_text() {
    let all = [basic_pair("entra", "hush"), api_key("x-api-key", "hush"), token("hush")];
    let text = format!("{all:?}");
    assert!(!text.contains("hush") && text.contains("x-api-key"), "{text}");
}

proptest! {
    #[test]
    fn only_the_secret_itself_is_let_in(guess in "[ -~]{0,12}", secret in "[ -~]{1,12}") {
        // A header has no spaces around its value.
        prop_assume!(guess == guess.trim() && secret == secret.trim());
        let fits = guess == secret;
        let keys = [api_key("x-api-key", &secret)];
        prop_assert_eq!(call(&keys, &[("x-api-key", guess.as_bytes())]).is_ok(), fits);
        let tokens = [token(&secret)];
        let bearer = format!("Bearer {guess}");
        prop_assert_eq!(call(&tokens, &[("authorization", bearer.as_bytes())]).is_ok(), fits);
        let pairs = [basic_pair(&secret, &secret)];
        let pair = encoded(&format!("{guess}:{secret}"));
        let fits = fits && !secret.contains(':');
        prop_assert_eq!(call(&pairs, &[("authorization", pair.as_bytes())]).is_ok(), fits);
    }
}
