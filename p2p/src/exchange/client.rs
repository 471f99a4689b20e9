//! Asks others.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, DiffId, Digest};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::runs::Runs;
use hermes_image::verify::Verified;
use hermes_policy::profile::PROFILE_LEN_MAX_BYTES;
use libp2p::{PeerId, StreamProtocol};
use libp2p_stream::{Control, OpenStreamError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::codec::{
    ANSWER_LEN_MAX_BYTES, Answer, Class, GRANT_LEN_MAX_BYTES, PeerName, Request, STATEMENT_LEN_MAX_BYTES, VERSION,
};
use super::compress::Codecs;
use super::error::ExchangeError;
use super::linked::Linked;
use super::pool::{PeerSession, Pool, Purpose, Slot};
use super::proofs::Proofs;
use super::session::{Session, SessionError};
use crate::config::DownloadLimits;
use crate::error::NodeError;
use crate::swarm::{Command, Shared};

/// How often opening a stream is tried: the other end drops streams that come while it is not looking. Measured on a
/// machine with ten busy processes, three attempts in a row are over within 0.3 ms and all fail; so there are pauses.
const OPEN_ATTEMPTS: u32 = 6;
/// First pause between two attempts; each is three times as long as the one before, 240 ms in all.
const OPEN_PAUSE_FIRST: Duration = Duration::from_millis(2);
/// How often a request is tried when it fails before the first byte of its answer. Idle streams die unnoticed.
const ASK_ATTEMPTS: u32 = 3;
/// Longest wait that a peer can impose with BUSY or PENDING.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
/// Artifact memory is counted in KiB, because a semaphore counts in 32 bits.
const MEMORY_UNIT_BYTES: u64 = 1024;

/// Everything that a request needs. Shared by all handles and tasks of a node.
pub(crate) struct Client {
    pub(crate) local: PeerId,
    pub(crate) control: Control,
    pub(crate) protocol: StreamProtocol,
    pub(crate) pool: Pool,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) codecs: Arc<Codecs>,
    pub(crate) limits: DownloadLimits,
    pub(crate) artifact_memory: Arc<Semaphore>,
    /// This node's own grants, and what it has shown of them.
    pub(crate) proofs: Proofs,
    pub(crate) tasks: TaskTracker,
    pub(crate) cancel: CancellationToken,
}

/// A stream that is in the middle of one request. Dropped before [`Lease::done`], it is reset.
#[derive(Debug)]
pub(crate) struct Lease {
    slot: Slot,
    session: PeerSession,
    peer: PeerId,
    request: &'static str,
    stall_timeout: Duration,
}

impl Client {
    /// The semaphore for `limits`.
    pub(crate) fn artifact_memory(limits: &DownloadLimits) -> Arc<Semaphore> {
        let units = limits.artifacts_len_max_bytes.div_ceil(MEMORY_UNIT_BYTES);
        // At most 2^30: validated.
        Arc::new(Semaphore::new(units as usize))
    }

    /// Runs `work` until it is done or the node shuts down. What breaks because of that is no fault of a peer.
    pub(crate) async fn while_open<T>(
        &self,
        work: impl Future<Output = Result<T, ExchangeError>>,
    ) -> Result<T, ExchangeError> {
        match self.cancel.run_until_cancelled(work).await {
            Some(Ok(value)) => Ok(value),
            Some(Err(error)) if !self.cancel.is_cancelled() => Err(error),
            Some(Err(_)) | None => Err(ExchangeError::Closed),
        }
    }

    /// Sends `request` to `peer` and reads the first frame of the answer. Answers that end the request for every kind of
    /// request are errors here already.
    ///
    /// When the peer denies what is asked of a layer, and this node has a grant for that which it has not shown on this
    /// connection, it shows it and asks once more.
    ///
    /// Cancel safe: the stream is dropped.
    pub(crate) async fn ask(
        &self,
        peer: PeerId,
        purpose: impl Into<Purpose>,
        request: &Request,
        chunk_count: u32,
        deadline: Instant,
    ) -> Result<(Lease, Answer), ExchangeError> {
        let purpose = purpose.into();
        let shown = request.layer().and_then(|layer| self.proofs.shown(&peer, layer));
        match self.ask_plainly(peer, purpose, request, chunk_count, deadline).await {
            Err(ExchangeError::Denied { peer, what }) => match request.layer() {
                Some(layer) if self.show(peer, layer, shown, deadline).await? => {
                    self.ask_plainly(peer, purpose, request, chunk_count, deadline).await
                }
                _ => Err(ExchangeError::Denied { peer, what }),
            },
            answered => answered,
        }
    }

    /// Shows `peer` this node's own grant for `layer`, which it has denied; `shown` is the end of the one that it had then.
    /// Whether that is a reason to ask again.
    async fn show(
        &self,
        peer: PeerId,
        layer: DiffId,
        shown: Option<u64>,
        deadline: Instant,
    ) -> Result<bool, ExchangeError> {
        let Some((not_after, grant)) = self.proofs.unshown(layer, shown) else { return Ok(false) };
        if self.proofs.shown(&peer, layer) == Some(not_after) {
            // Another request has shown it meanwhile.
            return Ok(true);
        }
        // Boxed, because presenting is asking.
        let taken = Box::pin(self.present_grant(peer, grant, deadline)).await?;
        if !taken {
            tracing::info!(%peer, %layer, "a peer does not take this node's grant");
        }
        // One that is refused is refused the next time too.
        self.proofs.note(peer, layer, not_after);
        Ok(taken)
    }

    /// Shows `peer` this node's own grants for `layers`, as far as it has not seen them on this connection. Whether there
    /// are such, and the peer has refused none of them now.
    pub(crate) async fn show_all(
        &self,
        peer: PeerId,
        layers: &[DiffId],
        deadline: Instant,
    ) -> Result<bool, ExchangeError> {
        let mut some = false;
        for layer in layers {
            let shown = self.proofs.shown(&peer, *layer);
            if self.proofs.unshown(*layer, shown).is_some() && !self.show(peer, *layer, shown, deadline).await? {
                return Ok(false);
            }
            // Also one that was shown long ago: another request may have done so while this one was denied.
            some |= self.proofs.unshown(*layer, None).is_some();
        }
        Ok(some)
    }

    async fn ask_plainly(
        &self,
        peer: PeerId,
        purpose: Purpose,
        request: &Request,
        chunk_count: u32,
        deadline: Instant,
    ) -> Result<(Lease, Answer), ExchangeError> {
        let mut attempt = 1;
        loop {
            let error = match self.ask_once(peer, purpose, request, chunk_count, deadline).await {
                Ok((lease, answer)) => return lease.sort(answer),
                Err((error, Reused::Yes)) if attempt < ASK_ATTEMPTS => error,
                Err((error, _)) => return Err(error),
            };
            if !matches!(error, ExchangeError::Disconnected { .. }) {
                return Err(error);
            }
            // The idle streams of a peer die together.
            self.pool.forget(&peer);
            attempt += 1;
        }
    }

    async fn ask_once(
        &self,
        peer: PeerId,
        purpose: Purpose,
        request: &Request,
        chunk_count: u32,
        deadline: Instant,
    ) -> Result<(Lease, Answer), (ExchangeError, Reused)> {
        let slow = |doing| (ExchangeError::Timeout { peer, doing }, Reused::No);
        let slot = timeout_at(deadline, self.pool.slot(peer, purpose)).await;
        let mut slot =
            slot.map_err(|_| slow("waiting for a free stream"))?.ok_or((ExchangeError::Closed, Reused::No))?;
        let (session, reused) = match slot.take_session() {
            Some(session) => (session, Reused::Yes),
            None => {
                let dial_timeout = match request {
                    Request::Get { .. } => self.limits.dial_timeout,
                    _ => self.limits.open_timeout,
                };
                let reached = self.reach(peer, deadline.min(Instant::now() + dial_timeout)).await;
                reached.map_err(|error| (error, Reused::No))?;
                // One at a time: then streams of one asker never push each other out at the other end.
                let turn = timeout_at(deadline, slot.turn_to_open()).await;
                let _turn = turn.map_err(|_| slow("waiting to open a stream"))?;
                (self.open(peer, deadline).await.map_err(|error| (error, Reused::No))?, Reused::No)
            }
        };
        let stall_timeout = self.limits.stall_timeout;
        let mut lease = Lease { slot, session, peer, request: request.name(), stall_timeout };
        let answer = async {
            lease.say(request, deadline).await?;
            lease.answer(chunk_count, deadline).await
        };
        match answer.await {
            Ok(answer) => Ok((lease, answer)),
            Err(error) => Err((error, reused)),
        }
    }

    /// A fresh stream that has shaken hands, over a connection that is there already.
    async fn open(&self, peer: PeerId, deadline: Instant) -> Result<PeerSession, ExchangeError> {
        let deadline = deadline.min(Instant::now() + self.limits.open_timeout);
        let mut attempt = 1;
        loop {
            match self.open_once(peer, deadline).await {
                Err(error @ ExchangeError::Disconnected { .. }) if attempt < OPEN_ATTEMPTS => {
                    tracing::debug!(%peer, attempt, %error, "opening a stream failed");
                    // Not all at the same moment again.
                    let pause = OPEN_PAUSE_FIRST * 3_u32.pow(attempt - 1);
                    tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    async fn open_once(&self, peer: PeerId, deadline: Instant) -> Result<PeerSession, ExchangeError> {
        let slow = || ExchangeError::Timeout { peer, doing: "opening a stream" };
        let mut control = self.control.clone();
        let opened = timeout_at(deadline, control.open_stream(peer, self.protocol.clone())).await;
        let stream = opened.map_err(|_| slow())?.map_err(|error| match error {
            OpenStreamError::UnsupportedProtocol(protocol) => {
                ExchangeError::Unsupported { peer, protocol: protocol.to_string() }
            }
            OpenStreamError::Io(source) => ExchangeError::Disconnected { peer, source },
            other => ExchangeError::Disconnected { peer, source: std::io::Error::other(other.to_string()) },
        })?;
        let lost = || ExchangeError::Disconnected { peer, source: std::io::ErrorKind::NotConnected.into() };
        let mut session = Session::new(Linked::new(stream, self.shared.gone(&peer).ok_or_else(lost)?));
        let mut hello = Vec::new();
        Request::Hello { version: VERSION }.encode(&mut hello);
        let left = deadline.saturating_duration_since(Instant::now());
        session.write_frames(&hello, left).await.map_err(|error| broken(peer, error, "saying hello"))?;
        let frame = session.read_frame(ANSWER_LEN_MAX_BYTES, deadline, left).await;
        let frame = frame.map_err(|error| broken(peer, error, "waiting for hello"))?;
        match Answer::decode(&frame, 0).map_err(|source| ExchangeError::Codec { peer, source })? {
            Answer::Hello { version: VERSION } => Ok(session),
            Answer::Hello { version } => {
                let protocol = format!("{} version {VERSION} but {version}", self.protocol);
                Err(ExchangeError::Unsupported { peer, protocol })
            }
            Answer::Error { reason } => Err(ExchangeError::Refused { peer, reason }),
            other => Err(ExchangeError::Unexpected { peer, request: "HELLO", answer: other.name() }),
        }
    }

    /// Sees that there is a connection to `peer`.
    async fn reach(&self, peer: PeerId, deadline: Instant) -> Result<(), ExchangeError> {
        if self.shared.is_connected(&peer) {
            return Ok(());
        }
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.commands.send(Command::Reach { peer, reply }).await.map_err(|_| NodeError::Closed)?;
            answer.await.map_err(|_| NodeError::Closed)?
        };
        match timeout_at(deadline, asked).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(NodeError::Closed)) => Err(ExchangeError::Closed),
            Ok(Err(source)) => Err(ExchangeError::Unreachable { peer, source: Box::new(source) }),
            Err(_) => Err(ExchangeError::Timeout { peer, doing: "connecting" }),
        }
    }

    /// What `peer` has of the layer of `table`.
    pub(crate) async fn have(
        &self,
        peer: PeerId,
        table: &ChunkTable,
        deadline: Instant,
    ) -> Result<Runs, ExchangeError> {
        let request = Request::Have { layer: table.diff_id(), table: table.id() };
        let (lease, answer) = self.ask(peer, Class::Demand, &request, table.count(), deadline).await?;
        match answer {
            Answer::HaveMap { chunks, .. } => {
                lease.done();
                Ok(chunks)
            }
            other => Err(lease.unexpected(&other)),
        }
    }

    /// Presents `grant` to `peer`; whether the peer takes it.
    pub(crate) async fn present_grant(
        &self,
        peer: PeerId,
        grant: Bytes,
        deadline: Instant,
    ) -> Result<bool, ExchangeError> {
        if !(1..=GRANT_LEN_MAX_BYTES).contains(&grant.len()) {
            return Err(ExchangeError::GrantLength { len_bytes: grant.len(), limit_bytes: GRANT_LEN_MAX_BYTES });
        }
        match self.ask(peer, Class::Demand, &Request::Grant { grant }, 0, deadline).await {
            Ok((lease, Answer::End)) => {
                lease.done();
                Ok(true)
            }
            Ok((lease, other)) => Err(lease.unexpected(&other)),
            Err(ExchangeError::Denied { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Remembers where `from` says that others are, and gives back who they are, each once and without this node.
    pub(crate) async fn heard_of(&self, from: PeerId, names: Vec<PeerName>) -> Result<Vec<PeerId>, ExchangeError> {
        let mut peers = Vec::with_capacity(names.len());
        for PeerName { peer, addresses } in names {
            if peer == self.local || peers.contains(&peer) {
                continue;
            }
            peers.push(peer);
            if !addresses.is_empty() {
                let told = self.commands.send(Command::Hear { from, peer, addresses }).await;
                told.map_err(|_| ExchangeError::Closed)?;
            }
        }
        Ok(peers)
    }

    /// The whole artifact `id`, checked.
    pub(crate) async fn artifact(
        &self,
        peer: PeerId,
        id: ArtifactId,
        limit_bytes: Option<u64>,
        deadline: Instant,
    ) -> Result<Verified<Bytes>, ExchangeError> {
        let request = Request::Artifact { id, offset: 0, len: u64::MAX };
        let wanted = match limit_bytes {
            Some(limit_bytes) => Wanted::Short { limit_bytes },
            None => Wanted::Whole { limit_bytes: self.limits.artifact_len_max_bytes },
        };
        let (bytes, _memory) = self.blob(peer, &request, "artifact", wanted, deadline).await?;
        // Up to hundreds of megabytes: not on an async thread.
        let checked = tokio::task::spawn_blocking(move || Verified::artifact(id, bytes)).await;
        checked.map_err(|_| ExchangeError::Closed)?.map_err(|_| ExchangeError::WrongArtifact { peer, id })
    }

    /// Part of the artifact `id`, not checked: only the caller knows the part's name.
    pub(crate) async fn artifact_range(
        &self,
        peer: PeerId,
        id: ArtifactId,
        range: Range<u64>,
        deadline: Instant,
    ) -> Result<Bytes, ExchangeError> {
        let request = Request::Artifact { id, offset: range.start, len: range.end.saturating_sub(range.start) };
        let (bytes, _memory) = self.blob(peer, &request, "part of an artifact", Wanted::Part(range), deadline).await?;
        Ok(bytes)
    }

    /// The signed statement of `manifest`, not checked: the signature is the caller's business.
    pub(crate) async fn statement(
        &self,
        peer: PeerId,
        manifest: Digest,
        deadline: Instant,
    ) -> Result<Bytes, ExchangeError> {
        let request = Request::Statement { manifest };
        let wanted = Wanted::Whole { limit_bytes: STATEMENT_LEN_MAX_BYTES };
        let (bytes, _memory) = self.blob(peer, &request, "statement", wanted, deadline).await?;
        Ok(bytes)
    }

    /// What starts of the image `manifest` read, not checked: it is a hint, which nobody signs.
    pub(crate) async fn profile(
        &self,
        peer: PeerId,
        manifest: Digest,
        deadline: Instant,
    ) -> Result<Bytes, ExchangeError> {
        let wanted = Wanted::Whole { limit_bytes: PROFILE_LEN_MAX_BYTES as u64 };
        let (bytes, _memory) = self.blob(peer, &Request::Profile { manifest }, "profile", wanted, deadline).await?;
        Ok(bytes)
    }

    async fn blob(
        &self,
        peer: PeerId,
        request: &Request,
        what: &'static str,
        wanted: Wanted,
        deadline: Instant,
    ) -> Result<(Bytes, OwnedSemaphorePermit), ExchangeError> {
        let (mut lease, answer) = self.ask(peer, Class::Demand, request, 0, deadline).await?;
        let Answer::Blob { total_len_bytes } = answer else { return Err(lease.unexpected(&answer)) };
        // A holder says how long the whole is, also when it was asked for a part.
        let (expected_len_bytes, limit_bytes) = match wanted {
            Wanted::Whole { limit_bytes } => (total_len_bytes, limit_bytes),
            Wanted::Short { limit_bytes } if total_len_bytes > limit_bytes => {
                return Err(ExchangeError::NotFound { peer, what });
            }
            Wanted::Short { .. } => (total_len_bytes, self.limits.artifact_len_max_bytes),
            Wanted::Part(range) if range.end > total_len_bytes => return Err(ExchangeError::NotFound { peer, what }),
            Wanted::Part(range) => (range.end.saturating_sub(range.start), self.limits.artifact_len_max_bytes),
        };
        let too_long = |len_bytes, limit_bytes| ExchangeError::TooLong { peer, what, len_bytes, limit_bytes };
        if expected_len_bytes > limit_bytes {
            return Err(too_long(expected_len_bytes, limit_bytes));
        }
        // At most 2^30 by validation of the limits.
        let units = expected_len_bytes.div_ceil(MEMORY_UNIT_BYTES) as u32;
        let memory = timeout_at(deadline, Arc::clone(&self.artifact_memory).acquire_many_owned(units)).await;
        let memory = memory
            .map_err(|_| ExchangeError::Timeout { peer, doing: "waiting for memory" })?
            .map_err(|_| ExchangeError::Closed)?;
        let mut bytes = Vec::new();
        loop {
            match lease.answer(0, deadline).await? {
                Answer::Piece { body } => {
                    let len_bytes = (bytes.len() + body.len()) as u64;
                    if len_bytes > expected_len_bytes {
                        return Err(too_long(len_bytes, expected_len_bytes));
                    }
                    bytes.extend_from_slice(&body);
                }
                Answer::End if bytes.len() as u64 == expected_len_bytes => break,
                other => return Err(lease.unexpected(&other)),
            }
        }
        lease.done();
        Ok((Bytes::from(bytes), memory))
    }
}

/// How much of a blob was asked for.
#[derive(Debug)]
enum Wanted {
    /// All of it, if it is not longer than this.
    Whole { limit_bytes: u64 },
    /// All of it; one that is longer than this is not there.
    Short { limit_bytes: u64 },
    /// These bytes of it.
    Part(Range<u64>),
}

/// Whether a stream was used before, so that its failure says nothing about the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reused {
    Yes,
    No,
}

impl Lease {
    async fn say(&mut self, request: &Request, deadline: Instant) -> Result<(), ExchangeError> {
        let mut frame = Vec::new();
        request.encode(&mut frame);
        let left = deadline.saturating_duration_since(Instant::now()).min(self.stall_timeout);
        let said = self.session.write_frames(&frame, left).await;
        said.map_err(|error| broken(self.peer, error, "sending a request"))
    }

    /// The next frame of the answer.
    pub(crate) async fn answer(&mut self, chunk_count: u32, deadline: Instant) -> Result<Answer, ExchangeError> {
        self.answer_by(chunk_count, deadline.min(Instant::now() + self.stall_timeout), deadline).await
    }

    /// The next frame of the answer, which must begin before `first_by` and end before `deadline`.
    pub(crate) async fn answer_by(
        &mut self,
        chunk_count: u32,
        first_by: Instant,
        deadline: Instant,
    ) -> Result<Answer, ExchangeError> {
        let peer = self.peer;
        let frame = self.session.read_frame(ANSWER_LEN_MAX_BYTES, first_by, self.stall_timeout);
        let frame = timeout_at(deadline, frame).await.unwrap_or(Err(SessionError::Stalled));
        let frame = frame.map_err(|error| broken(peer, error, "waiting for an answer"))?;
        Answer::decode(&frame, chunk_count).map_err(|source| ExchangeError::Codec { peer, source })
    }

    /// Turns the answers that end any request into errors. After all but ERROR the stream is in step.
    pub(crate) fn sort(self, answer: Answer) -> Result<(Self, Answer), ExchangeError> {
        let (peer, what) = (self.peer, noun(self.request));
        let error = match answer {
            Answer::NotFound => ExchangeError::NotFound { peer, what },
            Answer::Denied => ExchangeError::Denied { peer, what },
            Answer::Busy { retry_after_ms } => ExchangeError::Busy { peer, retry_after: believable(retry_after_ms) },
            Answer::Error { reason } => return Err(ExchangeError::Refused { peer, reason }),
            other => return Ok((self, other)),
        };
        self.done();
        Err(error)
    }

    /// The error for an answer that has no place here.
    pub(crate) fn unexpected(&self, answer: &Answer) -> ExchangeError {
        match answer {
            Answer::Error { reason } => ExchangeError::Refused { peer: self.peer, reason: *reason },
            other => ExchangeError::Unexpected { peer: self.peer, request: self.request, answer: other.name() },
        }
    }

    /// The answer was read to its end: the stream may be used again.
    pub(crate) fn done(self) {
        self.slot.give_back(self.session);
    }
}

/// A wait that a peer imposes, cut down to what it may.
pub(crate) fn believable(wait_ms: u32) -> Duration {
    Duration::from_millis(u64::from(wait_ms)).min(RETRY_AFTER_MAX)
}

/// What a request asks for, in words.
fn noun(request: &'static str) -> &'static str {
    match request {
        "ARTIFACT" => "artifact",
        "STATEMENT" => "statement",
        "GRANT" => "grant",
        "PROFILE" => "profile",
        _ => "layer",
    }
}

fn broken(peer: PeerId, error: SessionError, doing: &'static str) -> ExchangeError {
    match error {
        SessionError::Io(source) => ExchangeError::Disconnected { peer, source },
        SessionError::Closed => ExchangeError::Disconnected { peer, source: std::io::ErrorKind::UnexpectedEof.into() },
        SessionError::Codec(source) => ExchangeError::Codec { peer, source },
        SessionError::Stalled => ExchangeError::Timeout { peer, doing },
    }
}
