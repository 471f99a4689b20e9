//! Carrying out a prefetch, by a profile or around what is read: the policy says what to ask for, the fetch driver gets it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::stream::FuturesUnordered;
use futures::{FutureExt as _, StreamExt as _};
use hermes_image::ids::{ChunkRange, DiffId};
use hermes_image::runs::Runs;
use hermes_policy::geometry::LayerGeometry;
use hermes_policy::profile::{Batch, Near, Prefetch, PrefetchLimits, PrefetchState, Profile};
use hermes_policy::time;
use tokio::time::MissedTickBehavior;

use super::start::Start;
use crate::fetch::{Class, FetchHandle, OpenLayer};
use crate::metrics::{PrefetchedBytes, RECORDED};

/// How often it is looked at what the start has read, where a profile says what it will read.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// And where that is all that is known: short beside a round trip to a registry. A look at 10,000 chunks takes some 20 us.
const NEAR_LOOK_EVERY: Duration = Duration::from_millis(5);
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
    pub(crate) near_limits: PrefetchLimits,
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

/// Says what to fetch.
trait Plan {
    /// How often [`Self::look`] is called.
    const LOOK_EVERY: Duration;
    /// Looks at what the start has read.
    fn look(&mut self, start: &Start);
    /// What to ask for now, as far as it is `missing`.
    fn next(&mut self, missing: impl FnMut(DiffId, ChunkRange) -> Runs) -> Vec<Batch>;
    /// A batch of so many bytes that was asked for at `asked` is over.
    fn ended(&mut self, bytes: u64, asked: time::Instant, now: time::Instant);
    /// Whether there will be more.
    fn state(&self) -> PrefetchState;
}

/// By a profile.
struct ByProfile {
    policy: Prefetch,
    expected: BTreeMap<DiffId, Runs>,
}

impl Plan for ByProfile {
    const LOOK_EVERY: Duration = LOOK_EVERY;

    fn look(&mut self, start: &Start) {
        self.policy.saw(start.look(&self.expected).seen);
    }

    fn next(&mut self, missing: impl FnMut(DiffId, ChunkRange) -> Runs) -> Vec<Batch> {
        self.policy.next(missing)
    }

    fn ended(&mut self, bytes: u64, _: time::Instant, _: time::Instant) {
        self.policy.ended(bytes);
    }

    fn state(&self) -> PrefetchState {
        self.policy.state()
    }
}

/// Around what is read, until the start is over.
struct AroundReads {
    policy: Near,
    known: BTreeMap<DiffId, Runs>,
    began: Instant,
    is_over: bool,
}

impl Plan for AroundReads {
    const LOOK_EVERY: Duration = NEAR_LOOK_EVERY;

    fn look(&mut self, start: &Start) {
        let look = start.look(&BTreeMap::new());
        self.policy.used(look.seen.used_bytes);
        self.is_over |= look.is_over(self.began.elapsed());
        for (layer, chunk) in start.first_reads(&mut self.known) {
            self.policy.read(layer, chunk);
        }
    }

    fn next(&mut self, missing: impl FnMut(DiffId, ChunkRange) -> Runs) -> Vec<Batch> {
        self.policy.next(missing)
    }

    fn ended(&mut self, bytes: u64, asked: time::Instant, now: time::Instant) {
        self.policy.ended(bytes, asked, now);
    }

    fn state(&self) -> PrefetchState {
        if self.is_over { PrefetchState::Done } else { PrefetchState::Running }
    }
}

impl PrefetchJob {
    /// Fetches by `profile`. Cancel safe: what is under way is withdrawn.
    pub(crate) async fn run(&self, profile: &Profile) -> PrefetchEnd {
        let policy = Prefetch::new(profile, &self.geometries(), self.limits);
        self.carry_out(ByProfile { expected: policy.chunks(), policy }).await
    }

    /// Fetches around what the start reads, until it is over. Cancel safe.
    pub(crate) async fn run_near(&self) -> PrefetchEnd {
        let policy = Near::new(&self.geometries(), self.near_limits);
        let (known, began) = (BTreeMap::new(), Instant::now());
        self.carry_out(AroundReads { policy, known, began, is_over: false }).await
    }

    fn geometries(&self) -> BTreeMap<DiffId, Arc<LayerGeometry>> {
        self.layers.iter().map(|layer| (layer.diff_id(), layer.geometry())).collect()
    }

    async fn carry_out<P: Plan>(&self, mut plan: P) -> PrefetchEnd {
        let open: BTreeMap<DiffId, &Arc<OpenLayer>> =
            self.layers.iter().map(|layer| (layer.diff_id(), layer)).collect();
        let began = Instant::now();
        let deadline = began + PREFETCH_MAX;
        let now = || time::Instant::ZERO + began.elapsed();
        let (mut under_way, mut failures) = (FuturesUnordered::new(), 0);
        // However often batches end: what is read meanwhile says what to fetch next.
        let mut looks = tokio::time::interval(P::LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            loop {
                let missing =
                    |layer, chunks| open.get(&layer).map_or_else(Runs::new, |open| open.layer.missing(chunks));
                let batches = plan.next(missing);
                if batches.is_empty() {
                    break;
                }
                for batch in batches {
                    self.start.prefetching(batch.layer, &batch.chunks);
                    let asked = now();
                    under_way.push(self.get(batch, deadline).map(move |(batch, came)| (batch, asked, came)));
                }
            }
            match plan.state() {
                PrefetchState::PoorUse => return PrefetchEnd::PoorUse,
                PrefetchState::Done if under_way.is_empty() => return PrefetchEnd::Done,
                PrefetchState::Done | PrefetchState::Running => {}
            }
            if Instant::now() >= deadline {
                return PrefetchEnd::Failed;
            }
            tokio::select! {
                Some((batch, asked, came)) = under_way.next(), if !under_way.is_empty() => {
                    plan.ended(batch.bytes, asked, now());
                    match came {
                        Came::All => failures = 0,
                        Came::NoRoom => return PrefetchEnd::NoRoom,
                        Came::Nothing => failures += 1,
                    }
                    if failures >= FAILURES_MAX {
                        return PrefetchEnd::Failed;
                    }
                }
                _ = looks.tick() => plan.look(&self.start),
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
