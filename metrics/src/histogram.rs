//! How long things took, counted by size.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A histogram while it counts, with one bucket more than it has bounds.
#[derive(Debug)]
pub struct Histogram<const BUCKETS: usize> {
    /// Upper bounds in seconds, ascending.
    bounds: &'static [f64],
    buckets: [AtomicU64; BUCKETS],
    micros: AtomicU64,
}

/// What a histogram has counted.
#[derive(Debug, Clone, PartialEq)]
pub struct Distribution {
    /// Upper bounds in seconds, ascending.
    pub bounds: &'static [f64],
    /// How many were in each bucket, that beyond the last bound included.
    pub buckets: Vec<u64>,
    /// The sum of all, in seconds.
    pub sum_seconds: f64,
}

impl<const BUCKETS: usize> Histogram<BUCKETS> {
    /// Empty, with the upper bounds `bounds` in seconds.
    ///
    /// # Panics
    /// When there are not as many bounds as buckets less one; in a constant, the compiler says so.
    pub const fn new(bounds: &'static [f64]) -> Self {
        assert!(bounds.len() + 1 == BUCKETS, "a bucket for each bound, and one beyond");
        Self { bounds, buckets: [const { AtomicU64::new(0) }; BUCKETS], micros: AtomicU64::new(0) }
    }

    /// Counts something that took so long.
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = self.bounds.iter().position(|bound| seconds <= *bound).unwrap_or(BUCKETS - 1);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.micros.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// What was counted so far.
    pub fn read(&self) -> Distribution {
        Distribution {
            bounds: self.bounds,
            buckets: self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect(),
            sum_seconds: self.micros.load(Ordering::Relaxed) as f64 / 1e6,
        }
    }
}
