//! A sample with its index, its registry and its mount point.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use hermes_snapshotter::status::ImageStatus;

use crate::compress::Compression;
use crate::daemon::Daemon;
use crate::faulty::FaultyRegistry;
use crate::guard::ScratchDir;
use crate::sample::{Sample, SampleIndex, TAG};

/// The image that a test mounts.
#[derive(Debug)]
pub struct SampleImage {
    /// Where it is read from.
    pub registry: FaultyRegistry,
    /// Its index.
    pub index: SampleIndex,
    /// What is in it.
    pub sample: Sample,
    /// Where it is mounted.
    pub dir: PathBuf,
}

impl SampleImage {
    /// Makes `sample` below the folder `name` of `scratch`, indexes it with `hermes`, and serves its layout by `serve`.
    ///
    /// # Errors
    /// When one of them fails.
    pub fn new(
        hermes: &Path,
        scratch: &ScratchDir,
        name: &str,
        serve: impl FnOnce(&Path) -> Result<FaultyRegistry>,
        sample: impl FnOnce(&Path) -> Result<Sample>,
    ) -> Result<Self> {
        let folder = scratch.make(name)?;
        let sample = sample(&folder.join("layout"))?;
        let index = sample.build_index(hermes, &folder)?;
        let registry = serve(sample.layout.dir())?;
        Ok(Self { registry, index, sample, dir: folder.join("image") })
    }

    /// How it stands with `daemon`.
    ///
    /// # Errors
    /// When the daemon does not answer, or has not mounted it.
    pub fn status(&self, daemon: &Daemon) -> Result<ImageStatus> {
        let dir = self.dir.display().to_string();
        daemon.status()?.images.into_iter().find(|mounted| mounted.dir == dir).context("it is not mounted")
    }

    /// An image of three files of 15 MB each, in one layer that is not compressed.
    ///
    /// # Errors
    /// See [`Self::new`].
    pub fn large(
        hermes: &Path,
        scratch: &ScratchDir,
        serve: impl FnOnce(&Path) -> Result<FaultyRegistry>,
    ) -> Result<Self> {
        let files: &[(&str, u64)] = &[("a", 15_000_000), ("b", 15_000_000), ("c", 15_000_000)];
        let sample = |dir: &Path| Sample::with_layers(dir, &[(Compression::Plain, files)]);
        Self::new(hermes, scratch, "large", serve, sample)
    }

    /// Mounts it.
    ///
    /// # Errors
    /// When the daemon does not.
    pub fn mount(&self, daemon: &Daemon) -> Result<()> {
        daemon.mount(&self.registry.image(TAG), &self.dir, &self.index, &[])
    }
}
