//! Fetching all of an image, in the background of whoever reads it.
//!
//! There is no time by which it must have come: a slow link is no fault. What ends it is standing still, or a store that
//! has no room. A request that is dropped stops at once, and what has come stays.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hermes_image::runs::Runs;
use tokio::sync::mpsc;

use super::mount::say;
use super::{Inner, NodeError};
use crate::control::Answer;
use crate::fetch::{Class, OpenLayer};

/// How long nothing at all may come before it is said what is wrong. A span of 512 KiB takes 5 s at 1 Mbit/s, and a
/// registry that asks for rest may do so for a minute.
const STALL_MAX: Duration = Duration::from_secs(120);
/// How often progress is looked at and told.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Longest that one batch may wait in the policy's queue. Standing still ends it long before.
const BATCH_MAX: Duration = Duration::from_secs(7 * 24 * 3600);
/// Chunks that are asked for at once: about 64 MiB, enough to keep the link and all cores busy, little enough that a
/// read on demand finds room.
const BATCH_CHUNKS: u32 = 1024;

/// Notices that nothing comes any more.
#[derive(Debug)]
struct Stall {
    present_bytes: u64,
    since: Instant,
}

impl Stall {
    fn new(present_bytes: u64, now: Instant) -> Self {
        Self { present_bytes, since: now }
    }

    /// Whether nothing has come for [`STALL_MAX`]. Eviction is no progress, but what comes after it is.
    fn is_over(&mut self, present_bytes: u64, now: Instant) -> bool {
        if present_bytes > self.present_bytes {
            self.since = now;
        }
        self.present_bytes = present_bytes;
        now.saturating_duration_since(self.since) >= STALL_MAX
    }
}

impl Inner {
    /// Fetches what is missing of the image at `dir`.
    pub(super) async fn complete(&self, dir: &Path, progress: mpsc::Sender<Answer>) -> Result<(), NodeError> {
        let layers = {
            let images = self.images.lock().await;
            let image = images.iter().find(|image| image.dir == dir);
            image.ok_or_else(|| NodeError::NotMounted { dir: dir.to_owned() })?.layers.clone()
        };
        let total = layers.iter().map(|layer| layer.layer.table().logical_len_bytes()).sum();
        for layer in &layers {
            loop {
                let missing = layer.layer.missing(0..layer.layer.table().count()).take(BATCH_CHUNKS);
                if missing.is_empty() {
                    break;
                }
                self.fetch_batch(layer, missing, || say(&progress, "fetching", present_bytes(&layers), total)).await?;
            }
        }
        let sync = tokio::task::spawn_blocking(move || layers.iter().try_for_each(|layer| layer.layer.sync()));
        Ok(sync.await.map_err(|_| NodeError::Interrupted)??)
    }

    async fn fetch_batch(&self, layer: &OpenLayer, missing: Runs, tell: impl Fn()) -> Result<(), NodeError> {
        let need = |deadline| self.fetch.need(layer.diff_id(), missing.clone(), Class::Prefetch, deadline);
        let mut coming = std::pin::pin!(need(Instant::now() + BATCH_MAX));
        let mut stall = Stall::new(progress_bytes(layer), Instant::now());
        let delivered = loop {
            tokio::select! {
                delivered = &mut coming => break delivered?,
                () = tokio::time::sleep(LOOK_EVERY) => {
                    tell();
                    if stall.is_over(progress_bytes(layer), Instant::now()) {
                        // A need whose time has passed fails at once, and says who was asked and what came of it.
                        break need(Instant::now()).await?;
                    }
                }
            }
        };
        tell();
        if delivered.is_empty() {
            return Ok(());
        }
        // The chunks came and could not be kept: going on would fetch them for ever.
        Err(NodeError::Full { store: self.config.state.join("store") })
    }
}

/// What has come of all layers, in bytes.
fn present_bytes(layers: &[Arc<OpenLayer>]) -> u64 {
    layers.iter().map(|layer| layer.layer.present_bytes()).sum()
}

/// What shows that something comes, in bytes. A layer that can only be read from its start may have to go through all
/// that is here already before it brings anything new, so there what comes over the link counts.
fn progress_bytes(layer: &OpenLayer) -> u64 {
    let wire = if layer.geometry().is_whole_stream() { layer.counters.snapshot().registry_wire_bytes } else { 0 };
    layer.layer.present_bytes() + wire
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_link_is_no_stall_and_silence_is_one() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut stall = Stall::new(0, start);
        // One chunk of 64 KiB a minute, for ten hours: two orders below the slowest link that is of use.
        for minute in 1..=600 {
            assert!(!stall.is_over(minute << 16, at(minute * 60)), "after {minute} minutes");
        }
        let quiet = 600 * 60;
        assert!(!stall.is_over(600 << 16, at(quiet + 119)));
        assert!(stall.is_over(600 << 16, at(quiet + 120)));
        // Chunks that were evicted are no progress; those that come again are.
        assert!(stall.is_over(500 << 16, at(quiet + 130)));
        assert!(!stall.is_over(501 << 16, at(quiet + 131)));
    }
}
