//! Images: which layers and artifacts belong together, and which must stay.

use std::collections::BTreeSet;

use hermes_image::access::Access;
use hermes_image::ids::{ArtifactId, DiffId, Digest, LayerId};
use hermes_image::statement::LayerStatement;
use serde::{Deserialize, Serialize};

use crate::error::StoreError;
use crate::store::Store;

/// Longest name of a pin's owner, in bytes.
pub const PIN_OWNER_MAX_BYTES: usize = 255;

/// What the store knows of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRecord {
    /// Digest of the manifest, which names the image.
    pub manifest: Digest,
    /// The reference that it was last asked for by, as the user wrote it.
    pub reference: String,
    /// Platform, as `os/architecture[/variant]`.
    pub platform: String,
    /// Its layers, lowest first.
    pub layers: Vec<ImageLayer>,
    /// The merged tree, once it was made.
    pub tree: Option<ArtifactId>,
    /// Unix seconds when the image was last asked for.
    pub last_use_seconds: u64,
    /// To whom its registry gives it. A record that does not say counts as private.
    #[serde(default)]
    pub access: Access,
    /// Whether its registry has ever given it to this node.
    #[serde(default)]
    pub proven: bool,
}

/// One layer of an image, with the artifacts of its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageLayer {
    /// The compressed blob.
    pub layer: LayerId,
    /// The uncompressed content.
    pub diff_id: DiffId,
    /// The table of contents.
    pub toc: ArtifactId,
    /// The chunk table.
    pub chunks: ArtifactId,
    /// The seek table.
    pub seek: ArtifactId,
    /// The windows of the seek table.
    pub windows: ArtifactId,
}

impl From<&LayerStatement> for ImageLayer {
    fn from(layer: &LayerStatement) -> Self {
        let LayerStatement { layer, diff_id, toc, chunks, seek, windows, .. } = *layer;
        Self { layer, diff_id, toc, chunks, seek, windows }
    }
}

impl ImageRecord {
    pub(crate) fn decode(digest: Digest, json: &[u8]) -> Result<Self, StoreError> {
        let damaged = |reason| StoreError::Damaged { record: format!("image {digest}"), reason };
        let record: Self = serde_json::from_slice(json).map_err(|error| damaged(error.to_string()))?;
        if record.manifest == digest {
            Ok(record)
        } else {
            Err(damaged(format!("it describes {} instead", record.manifest)))
        }
    }

    /// The artifacts of its layers' indexes, and its tree.
    pub fn artifacts(&self) -> impl Iterator<Item = ArtifactId> + '_ {
        let of_layers = self.layers.iter().flat_map(|layer| [layer.toc, layer.chunks, layer.seek, layer.windows]);
        of_layers.chain(self.tree)
    }
}

impl Store {
    /// Keeps an image's record, durably; replaces one of the same digest.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        let json = serde_json::to_vec(record).expect("names, text and numbers always serialise");
        self.shared.catalogue.put_image(record.manifest, &json)?;
        self.shared.space.something_changed();
        Ok(())
    }

    /// An image's record.
    ///
    /// # Errors
    /// When the catalogue cannot be read, or the record is damaged.
    pub fn image(&self, manifest: Digest) -> Result<Option<ImageRecord>, StoreError> {
        let json = self.shared.catalogue.image(manifest)?;
        json.map(|json| ImageRecord::decode(manifest, &json)).transpose()
    }

    /// All images, by digest. A damaged record is left out and logged; [`Store::remove_image`] takes it away.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        let mut images = Vec::new();
        for (digest, json) in self.shared.catalogue.images()? {
            match ImageRecord::decode(digest, &json) {
                Ok(record) => images.push(record),
                Err(error) => tracing::warn!(%digest, %error, "image record left out"),
            }
        }
        Ok(images)
    }

    /// Forgets an image and its pins. Its layers and artifacts stay, as something to copy chunks from, until the
    /// budget or the caller wants their room: the answer names the layers that no other image has, for
    /// [`Store::remove_layer`].
    ///
    /// # Errors
    /// When the catalogue cannot be read or written.
    pub fn remove_image(&self, manifest: Digest) -> Result<Vec<DiffId>, StoreError> {
        let layers: BTreeSet<DiffId> = match self.image(manifest) {
            Ok(Some(record)) => record.layers.iter().map(|layer| layer.diff_id).collect(),
            Ok(None) | Err(StoreError::Damaged { .. }) => BTreeSet::new(),
            Err(error) => return Err(error),
        };
        self.shared.catalogue.remove_image(manifest)?;
        self.shared.space.something_changed();
        let kept: BTreeSet<DiffId> =
            self.images()?.iter().flat_map(|image| image.layers.iter().map(|layer| layer.diff_id)).collect();
        Ok(layers.difference(&kept).copied().collect())
    }

    /// Keeps what is present of an image's layers from being evicted, until every owner has unpinned it. Durable. May
    /// come before the image.
    ///
    /// # Errors
    /// When the catalogue cannot be written, or the owner's name is empty or longer than [`PIN_OWNER_MAX_BYTES`].
    pub fn pin(&self, manifest: Digest, owner: &str) -> Result<(), StoreError> {
        if owner.is_empty() || owner.len() > PIN_OWNER_MAX_BYTES {
            let rule = "a pin's owner has a name of 1 to 255 bytes";
            return Err(StoreError::Config { field: "pin owner", value: owner.to_owned(), rule });
        }
        self.shared.catalogue.set_pin(manifest, owner, true)
    }

    /// Takes one owner's pin away. Nothing happens when there is none.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn unpin(&self, manifest: Digest, owner: &str) -> Result<(), StoreError> {
        self.shared.catalogue.set_pin(manifest, owner, false)?;
        self.shared.space.something_changed();
        Ok(())
    }

    /// Every pin: the image and the owner.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn pins(&self) -> Result<Vec<(Digest, String)>, StoreError> {
        self.shared.catalogue.pins()
    }

    /// Removes the artifacts that neither an image nor a layer refers to and that `keep` does not want; the bytes that
    /// came back. Call it when nobody is between [`Store::put_artifact`] and [`Store::put_image`].
    ///
    /// # Errors
    /// When the catalogue cannot be read or a file cannot be removed.
    pub fn remove_unused_artifacts(&self, keep: &dyn Fn(ArtifactId) -> bool) -> Result<u64, StoreError> {
        self.shared.remove_artifacts_but(&self.used_artifacts()?, keep)
    }

    /// Removes what an image had for itself: `layers` but for those that somebody holds, and those of `artifacts` to which
    /// neither an image nor a layer refers then.
    ///
    /// # Errors
    /// When the catalogue cannot be read or a file cannot be removed.
    pub fn remove_if_unused(
        &self,
        layers: impl IntoIterator<Item = DiffId>,
        artifacts: &[ArtifactId],
    ) -> Result<(), StoreError> {
        for layer in layers {
            match self.remove_layer(layer) {
                Ok(_) | Err(StoreError::LayerInUse { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.shared.remove_artifacts(artifacts, &self.used_artifacts()?)
    }

    /// What images and layers refer to.
    fn used_artifacts(&self) -> Result<BTreeSet<ArtifactId>, StoreError> {
        let mut used: BTreeSet<ArtifactId> = self.layers().iter().map(|layer| layer.table().id()).collect();
        for (digest, json) in self.shared.catalogue.images()? {
            // A damaged record could refer to anything: nothing is removed until it is.
            used.extend(ImageRecord::decode(digest, &json)?.artifacts());
        }
        Ok(used)
    }
}
