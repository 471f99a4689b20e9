//! The key that issues: what a [`super::issuer::Issuer`] signs with, wherever it got the key from.

use std::fmt;
use std::time::Duration;

use hermes_image::ids::DiffId;
use libp2p::PeerId;
use libp2p::identity::ed25519;

use super::certificate::{Certificate, SignedCertificate};
use super::grants::{Grant, SignedGrant};
use super::issuer::CertificateRequest;
use super::revocation::{Revocation, SignedRevocation};
use super::signed::Document as _;
use crate::canonical::PeerKey;
use crate::config::ClusterId;

/// A cluster's issuing key (Ed25519).
pub struct IssuingKey(ed25519::Keypair);

impl fmt::Debug for IssuingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IssuingKey").field(&self.public()).finish()
    }
}

impl IssuingKey {
    /// The key of this seed, which is the secret.
    pub fn from_seed(mut seed: [u8; 32]) -> Self {
        let key = ed25519::SecretKey::try_from_bytes(&mut seed).expect("any 32 bytes are a seed");
        Self(key.into())
    }

    /// What others check its signatures with.
    pub fn public(&self) -> PeerKey {
        PeerKey::from_bytes(self.0.public().to_bytes())
    }

    /// A certificate as `request` wants it, good from its `now` for `life`.
    pub fn certificate(&self, request: &CertificateRequest, life: Duration) -> SignedCertificate {
        let certificate = Certificate {
            cluster: request.cluster.clone(),
            peer: request.peer,
            zone: request.zone.clone(),
            epoch: request.epoch_min,
            not_before: request.now,
            not_after: request.now.saturating_add(life.as_secs()),
        };
        certificate.sign(&self.0)
    }

    /// A grant of `layer` to `peer`, good until `life` after `now` (seconds since 1970).
    pub fn grant(&self, cluster: &ClusterId, peer: PeerId, layer: DiffId, now: u64, life: Duration) -> SignedGrant {
        let not_after = now.saturating_add(life.as_secs());
        Grant { cluster: cluster.clone(), peer, layer, not_after }.sign(&self.0)
    }

    /// `notice`, signed.
    pub fn revocation(&self, notice: Revocation) -> SignedRevocation {
        notice.sign(&self.0)
    }
}
