//! The one place that looks at a clock.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::event::UnixMillis;

/// Now.
pub fn now() -> UnixMillis {
    // A clock before 1970 is not set; time begins then.
    let elapsed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixMillis(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX))
}
