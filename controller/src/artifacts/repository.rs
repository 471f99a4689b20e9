//! Objects in a repository of a registry, as OCI artifacts: one manifest and one blob each.
//!
//! ```text
//! statements/<hex>.json   tag statements-<hex>.json   manifest { artifactType, layers: [the object], annotations }
//! artifacts/<hex>         tag artifacts-<hex>         the same
//! ```
//!
//! A manifest keeps the blob, its tag finds it, and its annotation with the name makes it one of its own even where two
//! objects hold the same. That of a statement names its image in a second annotation, and not as its `subject` (OCI 1.1): a
//! subject is a descriptor with a type and a length, and the image's manifest, which is in another repository as a rule, has to be
//! neither read nor there when its index is signed again. Whoever looks for the index of an image knows the tag.
//!
//! Deleting is deleting the manifest; the registry collects the blob in its own time. One that does not delete (405) gets an
//! empty manifest in the place of the object, which counts as nothing here, and is said once. What an object has replaced is
//! deleted the same way, as far as the registry does.
//!
//! One process writes, so what the tags stand for is known after they were read once, at the start.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use hermes_image::ids::Digest;
use hermes_origin::{OriginClient, OriginError, Repository};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};

use super::store::Found;
use super::{ArtifactsError, KINDS};

/// What addresses begin with.
pub(super) const SCHEME: &str = "oci://";
/// The type of every manifest.
const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
/// The type of an object.
const OBJECT_TYPE: &str = "application/vnd.hermes.object.v1";
/// The type of what stands for a deleted object.
const DELETED_TYPE: &str = "application/vnd.hermes.deleted.v1";
/// The type of the empty document, which manifests without a configuration have (image specification 1.1).
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
const EMPTY: &[u8] = b"{}";
/// The annotation with an object's name.
const TITLE: &str = "org.opencontainers.image.title";
/// The annotation with the digest of the image that a statement is about.
const IMAGE: &str = "hermes.cloudpilot.ai/image";
/// Manifests that are read at once, at the start.
const READS_MAX: usize = 16;

/// What a tag stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Object {
    manifest: Digest,
    blob: Digest,
    len_bytes: u64,
}

/// A repository, and what is in it.
#[derive(Debug)]
pub(super) struct RepositoryStore {
    repository: Repository,
    /// By tag.
    objects: Mutex<BTreeMap<String, Object>>,
    /// Whether it was said that the registry does not delete.
    told: AtomicBool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    artifact_type: Option<String>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: Digest,
    size: u64,
}

fn tag(path: &str) -> String {
    path.replace('/', "-")
}

/// The image that a statement is about.
fn image(path: &str) -> Option<Digest> {
    let hex = path.strip_prefix("statements/")?.strip_suffix(".json")?;
    format!("sha256:{hex}").parse().ok()
}

fn descriptor(kind: &str, bytes: &[u8], digest: Digest) -> Value {
    json!({ "mediaType": kind, "digest": digest.to_string(), "size": bytes.len() })
}

/// What a manifest says of an object; `None` when it is none of ours, or of one that was deleted.
fn object(manifest: Digest, bytes: &[u8]) -> Option<Object> {
    let parsed: Manifest = serde_json::from_slice(bytes).ok()?;
    // Registries from before OCI 1.1 keep the manifest as it is, too.
    let kind = parsed.artifact_type.or(parsed.config.map(|config| config.media_type))?;
    let layer = parsed.layers.first().filter(|layer| kind == OBJECT_TYPE && layer.media_type == OBJECT_TYPE)?;
    Some(Object { manifest, blob: layer.digest, len_bytes: layer.size })
}

impl RepositoryStore {
    /// The repository at `location`, `oci://HOST[:PORT]/NAME`, with everything that its tags stand for.
    pub(super) async fn open(client: &OriginClient, location: &str) -> Result<Self, ArtifactsError> {
        let wrong = |reason: String| ArtifactsError::Location { location: location.to_owned(), reason };
        let place = location.strip_prefix(SCHEME).and_then(|place| place.split_once('/'));
        let Some((host, name)) = place.filter(|(host, name)| !host.is_empty() && is_repository(name)) else {
            return Err(wrong("write oci://HOST[:PORT]/REPOSITORY, without a tag".to_owned()));
        };
        let failed = |source: OriginError| ArtifactsError::Store {
            action: "list",
            object: "objects".to_owned(),
            location: location.to_owned(),
            source: source.into(),
        };
        let repository = client.repository(host, name).await.map_err(failed)?;
        let ours =
            |tag: &String| KINDS.iter().any(|kind| tag.starts_with(&format!("{kind}-"))) || tag.ends_with(".json");
        let tags: Vec<String> = repository.tags().await.map_err(failed)?.into_iter().filter(ours).collect();
        let reads = stream::iter(tags).map(|tag| async {
            let found = repository.manifest(&tag).await?;
            Ok::<_, OriginError>(found.and_then(|(digest, bytes)| Some((tag, object(digest, &bytes)?))))
        });
        let objects: Vec<_> = reads.buffer_unordered(READS_MAX).try_collect().await.map_err(failed)?;
        let objects = Mutex::new(objects.into_iter().flatten().collect());
        Ok(Self { repository, objects, told: AtomicBool::new(false) })
    }

    fn known(&self, path: &str) -> Option<Object> {
        self.objects.lock().get(&tag(path)).copied()
    }

    pub(super) async fn get(&self, path: &str, limit_bytes: u64) -> Result<Found, OriginError> {
        let Some(object) = self.known(path) else { return Ok(Found::Nothing) };
        if object.len_bytes > limit_bytes {
            return Ok(Found::TooLong);
        }
        let bytes = self.repository.blob(object.blob, 0..object.len_bytes, object.len_bytes).await?;
        Ok(bytes.map_or(Found::Nothing, Found::Object))
    }

    pub(super) async fn get_range(&self, path: &str, range: Range<u64>) -> Result<Option<Bytes>, OriginError> {
        let Some(object) = self.known(path) else { return Ok(None) };
        let range = range.start.min(object.len_bytes)..range.end.min(object.len_bytes);
        if range.is_empty() {
            return Ok(Some(Bytes::new()));
        }
        self.repository.blob(object.blob, range, object.len_bytes).await
    }

    pub(super) async fn put(&self, path: &str, bytes: Bytes) -> Result<(), OriginError> {
        let len_bytes = bytes.len() as u64;
        let empty = self.repository.put_blob(Bytes::from_static(EMPTY)).await?;
        let blob = self.repository.put_blob(bytes.clone()).await?;
        let mut manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": OBJECT_TYPE,
            "config": descriptor(EMPTY_TYPE, EMPTY, empty),
            "layers": [descriptor(OBJECT_TYPE, &bytes, blob)],
            "annotations": { TITLE: path },
        });
        if let Some(image) = image(path) {
            manifest["annotations"][IMAGE] = image.to_string().into();
        }
        let document = Bytes::from(manifest.to_string());
        let manifest = self.repository.put_manifest(&tag(path), MANIFEST_TYPE, document).await?;
        let before = self.objects.lock().insert(tag(path), Object { manifest, blob, len_bytes });
        // A manifest without a tag is in nobody's way, should it stay.
        if let Some(before) = before.filter(|before| before.manifest != manifest)
            && let Err(error) = self.repository.delete_manifest(before.manifest).await
        {
            tracing::debug!(path, %error, "what an object has replaced is left in the registry");
        }
        Ok(())
    }

    pub(super) async fn delete(&self, path: &str) -> Result<(), OriginError> {
        let Some(object) = self.known(path) else { return Ok(()) };
        if !self.repository.delete_manifest(object.manifest).await? {
            if !self.told.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    "the registry deletes nothing; what is given up is replaced by an empty manifest, and stays there"
                );
            }
            let empty = self.repository.put_blob(Bytes::from_static(EMPTY)).await?;
            let manifest = json!({
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "artifactType": DELETED_TYPE,
                "config": descriptor(EMPTY_TYPE, EMPTY, empty),
                "layers": [descriptor(EMPTY_TYPE, EMPTY, empty)],
            });
            let document = Bytes::from(manifest.to_string());
            self.repository.put_manifest(&tag(path), MANIFEST_TYPE, document).await?;
        }
        self.objects.lock().remove(&tag(path));
        Ok(())
    }

    pub(super) fn list(&self, kind: &str) -> BTreeMap<String, u64> {
        let prefix = format!("{kind}-");
        let objects = self.objects.lock();
        let listed = objects.range(prefix.clone()..).take_while(|(tag, _)| tag.starts_with(&prefix));
        listed.map(|(tag, object)| (tag[prefix.len()..].to_owned(), object.len_bytes)).collect()
    }
}

/// Whether registries take it as a repository's name: lower-case words, with `/` between them.
fn is_repository(name: &str) -> bool {
    let is_word = |word: &str| {
        let fits =
            word.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte));
        fits && word.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
    };
    name.len() <= 255 && name.split('/').all(is_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifests_of_others_and_deleted_ones_are_nothing() {
        let digest = Digest([1; 32]);
        let manifest = |kind: &str, layer: &str| {
            let layer = json!({ "mediaType": layer, "digest": digest.to_string(), "size": 7 });
            json!({ "schemaVersion": 2, "artifactType": kind, "layers": [layer] }).to_string()
        };
        let ours = object(Digest([2; 32]), manifest(OBJECT_TYPE, OBJECT_TYPE).as_bytes());
        assert_eq!(ours, Some(Object { manifest: Digest([2; 32]), blob: digest, len_bytes: 7 }));
        for other in [manifest(DELETED_TYPE, EMPTY_TYPE), manifest("x", OBJECT_TYPE), "{}".to_owned(), "x".to_owned()] {
            assert_eq!(object(digest, other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn places_are_repositories_without_a_tag() {
        for (name, expected) in [
            ("a", true),
            ("team/indexes", true),
            ("a/b.c_d-1", true),
            ("", false),
            ("a:b", false),
            ("A", false),
            ("a//b", false),
        ] {
            assert_eq!(is_repository(name), expected, "{name}");
        }
        assert_eq!(image(&format!("statements/{}.json", "ab".repeat(32))), Some(Digest([0xab; 32])));
        assert_eq!(image(&format!("images/{}.json", "ab".repeat(32))), None);
    }
}
