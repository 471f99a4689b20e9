//! Unpacking an image with the programs that others trust, to compare with.
//!
//! Three oracles: containerd, whose behaviour Hermes promises; umoci, an independent implementation; and GNU tar, layer
//! by layer, where this module only deletes what whiteouts name. Each unpacks into a tree that belongs to a guard.

mod containerd;
mod gnu_tar;
mod umoci;

pub use containerd::{Containerd, MountedImage, Snapshotter};
pub use gnu_tar::{decompress, gnu_tar};
pub use umoci::umoci;
