//! Secrets stand outside the configuration file, which only says where.

use std::{
    env::VarError,
    fmt,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use secrecy::SecretString;

/// Where a secret is to be had. It is fetched when a process needs it, so that a worker can share
/// the configuration file of the connector without holding its secrets.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum SecretSource {
    /// `env:NAME`
    Environment(String),
    /// `file:PATH`; the last line break does not count.
    File(PathBuf),
    /// `example:TEXT`: known to everybody who read the manual, so only good on loopback.
    Example(String),
}

impl SecretSource {
    pub(crate) const EXPECTED: &str =
        "where the secret is: \"env:NAME\" or \"file:PATH\", never the secret itself";

    pub(crate) fn parse(text: &str) -> Option<Self> {
        match text.split_once(':')? {
            (_, "") => None,
            ("env", name) => Some(Self::Environment(name.to_owned())),
            ("file", path) => Some(Self::File(path.into())),
            ("example", text) => Some(Self::Example(text.to_owned())),
            _ => None,
        }
    }

    /// Where it lies, if it may change without the configuration.
    pub(crate) fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Environment(_) | Self::Example(_) => None,
        }
    }

    pub(crate) fn fetch(&self) -> anyhow::Result<SecretString> {
        let secret = match self {
            Self::Environment(name) => match std::env::var(name) {
                Ok(secret) => secret,
                Err(VarError::NotPresent) => bail!("the environment variable {name} is not set"),
                Err(VarError::NotUnicode(_)) => {
                    bail!("the environment variable {name} holds something other than text")
                }
            },
            Self::File(path) => {
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("could not read the secret in {}", path.display()))?;
                text.trim_end_matches(['\r', '\n']).to_owned()
            }
            Self::Example(text) => text.clone(),
        };
        anyhow::ensure!(!secret.is_empty(), "the secret {self} is empty");
        Ok(secret.into())
    }
}

impl fmt::Display for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Environment(name) => write!(f, "env:{name}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Example(_) => f.write_str("example:…"),
        }
    }
}

impl fmt::Debug for SecretSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret;

    use super::*;

    #[test]
    fn a_secret_itself_is_no_source() {
        for text in ["hunter2", "env:", "vault:x", ""] {
            assert_eq!(SecretSource::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_file_gives_its_text_without_the_last_line_break() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "a:b c\n").unwrap();
        let source = SecretSource::parse(&format!("file:{}", file.path().display())).unwrap();
        assert_eq!(source.fetch().unwrap().expose_secret(), "a:b c");
    }

    #[test]
    fn what_is_missing_is_named() {
        let source = SecretSource::parse("env:VESTIBULE_TEST_UNSET").unwrap();
        let error = format!("{:#}", source.fetch().unwrap_err());
        assert_eq!(error, "the environment variable VESTIBULE_TEST_UNSET is not set");
    }
}
