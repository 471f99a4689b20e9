//! How long the long tests go on.
//!
//! `make test` runs each of them in a short form, `make soak` whole: it sets `HERMES_SOAK_SECONDS`, which says how long
//! tests go on that could go on for ever. Tests with a number of rounds do all of them.

use std::time::Duration;

use anyhow::{Result, bail};

/// What `make soak` sets.
const VARIABLE: &str = "HERMES_SOAK_SECONDS";

/// How long a test is to go on; `None` when it is to be short.
///
/// # Errors
/// When the environment says something that is no number of seconds.
pub fn length() -> Result<Option<Duration>> {
    let Some(seconds) = std::env::var_os(VARIABLE) else { return Ok(None) };
    match seconds.to_str().and_then(|text| text.parse().ok()) {
        Some(seconds) => Ok(Some(Duration::from_secs(seconds))),
        None => bail!("{VARIABLE} is a number of seconds"),
    }
}

/// `whole` under `make soak`, else `short`.
///
/// # Errors
/// As [`length`].
pub fn choose<T>(short: T, whole: T) -> Result<T> {
    Ok(if length()?.is_some() { whole } else { short })
}
