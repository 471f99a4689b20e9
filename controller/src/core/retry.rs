//! When to try again.

use std::time::Duration;

use hermes_policy::rng::Rng;

use crate::event::{Failure, FailureClass, UnixMillis};

/// The first wait, in milliseconds, as a bound: the wait is drawn evenly below it (full jitter).
const FIRST_MS: u64 = 1_000;
/// The longest wait.
const LONGEST_MS: u64 = 5 * 60 * 1_000;
/// The longest rest that a registry is granted: its word counts, but not for ever.
const REST_MAX: Duration = Duration::from_secs(3600);

/// When something that failed `failures` times in a row, the last time with `failure`, is tried again; `None` for never.
pub(super) fn next_attempt(
    now: UnixMillis,
    failure: &Failure,
    failures: u32,
    refresh: Duration,
    rng: &mut Rng,
) -> Option<UnixMillis> {
    let wait_ms = match failure.class {
        FailureClass::Unfit => return None,
        FailureClass::Denied | FailureClass::NotFound => spread(refresh, rng),
        FailureClass::Transient | FailureClass::Local => {
            let bound = FIRST_MS.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(LONGEST_MS);
            1 + rng.below(bound)
        }
    };
    let rest_ms = failure.retry_after.map_or(0, |rest| {
        let rest_ms = rest.min(REST_MAX).as_millis() as u64;
        // Whoever was told the same does not come at the same moment.
        rest_ms + rng.below(rest_ms / 4 + FIRST_MS)
    });
    Some(UnixMillis(now.0.saturating_add(wait_ms.max(rest_ms))))
}

/// About `interval` in milliseconds, between nine and eleven tenths of it, so that what began together does not stay so.
pub(super) fn spread(interval: Duration, rng: &mut Rng) -> u64 {
    let interval_ms = u64::try_from(interval.as_millis()).unwrap_or(u64::MAX / 2).max(1);
    interval_ms - interval_ms / 10 + rng.below(interval_ms / 5 + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(class: FailureClass, retry_after: Option<Duration>) -> Failure {
        Failure { class, reason: "Reason", message: String::new(), retry_after }
    }

    #[test]
    fn waits_double_up_to_the_longest_and_are_spread() {
        let (mut rng, refresh) = (Rng::new(1), Duration::from_secs(300));
        for (failures, bound) in [(1, 1_000), (2, 2_000), (5, 16_000), (9, 256_000), (10, 300_000), (u32::MAX, 300_000)]
        {
            let waits: Vec<u64> = (0..200)
                .map(|_| {
                    let failure = failure(FailureClass::Transient, None);
                    next_attempt(UnixMillis(0), &failure, failures, refresh, &mut rng).expect("tried again").0
                })
                .collect();
            let (least, most) = (waits.iter().min().expect("some"), waits.iter().max().expect("some"));
            assert!((1..=bound).contains(least) && *most <= bound, "{failures}: {least} to {most}");
            assert!(*least < bound / 4 && *most > bound / 4 * 3, "{failures}: {least} to {most}");
        }
    }

    #[test]
    fn the_class_and_the_registry_say_when() {
        let (mut rng, refresh) = (Rng::new(1), Duration::from_secs(300));
        let mut next = |class, rest| next_attempt(UnixMillis(0), &failure(class, rest), 1, refresh, &mut rng);
        assert_eq!(next(FailureClass::Unfit, None), None);
        for class in [FailureClass::Denied, FailureClass::NotFound] {
            let wait = next(class, None).expect("tried again").0;
            assert!((270_000..=330_000).contains(&wait), "{wait}");
        }
        let wait = next(FailureClass::Transient, Some(Duration::from_secs(60))).expect("tried again").0;
        assert!((60_000..=80_000).contains(&wait), "{wait}");
        let wait = next(FailureClass::Transient, Some(Duration::from_secs(1 << 40))).expect("tried again").0;
        assert!(wait <= 5_000_000, "{wait}");
    }
}
