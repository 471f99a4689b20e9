//! Carrying out one ask: from another layer, from a peer, from the registry.
//!
//! An ask is a future that stores what it gets, reports it, and returns how it ended. It may be dropped at any await:
//! what was stored stays, and nothing else is left behind. Decoding and disk writes run on blocking threads, so many
//! asks use all cores and none of them holds up a reader.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use hermes_image::ids::{ChunkNo, SpanNo};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::runs::Runs;
use hermes_image::span::{SpanDecoder, SpanError};
use hermes_image::verify::Verified;
use hermes_origin::LayerDescriptor;
use hermes_p2p::{Arrival, Asking, ExchangeError, HaveNews, PeerId, Want};
use hermes_policy::class::{Class, ErrorClass};
use hermes_policy::event::{AskId, OriginNo, Outcome, Reason};
use hermes_store::Store;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::blob::{Blob, SpanIndexError};
use super::donor::Donor;
use super::layer::{LayerOrigin, OpenLayer, Rank};
use super::{Brought, COMMANDS_MAX, Command};
use crate::metrics::{ArrivedFrom, Egress, RECORDED};

/// Holders of one layer that are asked what they have; more would not make it quicker.
const HOLDERS_MAX: usize = 8;
/// How long a peer may take to say what it has. In one data centre this is a hundred round trips.
const HAVE_TIMEOUT: Duration = Duration::from_secs(2);
/// Pieces of a body on their way from the socket to the decoder: enough to keep both busy, about 1 MiB.
const PIECES_MAX: usize = 16;
/// Chunks that are written and reported together: one span's worth.
const BATCH_CHUNKS: usize = 8;
/// Longest time that one ask to a peer may take in all: what it may wait for an owner, and 2 MiB at 1 Mbit/s. The policy ends
/// those that make no progress within seconds.
const PEER_ASK_MAX: Duration = Duration::from_secs(60);
/// Longest time that one ask to the registry may take in all: a layer of 10 GB that can only be read from its start, at
/// 1 Mbit/s. The policy ends those that make no progress within seconds.
const ORIGIN_ASK_MAX: Duration = Duration::from_secs(24 * 3600);

const _: () = assert!(PIECES_MAX < COMMANDS_MAX, "asks must not fill the driver's queue");

/// What an ask works with.
pub(super) struct Ask {
    pub(super) id: Option<AskId>,
    /// Why its chunks are wanted.
    pub(super) class: Class,
    pub(super) store: Arc<Store>,
    pub(super) peers: Option<hermes_p2p::Node>,
    pub(super) reports: mpsc::Sender<Command>,
}

type Chunks = Vec<(ChunkNo, Verified<Bytes>)>;

/// What became of chunks that were to be stored.
struct Stored {
    arrived: Runs,
    /// Those that the store could not take.
    overflow: Vec<(ChunkNo, Bytes)>,
    /// Bytes of those that were here already.
    again_bytes: u64,
}

/// Stores `chunks`.
fn store_chunks(open: &OpenLayer, chunks: Chunks) -> Result<Stored, hermes_store::StoreError> {
    let arrived = chunks.iter().map(|(chunk, _)| chunk.0..chunk.0 + 1).collect();
    let again = chunks.iter().filter(|(chunk, _)| open.layer.contains(*chunk));
    let again_bytes = again.map(|(_, bytes)| bytes.len() as u64).sum();
    match open.layer.put_run(&chunks) {
        Ok(()) => Ok(Stored { arrived, overflow: Vec::new(), again_bytes }),
        Err(error) if error.is_full() => {
            if open.should_warn_of_full_store() {
                tracing::warn!(layer = %open.diff_id(), %error, "the store is full; chunks are read uncached");
            }
            let overflow = chunks.into_iter().map(|(chunk, bytes)| (chunk, bytes.into_inner())).collect();
            Ok(Stored { arrived, overflow, again_bytes })
        }
        Err(error) => Err(error),
    }
}

fn failed(class: ErrorClass) -> Outcome {
    Outcome::Failed { class, retry_after: None }
}

/// Copies chunks from other layers of this node.
pub(super) async fn local(work: Ask, open: Arc<OpenLayer>, chunks: Runs) -> Outcome {
    let (store, layer) = (Arc::clone(&work.store), Arc::clone(&open));
    let copied = tokio::task::spawn_blocking(move || {
        let (mut arrived, mut lacking) = (Runs::new(), Runs::new());
        for chunk in chunks.chunks() {
            match store.copy_local(&layer.layer, ChunkNo(chunk)) {
                Ok(true) => arrived.insert(chunk..chunk + 1),
                Ok(false) => lacking.insert(chunk..chunk + 1),
                Err(error) => return Err((error, arrived)),
            }
        }
        Ok((arrived, lacking))
    });
    let (arrived, lacking) = match copied.await {
        Ok(Ok(copied)) => copied,
        Ok(Err((error, arrived))) => {
            tracing::warn!(layer = %open.diff_id(), %error, "cannot copy chunks from another layer");
            report_local(&work, &open, arrived).await;
            return failed(ErrorClass::Local);
        }
        Err(_) => return failed(ErrorClass::Local),
    };
    let bytes = report_local(&work, &open, arrived).await;
    if lacking.is_empty() { Outcome::Done { bytes } } else { Outcome::Lacks { chunks: lacking } }
}

async fn report_local(work: &Ask, open: &OpenLayer, arrived: Runs) -> u64 {
    let bytes = arrived.iter().map(|run| len_of(open, run)).sum();
    open.counters.local.fetch_add(bytes, Ordering::Relaxed);
    RECORDED.arrived(ArrivedFrom::Local, work.class, bytes);
    let from = Some(Brought { ask: work.id, from: ArrivedFrom::Local, bytes, again_bytes: 0 });
    let command = Command::Arrived { layer: open.diff_id(), chunks: arrived, overflow: Vec::new(), from };
    let _ = work.reports.send(command).await;
    bytes
}

fn len_of(open: &OpenLayer, run: Range<u32>) -> u64 {
    let range = open.layer.table().run_range(run);
    range.end - range.start
}

/// Asks a peer for chunks; for those that it has of a donor, under that one's numbers.
pub(super) async fn peer(
    work: Ask,
    open: Arc<OpenLayer>,
    peer: PeerId,
    mut asking: Asking,
    timeout: Duration,
) -> Outcome {
    let mut got = Got::default();
    if asking.want == Want::Here {
        for donor in open.donors() {
            let chunks = donor.held_by(&peer, &asking.chunks);
            if chunks.is_empty() {
                continue;
            }
            asking.chunks.remove_all(&chunks);
            let places = donor.places(&chunks);
            let wanted = places.keys().map(|place| *place..place + 1).collect();
            let asking = Asking::here(wanted, asking.class);
            let from = Giver { peer, table: donor.table(), places: Some(&places), timeout };
            match transfer(&work, &open, &from, asking, &mut got).await {
                // It is not this layer that it does not have, or denies.
                Err(Outcome::Failed { class: ErrorClass::NotFound | ErrorClass::Denied, .. }) => {
                    donor.forget(&peer);
                    got.lacking.insert_all(&chunks);
                }
                Err(outcome) => return outcome,
                Ok(()) => {}
            }
        }
    }
    if !asking.chunks.is_empty() {
        let from = Giver { peer, table: open.layer.table(), places: None, timeout };
        if let Err(outcome) = transfer(&work, &open, &from, asking, &mut got).await {
            return outcome;
        }
    }
    let Got { bytes, lacking } = got;
    if lacking.is_empty() { Outcome::Done { bytes } } else { Outcome::Lacks { chunks: lacking } }
}

/// Whom is asked, by which numbers, and how long it may be silent.
struct Giver<'a> {
    peer: PeerId,
    table: &'a ChunkTable,
    /// The open layer's numbers of the table's chunks; `None` when they are the same.
    places: Option<&'a BTreeMap<u32, Vec<ChunkNo>>>,
    timeout: Duration,
}

impl Giver<'_> {
    /// The open layer's chunks that `runs` are.
    fn own(&self, runs: Runs) -> Runs {
        let Some(places) = self.places else { return runs };
        let chunks = runs.chunks().filter_map(|place| places.get(&place)).flatten();
        chunks.map(|ChunkNo(chunk)| *chunk..chunk + 1).collect()
    }

    /// The same for one that has come.
    fn add(&self, chunk: ChunkNo, bytes: Verified<Bytes>, batch: &mut Chunks) {
        let Some(places) = self.places else { return batch.push((chunk, bytes)) };
        batch.extend(places.get(&chunk.0).into_iter().flatten().map(|chunk| (*chunk, bytes.clone())));
    }
}

/// What came of an ask so far.
#[derive(Default)]
struct Got {
    bytes: u64,
    lacking: Runs,
}

/// Asks a peer once.
async fn transfer(
    work: &Ask,
    open: &Arc<OpenLayer>,
    from: &Giver<'_>,
    asking: Asking,
    got: &mut Got,
) -> Result<(), Outcome> {
    let Some(node) = &work.peers else { return Err(failed(ErrorClass::Local)) };
    let (peer, timeout, class) = (from.peer, from.timeout, asking.class);
    let mut fetch = node.fetch(peer, from.table, asking, Instant::now() + PEER_ASK_MAX);
    let mut batch = Chunks::new();
    loop {
        let Ok(next) = tokio::time::timeout(timeout, fetch.next()).await else {
            tracing::debug!(layer = %open.diff_id(), %peer, ?timeout, "a peer is silent");
            return Err(failed(ErrorClass::Transient));
        };
        let ends = !matches!(next, Some(Ok(Arrival::Chunk(..))));
        if let Some(Ok(Arrival::Chunk(chunk, chunk_bytes))) = &next {
            got.bytes += chunk_bytes.len() as u64;
            from.add(*chunk, chunk_bytes.clone(), &mut batch);
        }
        // A reader that waits for a single chunk must not wait for its neighbours.
        if (ends || batch.len() >= BATCH_CHUNKS || class == hermes_p2p::Class::Demand) && !batch.is_empty() {
            let len = store_batch(work, open, std::mem::take(&mut batch)).await?;
            open.counters.peer.fetch_add(len, Ordering::Relaxed);
            RECORDED.arrived(ArrivedFrom::Peer, work.class, len);
        }
        match next {
            None => return Ok(()),
            Some(Ok(Arrival::Chunk(..))) => {}
            Some(Ok(Arrival::Pending { registry_rests, .. })) => {
                report(work, |ask| Command::Pending { ask, registry_rests }).await;
            }
            Some(Ok(Arrival::Lacks(runs))) => got.lacking.insert_all(&from.own(runs)),
            Some(Ok(Arrival::Refer { chunks, peers })) => {
                let chunks = from.own(chunks);
                report(work, |ask| Command::Referred { ask, chunks, peers }).await;
            }
            Some(Ok(Arrival::Delegate(chunks))) => {
                let chunks = from.own(chunks);
                report(work, |ask| Command::Delegated { ask, chunks }).await;
            }
            Some(Err(error)) => return Err(peer_failed(open, peer, &error)),
        }
    }
}

fn peer_failed(open: &OpenLayer, peer: PeerId, error: &ExchangeError) -> Outcome {
    tracing::info!(layer = %open.diff_id(), %peer, %error, "a peer could not be read");
    match error {
        ExchangeError::Busy { retry_after, .. } => return Outcome::Busy { retry_after: *retry_after },
        ExchangeError::NotMine { epoch, .. } => return Outcome::NotMine { epoch: *epoch },
        _ => {}
    }
    failed(error.class())
}

/// Stores a batch from a peer on a blocking thread and reports it. Returns its length in bytes.
async fn store_batch(work: &Ask, open: &Arc<OpenLayer>, batch: Chunks) -> Result<u64, Outcome> {
    let len = batch.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    let layer = Arc::clone(open);
    let stored = tokio::task::spawn_blocking(move || store_chunks(&layer, batch)).await;
    match stored {
        Ok(Ok(Stored { arrived: chunks, overflow, again_bytes })) => {
            let from = Some(Brought { ask: work.id, from: ArrivedFrom::Peer, bytes: len, again_bytes });
            let _ = work.reports.send(Command::Arrived { layer: open.diff_id(), chunks, overflow, from }).await;
            progress(work).await;
            Ok(len)
        }
        Ok(Err(error)) => {
            tracing::error!(layer = %open.diff_id(), %error, "cannot store chunks");
            Err(failed(ErrorClass::Local))
        }
        Err(_) => Err(failed(ErrorClass::Local)),
    }
}

async fn progress(work: &Ask) {
    report(work, |ask| Command::Progress { ask }).await;
}

async fn report(work: &Ask, command: impl FnOnce(AskId) -> Command) {
    if let Some(ask) = work.id {
        let _ = work.reports.send(command(ask)).await;
    }
}

/// Reads a run of spans from the registry in one request and decodes it. `asked` is the registry that the policy means, and why
/// it is asked.
///
/// Where several images have the blob, one registry's refusal is not the blob's: the others are asked in turn. One
/// that fails in passing is asked last the next time, after the rest that the policy gives it.
pub(super) async fn registry(
    work: Ask,
    open: Arc<OpenLayer>,
    blob: Arc<Blob>,
    (asked, reason): (OriginNo, Reason),
    spans: Range<u32>,
    timeout: Duration,
) -> Outcome {
    let mut refused = failed(ErrorClass::NotFound);
    for (place, (origin, descriptor)) in open.origins_of(&blob).into_iter().enumerate() {
        let from = Place { blob: &blob, origin: &origin, descriptor: &descriptor };
        let outcome = read_spans(&work, &open, from, spans.clone(), (reason, timeout)).await;
        match outcome {
            Outcome::Failed { class: ErrorClass::NotFound | ErrorClass::Denied | ErrorClass::PeerFault, .. } => {
                refused = outcome;
            }
            Outcome::Failed { class: ErrorClass::Transient, .. } => {
                open.rank(&origin, Rank::Last);
                return outcome;
            }
            outcome => {
                if (place > 0 || origin.number != asked) && matches!(outcome, Outcome::Done { .. }) {
                    open.rank(&origin, Rank::First);
                    let _ = work.reports.send(Command::OriginsChanged { layer: open.diff_id() }).await;
                }
                return outcome;
            }
        }
    }
    refused
}

/// What is read where.
#[derive(Clone, Copy)]
struct Place<'a> {
    blob: &'a Blob,
    origin: &'a LayerOrigin,
    descriptor: &'a LayerDescriptor,
}

async fn read_spans(
    work: &Ask,
    open: &Arc<OpenLayer>,
    Place { blob, origin, descriptor }: Place<'_>,
    spans: Range<u32>,
    (reason, timeout): (Reason, Duration),
) -> Outcome {
    let decoder = match decoder(open, blob, spans.clone()).await {
        Ok(decoder) => decoder,
        Err(error) => {
            tracing::error!(layer = %open.diff_id(), %error, "the registry cannot be read without the seek table");
            return failed(error.class());
        }
    };
    let range = match blob.spans(open.layer.table()).await {
        Ok(index) => index.seek.blob_range(spans),
        Err(error) => return failed(error.class()),
    };
    let (pieces, queue) = mpsc::channel(PIECES_MAX);
    let decoded =
        Decoded { open: Arc::clone(open), ask: work.id, class: work.class, reason, reports: work.reports.clone() };
    let decoding = tokio::task::spawn_blocking(move || decode(&decoded, decoder, queue));
    let deadline = Instant::now() + ORIGIN_ASK_MAX;
    let mut body = std::pin::pin!(origin.origin.read(descriptor, range, deadline));
    let mut bytes = 0;
    let broken = loop {
        match tokio::time::timeout(timeout, body.next()).await {
            Ok(Some(Ok(piece))) => {
                bytes += piece.len() as u64;
                open.counters.registry_wire.fetch_add(piece.len() as u64, Ordering::Relaxed);
                RECORDED.received(piece.len() as u64);
                progress(work).await;
                if pieces.send(piece).await.is_err() {
                    // The decoder has all it needs, or has failed; it says which.
                    break None;
                }
            }
            Ok(Some(Err(error))) => break Some((error.class(), error.retry_after(), error.to_string())),
            Ok(None) => break None,
            Err(_) => {
                break Some((
                    ErrorClass::Transient,
                    None,
                    format!("no byte came from {} for {timeout:?}", origin.origin.host()),
                ));
            }
        }
    };
    drop(pieces);
    let decoded = decoding.await;
    if let Some((class, retry_after, error)) = broken {
        if open.registry_ended(Some(class)) {
            tracing::warn!(image = %open.image(), layer = %open.diff_id(), %error, "cannot read the registry");
        } else {
            tracing::debug!(image = %open.image(), layer = %open.diff_id(), %error, "still cannot read the registry");
        }
        return Outcome::Failed { class, retry_after };
    }
    match decoded {
        Ok(Ok(())) => {
            open.registry_ended(None);
            Outcome::Done { bytes }
        }
        Ok(Err(DecodeError::Span(error))) => {
            tracing::error!(image = %open.image(), layer = %open.diff_id(), %error, "the registry's bytes are not the ones that were indexed");
            // From a mirror it is no word about the registry.
            let another = origin.origin.distrust(descriptor);
            failed(if another { ErrorClass::Transient } else { ErrorClass::PeerFault })
        }
        Ok(Err(DecodeError::Store(error))) => {
            tracing::error!(layer = %open.diff_id(), %error, "cannot store chunks");
            failed(ErrorClass::Local)
        }
        Err(_) => failed(ErrorClass::Local),
    }
}

async fn decoder(open: &OpenLayer, blob: &Blob, spans: Range<u32>) -> Result<SpanDecoder, SpanIndexError> {
    let index = blob.spans(open.layer.table()).await?;
    let window = index.window(SpanNo(spans.start)).await?;
    SpanDecoder::run(&index.seek, open.layer.table(), spans, &window)
        .map_err(|error| SpanIndexError::Damaged(error.to_string()))
}

enum DecodeError {
    Span(SpanError),
    Store(hermes_store::StoreError),
}

/// Where decoded chunks go.
struct Decoded {
    open: Arc<OpenLayer>,
    ask: Option<AskId>,
    class: Class,
    reason: Reason,
    reports: mpsc::Sender<Command>,
}

impl Decoded {
    /// Stores and reports chunks.
    fn take(&self, chunks: Chunks) -> Result<(), DecodeError> {
        let bytes: u64 = chunks.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        let Stored { arrived, overflow, again_bytes } = store_chunks(&self.open, chunks).map_err(DecodeError::Store)?;
        self.open.counters.registry.fetch_add(bytes, Ordering::Relaxed);
        RECORDED.arrived(ArrivedFrom::Registry, self.class, bytes);
        RECORDED.left_registry(Egress::of(self.reason), bytes);
        let from = Some(Brought { ask: self.ask, from: ArrivedFrom::Registry, bytes, again_bytes });
        let command = Command::Arrived { layer: self.open.diff_id(), chunks: arrived, overflow, from };
        let _ = self.reports.blocking_send(command);
        Ok(())
    }
}

/// Decodes pieces as they come; chunks are stored and reported as soon as they are whole.
fn decode(to: &Decoded, mut decoder: SpanDecoder, mut pieces: mpsc::Receiver<Bytes>) -> Result<(), DecodeError> {
    let mut chunks = Chunks::new();
    while let Some(piece) = pieces.blocking_recv() {
        decoder.push(&piece, &mut chunks).map_err(DecodeError::Span)?;
        if !chunks.is_empty() {
            to.take(std::mem::take(&mut chunks))?;
        }
        if decoder.is_done() {
            return Ok(());
        }
    }
    decoder.finish().map_err(DecodeError::Span)
}

/// Looks for holders of a layer and of its donors.
pub(super) async fn holders(work: Ask, open: Arc<OpenLayer>) {
    let own = async {
        ask_holders(&work, &open, None).await;
        let _ = work.reports.send(Command::HoldersFound { layer: open.diff_id() }).await;
    };
    tokio::join!(own, donors(&work, &open));
}

/// Looks for holders of a layer's donors.
pub(super) async fn donors(work: &Ask, open: &OpenLayer) {
    let donors = open.donors();
    futures::future::join_all(donors.iter().map(|donor| ask_holders(work, open, Some(donor)))).await;
}

/// Asks what they have of a layer, or of a donor of it, those that the DHT names, and the peers that are connected.
async fn ask_holders(work: &Ask, open: &OpenLayer, donor: Option<&Donor>) {
    let Some(node) = &work.peers else { return };
    let table = donor.map_or(open.layer.table(), Donor::table);
    let mut holders = node.find_holders(table.diff_id()).await.unwrap_or_default();
    holders.extend(node.peers().into_iter().filter(|peer| !holders.contains(peer)).collect::<Vec<_>>());
    holders.truncate(HOLDERS_MAX);
    let tell = |peer| async move {
        match node.have(peer, table, Instant::now() + HAVE_TIMEOUT).await {
            Ok(runs) => {
                let chunks = match donor {
                    Some(donor) => donor.holds(peer, &runs),
                    None => runs,
                };
                if !chunks.is_empty() {
                    let _ = work.reports.send(Command::PeerHas { peer, layer: open.diff_id(), chunks }).await;
                }
            }
            Err(error) => tracing::debug!(layer = %table.diff_id(), %peer, %error, "a peer does not say what it has"),
        }
    };
    futures::future::join_all(holders.into_iter().map(tell)).await;
}

/// Listens to what one peer has of a layer, and gets, until it has all of it or the layer is closed.
pub(super) async fn watch(work: Ask, open: Arc<OpenLayer>, peer: PeerId) {
    let Some(node) = &work.peers else { return };
    let Ok(_partner) = Arc::clone(&open.partners).try_acquire_owned() else { return };
    let mut news = node.watch(peer, open.layer.table());
    // The driver and the layer may both end while the peer has no news; then nobody listens any more.
    let (reports, layer) = (work.reports.downgrade(), open.diff_id());
    let alive = Arc::downgrade(&open);
    drop(open);
    drop(work.reports);
    while let Some(next) = news.next().await {
        let (Some(reports), Some(_)) = (reports.upgrade(), alive.upgrade()) else { return };
        match next {
            Ok(HaveNews::Map(chunks) | HaveNews::More(chunks)) => {
                let _ = reports.send(Command::PeerHas { peer, layer, chunks }).await;
            }
            Err(error) => {
                tracing::debug!(%layer, %peer, %error, "a peer does not say any more what it has");
                return;
            }
        }
    }
}

/// Gets the restart points of a blob.
pub(super) async fn spans(work: Ask, open: Arc<OpenLayer>, blob: Arc<Blob>) {
    let layer = open.diff_id();
    let found = blob.spans(open.layer.table()).await.map(drop).map_err(|error| {
        tracing::error!(image = %open.image(), %layer, %error, "the registry cannot be read without the seek table");
        error.class()
    });
    let _ = work.reports.send(Command::SpansFound { layer, blob, found }).await;
}
