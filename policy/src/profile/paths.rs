//! The files of two images, so that what one of them read can be found in the other by path.

use std::collections::BTreeMap;

use hermes_image::ids::{ChunkRange, DiffId};

/// Places in the new image that one chunk of the old one may lead to: a chunk of small files holds dozens, and following
/// each would fetch what nobody reads.
const PLACES_MAX: usize = 4;

/// Where the bytes of a file are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePlace {
    /// The layer.
    pub layer: DiffId,
    /// The chunks that hold them.
    pub chunks: ChunkRange,
}

/// The files that two images have at the same path.
#[derive(Debug, Clone, Default)]
pub struct PathMap {
    /// By where they are in the old image: layer, first chunk, and a number that tells files of one chunk apart.
    pairs: BTreeMap<(DiffId, u32, u32), (ChunkRange, FilePlace)>,
    /// Chunks of the longest file, so that a look-up knows how far back files can begin.
    longest: u32,
}

impl PathMap {
    /// Nothing is found by path.
    pub fn none() -> Self {
        Self::default()
    }

    /// The files of `old` and `new` that have a path in common. A path that comes twice means its last file, as upper layers
    /// hide lower ones.
    pub fn new<'a>(
        old: impl IntoIterator<Item = (&'a [u8], FilePlace)>,
        new: impl IntoIterator<Item = (&'a [u8], FilePlace)>,
    ) -> Self {
        let new: BTreeMap<&[u8], FilePlace> = new.into_iter().collect();
        let old: BTreeMap<&[u8], FilePlace> = old.into_iter().collect();
        let mut map = Self::default();
        for (number, (path, place)) in (0_u32..).zip(old) {
            if let Some(there) = new.get(path).filter(|_| !place.chunks.is_empty()) {
                map.longest = map.longest.max(place.chunks.end - place.chunks.start);
                map.pairs.insert((place.layer, place.chunks.start, number), (place.chunks, there.clone()));
            }
        }
        map
    }

    /// Where the files that `chunk` of `layer` of the old image holds are in the new one: at most four chunks, each once.
    pub fn places(&self, layer: DiffId, chunk: u32) -> Vec<(DiffId, u32)> {
        let first = (layer, chunk.saturating_sub(self.longest), 0);
        let mut places = Vec::new();
        for (chunks, there) in self.pairs.range(first..=(layer, chunk, u32::MAX)).map(|(_, pair)| pair) {
            if !chunks.contains(&chunk) {
                continue;
            }
            let at = there.chunks.start.saturating_add(chunk - chunks.start);
            let place = (there.layer, at);
            if there.chunks.contains(&at) && !places.contains(&place) {
                places.push(place);
            }
            if places.len() == PLACES_MAX {
                break;
            }
        }
        places
    }
}
