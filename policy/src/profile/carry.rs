//! A profile of one image for another one: what an earlier version read, the next one reads too, as far as it has it.
//!
//! A layer that both have is the same under the same numbers. A chunk of another layer is looked for by its name: chunk
//! boundaries follow files, so files that did not change are the same chunks, wherever they are. What was rebuilt has other
//! names, and is found by path ([`super::paths`]): the chunk at the same place of the file of the same name.
//!
//! Who has the earlier version has the chunks that were found by their names, in layers that the new one does not have: the
//! carried profile says which ([`Donor`]).

use std::collections::{BTreeMap, BTreeSet};

use hermes_image::ids::{ChunkId, ChunkNo, DiffId};
use hermes_image::index::chunks::ChunkTable;

use super::paths::PathMap;
use super::{DONORS_MAX, Donor, LAYERS_MAX, Profile, Step};

/// `old` in terms of an image whose layers have the tables `new`, lowest first. `old_table` gives those of the old image, as
/// far as they are still known; `paths` knows the files of both, where somebody has looked.
///
/// Steps keep their order, times and weights; what is found nowhere is left out. No chunk is in two steps.
pub fn carry_over<'a>(
    old: &Profile,
    old_table: impl Fn(DiffId) -> Option<&'a ChunkTable>,
    new: &[&ChunkTable],
    paths: &PathMap,
) -> Profile {
    let places: BTreeMap<DiffId, u16> =
        new.iter().take(LAYERS_MAX).zip(0..).map(|(table, place)| (table.diff_id(), place)).collect();
    let named = names(old, &places, new);
    let mut taken = BTreeSet::new();
    let mut steps: Vec<Step> = Vec::new();
    let mut given: BTreeMap<Donor, usize> = BTreeMap::new();
    for step in &old.steps {
        let Some(layer) = old.layers.get(usize::from(step.layer)) else { continue };
        let table = old_table(*layer);
        for chunk in step.chunks.clone() {
            let mut by_name = || {
                let table = table.filter(|table| chunk < table.count())?;
                let (layer, chunk) = *named.get(&table.chunk_id(ChunkNo(chunk)))?;
                let donor = Donor { layer, diff_id: table.diff_id(), table: table.id() };
                *given.entry(donor).or_default() += 1;
                Some(vec![(layer, chunk)])
            };
            let by_path = || {
                let same = paths.places(*layer, chunk).into_iter();
                same.filter_map(|(layer, chunk)| Some((*places.get(&layer)?, chunk))).collect()
            };
            let found = match places.get(layer) {
                Some(place) => vec![(*place, chunk)],
                None => by_name().unwrap_or_else(by_path),
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
    let Profile { records, newest_seconds, .. } = *old;
    Profile { records, newest_seconds, layers, steps, donors: most_giving(given) }.fitted()
}

/// Those that give the most.
fn most_giving(given: BTreeMap<Donor, usize>) -> Vec<Donor> {
    let mut given: Vec<(Donor, usize)> = given.into_iter().collect();
    given.sort_by_key(|(_, chunks)| std::cmp::Reverse(*chunks));
    given.truncate(DONORS_MAX);
    let mut donors: Vec<Donor> = given.into_iter().map(|(donor, _)| donor).collect();
    donors.sort();
    donors
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
