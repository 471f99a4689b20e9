//! Memory maps of artifact files.
#![allow(unsafe_code)] // mmap(2) has no safe form: the kernel lets others change a mapped file.

use std::fs::File;
use std::io;

use bytes::Bytes;
use memmap2::Mmap;

/// Maps all of an artifact file. Its pages belong to the page cache, so a table or a tree that is used all day costs
/// no memory of the process.
///
/// The file must not be empty (mmap(2) refuses that).
pub(crate) fn map_artifact(file: &File) -> io::Result<Bytes> {
    // SAFETY: a mapping is sound as long as nobody changes the file. Artifact files are written under another name,
    // renamed once, and never opened for writing again; they are removed by unlinking, which keeps a mapping intact.
    // The store's folder is made for its owner only (mode 0700), and no other process is meant to touch it.
    let map = unsafe { Mmap::map(file)? };
    Ok(Bytes::from_owner(map))
}
