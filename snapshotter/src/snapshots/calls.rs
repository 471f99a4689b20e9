//! What each call does, apart from how it is asked for.
//!
//! Records and directories are handled on blocking threads, trees on the async side. The order is what makes a crash
//! harmless: tree shown, directory made, record written; record removed, tree released, directory deleted.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::StreamExt as _;
use hermes_containerd_api::types::Mount;
use hermes_store::{
    Commit, LabelChange, NewSnapshot, SnapshotError, SnapshotKind, SnapshotRecord, SnapshotUsage, Store,
};
use tokio_util::task::TaskTracker;

use super::directories::{Directories, disk_usage};
use super::error::{CallError, ServiceError};
use super::filter::Filters;
use super::id_map::IdMap;
use super::images::{Decision, Images, PulledLayer, RemoteChain, TARGET_LABEL};
use super::mapped;
use super::overlay::{Features, GROUP_MAPPING, Stack, USER_MAPPING, can_be_option};
use super::trees::Trees;

/// Longest name of a snapshot, in bytes. containerd's are a namespace, a number and a digest or a container's id.
const NAME_MAX_BYTES: usize = 4096;
/// Longest label, key and value together, in bytes: containerd's own limit.
const LABEL_MAX_BYTES: usize = 4096;
/// Trees that are shown again at once when the service starts.
const RESTORE_AT_ONCE: usize = 8;

/// What all calls share.
#[derive(Debug)]
pub(super) struct Snapshotter {
    store: Arc<Store>,
    directories: Directories,
    images: Arc<dyn Images>,
    trees: Trees,
    features: Features,
    /// Everything that outlives the call that began it.
    pub(super) tasks: TaskTracker,
    /// A sweep is about to begin.
    sweep_due: AtomicBool,
    /// One sweep at a time.
    sweeping: tokio::sync::Mutex<()>,
}

/// A snapshot to be made.
#[derive(Debug)]
pub(super) struct Create {
    pub(super) kind: SnapshotKind,
    pub(super) key: String,
    pub(super) parent: Option<String>,
    pub(super) labels: BTreeMap<String, String>,
}

impl Snapshotter {
    /// Takes up what an earlier process left: directories without records go, trees that snapshots need are shown.
    pub(super) async fn start(
        store: Arc<Store>,
        root: PathBuf,
        images: Arc<dyn Images>,
    ) -> Result<Arc<Self>, ServiceError> {
        let open =
            tokio::task::spawn_blocking(move || Ok::<_, ServiceError>((Directories::open(&root)?, Features::probe())));
        let (directories, features) = open.await.map_err(|_| ServiceError::Interrupted)??;
        let snapshotter = Arc::new(Self {
            store,
            directories,
            trees: Trees::new(Arc::clone(&images)),
            images,
            features,
            tasks: TaskTracker::new(),
            sweep_due: AtomicBool::new(false),
            sweeping: tokio::sync::Mutex::default(),
        });
        let records = snapshotter
            .blocking(|this| {
                let collected = this.collect()?;
                let records = this.store.snapshots().list()?;
                for record in records.iter().filter(|record| record.remote.is_none()) {
                    if !this.directories.exists(record.id) {
                        let name = &record.name;
                        tracing::error!(
                            name,
                            id = record.id,
                            "a snapshot has lost its directory; remove and pull its image"
                        );
                    }
                }
                tracing::info!(snapshots = records.len(), collected, "snapshots opened");
                Ok::<_, ServiceError>(records)
            })
            .await?;
        snapshotter.restore(records).await?;
        snapshotter.sweep_soon();
        Ok(snapshotter)
    }

    /// Shows the trees that snapshots need. One that cannot be shown is tried again when its mounts are asked for.
    async fn restore(self: &Arc<Self>, records: Vec<SnapshotRecord>) -> Result<(), ServiceError> {
        let used = records.into_iter().filter(|record| record.kind != SnapshotKind::Committed);
        let shows = used.map(|record| async move {
            let chain = self.chain(record.parent.clone()).await?;
            if let Some(remote) = RemoteChain::topmost(&chain)
                && let Err(error) = self.trees.need_again(&remote, record.id).await
            {
                tracing::error!(name = record.name, chain = %remote.layer.chain, %error, "a tree cannot be shown again");
            }
            Ok::<_, CallError>(())
        });
        let mut shows = futures::stream::iter(shows).buffer_unordered(RESTORE_AT_ONCE);
        while let Some(shown) = shows.next().await {
            if let Err(error) = shown {
                tracing::error!(%error, "a snapshot's layers cannot be found");
            }
        }
        Ok(())
    }

    /// Runs what waits for the disk.
    async fn blocking<T, E>(self: &Arc<Self>, work: impl FnOnce(&Self) -> Result<T, E> + Send + 'static) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<ServiceError> + Send + 'static,
    {
        let this = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(&this)).await;
        done.unwrap_or_else(|_| Err(ServiceError::Interrupted.into()))
    }

    /// The snapshot `name` and all below; nothing for none.
    async fn chain(self: &Arc<Self>, name: Option<String>) -> Result<Vec<SnapshotRecord>, CallError> {
        let Some(name) = name else { return Ok(Vec::new()) };
        self.blocking(move |this| Ok(this.store.snapshots().chain(&name)?)).await
    }

    /// Makes an active snapshot or a view; its mounts.
    pub(super) async fn create(self: Arc<Self>, create: Create) -> Result<Vec<Mount>, CallError> {
        check_name(&create.key)?;
        check_labels(&create.labels)?;
        let (key, parent) = (create.key.clone(), create.parent.clone());
        let chain = self.blocking(move |this| this.parents_of_new(&key, parent)).await?;
        let mapped_root = self.mapping(&create.labels, &chain)?.map(|(users, groups)| (users.root(), groups.root()));
        if create.kind == SnapshotKind::Active
            && let Some(target) = create.labels.get(TARGET_LABEL).filter(|target| !target.is_empty())
        {
            check_name(target)?;
            self.commit_remote(&create, target, &chain).await?;
        }
        let id = self.blocking(|this| Ok::<_, CallError>(this.store.snapshots().take_id()?)).await?;
        let remote = RemoteChain::topmost(&chain);
        let lower = match self.lower(&chain, remote.as_ref(), id).await {
            Ok(lower) => lower,
            Err(error) => {
                self.tree_done(remote.as_ref(), id).await;
                return Err(error);
            }
        };
        let mounts = self
            .blocking(move |this| {
                let record = this.make(create, id, mapped_root, lower.first())?;
                this.mounts(&record, &chain, lower).inspect_err(|_| this.unmake(&record))
            })
            .await;
        if mounts.is_err() {
            self.tree_done(remote.as_ref(), id).await;
        }
        mounts
    }

    /// What a new snapshot would stand on; refuses early what the catalogue would refuse in the end.
    fn parents_of_new(&self, key: &str, parent: Option<String>) -> Result<Vec<SnapshotRecord>, CallError> {
        let snapshots = self.store.snapshots();
        if snapshots.get(key)?.is_some() {
            return Err(SnapshotError::Exists { name: key.to_owned() }.into());
        }
        let Some(parent) = parent else { return Ok(Vec::new()) };
        let chain = snapshots.chain(&parent).map_err(|error| match error {
            SnapshotError::NotFound { name } => SnapshotError::ParentNotFound { name },
            other => other,
        })?;
        if chain.first().is_some_and(|parent| parent.kind != SnapshotKind::Committed) {
            return Err(SnapshotError::ParentNotCommitted { name: parent }.into());
        }
        Ok(chain)
    }

    /// Asks whether what is to be unpacked is shown lazily. If so it is committed at once, and the answer is the error
    /// that has containerd look for it.
    async fn commit_remote(
        self: &Arc<Self>,
        create: &Create,
        target: &str,
        chain: &[SnapshotRecord],
    ) -> Result<(), CallError> {
        let layer = PulledLayer {
            key: create.key.clone(),
            target: target.to_owned(),
            labels: create.labels.clone(),
            below: chain.to_vec(),
        };
        let remote = match self.images.decide(&layer).await {
            Decision::Lazy(remote) => remote,
            Decision::Plain { reason } => {
                tracing::debug!(target, reason, "the layer is downloaded and unpacked");
                return Ok(());
            }
        };
        let (target, labels, parent) = (layer.target, layer.labels, create.parent.clone());
        self.blocking(move |this| {
            let snapshots = this.store.snapshots();
            // containerd finds it by its target and its parent, whatever its name: another namespace may share it.
            let found = snapshots.list()?.into_iter().any(|record| {
                let same_target = record.labels.get(TARGET_LABEL) == Some(&target);
                record.remote.is_some() && same_target && record.parent == parent
            });
            if !found {
                let id = snapshots.take_id()?;
                // The target's name is taken where the same layer stands on another parent.
                let taken = snapshots.get(&target)?.is_some();
                let name = if taken { format!("{target}@{id}") } else { target.clone() };
                let kind = SnapshotKind::Committed;
                snapshots.insert(NewSnapshot { id, name, kind, parent, labels, remote: Some(remote) })?;
            }
            Err(CallError::ShownLazily { target })
        })
        .await
    }

    /// The directories below a snapshot, the nearest first. Plain layers have their own; the uppermost remote one has a
    /// tree, in which everything below is contained.
    async fn lower(
        &self,
        chain: &[SnapshotRecord],
        remote: Option<&RemoteChain>,
        user: u64,
    ) -> Result<Vec<PathBuf>, CallError> {
        let plain = chain.iter().take_while(|record| record.remote.is_none());
        let mut lower: Vec<PathBuf> = plain.map(|record| self.directories.layer(record.id)).collect();
        if let Some(remote) = remote {
            let tree = self.trees.need(remote, user).await?;
            if !can_be_option(&tree) {
                let message = format!("the tree's path {} cannot stand in mount options", tree.display());
                return Err(super::images::ImagesError::Failed(message).into());
            }
            lower.push(tree);
        }
        Ok(lower)
    }

    async fn tree_done(&self, remote: Option<&RemoteChain>, user: u64) {
        if let Some(remote) = remote {
            self.trees.done(remote, user).await;
        }
    }

    /// Makes the directory and the record of a snapshot.
    fn make(
        &self,
        create: Create,
        id: u64,
        mapped_root: Option<(u32, u32)>,
        parent: Option<&PathBuf>,
    ) -> Result<SnapshotRecord, CallError> {
        // The upper directory's root shows through: it belongs to whom the parent's belongs to.
        let owner = match (mapped_root, parent) {
            (Some(root), _) => Some(root),
            (None, Some(parent)) => {
                let found = std::fs::metadata(parent).map_err(ServiceError::io("look at", parent))?;
                Some((found.uid(), found.gid()))
            }
            (None, None) => None,
        };
        let Create { kind, key, parent, labels } = create;
        let insert = || {
            let new = NewSnapshot { id, name: key, kind, parent, labels, remote: None };
            Ok(self.store.snapshots().insert(new)?)
        };
        self.directories.make(id, kind == SnapshotKind::Active, owner, insert)
    }

    /// Takes back what [`Self::make`] has made, when it cannot be mounted.
    fn unmake(&self, record: &SnapshotRecord) {
        match self.store.snapshots().remove(&record.name) {
            Ok(_) => self.directories.retire(record.id),
            Err(error) => tracing::warn!(name = record.name, %error, "a snapshot that cannot be mounted stays"),
        }
    }

    fn mounts(
        &self,
        record: &SnapshotRecord,
        below: &[SnapshotRecord],
        mut lower: Vec<PathBuf>,
    ) -> Result<Vec<Mount>, CallError> {
        let option = |(label, option): (&str, &str)| record.labels.get(label).map(|map| format!("{option}={map}"));
        let mut mapping = Vec::new();
        if let Some((users, groups)) = self.mapping(&record.labels, below)? {
            if below.iter().any(|layer| layer.remote.is_some()) {
                let dir = self.directories.mapped(record.id);
                let shown = mapped::show(&dir, &lower, &users, &groups);
                lower = shown.map_err(ServiceError::io("map the ids of the layers below", &dir))?;
            } else {
                mapping.extend([USER_MAPPING, GROUP_MAPPING].into_iter().filter_map(option));
            }
        }
        let stack = Stack {
            kind: record.kind,
            upper: self.directories.layer(record.id),
            work: self.directories.work(record.id),
            lower,
            mapping,
        };
        Ok(stack.mounts(self.features))
    }

    /// How users and groups in a container are to be mapped above `below`; `None` when they are not, or when containerd
    /// has done it itself.
    fn mapping(
        &self,
        labels: &BTreeMap<String, String>,
        below: &[SnapshotRecord],
    ) -> Result<Option<(IdMap, IdMap)>, CallError> {
        let (users, groups) = match (labels.get(USER_MAPPING.0), labels.get(GROUP_MAPPING.0)) {
            (None, None) => return Ok(None),
            (Some(users), Some(groups)) => (IdMap::parse(users)?, IdMap::parse(groups)?),
            _ => {
                let message = "users are mapped and groups are not, or the reverse; give both";
                return Err(CallError::Invalid(message.to_owned()));
            }
        };
        if has_other_owners(below, &users, &groups) {
            return Ok(None);
        }
        if self.features.id_mapped { Ok(Some((users, groups))) } else { Err(CallError::NoIdMappedLayers) }
    }

    /// The mounts of a snapshot that is there.
    pub(super) async fn mounts_of(self: Arc<Self>, key: String) -> Result<Vec<Mount>, CallError> {
        let name = key.clone();
        let chain = self.blocking(move |this| Ok::<_, CallError>(this.store.snapshots().chain(&name)?)).await?;
        let mut chain = chain.into_iter();
        let Some(record) = chain.next() else {
            return Err(SnapshotError::NotFound { name: key }.into());
        };
        if record.kind == SnapshotKind::Committed {
            return Err(SnapshotError::NotActive { name: key }.into());
        }
        let below: Vec<SnapshotRecord> = chain.collect();
        let remote = RemoteChain::topmost(&below);
        let lower = self.lower(&below, remote.as_ref(), record.id).await;
        if remote.is_some() {
            // Removed meanwhile, it has told the tree so before this call needed it again.
            let found = self.blocking(move |this| Ok::<_, CallError>(this.store.snapshots().get(&key)?)).await?;
            if found.is_none_or(|found| found.id != record.id) {
                self.tree_done(remote.as_ref(), record.id).await;
                return Err(SnapshotError::NotFound { name: record.name.clone() }.into());
            }
        }
        let lower = lower?;
        self.blocking(move |this| this.mounts(&record, &below, lower)).await
    }

    /// Makes an active snapshot a committed one.
    pub(super) async fn commit(self: Arc<Self>, mut commit: Commit) -> Result<(), CallError> {
        check_name(&commit.name)?;
        check_labels(&commit.labels)?;
        let chain = self.chain(Some(commit.key.clone())).await?;
        let committed = self
            .blocking(move |this| {
                let snapshots = this.store.snapshots();
                if snapshots.get(&commit.name)?.is_some() {
                    return Err(SnapshotError::Exists { name: commit.name }.into());
                }
                match snapshots.get(&commit.key)? {
                    Some(active) if active.kind == SnapshotKind::Active => {
                        commit.usage = disk_usage(&this.directories.layer(active.id))?;
                    }
                    Some(_) => return Err(SnapshotError::NotActive { name: commit.key }.into()),
                    None => return Err(SnapshotError::NotFound { name: commit.key }.into()),
                }
                snapshots.commit(commit).map_err(|error| match error {
                    SnapshotError::ParentNotCommitted { name } => CallError::NewParentNotCommitted { name },
                    other => other.into(),
                })
            })
            .await?;
        // A layer needs no tree; what is made above it does.
        let remote = RemoteChain::topmost(chain.get(1..).unwrap_or_default());
        self.tree_done(remote.as_ref(), committed.id).await;
        Ok(())
    }

    /// Removes a snapshot; its directory goes later.
    pub(super) async fn remove(self: Arc<Self>, key: String) -> Result<(), CallError> {
        let (removed, below, layer_unused) = self
            .blocking(move |this| {
                let snapshots = this.store.snapshots();
                let chain = snapshots.chain(&key)?;
                let removed = snapshots.remove(&key)?;
                this.directories.retire(removed.id);
                let unused = match removed.remote {
                    None => None,
                    Some(layer) => {
                        let same =
                            |record: &SnapshotRecord| record.remote.is_some_and(|other| other.chain == layer.chain);
                        (!snapshots.list()?.iter().any(same)).then_some(layer)
                    }
                };
                Ok::<_, CallError>((removed, chain[1..].to_vec(), unused))
            })
            .await?;
        if removed.kind != SnapshotKind::Committed {
            self.tree_done(RemoteChain::topmost(&below).as_ref(), removed.id).await;
        }
        if let Some(layer) = layer_unused {
            self.images.removed(&layer).await;
        }
        self.sweep_soon();
        Ok(())
    }

    /// A snapshot.
    pub(super) async fn stat(self: Arc<Self>, key: String) -> Result<SnapshotRecord, CallError> {
        let found = self.blocking(move |this| match this.store.snapshots().get(&key)? {
            Some(record) => Ok(record),
            None => Err(CallError::from(SnapshotError::NotFound { name: key })),
        });
        found.await
    }

    /// Changes labels.
    pub(super) async fn update(
        self: Arc<Self>,
        name: String,
        change: LabelChange,
    ) -> Result<SnapshotRecord, CallError> {
        let (LabelChange::All(labels) | LabelChange::Some(labels)) = &change;
        check_labels(labels)?;
        self.blocking(move |this| Ok(this.store.snapshots().change_labels(&name, change)?)).await
    }

    /// The snapshots for which `filters` hold.
    pub(super) async fn list(self: Arc<Self>, filters: Vec<String>) -> Result<Vec<SnapshotRecord>, CallError> {
        let list = self.blocking(move |this| {
            let filters = Filters::parse(&filters)?;
            let mut records = this.store.snapshots().list()?;
            records.retain(|record| filters.holds(record));
            Ok(records)
        });
        list.await
    }

    /// What a snapshot takes: measured now while it is active, told by the images for a remote layer, else as it was
    /// when it was committed.
    pub(super) async fn usage(self: Arc<Self>, key: String) -> Result<SnapshotUsage, CallError> {
        let record = Arc::clone(&self).stat(key).await?;
        match (record.kind, record.remote) {
            (SnapshotKind::Active, _) => {
                self.blocking(move |this| Ok(disk_usage(&this.directories.layer(record.id))?)).await
            }
            (_, Some(layer)) => Ok(self.images.usage(&layer).await?),
            _ => Ok(record.usage),
        }
    }

    /// Deletes what removed snapshots and crashes have left, and waits until that is done.
    pub(super) async fn cleanup(self: Arc<Self>) -> Result<(), CallError> {
        let _one = self.sweeping.lock().await;
        self.blocking(|this| {
            this.collect()?;
            Ok(this.directories.delete_removed()?)
        })
        .await
    }

    fn collect(&self) -> Result<u64, ServiceError> {
        let known = || -> Result<BTreeSet<u64>, ServiceError> {
            Ok(self.store.snapshots().list()?.iter().map(|record| record.id).collect())
        };
        self.directories.collect(known)
    }

    /// Has removed directories deleted in the background.
    fn sweep_soon(self: &Arc<Self>) {
        if self.sweep_due.swap(true, Ordering::AcqRel) {
            return;
        }
        let this = Arc::clone(self);
        self.tasks.spawn(async move {
            let _one = this.sweeping.lock().await;
            this.sweep_due.store(false, Ordering::Release);
            if let Err(error) = this.blocking(|this| this.directories.delete_removed()).await {
                tracing::warn!(%error, "removed snapshots wait for the next cleanup");
            }
        });
    }
}

/// Whether containerd has made the nearest layer itself to change the owners of everything below, which it does where it
/// does not know of the capability `remap-ids`. It names such a layer after the one below and the ids of root
/// (`resolveSnapshotOptions` in its client).
fn has_other_owners(below: &[SnapshotRecord], users: &IdMap, groups: &IdMap) -> bool {
    let [changed, original, ..] = below else { return false };
    // containerd calls a snapshot NAMESPACE/NUMBER/KEY here; one that is shown lazily may have another name than it knows.
    fn key(name: &str) -> &str {
        name.splitn(3, '/').nth(2).unwrap_or(name)
    }
    let original = original.labels.get(TARGET_LABEL).filter(|_| original.remote.is_some()).unwrap_or(&original.name);
    key(&changed.name) == format!("{}-{}-{}", key(original), users.root(), groups.root())
}

fn check_name(name: &str) -> Result<(), CallError> {
    if name.is_empty() || name.len() > NAME_MAX_BYTES {
        return Err(CallError::Invalid(format!("a snapshot's name has 1 to {NAME_MAX_BYTES} bytes")));
    }
    Ok(())
}

fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), CallError> {
    match labels.iter().find(|(key, value)| key.len() + value.len() > LABEL_MAX_BYTES) {
        Some((key, _)) => {
            let key: String = key.chars().take(64).collect();
            Err(CallError::Invalid(format!("label '{key}' and its value have more than {LABEL_MAX_BYTES} bytes")))
        }
        None => Ok(()),
    }
}
