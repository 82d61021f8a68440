//! How much targets do not hold yet as they should, counted from the store.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use prometheus_client::{metrics::gauge::Gauge, registry::Registry};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use vestibule_store::Store;

/// Between two counts.
const PAUSE: Duration = Duration::from_secs(5);

/// Registers the metric; what is given keeps it true until `stop`, once the store is open.
pub(super) fn count_pending(
    store: Arc<OnceLock<Store>>,
    registry: &mut Registry,
    stop: CancellationToken,
) -> impl Future<Output = anyhow::Result<()>> + Send + 'static {
    let pending = Gauge::<i64>::default();
    registry.register(
        "vestibule_permissions_pending",
        "Roles that a target is yet to be given or to lose",
        pending.clone(),
    );
    async move {
        let counting = async {
            loop {
                if let Some(store) = store.get()
                    && let Ok(count) = store.grant_targets_pending().await
                {
                    pending.set(i64::try_from(count).unwrap_or(i64::MAX));
                }
                sleep(PAUSE).await;
            }
        };
        stop.run_until_cancelled(counting).await;
        Ok(())
    }
}
