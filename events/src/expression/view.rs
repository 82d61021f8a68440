//! The sign-up as expressions see it.
//!
//! It is not copied into CEL's own values: a member is looked up when an expression asks for it,
//! and text is borrowed.

use std::{collections::HashMap, fmt, sync::OnceLock};

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

use super::{Facts, SIGNUP, pattern::Pattern};
use crate::{Claims, Identity, SignUp};

/// The variables of one evaluation.
pub(super) struct Scope<'a> {
    signup: SignUpView<'a>,
    patterns: &'a [Pattern],
}

impl<'a> Scope<'a> {
    pub(super) fn new(facts: &Facts<'a>, patterns: &'a [Pattern]) -> Self {
        let Facts { sign_up, changed } = *facts;
        Self { signup: SignUpView { sign_up, changed }, patterns }
    }
}

impl VariableResolver for Scope<'_> {
    fn resolve<'b>(&'b self, variable: &str) -> Option<CowVal<'b, 'b>> {
        if variable == SIGNUP {
            return Some(CowVal::Borrowed(&self.signup));
        }
        let pattern = self.patterns.iter().find(|it| it.variable() == variable)?;
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
            "claims" => Box::new(ClaimsView {
                original: &sign_up.claims,
                changed: self.changed,
                names: OnceLock::new(),
            }),
            "client" => text(sign_up.client.as_deref()?),
            "locale" => text(sign_up.locale.as_deref()?),
            "object_id" => text(sign_up.object_id.as_deref()?),
            "correlation_id" => text(sign_up.correlation_id.as_deref()?),
            _ => return None,
        })
    }
}

/// `signup.claims`.
struct ClaimsView<'a> {
    original: &'a Claims,
    changed: Option<&'a Claims>,
    /// Only for those who go through all of them, which is rare.
    names: OnceLock<Vec<CelString<'a>>>,
}

impl<'a> ClaimsView<'a> {
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

fn value(json: &Value) -> Box<dyn Val + '_> {
    match json {
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
        Value::Array(items) => Box::new(CelList::from(items.iter().map(value).collect::<Vec<_>>())),
        Value::Object(members) => Box::new(CelMap::from(
            members
                .iter()
                .map(|(name, it)| (CelMapKey::from(name.as_str()), value(it)))
                .collect::<HashMap<_, _>>(),
        )),
    }
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
        self.member(name).map(CowVal::Owned).ok_or_else(|| no_such_member(name))
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
        let Self { original, changed, .. } = *self;
        Box::new(Self { original, changed, names: OnceLock::new() })
    }
}

impl Indexer for ClaimsView<'_> {
    fn get<'b, 'v>(&'b self, key: &dyn Val) -> Result<CowVal<'b, 'v>, ExecutionError>
    where
        Self: 'v,
    {
        let name = member_name(key)?;
        self.claim(name).map(|it| CowVal::Owned(value(it))).ok_or_else(|| no_such_member(name))
    }

    fn steal<'v>(self: Box<Self>, key: &dyn Val) -> Result<Box<dyn Val + 'v>, ExecutionError>
    where
        Self: 'v,
    {
        let name = member_name(key)?;
        self.claim(name).map(value).ok_or_else(|| no_such_member(name))
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
