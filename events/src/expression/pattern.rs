//! `matches`, with patterns that are compiled along with the expression.
//!
//! CEL's own function compiles its pattern at every call, which takes far longer than all the rest
//! of a rule. So a pattern that is written out in a call is replaced by a variable, which holds it
//! compiled; one that is put together from claims can only be compiled when it is there. Both are
//! bounded: matching takes time linear in the text, and a pattern may take so much memory.

use std::any::Any;

use cel::{
    DeclarationError, Env, ExecutionError, IdedExpr,
    common::{
        ast::{CallExpr, Expr, LiteralValue},
        types::{CelBool, CelString, Type},
        value::{StaticVal, Val},
    },
    parser::Macro,
};
use regex::{Regex, RegexBuilder};

const MATCHES: &str = "matches";

/// Begins the name of a variable that holds a pattern; the pattern itself follows. Nobody can write
/// such a name.
const VARIABLE: &str = "@pattern ";

/// Enough for some hundred classes of Unicode, and compiled within milliseconds: a claim may end up
/// in a pattern.
const BYTES_MAX: usize = 1024 * 1024;

static PATTERN: Type = Type::new_unspecified_type("pattern");

/// A pattern that is written in an expression.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    variable: String,
    regex: Regex,
}

impl Pattern {
    /// The pattern that a variable stands for, or what is wrong with it; `None` where the variable
    /// is another.
    pub(super) fn of_variable(name: &str) -> Option<Result<Self, String>> {
        let pattern = name.strip_prefix(VARIABLE)?;
        Some(regex(pattern).map(|regex| Self { variable: name.to_owned(), regex }))
    }

    pub(super) fn variable(&self) -> &str {
        &self.variable
    }
}

/// Declares `matches`, on a text and as a function of two.
pub(super) fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    cel::add_overload!(env, fn matches: (CelString, CelString) -> Result<CelBool>,
        id = "matches")?;
    cel::add_member_overload!(env, fn matches: (CelString, CelString) -> Result<CelBool>)?;
    cel::add_overload!(env, fn matches_compiled: (CelString, Pattern) -> CelBool,
        name = MATCHES, id = "matches_compiled")?;
    cel::add_member_overload!(env, fn matches_compiled: (CelString, Pattern) -> CelBool,
        name = MATCHES)?;
    env.add_macro(Macro::global(MATCHES, 2, |helper, target, args| {
        Ok(with_variable(target, args).map(|call| helper.next_expr(call)))
    }))?;
    env.add_macro(Macro::receiver(MATCHES, 1, |helper, target, args| {
        Ok(with_variable(target, args).map(|call| helper.next_expr(call)))
    }))
}

/// The call with a variable in the place of a written pattern, which keeps its place in the source.
fn with_variable(target: &mut Option<IdedExpr>, args: &mut Vec<IdedExpr>) -> Option<Expr> {
    let Some(IdedExpr { expr: Expr::Literal(LiteralValue::String(pattern)), id }) = args.last()
    else {
        return None;
    };
    let variable =
        IdedExpr { id: *id, expr: Expr::Ident(format!("{VARIABLE}{}", pattern.inner())) };
    args.pop();
    args.push(variable);
    Some(Expr::Call(CallExpr {
        func_name: MATCHES.to_owned(),
        target: target.take().map(Box::new),
        args: std::mem::take(args),
    }))
}

fn matches(text: &CelString<'_>, pattern: &CelString<'_>) -> Result<CelBool, ExecutionError> {
    let regex = regex(pattern.inner())
        .map_err(|message| ExecutionError::function_error(MATCHES, message))?;
    Ok(regex.is_match(text.inner()).into())
}

fn matches_compiled(text: &CelString<'_>, pattern: &Pattern) -> CelBool {
    pattern.regex.is_match(text.inner()).into()
}

fn regex(pattern: &str) -> Result<Regex, String> {
    RegexBuilder::new(pattern).size_limit(BYTES_MAX).build().map_err(|error| {
        let error = error.to_string();
        // Some messages are a drawing of the pattern; its last line is the message.
        let what = error.lines().last().unwrap_or_default();
        format!("`{pattern}` is no pattern: {}", what.trim_start_matches("error: "))
    })
}

impl Val for Pattern {
    fn get_type(&self) -> &Type {
        &PATTERN
    }

    fn cel_type() -> &'static Type {
        &PATTERN
    }

    fn clone_as_boxed<'v>(&self) -> Box<dyn Val + 'v> {
        Box::new(self.clone())
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }
}

impl StaticVal for Pattern {}
