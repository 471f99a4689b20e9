//! The one way to write what is signed.
//!
//! Certificates, revocations, grants, member entries and suspicions are sequences of fields of fixed length or with a
//! length of one or two bytes in front; numbers are little endian. There is exactly one encoding of each value, and a
//! decoder takes nothing else, so that what was signed and what was read cannot differ.

use std::str::FromStr;

use libp2p::PeerId;
use libp2p::identity::{Keypair, PublicKey, ed25519};
use thiserror::Error;

/// Length of an Ed25519 signature.
pub(crate) const SIGNATURE_LEN_BYTES: usize = 64;

/// Bytes that are not what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// They end too early.
    #[error("it ends in the middle of a field")]
    Short,
    /// Something follows the last field.
    #[error("{0} bytes follow its end")]
    Long(usize),
    /// A field that cannot be.
    #[error("its field '{0}' cannot be")]
    Field(&'static str),
    /// A version that this build does not know.
    #[error("it has version {0}, which this build does not know")]
    Version(u8),
}

/// The Ed25519 key of a node, which is its name: the `PeerId` is an encoding of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerKey(pub(crate) [u8; 32]);

impl std::fmt::Debug for PeerKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.peer() {
            Some(peer) => write!(f, "PeerKey({peer})"),
            None => write!(f, "PeerKey({:02x?})", &self.0[..8]),
        }
    }
}

impl PeerKey {
    /// The key within `peer`; `None` when its key is of another kind, as no node's is.
    pub fn of(peer: &PeerId) -> Option<Self> {
        let bytes = peer.to_bytes();
        // An identity multihash: its code (0), its length, and the protobuf of the public key.
        let [0, length, key @ ..] = bytes.as_slice() else { return None };
        if usize::from(*length) != key.len() {
            return None;
        }
        let key = PublicKey::try_decode_protobuf(key).ok()?.try_into_ed25519().ok()?;
        Some(Self(key.to_bytes()))
    }

    /// The name of the node; `None` when the bytes are no point of the curve.
    pub fn peer(&self) -> Option<PeerId> {
        let key = ed25519::PublicKey::try_from_bytes(&self.0).ok()?;
        Some(PublicKey::from(key).to_peer_id())
    }

    /// The key of these 32 bytes, which may be no point of the curve; then it has signed nothing.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Its 32 bytes.
    pub fn to_bytes(self) -> [u8; 32] {
        self.0
    }

    /// Whether this key has signed `body` in `domain`.
    pub(crate) fn has_signed(&self, domain: &[u8], body: &[u8], signature: &[u8; SIGNATURE_LEN_BYTES]) -> bool {
        let Ok(key) = ed25519::PublicKey::try_from_bytes(&self.0) else { return false };
        key.verify(&[domain, body].concat(), signature)
    }
}

/// Signs `body` in `domain`, so that the signature is good for nothing else.
pub(crate) fn sign(key: &ed25519::Keypair, domain: &[u8], body: &[u8]) -> [u8; SIGNATURE_LEN_BYTES] {
    let signature = key.sign(&[domain, body].concat());
    signature.try_into().expect("an Ed25519 signature has 64 bytes")
}

/// The Ed25519 pair within `key`; `None` when it is of another kind.
pub(crate) fn ed25519_of(key: &Keypair) -> Option<ed25519::Keypair> {
    key.clone().try_into_ed25519().ok()
}

/// Writes fields one after the other.
#[derive(Debug, Default)]
pub struct Writer(Vec<u8>);

impl Writer {
    pub(crate) fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    pub(crate) fn u16(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    /// Numbers of a count that both sides know.
    pub(crate) fn words(&mut self, words: impl Iterator<Item = u64>) -> &mut Self {
        words.for_each(|word| self.0.extend_from_slice(&word.to_le_bytes()));
        self
    }

    /// Bytes of a length that both sides know.
    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// At most 255 bytes, with their length in front.
    pub(crate) fn short(&mut self, bytes: &[u8]) -> &mut Self {
        let len = u8::try_from(bytes.len()).expect("the field was checked to be short when it was made");
        self.u8(len).bytes(bytes)
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// Reads fields one after the other.
#[derive(Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Of at most `len_max` bytes that begin with `version`.
    pub(crate) fn versioned(bytes: &'a [u8], len_max: usize, version: u8) -> Result<Self, DecodeError> {
        if bytes.len() > len_max {
            return Err(DecodeError::Long(bytes.len() - len_max));
        }
        let mut fields = Self(bytes);
        let found = fields.u8()?;
        if found == version { Ok(fields) } else { Err(DecodeError::Version(found)) }
    }

    pub(crate) fn left(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(DecodeError::Short)?;
        self.0 = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        Ok(self.bytes(N)?.try_into().expect("as long as asked for"))
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// At most 255 bytes, with their length in front.
    pub(crate) fn short(&mut self) -> Result<&'a [u8], DecodeError> {
        let len = self.u8()?;
        self.bytes(usize::from(len))
    }

    /// Text of at most 255 bytes that stands for a `T`.
    pub(crate) fn parsed<T: FromStr>(&mut self, field: &'static str) -> Result<T, DecodeError> {
        let text = std::str::from_utf8(self.short()?).map_err(|_| DecodeError::Field(field))?;
        text.parse().map_err(|_| DecodeError::Field(field))
    }

    /// The name of a node, in its one form.
    pub(crate) fn peer(&mut self) -> Result<PeerId, DecodeError> {
        let name = self.short()?;
        let peer = PeerId::from_bytes(name).map_err(|_| DecodeError::Field("peer"))?;
        if peer.to_bytes() != name || PeerKey::of(&peer).is_none() {
            return Err(DecodeError::Field("peer"));
        }
        Ok(peer)
    }

    /// That was all.
    pub(crate) fn end(&self) -> Result<(), DecodeError> {
        if self.0.is_empty() { Ok(()) } else { Err(DecodeError::Long(self.0.len())) }
    }
}

/// Seconds since 1970, as this host's clock has it.
pub fn unix_now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_and_its_key_are_the_same_name() {
        let pair = Keypair::generate_ed25519();
        let peer = pair.public().to_peer_id();
        let key = PeerKey::of(&peer).expect("an Ed25519 peer");
        assert_eq!(key.peer(), Some(peer));
        assert_eq!(PeerKey::of(&PeerId::random()), None, "a hash was taken for a key");
    }

    #[test]
    fn a_signature_is_good_in_its_domain_only() {
        let pair = ed25519::Keypair::generate();
        let key = PeerKey(pair.public().to_bytes());
        let signature = sign(&pair, b"one\0", b"body");
        assert!(key.has_signed(b"one\0", b"body", &signature));
        assert!(!key.has_signed(b"two\0", b"body", &signature));
        assert!(!key.has_signed(b"one\0", b"bodY", &signature));
        assert!(!PeerKey([0xff; 32]).has_signed(b"one\0", b"body", &signature));
    }
}
