//! What a start of an image reads, and what to fetch ahead of the next one.
//!
//! ```text
//!  first touches of one start --> StartRecord --\
//!  first touches of the next  --> StartRecord ----> merge --> Profile --> Prefetch --> what to ask for, in order
//!                                 (8 are kept)              ^    |
//!                        profile of an earlier version --> carry_over
//! ```
//!
//! A [`StartRecord`] is one start as a node saw it. A [`Profile`] is what several of them have in common, in their order.
//! It is a hint: nothing depends on its being right, it is not signed, and a hostile one can cost no more than what
//! [`Prefetch`] may have under way and ahead of the reader. Whoever uses one compares it with the chunk tables of the image,
//! which are signed; chunks that do not exist are left out.
//!
//! A start that nobody has recorded, or that reads something else, is fetched around what it reads ([`Near`]).
//!
//! All of it is pure: times and lists come in, decisions go out. Encodings are bounded, versioned, and have one form each
//! ([`codec`]).

pub mod carry;
pub mod codec;
pub mod files;
mod merge;
mod near;
pub mod paths;
mod prefetch;
mod record;
#[cfg(test)]
mod tests;

use hermes_image::ids::{ArtifactId, ChunkRange, DiffId};

pub use carry::carry_over;
pub use codec::ProfileError;
pub use merge::{choose, keep_newest, merge};
pub use near::Near;
pub use prefetch::{Batch, Prefetch, PrefetchLimits, PrefetchState, Seen};
pub use record::{FirstTouch, StartRecord, Touch, TouchSource};

/// Longest start that is recorded, in milliseconds: after two minutes a service that does not answer has other troubles.
pub const START_MAX_MS: u32 = 120_000;
/// Records of an image that are kept and merged, the newest: enough that one odd run has no say, few enough that what an
/// image reads today wins over what it read a month ago.
pub const RECORDS_MAX: usize = 8;
/// Records that are so much older than the newest have no say any more, in seconds: 90 days.
pub const RECORD_AGE_MAX_SECONDS: u64 = 90 * 24 * 3600;
/// Layers of one record or profile. Images have at most some hundred.
pub const LAYERS_MAX: usize = 1024;
/// Runs of chunks in one record. The start of a Spark master has 1,100.
pub const TOUCHES_MAX: usize = 16_384;
/// Chunks in one record: 16 GiB of the usual size.
pub const CHUNKS_MAX: u64 = 1 << 18;
/// Donors of one profile: images change in a few layers from version to version.
pub const DONORS_MAX: usize = 16;
/// Longest encoding of a profile, in bytes (design: small enough to go with every index).
pub const PROFILE_LEN_MAX_BYTES: usize = 64 * 1024;
/// Longest encoding of a record, in bytes: its runs at their longest, and its layers.
pub const RECORD_LEN_MAX_BYTES: usize = 512 * 1024;

/// Chunks that belong together: one run, at one place of the order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The layer, by its place in [`Profile::layers`].
    pub layer: u16,
    /// The chunks, never none.
    pub chunks: ChunkRange,
    /// When they are first read, in milliseconds since the first read of the start: the median of the records.
    pub at_ms: u32,
    /// In how many percent of the records they are, 1 to 100.
    pub weight: u8,
    /// How far the middle half of the records differs about the time, in milliseconds.
    pub spread_ms: u32,
}

/// A layer of an earlier version that has chunks of a layer of this one, under other numbers: who holds it can give them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Donor {
    /// The layer of this image, by its place in [`Profile::layers`].
    pub layer: u16,
    /// The layer of the earlier version.
    pub diff_id: DiffId,
    /// That layer's chunk table.
    pub table: ArtifactId,
}

/// What the starts of an image read, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// How many starts it is made of, 1 to 255.
    pub records: u8,
    /// When the newest of them was, in Unix seconds.
    pub newest_seconds: u64,
    /// The layers that steps are of.
    pub layers: Vec<DiffId>,
    /// The steps, first things first. No chunk is in two of them.
    pub steps: Vec<Step>,
    /// Where else chunks of these layers are, in ascending order and none twice; none of an image's own starts.
    pub donors: Vec<Donor>,
}

impl Profile {
    /// Number of chunks.
    pub fn chunk_count(&self) -> u64 {
        self.steps.iter().map(|step| u64::from(step.chunks.end - step.chunks.start)).sum()
    }

    /// Only the layers that steps use, and no more steps than fit [`PROFILE_LEN_MAX_BYTES`]: those go first that the fewest
    /// records have, and among them the latest.
    pub(crate) fn fitted(mut self) -> Self {
        self.drop_unused_layers();
        if codec::encoded_len(&self) <= PROFILE_LEN_MAX_BYTES {
            return self;
        }
        let mut by_worth: Vec<usize> = (0..self.steps.len()).collect();
        by_worth.sort_by_key(|step| (std::cmp::Reverse(self.steps[*step].weight), *step));
        let with = |count: usize| {
            let mut kept = by_worth[..count].to_vec();
            kept.sort_unstable();
            let steps = kept.into_iter().map(|step| self.steps[step].clone()).collect();
            let (layers, donors) = (self.layers.clone(), self.donors.clone());
            let mut profile = Self { steps, layers, donors, ..self };
            profile.drop_unused_layers();
            profile
        };
        let (mut fits, mut too_many) = (0, self.steps.len());
        while too_many - fits > 1 {
            let middle = fits + (too_many - fits) / 2;
            if codec::encoded_len(&with(middle)) <= PROFILE_LEN_MAX_BYTES { fits = middle } else { too_many = middle }
        }
        with(fits)
    }

    fn drop_unused_layers(&mut self) {
        let mut used = vec![false; self.layers.len()];
        self.steps.iter().for_each(|step| used[usize::from(step.layer)] = true);
        // Places fit: there are at most LAYERS_MAX layers.
        let mut next = 0_u16;
        let places: Vec<u16> = used
            .iter()
            .map(|used| {
                let place = next;
                next += u16::from(*used);
                place
            })
            .collect();
        self.steps.iter_mut().for_each(|step| step.layer = places[usize::from(step.layer)]);
        self.donors.retain(|donor| used[usize::from(donor.layer)]);
        self.donors.iter_mut().for_each(|donor| donor.layer = places[usize::from(donor.layer)]);
        let mut used = used.into_iter();
        self.layers.retain(|_| used.next() == Some(true));
    }
}
