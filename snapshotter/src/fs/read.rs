//! From a file range to bytes.
//!
//! A request becomes a [`Plan`]: pieces of layers, of the tree's image, and holes. [`Plan::fill`] copies what is there;
//! when all of it is, the request is answered on the FUSE thread that took it (handing hits to other threads halved
//! the throughput, measured). When chunks are missing, the request moves to the async side, waits for just its chunks,
//! and fills again. Presence is the store's word, never what a hole in a file looks like.

use std::cell::RefCell;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fuser::{Errno, ReplyData};
use hermes_image::ids::DiffId;
use hermes_image::index::chunks::ChunkTable;
use hermes_image::runs::Runs;
use hermes_policy::event::FailReason;
use hermes_store::Read;
use parking_lot::Mutex;
use thiserror::Error;

use super::failures::{Failures, Recovered};
use super::locate::Locator;
use crate::fetch::{Class, Delivered, FetchError, FetchHandle, Marks};
use crate::metrics::{RECORDED, ReadFailure};
use crate::profile::Touches;

/// How often a read starts over because chunks that had come were evicted before it could copy them.
const REFILL_MAX: u32 = 8;

/// A layer as readers see it.
#[derive(Debug, Clone)]
pub struct LayerFile {
    /// The bytes at rest.
    pub layer: Arc<hermes_store::Layer>,
    /// Where missing chunks come from.
    pub fetch: FetchHandle,
    /// Where its readers should be heard of.
    pub marks: Arc<Marks>,
    /// What starts that are being recorded have read of it.
    pub touches: Arc<Touches>,
}

impl LayerFile {
    /// The chunk table.
    pub fn table(&self) -> &ChunkTable {
        self.layer.table()
    }

    /// Notes that `range` of the logical space was read without waiting.
    fn was_hit(&self, range: Range<u64>) {
        if self.touches.is_active() {
            self.touches.read(self.table().covering(range.clone()), &Runs::new());
        }
        if self.marks.take(&range) {
            self.fetch.hit(self.layer.diff_id(), self.table().covering(range));
        }
    }
}

/// Why a read failed.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The local file cannot be read.
    #[error("cannot read layer {layer} from the store: {source}")]
    Store {
        /// The layer.
        layer: DiffId,
        /// What the store says.
        source: hermes_store::StoreError,
    },
    /// No source had the bytes in time.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// What came was evicted again and again before it could be read.
    #[error(
        "the store's budget is too small for what is read at once: chunks were evicted {REFILL_MAX} times before a reader saw them"
    )]
    Thrashing,
    /// The same bytes were waited for until now, for another request.
    #[error("layer {layer}: the same bytes did not come in time just now")]
    JustFailed {
        /// The layer.
        layer: DiffId,
    },
}

impl ReadError {
    /// The metric label.
    fn reason(&self) -> ReadFailure {
        match self {
            Self::Store { .. } => ReadFailure::Store,
            Self::Thrashing => ReadFailure::Thrashing,
            Self::JustFailed { .. } => ReadFailure::Deadline,
            Self::Fetch(FetchError::Ended) => ReadFailure::Closed,
            Self::Fetch(FetchError::Failed { reason, .. }) => match reason {
                FailReason::Deadline => ReadFailure::Deadline,
                FailReason::Refused => ReadFailure::Refused,
                FailReason::Overload => ReadFailure::Overload,
                FailReason::Closed | FailReason::Unknown => ReadFailure::Closed,
            },
        }
    }

    /// What the kernel is told. One arm per cause, so that a new one needs a decision.
    fn errno(&self) -> Errno {
        match self {
            Self::Store { .. } | Self::Fetch(_) | Self::Thrashing | Self::JustFailed { .. } => Errno::EIO,
        }
    }
}

/// Where a piece of a read stands.
#[derive(Debug)]
pub enum Piece {
    /// Zeros.
    Hole {
        /// Length in bytes.
        len: usize,
    },
    /// Bytes of the tree's own image.
    Image {
        /// The bytes.
        bytes: Bytes,
    },
    /// Bytes of a layer.
    Layer {
        /// The layer.
        file: Arc<LayerFile>,
        /// First byte in logical space.
        offset: u64,
        /// Length in bytes.
        len: usize,
    },
}

/// What a read has to copy, in order.
#[derive(Debug, Default)]
pub struct Plan {
    pieces: Vec<Piece>,
    len: usize,
}

/// Chunks that the store could not take (it is full): read once, from memory.
type Overflow = Vec<(Arc<LayerFile>, Delivered)>;

impl Plan {
    /// Adds the next piece.
    pub fn push(&mut self, piece: Piece) {
        self.len += match &piece {
            Piece::Hole { len } | Piece::Layer { len, .. } => *len,
            Piece::Image { bytes } => bytes.len(),
        };
        self.pieces.push(piece);
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// How many of the bytes are layers': not holes, and not of the tree's own image.
    fn layer_len_bytes(&self) -> u64 {
        let layers = self.pieces.iter().map(|piece| match piece {
            Piece::Layer { len, .. } => *len as u64,
            Piece::Hole { .. } | Piece::Image { .. } => 0,
        });
        layers.sum()
    }

    /// Whether there is nothing to read.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies into `buffer`, of the plan's length, all that is here. Returns what is missing.
    fn fill(&self, buffer: &mut [u8], overflow: &Overflow) -> Result<Vec<(Arc<LayerFile>, Runs)>, ReadError> {
        let mut missing = Vec::new();
        let mut at = 0;
        for piece in &self.pieces {
            match piece {
                Piece::Hole { len } => {
                    buffer[at..at + len].fill(0);
                    at += len;
                }
                Piece::Image { bytes } => {
                    buffer[at..at + bytes.len()].copy_from_slice(bytes);
                    at += bytes.len();
                }
                Piece::Layer { file, offset, len } => {
                    let part = &mut buffer[at..at + len];
                    let read = file.layer.read_at(*offset, part);
                    match read.map_err(|source| ReadError::Store { layer: file.layer.diff_id(), source })? {
                        Read::Hit(_) => file.was_hit(*offset..offset + *len as u64),
                        Read::Miss(runs) => {
                            if file.touches.is_active() {
                                let range = *offset..offset.saturating_add(*len as u64);
                                file.touches.read(file.table().covering(range), &runs);
                            }
                            let runs = fill_missing(file, *offset, part, runs, overflow)?;
                            if !runs.is_empty() {
                                missing.push((Arc::clone(file), runs));
                            }
                        }
                    }
                    at += len;
                }
            }
        }
        Ok(missing)
    }
}

/// Fills `part`, which starts at `offset`, chunk by chunk from the store and from `overflow`. Returns what neither has.
fn fill_missing(
    file: &Arc<LayerFile>,
    offset: u64,
    part: &mut [u8],
    missing: Runs,
    overflow: &Overflow,
) -> Result<Runs, ReadError> {
    let delivered = overflow.iter().find(|(other, _)| Arc::ptr_eq(other, file)).map(|(_, delivered)| delivered);
    let Some(delivered) = delivered.filter(|delivered| !delivered.is_empty()) else { return Ok(missing) };
    let end = offset + part.len() as u64;
    let mut left = Runs::new();
    for chunk in file.table().covering(offset..end) {
        let range = file.table().range(hermes_image::ids::ChunkNo(chunk));
        let (from, to) = (range.start.max(offset), range.end.min(end));
        let target = &mut part[(from - offset) as usize..(to - offset) as usize];
        if let Some(bytes) = delivered.get(chunk) {
            target.copy_from_slice(&bytes[(from - range.start) as usize..(to - range.start) as usize]);
            continue;
        }
        let read = file.layer.read_at(from, target);
        if let Read::Miss(runs) = read.map_err(|source| ReadError::Store { layer: file.layer.diff_id(), source })? {
            left.insert_all(&runs);
        }
    }
    Ok(left)
}

/// Answers reads.
#[derive(Debug, Clone)]
pub struct Reader {
    runtime: tokio::runtime::Handle,
    deadline: Duration,
    failures: Arc<Mutex<Failures>>,
    locator: Arc<Locator>,
}

impl Reader {
    /// Misses wait on `runtime`, at most `deadline`.
    pub fn new(runtime: tokio::runtime::Handle, deadline: Duration) -> Self {
        Self { runtime, deadline, failures: Arc::default(), locator: Arc::default() }
    }

    /// Where the files of shown trees are found, for messages.
    pub fn locator(&self) -> &Locator {
        &self.locator
    }

    /// Answers `plan`. Never blocks on the network: a miss goes on without this thread.
    pub fn answer(&self, plan: Plan, reply: ReplyData) {
        thread_local!(static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });
        let filled = BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < plan.len() {
                buffer.resize(plan.len(), 0);
            }
            let buffer = &mut buffer[..plan.len()];
            match plan.fill(buffer, &Vec::new()) {
                Ok(missing) if missing.is_empty() => {
                    RECORDED.hit();
                    RECORDED.read_at_once(plan.layer_len_bytes());
                    reply.data(buffer);
                    None
                }
                other => Some((other, reply)),
            }
        });
        match filled {
            None => {}
            Some((Ok(missing), reply)) => {
                RECORDED.missed();
                let now = Instant::now();
                let wanted = missing.iter().map(|(file, runs)| (file.layer.diff_id(), runs));
                let just_missed = self.failures.lock().just_missed(now, wanted);
                if let Some(layer) = just_missed {
                    let error = ReadError::JustFailed { layer };
                    tracing::debug!(%error, "a read failed");
                    RECORDED.read_failed(error.reason());
                    return reply.error(error.errno());
                }
                let deadline = now + self.deadline;
                let reader = self.clone();
                self.runtime.spawn(async move {
                    let wanted = missing.iter().map(|(file, runs)| (file.layer.diff_id(), runs.clone()));
                    let wanted: Vec<_> = wanted.collect();
                    match wait(&plan, missing, deadline).await {
                        Ok(bytes) => {
                            RECORDED.read_after_waiting(plan.layer_len_bytes());
                            reply.data(&bytes);
                            reader.delivered(&wanted);
                        }
                        Err(error) => {
                            let now = Instant::now();
                            if now >= deadline {
                                reader.failures.lock().missed(now, wanted);
                            }
                            reader.fail(&plan, error, reply);
                        }
                    }
                });
            }
            Some((Err(error), reply)) => self.fail(&plan, error, reply),
        }
    }

    /// Answers with an error. The first one of an image that fails is said in the log: the image, the file where one is
    /// found, the layer, and who was asked with which result.
    fn fail(&self, plan: &Plan, error: ReadError, reply: ReplyData) {
        RECORDED.read_failed(error.reason());
        reply.error(error.errno());
        let place = plan.pieces.iter().find_map(|piece| match piece {
            Piece::Layer { file, offset, .. } => Some((file.layer.diff_id(), *offset)),
            Piece::Hole { .. } | Piece::Image { .. } => None,
        });
        let (image, layer) = match &error {
            ReadError::Fetch(FetchError::Failed { image, layer, .. }) => (image.clone(), Some(*layer)),
            _ => (String::new(), place.map(|(layer, _)| layer)),
        };
        let told = layer.map_or(Some(1), |layer| {
            let subject = if image.is_empty() { layer.to_string() } else { image.clone() };
            self.failures.lock().failed(Instant::now(), &subject, layer)
        });
        let Some(failures) = told else {
            return tracing::debug!(image, %error, "another read failed with EIO");
        };
        let locator = Arc::clone(&self.locator);
        // Finding the file reads a tree, which nobody waits for.
        self.runtime.spawn_blocking(move || {
            let file = place.and_then(|(layer, offset)| locator.find(&image, layer, offset));
            let file = file.map_or_else(|| "unknown".to_owned(), |file| file.display().to_string());
            let (layer, offset) = place.map_or_else(Default::default, |(layer, offset)| (layer.to_string(), offset));
            tracing::warn!(%image, %file, %layer, offset, reason = error.reason().name(), %error, failures, "a read failed with EIO");
        });
    }

    /// Says in the log when images can be read again that could not.
    fn delivered(&self, wanted: &[(DiffId, Runs)]) {
        let recovered = self.failures.lock().delivered(Instant::now(), wanted.iter().map(|(layer, _)| *layer));
        for Recovered { subject, failed, lasted } in recovered {
            tracing::info!(subject, failures = failed, ?lasted, "reads that failed go on");
        }
    }

    /// The bytes of `plan`, waiting for what is missing. Cancel safe: a read that is dropped is withdrawn.
    ///
    /// # Errors
    /// When no source had the bytes in time, or the store cannot be read.
    pub async fn read(&self, plan: &Plan) -> Result<Vec<u8>, ReadError> {
        wait(plan, Vec::new(), Instant::now() + self.deadline).await
    }
}

async fn wait(plan: &Plan, mut missing: Vec<(Arc<LayerFile>, Runs)>, deadline: Instant) -> Result<Vec<u8>, ReadError> {
    let mut overflow = Overflow::new();
    for _ in 0..REFILL_MAX {
        let needs = missing.into_iter().map(|(file, runs)| async move {
            let delivered = file.fetch.need(file.layer.diff_id(), runs, Class::Demand, deadline).await?;
            Ok::<_, FetchError>((file, delivered))
        });
        for (file, delivered) in futures::future::try_join_all(needs).await? {
            match overflow.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &file)) {
                Some((_, known)) => known.merge(delivered),
                None => overflow.push((file, delivered)),
            }
        }
        let mut buffer = vec![0; plan.len()];
        missing = plan.fill(&mut buffer, &overflow)?;
        if missing.is_empty() {
            return Ok(buffer);
        }
        // Delivered, and gone again before it could be read: evicted, or found damaged and forgotten.
        for (file, runs) in &missing {
            file.fetch.evicted(file.layer.diff_id(), runs.clone()).await;
        }
    }
    Err(ReadError::Thrashing)
}

/// The error as the I/O error that a reader inside this process sees.
impl From<ReadError> for io::Error {
    fn from(error: ReadError) -> Self {
        Self::other(error)
    }
}
