//! Taking certificates back before they end.
//!
//! One notice holds all that is taken back: the lowest epoch that is still believed, and names. It is signed by the
//! issuing key, spreads with the member list, and is kept on disk. Of two notices the one with the higher number counts,
//! and it replaces the other whole; so whoever makes one starts from the last.

use std::collections::BTreeSet;

use libp2p::PeerId;

use super::certificate::Trust;
use super::signed::{Document, Signed};
use crate::canonical::{DecodeError, PeerKey, Reader, Writer};
use crate::config::ClusterId;

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
}

impl Document for Revocation {
    const DOMAIN: &'static [u8] = b"hermes revocation notice v1\0";
    const VERSION: u8 = 1;
    const LEN_MAX_BYTES: usize = REVOCATION_LEN_MAX_BYTES;

    fn cluster(&self) -> &ClusterId {
        &self.cluster
    }

    fn write(&self, out: &mut Writer) {
        let count = u16::try_from(self.revoked.len()).expect("at most REVOKED_MAX");
        out.u64(self.number).u64(self.epoch_min).u16(count);
        for key in &self.revoked {
            out.bytes(&key.0);
        }
    }

    fn read(cluster: ClusterId, fields: &mut Reader<'_>) -> Result<Self, DecodeError> {
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
        Ok(Self { cluster, number, epoch_min, revoked })
    }
}

/// A notice and its issuer's signature.
pub type SignedRevocation = Signed<Revocation>;

impl Signed<Revocation> {
    /// Whether it is for `cluster` and by an issuer that is believed.
    pub(crate) fn is_for(&self, cluster: &ClusterId, trust: &Trust) -> bool {
        self.said.cluster == *cluster && self.is_by(trust)
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::{Keypair, ed25519};
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
        assert!(read.is_for(&cluster, &trust));
        assert!(!read.is_for(&"test".parse().expect("a cluster id"), &trust));
        assert!(!first.sign(&ed25519::Keypair::generate()).is_for(&cluster, &trust));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..400), count in 0_u16..5) {
            if let Ok(read) = SignedRevocation::decode(&bytes) {
                prop_assert_eq!(read.encode(), bytes.clone());
            }
            // One that starts well.
            let mut out = Writer::default();
            out.u8(Revocation::VERSION).short(b"prod").u64(1).u64(2).u16(count).bytes(&bytes);
            let bytes = out.finish();
            if let Ok(read) = SignedRevocation::decode(&bytes) {
                prop_assert_eq!(read.encode(), bytes);
            }
        }
    }
}
