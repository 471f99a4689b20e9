//! What this kernel can do, found out by doing it.
//!
//! A version number says little: distributions backport, modules are missing, containers are confined. So a tree with
//! one file is mounted each way and the file is read. It costs a few milliseconds at start.

use std::io::Read as _;
use std::path::Path;

use bytes::Bytes;
use hermes_image::erofs;
use hermes_image::ids::{ChunkId, DiffId, LogicalOffset};
use hermes_image::index::chunks::{ChunkTable, ChunkTableBuilder};
use hermes_image::tree::{Extent, ExtentSource, Inode, InodeKind, Timestamp, Tree, TreeLayer};
use sha2::Digest as _;

use super::erofs::Backing;

/// Name of the file in the probe's tree.
const FILE_NAME: &str = "probe";

/// The layer that probes read: one block that no hole can be taken for.
pub fn layer_bytes() -> Bytes {
    (0..512_u32).map(|at| (at % 251) as u8 + 1).collect::<Vec<_>>().into()
}

/// Its chunk table: one chunk.
pub fn chunk_table() -> ChunkTable {
    let bytes = layer_bytes();
    let mut builder = ChunkTableBuilder::default();
    builder.push(ChunkId::of(&bytes), bytes.len() as u64).expect("one block is a valid chunk");
    builder.finish(DiffId(sha2::Sha256::digest(&bytes).into()))
}

/// The EROFS image of a tree with one file, which is the whole layer.
///
/// # Errors
/// Never on a tree that is always the same; the writer's own type is passed on.
pub fn tree_image() -> Result<Vec<u8>, erofs::WriteError> {
    let table = chunk_table();
    let len_bytes = table.logical_len_bytes();
    let inode = |permissions, link_count, kind| Inode {
        permissions,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        link_count,
        xattrs: Vec::new(),
        kind,
    };
    let source = ExtentSource::Layer { layer: 0, offset: LogicalOffset(0) };
    let file =
        InodeKind::Regular { size_bytes: len_bytes, extents: vec![Extent { file_offset: 0, len_bytes, source }] };
    let root = InodeKind::Directory { entries: vec![(FILE_NAME.as_bytes().to_vec(), 1)], parent: 0 };
    erofs::write(&Tree {
        layers: vec![TreeLayer { diff_id: table.diff_id(), logical_len_bytes: len_bytes }],
        inodes: vec![inode(0o755, 2, root), inode(0o444, 1, file)],
    })
}

/// Mounts the probe's `image` over `device` at `scratch`, an empty folder, and reads the file.
///
/// # Errors
/// With what does not work, for people.
pub fn try_erofs(image: &Path, device: &Path, scratch: &Path, backing: Backing) -> Result<(), String> {
    let mounted =
        super::erofs::mount(image, &[device.to_owned()], scratch, backing).map_err(|error| error.to_string())?;
    let mut bytes = Vec::new();
    let read = std::fs::File::open(scratch.join(FILE_NAME)).and_then(|mut file| file.read_to_end(&mut bytes));
    drop(mounted);
    read.map_err(|error| format!("the mount works, reading does not: {error}"))?;
    if bytes == layer_bytes() { Ok(()) } else { Err("the mount works, but gives other bytes".to_owned()) }
}
