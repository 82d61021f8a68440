//! The functions that identity people need, and what is known of all functions there are.
//!
//! Each is given text of a person and says something about it. None panics, each takes time linear
//! in what it is given, and where a text makes no sense to it, it fails without repeating it.

mod country;
mod dates;
mod mail;
mod network;
mod phone;
mod signatures;
mod text;

use cel::{
    DeclarationError, Env, ExecutionError,
    common::{
        types::{CelList, CelString, DYN_TYPE, Kind as CelKind},
        value::{CowVal, Val},
    },
};

pub(super) use self::{
    dates::{Moment, NOW},
    phone::prepare_phones,
    signatures::{FUNCTIONS, Kind, Param, Signature},
};

pub(super) fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_overload(PLAIN, PLAIN, vec![DYN_TYPE], plain)?;
    for extension in [
        mail::extension,
        text::extension,
        phone::extension,
        country::extension,
        network::extension,
        dates::extension,
    ] {
        extension(env)?;
    }
    Ok(())
}

/// Wraps an expression whose value may be of a type that cannot leave the language as it is.
pub(super) const PLAIN: &str = "@plain";

/// A date as it is written, other plain values as they are, and nothing usable for all others.
fn plain<'b, 'v>(mut args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let value = args.pop().ok_or_else(|| ExecutionError::invalid_argument_count(1, 0))?;
    if let Some(moment) = value.downcast_ref::<Moment>() {
        return Ok(CowVal::owned(CelString::from(moment.written())));
    }
    match value.get_type().kind() {
        CelKind::Boolean
        | CelKind::Double
        | CelKind::Int
        | CelKind::NullType
        | CelKind::String
        | CelKind::UInt => Ok(value),
        _ => Ok(CowVal::owned(CelList::from(Vec::<Box<dyn Val>>::new()))),
    }
}

/// What a function of text gives.
type TextResult = Result<CelString<'static>, ExecutionError>;

/// A text made no sense to the function; what it was stays out of the message.
fn no_sense(function: &'static str, wanted: &str) -> ExecutionError {
    ExecutionError::function_error(function, format!("that is no {wanted}"))
}

/// Declares a function of one text, to be called as `f(x)` and as `x.f()`.
macro_rules! of_text {
    ($env:expr, $name:literal, $function:ident -> $($result:tt)+) => {
        cel::add_overload!($env, fn $function: (CelString) -> $($result)+, name = $name)?;
        cel::add_member_overload!($env, fn $function: (CelString) -> $($result)+, name = $name)?;
    };
}
use of_text;
