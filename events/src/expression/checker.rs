//! What can be known of an expression before it is ever evaluated.
//!
//! Names and patterns are settled here once: what is left of them are variables that need no
//! further search.

use std::sync::Arc;

use cel::{
    Context, ExecutionError, IdedExpr, Program,
    common::ast::{CallExpr, EntryExpr, Expr, LiteralValue, SourceInfo, operators},
};

use super::{
    ENV, Fault, MEMBERS, SIGNUP,
    pattern::Pattern,
    sources::{Known, LISTS, LOOKUPS},
    view::{list_variable, lookup_variable},
};

/// An expression in which every name means something.
pub(super) struct Checked {
    pub(super) expression: IdedExpr,
    pub(super) patterns: Vec<Pattern>,
    /// The lookups that it names, each once.
    pub(super) lookups: Vec<String>,
}

/// Finds what would fail at every evaluation: names that do not exist and patterns that cannot be.
pub(super) struct Checker<'a> {
    source: &'a SourceInfo,
    known: &'a Known,
    /// Variables of the comprehensions around.
    scope: Vec<String>,
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
    pub(super) fn check(program: &'a Program, known: &'a Known) -> Result<Checked, Vec<Fault>> {
        let mut checker = Self {
            source: program.source_info(),
            known,
            scope: Vec::new(),
            patterns: Vec::new(),
            lookups: Vec::new(),
            faults: Vec::new(),
        };
        let mut expression = program.expression().clone();
        checker.visit(&mut expression);
        let Self { patterns, lookups, faults, .. } = checker;
        if faults.is_empty() { Ok(Checked { expression, patterns, lookups }) } else { Err(faults) }
    }

    fn visit(&mut self, node: &mut IdedExpr) {
        let at = node.id;
        match self.reference(node) {
            Some(Reference::List(name)) => {
                let message = format!("a list can only be asked with `in`: `… in {LISTS}.{name}`");
                return self.fault(at, message);
            }
            Some(Reference::Lookup(name)) => return node.expr = self.lookup(at, name),
            None => {}
        }
        match &mut node.expr {
            Expr::Unspecified | Expr::Literal(_) => {}
            Expr::Ident(name) => self.check_variable(at, name),
            Expr::Select(select) => {
                if let Expr::Ident(root) = &select.operand.expr
                    && !self.scope.contains(root)
                {
                    match root.as_str() {
                        SIGNUP => return self.check_member(at, &select.field),
                        LISTS | LOOKUPS => {
                            let message = format!("`{root}.{}` is always there", select.field);
                            return self.fault(at, message);
                        }
                        _ => {}
                    }
                }
                self.visit(&mut select.operand);
            }
            Expr::Call(call) => {
                if let Some(asked) = self.membership(call) {
                    node.expr = asked;
                    return;
                }
                // A qualified function, such as `optional.of`, looks like a variable's member.
                let qualified = matches!(
                    call.target.as_deref(),
                    Some(IdedExpr { expr: Expr::Ident(name), .. }) if name == "optional"
                );
                if !qualified {
                    call.target.iter_mut().for_each(|target| self.visit(target));
                    self.check_function(at, call);
                }
                call.args.iter_mut().for_each(|argument| self.visit(argument));
            }
            Expr::List(list) => list.elements.iter_mut().for_each(|element| self.visit(element)),
            Expr::Map(map) => {
                map.entries.iter_mut().for_each(|entry| self.visit_entry(&mut entry.expr));
            }
            Expr::Struct(it) => {
                it.entries.iter_mut().for_each(|entry| self.visit_entry(&mut entry.expr));
            }
            Expr::Comprehension(it) => {
                // What the platform sends decides how often a loop turns; squared, it could use up
                // the deadline of the call and of those behind it.
                if !self.scope.is_empty() && !matches!(it.iter_range.expr, Expr::List(_)) {
                    let message = "a loop within a loop can only walk a list that is written here";
                    self.fault(at, message.to_owned());
                }
                self.visit(&mut it.iter_range);
                self.visit(&mut it.accu_init);
                let outside = self.scope.len();
                self.scope.extend([it.iter_var.clone(), it.accu_var.clone()]);
                self.scope.extend(it.iter_var2.clone());
                self.visit(&mut it.loop_cond);
                self.visit(&mut it.loop_step);
                self.visit(&mut it.result);
                self.scope.truncate(outside);
            }
        }
    }

    fn visit_entry(&mut self, entry: &mut EntryExpr) {
        match entry {
            EntryExpr::StructField(field) => self.visit(&mut field.value),
            EntryExpr::MapEntry(entry) => {
                self.visit(&mut entry.key);
                self.visit(&mut entry.value);
            }
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

    fn check_variable(&mut self, at: u64, name: &str) {
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
        match Pattern::of_variable(name) {
            Some(Ok(pattern)) => return self.patterns.push(pattern),
            Some(Err(message)) => return self.fault(at, message),
            None => {}
        }
        if self.scope.iter().any(|it| it == name) || name == SIGNUP || TYPES.contains(&name) {
            return;
        }
        let message = match name {
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
    }

    fn check_member(&mut self, at: u64, name: &str) {
        if !MEMBERS.contains(&name) {
            let members = MEMBERS.join(", ");
            self.fault(at, format!("`{SIGNUP}` has no `{name}`; it has {members}"));
        }
    }

    /// Calls the function with arguments that suit none, to hear whether there is one of that name.
    fn check_function(&mut self, at: u64, call: &CallExpr) {
        let null = || IdedExpr { id: 0, expr: Expr::Literal(LiteralValue::Null) };
        let probe = Expr::Call(CallExpr {
            func_name: call.func_name.clone(),
            target: call.target.as_ref().map(|_| Box::new(null())),
            args: call.args.iter().map(|_| null()).collect(),
        });
        let probe = IdedExpr { id: 0, expr: probe };
        let context = Context::with_env(Arc::clone(&ENV));
        if let Err(ExecutionError::UndeclaredReference(name)) =
            cel::Value::resolve(&probe, &context)
        {
            self.fault(at, format!("there is no function `{name}`"));
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

/// `; did you mean …?`, where something of that kind has nearly the name.
fn nearest<'n>(name: &str, known: impl Iterator<Item = &'n str>) -> String {
    known
        .map(|it| (strsim::damerau_levenshtein(name, it), it))
        .filter(|(distance, it)| *distance <= 1 + it.len() / 4)
        .min()
        .map_or_else(String::new, |(_, it)| format!("; did you mean `{it}`?"))
}
