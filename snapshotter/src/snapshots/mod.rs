//! containerd's snapshotter: the gRPC service `containerd.services.snapshots.v1` on a unix socket.
//!
//! containerd asks for snapshots (a layer being written, a view, a committed layer) and mounts what it is told. The
//! service keeps a record of each in the store's catalogue and a directory for each layer, and is by itself an ordinary
//! overlay snapshotter. Images that are shown lazily come in through [`Images`]: their layers are records without a
//! directory, and the uppermost of a chain is one lower directory for itself and everything below.
//!
//! Data flows: [`Listener`] -> `grpc` (messages) -> `calls` (what each call does) -> the catalogue's records,
//! `directories`, `trees` (who needs which tree) and `overlay` (the mounts that are answered).
//!
//! What was answered is durable: records are synced before a call returns, and directories before their record. The
//! files of a layer are not synced at its commit, as containerd's own snapshotters do not; containerd 2 can be told to
//! sync what it unpacks (`image_pull_with_sync_fs`). A crash leaves at most directories without a record, which the next
//! start removes. Calls go on to their end when containerd stops waiting.
//!
//! User namespaces: where containerd leaves the mapping of ids to its snapshotter (capability `remap-ids`), a kernel from
//! 5.19 does it, and files are never copied to change their owners. Above a tree the layers are mapped here (`mapped`), else
//! the mounts carry `uidmap` and `gidmap` for containerd. On older kernels such a snapshot is refused. Without the
//! capability containerd changes all owners in a layer of its own, and nothing is mapped above that.

mod calls;
mod directories;
mod error;
mod filter;
mod grpc;
mod id_map;
pub mod images;
mod mapped;
mod overlay;
mod socket;
mod trees;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hermes_containerd_api::snapshots::snapshots_server::SnapshotsServer;
use hermes_store::Store;
use tokio::sync::oneshot;

use calls::Snapshotter;
pub use error::ServiceError;
pub use images::{Decision, Images, ImagesError, PlainImages, PulledLayer, RemoteChain};
pub use socket::{DEFAULT_SOCKET, Listener};

/// Calls of one connection that are answered at once; further ones wait. containerd has one connection.
const CALLS_MAX: usize = 256;
/// How long calls under way may take when the service ends.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// What the service can do on this kernel beyond the basics, in containerd's words: `remap-ids` where layers can be shown
/// with mapped ids, for containers in user namespaces.
pub fn capabilities() -> impl Iterator<Item = &'static str> {
    overlay::Features::probe().id_mapped.then_some("remap-ids").into_iter()
}

/// The snapshots service.
#[derive(Debug)]
pub struct Service {
    snapshotter: Arc<Snapshotter>,
}

impl Service {
    /// Opens the snapshots whose records are in `store` and whose directories are in `root`, removes what a crash left
    /// of others, and has the trees shown that snapshots need.
    ///
    /// Not cancel safe: dropped, it may have removed and shown some.
    ///
    /// # Errors
    /// When `root` cannot be used or the catalogue cannot be read. A tree that cannot be shown is logged.
    pub async fn start(store: Arc<Store>, root: PathBuf, images: Arc<dyn Images>) -> Result<Self, ServiceError> {
        Ok(Self { snapshotter: Snapshotter::start(store, root, images).await? })
    }

    /// Answers calls until `shutdown`, then those that are under way, for at most five seconds.
    ///
    /// Cancel safe: calls under way go on by themselves.
    ///
    /// # Errors
    /// When the server breaks.
    pub async fn serve(
        &self,
        listener: Listener,
        shutdown: impl Future<Output = ()> + Send,
    ) -> Result<(), ServiceError> {
        tracing::info!(socket = %listener.path().display(), "answering containerd");
        let (stop, stopped) = oneshot::channel::<()>();
        let service = SnapshotsServer::new(grpc::Grpc(Arc::clone(&self.snapshotter)));
        let server =
            tonic::transport::Server::builder().concurrency_limit_per_connection(CALLS_MAX).add_service(service);
        // The sender going away stops it as well.
        let stopped = async { drop(stopped.await) };
        let mut serving = std::pin::pin!(server.serve_with_incoming_shutdown(listener.connections(), stopped));
        tokio::select! {
            served = &mut serving => return served.map_err(ServiceError::Server),
            () = shutdown => {}
        }
        drop(stop);
        // An idle connection may stay open; what matters is that calls end.
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, serving).await;
        self.snapshotter.tasks.close();
        if tokio::time::timeout(DRAIN_TIMEOUT, self.snapshotter.tasks.wait()).await.is_err() {
            tracing::warn!("calls of containerd were still under way at the end");
        }
        Ok(())
    }
}
