//! Fetching by a profile: what to ask for next, how much at once, and when to stop.
//!
//! It begins with small requests side by side, so that the first chunks, which the reader wants at once, come first; what may
//! be under way grows with what has come, as the requests do. The fetch policy puts neighbours among them into one request and
//! lets readers that wait go first, always. Two things end it before its end: a start that reads something else than the
//! profile says, and a reader that has fallen too far behind, until it comes closer.

use std::collections::BTreeMap;
use std::sync::Arc;

use hermes_image::ids::{ChunkRange, DiffId};
use hermes_image::runs::Runs;

use super::Profile;
use crate::geometry::LayerGeometry;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// The bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefetchLimits {
    /// Uncompressed bytes of the first requests.
    pub first_batch_bytes: u64,
    /// Uncompressed bytes of the longest ones.
    pub batch_bytes: u64,
    /// Uncompressed bytes under way at first.
    pub first_flight_bytes: u64,
    /// Uncompressed bytes under way at most.
    pub flight_bytes: u64,
    /// Uncompressed bytes that were fetched and nobody has read yet, at most.
    pub ahead_bytes: u64,
    /// Chunks that a start has to have read before it is judged.
    pub judged_after_chunks: u64,
    /// Percent of the chunks that a start reads which have to be in the profile, else the profile is not for it.
    pub use_percent_min: u64,
}

impl Default for PrefetchLimits {
    fn default() -> Self {
        Self {
            // Demand asks are as large: eight of them in parallel hide 20 ms at 1 Gbit/s.
            first_batch_bytes: 512 * KIB,
            batch_bytes: 4 * MIB,
            first_flight_bytes: 4 * MIB,
            // A quarter of a second at 1 Gbit/s, and room for the fetch policy to find neighbours in.
            flight_bytes: 32 * MIB,
            // The start of a Spark master reads 115 MiB, the largest seen 400. A tree that is mounted and not read costs
            // that much and no more.
            ahead_bytes: 256 * MIB,
            // 4 MiB of demand: what two requests beside it can slow down is a tenth of a second at 1 Gbit/s.
            judged_after_chunks: 64,
            use_percent_min: 25,
        }
    }
}

impl PrefetchLimits {
    /// Those of a prefetch around what is read ([`super::Near`]), which knows less and is worth more where it is right.
    pub fn near() -> Self {
        // A Spark master and a Python service read 121 and 139 MB; that and what lies around it are 286 and 294.
        Self { ahead_bytes: 512 * MIB, ..Self::default() }
    }
}

/// What is to be asked for: chunks of one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// The layer.
    pub layer: DiffId,
    /// The chunks.
    pub chunks: Runs,
    /// Their uncompressed bytes.
    pub bytes: u64,
}

impl Batch {
    /// Adds chunks of a layer to what is asked for at once, unless there are none.
    pub(super) fn add(batches: &mut Vec<Self>, layer: DiffId, chunks: &Runs, bytes: u64) {
        match batches.iter_mut().find(|batch| batch.layer == layer) {
            _ if bytes == 0 => {}
            Some(batch) => {
                batch.chunks.insert_all(chunks);
                batch.bytes += bytes;
            }
            None => batches.push(Self { layer, chunks: chunks.clone(), bytes }),
        }
    }
}

/// What is under way and what came of it, within the bounds.
#[derive(Debug)]
pub(super) struct Flow {
    limits: PrefetchLimits,
    /// What may be under way now.
    window_bytes: u64,
    flight_bytes: u64,
    done_bytes: u64,
    used_bytes: u64,
}

impl Flow {
    pub(super) fn new(limits: PrefetchLimits) -> Self {
        let window_bytes = limits.first_flight_bytes.min(limits.flight_bytes);
        Self { limits, window_bytes, flight_bytes: 0, done_bytes: 0, used_bytes: 0 }
    }

    /// Whether more may be asked for.
    pub(super) fn has_room(&self) -> bool {
        let ahead = (self.done_bytes + self.flight_bytes).saturating_sub(self.used_bytes);
        self.flight_bytes < self.window_bytes && ahead < self.limits.ahead_bytes
    }

    /// What may be under way.
    #[cfg(test)]
    pub(super) fn window_bytes(&self) -> u64 {
        self.window_bytes
    }

    /// How much at once.
    pub(super) fn batch_bytes(&self) -> u64 {
        (self.window_bytes / 8).clamp(self.limits.first_batch_bytes, self.limits.batch_bytes)
    }

    /// So much was asked for.
    pub(super) fn asked(&mut self, bytes: u64) {
        self.flight_bytes += bytes;
    }

    /// So much is over, however it ended.
    pub(super) fn ended(&mut self, bytes: u64) {
        self.flight_bytes = self.flight_bytes.saturating_sub(bytes);
        self.done_bytes += bytes;
    }

    /// So much more may be under way.
    pub(super) fn widen(&mut self, bytes: u64) {
        self.window_bytes = (self.window_bytes + bytes).min(self.limits.flight_bytes);
    }

    /// As [`Self::widen`] when all that may be under way is one batch more once it came: how what shares a link keeps to it.
    pub(super) fn widen_gently(&mut self, bytes: u64) {
        self.widen(self.limits.first_batch_bytes * bytes / self.window_bytes.max(1));
    }

    /// Half as much may be under way, but one of the first batches always.
    pub(super) fn halve(&mut self) {
        self.window_bytes = (self.window_bytes / 2).max(self.limits.first_batch_bytes);
    }

    /// So much of what came has been read, all in all. Less than before changes nothing.
    pub(super) fn used(&mut self, bytes: u64) {
        self.used_bytes = self.used_bytes.max(bytes);
    }
}

/// What the start has read so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Seen {
    /// Chunks that were read.
    pub chunks: u64,
    /// Of these, chunks that the profile has.
    pub in_profile: u64,
    /// Bytes of chunks that were prefetched and read.
    pub used_bytes: u64,
}

/// How it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefetchState {
    /// There is more to ask for.
    Running,
    /// All of the profile was asked for.
    Done,
    /// The start reads something else.
    PoorUse,
}

/// A prefetch by one profile.
#[derive(Debug)]
pub struct Prefetch {
    limits: PrefetchLimits,
    flow: Flow,
    layers: Vec<(DiffId, Arc<LayerGeometry>)>,
    /// The layer by its place among `layers`, and chunks that exist.
    steps: Vec<(usize, ChunkRange)>,
    next: usize,
    seen: Seen,
    state: PrefetchState,
}

impl Prefetch {
    /// Fetches by `profile` what the layers `geometries` have; what else it names is left out.
    pub fn new(profile: &Profile, geometries: &BTreeMap<DiffId, Arc<LayerGeometry>>, limits: PrefetchLimits) -> Self {
        let layers: Vec<_> = geometries.iter().map(|(layer, geometry)| (*layer, Arc::clone(geometry))).collect();
        let steps = profile.steps.iter().filter_map(|step| {
            let layer = profile.layers.get(usize::from(step.layer))?;
            let place = layers.binary_search_by_key(&layer, |(layer, _)| layer).ok()?;
            let count = layers[place].1.chunk_count();
            let chunks = step.chunks.start.min(count)..step.chunks.end.min(count);
            (!chunks.is_empty()).then_some((place, chunks))
        });
        let (flow, steps, seen) = (Flow::new(limits), steps.collect(), Seen::default());
        Self { limits, flow, layers, steps, next: 0, seen, state: PrefetchState::Running }
    }

    /// The chunks of the profile that exist, by layer.
    pub fn chunks(&self) -> BTreeMap<DiffId, Runs> {
        let mut all: BTreeMap<DiffId, Runs> = BTreeMap::new();
        for (place, chunks) in &self.steps {
            all.entry(self.layers[*place].0).or_default().insert(chunks.clone());
        }
        all
    }

    /// How it stands.
    pub fn state(&self) -> PrefetchState {
        self.state
    }

    /// What to ask for now, empty when that has to wait for [`Self::ended`] or [`Self::saw`], or the end has come; `missing`
    /// says what of a layer's chunks is not here. All of it counts as under way from now on.
    pub fn next(&mut self, mut missing: impl FnMut(DiffId, ChunkRange) -> Runs) -> Vec<Batch> {
        let mut batches: Vec<Batch> = Vec::new();
        if self.state != PrefetchState::Running || !self.flow.has_room() {
            return batches;
        }
        let size = self.flow.batch_bytes();
        let mut total = 0;
        while total < size
            && let Some((place, chunks)) = self.steps.get_mut(self.next)
        {
            let (layer, geometry) = &self.layers[*place];
            // A step may be longer than a batch: its rest is the next one's beginning.
            let cut = chunks.clone().find(|chunk| total + geometry.len_bytes(&(chunks.start..chunk + 1)) >= size);
            let part = chunks.start..cut.map_or(chunks.end, |last| last + 1);
            chunks.start = part.end;
            if chunks.start == chunks.end {
                self.next += 1;
            }
            let wanted = missing(*layer, part.clone()).within(part);
            let bytes = wanted.iter().map(|run| geometry.len_bytes(&run)).sum::<u64>();
            total += bytes;
            Batch::add(&mut batches, *layer, &wanted, bytes);
        }
        self.flow.asked(total);
        if self.next == self.steps.len() {
            self.state = PrefetchState::Done;
        }
        batches
    }

    /// A batch of so many bytes is over, however it ended.
    pub fn ended(&mut self, bytes: u64) {
        self.flow.ended(bytes);
        self.flow.widen(bytes);
    }

    /// What the start has read, all in all. Less than before changes nothing.
    pub fn saw(&mut self, seen: Seen) {
        let seen = Seen {
            chunks: seen.chunks.max(self.seen.chunks),
            in_profile: seen.in_profile.max(self.seen.in_profile),
            used_bytes: seen.used_bytes.max(self.seen.used_bytes),
        };
        self.seen = seen;
        self.flow.used(seen.used_bytes);
        let is_poor = seen.in_profile * 100 < seen.chunks * self.limits.use_percent_min;
        if self.state == PrefetchState::Running && seen.chunks >= self.limits.judged_after_chunks && is_poor {
            self.state = PrefetchState::PoorUse;
        }
    }
}
