//! Which file of an image a place in a layer belongs to, for messages.
//!
//! Reads come as ranges of layers; people know files. The mounted trees are searched when somebody asks, which walks
//! every name of an image: for messages and dumps, never for reads.

use std::ops::Range;
use std::path::PathBuf;

use bytes::Bytes;
use hermes_image::erofs::{FileType, Image, Nid, RangeSource};
use hermes_image::ids::DiffId;
use parking_lot::Mutex;

/// Entries of a tree that are looked at: four times the largest images known. Past them a place has no file.
const MAX_ENTRIES: u32 = 4_000_000;

/// A tree that is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShownTree {
    /// The image, as the user named it.
    pub image: String,
    /// The tree's EROFS image.
    pub tree_path: PathBuf,
    /// Its layers, in the order of its devices.
    pub layers: Vec<DiffId>,
}

/// The trees that are shown.
#[derive(Debug, Default)]
pub struct Locator {
    trees: Mutex<Vec<ShownTree>>,
}

impl Locator {
    /// Adds a tree.
    pub fn insert(&self, tree: ShownTree) {
        self.trees.lock().push(tree);
    }

    /// Forgets one tree that is `tree`.
    pub fn remove(&self, tree: &ShownTree) {
        let mut trees = self.trees.lock();
        if let Some(at) = trees.iter().position(|known| known == tree) {
            trees.swap_remove(at);
        }
    }

    /// The file, within its image, that holds the byte `offset` of `layer`; `None` where no shown tree has one there.
    /// Of several images that share the layer, the one called `image` is meant, else any. Reads the tree from the disk.
    pub fn find(&self, image: &str, layer: DiffId, offset: u64) -> Option<PathBuf> {
        let mut trees: Vec<ShownTree> = self.trees.lock().clone();
        trees.retain(|tree| tree.layers.contains(&layer));
        trees.sort_by_key(|tree| tree.image != image);
        trees.iter().find_map(|tree| {
            let index = tree.layers.iter().position(|known| *known == layer)?;
            let bytes = Bytes::from(std::fs::read(&tree.tree_path).ok()?);
            find_in(&Image::open(bytes).ok()?, index, offset)
        })
    }
}

/// The first file of `image`, in the order of the tree, with a byte at `offset` of the device `index`.
fn find_in(image: &Image<Bytes>, index: usize, offset: u64) -> Option<PathBuf> {
    let mut folders = vec![(image.root(), PathBuf::from("/"))];
    let mut seen = 0;
    while let Some((folder, path)) = folders.pop() {
        // A tree that is damaged is said elsewhere; here it just has no answer.
        for entry in image.readdir(folder, 0).ok()? {
            let entry = entry.ok()?;
            seen += 1;
            if seen > MAX_ENTRIES {
                return None;
            }
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            let name = || path.join(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(entry.name));
            match entry.kind {
                FileType::Directory => folders.push((entry.nid, name())),
                FileType::Regular if holds(image, entry.nid, index, offset) => return Some(name()),
                _ => {}
            }
        }
    }
    None
}

fn holds(image: &Image<Bytes>, nid: Nid, index: usize, offset: u64) -> bool {
    let Ok(attributes) = image.stat(nid) else { return false };
    let Ok(mut extents) = image.extents(nid, 0..attributes.size_bytes) else { return false };
    extents.any(|extent| {
        extent.is_ok_and(|extent| match extent.source {
            RangeSource::Device { index: device, offset: start } => {
                let held: Range<u64> = start.0..start.0.saturating_add(extent.len_bytes);
                usize::from(device) == index && held.contains(&offset)
            }
            RangeSource::Hole | RangeSource::Image { .. } => false,
        })
    })
}
