//! Chunks from one peer, each checked against the chunk table before it is handed out.
//!
//! A task of its own reads, decompresses and hashes, so that the stream is always being read and a slow caller only
//! holds back its own peer. The task ends with the transfer, with the deadline, or when its [`Fetch`] is dropped.
//!
//! Answers come in any order. What is left of a request is a set of chunks, from which every frame that answers takes
//! some out; so a chunk that was never asked for, or comes twice, is noticed, and no answer is endless. PENDING takes
//! nothing out, so it has limits of its own in number and in time.

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use hermes_image::ids::ChunkNo;
use hermes_image::index::chunks::ChunkTable;
use hermes_image::runs::Runs;
use hermes_image::verify::Verified;
use libp2p::PeerId;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use super::client::{Client, Lease, believable};
use super::codec::{Accept, Answer, Class, Encoding, GET_CHUNKS_MAX, Request, Want, extent_fits};
use super::error::ExchangeError;

/// Checked chunks that wait for the caller: 2 MiB of the usual size.
const ARRIVALS_MAX: usize = 32;

/// PENDING may come this often at once, and beyond it once every [`PENDING_EVERY_MIN`]. A peer of this version says it
/// when it begins to wait and then every 100 ms.
const PENDING_BURST: u32 = 4;
/// See [`PENDING_BURST`]. Counted from the request, so that what was held up on the way does not look like a flood.
const PENDING_EVERY_MIN: Duration = Duration::from_millis(50);

/// What is asked of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asking {
    /// Which chunks.
    pub chunks: Runs,
    /// The extent that they belong to. With [`Want::Here`] they need not lie within it, and 0..0 means none; with
    /// [`Want::Owner`] all of them do.
    pub extent: Range<u32>,
    /// What is expected of the peer.
    pub want: Want,
    /// How urgent.
    pub class: Class,
}

impl Asking {
    /// Asks for those of `chunks` that the peer has.
    pub fn here(chunks: Runs, class: Class) -> Self {
        Self { chunks, extent: 0..0, want: Want::Here, class }
    }
}

/// What has come of a fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arrival {
    /// A chunk, checked.
    Chunk(ChunkNo, Verified<Bytes>),
    /// Chunks that the peer does not have; they will not come.
    Lacks(Runs),
    /// Nothing has come yet, but the peer sees to it. A caller that is behind may miss some of these.
    Pending {
        /// When the next chunk may come, if the peer knows; at most a minute.
        eta: Option<Duration>,
        /// How long the registry lets the peer wait, if it does; at most a minute.
        registry_rests: Option<Duration>,
    },
    /// Chunks that are to be had from others; they will not come from this peer.
    Refer {
        /// Which.
        chunks: Runs,
        /// From whom: one to four, never this node. Their addresses are remembered already.
        peers: Vec<PeerId>,
    },
    /// Chunks that this node is to read from the source, because the peer sends others to it for them. They will not come
    /// from this peer. There may be chunks of the extent among them that were not asked for.
    Delegate(Runs),
}

#[derive(Debug)]
enum Delivery {
    Arrival(Arrival),
    End(Result<(), ExchangeError>),
}

/// A transfer from one peer, as a stream of [`Arrival`]s in any order.
///
/// It ends after every chunk was delivered, lacking, referred or delegated, or after one error; nothing that a peer sent after a
/// wrong byte is ever delivered. Dropping it cancels the transfer: the stream to the peer is reset, which tells the peer
/// to stop, and its place in the pool is free at once.
#[derive(Debug)]
pub struct Fetch {
    deliveries: mpsc::Receiver<Delivery>,
    _task: AbortOnDropHandle<()>,
    ended: bool,
}

impl Stream for Fetch {
    type Item = Result<Arrival, ExchangeError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let item = match ready!(self.deliveries.poll_recv(context)) {
            Some(Delivery::Arrival(arrival)) => return Poll::Ready(Some(Ok(arrival))),
            Some(Delivery::End(Ok(()))) => None,
            Some(Delivery::End(Err(error))) => Some(Err(error)),
            // The task was lost: an end without END must not look like success.
            None => Some(Err(ExchangeError::Closed)),
        };
        self.ended = true;
        Poll::Ready(item)
    }
}

impl Fetch {
    /// Starts to fetch from `peer`.
    pub(crate) fn start(
        client: Arc<Client>,
        peer: PeerId,
        table: ChunkTable,
        asking: Asking,
        deadline: Instant,
    ) -> Self {
        let (deliver, deliveries) = mpsc::channel(ARRIVALS_MAX);
        let tasks = client.tasks.clone();
        let task = tasks.spawn(async move {
            let Asking { chunks, extent, want, class } = asking;
            let job = Job { client, peer, table, extent, want, class, deadline, deliver: deliver.clone() };
            let result = job.client.while_open(job.run(chunks)).await;
            // The caller may have gone, which is how it cancels.
            let _ = deliver.send(Delivery::End(result)).await;
        });
        Self { deliveries, _task: AbortOnDropHandle::new(task), ended: false }
    }
}

struct Job {
    client: Arc<Client>,
    peer: PeerId,
    table: ChunkTable,
    extent: Range<u32>,
    want: Want,
    class: Class,
    deadline: Instant,
    deliver: mpsc::Sender<Delivery>,
}

/// How far the answer to one GET is.
struct Progress {
    /// What was asked for and is not answered.
    open: Runs,
    asked: Runs,
    /// When the request was made.
    begun: Instant,
    /// When a chunk was answered for last; at first, when the answer began.
    moved: Instant,
    /// How often the peer has said that it waits.
    pendings: u32,
    /// Whether that is the last thing it has said.
    waits: bool,
}

impl Progress {
    /// The answer to a request that was begun at `begun` starts now.
    fn new(asked: Runs, begun: Instant) -> Self {
        Self { open: asked.clone(), asked, begun, moved: Instant::now(), pendings: 0, waits: false }
    }

    /// `chunks` are answered for, and the caller knows.
    fn answered(&mut self, chunks: &Runs) {
        self.open.remove_all(chunks);
        self.moved = Instant::now();
        self.waits = false;
    }

    /// The peer says that it waits; whether it may.
    fn pending(&mut self, now: Instant) -> bool {
        self.pendings = self.pendings.saturating_add(1);
        self.waits = true;
        let earned = now.saturating_duration_since(self.begun).as_millis() / PENDING_EVERY_MIN.as_millis();
        u128::from(self.pendings) <= u128::from(PENDING_BURST) + earned
    }

    /// Whether these chunks may be delegated: some that are open, and beside them only others of the extent that were not
    /// asked for.
    fn may_delegate(&self, chunks: &Runs, extent: &Range<u32>) -> bool {
        let beside = chunks.difference(&self.open);
        beside != *chunks && beside.intersection(&self.asked).is_empty() && beside.within(extent.clone()) == beside
    }
}

impl Job {
    async fn run(&self, mut left: Runs) -> Result<(), ExchangeError> {
        let last = left.iter().next_back().map_or(0, |run| run.end);
        let (end, count) = (last.max(self.extent.end), self.table.count());
        if end > count {
            return Err(ExchangeError::NoSuchChunk { end, count });
        }
        if !extent_fits(self.want, &self.extent, &left) {
            return Err(ExchangeError::NotInExtent { extent: self.extent.clone() });
        }
        let accept = if self.client.limits.compression { Accept::Zstd } else { Accept::Plain };
        while !left.is_empty() {
            let chunks = left.take(GET_CHUNKS_MAX);
            left.remove_all(&chunks);
            let request = Request::Get {
                layer: self.table.diff_id(),
                table: self.table.id(),
                class: self.class,
                accept,
                want: self.want,
                extent: self.extent.clone(),
                chunks: chunks.clone(),
            };
            let begun = Instant::now();
            let (lease, first) = self.client.ask(self.peer, self.class, &request, count, self.deadline).await?;
            self.receive(lease, first, Progress::new(chunks, begun), &mut left).await?;
        }
        Ok(())
    }

    /// Reads one answer to its end, which comes exactly when everything asked for is answered for. `later` is what other
    /// requests are to ask for; what is delegated is taken out of it.
    async fn receive(
        &self,
        mut lease: Lease,
        first: Answer,
        mut progress: Progress,
        later: &mut Runs,
    ) -> Result<(), ExchangeError> {
        let peer = self.peer;
        let mut answer = first;
        loop {
            match answer {
                Answer::Data { chunk, encoding, body } => {
                    if !progress.open.contains(chunk.0) {
                        return Err(ExchangeError::Unasked { peer, chunk });
                    }
                    let bytes = self.check(chunk, encoding, body)?;
                    self.hand_out(Arrival::Chunk(chunk, bytes)).await?;
                    progress.answered(&Runs::one(chunk.0..chunk.0 + 1));
                }
                Answer::Lacks { chunks } if chunks.difference(&progress.open).is_empty() => {
                    self.hand_out(Arrival::Lacks(chunks.clone())).await?;
                    progress.answered(&chunks);
                }
                Answer::Refer { chunks, peers } if chunks.difference(&progress.open).is_empty() => {
                    let peers = self.client.heard_of(peer, peers).await?;
                    // To be sent to oneself is to be told that nobody has it.
                    let nobody = peers.is_empty();
                    let arrival = Arrival::Refer { chunks: chunks.clone(), peers };
                    self.hand_out(if nobody { Arrival::Lacks(chunks.clone()) } else { arrival }).await?;
                    progress.answered(&chunks);
                }
                Answer::Delegate { chunks } if progress.may_delegate(&chunks, &self.extent) => {
                    later.remove_all(&chunks);
                    self.hand_out(Arrival::Delegate(chunks.clone())).await?;
                    progress.answered(&chunks);
                }
                Answer::Pending { eta_ms, registry_rests_ms } if !progress.open.is_empty() => {
                    if !progress.pending(Instant::now()) {
                        return Err(ExchangeError::PendingFlood { peer });
                    }
                    let some = |wait_ms| (wait_ms > 0).then(|| believable(wait_ms));
                    self.mention(Arrival::Pending { eta: some(eta_ms), registry_rests: some(registry_rests_ms) })?;
                }
                Answer::NotMine { epoch } if self.want != Want::Here => {
                    lease.done();
                    return Err(ExchangeError::NotMine { peer, epoch });
                }
                Answer::End if progress.open.is_empty() => {
                    lease.done();
                    return Ok(());
                }
                // They end the request wherever it is.
                Answer::Denied | Answer::Busy { .. } => return lease.sort(answer).map(|_| ()),
                other => return Err(lease.unexpected(&other)),
            }
            answer = self.next(&mut lease, &progress).await?;
        }
    }

    /// The next frame. While the peer says that it waits, it may take until `pending_max` has passed without a chunk.
    async fn next(&self, lease: &mut Lease, progress: &Progress) -> Result<Answer, ExchangeError> {
        if !progress.waits {
            return lease.answer(self.table.count(), self.deadline).await;
        }
        let until = self.deadline.min(progress.moved + self.client.limits.pending_max);
        lease.answer_by(self.table.count(), until, self.deadline).await
    }

    /// About 20 us a chunk to hash and 50 us to decompress: less than a change of threads would be worth.
    fn check(&self, chunk: ChunkNo, encoding: Encoding, body: Bytes) -> Result<Verified<Bytes>, ExchangeError> {
        let peer = self.peer;
        let plain = match encoding {
            Encoding::Plain => body,
            Encoding::Zstd => {
                let range = self.table.range(chunk);
                // At most 128 KiB: the table was checked when it was opened.
                let len = (range.end - range.start) as usize;
                self.client.codecs.decompress(&body, len).ok_or(ExchangeError::BadEncoding { peer, chunk })?
            }
        };
        self.table.verify(chunk, plain).map_err(|source| ExchangeError::WrongChunk { peer, chunk, source })
    }

    async fn hand_out(&self, arrival: Arrival) -> Result<(), ExchangeError> {
        let peer = self.peer;
        let sent = timeout_at(self.deadline, self.deliver.send(Delivery::Arrival(arrival))).await;
        sent.map_err(|_| ExchangeError::Timeout { peer, doing: "waiting for the caller" })?
            .map_err(|_| ExchangeError::Closed)
    }

    /// Tells the caller something that it can do without, if there is room.
    fn mention(&self, arrival: Arrival) -> Result<(), ExchangeError> {
        match self.deliver.try_send(Delivery::Arrival(arrival)) {
            Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => Ok(()),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(ExchangeError::Closed),
        }
    }
}
