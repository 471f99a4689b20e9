//! What a node of a model keeps.

use std::collections::{BTreeMap, BTreeSet};

use crate::net::FlowNo;
use crate::queue::Nanos;

/// Names the whole layer where a piece is named: an origin reads it in one request.
pub(crate) const ALL_PIECES: u32 = u32::MAX;

/// A set of pieces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Pieces {
    words: Vec<u64>,
    count: u32,
}

impl Pieces {
    pub(crate) fn none_of(count: u32) -> Self {
        Self { words: vec![0; count.div_ceil(64) as usize], count: 0 }
    }

    pub(crate) fn all_of(count: u32) -> Self {
        let mut pieces = Self::none_of(count);
        (0..count).for_each(|piece| pieces.insert(piece));
        pieces
    }

    pub(crate) fn count(&self) -> u32 {
        self.count
    }

    pub(crate) fn contains(&self, piece: u32) -> bool {
        self.words.get(piece as usize / 64).is_some_and(|word| word >> (piece % 64) & 1 == 1)
    }

    pub(crate) fn insert(&mut self, piece: u32) {
        if !self.contains(piece) {
            self.words[piece as usize / 64] |= 1 << (piece % 64);
            self.count += 1;
        }
    }

    pub(crate) fn remove(&mut self, piece: u32) {
        if self.contains(piece) {
            self.words[piece as usize / 64] &= !(1 << (piece % 64));
            self.count -= 1;
        }
    }

    /// Pieces of this set that are neither in `one` nor in `two`, in order.
    pub(crate) fn beyond<'a>(&'a self, one: &'a Self, two: &'a Self) -> impl Iterator<Item = u32> + 'a {
        let words = self.words.iter().zip(&one.words).zip(&two.words).enumerate();
        words.flat_map(|(place, ((mine, one), two))| {
            let mut left = mine & !one & !two;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros())?;
                left &= left - 1;
                Some(place as u32 * 64 + bit)
            })
        })
    }
}

/// How far the search for nodes with a whole layer is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum Search {
    #[default]
    Not,
    UnderWay,
    /// Nodes that have not been tried, the next one last.
    Found(Vec<u32>),
}

/// A host that pieces are taken from, and how many of them are under way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Neighbour {
    pub(crate) host: u32,
    pub(crate) under_way: u32,
    /// When it became one, or the last piece of it was asked for or was over.
    pub(crate) active: Nanos,
}

/// One layer's blob on one host.
#[derive(Debug, Default)]
pub(crate) struct Blob {
    pub(crate) len_bytes: u64,
    pub(crate) piece_bytes: u64,
    pub(crate) piece_count: u32,
    pub(crate) have: Pieces,
    pub(crate) under_way: Pieces,
    /// Bytes that are here of pieces whose transfer broke off.
    pub(crate) broken: BTreeMap<u32, u64>,
    pub(crate) wanted: bool,
    pub(crate) unpacked: bool,
    pub(crate) search: Search,
    /// The scheduler or tracker knows of it.
    pub(crate) registered: bool,
    /// The next time that the scheduler or tracker may be asked, and how often it was asked in vain.
    pub(crate) asks_at: Nanos,
    pub(crate) asked_in_vain: u32,
    /// It reads the registry itself.
    pub(crate) back_to_source: bool,
    pub(crate) neighbours: Vec<Neighbour>,
    /// Hosts that take pieces from here.
    pub(crate) takers: BTreeSet<u32>,
    /// How many neighbours have each piece.
    pub(crate) rarity: Vec<u16>,
}

impl Blob {
    pub(crate) fn is_whole(&self) -> bool {
        self.have.count() == self.piece_count
    }

    /// Bytes of a piece, or of the whole.
    pub(crate) fn len_of(&self, piece: u32) -> u64 {
        if piece == ALL_PIECES {
            return self.len_bytes;
        }
        self.piece_bytes.min(self.len_bytes.saturating_sub(u64::from(piece) * self.piece_bytes)).max(1)
    }
}

/// A piece on its way.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) layer: u16,
    pub(crate) piece: u32,
    /// Who sends; `None` for the registry.
    pub(crate) from: Option<u32>,
    pub(crate) left_bytes: u64,
    pub(crate) flow: Option<FlowNo>,
    pub(crate) sign: Nanos,
    /// Something of it is not what it should be.
    pub(crate) wrong: bool,
}

/// What a node of a model keeps beside its layers.
#[derive(Debug, Default)]
pub(crate) struct Rival {
    pub(crate) blobs: Vec<Blob>,
    pub(crate) transfers: BTreeMap<u64, Transfer>,
    pub(crate) next_transfer: u64,
    /// Failures in a row, and until when it rests for them.
    pub(crate) failures: u32,
    pub(crate) rests_until: Nanos,
    /// A look at what can be asked for is planned for then.
    pub(crate) looks_at: Option<Nanos>,
    pub(crate) unpacking: bool,
    /// The program has begun to read.
    pub(crate) reads: bool,
    pub(crate) uploads: u32,
    /// Spans that are fetched or decoded, of the lazy model.
    pub(crate) spans_under_way: BTreeSet<(u16, u32)>,
}

impl Rival {
    /// Forgets what dies with the daemon; the content store stays.
    pub(crate) fn die(&mut self) {
        self.transfers.clear();
        self.spans_under_way.clear();
        (self.failures, self.rests_until, self.looks_at) = (0, 0, None);
        (self.unpacking, self.reads, self.uploads) = (false, false, 0);
        for blob in &mut self.blobs {
            blob.under_way = Pieces::none_of(blob.piece_count);
            (blob.search, blob.registered, blob.asks_at, blob.asked_in_vain) = (Search::Not, false, 0, 0);
            blob.neighbours.clear();
            blob.takers.clear();
            blob.rarity.iter_mut().for_each(|count| *count = 0);
        }
    }
}

/// What the scheduler or the tracker knows of one layer, and who announces it whole.
#[derive(Debug, Default)]
pub(crate) struct Swarm {
    /// In the order in which they came.
    pub(crate) members: Vec<u32>,
    /// Nodes that have it whole and say so.
    pub(crate) providers: Vec<u32>,
    /// Peers that were let to the registry.
    pub(crate) back_to_source: u32,
    /// The hosts that hold it for all have been told.
    pub(crate) seeded: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_pieces_are_sets() {
        let mut some = Pieces::none_of(130);
        [0, 63, 64, 129, 64].into_iter().for_each(|piece| some.insert(piece));
        assert_eq!((some.count(), some.contains(129), some.contains(128), some.contains(500)), (4, true, false, false));
        let mut taken = Pieces::none_of(130);
        taken.insert(63);
        let beyond: Vec<u32> = some.beyond(&taken, &Pieces::none_of(130)).collect();
        assert_eq!(beyond, [0, 64, 129]);
        some.remove(0);
        some.remove(0);
        assert_eq!((some.count(), Pieces::all_of(130).count()), (3, 130));
    }

    #[test]
    fn the_last_piece_is_what_is_left() {
        let blob = Blob { len_bytes: 10, piece_bytes: 4, piece_count: 3, ..Blob::default() };
        assert_eq!([0, 1, 2, ALL_PIECES].map(|piece| blob.len_of(piece)), [4, 4, 2, 10]);
    }
}
