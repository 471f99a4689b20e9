//! umoci: an OCI implementation that shares no code with containerd's unpacking.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::command::run;
use crate::layout::Layout;

/// Unpacks the image `tag` of `layout` into `target`, which must not exist.
///
/// umoci 0.4 reads gzip and uncompressed layers only, and sets attributes, owners and devices when it is root.
///
/// # Errors
///
/// When umoci is missing or refuses the image.
pub fn umoci(layout: &Layout, tag: &str, target: &Path) -> Result<()> {
    let image = format!("{}:{tag}", layout.dir().display());
    run(Command::new("umoci").args(["raw", "unpack", "--image", &image]).arg(target)).map(drop)
}
