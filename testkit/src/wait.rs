//! Waiting for a fact, with a limit. The only place in the tests that may sleep.

use std::time::{Duration, Instant};

/// What a condition closure may return: a `bool`, an `Option` of what was looked for, or a `Result` of
/// either. An error counts as "not yet" and is shown if the limit passes.
pub trait Condition {
    type Found;

    /// `Ok(Some(_))` once it holds, `Ok(None)` while it does not, `Err` if it could not be seen.
    fn found(self) -> anyhow::Result<Option<Self::Found>>;
}

impl Condition for bool {
    type Found = ();

    fn found(self) -> anyhow::Result<Option<()>> {
        Ok(self.then_some(()))
    }
}

impl<T> Condition for Option<T> {
    type Found = T;

    fn found(self) -> anyhow::Result<Option<T>> {
        Ok(self)
    }
}

impl<C: Condition, E: Into<anyhow::Error>> Condition for Result<C, E> {
    type Found = C::Found;

    fn found(self) -> anyhow::Result<Option<C::Found>> {
        self.map_err(Into::into).and_then(C::found)
    }
}

/// Asks again and again until `condition` holds, at most for `limit`; `what` names the thing waited for
/// in the error.
///
/// A condition that hangs is cut off at the limit too.
pub async fn eventually<C: Condition>(
    limit: Duration,
    what: &str,
    mut condition: impl AsyncFnMut() -> C,
) -> anyhow::Result<C::Found> {
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(2);
    let mut last_error = None;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, condition()).await.map(C::found) {
            Ok(Ok(Some(found))) => return Ok(found),
            Ok(Ok(None)) => last_error = None,
            Ok(Err(error)) => last_error = Some(error),
            Err(_) => {}
        }
        if Instant::now() >= deadline {
            let message = format!("waited {limit:?} in vain until {what}");
            return Err(match last_error {
                Some(error) => error.context(message),
                None => anyhow::anyhow!(message),
            });
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn what_was_found_is_handed_back_once_it_is_there() -> anyhow::Result<()> {
        let mut asked = 0;
        let found = eventually(Duration::from_secs(10), "asked thrice", async || {
            asked += 1;
            (asked == 3).then_some(asked)
        });
        assert_eq!(found.await?, 3);
        Ok(())
    }

    #[tokio::test]
    async fn in_vain_the_error_says_what_was_waited_for_and_why_it_could_not_be_seen() {
        let never = eventually(SHORT, "pigs fly", async || false).await.unwrap_err();
        assert!(never.to_string().contains("pigs fly"));

        let blind =
            eventually(SHORT, "pigs fly", async || Err::<bool, _>(anyhow::anyhow!("it is dark")));
        let blind = format!("{:#}", blind.await.unwrap_err());
        assert!(blind.contains("pigs fly") && blind.contains("it is dark"), "{blind}");
    }

    #[tokio::test]
    async fn a_condition_that_hangs_is_cut_off() {
        let hung = eventually(SHORT, "an answer comes", std::future::pending::<bool>).await;
        assert!(hung.is_err());
    }
}
