//! Index on first pull: the node takes the pull of an image that nobody has an index of.
//!
//! When containerd is about to download such an image, the node does so itself: it streams every layer once through the
//! index builder, several at a time, stores the chunks as they are cut, checks blobs and diffIDs, and signs the index with
//! its key. Only then is the first `Prepare` answered, as for any image that is shown lazily: containerd never downloads
//! a layer that was once answered so, and therefore nothing is before everything is here. This node's containers read a
//! complete image; the next node finds index and chunks here, and starts lazily, without a controller.
//!
//! ```text
//! Prepare -> offer: who says so? manifest, platform, layers, size, room, a byte of a range       within the decision's time
//!              -> task: layers -> [known] or [staged]   -> commit -> statement -> answer         as long as bytes come
//!                        image record, artifacts, layers (store), tree, statement (own folder), peers
//! ```
//!
//! *Whether* is decided in the time of any decision. The taking itself has no limit of its own; a registry that stops
//! is noticed by the limits of the origin, and a layer that breaks off is gone on with (`indexing`). It belongs to
//! the node and not to the call: when containerd gives up waiting it goes on, whoever asks again joins it, and so does
//! whoever asks at the same time. It ends with the node. containerd itself has the patience: its limit for a pull without
//! progress (`image_pull_progress_timeout`) counts only while it has a request to a registry under way.
//!
//! A layer that this node knows from an index that its own key has signed, and has all of, is not read again. One that
//! two pulls want at the same time is read by one of them. What another key has signed is not taken over, also when it
//! is trusted: the statement that is made here says that *this* key's owner has checked every layer.
//!
//! **All or nothing, also on the disk.** Layers and artifacts are staged ([`hermes_store::StagedLayer`]), which leaves
//! nothing when they are dropped. The image's record comes first in the commit, so that what a crash in its midst leaves
//! belongs to an image, and is neither lost nor kept twice by the next attempt; the statement comes last, so that nothing
//! is decided by an index of which a part is missing. What fails in between is taken back. After a failure containerd pulls as ever, at once, and the image is
//! not tried again for a while: the pull that failed may have cost more than it would have saved.
//!
//! A statement that is found and refused (not trusted, damaged, of another image) is no missing index: the image is
//! pulled as ever and the reason said, because somebody has to look at keys or files, and a second index beside the
//! first would hide that.
//!
//! Memory: one builder's pipeline for each layer under way (34 MB), of which there are at most [`PIPELINES_MAX`] on the
//! node.

mod layers;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use hermes_image::ids::{ChainId, DiffId, Digest, LayerId};
use hermes_registry::oci::Platform;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::layers::LayerSlot;
use super::Inner;
use super::lazy::{LAYER_LABEL, LazyImage, Refusal, refusal};
use crate::config::NodeConfig;
use crate::metrics::{self, FirstPullEnd, RECORDED};
use crate::snapshots::PulledLayer;
use crate::status::FirstPullStatus;
use hermes_origin::{ErrorClass, Failure, FindImageError, ImageSource, LayerDescriptor, Origin, ResolvedImage};

/// Images that are taken at once. More would divide the link, and pods wait for them.
const IMAGES_MAX: usize = 4;
/// Layers of all images that are streamed at once, at most: one uses more than a core, and 34 MB.
const PIPELINES_MAX: usize = 4;
/// How long an image whose pull failed is left to containerd.
const FAILED_FOR: Duration = Duration::from_secs(600);
/// Failures that are remembered; the oldest is forgotten.
const FAILURES_MAX: usize = 256;
/// Why an image is pulled as ever when its pull is not taken.
const NO_INDEX: &str = "nobody has its index; `hermes index build` makes one";
/// How long pulls under way may take to end with the node: they stop at their next step.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// What came of a pull.
type Outcome = Result<Arc<LazyImage>, Refusal>;

/// The pull that is being taken, or why none is.
type Offer = Result<Arc<FirstPull>, Refusal>;

/// A pull that is being taken.
#[derive(Debug)]
pub(super) struct FirstPull {
    manifest: Digest,
    /// What containerd calls the image.
    reference: String,
    total_bytes: u64,
    done_bytes: AtomicU64,
    outcome: watch::Receiver<Option<Outcome>>,
}

impl FirstPull {
    /// Waits for the end. Cancel safe: the pull goes on.
    pub(super) async fn outcome(&self) -> Outcome {
        let mut outcome = self.outcome.clone();
        // The sender goes with its task.
        let ended = outcome.wait_for(Option::is_some).await;
        let ended = ended.ok().and_then(|outcome| outcome.clone());
        ended.unwrap_or_else(|| Err(refusal(metrics::Decision::Failed, "taking its pull was interrupted")))
    }

    fn progress(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// An image that is to be taken.
struct Taking {
    pull: Arc<FirstPull>,
    origin: Arc<Origin>,
    image: ResolvedImage,
}

#[derive(Debug)]
struct Failed {
    manifest: Digest,
    at: Instant,
    refusal: Refusal,
}

/// The pulls that this node takes itself.
#[derive(Debug)]
pub(super) struct FirstPulls {
    /// Compressed bytes of the smallest image; `None` when no pull is taken.
    min_bytes: Option<u64>,
    running: Mutex<BTreeMap<Digest, Arc<FirstPull>>>,
    /// The latest last.
    failed: Mutex<VecDeque<Failed>>,
    /// Layers that some pull is about to have.
    layers: Mutex<BTreeMap<(LayerId, DiffId), Weak<LayerSlot>>>,
    pipelines: Semaphore,
    tasks: TaskTracker,
    ending: CancellationToken,
}

impl FirstPulls {
    pub(super) fn new(config: &NodeConfig) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            min_bytes: config.index_on_first_pull.then_some(config.index_on_first_pull_min_bytes),
            running: Mutex::default(),
            failed: Mutex::default(),
            layers: Mutex::default(),
            pipelines: Semaphore::new(cores.min(PIPELINES_MAX)),
            tasks: TaskTracker::new(),
            ending: CancellationToken::new(),
        }
    }

    /// The pull of `manifest` that is under way.
    pub(super) fn running(&self, manifest: Digest) -> Option<Arc<FirstPull>> {
        self.running.lock().get(&manifest).cloned()
    }

    /// The images under way.
    pub(super) fn manifests(&self) -> Vec<Digest> {
        self.running.lock().keys().copied().collect()
    }

    /// Those under way, for people.
    pub(super) fn status(&self) -> Vec<FirstPullStatus> {
        let running = self.running.lock();
        let status = running.values().map(|pull| FirstPullStatus {
            manifest: pull.manifest,
            reference: pull.reference.clone(),
            total_bytes: pull.total_bytes,
            done_bytes: pull.done_bytes.load(Ordering::Relaxed).min(pull.total_bytes),
        });
        status.collect()
    }

    /// Ends all pulls; whoever waits for one is told so. No other begins.
    pub(super) async fn end(&self) {
        self.ending.cancel();
        self.tasks.close();
        if tokio::time::timeout(END_TIMEOUT, self.tasks.wait()).await.is_err() {
            tracing::warn!("a pull that this node takes is still under way at the end");
        }
    }

    /// Why the pull of `manifest` is not taken, as far as this node alone can say.
    fn check(&self, manifest: Digest) -> Result<u64, Refusal> {
        let Some(min_bytes) = self.min_bytes else {
            return Err(refusal(metrics::Decision::NoIndex, NO_INDEX));
        };
        let mut failed = self.failed.lock();
        failed.retain(|failed| failed.at.elapsed() < FAILED_FOR);
        match failed.iter().find(|failed| failed.manifest == manifest) {
            Some(failed) => Err(failed.refusal.clone()),
            None => Ok(min_bytes),
        }
    }

    /// Begins to take the pull, or joins the one that has begun meanwhile.
    fn begin(&self, node: &Arc<Inner>, reference: String, origin: Arc<Origin>, image: ResolvedImage) -> Offer {
        let manifest = image.manifest_digest;
        let mut running = self.running.lock();
        if let Some(pull) = running.get(&manifest) {
            return Ok(Arc::clone(pull));
        }
        if running.len() >= IMAGES_MAX {
            let reason = format!("{NO_INDEX}; this node takes the pulls of {IMAGES_MAX} other images already");
            return Err(refusal(metrics::Decision::Busy, reason));
        }
        if self.ending.is_cancelled() {
            return Err(refusal(metrics::Decision::Failed, "the node is about to end"));
        }
        let (tell, outcome) = watch::channel(None);
        let total_bytes = compressed_bytes(&image.layers);
        let pull = Arc::new(FirstPull { manifest, reference, total_bytes, done_bytes: AtomicU64::new(0), outcome });
        running.insert(manifest, Arc::clone(&pull));
        drop(running);
        let taking = Taking { pull: Arc::clone(&pull), origin, image };
        self.tasks.spawn(run(Arc::clone(node), taking, tell));
        Ok(pull)
    }

    fn remember_failure(&self, manifest: Digest, refusal: &Refusal) {
        let mut failed = self.failed.lock();
        if failed.len() >= FAILURES_MAX {
            failed.pop_front();
        }
        failed.push_back(Failed { manifest, at: Instant::now(), refusal: refusal.clone() });
    }
}

/// Takes the pull of an image to its end, and tells those who wait.
async fn run(node: Arc<Inner>, taking: Taking, tell: watch::Sender<Option<Outcome>>) {
    let _registered = Registered { node: Arc::clone(&node), manifest: taking.pull.manifest };
    let pull = Arc::clone(&taking.pull);
    let (manifest, image) = (pull.manifest, pull.reference.as_str());
    let (bytes, layers) = (pull.total_bytes, taking.image.layers.len());
    tracing::info!(%manifest, image, layers, bytes, "taking the pull, because nobody has its index");
    let started = Instant::now();
    let taken = tokio::select! {
        biased;
        () = node.first_pulls.ending.cancelled() => {
            Err(refusal(metrics::Decision::Failed, "its pull was being taken when the node ended"))
        }
        taken = layers::take(&node, &taking) => taken,
    };
    let elapsed_ms = started.elapsed().as_millis() as u64;
    match &taken {
        Ok(_) => {
            RECORDED.first_pull_ended(FirstPullEnd::Done);
            tracing::info!(%manifest, image, elapsed_ms, bytes, "took the pull; image and index are complete");
        }
        Err(refusal) => {
            RECORDED.first_pull_ended(FirstPullEnd::Failed);
            let reason = &refusal.reason;
            tracing::warn!(%manifest, image, elapsed_ms, reason, "the pull could not be taken");
            node.first_pulls.remember_failure(manifest, refusal);
        }
    }
    let _ = tell.send(Some(taken));
}

/// Takes a pull off the list of those under way, however it ends.
struct Registered {
    node: Arc<Inner>,
    manifest: Digest,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.node.first_pulls.running.lock().remove(&self.manifest);
    }
}

impl Inner {
    /// Offers to take the pull of an image that nobody has an index of: `layer` is the first that containerd is about to
    /// download. Answers as soon as that is decided.
    pub(super) async fn offer_first_pull(
        self: &Arc<Self>,
        manifest: Digest,
        reference: Option<String>,
        layer: &PulledLayer,
    ) -> Offer {
        let pulls = &self.first_pulls;
        let min_bytes = pulls.check(manifest)?;
        let nowhere =
            || refusal(metrics::Decision::NoIndex, format!("{NO_INDEX}; containerd does not say where it is from"));
        let reference = reference.ok_or_else(nowhere)?;
        let (origin, image) = self.resolve_manifest(&reference, manifest).await?;
        check_layer(&image.layers, layer)?;
        let bytes = compressed_bytes(&image.layers);
        if bytes < min_bytes {
            let reason = format!("nobody has its index, and its layers have {bytes} bytes, less than {min_bytes}");
            return Err(refusal(metrics::Decision::Small, reason));
        }
        let way = self.ways.choose(self.config.way, true);
        way.map_err(|error| refusal(metrics::Decision::NoWay, error.to_string()))?;
        self.check_room(bytes).await?;
        self.check_source(Some(&reference), &image.layers).await?;
        pulls.begin(self, reference, origin, image)
    }

    /// The image `manifest` where `reference` is from, whatever a tag in it means now.
    pub(super) async fn resolve_manifest(
        &self,
        reference: &str,
        manifest: Digest,
    ) -> Result<(Arc<Origin>, ResolvedImage), Refusal> {
        let source = reference.parse::<ImageSource>().map_err(|error| find_refusal(&error.into()))?;
        let source = match source {
            ImageSource::Registry(named) => ImageSource::Registry(named.clone_with_digest(manifest.to_string())),
            layout @ ImageSource::Layout { .. } => layout,
        };
        let origin = self.origin_client.open(&source).await.map_err(|error| find_refusal(&error.into()))?;
        // The decision's own time ends sooner.
        let deadline = Instant::now() + super::lazy::DECISION_TIMEOUT;
        let image = origin.resolve(&Platform::host(), deadline.into()).await;
        let image = image.map_err(|error| find_refusal(&error.into()))?;
        if image.manifest_digest != manifest {
            let reason = format!("{reference} is {}, and containerd means {manifest}", image.manifest_digest);
            return Err(refusal(metrics::Decision::OtherImage, reason));
        }
        // The registry gives it to this node, which peers that have some of it may want to see.
        if origin.access().is_some() {
            self.prove(image.layers.iter().map(|layer| layer.diff_id).collect()).await;
        }
        Ok((Arc::new(origin), image))
    }

    /// Refuses what cannot fit even as long as it is compressed, before everything else is evicted for it. How long the
    /// content is, nobody says (1.1 to 3.4 times as long for the large layers of `tools/images`); what turns out not to fit
    /// fails then.
    async fn check_room(&self, compressed_bytes: u64) -> Result<(), Refusal> {
        let store = Arc::clone(&self.store);
        let usage = tokio::task::spawn_blocking(move || store.usage()).await;
        let failed = |error: String| refusal(metrics::Decision::Failed, error);
        let usage = usage.map_err(|error| failed(error.to_string()))?.map_err(|error| failed(error.to_string()))?;
        // What is used may be evicted.
        let on_disk = usage.free_bytes.saturating_add(usage.used_bytes);
        let room = usage.budget_bytes.unwrap_or(u64::MAX).min(on_disk);
        if compressed_bytes > room {
            let reason = format!(
                "nobody has its index, and its {compressed_bytes} bytes, compressed, do not fit into the store"
            );
            return Err(refusal(metrics::Decision::NoRoom, reason));
        }
        Ok(())
    }
}

/// Compressed bytes of the layers, of each once.
fn compressed_bytes(layers: &[LayerDescriptor]) -> u64 {
    let distinct: BTreeMap<LayerId, u64> = layers.iter().map(|layer| (layer.layer, layer.len_bytes)).collect();
    distinct.into_values().fold(0, u64::saturating_add)
}

/// Whether the manifest's layers are those that containerd means.
fn check_layer(layers: &[LayerDescriptor], pulled: &PulledLayer) -> Result<(), Refusal> {
    let other = |reason: String| refusal(metrics::Decision::OtherImage, reason);
    let diff_ids: Vec<DiffId> = layers.iter().map(|layer| layer.diff_id).collect();
    let chains = (1..=diff_ids.len()).filter_map(|count| ChainId::of(&diff_ids[..count]));
    let place = chains.into_iter().position(|chain| chain.to_string() == pulled.target);
    let place = place.ok_or_else(|| other(format!("its manifest has no layer with chain {}", pulled.target)))?;
    match pulled.labels.get(LAYER_LABEL) {
        Some(blob) if *blob != layers[place].layer.to_string() => {
            Err(other(format!("its manifest has layer {} where containerd means {blob}", layers[place].layer)))
        }
        _ => Ok(()),
    }
}

/// Why an image cannot be resolved, as a reason for a plain pull.
fn find_refusal(error: &FindImageError) -> Refusal {
    let label = match error {
        FindImageError::Origin(error) => match (error.failure(), error.class()) {
            (Failure::PlatformMissing { .. }, _) => metrics::Decision::Platform,
            (_, ErrorClass::Denied | ErrorClass::NotFound) => metrics::Decision::Denied,
            _ => metrics::Decision::Unreachable,
        },
        FindImageError::Name(_) | FindImageError::Platform(_) | FindImageError::Setup(_) => {
            metrics::Decision::Unreachable
        }
    };
    refusal(label, format!("nobody has its index, and its pull cannot be taken: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(name: u8, len_bytes: u64) -> LayerDescriptor {
        LayerDescriptor { layer: LayerId([name; 32]), diff_id: DiffId([name; 32]), len_bytes, media_type: None }
    }

    fn pulled(target: &str, blob: Option<String>) -> PulledLayer {
        let labels = blob.map(|blob| (LAYER_LABEL.to_owned(), blob)).into_iter().collect();
        PulledLayer { key: "key".to_owned(), target: target.to_owned(), labels, below: Vec::new() }
    }

    #[test]
    fn a_layer_that_is_named_twice_counts_once() {
        assert_eq!(compressed_bytes(&[layer(1, 10), layer(2, 5), layer(1, 10)]), 15);
        assert_eq!(compressed_bytes(&[layer(1, u64::MAX), layer(2, 5)]), u64::MAX);
    }

    #[test]
    fn only_the_image_that_containerd_means_is_taken() {
        let layers = [layer(1, 10), layer(2, 5)];
        let diff_ids = [DiffId([1; 32]), DiffId([2; 32])];
        let chain = ChainId::of(&diff_ids).expect("a chain").to_string();
        assert!(check_layer(&layers, &pulled(&chain, None)).is_ok());
        assert!(check_layer(&layers, &pulled(&chain, Some(layers[1].layer.to_string()))).is_ok());
        let refused = |pulled| check_layer(&layers, &pulled).expect_err("refused").label;
        let other_layer = pulled(&chain, Some(layers[0].layer.to_string()));
        assert_eq!(refused(other_layer), metrics::Decision::OtherImage);
        assert_eq!(refused(pulled("sha256:00", None)), metrics::Decision::OtherImage);
    }

    #[tokio::test]
    async fn a_failure_is_not_repeated_at_once_and_switched_off_nothing_is_taken() {
        let pulls = FirstPulls::new(&NodeConfig::default());
        let (failing, other) = (Digest([1; 32]), Digest([2; 32]));
        assert_eq!(pulls.check(failing).expect("may be taken"), crate::config::FIRST_PULL_MIN_BYTES);
        pulls.remember_failure(failing, &refusal(metrics::Decision::NoRoom, "full"));
        assert_eq!(pulls.check(failing).expect_err("not again").label, metrics::Decision::NoRoom);
        assert!(pulls.check(other).is_ok());
        for name in 0..=u8::MAX {
            pulls.remember_failure(Digest([name; 32]), &refusal(metrics::Decision::Failed, "failed"));
        }
        assert_eq!(pulls.failed.lock().len(), FAILURES_MAX);
        let off = FirstPulls::new(&NodeConfig { index_on_first_pull: false, ..NodeConfig::default() });
        assert_eq!(off.check(other).expect_err("switched off").label, metrics::Decision::NoIndex);
        pulls.end().await;
    }
}
