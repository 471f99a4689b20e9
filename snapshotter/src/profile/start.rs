//! One start of an image, from the mount of its tree on.

use std::collections::BTreeMap;
use std::time::Duration;

use hermes_image::ids::DiffId;
use hermes_image::index::chunks::ChunkTable;
use hermes_image::runs::Runs;
use hermes_policy::completion::QUIET;
use hermes_policy::profile::{FirstTouch, START_MAX_MS, Seen, StartRecord};

use super::touches::{Claim, Touches};
use std::sync::Arc;

/// A start that nobody begins is waited for so long.
const BEGUN_WITHIN: Duration = Duration::from_secs(3600);

/// A layer, as a start sees it.
#[derive(Debug)]
pub struct StartLayer {
    /// The layer.
    pub diff_id: DiffId,
    /// Its chunks.
    pub table: ChunkTable,
    /// Where its reads are noted; `None` when the kernel reads it without the daemon.
    pub touches: Option<Arc<Touches>>,
}

#[derive(Debug)]
struct Recorded {
    diff_id: DiffId,
    table: ChunkTable,
    claim: Claim,
}

/// A start that is being recorded. Dropping it ends that, and nothing is kept.
#[derive(Debug)]
pub struct Start {
    layers: Vec<Recorded>,
}

/// How a start stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Look {
    /// From the mount to the first read, in microseconds; `None` before it.
    pub first_us: Option<u64>,
    /// From the mount to the last time that something was read for the first time.
    pub last_us: u64,
    /// What was read.
    pub seen: Seen,
    /// Bytes that the profile asked for and that came, or are about to.
    pub prefetched_bytes: u64,
}

impl Look {
    /// Whether the start is over, `age` after its mount.
    pub fn is_over(&self, age: Duration) -> bool {
        let Some(first_us) = self.first_us else { return age >= BEGUN_WITHIN };
        let (first, last) = (Duration::from_micros(first_us), Duration::from_micros(self.last_us));
        age.saturating_sub(last) >= QUIET || age.saturating_sub(first) >= Duration::from_millis(START_MAX_MS.into())
    }
}

impl Start {
    /// Begins to record reads of `layers`. Those that the kernel reads by itself, and those that are being recorded for too
    /// many other starts, are left out.
    pub fn begin(layers: Vec<StartLayer>) -> Self {
        let layers = layers.into_iter().filter_map(|layer| {
            let claim = layer.touches?.claim()?;
            Some(Recorded { diff_id: layer.diff_id, table: layer.table, claim })
        });
        Self { layers: layers.collect() }
    }

    /// Whether anything can be seen.
    pub fn is_blind(&self) -> bool {
        self.layers.is_empty()
    }

    /// Notes that the profile asks for `chunks`, before it does.
    pub fn prefetching(&self, layer: DiffId, chunks: &Runs) {
        self.layers.iter().filter(|known| known.diff_id == layer).for_each(|known| known.claim.prefetching(chunks));
    }

    /// Notes that the profile asked for `chunks` and they did not come.
    pub fn not_prefetched(&self, layer: DiffId, chunks: &Runs) {
        self.layers.iter().filter(|known| known.diff_id == layer).for_each(|known| known.claim.not_prefetched(chunks));
    }

    /// How it stands, and how it compares with a profile of the chunks `expected`.
    pub fn look(&self, expected: &BTreeMap<DiffId, Runs>) -> Look {
        let mut look = Look::default();
        for layer in &self.layers {
            let expected = expected.get(&layer.diff_id);
            for touched in layer.claim.touched() {
                let len = || {
                    let range = layer.table.run_range(touched.chunk..touched.chunk + 1);
                    range.end - range.start
                };
                if touched.prefetched {
                    look.prefetched_bytes += len();
                }
                let Some(at_us) = touched.at_us else { continue };
                look.first_us = Some(look.first_us.map_or(at_us, |first| first.min(at_us)));
                look.last_us = look.last_us.max(at_us);
                look.seen.chunks += 1;
                look.seen.in_profile += u64::from(expected.is_some_and(|expected| expected.contains(touched.chunk)));
                // A chunk that the reader had to wait for came too late to be of use, but for the time that was saved.
                if touched.prefetched {
                    look.seen.used_bytes += len();
                }
            }
        }
        look
    }

    /// What was read for the first time since `known`, which takes it up, in the order of the reads.
    pub fn first_reads(&self, known: &mut BTreeMap<DiffId, Runs>) -> Vec<(DiffId, u32)> {
        let mut reads = Vec::new();
        for layer in &self.layers {
            let known = known.entry(layer.diff_id).or_default();
            let new = layer.claim.touched().filter_map(|touched| Some((touched.at_us?, touched.chunk)));
            let new: Vec<_> = new.filter(|(_, chunk)| !known.contains(*chunk)).collect();
            for (at_us, chunk) in new {
                known.insert(chunk..chunk + 1);
                reads.push((at_us, layer.diff_id, chunk));
            }
        }
        reads.sort_unstable();
        reads.into_iter().map(|(_, layer, chunk)| (layer, chunk)).collect()
    }

    /// What was read so far; `None` when nothing was.
    pub fn record(&self, ended_seconds: u64) -> Option<StartRecord> {
        let first_us = self.look(&BTreeMap::new()).first_us?;
        let mut touches = Vec::new();
        // Places fit: a record cuts off what is beyond its bound.
        for (place, layer) in (0_u16..).zip(&self.layers) {
            touches.extend(layer.claim.touched().filter_map(|touched| {
                let at_ms = touched.at_us?.saturating_sub(first_us) / 1000;
                let at_ms = u32::try_from(at_ms).unwrap_or(u32::MAX);
                let (chunk, waited, source) = (touched.chunk, touched.waited, touched.source);
                Some(FirstTouch { at_ms, layer: place, chunk, waited, source })
            }));
        }
        let layers = self.layers.iter().map(|layer| layer.diff_id).collect();
        Some(StartRecord::of(ended_seconds, layers, touches))
    }
}

#[cfg(test)]
mod tests {
    use hermes_image::ids::ChunkId;
    use hermes_image::index::chunks::ChunkTableBuilder;

    use super::*;

    fn layer(no: u8) -> (StartLayer, Arc<Touches>) {
        let mut builder = ChunkTableBuilder::default();
        (0..10).for_each(|chunk| builder.push(ChunkId([chunk; 32]), 65_536).expect("a chunk"));
        let (table, touches) = (builder.finish(DiffId([no; 32])), Arc::new(Touches::new(10)));
        (StartLayer { diff_id: DiffId([no; 32]), table, touches: Some(Arc::clone(&touches)) }, touches)
    }

    #[test]
    fn a_start_is_what_was_read_of_the_layers_that_are_seen() {
        let ((first, touches), (second, others), (mut hidden, _)) = (layer(1), layer(2), layer(3));
        hidden.touches = None;
        let start = Start::begin(vec![first, hidden, second]);
        assert_eq!(start.record(7), None);
        start.prefetching(DiffId([1; 32]), &Runs::one(4..6));
        touches.read(4..5, &Runs::new());
        others.read(8..9, &Runs::one(8..9));
        let expected = BTreeMap::from([(DiffId([1; 32]), Runs::one(0..5))]);
        let look = start.look(&expected);
        assert_eq!((look.prefetched_bytes, look.seen.used_bytes), (2 * 65_536, 65_536));
        assert_eq!((look.seen.chunks, look.seen.in_profile), (2, 1));
        let mut known = BTreeMap::from([(DiffId([2; 32]), Runs::one(8..9))]);
        assert_eq!(start.first_reads(&mut known), [(DiffId([1; 32]), 4)]);
        assert_eq!(start.first_reads(&mut known), []);
        let record = start.record(7).expect("something was read");
        assert_eq!(record.layers, [DiffId([1; 32]), DiffId([2; 32])]);
        assert_eq!(record.touches().iter().map(|touch| touch.waited).collect::<Vec<_>>(), [false, true]);
        drop(start);
        assert!(!touches.is_active() && !others.is_active());
    }

    #[test]
    fn a_start_is_over_when_it_has_settled_or_lasts_too_long() {
        let seconds = Duration::from_secs;
        let look = |first: Option<u64>, last: u64| Look {
            first_us: first.map(|at| at * 1_000_000),
            last_us: last * 1_000_000,
            ..Look::default()
        };
        assert!(!look(None, 0).is_over(seconds(3599)) && look(None, 0).is_over(seconds(3600)));
        assert!(!look(Some(50), 55).is_over(seconds(64)) && look(Some(50), 55).is_over(seconds(65)));
        // It reads on and on.
        assert!(!look(Some(50), 169).is_over(seconds(169)) && look(Some(50), 169).is_over(seconds(170)));
    }
}
