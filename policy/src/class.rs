//! What a request is for, and what a failure means.
//!
//! Drivers reduce every error to one [`ErrorClass`]; nothing else of an error reaches policy. Each class has one rule:
//!
//! | class | meaning | what follows |
//! |---|---|---|
//! | transient | may work when asked again | the source rests (backoff, or what its `Retry-After` says), then is asked again |
//! | peer fault | wrong bytes | a peer is banned; an origin is asked again a few times, then counts as refused |
//! | not found | the source does not have it | remembered for that source and layer |
//! | denied | the source refuses us | remembered for that source and layer |
//! | local | our own disk or memory failed | no source is blamed; the layer rests |

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::rng::Rng;
use crate::time::{Duration, Instant, nanos};

/// Why chunks are wanted. Demand sorts first, because it is always served first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Class {
    /// A reader waits for them.
    Demand,
    /// Somebody may read them soon.
    Prefetch,
}

impl Class {
    /// The metric label.
    pub const fn kind(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::Prefetch => "prefetch",
        }
    }
}

/// What a failure means for the next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ErrorClass {
    /// It may work when asked again: timeouts, cut connections, 429, 5xx.
    Transient,
    /// The source sent bytes that are not what they were asked for.
    PeerFault,
    /// The source does not have it.
    NotFound,
    /// The source refuses us: credentials, grants.
    Denied,
    /// Our own side failed: disk, memory.
    Local,
}

impl ErrorClass {
    /// Whether asking the same source for the same layer again is useless for a long while.
    pub const fn is_permanent(self) -> bool {
        match self {
            Self::NotFound | Self::Denied => true,
            Self::Transient | Self::PeerFault | Self::Local => false,
        }
    }

    /// The metric label.
    pub const fn kind(self) -> &'static str {
        match self {
            Self::Transient => "transient",
            Self::PeerFault => "peer_fault",
            Self::NotFound => "not_found",
            Self::Denied => "denied",
            Self::Local => "local",
        }
    }
}

impl fmt::Display for ErrorClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Transient => "transient failure",
            Self::PeerFault => "wrong bytes",
            Self::NotFound => "not found",
            Self::Denied => "denied",
            Self::Local => "failure on this node",
        })
    }
}

/// How long a source rests after failures in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackoffRule {
    /// Longest rest after the first failure; doubles with each further one.
    pub base: Duration,
    /// Longest rest after any number of failures.
    pub cap: Duration,
    /// Longest `Retry-After` that is honoured.
    pub retry_after_max: Duration,
}

/// The failures in a row of one source, and how long it rests.
///
/// Full jitter: the rest is evenly spread between zero and the doubled bound, so that many nodes which failed together
/// do not come back together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Backoff {
    failures: u32,
    failed_at: Instant,
    until: Instant,
}

impl Backoff {
    /// Notes that a request sent at `sent` failed.
    ///
    /// Requests that were under way together when the first of them failed count as one failure: eight of them cut by
    /// one lost connection must not rest the source as long as eight attempts would.
    pub fn fail(
        &mut self,
        now: Instant,
        sent: Instant,
        retry_after: Option<Duration>,
        rule: &BackoffRule,
        rng: &mut Rng,
    ) {
        if self.failures == 0 || sent >= self.failed_at {
            let bound = nanos(rule.base).saturating_mul(1 << self.failures.min(32)).min(nanos(rule.cap));
            self.failures = self.failures.saturating_add(1);
            self.failed_at = now;
            self.until = self.until.max(now + Duration::from_nanos(1 + rng.below(bound)));
        }
        if let Some(wait) = retry_after {
            self.until = self.until.max(now + wait.min(rule.retry_after_max));
        }
    }

    /// Notes an answer: no more rest.
    pub fn succeed(&mut self) {
        *self = Self::default();
    }

    /// When the rest ends, if it lasts beyond `now`.
    pub fn resting(&self, now: Instant) -> Option<Instant> {
        (self.until > now).then_some(self.until)
    }

    /// Failures in a row.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: BackoffRule = BackoffRule {
        base: Duration::from_millis(100),
        cap: Duration::from_secs(10),
        retry_after_max: Duration::from_secs(60),
    };

    #[test]
    fn rests_double_up_to_the_cap_with_full_jitter() {
        let mut rng = Rng::new(1);
        for (failures, bound_ms) in [(1, 100), (2, 200), (3, 400), (7, 6_400), (8, 10_000), (40, 10_000)] {
            let (mut shortest, mut longest) = (u64::MAX, 0);
            for _ in 0..300 {
                let mut backoff = Backoff::default();
                let mut now = Instant::ZERO;
                for _ in 0..failures {
                    now = backoff.resting(now).unwrap_or(now);
                    backoff.fail(now, now, None, &RULE, &mut rng);
                }
                let rest = nanos(backoff.until.since(now));
                (shortest, longest) = (shortest.min(rest), longest.max(rest));
                assert!(rest <= bound_ms * 1_000_000 + 1, "{failures} failures rest {rest} ns");
            }
            assert!(longest > bound_ms * 900_000, "{failures}: never near the bound, {longest} ns");
            assert!(shortest < bound_ms * 100_000, "{failures}: no full jitter, {shortest} ns");
        }
    }

    #[test]
    fn retry_after_is_honoured_up_to_its_bound() {
        let mut rng = Rng::new(2);
        for (wait_s, expected_s) in [(5, 5), (60, 60), (600, 60)] {
            let mut backoff = Backoff::default();
            backoff.fail(Instant::ZERO, Instant::ZERO, Some(Duration::from_secs(wait_s)), &RULE, &mut rng);
            assert_eq!(backoff.resting(Instant::ZERO), Some(Instant::ZERO + Duration::from_secs(expected_s)));
        }
    }

    #[test]
    fn requests_that_fail_together_count_once() {
        let mut rng = Rng::new(3);
        let mut backoff = Backoff::default();
        for at in 10..18 {
            backoff.fail(Instant(at), Instant(5), None, &RULE, &mut rng);
        }
        assert_eq!(backoff.failures(), 1);
        backoff.fail(Instant(30), Instant(20), None, &RULE, &mut rng);
        assert_eq!(backoff.failures(), 2);
        backoff.succeed();
        assert_eq!((backoff.failures(), backoff.resting(Instant(30))), (0, None));
    }
}
