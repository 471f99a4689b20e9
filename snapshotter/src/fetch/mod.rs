//! Getting chunks that are missing.
//!
//! One task owns the fetch policy and carries out what it asks for; it decides nothing itself. Readers hand it what
//! they need and wait for just that; asks run as tasks of their own and report what arrived. Data flows one way:
//! reader -> [`FetchHandle`] -> [`driver`] -> policy -> [`asks`] -> store, and the driver tells the readers that their
//! chunks are there.
//!
//! Nothing here holds chunks, with one exception: when the store cannot take a chunk (disk or budget full), the
//! readers that wait for it get the bytes themselves, and the next reader fetches it again.

mod asks;
mod blob;
mod desk;
mod donor;
mod driver;
mod layer;
mod marks;
mod numbers;
mod overflow;
mod record;
mod trace;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hermes_image::ids::{ChunkNo, ChunkRange, DiffId};
use hermes_image::runs::Runs;
use hermes_p2p::PeerId;
use hermes_policy::class::ErrorClass;
use hermes_policy::event::{AskId, ClaimId, FailReason, Outcome, PeerView, ReadId, Source, Status};
use hermes_store::Store;
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};

use crate::status::{ImageTrace, WaitingRead};

use blob::Blob;
pub use desk::{Claims, FetchDesk, desk};
pub use driver::{FetchConfig, spawn};
pub use hermes_policy::class::Class;
pub use layer::{LayerOrigin, LayerUser, MountNo, OpenLayer};
pub use marks::Marks;
pub use numbers::OriginNumbers;
pub(crate) use trace::Brought;

/// Commands that wait for the driver: reads of both FUSE threads and reports of all asks, with room. When it is full,
/// readers and asks wait; the driver itself never does.
const COMMANDS_MAX: usize = 1024;

/// Chunks that the store could not take, for one reader.
#[derive(Debug, Clone, Default)]
pub struct Delivered {
    chunks: BTreeMap<u32, Bytes>,
}

impl Delivered {
    /// Whether the store took everything.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The bytes of `chunk`, if the store could not take it.
    pub fn get(&self, chunk: u32) -> Option<&Bytes> {
        self.chunks.get(&chunk)
    }

    /// Adds what came later.
    pub fn merge(&mut self, later: Self) {
        self.chunks.extend(later.chunks);
    }
}

/// A source that was asked and has not given what was wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tried {
    /// For people: the registry's host, a peer's id, or the local store.
    pub name: String,
    /// Which kind of source it is.
    pub source: Source,
    /// How it failed; `None` when it has not answered yet.
    pub failure: Option<ErrorClass>,
}

/// Why chunks did not come.
#[derive(Debug, Error)]
pub enum FetchError {
    /// Policy gave up.
    #[error("{image}: layer {layer}: {}", describe(*reason, tried))]
    Failed {
        /// The image that the layer was opened for.
        image: String,
        /// The layer.
        layer: DiffId,
        /// Why it ended now.
        reason: FailReason,
        /// What was tried.
        tried: Vec<Tried>,
    },
    /// The layer was never opened, or the daemon ends.
    #[error("the node is ending")]
    Ended,
}

impl FetchError {
    /// What the registry, from which everything can come, has to say; `None` when it has failed in passing, was not
    /// asked, or has not answered.
    pub fn registry_failure(&self) -> Option<ErrorClass> {
        match self {
            Self::Failed { tried, .. } => registry_failure(tried),
            Self::Ended => None,
        }
    }
}

fn registry_failure(tried: &[Tried]) -> Option<ErrorClass> {
    tried.iter().find(|tried| tried.source == Source::Origin).and_then(|tried| tried.failure)
}

/// What was tried, and what to do about it.
fn describe(reason: FailReason, tried: &[Tried]) -> String {
    let reason = match reason {
        FailReason::Deadline => "no source answered in time",
        FailReason::Refused => "no source can give the bytes",
        FailReason::Overload => "too many reads wait already",
        FailReason::Closed => "the image was unmounted",
        FailReason::Unknown => "the layer is not open here",
    };
    let next = match registry_failure(tried) {
        Some(ErrorClass::Denied) => "check the registry's credentials",
        Some(ErrorClass::NotFound) => "check that the registry still has the layer",
        Some(ErrorClass::PeerFault) => "the registry's blob is not the one that was indexed; build the index again",
        Some(ErrorClass::Local) => "check the disk under the state folder",
        Some(ErrorClass::Transient) | None => "check the network, or add a peer that has the image",
    };
    let tried = tried.iter().map(|tried| match tried.failure {
        Some(class) => format!("{}: {class}", tried.name),
        None => format!("{}: no answer yet", tried.name),
    });
    let tried = tried.collect::<Vec<_>>().join(", ");
    let tried = if tried.is_empty() { "nothing could be asked".to_owned() } else { tried };
    format!("{reason} ({tried}); {next}")
}

/// What reaches the driver.
#[derive(Debug)]
pub(crate) enum Command {
    Open {
        layer: Arc<OpenLayer>,
        local: Runs,
        ready: oneshot::Sender<()>,
    },
    OriginsChanged {
        layer: DiffId,
    },
    Close {
        layer: DiffId,
    },
    Need {
        read: ReadId,
        layer: DiffId,
        chunks: Runs,
        class: Class,
        deadline: Instant,
        done: oneshot::Sender<Answer>,
    },
    Withdraw {
        read: ReadId,
    },
    Hit {
        layer: DiffId,
        chunks: ChunkRange,
    },
    LocalHas {
        layer: DiffId,
        chunks: Runs,
    },
    Evicted {
        layer: DiffId,
        chunks: Runs,
    },
    Arrived {
        layer: DiffId,
        chunks: Runs,
        overflow: Vec<(ChunkNo, Bytes)>,
        from: Option<Brought>,
    },
    Progress {
        ask: AskId,
    },
    /// What a peer answered beside chunks.
    Referred {
        ask: AskId,
        chunks: Runs,
        peers: Vec<PeerId>,
    },
    Delegated {
        ask: AskId,
        chunks: Runs,
    },
    Pending {
        ask: AskId,
        registry_rests: Option<Duration>,
    },
    /// Whoever asked this node does not wait any more.
    ClaimEnded {
        claim: ClaimId,
    },
    Ended {
        ask: AskId,
        outcome: Outcome,
    },
    PeerHas {
        peer: PeerId,
        layer: DiffId,
        chunks: Runs,
    },
    HoldersFound {
        layer: DiffId,
    },
    FindDonors {
        layer: DiffId,
        found: oneshot::Sender<()>,
    },
    SpansFound {
        layer: DiffId,
        blob: Arc<Blob>,
        /// Why the registry cannot be read without them.
        found: Result<(), ErrorClass>,
    },
    Status {
        answer: oneshot::Sender<Status>,
    },
    Waiting {
        answer: oneshot::Sender<Vec<WaitingRead>>,
    },
    Trace {
        layers: Vec<DiffId>,
        answer: oneshot::Sender<ImageTrace>,
    },
    Held {
        layer: DiffId,
        answer: oneshot::Sender<Vec<Runs>>,
    },
    Peers {
        peers: Vec<PeerId>,
        answer: oneshot::Sender<Vec<PeerAccount>>,
    },
}

type Answer = Result<Delivered, FetchError>;

/// How readers reach the driver. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FetchHandle {
    commands: mpsc::Sender<Command>,
    store: Arc<Store>,
    next_read: Arc<AtomicU64>,
    completions: watch::Receiver<()>,
}

impl FetchHandle {
    fn new(commands: mpsc::Sender<Command>, store: Arc<Store>, completions: watch::Receiver<()>) -> Self {
        Self { commands, store, next_read: Arc::default(), completions }
    }

    /// Changes whenever a layer has become complete, and is closed when the driver has ended.
    pub fn completions(&self) -> watch::Receiver<()> {
        self.completions.clone()
    }

    /// Waits until `chunks` of `layer` are in the store; what the store cannot take is handed over.
    ///
    /// Cancel safe: a need that is dropped is withdrawn, and what nobody else waits for is stopped.
    ///
    /// # Errors
    /// When no source had them by `deadline`, or every source has refused them for good.
    pub async fn need(&self, layer: DiffId, chunks: Runs, class: Class, deadline: Instant) -> Answer {
        let read = ReadId(self.next_read.fetch_add(1, Ordering::Relaxed));
        let (done, answer) = oneshot::channel();
        let command = Command::Need { read, layer, chunks, class, deadline, done };
        self.commands.send(command).await.map_err(|_| FetchError::Ended)?;
        let mut withdrawal = Withdrawal { commands: &self.commands, read: Some(read) };
        let answer = answer.await;
        withdrawal.read = None;
        answer.unwrap_or(Err(FetchError::Ended))
    }

    /// Tells that a read has found `chunks` in the store and reached one of the layer's [`Marks`]. Never waits: a
    /// report that finds the driver too busy is lost, and readahead begins anew at the next miss.
    pub fn hit(&self, layer: DiffId, chunks: ChunkRange) {
        let _ = self.commands.try_send(Command::Hit { layer, chunks });
    }

    /// Opens `layer`: its chunks can be needed from when this returns. What other layers on this node hold of it is
    /// looked up for as long as `patience`; what is found later than that is used from then on. Not cancel safe in
    /// that the layer may be open afterwards.
    pub async fn open(&self, layer: Arc<OpenLayer>, patience: Duration) {
        let (ready, opened) = oneshot::channel();
        let (diff_id, store, looked_at) = (layer.diff_id(), Arc::clone(&self.store), Arc::clone(&layer));
        // A look-up of every missing chunk in the catalogue: seconds for a large layer on a slow disk.
        let mut look = tokio::task::spawn_blocking(move || {
            store.local_runs(&looked_at.layer).unwrap_or_else(|error| {
                tracing::warn!(layer = %diff_id, %error, "nothing is copied from other layers");
                Runs::new()
            })
        });
        let in_time = tokio::time::timeout(patience, &mut look).await;
        let is_late = in_time.is_err();
        let local = in_time.map_or_else(|_| Runs::new(), Result::unwrap_or_default);
        if self.commands.send(Command::Open { layer, local, ready }).await.is_err() {
            return;
        }
        if is_late {
            let commands = self.commands.clone();
            tokio::spawn(async move {
                let chunks = look.await.unwrap_or_default();
                let _ = commands.send(Command::LocalHas { layer: diff_id, chunks }).await;
            });
        }
        let _ = opened.await;
    }

    /// Tells that the users of `layer`, and with them its registries, have changed: what was refused is asked for
    /// again. Cancel safe.
    pub async fn origins_changed(&self, layer: DiffId) {
        let _ = self.commands.send(Command::OriginsChanged { layer }).await;
    }

    /// Closes a layer; reads that still wait for it fail. Cancel safe.
    pub async fn close(&self, layer: DiffId) {
        let _ = self.commands.send(Command::Close { layer }).await;
    }

    /// Asks peers what they have of the donors of `layer`; returns when those have answered that do so soon. Cancel safe.
    pub async fn find_donors(&self, layer: DiffId) {
        let (found, answered) = oneshot::channel();
        if self.commands.send(Command::FindDonors { layer, found }).await.is_ok() {
            let _ = answered.await;
        }
    }

    /// Tells that chunks left the store. Cancel safe.
    pub async fn evicted(&self, layer: DiffId, chunks: Runs) {
        let _ = self.commands.send(Command::Evicted { layer, chunks }).await;
    }

    /// Tells that chunks came into the store some other way, such as while an index was built. Cancel safe.
    pub async fn arrived(&self, layer: DiffId, chunks: Runs) {
        let _ = self.commands.send(Command::Arrived { layer, chunks, overflow: Vec::new(), from: None }).await;
    }

    /// What each peer has said that it has of `layer`; nothing when the daemon ends. Cancel safe.
    pub async fn held(&self, layer: DiffId) -> Vec<Runs> {
        let (answer, held) = oneshot::channel();
        if self.commands.send(Command::Held { layer, answer }).await.is_err() {
            return Vec::new();
        }
        held.await.unwrap_or_default()
    }

    /// What waits and what is under way. Cancel safe.
    pub async fn status(&self) -> Status {
        let (answer, status) = oneshot::channel();
        if self.commands.send(Command::Status { answer }).await.is_err() {
            return Status::default();
        }
        status.await.unwrap_or_default()
    }
}

/// Reads that are listed in one dump.
const WAITING_MAX: usize = 1000;

impl FetchHandle {
    /// The reads that wait, the longest first, without their files; at most a thousand. Cancel safe.
    pub async fn waiting(&self) -> Vec<WaitingRead> {
        let (answer, waiting) = oneshot::channel();
        if self.commands.send(Command::Waiting { answer }).await.is_err() {
            return Vec::new();
        }
        waiting.await.unwrap_or_default()
    }
}

/// What is known of a peer.
#[derive(Debug, Clone, Copy, Default)]
pub struct PeerAccount {
    /// By the policy.
    pub view: PeerView,
    /// Uncompressed bytes that came from it since the daemon started.
    pub from_bytes: u64,
}

impl FetchHandle {
    /// Who was asked for chunks of `layers`, when, why, and what came of it. Cancel safe.
    pub async fn trace(&self, layers: Vec<DiffId>) -> ImageTrace {
        let (answer, trace) = oneshot::channel();
        if self.commands.send(Command::Trace { layers, answer }).await.is_err() {
            return ImageTrace::default();
        }
        trace.await.unwrap_or_default()
    }

    /// What is known of each of `peers`, in their order; nothing when the daemon ends. Cancel safe.
    pub async fn peers(&self, peers: Vec<PeerId>) -> Vec<PeerAccount> {
        let (answer, accounts) = oneshot::channel();
        if self.commands.send(Command::Peers { peers, answer }).await.is_err() {
            return Vec::new();
        }
        accounts.await.unwrap_or_default()
    }
}

/// Withdraws a need whose future was dropped.
struct Withdrawal<'a> {
    commands: &'a mpsc::Sender<Command>,
    read: Option<ReadId>,
}

impl Drop for Withdrawal<'_> {
    fn drop(&mut self) {
        if let Some(read) = self.read {
            // When the queue is full the read stays until its deadline, which bounds it.
            let _ = self.commands.try_send(Command::Withdraw { read });
        }
    }
}
