//! Running other programs and saying what went wrong when they fail.

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// How much of a failed program's error output a message carries, in bytes; the end says most.
const ERROR_TAIL_BYTES: usize = 4096;

/// Runs `command` to its end and returns its standard output.
///
/// # Errors
///
/// When it cannot be started or ends with another status than 0; the message holds the command line and the end of its
/// error output.
pub fn run(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {command:?}"))?;
    succeeded(command, &output)?;
    Ok(output.stdout)
}

/// Runs `command` with `input` as standard input and `output` as standard output.
///
/// # Errors
///
/// As [`run`].
pub fn filter(command: &mut Command, input: File, output: File) -> Result<()> {
    let result = command
        .stdin(input)
        .stdout(output)
        .stderr(Stdio::piped())
        .spawn()
        .and_then(|child| child.wait_with_output())
        .with_context(|| format!("start {command:?}"))?;
    succeeded(command, &result)
}

/// Whether a program of this name stands in `PATH`.
pub fn exists(program: impl AsRef<OsStr>) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|dir| dir.join(program.as_ref()).is_file())
}

/// A temporary folder's file, by its name, opened for writing.
///
/// # Errors
///
/// When it cannot be created.
pub fn create(path: &Path) -> Result<File> {
    File::create(path).with_context(|| format!("create {}", path.display()))
}

fn succeeded(command: &Command, output: &Output) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    let start = output.stderr.len().saturating_sub(ERROR_TAIL_BYTES);
    let tail = String::from_utf8_lossy(&output.stderr[start..]);
    bail!("{command:?} ended with {}: {}", output.status, tail.trim())
}
