//! What tools of the source tree make for benchmarks.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use hermes_lab::command::run as run_program;
use hermes_snapshotter::control::FailureClass;

use crate::output::failure;

/// What `tool` in the folder `tools` says is the place of what it has made.
///
/// # Errors
/// When it is not there, or fails.
pub(super) fn made_by(tools: &Path, tool: &str, arguments: &[&str]) -> anyhow::Result<PathBuf> {
    let path = std::path::absolute(tools.join(tool))?;
    if !path.exists() {
        let message = format!("{} is missing; run the benchmark in the source tree, or by `make`", path.display());
        return Err(failure(FailureClass::Usage, message));
    }
    let printed = String::from_utf8(run_program(Command::new(path).args(arguments))?)?;
    let place = printed.lines().last().map(PathBuf::from);
    place.with_context(|| format!("{tool} {arguments:?} did not say where it is"))
}
