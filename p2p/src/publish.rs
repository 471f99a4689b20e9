//! When to tell the DHT which layers are here.
//!
//! libp2p's own republication walks all keys at once every twelve hours. Here each layer has its own time, spread by a
//! jitter, so that a node with a thousand layers asks steadily, and nodes that started together do not ask together.
//! A state machine: time and jitter are arguments.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use hermes_image::ids::DiffId;

/// First wait after a publication that failed; doubles up to the usual interval.
const RETRY_FIRST: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
struct Entry {
    /// `None` while a publication is on its way.
    due: Option<Instant>,
    failures: u32,
    /// Somebody joined while a publication was on its way, which may have missed them.
    again: bool,
}

/// The layers to announce, and when.
#[derive(Debug)]
pub(crate) struct Schedule {
    every: Duration,
    limit: usize,
    entries: HashMap<DiffId, Entry>,
    order: BTreeSet<(Instant, DiffId)>,
}

impl Schedule {
    /// Nothing to announce; later each layer every `every`, at most `limit` layers.
    pub(crate) fn new(every: Duration, limit: usize) -> Self {
        Self { every, limit, entries: HashMap::new(), order: BTreeSet::new() }
    }

    /// Announces `layer` from now on. False when the schedule is full.
    pub(crate) fn add(&mut self, layer: DiffId, now: Instant) -> bool {
        if self.entries.contains_key(&layer) {
            return true;
        }
        if self.entries.len() >= self.limit {
            return false;
        }
        self.entries.insert(layer, Entry { due: Some(now), failures: 0, again: false });
        self.order.insert((now, layer));
        true
    }

    /// No longer announces `layer`. False when it was not announced.
    pub(crate) fn remove(&mut self, layer: DiffId) -> bool {
        let Some(entry) = self.entries.remove(&layer) else { return false };
        if let Some(due) = entry.due {
            self.order.remove(&(due, layer));
        }
        true
    }

    /// Whether `layer` is announced.
    pub(crate) fn contains(&self, layer: DiffId) -> bool {
        self.entries.contains_key(&layer)
    }

    /// The next layer whose time has come. It is on its way until [`Self::finished`].
    pub(crate) fn take_due(&mut self, now: Instant) -> Option<DiffId> {
        let (due, layer) = self.order.first().copied()?;
        if due > now {
            return None;
        }
        self.order.pop_first();
        let entry = self.entries.get_mut(&layer)?;
        entry.due = None;
        Some(layer)
    }

    /// When the next layer is due.
    pub(crate) fn next_due(&self) -> Option<Instant> {
        self.order.first().map(|(due, _)| *due)
    }

    /// A publication of `layer` has ended. `jitter` is in 0..1.
    pub(crate) fn finished(&mut self, layer: DiffId, published: bool, now: Instant, jitter: f64) {
        let Some(entry) = self.entries.get_mut(&layer) else { return };
        if entry.due.is_some() {
            return;
        }
        let wait = if published && !entry.again {
            entry.failures = 0;
            // Between three and five quarters of the interval.
            self.every.mul_f64(0.75 + 0.5 * jitter)
        } else {
            entry.failures = (entry.failures + 1).min(16);
            let doubled = RETRY_FIRST * (1 << (entry.failures - 1));
            doubled.min(self.every).mul_f64(0.5 + 0.5 * jitter)
        };
        entry.again = false;
        entry.due = Some(now + wait);
        self.order.insert((now + wait, layer));
    }

    /// The first other node has joined: what was announced to nobody is announced again, spread over `spread`.
    pub(crate) fn restart(&mut self, now: Instant, spread: Duration, mut jitter: impl FnMut() -> f64) {
        self.order.clear();
        for (layer, entry) in &mut self.entries {
            match entry.due {
                Some(_) => {
                    let due = now + spread.mul_f64(jitter());
                    entry.due = Some(due);
                    self.order.insert((due, *layer));
                }
                None => entry.again = true,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(300);

    fn layer(no: u8) -> DiffId {
        DiffId([no; 32])
    }

    #[test]
    fn a_layer_is_announced_at_once_and_then_again_around_the_interval() {
        let start = Instant::now();
        let mut schedule = Schedule::new(EVERY, 8);
        assert!(schedule.add(layer(1), start));
        assert_eq!(schedule.take_due(start), Some(layer(1)));
        assert_eq!((schedule.take_due(start), schedule.next_due()), (None, None));
        schedule.finished(layer(1), true, start, 0.0);
        assert_eq!(schedule.next_due(), Some(start + EVERY.mul_f64(0.75)));
        assert_eq!(schedule.take_due(start + EVERY), Some(layer(1)));
        schedule.finished(layer(1), true, start, 1.0);
        assert_eq!(schedule.next_due(), Some(start + EVERY.mul_f64(1.25)));
    }

    #[test]
    fn failures_back_off_up_to_the_interval() {
        let start = Instant::now();
        let mut schedule = Schedule::new(EVERY, 8);
        schedule.add(layer(1), start);
        let mut waits = Vec::new();
        for _ in 0..12 {
            let due = schedule.next_due().expect("is due");
            assert_eq!(schedule.take_due(due), Some(layer(1)));
            schedule.finished(layer(1), false, due, 1.0);
            waits.push(schedule.next_due().expect("is due") - due);
        }
        assert_eq!(waits[..3], [1, 2, 4].map(Duration::from_secs));
        assert_eq!(waits[11], EVERY);
    }

    #[test]
    fn the_number_is_bounded_and_withdrawal_makes_room() {
        let start = Instant::now();
        let mut schedule = Schedule::new(EVERY, 1);
        assert!(schedule.add(layer(1), start) && schedule.add(layer(1), start));
        assert!(!schedule.add(layer(2), start));
        assert!(schedule.remove(layer(1)) && !schedule.remove(layer(1)));
        assert!(schedule.add(layer(2), start));
        assert_eq!(schedule.take_due(start), Some(layer(2)));
        schedule.remove(layer(2));
        schedule.finished(layer(2), true, start, 0.5);
        assert_eq!(schedule.next_due(), None, "a withdrawn layer came back");
    }

    #[test]
    fn what_was_announced_to_nobody_is_announced_again() {
        let start = Instant::now();
        let mut schedule = Schedule::new(EVERY, 8);
        schedule.add(layer(1), start);
        schedule.add(layer(2), start);
        let first = schedule.take_due(start).expect("is due");
        let second = schedule.take_due(start).expect("is due");
        schedule.finished(first, true, start, 0.5);
        schedule.restart(start, Duration::from_secs(1), || 0.5);
        assert_eq!(schedule.next_due(), Some(start + Duration::from_millis(500)));
        schedule.finished(second, true, start, 1.0);
        assert_eq!(schedule.take_due(start + Duration::from_secs(1)), Some(first));
        assert_eq!(schedule.take_due(start + Duration::from_secs(1)), Some(second));
    }
}
