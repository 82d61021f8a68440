//! Dates and moments.
//!
//! A date is a day of the calendar, and one with a time is a moment; both are of one type, so that
//! they compare. What day it is today is said in UTC. Which moment is now, whoever evaluates says.

use std::{any::Any, cmp::Ordering};

use cel::{
    DeclarationError, Env, ExecutionError,
    common::{
        ast::{CallExpr, Expr},
        traits::Comparer,
        types::{CelInt, CelString, STRING_TYPE, Type},
        value::{CowVal, StaticVal, Val},
    },
    parser::Macro,
};
use time::{
    Date, Duration, OffsetDateTime, Time, UtcOffset, format_description::well_known::Rfc3339,
    macros::format_description,
};

use super::{mail::text, no_sense};

/// The variable that holds the moment of the evaluation; nobody can write its name.
pub(in crate::expression) const NOW: &str = "@now";

/// A day, or a moment in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::expression) struct Moment {
    at: OffsetDateTime,
    whole_day: bool,
}

static DATE: Type = Type::new_unspecified_type("date");

impl Moment {
    pub(in crate::expression) fn new(at: OffsetDateTime) -> Self {
        Self { at: at.to_offset(UtcOffset::UTC), whole_day: false }
    }

    fn day(day: Date) -> Self {
        Self { at: day.with_time(Time::MIDNIGHT).assume_utc(), whole_day: true }
    }

    /// `2001-02-03`, or RFC 3339, of which the day is taken as it is written.
    fn parse(written: &str) -> Option<(Self, Date)> {
        let written = written.trim();
        if let Ok(day) = Date::parse(written, format_description!("[year]-[month]-[day]")) {
            return Some((Self::day(day), day));
        }
        let at = OffsetDateTime::parse(written, &Rfc3339).ok()?;
        Some((Self { at: at.checked_to_offset(UtcOffset::UTC)?, whole_day: false }, at.date()))
    }

    /// As it is written into a claim.
    pub(in crate::expression) fn written(&self) -> String {
        let written = if self.whole_day {
            self.at.format(format_description!("[year]-[month]-[day]"))
        } else {
            self.at.format(&Rfc3339)
        };
        written.unwrap_or_default()
    }
}

pub(super) fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_type(DATE.to_owned())?;
    cel::add_overload!(env, fn today: (Moment) -> Moment, name = "@today")?;
    cel::add_overload!(env, fn date: (CelString) -> Result<Moment>)?;
    cel::add_overload!(env, fn date_of: (Moment) -> Moment, name = "date")?;
    cel::add_overload!(env, fn timestamp: (CelString) -> Result<Moment>)?;
    cel::add_overload!(env, fn string_of: (Moment) -> CelString, name = "string", id = "date_to_string")?;
    let kinds = [("text", STRING_TYPE), ("date", DATE.to_owned())];
    for (left_name, left) in &kinds {
        env.add_overload(
            "add_days",
            left_name,
            vec![left.to_owned(), cel::common::types::INT_TYPE],
            add_days,
        )?;
        for (right_name, right) in &kinds {
            let id = format!("{left_name}_{right_name}");
            let types = || vec![left.to_owned(), right.to_owned()];
            env.add_overload("years_between", &id, types(), years_between)?;
            env.add_overload("days_between", &id, types(), days_between)?;
        }
    }
    // What is asked of now becomes a question about a variable.
    for (name, function, now_first) in [
        ("years_since", "years_between", false),
        ("days_since", "days_between", false),
        ("days_until", "days_between", true),
    ] {
        env.add_macro(Macro::global(name, 1, move |helper, _, args| {
            let now = helper.next_expr(Expr::Ident(NOW.to_owned()));
            let mut args = std::mem::take(args);
            args.insert(if now_first { 0 } else { 1 }, now);
            let func_name = function.to_owned();
            Ok(Some(helper.next_expr(Expr::Call(CallExpr { func_name, target: None, args }))))
        }))?;
    }
    env.add_macro(Macro::global("now", 0, |helper, _, _| {
        Ok(Some(helper.next_expr(Expr::Ident(NOW.to_owned()))))
    }))?;
    env.add_macro(Macro::global("today", 0, |helper, _, _| {
        let args = vec![helper.next_expr(Expr::Ident(NOW.to_owned()))];
        let func_name = "@today".to_owned();
        Ok(Some(helper.next_expr(Expr::Call(CallExpr { func_name, target: None, args }))))
    }))
}

fn today(now: &Moment) -> Moment {
    Moment::day(now.at.date())
}

fn date(written: &CelString<'_>) -> Result<Moment, ExecutionError> {
    let (_, day) = Moment::parse(written).ok_or_else(|| no_sense("date", "date"))?;
    Ok(Moment::day(day))
}

fn date_of(moment: &Moment) -> Moment {
    today(moment)
}

fn timestamp(written: &CelString<'_>) -> Result<Moment, ExecutionError> {
    let (moment, _) = Moment::parse(written).ok_or_else(|| no_sense("timestamp", "date"))?;
    Ok(Moment { whole_day: false, ..moment })
}

fn string_of(moment: &Moment) -> CelString<'static> {
    moment.written().into()
}

/// The day of a date, or of what is written as one.
fn day_of(function: &'static str, value: &dyn Val) -> Result<Date, ExecutionError> {
    if let Some(moment) = value.downcast_ref::<Moment>() {
        return Ok(moment.at.date());
    }
    let (_, day) = Moment::parse(text(value)?).ok_or_else(|| no_sense(function, "date"))?;
    Ok(day)
}

fn between<'b, 'v>(
    function: &'static str,
    args: &[CowVal<'b, 'v>],
    count: impl FnOnce(Date, Date) -> i64,
) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let [from, to] = args else {
        return Err(ExecutionError::invalid_argument_count(2, args.len()));
    };
    let (from, to) = (day_of(function, from.as_ref())?, day_of(function, to.as_ref())?);
    Ok(CowVal::owned(CelInt::from(count(from, to))))
}

/// Whole years: the age on the second day of who was born on the first. Who was born on a leap day
/// has his birthday on the first of March where there is none.
fn years_between<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    between("years_between", &args, years)
}

fn years(from: Date, to: Date) -> i64 {
    let before_birthday = (to.month() as u8, to.day()) < (from.month() as u8, from.day());
    i64::from(to.year()) - i64::from(from.year()) - i64::from(before_birthday)
}

fn days_between<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    between("days_between", &args, |from, to| (to - from).whole_days())
}

fn add_days<'b, 'v>(args: Vec<CowVal<'b, 'v>>) -> Result<CowVal<'b, 'v>, ExecutionError> {
    let [day, days] = args.as_slice() else {
        return Err(ExecutionError::invalid_argument_count(2, args.len()));
    };
    let day = day_of("add_days", day.as_ref())?;
    let days = days.downcast_ref::<CelInt>().map_or(0, |days| *days.inner());
    // Ten thousand years are beyond every calendar, and days beyond that would not fit the type.
    let days = Some(days).filter(|days| days.abs() < 4_000_000).map(Duration::days);
    let day = days.and_then(|days| day.checked_add(days));
    day.map(|day| CowVal::owned(Moment::day(day))).ok_or_else(|| no_sense("add_days", "date"))
}

/// Why a written date is none.
pub(super) fn date_fault(written: &str) -> Option<String> {
    let message = || format!("`{written}` is no date, such as `2001-02-03`");
    Moment::parse(written).is_none().then(message)
}

impl Val for Moment {
    fn get_type(&self) -> &Type {
        &DATE
    }

    fn cel_type() -> &'static Type {
        &DATE
    }

    fn as_comparer(&self) -> Option<&dyn Comparer> {
        Some(self)
    }

    fn equals(&self, other: &dyn Val) -> bool {
        other.downcast_ref::<Self>().is_some_and(|other| self.at == other.at)
    }

    fn clone_as_boxed<'v>(&self) -> Box<dyn Val + 'v> {
        Box::new(*self)
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }
}

impl StaticVal for Moment {}

impl Comparer for Moment {
    fn compare(&self, other: &dyn Val) -> Result<Ordering, ExecutionError> {
        let other = other.downcast_ref::<Self>().ok_or_else(|| ExecutionError::UnexpectedType {
            got: other.get_type().name().to_owned(),
            want: "date".into(),
        })?;
        Ok(self.at.cmp(&other.at))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use time::macros::date as day;

    use super::*;

    #[test]
    fn years_are_whole_and_leap_days_come_late() {
        for (from, to, expected) in [
            (day!(2000 - 06 - 15), day!(2018 - 06 - 14), 17),
            (day!(2000 - 06 - 15), day!(2018 - 06 - 15), 18),
            (day!(2004 - 02 - 29), day!(2022 - 02 - 28), 17),
            (day!(2004 - 02 - 29), day!(2022 - 03 - 01), 18),
            (day!(2004 - 02 - 29), day!(2024 - 02 - 29), 20),
            (day!(2020 - 01 - 01), day!(2019 - 12 - 31), -1),
        ] {
            assert_eq!(years(from, to), expected, "{from} to {to}");
        }
    }

    #[test]
    fn dates_are_read_in_two_ways_and_no_other() {
        for (written, expected) in [
            ("2001-02-03", Some("2001-02-03")),
            (" 2001-02-03T23:30:00-05:00 ", Some("2001-02-04T04:30:00Z")),
            ("2001-02-03T04:05:06.789Z", Some("2001-02-03T04:05:06.789Z")),
            ("2001-02-29", None),
            ("03.02.2001", None),
            ("02/03/2001", None),
            ("2001-02-03T10:00", None),
            ("9999-12-31T23:59:59-23:59", None),
            ("", None),
        ] {
            let read = Moment::parse(written).map(|(moment, _)| moment.written());
            assert_eq!(read.as_deref(), expected, "{written}");
        }
        // The day is the one that is written, wherever it is another day already.
        let day = date(&"2001-02-03T23:30:00-05:00".into()).unwrap();
        assert_eq!(day.written(), "2001-02-03");
    }

    proptest! {
        #[test]
        fn nothing_makes_them_panic(text in "[0-9TZ:+. -]{0,30}|.{0,30}") {
            let _ = (date(&text.as_str().into()), timestamp(&text.as_str().into()));
        }

        #[test]
        fn years_and_days_agree(from in 0..800_000_i32, days in 0..40_000_i64) {
            let from = Date::from_julian_day(2_200_000 + from).unwrap();
            let to = from + Duration::days(days);
            // A year has 365 or 366 days, and a quarter more than 365 of them over the years.
            let years = years(from, to);
            prop_assert!(years * 365 <= days && days <= (years + 1) * 366);
        }
    }
}
