//! A worker that is given only what a condition holds for.
//!
//! The log filters by kind and connector; what a sign-up says is asked here, before the attempt of
//! the worker within. An event that the condition does not hold for is done; one that it fails with
//! is parked, for somebody should mend the condition and send it back.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use vestibule_events::expression::{Condition, Facts, Failure, Fault};

use crate::{Cause, HandleError, SettingError, Task, Worker};

/// Another worker behind a condition.
#[derive(Debug)]
pub struct Filtered {
    when: Condition,
    worker: Arc<dyn Worker>,
}

/// A condition that failed with an event. Holds nothing of what it looked at.
#[derive(Debug, thiserror::Error)]
#[error("could not evaluate `when`: {}", .0.as_str())]
struct ConditionFailed(Failure);

impl Filtered {
    /// Puts a worker behind a condition in CEL over `signup.*`, as in the rules of a connector.
    pub fn new(when: &str, worker: Arc<dyn Worker>) -> Result<Self, Vec<SettingError>> {
        Ok(Self { when: compile(when)?, worker })
    }

    /// What `new` would complain about.
    pub fn check(when: &str) -> Result<(), Vec<SettingError>> {
        compile(when).map(drop)
    }
}

fn compile(when: &str) -> Result<Condition, Vec<SettingError>> {
    let complaint = |Fault { message, line, column }| {
        let message = match (line, column) {
            (1, 1) => message,
            _ => format!("line {line} column {column}: {message}"),
        };
        SettingError { key: "when", message }
    };
    Condition::compile(when).map_err(|faults| faults.into_iter().map(complaint).collect())
}

#[async_trait]
impl Worker for Filtered {
    fn name(&self) -> &str {
        self.worker.name()
    }

    async fn handle(&self, task: &Task) -> Result<(), HandleError> {
        match self.when.holds(&Facts::of(&task.event)) {
            Ok(true) => self.worker.handle(task).await,
            // What is not there fulfils no condition, as in the rules of permissions.
            Ok(false) | Err(Failure::Missing) => Ok(()),
            Err(failure) => Err(HandleError::park(Cause::InvalidRule, ConditionFailed(failure))),
        }
    }

    fn has_one_target(&self) -> bool {
        self.worker.has_one_target()
    }

    async fn tend(&self) -> Option<Duration> {
        self.worker.tend().await
    }

    async fn close(&self) {
        self.worker.close().await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use serde_json::json;

    use super::*;
    use crate::{claims::sample, testing::task};

    #[derive(Debug, Default)]
    struct Counting(AtomicU32);

    #[async_trait]
    impl Worker for Counting {
        fn name(&self) -> &str {
            "crm"
        }

        async fn handle(&self, _: &Task) -> Result<(), HandleError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
    }

    /// How often the worker within was asked, and how it ended.
    async fn handled(when: &str) -> (u32, Result<(), HandleError>) {
        let mut event = sample();
        event.sign_up.claims.insert("age".into(), json!("forty"));
        let counting = Arc::new(Counting::default());
        let filtered = Filtered::new(when, counting.clone()).unwrap();
        assert_eq!(filtered.name(), "crm");
        let ended = filtered.handle(&task(event)).await;
        (counting.0.load(Ordering::Relaxed), ended)
    }

    #[tokio::test]
    async fn only_what_the_condition_holds_for_is_handled() {
        assert!(matches!(handled("signup.email_domain == 'example.com'").await, (1, Ok(()))));
        assert!(matches!(handled("signup.email_domain == 'example.net'").await, (0, Ok(()))));
        assert!(matches!(handled("signup.claims.nothing == 1").await, (0, Ok(()))));
    }

    #[tokio::test]
    async fn an_event_that_the_condition_fails_with_is_parked_without_its_claims() {
        let (asked, ended) = handled("signup.claims.age > 17").await;
        let Err(HandleError::Park { source, cause: Cause::InvalidRule }) = ended else {
            panic!("{ended:?}")
        };
        assert_eq!(asked, 0);
        assert!(!source.to_string().contains("forty"), "{source}");
    }

    #[test]
    fn a_condition_that_does_not_compile_is_complained_of() {
        let complaints = Filtered::check("signup.emial == ''").unwrap_err();
        assert!(complaints[0].to_string().contains("when: "), "{}", complaints[0]);
        assert!(complaints[0].message.contains("`emial`"), "{}", complaints[0]);
    }
}
