//! Runs the steps of a build: one after the other, or each on a thread with a bounded queue before it.
//!
//! A thread finishes when it gets the last item, which is marked; an empty block is the mark of the first queues. It
//! stops without a result when its queue is closed before that, or when a later thread has gone: then somebody else has
//! the error, or the build was dropped. Results are looked at from the first step to the last, so the error that is
//! reported is the earliest in the data flow.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::layout::{LaidOut, Layout};
use super::plan::SpanDraft;
use super::unpack::{Piece, Unpacked, Unpacker};
use super::windows::SpanWriter;
use super::{BuildError, ChunkSink, Options};
use crate::ids::{DiffId, LayerId};
use crate::index::seek::SeekTableBuilder;

/// Items that wait before a step: 8 blocks of 64 KiB, or 8 pieces of 256 KiB. Enough to even out steps that take turns
/// on few cores; 5 MiB in all.
const QUEUE_LEN: usize = 8;

/// What the steps know in the end.
pub(super) struct Outcome {
    pub(super) layer: LayerId,
    pub(super) unpacked: Unpacked,
    pub(super) diff_id: DiffId,
    pub(super) layout: LaidOut,
    pub(super) spans: SeekTableBuilder,
}

/// A build under way.
pub(super) enum Engine {
    /// All steps in the caller's thread.
    Inline(Box<Steps>),
    /// A thread for each.
    Threads(Threads),
}

impl Engine {
    pub(super) fn new(options: Options, sink: Option<ChunkSink>) -> Result<Self, BuildError> {
        let steps = Steps::new(options, sink)?;
        if options.threads > 1 { Threads::start(steps).map(Self::Threads) } else { Ok(Self::Inline(Box::new(steps))) }
    }

    /// Takes the next block; gives itself back unless the build has failed.
    pub(super) fn push(self, block: Bytes) -> Result<Self, BuildError> {
        match self {
            Self::Inline(mut steps) => {
                steps.push(&block)?;
                Ok(Self::Inline(steps))
            }
            Self::Threads(mut threads) => {
                if threads.send(&block) {
                    Ok(Self::Threads(threads))
                } else {
                    Err(threads.join().err().unwrap_or(BuildError::Failed))
                }
            }
        }
    }

    /// The blob has ended.
    pub(super) fn finish(self) -> Result<Outcome, BuildError> {
        match self {
            Self::Inline(steps) => steps.finish(),
            Self::Threads(mut threads) => {
                // When a thread has gone already, joining tells why.
                threads.send(&Bytes::new());
                threads.join()
            }
        }
    }
}

/// The steps, and what is on its way between them.
pub(super) struct Steps {
    blob_hash: Sha256,
    unpack: Unpacker,
    tar_hash: Sha256,
    layout: Layout,
    spans: SpanWriter,
    pieces: Vec<Piece>,
    drafts: Vec<SpanDraft>,
}

impl Steps {
    fn new(options: Options, sink: Option<ChunkSink>) -> Result<Self, BuildError> {
        Ok(Self {
            blob_hash: Sha256::new(),
            unpack: Unpacker::new(options.logical_len_max_bytes),
            tar_hash: Sha256::new(),
            layout: Layout::new(options.spans, sink),
            spans: SpanWriter::new(options.spans)?,
            pieces: Vec::new(),
            drafts: Vec::new(),
        })
    }

    fn push(&mut self, block: &[u8]) -> Result<(), BuildError> {
        self.blob_hash.update(block);
        self.unpack.push(block, &mut self.pieces)?;
        self.take_pieces()
    }

    fn take_pieces(&mut self) -> Result<(), BuildError> {
        for piece in self.pieces.drain(..) {
            self.tar_hash.update(&piece.bytes);
            self.layout.push(piece, &mut self.drafts)?;
            for draft in self.drafts.drain(..) {
                self.spans.push(&draft)?;
            }
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Outcome, BuildError> {
        let mut last = Vec::new();
        let unpack = self.unpack;
        let unpacked = unpack.finish(&mut last)?;
        for piece in last {
            self.tar_hash.update(&piece.bytes);
            self.layout.push(piece, &mut self.drafts)?;
        }
        let layout = self.layout.finish(&mut self.drafts)?;
        for draft in self.drafts {
            self.spans.push(&draft)?;
        }
        Ok(Outcome {
            layer: LayerId(self.blob_hash.finalize().into()),
            unpacked,
            diff_id: DiffId(self.tar_hash.finalize().into()),
            layout,
            spans: self.spans.finish(),
        })
    }
}

/// A thread's result: `None` when it stopped because a later thread had gone.
type Step<T> = JoinHandle<Result<Option<T>, BuildError>>;

/// The threads of a build. Dropping them closes the first queues, upon which all end, and waits for that.
pub(super) struct Threads {
    /// To the blob hash and to the unpacker.
    blocks: Vec<SyncSender<Bytes>>,
    /// `None` when joined.
    running: Option<Running>,
}

struct Running {
    blob_hash: Step<LayerId>,
    unpack: Step<Unpacked>,
    tar_hash: Step<DiffId>,
    layout: Step<LaidOut>,
    spans: Step<SeekTableBuilder>,
}

impl Threads {
    fn start(steps: Steps) -> Result<Self, BuildError> {
        let Steps { blob_hash, unpack, tar_hash, layout, spans, .. } = steps;
        let (blob_sender, blob_blocks) = sync_channel(QUEUE_LEN);
        let (unpack_sender, unpack_blocks) = sync_channel(QUEUE_LEN);
        let (tar_sender, tar_pieces) = sync_channel(QUEUE_LEN);
        let (piece_sender, pieces) = sync_channel(QUEUE_LEN);
        let (draft_sender, drafts) = sync_channel(QUEUE_LEN);
        let running = Running {
            blob_hash: spawn("blob-hash", move || Ok(Some(LayerId(hash(blob_hash, &blob_blocks)))))?,
            unpack: spawn("unpack", move || run_unpack(unpack, &unpack_blocks, &tar_sender, &piece_sender))?,
            tar_hash: spawn("tar-hash", move || Ok(Some(DiffId(hash(tar_hash, &tar_pieces)))))?,
            layout: spawn("layout", move || run_layout(layout, &pieces, &draft_sender))?,
            spans: spawn("windows", move || run_windows(spans, &drafts))?,
        };
        Ok(Self { blocks: vec![blob_sender, unpack_sender], running: Some(running) })
    }

    /// Whether both first threads are there to take `block`.
    fn send(&mut self, block: &Bytes) -> bool {
        self.blocks.iter().all(|queue| queue.send(block.clone()).is_ok())
    }

    /// Closes the first queues and waits for all threads.
    fn join(mut self) -> Result<Outcome, BuildError> {
        self.join_running()
    }

    fn join_running(&mut self) -> Result<Outcome, BuildError> {
        self.blocks.clear();
        let Some(Running { blob_hash, unpack, tar_hash, layout, spans }) = self.running.take() else {
            return Err(BuildError::Failed);
        };
        // All are waited for before any error is looked at, so that none outlives the build.
        let layer = wait("blob-hash", blob_hash);
        let unpacked = wait("unpack", unpack);
        let diff_id = wait("tar-hash", tar_hash);
        let layout = wait("layout", layout);
        let spans = wait("windows", spans);
        match (layer?, unpacked?, diff_id?, layout?, spans?) {
            (Some(layer), Some(unpacked), Some(diff_id), Some(layout), Some(spans)) => {
                Ok(Outcome { layer, unpacked, diff_id, layout, spans })
            }
            _ => Err(BuildError::Failed),
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if self.running.is_some() {
            // Nobody asks for the result any more.
            drop(self.join_running());
        }
    }
}

fn spawn<T: Send + 'static>(
    name: &'static str,
    step: impl FnOnce() -> Result<Option<T>, BuildError> + Send + 'static,
) -> Result<Step<T>, BuildError> {
    // Linux shows 15 bytes of a thread's name.
    let builder = std::thread::Builder::new().name(format!("hix-{name}"));
    builder.spawn(step).map_err(|source| BuildError::Thread { name, source })
}

fn wait<T>(name: &'static str, step: Step<T>) -> Result<Option<T>, BuildError> {
    step.join().unwrap_or(Err(BuildError::Panicked { name }))
}

fn hash(mut sha256: Sha256, queue: &Receiver<Bytes>) -> [u8; 32] {
    for bytes in queue {
        sha256.update(&bytes);
    }
    sha256.finalize().into()
}

fn run_unpack(
    mut step: Unpacker,
    blocks: &Receiver<Bytes>,
    to_hash: &SyncSender<Bytes>,
    to_layout: &SyncSender<Piece>,
) -> Result<Option<Unpacked>, BuildError> {
    let hand_on = |pieces: &mut Vec<Piece>| {
        pieces.drain(..).all(|piece| to_hash.send(piece.bytes.clone()).is_ok() && to_layout.send(piece).is_ok())
    };
    let mut pieces = Vec::new();
    for block in blocks {
        if block.is_empty() {
            let unpacked = step.finish(&mut pieces)?;
            return Ok(hand_on(&mut pieces).then_some(unpacked));
        }
        step.push(&block, &mut pieces)?;
        if !hand_on(&mut pieces) {
            break;
        }
    }
    Ok(None)
}

fn run_layout(
    mut step: Layout,
    pieces: &Receiver<Piece>,
    to_windows: &SyncSender<SpanDraft>,
) -> Result<Option<LaidOut>, BuildError> {
    let hand_on = |drafts: &mut Vec<SpanDraft>| drafts.drain(..).all(|draft| to_windows.send(draft).is_ok());
    let mut drafts = Vec::new();
    for piece in pieces {
        let is_last = piece.is_last;
        step.push(piece, &mut drafts)?;
        if is_last {
            let laid_out = step.finish(&mut drafts)?;
            return Ok(hand_on(&mut drafts).then_some(laid_out));
        }
        if !hand_on(&mut drafts) {
            break;
        }
    }
    Ok(None)
}

fn run_windows(mut step: SpanWriter, drafts: &Receiver<SpanDraft>) -> Result<Option<SeekTableBuilder>, BuildError> {
    for draft in drafts {
        step.push(&draft)?;
    }
    Ok(Some(step.finish()))
}
