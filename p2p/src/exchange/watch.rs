//! What a peer has of a layer, and what it gets while it downloads.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::Stream;
use hermes_image::index::chunks::ChunkTable;
use hermes_image::runs::Runs;
use libp2p::PeerId;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

use super::client::Client;
use super::codec::{Answer, Request};
use super::error::ExchangeError;
use super::pool::Purpose;

/// News that wait for the caller. They come at most every 50 ms; beyond it the peer is not read, and sends larger news
/// later.
const NEWS_MAX: usize = 4;
/// How long the first answer may take.
const FIRST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a watch may be silent. A holder that gets nothing for so long is asked anew, if at all.
const SILENCE_MAX: Duration = Duration::from_secs(600);

/// What a peer has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HaveNews {
    /// All that it has now. Comes first.
    Map(Runs),
    /// What it has got since.
    More(Runs),
}

#[derive(Debug)]
enum Delivery {
    News(HaveNews),
    End(Result<(), ExchangeError>),
}

/// What one peer has of one layer, as a stream that ends when it has all of it, or after one error.
///
/// Dropping it ends the watch at both ends.
#[derive(Debug)]
pub struct Watch {
    deliveries: mpsc::Receiver<Delivery>,
    _task: AbortOnDropHandle<()>,
    ended: bool,
}

impl Stream for Watch {
    type Item = Result<HaveNews, ExchangeError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let item = match ready!(self.deliveries.poll_recv(context)) {
            Some(Delivery::News(news)) => return Poll::Ready(Some(Ok(news))),
            Some(Delivery::End(Ok(()))) => None,
            Some(Delivery::End(Err(error))) => Some(Err(error)),
            None => Some(Err(ExchangeError::Closed)),
        };
        self.ended = true;
        Poll::Ready(item)
    }
}

impl Watch {
    /// Starts to watch what `peer` has of the layer of `table`.
    pub(crate) fn start(client: Arc<Client>, peer: PeerId, table: ChunkTable) -> Self {
        let (deliver, deliveries) = mpsc::channel(NEWS_MAX);
        let tasks = client.tasks.clone();
        let task = tasks.spawn(async move {
            let result = client.while_open(watch(&client, peer, &table, &deliver)).await;
            // The caller may have gone, which is how it ends a watch.
            let _ = deliver.send(Delivery::End(result)).await;
        });
        Self { deliveries, _task: AbortOnDropHandle::new(task), ended: false }
    }
}

async fn watch(
    client: &Client,
    peer: PeerId,
    table: &ChunkTable,
    deliver: &mpsc::Sender<Delivery>,
) -> Result<(), ExchangeError> {
    let request = Request::Watch { layer: table.diff_id(), table: table.id() };
    let deadline = Instant::now() + FIRST_TIMEOUT;
    let (mut lease, first) = client.ask(peer, Purpose::Watch, &request, table.count(), deadline).await?;
    let Answer::HaveMap { chunks, .. } = first else { return Err(lease.unexpected(&first)) };
    let mut known = chunks.clone();
    let mut news = HaveNews::Map(chunks);
    loop {
        deliver.send(Delivery::News(news)).await.map_err(|_| ExchangeError::Closed)?;
        if known.contains_all(0..table.count()) {
            return Ok(());
        }
        let silent_until = Instant::now() + SILENCE_MAX;
        let grace = silent_until + Duration::from_secs(60);
        match lease.answer_by(table.count(), silent_until, grace).await? {
            // News that say nothing new would be an endless stream of nothing.
            Answer::HaveMore { chunks } if !chunks.difference(&known).is_empty() => {
                known.insert_all(&chunks);
                news = HaveNews::More(chunks);
            }
            other => return Err(lease.unexpected(&other)),
        }
    }
}
