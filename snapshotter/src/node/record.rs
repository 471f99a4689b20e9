//! What the next daemon needs to go on showing a tree: written before the tree can be seen, removed after it cannot.
//!
//! A record is keyed by the mount point and says everything that does not lie in the store already, so that nobody has to
//! be asked: not the registry, not a peer, not containerd. It does not say whether the tree *is* mounted; the kernel
//! knows ([`super::restore`]).

use std::path::{Path, PathBuf};

use hermes_image::ids::{ArtifactId, ChainId, Digest};
use hermes_image::statement::LayerStatement;
use hermes_store::Store;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use super::NodeError;
use crate::status::Way;

/// What connections of trees are called at the supervisor, before the name of their mount point.
const TREE_CONNECTION: &str = "hermes.tree";
/// What the connection of the layer files is called at the supervisor.
pub(super) const LAYERS_CONNECTION: &str = "hermes.layers";

/// A mounted tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MountRecord {
    /// The image's manifest.
    pub(super) manifest: Digest,
    /// The chain of layers that the tree was made of.
    pub(super) chain: ChainId,
    /// The reference, as the user wrote it: where missing bytes come from.
    pub(super) reference: String,
    /// Whether the registry is spoken to in clear.
    pub(super) plain_http: bool,
    /// How the tree is shown.
    pub(super) way: Way,
    /// The tree's image, an artifact of the store.
    pub(super) tree: ArtifactId,
    /// Its layers, lowest first, as the signed statement has them.
    pub(super) layers: Vec<LayerStatement>,
    /// Folders of indexes that were named for this image.
    pub(super) index_folders: Vec<PathBuf>,
    /// Peers that were named for this image.
    pub(super) peers: Vec<String>,
}

impl MountRecord {
    /// Keeps the record of the tree at `dir`, durably.
    ///
    /// # Errors
    /// When the store cannot be written.
    pub(super) fn put(&self, store: &Store, dir: &Path) -> Result<(), NodeError> {
        let json = serde_json::to_vec(self).map_err(|error| NodeError::MountPoint {
            dir: dir.to_owned(),
            reason: format!("what is mounted cannot be written down: {error}"),
        })?;
        Ok(store.put_mount(dir, &json)?)
    }

    /// Reads a record.
    ///
    /// # Errors
    /// With what is wrong with it.
    pub(super) fn decode(json: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(json).map_err(|error| error.to_string())
    }
}

/// What the connection of the tree at `dir` is called at the supervisor. A path may have what a name may not.
pub(super) fn tree_connection(dir: &Path) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    let hash = sha2::Sha256::digest(dir.as_os_str().as_bytes());
    // Half a hash tells a node's few hundred mount points apart.
    format!("{TREE_CONNECTION}-{}", hex::encode(&hash[..16]))
}

#[cfg(test)]
mod tests {
    use hermes_image::ids::{DiffId, LayerId};

    use super::*;

    #[test]
    fn records_survive_and_nonsense_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(hermes_store::StoreConfig::new(folder.path())).expect("opens");
        let diff_id = DiffId([1; 32]);
        let layer = LayerStatement {
            layer: LayerId([2; 32]),
            diff_id,
            blob_len_bytes: 3,
            logical_len_bytes: 512,
            toc: ArtifactId([6; 32]),
            chunks: ArtifactId([7; 32]),
            seek: ArtifactId([8; 32]),
            windows: ArtifactId([9; 32]),
        };
        let record = MountRecord {
            manifest: Digest([4; 32]),
            chain: ChainId::of(&[diff_id]).expect("a chain"),
            reference: "registry.test/a:b".to_owned(),
            plain_http: true,
            way: Way::FuseTree,
            tree: ArtifactId([5; 32]),
            layers: vec![layer],
            index_folders: vec![PathBuf::from("/index")],
            peers: vec!["host:1".to_owned()],
        };
        record.put(&store, Path::new("/dir")).expect("kept");
        let (dir, json) = store.mounts().expect("reads").remove(0);
        assert_eq!((dir.as_path(), MountRecord::decode(&json)), (Path::new("/dir"), Ok(record)));
        assert!(MountRecord::decode(b"{}").expect_err("refused").contains("manifest"));
    }

    #[test]
    fn connections_of_two_folders_have_two_names() {
        let (one, other) = (tree_connection(Path::new("/a")), tree_connection(Path::new("/b")));
        assert_ne!(one, other);
        assert!(one.starts_with(TREE_CONNECTION) && one.len() < 64);
    }
}
