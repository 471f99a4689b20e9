//! Fetching all of an image.
//!
//! Two callers: somebody who asks for it and waits ([`Inner::complete`], as fast as the link and the cores go), and the
//! node itself, in the background of whoever reads ([`background`]). Both take what is missing in parts of
//! [`PART_BYTES`], several at a time, in the order that [`hermes_policy::completion`] says (what the fewest peers have
//! first), and leave it to the fetch policy to ask for them as what nobody waits for.
//!
//! There is no time by which it must have come: a slow link is no fault. What ends it is standing still, or a store that
//! has no room. A request that is dropped stops at once, and what has come stays: chunks are durable a moment after they
//! came, as all others, and what a crash loses is missing again when somebody looks.

pub(super) mod background;
mod stall;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use hermes_image::runs::Runs;
use hermes_policy::completion;
use tokio::sync::mpsc;

use self::stall::Stall;
use super::mount::say;
use super::{Inner, NodeError};
use crate::control::Answer;
use crate::fetch::{Class, OpenLayer};

/// How often progress is looked at and told.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Longest that one part may wait in the policy's queue. Standing still ends it long before.
const PART_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Uncompressed bytes of one part: an extent of the swarm, which its owner reads in one go, and about one request to a
/// registry (4 MiB compressed at most, [`hermes_policy::limits::Limits::origin_size`]).
const PART_BYTES: u64 = 4 << 20;
/// Parts that somebody who waits asks for at once: 128 MiB, enough that requests of full length (three parts of text
/// compress into one) fill all that the policy has under way at a registry (6 beside demand), little enough that a
/// read on demand finds room in the policy's queue.
const PARTS_AT_ONCE: usize = 32;

/// A part of a layer.
struct Part {
    layer: Arc<OpenLayer>,
    chunks: Runs,
}

impl Part {
    /// What of it is not here now, as others may have asked for it meanwhile.
    fn missing(&self) -> Runs {
        self.chunks.iter().fold(Runs::new(), |mut missing, run| {
            missing.insert_all(&self.layer.layer.missing(run));
            missing
        })
    }

    /// Uncompressed bytes of what is not here.
    fn missing_bytes(&self) -> u64 {
        self.missing().iter().map(|run| self.layer.layer.table().run_range(run)).map(|at| at.end - at.start).sum()
    }
}

impl Inner {
    /// Fetches what is missing of the image that is mounted at `dir` or has the name `image`; of several with one name,
    /// of the one that was mounted last.
    pub(super) async fn complete(
        &self,
        image: &str,
        dir: &Path,
        progress: mpsc::Sender<Answer>,
    ) -> Result<(), NodeError> {
        let layers = {
            let images = self.images.lock().await;
            let found = images.iter().find(|mounted| mounted.dir == dir);
            let found = found.or_else(|| images.iter().rev().find(|mounted| mounted.reference == image));
            let unknown = || NodeError::UnknownImage { image: image.to_owned(), dir: dir.to_owned() };
            found.ok_or_else(unknown)?.layers.clone()
        };
        let total = layers.iter().map(|layer| layer.layer.table().logical_len_bytes()).sum();
        // What came and was evicted meanwhile is looked for once more; a store with room keeps what it has.
        while layers.iter().any(|layer| !layer.layer.is_complete()) {
            self.fetch_all(&layers, || say(&progress, "fetching", present_bytes(&layers), total)).await?;
        }
        sync_layers(layers).await
    }

    /// One pass over what is missing of `layers`.
    pub(super) async fn fetch_all(&self, layers: &[Arc<OpenLayer>], tell: impl Fn()) -> Result<(), NodeError> {
        let parts = self.all_parts(layers).await;
        let fetches: Vec<_> = parts.into_iter().map(|part| self.fetch_part(part, PART_MAX)).collect();
        let fetches = stream::iter(fetches).buffer_unordered(PARTS_AT_ONCE);
        let mut fetching = std::pin::pin!(fetches.try_for_each(|()| std::future::ready(Ok(()))));
        let mut stall = Stall::new(progress_bytes(layers), Instant::now());
        loop {
            tokio::select! {
                fetched = &mut fetching => {
                    tell();
                    return fetched;
                }
                () = tokio::time::sleep(LOOK_EVERY) => {
                    tell();
                    if stall.is_over(progress_bytes(layers), Instant::now()) {
                        // A need whose time has passed fails at once, and says who was asked and what came of it.
                        if let Some(part) = self.all_parts(layers).await.pop() {
                            self.fetch_part(part, Duration::ZERO).await?;
                        }
                    }
                }
            }
        }
    }

    /// What is missing of `layers`, in the order in which this node fetches it.
    async fn all_parts(&self, layers: &[Arc<OpenLayer>]) -> Vec<Part> {
        let node = self.completion.node_number();
        let mut all = Vec::new();
        for layer in layers {
            let missing = layer.layer.missing(0..layer.layer.table().count());
            let (diff_id, held) = (layer.diff_id(), self.fetch.held(layer.diff_id()).await);
            let mut parts = completion::parts(&diff_id, &layer.geometry(), &missing, PART_BYTES, node);
            completion::rarest_first(&diff_id, &mut parts, &held, node);
            all.extend(parts.into_iter().map(|chunks| Part { layer: Arc::clone(layer), chunks }));
        }
        all
    }

    async fn fetch_part(&self, part: Part, patience: Duration) -> Result<(), NodeError> {
        let missing = part.missing();
        if missing.is_empty() {
            return Ok(());
        }
        let need = self.fetch.need(part.layer.diff_id(), missing, Class::Prefetch, Instant::now() + patience);
        if need.await?.is_empty() {
            return Ok(());
        }
        // The chunks came and could not be kept: going on would fetch them for ever.
        Err(NodeError::Full { store: self.config.state.join("store") })
    }
}

/// Makes all that is present of `layers` durable.
pub(super) async fn sync_layers(layers: Vec<Arc<OpenLayer>>) -> Result<(), NodeError> {
    let sync = tokio::task::spawn_blocking(move || layers.iter().try_for_each(|layer| layer.layer.sync()));
    Ok(sync.await.map_err(|_| NodeError::Interrupted)??)
}

/// What has come of all layers, in bytes.
fn present_bytes(layers: &[Arc<OpenLayer>]) -> u64 {
    layers.iter().map(|layer| layer.layer.present_bytes()).sum()
}

/// What shows that something comes, in bytes. A layer that can only be read from its start may have to go through all
/// that is here already before it brings anything new, so there what comes over the link counts.
fn progress_bytes(layers: &[Arc<OpenLayer>]) -> u64 {
    let of = |layer: &Arc<OpenLayer>| {
        let is_stream = layer.geometry().is_whole_stream();
        let wire = if is_stream { layer.counters.snapshot().registry_wire_bytes } else { 0 };
        layer.layer.present_bytes() + wire
    };
    layers.iter().map(of).sum()
}
