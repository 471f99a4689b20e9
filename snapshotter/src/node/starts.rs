//! The starts of the images that this node shows: recorded, and fetched ahead of.
//!
//! A start begins with the mount of a tree, before it can be seen, so that no read of it is missed, and ends when it has
//! settled or the tree is unmounted; then its record is kept. A daemon that ends drops the records under way.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hermes_image::ids::{DiffId, Digest};
use hermes_image::index::chunks::ChunkTable;
use hermes_policy::profile::{Donor, PrefetchLimits, Profile, START_MAX_MS, codec};
use hermes_store::ImageRecord;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::{Inner, MountedImage, NodeError};
use crate::controller::Controller;
use crate::fetch::{FetchHandle, OpenLayer};
use crate::metrics::{PrefetchedBytes, RECORDED, StartRecordEnd};
use crate::profile::{
    PathIndex, PrefetchEnd, PrefetchJob, Profiles, Start, StartLayer, Wanted, report_steps, summary, touches,
};
use crate::status::{ProfileOrigin, ProfileReport, StartStatus};

/// How often it is looked whether a start has settled.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long an unmount waits for the record to be kept: one write.
const KEEP_TIMEOUT: Duration = Duration::from_secs(5);
/// How long after its mount it may be said that a start explores: all of it is over then.
const EXPLORE_WAIT: Duration = Duration::from_millis(START_MAX_MS as u64);
/// How long a prefetch waits to hear what peers have of an earlier version: some round trips, and an index of 200 KB.
const DONORS_WAIT: Duration = Duration::from_millis(500);
/// Share of the store's budget that may be fetched ahead of one start: others start too.
const BUDGET_SHARE: u64 = 4;

/// What all starts need.
#[derive(Debug)]
pub(super) struct Starts {
    pub(super) profiles: Profiles,
    pub(super) fetch: FetchHandle,
    pub(super) budget_bytes: Option<u64>,
    /// Is told of every start, to make a profile for all nodes.
    pub(super) controller: Option<Arc<Controller>>,
}

/// What is known of a start while it goes on.
#[derive(Debug, Default)]
struct View {
    recorded: Mutex<bool>,
    origin: Mutex<Option<ProfileOrigin>>,
    /// Whether there is a profile, once that is known.
    has_profile: watch::Sender<Option<bool>>,
    /// Whether more than what is read may be fetched without a profile.
    may_explore: watch::Sender<bool>,
    ended: Mutex<Option<&'static str>>,
    fetched_bytes: Arc<AtomicU64>,
    used_bytes: AtomicU64,
}

/// The start of a container, for whom it is prepared for.
pub(super) struct ContainerStart {
    view: Weak<View>,
}

impl ContainerStart {
    /// Whether no profile knows what it reads. Waits until that is known; false when it is over before.
    pub(super) async fn is_unknown(&self) -> bool {
        let Some(mut has_profile) = self.view.upgrade().map(|view| view.has_profile.subscribe()) else { return false };
        has_profile.wait_for(Option::is_some).await.is_ok_and(|found| *found == Some(false))
    }

    /// As far as no profile knows what it reads, it is fetched around that from now on.
    pub(super) fn explore(&self) {
        if let Some(view) = self.view.upgrade() {
            view.may_explore.send_replace(true);
        }
    }
}

/// A start under way. Dropping it ends it, and its record is lost.
#[derive(Debug)]
pub(super) struct RunningStart {
    /// The work's own: what is recorded ends with that, not with the mount.
    start: Weak<Start>,
    view: Arc<View>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Drop for RunningStart {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl RunningStart {
    /// Ends it and keeps its record.
    pub(super) async fn end(mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if tokio::time::timeout(KEEP_TIMEOUT, &mut self.task).await.is_err() {
            tracing::warn!("the record of a start is not kept in time, and lost");
        }
    }

    /// How it stands.
    pub(super) fn status(&self) -> StartStatus {
        let used = match self.start.upgrade() {
            Some(start) => start.look(&BTreeMap::new()).seen.used_bytes,
            None => self.view.used_bytes.load(Ordering::Relaxed),
        };
        StartStatus {
            recording: !*self.view.recorded.lock(),
            profile: *self.view.origin.lock(),
            prefetch_ended: self.view.ended.lock().map(str::to_owned),
            prefetched_bytes: self.view.fetched_bytes.load(Ordering::Relaxed),
            used_bytes: used,
        }
    }
}

impl MountedImage {
    /// Ends its start, if that still goes on, and keeps the record.
    pub(super) async fn end_start(&mut self) {
        if let Some(start) = self.start.take() {
            start.end().await;
        }
    }
}

/// One start's work.
struct Work {
    manifest: Digest,
    start: Arc<Start>,
    view: Arc<View>,
    profiles: Profiles,
    controller: Option<Arc<Controller>>,
    job: PrefetchJob,
    wanted: Wanted,
}

impl Starts {
    /// Begins to record reads of `layers`, but for those that are read `directly`. To be called before anybody can read.
    pub(super) fn claim(layers: &[Arc<OpenLayer>], directly: impl Fn(&OpenLayer) -> bool) -> Start {
        let layers = layers.iter().map(|layer| StartLayer {
            diff_id: layer.diff_id(),
            table: layer.layer.table().clone(),
            touches: (!directly(layer)).then(|| Arc::clone(&layer.touches)),
        });
        Start::begin(layers.collect())
    }

    /// Goes on with `start`, now that the tree can be seen; `None` when nothing of it can be.
    pub(super) fn run(
        &self,
        start: Start,
        manifest: Digest,
        reference: &str,
        layers: &[Arc<OpenLayer>],
    ) -> Option<RunningStart> {
        if start.is_blind() {
            return None;
        }
        let share = self.budget_bytes.map_or(u64::MAX, |budget| budget / BUDGET_SHARE);
        let within = |limits: PrefetchLimits| PrefetchLimits { ahead_bytes: limits.ahead_bytes.min(share), ..limits };
        let (start, view) = (Arc::new(start), Arc::<View>::default());
        let work = Work {
            manifest,
            start: Arc::clone(&start),
            view: Arc::clone(&view),
            profiles: self.profiles.clone(),
            controller: self.controller.clone(),
            job: PrefetchJob {
                start: Arc::clone(&start),
                layers: layers.to_vec(),
                fetch: self.fetch.clone(),
                limits: within(PrefetchLimits::default()),
                near_limits: within(PrefetchLimits::near()),
                fetched_bytes: Arc::clone(&view.fetched_bytes),
            },
            wanted: Wanted {
                manifest,
                reference: reference.to_owned(),
                tables: layers.iter().map(|layer| layer.layer.table().clone()).collect(),
            },
        };
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(work.run(stopped));
        Some(RunningStart { start: Arc::downgrade(&start), view, stop: Some(stop), task })
    }
}

impl Work {
    async fn run(self, stopped: oneshot::Receiver<()>) {
        let both = async { tokio::join!(self.record(), self.prefetch()) };
        tokio::select! {
            _ = both => {}
            // Also when whoever could stop it is gone.
            _ = stopped => {}
        }
        self.keep().await;
        let look = self.start.look(&BTreeMap::new());
        let used = look.seen.used_bytes;
        self.view.used_bytes.store(used, Ordering::Relaxed);
        RECORDED.prefetched(PrefetchedBytes::Used, used);
        RECORDED.prefetched(PrefetchedBytes::Wasted, look.prefetched_bytes.saturating_sub(used));
    }

    /// Keeps the record when the start has settled.
    async fn record(&self) {
        let began = Instant::now();
        while !self.start.look(&BTreeMap::new()).is_over(began.elapsed()) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        self.keep().await;
    }

    /// Keeps the record, unless that was done.
    async fn keep(&self) {
        if std::mem::replace(&mut *self.view.recorded.lock(), true) {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let Some(record) = self.start.record(now) else { return RECORDED.start_recorded(StartRecordEnd::Empty) };
        let (manifest, chunks, length_ms) = (self.manifest, record.chunk_count(), record.length_ms());
        if let Some(controller) = &self.controller {
            controller.offer_start(manifest, codec::encode_record(&record));
        }
        let profiles = self.profiles.clone();
        let kept = tokio::task::spawn_blocking(move || profiles.add_record(manifest, record)).await;
        match kept {
            Ok(Ok(())) => tracing::info!(%manifest, chunks, length_ms, "a start is recorded"),
            Ok(Err(error)) => {
                RECORDED.start_recorded(StartRecordEnd::Failed);
                tracing::warn!(%manifest, %error, "the record of a start is lost");
            }
            Err(_) => RECORDED.start_recorded(StartRecordEnd::Failed),
        }
    }

    async fn prefetch(&self) {
        let found = self.profiles.find(self.wanted.clone()).await;
        self.view.has_profile.send_replace(Some(found.is_some()));
        let by_profile = match &found {
            Some((profile, origin)) => {
                *self.view.origin.lock() = Some(*origin);
                self.take_donors(profile).await;
                Some(self.job.run(profile).await)
            }
            None => None,
        };
        let profile = found.as_ref().map(|(_, origin)| origin.name());
        if let Some(end) = by_profile {
            self.fetched(profile, end);
        }
        if !matches!(by_profile, None | Some(PrefetchEnd::PoorUse)) {
            return;
        }
        let mut may_explore = self.view.may_explore.subscribe();
        let said = tokio::time::timeout(EXPLORE_WAIT, may_explore.wait_for(|may_explore| *may_explore));
        if said.await.is_ok_and(|said| said.is_ok()) {
            let end = self.job.run_near().await;
            self.fetched(None, end);
        }
    }

    /// Lets who has an earlier version give what that has in common with this one. What is not known soon is used later.
    async fn take_donors(&self, profile: &Profile) {
        let taken = self.job.layers.iter().filter_map(|open| {
            let is_of = |donor: &&Donor| profile.layers.get(usize::from(donor.layer)) == Some(&open.diff_id());
            let donors: Vec<Donor> = profile.donors.iter().filter(is_of).cloned().collect();
            if donors.is_empty() {
                return None;
            }
            let (open, fetch) = (Arc::clone(open), self.job.fetch.clone());
            // What is not known soon is found out meanwhile.
            Some(tokio::spawn(async move {
                let taken = donors.iter().map(|donor| open.take_donor(donor.diff_id, donor.table));
                if futures::future::join_all(taken).await.contains(&true) {
                    fetch.find_donors(open.diff_id()).await;
                }
            }))
        });
        let began = Instant::now();
        let taken = futures::future::join_all(taken);
        let in_time = tokio::time::timeout(DONORS_WAIT, taken).await.is_ok();
        let (donors, took) = (profile.donors.len(), began.elapsed());
        tracing::debug!(manifest = %self.manifest, donors, in_time, ?took, "peers were asked for an earlier version");
    }

    /// Takes note of the end of a prefetch, by a profile or around what was read.
    fn fetched(&self, profile: Option<&'static str>, end: PrefetchEnd) {
        self.job.settle();
        *self.view.ended.lock() = Some(end.name());
        let (manifest, bytes) = (self.manifest, self.view.fetched_bytes.load(Ordering::Relaxed));
        tracing::info!(%manifest, profile, bytes, end = end.name(), "fetched ahead of a start");
    }
}

impl Inner {
    /// The start of the tree at `dir`, which is a container's. `None` when none goes on there.
    pub(super) async fn container_start(&self, dir: &Path) -> Option<ContainerStart> {
        let images = self.images.lock().await;
        let start = images.iter().find(|image| image.dir == dir)?.start.as_ref()?;
        Some(ContainerStart { view: Arc::downgrade(&start.view) })
    }

    /// The image called `image`, or mounted at `dir`, or with the digest that `image` is; of several with one name the one that
    /// was used last.
    async fn known_image(&self, image: &str, dir: &Path) -> Result<ImageRecord, NodeError> {
        let mounted = {
            let images = self.images.lock().await;
            let found = images.iter().find(|mounted| mounted.dir == dir);
            let found = found.or_else(|| images.iter().rev().find(|mounted| mounted.reference == image));
            found.map(|mounted| mounted.manifest)
        };
        let manifest = mounted.or_else(|| image.parse().ok());
        let mut known = self.store.images()?;
        known.retain(|record| manifest.map_or(record.reference == image, |manifest| record.manifest == manifest));
        let newest = known.into_iter().max_by_key(|record| record.last_use_seconds);
        newest.ok_or_else(|| NodeError::UnknownImage { image: image.to_owned(), dir: dir.to_owned() })
    }

    /// What is known of the starts of an image; with the names of files when `files` are wanted.
    pub(super) async fn profile_report(
        self: &Arc<Self>,
        image: &str,
        dir: &Path,
        files: bool,
    ) -> Result<ProfileReport, NodeError> {
        let record = self.known_image(image, dir).await?;
        let node = Arc::clone(self);
        let made = tokio::task::spawn_blocking(move || node.make_report(&record, files)).await;
        made.map_err(|_| NodeError::Interrupted)?
    }

    fn make_report(&self, record: &ImageRecord, files: bool) -> Result<ProfileReport, NodeError> {
        let mut tables: BTreeMap<DiffId, ChunkTable> = BTreeMap::new();
        for layer in &record.layers {
            if let Some(bytes) = self.store.artifact(layer.chunks)?
                && let Ok(table) = ChunkTable::decode(bytes)
            {
                tables.insert(layer.diff_id, table);
            }
        }
        let kept = self.profiling.profiles.kept(record.manifest);
        let tree = match record.tree.filter(|_| files) {
            Some(tree) => self.store.artifact(tree)?,
            None => None,
        };
        let layers: Vec<DiffId> = record.layers.iter().map(|layer| layer.diff_id).collect();
        let paths = tree.map(|tree| PathIndex::of(tree, &layers));
        let chosen = kept.chosen();
        let profile = chosen.as_ref().map(|(profile, _)| profile);
        let newest = kept.records.first();
        Ok(ProfileReport {
            reference: record.reference.clone(),
            manifest: record.manifest,
            image_bytes: tables.values().map(ChunkTable::logical_len_bytes).sum(),
            origin: chosen.as_ref().map(|(_, origin)| *origin),
            records: profile.map_or(0, |profile| profile.records),
            newest_seconds: profile.map_or(0, |profile| profile.newest_seconds),
            steps: profile.map(|profile| report_steps(profile, &tables, paths.as_ref())).unwrap_or_default(),
            encoded: profile.map(|profile| hex::encode(codec::encode(profile))).unwrap_or_default(),
            starts: kept.records.iter().map(|record| summary(record, &tables)).collect(),
            touches: newest.map(|record| touches(record, &tables)).unwrap_or_default(),
        })
    }

    /// Keeps a profile that somebody hands in.
    pub(super) async fn import_profile(&self, image: &str, dir: &Path, encoded: &str) -> Result<(), NodeError> {
        let record = self.known_image(image, dir).await?;
        let wrong = |reason: String| NodeError::Address(format!("the profile is not taken: {reason}"));
        let bytes = hex::decode(encoded).map_err(|error| wrong(error.to_string()))?;
        let profile = codec::decode(&bytes).map_err(|error| wrong(error.to_string()))?;
        let is_of_it = |layer: &DiffId| record.layers.iter().any(|known| known.diff_id == *layer);
        if !profile.layers.iter().any(is_of_it) {
            return Err(wrong(format!("it is of none of the layers of {}", record.reference)));
        }
        let (profiles, manifest) = (self.profiling.profiles.clone(), record.manifest);
        let kept = tokio::task::spawn_blocking(move || profiles.put_given(manifest, &profile)).await;
        Ok(kept.map_err(|_| NodeError::Interrupted)??)
    }
}
