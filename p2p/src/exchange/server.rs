//! Answers the requests of others.
//!
//! libp2p hands inbound streams over a channel without room and drops those that come while nobody waits, so the accept
//! task does nothing but queue them. Each stream is one task that lives until its asker closes it, breaks the protocol,
//! stalls, or the node shuts down; it holds one request at a time, so a flood waits in the asker's own window.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{AsyncRead, AsyncWrite, StreamExt};
use hermes_image::ids::{ArtifactId, DiffId};
use hermes_image::runs::Runs;
use hermes_policy::profile::PROFILE_LEN_MAX_BYTES;
use libp2p::{PeerId, Stream};
use libp2p_stream::IncomingStreams;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::answering::Get;
use super::codec::{
    Answer, Class, CodecError, MAP_RUNS_MAX, PIECE_LEN_MAX_BYTES, REQUEST_LEN_MAX_BYTES, Reason, Request,
    STATEMENT_LEN_MAX_BYTES, VERSION,
};
use super::compress::Codecs;
use super::limits::{Busy, Gate, StreamPermit};
use super::progress::Progress;
use super::session::{Session, SessionError};
use super::upload::BATCH_LEN_BYTES;
use super::{Content, Desk};
use crate::config::UploadLimits;
use crate::swarm::Command;

/// Inbound streams that wait for their task. A burst of all peers at once; more are dropped, and their askers try again.
const QUEUE_MAX: usize = 256;
/// A stream whose requests were refused this often in a row for their rate is ended.
const REFUSED_IN_A_ROW_MAX: u32 = 64;
/// News of progress are at least this far apart (design, section 6).
const NEWS_EVERY: Duration = Duration::from_millis(50);

/// Why a stream has ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum ServeError {
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A message at the wrong time.
    #[error("{0} at the wrong time")]
    OutOfOrder(&'static str),
    /// Requests that keep coming after BUSY.
    #[error("{REFUSED_IN_A_ROW_MAX} requests in a row above the rate")]
    Flood,
    /// The content panicked.
    #[error("reading content failed")]
    Content(#[from] tokio::task::JoinError),
}

impl From<CodecError> for ServeError {
    fn from(error: CodecError) -> Self {
        Self::Session(error.into())
    }
}

impl ServeError {
    /// What to tell the other side; `None` when nobody listens any more.
    fn reason(&self) -> Option<Reason> {
        match self {
            Self::Session(SessionError::Codec(error)) => Some(Reason::of(error)),
            Self::Session(_) => None,
            Self::OutOfOrder(_) => Some(Reason::OutOfOrder),
            Self::Flood => Some(Reason::Flood),
            Self::Content(_) => Some(Reason::Internal),
        }
    }
}

/// Everything that a stream's task needs.
pub(crate) struct Server {
    pub(super) content: Arc<dyn Content>,
    pub(super) desk: Arc<dyn Desk>,
    pub(super) gate: Arc<Gate>,
    pub(super) codecs: Arc<Codecs>,
    pub(super) progress: Arc<Progress>,
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) limits: UploadLimits,
}

/// Where answers come from.
pub(crate) struct Sources {
    pub(crate) content: Arc<dyn Content>,
    pub(crate) desk: Arc<dyn Desk>,
    pub(crate) codecs: Arc<Codecs>,
    pub(crate) progress: Arc<Progress>,
}

/// A stream that a peer has opened.
pub(crate) type Inbound = (PeerId, Stream);

/// Queues inbound streams and nothing else.
pub(crate) async fn accept(mut incoming: IncomingStreams, queue: mpsc::Sender<Inbound>) {
    while let Some((peer, stream)) = incoming.next().await {
        if queue.try_send((peer, stream)).is_err() {
            tracing::debug!(%peer, "inbound stream dropped: too many wait");
        }
    }
}

/// The queue between [`accept`] and [`Server::run`].
pub(crate) fn queue() -> (mpsc::Sender<Inbound>, mpsc::Receiver<Inbound>) {
    mpsc::channel(QUEUE_MAX)
}

impl Server {
    /// A server of `sources`. `commands` go to the task that knows where peers are.
    pub(crate) fn new(sources: Sources, commands: mpsc::Sender<Command>, limits: UploadLimits) -> Arc<Self> {
        let Sources { content, desk, codecs, progress } = sources;
        Arc::new(Self { content, desk, gate: Gate::new(limits.clone()), codecs, progress, commands, limits })
    }

    /// What guards the uploads.
    pub(crate) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// Serves every stream from `queue` in a task of its own until `cancel`.
    pub(crate) async fn run(
        self: Arc<Self>,
        mut queue: mpsc::Receiver<Inbound>,
        tasks: TaskTracker,
        cancel: CancellationToken,
    ) {
        while let Some(Some((peer, stream))) = cancel.run_until_cancelled(queue.recv()).await {
            let Some(permit) = self.gate.stream(peer) else {
                tracing::debug!(%peer, "inbound stream dropped: the peer or the node has too many");
                continue;
            };
            let (server, cancel) = (Arc::clone(&self), cancel.clone());
            tasks.spawn(async move { cancel.run_until_cancelled(server.serve(peer, stream, permit)).await });
        }
    }

    async fn serve<S: AsyncRead + AsyncWrite + Unpin>(&self, peer: PeerId, stream: S, permit: StreamPermit) {
        let mut session = Session::new(stream);
        let Err(error) = self.converse(peer, &mut session).await else { return };
        if let Some(reason) = error.reason() {
            tracing::info!(%peer, %error, "stream ended: {}", reason.name());
            // Best effort: the other side may have gone.
            let _ = self.say(&mut session, &Answer::Error { reason }).await;
        } else {
            tracing::debug!(%peer, %error, "stream ended");
        }
        session.close(self.limits.stall_timeout).await;
        drop(permit);
    }

    async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        peer: PeerId,
        session: &mut Session<S>,
    ) -> Result<(), ServeError> {
        match self.next(session, self.limits.stall_timeout).await? {
            Request::Hello { version: VERSION } => self.say(session, &Answer::Hello { version: VERSION }).await?,
            Request::Hello { version } => return Err(CodecError::Version(version).into()),
            other => return Err(ServeError::OutOfOrder(other.name())),
        }
        let mut refused = 0;
        loop {
            let request = self.next(session, self.limits.stream_idle_timeout).await?;
            if let Err(busy) = self.gate.request(&peer, Instant::now()) {
                refused += 1;
                if refused > REFUSED_IN_A_ROW_MAX {
                    return Err(ServeError::Flood);
                }
                self.busy(session, busy).await?;
                continue;
            }
            refused = 0;
            match request {
                Request::Hello { .. } => return Err(ServeError::OutOfOrder("HELLO")),
                Request::Have { layer, table } => self.have(session, peer, layer, table).await?,
                Request::Get { layer, table, class, accept, want, extent, chunks } => {
                    self.get(session, peer, Get { layer, table, class, accept, want, extent, chunks }).await?;
                }
                Request::Artifact { id, offset, len } => self.artifact(session, peer, id, offset, len).await?,
                Request::Statement { manifest } => {
                    let content = Arc::clone(&self.content);
                    let found = tokio::task::spawn_blocking(move || content.statement(manifest)).await?;
                    let found = found.filter(|statement| statement.len() as u64 <= STATEMENT_LEN_MAX_BYTES);
                    if found.is_some() && !self.desk.allows_statement(peer, manifest) {
                        self.say(session, &Answer::Denied).await?;
                        continue;
                    }
                    self.blob(session, found, 0, u64::MAX).await?;
                }
                Request::Profile { manifest } => {
                    let content = Arc::clone(&self.content);
                    let found = tokio::task::spawn_blocking(move || content.profile(manifest)).await?;
                    let found = found.filter(|profile| profile.len() <= PROFILE_LEN_MAX_BYTES);
                    // It tells which files of an image are read, so it is for whoever may have its statement.
                    if found.is_some() && !self.desk.allows_statement(peer, manifest) {
                        self.say(session, &Answer::Denied).await?;
                        continue;
                    }
                    self.blob(session, found, 0, u64::MAX).await?;
                }
                Request::Watch { layer, table } => {
                    if self.watch(session, peer, layer, table).await?.is_break() {
                        return Ok(());
                    }
                }
                Request::Grant { grant } => {
                    let answer = if self.desk.grant(peer, &grant) { Answer::End } else { Answer::Denied };
                    self.say(session, &answer).await?;
                }
            }
        }
    }

    async fn next<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        session: &mut Session<S>,
        idle: Duration,
    ) -> Result<Request, ServeError> {
        let first_by = Instant::now() + idle;
        let frame = session.read_frame(REQUEST_LEN_MAX_BYTES, first_by, self.limits.stall_timeout).await?;
        Ok(Request::decode(&frame)?)
    }

    pub(super) async fn say<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        session: &mut Session<S>,
        answer: &Answer,
    ) -> Result<(), SessionError> {
        let mut frame = Vec::new();
        answer.encode(&mut frame);
        session.write_frames(&frame, self.limits.stall_timeout).await
    }

    pub(super) async fn busy<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        session: &mut Session<S>,
        busy: Busy,
    ) -> Result<(), SessionError> {
        self.say(session, &Answer::Busy { retry_after_ms: busy.retry_after_ms }).await
    }

    /// The have-map, read where it may block.
    async fn map(&self, layer: DiffId, table: ArtifactId) -> Result<Option<Runs>, ServeError> {
        let content = Arc::clone(&self.content);
        Ok(tokio::task::spawn_blocking(move || content.have(layer, table)).await?)
    }

    async fn have<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        session: &mut Session<S>,
        peer: PeerId,
        layer: DiffId,
        table: ArtifactId,
    ) -> Result<(), ServeError> {
        if !self.desk.allows(peer, layer) {
            return Ok(self.say(session, &Answer::Denied).await?);
        }
        let answer = match self.map(layer, table).await? {
            None => Answer::NotFound,
            Some(chunks) => {
                let (chunks, cut_short) = fit(chunks);
                Answer::HaveMap { cut_short, chunks }
            }
        };
        Ok(self.say(session, &answer).await?)
    }

    async fn artifact<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        session: &mut Session<S>,
        peer: PeerId,
        id: ArtifactId,
        offset: u64,
        len: u64,
    ) -> Result<(), ServeError> {
        // An index is always waited for.
        let _transfer = match self.gate.transfer(peer, Class::Demand) {
            Ok(transfer) => transfer,
            Err(busy) => return Ok(self.busy(session, busy).await?),
        };
        let content = Arc::clone(&self.content);
        let found = tokio::task::spawn_blocking(move || content.artifact(id)).await?.unwrap_or_else(|error| {
            tracing::error!(%id, %error, "cannot read an artifact that should be here");
            None
        });
        // What is not here is not found, whoever asks: only then do askers prove what they may read.
        if found.is_some() && !self.desk.allows_artifact(peer, id) {
            return Ok(self.say(session, &Answer::Denied).await?);
        }
        self.blob(session, found, offset, len).await
    }

    async fn blob<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        session: &mut Session<S>,
        found: Option<Bytes>,
        offset: u64,
        len: u64,
    ) -> Result<(), ServeError> {
        let Some(whole) = found else { return Ok(self.say(session, &Answer::NotFound).await?) };
        let total_len_bytes = whole.len() as u64;
        let start = offset.min(total_len_bytes);
        let end = start.saturating_add(len).min(total_len_bytes);
        // Both are at most the length of something in memory.
        let part = whole.slice(start as usize..end as usize);
        let mut frames = Vec::new();
        Answer::Blob { total_len_bytes }.encode(&mut frames);
        for at in (0..part.len()).step_by(PIECE_LEN_MAX_BYTES) {
            let body = part.slice(at..part.len().min(at + PIECE_LEN_MAX_BYTES));
            Answer::Piece { body }.encode(&mut frames);
            if frames.len() >= BATCH_LEN_BYTES {
                self.gate.pace(Class::Demand, frames.len()).await;
                session.write_frames(&frames, self.limits.stall_timeout).await?;
                frames.clear();
            }
        }
        Answer::End.encode(&mut frames);
        self.gate.pace(Class::Demand, frames.len()).await;
        Ok(session.write_frames(&frames, self.limits.stall_timeout).await?)
    }

    /// Says what is here and then what comes, until the asker closes the stream. Goes on with other requests
    /// when it could not even begin.
    async fn watch<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        session: &mut Session<S>,
        peer: PeerId,
        layer: DiffId,
        table: ArtifactId,
    ) -> Result<ControlFlow<()>, ServeError> {
        if !self.desk.allows(peer, layer) {
            self.say(session, &Answer::Denied).await?;
            return Ok(ControlFlow::Continue(()));
        }
        let _watcher = match self.gate.watcher() {
            Ok(watcher) => watcher,
            Err(busy) => {
                self.busy(session, busy).await?;
                return Ok(ControlFlow::Continue(()));
            }
        };
        // Before the first look, so that nothing that comes in between is missed.
        let mut news = self.progress.subscribe(layer);
        let Some(have) = self.map(layer, table).await? else {
            self.say(session, &Answer::NotFound).await?;
            return Ok(ControlFlow::Continue(()));
        };
        let (mut said, mut cut_short) = fit(have);
        self.say(session, &Answer::HaveMap { cut_short, chunks: said.clone() }).await?;
        loop {
            let grown = async {
                if !cut_short {
                    news.grown().await;
                }
                tokio::time::sleep(NEWS_EVERY).await;
            };
            tokio::select! {
                closed = session.interrupted() => {
                    return if closed { Ok(ControlFlow::Break(())) } else { Err(ServeError::OutOfOrder("a request after WATCH")) };
                }
                () = grown => {}
            }
            // A grant may end meanwhile.
            if !self.desk.allows(peer, layer) {
                return Ok(ControlFlow::Break(()));
            }
            let Some(have) = self.map(layer, table).await? else { return Ok(ControlFlow::Break(())) };
            let more;
            (more, cut_short) = fit(have.difference(&said));
            if !more.is_empty() {
                said.insert_all(&more);
                self.say(session, &Answer::HaveMore { chunks: more }).await?;
            }
        }
    }
}

/// As many of `chunks` as one message holds, and whether that is less than all.
fn fit(chunks: Runs) -> (Runs, bool) {
    if chunks.run_count() <= MAP_RUNS_MAX {
        return (chunks, false);
    }
    (chunks.iter().take(MAP_RUNS_MAX).collect(), true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_that_does_not_fit_says_less_and_says_so() {
        let apart = |count: u32| (0..count).map(|no| no * 2..no * 2 + 1).collect::<Runs>();
        assert_eq!(fit(apart(MAP_RUNS_MAX as u32)), (apart(MAP_RUNS_MAX as u32), false));
        assert_eq!(fit(apart(MAP_RUNS_MAX as u32 + 5)), (apart(MAP_RUNS_MAX as u32), true));
    }
}
