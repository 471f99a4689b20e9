//! How long to wait before trying again.

use std::time::Duration;

use rand::RngExt as _;

/// The first wait.
const FIRST: Duration = Duration::from_millis(500);
/// The longest wait: an API server that comes back is found within this.
const LONGEST: Duration = Duration::from_secs(15);

/// The wait before the try that follows `failures` failures in a row: doubled each time, with a random half of it taken
/// off, so that many who failed together do not come back together.
pub(super) fn after(failures: u32) -> Duration {
    let doubled = FIRST.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LONGEST);
    doubled.mul_f64(rand::rng().random_range(0.5..=1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_end_growing() {
        for (failures, longest) in
            [(0, FIRST), (1, FIRST), (2, FIRST * 2), (4, FIRST * 8), (6, LONGEST), (u32::MAX, LONGEST)]
        {
            let wait = after(failures);
            assert!(wait <= longest && wait >= longest / 2, "{failures}: {wait:?}");
        }
    }
}
