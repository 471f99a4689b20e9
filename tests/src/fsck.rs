//! `fsck.erofs`: what the file system's own tools say of a tree.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

/// The first release that knows 512-byte blocks and several devices.
const RECENT: (u32, u32) = (1, 8);

/// Has `fsck.erofs` check the tree image `tree` and read all data of its files from `devices`, the layer files, lowest
/// first.
///
/// # Errors
///
/// When it complains, or is missing or too old.
pub fn fsck(tree: &Path, devices: &[PathBuf]) -> Result<()> {
    require_recent()?;
    let mut command = Command::new("fsck.erofs");
    // Without a folder this reads everything and writes nothing.
    command.arg("--extract");
    for device in devices {
        command.arg(format!("--device={}", device.display()));
    }
    let output = command.arg(tree).output().context("start fsck.erofs")?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success() && !said.contains("<E>"), "fsck.erofs ended with {}: {said}", output.status);
    Ok(())
}

fn require_recent() -> Result<()> {
    let missing = "fsck.erofs 1.8 or newer is not on PATH: `make test` puts it there (tools/erofs-utils builds it)";
    let output = Command::new("fsck.erofs").arg("--version").output().context(missing)?;
    // "fsck.erofs (erofs-utils) 1.8.6"
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let version = text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    let mut numbers = version.unwrap_or_default().split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < RECENT {
        bail!("{missing}; the one there says: {}", text.trim());
    }
    Ok(())
}
