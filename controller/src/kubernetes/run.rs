//! A controller on Kubernetes: one of several replicas, which decides while it leads.
//!
//! A replica that does not lead yet waits, and reads nothing but the Lease. One that leads runs until it is told to end or
//! loses the Lease. In the first case it stops deciding, writes what it has to say, and gives the Lease back, so that
//! another goes on at once; in the second it ends with an error at once and is started again, because what it knows may
//! be old by then.

use std::path::PathBuf;
use std::sync::Arc;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use kube::Client;
use thiserror::Error;
use tokio::sync::watch as state;
use tokio_util::sync::CancellationToken;

use super::lease::{Election, LeaseConfig, Standing, Timing};
use super::reports::{Reports, ReportsConfig};
use super::secrets::{SecretError, Secrets as ClusterSecrets};
use super::vault::SecretVault;
use super::{ConnectError, MANAGER, connect, watch};
use crate::api::review::Reviewer;
use crate::api::review::kubernetes::TokenReviews;
use crate::api::review::viewers::AccessReviews;
use crate::event::SecretRef;
use crate::metrics::{Metrics, Role};
use crate::pipeline::secrets::{Document, Secrets, SecretsError};
use crate::run::{RunConfig, RunError, World};

/// How a controller on Kubernetes is run.
#[derive(Debug, Clone)]
pub struct KubernetesConfig {
    /// The file that names the API server; that of the pod's ServiceAccount, or the user's, when absent.
    pub kubeconfig: Option<PathBuf>,
    /// The namespace of the Lease and of the controller's keys.
    pub namespace: String,
    /// Who this replica is, such as its pod's name; another text for each process.
    pub identity: String,
    /// The ServiceAccounts, as namespace and name, whose pods may join as the nodes that they run on.
    pub node_accounts: Vec<(String, String)>,
    /// All else.
    pub run: RunConfig,
}

/// A controller that cannot be run.
#[derive(Debug, Error)]
pub enum KubernetesError {
    /// There is no API server.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The Lease could not be renewed.
    #[error("lost the lease to decide; another replica goes on, and this one has to be started again")]
    LeadershipLost,
    /// All else.
    #[error(transparent)]
    Run(#[from] RunError),
}

/// Takes part in the election, and runs a controller while this replica leads, until `ending` is cancelled.
///
/// # Errors
/// When the API server, the keys or the artifacts cannot be used, or the lease is lost.
pub async fn run(config: KubernetesConfig, ending: CancellationToken) -> Result<(), KubernetesError> {
    let client = connect(config.kubeconfig.as_deref()).await?;
    let lease = LeaseConfig {
        namespace: config.namespace.clone(),
        name: MANAGER.to_owned(),
        identity: config.identity.clone(),
        timing: Timing::default(),
    };
    let (election, standing) = Election::new(client.clone(), lease);
    let following = tokio::spawn(show_standing(standing.clone(), config.run.metrics.clone()));
    let stop = CancellationToken::new();
    let taking_part = tokio::spawn(election.run(stop.clone()));
    let ended = lead(config, client, standing, ending).await;
    following.abort();
    // Only now: whoever gives the Lease back no longer decides.
    stop.cancel();
    if let Err(error) = taking_part.await {
        tracing::error!(%error, "a task has panicked");
    }
    ended
}

/// Says who leads to those who look at this replica. That it leads itself is said when it has begun to.
async fn show_standing(mut standing: state::Receiver<Standing>, metrics: Metrics) {
    loop {
        if matches!(&*standing.borrow_and_update(), Standing::Follower { leader: Some(_) }) {
            metrics.stands(Role::Standby);
        }
        if standing.changed().await.is_err() {
            return;
        }
    }
}

async fn lead(
    config: KubernetesConfig,
    client: Client,
    mut standing: state::Receiver<Standing>,
    ending: CancellationToken,
) -> Result<(), KubernetesError> {
    tokio::select! {
        () = ending.cancelled() => return Ok(()),
        leads = standing.wait_for(|standing| *standing == Standing::Leader) => {
            leads.map_err(|_| KubernetesError::LeadershipLost)?;
        }
    }
    let (running, lost) = (ending.child_token(), CancellationToken::new());
    let watching = {
        let (running, lost) = (running.clone(), lost.clone());
        async move {
            if standing.wait_for(|standing| *standing != Standing::Leader).await.is_ok() {
                lost.cancel();
                running.cancel();
            }
            std::future::pending::<()>().await;
        }
    };
    let reports = Arc::new(Reports::new(ReportsConfig::default()));
    let source = client.clone();
    let world = World {
        source: Box::new(move |events, ending| {
            async move {
                ending.run_until_cancelled(watch::run(source, events)).await;
            }
            .boxed()
        }),
        secrets: Arc::new(ClusterSecrets::new(client.clone())),
        audiences: vec![reports.clone()],
        reviewer: Some(Arc::new(TokenReviews::new(client.clone(), config.node_accounts)) as Arc<dyn Reviewer>),
        viewers: Some(Arc::new(AccessReviews::new(client.clone()))),
    };
    let vault = Arc::new(SecretVault::new(client.clone(), &config.namespace));
    let ended = tokio::select! {
        ended = crate::run::run(config.run, vault, world, running) => ended,
        () = reports.write(client) => Ok(()),
        () = watching => Ok(()),
    };
    if lost.is_cancelled() { Err(KubernetesError::LeadershipLost) } else { Ok(ended?) }
}

impl Secrets for ClusterSecrets {
    fn read<'a>(&'a self, secret: &'a SecretRef) -> BoxFuture<'a, Result<Option<Document>, SecretsError>> {
        async move {
            match self.logins(secret).await {
                Ok(document) => Ok(Some(document)),
                Err(SecretError::NotFound { .. }) => Ok(None),
                Err(error) => Err(SecretsError { secret: secret.clone(), reason: error.to_string() }),
            }
        }
        .boxed()
    }
}
