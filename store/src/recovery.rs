//! Opening what the last process left.
//!
//! The catalogue is believed, files are only checked against it. A layer file without a record is what is left of an
//! interrupted registration or removal, and goes; so does a file with a temporary name. A record without a file, or with one that is too short, stands for
//! bytes that are gone: its presence is cleared, durably, before a new file is made. Damage to what describes a layer
//! drops that layer only. Nothing is ever inferred from holes.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use hermes_image::ids::DiffId;
use hermes_image::index::chunks::ChunkTable;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::artifacts::{TEMPORARY_PREFIX, artifact_of, sync_dir};
use crate::bitmap::AtomicBitmap;
use crate::catalogue::{Found, LayerRecord};
use crate::error::StoreError;
use crate::layer::{GROUP_CHUNKS, GROUPS_PER_PAGE, Layer, LayerParts};
use crate::shared::Shared;

/// Block length of the file systems that are mounted over layer files, in bytes (docs/format.md).
const BLOCK_LEN_BYTES: u64 = 512;

/// What opening the store found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// Whether the last process ended without closing the store.
    pub unclean: bool,
    /// Whether the end of the catalogue's log was damaged, as a power cut leaves it.
    pub cut: bool,
    /// Layers that are open now.
    pub layers: u64,
    /// Layers whose record or chunk table was damaged or missing, and why. They are gone.
    pub dropped: Vec<(DiffId, String)>,
    /// Layers whose file was missing or short, or whose presence was damaged, and why. They are empty now.
    pub cleared: Vec<(DiffId, String)>,
    /// Temporary files that were removed.
    pub temporary_files: u64,
    /// Layer files without a record that were removed.
    pub orphan_layer_files: u64,
    /// Places of chunks in layers without a record that were removed.
    pub orphan_places: u64,
    /// Files that are none of the store's and were left alone.
    pub foreign_files: Vec<String>,
}

/// Why a layer cannot be opened as the catalogue has it.
enum Trouble {
    /// What describes it is damaged: it goes.
    Drop(String),
    /// The call fails, and the store with it.
    Fail(StoreError),
}

impl From<StoreError> for Trouble {
    fn from(error: StoreError) -> Self {
        Self::Fail(error)
    }
}

/// Opens every layer and removes what belongs to none.
pub(crate) fn recover(shared: &Arc<Shared>, found: Found) -> Result<RecoveryReport, StoreError> {
    let cut = found == Found::Cut;
    let mut report = RecoveryReport { unclean: cut || found == Found::Unclean, cut, ..RecoveryReport::default() };
    recover_artifacts(shared, &mut report)?;
    for (diff_id, record) in shared.catalogue.layers()? {
        let number = record.as_ref().ok().map(|record| record.number);
        let opened = match record {
            Ok(record) => open_registered(shared, diff_id, record, &mut report),
            Err(reason) => Err(Trouble::Drop(format!("its record is damaged: {reason}"))),
        };
        match opened {
            Ok(layer) => shared.layers.write().insert(&layer),
            Err(Trouble::Fail(error)) => return Err(error),
            Err(Trouble::Drop(reason)) => {
                // Its file goes with the other orphans below.
                shared.catalogue.unregister(diff_id, number)?;
                report.dropped.push((diff_id, reason));
            }
        }
    }
    recover_layer_files(shared, &mut report)?;
    let numbers: BTreeSet<u32> = shared.layers.read().by_number.keys().copied().collect();
    report.orphan_places = shared.catalogue.remove_orphan_places(|number| numbers.contains(&number))?;
    report.layers = numbers.len() as u64;
    log(shared.dir(), &report);
    Ok(report)
}

fn recover_artifacts(shared: &Shared, report: &mut RecoveryReport) -> Result<(), StoreError> {
    let dir = shared.artifacts_dir();
    let mut total = 0;
    for entry in fs::read_dir(&dir).map_err(StoreError::io("list", &dir))? {
        let entry = entry.map_err(StoreError::io("list", &dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(TEMPORARY_PREFIX) {
            fs::remove_file(entry.path()).map_err(StoreError::io("remove", &entry.path()))?;
            report.temporary_files += 1;
        } else if artifact_of(&name).is_some() {
            total += entry.metadata().map_err(StoreError::io("stat", &entry.path()))?.len();
        } else {
            report.foreign_files.push(format!("artifacts/{name}"));
        }
    }
    shared.artifact_bytes.store(total, Ordering::Relaxed);
    shared.space.adjust(0, total);
    Ok(())
}

fn recover_layer_files(shared: &Shared, report: &mut RecoveryReport) -> Result<(), StoreError> {
    let dir = shared.layers_dir();
    for entry in fs::read_dir(&dir).map_err(StoreError::io("list", &dir))? {
        let entry = entry.map_err(StoreError::io("list", &dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        match format!("sha256:{name}").parse::<DiffId>() {
            Ok(diff_id) if shared.layers.read().by_id.contains_key(&diff_id) => {}
            Ok(_) => {
                fs::remove_file(entry.path()).map_err(StoreError::io("remove", &entry.path()))?;
                report.orphan_layer_files += 1;
            }
            Err(_) if name.starts_with(TEMPORARY_PREFIX) => {
                fs::remove_file(entry.path()).map_err(StoreError::io("remove", &entry.path()))?;
                report.temporary_files += 1;
            }
            Err(_) => report.foreign_files.push(format!("layers/{name}")),
        }
    }
    Ok(())
}

fn open_registered(
    shared: &Arc<Shared>,
    diff_id: DiffId,
    record: LayerRecord,
    report: &mut RecoveryReport,
) -> Result<Arc<Layer>, Trouble> {
    let bytes = match shared.artifact(record.chunk_table) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Err(Trouble::Drop(format!("its chunk table {} is missing", record.chunk_table))),
        Err(error @ StoreError::DamagedArtifact { .. }) => return Err(Trouble::Drop(error.to_string())),
        Err(error) => return Err(Trouble::Fail(error)),
    };
    let table = ChunkTable::decode(bytes).map_err(|error| Trouble::Drop(error.to_string()))?;
    if table.diff_id() != diff_id
        || table.count() != record.chunk_count
        || table.logical_len_bytes() != record.logical_len_bytes
    {
        return Err(Trouble::Drop("its record and its chunk table disagree".to_owned()));
    }
    let path = shared.layer_path(diff_id);
    let (file, durable) = match open_filled(shared, &path, record.number, &table, report.cut)? {
        Ok(parts) => parts,
        Err(reason) => {
            shared.catalogue.clear_presence(record.number)?;
            report.cleared.push((diff_id, reason));
            // Emptied: what an old file holds stands for nothing, and its room comes back.
            let file = make_layer_file(&path, table.logical_len_bytes())?;
            sync_dir(&shared.layers_dir())?;
            (file, AtomicBitmap::new(table.count()))
        }
    };
    let last_uses = load_uses(shared, record.number, table.count())?;
    Ok(Layer::new(LayerParts { table, record, file, path, durable, last_uses }, Arc::clone(shared))?)
}

/// A layer's file and what it holds, or why that cannot be believed; `is_cut` when the end of the log was lost.
fn open_filled(
    shared: &Shared,
    path: &Path,
    number: u32,
    table: &ChunkTable,
    is_cut: bool,
) -> Result<Result<(File, AtomicBitmap), String>, StoreError> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Err("its file is missing".to_owned())),
        Err(source) => return Err(StoreError::io("open", path)(source)),
    };
    let len_bytes = file.metadata().map_err(StoreError::io("stat", path))?.len();
    if len_bytes < table.logical_len_bytes() {
        return Ok(Err(format!("its file has {len_bytes} of {} bytes", table.logical_len_bytes())));
    }
    let padded_len_bytes = file_len_bytes(table.logical_len_bytes());
    if len_bytes < padded_len_bytes {
        file.set_len(padded_len_bytes).map_err(StoreError::io("extend", path))?;
    }
    let durable = AtomicBitmap::new(table.count());
    for (page, bytes) in shared.catalogue.presence(number)? {
        if let Err(error) = durable.load_page(page, &bytes) {
            return Ok(Err(error.to_string()));
        }
    }
    if is_cut && has_hole(&file, &durable, table).map_err(StoreError::io("look for holes in", path))? {
        return Ok(Err("the catalogue's log was damaged, and its file has holes where chunks should be".to_owned()));
    }
    Ok(Ok((file, durable)))
}

/// Whether a chunk that is `present` lies in a hole of the file: it was evicted, and the log does not say so any more. A hole says
/// nothing else.
fn has_hole(file: &File, present: &AtomicBitmap, table: &ChunkTable) -> io::Result<bool> {
    let len_bytes = table.logical_len_bytes();
    let mut offset = 0;
    while offset < len_bytes {
        let hole = rustix::fs::seek(file, SeekFrom::Hole(offset))?;
        if hole >= len_bytes {
            break;
        }
        let data = match rustix::fs::seek(file, SeekFrom::Data(hole)) {
            Ok(data) => data.min(len_bytes),
            // Nothing but hole up to the end.
            Err(Errno::NXIO) => len_bytes,
            Err(error) => return Err(error.into()),
        };
        if !present.runs(table.covering(hole..data), true).is_empty() {
            return Ok(true);
        }
        offset = data;
    }
    Ok(false)
}

/// Last uses as the catalogue has them. A page that cannot be is ignored: it only makes eviction less wise.
fn load_uses(shared: &Shared, layer: u32, chunk_count: u32) -> Result<Box<[AtomicU32]>, StoreError> {
    let last_uses = new_uses(chunk_count, 0);
    for (page, bytes) in shared.catalogue.uses(layer)? {
        let first = (page as usize).saturating_mul(GROUPS_PER_PAGE);
        for (last_use, bytes) in last_uses.iter().skip(first).zip(bytes.chunks_exact(4)) {
            last_use.store(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]), Ordering::Relaxed);
        }
    }
    Ok(last_uses)
}

/// Last uses of a layer of `chunk_count` chunks.
pub(crate) fn new_uses(chunk_count: u32, seconds: u32) -> Box<[AtomicU32]> {
    (0..chunk_count.div_ceil(GROUP_CHUNKS)).map(|_| AtomicU32::new(seconds)).collect()
}

/// The length of the file of a layer of `len_bytes`: it ends with a block also where the stream does not, because EROFS
/// reads whole blocks and a loop device ends with the last whole one.
pub(crate) fn file_len_bytes(len_bytes: u64) -> u64 {
    len_bytes.next_multiple_of(BLOCK_LEN_BYTES)
}

/// Makes an empty sparse file for a layer of `len_bytes`; one that is there is emptied.
///
/// Not synced: the first chunks' sync has the length and the emptiness with it, and before that nothing is present. The
/// caller syncs the folder, so that an old file of the same name does not come back instead.
pub(crate) fn make_layer_file(path: &Path, len_bytes: u64) -> Result<File, StoreError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .map_err(StoreError::io("make", path))?;
    file.set_len(file_len_bytes(len_bytes)).map_err(StoreError::io("extend", path))?;
    Ok(file)
}

fn log(dir: &Path, report: &RecoveryReport) {
    for (diff_id, reason) in &report.dropped {
        tracing::warn!(%diff_id, reason, "layer dropped; it will be fetched again");
    }
    for (diff_id, reason) in &report.cleared {
        tracing::warn!(%diff_id, reason, "layer emptied; its chunks will be fetched again");
    }
    tracing::info!(
        dir = %dir.display(),
        unclean = report.unclean,
        cut = report.cut,
        layers = report.layers,
        temporary_files = report.temporary_files,
        orphan_layer_files = report.orphan_layer_files,
        orphan_places = report.orphan_places,
        foreign_files = report.foreign_files.len(),
        "store opened"
    );
}
