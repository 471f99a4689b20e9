//! Who may read which private layer.
//!
//! A grant names a peer, a layer and an end, signed by the cluster's issuer. The asker presents its own; whoever is
//! asked keeps what was presented until it ends, in a table with a bound. Which layers are private is not known here:
//! the caller asks only about those.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use hermes_image::ids::DiffId;
use libp2p::PeerId;
use parking_lot::Mutex;
use thiserror::Error;

use super::Admission;
use super::certificate::{CLOCK_SKEW_SECONDS, Trust};
use super::issuer::IssueError;
use super::signed::{Document, Signed};
use crate::canonical::{DecodeError, PeerKey, Reader, Writer};
use crate::config::ClusterId;

/// Longest encoded grant. One of this version has at most 210 bytes; the rest is for later ones.
pub const GRANT_LEN_MAX_BYTES: usize = 1024;
/// Most grants of others that are kept, about 8 MB of them.
const HELD_MAX: usize = 65_536;
/// Most of them of one peer: the layers of some hundred images.
const HELD_PER_PEER_MAX: usize = 4096;
/// Most grants of this node's own.
const OWN_MAX: usize = 16_384;

/// What a grant says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Where it is good.
    pub cluster: ClusterId,
    /// Who may read.
    pub peer: PeerId,
    /// The layer.
    pub layer: DiffId,
    /// Until when, in seconds since 1970.
    pub not_after: u64,
}

impl Document for Grant {
    const DOMAIN: &'static [u8] = b"hermes layer grant v1\0";
    const VERSION: u8 = 1;
    const LEN_MAX_BYTES: usize = GRANT_LEN_MAX_BYTES;

    fn cluster(&self) -> &ClusterId {
        &self.cluster
    }

    fn write(&self, out: &mut Writer) {
        out.short(&self.peer.to_bytes()).bytes(&self.layer.0).u64(self.not_after);
    }

    fn read(cluster: ClusterId, fields: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self { cluster, peer: fields.peer()?, layer: DiffId(fields.array()?), not_after: fields.u64()? })
    }
}

/// A grant and its issuer's signature.
pub type SignedGrant = Signed<Grant>;

impl Signed<Grant> {
    /// Whether it is good in `cluster` at `now` (seconds since 1970), for whomever it names.
    ///
    /// # Errors
    /// With the first reason why not.
    pub fn verify(&self, cluster: &ClusterId, trust: &Trust, now: u64) -> Result<(), GrantError> {
        if self.said.cluster != *cluster {
            return Err(GrantError::OtherCluster);
        }
        if now > self.said.not_after.saturating_add(CLOCK_SKEW_SECONDS) {
            return Err(GrantError::Expired);
        }
        if !self.is_by(trust) {
            return Err(GrantError::UnknownIssuer);
        }
        Ok(())
    }
}

/// A grant that was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum GrantError {
    /// It cannot be read.
    #[error("the grant cannot be read: {0}; run the same version on all nodes")]
    Decode(#[from] DecodeError),
    /// It is for another cluster.
    #[error("the grant is for another cluster; ask the issuer of this one")]
    OtherCluster,
    /// It names somebody else than the one who presents it.
    #[error("the grant names another peer than the one that presents it; present one of your own")]
    OtherPeer,
    /// Its time is over.
    #[error("the grant has ended; ask for a new one")]
    Expired,
    /// Nobody who is believed has signed it.
    #[error("nobody who is believed here has signed the grant; ask the issuer of this cluster")]
    UnknownIssuer,
    /// There is no issuer.
    #[error("this swarm is open and has no issuer, so nobody can be granted anything; start it with --join-secret")]
    Open,
    /// No room.
    #[error("{limit} grants are held already; wait until some end")]
    Full {
        /// How many there may be.
        limit: usize,
    },
}

impl GrantError {
    /// The label in metrics.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Decode(_) => "grant_malformed",
            Self::OtherCluster => "grant_other_cluster",
            Self::OtherPeer => "grant_other_peer",
            Self::Expired => "grant_expired",
            Self::UnknownIssuer => "grant_unknown_issuer",
            Self::Open => "grant_open_swarm",
            Self::Full { .. } => "grant_no_room",
        }
    }
}

#[derive(Debug, Default)]
struct Tables {
    /// Ends of the grants of others.
    held: BTreeMap<PeerKey, BTreeMap<DiffId, u64>>,
    held_count: usize,
    own: BTreeMap<DiffId, (u64, Bytes)>,
}

impl Tables {
    fn sweep(&mut self, now: u64) {
        let lives = |not_after: u64| now <= not_after.saturating_add(CLOCK_SKEW_SECONDS);
        self.held.retain(|_, layers| {
            layers.retain(|_, not_after| lives(*not_after));
            !layers.is_empty()
        });
        self.held_count = self.held.values().map(BTreeMap::len).sum();
        self.own.retain(|_, (not_after, _)| lives(*not_after));
    }
}

/// The grants that others have presented, and this node's own.
#[derive(Debug)]
pub struct Grants {
    admission: std::sync::Arc<Admission>,
    tables: Mutex<Tables>,
}

impl Grants {
    pub(crate) fn new(admission: std::sync::Arc<Admission>) -> Self {
        Self { admission, tables: Mutex::default() }
    }

    /// `from` presents a grant of its own. Verifies a signature: some 50 µs.
    ///
    /// # Errors
    /// When the grant is not good here and now for `from`, or there is no room for it.
    pub fn present(&self, from: &PeerId, bytes: &[u8]) -> Result<Grant, GrantError> {
        self.present_at(from, bytes, crate::canonical::unix_now())
    }

    fn present_at(&self, from: &PeerId, bytes: &[u8], now: u64) -> Result<Grant, GrantError> {
        let grant = self.verified(from, bytes, now)?;
        let key = PeerKey::of(from).ok_or(GrantError::OtherPeer)?;
        let mut tables = self.tables.lock();
        let of_peer = |tables: &Tables| tables.held.get(&key).map_or(0, BTreeMap::len);
        let known = tables.held.get(&key).is_some_and(|layers| layers.contains_key(&grant.layer));
        if !known && (tables.held_count >= HELD_MAX || of_peer(&tables) >= HELD_PER_PEER_MAX) {
            tables.sweep(now);
        }
        if !known && of_peer(&tables) >= HELD_PER_PEER_MAX {
            return Err(GrantError::Full { limit: HELD_PER_PEER_MAX });
        }
        if !known && tables.held_count >= HELD_MAX {
            return Err(GrantError::Full { limit: HELD_MAX });
        }
        tables.held_count += usize::from(!known);
        // The one that lasts longest counts.
        let end = tables.held.entry(key).or_default().entry(grant.layer).or_default();
        *end = grant.not_after.max(*end);
        Ok(grant)
    }

    fn verified(&self, from: &PeerId, bytes: &[u8], now: u64) -> Result<Grant, GrantError> {
        let signed = SignedGrant::decode(bytes)?;
        if signed.said.peer != *from {
            return Err(GrantError::OtherPeer);
        }
        let trust = self.admission.trust().ok_or(GrantError::Open)?;
        signed.verify(self.admission.cluster(), &trust, now)?;
        Ok(signed.said)
    }

    /// Whether `peer` has presented a grant for `layer` that is good now.
    pub fn allows(&self, peer: &PeerId, layer: DiffId) -> bool {
        self.allows_at(peer, layer, crate::canonical::unix_now())
    }

    fn allows_at(&self, peer: &PeerId, layer: DiffId, now: u64) -> bool {
        let Some(key) = PeerKey::of(peer) else { return false };
        let end = self.tables.lock().held.get(&key).and_then(|layers| layers.get(&layer).copied());
        end.is_some_and(|not_after| now <= not_after.saturating_add(CLOCK_SKEW_SECONDS))
    }

    /// Keeps a grant of this node's own (`local`), to be presented to others.
    ///
    /// # Errors
    /// When the grant is not good here and now for this node, or there is no room for it.
    pub fn keep_own(&self, local: &PeerId, bytes: &[u8]) -> Result<Grant, GrantError> {
        let now = crate::canonical::unix_now();
        let grant = self.verified(local, bytes, now)?;
        let mut tables = self.tables.lock();
        if tables.own.len() >= OWN_MAX {
            tables.sweep(now);
        }
        if tables.own.len() >= OWN_MAX && !tables.own.contains_key(&grant.layer) {
            return Err(GrantError::Full { limit: OWN_MAX });
        }
        let kept = tables.own.get(&grant.layer).is_some_and(|(end, _)| *end >= grant.not_after);
        if !kept {
            tables.own.insert(grant.layer, (grant.not_after, Bytes::copy_from_slice(bytes)));
        }
        Ok(grant)
    }

    /// This node's own grant for `layer`, encoded, if it has one that is good now.
    pub fn own(&self, layer: DiffId) -> Option<Bytes> {
        self.own_with_end(layer).map(|(_, bytes)| bytes)
    }

    /// The same with its end, in seconds since 1970.
    pub fn own_with_end(&self, layer: DiffId) -> Option<(u64, Bytes)> {
        let now = crate::canonical::unix_now();
        self.tables.lock().own.get(&layer).filter(|(not_after, _)| now <= *not_after).cloned()
    }

    /// Has `layers` granted to this node (`local`) for `life` and keeps the grants. In an open swarm there is nothing to
    /// be granted. Blocks as the issuer does.
    pub(crate) fn issue_own(&self, local: &PeerId, layers: &[DiffId], life: Duration) -> Result<(), IssueError> {
        for granted in self.admission.grant(*local, layers, life)? {
            let kept = self.keep_own(local, &granted.encode());
            kept.map_err(|error| IssueError::Failed { reason: error.to_string() })?;
        }
        Ok(())
    }

    /// Whether everybody may read everything here: an open swarm grants nothing.
    pub fn is_open(&self) -> bool {
        self.admission.is_open()
    }

    /// Forgets what has ended at `now` (seconds since 1970).
    pub(crate) fn sweep(&self, now: u64) {
        self.tables.lock().sweep(now);
    }

    /// Forgets what `peer` has presented: it was taken back.
    pub(crate) fn forget_peer(&self, peer: &PeerId) {
        let mut tables = self.tables.lock();
        if let Some(layers) = PeerKey::of(peer).and_then(|key| tables.held.remove(&key)) {
            tables.held_count -= layers.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use libp2p::identity::{Keypair, ed25519};
    use proptest::prelude::*;

    use super::super::issuer::Issuer;
    use super::super::join_secret::JoinSecret;
    use super::*;

    const NOW: u64 = 1_700_000_000;

    fn peer() -> PeerId {
        Keypair::generate_ed25519().public().to_peer_id()
    }

    fn issuer() -> Arc<JoinSecret> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("secret");
        std::fs::write(&path, "s".repeat(40)).expect("writes");
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("protects");
        Arc::new(JoinSecret::load(&path, &cluster()).expect("loads"))
    }

    fn cluster() -> ClusterId {
        "prod".parse().expect("a cluster id")
    }

    fn granted(issuer: &dyn Issuer, peer: PeerId, layer: DiffId) -> Vec<u8> {
        issuer.grant(&cluster(), peer, layer, NOW, Duration::from_secs(600)).expect("granted").encode()
    }

    #[test]
    fn a_grant_lets_its_peer_read_its_layer_until_it_ends() {
        let issuer = issuer();
        let grants = Grants::new(Arc::new(Admission::new(cluster(), Some(issuer.clone()))));
        let (one, two, layer) = (peer(), peer(), DiffId([7; 32]));
        let bytes = granted(&*issuer, one, layer);
        assert!(bytes.len() <= GRANT_LEN_MAX_BYTES);
        assert!(!grants.allows_at(&one, layer, NOW), "allowed before anything was presented");
        assert_eq!(grants.present_at(&two, &bytes, NOW), Err(GrantError::OtherPeer), "somebody else's was taken");
        assert_eq!(grants.present_at(&one, &bytes, NOW + 661), Err(GrantError::Expired));
        assert_eq!(grants.present_at(&one, &bytes, NOW).expect("taken").layer, layer);
        assert!(grants.allows_at(&one, layer, NOW) && grants.allows_at(&one, layer, NOW + 660));
        assert!(!grants.allows_at(&one, layer, NOW + 661), "allowed after its end");
        assert!(!grants.allows_at(&two, layer, NOW) && !grants.allows_at(&one, DiffId([8; 32]), NOW));
        grants.sweep(NOW + 661);
        assert_eq!(grants.tables.lock().held_count, 0);
    }

    #[test]
    fn grants_of_strangers_and_of_open_swarms_are_refused() {
        let (ours, theirs) = (issuer(), ed25519::Keypair::generate());
        let admission = Arc::new(Admission::new(cluster(), Some(ours)));
        let grants = Grants::new(admission);
        let (one, layer) = (peer(), DiffId([7; 32]));
        let forged = Grant { cluster: cluster(), peer: one, layer, not_after: u64::MAX }.sign(&theirs).encode();
        assert_eq!(grants.present_at(&one, &forged, NOW), Err(GrantError::UnknownIssuer));
        let open = Grants::new(Arc::new(Admission::new(cluster(), None)));
        assert_eq!(open.present_at(&one, &forged, NOW), Err(GrantError::Open));
    }

    #[test]
    fn one_peer_cannot_fill_the_table() {
        let issuer = issuer();
        let grants = Grants::new(Arc::new(Admission::new(cluster(), Some(issuer.clone()))));
        let (one, two) = (peer(), peer());
        let key = PeerKey::of(&one).expect("an Ed25519 peer");
        {
            let mut tables = grants.tables.lock();
            let layer = |no: usize| DiffId(*blake3::hash(&no.to_le_bytes()).as_bytes());
            tables.held.insert(key, (0..HELD_PER_PEER_MAX).map(|no| (layer(no), NOW + 600)).collect());
            tables.held_count = HELD_PER_PEER_MAX;
        }
        let layer = DiffId([7; 32]);
        let full = Err(GrantError::Full { limit: HELD_PER_PEER_MAX });
        assert_eq!(grants.present_at(&one, &granted(&*issuer, one, layer), NOW), full);
        assert!(grants.present_at(&two, &granted(&*issuer, two, layer), NOW).is_ok());
        grants.forget_peer(&one);
        assert_eq!(grants.tables.lock().held_count, 1);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(read) = SignedGrant::decode(&bytes) {
                prop_assert_eq!(read.encode(), bytes);
            }
        }

        #[test]
        fn no_byte_of_a_grant_can_change(at in 0_usize..500, flip in 1_u8..) {
            let issuer = issuer();
            let (one, layer) = (peer(), DiffId([7; 32]));
            let mut bytes = granted(&*issuer, one, layer);
            let at = at % bytes.len();
            bytes[at] ^= flip;
            let good = SignedGrant::decode(&bytes).is_ok_and(|read| read.verify(&cluster(), &issuer.trust(), NOW).is_ok());
            prop_assert!(!good);
        }
    }
}
