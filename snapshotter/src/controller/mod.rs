//! The node's side of the controller: joins it, hears of images, members and keys, and tells what this node is and does.
//!
//! ```text
//!  controller --Watch--> known --+--> statements, for `artifacts`     (public images; private ones are asked for)
//!      ^  ^               | ^    +--> places of members, for the swarm's `Provider`
//!      |  |               v |    +--> whom to believe: roots, issuing keys, index keys, the revocation notice
//!      |  |              disk    +--> what this node is to hold
//!      |  +---- reports, records of starts
//!      +------- certificates and grants, for the swarm's `Issuer`
//! ```
//!
//! | module | what |
//! |---|---|
//! | `known` | what was told, as a value; its form on disk |
//! | `session` | one connection: join, watch, renew; and when to try the next |
//! | `ask` | questions that somebody waits for: an image, an artifact, grants |
//! | `issuer` | the swarm's issuer and provider, by what is known here |
//!
//! Nothing waits for the controller but what only it can say. When it is away, everything known stays in use, also after
//! a restart of the node: the file is written whole, a moment after something has changed, and checked by a hash. What it
//! says is taken because its certificate is of a root that this node believes: those of the settings, and from the first
//! join on those that the controller has named, over a connection that was believed. Indexes are taken by their
//! signatures all the same, so an image is never more than what a signing key has said of it.

mod ask;
mod issuer;
mod known;
mod session;

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use hermes_controller_api::v1;
use hermes_controller_api::v1::controller_client::ControllerClient;
use hermes_image::ids::Digest;
use hermes_image::statement::PublicKey;
use hermes_p2p::identity::{self, IdentityError};
use hermes_p2p::members::provider::Seed;
use hermes_p2p::{ClusterId, PeerId};
use parking_lot::{Mutex, RwLock};
use thiserror::Error;
use tokio::sync::{Notify, watch};
use tonic::transport::Channel;

use crate::config::{ConfigError, NodeConfig};
use known::Known;

pub(crate) use issuer::Places;
pub use known::Wanted;

/// File of what was told, below the state folder.
const STATE_FILE: &str = "controller-state";
/// Records of starts that wait to be sent. The oldest goes: newer ones say more.
const STARTS_MAX: usize = 16;

/// A controller that cannot be talked with at all.
#[derive(Debug, Error)]
pub enum ControllerError {
    /// The node's key.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// How the controller is reached, and as whom.
#[derive(Debug, Clone)]
struct Settings {
    /// `https://host:port` each.
    addresses: Vec<String>,
    ca: PathBuf,
    token: Option<PathBuf>,
    node: String,
    cluster: ClusterId,
    zone: String,
    state_path: PathBuf,
}

/// The controller, as this node has it.
#[derive(Debug)]
pub struct Controller {
    settings: Settings,
    peer: PeerId,
    /// PKCS #8 as PEM.
    key: zeroize::Zeroizing<String>,
    known: RwLock<Known>,
    /// Told whenever images have changed.
    images: watch::Sender<u64>,
    /// Where members may be.
    places: watch::Sender<Vec<Seed>>,
    /// The newest notice of who was taken out, as it was told.
    notice: watch::Sender<bytes::Bytes>,
    client: watch::Sender<Option<ControllerClient<Channel>>>,
    /// Where others reach this node.
    addresses: RwLock<Vec<String>>,
    starts: Mutex<VecDeque<(Digest, Vec<u8>)>>,
    starts_due: Notify,
    /// The certificate that is kept was not believed.
    distrusted: AtomicBool,
    /// Counts what is to be saved, and what was.
    changes: AtomicU64,
    runtime: tokio::runtime::Handle,
}

impl Controller {
    /// By the settings; `None` when they name no controller. Reads what an earlier daemon was told. Blocks on the disk; to be
    /// called within a runtime.
    ///
    /// # Errors
    /// When the node's key cannot be used.
    pub fn open(config: &NodeConfig) -> Result<Option<Arc<Self>>, ControllerError> {
        let Some((ca, node)) = config.controller_ca.clone().zip(config.node_name.clone()) else { return Ok(None) };
        if config.controller.is_empty() {
            return Ok(None);
        }
        let key = identity::load_or_create(&config.state.join("identity"))?;
        let malformed = || IdentityError::Malformed { path: config.state.join("identity") };
        let pkcs8 = zeroize::Zeroizing::new(identity::pkcs8(&key).ok_or_else(malformed)?);
        let settings = Settings {
            addresses: config.controller_addresses()?,
            ca,
            token: config.controller_token.clone(),
            node,
            cluster: config.cluster_id()?,
            zone: config.zone.clone(),
            state_path: config.state.join(STATE_FILE),
        };
        let known = Known::load(&settings.state_path).unwrap_or_else(|error| {
            tracing::warn!(%error, "what the controller had said is not used; it is asked for again");
            Known::default()
        });
        let places = known.places();
        let notice = known.notice();
        Ok(Some(Arc::new(Self {
            settings,
            peer: key.public().to_peer_id(),
            key: zeroize::Zeroizing::new(hermes_controller_api::pem("PRIVATE KEY", &pkcs8)),
            known: RwLock::new(known),
            images: watch::Sender::new(0),
            places: watch::Sender::new(places),
            notice: watch::Sender::new(notice),
            client: watch::Sender::new(None),
            addresses: RwLock::default(),
            starts: Mutex::default(),
            starts_due: Notify::new(),
            distrusted: AtomicBool::new(false),
            changes: AtomicU64::new(0),
            runtime: tokio::runtime::Handle::current(),
        })))
    }

    /// The name of this node in the cluster.
    pub fn node(&self) -> &str {
        &self.settings.node
    }

    /// Whether there is a connection that works.
    pub fn is_connected(&self) -> bool {
        self.client.borrow().is_some()
    }

    /// Tells when there is a connection, and when there is none any more.
    pub fn connections(&self) -> watch::Receiver<Option<ControllerClient<Channel>>> {
        self.client.subscribe()
    }

    /// Keys whose index statements the controller says are good.
    pub fn index_keys(&self) -> Vec<PublicKey> {
        self.known.read().index_keys()
    }

    /// What is known of the image `manifest`, private or not, if the controller has it.
    pub fn image(&self, manifest: Digest) -> Option<v1::Image> {
        self.known.read().image(manifest)
    }

    /// Tells whenever images have changed.
    pub fn image_changes(&self) -> watch::Receiver<u64> {
        self.images.subscribe()
    }

    /// What this node is to hold.
    pub fn wanted(&self) -> Vec<Wanted> {
        self.known.read().wanted(&self.settings.node)
    }

    /// The newest notice of who was taken out, encoded; empty while there is none.
    pub fn notices(&self) -> watch::Receiver<bytes::Bytes> {
        self.notice.subscribe()
    }

    /// Others reach this node there.
    pub fn set_addresses(&self, addresses: Vec<String>) {
        *self.addresses.write() = addresses;
    }

    /// A start of `manifest` has this record, encoded. Sent when there is a connection; the oldest of those that wait goes
    /// when there are too many.
    pub fn offer_start(&self, manifest: Digest, record: Vec<u8>) {
        if self.image(manifest).is_none() {
            return;
        }
        let mut starts = self.starts.lock();
        if starts.len() >= STARTS_MAX {
            starts.pop_front();
        }
        starts.push_back((manifest, record));
        drop(starts);
        self.starts_due.notify_one();
    }
}

#[cfg(test)]
mod tests;
