//! Where in the file something stands, so that a warning leads there.

use std::path::Path;

use toml::de::{DeTable, DeValue};

use crate::config::{Complaint, Complaints};

/// The configuration file, read once more for its lines.
pub(super) struct Places {
    file: String,
    source: String,
}

impl Places {
    /// Without a file there are no lines, and warnings do without them.
    pub(super) fn read(file: &Path) -> Self {
        let source = std::fs::read_to_string(file).unwrap_or_default();
        Self { file: file.display().to_string(), source }
    }

    /// A warning about a rule of a connector, from 0.
    pub(super) fn about_rule(&self, connector: &str, rule: usize, warning: &str) -> String {
        let key = format!("connectors.{connector}.rules[{rule}]");
        self.about(self.line(&["connectors", connector, "rules"], Some(rule)), &key, warning)
    }

    /// A warning about a table, such as `lists.partners`.
    pub(super) fn about_table(&self, path: [&str; 2], warning: &str) -> String {
        self.about(self.line(&path, None), &path.join("."), warning)
    }

    /// What a start would refuse about a table.
    pub(super) fn mistake(&self, path: [&str; 2], message: String) -> Complaint {
        let line = self.line(&path, None).unwrap_or(1);
        Complaint { line, column: 1, key: path.join("."), message }
    }

    /// All of them, as the reader tells its own.
    pub(super) fn mistakes(&self, complaints: Vec<Complaint>) -> Complaints {
        Complaints { file: self.file.clone(), complaints }
    }

    fn about(&self, line: Option<usize>, key: &str, warning: &str) -> String {
        match line {
            Some(line) => format!("{}:{line}: {key}: {warning}", self.file),
            None => format!("{key}: {warning}"),
        }
    }

    fn line(&self, path: &[&str], index: Option<usize>) -> Option<usize> {
        let (root, _) = DeTable::parse_recoverable(&self.source);
        let (first, rest) = path.split_first()?;
        let mut value = root.get_ref().get(*first)?;
        for key in rest {
            value = value.get_ref().as_table()?.get(*key)?;
        }
        if let Some(index) = index {
            value =
                value.get_ref().as_array().and_then(|it: &toml::de::DeArray<'_>| it.get(index))?;
        }
        let is_table = matches!(value.get_ref(), DeValue::Table(_));
        let before = &self.source.get(..value.span().start)?;
        is_table.then(|| before.matches('\n').count() + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_leads_to_its_table() {
        let source = "[lists.vip]\nentries = []\n\n[connectors.a]\n[[connectors.a.rules]]\n\
                      name = \"x\"\n[[connectors.a.rules]]\nname = \"y\"\n";
        let places = Places { file: "v.toml".into(), source: source.into() };
        let about = |index| places.about_rule("a", index, "!");
        assert_eq!(about(1), "v.toml:7: connectors.a.rules[1]: !");
        assert_eq!(about(2), "connectors.a.rules[2]: !");
        assert_eq!(places.about_table(["lists", "vip"], "!"), "v.toml:1: lists.vip: !");
    }
}
