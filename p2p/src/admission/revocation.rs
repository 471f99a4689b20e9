//! Taking certificates back before they end.
//!
//! One notice holds all that is taken back: the lowest epoch that is still believed, and names. It is signed by the
//! issuing key, spreads with the member list, and is kept on disk. Of two notices the one with the higher number counts,
//! and it replaces the other whole; so whoever makes one starts from the last.

use std::collections::BTreeSet;

use libp2p::PeerId;
use libp2p::identity::ed25519;

use super::certificate::Trust;
use crate::canonical::{DecodeError, PeerKey, Reader, SIGNATURE_LEN_BYTES, Writer, sign};
use crate::config::ClusterId;

const VERSION: u8 = 1;
const DOMAIN: &[u8] = b"hermes revocation notice v1\0";
/// Most names in a notice, 32 KiB of them. Whoever has to take back more raises the epoch, or changes the secret.
pub const REVOKED_MAX: usize = 1024;
/// Longest encoded notice.
pub(crate) const REVOCATION_LEN_MAX_BYTES: usize = 160 + 32 * REVOKED_MAX;

/// What a notice says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// Where it is good.
    pub cluster: ClusterId,
    /// The highest number counts: milliseconds since 1970 when it was made, or one more than the last.
    pub number: u64,
    /// Certificates of an earlier epoch are refused.
    pub epoch_min: u64,
    /// Who is refused.
    pub(crate) revoked: BTreeSet<PeerKey>,
}

impl Revocation {
    /// The notice that follows `last`, made at `now_ms` (milliseconds since 1970), with `peer` among the refused.
    ///
    /// `None` when the notice is full, or `peer` has no Ed25519 key and so can have no certificate.
    pub fn with(cluster: &ClusterId, last: Option<&Self>, peer: &PeerId, now_ms: u64) -> Option<Self> {
        let mut revoked = last.map(|last| last.revoked.clone()).unwrap_or_default();
        revoked.insert(PeerKey::of(peer)?);
        if revoked.len() > REVOKED_MAX {
            return None;
        }
        let number = last.map_or(0, |last| last.number.saturating_add(1)).max(now_ms);
        let epoch_min = last.map_or(0, |last| last.epoch_min);
        Some(Self { cluster: cluster.clone(), number, epoch_min, revoked })
    }

    /// Whether `peer` is refused by name.
    pub fn names(&self, peer: &PeerId) -> bool {
        PeerKey::of(peer).is_some_and(|key| self.revoked.contains(&key))
    }

    /// Those who are refused by name.
    pub fn peers(&self) -> impl Iterator<Item = PeerId> + '_ {
        self.revoked.iter().filter_map(PeerKey::peer)
    }

    fn body(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.u8(VERSION).short(self.cluster.as_str().as_bytes()).u64(self.number).u64(self.epoch_min);
        let count = u16::try_from(self.revoked.len()).expect("at most REVOKED_MAX");
        out.u16(count);
        for key in &self.revoked {
            out.bytes(&key.0);
        }
        out.finish()
    }

    /// Signs it with the issuing `key`.
    pub fn sign(self, key: &ed25519::Keypair) -> SignedRevocation {
        let signature = sign(key, DOMAIN, &self.body());
        SignedRevocation { revocation: self, signature }
    }
}

/// A notice and its issuer's signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedRevocation {
    pub(crate) revocation: Revocation,
    signature: [u8; SIGNATURE_LEN_BYTES],
}

impl SignedRevocation {
    /// What it says, believed or not.
    pub fn revocation(&self) -> &Revocation {
        &self.revocation
    }

    /// The bytes that are sent and kept.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.revocation.body();
        bytes.extend_from_slice(&self.signature);
        bytes
    }

    /// Reads what [`Self::encode`] has written, and nothing else.
    ///
    /// # Errors
    /// When the bytes are too many or not of that form.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        if let Some(more) = bytes.len().checked_sub(REVOCATION_LEN_MAX_BYTES).filter(|more| *more > 0) {
            return Err(DecodeError::Long(more));
        }
        let mut fields = Reader::new(bytes);
        match fields.u8()? {
            VERSION => {}
            other => return Err(DecodeError::Version(other)),
        }
        let cluster = fields.text("cluster")?.parse().map_err(|_| DecodeError::Field("cluster"))?;
        let (number, epoch_min, count) = (fields.u64()?, fields.u64()?, usize::from(fields.u16()?));
        if count > REVOKED_MAX {
            return Err(DecodeError::Field("count"));
        }
        let mut revoked = BTreeSet::new();
        for _ in 0..count {
            let key = PeerKey(fields.array()?);
            // In order and once each, so that there is one way to write a set.
            if revoked.last().is_some_and(|last| *last >= key) {
                return Err(DecodeError::Field("revoked"));
            }
            revoked.insert(key);
        }
        let signature = fields.array()?;
        fields.end()?;
        Ok(Self { revocation: Revocation { cluster, number, epoch_min, revoked }, signature })
    }

    /// Whether it is for `cluster` and by an issuer that is believed.
    pub(crate) fn is_by(&self, cluster: &ClusterId, trust: &Trust) -> bool {
        self.revocation.cluster == *cluster && trust.has_signed(DOMAIN, &self.revocation.body(), &self.signature)
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;
    use proptest::prelude::*;

    use super::*;

    fn peer() -> PeerId {
        Keypair::generate_ed25519().public().to_peer_id()
    }

    #[test]
    fn a_notice_grows_and_its_number_too() {
        let cluster: ClusterId = "prod".parse().expect("a cluster id");
        let (one, two) = (peer(), peer());
        let first = Revocation::with(&cluster, None, &one, 1000).expect("made");
        // The clock has gone back.
        let second = Revocation::with(&cluster, Some(&first), &two, 10).expect("made");
        assert_eq!((first.number, second.number), (1000, 1001));
        assert!(second.names(&one) && second.names(&two) && !first.names(&two));
        assert!(Revocation::with(&cluster, None, &PeerId::random(), 0).is_none());
        let key = ed25519::Keypair::generate();
        let trust = Trust { keys: vec![PeerKey(key.public().to_bytes())], epoch_min: 0 };
        let signed = second.sign(&key);
        let read = SignedRevocation::decode(&signed.encode()).expect("read");
        assert_eq!(read, signed);
        assert!(read.is_by(&cluster, &trust));
        assert!(!read.is_by(&"test".parse().expect("a cluster id"), &trust));
        assert!(!first.sign(&ed25519::Keypair::generate()).is_by(&cluster, &trust));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400), count in 0_u16..5) {
            if let Ok(read) = SignedRevocation::decode(&bytes) {
                prop_assert_eq!(read.encode(), bytes.clone());
            }
            // One that starts well.
            let mut out = Writer::default();
            out.u8(VERSION).short(b"prod").u64(1).u64(2).u16(count).bytes(&bytes);
            let bytes = out.finish();
            if let Ok(read) = SignedRevocation::decode(&bytes) {
                prop_assert_eq!(read.encode(), bytes);
            }
        }
    }
}
