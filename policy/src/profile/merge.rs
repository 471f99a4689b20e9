//! Several starts into one profile.
//!
//! A chunk is in the profile when more than a third of the records have it, of those that saw its layer: one run that reads something else (somebody who
//! looked around with a shell, a crash half-way) has no say as soon as there are three. Its place is the median of its places
//! in the records, counted in chunks rather than in milliseconds, because a start from a registry and one from memory read the
//! same things in the same order at different speeds. The result does not depend on the order in which records are given.

use std::collections::{BTreeMap, BTreeSet};

use hermes_image::ids::DiffId;

use super::{LAYERS_MAX, Profile, RECORD_AGE_MAX_SECONDS, RECORDS_MAX, StartRecord, Step};

/// Chunks are in the profile when this many times the records that have them are more than all.
const SHARE: usize = 3;
/// Neighbouring chunks are one step when their places are no further apart than this, in chunks: 4 MiB, what one request for
/// prefetch asks for.
const JOINED_PLACES: u64 = 64;
/// Own records that outweigh a profile of others: from then on no odd run has a say.
const OWN_RECORDS_MIN: u8 = 3;

/// The newest [`RECORDS_MAX`] of `records`, without those that are too old to count; newest first.
pub fn keep_newest(mut records: Vec<StartRecord>) -> Vec<StartRecord> {
    records.sort_unstable_by(|a, b| b.cmp(a));
    let newest = records.first().map_or(0, |record| record.ended_seconds);
    records.retain(|record| newest - record.ended_seconds <= RECORD_AGE_MAX_SECONDS);
    records.truncate(RECORDS_MAX);
    records
}

/// One record's word on a chunk.
#[derive(Debug, Clone, Copy)]
struct Word {
    /// Chunks that were read before it.
    place: u64,
    at_ms: u32,
}

/// A chunk of the profile to be.
#[derive(Debug)]
struct Merged {
    layer: DiffId,
    chunk: u32,
    place: u64,
    at_ms: u32,
    spread_ms: u32,
    weight: u8,
}

/// What `records` have in common; `None` when there is none that counts, or they have nothing.
pub fn merge(records: &[StartRecord]) -> Option<Profile> {
    let records = keep_newest(records.to_vec());
    let newest_seconds = records.first()?.ended_seconds;
    let mut words: BTreeMap<(DiffId, u32), Vec<Word>> = BTreeMap::new();
    let mut saw: BTreeMap<DiffId, usize> = BTreeMap::new();
    for record in &records {
        let layers: BTreeSet<DiffId> = record.layers.iter().copied().collect();
        layers.into_iter().for_each(|layer| *saw.entry(layer).or_default() += 1);
        let mut place = 0;
        for touch in &record.touches {
            // A record's touches name its own layers.
            let layer = record.layers[usize::from(touch.layer)];
            for chunk in touch.range() {
                words.entry((layer, chunk)).or_default().push(Word { place, at_ms: touch.at_ms });
                place += 1;
            }
        }
    }
    let count = records.len();
    let merged = words.into_iter().filter_map(|((layer, chunk), words)| {
        let all = saw.get(&layer).copied().unwrap_or(count);
        if words.len() * SHARE <= all {
            return None;
        }
        let places: Vec<u64> = words.iter().map(|word| word.place).collect();
        let times: Vec<u64> = words.iter().map(|word| u64::from(word.at_ms)).collect();
        Some(Merged {
            layer,
            chunk,
            place: quantile(places.clone(), 2),
            // Times are below 2^32, and a share of at most all is 100 percent.
            at_ms: quantile(times.clone(), 2) as u32,
            spread_ms: (quantile(times.clone(), 3) - quantile(times, 1)) as u32,
            weight: (words.len() * 100 / all).clamp(1, 100) as u8,
        })
    });
    let profile = steps(merged.collect(), count as u8, newest_seconds);
    (!profile.steps.is_empty()).then(|| profile.fitted())
}

/// The value at so many quarters of the way, the lower one of two.
fn quantile(mut values: Vec<u64>, quarters: usize) -> u64 {
    values.sort_unstable();
    values.get((values.len().saturating_sub(1)) * quarters / 4).copied().unwrap_or(0)
}

/// Joins neighbours, which come in order, and puts what comes of it into the order of reading.
fn steps(merged: Vec<Merged>, records: u8, newest_seconds: u64) -> Profile {
    let mut layers: Vec<DiffId> = Vec::new();
    let mut placed: Vec<(u64, Step)> = Vec::new();
    for chunk in merged {
        if layers.last() != Some(&chunk.layer) {
            if layers.len() == LAYERS_MAX {
                break;
            }
            layers.push(chunk.layer);
        }
        let layer = (layers.len() - 1) as u16;
        if let Some((place, step)) = placed.last_mut()
            && (step.layer, step.chunks.end, step.weight) == (layer, chunk.chunk, chunk.weight)
            && place.abs_diff(chunk.place) <= JOINED_PLACES
        {
            step.chunks.end += 1;
            step.spread_ms = step.spread_ms.max(chunk.spread_ms);
            *place = (*place).min(chunk.place);
            step.at_ms = step.at_ms.min(chunk.at_ms);
            continue;
        }
        let chunks = chunk.chunk..chunk.chunk + 1;
        let step = Step { layer, chunks, at_ms: chunk.at_ms, weight: chunk.weight, spread_ms: chunk.spread_ms };
        placed.push((chunk.place, step));
    }
    placed.sort_by_key(|(place, step)| (*place, step.layer, step.chunks.start));
    let steps = placed.into_iter().map(|(_, step)| step).collect();
    Profile { records, newest_seconds, layers, steps, donors: Vec::new() }
}

/// Which profile to use: that of this node's own starts once they are enough, else the one that others have given, else the
/// own one.
pub fn choose(own: Option<Profile>, given: Option<Profile>) -> Option<Profile> {
    match (own, given) {
        (Some(own), Some(given)) if own.records < OWN_RECORDS_MIN && given.records > own.records => Some(given),
        (Some(own), _) => Some(own),
        (None, given) => given,
    }
}
