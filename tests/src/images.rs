//! The real images that `tools/images` makes from packages.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::command::run;
use crate::layout::Layout;

/// The tag of the image in each layout.
pub const TAG: &str = "latest";

/// A real image of several hundred megabytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RealImage {
    /// A JVM service in six gzip layers: Apache Spark.
    Spark,
    /// A Node service; gzip, zstd and multi-member gzip layers.
    Web,
    /// A data service in Python; gzip and uncompressed layers.
    Python,
}

impl RealImage {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Spark, Self::Web, Self::Python];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Spark => "spark",
            Self::Web => "web",
            Self::Python => "python",
        }
    }

    /// Its layout. It is made first if it is not in the cache, which takes minutes and needs root and the network.
    ///
    /// # Errors
    ///
    /// When it cannot be made; the message holds what the script said.
    pub fn layout(self) -> Result<Layout> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/images");
        let output = run(Command::new(script).arg(self.name()))?;
        let path = String::from_utf8(output).context("tools/images printed a path that is not text")?;
        Layout::open(&PathBuf::from(path.trim_end()))
    }
}
