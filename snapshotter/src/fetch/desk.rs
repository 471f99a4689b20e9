//! What other nodes ask this one for, on its way to the policy.
//!
//! The exchange server hands over claims before there is a driver, so they go through a channel. A claim that finds it full
//! is left to the server, which then gives what is here.

use std::sync::Arc;

use hermes_image::ids::{ArtifactId, DiffId, Digest};
use hermes_p2p::{Claim, Desk, PeerId, Ruling};
use tokio::sync::mpsc;

use crate::privacy::Privacy;

/// Claims on their way to the driver.
const CLAIMS_MAX: usize = 256;
/// Rulings on their way to one claimant. Policy makes a few for each claim; what is above is lost, and the claimant asks
/// somebody else when it gets nothing.
const RULINGS_MAX: usize = 32;

/// A claim, and where its rulings go.
#[derive(Debug)]
pub struct Claimed {
    pub(super) claim: Claim,
    pub(super) rulings: mpsc::Sender<Ruling>,
}

/// Where claims come out.
pub type Claims = mpsc::Receiver<Claimed>;

/// The end of the channel that the exchange server has.
#[derive(Debug)]
pub struct FetchDesk {
    claims: mpsc::Sender<Claimed>,
    privacy: Arc<Privacy>,
}

/// Both ends of the channel. `privacy` says who may ask for what.
pub fn desk(privacy: Arc<Privacy>) -> (Arc<FetchDesk>, Claims) {
    let (claims, queue) = mpsc::channel(CLAIMS_MAX);
    (Arc::new(FetchDesk { claims, privacy }), queue)
}

impl Desk for FetchDesk {
    fn claim(&self, claim: Claim) -> mpsc::Receiver<Ruling> {
        let (rulings, receiver) = mpsc::channel(RULINGS_MAX);
        // When the queue is full the sender is dropped here, which leaves the claim to the server.
        let _ = self.claims.try_send(Claimed { claim, rulings });
        receiver
    }

    fn allows(&self, peer: PeerId, layer: DiffId) -> bool {
        self.privacy.allows_layer(peer, layer)
    }

    fn allows_artifact(&self, peer: PeerId, id: ArtifactId) -> bool {
        self.privacy.allows_artifact(peer, id)
    }

    fn allows_statement(&self, peer: PeerId, manifest: Digest) -> bool {
        self.privacy.allows_statement(peer, manifest)
    }

    fn grant(&self, peer: PeerId, grant: &[u8]) -> bool {
        self.privacy.present(peer, grant)
    }
}
