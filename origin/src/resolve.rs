//! From a name to an image: index, manifest, configuration and layers, each checked against the digest that led to it.

use bytes::Bytes;
use hermes_image::agreement::ManifestLayer;
use hermes_image::ids::{DiffId, Digest, LayerId};
use hermes_image::statement::LayerStatement;
use hermes_registry::oci::{
    Descriptor, DocumentError, DocumentKind, ImageConfig, Index, MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, Manifest,
    Platform, document_kind, media_type,
};
use tokio::time::Instant;

use super::Origin;
use super::error::{Failure, OriginError};
use super::registry::Document;

/// Indexes that may lie inside each other; tools make one, some two.
const MAX_INDEX_DEPTH: usize = 4;

/// Docker's type of an image configuration.
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerDescriptor {
    /// The digest of the compressed bytes.
    pub layer: LayerId,
    /// The digest of the uncompressed tar stream, by the image's configuration.
    pub diff_id: DiffId,
    /// The number of compressed bytes.
    pub len_bytes: u64,
    /// The media type, which says the compression; one of those that containerd accepts. `None` when the layer is known
    /// from a signed index and not from the manifest.
    pub media_type: Option<String>,
}

impl LayerDescriptor {
    /// What a signed statement says of a layer.
    pub fn of_statement(statement: &LayerStatement) -> Self {
        let LayerStatement { layer, diff_id, blob_len_bytes, .. } = *statement;
        Self { layer, diff_id, len_bytes: blob_len_bytes, media_type: None }
    }

    /// What an index is compared with.
    pub fn manifest_layer(&self) -> ManifestLayer {
        ManifestLayer { layer: self.layer, diff_id: self.diff_id, len_bytes: self.len_bytes }
    }
}

/// An image for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedImage {
    /// The reference that was resolved, in full.
    pub reference: String,
    /// The digest that the reference stands for: of an index, or of the manifest itself.
    pub target_digest: Digest,
    /// The digest of the manifest for the platform.
    pub manifest_digest: Digest,
    /// That manifest, as it stands in the source.
    pub manifest_bytes: Bytes,
    /// The platform of the image, by its configuration.
    pub platform: Platform,
    /// The configuration, as it stands in the source.
    pub config_bytes: Bytes,
    /// The layers, lowest first.
    pub layers: Vec<LayerDescriptor>,
}

pub(super) async fn resolve(
    origin: &Origin,
    platform: &Platform,
    deadline: Instant,
) -> Result<ResolvedImage, OriginError> {
    let subject = origin.subject();
    let error = |failure| subject.error(failure);
    let target = origin.target(deadline).await?;
    let target_digest = target.digest;
    let document = descend(origin, target, platform, deadline).await?;
    let manifest: Manifest = parse("manifest", &document.bytes).map_err(error)?;
    check_kind(&manifest).map_err(error)?;

    let config = &manifest.config;
    let config = origin.small_blob("configuration", config.digest, MAX_CONFIG_BYTES, deadline).await?;
    let parsed: ImageConfig = parse("configuration", &config.bytes).map_err(error)?;
    if !parsed.platform.is_unknown() && !parsed.platform.runs_on(platform) {
        let available = vec![parsed.platform];
        return Err(error(Failure::PlatformMissing { wanted: platform.clone(), available }));
    }
    Ok(ResolvedImage {
        reference: subject.image.to_string(),
        target_digest,
        manifest_digest: document.digest,
        manifest_bytes: document.bytes,
        platform: if parsed.platform.is_unknown() { platform.clone() } else { parsed.platform },
        layers: layers(&manifest, &parsed.rootfs.diff_ids).map_err(error)?,
        config_bytes: config.bytes,
    })
}

/// Goes from an index down to the manifest for `platform`.
async fn descend(
    origin: &Origin,
    mut document: Document,
    platform: &Platform,
    deadline: Instant,
) -> Result<Document, OriginError> {
    let error = |failure| origin.subject().error(failure);
    for _ in 0..MAX_INDEX_DEPTH {
        let (kind, _) = document_kind(&document.bytes).map_err(|cause| {
            error(match cause {
                DocumentError::Malformed(cause) => Failure::Malformed { what: "manifest", reason: cause.to_string() },
                DocumentError::Unsupported(_) => Failure::Unsupported(cause.to_string()),
            })
        })?;
        if kind == DocumentKind::Manifest {
            return Ok(document);
        }
        let index: Index = parse("index", &document.bytes).map_err(error)?;
        let entry = index
            .select(platform)
            .map_err(|available| error(Failure::PlatformMissing { wanted: platform.clone(), available }))?;
        if entry.size > MAX_MANIFEST_BYTES {
            return Err(error(Failure::TooLong { what: "manifest", limit_bytes: MAX_MANIFEST_BYTES }));
        }
        document = origin.manifest(entry.digest, deadline).await?;
        let actual_bytes = document.bytes.len() as u64;
        if actual_bytes != entry.size {
            return Err(error(Failure::WrongLength { wanted_bytes: entry.size, actual_bytes }));
        }
    }
    let reason = format!("its indexes lie more than {MAX_INDEX_DEPTH} deep in each other");
    Err(error(Failure::Malformed { what: "index", reason }))
}

fn parse<T: serde::de::DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(bytes).map_err(|cause| Failure::Malformed { what, reason: cause.to_string() })
}

/// Refuses what is no container image, such as a chart or a signature.
fn check_kind(manifest: &Manifest) -> Result<(), Failure> {
    match manifest.config.media_type.as_str() {
        "" | media_type::OCI_CONFIG | DOCKER_CONFIG => Ok(()),
        other => {
            Err(Failure::Unsupported(format!("it is not a container image: its configuration is of type {other}")))
        }
    }
}

fn layers(manifest: &Manifest, diff_ids: &[DiffId]) -> Result<Vec<LayerDescriptor>, Failure> {
    if manifest.layers.len() != diff_ids.len() {
        return Err(Failure::LayerCount { layers: manifest.layers.len(), diff_ids: diff_ids.len() });
    }
    manifest.layers.iter().zip(diff_ids).map(|(layer, diff_id)| checked_layer(layer, *diff_id)).collect()
}

fn checked_layer(layer: &Descriptor, diff_id: DiffId) -> Result<LayerDescriptor, Failure> {
    match layer.media_type.as_str() {
        media_type::OCI_LAYER_TAR
        | media_type::OCI_LAYER_GZIP
        | media_type::OCI_LAYER_ZSTD
        | media_type::DOCKER_LAYER_TAR
        | media_type::DOCKER_LAYER_GZIP
        | media_type::DOCKER_LAYER_ZSTD => {}
        foreign if foreign.contains("nondistributable") || foreign.contains("foreign") => {
            return Err(Failure::Unsupported(format!(
                "its layer {} may not be distributed by registries (type {foreign})",
                layer.digest
            )));
        }
        other => {
            return Err(Failure::Unsupported(format!("its layer {} is of the unknown type '{other}'", layer.digest)));
        }
    }
    Ok(LayerDescriptor {
        layer: layer.digest.into(),
        diff_id,
        len_bytes: layer.size,
        media_type: Some(layer.media_type.clone()),
    })
}
