//! `matches`, with patterns that are compiled along with the expression.
//!
//! CEL's own function compiles its pattern at every call, which takes far longer than all the rest
//! of a rule. So a pattern that is written out in a call is replaced by a variable, which holds it
//! compiled; one that is put together from claims can only be compiled when it is there. Both are
//! bounded: matching takes time linear in the text, times the size of the pattern at worst; a pattern
//! may be so large, and what it may take to match is counted.

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

use super::bounded::{charge, length};

const MATCHES: &str = "matches";

/// Begins the name of a variable that holds a pattern; the pattern itself follows. Nobody can write
/// such a name.
const VARIABLE: &str = "@pattern ";

/// The sizes that a compiled pattern may have, in bytes: some letters, many, a class of Unicode, some
/// of them, some hundred. A claim may end up in a pattern, and then the smaller ones must do.
const SIZES: [usize; 5] = [4 * 1024, 16 * 1024, 64 * 1024, 256 * 1024, 1024 * 1024];
const SIZES_OF_CLAIMS: &[usize] = SIZES.split_at(3).0;

/// Where a text defeats all that is clever in matching, each of its bytes is held against each part
/// of the pattern, which is some sixty bytes large.
const PART_BYTES: usize = 64;

static PATTERN: Type = Type::new_unspecified_type("pattern");

/// A pattern that is written in an expression.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    variable: String,
    regex: Regex,
    effort: u64,
}

impl Pattern {
    /// The pattern that a variable stands for, or what is wrong with it; `None` where the variable
    /// is another.
    pub(super) fn of_variable(name: &str) -> Option<Result<Self, String>> {
        let pattern = name.strip_prefix(VARIABLE)?;
        let compiled = compile(pattern, &SIZES);
        Some(compiled.map(|(regex, effort)| Self { variable: name.to_owned(), regex, effort }))
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
    cel::add_overload!(env, fn matches_compiled: (CelString, Pattern) -> Result<CelBool>,
        name = MATCHES, id = "matches_compiled")?;
    cel::add_member_overload!(env, fn matches_compiled: (CelString, Pattern) -> Result<CelBool>,
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

/// Compiling a pattern, up to the size that it may have.
const COMPILING: u64 = 500_000;

fn matches(text: &CelString<'_>, pattern: &CelString<'_>) -> Result<CelBool, ExecutionError> {
    charge(COMPILING)?;
    let (regex, effort) = compile(pattern.inner(), SIZES_OF_CLAIMS)
        .map_err(|message| ExecutionError::function_error(MATCHES, message))?;
    charge(effort.saturating_mul(length(text)))?;
    Ok(regex.is_match(text.inner()).into())
}

fn matches_compiled(text: &CelString<'_>, pattern: &Pattern) -> Result<CelBool, ExecutionError> {
    charge(pattern.effort.saturating_mul(length(text)))?;
    Ok(pattern.regex.is_match(text.inner()).into())
}

/// A pattern within one of the sizes, with how many times as long as reading a text it may take to
/// match.
fn compile(pattern: &str, sizes: &[usize]) -> Result<(Regex, u64), String> {
    let mut fault = String::new();
    for size in sizes {
        match RegexBuilder::new(pattern).size_limit(*size).build() {
            Ok(regex) => return Ok((regex, u64::try_from(size / PART_BYTES).unwrap_or(u64::MAX))),
            Err(error) => {
                let message = error.to_string();
                // Some messages are a drawing of the pattern; its last line is the message.
                let what = message.lines().last().unwrap_or_default();
                let what = what.trim_start_matches("error: ");
                fault = format!("`{pattern}` is no pattern: {what}");
                if !matches!(error, regex::Error::CompiledTooBig(_)) {
                    break;
                }
            }
        }
    }
    Err(fault)
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
