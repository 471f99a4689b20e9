//! Who issues certificates.

use std::fmt;
use std::time::Duration;

use hermes_image::ids::DiffId;
use libp2p::PeerId;
use thiserror::Error;

use super::certificate::{SignedCertificate, Trust, Zone};
use super::grants::SignedGrant;
use super::revocation::{Revocation, SignedRevocation};
use crate::config::ClusterId;

/// An issuer that did not issue.
#[derive(Debug, Error)]
pub enum IssueError {
    /// It is not for this node to do.
    #[error("this node may not {what}; do it where the cluster's certificates are issued")]
    NotHere {
        /// What was asked.
        what: &'static str,
    },
    /// Such as a service that is away.
    #[error("the issuer did not answer as it should: {reason}")]
    Failed {
        /// What went wrong and what to do.
        reason: String,
    },
}

/// For whom a certificate is wanted.
#[derive(Debug, Clone)]
pub struct CertificateRequest {
    /// The cluster.
    pub cluster: ClusterId,
    /// This node.
    pub peer: PeerId,
    /// Its zone, as its settings say.
    pub zone: Zone,
    /// The lowest epoch that is believed: one of an earlier epoch would be worth nothing.
    pub epoch_min: u64,
    /// Now, in seconds since 1970.
    pub now: u64,
}

/// Issues certificates for this node, and says whose certificates are believed.
///
/// Every method but [`Self::trust`] may block; none is called on an async thread.
pub trait Issuer: fmt::Debug + Send + Sync + 'static {
    /// A certificate for this node.
    ///
    /// # Errors
    /// When the issuer cannot be asked, or refuses. It is asked again.
    fn issue(&self, request: &CertificateRequest) -> Result<SignedCertificate, IssueError>;

    /// Which keys and epochs are believed now. Called for every connection and certificate, so it must not block.
    fn trust(&self) -> Trust;

    /// Signs a notice that takes certificates back.
    ///
    /// # Errors
    /// When this node may not do that, or the issuer cannot be asked.
    fn revoke(&self, notice: Revocation) -> Result<SignedRevocation, IssueError>;

    /// Grants `peer` the chunks of a private layer for `life`, counted from `now` (seconds since 1970).
    ///
    /// # Errors
    /// When this node may not do that, or the issuer cannot be asked.
    fn grant(
        &self,
        cluster: &ClusterId,
        peer: PeerId,
        layer: DiffId,
        now: u64,
        life: Duration,
    ) -> Result<SignedGrant, IssueError>;

    /// The same of several layers, in their order: one question where the issuer is far away.
    ///
    /// # Errors
    /// When one of them is not granted.
    fn grant_all(
        &self,
        cluster: &ClusterId,
        peer: PeerId,
        layers: &[DiffId],
        now: u64,
        life: Duration,
    ) -> Result<Vec<SignedGrant>, IssueError> {
        layers.iter().map(|layer| self.grant(cluster, peer, *layer, now, life)).collect()
    }
}
