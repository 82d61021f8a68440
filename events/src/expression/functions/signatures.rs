//! What every function takes and gives, so that a call that cannot work is found beforehand.

use super::{dates::date_fault, mail::domain_fault, network::network_fault, phone::region_fault};

/// What kind of value something has, as far as that can be known before it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::expression) enum Kind {
    /// A claim, say: nobody knows.
    Any,
    Text,
    Number,
    Bool,
    Null,
    Date,
    List,
    Map,
}

impl Kind {
    pub(in crate::expression) const fn name(self) -> &'static str {
        match self {
            Self::Any => "anything",
            Self::Text => "text",
            Self::Number => "a number",
            Self::Bool => "true or false",
            Self::Null => "null",
            Self::Date => "a date",
            Self::List => "a list",
            Self::Map => "a map",
        }
    }
}

/// What a function takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::expression) enum Param {
    Any,
    Text,
    Number,
    List,
    Optional,
    /// Text, a list or a map.
    Sized,
    /// A date, or text that is one.
    Date,
    /// The same, and text only.
    DateText,
    /// A domain, or a list of them.
    Domains,
    /// A network, or a list of them.
    Networks,
    /// The code of a country.
    Region,
}

impl Param {
    pub(in crate::expression) fn takes(self, kind: Kind) -> bool {
        match (self, kind) {
            (_, Kind::Any) | (Self::Any, _) => true,
            (Self::Text | Self::DateText | Self::Region, kind) => kind == Kind::Text,
            (Self::Number, kind) => kind == Kind::Number,
            (Self::List, kind) => kind == Kind::List,
            (Self::Optional, _) => false,
            (Self::Sized, kind) => matches!(kind, Kind::Text | Kind::List | Kind::Map),
            (Self::Date, kind) => matches!(kind, Kind::Text | Kind::Date),
            (Self::Domains | Self::Networks, kind) => matches!(kind, Kind::Text | Kind::List),
        }
    }

    pub(in crate::expression) const fn name(self) -> &'static str {
        match self {
            Self::Any => "anything",
            Self::Text | Self::DateText | Self::Region => "text",
            Self::Number => "a number",
            Self::List => "a list",
            Self::Optional => "an optional value, such as `signup.claims.?city`",
            Self::Sized => "text, a list or a map",
            Self::Date => "a date",
            Self::Domains | Self::Networks => "text or a list",
        }
    }

    /// Why a text that is written in the call makes no sense there.
    pub(in crate::expression) fn fault(self, written: &str) -> Option<String> {
        match self {
            Self::Date | Self::DateText => date_fault(written),
            Self::Domains => domain_fault(written),
            Self::Networks => network_fault(written),
            Self::Region => region_fault(written),
            _ => None,
        }
    }
}

/// One way to call a function.
#[derive(Debug)]
pub(in crate::expression) struct Signature {
    pub(in crate::expression) name: &'static str,
    /// `x.f()`, where the first of `takes` is `x`; else `f(x)`.
    pub(in crate::expression) on: bool,
    pub(in crate::expression) takes: &'static [Param],
    pub(in crate::expression) gives: Kind,
}

const fn of(name: &'static str, takes: &'static [Param], gives: Kind) -> Signature {
    Signature { name, on: false, takes, gives }
}

const fn on(name: &'static str, takes: &'static [Param], gives: Kind) -> Signature {
    Signature { name, on: true, takes, gives }
}

/// Every function, in every way that it may be called.
pub(in crate::expression) const FUNCTIONS: &[Signature] = &[
    // CEL's own
    of("bool", &[Param::Any], Kind::Bool),
    of("bytes", &[Param::Any], Kind::Any),
    of("double", &[Param::Any], Kind::Number),
    of("dyn", &[Param::Any], Kind::Any),
    of("int", &[Param::Any], Kind::Number),
    of("string", &[Param::Any], Kind::Text),
    of("type", &[Param::Any], Kind::Any),
    of("uint", &[Param::Any], Kind::Number),
    of("size", &[Param::Sized], Kind::Number),
    on("size", &[Param::Sized], Kind::Number),
    of("optional.none", &[], Kind::Any),
    of("optional.of", &[Param::Any], Kind::Any),
    of("optional.ofNonZeroValue", &[Param::Any], Kind::Any),
    on("hasValue", &[Param::Optional], Kind::Bool),
    on("or", &[Param::Optional, Param::Optional], Kind::Any),
    on("orValue", &[Param::Optional, Param::Any], Kind::Any),
    on("value", &[Param::Optional], Kind::Any),
    // Text
    of("matches", &[Param::Text, Param::Text], Kind::Bool),
    on("matches", &[Param::Text, Param::Text], Kind::Bool),
    on("contains", &[Param::Text, Param::Text], Kind::Bool),
    on("endsWith", &[Param::Text, Param::Text], Kind::Bool),
    on("startsWith", &[Param::Text, Param::Text], Kind::Bool),
    on("charAt", &[Param::Text, Param::Number], Kind::Text),
    on("format", &[Param::Text, Param::List], Kind::Text),
    on("indexOf", &[Param::Text, Param::Text], Kind::Number),
    on("indexOf", &[Param::Text, Param::Text, Param::Number], Kind::Number),
    on("join", &[Param::List], Kind::Text),
    on("join", &[Param::List, Param::Text], Kind::Text),
    on("lastIndexOf", &[Param::Text, Param::Text], Kind::Number),
    on("lastIndexOf", &[Param::Text, Param::Text, Param::Number], Kind::Number),
    on("lowerAscii", &[Param::Text], Kind::Text),
    on("replace", &[Param::Text, Param::Text, Param::Text], Kind::Text),
    on("replace", &[Param::Text, Param::Text, Param::Text, Param::Number], Kind::Text),
    on("reverse", &[Param::Text], Kind::Text),
    on("split", &[Param::Text, Param::Text], Kind::List),
    on("split", &[Param::Text, Param::Text, Param::Number], Kind::List),
    on("substring", &[Param::Text, Param::Number], Kind::Text),
    on("substring", &[Param::Text, Param::Number, Param::Number], Kind::Text),
    on("trim", &[Param::Text], Kind::Text),
    on("upperAscii", &[Param::Text], Kind::Text),
    of("collapse_spaces", &[Param::Text], Kind::Text),
    on("collapse_spaces", &[Param::Text], Kind::Text),
    of("title_case", &[Param::Text], Kind::Text),
    on("title_case", &[Param::Text], Kind::Text),
    // Addresses
    of("is_email", &[Param::Text], Kind::Bool),
    on("is_email", &[Param::Text], Kind::Bool),
    of("email_local", &[Param::Text], Kind::Text),
    on("email_local", &[Param::Text], Kind::Text),
    of("email_domain", &[Param::Text], Kind::Text),
    on("email_domain", &[Param::Text], Kind::Text),
    of("email_canonical", &[Param::Text], Kind::Text),
    on("email_canonical", &[Param::Text], Kind::Text),
    of("in_domain", &[Param::Text, Param::Domains], Kind::Bool),
    on("in_domain", &[Param::Text, Param::Domains], Kind::Bool),
    of("ip_in", &[Param::Text, Param::Networks], Kind::Bool),
    // Phones and countries
    of("phone", &[Param::Text, Param::Region], Kind::Text),
    on("phone", &[Param::Text, Param::Region], Kind::Text),
    of("is_phone", &[Param::Text, Param::Region], Kind::Bool),
    on("is_phone", &[Param::Text, Param::Region], Kind::Bool),
    of("country_code", &[Param::Text], Kind::Text),
    on("country_code", &[Param::Text], Kind::Text),
    of("country_name", &[Param::Text], Kind::Text),
    on("country_name", &[Param::Text], Kind::Text),
    // Dates
    of("now", &[], Kind::Date),
    of("today", &[], Kind::Date),
    of("date", &[Param::Date], Kind::Date),
    of("timestamp", &[Param::DateText], Kind::Date),
    of("years_since", &[Param::Date], Kind::Number),
    of("years_between", &[Param::Date, Param::Date], Kind::Number),
    of("days_since", &[Param::Date], Kind::Number),
    of("days_until", &[Param::Date], Kind::Number),
    of("days_between", &[Param::Date, Param::Date], Kind::Number),
    of("add_days", &[Param::Date, Param::Number], Kind::Date),
];
