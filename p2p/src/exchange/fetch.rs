//! Chunks from one peer, each checked against the chunk table before it is handed out.
//!
//! A task of its own reads, decompresses and hashes, so that the stream is always being read and a slow caller only
//! holds back its own peer. The task ends with the transfer, with the deadline, or when its [`Fetch`] is dropped.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

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

use super::client::{Client, Lease};
use super::codec::{Accept, Answer, Class, Encoding, GET_CHUNKS_MAX, Request};
use super::error::ExchangeError;

/// Checked chunks that wait for the caller: 2 MiB of the usual size.
const ARRIVALS_MAX: usize = 32;

/// What has come of a fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arrival {
    /// A chunk, checked.
    Chunk(ChunkNo, Verified<Bytes>),
    /// Chunks that the peer does not have; they will not come.
    Lacks(Runs),
}

#[derive(Debug)]
enum Delivery {
    Arrival(Arrival),
    End(Result<(), ExchangeError>),
}

/// A transfer from one peer, as a stream of [`Arrival`]s in the order of the chunks asked for.
///
/// It ends after every chunk was delivered or reported lacking, or after one error; nothing that a peer sent after a
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
    /// Starts to fetch `chunks` from `peer`.
    pub(crate) fn start(
        client: Arc<Client>,
        peer: PeerId,
        table: ChunkTable,
        chunks: Runs,
        class: Class,
        deadline: Instant,
    ) -> Self {
        let (deliver, deliveries) = mpsc::channel(ARRIVALS_MAX);
        let tasks = client.tasks.clone();
        let task = tasks.spawn(async move {
            let job = Job { client, peer, table, class, deadline, deliver: deliver.clone() };
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
    class: Class,
    deadline: Instant,
    deliver: mpsc::Sender<Delivery>,
}

impl Job {
    async fn run(&self, mut left: Runs) -> Result<(), ExchangeError> {
        let (end, count) = (left.iter().next_back().map_or(0, |run| run.end), self.table.count());
        if end > count {
            return Err(ExchangeError::NoSuchChunk { end, count });
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
                chunks: chunks.clone(),
            };
            let (lease, first) = self.client.ask(self.peer, self.class, &request, count, self.deadline).await?;
            self.receive(lease, first, chunks).await?;
        }
        Ok(())
    }

    /// Reads one answer to its end, which comes exactly when everything asked for has come or is lacking.
    async fn receive(&self, mut lease: Lease, first: Answer, mut open: Runs) -> Result<(), ExchangeError> {
        let mut answer = first;
        loop {
            match answer {
                Answer::Data { chunk, encoding, body } => {
                    if open.first().map(|run| run.start) != Some(chunk.0) {
                        return Err(ExchangeError::Unasked { peer: self.peer, chunk });
                    }
                    open.remove(chunk.0..chunk.0 + 1);
                    let bytes = self.check(chunk, encoding, body)?;
                    self.hand_out(Arrival::Chunk(chunk, bytes)).await?;
                }
                Answer::Lacks { chunks } if chunks.difference(&open).is_empty() => {
                    open.remove_all(&chunks);
                    self.hand_out(Arrival::Lacks(chunks)).await?;
                }
                Answer::End if open.is_empty() => {
                    lease.done();
                    return Ok(());
                }
                other => return Err(lease.unexpected(&other)),
            }
            answer = lease.answer(self.table.count(), self.deadline).await?;
        }
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
}
