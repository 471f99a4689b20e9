//! A small image in which every byte is a function of its file and place, so that every wrong byte shows.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::command::run;
use crate::compress::Compression;
use crate::layout::{Layout, LayoutImage, NewLayer};
use crate::tarball::{BLOCK_LEN_BYTES, Entry, Tarball};

/// The tag under which samples are stored.
pub const TAG: &str = "v1";

/// An image in a layout, and what its files hold.
#[derive(Debug)]
pub struct Sample {
    /// Where it is.
    pub layout: Layout,
    /// Its manifest and layers.
    pub image: LayoutImage,
    files: BTreeMap<String, u64>,
    /// Its layers before compression, lowest first.
    tars: Vec<Vec<u8>>,
}

/// A layer of a sample: how it is compressed, and its files with their lengths in bytes.
pub type SampleLayer<'a> = (Compression, &'a [(&'a str, u64)]);

/// The index of a sample.
pub type SampleIndex = hermes_lab::index::Index;

impl Sample {
    /// An image of five megabytes: one gzip layer, one of zstd frames, one plain.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn new(dir: &Path) -> Result<Self> {
        Self::with_layers(
            dir,
            &[
                (Compression::Gzip(6), &[("gzip/first", 1_500_000), ("gzip/second", 700_001), ("gzip/small", 17)]),
                (Compression::ZstdFrames { frame_len_bytes: 300_000 }, &[("zstd/first", 1_300_000), ("zstd/small", 3)]),
                (Compression::Plain, &[("plain/first", 1_200_000), ("plain/second", 300_000)]),
            ],
        )
    }

    /// An image of these layers, lowest first.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn with_layers(dir: &Path, layers: &[SampleLayer<'_>]) -> Result<Self> {
        let layout = Layout::create(dir)?;
        let tars: Vec<_> = layers
            .iter()
            .map(|(compression, files)| NewLayer {
                tar: Tarball::of(files.iter().map(|(name, len)| Entry::file(name, content(name, *len)))),
                compression: compression.clone(),
            })
            .collect();
        let image = layout.add(TAG, &tars, &json!({}))?;
        let files = layers.iter().flat_map(|(_, files)| files.iter().map(|(name, len)| ((*name).to_owned(), *len)));
        let files = files.collect();
        Ok(Self { layout, image, files, tars: tars.into_iter().map(|layer| layer.tar).collect() })
    }

    /// The same image in another layout, its layers compressed as `kinds` say, lowest first.
    ///
    /// # Errors
    /// When it cannot be read or written.
    ///
    /// # Panics
    /// When there are fewer kinds than layers.
    pub fn compressed_as(&self, dir: &Path, kinds: &[Compression]) -> Result<Self> {
        let layout = Layout::create(dir)?;
        let layers = self.tars.iter().enumerate();
        let layers = layers.map(|(place, tar)| NewLayer { tar: tar.clone(), compression: kinds[place].clone() });
        let image = layout.add(TAG, &layers.collect::<Vec<_>>(), &json!({}))?;
        Ok(Self { layout, image, files: self.files.clone(), tars: self.tars.clone() })
    }

    /// The names of its files.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// What `name` holds.
    ///
    /// # Panics
    /// When there is no such file.
    pub fn content(&self, name: &str) -> Vec<u8> {
        content(name, self.files[name])
    }

    /// The layer that holds `name`, from the lowest, and where its content lies in that before compression. `None` when there is no such
    /// file, or an empty one.
    pub fn place(&self, name: &str) -> Option<(usize, Range<u64>)> {
        let content = self.files.get(name).filter(|len| **len > 0).map(|len| content(name, *len))?;
        let find = |tar: &[u8]| {
            let mut blocks = (0..tar.len()).step_by(BLOCK_LEN_BYTES);
            blocks.find(|at| tar[*at..].starts_with(&content)).map(|at| at as u64..(at + content.len()) as u64)
        };
        self.tars.iter().enumerate().find_map(|(layer, tar)| Some((layer, find(tar)?)))
    }

    /// Builds its index with `hermes`, the real program.
    ///
    /// # Errors
    /// With what the program says.
    pub fn build_index(&self, hermes: &Path, folder: &Path) -> Result<SampleIndex> {
        let image = format!("oci:{}:{TAG}", self.layout.dir().display());
        let mut command = Command::new(hermes);
        command.args(["index", "build", &image, "--json", "--output"]).arg(folder.join("index"));
        command.arg("--key").arg(folder.join("key")).arg("--state").arg(folder);
        let answer: Value = serde_json::from_slice(&run(&mut command)?)?;
        let key = answer["key"].as_str().context("the answer names no key")?.to_owned();
        Ok(SampleIndex { folder: folder.join("index"), key })
    }

    /// Says how the tree at `root` differs from what the files should hold; nothing when all is right.
    ///
    /// # Errors
    /// With the first file that cannot be read.
    pub fn check(&self, root: &Path) -> Result<()> {
        self.names().try_for_each(|name| self.check_file(root, name))
    }

    /// The same for one file.
    ///
    /// # Errors
    /// When it cannot be read, or holds other bytes.
    pub fn check_file(&self, root: &Path, name: &str) -> Result<()> {
        let found = std::fs::read(root.join(name)).with_context(|| format!("read {name}"))?;
        anyhow::ensure!(found == self.content(name), "{name} holds wrong bytes");
        Ok(())
    }
}

/// What a file called `name` of `len_bytes` holds. Half noise, half text: it compresses, and no two places are alike.
pub fn content(name: &str, len_bytes: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len_bytes as usize + 64);
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3) // FNV-1a
    });
    while (bytes.len() as u64) < len_bytes {
        // splitmix64
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
        bytes.extend_from_slice(b" a byte ");
    }
    bytes.truncate(len_bytes as usize);
    bytes
}
