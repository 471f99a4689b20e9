//! The controller's API for nodes: admits them, tells them what is ready, gives indexes, hears what they say.
//!
//! ```text
//!  TCP --> TLS 1.3 (connections) --> HTTP/2, gRPC --> calls (service) --> events to the core
//!            | certificate: who and until when           |  ^
//!            | none: Join alone --> review               |  | one cursor for each stream
//!                                                        +-- hub <-- what the core publishes; keys, members
//! ```
//!
//! | module | what |
//! |---|---|
//! | `hub` | what nodes are to know, with revisions; hears the core and never makes it wait |
//! | `service` | the calls |
//! | `connections` | TLS, who is at the other end, when a connection ends |
//! | `browsers` | connections by HTTP/1.1, which have the status page ([`crate::page`]) and nothing else |
//! | `review` | whether a token proves who joins, or may look at the page: Kubernetes' reviews, or a file |
//! | `custody` | the authority in force: rotation, revocation, keeping |
//! | `nodes`, `limits` | what one node, and all of them, may ask for |
//! | `numbers` | what is counted |
//!
//! Nothing here is kept over a restart but the authority: a controller that comes back learns from the core what is
//! ready, nodes say which of it they know, and are told the difference.
//!
//! **Private images.** What a registry gives only for a login is told to nobody but by its digest. All of it is given to a
//! node that shows grants for all its layers, and an artifact for a grant of the layer that it is of; and to the nodes
//! that a policy has chosen to hold a copy. A grant is given to a member that says that its registry has given it the
//! layer, as between nodes with a join secret: the controller knows who said so, and writes it down, but cannot see the
//! registry's answer. A node without a grant does without the controller's index: containerd pulls, or the node builds its own.

pub mod custody;
pub mod hub;
pub mod limits;
pub mod numbers;
pub mod review;

mod browsers;
mod connections;
mod nodes;
mod service;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hermes_controller_api::v1::{self, controller_server::ControllerServer};
use hermes_p2p::unix_now;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::Routes;

use crate::artifacts::Artifacts;
use crate::authority::{Authority, AuthorityError};
use crate::event::Event;
use crate::page::Page;
use browsers::Browsers;
use connections::Accepting;
pub(crate) use connections::Caller;
use custody::Custody;
use hub::Hub;
use limits::ApiLimits;
use nodes::Nodes;
use numbers::Numbers;
use review::Reviewer;
use service::{Calls, REQUEST_LEN_MAX_BYTES, Service};

/// How often members are told of, silence is noticed and keys are looked at.
const TICK: Duration = Duration::from_secs(1);
/// How often the authority is looked at, in ticks.
const ROTATE_TICKS: u64 = 600;
/// How often the API gets a new certificate, in ticks: each is good for a week.
const CERTIFICATE_TICKS: u64 = 24 * 3600;
/// How often a connection on which nothing passes is asked whether anybody is there.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(30);
/// How long the answer may take.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Most calls of one connection at once: a watch, and the artifacts of an image.
const CALLS_PER_CONNECTION: u32 = 64;
/// How much of requests is taken before it is read: the longest are records of starts.
const WINDOW_LEN_BYTES: u32 = 64 * 1024;

/// An API that cannot be.
#[derive(Debug, Error)]
pub enum ApiError {
    /// The address is taken, or not this host's.
    #[error("cannot listen for nodes on {address}: {source}; choose another address")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The authority failed.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

/// What an API is made of.
#[derive(Debug)]
pub struct ApiParts {
    /// Where nodes reach it.
    pub listen: SocketAddr,
    /// Who is who.
    pub custody: Arc<Custody>,
    /// Who may join.
    pub reviewer: Arc<dyn Reviewer>,
    /// What nodes are told.
    pub hub: Arc<Hub>,
    /// The indexes.
    pub artifacts: Artifacts,
    /// Where facts go: [`Event::Reported`], [`Event::Started`], [`Event::NodeSilent`].
    pub events: mpsc::Sender<Event>,
    /// What is counted.
    pub numbers: Arc<Numbers>,
    /// How much is allowed.
    pub limits: ApiLimits,
    /// The status page, served beside the calls; nobody sees any when absent.
    pub page: Option<Arc<Page>>,
}

/// A running API.
#[derive(Debug)]
pub struct Api {
    address: SocketAddr,
    cancel: CancellationToken,
    tasks: TaskTracker,
    drain: Duration,
}

impl Api {
    /// Listens, and answers from when this returns.
    ///
    /// # Errors
    /// When it cannot listen, or the authority gives no certificate.
    pub async fn start(parts: ApiParts) -> Result<Self, ApiError> {
        let failed = |source| ApiError::Listen { address: parts.listen, source };
        let listener = TcpListener::bind(parts.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        parts.custody.rotate().await?;
        let authority = parts.custody.current();
        let (tls, tls_changes) = watch::channel(authority.server_config(unix_now())?);
        parts.hub.set_trust(trust_of(&authority, &parts.hub));
        let (cancel, tasks) = (CancellationToken::new(), TaskTracker::new());
        let nodes = Arc::new(Nodes::new(parts.limits.clone(), Arc::clone(&parts.numbers)));
        let service = Service {
            custody: Arc::clone(&parts.custody),
            reviewer: parts.reviewer,
            hub: Arc::clone(&parts.hub),
            artifacts: parts.artifacts,
            events: parts.events.clone(),
            nodes: Arc::clone(&nodes),
            numbers: Arc::clone(&parts.numbers),
            reviews: Semaphore::new(parts.limits.reviews_max),
            limits: parts.limits.clone(),
            cancel: cancel.clone(),
        };
        let pages = parts.page.map(Page::routes);
        let accepting = Accepting {
            listener,
            tls: tls_changes,
            browsers: pages.clone().map(Browsers::new),
            limits: parts.limits.clone(),
            numbers: parts.numbers,
            cancel: cancel.clone(),
            tasks: tasks.clone(),
        };
        let calls = ControllerServer::new(Calls(Arc::new(service))).max_decoding_message_size(REQUEST_LEN_MAX_BYTES);
        let calls = Routes::new(calls).into_axum_router();
        let routes = pages.into_iter().fold(calls, axum::Router::merge);
        let served = tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .max_concurrent_streams(CALLS_PER_CONNECTION)
            .initial_stream_window_size(WINDOW_LEN_BYTES)
            .initial_connection_window_size(4 * WINDOW_LEN_BYTES)
            .http2_max_header_list_size(16 * 1024)
            .add_routes(Routes::from(routes))
            .serve_with_incoming_shutdown(accepting.start(), cancel.clone().cancelled_owned());
        tasks.spawn(async move {
            if let Err(error) = served.await {
                tracing::error!(%error, "the API for nodes has ended");
            }
        });
        let upkeep = Upkeep { custody: parts.custody, hub: parts.hub, nodes, events: parts.events, tls };
        let ended = cancel.clone();
        tasks.spawn(async move { ended.run_until_cancelled_owned(upkeep.run()).await });
        tasks.close();
        tracing::info!(%address, "nodes may join");
        Ok(Self { address, cancel, tasks, drain: parts.limits.drain })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends streams, so that nodes turn to another replica, and lets calls under way end. Nodes go on with what they know.
    pub async fn stop(self) {
        self.cancel.cancel();
        if tokio::time::timeout(self.drain, self.tasks.wait()).await.is_err() {
            tracing::warn!("calls of nodes did not end in time");
        }
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

/// What is done every second.
struct Upkeep {
    custody: Arc<Custody>,
    hub: Arc<Hub>,
    nodes: Arc<Nodes>,
    events: mpsc::Sender<Event>,
    tls: watch::Sender<Arc<rustls::ServerConfig>>,
}

impl Upkeep {
    async fn run(self) {
        let mut authority = self.custody.changes();
        let mut told = trust_of(&authority.borrow_and_update(), &self.hub);
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for tick in 1_u64.. {
            tokio::select! {
                _ = ticks.tick() => {}
                changed = authority.changed() => if changed.is_err() { return },
            }
            if tick.is_multiple_of(ROTATE_TICKS)
                && let Err(error) = self.custody.rotate().await
            {
                tracing::error!(%error, "the authority is not rotated");
            }
            authority.mark_unchanged();
            if tick.is_multiple_of(CERTIFICATE_TICKS) {
                self.show(&self.custody.current());
            }
            let trust = trust_of(&self.custody.current(), &self.hub);
            if trust != told {
                // A new root is told before anything that it has signed is shown.
                self.hub.set_trust(trust.clone());
                self.show(&self.custody.current());
                told = trust;
            }
            self.hub.tick();
            for (node, peer) in self.nodes.fallen_silent(Instant::now()) {
                self.hub.set_member(peer, None);
                if self.events.send(Event::NodeSilent(node)).await.is_err() {
                    return;
                }
            }
        }
    }

    fn show(&self, authority: &Authority) {
        match authority.server_config(unix_now()) {
            Ok(config) => drop(self.tls.send_replace(config)),
            Err(error) => tracing::error!(%error, "the API goes on with its last certificate"),
        }
    }
}

/// Whom nodes are to believe.
fn trust_of(authority: &Authority, hub: &Hub) -> v1::Trust {
    v1::Trust {
        roots: authority.roots().into_iter().map(Into::into).collect(),
        issuer_keys: authority.issuer_keys().iter().map(|key| key.to_bytes().to_vec().into()).collect(),
        index_keys: hub.keys().public_keys().iter().map(ToString::to_string).collect(),
        revocation: authority.revocation().map(|notice| notice.encode().into()).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests;
