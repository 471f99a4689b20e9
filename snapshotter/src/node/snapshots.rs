//! The node as containerd's snapshotter.

use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::lazy::LazyImages;
use super::{Inner, NodeError};
use crate::snapshots::{Images, Listener, PlainImages, Service};

/// The folder below the state folder that containerd's `exports.root` names.
const FOLDER: &str = "snapshots";

/// The snapshots service of a node, until it is stopped or dropped.
#[derive(Debug)]
pub(super) struct RunningSnapshots {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl RunningSnapshots {
    /// Starts it where the settings say; `None` when they do not.
    ///
    /// # Errors
    /// When the socket is taken or the snapshots cannot be opened.
    pub(super) async fn start(inner: &Arc<Inner>) -> Result<Option<Self>, NodeError> {
        let Some(socket) = &inner.config.snapshotter_socket else { return Ok(None) };
        // Taken first: of two daemons, the second touches nothing.
        let listener = Listener::bind(socket)?;
        let root = inner.config.state.join(FOLDER);
        let images: Arc<dyn Images> =
            if inner.config.plain { Arc::new(PlainImages) } else { Arc::new(LazyImages::new(Arc::clone(inner))) };
        let service = Service::start(Arc::clone(&inner.store), root, images).await?;
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            // The sender going away is the end of the node as well.
            if let Err(error) = service.serve(listener, async { drop(stopped.await) }).await {
                tracing::error!(%error, "containerd is no longer answered; restart the node");
            }
        });
        Ok(Some(Self { stop, task }))
    }

    /// Stops it; calls under way end first.
    pub(super) async fn stop(self) {
        drop(self.stop);
        if self.task.await.is_err() {
            tracing::warn!("the snapshots service did not end well");
        }
    }
}
