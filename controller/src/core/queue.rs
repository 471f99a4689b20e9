//! What waits for its turn: most wanted first, then longest waiting.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use crate::event::UnixMillis;

/// How much something is wanted.
type Rank = (Reverse<u32>, UnixMillis);

/// A queue with priorities that may change.
#[derive(Debug)]
pub(super) struct Queue<K> {
    order: BTreeSet<(Rank, K)>,
    ranks: BTreeMap<K, Rank>,
}

impl<K> Default for Queue<K> {
    fn default() -> Self {
        Self { order: BTreeSet::new(), ranks: BTreeMap::new() }
    }
}

impl<K: Ord + Clone> Queue<K> {
    /// Puts `key` in, or changes its priority: `waiting` is how many wait for it. Who is in keeps the time since when.
    pub(super) fn put(&mut self, key: &K, waiting: u32, now: UnixMillis) {
        let since = self.ranks.get(key).map_or(now, |(_, since)| *since);
        self.remove(key);
        let rank = (Reverse(waiting), since);
        self.order.insert((rank, key.clone()));
        self.ranks.insert(key.clone(), rank);
    }

    /// Takes `key` out.
    pub(super) fn remove(&mut self, key: &K) {
        if let Some(rank) = self.ranks.remove(key) {
            self.order.remove(&(rank, key.clone()));
        }
    }

    /// Takes out the first that `may` go now.
    pub(super) fn pop(&mut self, may: impl Fn(&K) -> bool) -> Option<K> {
        let key = self.find(may)?;
        self.remove(&key);
        Some(key)
    }

    /// The first that `may` go now, which stays in.
    pub(super) fn find(&self, may: impl Fn(&K) -> bool) -> Option<K> {
        self.order.iter().map(|(_, key)| key).find(|key| may(key)).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_wanted_goes_first_then_the_oldest() {
        let mut queue = Queue::default();
        queue.put(&"old", 0, UnixMillis(1));
        queue.put(&"new", 0, UnixMillis(2));
        queue.put(&"wanted", 1, UnixMillis(3));
        queue.put(&"late", 0, UnixMillis(4));
        queue.put(&"late", 2, UnixMillis(5));
        queue.put(&"gone", 9, UnixMillis(0));
        queue.remove(&"gone");
        assert_eq!(queue.pop(|key| *key == "old"), Some("old"));
        assert_eq!(queue.pop(|key| *key == "gone"), None);
        assert_eq!(std::iter::from_fn(|| queue.pop(|_| true)).collect::<Vec<_>>(), ["late", "wanted", "new"]);
    }
}
