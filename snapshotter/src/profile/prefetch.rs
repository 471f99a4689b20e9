//! Carrying out a prefetch: the policy says what to ask for, the fetch driver gets it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use hermes_image::ids::DiffId;
use hermes_image::runs::Runs;
use hermes_policy::profile::{Batch, Prefetch, PrefetchLimits, PrefetchState, Profile};

use super::start::Start;
use crate::fetch::{Class, FetchHandle, OpenLayer};
use crate::metrics::{PrefetchedBytes, RECORDED};

/// How often it is looked at what the start has read.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long all of it may take, and each batch with it: 512 MiB at 10 Mbit/s. What a start has not read by then it does not
/// need soon.
const PREFETCH_MAX: Duration = Duration::from_secs(450);
/// Batches in a row that may fail before it is given up: the sources are out of reach, and readers try them anyway.
const FAILURES_MAX: u32 = 3;

/// What a prefetch needs.
#[derive(Debug)]
pub(crate) struct PrefetchJob {
    pub(crate) start: Arc<Start>,
    pub(crate) layers: Vec<Arc<OpenLayer>>,
    pub(crate) fetch: FetchHandle,
    pub(crate) limits: PrefetchLimits,
    /// Bytes that came so far, for whoever looks.
    pub(crate) fetched_bytes: Arc<AtomicU64>,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PrefetchEnd {
    /// All of the profile is here.
    Done,
    /// The start reads something else than the profile says.
    PoorUse,
    /// The store has no room.
    NoRoom,
    /// The sources do not answer, or it took too long.
    Failed,
}

impl PrefetchEnd {
    /// For logs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::PoorUse => "the start reads something else",
            Self::NoRoom => "no room",
            Self::Failed => "no source answers",
        }
    }
}

impl PrefetchJob {
    /// Fetches by `profile`. Cancel safe: what is under way is withdrawn.
    pub(crate) async fn run(&self, profile: &Profile) -> PrefetchEnd {
        let geometries: BTreeMap<DiffId, _> =
            self.layers.iter().map(|layer| (layer.diff_id(), layer.geometry())).collect();
        let open: BTreeMap<DiffId, &Arc<OpenLayer>> =
            self.layers.iter().map(|layer| (layer.diff_id(), layer)).collect();
        let mut policy = Prefetch::new(profile, &geometries, self.limits);
        let expected = policy.chunks();
        let deadline = Instant::now() + PREFETCH_MAX;
        let (mut under_way, mut failures) = (FuturesUnordered::new(), 0);
        loop {
            loop {
                let missing =
                    |layer, chunks| open.get(&layer).map_or_else(Runs::new, |open| open.layer.missing(chunks));
                let batches = policy.next(missing);
                if batches.is_empty() {
                    break;
                }
                for batch in batches {
                    self.start.prefetching(batch.layer, &batch.chunks);
                    under_way.push(self.get(batch, deadline));
                }
            }
            match policy.state() {
                PrefetchState::PoorUse => return PrefetchEnd::PoorUse,
                PrefetchState::Done if under_way.is_empty() => return PrefetchEnd::Done,
                PrefetchState::Done | PrefetchState::Running => {}
            }
            if Instant::now() >= deadline {
                return PrefetchEnd::Failed;
            }
            tokio::select! {
                Some((batch, came)) = under_way.next(), if !under_way.is_empty() => {
                    policy.ended(batch.bytes);
                    match came {
                        Came::All => failures = 0,
                        Came::NoRoom => return PrefetchEnd::NoRoom,
                        Came::Nothing => failures += 1,
                    }
                    if failures >= FAILURES_MAX {
                        return PrefetchEnd::Failed;
                    }
                }
                () = tokio::time::sleep(LOOK_EVERY) => policy.saw(self.start.look(&expected).seen),
            }
        }
    }

    /// To be called when it has ended: what did not come was not prefetched.
    pub(crate) fn settle(&self) {
        for layer in &self.layers {
            self.start.not_prefetched(layer.diff_id(), &layer.layer.missing(0..layer.layer.table().count()));
        }
    }

    async fn get(&self, batch: Batch, deadline: Instant) -> (Batch, Came) {
        let answer = self.fetch.need(batch.layer, batch.chunks.clone(), Class::Prefetch, deadline).await;
        let came = match answer {
            Ok(delivered) if delivered.is_empty() => {
                self.fetched_bytes.fetch_add(batch.bytes, Ordering::Relaxed);
                RECORDED.prefetched(PrefetchedBytes::Fetched, batch.bytes);
                Came::All
            }
            Ok(_) => Came::NoRoom,
            Err(error) => {
                tracing::debug!(layer = %batch.layer, %error, "what a start is expected to read does not come");
                self.start.not_prefetched(batch.layer, &batch.chunks);
                Came::Nothing
            }
        };
        (batch, came)
    }
}

/// What came of a batch.
enum Came {
    All,
    NoRoom,
    Nothing,
}
