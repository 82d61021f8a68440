//! The sign-up, lists and lookups as expressions see them.
//!
//! They are not copied into CEL's own values: a member is looked up when an expression asks for it,
//! and text is borrowed.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use cel::{
    ExecutionError,
    common::{
        traits::{Container, Indexer, Iterable, Sizer},
        types::{
            CelBool, CelDouble, CelInt, CelList, CelMap, CelMapKey, CelNull, CelString, CelUInt,
            MAP_TYPE, Type,
        },
        value::{CowVal, Val},
    },
    context::VariableResolver,
};
use serde_json::Value;

use super::{
    Facts, SIGNUP,
    bounded::{self, charge},
    checker::Checked,
    functions::{Moment, NOW},
    sources::{LookupState, Members, Sources},
};
use crate::{Claims, Identity, SignUp};

/// Begin the names of variables that hold a list or the answer of a lookup; its name follows.
/// Nobody can write such a name.
const LIST: &str = "@list ";
const LOOKUP: &str = "@lookup ";

pub(super) fn list_variable(name: &str) -> String {
    format!("{LIST}{name}")
}

pub(super) fn lookup_variable(name: &str) -> String {
    format!("{LOOKUP}{name}")
}

/// The variables of one evaluation.
pub(super) struct Scope<'a> {
    signup: Option<SignUpView<'a>>,
    sources: Option<&'a dyn Sources>,
    expression: &'a Checked,
    now: Option<Moment>,
    /// Whether a list or a lookup was wanted and not there.
    wanting: AtomicBool,
}

impl<'a> Scope<'a> {
    pub(super) fn new(facts: &Facts<'a>, expression: &'a Checked) -> Self {
        let Facts { sign_up, changed, sources, now } = *facts;
        let signup = Some(SignUpView { sign_up, changed });
        let now = Some(Moment::new(now));
        Self { signup, sources, expression, now, wanting: AtomicBool::new(false) }
    }

    /// Holds nothing, so that only what depends on nothing has a value.
    pub(super) fn empty(expression: &'a Checked) -> Self {
        let wanting = AtomicBool::new(false);
        Self { signup: None, sources: None, expression, now: None, wanting }
    }

    pub(super) fn was_wanting(&self) -> bool {
        self.wanting.load(Ordering::Relaxed)
    }

    fn list(&self, name: &str) -> Option<ListView<'_>> {
        let list = self.sources.and_then(|sources| sources.list(name));
        self.wanting.fetch_or(list.is_none(), Ordering::Relaxed);
        list.map(ListView)
    }

    /// What it answered; else nothing, which fails whatever is done with it. An empty answer would
    /// not: `lookups.x.?y` would take it for an answer without `y`.
    fn lookup(&self, name: &str) -> Option<ClaimsView<'_>> {
        let answer = match self.sources.map(|sources| sources.lookup(name)) {
            Some(LookupState::Is(answer)) => Some(answer),
            Some(LookupState::NotYet | LookupState::Failed) | None => None,
        };
        self.wanting.fetch_or(answer.is_none(), Ordering::Relaxed);
        answer.map(|answer| ClaimsView::new(answer, None))
    }
}

impl VariableResolver for Scope<'_> {
    fn resolve<'b>(&'b self, variable: &str) -> Option<CowVal<'b, 'b>> {
        if variable == SIGNUP {
            return self.signup.as_ref().map(|it| CowVal::Borrowed(it as &dyn Val));
        }
        if !variable.starts_with('@') {
            return self.signup?.named(variable).map(CowVal::Owned);
        }
        // The name is also asked for with members behind it, `@lookup crm.found`.
        if let Some(name) = variable.strip_prefix(LOOKUP) {
            let named = self.expression.lookups.iter().any(|it| it == name);
            return if named { self.lookup(name).map(CowVal::owned) } else { None };
        }
        if let Some(name) = variable.strip_prefix(LIST) {
            return self.list(name).map(CowVal::owned);
        }
        if variable == NOW {
            return self.now.as_ref().map(|now| CowVal::Borrowed(now as &dyn Val));
        }
        let pattern = self.expression.patterns.iter().find(|it| it.variable() == variable)?;
        Some(CowVal::Borrowed(pattern))
    }
}

/// `signup`.
#[derive(Clone, Copy)]
struct SignUpView<'a> {
    sign_up: &'a SignUp,
    changed: Option<&'a Claims>,
}

impl<'a> SignUpView<'a> {
    /// What has a name of several parts, `signup.email` or `signup.claims.city`, found at once
    /// instead of part by part. Of a longer name the rest is selected from that, as always; and
    /// what is not here is looked for part by part, and missed there.
    fn named(&self, name: &str) -> Option<Box<dyn Val + 'a>> {
        let member = name.strip_prefix(SIGNUP)?.strip_prefix('.')?;
        match member.split_once('.') {
            None => self.counted(member).ok()?,
            Some(("claims", claim)) if !claim.contains('.') => {
                let claims = ClaimsView::new(&self.sign_up.claims, self.changed);
                value(claims.claim(claim)?).ok()
            }
            Some(_) => None,
        }
    }

    fn counted(&self, name: &str) -> Result<Option<Box<dyn Val + 'a>>, ExecutionError> {
        if name == "identities" {
            let identities = u64::try_from(self.sign_up.identities.len()).unwrap_or(u64::MAX);
            charge(bounded::ITEM * identities)?;
        }
        Ok(self.member(name))
    }

    fn member(&self, name: &str) -> Option<Box<dyn Val + 'a>> {
        let sign_up = self.sign_up;
        Some(match name {
            "connector" => text(sign_up.connector.as_str()),
            "protocol" => text(sign_up.protocol.as_str()),
            "step" => text(sign_up.step.as_str()),
            "email" => text(sign_up.email.as_ref()?.expose()),
            "email_domain" => {
                let domain = sign_up.email.as_ref()?.domain();
                Box::new(CelString::from(domain.trim().to_ascii_lowercase()))
            }
            "identities" => {
                let identities: Vec<_> = sign_up.identities.iter().map(identity).collect();
                Box::new(CelList::from(identities))
            }
            "claims" => Box::new(ClaimsView::new(&sign_up.claims, self.changed)),
            "client" => text(sign_up.client.as_deref()?),
            "locale" => text(sign_up.locale.as_deref()?),
            "ip" => text(sign_up.ip.as_deref()?),
            "object_id" => text(sign_up.object_id.as_deref()?),
            "correlation_id" => text(sign_up.correlation_id.as_deref()?),
            _ => return None,
        })
    }
}

/// `signup.claims`, or the answer of a lookup.
struct ClaimsView<'a> {
    original: &'a Claims,
    changed: Option<&'a Claims>,
    /// Only for those who go through all of them, which is rare.
    names: OnceLock<Vec<CelString<'a>>>,
}

impl<'a> ClaimsView<'a> {
    fn new(original: &'a Claims, changed: Option<&'a Claims>) -> Self {
        Self { original, changed, names: OnceLock::new() }
    }

    fn claim(&self, name: &str) -> Option<&'a Value> {
        self.changed.and_then(|it| it.get(name)).or_else(|| self.original.get(name))
    }

    fn names(&self) -> &[CelString<'a>] {
        self.names.get_or_init(|| {
            let changed = self.changed.into_iter().flat_map(Claims::keys);
            let added = changed.filter(|name| !self.original.contains_key(*name));
            self.original.keys().chain(added).map(|name| CelString::from(name.as_str())).collect()
        })
    }
}

fn text<'a>(text: &'a str) -> Box<dyn Val + 'a> {
    Box::new(CelString::from(text))
}

fn identity(identity: &Identity) -> Box<dyn Val + '_> {
    Box::new(CelMap::from(HashMap::from([
        (CelMapKey::from("signInType"), text(&identity.sign_in_type)),
        (CelMapKey::from("issuer"), text(&identity.issuer)),
        (CelMapKey::from("issuerAssignedId"), text(&identity.issuer_assigned_id)),
    ])))
}

/// Text is borrowed; what is in a list or a map is made anew each time that an expression asks, and
/// counted.
fn value(json: &Value) -> Result<Box<dyn Val + '_>, ExecutionError> {
    Ok(match json {
        Value::Null => Box::new(CelNull),
        Value::Bool(yes) => Box::new(CelBool::from(*yes)),
        Value::Number(number) => {
            if let Some(number) = number.as_i64() {
                Box::new(CelInt::from(number))
            } else if let Some(number) = number.as_u64() {
                Box::new(CelUInt::from(number))
            } else {
                Box::new(CelDouble::from(number.as_f64().unwrap_or(f64::NAN)))
            }
        }
        Value::String(it) => text(it),
        Value::Array(items) => {
            let item = |it| charge(bounded::ITEM).and_then(|()| value(it));
            Box::new(CelList::from(items.iter().map(item).collect::<Result<Vec<_>, _>>()?))
        }
        Value::Object(members) => {
            let mut values = HashMap::with_capacity(members.len());
            for (name, it) in members {
                charge(2 * bounded::ITEM)?;
                values.insert(CelMapKey::from(name.as_str()), value(it)?);
            }
            Box::new(CelMap::from(values))
        }
    })
}

/// Names a member with text, the only way there is.
fn member_name(key: &dyn Val) -> Result<&str, ExecutionError> {
    key.downcast_ref::<CelString<'_>>().map(CelString::inner).ok_or_else(|| {
        ExecutionError::UnexpectedType {
            got: key.get_type().name().to_owned(),
            want: "string".into(),
        }
    })
}

fn no_such_member(name: &str) -> ExecutionError {
    ExecutionError::no_such_key(name)
}

impl fmt::Debug for SignUpView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("signup")
    }
}

impl Val for SignUpView<'_> {
    fn get_type(&self) -> &Type {
        &MAP_TYPE
    }

    fn cel_type() -> &'static Type {
        &MAP_TYPE
    }

    fn as_container(&self) -> Option<&dyn Container> {
        Some(self)
    }

    fn as_indexer<'b, 'v>(&'b self) -> Option<&'b (dyn Indexer + 'v)>
    where
        Self: 'v,
    {
        Some(self)
    }

    fn clone_as_boxed<'v>(&self) -> Box<dyn Val + 'v>
    where
        Self: 'v,
    {
        Box::new(*self)
    }
}

impl Indexer for SignUpView<'_> {
    fn get<'b, 'v>(&'b self, key: &dyn Val) -> Result<CowVal<'b, 'v>, ExecutionError>
    where
        Self: 'v,
    {
        let name = member_name(key)?;
        self.counted(name)?.map(CowVal::Owned).ok_or_else(|| no_such_member(name))
    }

    fn steal<'v>(self: Box<Self>, key: &dyn Val) -> Result<Box<dyn Val + 'v>, ExecutionError>
    where
        Self: 'v,
    {
        self.get(key).map(CowVal::into_owned)
    }
}

impl Container for SignUpView<'_> {
    fn contains(&self, key: &dyn Val) -> Result<bool, ExecutionError> {
        Ok(self.member(member_name(key)?).is_some())
    }
}

impl fmt::Debug for ClaimsView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("signup.claims")
    }
}

impl Val for ClaimsView<'_> {
    fn get_type(&self) -> &Type {
        &MAP_TYPE
    }

    fn cel_type() -> &'static Type {
        &MAP_TYPE
    }

    fn as_container(&self) -> Option<&dyn Container> {
        Some(self)
    }

    fn as_indexer<'b, 'v>(&'b self) -> Option<&'b (dyn Indexer + 'v)>
    where
        Self: 'v,
    {
        Some(self)
    }

    fn as_iterable<'b, 'v>(&'b self) -> Option<&'b (dyn Iterable + 'v)>
    where
        Self: 'v,
    {
        Some(self)
    }

    fn as_sizer(&self) -> Option<&dyn Sizer> {
        Some(self)
    }

    fn clone_as_boxed<'v>(&self) -> Box<dyn Val + 'v>
    where
        Self: 'v,
    {
        Box::new(Self::new(self.original, self.changed))
    }
}

impl Indexer for ClaimsView<'_> {
    fn get<'b, 'v>(&'b self, key: &dyn Val) -> Result<CowVal<'b, 'v>, ExecutionError>
    where
        Self: 'v,
    {
        let name = member_name(key)?;
        let claim = self.claim(name).ok_or_else(|| no_such_member(name))?;
        value(claim).map(CowVal::Owned)
    }

    fn steal<'v>(self: Box<Self>, key: &dyn Val) -> Result<Box<dyn Val + 'v>, ExecutionError>
    where
        Self: 'v,
    {
        self.get(key).map(CowVal::into_owned)
    }
}

impl Container for ClaimsView<'_> {
    fn contains(&self, key: &dyn Val) -> Result<bool, ExecutionError> {
        Ok(self.claim(member_name(key)?).is_some())
    }
}

impl Sizer for ClaimsView<'_> {
    fn size(&self) -> CelInt {
        CelInt::from(i64::try_from(self.names().len()).unwrap_or(i64::MAX))
    }
}

impl Iterable for ClaimsView<'_> {
    fn iter<'b, 'v>(&'b self) -> Box<dyn cel::common::traits::Iterator<'b, 'v> + 'b>
    where
        Self: 'v,
    {
        Box::new(Names(self.names().iter()))
    }
}

struct Names<'b, 'a>(std::slice::Iter<'b, CelString<'a>>);

impl<'b, 'v, 'a: 'v> cel::common::traits::Iterator<'b, 'v> for Names<'b, 'a> {
    fn next(&mut self) -> Option<&'b (dyn Val + 'v)> {
        self.0.next().map(|name| name as &(dyn Val + 'v))
    }
}

/// A list. It has no size and no items: nobody loops over a million entries.
struct ListView<'a>(&'a dyn Members);

static LIST_OF_ENTRIES: Type = Type::new_unspecified_type("list of entries");

impl fmt::Debug for ListView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("list")
    }
}

impl Val for ListView<'_> {
    fn get_type(&self) -> &Type {
        &LIST_OF_ENTRIES
    }

    fn cel_type() -> &'static Type {
        &LIST_OF_ENTRIES
    }

    fn as_container(&self) -> Option<&dyn Container> {
        Some(self)
    }

    fn clone_as_boxed<'v>(&self) -> Box<dyn Val + 'v>
    where
        Self: 'v,
    {
        Box::new(ListView(self.0))
    }
}

impl Container for ListView<'_> {
    fn contains(&self, entry: &dyn Val) -> Result<bool, ExecutionError> {
        if let Some(text) = entry.downcast_ref::<CelString<'_>>() {
            return Ok(self.0.contains(text.inner()));
        }
        // Entries are text; a claim may well come as a number.
        let text = if let Some(number) = entry.downcast_ref::<CelInt>() {
            number.inner().to_string()
        } else if let Some(number) = entry.downcast_ref::<CelUInt>() {
            number.inner().to_string()
        } else if let Some(yes) = entry.downcast_ref::<CelBool>() {
            yes.inner().to_string()
        } else {
            let got = entry.get_type().name().to_owned();
            return Err(ExecutionError::UnexpectedType { got, want: "string".into() });
        };
        Ok(self.0.contains(&text))
    }
}
