//! Layers in the making: bytes that are written before anybody can say which chunks they are.
//!
//! Whoever builds the index of a layer while it streams by has its chunks at once and its chunk table only in the end,
//! and knows only then whether the layer was the one that was wanted. So the bytes go to a file of their own first, one
//! after the other, and become a layer in one step:
//!
//! * [`Store::stage_layer`], [`StagedLayer::append`]: a temporary file in the folder of the layers. It takes room like
//!   any put, and evicts for it, but no bit stands for it and nobody reads it.
//! * [`StagedLayer::seal`]: all of it is there, by the chunk table; `fdatasync`.
//! * [`Store::adopt`]: the file gets the layer's name (the folder is synced), and then one synced write of the catalogue
//!   says that the layer is there, with every chunk. A layer that is registered already by the same table gets what it
//!   lacks instead, chunk by chunk and checked.
//!
//! So data comes before presence here, too. A crash or a drop before the write of the catalogue leaves nothing: a
//! dropped file is removed and its room given back, one that a crash left is removed by the next [`Store::open`], under
//! its temporary name or under a layer's without a record. After that write, the layer is complete.
//!
//! Artifacts that belong to such a layer are staged in the same way: [`Store::stage_artifact`],
//! [`StagedArtifact::keep`].

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, ChunkNo};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::runs::Runs;
use hermes_image::verify::Verified;

use crate::artifacts::{TEMPORARY_PREFIX, sync_dir, write_whole};
use crate::config::DropBehind;
use crate::error::{FullCause, StoreError, no_space};
use crate::layer::{Layer, LayerUse};
use crate::recovery::file_len_bytes;
use crate::shared::Shared;
use crate::store::Store;

/// The kernel is told to write so many bytes out at a time, so that the `fdatasync` in the end finds little to do: an
/// eighth of what a round of the sync thread writes.
const WRITE_OUT_BYTES: u64 = 8 << 20;

/// A file below a temporary name, and the room that it takes. Dropped, both are given back.
struct StagedFile {
    shared: Arc<Shared>,
    path: PathBuf,
    charged_bytes: u64,
}

impl StagedFile {
    /// A name in `dir` that nobody uses. The file is not made yet.
    fn new(shared: &Arc<Shared>, dir: &Path) -> Self {
        let number = shared.temporary_names.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!("{TEMPORARY_PREFIX}{}-{number}", std::process::id()));
        Self { shared: Arc::clone(shared), path, charged_bytes: 0 }
    }
}

impl std::fmt::Debug for StagedFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { path, charged_bytes, .. } = self;
        f.debug_struct("StagedFile").field("path", path).field("charged_bytes", charged_bytes).finish_non_exhaustive()
    }
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        // It is not there when it was never made, or has got its own name. The next open removes what this cannot.
        let _ = fs::remove_file(&self.path);
        self.shared.space.adjust(self.charged_bytes, 0);
        self.shared.space.something_changed();
    }
}

/// A layer that is being written from its start. Dropped, it is gone.
#[derive(Debug)]
pub struct StagedLayer {
    file: File,
    len_bytes: u64,
    written_out_to: u64,
    staged: StagedFile,
}

/// All bytes of a layer, on the disk. Dropped, they are gone; [`Store::adopt`] makes them a layer.
#[derive(Debug)]
pub struct SealedLayer {
    file: File,
    table: ChunkTable,
    staged: StagedFile,
}

impl StagedLayer {
    fn new(shared: &Arc<Shared>) -> Result<Self, StoreError> {
        let staged = StagedFile::new(shared, &shared.layers_dir());
        let made = OpenOptions::new().read(true).write(true).create_new(true).open(&staged.path);
        let file = made.map_err(StoreError::io("make", &staged.path))?;
        Ok(Self { file, len_bytes: 0, written_out_to: 0, staged })
    }

    /// Bytes that were appended.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Writes the next chunk of the layer behind those before it, evicting other layers' for its room if it must.
    ///
    /// # Errors
    /// [`StoreError::Full`] when there is no room; when the disk fails, or the store was closed.
    pub fn append(&mut self, chunk: &Verified<Bytes>) -> Result<(), StoreError> {
        let chunk_len_bytes = chunk.len() as u64;
        let Self { file, len_bytes, staged, .. } = self;
        let shared = &staged.shared;
        let mut evicted = false;
        loop {
            let room = shared.reserve(chunk_len_bytes)?;
            match file.write_all_at(chunk, *len_bytes) {
                Ok(()) => {
                    room.spend(chunk_len_bytes);
                    break;
                }
                Err(source) if !no_space(&source) => return Err(StoreError::io("write", &staged.path)(source)),
                Err(_) => {}
            }
            drop(room);
            if evicted || shared.make_room(chunk_len_bytes)? == 0 {
                return Err(StoreError::Full { needed_bytes: chunk_len_bytes, cause: FullCause::Filesystem });
            }
            evicted = true;
        }
        *len_bytes += chunk_len_bytes;
        staged.charged_bytes += chunk_len_bytes;
        self.write_out(WRITE_OUT_BYTES)
    }

    /// Lets the kernel begin to write, once `at_least` bytes wait. Dropping cached pages does that with dirty ones, and
    /// keeps them until they are clean (mm/fadvise.c).
    fn write_out(&mut self, at_least: u64) -> Result<(), StoreError> {
        let waiting = self.len_bytes - self.written_out_to;
        if waiting < at_least || self.staged.shared.config.drop_behind == DropBehind::Off {
            return Ok(());
        }
        let from = std::mem::replace(&mut self.written_out_to, self.len_bytes);
        drop_cached(&self.file, from, waiting).map_err(StoreError::io("write out", &self.staged.path))
    }

    /// The layer has ended, and these are its chunks: makes it durable. The chunks that were appended must be those of
    /// `table`, in order, which whoever made the table of them knows; only their length is compared.
    ///
    /// # Errors
    /// [`StoreError::StagedLength`] when the table describes something else, or when the disk fails.
    pub fn seal(self, table: &ChunkTable) -> Result<SealedLayer, StoreError> {
        let Self { file, len_bytes, staged, .. } = self;
        let (diff_id, expected) = (table.diff_id(), table.logical_len_bytes());
        if len_bytes != expected {
            return Err(StoreError::StagedLength { diff_id, expected, actual: len_bytes });
        }
        let synced = file.set_len(file_len_bytes(expected)).and_then(|()| file.sync_data());
        synced.map_err(StoreError::io("sync", &staged.path))?;
        if staged.shared.config.drop_behind != DropBehind::Off {
            drop_cached(&file, 0, len_bytes).map_err(StoreError::io("drop cached pages of", &staged.path))?;
        }
        Ok(SealedLayer { file, table: table.clone(), staged })
    }
}

fn drop_cached(file: &File, from: u64, len_bytes: u64) -> rustix::io::Result<()> {
    match std::num::NonZeroU64::new(len_bytes) {
        Some(len_bytes) => rustix::fs::fadvise(file, from, Some(len_bytes), rustix::fs::Advice::DontNeed),
        // No length would mean: to the end.
        None => Ok(()),
    }
}

impl SealedLayer {
    /// The chunk table of the layer.
    pub fn table(&self) -> &ChunkTable {
        &self.table
    }

    /// Gives the file its layer's name.
    fn become_layer(&self, path: &Path) -> Result<File, StoreError> {
        let file = self.file.try_clone().map_err(StoreError::io("open", &self.staged.path))?;
        fs::rename(&self.staged.path, path).map_err(StoreError::io("name", path))?;
        Ok(file)
    }

    /// Puts what `layer`, of the same table, lacks.
    fn fill(&self, layer: &Layer) -> Result<(), StoreError> {
        for chunk in layer.missing(0..self.table.count()).chunks().map(ChunkNo) {
            let range = self.table.range(chunk);
            // At most CHUNK_LEN_MAX_BYTES, which a chunk table promises.
            let mut bytes = vec![0; (range.end - range.start) as usize];
            self.file.read_exact_at(&mut bytes, range.start).map_err(StoreError::io("read", &self.staged.path))?;
            let damaged = |_| {
                let source = std::io::Error::other(format!("chunk {chunk} is not what was written"));
                StoreError::io("read", &self.staged.path)(source)
            };
            layer.put(chunk, &self.table.verify(chunk, Bytes::from(bytes)).map_err(damaged)?)?;
        }
        layer.sync()
    }
}

impl Store {
    /// Begins a layer whose chunks are not known yet.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn stage_layer(&self) -> Result<StagedLayer, StoreError> {
        StagedLayer::new(&self.shared)
    }

    /// Makes `sealed` a layer of the store, complete and durable, which is held from the beginning. Nobody sees any of
    /// it before this returns, or all of it.
    ///
    /// A layer that is registered with the same table gets the chunks that it lacks; one with another table is removed.
    ///
    /// # Errors
    /// [`StoreError::LayerInUse`] when it is registered with another table and held; when the disk is full or fails.
    pub fn adopt(&self, sealed: SealedLayer) -> Result<LayerUse, StoreError> {
        let _one = self.shared.registering.lock();
        let table = &sealed.table;
        if let Some(layer) = self.registered(table) {
            let held = layer.hold();
            sealed.fill(&held)?;
            return Ok(held);
        }
        self.make_way_for(table)?;
        let path = self.shared.layer_path(table.diff_id());
        let all = if table.count() == 0 { Runs::new() } else { Runs::one(0..table.count()) };
        let prepared = self.prepare(table, &all, |path| sealed.become_layer(path));
        let mut layers = prepared.and_then(|prepared| self.register(vec![prepared])).inspect_err(|_| {
            // Without a record it is nobody's; the next open removes what this cannot.
            let _ = fs::remove_file(&path);
        })?;
        Ok(layers.remove(0))
    }

    /// Writes an artifact down, durably, for [`StagedArtifact::keep`]. Nothing is written when it is there.
    ///
    /// # Errors
    /// When the disk is full or fails.
    pub fn stage_artifact(&self, bytes: &Verified<Bytes>) -> Result<StagedArtifact, StoreError> {
        self.shared.stage_artifact(bytes)
    }
}

/// An artifact that nobody finds yet. Dropped, it is gone, unless it was there before.
#[derive(Debug)]
pub struct StagedArtifact {
    id: ArtifactId,
    /// `None` when the store has it.
    staged: Option<StagedFile>,
}

impl StagedArtifact {
    /// Its name.
    pub fn id(&self) -> ArtifactId {
        self.id
    }

    /// Puts the artifact under its name, durably.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn keep(self) -> Result<ArtifactId, StoreError> {
        let Some(mut staged) = self.staged else { return Ok(self.id) };
        let path = staged.shared.artifact_path(self.id);
        // Somebody else may have put it meanwhile; then the room of this one is given back.
        if !path.exists() {
            fs::rename(&staged.path, &path).map_err(StoreError::io("write", &path))?;
            let len_bytes = std::mem::take(&mut staged.charged_bytes);
            staged.shared.artifact_bytes.fetch_add(len_bytes, Ordering::Relaxed);
        }
        sync_dir(&staged.shared.artifacts_dir())?;
        Ok(self.id)
    }
}

impl Shared {
    pub(crate) fn stage_artifact(self: &Arc<Self>, bytes: &Verified<Bytes>) -> Result<StagedArtifact, StoreError> {
        let id = ArtifactId::of(bytes);
        match self.artifact(id) {
            Ok(Some(_)) => return Ok(StagedArtifact { id, staged: None }),
            // Removed just now: these bytes take its place.
            Ok(None) | Err(StoreError::DamagedArtifact { .. }) => {}
            Err(error) => return Err(error),
        }
        let mut staged = StagedFile::new(self, &self.artifacts_dir());
        write_whole(&staged.path, bytes).map_err(|source| {
            if no_space(&source) {
                StoreError::Full { needed_bytes: bytes.len() as u64, cause: FullCause::Filesystem }
            } else {
                StoreError::io("write", &self.artifact_path(id))(source)
            }
        })?;
        staged.charged_bytes = bytes.len() as u64;
        self.space.adjust(0, staged.charged_bytes);
        Ok(StagedArtifact { id, staged: Some(staged) })
    }
}

#[cfg(test)]
mod tests;
