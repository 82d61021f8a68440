//! CEL: expressions compiled and checked once, and the sign-up as they see it.
//!
//! The sign-up is not copied into CEL's own values: a member is looked up when an expression asks
//! for it, and text is borrowed. A rule costs what it looks at.

use std::{
    fmt,
    sync::{Arc, LazyLock, OnceLock},
};

use cel::{
    Context, Env, ExecutionError, IdedExpr, Program,
    common::{
        ast::{CallExpr, Expr, LiteralValue, SourceInfo},
        traits::{Container, Indexer, Iterable, Sizer},
        types::{
            CelBool, CelDouble, CelInt, CelList, CelMap, CelMapKey, CelNull, CelString, CelUInt,
            MAP_TYPE, Type,
        },
        value::{CowVal, Val},
    },
};
use serde_json::Value;
use vestibule_events::{Claims, Identity, SignUp};

/// The functions that expressions may call: CEL's standard library and its extension for text, for
/// claims want trimming and changes of case.
static ENV: LazyLock<Arc<Env>> = LazyLock::new(|| {
    let mut env = Env::stdlib();
    env.add_extension(cel::extensions::strings).expect("it clashes with nothing in the standard");
    Arc::new(env)
});

/// The one variable there is, and its members.
const SIGNUP: &str = "signup";
const MEMBERS: [&str; 11] = [
    "connector",
    "protocol",
    "step",
    "email",
    "email_domain",
    "identities",
    "claims",
    "client",
    "locale",
    "object_id",
    "correlation_id",
];

/// An expression that can be evaluated.
#[derive(Debug)]
pub(super) struct Compiled(Program);

/// What is wrong with an expression, and where in it, from 1.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) message: String,
    pub(super) line: usize,
    pub(super) column: usize,
}

/// Why an expression gave no usable value. Holds nothing of what it looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// A member that is not there, for which the expression does not ask with `has()`.
    Missing,
    /// A value is not of the type that an operator or function needs.
    Type,
    /// A condition is neither true nor false, or a claim neither text, number nor yes or no.
    Result,
    /// An overflow, a division by zero, a bad pattern.
    Other,
}

impl Failure {
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "missing member",
            Self::Type => "unexpected type",
            Self::Result => "unusable result",
            Self::Other => "evaluation error",
        }
    }
}

impl From<ExecutionError> for Failure {
    fn from(error: ExecutionError) -> Self {
        match error {
            ExecutionError::NoSuchKey(_) | ExecutionError::IndexOutOfBounds(_) => Self::Missing,
            ExecutionError::NoSuchOverload(_)
            | ExecutionError::UnexpectedType { .. }
            | ExecutionError::UnsupportedTargetType { .. }
            | ExecutionError::ValuesNotComparable(..)
            | ExecutionError::UnsupportedBinaryOperator(..) => Self::Type,
            _ => Self::Other,
        }
    }
}

impl Compiled {
    pub(super) fn compile(source: &str) -> Result<Self, Vec<Fault>> {
        let program = ENV.compile(source).map_err(|errors| {
            let fault = |it: cel::ParseError| Fault {
                message: it.msg,
                line: usize::try_from(it.pos.0).unwrap_or(1).max(1),
                column: usize::try_from(it.pos.1).unwrap_or(1).max(1),
            };
            errors.errors.into_iter().map(fault).collect::<Vec<_>>()
        })?;
        let mut checker = Checker::new(program.source_info());
        checker.check(program.expression());
        if checker.faults.is_empty() { Ok(Self(program)) } else { Err(checker.faults) }
    }

    /// Whether a condition holds.
    pub(super) fn holds(&self, facts: &Facts<'_>) -> Result<bool, Failure> {
        match self.0.execute(&facts.0)? {
            cel::Value::Bool(holds) => Ok(holds),
            _ => Err(Failure::Result),
        }
    }

    /// The value of a claim; null where it is to stay as it is.
    pub(super) fn claim(&self, facts: &Facts<'_>) -> Result<Value, Failure> {
        Ok(match self.0.execute(&facts.0)? {
            cel::Value::String(text) => Arc::unwrap_or_clone(text).into(),
            cel::Value::Bool(yes) => yes.into(),
            cel::Value::Int(number) => number.into(),
            cel::Value::UInt(number) => number.into(),
            cel::Value::Float(number) if number.is_finite() => number.into(),
            cel::Value::Null => Value::Null,
            // Platforms take no collections (contract 1.2).
            _ => return Err(Failure::Result),
        })
    }
}

/// What expressions see: the sign-up, with what earlier rules changed.
pub(super) struct Facts<'a>(Context<'a, 'a>);

impl<'a> Facts<'a> {
    pub(super) fn new(sign_up: &'a SignUp, changed: &'a Claims) -> Self {
        let mut context = Context::with_env(Arc::clone(&ENV));
        context.add_variable_as_val(SIGNUP, Box::new(SignUpView { sign_up, changed }));
        Self(context)
    }
}

/// `signup`.
#[derive(Clone, Copy)]
struct SignUpView<'a> {
    sign_up: &'a SignUp,
    changed: &'a Claims,
}

impl<'a> SignUpView<'a> {
    fn member(&self, name: &str) -> Option<Box<dyn Val + 'a>> {
        let sign_up = self.sign_up;
        Some(match name {
            "connector" => text(sign_up.connector.as_str()),
            "protocol" => match sign_up.protocol {
                vestibule_events::Protocol::ApiConnector => text("api-connector"),
            },
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
    changed: &'a Claims,
    /// Only for those who go through all of them, which is rare.
    names: OnceLock<Vec<CelString<'a>>>,
}

impl<'a> ClaimsView<'a> {
    fn claim(&self, name: &str) -> Option<&'a Value> {
        self.changed.get(name).or_else(|| self.original.get(name))
    }

    fn names(&self) -> &[CelString<'a>] {
        self.names.get_or_init(|| {
            let added = self.changed.keys().filter(|name| !self.original.contains_key(*name));
            self.original.keys().chain(added).map(|name| CelString::from(name.as_str())).collect()
        })
    }
}

fn text<'a>(text: &'a str) -> Box<dyn Val + 'a> {
    Box::new(CelString::from(text))
}

fn identity(identity: &Identity) -> Box<dyn Val + '_> {
    Box::new(CelMap::from(std::collections::HashMap::from([
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
                .collect::<std::collections::HashMap<_, _>>(),
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

/// Finds what would fail at every evaluation: names that do not exist and patterns that cannot be.
struct Checker<'a> {
    source: &'a SourceInfo,
    /// Variables of the comprehensions around.
    scope: Vec<&'a str>,
    faults: Vec<Fault>,
}

impl<'a> Checker<'a> {
    fn new(source: &'a SourceInfo) -> Self {
        Self { source, scope: Vec::new(), faults: Vec::new() }
    }

    fn check(&mut self, expression: &'a IdedExpr) {
        match &expression.expr {
            Expr::Unspecified | Expr::Literal(_) => {}
            Expr::Ident(name) => self.check_variable(expression, name),
            Expr::Select(select) => {
                self.check(&select.operand);
                let signup = matches!(&select.operand.expr, Expr::Ident(name) if name == SIGNUP);
                if signup && !self.scope.contains(&SIGNUP) {
                    self.check_member(expression, &select.field);
                }
            }
            Expr::Call(call) => {
                // A qualified function, such as `optional.of`, looks like a variable's member.
                let qualified = matches!(
                    call.target.as_deref(),
                    Some(IdedExpr { expr: Expr::Ident(name), .. }) if name == "optional"
                );
                if !qualified {
                    call.target.iter().for_each(|target| self.check(target));
                    self.check_function(expression, call);
                }
                call.args.iter().for_each(|argument| self.check(argument));
            }
            Expr::List(list) => list.elements.iter().for_each(|element| self.check(element)),
            Expr::Map(map) => map.entries.iter().for_each(|entry| self.check_entry(&entry.expr)),
            Expr::Struct(it) => it.entries.iter().for_each(|entry| self.check_entry(&entry.expr)),
            Expr::Comprehension(it) => {
                self.check(&it.iter_range);
                self.check(&it.accu_init);
                let outside = self.scope.len();
                self.scope.extend([it.iter_var.as_str(), it.accu_var.as_str()]);
                self.scope.extend(it.iter_var2.as_deref());
                self.check(&it.loop_cond);
                self.check(&it.loop_step);
                self.check(&it.result);
                self.scope.truncate(outside);
            }
        }
    }

    fn check_entry(&mut self, entry: &'a cel::common::ast::EntryExpr) {
        match entry {
            cel::common::ast::EntryExpr::StructField(field) => self.check(&field.value),
            cel::common::ast::EntryExpr::MapEntry(entry) => {
                self.check(&entry.key);
                self.check(&entry.value);
            }
        }
    }

    fn check_variable(&mut self, at: &IdedExpr, name: &str) {
        const TYPES: [&str; 10] = [
            "bool",
            "bytes",
            "double",
            "int",
            "list",
            "map",
            "null_type",
            "string",
            "type",
            "uint",
        ];
        if name != SIGNUP && !self.scope.contains(&name) && !TYPES.contains(&name) {
            self.fault(at, format!("there is no `{name}`; everything is under `{SIGNUP}`"));
        }
    }

    fn check_member(&mut self, at: &IdedExpr, name: &str) {
        if !MEMBERS.contains(&name) {
            let members = MEMBERS.join(", ");
            self.fault(at, format!("`{SIGNUP}` has no `{name}`; it has {members}"));
        }
    }

    /// Calls the function with arguments that suit none, to hear whether there is one of that name.
    fn check_function(&mut self, at: &IdedExpr, call: &CallExpr) {
        let null = || IdedExpr { id: 0, expr: Expr::Literal(LiteralValue::Null) };
        let text = |text: &str| IdedExpr {
            id: 0,
            expr: Expr::Literal(LiteralValue::String(CelString::from(text.to_owned()))),
        };
        let call_with = |target: Option<IdedExpr>, args: Vec<IdedExpr>| {
            let call =
                CallExpr { func_name: call.func_name.clone(), target: target.map(Box::new), args };
            let call = IdedExpr { id: 0, expr: Expr::Call(call) };
            cel::Value::resolve(&call, &Context::with_env(Arc::clone(&ENV)))
        };
        let nulls = call.args.iter().map(|_| null()).collect();
        let probe = call_with(call.target.as_ref().map(|_| null()), nulls);
        if let Err(ExecutionError::UndeclaredReference(name)) = probe {
            return self.fault(at, format!("there is no function `{name}`"));
        }
        if let ("matches", Some(Expr::Literal(LiteralValue::String(pattern)))) =
            (call.func_name.as_str(), call.args.last().map(|it| &it.expr))
            && let Err(ExecutionError::FunctionError { message, .. }) =
                call_with(Some(text("")), vec![text(pattern.inner())])
        {
            self.fault(at, message);
        }
    }

    fn fault(&mut self, at: &IdedExpr, message: String) {
        let (start, _) = self.source.offset_for(at.id).unwrap_or_default();
        let before = self.source.source.get(..start as usize).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        self.faults.push(Fault {
            message,
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        });
    }
}
