//! A peer by name and address, as REFER has it.

use libp2p::{Multiaddr, PeerId};

use super::{CodecError, Parts};

/// Longest PeerId, in bytes. Today's have 38.
pub const NAME_PEER_LEN_MAX_BYTES: usize = 64;
/// Most addresses that are told of one peer: one of each family.
pub const NAME_ADDRESSES_MAX: usize = 2;
/// Longest address, in bytes. An IPv6 address with its port has 20.
pub const NAME_ADDRESS_LEN_MAX_BYTES: usize = 128;

/// A peer, and where it may be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerName {
    /// Who.
    pub peer: PeerId,
    /// Where, at most [`NAME_ADDRESSES_MAX`]; hearsay, and of any kind.
    pub addresses: Vec<Multiaddr>,
}

impl PeerName {
    /// `peer` with as many of `addresses` as a name holds.
    pub(crate) fn new(peer: PeerId, addresses: impl IntoIterator<Item = Multiaddr>) -> Self {
        let fits = |address: &Multiaddr| (1..=NAME_ADDRESS_LEN_MAX_BYTES).contains(&address.len());
        Self { peer, addresses: addresses.into_iter().filter(fits).take(NAME_ADDRESSES_MAX).collect() }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        put(out, &self.peer.to_bytes());
        // At most `NAME_ADDRESSES_MAX`.
        out.push(self.addresses.len() as u8);
        self.addresses.iter().for_each(|address| put(out, address.as_ref()));
    }

    pub(super) fn decode(parts: &mut Parts<'_>) -> Result<Self, CodecError> {
        let bytes = parts.prefixed("peer", NAME_PEER_LEN_MAX_BYTES)?;
        let peer = PeerId::from_bytes(bytes).ok().filter(|peer| peer.to_bytes() == bytes);
        let Some(peer) = peer else { return parts.malformed("peer") };
        let count = usize::from(parts.byte("number of addresses")?);
        if count > NAME_ADDRESSES_MAX {
            return parts.malformed("number of addresses");
        }
        let mut addresses = Vec::with_capacity(count);
        for _ in 0..count {
            let bytes = parts.prefixed("address", NAME_ADDRESS_LEN_MAX_BYTES)?;
            let Ok(address) = Multiaddr::try_from(bytes.to_vec()) else { return parts.malformed("address") };
            addresses.push(address);
        }
        Ok(Self { peer, addresses })
    }
}

/// Appends `bytes` behind one byte of length; both limits above are below 256.
fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(bytes.len() as u8);
    out.extend_from_slice(bytes);
}
