//! Images with everything that a layer can have: the generated set on which Hermes and the reference programs must
//! agree.
//!
//! [`images`] makes small multi-layer images, one per theme, so that a difference names its cause; [`random`] makes
//! images of random operations for differential tests; [`refused`] makes layers that containerd refuses. All are
//! functions of a seed: the same seed gives the same bytes. Contents are [`ramp`]s, in which every misplaced byte
//! shows.
//!
//! What containerd makes of each was observed, not assumed: `tests/odd.rs` has it unpack every image of this module
//! with both snapshotters, and holds what [`OddImage::oracles`] says against what it does.

mod layers;
mod links;
mod names;
mod random;
mod refused;
mod sparse;
mod types;

use anyhow::Result;
use serde_json::json;

use crate::compress::Compression;
use crate::layout::{Layout, LayoutImage, NewLayer};

pub use random::random;
pub use refused::{RefusedLayer, refused};

/// An image of one theme.
#[derive(Debug, Clone)]
pub struct OddImage {
    /// Its tag: lower-case letters, digits and dashes.
    pub tag: String,
    /// Which oracles show the tree that Hermes must show.
    pub oracles: Oracles,
    /// Tar and compression of each layer, lowest first.
    pub layers: Vec<NewLayer>,
}

/// Which reference programs agree on an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Oracles {
    /// containerd with both snapshotters: the image means one thing.
    All,
    /// containerd's two ways differ; its default, overlayfs, is what Hermes must equal.
    Overlayfs,
    /// containerd 1.6 refuses the image (old GNU sparse entries); GNU tar shows its tree.
    GnuTar,
}

impl OddImage {
    /// Layers whose compression changes from layer to layer, starting at a place that depends on the tag, so that all
    /// kinds occur in the set.
    fn new(tag: &str, tars: impl IntoIterator<Item = Vec<u8>>) -> Self {
        let kinds = Compression::all();
        let start: usize = tag.bytes().map(usize::from).sum();
        let layers = tars.into_iter().enumerate().map(|(index, tar)| {
            let compression = kinds[(start + index) % kinds.len()].clone();
            NewLayer { tar, compression }
        });
        Self { tag: tag.to_owned(), oracles: Oracles::All, layers: layers.collect() }
    }

    fn oracles(mut self, oracles: Oracles) -> Self {
        self.oracles = oracles;
        self
    }

    /// Writes the image into a layout, under its tag.
    ///
    /// # Errors
    ///
    /// When a file cannot be written or a compressor fails.
    pub fn write(&self, layout: &Layout) -> Result<LayoutImage> {
        layout.add(&self.tag, &self.layers, &json!({}))
    }
}

/// All themed images.
pub fn images(seed: u64) -> Vec<OddImage> {
    let mut images = types::images(seed);
    images.extend(names::images(seed));
    images.extend(links::images(seed));
    images.extend(sparse::images(seed));
    images.extend(layers::images(seed));
    images.extend(compressions(seed));
    images
}

/// The same content in every compression, long enough for many deflate blocks and several spans.
fn compressions(seed: u64) -> Vec<OddImage> {
    use crate::tarball::{Entry, Tarball};
    let tar = |index: u64| {
        let noise = noise(seed ^ index, 700_000);
        let text: Vec<u8> =
            (0..40_000_u64).flat_map(|line| format!("line {} of {seed}\n", line ^ index).into_bytes()).collect();
        Tarball::of([
            Entry::directory(format!("layer{index}")),
            Entry::file(format!("layer{index}/text"), text),
            Entry::file(format!("layer{index}/noise"), noise),
            Entry::file(format!("layer{index}/ramp"), ramp(seed, 500_123)),
            Entry::file(format!("layer{index}/zeros"), vec![0; 400_000]),
        ])
    };
    let layers =
        Compression::all().into_iter().zip(0..).map(|(compression, index)| NewLayer { tar: tar(index), compression });
    vec![OddImage { tag: "compressions".into(), oracles: Oracles::All, layers: layers.collect() }]
}

/// Content in which each 8-byte word says which file and which place it belongs to.
pub fn ramp(seed: u64, len_bytes: usize) -> Vec<u8> {
    let tag = (mix(seed) as u32 as u64) << 32;
    let words = (0..len_bytes.div_ceil(8) as u64).flat_map(|index| (tag | index).to_be_bytes());
    words.take(len_bytes).collect()
}

/// Content that does not compress.
pub fn noise(seed: u64, len_bytes: usize) -> Vec<u8> {
    let words = (0..len_bytes.div_ceil(8) as u64).flat_map(|index| mix(seed.wrapping_add(index)).to_le_bytes());
    words.take(len_bytes).collect()
}

/// SplitMix64's finaliser: a bijection whose outputs look random (Steele, Lea, Flood 2014).
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let value = (value ^ value >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let value = (value ^ value >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    value ^ value >> 31
}
