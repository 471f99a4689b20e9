//! Which reads of a layer wait for which part of it.
//!
//! Some thousand prefetch reads may wait for one layer while chunks arrive a thousand times a second; looking at every
//! read each time would cost a core. So reads are filed under the stretches of the layer that they touch. Reads that
//! touch many stretches (a whole file, a whole layer) are few, and looked at every time.

use std::collections::BTreeSet;

use hermes_image::runs::Runs;

use crate::event::ReadId;

/// Chunks in a stretch: 4 MiB at the usual 64 KiB.
const STRETCH_CHUNKS: u32 = 64;
/// Stretches that a read may be filed under before it counts as wide.
const STRETCHES_MAX: u32 = 8;

#[derive(Debug, Clone, Default)]
pub(super) struct Waiters {
    all: BTreeSet<ReadId>,
    filed: BTreeSet<(u32, ReadId)>,
    wide: BTreeSet<ReadId>,
}

/// The stretches that a set touches, first to last.
fn stretches(chunks: &Runs) -> impl Iterator<Item = u32> + '_ {
    let mut next = 0;
    chunks.iter().flat_map(move |run| {
        let first = (run.start / STRETCH_CHUNKS).max(next);
        next = (run.end - 1) / STRETCH_CHUNKS + 1;
        first..next
    })
}

impl Waiters {
    /// Files a read under all that it needs.
    pub(super) fn insert(&mut self, id: ReadId, needs: &Runs) {
        self.all.insert(id);
        if stretches(needs).nth(STRETCHES_MAX as usize).is_some() {
            self.wide.insert(id);
        } else {
            self.filed.extend(stretches(needs).map(|stretch| (stretch, id)));
        }
    }

    /// Takes a read out. `needs` is what it was filed under.
    pub(super) fn remove(&mut self, id: ReadId, needs: &Runs) {
        if self.all.remove(&id) && !self.wide.remove(&id) {
            for stretch in stretches(needs) {
                self.filed.remove(&(stretch, id));
            }
        }
    }

    /// The reads that may need one of `chunks`, in order of their names: all that do, and some that do not.
    pub(super) fn near(&self, chunks: &Runs) -> BTreeSet<ReadId> {
        let mut near = self.wide.clone();
        for stretch in stretches(chunks) {
            near.extend(self.filed.range((stretch, ReadId(0))..=(stretch, ReadId(u64::MAX))).map(|(_, id)| *id));
        }
        near
    }

    /// All reads.
    pub(super) fn all(&self) -> &BTreeSet<ReadId> {
        &self.all
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    use super::*;

    proptest! {
        #[test]
        fn no_read_that_needs_a_chunk_is_overlooked(
            reads in proptest::collection::vec(proptest::collection::vec((0_u32..3000, 1_u32..900), 1..4), 1..20),
            start in 0_u32..3000, len in 1_u32..300, gone in 0_usize..20,
        ) {
            let reads: Vec<Runs> = reads
                .into_iter()
                .map(|runs| runs.into_iter().map(|(start, len)| start..start + len).collect())
                .collect();
            let mut waiters = Waiters::default();
            for (no, needs) in reads.iter().enumerate() {
                waiters.insert(ReadId(no as u64), needs);
            }
            if let Some(needs) = reads.get(gone) {
                waiters.remove(ReadId(gone as u64), needs);
            }
            let near = waiters.near(&Runs::one(start..start + len));
            for (no, needs) in reads.iter().enumerate().filter(|(no, _)| *no != gone) {
                let needed = !needs.within(start..start + len).is_empty();
                prop_assert!(!needed || near.contains(&ReadId(no as u64)));
            }
            prop_assert!(!near.contains(&ReadId(gone as u64)));
            for (no, needs) in reads.iter().enumerate() {
                waiters.remove(ReadId(no as u64), needs);
            }
            prop_assert_eq!((waiters.all.len(), waiters.filed.len(), waiters.wide.len()), (0, 0, 0));
        }
    }

    #[test]
    fn far_reads_are_not_looked_at() {
        let mut waiters = Waiters::default();
        for no in 0..1000 {
            waiters.insert(ReadId(no), &Runs::one(no as u32 * 10..no as u32 * 10 + 3));
        }
        assert!(waiters.near(&Runs::one(5000..5004)).len() <= 14);
        waiters.insert(ReadId(1000), &Runs::one(0..10_000));
        assert!(waiters.near(&Runs::one(5000..5004)).contains(&ReadId(1000)));
    }
}
