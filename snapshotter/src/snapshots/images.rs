//! The seam between snapshots and images that are shown lazily.
//!
//! The service knows names, parents and directories; whether an image may be shown lazily, and how its tree comes to be
//! mounted, is decided behind [`Images`]. [`PlainImages`] never shows anything lazily, which makes the service an
//! ordinary overlay snapshotter.
//!
//! What the service promises: it calls [`Images::show`] before it hands out mounts that need a tree, and
//! [`Images::release`] after the last snapshot that needed it, or one of its places, is gone; for one chain these calls
//! never overlap. After a restart it calls `show` again for every tree that a snapshot needs. Calls are not cancelled when containerd gives up
//! waiting.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::{Path, PathBuf};

use futures::future::BoxFuture;
use hermes_store::{RemoteLayer, SnapshotRecord, SnapshotUsage};
use thiserror::Error;

/// The label with which containerd says what the snapshot that it prepares would become: a chain ID.
pub const TARGET_LABEL: &str = "containerd.io/snapshot.ref";

/// A layer that containerd is about to download and unpack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PulledLayer {
    /// The key of the snapshot that it would be unpacked into.
    pub key: String,
    /// What it would become: the chain ID of itself and everything below, as containerd writes it.
    pub target: String,
    /// containerd's labels: those of the image (`containerd.io/snapshot/cri.…`) where it sends them.
    pub labels: BTreeMap<String, String>,
    /// What is below, the nearest first. Empty for the lowest layer, and for every layer when containerd unpacks them in
    /// parallel.
    pub below: Vec<SnapshotRecord>,
}

/// Whether a layer is shown lazily.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// containerd is told that it has the layer already, and never downloads it.
    Lazy(RemoteLayer),
    /// containerd downloads and unpacks it.
    Plain {
        /// Why, for the log.
        reason: String,
    },
}

/// A layer that is shown lazily, with everything below it. Whatever is below, the tree of the whole chain is what is
/// shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteChain {
    /// The uppermost layer of the chain; its `chain` names the tree.
    pub layer: RemoteLayer,
    /// Its snapshot.
    pub top: SnapshotRecord,
    /// The snapshots below it, the nearest first. They may be remote or plain.
    pub below: Vec<SnapshotRecord>,
}

impl RemoteChain {
    /// The part of a chain, given the nearest first, from its uppermost remote layer down; `None` when all are plain.
    pub fn topmost(chain: &[SnapshotRecord]) -> Option<Self> {
        chain.iter().enumerate().find_map(|(above, top)| {
            Some(Self { layer: top.remote?, top: top.clone(), below: chain[above + 1..].to_vec() })
        })
    }
}

/// Why a tree could not be shown, or a layer not be measured.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ImagesError {
    /// It may work later: a source does not answer.
    #[error("{0}")]
    Unavailable(String),
    /// It will not work until somebody does something.
    #[error("{0}")]
    Failed(String),
}

/// What knows images. All calls may take long; none is made while the service holds a lock that others wait for, except
/// for others of the same chain.
pub trait Images: Debug + Send + Sync + 'static {
    /// Whether a layer that containerd is about to download is shown lazily. All or nothing for an image: a layer that
    /// is answered [`Decision::Lazy`] is never downloaded, and from the first one that is [`Decision::Plain`] containerd
    /// downloads it and every layer above.
    fn decide<'a>(&'a self, layer: &'a PulledLayer) -> BoxFuture<'a, Decision>;

    /// Makes sure that the merged tree of `chain` is mounted, read-only, and says where. Called whenever mounts are
    /// handed out, so it is quick when the tree is there. The answer may be another place than the last time; a place
    /// that was answered must go on showing the tree until it is released: containers have the directory in their
    /// mounts. Its path must not hold a colon or a comma.
    fn show<'a>(&'a self, chain: &'a RemoteChain) -> BoxFuture<'a, Result<PathBuf, ImagesError>>;

    /// Where the tree of `chain` is shown now, also by an earlier process.
    fn places<'a>(&'a self, chain: &'a RemoteChain) -> BoxFuture<'a, Vec<PathBuf>>;

    /// No snapshot needs the tree of `chain` any more at `place`; at none, when that is `None`. May come for a tree that
    /// could not be shown.
    fn release<'a>(&'a self, chain: &'a RemoteChain, place: Option<&'a Path>) -> BoxFuture<'a, ()>;

    /// What of a remote layer is really on this node.
    fn usage<'a>(&'a self, layer: &'a RemoteLayer) -> BoxFuture<'a, Result<SnapshotUsage, ImagesError>>;

    /// The last snapshot of a remote layer was removed.
    fn removed<'a>(&'a self, layer: &'a RemoteLayer) -> BoxFuture<'a, ()>;
}

/// No lazy images: every image is pulled and unpacked.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlainImages;

impl Images for PlainImages {
    fn decide<'a>(&'a self, _layer: &'a PulledLayer) -> BoxFuture<'a, Decision> {
        Box::pin(async { Decision::Plain { reason: "this node shows no image lazily".to_owned() } })
    }

    fn show<'a>(&'a self, chain: &'a RemoteChain) -> BoxFuture<'a, Result<PathBuf, ImagesError>> {
        let message = format!(
            "snapshot {} was never unpacked, and this node now shows no image lazily; remove its image and pull it again, \
             or start the node with lazy images",
            chain.top.name
        );
        Box::pin(async { Err(ImagesError::Failed(message)) })
    }

    fn places<'a>(&'a self, _chain: &'a RemoteChain) -> BoxFuture<'a, Vec<PathBuf>> {
        Box::pin(async { Vec::new() })
    }

    fn release<'a>(&'a self, _chain: &'a RemoteChain, _place: Option<&'a Path>) -> BoxFuture<'a, ()> {
        Box::pin(async {})
    }

    fn usage<'a>(&'a self, _layer: &'a RemoteLayer) -> BoxFuture<'a, Result<SnapshotUsage, ImagesError>> {
        Box::pin(async { Ok(SnapshotUsage::default()) })
    }

    fn removed<'a>(&'a self, _layer: &'a RemoteLayer) -> BoxFuture<'a, ()> {
        Box::pin(async {})
    }
}
