//! The daemon: builds everything from its settings, answers commands, ends in order.
//!
//! Composition root of the node. It opens the store, probes the kernel, joins the swarm, starts the fetch driver, and
//! listens on the control socket and, if it is told to, on containerd's. It needs no network to start and serves what it has. When it ends it unmounts what
//! it mounted, newest first; when it is killed, mounts stay behind as dead FUSE connections until the next daemon of
//! the same state folder clears them away.

mod complete;
mod drain;
mod error;
pub mod keys;
mod mount;
mod observe;
mod resolve;
mod serve;
mod snapshots;
mod ways;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use hermes_image::ids::{ChainId, DiffId, Digest};
use hermes_image::statement::{PublicKey, SigningKey};
use hermes_p2p::PeerAddress;
use hermes_p2p::address::multiaddr_of;
use hermes_policy::limits::Limits;
use hermes_store::{DropBehind, LayerUse, Store, StoreConfig, StoreError};
use parking_lot::Mutex;
use tokio::net::UnixListener;
use tokio::sync::watch;

use crate::artifacts::Artifacts;
use crate::config::NodeConfig;
use crate::content::NodeContent;
use crate::control::socket_path;
use crate::credentials::PullSecrets;
use crate::fetch::{self, FetchConfig, FetchHandle, MountNo, OpenLayer, OriginNumbers};
use crate::fs::layers::LayerDirectory;
use crate::fs::locate::ShownTree;
use crate::fs::read::{LayerFile, Reader};
use crate::fs::session::FuseSession;
use crate::index_folder::IndexFolder;
use crate::mounts::Mounted;
use crate::origin::{FindImageError, OriginClient};
use crate::status::Way;

/// How long a daemon that ends may keep the store after it has stopped listening: it unmounts and syncs.
const STORE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often its successor looks.
const STORE_RETRY: Duration = Duration::from_millis(20);

pub use error::{NodeError, find_class, origin_class};
use observe::Observer;
pub use observe::Readiness;
use snapshots::RunningSnapshots;
use ways::Ways;

/// A running node.
#[derive(Debug)]
pub struct Node {
    inner: Arc<Inner>,
    listener: UnixListener,
    observer: Observer,
    snapshots: Option<RunningSnapshots>,
}

/// What all requests share.
#[derive(Debug)]
struct Inner {
    config: NodeConfig,
    store: Arc<Store>,
    peers: hermes_p2p::Node,
    content: Arc<NodeContent>,
    artifacts: Artifacts,
    fetch: FetchHandle,
    reader: Reader,
    directory: Arc<LayerDirectory>,
    ways: Ways,
    key: SigningKey,
    /// Whose statements every request takes.
    trusted: Vec<PublicKey>,
    /// How images are found and read; owns the connections to registries.
    origin_client: OriginClient,
    origins: Mutex<OriginNumbers>,
    /// The layers that are open for at least one mount.
    layers: Mutex<BTreeMap<DiffId, (Arc<OpenLayer>, Arc<LayerFile>)>>,
    next_mount: AtomicU64,
    mounting: tokio::sync::Mutex<()>,
    images: tokio::sync::Mutex<Vec<MountedImage>>,
    unused: tokio::sync::Notify,
    /// Of daemons with this state folder, this one included.
    starts: u64,
    started_at_seconds: f64,
}

/// An image that is shown. Fields drop in this order: first the mount, then what it reads from.
#[derive(Debug)]
struct MountedImage {
    number: MountNo,
    shown: Shown,
    reference: String,
    manifest: Digest,
    chain: ChainId,
    dir: PathBuf,
    way: Way,
    tree_path: PathBuf,
    layers: Vec<Arc<OpenLayer>>,
    located: ShownTree,
    _uses: Vec<LayerUse>,
}

/// How a tree is shown.
#[derive(Debug)]
enum Shown {
    /// By the kernel.
    Erofs(Mounted),
    /// By a FUSE connection of its own, so that one tree's threads and failures are not another's.
    Fuse(FuseSession),
}

impl Node {
    /// Starts a node.
    ///
    /// # Errors
    /// When a setting is wrong, the store cannot be opened, the swarm cannot listen, or another daemon runs already.
    pub async fn start(config: NodeConfig) -> Result<Self, NodeError> {
        config.validate()?;
        if !rustix::process::geteuid().is_root() {
            return Err(NodeError::NotRoot);
        }
        let io = |what, path: PathBuf| move |source| NodeError::Io { what, path, source };
        private_folder(&config.state).map_err(io("make", config.state.clone()))?;
        raise_file_limit();
        let observer = Observer::start(config.metrics_listen).await?;
        let started_at_seconds = observe::seconds_now();
        let store = open_store(&config).await?;
        observer.readiness.store_is_open();
        // Only whoever has the store counts: the daemon before this one may be about to end.
        let starts = observe::count_start(&config.state);
        let origin_client = OriginClient::new(config.registries.origin_config()).map_err(FindImageError::from)?;
        serve::clear_leftovers(&config.state);
        serve::unpin_what_is_gone(&store)?;
        let key = keys::load_or_create(&config.state.join("index-key"))?;
        let mut trusted = config.public_keys()?;
        trusted.push(key.public());
        let content = Arc::new(NodeContent::new(Arc::clone(&store)));
        let peers = join_swarm(&config, Arc::clone(&content)).await?;
        let artifacts = Artifacts::new(Arc::clone(&store), Some(peers.clone()));
        for folder in &config.index_folders {
            artifacts.add_folder(IndexFolder::new(folder));
        }
        let seed = u64::from(std::process::id()) ^ rand::random::<u64>();
        let fetch = fetch::spawn(FetchConfig {
            store: Arc::clone(&store),
            peers: Some(peers.clone()),
            limits: Limits::default(),
            seed,
        });
        let reader = Reader::new(tokio::runtime::Handle::current(), config.read_deadline());
        let directory = Arc::new(LayerDirectory::default());
        let ways = Ways::probe(&config.state, &store, &fetch, &directory, &reader, config.erofs_backing).await?;
        let socket = socket_path(&config.state);
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).map_err(io("listen on", socket.clone()))?;
        serve::only_for_root(&socket).map_err(io("protect", socket))?;
        let inner = Arc::new(Inner {
            config,
            store,
            peers,
            content,
            artifacts,
            fetch,
            reader,
            directory,
            ways,
            key,
            trusted,
            origin_client,
            origins: Mutex::default(),
            layers: Mutex::default(),
            next_mount: AtomicU64::default(),
            mounting: tokio::sync::Mutex::default(),
            images: tokio::sync::Mutex::default(),
            unused: tokio::sync::Notify::new(),
            starts,
            started_at_seconds,
        });
        tokio::spawn(follow_completions(Arc::downgrade(&inner), inner.fetch.completions()));
        observer.show(&inner);
        if inner.config.snapshotter_socket.is_some() {
            observer.readiness.want_snapshots();
        }
        let snapshots = RunningSnapshots::start(&inner).await?;
        observer.readiness.snapshots_are(snapshots.is_some());
        tracing::info!(peer_id = %inner.peers.local_peer_id(), "node started");
        Ok(Self { inner, listener, observer, snapshots })
    }

    /// What `/readyz` says, for the parts that are started after the node.
    pub fn readiness(&self) -> &Arc<Readiness> {
        &self.observer.readiness
    }

    /// The image pull secrets that this node may use, for whoever hands them in.
    pub fn pull_secrets(&self) -> &PullSecrets {
        self.inner.origin_client.credentials().pull_secrets()
    }

    /// Answers commands until one of them ends the node, or nothing is mounted any more and that is its setting.
    ///
    /// Cancel safe: requests under way are dropped with it.
    ///
    /// # Errors
    /// When the control socket breaks.
    pub async fn serve(&self) -> Result<(), NodeError> {
        self.observer.readiness.control_is(true);
        let ended = serve::serve(&self.inner, &self.listener).await;
        self.observer.readiness.control_is(false);
        ended
    }

    /// Unmounts everything, makes what came durable, leaves the swarm.
    pub async fn stop(self) {
        let Self { inner, listener, observer, snapshots } = self;
        observer.readiness.control_is(false);
        drop(listener);
        if let Some(snapshots) = snapshots {
            snapshots.stop().await;
        }
        let _ = std::fs::remove_file(socket_path(&inner.config.state));
        let mut images = std::mem::take(&mut *inner.images.lock().await);
        while let Some(image) = images.pop() {
            let dir = image.dir.clone();
            if tokio::task::spawn_blocking(move || drop(image)).await.is_err() {
                tracing::warn!(dir = %dir.display(), "an unmount did not end well");
            }
        }
        inner.ways.stop().await;
        let store = Arc::clone(&inner.store);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || store.sync()).await {
            tracing::warn!(%error, "what came last is not durable; it is fetched again");
        }
        inner.peers.shutdown().await;
    }
}

/// Tells the images of every layer that becomes complete. Ends with the fetch driver, or with the node.
async fn follow_completions(node: Weak<Inner>, mut completions: watch::Receiver<()>) {
    while completions.changed().await.is_ok() {
        let Some(node) = node.upgrade() else { return };
        node.lengthen_read_ahead().await;
    }
}

/// Makes a folder that only root can enter, as the files below it hold what images hold.
///
/// # Errors
/// When it cannot be made.
pub fn private_folder(path: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// The store keeps a descriptor open for each layer, and each peer and request has one: take what the system allows.
fn raise_file_limit() {
    let mut limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = rustix::process::setrlimit(rustix::process::Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files stays as it was");
    }
}

async fn open_store(config: &NodeConfig) -> Result<Arc<Store>, NodeError> {
    let mut settings = StoreConfig::new(config.state.join("store"));
    settings.budget_bytes = config.store_budget_bytes;
    // The kernel caches what FUSE and EROFS give it; a second copy below would only take memory.
    settings.drop_behind = DropBehind::WrittenAndRead;
    let deadline = Instant::now() + STORE_TIMEOUT;
    loop {
        let settings = settings.clone();
        let opened = tokio::task::spawn_blocking(move || Store::open(settings)).await;
        match opened.map_err(|_| NodeError::Interrupted)? {
            // The daemon before this one no longer answers and is about to end.
            Err(StoreError::InUse { .. }) if Instant::now() < deadline => tokio::time::sleep(STORE_RETRY).await,
            opened => return Ok(opened?),
        }
    }
}

async fn join_swarm(config: &NodeConfig, content: Arc<NodeContent>) -> Result<hermes_p2p::Node, NodeError> {
    let listen = config.listen.as_deref().unwrap_or("127.0.0.1:0");
    let listen = match listen.parse::<SocketAddr>() {
        Ok(address) => multiaddr_of(address),
        Err(_) => listen.parse().map_err(|_| {
            NodeError::Address(format!("listen: '{listen}' is no address; write IP:PORT or /ip4/IP/tcp/PORT"))
        })?,
    };
    let cluster = config.cluster_id()?;
    let mut settings = hermes_p2p::NodeConfig::new(cluster, config.state.join("identity"), listen);
    settings.peers = config.peers.iter().map(|peer| peer_address("peers", peer)).collect::<Result<_, _>>()?;
    Ok(hermes_p2p::Node::start(settings, content).await?)
}

fn peer_address(setting: &'static str, text: &str) -> Result<PeerAddress, NodeError> {
    text.parse().map_err(|error| NodeError::Address(format!("{setting}: {error}")))
}
