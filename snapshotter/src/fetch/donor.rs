//! Layers of earlier versions of an image: their holders can give chunks of a layer that is open.
//!
//! A layer that was rebuilt has another name, and most of its chunks are those of the last one, under other numbers. Peers
//! say what they have layer by layer; what they have of a donor counts as what they have of the open layer, and they are
//! asked for it under the donor's numbers. A profile says which layers may be donors; that is a hint: a chunk counts only
//! where the name is the same in both tables, and what a peer sends is checked against it.

use std::collections::BTreeMap;

use hermes_image::ids::ChunkNo;
use hermes_image::index::chunks::ChunkTable;
use hermes_image::runs::Runs;
use hermes_p2p::PeerId;
use parking_lot::Mutex;

/// Donors of one open layer.
pub(super) const DONORS_MAX: usize = 4;

/// Longest chunk table of a donor, in bytes: 7 GB of the usual chunks. Nobody has signed which layers are donors.
pub(super) const DONOR_TABLE_MAX_BYTES: u64 = 4 << 20;
/// Holders of one donor that are remembered. Another one's chunks are asked for as the open layer's, and lacking.
const HOLDERS_MAX: usize = 64;

/// A donor of one open layer.
#[derive(Debug)]
pub(super) struct Donor {
    table: ChunkTable,
    /// For each chunk of the open layer, the donor's chunk of the same name.
    places: Vec<Option<u32>>,
    /// What peers have, by the open layer's numbers.
    held: Mutex<BTreeMap<PeerId, Runs>>,
}

impl Donor {
    /// The layer of the table `donor` for that of the table `open`; `None` when they have no chunk in common.
    pub(super) fn new(open: &ChunkTable, donor: ChunkTable) -> Option<Self> {
        let named: BTreeMap<_, u32> = (0..donor.count()).map(|chunk| (donor.chunk_id(ChunkNo(chunk)), chunk)).collect();
        let places: Vec<Option<u32>> =
            (0..open.count()).map(|chunk| named.get(&open.chunk_id(ChunkNo(chunk))).copied()).collect();
        let gives = places.iter().any(Option::is_some);
        gives.then(|| Self { table: donor, places, held: Mutex::default() })
    }

    /// Its own chunks.
    pub(super) fn table(&self) -> &ChunkTable {
        &self.table
    }

    /// `peer` has the donor's chunks `runs`. Which of the open layer's these are.
    pub(super) fn holds(&self, peer: PeerId, runs: &Runs) -> Runs {
        let chunks: Runs = (0_u32..)
            .zip(&self.places)
            .filter(|(_, place)| place.is_some_and(|place| runs.contains(place)))
            .map(|(chunk, _)| chunk..chunk + 1)
            .collect();
        let mut held = self.held.lock();
        if held.len() >= HOLDERS_MAX && !held.contains_key(&peer) {
            held.pop_first();
        }
        held.insert(peer, chunks.clone());
        drop(held);
        chunks
    }

    /// Those of `chunks` that `peer` has of it.
    pub(super) fn held_by(&self, peer: &PeerId, chunks: &Runs) -> Runs {
        self.held.lock().get(peer).map_or_else(Runs::new, |held| held.intersection(chunks))
    }

    /// `peer` gives nothing of it any more.
    pub(super) fn forget(&self, peer: &PeerId) {
        self.held.lock().remove(peer);
    }

    /// The donor's numbers of `chunks`, with those that each is of.
    pub(super) fn places(&self, chunks: &Runs) -> BTreeMap<u32, Vec<ChunkNo>> {
        let mut places: BTreeMap<u32, Vec<ChunkNo>> = BTreeMap::new();
        for chunk in chunks.chunks() {
            if let Some(Some(place)) = self.places.get(chunk as usize) {
                places.entry(*place).or_default().push(ChunkNo(chunk));
            }
        }
        places
    }
}

#[cfg(test)]
mod tests {
    use hermes_image::ids::{ChunkId, DiffId};
    use hermes_image::index::chunks::ChunkTableBuilder;

    use super::*;

    fn table(no: u8, ids: &[u8]) -> ChunkTable {
        let mut builder = ChunkTableBuilder::default();
        for id in ids {
            builder.push(ChunkId([*id; 32]), 4096).expect("a chunk");
        }
        builder.finish(DiffId([no; 32]))
    }

    #[test]
    fn what_a_peer_has_of_a_donor_it_has_of_the_layer() {
        let donor = Donor::new(&table(1, &[1, 9, 3, 2, 3]), table(2, &[3, 2, 1])).expect("three names in common");
        let peer = PeerId::random();
        assert_eq!(donor.holds(peer, &Runs::one(0..2)), Runs::one(2..5));
        assert_eq!(donor.held_by(&peer, &Runs::one(0..4)), Runs::one(2..4));
        let places = donor.places(&Runs::one(1..5));
        assert_eq!(places, [(0, vec![ChunkNo(2), ChunkNo(4)]), (1, vec![ChunkNo(3)])].into());
        donor.forget(&peer);
        assert!(donor.held_by(&peer, &Runs::one(0..5)).is_empty());
        assert!(Donor::new(&table(1, &[1]), table(2, &[2])).is_none());
    }
}
