//! The level of the log, changed while the daemon runs.
//!
//! Whoever sets up logging (the command) knows how to change it and hands that over here once; the control socket uses it.

use std::sync::OnceLock;

/// Sets the filter, in the syntax of `HERMES_LOG`; the error says what is wrong with it.
type Reload = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

static RELOAD: OnceLock<Reload> = OnceLock::new();

/// Takes over how the log's filter is changed. The first one stays.
pub fn set_reload(reload: impl Fn(&str) -> Result<(), String> + Send + Sync + 'static) {
    let _ = RELOAD.set(Box::new(reload));
}

/// Changes the log's filter to `filter`, a level such as `debug` or a filter in the syntax of `HERMES_LOG`.
///
/// # Errors
/// When the filter is malformed, or the log of this process cannot be changed.
pub(crate) fn reload(filter: &str) -> Result<(), String> {
    let reload = RELOAD.get().ok_or_else(|| "the log of this process cannot be changed".to_owned())?;
    reload(filter)
}
