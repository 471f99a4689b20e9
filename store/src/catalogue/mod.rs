//! What the store knows of its bytes, in RocksDB.
//!
//! | family | key | value |
//! |---|---|---|
//! | `meta` | `format` | format version, decimal text |
//! | | `next_layer` | the next free layer number, u32 big endian |
//! | | `next_snapshot` | the next free snapshot number, u64 big endian |
//! | | `registering` | a layer number whose places are being written, u32 big endian |
//! | | `running` | there while the store is open: still there at the next open, it was not closed |
//! | `layers` | diffID | [`LayerRecord`] as JSON |
//! | `presence` | layer number, page number (u32 big endian each) | 512 bytes: one bit a chunk, little-endian words |
//! | `uses` | layer number, page number | 1,024 bytes: last use of each group, Unix seconds, u32 little endian |
//! | `places` | first 16 bytes of the chunk's name, layer number, chunk number | nothing |
//! | `images` | manifest digest | [`ImageRecord`](crate::ImageRecord) as JSON |
//! | `pins` | manifest digest, owner's name | nothing |
//! | `snapshots` | name | [`SnapshotRecord`](crate::SnapshotRecord) as JSON |
//! | `children` | parent's number, child's number (u64 big endian each) | nothing |
//! | `mounts` | path of the mount point | what its owner noted |
//! | `profiles` | manifest digest, part (one byte) | part of what is known of the image's starts |
//!
//! Layers have numbers besides their diffIDs to keep keys short; a number is never used twice, so what a crash leaves
//! of a removed layer can never be taken for another's. A place is a hint: whoever follows it verifies what it finds,
//! so half a name is enough.
//!
//! All families share one log. It is synced where a caller needs durability ([`Durability::Synced`]) and once at the
//! end of a sync round; what was written before in the log is then durable too. After a crash an incomplete last record is
//! dropped. A power cut may also leave a record whose bytes are not all there: then the log is believed up to there, and
//! since presence bits that were cleared behind it would come back if it was not the end, the recovery compares presence with
//! the holes of the layers' files.

mod places;
mod presence;
mod snapshots;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hermes_image::ids::{ArtifactId, DiffId, Digest};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBRecoveryMode, Direction, ErrorKind,
    IteratorMode, LogLevel, Options, SliceTransform, WriteBatch, WriteOptions,
};
use serde::{Deserialize, Serialize};

use crate::error::StoreError;

use places::PLACE_PREFIX_LEN;
pub(crate) use places::Place;
pub(crate) use presence::PresencePage;

/// The format that this build reads and writes.
pub const FORMAT_VERSION: u32 = 1;

const META: &str = "meta";
const LAYERS: &str = "layers";
const PRESENCE: &str = "presence";
const USES: &str = "uses";
const PLACES: &str = "places";
const IMAGES: &str = "images";
const PINS: &str = "pins";
const SNAPSHOTS: &str = "snapshots";
const CHILDREN: &str = "children";
const MOUNTS: &str = "mounts";
const PROFILES: &str = "profiles";
const FAMILIES: [&str; 11] =
    [META, LAYERS, PRESENCE, USES, PLACES, IMAGES, PINS, SNAPSHOTS, CHILDREN, MOUNTS, PROFILES];

/// Memory of a family's write buffer. The whole catalogue of a node is tens of MiB. RocksDB allocates a tenth more
/// than this on disk for its log.
const WRITE_BUFFER_BYTES: usize = 2 << 20;
/// Memory of all families' write buffers together.
const WRITE_BUFFERS_BYTES: usize = 8 << 20;
/// What RocksDB allocates ahead for its manifest (its default of 4 MiB is for databases with many files).
const MANIFEST_AHEAD_BYTES: usize = 64 << 10;
/// Longest log, which is also what an open after a crash replays: about 30 ms.
const LOG_MAX_BYTES: u64 = 16 << 20;
/// Cached blocks of all families. Only `places` is read after the open.
const BLOCK_CACHE_BYTES: usize = 8 << 20;
/// Open table files. Few, because the catalogue is small, and descriptors are needed for layers.
const OPEN_FILES_MAX: i32 = 64;

/// Whether a write is durable when it returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    /// Survives the process; power loss may take it, and then everything written after it.
    Buffered,
    /// Survives power loss, and so does everything written before.
    Synced,
}

/// What is kept of a layer besides its presence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct LayerRecord {
    /// Its number in this store.
    pub(crate) number: u32,
    /// Its chunk table.
    pub(crate) chunk_table: ArtifactId,
    /// Number of chunks.
    pub(crate) chunk_count: u32,
    /// Length of its logical space in bytes.
    pub(crate) logical_len_bytes: u64,
}

/// How the catalogue was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Found {
    /// It was made just now.
    New,
    /// It was closed in order.
    Clean,
    /// Its process ended without closing it.
    Unclean,
    /// The end of its log is damaged, as a power cut leaves what was not synced yet; it is as it was before that.
    Cut,
}

/// A layer's diffID with its record, or with what is wrong with that.
pub(crate) type LayerEntry = (DiffId, Result<LayerRecord, String>);

/// A key and its value.
type Item = (Box<[u8]>, Box<[u8]>);

/// The open catalogue.
pub(crate) struct Catalogue {
    db: DB,
    path: PathBuf,
}

impl std::fmt::Debug for Catalogue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Catalogue").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Catalogue {
    /// Opens or makes the catalogue of the store in `dir`.
    ///
    /// # Errors
    /// When it cannot be read, or has another format.
    pub(crate) fn open(dir: &Path) -> Result<(Self, Found), StoreError> {
        let path = dir.join("catalogue");
        let failed = |operation| {
            let path = path.clone();
            move |source| StoreError::Catalogue { operation, path, source }
        };
        let new = !path.join("CURRENT").exists();
        let mut options = database_options();
        // A newer format may have more families; they are opened too, so that its version can be read and named.
        // RocksDB's own family is always there, and opened with buffers of 64 MiB unless it is named.
        let mut names: Vec<String> = FAMILIES.iter().chain(&["default"]).map(|name| (*name).to_owned()).collect();
        if !new {
            let existing = DB::list_cf(&options, &path).map_err(failed("open"))?;
            names.extend(existing.into_iter().filter(|name| name != "default" && !FAMILIES.contains(&name.as_str())));
        }
        let cache = Cache::new_lru_cache(BLOCK_CACHE_BYTES);
        let families = || {
            let family = |name: &String| ColumnFamilyDescriptor::new(name, family_options(name, &cache));
            names.iter().map(family).collect::<Vec<_>>()
        };
        let (db, is_cut) = match DB::open_cf_descriptors(&options, &path, families()) {
            Err(error) if error.kind() == ErrorKind::Corruption => {
                tracing::warn!(%error, "the catalogue's log is damaged; it is taken as it was before that");
                options.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
                (DB::open_cf_descriptors(&options, &path, families()).map_err(failed("open"))?, true)
            }
            opened => (opened.map_err(failed("open"))?, false),
        };
        let catalogue = Self { db, path };
        let found = catalogue.check_format(dir)?;
        let found = if is_cut { Found::Cut } else { found };
        Ok((catalogue, found))
    }

    fn check_format(&self, dir: &Path) -> Result<Found, StoreError> {
        let meta = self.family(META);
        let found = match self.get(META, b"format")? {
            Some(version) if version == FORMAT_VERSION.to_string().as_bytes() => {
                if self.get(META, b"running")?.is_some() { Found::Unclean } else { Found::Clean }
            }
            Some(version) => {
                let found = String::from_utf8_lossy(&version).into_owned();
                return Err(StoreError::Version { dir: dir.to_path_buf(), found, known: FORMAT_VERSION });
            }
            // The version is the first thing that is ever written: without it there is nothing, or somebody else's.
            None if self.iterate(LAYERS, &[]).next().is_none() => Found::New,
            None => {
                let found = "unknown (no version)".to_owned();
                return Err(StoreError::Version { dir: dir.to_path_buf(), found, known: FORMAT_VERSION });
            }
        };
        let mut batch = WriteBatch::default();
        batch.put_cf(meta, b"format", FORMAT_VERSION.to_string());
        batch.put_cf(meta, b"running", std::process::id().to_string());
        self.write(batch, Durability::Synced)?;
        Ok(found)
    }

    /// Notes that the store was closed in order.
    pub(crate) fn close(&self) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        batch.delete_cf(self.family(META), b"running");
        self.write(batch, Durability::Synced)
    }

    fn family(&self, name: &str) -> &ColumnFamily {
        self.db.cf_handle(name).expect("every family is opened with the database")
    }

    fn failed(&self, operation: &'static str) -> impl FnOnce(rocksdb::Error) -> StoreError {
        let path = self.path.clone();
        move |source| StoreError::Catalogue { operation, path, source }
    }

    fn get(&self, family: &str, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.db.get_cf(self.family(family), key).map_err(self.failed("read"))
    }

    fn write(&self, batch: WriteBatch, durability: Durability) -> Result<(), StoreError> {
        let mut options = WriteOptions::default();
        options.set_sync(durability == Durability::Synced);
        self.db.write_opt(batch, &options).map_err(self.failed("write"))
    }

    /// Makes everything written so far durable.
    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        self.db.flush_wal(true).map_err(self.failed("sync"))
    }

    /// Keys and values of `family` whose key begins with `prefix`, in order.
    fn iterate<'a>(&'a self, family: &str, prefix: &'a [u8]) -> impl Iterator<Item = Result<Item, StoreError>> + 'a {
        self.db
            .iterator_cf(self.family(family), IteratorMode::From(prefix, Direction::Forward))
            .map(|item| item.map_err(self.failed("read")))
            .take_while(move |item| item.as_ref().map_or(true, |(key, _)| key.starts_with(prefix)))
    }

    /// The number of rows of each family.
    pub(crate) fn rows(&self) -> Result<BTreeMap<&'static str, u64>, StoreError> {
        let count = |family| {
            let rows = self.iterate(family, &[]).try_fold(0, |rows, item| item.map(|_| rows + 1));
            Ok((family, rows?))
        };
        FAMILIES.into_iter().map(count).collect()
    }

    /// Every layer's record.
    pub(crate) fn layers(&self) -> Result<Vec<LayerEntry>, StoreError> {
        let mut layers = Vec::new();
        for item in self.iterate(LAYERS, &[]) {
            let (key, value) = item?;
            let Ok(diff_id) = <[u8; 32]>::try_from(&key[..]) else {
                return Err(StoreError::Damaged {
                    record: "a layer".to_owned(),
                    reason: format!("its key has {} bytes instead of 32", key.len()),
                });
            };
            let record = serde_json::from_slice(&value).map_err(|error| error.to_string());
            layers.push((DiffId(diff_id), record));
        }
        Ok(layers)
    }

    /// A layer's record; an unreadable one counts as one with an unknown number.
    pub(crate) fn layer_number(&self, diff_id: DiffId) -> Result<Option<Option<u32>>, StoreError> {
        let record = self.get(LAYERS, &diff_id.0)?;
        Ok(record.map(|json| serde_json::from_slice::<LayerRecord>(&json).ok().map(|record| record.number)))
    }

    /// A layer number that was never used before.
    pub(crate) fn take_layer_number(&self) -> Result<u32, StoreError> {
        let number = match self.get(META, b"next_layer")? {
            None => 0,
            Some(bytes) => match <[u8; 4]>::try_from(bytes.as_slice()) {
                Ok(bytes) => u32::from_be_bytes(bytes),
                Err(_) => {
                    return Err(StoreError::Damaged {
                        record: "the next layer number".to_owned(),
                        reason: format!("it has {} bytes instead of 4", bytes.len()),
                    });
                }
            },
        };
        let mut batch = WriteBatch::default();
        // 2^32 registrations are a century of one a second.
        batch.put_cf(self.family(META), b"next_layer", number.saturating_add(1).to_be_bytes());
        self.write(batch, Durability::Buffered)?;
        Ok(number)
    }

    /// Puts an image's record.
    pub(crate) fn put_image(&self, digest: Digest, json: &[u8]) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        batch.put_cf(self.family(IMAGES), digest.0, json);
        self.write(batch, Durability::Synced)
    }

    /// An image's record.
    pub(crate) fn image(&self, digest: Digest) -> Result<Option<Vec<u8>>, StoreError> {
        self.get(IMAGES, &digest.0)
    }

    /// Every image's digest and record.
    pub(crate) fn images(&self) -> Result<Vec<(Digest, Vec<u8>)>, StoreError> {
        let mut images = Vec::new();
        for item in self.iterate(IMAGES, &[]) {
            let (key, value) = item?;
            // A key of another length cannot have been written by this format; it names no image.
            if let Ok(digest) = <[u8; 32]>::try_from(&key[..]) {
                images.push((Digest(digest), value.into_vec()));
            }
        }
        Ok(images)
    }

    /// Removes an image's record, its pins, and what is known of its starts.
    pub(crate) fn remove_image(&self, digest: Digest) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        batch.delete_cf(self.family(IMAGES), digest.0);
        for family in [PINS, PROFILES] {
            for item in self.iterate(family, &digest.0) {
                batch.delete_cf(self.family(family), item?.0);
            }
        }
        self.write(batch, Durability::Synced)
    }

    /// Puts parts of what is known of an image's starts, all or none.
    pub(crate) fn put_profile(&self, digest: Digest, parts: &[(u8, &[u8])]) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        for (part, bytes) in parts {
            batch.put_cf(self.family(PROFILES), [&digest.0[..], &[*part]].concat(), bytes);
        }
        self.write(batch, Durability::Synced)
    }

    /// A part of what is known of an image's starts.
    pub(crate) fn profile(&self, digest: Digest, part: u8) -> Result<Option<Vec<u8>>, StoreError> {
        self.get(PROFILES, &[&digest.0[..], &[part]].concat())
    }

    /// Sets or removes a pin.
    pub(crate) fn set_pin(&self, digest: Digest, owner: &str, pinned: bool) -> Result<(), StoreError> {
        let key = [&digest.0, owner.as_bytes()].concat();
        let mut batch = WriteBatch::default();
        if pinned {
            batch.put_cf(self.family(PINS), key, []);
        } else {
            batch.delete_cf(self.family(PINS), key);
        }
        self.write(batch, Durability::Synced)
    }

    /// Every pin: the image and the owner.
    pub(crate) fn pins(&self) -> Result<Vec<(Digest, String)>, StoreError> {
        let mut pins = Vec::new();
        for item in self.iterate(PINS, &[]) {
            let (key, _) = item?;
            if let Some((digest, owner)) = key.split_first_chunk::<32>() {
                pins.push((Digest(*digest), String::from_utf8_lossy(owner).into_owned()));
            }
        }
        Ok(pins)
    }

    /// Sets or removes the note of the mount point `dir`.
    pub(crate) fn set_mount(&self, dir: &[u8], note: Option<&[u8]>) -> Result<(), StoreError> {
        let mut batch = WriteBatch::default();
        match note {
            Some(note) => batch.put_cf(self.family(MOUNTS), dir, note),
            None => batch.delete_cf(self.family(MOUNTS), dir),
        }
        self.write(batch, Durability::Synced)
    }

    /// Every mount point and its note.
    pub(crate) fn mounts(&self) -> Result<Vec<Item>, StoreError> {
        self.iterate(MOUNTS, &[]).collect()
    }
}

fn database_options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_paranoid_checks(true);
    options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
    options.set_max_total_wal_size(LOG_MAX_BYTES);
    options.set_db_write_buffer_size(WRITE_BUFFERS_BYTES);
    options.set_manifest_preallocation_size(MANIFEST_AHEAD_BYTES);
    options.set_max_open_files(OPEN_FILES_MAX);
    options.set_max_background_jobs(2);
    options.set_keep_log_file_num(2);
    options.set_max_log_file_size(1 << 20);
    options.set_log_level(LogLevel::Warn);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options
}

fn family_options(name: &str, cache: &Cache) -> Options {
    let mut options = Options::default();
    options.set_write_buffer_size(WRITE_BUFFER_BYTES);
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    if name == PLACES {
        // Most chunks of a new layer are nowhere else: the filter answers that without reading a block.
        options.set_prefix_extractor(SliceTransform::create_fixed_prefix(PLACE_PREFIX_LEN));
        options.set_memtable_prefix_bloom_ratio(0.05);
        blocks.set_bloom_filter(10.0, false);
        blocks.set_whole_key_filtering(false);
    }
    options.set_block_based_table_factory(&blocks);
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_format_is_named() {
        let dir = tempfile::tempdir().expect("a folder");
        let (catalogue, found) = Catalogue::open(dir.path()).expect("opens");
        assert_eq!(found, Found::New);
        catalogue.close().expect("closes");
        drop(catalogue);
        let (catalogue, found) = Catalogue::open(dir.path()).expect("opens again");
        assert_eq!(found, Found::Clean);
        let mut batch = WriteBatch::default();
        batch.put_cf(catalogue.family(META), b"format", b"2");
        catalogue.write(batch, Durability::Synced).expect("writes");
        drop(catalogue);
        // A family of a later format must not get in the way of the message.
        let mut db = DB::open_cf(&Options::default(), dir.path().join("catalogue"), FAMILIES).expect("opens");
        db.create_cf("later", &Options::default()).expect("makes a family");
        drop(db);
        match Catalogue::open(dir.path()) {
            Err(StoreError::Version { found, known: 1, .. }) => assert_eq!(found, "2"),
            other => panic!("{:?}", other.map(|(_, found)| found)),
        }
    }

    #[test]
    fn layer_numbers_are_never_used_twice() {
        let dir = tempfile::tempdir().expect("a folder");
        let (catalogue, _) = Catalogue::open(dir.path()).expect("opens");
        assert_eq!(catalogue.take_layer_number().expect("a number"), 0);
        assert_eq!(catalogue.take_layer_number().expect("a number"), 1);
        drop(catalogue);
        let (catalogue, found) = Catalogue::open(dir.path()).expect("opens again");
        assert_eq!(found, Found::Unclean);
        assert_eq!(catalogue.take_layer_number().expect("a number"), 2);
    }

    #[test]
    fn pins_of_one_image_are_apart_and_go_with_it() {
        let dir = tempfile::tempdir().expect("a folder");
        let (catalogue, _) = Catalogue::open(dir.path()).expect("opens");
        let (a, b) = (Digest([1; 32]), Digest([2; 32]));
        for (digest, owner) in [(a, "preload"), (a, "operator"), (b, "preload")] {
            catalogue.set_pin(digest, owner, true).expect("pins");
        }
        catalogue.set_pin(a, "preload", false).expect("unpins");
        assert_eq!(catalogue.pins().expect("reads"), vec![(a, "operator".to_owned()), (b, "preload".to_owned())]);
        catalogue.remove_image(a).expect("removes");
        assert_eq!(catalogue.pins().expect("reads"), vec![(b, "preload".to_owned())]);
    }
}
