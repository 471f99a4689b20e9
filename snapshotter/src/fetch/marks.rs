//! Where readers should be heard of although nothing is missing.
//!
//! Reads of present chunks do not reach the fetch policy: they are answered where they come in. But the policy's
//! readahead has to know when a reader comes near the end of what was fetched for it, so it puts marks on chunks
//! ([`hermes_policy::event::Action::Watch`]), and the read that reaches one reports itself, once. A read costs a few
//! relaxed loads.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use hermes_policy::limits::Limits;

/// No mark is set. Logical offsets are far below it.
const NONE: u64 = u64::MAX;

/// The marks of one layer, as logical offsets.
#[derive(Debug)]
pub struct Marks {
    places: Vec<AtomicU64>,
}

impl Default for Marks {
    /// As many as the policy sets.
    fn default() -> Self {
        Self::new(Limits::default().readahead_streams)
    }
}

impl Marks {
    /// Room for `count` marks, none of them set.
    pub fn new(count: usize) -> Self {
        Self { places: (0..count).map(|_| AtomicU64::new(NONE)).collect() }
    }

    /// Moves mark number `place` to `offset`; a place beyond the last is ignored, for marks are hints.
    pub fn set(&self, place: usize, offset: u64) {
        if let Some(mark) = self.places.get(place) {
            mark.store(offset, Ordering::Relaxed);
        }
    }

    /// Whether a mark is set in `range`. It is taken away, so that only one of parallel reads reports it.
    pub fn take(&self, range: &Range<u64>) -> bool {
        let mut taken = false;
        for place in &self.places {
            let mark = place.load(Ordering::Relaxed);
            if range.contains(&mark) {
                taken |= place.compare_exchange(mark, NONE, Ordering::Relaxed, Ordering::Relaxed).is_ok();
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_found_once_by_the_read_that_covers_it() {
        let marks = Marks::new(2);
        assert!(!marks.take(&(0..NONE)), "nothing is set yet");
        marks.set(1, 100);
        marks.set(2, 50);
        assert!(!marks.take(&(0..100)), "place 2 does not exist, and the end is not part of a range");
        assert!(marks.take(&(100..101)));
        assert!(!marks.take(&(100..101)), "it was taken");
    }
}
