//! What keeps an evaluation within bounds, whatever a rule says and a platform sends.
//!
//! Two things are counted off a budget: how often loops turn, with the size of what they handle at
//! each turn, and what functions build. Nothing that is built may grow beyond [`SIZE_MAX`]. What
//! runs outside of loops needs no count: a source is short, so it calls few functions, and each of
//! them is linear in what it is given.
//!
//! The budget is the thread's, for functions of the language are told nothing but their arguments.

use std::cell::Cell;

use cel::{
    DeclarationError, Env, ExecutionError,
    common::{
        types::{
            CelBytes, CelInt, CelList, CelMap, CelOptional, CelString, DYN_TYPE, LIST_TYPE,
            STRING_TYPE,
        },
        value::{CowVal, Val},
    },
};

/// The characters of an expression; a longer one wants a list or several rules.
pub(super) const SOURCE_MAX: usize = 16 * 1024;

/// How deep an expression may be nested, counting each of `a + b + c` too, and twice in a loop.
/// Evaluating it takes kilobytes of stack for each, and a thread has two megabytes.
pub(super) const DEPTH_MAX: usize = 32;

/// The functions that an expression may call.
pub(super) const CALLS_MAX: usize = 256;

/// The bytes of a text or list that an expression builds: several times what a call may send.
const SIZE_MAX: u64 = 256 * 1024;

/// Some tens of milliseconds. A rule that is of use takes a thousandth of it.
const BUDGET: u64 = 20_000_000;

/// One value put into a list.
pub(super) const ITEM: u64 = 200;

/// One turn of a loop, or one value handled in it.
const TURN: u64 = 400;

thread_local! {
    static LEFT: Cell<u64> = const { Cell::new(BUDGET) };
}

/// Evaluates within a budget; also says whether it was used up.
pub(super) fn within_budget<T>(evaluate: impl FnOnce() -> T) -> (T, bool) {
    LEFT.set(BUDGET);
    let value = evaluate();
    (value, LEFT.get() == 0)
}

/// Counts work off the budget, and fails once there is nothing left.
pub(super) fn charge(work: u64) -> Result<(), ExecutionError> {
    let left = LEFT.get().saturating_sub(work);
    LEFT.set(left);
    if left == 0 { Err(ExecutionError::function_error("budget", "is used up")) } else { Ok(()) }
}

pub(super) fn length(text: &str) -> u64 {
    text.len().try_into().unwrap_or(u64::MAX)
}

/// Wraps what a loop handles: counts it, and is it.
pub(super) const METERED: &str = "@metered";
/// Wraps what may become part of a text: fails where it is too large for that.
pub(super) const SIZED: &str = "@sized";
pub(super) const ADD: &str = "@add";

/// Functions that build more than they are given, or take longer than that; each is replaced by
/// one of ours that has bounds.
pub(super) const REPLACED: [(&str, &str); 5] = [
    ("indexOf", "@indexOf"),
    ("join", "@join"),
    ("lastIndexOf", "@lastIndexOf"),
    ("replace", "@replace"),
    ("split", "@split"),
];

pub(super) fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_overload(METERED, METERED, vec![DYN_TYPE], metered)?;
    env.add_overload(SIZED, SIZED, vec![DYN_TYPE], sized)?;
    env.add_overload(ADD, ADD, vec![DYN_TYPE, DYN_TYPE], add)?;
    let text = || vec![STRING_TYPE];
    env.add_member_overload("@join", "@join", LIST_TYPE, vec![], join)?;
    env.add_member_overload("@join", "@join_with", LIST_TYPE, text(), join)?;
    cel::add_member_overload!(env, fn index_of: (CelString, CelString) -> Result<CelInt>,
        name = "@indexOf")?;
    cel::add_member_overload!(env, fn index_of_from: (CelString, CelString, CelInt) -> Result<CelInt>,
        name = "@indexOf")?;
    cel::add_member_overload!(env, fn last_index_of: (CelString, CelString) -> Result<CelInt>,
        name = "@lastIndexOf")?;
    cel::add_member_overload!(env,
        fn last_index_of_from: (CelString, CelString, CelInt) -> Result<CelInt>,
        name = "@lastIndexOf")?;
    cel::add_member_overload!(env, fn replace: (CelString, CelString, CelString) -> Result<CelString>,
        name = "@replace")?;
    cel::add_member_overload!(env,
        fn replace_some: (CelString, CelString, CelString, CelInt) -> Result<CelString>,
        name = "@replace")?;
    cel::add_member_overload!(env, fn split: (CelString, CelString) -> Result<CelList>,
        name = "@split")?;
    cel::add_member_overload!(env, fn split_some: (CelString, CelString, CelInt) -> Result<CelList>,
        name = "@split")
}

fn metered<'b, 'v>(mut args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let value = the_one(&mut args)?;
    charge(TURN + weight(value.as_ref()))?;
    Ok(value)
}

fn sized<'b, 'v>(mut args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let value = the_one(&mut args)?;
    build(weight(value.as_ref()))?;
    Ok(value)
}

fn the_one<'b, 'v>(args: &mut Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    args.pop().ok_or_else(|| ExecutionError::invalid_argument_count(1, 0))
}

/// Says how much is about to be built.
fn build(size: u64) -> Result<(), ExecutionError> {
    charge(size)?;
    if size > SIZE_MAX {
        return Err(ExecutionError::function_error("budget", "would be exceeded"));
    }
    Ok(())
}

/// What a value holds, in bytes or so: as much as its copy, comparison or conversion costs.
fn weight(value: &dyn Val) -> u64 {
    if let Some(text) = value.downcast_ref::<CelString<'_>>() {
        length(text.inner())
    } else if let Some(bytes) = value.downcast_ref::<CelBytes<'_>>() {
        bytes.inner().len().try_into().unwrap_or(u64::MAX)
    } else if let Some(list) = value.downcast_ref::<CelList<'_>>() {
        list.inner().iter().map(|item| ITEM + weight(item.as_ref())).sum()
    } else if let Some(map) = value.downcast_ref::<CelMap<'_>>() {
        map.inner().values().map(|item| 2 * ITEM + weight(item.as_ref())).sum()
    } else if let Some(optional) = value.downcast_ref::<CelOptional<'_>>() {
        optional.inner().map_or(0, weight)
    } else {
        0
    }
}

fn add<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let [left, right] = args.as_slice() else {
        return Err(ExecutionError::invalid_argument_count(2, args.len()));
    };
    build(weight(left.as_ref()) + weight(right.as_ref()))?;
    let types = || vec![left.get_type().name().to_owned(), right.get_type().name().to_owned()];
    let adder = left.as_adder().ok_or_else(|| ExecutionError::no_such_overload("_+_", types()))?;
    Ok(CowVal::Owned(adder.add(right.as_ref())?.into_owned()))
}

fn join<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let separator = args.get(1).and_then(|it| it.downcast_ref::<CelString<'_>>());
    let separator = separator.map_or("", CelString::inner);
    let list = args.first().and_then(|it| it.as_iterable());
    let mut items =
        list.ok_or_else(|| ExecutionError::invalid_argument_count(1, args.len()))?.iter();
    let mut joined = String::new();
    let mut first = true;
    while let Some(item) = items.next() {
        let text = item.downcast_ref::<CelString<'_>>().ok_or_else(|| {
            let got = item.get_type().name().to_owned();
            ExecutionError::UnexpectedType { got, want: "string".into() }
        })?;
        if !std::mem::take(&mut first) {
            joined.push_str(separator);
        }
        joined.push_str(text.inner());
        charge(length(text.inner()) + length(separator))?;
        within_size(&joined)?;
    }
    Ok(CowVal::owned(CelString::from(joined)))
}

fn within_size(built: &str) -> Result<(), ExecutionError> {
    if length(built) > SIZE_MAX {
        return Err(ExecutionError::function_error("budget", "would be exceeded"));
    }
    Ok(())
}

type TextResult = Result<CelString<'static>, ExecutionError>;

fn replace(text: &CelString<'_>, from: &CelString<'_>, to: &CelString<'_>) -> TextResult {
    replace_some(text, from, to, &CelInt::from(-1))
}

/// Replaces the first `count`, or all where it is negative.
fn replace_some(
    text: &CelString<'_>,
    from: &CelString<'_>,
    to: &CelString<'_>,
    count: &CelInt,
) -> TextResult {
    let count = usize::try_from(*count.inner()).unwrap_or(usize::MAX);
    let mut replaced = String::new();
    let mut done = 0;
    for (at, found) in text.match_indices(from.inner()).take(count) {
        replaced.push_str(&text[done..at]);
        replaced.push_str(to.inner());
        done = at + found.len();
        charge(length(to.inner()) + 1)?;
        within_size(&replaced)?;
    }
    replaced.push_str(&text[done..]);
    within_size(&replaced)?;
    Ok(replaced.into())
}

type ListResult = Result<CelList<'static>, ExecutionError>;

fn split(text: &CelString<'_>, separator: &CelString<'_>) -> ListResult {
    split_some(text, separator, &CelInt::from(-1))
}

/// Splits into at most `count` parts, or as many as there are where it is negative. Nothing as a
/// separator splits between characters.
fn split_some(text: &CelString<'_>, separator: &CelString<'_>, count: &CelInt) -> ListResult {
    let count = usize::try_from(*count.inner()).unwrap_or(usize::MAX);
    let mut parts: Vec<Box<dyn Val>> = Vec::new();
    let mut rest = Some(text.inner());
    while let Some(text) = rest.filter(|_| parts.len() < count) {
        charge(ITEM)?;
        let last = parts.len() + 1 == count;
        let (part, behind) = match (separator.is_empty(), text.chars().next()) {
            (true, None) => break,
            _ if last => (text, None),
            (true, Some(first)) => {
                let (part, behind) = text.split_at(first.len_utf8());
                (part, Some(behind))
            }
            (false, _) => match text.split_once(separator.inner()) {
                Some((part, behind)) => (part, Some(behind)),
                None => (text, None),
            },
        };
        parts.push(Box::new(CelString::from(part.to_owned())));
        rest = behind;
    }
    Ok(parts.into())
}

type IndexResult = Result<CelInt, ExecutionError>;

fn index_of(text: &CelString<'_>, sought: &CelString<'_>) -> IndexResult {
    Ok(position(text, text.find(sought.inner())))
}

fn index_of_from(text: &CelString<'_>, sought: &CelString<'_>, from: &CelInt) -> IndexResult {
    let start = offset(text, from, sought.is_empty())?;
    Ok(position(text, text[start..].find(sought.inner()).map(|at| start + at)))
}

fn last_index_of(text: &CelString<'_>, sought: &CelString<'_>) -> IndexResult {
    Ok(position(text, text.rfind(sought.inner())))
}

/// The last one that begins at `from` or before.
fn last_index_of_from(text: &CelString<'_>, sought: &CelString<'_>, from: &CelInt) -> IndexResult {
    let start = offset(text, from, sought.is_empty())?;
    let mut end = (start + sought.len()).min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    Ok(position(text, text[..end].rfind(sought.inner())))
}

/// The place of a byte, counted in characters; -1 where there is none.
fn position(text: &str, at: Option<usize>) -> CelInt {
    let at = at.map(|at| i64::try_from(text[..at].chars().count()).unwrap_or(i64::MAX));
    at.unwrap_or(-1).into()
}

/// The byte at which the `from`th character begins.
fn offset(text: &str, from: &CelInt, up_to_the_end: bool) -> Result<usize, ExecutionError> {
    let beyond = || ExecutionError::IndexOutOfBounds((*from.inner()).into());
    let from = usize::try_from(*from.inner()).map_err(|_| beyond())?;
    match text.char_indices().nth(from) {
        Some((at, _)) => Ok(at),
        None if up_to_the_end => Ok(text.len()),
        None => Err(beyond()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::json;

    use super::super::{Claims, Condition, Facts, Failure, sample};
    use crate::SignUp;

    /// As much as a call may send, in the shapes that cost most.
    fn hostile() -> SignUp {
        let claims = json!({
            "long": "a".repeat(60_000),
            "half": "a".repeat(30_000),
            "needle": format!("{}b", "a".repeat(15_000)),
            "many": vec![1; 15_000],
            "words": vec!["ab"; 10_000],
            "deep": (0..100).fold(json!(1), |inner, _| json!([inner, inner.is_array()])),
        });
        SignUp { claims: claims.as_object().unwrap().clone(), ..sample() }
    }

    fn evaluate(condition: &str, sign_up: &SignUp) -> (Result<bool, Failure>, Duration) {
        let compiled = Condition::compile(condition);
        let compiled = compiled.unwrap_or_else(|faults| panic!("{condition}: {faults:?}"));
        let changed = Claims::new();
        let facts = Facts::new(sign_up, &changed);
        let start = Instant::now();
        (compiled.holds(&facts), start.elapsed())
    }

    #[test]
    fn a_hostile_rule_is_stopped() {
        let sign_up = hostile();
        let doubled = |start: &str, step: &str| format!("[{start}]{}", step.repeat(18));
        let numbers = (0..900).map(|it| it.to_string()).collect::<Vec<_>>().join(",");
        let sum = "x+".repeat(12);
        for (condition, stopped) in [
            // What grows
            (format!("{}.size() == 1", doubled("'aaaaaaaa'", ".map(x, x + x)")), true),
            (format!("{}.size() == 1", doubled("[1]", ".map(x, x + x)")), true),
            (format!("{}.size() == 1", doubled("[1]", ".map(x, [x, x])")), true),
            (format!("{}.size() == 1", doubled("b'aaaaaaaa'", ".map(x, x + x)")), true),
            (format!("{}.size() == 1", doubled("'ab'", ".map(x, x.replace('', x))")), true),
            (format!("{}.size() == 1", doubled("'ab'", ".map(x, x.split('').join(x))")), true),
            (format!("{}.size() == 1", doubled("'ab'", ".map(x, '%x'.format([x]))")), true),
            (format!("[signup.claims.long].all(x, {sum}x == '')"), true),
            ("signup.claims.long.replace('a', signup.claims.long) == ''".to_owned(), true),
            ("signup.claims.many.map(x, signup.claims.half).join('') == ''".to_owned(), true),
            // What turns
            (
                format!(
                    "[{numbers}].all(a, [{numbers}].all(b, [{numbers}].all(c, a + b + c >= 0)))"
                ),
                true,
            ),
            (
                format!(
                    "[{numbers}].exists(a, [{numbers}].exists(b, [{numbers}].exists(c, c / 0 == 1)))"
                ),
                true,
            ),
            (
                format!(
                    "[{numbers}].map(a, [{numbers}].map(b, [{numbers}].map(c, c))).size() == 1"
                ),
                true,
            ),
            (format!("[{numbers}].filter(a, [{numbers}].exists_one(b, a == b)).size() == 1"), true),
            ("signup.claims.many.all(x, signup.claims.long.lowerAscii() != '')".to_owned(), true),
            ("signup.claims.many.all(x, signup.claims.long.matches('^a*$'))".to_owned(), true),
            ("signup.claims.many.all(x, signup.claims.many.size() > x)".to_owned(), true),
            ("signup.claims.many.all(x, !(5 in signup.claims.many))".to_owned(), true),
            (
                "signup.claims.many.exists(x, signup.claims.long == signup.claims.half)".to_owned(),
                true,
            ),
            (
                format!(
                    "[signup.claims.many].all(l, [{numbers}].all(a, [{numbers}].all(b, l == l)))"
                ),
                true,
            ),
            (format!("[signup.claims.long].all(t, [{numbers}].all(a, t.reverse() == t))"), true),
            ("signup.claims.many.all(x, phone('020 7946 0018', 'GB') != '')".to_owned(), true),
            ("signup.claims.words.all(x, title_case(signup.claims.half) != x)".to_owned(), true),
            // What is long
            ("signup.claims.half.indexOf(signup.claims.needle) == -1".to_owned(), false),
            ("signup.claims.half.lastIndexOf(signup.claims.needle) == -1".to_owned(), false),
            ("signup.claims.half.contains(signup.claims.needle)".to_owned(), false),
            ("title_case(signup.claims.long).size() == 1".to_owned(), false),
            ("size(signup.claims.deep) == 2".to_owned(), false),
            (
                "is_email(signup.claims.long) || is_phone(signup.claims.long, 'GB')".to_owned(),
                false,
            ),
            (
                "signup.claims.long.matches('(a|aa)+$') && signup.claims.long.matches('(x+x+)+y')"
                    .to_owned(),
                false,
            ),
            (r"signup.claims.long.matches('(\\w{1,3}\\s?){1,3}$')".to_owned(), true),
            ("signup.claims.long.matches('a{0,500}b')".to_owned(), true),
            ("signup.claims.long.matches(signup.claims.half)".to_owned(), true),
            (format!("signup.claims.long{} == ''", ".reverse()".repeat(25)), false),
            (format!("size([{}1]) == 1", "signup.claims.many,".repeat(800)), true),
        ] {
            let (outcome, took) = evaluate(&condition, &sign_up);
            let short: String = condition.chars().take(90).collect();
            assert_eq!(outcome.is_err(), stopped, "{short}: {outcome:?}");
            // A fiftieth of it, optimised; here nothing is, and others use the machine too.
            assert!(took < Duration::from_secs(10), "{short} took {took:?}");
        }
    }

    #[test]
    fn the_deepest_that_is_allowed_can_be_evaluated_on_a_small_stack() {
        // The deepest of a kind that is let in.
        let deepest = |source: &dyn Fn(usize) -> String| {
            let fits = |times: &usize| Condition::compile(&source(*times)).is_ok();
            let times = (1..100).take_while(fits).last().expect("once fits");
            assert!((3..=32).contains(&times), "{times} times");
            source(times)
        };
        let around = |before: &str, within: &str, after: &str, times: usize| {
            format!("{}{within}{}", before.repeat(times), after.repeat(times))
        };
        let sources = [
            deepest(&|times| "size(signup.claims) + ".repeat(times) + "1 > 0"),
            deepest(&|times| around("1 + (", "size(signup.claims)", ")", times) + " > 0"),
            deepest(&|times| around("[", "true", "]", times) + " != []"),
            deepest(&|times| around("!(", "true", ")", times)),
            deepest(&|times| around("dyn(", "true", ")", times)),
            deepest(&|times| "true ? false : ".repeat(times) + "true"),
            deepest(&|times| around("[1].all(x, dyn(dyn(", "x == 1", ")))", times)),
            deepest(&|times| around("size([1].map(x, ", "x", "))", times) + " > 0"),
            deepest(&|times| "[1]".to_owned() + &".map(x, x)".repeat(times) + " != []"),
            deepest(&|times| "'a'".to_owned() + &".trim()".repeat(times) + " == 'a'"),
        ];
        let evaluating = move || {
            for condition in &sources {
                let (outcome, _) = evaluate(condition, &hostile());
                assert!(outcome.is_ok(), "{condition}: {outcome:?}");
            }
        };
        let thread = std::thread::Builder::new().stack_size(1024 * 1024).spawn(evaluating);
        thread.unwrap().join().unwrap();
    }
}
