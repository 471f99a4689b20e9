//! What the controller keeps: signed statements, the artifacts that they name, and what it needs to go on after a restart.
//!
//! ```text
//! statements/<manifest digest, hex>.json   the signed statement; while it is missing, the image is being built
//! references/<manifest digest, hex>        where the image was indexed from
//! profiles/<manifest digest, hex>          what its starts read
//! artifacts/<BLAKE3, hex>                  an artifact in its wire form
//! images/<manifest digest, hex>.json       name, platform, layers and access of an image; signed
//! layers/<blob digest, hex>.json           which artifacts a layer has; signed
//! hermes-controller.json                   says that all of this is a controller's to delete
//! ```
//!
//! The first four are the folder of indexes that nodes read ([`format.md`](../../../docs/format.md)), so a folder on a disk is
//! also that of a node. The store is a folder, a bucket or a repository of a registry (`repository`); each object is written
//! whole or not at all, by a rename after `fsync` or by one upload.
//!
//! Invariants, whatever is cut short: a statement is written after everything that it names, and deleted before it; a
//! layer's record is written after its artifacts and deleted before them; an image's record comes first and goes last. So
//! what a crash leaves is either complete, or the record of a build that goes on with the layers that it has, or something
//! that nothing names, which the next start deletes ([`Artifacts::open`]).
//!
//! Nothing that is read is believed: statements and records are opened with the controller's keys, artifacts compared with
//! their names, at the start and now and then (`check`). What is found damaged is deleted with everything that names it, and
//! its image, which [`Artifacts::lost`] names, is built again.
//!
//! One image is changed by one task at a time; layers may be written by many.

mod check;
mod error;
mod ledger;
mod location;
mod record;
mod recovery;
mod repository;
#[cfg(test)]
mod s3;
mod store;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, LayerId};
use hermes_image::index::wire;
use hermes_image::statement::{LayerStatement, Statement, signers};
use hermes_image::verify::Verified;
use hermes_origin::OriginClient;
use hermes_origin::indexing::Artifact;
use hermes_policy::profile::PROFILE_LEN_MAX_BYTES;
use object_store::path::Path;
use parking_lot::Mutex;
use tokio::sync::Notify;

pub use error::ArtifactsError;
pub use record::ImageRecord;

use self::check::Checks;
use self::ledger::{Entry, Ledger, Object};
use self::location::Place;
use self::repository::RepositoryStore;
use self::store::{Found, Store, StoreError};
use crate::event::{Event, ImageKey, ReadyIndex, UnixMillis};
use crate::signing::Keys;

/// Longest artifact that is read, in bytes of its plain form, as nodes have it: the table of contents of two million files.
pub const ARTIFACT_LEN_MAX_BYTES: usize = 1 << 30;
/// Longest document of the others that is read, in bytes: a signed statement at its longest.
const DOCUMENT_LEN_MAX_BYTES: u64 = hermes_image::statement::SIGNED_LEN_MAX_BYTES as u64;
/// How long a build that nobody goes on with keeps its layers: a working day, and the night after it.
pub const UNFINISHED_KEPT: Duration = Duration::from_secs(24 * 3600);
/// The folders.
const KINDS: [&str; 6] = ["statements", "references", "profiles", "artifacts", "images", "layers"];

/// How much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ArtifactSettings {
    /// Bytes of artifacts at most; no limit when `None`.
    pub quota_bytes: Option<u64>,
}

/// How much is kept, for people and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes of all artifacts.
    pub used_bytes: u64,
    /// Images with an index.
    pub images: u64,
    /// Builds that have not ended.
    pub unfinished: u64,
}

/// Everything that is kept. Cheap to clone; clones share it.
#[derive(Debug, Clone)]
pub struct Artifacts {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    store: Store,
    location: String,
    settings: ArtifactSettings,
    keys: Keys,
    ledger: Mutex<Ledger>,
    /// Something that was being deleted is gone.
    gone: Notify,
    /// What is compared with its name next, and what was found.
    checks: Checks,
}

/// Holds the artifacts of a layer while they are written.
#[derive(Debug)]
struct Pin<'a> {
    inner: &'a Inner,
    layer: &'a LayerStatement,
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.inner.ledger.lock().unpin(self.layer);
    }
}

fn statement_path(image: &ImageKey) -> Path {
    Path::from(format!("statements/{}.json", image.manifest.hex()))
}

fn reference_path(image: &ImageKey) -> Path {
    Path::from(format!("references/{}", image.manifest.hex()))
}

fn profile_path(image: &ImageKey) -> Path {
    Path::from(format!("profiles/{}", image.manifest.hex()))
}

fn image_path(image: &ImageKey) -> Path {
    Path::from(format!("images/{}.json", image.manifest.hex()))
}

fn layer_path(layer: LayerId) -> Path {
    Path::from(format!("layers/{}.json", layer.hex()))
}

fn artifact_path(id: ArtifactId) -> Path {
    Path::from(format!("artifacts/{}", id.hex()))
}

impl Artifacts {
    /// Opens what is kept at `location` (a folder, or the address of a bucket), checks it, and deletes what is damaged or
    /// needed by nothing. Returns it with an [`Event::Kept`] for every image that has an index.
    ///
    /// One process at a time: whoever leads.
    ///
    /// # Errors
    /// When the place cannot be read or written, or holds what no controller has made.
    pub async fn open(
        location: &str,
        settings: ArtifactSettings,
        keys: Keys,
        now: UnixMillis,
    ) -> Result<(Self, Vec<Event>), ArtifactsError> {
        Self::open_in(location, std::env::vars_os(), settings, keys, now).await
    }

    async fn open_in(
        location: &str,
        environment: impl Iterator<Item = (OsString, OsString)>,
        settings: ArtifactSettings,
        keys: Keys,
        now: UnixMillis,
    ) -> Result<(Self, Vec<Event>), ArtifactsError> {
        Self::open_place(location::open(location, environment)?, settings, keys, now).await
    }

    /// Opens what is kept at `location`: where [`Artifacts::open`] does, or in a repository, `oci://HOST[:PORT]/NAME`, that
    /// `client` may push to.
    ///
    /// # Errors
    /// As [`Artifacts::open`].
    pub async fn open_with(
        client: &OriginClient,
        location: &str,
        settings: ArtifactSettings,
        keys: Keys,
        now: UnixMillis,
    ) -> Result<(Self, Vec<Event>), ArtifactsError> {
        if !location.starts_with(repository::SCHEME) {
            return Self::open(location, settings, keys, now).await;
        }
        let store = Store::Repository(Box::new(RepositoryStore::open(client, location).await?));
        // What is read whole is compared with its digest on the way.
        let place = Place { store, name: location.to_owned(), may_rot: false };
        Self::open_place(place, settings, keys, now).await
    }

    async fn open_place(
        place: Place,
        settings: ArtifactSettings,
        keys: Keys,
        now: UnixMillis,
    ) -> Result<(Self, Vec<Event>), ArtifactsError> {
        let inner = Inner {
            store: place.store,
            location: place.name,
            settings,
            keys,
            ledger: Mutex::default(),
            gone: Notify::new(),
            checks: Checks::new(place.may_rot),
        };
        let may_rot = place.may_rot;
        let artifacts = Self { inner: Arc::new(inner) };
        let kept = recovery::recover(&artifacts, may_rot, now).await?;
        Ok((artifacts, kept))
    }

    /// How much is kept.
    pub fn usage(&self) -> Usage {
        let ledger = self.inner.ledger.lock();
        let images = ledger.images.values().filter(|entry| entry.index.is_some()).count();
        Usage {
            used_bytes: ledger.used_bytes(),
            images: images as u64,
            unfinished: (ledger.images.len() - images) as u64,
        }
    }

    /// Whether a build may begin.
    ///
    /// # Errors
    /// When the quota is used up.
    pub fn check_room(&self) -> Result<(), ArtifactsError> {
        self.inner.room_for(0)
    }

    /// The images that have an index.
    pub fn list(&self) -> Vec<(ImageRecord, ReadyIndex)> {
        let ledger = self.inner.ledger.lock();
        let ready = |entry: &Entry| Some((entry.record.clone(), entry.index.clone()?));
        ledger.images.values().filter_map(ready).collect()
    }

    /// The index of an image, if it is kept.
    pub fn index(&self, image: &ImageKey) -> Option<ReadyIndex> {
        self.inner.ledger.lock().images.get(image)?.index.clone()
    }

    /// What is known of a layer that was indexed, for whichever image.
    pub fn layer(&self, layer: LayerId) -> Option<LayerStatement> {
        self.inner.ledger.lock().layer(layer).cloned()
    }

    /// Length of the packed form of an artifact, in bytes.
    pub fn packed_len_bytes(&self, id: ArtifactId) -> Option<u64> {
        self.inner.ledger.lock().len_bytes(id)
    }

    /// The artifact `id`. Cancel safe.
    ///
    /// # Errors
    /// When the store fails, or has something else under this name, which is then removed.
    pub async fn read(&self, id: ArtifactId) -> Result<Option<Verified<Bytes>>, ArtifactsError> {
        if self.packed_len_bytes(id).is_none() {
            return Ok(None);
        }
        let path = artifact_path(id);
        let Some(packed) = self.inner.get(&path, ARTIFACT_LEN_MAX_BYTES as u64).await? else {
            self.remove_damaged(id, "it is missing").await;
            return Ok(None);
        };
        let unpacking = tokio::task::spawn_blocking(move || unpack(id, &packed)).await;
        match unpacking.map_err(ArtifactsError::Task)? {
            Ok(plain) => Ok(Some(plain)),
            Err(reason) => {
                self.remove_damaged(id, &reason).await;
                Err(ArtifactsError::Damaged { object: path.to_string(), reason })
            }
        }
    }

    /// The bytes `range` of the packed form of an artifact, unchecked: whoever puts them together compares the whole with
    /// its name. Fewer when it ends before. Cancel safe.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn read_packed_range(
        &self,
        id: ArtifactId,
        range: std::ops::Range<u64>,
    ) -> Result<Option<Bytes>, ArtifactsError> {
        let Some(len_bytes) = self.packed_len_bytes(id) else { return Ok(None) };
        let range = range.start.min(len_bytes)..range.end.min(len_bytes);
        if range.is_empty() {
            return Ok(Some(Bytes::new()));
        }
        let path = artifact_path(id);
        if range.start == 0 {
            self.inner.checks.is_read(id);
        }
        let found = self.inner.store.get_range(&path, range).await;
        let found = found.map_err(|source| self.inner.failed("read", &path, source))?;
        if found.is_none() {
            self.remove_damaged(id, "it is missing").await;
        }
        Ok(found)
    }

    /// Writes down that an image is being built, so that its layers are kept from now on. An index that it has goes.
    ///
    /// # Errors
    /// When the store fails, or there is no room for anything new.
    pub async fn begin(&self, record: ImageRecord) -> Result<(), ArtifactsError> {
        self.check_room()?;
        self.inner.delete(&statement_path(&record.image)).await?;
        self.inner.put(&image_path(&record.image), record.sign(&self.inner.keys)).await?;
        let entry = Entry { record, index: None };
        self.inner.ledger.lock().images.insert(entry.record.image.clone(), entry);
        Ok(())
    }

    /// Keeps what was made of a layer. Cancel safe: what is not complete is not kept.
    ///
    /// # Errors
    /// When the store fails, or there is no room.
    pub async fn put_layer(&self, layer: &LayerStatement, artifacts: [Artifact; 4]) -> Result<(), ArtifactsError> {
        let _pin = self.inner.pin(layer).await;
        for artifact in artifacts {
            self.put_artifact(artifact.bytes).await?;
        }
        self.inner.put(&layer_path(layer.layer), record::sign_layer(layer, &self.inner.keys)).await?;
        self.inner.ledger.lock().add_layer(layer.clone());
        Ok(())
    }

    /// Writes one artifact in its packed form, unless it is there. Held by whoever writes its layer.
    async fn put_artifact(&self, plain: Verified<Bytes>) -> Result<(), ArtifactsError> {
        let packing = tokio::task::spawn_blocking(move || (ArtifactId::of(&plain), wire::pack(&plain))).await;
        let (id, packed) = packing.map_err(ArtifactsError::Task)?;
        if self.packed_len_bytes(id).is_some() {
            return Ok(());
        }
        let len_bytes = packed.len() as u64;
        self.inner.room_for(len_bytes)?;
        self.inner.put(&artifact_path(id), packed).await?;
        self.inner.ledger.lock().stored(id, len_bytes);
        Ok(())
    }

    /// Signs and keeps the index of an image whose layers are all kept, which ends its build.
    ///
    /// # Errors
    /// When the store fails, no build has begun, or a layer is not kept as the statement says.
    pub async fn finish(&self, statement: &Statement) -> Result<ReadyIndex, ArtifactsError> {
        let image = ImageKey { manifest: statement.manifest };
        let name = {
            let ledger = self.inner.ledger.lock();
            let other = statement.layers.iter().find(|layer| ledger.layer(layer.layer) != Some(layer));
            if let Some(layer) = other {
                return Err(ArtifactsError::LayerMissing(layer.layer));
            }
            let entry = ledger.images.get(&image).ok_or(ArtifactsError::NotBegun(image.manifest))?;
            entry.record.name.clone()
        };
        self.inner.put(&reference_path(&image), name.reference.into_bytes()).await?;
        self.sign_and_keep(&image, statement).await
    }

    async fn sign_and_keep(&self, image: &ImageKey, statement: &Statement) -> Result<ReadyIndex, ArtifactsError> {
        let signed = self.inner.keys.sign(statement);
        self.inner.put(&statement_path(image), signed.clone()).await?;
        self.inner.set_index(image, signed.into()).ok_or(ArtifactsError::NotBegun(image.manifest))
    }

    /// Gives up an image, or its build; what no other image needs is deleted. To be driven to its end: what is left
    /// undone stays until the next start.
    ///
    /// # Errors
    /// When the store fails; the rest goes at the next start.
    pub async fn release(&self, image: &ImageKey) -> Result<(), ArtifactsError> {
        if !self.inner.ledger.lock().images.contains_key(image) {
            return Ok(());
        }
        for path in [statement_path(image), profile_path(image), reference_path(image), image_path(image)] {
            self.inner.delete(&path).await?;
        }
        self.inner.ledger.lock().images.remove(image);
        self.collect().await
    }

    /// Builds that began more than [`UNFINISHED_KEPT`] before `now` and have not ended.
    pub fn unfinished(&self, now: UnixMillis) -> Vec<ImageKey> {
        let kept_ms = UNFINISHED_KEPT.as_millis() as u64;
        self.inner.ledger.lock().unfinished_since(UnixMillis(now.0.saturating_sub(kept_ms)))
    }

    /// The layers that builds need which have begun and not ended, and that are not indexed yet.
    pub fn missing_layers(&self) -> BTreeSet<LayerId> {
        self.inner.ledger.lock().missing_layers()
    }

    /// Deletes what nothing needs.
    async fn collect(&self) -> Result<(), ArtifactsError> {
        let objects = self.inner.ledger.lock().collect();
        let mut result = Ok(());
        for object in &objects {
            let path = match object {
                Object::Layer(layer) => layer_path(*layer),
                Object::Artifact(id) => artifact_path(*id),
            };
            result = result.and(self.inner.delete(&path).await);
        }
        self.inner.ledger.lock().gone(&objects);
        self.inner.gone.notify_waiters();
        result
    }

    /// Keeps what starts of an image read, in the wire form of profiles. Nothing happens when the image is not kept.
    ///
    /// # Errors
    /// When the store fails, or it is longer than a profile.
    pub async fn put_profile(&self, image: &ImageKey, profile: &[u8]) -> Result<(), ArtifactsError> {
        let path = profile_path(image);
        if profile.len() > PROFILE_LEN_MAX_BYTES {
            let limit_bytes = PROFILE_LEN_MAX_BYTES as u64;
            return Err(ArtifactsError::TooLong { object: path.to_string(), limit_bytes });
        }
        if self.inner.ledger.lock().images.contains_key(image) {
            self.inner.put(&path, profile.to_vec()).await?;
        }
        Ok(())
    }

    /// What starts of an image read.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn profile(&self, image: &ImageKey) -> Result<Option<Arc<[u8]>>, ArtifactsError> {
        let bytes = self.inner.get(&profile_path(image), PROFILE_LEN_MAX_BYTES as u64).await?;
        Ok(bytes.map(|bytes| Arc::from(bytes.as_ref())))
    }

    /// Images that are not signed by exactly the keys in use: keys were exchanged. Builds that have not ended are not among
    /// them, for they are signed by the keys of their time.
    pub fn outdated(&self) -> Vec<ImageKey> {
        let ledger = self.inner.ledger.lock();
        let outdated = |entry: &&Entry| {
            let index = entry.index.as_ref();
            index.is_some_and(|index| !self.inner.keys.would_sign_as(&signers(&index.statement)))
        };
        ledger.images.values().filter(outdated).map(|entry| entry.record.image.clone()).collect()
    }

    /// Signs an index again, with its records, and returns it; `None` when it is not kept. To be called for all that are
    /// [outdated](Self::outdated) before the key retires that has signed them.
    ///
    /// # Errors
    /// When the store fails; what it was signed by until then stays.
    pub async fn sign_again(&self, image: &ImageKey) -> Result<Option<ReadyIndex>, ArtifactsError> {
        let (record, index, layers) = {
            let ledger = self.inner.ledger.lock();
            let Some(Entry { record, index: Some(index) }) = ledger.images.get(image) else { return Ok(None) };
            let layers = record.layers.iter().filter_map(|layer| ledger.layer(layer.layer).cloned());
            (record.clone(), index.clone(), layers.collect::<Vec<_>>())
        };
        // It was opened with the controller's keys when it was kept.
        let opened = Statement::open(&index.statement, image.manifest, &signers(&index.statement));
        let Ok(statement) = opened else { return Ok(None) };
        for layer in layers {
            let _pin = self.inner.pin(&layer).await;
            self.inner.put(&layer_path(layer.layer), record::sign_layer(&layer, &self.inner.keys)).await?;
        }
        self.inner.put(&image_path(image), record.sign(&self.inner.keys)).await?;
        self.sign_and_keep(image, &statement).await.map(Some)
    }
}

/// The artifact `id` of its packed form; why it is not otherwise.
fn unpack(id: ArtifactId, packed: &[u8]) -> Result<Verified<Bytes>, String> {
    let plain = wire::unpack(packed, ARTIFACT_LEN_MAX_BYTES).map_err(|error| error.to_string())?;
    Verified::artifact(id, plain).map_err(|error| error.to_string())
}

impl Inner {
    fn failed(&self, action: &'static str, path: &Path, source: StoreError) -> ArtifactsError {
        let location = self.location.clone();
        ArtifactsError::Store { action, object: path.to_string(), location, source }
    }

    fn room_for(&self, len_bytes: u64) -> Result<(), ArtifactsError> {
        let used_bytes = self.ledger.lock().used_bytes();
        match self.settings.quota_bytes {
            Some(quota_bytes) if used_bytes.saturating_add(len_bytes.max(1)) > quota_bytes => {
                Err(ArtifactsError::Quota { quota_bytes, used_bytes })
            }
            _ => Ok(()),
        }
    }

    /// Holds the artifacts of `layer`, after whatever of it is just being deleted is gone.
    async fn pin<'a>(&'a self, layer: &'a LayerStatement) -> Pin<'a> {
        loop {
            let gone = self.gone.notified();
            if self.ledger.lock().pin(layer) {
                return Pin { inner: self, layer };
            }
            gone.await;
        }
    }

    /// Notes the signed statement of an image, and what it needs.
    fn set_index(&self, image: &ImageKey, statement: Arc<[u8]>) -> Option<ReadyIndex> {
        let mut ledger = self.ledger.lock();
        let record = ledger.images.get(image)?.record.clone();
        let (artifacts, index_len_bytes) = ledger.artifacts_of_image(&record);
        let index =
            ReadyIndex { statement, artifacts: artifacts.into(), index_len_bytes, image_len_bytes: record.len_bytes() };
        ledger.images.get_mut(image)?.index = Some(index.clone());
        Some(index)
    }

    async fn get(&self, path: &Path, limit_bytes: u64) -> Result<Option<Bytes>, ArtifactsError> {
        match self.store.get(path, limit_bytes).await {
            Ok(Found::Object(bytes)) => Ok(Some(bytes)),
            Ok(Found::Nothing) => Ok(None),
            Ok(Found::TooLong) => Err(ArtifactsError::TooLong { object: path.to_string(), limit_bytes }),
            Err(source) => Err(self.failed("read", path, source)),
        }
    }

    async fn put(&self, path: &Path, bytes: Vec<u8>) -> Result<(), ArtifactsError> {
        let put = self.store.put(path, bytes.into()).await;
        put.map_err(|source| self.failed("write", path, source))
    }

    async fn delete(&self, path: &Path) -> Result<(), ArtifactsError> {
        self.store.delete(path).await.map_err(|source| self.failed("delete", path, source))
    }
}
