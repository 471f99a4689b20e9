//! A profile of one image for another one: what an earlier version read, the next one reads too, as far as it has it.
//!
//! A layer that both have is the same under the same numbers. A chunk of another layer is looked for by its name: chunk
//! boundaries follow files, so files that did not change are the same chunks, wherever they are. What was rebuilt has other
//! names, and is found by path ([`super::paths`]): the chunk at the same place of the file of the same name.

use std::collections::{BTreeMap, BTreeSet};

use hermes_image::ids::{ChunkId, ChunkNo, DiffId};
use hermes_image::index::chunks::ChunkTable;

use super::paths::PathMap;
use super::{LAYERS_MAX, Profile, Step};

/// `old` in terms of an image whose layers have the tables `new`, lowest first. `old_id` names a chunk of the old image, as
/// far as its tables are still known; `paths` knows the files of both, where somebody has looked.
///
/// Steps keep their order, times and weights; what is found nowhere is left out. No chunk is in two steps.
pub fn carry_over(
    old: &Profile,
    old_id: impl Fn(DiffId, u32) -> Option<ChunkId>,
    new: &[&ChunkTable],
    paths: &PathMap,
) -> Profile {
    let places: BTreeMap<DiffId, u16> =
        new.iter().take(LAYERS_MAX).zip(0..).map(|(table, place)| (table.diff_id(), place)).collect();
    let named = names(old, &places, new);
    let mut taken = BTreeSet::new();
    let mut steps: Vec<Step> = Vec::new();
    for step in &old.steps {
        let Some(layer) = old.layers.get(usize::from(step.layer)) else { continue };
        for chunk in step.chunks.clone() {
            let by_name = || old_id(*layer, chunk).and_then(|id| named.get(&id).copied());
            let found: Vec<(u16, u32)> = match places.get(layer) {
                Some(place) => vec![(*place, chunk)],
                None => by_name().map_or_else(
                    || {
                        let same = paths.places(*layer, chunk).into_iter();
                        same.filter_map(|(layer, chunk)| Some((*places.get(&layer)?, chunk))).collect()
                    },
                    |found| vec![found],
                ),
            };
            for (place, chunk) in found {
                let exists = new.get(usize::from(place)).is_some_and(|table| chunk < table.count());
                if exists && taken.insert((place, chunk)) {
                    add(&mut steps, step, place, chunk);
                }
            }
        }
    }
    let layers = new.iter().take(LAYERS_MAX).map(|table| table.diff_id()).collect();
    Profile { records: old.records, newest_seconds: old.newest_seconds, layers, steps }.fitted()
}

/// Where each name is that the layers have which `old` does not know; of several places the lowest.
fn names(old: &Profile, places: &BTreeMap<DiffId, u16>, new: &[&ChunkTable]) -> BTreeMap<ChunkId, (u16, u32)> {
    let mut named = BTreeMap::new();
    if old.layers.iter().all(|layer| places.contains_key(layer)) {
        return named;
    }
    for (table, place) in new.iter().take(LAYERS_MAX).zip(0..) {
        for chunk in 0..table.count() {
            named.entry(table.chunk_id(ChunkNo(chunk))).or_insert((place, chunk));
        }
    }
    named
}

/// Adds a chunk to the last step when it goes on there, else as a step of its own.
fn add(steps: &mut Vec<Step>, like: &Step, layer: u16, chunk: u32) {
    match steps.last_mut() {
        Some(last)
            if (last.layer, last.chunks.end) == (layer, chunk)
                && (last.at_ms, last.weight, last.spread_ms) == (like.at_ms, like.weight, like.spread_ms) =>
        {
            last.chunks.end += 1;
        }
        _ => steps.push(Step { layer, chunks: chunk..chunk + 1, ..like.clone() }),
    }
}
