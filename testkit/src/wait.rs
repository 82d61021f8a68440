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
