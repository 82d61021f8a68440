//! What can be known of an expression before it is ever evaluated.

use std::sync::Arc;

use cel::{
    Context, ExecutionError, IdedExpr, Program,
    common::ast::{CallExpr, EntryExpr, Expr, LiteralValue, SourceInfo},
};

use super::{ENV, Fault, MEMBERS, SIGNUP, pattern::Pattern};

/// Finds what would fail at every evaluation: names that do not exist and patterns that cannot be.
pub(super) struct Checker<'a> {
    source: &'a SourceInfo,
    /// Variables of the comprehensions around.
    scope: Vec<&'a str>,
    patterns: Vec<Pattern>,
    faults: Vec<Fault>,
}

impl<'a> Checker<'a> {
    /// The patterns that the expression needs, or everything that is wrong with it.
    pub(super) fn check(program: &'a Program) -> Result<Vec<Pattern>, Vec<Fault>> {
        let source = program.source_info();
        let mut checker =
            Self { source, scope: Vec::new(), patterns: Vec::new(), faults: Vec::new() };
        checker.visit(program.expression());
        if checker.faults.is_empty() { Ok(checker.patterns) } else { Err(checker.faults) }
    }

    fn visit(&mut self, expression: &'a IdedExpr) {
        match &expression.expr {
            Expr::Unspecified | Expr::Literal(_) => {}
            Expr::Ident(name) => self.check_variable(expression, name),
            Expr::Select(select) => {
                self.visit(&select.operand);
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
                    call.target.iter().for_each(|target| self.visit(target));
                    self.check_function(expression, call);
                }
                call.args.iter().for_each(|argument| self.visit(argument));
            }
            Expr::List(list) => list.elements.iter().for_each(|element| self.visit(element)),
            Expr::Map(map) => map.entries.iter().for_each(|entry| self.visit_entry(&entry.expr)),
            Expr::Struct(it) => it.entries.iter().for_each(|entry| self.visit_entry(&entry.expr)),
            Expr::Comprehension(it) => {
                // What the platform sends decides how often a loop turns; squared, it could use up
                // the deadline of the call and of those behind it.
                if !self.scope.is_empty() && !matches!(it.iter_range.expr, Expr::List(_)) {
                    let message = "a loop within a loop can only walk a list that is written here";
                    self.fault(expression, message.to_owned());
                }
                self.visit(&it.iter_range);
                self.visit(&it.accu_init);
                let outside = self.scope.len();
                self.scope.extend([it.iter_var.as_str(), it.accu_var.as_str()]);
                self.scope.extend(it.iter_var2.as_deref());
                self.visit(&it.loop_cond);
                self.visit(&it.loop_step);
                self.visit(&it.result);
                self.scope.truncate(outside);
            }
        }
    }

    fn visit_entry(&mut self, entry: &'a EntryExpr) {
        match entry {
            EntryExpr::StructField(field) => self.visit(&field.value),
            EntryExpr::MapEntry(entry) => {
                self.visit(&entry.key);
                self.visit(&entry.value);
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
        match Pattern::of_variable(name) {
            Some(Ok(pattern)) => return self.patterns.push(pattern),
            Some(Err(message)) => return self.fault(at, message),
            None => {}
        }
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
