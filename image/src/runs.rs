//! Sets of chunks as sorted, disjoint, non-adjacent runs.
//!
//! An image has 10^5 chunks, so presence, questions and answers are never lists of single chunks. The same type is the
//! answer of the store ("what is here"), the have-map on the wire, and the unit in which `policy` thinks.

use std::ops::Range;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use thiserror::Error;

use crate::ids::ChunkRange;

/// Bytes that are no encoded set of runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum DecodeRunsError {
    /// The bytes end inside a number.
    #[error("run set ends inside a number")]
    Truncated,
    /// A run is empty, touches the one before it, or ends beyond the limit.
    #[error("run set holds an empty, touching or overflowing run")]
    Malformed,
    /// More runs than the caller allows.
    #[error("run set holds more than {limit} runs")]
    TooMany {
        /// The caller's limit.
        limit: usize,
    },
}

/// Where one of two sets has this many times the runs of the other, the place of each run of the smaller one is searched for
/// in the larger one; else both are walked through. A search among n runs costs about as much as log2(n) steps.
const SEARCH_PAYS: usize = 8;

/// Runs that stand in the set itself: as many as there is room for beside a vector's three words. Questions and reads mostly have one
/// or two, and 10,000 simulated nodes have tens of millions of them.
const RUNS_INLINE: usize = 2;

/// The runs of `runs` that do not end before `start`.
fn skip_to(runs: &[ChunkRange], start: u32, by_search: bool) -> &[ChunkRange] {
    let is_before = |run: &ChunkRange| run.end <= start;
    let skipped = match by_search {
        true => runs.partition_point(is_before),
        false => runs.iter().take_while(|run| is_before(run)).count(),
    };
    &runs[skipped..]
}

/// A set of chunk numbers as runs: sorted, disjoint, never empty, never adjacent.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Vec<[u32; 2]>", into = "Vec<[u32; 2]>")]
pub struct Runs {
    runs: SmallVec<[ChunkRange; RUNS_INLINE]>,
}

/// Starts and ends, in any order.
impl From<Vec<[u32; 2]>> for Runs {
    fn from(runs: Vec<[u32; 2]>) -> Self {
        runs.into_iter().map(|[start, end]| start..end).collect()
    }
}

impl From<Runs> for Vec<[u32; 2]> {
    fn from(runs: Runs) -> Self {
        runs.iter().map(|run| [run.start, run.end]).collect()
    }
}

impl Runs {
    /// The empty set.
    pub const fn new() -> Self {
        Self { runs: SmallVec::new_const() }
    }

    /// One run. An empty range gives the empty set.
    pub fn one(range: ChunkRange) -> Self {
        let mut runs = Self::new();
        runs.insert(range);
        runs
    }

    /// Whether no chunk is in the set.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// Number of chunks in the set.
    pub fn chunk_count(&self) -> u64 {
        self.runs.iter().map(|run| u64::from(run.end - run.start)).sum()
    }

    /// Number of runs, which is what the set costs.
    pub fn run_count(&self) -> usize {
        self.runs.len()
    }

    /// The runs in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = ChunkRange> + ExactSizeIterator + '_ {
        self.runs.iter().cloned()
    }

    /// The chunks in order.
    pub fn chunks(&self) -> impl Iterator<Item = u32> + '_ {
        self.runs.iter().cloned().flatten()
    }

    /// The first run, if any.
    pub fn first(&self) -> Option<ChunkRange> {
        self.runs.first().cloned()
    }

    /// Whether `chunk` is in the set.
    pub fn contains(&self, chunk: u32) -> bool {
        let after = self.runs.partition_point(|run| run.start <= chunk);
        after > 0 && self.runs[after - 1].end > chunk
    }

    /// Whether some of `range` is in the set.
    pub fn intersects(&self, range: &ChunkRange) -> bool {
        let after = self.runs.partition_point(|run| run.end <= range.start);
        self.runs.get(after).is_some_and(|run| run.start < range.end) && !range.is_empty()
    }

    /// Whether all of `range` is in the set. True for an empty range.
    pub fn contains_all(&self, range: ChunkRange) -> bool {
        if range.is_empty() {
            return true;
        }
        let after = self.runs.partition_point(|run| run.start <= range.start);
        after > 0 && self.runs[after - 1].end >= range.end
    }

    /// The indices of the runs that overlap or touch `range`.
    fn touching(&self, range: &ChunkRange) -> Range<usize> {
        let first = self.runs.partition_point(|run| run.end < range.start);
        let last = self.runs.partition_point(|run| run.start <= range.end);
        first..last.max(first)
    }

    /// Adds `range`.
    pub fn insert(&mut self, range: ChunkRange) {
        if range.is_empty() {
            return;
        }
        // Most sets are made from their start to their end.
        match self.runs.last_mut() {
            Some(last) if range.start < last.start => {}
            Some(last) if range.start <= last.end => {
                last.end = last.end.max(range.end);
                return;
            }
            _ => return self.runs.push(range),
        }
        let touched = self.touching(&range);
        if touched.is_empty() {
            return self.runs.insert(touched.start, range);
        }
        let end = self.runs[touched.end - 1].end.max(range.end);
        let merged = &mut self.runs[touched.start];
        *merged = merged.start.min(range.start)..end;
        self.runs.drain(touched.start + 1..touched.end);
    }

    /// Takes `range` out.
    pub fn remove(&mut self, range: ChunkRange) {
        if range.is_empty() {
            return;
        }
        let touched = self.touching(&range);
        let Some((first, last)) = self.runs[touched.clone()].first().zip(self.runs[touched.clone()].last()) else {
            return;
        };
        let before = first.start..first.end.min(range.start);
        let after = last.start.max(range.end)..last.end;
        let mut parts = [before, after].into_iter().filter(|part| part.start < part.end);
        let mut kept = touched.start;
        for (place, part) in touched.clone().zip(&mut parts) {
            self.runs[place] = part;
            kept = place + 1;
        }
        self.runs.drain(kept..touched.end);
        // A run that is cut in two.
        if let Some(part) = parts.next() {
            self.runs.insert(kept, part);
        }
    }

    /// Adds every chunk of `other`.
    pub fn insert_all(&mut self, other: &Self) {
        if other.runs.len() * SEARCH_PAYS <= self.runs.len() {
            return other.iter().for_each(|run| self.insert(run));
        }
        // One pass over both: each run is put at the end.
        let mine = std::mem::take(&mut self.runs);
        self.runs.reserve(mine.len().max(other.runs.len()));
        let (mut mine, mut theirs) = (mine.into_iter().peekable(), other.iter().peekable());
        loop {
            let next = match (mine.peek(), theirs.peek()) {
                (Some(one), Some(two)) if one.start <= two.start => mine.next(),
                (Some(_), None) => mine.next(),
                _ => theirs.next(),
            };
            let Some(run) = next else { return };
            self.insert(run);
        }
    }

    /// Takes every chunk of `other` out.
    pub fn remove_all(&mut self, other: &Self) {
        if self.runs.is_empty() {
            return;
        }
        if other.runs.len() * SEARCH_PAYS <= self.runs.len() {
            return other.iter().for_each(|run| self.remove(run));
        }
        *self = self.difference(other);
    }

    /// The chunks in both sets.
    pub fn intersection(&self, other: &Self) -> Self {
        let (few, many) = if self.runs.len() <= other.runs.len() { (self, other) } else { (other, self) };
        let by_search = few.runs.len() * SEARCH_PAYS <= many.runs.len();
        let (mut both, mut rest) = (SmallVec::new(), many.runs.as_slice());
        for run in &few.runs {
            rest = skip_to(rest, run.start, by_search);
            let common = rest.iter().take_while(|other| other.start < run.end);
            both.extend(common.map(|other| other.start.max(run.start)..other.end.min(run.end)));
        }
        Self { runs: both }
    }

    /// The chunks of `self` that are not in `other`.
    pub fn difference(&self, other: &Self) -> Self {
        let by_search = self.runs.len() * SEARCH_PAYS <= other.runs.len();
        let (mut left, mut rest) = (SmallVec::with_capacity(self.runs.len()), other.runs.as_slice());
        for run in &self.runs {
            rest = skip_to(rest, run.start, by_search);
            let mut start = run.start;
            for taken in rest.iter().take_while(|taken| taken.start < run.end) {
                if start < taken.start {
                    left.push(start..taken.start);
                }
                start = taken.end;
            }
            if start < run.end {
                left.push(start..run.end);
            }
        }
        Self { runs: left }
    }

    /// The chunks of `self` that lie in `range`.
    pub fn within(&self, range: ChunkRange) -> Self {
        let first = self.runs.partition_point(|run| run.end <= range.start);
        let inside = self.runs[first..].iter().take_while(|run| run.start < range.end);
        let cut = inside.map(|run| run.start.max(range.start)..run.end.min(range.end));
        Self { runs: cut.filter(|run| run.start < run.end).collect() }
    }

    /// The first chunk that is in both sets.
    pub fn first_common(&self, other: &Self) -> Option<u32> {
        let (mut mine, mut theirs) = (self.runs.as_slice(), other.runs.as_slice());
        loop {
            let (one, two) = (mine.first()?, theirs.first()?);
            if one.end <= two.start {
                mine = skip_to(mine, two.start, true);
            } else if two.end <= one.start {
                theirs = skip_to(theirs, one.start, true);
            } else {
                return Some(one.start.max(two.start));
            }
        }
    }

    /// The first chunk of the set that is not before `at`.
    pub fn first_from(&self, at: u32) -> Option<u32> {
        let next = self.runs.partition_point(|run| run.end <= at);
        self.runs.get(next).map(|run| run.start.max(at))
    }

    /// The first `count` chunks of the set.
    pub fn take(&self, count: u32) -> Self {
        let mut left = count;
        let mut runs = SmallVec::new();
        for run in &self.runs {
            if left == 0 {
                break;
            }
            let len = left.min(run.end - run.start);
            runs.push(run.start..run.start + len);
            left -= len;
        }
        Self { runs }
    }

    /// Appends the wire form: LEB128 numbers, first the number of runs, then for each run the gap from the end of the
    /// run before it and its length.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_varint(out, self.runs.len() as u64);
        let mut at = 0;
        for run in &self.runs {
            put_varint(out, u64::from(run.start - at));
            put_varint(out, u64::from(run.end - run.start));
            at = run.end;
        }
    }

    /// Reads the wire form from the front of `bytes` and moves `bytes` past it.
    ///
    /// # Errors
    /// When the bytes are no canonical set, name a chunk at or above `chunk_limit`, or hold more than `run_limit` runs.
    /// Nothing is allocated beyond `run_limit` runs, nor beyond what the bytes can hold.
    pub fn decode(bytes: &mut &[u8], chunk_limit: u32, run_limit: usize) -> Result<Self, DecodeRunsError> {
        let count = take_varint(bytes)?;
        let limit = usize::try_from(count).ok().filter(|count| *count <= run_limit);
        let Some(count) = limit else {
            return Err(DecodeRunsError::TooMany { limit: run_limit });
        };
        if count > bytes.len() {
            return Err(DecodeRunsError::Truncated);
        }
        let mut runs = SmallVec::with_capacity(count);
        let mut at = 0_u64;
        for index in 0..count {
            let gap = take_varint(bytes)?;
            let len = take_varint(bytes)?;
            let start = at.checked_add(gap).ok_or(DecodeRunsError::Malformed)?;
            let end = start.checked_add(len).ok_or(DecodeRunsError::Malformed)?;
            if len == 0 || (gap == 0 && index > 0) || end > u64::from(chunk_limit) {
                return Err(DecodeRunsError::Malformed);
            }
            // Both fit: `end` is at most `chunk_limit`, a u32.
            runs.push(start as u32..end as u32);
            at = end;
        }
        Ok(Self { runs })
    }
}

impl FromIterator<ChunkRange> for Runs {
    fn from_iter<T: IntoIterator<Item = ChunkRange>>(ranges: T) -> Self {
        let mut runs = Self::new();
        for range in ranges {
            runs.insert(range);
        }
        runs
    }
}

/// Appends `value` as LEB128: seven bits a byte, low bits first, the top bit set on all but the last byte.
pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Reads one LEB128 number from the front of `bytes` and moves `bytes` past it.
///
/// # Errors
/// When the bytes end inside the number, it does not fit 64 bits, or it has a shorter form.
pub fn take_varint(bytes: &mut &[u8]) -> Result<u64, DecodeRunsError> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (first, rest) = bytes.split_first().ok_or(DecodeRunsError::Truncated)?;
        *bytes = rest;
        let part = u64::from(first & 0x7f);
        if shift == 63 && part > 1 {
            return Err(DecodeRunsError::Malformed);
        }
        value |= part << shift;
        if first & 0x80 == 0 {
            // A last byte of zero adds nothing: the number has a shorter form, and every number has one form only.
            return if *first == 0 && shift > 0 { Err(DecodeRunsError::Malformed) } else { Ok(value) };
        }
    }
    Err(DecodeRunsError::Malformed)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn set_of(runs: &Runs) -> BTreeSet<u32> {
        runs.chunks().collect()
    }

    fn assert_canonical(runs: &Runs) {
        let mut end = None;
        for run in runs.iter() {
            assert!(run.start < run.end);
            assert!(end.is_none_or(|end| run.start > end), "adjacent or overlapping runs in {runs:?}");
            end = Some(run.end);
        }
    }

    proptest! {
        #[test]
        fn behaves_like_a_set(ops in proptest::collection::vec((any::<bool>(), 0_u32..60, 0_u32..20), 0..40),
                              other in proptest::collection::vec((0_u32..60, 0_u32..20), 0..10), from in 0_u32..60, len in 0_u32..30) {
            let mut runs = Runs::new();
            let mut oracle = BTreeSet::new();
            for (insert, start, len) in ops {
                if insert {
                    runs.insert(start..start + len);
                    oracle.extend(start..start + len);
                } else {
                    runs.remove(start..start + len);
                    oracle.retain(|chunk| !(start..start + len).contains(chunk));
                }
                assert_canonical(&runs);
                prop_assert_eq!(&set_of(&runs), &oracle);
            }
            let other: Runs = other.into_iter().map(|(start, len)| start..start + len).collect();
            prop_assert_eq!(set_of(&runs.intersection(&other)), oracle.intersection(&set_of(&other)).copied().collect());
            let mut union = runs.clone();
            union.insert_all(&other);
            assert_canonical(&union);
            prop_assert_eq!(set_of(&union), oracle.union(&set_of(&other)).copied().collect());
            let mut rest = runs.clone();
            rest.remove_all(&other);
            prop_assert_eq!(&rest, &runs.difference(&other));
            prop_assert_eq!(runs.first_common(&other), oracle.intersection(&set_of(&other)).next().copied());
            prop_assert_eq!(set_of(&runs.difference(&other)), oracle.difference(&set_of(&other)).copied().collect());
            prop_assert_eq!(runs.contains_all(from..from + len), (from..from + len).all(|chunk| oracle.contains(&chunk)));
            prop_assert_eq!(runs.contains(from), oracle.contains(&from));
            prop_assert_eq!(runs.first_from(from), oracle.range(from..).next().copied());
            let within = runs.within(from..from + len);
            assert_canonical(&within);
            assert_canonical(&runs.difference(&other));
            prop_assert_eq!(set_of(&within), oracle.range(from..from + len).copied().collect());
            prop_assert_eq!(set_of(&runs.take(len)), oracle.iter().copied().take(len as usize).collect());
            prop_assert_eq!(runs.chunk_count(), oracle.len() as u64);
            let mut bytes = Vec::new();
            runs.encode(&mut bytes);
            let mut rest = bytes.as_slice();
            prop_assert_eq!(Runs::decode(&mut rest, 1000, 100), Ok(runs));
            prop_assert!(rest.is_empty());
        }

        /// A few runs and many, either way: those that are searched for.
        #[test]
        fn sets_of_different_sizes_are_sets(many in proptest::collection::vec((0_u32..4000, 1_u32..9), 60..200),
                                            few in proptest::collection::vec((0_u32..4000, 1_u32..300), 0..5)) {
            let [many, few] = [many, few].map(|runs| runs.into_iter().map(|(start, len)| start..start + len).collect::<Runs>());
            for (one, two) in [(&many, &few), (&few, &many)] {
                let (left, right) = (set_of(one), set_of(two));
                let (mut union, mut rest) = (one.clone(), one.clone());
                union.insert_all(two);
                rest.remove_all(two);
                let both = one.intersection(two);
                [&union, &rest, &both].into_iter().for_each(assert_canonical);
                prop_assert_eq!(set_of(&both), left.intersection(&right).copied().collect());
                prop_assert_eq!(set_of(&union), left.union(&right).copied().collect());
                prop_assert_eq!(set_of(&rest), left.difference(&right).copied().collect());
                prop_assert_eq!(one.first_common(two), left.intersection(&right).next().copied());
            }
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(runs) = Runs::decode(&mut bytes.as_slice(), 1000, 8) {
                assert_canonical(&runs);
                prop_assert!(runs.run_count() <= 8);
            }
        }
    }

    #[test]
    fn a_number_has_one_form_only() {
        for bytes in [&[0x80, 0x00][..], &[0x81, 0x00], &[0xff, 0x80, 0x00]] {
            assert_eq!(take_varint(&mut &*bytes), Err(DecodeRunsError::Malformed), "{bytes:?}");
        }
        assert_eq!(take_varint(&mut &[0][..]), Ok(0));
        assert_eq!(take_varint(&mut &[0x80, 0x01][..]), Ok(128));
        // One run, of two chunks from 1, with a length in two bytes.
        let long = [1, 1, 0x82, 0x00];
        assert_eq!(Runs::decode(&mut &long[..], 10, 9), Err(DecodeRunsError::Malformed));
    }

    #[test]
    fn limits_are_kept() {
        let mut bytes = Vec::new();
        Runs::from_iter([0..1, 2..3, 4..5]).encode(&mut bytes);
        assert_eq!(Runs::decode(&mut bytes.as_slice(), 10, 2), Err(DecodeRunsError::TooMany { limit: 2 }));
        assert_eq!(Runs::decode(&mut bytes.as_slice(), 4, 9), Err(DecodeRunsError::Malformed));
        assert_eq!(Runs::decode(&mut &bytes[..3], 10, 9), Err(DecodeRunsError::Truncated));
    }
}
