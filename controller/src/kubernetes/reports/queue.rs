//! What is still to be written: one wish for each object, the newest. Pure.
//!
//! A wish that is replaced keeps its place in time. An object is written again no sooner than its interval after the last
//! time, and after a failure no sooner than its wait; while it is being written a newer wish waits. Urgent things go
//! before others that are as due: thousands of nodes must not keep a policy's status waiting.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::write::Key;

/// What is known of one object.
#[derive(Debug)]
struct Slot<W> {
    wish: Option<W>,
    /// When the wish is due; it then stands in the queue's order, unless it is being written.
    due: Instant,
    is_in_flight: bool,
    failures: u32,
    /// The earliest moment for the next write.
    not_before: Instant,
}

/// All wishes.
#[derive(Debug)]
pub(super) struct Queue<W> {
    slots: BTreeMap<Key, Slot<W>>,
    /// What waits, by urgency and then by when it is due.
    waiting: [BTreeSet<(Instant, Key)>; 2],
}

impl<W> Default for Queue<W> {
    fn default() -> Self {
        Self { slots: BTreeMap::new(), waiting: [BTreeSet::new(), BTreeSet::new()] }
    }
}

impl<W> Queue<W> {
    /// Wishes for `key`; replaces an older wish.
    pub(super) fn put(&mut self, now: Instant, key: Key, wish: W) {
        let fresh = Slot { wish: None, due: now, is_in_flight: false, failures: 0, not_before: now };
        let slot = self.slots.entry(key.clone()).or_insert(fresh);
        let is_new = slot.wish.replace(wish).is_none();
        if is_new && !slot.is_in_flight {
            slot.due = slot.not_before.max(now);
            self.waiting[key.urgency()].insert((slot.due, key));
        }
    }

    /// A wish that is due at `now`. It counts as being written until [`Queue::written`] or [`Queue::failed`].
    pub(super) fn take(&mut self, now: Instant) -> Option<(Key, W)> {
        for waiting in &mut self.waiting {
            if waiting.first().is_some_and(|(due, _)| *due <= now) {
                let (_, key) = waiting.pop_first()?;
                let slot = self.slots.get_mut(&key)?;
                slot.is_in_flight = true;
                return slot.wish.take().map(|wish| (key, wish));
            }
        }
        None
    }

    /// When the next wish is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.waiting.iter().filter_map(|waiting| waiting.first()).map(|(due, _)| *due).min()
    }

    /// The object was written, or nothing was to be done.
    pub(super) fn written(&mut self, now: Instant, key: Key, interval: Duration) {
        let Some(slot) = self.slots.get_mut(&key) else { return };
        (slot.failures, slot.is_in_flight, slot.not_before) = (0, false, now + interval);
        if slot.wish.is_some() {
            slot.due = slot.not_before;
            self.waiting[key.urgency()].insert((slot.due, key));
        }
    }

    /// The object could not be written. The wish comes back, unless there is a newer one, after what `wait` says to the
    /// number of failures; without a wait it is given up.
    pub(super) fn failed(&mut self, now: Instant, key: Key, wish: W, wait: impl FnOnce(u32) -> Option<Duration>) {
        let Some(slot) = self.slots.get_mut(&key) else { return };
        slot.is_in_flight = false;
        slot.failures = slot.failures.saturating_add(1);
        match wait(slot.failures) {
            Some(wait) => {
                slot.wish.get_or_insert(wish);
                slot.not_before = now + wait;
            }
            None => slot.failures = 0,
        }
        if slot.wish.is_some() {
            slot.due = slot.not_before.max(now);
            self.waiting[key.urgency()].insert((slot.due, key));
        }
    }

    /// Forgets what is known of an object for which nothing is to be written any more.
    pub(super) fn forget(&mut self, now: Instant) {
        self.slots.retain(|_, slot| slot.wish.is_some() || slot.is_in_flight || slot.not_before > now);
    }

    /// Events that something is known of.
    pub(super) fn tale_count(&self) -> usize {
        self.slots.keys().rev().take_while(|key| matches!(key, Key::Tale(_))).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(10);

    fn policy(name: &str) -> Key {
        Key::Policy(name.to_owned())
    }

    #[test]
    fn the_newest_wish_is_written_once_and_the_next_after_its_interval() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.put(now, policy("a"), 1);
        queue.put(now, policy("a"), 2);
        assert_eq!(queue.take(now), Some((policy("a"), 2)));
        // What comes while it is written waits for the interval.
        queue.put(now, policy("a"), 3);
        assert_eq!((queue.take(now), queue.next_due()), (None, None));
        queue.written(now, policy("a"), INTERVAL);
        queue.put(now, policy("a"), 4);
        assert_eq!((queue.take(now), queue.next_due()), (None, Some(now + INTERVAL)));
        assert_eq!(queue.take(now + INTERVAL), Some((policy("a"), 4)));
        queue.written(now, policy("a"), INTERVAL);
        queue.forget(now);
        assert_eq!(queue.slots.len(), 1);
        // Of the first write, the second began after its interval.
        queue.forget(now + INTERVAL);
        assert_eq!(queue.slots.len(), 0);
    }

    #[test]
    fn a_failed_wish_comes_back_unless_there_is_a_newer_one() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        let wait = |failures: u32| (failures < 3).then(|| INTERVAL * failures);
        queue.put(now, policy("a"), 1);
        for failures in 1..3_u32 {
            let at = now + INTERVAL * (failures - 1);
            let (key, wish) = queue.take(at).expect("it is due");
            queue.failed(now, key, wish, wait);
            assert_eq!(queue.next_due(), Some(now + INTERVAL * failures));
        }
        let (key, wish) = queue.take(now + INTERVAL * 2).expect("it is due");
        queue.put(now, policy("a"), 2);
        queue.failed(now, key, wish, wait);
        assert_eq!(queue.take(now + INTERVAL * 2), Some((policy("a"), 2)));
    }

    #[test]
    fn nodes_wait_for_policies() {
        let (mut queue, now) = (Queue::default(), Instant::now());
        queue.put(now, Key::Node("n".to_owned()), 1);
        queue.put(now + INTERVAL, policy("a"), 2);
        assert_eq!(queue.next_due(), Some(now));
        assert_eq!(queue.take(now + INTERVAL), Some((policy("a"), 2)));
        assert_eq!(queue.take(now + INTERVAL), Some((Key::Node("n".to_owned()), 1)));
    }
}
