//! The store: opening, registering layers, asking what is there, closing.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, DiffId};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::runs::Runs;
use hermes_image::verify::Verified;
use parking_lot::{Mutex, RwLock};

use crate::artifacts::{TEMPORARY_PREFIX, sync_dir};
use crate::bitmap::AtomicBitmap;
use crate::catalogue::{Catalogue, LayerRecord, PresencePage};
use crate::config::StoreConfig;
use crate::counters::Counters;
use crate::error::StoreError;
use crate::layer::{Layer, LayerParts, LayerUse, punch_hole};
use crate::lock::DirLock;
use crate::recovery::{RecoveryReport, make_layer_file, new_uses, recover};
use crate::reuse::shares_blocks;
use crate::shared::{Clock, Layers, Shared};
use crate::space::Space;
use crate::sync::{Stop, SyncQueue, start};

/// What the store uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of the chunks that are present.
    pub present_bytes: u64,
    /// Bytes that the filesystem has allocated for layer files.
    pub allocated_bytes: u64,
    /// Bytes of the artifacts.
    pub artifact_bytes: u64,
    /// Bytes of the catalogue's files.
    pub catalogue_bytes: u64,
    /// What counts against the budget: layers and artifacts.
    pub used_bytes: u64,
    /// The budget, if there is one.
    pub budget_bytes: Option<u64>,
    /// Bytes that the filesystem has free.
    pub free_bytes: u64,
    /// Registered layers.
    pub layers: u64,
    /// Layers with every chunk present.
    pub complete_layers: u64,
    /// Images.
    pub images: u64,
}

/// A layer of which all is there but its record.
pub(crate) struct PreparedLayer {
    parts: LayerParts,
    pages: Vec<PresencePage>,
}

/// An open store. One process and one `Store` a folder; shared through [`Arc`], all methods from any thread. None of
/// them is async: [`Layer::read_at`] may be called from FUSE threads, the rest wait for disks and belong on blocking
/// threads.
///
/// Dropped, it syncs what was put and closes the catalogue. Layers that are still held then can be read, not written,
/// and keep the folder locked.
#[derive(Debug)]
pub struct Store {
    pub(crate) shared: Arc<Shared>,
    report: RecoveryReport,
    sync_thread: Option<JoinHandle<()>>,
}

impl Store {
    /// Opens the store in `config.dir`, or makes one, and recovers what the last process left
    /// ([`Store::recovery`] says what that was).
    ///
    /// # Errors
    /// When a setting is out of range, another process has the store, its format is another one, its filesystem cannot
    /// do what the settings need, or the disk fails.
    pub fn open(config: StoreConfig) -> Result<Arc<Self>, StoreError> {
        config.validate()?;
        let dir = config.dir.clone();
        for dir in [&dir, &dir.join("layers"), &dir.join("artifacts")] {
            make_dir(dir)?;
        }
        let lock = DirLock::take(&dir)?;
        let shares_blocks = probe(&dir, config.budget_bytes.is_some())?;
        let (catalogue, found) = Catalogue::open(&dir)?;
        let shared = Arc::new(Shared {
            queue: SyncQueue::new(config.sync_bytes),
            config,
            catalogue,
            layers: RwLock::new(Layers::default()),
            registering: Mutex::new(()),
            snapshots: Mutex::new(()),
            space: Space::default(),
            checked_artifacts: Mutex::default(),
            last_copy: RwLock::new(None),
            clock: Clock::default(),
            counters: Counters::default(),
            artifact_bytes: AtomicU64::new(0),
            temporary_names: AtomicU64::new(0),
            shares_blocks,
            closed: AtomicBool::new(false),
            _lock: lock,
        });
        shared.clock.tick();
        let opened = recover(&shared, found).and_then(|report| Ok((report, start(Arc::clone(&shared))?)));
        let (report, sync_thread) = opened.inspect_err(|_| {
            // Layers and what they share point at each other.
            *shared.layers.write() = Layers::default();
        })?;
        Ok(Arc::new(Self { shared, report, sync_thread: Some(sync_thread) }))
    }

    /// What opening the store found and did.
    pub fn recovery(&self) -> &RecoveryReport {
        &self.report
    }

    /// The settings.
    pub fn config(&self) -> &StoreConfig {
        &self.shared.config
    }

    /// What the store has done since it was opened.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Keeps an artifact, durably. Nothing is written when it is there.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn put_artifact(&self, bytes: &Verified<Bytes>) -> Result<ArtifactId, StoreError> {
        self.shared.put_artifact(bytes)
    }

    /// An artifact's bytes, checked against its name; large ones are memory-mapped. `None` when it is not here.
    ///
    /// # Errors
    /// When the file cannot be read; [`StoreError::DamagedArtifact`] when it was not what its name says and was
    /// removed.
    pub fn artifact(&self, id: ArtifactId) -> Result<Option<Bytes>, StoreError> {
        self.shared.artifact(id)
    }

    /// The same for whoever asks for parts of it again and again, such as peers for windows: a large file is checked
    /// every ten minutes, and when it was replaced, not each time.
    ///
    /// # Errors
    /// As [`Store::artifact`].
    pub fn artifact_checked_lately(&self, id: ArtifactId) -> Result<Option<Bytes>, StoreError> {
        self.shared.artifact_checked_lately(id)
    }

    /// Where an artifact's file is, or would be: for the kernel, which mounts trees by path.
    pub fn artifact_path(&self, id: ArtifactId) -> PathBuf {
        self.shared.artifact_path(id)
    }

    /// The layer that `table` describes; registers it when it is new. See [`Self::layers_of`].
    ///
    /// # Errors
    /// As [`Self::layers_of`].
    pub fn layer(&self, table: &ChunkTable) -> Result<Arc<Layer>, StoreError> {
        Ok(self.layers_of(std::slice::from_ref(table))?.remove(0))
    }

    /// The layers that `tables` describe, in their order. Those that are new are registered, all of them with one write
    /// to the catalogue, because an image may have a hundred and a disk takes milliseconds for each.
    ///
    /// A layer that is registered with another table (an index built again with other chunks) is removed first: its
    /// presence is by chunk, and none of these are known.
    ///
    /// # Errors
    /// [`StoreError::LayerInUse`] when one is registered with another table and held, or is among `tables` with two;
    /// when the disk is full or fails. Then none of the new ones is registered.
    pub fn layers_of(&self, tables: &[ChunkTable]) -> Result<Vec<Arc<Layer>>, StoreError> {
        let known: Option<Vec<_>> = tables.iter().map(|table| self.registered(table)).collect();
        if let Some(layers) = known {
            return Ok(layers);
        }
        let _one = self.shared.registering.lock();
        let mut new: Vec<&ChunkTable> = Vec::new();
        for table in tables {
            match new.iter().find(|other| other.diff_id() == table.diff_id()) {
                Some(other) if other.id() != table.id() => {
                    return Err(StoreError::LayerInUse { diff_id: table.diff_id() });
                }
                Some(_) => {}
                None if self.registered(table).is_none() => new.push(table),
                None => {}
            }
        }
        let prepare = |table: &&ChunkTable| {
            self.make_way_for(table)?;
            self.prepare(table, &Runs::new(), |path| make_layer_file(path, table.logical_len_bytes()))
        };
        let new = new.iter().map(prepare).collect::<Result<Vec<_>, StoreError>>()?;
        self.register(new)?;
        let layers = tables.iter().map(|table| {
            // Not there: another table of the same layer has just taken its place.
            self.registered(table).ok_or_else(|| StoreError::LayerInUse { diff_id: table.diff_id() })
        });
        layers.collect()
    }

    /// Removes the layer that is registered with another table than `table`, while the caller holds `registering`.
    pub(crate) fn make_way_for(&self, table: &ChunkTable) -> Result<(), StoreError> {
        let Some(other) = self.open_layer(table.diff_id()) else { return Ok(()) };
        tracing::info!(diff_id = %table.diff_id(), "layer has a new chunk table; its chunks are fetched again");
        self.remove_registered(&other)
    }

    /// Makes all of the layer that `table` describes but its record; `make` puts a file in its place that holds
    /// `present`, durably. The caller holds `registering`, and no such layer is registered.
    pub(crate) fn prepare(
        &self,
        table: &ChunkTable,
        present: &Runs,
        make: impl FnOnce(&Path) -> Result<File, StoreError>,
    ) -> Result<PreparedLayer, StoreError> {
        let shared = &self.shared;
        // The mapped file takes the place of the caller's memory.
        let (id, bytes) = Verified::named(table.bytes().clone());
        shared.put_artifact(&bytes)?;
        let kept = shared.artifact(id)?.and_then(|bytes| ChunkTable::decode(bytes).ok());
        let table = kept.unwrap_or_else(|| table.clone());
        // A removal that failed half-way has left its record. It must be gone before its file is replaced.
        if let Some(number) = shared.catalogue.layer_number(table.diff_id())? {
            shared.catalogue.unregister(table.diff_id(), number)?;
        }
        let path = shared.layer_path(table.diff_id());
        let record = LayerRecord {
            number: shared.catalogue.take_layer_number()?,
            chunk_table: id,
            chunk_count: table.count(),
            logical_len_bytes: table.logical_len_bytes(),
        };
        let durable = AtomicBitmap::new(table.count());
        for chunk in present.chunks() {
            durable.set(chunk);
        }
        let pages = AtomicBitmap::pages_of(present).into_iter().map(|page| (page, durable.page(page))).collect();
        let file = make(&path)?;
        let last_uses = new_uses(table.count(), shared.clock.seconds());
        Ok(PreparedLayer { parts: LayerParts { table, record, file, path, durable, last_uses }, pages })
    }

    /// Registers layers whose files are in their places, while the caller holds `registering`, and holds them. A crash
    /// leaves files without a record and places without a layer; the next open removes both.
    pub(crate) fn register(&self, layers: Vec<PreparedLayer>) -> Result<Vec<LayerUse>, StoreError> {
        let shared = &self.shared;
        sync_dir(&shared.layers_dir())?;
        let places = layers.iter().map(|layer| (layer.parts.record.number, &layer.parts.table));
        shared.catalogue.write_places(places)?;
        let records = layers.iter().map(|PreparedLayer { parts, pages }| {
            let diff_id = parts.table.diff_id();
            (diff_id, &parts.record, pages.as_slice())
        });
        shared.catalogue.register(records)?;
        let layers = layers.into_iter().map(|layer| {
            let layer = Layer::new(layer.parts, Arc::clone(shared))?;
            // Before anybody can evict from it.
            let held = layer.hold();
            shared.layers.write().insert(&layer);
            Ok(held)
        });
        layers.collect()
    }

    /// The layer that is registered with `table`.
    pub(crate) fn registered(&self, table: &ChunkTable) -> Option<Arc<Layer>> {
        self.open_layer(table.diff_id()).filter(|layer| layer.table().id() == table.id())
    }

    /// A registered layer.
    pub fn open_layer(&self, diff_id: DiffId) -> Option<Arc<Layer>> {
        self.shared.layers.read().by_id.get(&diff_id).cloned()
    }

    /// All registered layers, by diffID.
    pub fn layers(&self) -> Vec<Arc<Layer>> {
        self.shared.all_layers()
    }

    /// Removes a layer with all its chunks; whether there was one. Its chunk table stays, as an artifact.
    ///
    /// # Errors
    /// [`StoreError::LayerInUse`] when somebody holds it; when the disk fails.
    pub fn remove_layer(&self, diff_id: DiffId) -> Result<bool, StoreError> {
        let _one = self.shared.registering.lock();
        let Some(layer) = self.open_layer(diff_id) else { return Ok(false) };
        self.remove_registered(&layer)?;
        Ok(true)
    }

    /// Removes a layer, while the caller holds `registering`. A crash leaves a file without a record, or places
    /// without a layer; the next open removes both.
    fn remove_registered(&self, layer: &Arc<Layer>) -> Result<(), StoreError> {
        layer.retire()?;
        self.shared.layers.write().remove(layer);
        self.shared.catalogue.unregister(layer.diff_id(), Some(layer.number()))?;
        match fs::remove_file(layer.path()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(StoreError::io("remove", layer.path())(error));
            }
            _ => {}
        }
        self.shared.space.something_changed();
        self.shared.catalogue.remove_places(layer.number(), layer.table())
    }

    /// Makes everything durable that was put before the call.
    ///
    /// # Errors
    /// The first one met; the other layers are synced all the same. See [`Layer::sync`].
    pub fn sync(&self) -> Result<(), StoreError> {
        self.shared.sync_round()
    }

    /// Evicts at least `bytes` of what may go, or as much as there is; how much went.
    ///
    /// # Errors
    /// When the catalogue cannot be written or no hole can be punched.
    pub fn make_room(&self, bytes: u64) -> Result<u64, StoreError> {
        self.shared.make_room(bytes)
    }

    /// Tells the store how to find out whether this node may hold the last copy of a layer outside the registry. Such
    /// layers are evicted last. Called during evictions: it must not call the store.
    pub fn set_last_copy_hint(&self, hint: impl Fn(DiffId) -> bool + Send + Sync + 'static) {
        *self.shared.last_copy.write() = Some(Arc::new(hint));
    }

    /// How many bytes can be written before something has to be evicted, or the filesystem's floor is reached. Others
    /// write at the same time: what is true now need not be in a moment.
    ///
    /// # Errors
    /// When the filesystem cannot be asked.
    pub fn spare_bytes(&self) -> Result<u64, StoreError> {
        let config = &self.shared.config;
        let budget =
            config.budget_bytes.map_or(u64::MAX, |budget| budget.saturating_sub(self.shared.space.used_bytes()));
        Ok(budget.min(self.shared.free_bytes()?.saturating_sub(config.free_floor_bytes)))
    }

    /// What the store uses. Costs a `stat` for each layer.
    ///
    /// # Errors
    /// When the filesystem or the catalogue cannot be asked.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        let layers = self.layers();
        let mut usage = Usage {
            present_bytes: 0,
            allocated_bytes: 0,
            artifact_bytes: self.shared.artifact_bytes.load(Ordering::Relaxed),
            catalogue_bytes: len_of_files(&self.shared.dir().join("catalogue"))?,
            used_bytes: self.shared.space.used_bytes(),
            budget_bytes: self.shared.config.budget_bytes,
            free_bytes: self.shared.free_bytes()?,
            layers: layers.len() as u64,
            complete_layers: 0,
            images: self.shared.catalogue.images()?.len() as u64,
        };
        for layer in layers {
            usage.present_bytes += layer.present_bytes();
            usage.allocated_bytes += layer.allocated_bytes()?;
            usage.complete_layers += u64::from(layer.is_complete());
        }
        Ok(usage)
    }

    /// The number of rows of each of the catalogue's families, which `catalogue` names: what shows whether something was
    /// left behind. Reads all of it.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn rows(&self) -> Result<BTreeMap<&'static str, u64>, StoreError> {
        self.shared.catalogue.rows()
    }

    fn end(&mut self, how: Stop) {
        self.shared.queue.stop(how);
        if let Some(thread) = self.sync_thread.take()
            && thread.join().is_err()
        {
            tracing::error!(dir = %self.shared.dir().display(), "the store's sync thread panicked");
        }
        self.shared.closed.store(true, Ordering::Release);
        *self.shared.layers.write() = Layers::default();
        self.shared.queue.clear();
    }

    /// Ends like a killed process: nothing more is synced, and the catalogue is not closed in order.
    #[cfg(test)]
    pub(crate) fn abandon(store: Arc<Self>) {
        let mut store = Arc::into_inner(store).expect("the last owner abandons the store");
        store.end(Stop::Abandon);
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if self.sync_thread.is_none() {
            return;
        }
        self.end(Stop::Close);
        if let Err(error) = self.shared.catalogue.close() {
            tracing::warn!(dir = %self.shared.dir().display(), %error, "store not closed in order");
        }
    }
}

/// Makes a folder that only its owner enters.
fn make_dir(dir: &Path) -> Result<(), StoreError> {
    DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(StoreError::io("make the folder", dir))
}

/// Asks the filesystem what it can do: whether files can share blocks, and (an error if not) whether holes can be
/// punched, which a budget needs.
fn probe(dir: &Path, needs_holes: bool) -> Result<bool, StoreError> {
    let path = dir.join("artifacts").join(format!("{TEMPORARY_PREFIX}probe-{}", std::process::id()));
    let file = File::create(&path).map_err(StoreError::io("make", &path))?;
    let shares = shares_blocks(&file);
    let punched = file.set_len(8192).and_then(|()| punch_hole(&file, 0..4096));
    fs::remove_file(&path).map_err(StoreError::io("remove", &path))?;
    match punched {
        Ok(()) => Ok(shares),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            if needs_holes {
                Err(StoreError::NoHolePunching { dir: dir.to_path_buf() })
            } else {
                Ok(shares)
            }
        }
        Err(source) => Err(StoreError::io("punch a hole into", &path)(source)),
    }
}

fn len_of_files(dir: &Path) -> Result<u64, StoreError> {
    let mut total = 0;
    for entry in fs::read_dir(dir).map_err(StoreError::io("list", dir))? {
        // RocksDB removes files as it goes: one that is gone has no length.
        let metadata = entry.and_then(|entry| entry.metadata());
        total += metadata.map_or(0, |metadata| metadata.len());
    }
    Ok(total)
}
