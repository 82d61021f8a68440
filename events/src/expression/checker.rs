//! What can be known of an expression before it is ever evaluated.
//!
//! Names, patterns and bounds are settled here once: what is left of an expression means something,
//! and where it could grow or take long it is made of functions that count ([`super::bounded`]).
//! Of what kind a value is, is known of members, of what is written in the expression and of what
//! functions give. Of claims nothing is known, so nothing is said about them.

use cel::{
    IdedExpr,
    common::ast::{
        CallExpr, ComprehensionExpr, EntryExpr, Expr, LiteralValue, SourceInfo, operators,
    },
};

use super::{
    Fault, MEMBERS, SIGNUP,
    bounded::{self, CALLS_MAX, DEPTH_MAX},
    functions::{self, FUNCTIONS, Kind, NOW, Param, Signature},
    pattern::Pattern,
    sources::{Known, LISTS, LOOKUPS},
    view::{list_variable, lookup_variable},
};

/// An expression in which every name means something.
pub(super) struct Checked {
    pub(super) expression: IdedExpr,
    /// Of what kind its value is.
    pub(super) kind: Kind,
    pub(super) patterns: Vec<Pattern>,
    /// The lookups that it names, each once.
    pub(super) lookups: Vec<String>,
}

/// Finds what would fail at every evaluation: names that do not exist, patterns that cannot be,
/// values of a kind that is of no use where they stand.
pub(super) struct Checker<'a> {
    source: &'a SourceInfo,
    known: &'a Known,
    /// Variables of the comprehensions around.
    scope: Vec<String>,
    depth: usize,
    calls: usize,
    patterns: Vec<Pattern>,
    lookups: Vec<String>,
    faults: Vec<Fault>,
}

/// A list or a lookup that an expression names.
enum Reference {
    List(String),
    Lookup(String),
}

impl<'a> Checker<'a> {
    /// The expression with what it needs, or everything that is wrong with it.
    pub(super) fn check(
        mut expression: IdedExpr,
        source: &'a SourceInfo,
        known: &'a Known,
    ) -> Result<Checked, Vec<Fault>> {
        let mut checker = Self {
            source,
            known,
            scope: Vec::new(),
            depth: 0,
            calls: 0,
            patterns: Vec::new(),
            lookups: Vec::new(),
            faults: Vec::new(),
        };
        let kind = checker.visit(&mut expression);
        if !matches!(kind, Kind::Bool | Kind::Number | Kind::Text) {
            wrap(&mut expression, functions::PLAIN);
        }
        let Self { patterns, lookups, faults, .. } = checker;
        if faults.is_empty() {
            Ok(Checked { expression, kind, patterns, lookups })
        } else {
            Err(faults)
        }
    }

    /// Says of what kind the value is.
    fn visit(&mut self, node: &mut IdedExpr) -> Kind {
        // What a loop handles is counted, which nests it once more.
        let step = if self.scope.is_empty() { 1 } else { 2 };
        if self.depth + step > DEPTH_MAX {
            self.fault(node.id, "this is nested too deep; split it into several".to_owned());
            return Kind::Any;
        }
        self.depth += step;
        let kind = self.visit_within(node);
        self.depth -= step;
        kind
    }

    fn visit_within(&mut self, node: &mut IdedExpr) -> Kind {
        let at = node.id;
        match self.reference(node) {
            Some(Reference::List(name)) => {
                let message = format!("a list can only be asked with `in`: `… in {LISTS}.{name}`");
                self.fault(at, message);
                return Kind::Any;
            }
            Some(Reference::Lookup(name)) => {
                node.expr = self.lookup(at, name);
                return Kind::Map;
            }
            None => {}
        }
        match &mut node.expr {
            Expr::Unspecified => Kind::Any,
            Expr::Literal(literal) => kind_of(literal),
            Expr::Ident(name) => self.check_variable(at, name),
            Expr::Select(select) => {
                if let Expr::Ident(root) = &select.operand.expr
                    && !self.scope.contains(root)
                {
                    match root.as_str() {
                        SIGNUP => {
                            let kind = self.check_member(at, &select.field);
                            return if select.test { Kind::Bool } else { kind };
                        }
                        LISTS | LOOKUPS => {
                            let message = format!("`{root}.{}` is always there", select.field);
                            self.fault(at, message);
                            return Kind::Bool;
                        }
                        _ => {}
                    }
                }
                let operand = self.visit(&mut select.operand);
                if matches!(operand, Kind::Text | Kind::Number | Kind::Bool | Kind::Date) {
                    let message = format!("{} has no `{}`", operand.name(), select.field);
                    self.fault(at, message);
                }
                if select.test { Kind::Bool } else { Kind::Any }
            }
            Expr::Call(call) => match self.membership(call) {
                Some(asked) => {
                    node.expr = asked;
                    Kind::Bool
                }
                None => self.visit_call(at, call),
            },
            Expr::List(list) => {
                list.elements.iter_mut().for_each(|element| {
                    self.visit(element);
                });
                Kind::List
            }
            Expr::Map(map) => {
                for entry in &mut map.entries {
                    if let EntryExpr::MapEntry(entry) = &mut entry.expr {
                        self.visit(&mut entry.key);
                        self.visit(&mut entry.value);
                    }
                }
                Kind::Map
            }
            Expr::Struct(it) => {
                let message = format!("there is no type `{}`", it.type_name);
                self.fault(at, message);
                Kind::Any
            }
            Expr::Comprehension(it) => self.visit_loop(at, it),
        }
    }

    fn visit_loop(&mut self, at: u64, it: &mut ComprehensionExpr) -> Kind {
        // What the platform sends decides how often a loop turns; squared, it could use up the
        // deadline of the call and of those behind it.
        if !self.scope.is_empty() && !matches!(it.iter_range.expr, Expr::List(_)) {
            let message = "a loop within a loop can only walk a list that is written here";
            self.fault(at, message.to_owned());
        }
        let range = self.visit(&mut it.iter_range);
        if !matches!(range, Kind::List | Kind::Map | Kind::Any) {
            self.fault(at, format!("a loop needs a list or a map, and this is {}", range.name()));
        }
        let result = self.visit(&mut it.accu_init);
        let outside = self.scope.len();
        self.scope.extend([it.iter_var.clone(), it.accu_var.clone()]);
        self.scope.extend(it.iter_var2.clone());
        self.visit(&mut it.loop_cond);
        self.visit(&mut it.loop_step);
        let counted = self.visit(&mut it.result);
        self.scope.truncate(outside);
        meter(it);
        if counted == Kind::Any { result } else { counted }
    }

    fn visit_call(&mut self, at: u64, call: &mut CallExpr) -> Kind {
        // A qualified function, such as `optional.of`, looks like a variable's member.
        let qualified = match call.target.as_deref() {
            Some(IdedExpr { expr: Expr::Ident(name), .. }) if name == "optional" => {
                Some(format!("{name}.{}", call.func_name))
            }
            _ => None,
        };
        let mut kinds = Vec::with_capacity(1 + call.args.len());
        if qualified.is_none() {
            kinds.extend(call.target.iter_mut().map(|target| self.visit(target)));
        }
        kinds.extend(call.args.iter_mut().map(|argument| self.visit(argument)));
        let operator = !call.func_name.starts_with(|c: char| c.is_ascii_alphabetic());
        let kind = if operator {
            self.check_operator(at, call, &kinds)
        } else {
            self.calls += 1;
            if self.calls == CALLS_MAX + 1 {
                self.fault(at, format!("this calls more than {CALLS_MAX} functions"));
            }
            let name = qualified.as_ref().unwrap_or(&call.func_name);
            let on = call.target.is_some() && qualified.is_none();
            let kind = self.check_function(at, name, on, call, &kinds);
            if name.ends_with("phone") {
                functions::prepare_phones();
            }
            if let Some((_, ours)) =
                bounded::REPLACED.iter().find(|(name, _)| call.func_name == *name)
            {
                call.func_name = (*ours).to_owned();
            }
            if on && call.func_name == "format" {
                call.args.iter_mut().for_each(|it| wrap(it, bounded::SIZED));
            }
            kind
        };
        if !self.scope.is_empty() {
            let handled = call.target.as_deref_mut().filter(|_| qualified.is_none());
            let handled = handled.into_iter().chain(&mut call.args).zip(&kinds);
            for (value, kind) in handled {
                // What is written here is short, and of a number or so there is nothing to count.
                let short = matches!(kind, Kind::Number | Kind::Bool | Kind::Null | Kind::Date)
                    || matches!(value.expr, Expr::Literal(_))
                    || matches!(&value.expr, Expr::Ident(name) if name.starts_with('@'));
                let passes_on = matches!(
                    call.func_name.as_str(),
                    operators::LOGICAL_AND
                        | operators::LOGICAL_OR
                        | operators::LOGICAL_NOT
                        | operators::CONDITIONAL
                        | operators::NOT_STRICTLY_FALSE
                        | operators::INDEX
                        | operators::OPT_INDEX
                        | operators::OPT_SELECT
                        | operators::ADD
                        | bounded::ADD
                );
                if !short && !passes_on {
                    wrap(value, bounded::METERED);
                }
            }
        }
        kind
    }

    fn check_operator(&mut self, at: u64, call: &mut CallExpr, kinds: &[Kind]) -> Kind {
        let sign = call.func_name.trim_matches('_').to_owned();
        let differ = matches!(kinds, [left, right]
            if left != right && ![left, right].iter().any(|it| matches!(it, Kind::Any | Kind::Null)));
        match (call.func_name.as_str(), kinds) {
            (operators::LOGICAL_AND | operators::LOGICAL_OR | operators::LOGICAL_NOT, kinds) => {
                self.check_truths(at, &sign, kinds);
                Kind::Bool
            }
            (operators::CONDITIONAL, [condition, yes, no]) => {
                self.check_truths(at, "?", &[*condition]);
                if yes == no { *yes } else { Kind::Any }
            }
            (operators::EQUALS | operators::NOT_EQUALS, [left, right]) => {
                if differ {
                    let (left, right) = (left.name(), right.name());
                    self.fault(at, format!("{left} on the left of `{sign}` never equals {right}"));
                }
                Kind::Bool
            }
            (
                operators::LESS
                | operators::LESS_EQUALS
                | operators::GREATER
                | operators::GREATER_EQUALS,
                [left, right],
            ) => {
                if differ {
                    let (left, right) = (left.name(), right.name());
                    self.fault(at, format!("`{sign}` cannot compare {left} with {right}"));
                }
                Kind::Bool
            }
            (operators::IN, [_, range]) => {
                if !matches!(range, Kind::List | Kind::Map | Kind::Any) {
                    let message =
                        format!("`in` needs a list on its right, and has {}", range.name());
                    self.fault(at, message);
                }
                Kind::Bool
            }
            (operators::ADD, [left, right]) => {
                if differ || [left, right].iter().any(|it| matches!(it, Kind::Bool | Kind::Date)) {
                    let (left, right) = (left.name(), right.name());
                    self.fault(at, format!("`+` cannot add {left} and {right}"));
                }
                // What a loop gathers is counted where it turns; the shape of this is its own.
                let gathers = matches!(&call.args[0].expr, Expr::Ident(it) if it.starts_with('@'));
                if *left != Kind::Number && *right != Kind::Number && !gathers {
                    call.func_name = bounded::ADD.to_owned();
                }
                if left == right { *left } else { Kind::Any }
            }
            (
                operators::SUBSTRACT
                | operators::MULTIPLY
                | operators::DIVIDE
                | operators::MODULO
                | operators::NEGATE,
                kinds,
            ) => {
                let odd = kinds.iter().find(|it| !matches!(it, Kind::Number | Kind::Any));
                if let Some(odd) = odd {
                    self.fault(at, format!("`{sign}` needs numbers, and has {}", odd.name()));
                }
                Kind::Number
            }
            (operators::INDEX | operators::OPT_INDEX, [of, _]) => {
                if !matches!(of, Kind::List | Kind::Map | Kind::Any) {
                    self.fault(at, format!("`[…]` needs a list or a map, and has {}", of.name()));
                }
                Kind::Any
            }
            (operators::NOT_STRICTLY_FALSE, _) => Kind::Bool,
            ("@today", _) => Kind::Date,
            _ => Kind::Any,
        }
    }

    fn check_truths(&mut self, at: u64, sign: &str, kinds: &[Kind]) {
        if let Some(odd) = kinds.iter().find(|it| !matches!(it, Kind::Bool | Kind::Any)) {
            self.fault(at, format!("`{sign}` needs true or false, and has {}", odd.name()));
        }
    }

    /// The list or lookup that this is, written `lists.name` or `lists['name']`.
    fn reference(&self, node: &IdedExpr) -> Option<Reference> {
        let (root, name) = match &node.expr {
            Expr::Select(select) if !select.test => (&*select.operand, &*select.field),
            Expr::Call(call) if call.func_name == operators::INDEX => match call.args.as_slice() {
                [root, IdedExpr { expr: Expr::Literal(LiteralValue::String(name)), .. }] => {
                    (root, name.inner())
                }
                _ => return None,
            },
            _ => return None,
        };
        match &root.expr {
            Expr::Ident(root) if self.scope.contains(root) => None,
            Expr::Ident(root) if root == LISTS => Some(Reference::List(name.to_owned())),
            Expr::Ident(root) if root == LOOKUPS => Some(Reference::Lookup(name.to_owned())),
            _ => None,
        }
    }

    /// `x in lists.name` or `lists.name.contains(x)`: the one thing that can be asked of a list.
    fn membership(&mut self, call: &mut CallExpr) -> Option<Expr> {
        let (entry, list) = match (call.func_name.as_str(), &mut call.target, &mut *call.args) {
            (operators::IN, None, [entry, list]) => (entry, list),
            ("contains", Some(list), [entry]) => (entry, &mut **list),
            _ => return None,
        };
        let Some(Reference::List(name)) = self.reference(list) else {
            return None;
        };
        if !self.known.lists.contains(&name) {
            self.unknown(list.id, "list", &name, &self.known.lists);
        }
        let list = IdedExpr { id: list.id, expr: Expr::Ident(list_variable(&name)) };
        let mut entry = std::mem::take(entry);
        self.visit(&mut entry);
        let args = vec![entry, list];
        Some(Expr::Call(CallExpr { func_name: operators::IN.to_owned(), target: None, args }))
    }

    /// A variable in the place of a lookup. It is none while there is no answer, so that nothing
    /// takes a missing answer for an empty one.
    fn lookup(&mut self, at: u64, name: String) -> Expr {
        let variable = Expr::Ident(lookup_variable(&name));
        if !self.known.lookups.contains(&name) {
            self.unknown(at, "lookup", &name, &self.known.lookups);
        } else if !self.lookups.contains(&name) {
            self.lookups.push(name);
        }
        variable
    }

    fn unknown(&mut self, at: u64, what: &str, name: &str, known: &[String]) {
        let hint = nearest(name, known.iter().map(String::as_str));
        self.fault(at, format!("there is no {what} `{name}`{hint}"));
    }

    fn check_variable(&mut self, at: u64, name: &str) -> Kind {
        const TYPES: [&str; 11] = [
            "bool",
            "bytes",
            "date",
            "double",
            "int",
            "list",
            "map",
            "null_type",
            "string",
            "type",
            "uint",
        ];
        match Pattern::of_variable(name) {
            Some(Ok(pattern)) => {
                self.patterns.push(pattern);
                return Kind::Any;
            }
            Some(Err(message)) => {
                self.fault(at, message);
                return Kind::Any;
            }
            None => {}
        }
        if self.scope.iter().any(|it| it == name) || TYPES.contains(&name) {
            return Kind::Any;
        }
        let message = match name {
            SIGNUP => return Kind::Map,
            NOW => return Kind::Date,
            LISTS => format!("`{LISTS}` needs the name of one: `… in {LISTS}.name`"),
            LOOKUPS => format!("`{LOOKUPS}` needs the name of one: `{LOOKUPS}.name.found`"),
            _ => {
                let hint = nearest(name, [SIGNUP, LISTS, LOOKUPS].into_iter());
                let hint = if hint.is_empty() {
                    format!("; everything is under `{SIGNUP}`, `{LISTS}` and `{LOOKUPS}`")
                } else {
                    hint
                };
                format!("there is no `{name}`{hint}")
            }
        };
        self.fault(at, message);
        Kind::Any
    }

    fn check_member(&mut self, at: u64, name: &str) -> Kind {
        if !MEMBERS.contains(&name) {
            let hint = nearest(name, MEMBERS.into_iter());
            let members = MEMBERS.join(", ");
            self.fault(at, format!("`{SIGNUP}` has no `{name}`{hint}; it has {members}"));
            return Kind::Any;
        }
        match name {
            "claims" => Kind::Map,
            "identities" => Kind::List,
            _ => Kind::Text,
        }
    }

    /// Whether there is such a function, and whether it can be called like that.
    fn check_function(
        &mut self,
        at: u64,
        name: &str,
        on: bool,
        call: &CallExpr,
        kinds: &[Kind],
    ) -> Kind {
        let name = as_written(name, call);
        let named: Vec<&Signature> = FUNCTIONS.iter().filter(|it| it.name == name).collect();
        let called: Vec<&Signature> = named.iter().copied().filter(|it| it.on == on).collect();
        let Some(first) = called.first() else {
            let message = match (named.first(), on) {
                (Some(_), true) => {
                    format!("`{name}` is called as `{name}(x)`, not as `x.{name}()`")
                }
                (Some(_), false) => {
                    format!("`{name}` is called as `x.{name}()`, not as `{name}(x)`")
                }
                (None, _) => {
                    let like = FUNCTIONS.iter().filter(|it| it.on == on).map(|it| it.name);
                    format!("there is no function `{name}`{}", nearest(name, like))
                }
            };
            self.fault(at, message);
            return Kind::Any;
        };
        // What is asked of now came here with one value more.
        let kinds = if name.ends_with("_since") { &kinds[..1] } else { kinds };
        let until = usize::from(name == "days_until" && kinds.len() > 1);
        let kinds = &kinds[until..];
        let Some(signature) = called.iter().find(|it| it.takes.len() == kinds.len()) else {
            let own = usize::from(on);
            let mut counts: Vec<_> =
                called.iter().map(|it| (it.takes.len() - own).to_string()).collect();
            counts.dedup();
            let (counts, has) = (counts.join(" or "), kinds.len() - own);
            self.fault(
                at,
                format!("`{name}` takes {counts} values in its brackets, and has {has}"),
            );
            return first.gives;
        };
        let values = call.target.as_deref().filter(|_| on).into_iter().chain(&call.args[until..]);
        for ((value, takes), kind) in values.zip(signature.takes).zip(kinds) {
            self.check_value(name, value, *takes, *kind);
        }
        signature.gives
    }

    fn check_value(&mut self, function: &str, value: &IdedExpr, takes: Param, kind: Kind) {
        if !takes.takes(kind) {
            let (takes, has) = (takes.name(), kind.name());
            self.fault(value.id, format!("`{function}` needs {takes}, and has {has}"));
        }
        match &value.expr {
            Expr::Literal(LiteralValue::String(written)) => {
                if let Some(message) = takes.fault(written.inner()) {
                    self.fault(value.id, message);
                }
            }
            Expr::List(list) if matches!(takes, Param::Domains | Param::Networks) => {
                for element in &list.elements {
                    let kind = match &element.expr {
                        Expr::Literal(literal) => kind_of(literal),
                        _ => Kind::Any,
                    };
                    self.check_value(function, element, takes, kind);
                }
            }
            _ => {}
        }
    }

    fn fault(&mut self, at: u64, message: String) {
        let (start, _) = self.source.offset_for(at).unwrap_or_default();
        let before = self.source.source.get(..start as usize).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        self.faults.push(Fault {
            message,
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        });
    }
}

const fn kind_of(literal: &LiteralValue) -> Kind {
    match literal {
        LiteralValue::Boolean(_) => Kind::Bool,
        LiteralValue::Double(_) | LiteralValue::Int(_) | LiteralValue::UInt(_) => Kind::Number,
        LiteralValue::String(_) => Kind::Text,
        LiteralValue::Null => Kind::Null,
        LiteralValue::Bytes(_) => Kind::Any,
    }
}

/// The name that a function was called by, where that became a question about now.
fn as_written<'n>(name: &'n str, call: &CallExpr) -> &'n str {
    let now = |at: usize| matches!(call.args.get(at), Some(IdedExpr { expr: Expr::Ident(it), .. }) if it == NOW);
    match name {
        "years_between" if now(1) => "years_since",
        "days_between" if now(1) => "days_since",
        "days_between" if now(0) => "days_until",
        _ => name,
    }
}

/// Puts a call of a function of one argument around a value.
fn wrap(value: &mut IdedExpr, function: &str) {
    let id = value.id;
    let args = vec![std::mem::take(value)];
    let call = CallExpr { func_name: function.to_owned(), target: None, args };
    *value = IdedExpr { id, expr: Expr::Call(call) };
}

/// Counts each turn of a loop.
///
/// Where the loop asks whether to go on, that fails once there is no budget left, which no error
/// absorbed on the way can change. Where it always goes on, its first failure ends it.
fn meter(it: &mut ComprehensionExpr) {
    fn items(step: &mut IdedExpr) {
        match &mut step.expr {
            Expr::Call(call) if call.func_name == operators::CONDITIONAL => {
                wrap(&mut call.args[0], bounded::METERED);
                items(&mut call.args[1]);
            }
            Expr::Call(call) if call.func_name == operators::ADD => {
                if let Expr::List(list) = &mut call.args[1].expr {
                    list.elements.iter_mut().for_each(|item| wrap(item, bounded::METERED));
                }
            }
            _ => {}
        }
    }
    if matches!(it.loop_cond.expr, Expr::Literal(_)) {
        items(&mut it.loop_step);
    } else {
        wrap(&mut it.loop_cond, bounded::METERED);
    }
}

/// `; did you mean …?`, where something of that kind has nearly the name.
fn nearest<'n>(name: &str, known: impl Iterator<Item = &'n str>) -> String {
    known
        .map(|it| (strsim::damerau_levenshtein(name, it), it))
        .filter(|(distance, it)| *distance <= 1 + it.len() / 4)
        .min()
        .map_or_else(String::new, |(_, it)| format!("; did you mean `{it}`?"))
}
