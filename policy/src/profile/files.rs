//! Where the files of layers are, by path: what [`super::paths::PathMap`] compares of two images.

use std::collections::BTreeMap;

use hermes_image::index::chunks::ChunkTable;
use hermes_image::index::toc::{NodeKind, ROOT, Toc};
use hermes_image::tree::ExtentSource;

use super::paths::FilePlace;

/// The regular files of some layers, by path.
#[derive(Debug)]
pub struct Files {
    files: Vec<(Vec<u8>, FilePlace)>,
    len_bytes: usize,
    len_max_bytes: usize,
}

impl Files {
    /// None yet. Of files beyond `len_max_bytes` of paths nothing is kept.
    pub fn new(len_max_bytes: usize) -> Self {
        Self { files: Vec::new(), len_bytes: 0, len_max_bytes }
    }

    /// Adds the files of a layer that are in one piece; sparse files start nothing.
    pub fn add(&mut self, toc: &Toc, table: &ChunkTable) {
        let mut paths: BTreeMap<u32, Vec<u8>> = BTreeMap::from([(ROOT, Vec::new())]);
        // Directories stand before what is in them.
        for node in toc.nodes() {
            // Each path is needed once: taken away, so that those of one level of the tree are all that is held.
            let Some(path) = paths.remove(&node.no()) else { continue };
            match node.kind() {
                NodeKind::Directory { children, .. } => {
                    for child in children {
                        let name = toc.node(child).name();
                        paths.insert(child, [path.as_slice(), b"/", name].concat());
                    }
                }
                NodeKind::Regular { mut extents, .. } => {
                    let (first, more) = (extents.next(), extents.next());
                    if let (Some(extent), None) = (first, more)
                        && let ExtentSource::Layer { offset, .. } = extent.source
                        && self.len_bytes < self.len_max_bytes
                    {
                        self.len_bytes += path.len();
                        let chunks = table.covering(offset.0..offset.0.saturating_add(extent.len_bytes));
                        self.files.push((path, FilePlace { layer: table.diff_id(), chunks }));
                    }
                }
                _ => {}
            }
        }
    }

    /// Each file, lowest layer first.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], FilePlace)> {
        self.files.iter().map(|(path, place)| (path.as_slice(), place.clone()))
    }
}
