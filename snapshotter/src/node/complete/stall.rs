//! Noticing that nothing comes any more.

use std::time::{Duration, Instant};

/// How long nothing at all may come before it is said what is wrong. A span of 512 KiB takes 5 s at 1 Mbit/s, and a
/// registry that asks for rest may do so for a minute.
const STALL_MAX: Duration = Duration::from_secs(120);

/// What came last, and when.
#[derive(Debug)]
pub(super) struct Stall {
    present_bytes: u64,
    since: Instant,
}

impl Stall {
    pub(super) fn new(present_bytes: u64, now: Instant) -> Self {
        Self { present_bytes, since: now }
    }

    /// Whether nothing has come for [`STALL_MAX`]. Eviction is no progress, but what comes after it is.
    pub(super) fn is_over(&mut self, present_bytes: u64, now: Instant) -> bool {
        if present_bytes > self.present_bytes {
            self.since = now;
        }
        self.present_bytes = present_bytes;
        now.saturating_duration_since(self.since) >= STALL_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_link_is_no_stall_and_silence_is_one() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut stall = Stall::new(0, start);
        // One chunk of 64 KiB a minute, for ten hours: two orders below the slowest link that is of use.
        for minute in 1..=600 {
            assert!(!stall.is_over(minute << 16, at(minute * 60)), "after {minute} minutes");
        }
        let quiet = 600 * 60;
        assert!(!stall.is_over(600 << 16, at(quiet + 119)));
        assert!(stall.is_over(600 << 16, at(quiet + 120)));
        // Chunks that were evicted are no progress; those that come again are.
        assert!(stall.is_over(500 << 16, at(quiet + 130)));
        assert!(!stall.is_over(501 << 16, at(quiet + 131)));
    }
}
