//! A controller, put together: everything that is the same on a folder and on Kubernetes.
//!
//! ```text
//!            World { source, secrets, audiences, reviewer, viewers } Vault: signing keys, authority
//!                        |                                              |
//!   source --Event--> program { core } --Action--> pipeline --> artifacts, signed
//!                        |        ^ Event                               |
//!                        +--Action--> audiences, hub --> node API <-----+
//! ```
//!
//! What a crash leaves is what the artifacts and the vault hold; the rest is heard again.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use hermes_files::{OWNER_ONLY, write_whole};
use hermes_origin::{OriginClient, OriginConfig, SetupError};
use hermes_p2p::ClusterId;
use thiserror::Error;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::api::custody::{Custody, Keep};
use crate::api::hub::Hub;
use crate::api::limits::ApiLimits;
use crate::api::numbers::Numbers;
use crate::api::review::{Reviewer, Viewers};
use crate::api::{Api, ApiError, ApiParts};
use crate::artifacts::{ArtifactSettings, Artifacts, ArtifactsError};
use crate::authority::{Authority, AuthorityError};
use crate::clock;
use crate::core::Settings;
use crate::event::{Audience, Event};
use crate::metrics::{Metrics, Parts, Role};
use crate::page::{Board, Page};
use crate::pipeline::Pipeline;
use crate::pipeline::partial::Partials;
use crate::pipeline::secrets::Secrets;
use crate::program::{EVENTS_MAX, Program};
use crate::signing::{KeySet, Keys, SigningError};

/// How long the end waits for what is being written.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// How a controller is run.
#[derive(Debug, Clone)]
pub struct RunConfig {
    /// The folder with everything that it keeps on this machine.
    pub state: PathBuf,
    /// Where indexes are kept: a folder, or the address of a bucket or a repository; `indexes` below the state folder when
    /// absent.
    pub artifacts: Option<String>,
    /// How much is kept.
    pub artifact_settings: ArtifactSettings,
    /// How the core works.
    pub settings: Settings,
    /// How registries are reached.
    pub origin: OriginConfig,
    /// Where nodes reach it; nodes are not served when absent.
    pub api: Option<ApiConfig>,
    /// What it counts.
    pub metrics: Metrics,
}

/// How nodes are served.
#[derive(Debug, Clone)]
pub struct ApiConfig {
    /// Where.
    pub listen: SocketAddr,
    /// The swarm that they are admitted to.
    pub cluster: ClusterId,
}

/// What a controller cannot lose, and shares with the replica that takes over.
pub trait Vault: fmt::Debug + Send + Sync + 'static {
    /// The keys that sign indexes, made if there are none. Asked again now and then: somebody may have rotated them.
    fn keys(&self) -> BoxFuture<'_, Result<KeySet, VaultError>>;

    /// The authority of `cluster`, made if there is none.
    fn authority<'a>(&'a self, cluster: &'a ClusterId) -> BoxFuture<'a, Result<Authority, VaultError>>;

    /// Keeps an authority that has changed; fails when somebody else has changed it meanwhile.
    fn keep(&self, authority: Arc<Authority>) -> BoxFuture<'static, Result<(), AuthorityError>>;

    /// How often keys are asked for again.
    fn keys_every(&self) -> Duration;

    /// Hands the roots (PEM) by which nodes know this controller to where new nodes look for them, if there is such a place
    /// beside the file in the state folder.
    fn show_roots<'a>(&'a self, _roots: &'a str) -> BoxFuture<'a, Result<(), VaultError>> {
        Box::pin(async { Ok(()) })
    }
}

/// Keys that cannot be had.
#[derive(Debug, Error)]
pub enum VaultError {
    /// The signing keys.
    #[error(transparent)]
    Signing(#[from] SigningError),
    /// The authority.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The place where they are.
    #[error("the controller's keys cannot be {doing}: {reason}")]
    Place {
        /// What was tried, such as `read`.
        doing: &'static str,
        /// Why.
        reason: String,
    },
}

/// Says facts until the token is cancelled.
pub type Source = Box<dyn FnOnce(mpsc::Sender<Event>, CancellationToken) -> BoxFuture<'static, ()> + Send>;

/// What is outside: where facts come from, and who hears what has become of them.
pub struct World {
    /// Where facts come from.
    pub source: Source,
    /// Where logins are.
    pub secrets: Arc<dyn Secrets>,
    /// Who hears.
    pub audiences: Vec<Arc<dyn Audience>>,
    /// Who may join as a node; needed with [`RunConfig::api`].
    pub reviewer: Option<Arc<dyn Reviewer>>,
    /// Who may see the status page; nobody when absent.
    pub viewers: Option<Arc<dyn Viewers>>,
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("World").field("audiences", &self.audiences).finish_non_exhaustive()
    }
}

/// A controller that cannot be run.
#[derive(Debug, Error)]
pub enum RunError {
    /// The state folder cannot be used.
    #[error("cannot {action} {}: {source}; check the folder and its owner", path.display())]
    State {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Another controller runs there.
    #[error("another controller uses {}; end it, or choose another state folder", .0.display())]
    InUse(PathBuf),
    /// The keys.
    #[error(transparent)]
    Vault(#[from] VaultError),
    /// The artifacts.
    #[error(transparent)]
    Artifacts(#[from] ArtifactsError),
    /// The HTTP client.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The API for nodes.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// Nobody says who may join.
    #[error("nodes are to be served, and nothing says which may join; give --join-tokens FILE")]
    NobodyJoins,
}

/// Runs a controller until `ending` is cancelled.
///
/// # Errors
/// When a folder, the keys or the artifacts cannot be used. What goes wrong later is logged, and tried again.
pub async fn run(
    config: RunConfig,
    vault: Arc<dyn Vault>,
    world: World,
    ending: CancellationToken,
) -> Result<(), RunError> {
    let _lock = lock(&config.state)?;
    let keys = Keys::new(vault.keys().await?);
    write_trusted(&config.state, &keys)?;
    let location = config.artifacts.clone().unwrap_or_else(|| config.state.join("indexes").display().to_string());
    let origin = OriginClient::new(config.origin.clone())?;
    let opened = Artifacts::open_with(&origin, &location, config.artifact_settings, keys.clone(), clock::now());
    let (artifacts, kept) = opened.await?;
    tracing::info!(images = kept.len(), location, "what earlier runs have kept is in use");
    let folder = config.state.join("partial");
    let partials = Partials::open(folder.clone());
    let partials = partials.map_err(|source| RunError::State { action: "use", path: folder, source })?;
    let pipeline = Pipeline::new(origin.clone(), config.origin.credentials, artifacts.clone(), partials, world.secrets);
    let (events, received) = mpsc::channel(EVENTS_MAX);
    let mut audiences = world.audiences;
    let (mut api, mut counted, mut held) = (None, None, None);
    config.metrics.stands(Role::Leader);
    audiences.push(Arc::new(config.metrics.clone()));
    if let Some(wanted) = config.api {
        let reviewer = world.reviewer.ok_or(RunError::NobodyJoins)?;
        let hub = Arc::new(Hub::new(keys.clone()));
        audiences.push(Arc::clone(&hub) as Arc<dyn Audience>);
        let custody = custody(&vault, &wanted.cluster, &config.state).await?;
        let (numbers, limits) = (Arc::new(Numbers::default()), ApiLimits::default());
        counted = Some(Arc::clone(&numbers));
        held = Some(Arc::clone(&custody));
        let listen = wanted.listen;
        let board = Arc::new(Board::new(clock::now()));
        let page = world.viewers.map(|viewers| {
            audiences.push(Arc::clone(&board) as Arc<dyn Audience>);
            Arc::new(Page::new(&wanted.cluster, board, viewers, Arc::clone(&numbers)))
        });
        let (artifacts, events) = (artifacts.clone(), events.clone());
        let parts = ApiParts { listen, custody, reviewer, hub, artifacts, events, numbers, limits, page };
        let started = Api::start(parts).await?;
        tracing::info!(address = %started.address(), "nodes are served");
        api = Some(started);
    }
    let quota_bytes = config.artifact_settings.quota_bytes;
    config.metrics.show(Parts { artifacts, quota_bytes, origin, numbers: counted, events: events.downgrade() });
    let program = Program::new(config.settings, pipeline, audiences, kept);
    let following = tokio::spawn((world.source)(events, ending.clone()));
    let exchanging = tokio::spawn(follow_keys(vault, config.state, keys, held, ending.clone()));
    program.run(received, ending.clone(), DRAIN_TIMEOUT).await;
    ending.cancel();
    if let Some(api) = api {
        api.stop().await;
    }
    for task in [following, exchanging] {
        if let Err(error) = task.await {
            tracing::error!(%error, "a task has panicked");
        }
    }
    Ok(())
}

/// Who holds the authority: what it becomes is kept in the vault. Its public roots are written down for nodes.
async fn custody(vault: &Arc<dyn Vault>, cluster: &ClusterId, state: &Path) -> Result<Arc<Custody>, RunError> {
    let authority = vault.authority(cluster).await?;
    let path = state.join("api-roots.pem");
    write_whole(&path, OWNER_ONLY, authority.roots_pem().as_bytes()).map_err(|source| RunError::State {
        action: "write",
        path: path.clone(),
        source,
    })?;
    let vault = Arc::clone(vault);
    let keep: Keep = Box::new(move |authority: Arc<Authority>| {
        let (vault, path) = (Arc::clone(&vault), path.clone());
        Box::pin(async move {
            let roots = authority.roots_pem();
            vault.keep(authority).await?;
            write_whole(&path, OWNER_ONLY, roots.as_bytes()).map_err(|source| AuthorityError::Io {
                doing: "write",
                path,
                source,
            })
        })
    });
    Ok(Arc::new(Custody::new(authority, keep)))
}

/// Makes sure that nobody else uses the state folder, for as long as the file is open.
fn lock(state: &Path) -> Result<std::fs::File, RunError> {
    let path = state.join("controller.lock");
    let failed = |action, source| RunError::State { action, path: path.clone(), source };
    std::fs::create_dir_all(state).map_err(|source| failed("make", source))?;
    let file = std::fs::File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|source| failed("open", source))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(RunError::InUse(state.to_owned())),
        Err(std::fs::TryLockError::Error(source)) => Err(failed("lock", source)),
    }
}

/// Writes the public keys down for nodes.
fn write_trusted(state: &Path, keys: &Keys) -> Result<(), RunError> {
    let path = state.join("trusted-keys");
    let text: String = keys.public_keys().iter().map(|key| format!("{key}\n")).collect();
    write_whole(&path, OWNER_ONLY, text.as_bytes()).map_err(|source| RunError::State { action: "write", path, source })
}

/// Puts keys to use that somebody has rotated, gives up those whose time has come, and shows roots that are new.
async fn follow_keys(
    vault: Arc<dyn Vault>,
    state: PathBuf,
    keys: Keys,
    custody: Option<Arc<Custody>>,
    ending: CancellationToken,
) {
    let mut ticks = tokio::time::interval(vault.keys_every());
    let mut shown = String::new();
    loop {
        tokio::select! {
            () = ending.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let looked = async {
            let set = vault.keys().await?;
            if set.public_keys() != keys.public_keys() {
                tracing::info!(keys = set.public_keys().len(), "other signing keys are in use");
                keys.replace(set);
                write_trusted(&state, &keys)?;
            }
            Ok::<(), RunError>(())
        };
        if let Err(error) = looked.await {
            tracing::error!(%error, "the signing keys cannot be followed; those in use stay");
        }
        let roots = custody.as_ref().map_or_else(String::new, |custody| custody.current().roots_pem());
        if roots != shown {
            match vault.show_roots(&roots).await {
                Ok(()) => shown = roots,
                Err(error) => {
                    tracing::error!(%error, "nodes that join for the first time cannot be told whom to believe");
                }
            }
        }
    }
}
