//! The daemon: builds everything from its settings, answers commands, ends in order.
//!
//! Composition root of the node. It opens the store, probes the kernel, joins the swarm, starts the fetch driver, and
//! listens on the control socket and, if it is told to, on containerd's. It needs no network to start and serves what it
//! has.
//!
//! Under a supervisor ([`crate::keeper`]) its end is not that of what it shows: killed or told to hand over, it leaves
//! its mounts to the next daemon, which goes on with them ([`restore`]) before it does anything else. Told to drain, or
//! without a supervisor, it unmounts what it mounted, newest first; and when it is killed without a supervisor, its
//! mounts answer ENOTCONN until the next daemon of the same state folder clears them away.

mod cluster;
mod complete;
mod drain;
mod error;
mod first_pull;
mod forget;
mod grants;
mod guess;
pub mod keys;
mod lazy;
mod members;
mod mount;
mod observe;
mod record;
mod resolve;
mod restore;
mod seed;
mod seeing;
mod serve;
mod shown;
mod snapshots;
mod starts;
mod ways;

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use hermes_image::ids::{ChainId, DiffId, Digest};
use hermes_image::statement::{PublicKey, SigningKey};
use hermes_p2p::PeerAddress;
use hermes_policy::limits::Limits;
use hermes_store::{DropBehind, LayerUse, Store, StoreConfig, StoreError};
use parking_lot::Mutex;
use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::artifacts::Artifacts;
use crate::config::NodeConfig;
use crate::content::NodeContent;
use crate::control::socket_path;
use crate::controller::Controller;
use crate::fetch::{self, FetchConfig, FetchHandle, MountNo, OpenLayer, OriginNumbers};
use crate::fs::layers::LayerDirectory;
use crate::fs::locate::ShownTree;
use crate::fs::read::{LayerFile, Reader};
use crate::fs::session::FuseSession;
use crate::index_folder::IndexFolder;
use crate::keeper::notify::{Inherited, Notifier};
use crate::mounts::Mounted;
use crate::privacy::Privacy;
use crate::profile::Profiles;
use crate::state_version;
use crate::status::{PullStatus, Way};
use hermes_origin::credentials::PullSecrets;
use hermes_origin::{FindImageError, OriginClient};

/// How long a daemon that ends may keep the store after it has stopped listening: it unmounts and syncs.
const STORE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often its successor looks.
const STORE_RETRY: Duration = Duration::from_millis(20);
/// How long a daemon that hands over lets a mount or unmount finish that is under way. Both take milliseconds.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(5);
/// The node's own indexes, below the state folder.
const INDEXES_FOLDER: &str = "indexes";
/// Where layer files are served, below the state folder.
const LAYERS_FOLDER: &str = "layers";

use complete::background::{self, Completion};
pub use error::{NodeError, find_class, origin_class};
use first_pull::FirstPulls;
use observe::Observer;
pub use observe::Readiness;
use record::LAYERS_CONNECTION;
use snapshots::RunningSnapshots;
use starts::{RunningStart, Starts};
use ways::{Probe, Ways};

/// Who supervises this process, and what that has kept from the process before.
#[derive(Debug, Default)]
pub struct Supervision {
    /// The supervisor; `None` when there is none.
    pub notifier: Option<Notifier>,
    /// What it has kept.
    pub inherited: Inherited,
}

impl Supervision {
    /// As the environment says. To be called once, before anything else opens descriptors.
    ///
    /// # Errors
    /// When the supervisor's socket cannot be one.
    pub fn from_environment() -> Result<Self, NodeError> {
        let notifier = Notifier::from_environment().map_err(NodeError::Supervisor)?;
        Ok(Self { notifier, inherited: Inherited::from_environment() })
    }
}

/// A running node.
#[derive(Debug)]
pub struct Node {
    inner: Arc<Inner>,
    listener: UnixListener,
    observer: Observer,
    snapshots: Option<RunningSnapshots>,
    /// What nobody waits for; ends with the node.
    background: JoinSet<()>,
}

/// Layers that are open, and the files that their readers see.
type OpenLayers = BTreeMap<DiffId, (Arc<OpenLayer>, Arc<LayerFile>)>;

/// What all requests share.
#[derive(Debug)]
struct Inner {
    config: NodeConfig,
    notifier: Option<Arc<Notifier>>,
    store: Arc<Store>,
    peers: hermes_p2p::Node,
    content: Arc<NodeContent>,
    privacy: Arc<Privacy>,
    artifacts: Artifacts,
    profiling: Starts,
    fetch: FetchHandle,
    reader: Reader,
    directory: Arc<LayerDirectory>,
    ways: Ways,
    key: SigningKey,
    /// Whose statements every request takes, beside those that the controller names.
    own_trusted: Vec<PublicKey>,
    /// The controller, if there is one.
    controller: Option<Arc<Controller>>,
    /// How images are found and read; owns the connections to registries.
    origin_client: OriginClient,
    origins: Mutex<OriginNumbers>,
    /// The layers that are open for at least one mount.
    layers: Mutex<OpenLayers>,
    next_mount: AtomicU64,
    mounting: tokio::sync::Mutex<()>,
    images: tokio::sync::Mutex<Vec<MountedImage>>,
    unused: tokio::sync::Notify,
    /// Held shared by whoever is between reading an index and writing down what needs it, alone by what forgets images.
    keeping: tokio::sync::RwLock<()>,
    /// Something was removed, and images may be forgotten.
    forget_due: Arc<tokio::sync::Notify>,
    /// What was decided about images that containerd pulls, the latest last.
    pulls: Mutex<VecDeque<PullStatus>>,
    /// The pulls that this node takes itself.
    first_pulls: FirstPulls,
    /// How images are completed in the background.
    completion: Completion,
    /// Of daemons with this state folder, this one included.
    starts: u64,
    started_at_seconds: f64,
}

/// An image that is shown. Fields drop in this order: first the mount, then what it reads from.
#[derive(Debug)]
struct MountedImage {
    number: MountNo,
    shown: Shown,
    /// `None` for a tree that an earlier daemon has mounted, and for one that is read without this one.
    start: Option<RunningStart>,
    reference: String,
    manifest: Digest,
    chain: ChainId,
    dir: PathBuf,
    way: Way,
    /// When a container was last prepared on it, or it was mounted.
    prepared: Instant,
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
    /// Starts a node, which goes on with what the one before it showed as far as `supervision` has kept it.
    ///
    /// # Errors
    /// When a setting is wrong, the state folder is of an unknown version, the store cannot be opened, the swarm cannot
    /// listen, or another daemon runs already.
    pub async fn start(config: NodeConfig, supervision: Supervision) -> Result<Self, NodeError> {
        config.validate()?;
        if !rustix::process::geteuid().is_root() {
            return Err(NodeError::NotRoot);
        }
        private_folder(&config.state).map_err(|source| {
            let path = config.state.clone();
            NodeError::Io { what: "make", path, source }
        })?;
        state_version::open(&config.state)?;
        raise_file_limit();
        let observer = Observer::start(config.metrics_listen).await?;
        let started_at_seconds = hermes_metrics::seconds_now();
        let store = open_store(&config).await?;
        observer.readiness.store_is_open();
        // Only whoever has the store counts: the daemon before this one may be about to end.
        let starts = observe::count_start(&config.state);
        let origin_client = OriginClient::new(config.registries.origin_config()).map_err(FindImageError::from)?;
        let Supervision { notifier, inherited } = supervision;
        let notifier = notifier.map(Arc::new);
        serve::clear_leftovers(&config.state, notifier.is_some() && inherited.has(LAYERS_CONNECTION));
        serve::unpin_what_is_gone(&store)?;
        let (key, trusted) = signing_keys(&config)?;
        let own_indexes = IndexFolder::new(config.state.join(INDEXES_FOLDER));
        let privacy = Arc::new(Privacy::new(Arc::clone(&store))?);
        let content = Arc::new(NodeContent::new(Arc::clone(&store), own_indexes.clone(), Arc::clone(&privacy)));
        let (desk, claims) = fetch::desk(Arc::clone(&privacy));
        let mut tasks = JoinSet::new();
        let controller = Controller::open(&config)?;
        if let Some(controller) = &controller {
            tasks.spawn(Arc::clone(controller).run());
        }
        let peers = members::join_swarm(&config, Arc::clone(&content), desk, controller.as_ref()).await?;
        privacy.join(Arc::clone(peers.grants()));
        let artifacts = Artifacts::new(Arc::clone(&store), Some(peers.clone())).with_controller(controller.clone());
        config.index_folders.iter().for_each(|folder| artifacts.add_folder(IndexFolder::new(folder)));
        artifacts.add_folder(own_indexes);
        let fetch = start_fetching(&config, &store, &peers, claims)?;
        let reader = Reader::new(tokio::runtime::Handle::current(), config.read_deadline());
        let directory = Arc::new(LayerDirectory::default());
        let layers_dir = config.state.join(LAYERS_FOLDER);
        let parts = restore::Parts {
            layers_dir: &layers_dir,
            store: &store,
            artifacts: &artifacts,
            fetch: &fetch,
            reader: &reader,
            directory: &directory,
            origin_client: &origin_client,
            notifier: notifier.clone(),
        };
        let mut restored = parts.restore(inherited).await?;
        let ways = Ways::probe(Probe {
            state: config.state.clone(),
            layers_dir,
            store: Arc::clone(&store),
            fetch: fetch.clone(),
            directory: Arc::clone(&directory),
            reader: reader.clone(),
            notifier: notifier.clone(),
            wanted: config.erofs_backing,
            session: restored.session.take(),
        })
        .await?;
        let listener = listen(&config)?;
        let profiling = Starts {
            profiles: Profiles::new(Arc::clone(&store), artifacts.clone()),
            fetch: fetch.clone(),
            budget_bytes: config.store_budget_bytes,
            controller: controller.clone(),
        };
        let inner = Arc::new(Inner {
            profiling,
            first_pulls: FirstPulls::new(&config),
            completion: Completion::new(&config, observe::number_of(&peers.local_peer_id().to_bytes())),
            config,
            notifier,
            store,
            peers,
            content,
            privacy,
            artifacts,
            fetch,
            reader,
            directory,
            ways,
            key,
            own_trusted: trusted,
            controller,
            origin_client,
            origins: Mutex::new(restored.origins),
            layers: Mutex::new(restored.layers),
            next_mount: AtomicU64::new(restored.next_mount),
            mounting: tokio::sync::Mutex::default(),
            images: tokio::sync::Mutex::new(restored.images),
            unused: tokio::sync::Notify::new(),
            keeping: tokio::sync::RwLock::default(),
            forget_due: Arc::default(),
            pulls: Mutex::default(),
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
        inner.catch_up(restored.peers).await;
        tasks.spawn(background::run(Arc::downgrade(&inner)));
        cluster::spawn(&inner, &mut tasks);
        Ok(Self { inner, listener, observer, snapshots, background: tasks })
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

    /// Whether somebody keeps what this node shows when it hands over.
    pub fn is_supervised(&self) -> bool {
        self.inner.notifier.is_some()
    }

    /// Ends the process so that the next one can go on: nothing is unmounted, and reads that wait for their bytes are
    /// not answered, because the next daemon is asked for them again.
    pub async fn hand_over(self) -> ! {
        let Self { inner, listener, observer, snapshots, mut background } = self;
        observer.readiness.control_is(false);
        drop(listener);
        background.shutdown().await;
        let _ = std::fs::remove_file(socket_path(&inner.config.state));
        // Whoever waits for a pull that is being taken gets an answer.
        inner.first_pulls.end().await;
        // containerd's calls end first; those that it makes meanwhile wait for the next daemon.
        if let Some(snapshots) = snapshots
            && tokio::time::timeout(HANDOVER_TIMEOUT, snapshots.stop()).await.is_err()
        {
            tracing::warn!("handing over while containerd is being answered");
        }
        // A thread that mounts waits for this process to answer, and could not end without it.
        let quiet = async { (inner.mounting.lock().await, inner.images.lock().await) };
        let quiet = tokio::time::timeout(HANDOVER_TIMEOUT, quiet).await;
        if quiet.is_err() {
            tracing::warn!("handing over while something is being mounted");
        }
        let store = Arc::clone(&inner.store);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || store.sync()).await {
            tracing::warn!(%error, "what came last is not durable; it is fetched again");
        }
        tracing::info!("handing over");
        // Anything that is dropped from here on would answer somebody with an error.
        crate::keeper::exit_at_once(0)
    }

    /// Unmounts everything but what containers read without a daemon, makes what came durable, leaves the swarm.
    pub async fn stop(self) {
        let Self { inner, listener, observer, snapshots, mut background } = self;
        observer.readiness.control_is(false);
        background.shutdown().await;
        if let Some(Err(error)) = inner.notifier.as_deref().map(Notifier::stopping) {
            tracing::warn!(%error, "the supervisor does not hear that the node ends");
        }
        drop(listener);
        inner.first_pulls.end().await;
        if let Some(snapshots) = snapshots {
            snapshots.stop().await;
        }
        let _ = std::fs::remove_file(socket_path(&inner.config.state));
        let mut images = std::mem::take(&mut *inner.images.lock().await);
        while let Some(mut image) = images.pop() {
            let dir = image.dir.clone();
            if image.leave_to_users() {
                // Its record and its pin stay, so that the next daemon holds its layers before it evicts anything.
                tracing::info!(dir = %dir.display(), "containers go on reading a tree without a daemon");
                continue;
            }
            let store = Arc::clone(&inner.store);
            let unmounted = tokio::task::spawn_blocking(move || {
                let dir = image.dir.clone();
                drop(image);
                store.remove_mount(&dir)
            });
            match unmounted.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(dir = %dir.display(), %error, "the unmount is not noted"),
                Err(_) => tracing::warn!(dir = %dir.display(), "an unmount did not end well"),
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

impl Inner {
    /// Whose statements are taken now.
    fn trusted(&self) -> Vec<PublicKey> {
        let named = self.controller.as_ref().map(|controller| controller.index_keys()).unwrap_or_default();
        self.own_trusted.iter().copied().chain(named).collect()
    }

    /// Tells that the node answers, and does for trees that go on what a mount does beside showing them.
    async fn catch_up(self: &Arc<Self>, peers: Vec<String>) {
        tracing::info!(peer_id = %self.peers.local_peer_id(), "node started");
        if let Some(Err(error)) = self.notifier.as_deref().map(Notifier::ready) {
            tracing::warn!(%error, "the supervisor does not hear that the node has started");
        }
        for image in self.images.lock().await.iter() {
            self.announce(&image.layers);
        }
        tokio::spawn(grants::run(Arc::downgrade(self)));
        tokio::spawn(forget::run(Arc::downgrade(self), Arc::clone(&self.forget_due)));
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            for peer in peers {
                if let Err(error) = inner.connect(std::slice::from_ref(&peer)).await {
                    tracing::info!(peer, %error, "a peer that was named is not there now");
                }
            }
        });
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

/// What the node signs with, and whose statements it takes. With a key from the settings it goes on taking what it has
/// signed with its own before.
fn signing_keys(config: &NodeConfig) -> Result<(SigningKey, Vec<PublicKey>), NodeError> {
    let mut trusted = config.public_keys()?;
    let own = config.state.join("index-key");
    let key = match &config.signing_key {
        None => keys::load_or_create(&own)?,
        Some(path) => {
            if own.exists() {
                trusted.push(keys::load_or_create(&own)?.public());
            }
            keys::load_shared(path)?
        }
    };
    trusted.push(key.public());
    Ok((key, trusted))
}

/// Where commands are answered.
fn listen(config: &NodeConfig) -> Result<UnixListener, NodeError> {
    let io = |what, path: PathBuf| move |source| NodeError::Io { what, path, source };
    let socket = socket_path(&config.state);
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).map_err(io("listen on", socket.clone()))?;
    serve::only_for_root(&socket).map_err(io("protect", socket))?;
    Ok(listener)
}

fn start_fetching(
    config: &NodeConfig,
    store: &Arc<Store>,
    peers: &hermes_p2p::Node,
    claims: fetch::Claims,
) -> Result<FetchHandle, NodeError> {
    let started = fetch::spawn(FetchConfig {
        store: Arc::clone(store),
        peers: Some(peers.clone()),
        claims: Some(claims),
        limits: Limits::default(),
        seed: u64::from(std::process::id()) ^ rand::random::<u64>(),
        record: config.record_decisions.clone(),
    });
    let path = config.record_decisions.clone().unwrap_or_default();
    started.map_err(|source| NodeError::Io { what: "write", path, source })
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

fn peer_address(setting: &'static str, text: &str) -> Result<PeerAddress, NodeError> {
    text.parse().map_err(|error| NodeError::Address(format!("{setting}: {error}")))
}
