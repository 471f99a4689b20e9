//! The image that a fleet reads, and what is read of it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::compress::Compression;
use crate::guard::{ScratchDir, Sweeper};
use crate::sample::{Sample, SampleIndex};

/// An image to be made: some rounds of files in each of its layers.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// How many layers.
    pub layers: usize,
    /// How many rounds each layer has. Every other one is read, from the first.
    pub rounds: usize,
    /// The lengths of the files of a round, in bytes.
    pub lengths: &'static [u64],
}

impl Plan {
    /// Four megabytes, all of which is read.
    pub const SMALL: Self =
        Self { layers: 2, rounds: 1, lengths: &[1_000_000, 300_000, 70_000, 500_000, 100_000, 20_000, 3] };
    /// 127 MB in four layers, 75 MB compressed; half of it is read.
    pub const WHOLE: Self = Self {
        layers: 4,
        rounds: 4,
        lengths: &[4_000_000, 1_000_000, 250_000, 60_000, 2_000_000, 500_000, 100_000, 20_000],
    };
}

/// A file that is read, and what it must hold.
#[derive(Debug, Clone)]
pub struct KnownFile {
    /// Its path in the image.
    pub name: String,
    /// The hash of its content.
    pub hash: blake3::Hash,
}

/// An image with its index, and the program that nodes are.
#[derive(Debug)]
pub struct Rig {
    /// The `hermes` command.
    pub hermes: PathBuf,
    /// The image.
    pub sample: Sample,
    /// Its index, which all nodes have.
    pub index: SampleIndex,
    /// What nodes read, in this order.
    pub read: Vec<KnownFile>,
    /// Bytes that the files to be read take in the compressed layers, about: as the layers compress.
    pub read_compressed_bytes: u64,
    _scratch: ScratchDir,
    _sweeper: Sweeper,
}

impl Rig {
    /// Makes the image and its index.
    ///
    /// # Errors
    /// When it cannot be written, or with what `hermes index build` says.
    pub fn new(hermes: &Path, plan: Plan) -> Result<Self> {
        let scratch = ScratchDir::new("rig")?;
        let sweeper = Sweeper::watch(scratch.path())?;
        let layers: Vec<Vec<(String, u64, bool)>> = (0..plan.layers).map(|layer| files(plan, layer)).collect();
        let borrowed: Vec<Vec<(&str, u64)>> =
            layers.iter().map(|files| files.iter().map(|(name, len, _)| (name.as_str(), *len)).collect()).collect();
        let described: Vec<_> = borrowed.iter().map(|files| (Compression::Gzip(6), files.as_slice())).collect();
        let sample = Sample::with_layers(&scratch.path().join("layout"), &described)?;
        let index = sample.build_index(hermes, scratch.path())?;
        let is_read = layers.iter().flatten().filter(|(_, _, is_read)| *is_read);
        let known = is_read
            .clone()
            .map(|(name, ..)| KnownFile { name: name.clone(), hash: blake3::hash(&sample.content(name)) });
        let read = known.collect();
        let read_bytes: u64 = is_read.map(|(_, len, _)| len).sum();
        let all_bytes: u64 = layers.iter().flatten().map(|(_, len, _)| len).sum();
        let compressed_bytes: u64 = sample.image.layers.iter().map(|layer| layer.blob_len_bytes).sum();
        let read_compressed_bytes = read_bytes * compressed_bytes / all_bytes.max(1);
        let hermes = std::fs::canonicalize(hermes).context("find hermes")?;
        Ok(Self { hermes, sample, index, read, read_compressed_bytes, _scratch: scratch, _sweeper: sweeper })
    }
}

/// Name and length of each file of a layer, and whether it is read.
fn files(plan: Plan, layer: usize) -> Vec<(String, u64, bool)> {
    let rounds = (0..plan.rounds).flat_map(|round| plan.lengths.iter().enumerate().map(move |file| (round, file)));
    rounds
        .map(|(round, (file, len))| (format!("layer-{layer}/round-{round}/file-{file}"), *len, round.is_multiple_of(2)))
        .collect()
}
