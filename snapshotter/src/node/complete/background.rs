//! Completing images by itself, one after the other, in the background of whoever reads.
//!
//! An image is completed when the start that it was mounted for has settled ([`hermes_policy::completion`]; at once with
//! [`CompleteMode::Full`]). What is missing is fetched in rounds of [`ROUND_PARTS`] parts; before each part it is looked
//! at whether somebody has paused it, whether a reader waits, whether the rate allows it, and whether the store has room
//! without evicting anything. When an image is whole its layers are synced, so that whoever mounts it next lets the
//! kernel read the files themselves.
//!
//! **Invariant:** never in the way: parts are asked for as what nobody waits for, on few lanes (each is a decoder's worth
//! of work), and begin only while no reader waits. Never at another's cost: what would have to evict does not begin.
//!
//! Nothing of it is kept but whether it is paused: after a crash or a restart, what is missing of what is mounted is
//! fetched as if it had just been prepared. What came before is there.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use hermes_policy::completion::{self, Pace, Room};
use parking_lot::Mutex;

use super::{PART_MAX, Part, sync_layers};
use crate::config::{CompleteMode, NodeConfig};
use crate::fetch::{MountNo, OpenLayer};
use crate::node::{Inner, NodeError};
use crate::status::{CompletionState, CompletionStatus};

/// How often it is looked whether an image has settled.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Parts of one round; after it another image may be the next.
const ROUND_PARTS: usize = 16;
/// Parts at a time with [`CompleteMode::Full`]: as many as fill all requests that the policy has under way at a registry.
const FULL_LANES: usize = 32;
/// Of so many cores, one decodes what nobody waits for.
const CORES_PER_LANE: usize = 4;
/// How long a part waits before it looks again whether a reader waits, or it is paused.
const READERS_PAUSE: Duration = Duration::from_millis(50);
/// Longest that parts wait for readers who never stop: then they take their turn behind them in the policy.
const READERS_PATIENCE: Duration = Duration::from_secs(10);
/// Longest that one part waits for its bytes before the image is left alone for a while: 4 MiB at 60 kbit/s.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long an image is left alone after it failed, or had no room.
const REST: Duration = Duration::from_secs(60);
/// Room that is left to readers on demand: a 32nd of the budget, as the store evicts by.
const MARGIN_BUDGET_SHARE: u64 = 32;
/// Within these bounds, in bytes; the upper one where there is no budget.
const MARGIN_MIN_BYTES: u64 = 1 << 20;
const MARGIN_MAX_BYTES: u64 = 64 << 20;
/// The file in the state folder that says that completion is paused.
const PAUSED_FILE: &str = "completion-paused";

/// What completing images goes by, and how far it is.
#[derive(Debug)]
pub(in crate::node) struct Completion {
    mode: CompleteMode,
    rate_bytes_per_second: u64,
    paused_path: PathBuf,
    paused: AtomicBool,
    /// Another one on each node.
    node_number: u64,
    started: Instant,
    pace: Mutex<Pace>,
    /// What is known of images that are not simply waiting for their start to settle.
    states: Mutex<BTreeMap<MountNo, Standing>>,
    fetched_bytes: AtomicU64,
    completed_images: AtomicU64,
}

/// How an image stands.
#[derive(Debug, Clone)]
struct Standing {
    state: CompletionState,
    /// Not looked at before.
    rests_until: Option<Instant>,
}

impl Completion {
    /// By `config`; `node_number` is another one on each node.
    pub(in crate::node) fn new(config: &NodeConfig, node_number: u64) -> Self {
        let paused_path = config.state.join(PAUSED_FILE);
        Self {
            mode: config.complete,
            rate_bytes_per_second: config.complete_rate_bytes_per_second,
            paused: AtomicBool::new(paused_path.exists()),
            paused_path,
            node_number,
            started: Instant::now(),
            pace: Mutex::new(Pace::new(config.complete_rate_bytes_per_second)),
            states: Mutex::default(),
            fetched_bytes: AtomicU64::new(0),
            completed_images: AtomicU64::new(0),
        }
    }

    /// Another one on each node.
    pub(super) fn node_number(&self) -> u64 {
        self.node_number
    }

    /// Pauses, or goes on, also after a restart and a power cut. Going on, it looks at once at what it had left alone for a
    /// while.
    ///
    /// # Errors
    /// When it cannot be kept.
    pub(in crate::node) fn pause(&self, paused: bool) -> Result<(), NodeError> {
        let kept = match paused {
            true => std::fs::write(&self.paused_path, ""),
            false => std::fs::remove_file(&self.paused_path),
        };
        match kept {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(NodeError::Io { what: "change", path: self.paused_path.clone(), source: error });
            }
            _ => self.paused.store(paused, Ordering::Release),
        }
        let folder = self.paused_path.parent().unwrap_or(&self.paused_path);
        std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(|source| NodeError::Io {
            what: "sync",
            path: folder.to_owned(),
            source,
        })?;
        if !paused {
            self.states.lock().values_mut().for_each(|standing| standing.rests_until = None);
        }
        tracing::info!(paused, "completing images in the background");
        Ok(())
    }

    fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// For `hermes status`.
    pub(in crate::node) fn status(&self) -> CompletionStatus {
        CompletionStatus {
            mode: self.mode,
            paused: self.is_paused(),
            rate_bytes_per_second: self.rate_bytes_per_second,
            fetched_bytes: self.fetched_bytes.load(Ordering::Relaxed),
            completed_images: self.completed_images.load(Ordering::Relaxed),
        }
    }

    /// How the image of `mount` stands.
    pub(in crate::node) fn state_of(&self, mount: MountNo, layers: &[Arc<OpenLayer>]) -> CompletionState {
        if layers.iter().all(|layer| layer.layer.is_complete()) {
            return CompletionState::Complete;
        }
        match self.mode {
            CompleteMode::Never => CompletionState::Off,
            _ if self.is_paused() => CompletionState::Paused,
            _ => self.states.lock().get(&mount).map_or(CompletionState::Starting, |standing| standing.state.clone()),
        }
    }

    fn set(&self, mount: MountNo, state: CompletionState, rest: Option<Duration>) {
        let rests_until = rest.map(|rest| Instant::now() + rest);
        self.states.lock().insert(mount, Standing { state, rests_until });
    }

    fn rests(&self, mount: MountNo) -> bool {
        let states = self.states.lock();
        states.get(&mount).and_then(|standing| standing.rests_until).is_some_and(|until| until > Instant::now())
    }

    fn forget_others(&self, mounted: &[MountNo]) {
        self.states.lock().retain(|mount, _| mounted.contains(mount));
    }

    /// The policy's clock begins with this.
    fn time(&self, at: Instant) -> hermes_policy::time::Instant {
        let nanos = at.saturating_duration_since(self.started).as_nanos();
        hermes_policy::time::Instant(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn lanes(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        if self.mode == CompleteMode::Full { FULL_LANES } else { cores.div_ceil(CORES_PER_LANE) }
    }

    /// When something was prepared, by the policy's clock: what was before this process began counts as then.
    fn is_settled(&self, prepared: Instant, last_miss: Option<Instant>) -> bool {
        let now = self.time(Instant::now());
        completion::is_settled(self.time(prepared), last_miss.map(|miss| self.time(miss)), now)
    }
}

/// An image that is to be completed.
struct Next {
    mount: MountNo,
    image: String,
    layers: Vec<Arc<OpenLayer>>,
}

/// Completes images until the node ends.
pub(in crate::node) async fn run(node: Weak<Inner>) {
    loop {
        let Some(inner) = node.upgrade() else { return };
        let next = inner.next_to_complete().await;
        let is_idle = next.is_none();
        if let Some(next) = next {
            inner.complete_some(&next).await;
        }
        drop(inner);
        if is_idle {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

impl Inner {
    /// The image that was mounted first of those whose start has settled and of which something is missing.
    async fn next_to_complete(&self) -> Option<Next> {
        let completion = &self.completion;
        let images = self.images.lock().await;
        completion.forget_others(&images.iter().map(|image| image.number).collect::<Vec<_>>());
        if completion.mode == CompleteMode::Never || completion.is_paused() {
            return None;
        }
        let found = images.iter().find(|image| {
            let last_miss = image.layers.iter().filter_map(|layer| layer.last_miss()).max();
            !image.layers.iter().all(|layer| layer.layer.is_complete())
                && !completion.rests(image.number)
                && (completion.mode == CompleteMode::Full || completion.is_settled(image.prepared, last_miss))
        });
        found.map(|image| Next { mount: image.number, image: image.reference.clone(), layers: image.layers.clone() })
    }

    /// One round of an image.
    async fn complete_some(&self, next: &Next) {
        let completion = &self.completion;
        let mut parts = self.all_parts(&next.layers).await;
        let missing_bytes = parts.iter().map(Part::missing_bytes).sum();
        if !self.has_room(missing_bytes) {
            return self.rest_for_room(next, missing_bytes);
        }
        completion.set(next.mount, CompletionState::Running, None);
        parts.truncate(ROUND_PARTS.max(completion.lanes()));
        let fetches: Vec<_> = parts.into_iter().map(|part| self.complete_part(part)).collect();
        let fetches = stream::iter(fetches).buffer_unordered(completion.lanes());
        let fetched = fetches.try_for_each(|()| std::future::ready(Ok(()))).await;
        match fetched {
            Ok(()) if next.layers.iter().all(|layer| layer.layer.is_complete()) => self.finish(next).await,
            Ok(()) => {}
            Err(Stop::Paused) => {}
            Err(Stop::NoRoom) => self.rest_for_room(next, missing_bytes),
            Err(Stop::Failed(error)) => {
                tracing::info!(image = %next.image, %error, "an image is not completed now");
                completion.set(next.mount, CompletionState::Failed { reason: error.to_string() }, Some(REST));
            }
        }
    }

    fn rest_for_room(&self, next: &Next, missing_bytes: u64) {
        let before = self.completion.states.lock().get(&next.mount).map(|standing| standing.state.clone());
        if !matches!(before, Some(CompletionState::NoRoom { .. })) {
            tracing::warn!(image = %next.image, missing_bytes, "an image is not completed: that would evict others");
        }
        self.completion.set(next.mount, CompletionState::NoRoom { missing_bytes }, Some(REST));
    }

    async fn finish(&self, next: &Next) {
        match sync_layers(next.layers.clone()).await {
            Ok(()) => {
                self.completion.completed_images.fetch_add(1, Ordering::Relaxed);
                tracing::info!(image = %next.image, "an image is complete on this node");
            }
            // It is complete all the same; whoever mounts it syncs again.
            Err(error) => tracing::warn!(image = %next.image, %error, "a complete image is not synced"),
        }
    }

    /// Whether `bytes` more can be kept without evicting anything.
    fn has_room(&self, bytes: u64) -> bool {
        let budget = self.config.store_budget_bytes.unwrap_or(u64::MAX);
        let margin_bytes = (budget / MARGIN_BUDGET_SHARE).clamp(MARGIN_MIN_BYTES, MARGIN_MAX_BYTES);
        // A disk that cannot be asked is not written to without need.
        self.store.spare_bytes().is_ok_and(|spare_bytes| Room { spare_bytes, margin_bytes }.has(bytes))
    }

    async fn complete_part(&self, part: Part) -> Result<(), Stop> {
        let completion = &self.completion;
        let bytes = part.missing_bytes();
        let pause = completion.pace.lock().take(bytes, completion.time(Instant::now()));
        tokio::time::sleep(pause).await;
        let until = Instant::now() + READERS_PATIENCE;
        // Short waits of readers lie between two looks; while they last, the policy lets them through first.
        while completion.mode == CompleteMode::Idle
            && !completion.is_paused()
            && Instant::now() < until
            && self.fetch.status().await.waiting_demand > 0
        {
            tokio::time::sleep(READERS_PAUSE).await;
        }
        if completion.is_paused() {
            return Err(Stop::Paused);
        }
        if !self.has_room(bytes) {
            return Err(Stop::NoRoom);
        }
        // What is one stream comes as a whole.
        let patience = if part.layer.geometry().is_whole_stream() { PART_MAX } else { PATIENCE };
        self.fetch_part(part, patience).await.map_err(|error| match error {
            NodeError::Full { .. } => Stop::NoRoom,
            error => Stop::Failed(error),
        })?;
        completion.fetched_bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }
}

/// Why a round ended early.
enum Stop {
    Paused,
    NoRoom,
    Failed(NodeError),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completion(state: &std::path::Path, mode: CompleteMode) -> Completion {
        let config = NodeConfig { state: state.to_owned(), complete: mode, ..NodeConfig::default() };
        Completion::new(&config, 1)
    }

    #[test]
    fn a_pause_outlives_a_restart() {
        let state = tempfile::tempdir().expect("a folder");
        let first = completion(state.path(), CompleteMode::Idle);
        assert!(!first.is_paused());
        first.pause(true).expect("kept");
        first.pause(true).expect("twice is as good");
        assert!(first.status().paused && completion(state.path(), CompleteMode::Idle).is_paused());
        first.pause(false).expect("kept");
        first.pause(false).expect("twice is as good");
        assert!(!completion(state.path(), CompleteMode::Idle).is_paused());
    }

    #[test]
    fn images_rest_and_are_forgotten_when_they_go() {
        let state = tempfile::tempdir().expect("a folder");
        let completion = completion(state.path(), CompleteMode::Idle);
        let (one, other) = (MountNo(1), MountNo(2));
        completion.set(one, CompletionState::NoRoom { missing_bytes: 5 }, Some(REST));
        completion.set(other, CompletionState::Running, None);
        assert!(completion.rests(one) && !completion.rests(other) && !completion.rests(MountNo(3)));
        completion.pause(false).expect("kept");
        assert!(!completion.rests(one), "somebody has told it to go on");
        completion.set(one, CompletionState::NoRoom { missing_bytes: 5 }, Some(REST));
        completion.forget_others(&[other]);
        assert!(!completion.rests(one));
    }

    #[test]
    fn full_speed_takes_more_lanes() {
        let state = tempfile::tempdir().expect("a folder");
        let lanes = |mode| completion(state.path(), mode).lanes();
        assert!(lanes(CompleteMode::Idle) >= 1 && lanes(CompleteMode::Idle) < lanes(CompleteMode::Full));
    }
}
