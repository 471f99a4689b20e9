//! Reads that failed: what their neighbours learn from them, and what people are told.
//!
//! A registry that is gone fails thousands of reads, and people want to hear of it once. An *episode* begins with the
//! first read of an image that fails, and ends with the first that had to wait for one of the same layers and got its
//! bytes. There is a line at its beginning, one at its end with how many reads it has cost, and, should it go on, one
//! more every ten minutes. Nothing of this outlives the process.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use hermes_image::ids::DiffId;
use hermes_image::runs::Runs;

/// How long a read that ended at its deadline speaks for its neighbours: the kernel asks for the same page again as
/// soon as a readahead has failed (33 ms later on a busy machine, measured), and the reader has waited enough.
const JUST_NOW: Duration = Duration::from_millis(500);
/// Reads that ended at their deadline which are remembered: as many as the kernel has under way on two connections.
const FAILURES_MAX: usize = 128;

/// Time between two episodes that are told: one image after the other may begin to fail, and a bad link may do so again
/// and again.
const TELL_INTERVAL: Duration = Duration::from_secs(1);
/// How often an episode that goes on is told of again.
const REMIND_INTERVAL: Duration = Duration::from_secs(600);
/// Episodes at once. More images than that fail on a node when everything does; then the oldest is told again.
const EPISODES_MAX: usize = 256;

/// Reads that fail.
#[derive(Debug)]
struct Episode {
    subject: String,
    layers: BTreeSet<DiffId>,
    began: Instant,
    told: Instant,
    failed: u64,
}

/// An episode that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Recovered {
    /// The image, or the layer where no image is known.
    pub(super) subject: String,
    /// Reads that have failed.
    pub(super) failed: u64,
    /// Since the first of them.
    pub(super) lasted: Duration,
}

/// The reads that failed a moment ago, and the episodes.
///
/// A reader of the page cache first causes a readahead, and when that fails, the kernel asks once more for the page
/// itself. Without this record the reader would wait for two deadlines.
#[derive(Debug, Default)]
pub(super) struct Failures {
    latest: VecDeque<(Instant, DiffId, Runs)>,
    episodes: VecDeque<Episode>,
    told: Option<Instant>,
}

impl Failures {
    /// Notes that a read of `layer` for `subject`, an image as a rule, has failed. How many of that have failed by now, when
    /// people are to be told.
    pub(super) fn failed(&mut self, now: Instant, subject: &str, layer: DiffId) -> Option<u64> {
        if let Some(episode) = self.episodes.iter_mut().find(|episode| episode.subject == subject) {
            episode.failed += 1;
            episode.layers.insert(layer);
            let is_due = now.saturating_duration_since(episode.told) >= REMIND_INTERVAL;
            return is_due.then(|| {
                episode.told = now;
                episode.failed
            });
        }
        if self.told.is_some_and(|told| now.saturating_duration_since(told) < TELL_INTERVAL) {
            // The next one begins the episode.
            return None;
        }
        self.told = Some(now);
        if self.episodes.len() == EPISODES_MAX {
            self.episodes.pop_front();
        }
        let (subject, layers) = (subject.to_owned(), BTreeSet::from([layer]));
        self.episodes.push_back(Episode { subject, layers, began: now, told: now, failed: 1 });
        Some(1)
    }

    /// Notes that a read which had to wait for `layers` got its bytes. The episodes that are over by that.
    pub(super) fn delivered(&mut self, now: Instant, layers: impl Iterator<Item = DiffId>) -> Vec<Recovered> {
        if self.episodes.is_empty() {
            return Vec::new();
        }
        let layers: BTreeSet<DiffId> = layers.collect();
        let (over, on) = std::mem::take(&mut self.episodes)
            .into_iter()
            .partition::<VecDeque<_>, _>(|episode| !episode.layers.is_disjoint(&layers));
        self.episodes = on;
        let recovered = |episode: Episode| Recovered {
            lasted: now.saturating_duration_since(episode.began),
            subject: episode.subject,
            failed: episode.failed,
        };
        over.into_iter().map(recovered).collect()
    }

    /// Notes what has not come by its deadline.
    pub(super) fn missed(&mut self, now: Instant, missing: Vec<(DiffId, Runs)>) {
        self.latest.retain(|(at, ..)| now.saturating_duration_since(*at) < JUST_NOW);
        for (layer, runs) in missing {
            if self.latest.len() == FAILURES_MAX {
                self.latest.pop_front();
            }
            self.latest.push_back((now, layer, runs));
        }
    }

    /// The layer of which some of `missing` did not come just now.
    pub(super) fn just_missed<'a>(
        &self,
        now: Instant,
        missing: impl Iterator<Item = (DiffId, &'a Runs)> + Clone,
    ) -> Option<DiffId> {
        let is_same = |(at, layer, failed): &&(Instant, DiffId, Runs)| {
            now.saturating_duration_since(*at) < JUST_NOW
                && missing.clone().any(|(other, runs)| other == *layer && !runs.intersection(failed).is_empty())
        };
        self.latest.iter().find(is_same).map(|(_, layer, _)| *layer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOW: DiffId = DiffId([1; 32]);
    const HIGH: DiffId = DiffId([2; 32]);

    #[test]
    fn an_outage_is_told_once_and_its_end_too() {
        let (mut failures, start) = (Failures::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(failures.failed(at(0), "a", LOW), Some(1));
        (1..599).for_each(|second| assert_eq!(failures.failed(at(second), "a", HIGH), None));
        assert_eq!(failures.failed(at(600), "a", LOW), Some(600));
        assert_eq!(failures.delivered(at(601), [DiffId([3; 32])].into_iter()), []);
        let over = failures.delivered(at(602), [HIGH].into_iter());
        assert_eq!(over, [Recovered { subject: "a".to_owned(), failed: 600, lasted: Duration::from_secs(602) }]);
        assert_eq!(failures.delivered(at(603), [HIGH].into_iter()), []);
        assert_eq!(failures.failed(at(604), "a", LOW), Some(1), "another outage");
    }

    #[test]
    fn images_are_told_one_after_the_other_and_none_is_left_out() {
        let (mut failures, start) = (Failures::default(), Instant::now());
        assert_eq!(failures.failed(start, "a", LOW), Some(1));
        assert_eq!(failures.failed(start, "b", LOW), None, "too soon");
        assert_eq!(failures.failed(start + TELL_INTERVAL, "b", LOW), Some(1));
        assert_eq!(failures.delivered(start + TELL_INTERVAL, [LOW].into_iter()).len(), 2, "both read the layer");
        for image in 0..EPISODES_MAX as u64 + 5 {
            let at = start + TELL_INTERVAL * (image as u32 + 2);
            assert_eq!(failures.failed(at, &image.to_string(), HIGH), Some(1));
        }
        assert_eq!(failures.episodes.len(), EPISODES_MAX);
    }

    #[test]
    fn what_was_just_missed_is_known_for_a_moment() {
        let (mut failures, now) = (Failures::default(), Instant::now());
        let (missed, other): (Runs, Runs) = (std::iter::once(3..6).collect(), std::iter::once(6..9).collect());
        failures.missed(now, vec![(LOW, missed.clone())]);
        assert_eq!(failures.just_missed(now, [(LOW, &missed)].into_iter()), Some(LOW));
        assert_eq!(failures.just_missed(now, [(LOW, &other), (HIGH, &missed)].into_iter()), None);
        assert_eq!(failures.just_missed(now + JUST_NOW, [(LOW, &missed)].into_iter()), None);
    }
}
