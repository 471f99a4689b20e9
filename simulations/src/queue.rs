//! What is to happen, by (time, order of being planned).
//!
//! Two things that happen at the same nanosecond happen in the order in which they were planned, so a run depends on its
//! seed alone. Nothing is ever taken out again: what has lost its meaning is ignored when its time comes.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};

/// Virtual time in nanoseconds since the start of the run.
pub type Nanos = u64;

/// Nanoseconds in a millisecond.
pub const MILLISECOND: Nanos = 1_000_000;
/// Nanoseconds in a second.
pub const SECOND: Nanos = 1_000_000_000;

#[derive(Debug)]
struct Item<T> {
    at: Nanos,
    order: u64,
    what: T,
}

impl<T> PartialEq for Item<T> {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl<T> Eq for Item<T> {}

impl<T> PartialOrd for Item<T> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Item<T> {
    /// The earliest is the greatest, because the heap gives the greatest first.
    fn cmp(&self, other: &Self) -> Ordering {
        (other.at, other.order).cmp(&(self.at, self.order))
    }
}

/// Items whose times differ in their higher bits only are sorted when it is their turn: 65 microseconds, in which some thousand
/// things happen in the largest clusters. One heap for all of a run would be as large as a processor's caches.
const SLOT_BITS: u32 = 16;

/// The plan of a run.
#[derive(Debug)]
pub struct Queue<T> {
    /// What is planned for the slot `sorted` and those before it.
    heap: BinaryHeap<Item<T>>,
    sorted: u64,
    /// The rest, by slot.
    later: BTreeMap<u64, Vec<Item<T>>>,
    len: usize,
    planned: u64,
    now: Nanos,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self { heap: BinaryHeap::new(), sorted: 0, later: BTreeMap::new(), len: 0, planned: 0, now: 0 }
    }
}

impl<T> Queue<T> {
    /// The time of what happened last.
    pub fn now(&self) -> Nanos {
        self.now
    }

    /// Plans `what` for the time `at`; for now when that is in the past.
    pub fn at(&mut self, at: Nanos, what: T) {
        let at = at.max(self.now);
        let (item, slot) = (Item { at, order: self.planned, what }, at >> SLOT_BITS);
        if slot <= self.sorted {
            self.heap.push(item);
        } else {
            self.later.entry(slot).or_default().push(item);
        }
        self.planned += 1;
        self.len += 1;
    }

    /// Plans `what` for `wait` nanoseconds from now.
    pub fn after(&mut self, wait: Nanos, what: T) {
        self.at(self.now.saturating_add(wait), what);
    }

    /// What happens next, and moves the clock there; `None` when nothing is planned up to `end`.
    pub fn next(&mut self, end: Nanos) -> Option<T> {
        if self.heap.is_empty() {
            let (slot, items) = self.later.pop_first()?;
            (self.sorted, self.heap) = (slot, items.into());
        }
        if self.heap.peek()?.at > end {
            return None;
        }
        let item = self.heap.pop()?;
        self.now = item.at;
        self.len -= 1;
        Some(item.what)
    }

    /// Things that are planned.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is planned.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Things that were ever planned.
    pub fn planned(&self) -> u64 {
        self.planned
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert_eq, proptest};

    use super::*;

    proptest! {
        #[test]
        fn everything_comes_once_and_in_order(waits in proptest::collection::vec(0_u64..1 << 20, 1..200)) {
            let (mut queue, mut planned, mut came) = (Queue::default(), Vec::new(), Vec::new());
            for (no, wait) in waits.into_iter().enumerate() {
                // Half is planned before anything happens, the rest while it does.
                if no % 2 == 1 {
                    came.extend(queue.next(u64::MAX).map(|what| (queue.now(), what)));
                }
                planned.push((queue.now() + wait, no));
                queue.after(wait, no);
            }
            while let Some(what) = queue.next(u64::MAX) {
                came.push((queue.now(), what));
            }
            planned.sort_unstable();
            prop_assert_eq!(came, planned);
            prop_assert_eq!(queue.len(), 0);
        }
    }

    #[test]
    fn time_first_then_the_order_of_planning() {
        let mut queue = Queue::default();
        for (at, what) in [(5, 'b'), (3, 'a'), (5, 'c'), (9, 'd')] {
            queue.at(at, what);
        }
        assert_eq!((queue.next(5), queue.now()), (Some('a'), 3));
        queue.at(1, 'x');
        assert_eq!((queue.next(5), queue.now()), (Some('x'), 3), "the past is now");
        assert_eq!((queue.next(5), queue.next(5), queue.next(5)), (Some('b'), Some('c'), None));
        assert_eq!((queue.next(9), queue.is_empty(), queue.planned()), (Some('d'), true, 5));
    }
}
