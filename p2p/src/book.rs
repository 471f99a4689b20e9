//! The addresses at which peers were last seen or said to be.
//!
//! Kademlia forgets the address of a provider when a lookup ends, and identify's own cache also holds bridges. This book
//! keeps a few usable addresses of the peers heard of last.

use std::collections::{BTreeMap, HashMap};

use libp2p::{Multiaddr, PeerId};

use crate::address::ADDRESSES_PER_PEER_MAX;

/// Most peers with remembered addresses; 4,096 at eight addresses of 30 bytes are 1 MB.
const PEERS_MAX: usize = 4096;

#[derive(Debug)]
struct Page {
    used: u64,
    /// Newest last.
    addresses: Vec<Multiaddr>,
}

/// Addresses of the peers heard of last.
#[derive(Debug, Default)]
pub(crate) struct AddressBook {
    pages: HashMap<PeerId, Page>,
    order: BTreeMap<u64, PeerId>,
    clock: u64,
}

impl AddressBook {
    /// `peer` is, or says it is, at `address`.
    pub(crate) fn add(&mut self, peer: PeerId, address: Multiaddr) {
        self.clock += 1;
        let page = self.pages.entry(peer).or_insert_with(|| Page { used: 0, addresses: Vec::new() });
        self.order.remove(&page.used);
        page.used = self.clock;
        self.order.insert(self.clock, peer);
        page.addresses.retain(|known| *known != address);
        page.addresses.push(address);
        if page.addresses.len() > ADDRESSES_PER_PEER_MAX {
            page.addresses.remove(0);
        }
        if self.pages.len() > PEERS_MAX
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.pages.remove(&oldest);
        }
    }

    /// Where `peer` may be, newest first.
    pub(crate) fn addresses(&self, peer: &PeerId) -> Vec<Multiaddr> {
        self.pages.get(peer).map(|page| page.addresses.iter().rev().cloned().collect()).unwrap_or_default()
    }

    /// `peer` is not to be dialled any more.
    pub(crate) fn remove(&mut self, peer: &PeerId) {
        if let Some(page) = self.pages.remove(peer) {
            self.order.remove(&page.used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> Multiaddr {
        format!("/ip4/10.0.0.1/tcp/{port}").parse().expect("a multiaddr")
    }

    #[test]
    fn the_newest_addresses_of_the_newest_peers_stay() {
        let mut book = AddressBook::default();
        let peer = PeerId::random();
        for port in 1..=20 {
            book.add(peer, address(port));
        }
        book.add(peer, address(15));
        let expected: Vec<Multiaddr> = [15, 20, 19, 18, 17, 16, 14, 13].map(address).to_vec();
        assert_eq!(book.addresses(&peer), expected);

        for _ in 0..PEERS_MAX {
            book.add(PeerId::random(), address(1));
        }
        assert_eq!((book.addresses(&peer), book.pages.len(), book.order.len()), (Vec::new(), PEERS_MAX, PEERS_MAX));
        let kept = *book.pages.keys().next().expect("has peers");
        book.remove(&kept);
        assert_eq!((book.pages.len(), book.order.len()), (PEERS_MAX - 1, PEERS_MAX - 1));
    }
}
