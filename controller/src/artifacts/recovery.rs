//! What an earlier run has left: checked, completed where that can be, and deleted where nothing needs it.
//!
//! From below: artifacts that are what their names say; layers' records whose artifacts are all there; statements whose
//! layers are; images. What fails takes everything above it along, but for the image's record: the image counts as one
//! whose build has not ended, and keeps the layers that are right.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use hermes_image::ids::{ArtifactId, Digest, LayerId};
use hermes_image::statement::{LayerStatement, Statement};
use object_store::path::Path;

use super::ledger::{Entry, Ledger, artifacts_of};
use super::record::{self, ImageRecord};
use super::{ARTIFACT_LEN_MAX_BYTES, Artifacts, ArtifactsError, DOCUMENT_LEN_MAX_BYTES, KINDS, UNFINISHED_KEPT};
use crate::event::{Event, ImageKey, UnixMillis};

/// Says that everything beside it is a controller's.
const MARKER: &str = "hermes-controller.json";
/// What the marker holds.
const MARKER_TEXT: &[u8] = b"{\"format\":1}\n";
/// Objects of one kind that are looked at: 100,000 images of ten layers.
const OBJECTS_MAX: usize = 4_000_000;
/// Documents that are read at once, to cover a bucket's latency.
const READS_MAX: usize = 16;
/// Artifacts that are compared with their names at once: each is in memory twice, packed and plain.
const CHECKS_MAX: usize = 2;

/// The names that are there, by their kind, and their lengths in bytes.
type Listing = BTreeMap<&'static str, BTreeMap<String, u64>>;

pub(super) async fn recover(
    artifacts: &Artifacts,
    may_rot: bool,
    now: UnixMillis,
) -> Result<Vec<Event>, ArtifactsError> {
    let mut listing = list(artifacts).await?;
    claim(artifacts, &listing).await?;
    let lengths = artifact_lengths(&listing);
    let layers = read_layers(artifacts, &listing, &lengths).await?;
    let images = read_images(artifacts, &listing, now).await?;
    let needed: BTreeSet<LayerId> =
        images.iter().flat_map(|record| record.layers.iter().map(|layer| layer.layer)).collect();
    let mut layers: BTreeMap<LayerId, LayerStatement> =
        layers.into_iter().filter(|layer| needed.contains(&layer.layer)).map(|layer| (layer.layer, layer)).collect();
    if may_rot {
        let wanted: BTreeSet<ArtifactId> = layers.values().flat_map(artifacts_of).collect();
        let damaged = damaged(artifacts, wanted).await?;
        layers.retain(|_, layer| !artifacts_of(layer).iter().any(|id| damaged.contains(id)));
    }
    fill(&mut artifacts.inner.ledger.lock(), images.iter(), layers.values(), &lengths);
    let events = read_statements(artifacts, images, now).await?;
    delete_leftovers(artifacts, &mut listing).await?;
    Ok(events)
}

async fn list(artifacts: &Artifacts) -> Result<Listing, ArtifactsError> {
    let mut listing = Listing::new();
    for kind in KINDS {
        let names = artifacts.inner.store.list(kind, OBJECTS_MAX).await;
        let names = names.map_err(|source| artifacts.inner.failed("list", &Path::from(kind), source))?;
        if names.len() > OBJECTS_MAX {
            return Err(ArtifactsError::Location {
                location: artifacts.inner.location.clone(),
                reason: format!("there are more than {OBJECTS_MAX} {kind}; choose an empty place"),
            });
        }
        listing.insert(kind, names);
    }
    Ok(listing)
}

/// Makes sure that what is there may be deleted.
async fn claim(artifacts: &Artifacts, listing: &Listing) -> Result<(), ArtifactsError> {
    let marker = Path::from(MARKER);
    if artifacts.inner.get(&marker, DOCUMENT_LEN_MAX_BYTES).await?.is_some() {
        return Ok(());
    }
    if listing.values().any(|names| !names.is_empty()) {
        return Err(ArtifactsError::NotOurs { location: artifacts.inner.location.clone() });
    }
    artifacts.inner.put(&marker, MARKER_TEXT.to_vec()).await
}

fn artifact_lengths(listing: &Listing) -> BTreeMap<ArtifactId, u64> {
    let names = listing.get("artifacts").into_iter().flatten();
    names.filter_map(|(name, len)| Some((format!("blake3:{name}").parse().ok()?, *len))).collect()
}

fn digests<'a>(listing: &'a Listing, kind: &str) -> impl Iterator<Item = Digest> + 'a {
    let names = listing.get(kind).into_iter().flatten();
    names.filter_map(|(name, _)| format!("sha256:{}", name.strip_suffix(".json").unwrap_or(name)).parse().ok())
}

/// Reads documents, and gives each to `open`, which says what is wrong with it.
async fn read_documents<T>(
    artifacts: &Artifacts,
    paths: Vec<(Path, Digest)>,
    open: impl Fn(&[u8], Digest) -> Result<T, String>,
) -> Result<Vec<T>, ArtifactsError> {
    let reads = stream::iter(paths).map(|(path, digest)| async move {
        let read = artifacts.inner.get(&path, DOCUMENT_LEN_MAX_BYTES).await;
        let read = match read {
            Err(ArtifactsError::TooLong { .. }) => Ok(Some(bytes::Bytes::new())),
            other => other,
        };
        read.map(|bytes| (path, digest, bytes))
    });
    let read: Vec<_> = reads.buffered(READS_MAX).try_collect().await?;
    let opened = read.into_iter().filter_map(|(path, digest, bytes)| match open(&bytes?, digest) {
        Ok(opened) => Some(opened),
        Err(reason) => {
            tracing::warn!(object = %path, reason, "a record is damaged and is removed; what it was about is built again");
            None
        }
    });
    Ok(opened.collect())
}

/// The layers whose record is right and whose artifacts are all there.
async fn read_layers(
    artifacts: &Artifacts,
    listing: &Listing,
    lengths: &BTreeMap<ArtifactId, u64>,
) -> Result<Vec<LayerStatement>, ArtifactsError> {
    let paths = digests(listing, "layers").map(|digest| (super::layer_path(digest.into()), digest)).collect();
    let keys = &artifacts.inner.keys;
    let open = |bytes: &[u8], digest: Digest| {
        let layer = record::open_layer(bytes, digest.into(), keys)?;
        match artifacts_of(&layer).into_iter().find(|id| !lengths.contains_key(id)) {
            Some(missing) => Err(format!("its artifact {missing} is missing")),
            None => Ok(layer),
        }
    };
    read_documents(artifacts, paths, open).await
}

/// The images whose record is right, but for builds that nobody goes on with.
async fn read_images(
    artifacts: &Artifacts,
    listing: &Listing,
    now: UnixMillis,
) -> Result<Vec<ImageRecord>, ArtifactsError> {
    let path = |manifest| (super::image_path(&ImageKey { manifest }), manifest);
    let paths = digests(listing, "images").map(path).collect();
    let open = |bytes: &[u8], digest| ImageRecord::open(bytes, digest, &artifacts.inner.keys);
    let mut images = read_documents(artifacts, paths, open).await?;
    let signed: BTreeSet<Digest> = digests(listing, "statements").collect();
    let kept_ms = UNFINISHED_KEPT.as_millis() as u64;
    images.retain(|record| signed.contains(&record.image.manifest) || record.begun.0.saturating_add(kept_ms) > now.0);
    Ok(images)
}

/// Those of `wanted` that are not what their names say.
async fn damaged(artifacts: &Artifacts, wanted: BTreeSet<ArtifactId>) -> Result<BTreeSet<ArtifactId>, ArtifactsError> {
    let checks = stream::iter(wanted).map(|id| async move {
        let path = super::artifact_path(id);
        let packed = match artifacts.inner.get(&path, ARTIFACT_LEN_MAX_BYTES as u64).await {
            Ok(packed) => packed.unwrap_or_default(),
            Err(ArtifactsError::TooLong { .. }) => bytes::Bytes::new(),
            Err(error) => return Err(error),
        };
        let checking = tokio::task::spawn_blocking(move || super::unpack(id, &packed).err()).await;
        Ok((id, checking.map_err(ArtifactsError::Task)?))
    });
    let checked: Vec<(ArtifactId, Option<String>)> = checks.buffer_unordered(CHECKS_MAX).try_collect().await?;
    let damaged = checked.into_iter().filter_map(|(id, reason)| {
        let reason = reason?;
        tracing::error!(artifact = %id, reason, "an artifact is damaged and is removed; its images are built again");
        Some(id)
    });
    Ok(damaged.collect())
}

fn fill<'a>(
    ledger: &mut Ledger,
    images: impl Iterator<Item = &'a ImageRecord>,
    layers: impl Iterator<Item = &'a LayerStatement>,
    lengths: &BTreeMap<ArtifactId, u64>,
) {
    for layer in layers {
        for id in artifacts_of(layer) {
            ledger.stored(id, lengths.get(&id).copied().unwrap_or(0));
        }
        ledger.add_layer(layer.clone());
    }
    for record in images {
        ledger.images.insert(record.image.clone(), Entry { record: record.clone(), index: None });
    }
}

/// Opens the statement of each image, and puts it to use if everything that it names is there.
async fn read_statements(
    artifacts: &Artifacts,
    images: Vec<ImageRecord>,
    now: UnixMillis,
) -> Result<Vec<Event>, ArtifactsError> {
    let mut events = Vec::new();
    for record in images {
        let image = record.image.clone();
        let path = super::statement_path(&image);
        let signed = match artifacts.inner.get(&path, DOCUMENT_LEN_MAX_BYTES).await {
            Ok(Some(signed)) => signed,
            Ok(None) => continue,
            Err(ArtifactsError::TooLong { .. }) => bytes::Bytes::new(),
            Err(error) => return Err(error),
        };
        if let Err(reason) = check_statement(artifacts, &record, &signed) {
            tracing::warn!(image = %image.manifest, reason, "an index is incomplete and is removed; it is built again");
            artifacts.inner.delete(&path).await?;
            // The time for going on with it begins now.
            if let Some(entry) = artifacts.inner.ledger.lock().images.get_mut(&image) {
                entry.record.begun = now;
            }
            continue;
        }
        let Some(index) = artifacts.inner.set_index(&image, Arc::from(signed.as_ref())) else { continue };
        let profile = match artifacts.profile(&image).await {
            Ok(profile) => profile,
            Err(ArtifactsError::TooLong { .. }) => None,
            Err(error) => return Err(error),
        };
        let ImageRecord { name, layers, access, .. } = record;
        events.push(Event::Kept { image, name, index, layers, access, profile });
    }
    Ok(events)
}

fn check_statement(artifacts: &Artifacts, record: &ImageRecord, signed: &[u8]) -> Result<(), String> {
    let trusted = artifacts.inner.keys.public_keys();
    let statement = Statement::open(signed, record.image.manifest, &trusted).map_err(|error| error.to_string())?;
    let same = statement.layers.len() == record.layers.len()
        && statement.layers.iter().zip(record.layers.iter()).all(|(layer, recorded)| layer.layer == recorded.layer);
    if !same {
        return Err("it has other layers than the image's record".to_owned());
    }
    let ledger = artifacts.inner.ledger.lock();
    match statement.layers.iter().find(|layer| ledger.layer(layer.layer) != Some(layer)) {
        Some(layer) => Err(format!("layer {} is not kept as it says", layer.layer)),
        None => Ok(()),
    }
}

/// Deletes what is there and nothing needs. Names that are none of ours stay.
async fn delete_leftovers(artifacts: &Artifacts, listing: &mut Listing) -> Result<(), ArtifactsError> {
    let mut leftovers = Vec::new();
    {
        let ledger = artifacts.inner.ledger.lock();
        let entry = |digest: &Digest| ledger.images.get(&ImageKey { manifest: *digest });
        for digest in digests(listing, "statements").filter(|digest| entry(digest).is_none()) {
            leftovers.push(super::statement_path(&ImageKey { manifest: digest }));
        }
        for digest in digests(listing, "profiles").filter(|digest| entry(digest).is_none()) {
            leftovers.push(super::profile_path(&ImageKey { manifest: digest }));
        }
        for digest in digests(listing, "references").filter(|digest| entry(digest).is_none()) {
            leftovers.push(super::reference_path(&ImageKey { manifest: digest }));
        }
        for digest in digests(listing, "images").filter(|digest| entry(digest).is_none()) {
            leftovers.push(super::image_path(&ImageKey { manifest: digest }));
        }
        for digest in digests(listing, "layers").filter(|digest| ledger.layer((*digest).into()).is_none()) {
            leftovers.push(super::layer_path(digest.into()));
        }
        for id in artifact_lengths(listing).into_keys().filter(|id| ledger.len_bytes(*id).is_none()) {
            leftovers.push(super::artifact_path(id));
        }
    }
    if !leftovers.is_empty() {
        tracing::info!(objects = leftovers.len(), "what an earlier run left and nothing needs is deleted");
    }
    for path in leftovers {
        artifacts.inner.delete(&path).await?;
    }
    listing.clear();
    Ok(())
}
