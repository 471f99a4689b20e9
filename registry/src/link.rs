//! A link that is slower than the one there is: bandwidth shared by all connections, latency per connection and request.
//!
//! The bandwidth is kept by a schedule: each piece of a body reserves the time that it takes on the link, after all
//! pieces reserved before it, and is handed on when that time is over. Timers wake late by up to a millisecond or more,
//! so a piece may begin as much as [`CATCH_UP`] in the past; otherwise every late wake-up would be lost for good.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How far behind the schedule may run and still catch up: some late wake-ups of a loaded machine. It is also the
/// largest burst, in time, that an idle link lets through at once.
const CATCH_UP: Duration = Duration::from_millis(10);

/// Time that one piece takes on the link: short, so that bytes flow smoothly and connections take turns.
const PIECE_TIME: Duration = Duration::from_millis(2);

/// Bytes: the smallest piece, about one packet; below it the overhead per piece counts.
const MIN_PIECE_BYTES: u64 = 1 << 10;

/// Bytes: the largest piece, and the only size on a link without a limit.
pub(crate) const MAX_PIECE_BYTES: u64 = 128 << 10;

/// The emulated link.
#[derive(Debug)]
pub(crate) struct Link {
    bits_per_second: Option<NonZeroU64>,
    latency: Duration,
    /// When the last reserved piece is through.
    free_at: Mutex<Instant>,
}

impl Link {
    pub(crate) fn new(bits_per_second: Option<NonZeroU64>, latency: Duration) -> Self {
        Self { bits_per_second, latency, free_at: Mutex::new(Instant::now()) }
    }

    /// Waits as long as a request takes to get here and its answer to begin, or a connection to be made.
    pub(crate) async fn round_trip(&self) {
        if !self.latency.is_zero() {
            tokio::time::sleep(self.latency).await;
        }
    }

    /// Bytes that one piece of a body should have.
    pub(crate) fn piece_bytes(&self) -> u64 {
        match self.bits_per_second {
            None => MAX_PIECE_BYTES,
            Some(bits) => {
                let bytes = u128::from(bits.get()) * PIECE_TIME.as_micros() / 8 / 1_000_000;
                u64::try_from(bytes).unwrap_or(u64::MAX).clamp(MIN_PIECE_BYTES, MAX_PIECE_BYTES)
            }
        }
    }

    /// Waits until a piece of `len_bytes` is through the link. Cancel safe in the sense that a dropped wait keeps its
    /// reservation, as a packet under way would.
    pub(crate) async fn carry(&self, len_bytes: u64) {
        if let Some(through_at) = self.reserve(Instant::now(), len_bytes) {
            tokio::time::sleep_until(through_at).await;
        }
    }

    fn reserve(&self, now: Instant, len_bytes: u64) -> Option<Instant> {
        let bits_per_second = self.bits_per_second?.get();
        let nanos = u128::from(len_bytes) * 8 * 1_000_000_000 / u128::from(bits_per_second);
        let takes = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let start = (*free_at).max(now.checked_sub(CATCH_UP).unwrap_or(now));
        *free_at = start + takes;
        Some(*free_at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(bits_per_second: u64) -> Link {
        Link::new(NonZeroU64::new(bits_per_second), Duration::ZERO)
    }

    #[test]
    fn pieces_are_small_enough_to_flow() {
        let cases = [(8_000, 1 << 10), (200_000_000, 50_000), (100_000_000_000, 128 << 10), (0, 128 << 10)];
        for (bits_per_second, expected) in cases {
            assert_eq!(link(bits_per_second).piece_bytes(), expected, "{bits_per_second} bit/s");
        }
    }

    #[tokio::test]
    async fn late_wake_ups_are_made_good() {
        let link = link(8_000_000);
        let start = Instant::now() + Duration::from_secs(1);
        let mut now = start;
        for _ in 0..1000 {
            // Each of these takes a millisecond on the link; the timer is late by half of one every time.
            let through_at = link.reserve(now, 1000).expect("a limit");
            now = now.max(through_at) + Duration::from_micros(500);
        }
        let took = now - start;
        assert!(took < Duration::from_millis(1010), "{took:?} for a second's bytes");
        assert!(took > Duration::from_millis(980), "{took:?} for a second's bytes");
    }

    #[tokio::test]
    async fn an_idle_link_saves_up_little() {
        let link = link(8_000_000);
        let now = Instant::now() + Duration::from_secs(100);
        let through_at = link.reserve(now, 1_000_000).expect("a limit");
        assert!(through_at - now >= Duration::from_millis(990));
    }

    #[tokio::test]
    async fn connections_share_the_link() {
        let link = link(8_000_000);
        let now = Instant::now() + Duration::from_secs(1);
        let ends: Vec<Instant> = (0..4).filter_map(|_| link.reserve(now, 250_000)).collect();
        assert!(ends[3] - now >= Duration::from_millis(990), "four at once take as long as one after the other");
    }
}
