//! Which of this node's grants each peer has seen.
//!
//! A grant is shown once for each connection and layer, when the peer has denied something: public layers cost nothing.
//! What was shown is forgotten with the connection, because the peer may have been started anew. A grant that was renewed
//! is another one. Bounded by the grants of this node times the peers that it is connected with.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use hermes_image::ids::DiffId;
use libp2p::PeerId;
use parking_lot::Mutex;

use crate::admission::grants::Grants;

/// This node's own grants, and what it has shown of them.
pub(crate) struct Proofs {
    grants: Arc<Grants>,
    /// Ends of the grants that were shown, in seconds since 1970.
    shown: Mutex<HashMap<PeerId, BTreeMap<DiffId, u64>>>,
}

impl Proofs {
    pub(crate) fn new(grants: Arc<Grants>) -> Self {
        Self { grants, shown: Mutex::default() }
    }

    /// The end of the grant for `layer` that `peer` has taken last.
    pub(crate) fn shown(&self, peer: &PeerId, layer: DiffId) -> Option<u64> {
        self.shown.lock().get(peer).and_then(|layers| layers.get(&layer).copied())
    }

    /// This node's grant for `layer` with its end, unless it is the one that ends at `shown`.
    pub(crate) fn unshown(&self, layer: DiffId, shown: Option<u64>) -> Option<(u64, Bytes)> {
        let own = self.grants.own_with_end(layer)?;
        (Some(own.0) != shown).then_some(own)
    }

    /// `peer` has taken the grant for `layer` that ends at `not_after`.
    pub(crate) fn note(&self, peer: PeerId, layer: DiffId, not_after: u64) {
        self.shown.lock().entry(peer).or_default().insert(layer, not_after);
    }

    /// The connection with `peer` has ended.
    pub(crate) fn forget(&self, peer: &PeerId) {
        self.shown.lock().remove(peer);
    }

    /// Connections have ended, and it is not known which.
    pub(crate) fn forget_all(&self) {
        self.shown.lock().clear();
    }
}
