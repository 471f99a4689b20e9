//! Who is who: the controller's own certificate authority, and the issuing key of the swarm.
//!
//! ```text
//!  generation = { root (X.509, P-256), issuing key of the swarm (Ed25519) }
//!
//!  made ------- OVERLAP -------> issues ------------------------------------> a newer one issues -- OVERLAP --> dropped
//!  (believed by everybody who hears of it)                                    (still believed)
//! ```
//!
//! A generation is made and told to nodes before anything is issued by it, and believed until everything that was issued
//! by the one before has ended. So it is replaced while every connection goes on. An [`Authority`] is a value: what
//! changes it makes a new one, which its owner first makes durable (one document, whole or not at all) and then uses.
//! A crash between the two leaves the old one, and nothing that was signed by what is lost.
//!
//! What it issues is short: certificates of nodes for a day, those of the swarm for an hour, the server's own for a week.
//! It keeps no list of what it issued; a member is taken out by the swarm's revocation notice, which names its key, and the
//! same notice closes this API to it.

mod document;
pub mod folder;
mod generation;
pub mod identity;
mod tls;

use std::time::Duration;

use hermes_image::ids::DiffId;
use hermes_p2p::admission::certificate::{CERTIFICATE_LIFE, SignedCertificate, Trust};
use hermes_p2p::admission::grants::SignedGrant;
use hermes_p2p::admission::issuer::CertificateRequest;
use hermes_p2p::admission::revocation::{REVOKED_MAX, Revocation, SignedRevocation};
use hermes_p2p::{ClusterId, PeerId, PeerKey, Zone};
use thiserror::Error;

use generation::Generation;

/// How long a node's certificate for this API is good, unless it is renewed before. A node renews at half of it.
pub const NODE_CERTIFICATE_LIFE: Duration = Duration::from_secs(24 * 3600);
/// How long the certificate is good that this API shows.
pub const SERVER_CERTIFICATE_LIFE: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a generation is known before it issues, and believed after it has: twice the longest life that nodes' certificates have.
pub const OVERLAP: Duration = Duration::from_secs(48 * 3600);
/// How old a generation becomes before the next one is made.
pub const ROTATE_EVERY: Duration = Duration::from_secs(90 * 24 * 3600);

/// An authority that cannot do what was asked.
#[derive(Debug, Error)]
pub enum AuthorityError {
    /// The document is none.
    #[error(
        "the authority's document cannot be used: {reason}; restore it from a backup, or remove it and let all nodes join anew"
    )]
    Document {
        /// What is wrong with it.
        reason: String,
    },
    /// Of another cluster.
    #[error(
        "the authority's document is of cluster '{found}', and this is '{expected}'; give each cluster a folder of its own"
    )]
    OtherCluster {
        /// The cluster that it should be of.
        expected: String,
        /// The cluster that it is of.
        found: String,
    },
    /// The file failed.
    #[error("cannot {doing} {path}: {source}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: std::path::PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// Others may read the file.
    #[error(
        "{path} has mode {mode:04o}, so others can read the cluster's keys; chmod 600 it, and remove it if they did"
    )]
    Exposed {
        /// The file.
        path: std::path::PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The X.509 library refused.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// The TLS library refused.
    #[error("cannot set TLS up: {0}")]
    Tls(String),
    /// A name that is none.
    #[error("'{name}' is no name of a node; use 1 to 253 lower-case letters, digits, '-' and '.'")]
    NodeName {
        /// What was given.
        name: String,
    },
    /// A name without an Ed25519 key.
    #[error("{peer} has no Ed25519 key and can be no node")]
    Peer {
        /// The name.
        peer: PeerId,
    },
    /// The notice has no room.
    #[error(
        "{REVOKED_MAX} nodes are revoked already; renew the authority, so that only nodes that join anew are members"
    )]
    RevocationFull,
}

/// A cluster's certificate authority and issuer.
#[derive(Debug, Clone)]
pub struct Authority {
    cluster: ClusterId,
    /// The oldest first; at least one.
    generations: Vec<Generation>,
    revocation: Option<SignedRevocation>,
}

impl Authority {
    /// A new one for `cluster`, at `now` (seconds since 1970).
    ///
    /// # Errors
    /// When the X.509 library fails.
    pub fn create(cluster: ClusterId, now: u64) -> Result<Self, AuthorityError> {
        let first = Generation::create(&cluster, 1, now)?;
        Ok(Self { cluster, generations: vec![first], revocation: None })
    }

    /// The swarm that it issues for.
    pub fn cluster(&self) -> &ClusterId {
        &self.cluster
    }

    /// The generation that issues at `now`: the newest that everybody has had time to hear of.
    fn issuing(&self, now: u64) -> &Generation {
        let known = self.generations.iter().rev().find(|generation| generation.issues_from() <= now);
        known.or(self.generations.first()).expect("an authority has a generation")
    }

    /// What it has to become by `now`: with a further generation, or without one that is over. `None` when nothing is due.
    ///
    /// # Errors
    /// When the X.509 library fails.
    pub fn rotated(&self, now: u64) -> Result<Option<Self>, AuthorityError> {
        let newest = self.generations.last().expect("an authority has a generation");
        if newest.made_at.saturating_add(ROTATE_EVERY.as_secs()) <= now {
            return self.renewed(now).map(Some);
        }
        let issuing = self.issuing(now);
        let over = issuing.issues_from().saturating_add(OVERLAP.as_secs()) <= now;
        if !over || self.generations[0].number == issuing.number {
            return Ok(None);
        }
        let first = issuing.number;
        let mut next = self.clone();
        next.generations.retain(|generation| generation.number >= first);
        next.sign_revocation_again(now);
        Ok(Some(next))
    }

    /// The same with a new generation, made at `now`, which issues after [`OVERLAP`].
    ///
    /// # Errors
    /// When the X.509 library fails.
    pub fn renewed(&self, now: u64) -> Result<Self, AuthorityError> {
        let mut next = self.clone();
        let newest = next.generations.last().expect("an authority has a generation");
        next.generations.push(Generation::create(&self.cluster, newest.number + 1, now)?);
        Ok(next)
    }

    /// A notice outlives the key that has signed it.
    fn sign_revocation_again(&mut self, now: u64) {
        if let Some(notice) = &self.revocation {
            let mut said = notice.said().clone();
            said.number = said.number.saturating_add(1);
            self.revocation = Some(self.issuing(now).issuer().revocation(said));
        }
    }

    /// The roots that nodes believe, X.509 in DER, the oldest first.
    pub fn roots(&self) -> Vec<Vec<u8>> {
        self.generations.iter().map(|generation| generation.root().to_vec()).collect()
    }

    /// The same as PEM: what nodes are given to believe this controller by (`--controller-ca`).
    pub fn roots_pem(&self) -> String {
        self.generations.iter().map(Generation::root_pem).collect()
    }

    /// Whose signatures the swarm believes.
    pub fn trust(&self) -> Trust {
        Trust { keys: self.issuer_keys(), epoch_min: 0 }
    }

    /// The keys of [`Self::trust`].
    pub fn issuer_keys(&self) -> Vec<PeerKey> {
        self.generations.iter().map(|generation| generation.issuer().public()).collect()
    }

    /// A certificate by which `peer` speaks as `node` to this API, X.509 in DER, good for [`NODE_CERTIFICATE_LIFE`] from `now`.
    ///
    /// Whoever shows it has to hold the key that the `PeerId` is made of, so it is of no use to anybody else.
    ///
    /// # Errors
    /// When the name is none, the peer has no Ed25519 key, or the X.509 library fails.
    pub fn node_certificate(&self, node: &str, peer: &PeerId, now: u64) -> Result<Vec<u8>, AuthorityError> {
        if !is_node_name(node) {
            return Err(AuthorityError::NodeName { name: node.chars().take(64).collect() });
        }
        let key = PeerKey::of(peer).ok_or(AuthorityError::Peer { peer: *peer })?;
        self.issuing(now).node_certificate(node, key, now)
    }

    /// A certificate of the swarm for `peer` in `zone`, good for an hour from `now`.
    pub fn member_certificate(&self, peer: PeerId, zone: Zone, now: u64) -> SignedCertificate {
        let epoch_min = self.revocation.as_ref().map_or(0, |notice| notice.said().epoch_min);
        let request = CertificateRequest { cluster: self.cluster.clone(), peer, zone, epoch_min, now };
        self.issuing(now).issuer().certificate(&request, CERTIFICATE_LIFE)
    }

    /// Grants `layer` to `peer` until `life` after `now`.
    pub fn grant(&self, peer: PeerId, layer: DiffId, now: u64, life: Duration) -> SignedGrant {
        self.issuing(now).issuer().grant(&self.cluster, peer, layer, now, life)
    }

    /// The layer that `grant` lets `peer` read at `now`; `None` when it is not good, or is somebody else's.
    pub fn granted(&self, grant: &[u8], peer: &PeerId, now: u64) -> Option<DiffId> {
        let signed = SignedGrant::decode(grant).ok()?;
        let is_good = signed.said().peer == *peer && signed.verify(&self.cluster, &self.trust(), now).is_ok();
        is_good.then(|| signed.said().layer)
    }

    /// The same with `peer` taken out, at `now`.
    ///
    /// # Errors
    /// When the notice is full, or the peer can be no member.
    pub fn without(&self, peer: &PeerId, now: u64) -> Result<Self, AuthorityError> {
        PeerKey::of(peer).ok_or(AuthorityError::Peer { peer: *peer })?;
        let last = self.revocation.as_ref().map(SignedRevocation::said);
        let notice = Revocation::with(&self.cluster, last, peer, now.saturating_mul(1000));
        let notice = notice.ok_or(AuthorityError::RevocationFull)?;
        let revocation = Some(self.issuing(now).issuer().revocation(notice));
        Ok(Self { revocation, ..self.clone() })
    }

    /// The newest notice of who was taken out.
    pub fn revocation(&self) -> Option<&SignedRevocation> {
        self.revocation.as_ref()
    }

    /// Whether `peer` was taken out.
    pub fn has_revoked(&self, peer: &PeerId) -> bool {
        self.revocation.as_ref().is_some_and(|notice| notice.said().names(peer))
    }
}

/// Whether `name` can be the name of a node: a DNS subdomain, as Kubernetes has it (RFC 1123).
pub fn is_node_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'.');
    let edge = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
    let bytes = name.as_bytes();
    bytes.len() <= 253 && name.bytes().all(allowed) && edge(bytes.first().copied()) && edge(bytes.last().copied())
}

#[cfg(test)]
mod tests;
