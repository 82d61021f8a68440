//! An HTTP server on a thread of its own: it answers while the test blocks.

use axum::Router;
use tokio::{net::TcpListener, sync::oneshot};

/// Ends when dropped; calls that hang are not waited for.
#[derive(Debug)]
pub(crate) struct Background {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Background {
    /// Serves on a listener that takes connections already.
    pub(crate) fn serve(name: &str, listener: TcpListener, router: Router) -> anyhow::Result<Self> {
        let (stop, stopped) = oneshot::channel();
        // It belongs to the runtime of the test until it is taken out of it.
        let listener = listener.into_std()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = TcpListener::from_std(listener) else { return };
                tokio::select! {
                    _ = axum::serve(listener, router) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
