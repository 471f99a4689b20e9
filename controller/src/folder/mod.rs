//! The controller without Kubernetes: policies are files, and so is what is said of them.
//!
//! [`source`] reads a folder of documents and says what has changed in it; [`reports`] writes what has become of policies and
//! images; [`run`] puts them together with [`crate::run`], as one process for one machine.
//!
//! ```text
//! STATE/signing-keys.json     the secret keys            STATE/trusted-keys   the public ones, one a line, for nodes
//! STATE/indexes/              what is kept               STATE/status/        what has become of policies and images
//! STATE/authority/            who admits nodes         STATE/api-roots.pem  what nodes know the controller by
//! STATE/controller.lock       held while it runs
//! ```

mod documents;
pub mod reports;
pub mod source;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use hermes_p2p::{ClusterId, unix_now};
use thiserror::Error;
use tokio_util::sync::CancellationToken;

use self::reports::FolderReports;
use self::source::{FolderSource, FolderSourceError};
use crate::api::review::tokens::TokenFile;
use crate::api::review::{Reviewer, Viewers};
use crate::authority::folder::AuthorityFolder;
use crate::authority::{Authority, AuthorityError};
use crate::clock;
use crate::pipeline::secrets::FolderSecrets;
use crate::run::{RunConfig, RunError, Vault, VaultError, World};
use crate::signing::KeySet;

/// How often the file with the keys is looked at: somebody may have rotated them.
const KEYS_INTERVAL: Duration = Duration::from_secs(2);

/// The file with the secret keys below a state folder.
pub fn keys_path(state: &Path) -> PathBuf {
    state.join("signing-keys.json")
}

/// How a controller without Kubernetes is run.
#[derive(Debug, Clone)]
pub struct StandaloneConfig {
    /// The folder with policies and lists of images.
    pub policies: PathBuf,
    /// The folder with the secrets that policies name.
    pub secrets: PathBuf,
    /// The file with the tokens by which nodes join, and people look at the page.
    pub join_tokens: Option<PathBuf>,
    /// All else.
    pub run: RunConfig,
}

/// A controller that cannot be run.
#[derive(Debug, Error)]
pub enum StandaloneError {
    /// The folder with policies.
    #[error(transparent)]
    Source(#[from] FolderSourceError),
    /// All else.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// Runs a controller until `ending` is cancelled.
///
/// # Errors
/// When a folder, the keys or the artifacts cannot be used. What goes wrong later is logged, and tried again.
pub async fn run(config: StandaloneConfig, ending: CancellationToken) -> Result<(), StandaloneError> {
    let state = config.run.state.clone();
    let status = state.join("status");
    let failed = |source| RunError::State { action: "make", path: status.clone(), source };
    let (reports, writer) = FolderReports::start(&status).map_err(failed)?;
    let source = FolderSource::open(&config.policies)?;
    let tokens = config.join_tokens.map(|path| Arc::new(TokenFile::new(path)));
    let world = World {
        source: Box::new(move |events, ending| source.run(events, ending).boxed()),
        secrets: Arc::new(FolderSecrets::new(&config.secrets)),
        audiences: vec![reports],
        reviewer: tokens.clone().map(|tokens| tokens as Arc<dyn Reviewer>),
        viewers: tokens.map(|tokens| tokens as Arc<dyn Viewers>),
    };
    crate::run::run(config.run, Arc::new(FolderVault { state }), world, ending).await?;
    // It ends when nobody can say anything any more.
    let _ = writer.await;
    Ok(())
}

/// Keys below the state folder.
#[derive(Debug, Clone)]
struct FolderVault {
    state: PathBuf,
}

impl FolderVault {
    fn authority_folder(&self) -> AuthorityFolder {
        AuthorityFolder::new(self.state.join("authority"))
    }
}

impl Vault for FolderVault {
    fn keys(&self) -> BoxFuture<'_, Result<KeySet, VaultError>> {
        let path = keys_path(&self.state);
        let read = move || {
            let mut set = KeySet::load_or_make(&path, clock::now())?;
            // What an old key alone has signed is signed by the new one long before: its time is a matter of days.
            if set.retire(clock::now()) {
                set.save(&path)?;
            }
            Ok(set)
        };
        blocking(read).boxed()
    }

    fn authority<'a>(&'a self, cluster: &'a ClusterId) -> BoxFuture<'a, Result<Authority, VaultError>> {
        let (folder, cluster) = (self.authority_folder(), cluster.clone());
        blocking(move || Ok(folder.load_or_create(&cluster, unix_now())?)).boxed()
    }

    fn keep(&self, authority: Arc<Authority>) -> BoxFuture<'static, Result<(), AuthorityError>> {
        self.authority_folder().keep(authority)
    }

    fn keys_every(&self) -> Duration {
        KEYS_INTERVAL
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, VaultError> + Send + 'static,
) -> Result<T, VaultError> {
    let interrupted = |error: tokio::task::JoinError| VaultError::Place { doing: "read", reason: error.to_string() };
    tokio::task::spawn_blocking(work).await.map_err(interrupted)?
}
