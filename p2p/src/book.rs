//! The addresses at which peers were last seen or said to be.
//!
//! Kademlia forgets the address of a provider when a lookup ends, and identify's own cache also holds bridges. This book
//! keeps a few usable addresses of the peers heard of last.

use std::collections::{BTreeMap, HashMap};

use libp2p::{Multiaddr, PeerId};

use crate::address::ADDRESSES_PER_PEER_MAX;

/// Most peers with remembered addresses; 4,096 at eight addresses of 30 bytes are 1 MB.
const PEERS_MAX: usize = 4096;

/// Which page goes first when the book is full: hearsay before what this node has seen or was told to believe, then the
/// oldest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Hearsay(u64),
    Known(u64),
}

#[derive(Debug)]
struct Page {
    rank: Rank,
    /// Newest last.
    addresses: Vec<Multiaddr>,
}

/// Addresses of the peers heard of last.
#[derive(Debug, Default)]
pub(crate) struct AddressBook {
    pages: HashMap<PeerId, Page>,
    order: BTreeMap<Rank, PeerId>,
    clock: u64,
}

impl AddressBook {
    /// `peer` is, or says it is, at `address`.
    pub(crate) fn add(&mut self, peer: PeerId, address: Multiaddr) {
        self.clock += 1;
        let page = self.turn_to(peer, Rank::Known(self.clock));
        page.addresses.retain(|known| *known != address);
        page.addresses.push(address);
        if page.addresses.len() > ADDRESSES_PER_PEER_MAX {
            page.addresses.remove(0);
        }
        self.cut();
    }

    /// Another peer says that `peer` is at `address`. That pushes nothing out but other hearsay.
    pub(crate) fn hear(&mut self, peer: PeerId, address: Multiaddr) {
        self.clock += 1;
        let rank = Rank::Hearsay(self.clock);
        let known = self.pages.get(&peer).map_or(rank, |page| page.rank);
        let page = self.turn_to(peer, known.max(rank));
        if !page.addresses.contains(&address) && page.addresses.len() < ADDRESSES_PER_PEER_MAX {
            page.addresses.insert(0, address);
        }
        self.cut();
    }

    fn turn_to(&mut self, peer: PeerId, rank: Rank) -> &mut Page {
        let page = self.pages.entry(peer).or_insert_with(|| Page { rank, addresses: Vec::new() });
        self.order.remove(&page.rank);
        page.rank = rank;
        self.order.insert(rank, peer);
        page
    }

    fn cut(&mut self) {
        if self.pages.len() > PEERS_MAX
            && let Some((_, first)) = self.order.pop_first()
        {
            self.pages.remove(&first);
        }
    }

    /// Where `peer` may be, newest first.
    pub(crate) fn addresses(&self, peer: &PeerId) -> Vec<Multiaddr> {
        self.pages.get(peer).map(|page| page.addresses.iter().rev().cloned().collect()).unwrap_or_default()
    }

    /// `peer` is not to be dialled any more.
    pub(crate) fn remove(&mut self, peer: &PeerId) {
        if let Some(page) = self.pages.remove(peer) {
            self.order.remove(&page.rank);
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

    #[test]
    fn hearsay_pushes_out_nothing_but_hearsay() {
        let mut book = AddressBook::default();
        let (known, rumoured) = (PeerId::random(), PeerId::random());
        for port in 1..=7 {
            book.add(known, address(port));
        }
        for port in 100..120 {
            book.hear(known, address(port));
            book.hear(rumoured, address(port));
        }
        let expected: Vec<Multiaddr> = [7, 6, 5, 4, 3, 2, 1, 100].map(address).to_vec();
        assert_eq!(book.addresses(&known), expected);
        assert_eq!(book.addresses(&rumoured).len(), ADDRESSES_PER_PEER_MAX);
        book.add(known, address(8));
        assert!(!book.addresses(&known).contains(&address(100)), "hearsay was kept before what was seen");
        for _ in 0..PEERS_MAX {
            book.hear(PeerId::random(), address(1));
        }
        assert!(book.addresses(&rumoured).is_empty() && !book.addresses(&known).is_empty());
        assert_eq!((book.pages.len(), book.order.len()), (PEERS_MAX, PEERS_MAX));
    }
}
