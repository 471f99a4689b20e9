//! containerd's snapshots: what is known of each, in batches that are whole and durable when they return.
//!
//! Owns the rules that hold between records: a name is used once, a parent is committed and stays as long as it has
//! children, only an active snapshot is committed. It knows nothing of the directories; whoever keeps those makes them
//! before [`Snapshots::insert`] and removes them after [`Snapshots::remove`], so that a crash leaves a directory without
//! a record and never a record without a directory.
//!
//! One change at a time: each reads, checks and writes under one lock. Reads take none; a list is of one moment.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hermes_image::ids::{ChainId, DiffId, Digest, LayerId};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::error::StoreError;
use crate::store::Store;

/// Longest chain of parents that is followed. The kernel's overlay takes 500 layers; a longer chain than this can only
/// be a damaged catalogue.
const CHAIN_LEN_MAX: usize = 4096;

/// What a snapshot is for. The words are containerd's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotKind {
    /// Its parents, to be read only.
    View,
    /// Its parents and a layer that is being written.
    Active,
    /// A layer that no longer changes, and may be a parent.
    Committed,
}

/// What a snapshot takes on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotUsage {
    /// Bytes of allocated blocks.
    pub size_bytes: u64,
    /// Inodes, each counted once however many names it has.
    pub inodes: u64,
}

/// What is known of a layer that was never unpacked, because it is shown lazily. Names only: what they stand for is
/// elsewhere in the store, or fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteLayer {
    /// The chain whose top this layer is: names the merged tree of itself and everything below.
    pub chain: ChainId,
    /// Its content.
    pub diff_id: DiffId,
    /// Its blob.
    pub layer: LayerId,
    /// The manifest with which it was first pulled.
    pub manifest: Digest,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRecord {
    /// Its number in this store, from 1; never used again. Its directory has this name.
    pub id: u64,
    /// Its name, which for an active snapshot or a view containerd calls the key.
    pub name: String,
    /// What it is for.
    pub kind: SnapshotKind,
    /// The name of the committed snapshot below it.
    pub parent: Option<String>,
    /// containerd's labels. No value is empty.
    pub labels: BTreeMap<String, String>,
    /// When it was made or, if it is committed, committed. Nanoseconds since the Unix epoch.
    pub created_ns: u64,
    /// When its labels last changed. Nanoseconds since the Unix epoch.
    pub updated_ns: u64,
    /// What it takes on disk, measured when it was committed; zero before, and for a remote layer.
    pub usage: SnapshotUsage,
    /// There for a layer that is shown lazily and has nothing in its directory.
    pub remote: Option<RemoteLayer>,
}

impl SnapshotRecord {
    /// When it was made or committed.
    pub fn created(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.created_ns)
    }

    /// When its labels last changed.
    pub fn updated(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_nanos(self.updated_ns)
    }

    fn decode(name: &str, json: &[u8]) -> Result<Self, StoreError> {
        let damaged = |reason| StoreError::Damaged { record: format!("snapshot {name}"), reason };
        let record: Self = serde_json::from_slice(json).map_err(|error| damaged(error.to_string()))?;
        if record.name == name { Ok(record) } else { Err(damaged(format!("it describes {} instead", record.name))) }
    }

    fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("names, text and numbers always serialise")
    }
}

/// A snapshot to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshot {
    /// From [`Snapshots::take_id`].
    pub id: u64,
    /// Its name.
    pub name: String,
    /// What it is for; committed only for a remote layer.
    pub kind: SnapshotKind,
    /// The committed snapshot below it.
    pub parent: Option<String>,
    /// Its labels; those with an empty value are left out.
    pub labels: BTreeMap<String, String>,
    /// There for a layer that is shown lazily.
    pub remote: Option<RemoteLayer>,
}

/// What becomes of an active snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// The active snapshot.
    pub key: String,
    /// Its name from now on.
    pub name: String,
    /// Its labels from now on; none of the old ones stay.
    pub labels: BTreeMap<String, String>,
    /// The snapshot below it from now on, for one that was made without any.
    pub parent: Option<String>,
    /// What it takes on disk.
    pub usage: SnapshotUsage,
}

/// Which labels change. An empty value takes a label away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelChange {
    /// These are all that is left.
    All(BTreeMap<String, String>),
    /// These change, the others stay.
    Some(BTreeMap<String, String>),
}

/// Why a snapshot could not be made, changed or removed.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// There is none of this name.
    #[error("snapshot {name} does not exist")]
    NotFound {
        /// The name.
        name: String,
    },
    /// The parent does not exist.
    #[error("parent snapshot {name} does not exist")]
    ParentNotFound {
        /// The parent.
        name: String,
    },
    /// The name is taken.
    #[error("snapshot {name} exists already")]
    Exists {
        /// The name.
        name: String,
    },
    /// Only an active snapshot is committed.
    #[error("snapshot {name} is not active")]
    NotActive {
        /// The name.
        name: String,
    },
    /// Only a committed snapshot is a parent.
    #[error("parent snapshot {name} is not committed")]
    ParentNotCommitted {
        /// The parent.
        name: String,
    },
    /// A parent given at the commit is another than the one given before.
    #[error("snapshot {name} has a parent, which a commit cannot change")]
    ParentChanged {
        /// The active snapshot.
        name: String,
    },
    /// Others stand on it.
    #[error("cannot remove snapshot {name}: it has children; remove those first")]
    HasChildren {
        /// The name.
        name: String,
    },
    /// The catalogue failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The snapshots of a store. All methods wait for the disk and belong on blocking threads.
#[derive(Debug, Clone, Copy)]
pub struct Snapshots<'a> {
    store: &'a Store,
}

impl Store {
    /// containerd's snapshots.
    pub fn snapshots(&self) -> Snapshots<'_> {
        Snapshots { store: self }
    }
}

impl Snapshots<'_> {
    /// A number for a new snapshot; never the same again.
    ///
    /// # Errors
    /// When the catalogue cannot be read or written.
    pub fn take_id(&self) -> Result<u64, StoreError> {
        let _one = self.store.shared.snapshots.lock();
        self.store.shared.catalogue.take_snapshot_number()
    }

    /// Makes a snapshot, durably.
    ///
    /// # Errors
    /// When the name is taken, or the parent is missing or not committed; when the catalogue fails.
    pub fn insert(&self, new: NewSnapshot) -> Result<SnapshotRecord, SnapshotError> {
        let catalogue = &self.store.shared.catalogue;
        let _one = self.store.shared.snapshots.lock();
        let parent = self.parent(new.parent.as_deref())?;
        if self.get(&new.name)?.is_some() {
            return Err(SnapshotError::Exists { name: new.name });
        }
        let now_ns = now_ns();
        let record = SnapshotRecord {
            id: new.id,
            name: new.name,
            kind: new.kind,
            parent: new.parent,
            labels: without_empty(new.labels),
            created_ns: now_ns,
            updated_ns: now_ns,
            usage: SnapshotUsage::default(),
            remote: new.remote,
        };
        let mut batch = catalogue.snapshot_batch();
        batch.put(&record.name, &record.encode());
        if let Some(parent) = parent {
            batch.link(parent.id, record.id);
        }
        batch.write()?;
        Ok(record)
    }

    /// Makes an active snapshot a committed one with a name of its own, durably. Its number stays.
    ///
    /// # Errors
    /// When the name is taken, there is no such active snapshot, its parent would change, or the new parent is missing
    /// or not committed; when the catalogue fails.
    pub fn commit(&self, commit: Commit) -> Result<SnapshotRecord, SnapshotError> {
        let catalogue = &self.store.shared.catalogue;
        let _one = self.store.shared.snapshots.lock();
        if self.get(&commit.name)?.is_some() {
            return Err(SnapshotError::Exists { name: commit.name });
        }
        let Some(active) = self.get(&commit.key)? else { return Err(SnapshotError::NotFound { name: commit.key }) };
        if active.kind != SnapshotKind::Active {
            return Err(SnapshotError::NotActive { name: commit.key });
        }
        let mut batch = catalogue.snapshot_batch();
        let parent = match (active.parent, commit.parent) {
            (None, Some(parent)) => {
                let below = self.parent(Some(&parent))?;
                below.into_iter().for_each(|below| batch.link(below.id, active.id));
                Some(parent)
            }
            (Some(old), Some(new)) if old != new => {
                return Err(SnapshotError::ParentChanged { name: commit.key });
            }
            (parent, _) => parent,
        };
        let now_ns = now_ns();
        let record = SnapshotRecord {
            id: active.id,
            name: commit.name,
            kind: SnapshotKind::Committed,
            parent,
            labels: without_empty(commit.labels),
            created_ns: now_ns,
            updated_ns: now_ns,
            usage: commit.usage,
            remote: None,
        };
        batch.delete(&commit.key);
        batch.put(&record.name, &record.encode());
        batch.write()?;
        Ok(record)
    }

    /// Removes a snapshot, durably; what it was.
    ///
    /// # Errors
    /// When there is none, or it has children; when the catalogue fails.
    pub fn remove(&self, name: &str) -> Result<SnapshotRecord, SnapshotError> {
        let catalogue = &self.store.shared.catalogue;
        let _one = self.store.shared.snapshots.lock();
        let Some(record) = self.get(name)? else { return Err(SnapshotError::NotFound { name: name.to_owned() }) };
        if catalogue.snapshot_has_children(record.id)? {
            return Err(SnapshotError::HasChildren { name: name.to_owned() });
        }
        let mut batch = catalogue.snapshot_batch();
        batch.delete(name);
        if let Some(parent) = &record.parent
            && let Some(parent) = self.get(parent)?
        {
            batch.unlink(parent.id, record.id);
        }
        batch.write()?;
        Ok(record)
    }

    /// Changes a snapshot's labels, durably; what it is now.
    ///
    /// # Errors
    /// When there is none; when the catalogue fails.
    pub fn change_labels(&self, name: &str, change: LabelChange) -> Result<SnapshotRecord, SnapshotError> {
        let _one = self.store.shared.snapshots.lock();
        let Some(mut record) = self.get(name)? else { return Err(SnapshotError::NotFound { name: name.to_owned() }) };
        record.labels = without_empty(match change {
            LabelChange::All(labels) => labels,
            LabelChange::Some(labels) => {
                let mut all = record.labels;
                all.extend(labels);
                all
            }
        });
        // Never before it was made, whatever the clock does.
        record.updated_ns = now_ns().max(record.created_ns);
        let mut batch = self.store.shared.catalogue.snapshot_batch();
        batch.put(name, &record.encode());
        batch.write()?;
        Ok(record)
    }

    /// A snapshot.
    ///
    /// # Errors
    /// When the catalogue cannot be read, or the record is damaged.
    pub fn get(&self, name: &str) -> Result<Option<SnapshotRecord>, StoreError> {
        let json = self.store.shared.catalogue.snapshot(name)?;
        json.map(|json| SnapshotRecord::decode(name, &json)).transpose()
    }

    /// The snapshot `name` and everything below it, the nearest first.
    ///
    /// # Errors
    /// When one of them does not exist; when the catalogue cannot be read.
    pub fn chain(&self, name: &str) -> Result<Vec<SnapshotRecord>, SnapshotError> {
        let mut chain: Vec<SnapshotRecord> = Vec::new();
        let mut next = Some(name.to_owned());
        while let Some(name) = next.take() {
            let Some(record) = self.get(&name)? else { return Err(SnapshotError::NotFound { name }) };
            next.clone_from(&record.parent);
            chain.push(record);
            if chain.len() > CHAIN_LEN_MAX {
                let reason = format!("it has more than {CHAIN_LEN_MAX} snapshots below it");
                return Err(StoreError::Damaged { record: format!("snapshot {}", chain[0].name), reason }.into());
            }
        }
        Ok(chain)
    }

    /// All snapshots by name, as they are at one moment.
    ///
    /// # Errors
    /// When the catalogue cannot be read, or a record is damaged: what is left out here would be taken for garbage.
    pub fn list(&self) -> Result<Vec<SnapshotRecord>, StoreError> {
        let records = self.store.shared.catalogue.snapshots()?;
        records.iter().map(|(name, json)| SnapshotRecord::decode(name, json)).collect()
    }

    fn parent(&self, name: Option<&str>) -> Result<Option<SnapshotRecord>, SnapshotError> {
        let Some(name) = name else { return Ok(None) };
        match self.get(name)? {
            None => Err(SnapshotError::ParentNotFound { name: name.to_owned() }),
            Some(parent) if parent.kind != SnapshotKind::Committed => {
                Err(SnapshotError::ParentNotCommitted { name: name.to_owned() })
            }
            parent => Ok(parent),
        }
    }
}

/// containerd's rule: a label without a value is no label.
fn without_empty(mut labels: BTreeMap<String, String>) -> BTreeMap<String, String> {
    labels.retain(|_, value| !value.is_empty());
    labels
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // 64 bits of nanoseconds last until the year 2554.
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::config::StoreConfig;

    fn open(dir: &std::path::Path) -> Arc<Store> {
        Store::open(StoreConfig::new(dir.join("store"))).expect("opens")
    }

    fn new(
        store: &Store,
        name: &str,
        parent: Option<&str>,
        kind: SnapshotKind,
    ) -> Result<SnapshotRecord, SnapshotError> {
        store.snapshots().insert(NewSnapshot {
            id: store.snapshots().take_id()?,
            name: name.to_owned(),
            kind,
            parent: parent.map(str::to_owned),
            labels: BTreeMap::from([("a".to_owned(), "1".to_owned()), ("none".to_owned(), String::new())]),
            remote: None,
        })
    }

    fn commit(store: &Store, key: &str, name: &str, parent: Option<&str>) -> Result<SnapshotRecord, SnapshotError> {
        store.snapshots().commit(Commit {
            key: key.to_owned(),
            name: name.to_owned(),
            labels: BTreeMap::new(),
            parent: parent.map(str::to_owned),
            usage: SnapshotUsage { size_bytes: 4096, inodes: 1 },
        })
    }

    #[test]
    fn rules_between_snapshots_hold() {
        let dir = tempfile::tempdir().expect("a folder");
        let store = open(dir.path());
        let snapshots = store.snapshots();
        let active = new(&store, "active", None, SnapshotKind::Active).expect("inserts");
        assert_eq!(active.labels.len(), 1, "a label without a value is no label");
        assert!(matches!(new(&store, "active", None, SnapshotKind::View), Err(SnapshotError::Exists { .. })));
        let on_active = new(&store, "b", Some("active"), SnapshotKind::Active);
        assert!(matches!(on_active, Err(SnapshotError::ParentNotCommitted { .. })));
        let on_nothing = new(&store, "b", Some("nothing"), SnapshotKind::Active);
        assert!(matches!(on_nothing, Err(SnapshotError::ParentNotFound { .. })));

        let layer = commit(&store, "active", "layer", None).expect("commits");
        assert_eq!((layer.id, layer.labels.len(), layer.usage.inodes), (active.id, 0, 1));
        assert!(matches!(commit(&store, "active", "x", None), Err(SnapshotError::NotFound { .. })));
        assert!(matches!(commit(&store, "layer", "x", None), Err(SnapshotError::NotActive { .. })));

        new(&store, "view", Some("layer"), SnapshotKind::View).expect("inserts");
        assert!(matches!(snapshots.remove("layer"), Err(SnapshotError::HasChildren { .. })));
        assert!(matches!(commit(&store, "view", "x", None), Err(SnapshotError::NotActive { .. })));
        snapshots.remove("view").expect("removes");
        snapshots.remove("layer").expect("removes");
        assert!(matches!(snapshots.remove("layer"), Err(SnapshotError::NotFound { .. })));
        assert_eq!(snapshots.list().expect("lists"), []);
    }

    #[test]
    fn a_parent_may_come_with_the_commit_and_not_change() {
        let dir = tempfile::tempdir().expect("a folder");
        let store = open(dir.path());
        for (key, name) in [("a", "low"), ("b", "other")] {
            new(&store, key, None, SnapshotKind::Active).expect("inserts");
            commit(&store, key, name, None).expect("commits");
        }
        new(&store, "free", None, SnapshotKind::Active).expect("inserts");
        assert!(matches!(commit(&store, "free", "top", Some("free")), Err(SnapshotError::ParentNotCommitted { .. })));
        assert!(matches!(commit(&store, "free", "top", Some("none")), Err(SnapshotError::ParentNotFound { .. })));
        let top = commit(&store, "free", "top", Some("low")).expect("commits");
        assert_eq!(top.parent.as_deref(), Some("low"));
        assert!(matches!(store.snapshots().remove("low"), Err(SnapshotError::HasChildren { .. })));
        new(&store, "bound", Some("low"), SnapshotKind::Active).expect("inserts");
        assert!(matches!(commit(&store, "bound", "x", Some("other")), Err(SnapshotError::ParentChanged { .. })));
        commit(&store, "bound", "x", Some("low")).expect("the same parent is no change");
        let chain = store.snapshots().chain("x").expect("a chain");
        assert_eq!(chain.iter().map(|record| record.name.as_str()).collect::<Vec<_>>(), ["x", "low"]);
    }

    #[test]
    fn what_was_returned_survives_a_crash_and_numbers_are_never_used_twice() {
        let dir = tempfile::tempdir().expect("a folder");
        let store = open(dir.path());
        let first = new(&store, "first", None, SnapshotKind::Active).expect("inserts");
        let change =
            LabelChange::Some(BTreeMap::from([("b".to_owned(), "2".to_owned()), ("a".to_owned(), String::new())]));
        let changed = store.snapshots().change_labels("first", change).expect("changes");
        assert_eq!(changed.labels, BTreeMap::from([("b".to_owned(), "2".to_owned())]));
        assert!(changed.updated_ns >= first.updated_ns);
        let unused = store.snapshots().take_id().expect("a number");
        Store::abandon(store);
        let store = open(dir.path());
        assert_eq!(store.snapshots().get("first").expect("reads"), Some(changed));
        assert!(store.snapshots().take_id().expect("a number") > unused);
    }
}
