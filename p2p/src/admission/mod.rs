//! Who may talk with this node at all.
//!
//! ```text
//!  TCP --> Noise (proves the PeerId) --> certificates, both ways --> yamux --> DHT, exchange, members
//!                                          | refused: one byte why, closed
//! ```
//!
//! A node of a closed swarm has an [`Issuer`], shows a certificate over its `PeerId`, and lets in whoever shows one that
//! it believes. The exchange happens inside the authenticated upgrade of a connection ([`upgrade`]), so a stranger reaches
//! no multiplexer and no protocol. A node without an issuer shows and asks for none; the configuration sees to it that
//! such a node listens on loopback alone, or was told to be open.
//!
//! Certificates live for an hour and travel with the member entries (`members`) when they are renewed. This module keeps,
//! in memory, until when each admitted peer may stay; what has ended is closed by the membership task. The newest notice
//! of what was taken back ([`revocation`]) is kept on disk with the member list.

pub mod certificate;
pub mod grants;
pub mod issuer;
pub mod issuing;
pub mod join_secret;
pub mod refusal;
pub mod revocation;
pub mod signed;
pub mod upgrade;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hermes_image::ids::DiffId;
use libp2p::PeerId;
use parking_lot::{Mutex, RwLock};

use crate::canonical::unix_now;
use crate::config::ClusterId;
use certificate::{CLOCK_SKEW_SECONDS, SignedCertificate, Trust};
use grants::SignedGrant;
use issuer::{CertificateRequest, IssueError, Issuer};
use refusal::{Refusal, Refusals};
use revocation::{Revocation, SignedRevocation};

/// Most peers of which the end of the certificate is remembered: the largest member list and as many that come and go.
const ADMITTED_MAX: usize = 20_000;

/// What this node shows, whom it believes, and whom it has let in.
#[derive(Debug)]
pub struct Admission {
    cluster: ClusterId,
    issuer: Option<Arc<dyn Issuer>>,
    own: RwLock<Option<Arc<SignedCertificate>>>,
    revocation: RwLock<Option<Arc<SignedRevocation>>>,
    /// Until when the peers seen last may stay, in seconds since 1970.
    admitted: Mutex<HashMap<PeerId, u64>>,
    refusals: Refusals,
}

impl Admission {
    /// Of a node of `cluster`: closed with an issuer, open to everybody without one.
    pub fn new(cluster: ClusterId, issuer: Option<Arc<dyn Issuer>>) -> Self {
        Self {
            cluster,
            issuer,
            own: RwLock::default(),
            revocation: RwLock::default(),
            admitted: Mutex::default(),
            refusals: Refusals::default(),
        }
    }

    /// Whether everybody may talk.
    pub fn is_open(&self) -> bool {
        self.issuer.is_none()
    }

    pub(crate) fn cluster(&self) -> &ClusterId {
        &self.cluster
    }

    /// Whose signatures are believed now; `None` in an open swarm.
    pub(crate) fn trust(&self) -> Option<Trust> {
        self.issuer.as_ref().map(|issuer| issuer.trust())
    }

    /// The certificate that this node shows.
    pub(crate) fn own(&self) -> Option<Arc<SignedCertificate>> {
        self.own.read().clone()
    }

    /// The newest notice of what was taken back.
    pub(crate) fn revocation(&self) -> Option<Arc<SignedRevocation>> {
        self.revocation.read().clone()
    }

    /// Gets a certificate for this node and shows it from now on. Blocks as the issuer does.
    ///
    /// # Errors
    /// When the issuer did not issue.
    pub(crate) fn renew(&self, peer: PeerId, zone: certificate::Zone) -> Result<(), IssueError> {
        let Some(issuer) = &self.issuer else { return Ok(()) };
        let revoked_below = self.revocation().map_or(0, |notice| notice.said.epoch_min);
        let epoch_min = issuer.trust().epoch_min.max(revoked_below);
        let request = CertificateRequest { cluster: self.cluster.clone(), peer, zone, epoch_min, now: unix_now() };
        let certificate = issuer.issue(&request)?;
        *self.own.write() = Some(Arc::new(certificate));
        Ok(())
    }

    /// Has `layers` granted to `peer`, this node; none in an open swarm. Blocks as the issuer does.
    ///
    /// # Errors
    /// When the issuer did not issue.
    pub(crate) fn grant(
        &self,
        peer: PeerId,
        layers: &[DiffId],
        life: Duration,
    ) -> Result<Vec<SignedGrant>, IssueError> {
        let Some(issuer) = &self.issuer else { return Ok(Vec::new()) };
        issuer.grant_all(&self.cluster, peer, layers, unix_now(), life)
    }

    /// Whether `peer` may talk by what it shows; remembers until when. `None` shows nothing.
    ///
    /// # Errors
    /// With the reason why not. Nothing is counted here.
    pub(crate) fn check(&self, peer: &PeerId, shown: Option<&SignedCertificate>, now: u64) -> Result<(), Refusal> {
        let Some(trust) = self.trust() else { return Ok(()) };
        let shown = shown.ok_or(Refusal::NoCertificate)?;
        let notice = self.revocation();
        let notice = notice.as_deref().map(SignedRevocation::said);
        shown.check(&self.cluster, peer, &trust, notice, now)?;
        self.remember(*peer, shown.said.not_after, now);
        Ok(())
    }

    fn remember(&self, peer: PeerId, not_after: u64, now: u64) {
        let mut admitted = self.admitted.lock();
        if admitted.len() >= ADMITTED_MAX && !admitted.contains_key(&peer) {
            admitted.retain(|_, end| now <= end.saturating_add(CLOCK_SKEW_SECONDS));
        }
        if admitted.len() >= ADMITTED_MAX && !admitted.contains_key(&peer) {
            // Whoever is forgotten is asked for its certificate again, with a new connection.
            let first = admitted.iter().min_by_key(|(_, end)| **end).map(|(peer, _)| *peer);
            first.map(|first| admitted.remove(&first));
        }
        let end = admitted.entry(peer).or_default();
        *end = not_after.max(*end);
    }

    /// Why `peer`, which was let in, may not stay; `None` while it may.
    pub(crate) fn must_go(&self, peer: &PeerId, now: u64) -> Option<Refusal> {
        if self.is_open() {
            return None;
        }
        if self.revocation().is_some_and(|notice| notice.said.names(peer)) {
            return Some(Refusal::Revoked);
        }
        let end = self.admitted.lock().get(peer).copied();
        match end {
            Some(end) if now <= end.saturating_add(CLOCK_SKEW_SECONDS) => None,
            _ => Some(Refusal::Expired),
        }
    }

    /// Whether this node's certificate is of an epoch that is not believed any more.
    pub(crate) fn is_outdated(&self) -> bool {
        let epoch_min = self.revocation().map_or(0, |notice| notice.said.epoch_min);
        self.own().is_some_and(|own| own.said.epoch < epoch_min)
    }

    /// Until when `peer` may stay without renewal, in seconds since 1970.
    pub fn admitted_until(&self, peer: &PeerId) -> Option<u64> {
        self.admitted.lock().get(peer).copied()
    }

    /// Takes a notice if it is newer than the one that is known and its issuer is believed. True when it was.
    pub(crate) fn take_revocation(&self, notice: SignedRevocation) -> bool {
        let Some(trust) = self.trust() else { return false };
        let is_newer = |known: &Option<Arc<SignedRevocation>>| {
            known.as_ref().is_none_or(|known| known.said.number < notice.said.number)
        };
        if !is_newer(&self.revocation.read()) || !notice.is_for(&self.cluster, &trust) {
            return false;
        }
        let mut known = self.revocation.write();
        let taken = is_newer(&known);
        if taken {
            *known = Some(Arc::new(notice));
        }
        taken
    }

    /// Takes `peer`'s certificates back. Blocks as the issuer does.
    ///
    /// # Errors
    /// When this swarm is open, the peer can have no certificate, the notice is full, or the issuer does not sign.
    pub(crate) fn revoke(&self, peer: &PeerId) -> Result<(), IssueError> {
        let Some(issuer) = &self.issuer else {
            return Err(IssueError::Failed {
                reason: "the swarm is open, so there is nothing to take back; start all nodes with --join-secret"
                    .into(),
            });
        };
        let last = self.revocation();
        let last = last.as_deref().map(SignedRevocation::said);
        let notice = Revocation::with(&self.cluster, last, peer, unix_now().saturating_mul(1000));
        let notice = notice.ok_or_else(|| IssueError::Failed {
            reason: format!(
                "{peer} is no node, or {} nodes are revoked already; change the join secret on all nodes that stay",
                revocation::REVOKED_MAX
            ),
        })?;
        self.take_revocation(issuer.revoke(notice)?);
        Ok(())
    }

    /// Counts that this node has refused `peer`, and logs it unless it did so within the last minute.
    pub(crate) fn refused(&self, peer: PeerId, refusal: Refusal) {
        if self.refusals.count(peer, refusal, Instant::now()) {
            tracing::warn!(%peer, reason = refusal.name(), "peer is refused: {refusal}");
        }
    }

    /// Logs that `peer` has refused this node, at most once a minute.
    pub(crate) fn refused_by(&self, peer: PeerId, refusal: Option<Refusal>) {
        if self.refusals.may_log(peer, Instant::now()) {
            let reason = refusal.map_or("unknown", Refusal::name);
            let advice = refusal.map_or(upgrade::UNKNOWN_REFUSAL, Refusal::advice);
            tracing::warn!(%peer, reason, "a peer refuses this node: {advice}");
        }
    }

    /// How often this node has refused anybody since it started, by reason.
    pub fn refusals(&self) -> Vec<(Refusal, u64)> {
        self.refusals.counts()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use libp2p::identity::Keypair;

    use super::certificate::Zone;
    use super::join_secret::JoinSecret;
    use super::signed::Document as _;
    use super::*;

    fn peer() -> PeerId {
        Keypair::generate_ed25519().public().to_peer_id()
    }

    fn cluster() -> ClusterId {
        "prod".parse().expect("a cluster id")
    }

    fn issuer() -> Arc<JoinSecret> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("secret");
        std::fs::write(&path, "s".repeat(40)).expect("writes");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("protects");
        Arc::new(JoinSecret::load(&path, &cluster()).expect("loads"))
    }

    #[test]
    fn the_newest_notice_counts_and_a_raised_epoch_asks_for_a_new_certificate() {
        let issuer = issuer();
        let admission = Admission::new(cluster(), Some(issuer.clone()));
        let (local, other, now) = (peer(), peer(), unix_now());
        admission.renew(local, Zone::default()).expect("issued");
        let old = admission.own().expect("issued");
        assert!(admission.check(&local, Some(&old), now).is_ok() && !admission.is_outdated());

        let first = Revocation::with(&cluster(), None, &other, 1).expect("made");
        let second = Revocation { number: 2, epoch_min: 7, ..first.clone() };
        let forged = Revocation { number: 9, ..first.clone() }.sign(&libp2p::identity::ed25519::Keypair::generate());
        assert!(!admission.take_revocation(forged), "a stranger's notice was taken");
        assert!(admission.take_revocation(issuer.revoke(second).expect("signed")));
        assert!(!admission.take_revocation(issuer.revoke(first).expect("signed")), "an older notice was taken");
        assert_eq!(admission.check(&local, Some(&old), now), Err(Refusal::Revoked));
        assert!(admission.is_outdated());
        admission.renew(local, Zone::default()).expect("issued");
        assert!(!admission.is_outdated());
        assert!(admission.check(&local, admission.own().as_deref(), now).is_ok());
    }

    #[test]
    fn who_was_let_in_may_stay_until_the_certificate_ends() {
        let issuer = issuer();
        let admission = Admission::new(cluster(), Some(issuer.clone()));
        let (other, now) = (peer(), unix_now());
        let request = CertificateRequest { cluster: cluster(), peer: other, zone: Zone::default(), epoch_min: 0, now };
        let shown = issuer.issue(&request).expect("issued");
        assert_eq!(admission.must_go(&other, now), Some(Refusal::Expired), "somebody unknown may stay");
        admission.check(&other, Some(&shown), now).expect("let in");
        assert_eq!(admission.must_go(&other, now + 3660), None);
        assert_eq!(admission.must_go(&other, now + 3661), Some(Refusal::Expired));
        let renewed = issuer.issue(&CertificateRequest { now: now + 1800, ..request }).expect("issued");
        admission.check(&other, Some(&renewed), now + 1800).expect("renewed");
        assert_eq!(admission.must_go(&other, now + 3661), None);
        admission.revoke(&other).expect("revokes");
        assert_eq!(admission.must_go(&other, now), Some(Refusal::Revoked));
        assert_eq!(Admission::new(cluster(), None).must_go(&other, now), None);
    }

    #[test]
    fn the_number_of_admitted_peers_is_bounded() {
        let admission = Admission::new(cluster(), Some(issuer()));
        let first = PeerId::random();
        admission.remember(first, 100, 0);
        for no in 0..ADMITTED_MAX as u64 {
            admission.remember(PeerId::random(), 1000 + no, 0);
        }
        assert_eq!(admission.admitted.lock().len(), ADMITTED_MAX);
        assert_eq!(admission.admitted_until(&first), None, "the one that ends first stayed");
    }
}
