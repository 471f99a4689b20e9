//! Plain counters, for whoever exports metrics. Relaxed atomics: each is right, none is in step with another.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What the store has done since it was opened.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: Counter,)*
        }

        impl Counters {
            /// Name and value of each, in a fixed order.
            pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)*]
            }
        }
    };
}

counters! {
    /// Reads that were answered.
    read_hits,
    /// Reads that met an absent chunk.
    read_misses,
    /// Bytes of the reads that were answered.
    read_bytes,
    /// Reads done again because an eviction came between.
    read_retries,
    /// Chunks written.
    put_chunks,
    /// Bytes written.
    put_bytes,
    /// Chunks that were given again while they were present.
    put_duplicates,
    /// Chunks that found no room.
    full_chunks,
    /// Chunks copied from elsewhere in the store.
    copied_chunks,
    /// Bytes copied from elsewhere in the store.
    copied_bytes,
    /// Chunks evicted.
    evicted_chunks,
    /// Bytes evicted.
    evicted_bytes,
    /// Sync rounds begun. A chunk that was put before a round began is durable when that round has ended.
    sync_rounds_begun,
    /// Sync rounds ended without an error.
    sync_rounds_ended,
    /// Sync rounds that met an error; what they could not write is tried again or fetched again.
    sync_failures,
    /// Chunks made durable.
    synced_chunks,
    /// Chunks that no longer had their bytes when they were read, and were forgotten.
    damaged_chunks,
    /// Artifacts that no longer had their bytes when they were read, and were removed.
    damaged_artifacts,
    /// Artifacts that were given without being hashed again, because they were right a while ago.
    artifacts_not_hashed,
}

/// One counter.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn add(&self, value: u64) {
        self.0.fetch_add(value, Ordering::Relaxed);
    }
}
