//! Certificates: who may talk in a cluster, for about an hour.
//!
//! A certificate binds a `PeerId` to a cluster and a zone until a time, signed by the cluster's issuing key. It is no
//! secret: whoever shows it must also hold the key of that `PeerId`, which Noise has proven before. Pure: time is an
//! argument.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use libp2p::PeerId;
use thiserror::Error;

use super::refusal::Refusal;
use super::revocation::Revocation;
use super::signed::{Document, Signed};
use crate::canonical::{DecodeError, PeerKey, Reader, SIGNATURE_LEN_BYTES, Writer};
use crate::config::ClusterId;

/// How long a certificate is good for unless its issuer says otherwise. Short, because taking one back takes a notice
/// that may not reach everybody; and long enough for an issuer that is away for half of it.
pub const CERTIFICATE_LIFE: Duration = Duration::from_secs(3600);
/// How far the clocks of two nodes may be apart, in seconds.
pub const CLOCK_SKEW_SECONDS: u64 = 60;
/// Longest encoded certificate: two labels of 63 bytes, a name, three numbers, a signature.
pub const CERTIFICATE_LEN_MAX_BYTES: usize = 320;
/// Longest zone name, as a Kubernetes label value.
const ZONE_LEN_MAX_BYTES: usize = 63;

/// The zone (rack, availability zone) of a node. Empty where nobody has named zones.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Zone(String);

/// A text that is no zone.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{text}' is no zone; use at most 63 letters, digits, '-', '_' and '.'")]
pub struct ZoneError {
    /// What was given.
    pub text: String,
}

impl Zone {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Zone {
    type Err = ZoneError;

    fn from_str(text: &str) -> Result<Self, ZoneError> {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if text.len() > ZONE_LEN_MAX_BYTES || !text.bytes().all(allowed) {
            return Err(ZoneError { text: text.chars().take(2 * ZONE_LEN_MAX_BYTES).collect() });
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Zone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Where it is good.
    pub cluster: ClusterId,
    /// For whom.
    pub peer: PeerId,
    /// The zone of that node.
    pub zone: Zone,
    /// The issuer's epoch. Certificates below the lowest believed epoch are worth nothing.
    pub epoch: u64,
    /// From when it is good, in seconds since 1970.
    pub not_before: u64,
    /// Until when it is good, in seconds since 1970.
    pub not_after: u64,
}

impl Document for Certificate {
    const DOMAIN: &'static [u8] = b"hermes member certificate v1\0";
    const VERSION: u8 = 1;
    const LEN_MAX_BYTES: usize = CERTIFICATE_LEN_MAX_BYTES;

    fn cluster(&self) -> &ClusterId {
        &self.cluster
    }

    fn write(&self, out: &mut Writer) {
        out.short(&self.peer.to_bytes()).short(self.zone.as_str().as_bytes());
        out.u64(self.epoch).u64(self.not_before).u64(self.not_after);
    }

    fn read(cluster: ClusterId, fields: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            cluster,
            peer: fields.peer()?,
            zone: fields.parsed("zone")?,
            epoch: fields.u64()?,
            not_before: fields.u64()?,
            not_after: fields.u64()?,
        })
    }
}

/// What this node believes about issuers when it looks at a certificate.
#[derive(Debug, Clone)]
pub struct Trust {
    /// The issuing keys that are believed now: one, or two while they change. At most four are looked at.
    pub keys: Vec<PeerKey>,
    /// Certificates of an earlier epoch are refused.
    pub epoch_min: u64,
}

/// Most issuing keys that are tried.
pub(crate) const ISSUER_KEYS_MAX: usize = 4;

impl Trust {
    /// Whether one of the keys has signed `body` in `domain`.
    pub(crate) fn has_signed(&self, domain: &[u8], body: &[u8], signature: &[u8; SIGNATURE_LEN_BYTES]) -> bool {
        self.keys.iter().take(ISSUER_KEYS_MAX).any(|key| key.has_signed(domain, body, signature))
    }
}

/// A certificate and its issuer's signature, not checked until [`Signed::check`].
pub type SignedCertificate = Signed<Certificate>;

impl Signed<Certificate> {
    /// Whether `peer` may talk in `cluster` at `now` (seconds since 1970) by this certificate.
    ///
    /// # Errors
    /// With the first reason why not.
    pub fn check(
        &self,
        cluster: &ClusterId,
        peer: &PeerId,
        trust: &Trust,
        revocation: Option<&Revocation>,
        now: u64,
    ) -> Result<(), Refusal> {
        let said = &self.said;
        if said.cluster != *cluster {
            return Err(Refusal::OtherCluster);
        }
        if said.peer != *peer {
            return Err(Refusal::OtherPeer);
        }
        if now > said.not_after.saturating_add(CLOCK_SKEW_SECONDS) || said.not_after < said.not_before {
            return Err(Refusal::Expired);
        }
        if now.saturating_add(CLOCK_SKEW_SECONDS) < said.not_before {
            return Err(Refusal::NotYet);
        }
        let epoch_min = revocation.map_or(0, |revocation| revocation.epoch_min).max(trust.epoch_min);
        if said.epoch < epoch_min || revocation.is_some_and(|revocation| revocation.names(peer)) {
            return Err(Refusal::Revoked);
        }
        if !self.is_by(trust) {
            return Err(Refusal::UnknownIssuer);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::{Keypair, ed25519};
    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_700_000_000;

    fn cluster(name: &str) -> ClusterId {
        name.parse().expect("a cluster id")
    }

    fn peer() -> PeerId {
        Keypair::generate_ed25519().public().to_peer_id()
    }

    fn made(peer: PeerId, key: &ed25519::Keypair) -> SignedCertificate {
        let zone = "rack-1".parse().expect("a zone");
        let said =
            Certificate { cluster: cluster("prod"), peer, zone, epoch: 3, not_before: NOW, not_after: NOW + 3600 };
        said.sign(key)
    }

    fn trust(key: &ed25519::Keypair) -> Trust {
        Trust { keys: vec![PeerKey(key.public().to_bytes())], epoch_min: 0 }
    }

    #[test]
    fn a_certificate_is_good_for_its_cluster_its_peer_and_its_time() {
        let (key, peer) = (ed25519::Keypair::generate(), peer());
        let signed = made(peer, &key);
        let trust = trust(&key);
        let check = |signed: &SignedCertificate, now| signed.check(&cluster("prod"), &peer, &trust, None, now);
        assert_eq!(check(&signed, NOW), Ok(()));
        // A minute of skew either way, and not a second more.
        assert_eq!(check(&signed, NOW - 60), Ok(()));
        assert_eq!(check(&signed, NOW - 61), Err(Refusal::NotYet));
        assert_eq!(check(&signed, NOW + 3660), Ok(()));
        assert_eq!(check(&signed, NOW + 3661), Err(Refusal::Expired));
        assert_eq!(signed.check(&cluster("test"), &peer, &trust, None, NOW), Err(Refusal::OtherCluster));
        assert_eq!(signed.check(&cluster("prod"), &self::peer(), &trust, None, NOW), Err(Refusal::OtherPeer));
        let other = Trust { keys: vec![PeerKey(ed25519::Keypair::generate().public().to_bytes())], epoch_min: 0 };
        assert_eq!(signed.check(&cluster("prod"), &peer, &other, None, NOW), Err(Refusal::UnknownIssuer));
        let later = Trust { epoch_min: 4, ..trust.clone() };
        assert_eq!(signed.check(&cluster("prod"), &peer, &later, None, NOW), Err(Refusal::Revoked));
        let mut widened = signed.clone();
        widened.said.not_after = u64::MAX;
        assert_eq!(check(&widened, NOW), Err(Refusal::UnknownIssuer));
    }

    #[test]
    fn it_is_read_as_it_was_written_and_no_byte_can_change() {
        let (key, peer) = (ed25519::Keypair::generate(), peer());
        let signed = made(peer, &key);
        let bytes = signed.encode();
        assert!(bytes.len() <= CERTIFICATE_LEN_MAX_BYTES);
        assert_eq!(SignedCertificate::decode(&bytes), Ok(signed));
        for at in 0..bytes.len() {
            for flip in [1, 0x80] {
                let mut bad = bytes.clone();
                bad[at] ^= flip;
                let accepted = SignedCertificate::decode(&bad)
                    .is_ok_and(|read| read.check(&cluster("prod"), &peer, &trust(&key), None, NOW).is_ok());
                assert!(!accepted, "byte {at} may be changed");
            }
            assert!(SignedCertificate::decode(&bytes[..at]).is_err());
        }
        assert!(SignedCertificate::decode(&[&bytes[..], &[0]].concat()).is_err());
    }

    #[test]
    fn the_longest_fits() {
        let long = "x".repeat(63);
        let zone = long.parse().expect("a zone");
        let said =
            Certificate { cluster: cluster(&long), peer: peer(), zone, epoch: 1, not_before: 0, not_after: u64::MAX };
        let bytes = said.sign(&ed25519::Keypair::generate()).encode();
        assert!(bytes.len() <= CERTIFICATE_LEN_MAX_BYTES, "{}", bytes.len());
        assert!(SignedCertificate::decode(&bytes).is_ok());
        assert!(format!("{long}x").parse::<Zone>().is_err() && "a b".parse::<Zone>().is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(read) = SignedCertificate::decode(&bytes) {
                prop_assert_eq!(read.encode(), bytes);
            }
        }
    }
}
