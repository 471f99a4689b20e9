//! One GET on the answering side.
//!
//! ```text
//!  asked ---- not answered: `open` ---- answered by DATA, LACKS, REFER or DELEGATE; END when `open` is empty
//!               |
//!               +-- `given`      is sent as soon as it is here
//!               +-- undecided    lies with the desk, whose rulings give it or answer for it
//! ```
//!
//! A look at the content and the first batch of what is there are one trip to a blocking thread, made when the desk gives
//! something or the layer grows; so a chunk that this node waits for leaves as soon as it is stored. A transfer slot is
//! held from such a look until everything that it found is sent, and never while nothing can be sent. Waiting is bounded
//! by the claim: in number by the [`Gate`](super::limits::Gate), in time by `claim_timeout`.
//!
//! Dropping this at any await, and every return, drops the receiver of the desk's rulings, which withdraws the claim.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures::{AsyncRead, AsyncWrite};
use hermes_image::ids::{ArtifactId, DiffId};
use hermes_image::runs::Runs;
use libp2p::PeerId;
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{Instant, sleep_until};

use super::codec::{Accept, Answer, Class, GET_CHUNKS_MAX, PeerName, REFER_PEERS_MAX, Want};
use super::desk::{Claim, Ruling};
use super::limits::{Busy, ClaimPermit, Gate, TransferPermit};
use super::progress::Subscription;
use super::server::{ServeError, Server};
use super::session::{Session, SessionError};
use super::upload::{Batch, Upload};
use crate::swarm::Command;

/// How far apart PENDING is said: often enough that an asker notices within a few round trips of a data centre that this
/// node is gone, and half as often as an asker takes for a flood.
const PENDING_EVERY: Duration = Duration::from_millis(100);

/// Longest rest of the registry that is told: as long as an asker believes.
const REST_MAX: Duration = Duration::from_secs(60);

/// What a peer asks for.
pub(super) struct Get {
    pub(super) layer: DiffId,
    pub(super) table: ArtifactId,
    pub(super) class: Class,
    pub(super) accept: Accept,
    pub(super) want: Want,
    pub(super) extent: Range<u32>,
    pub(super) chunks: Runs,
}

/// What the desk was asked.
struct Claimed {
    /// `None` when nothing more is to come.
    rulings: Option<mpsc::Receiver<Ruling>>,
    news: Subscription,
    until: Instant,
    _permit: ClaimPermit,
}

struct Answering<'a> {
    server: &'a Server,
    peer: PeerId,
    get: Get,
    open: Runs,
    given: Runs,
    /// Of `given`: lacking if it is not here at the next look.
    last: Runs,
    /// Whether something given may be here that was not at the last look.
    looks: bool,
    claimed: Option<Claimed>,
    /// Between two looks.
    upload: Option<Upload>,
    /// Answers that wait to be written.
    frames: Vec<u8>,
    /// Whether the last frame of the answer is written, or among `frames`.
    ended: bool,
    /// When PENDING may be said; at once for the first time.
    pending_at: Instant,
    registry_rests_until: Instant,
}

/// What has happened while nothing could be sent.
enum Event {
    Gone,
    Ruled(Option<Ruling>),
    Grown,
    SlotFreed,
    PendingDue,
    Expired,
}

impl Server {
    pub(super) async fn get<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        session: &mut Session<S>,
        peer: PeerId,
        get: Get,
    ) -> Result<(), ServeError> {
        if !self.desk.allows(peer, get.layer) {
            return Ok(self.say(session, &Answer::Denied).await?);
        }
        let now = Instant::now();
        let mut answering = Answering {
            server: self,
            peer,
            open: get.chunks.clone(),
            given: Runs::new(),
            last: Runs::new(),
            looks: false,
            claimed: None,
            upload: None,
            frames: Vec::new(),
            ended: false,
            pending_at: now,
            registry_rests_until: now,
            get,
        };
        match answering.get.want {
            Want::Here => {
                let slot = match self.gate.transfer(peer, answering.get.class) {
                    Ok(slot) => slot,
                    Err(busy) => return Ok(self.busy(session, busy).await?),
                };
                answering.given = answering.open.clone();
                answering.send(session, slot).await?;
            }
            Want::Owner { .. } => {
                if let Err(busy) = answering.claim(answering.open.clone()) {
                    return Ok(self.busy(session, busy).await?);
                }
            }
        }
        answering.run(session).await
    }
}

impl Answering<'_> {
    /// Goes on until everything is answered for.
    async fn run<S: AsyncRead + AsyncWrite + Unpin>(mut self, session: &mut Session<S>) -> Result<(), ServeError> {
        loop {
            self.take_rulings(&Runs::new()).await;
            self.end_when_answered();
            self.write(session).await?;
            if self.ended {
                return Ok(());
            }
            // Before the attempt, so that no slot is missed that becomes free just after it.
            let freed = self.server.gate.freed();
            let sends = self.looks && !self.given.is_empty();
            if sends && let Ok(slot) = self.server.gate.transfer(self.peer, self.get.class) {
                self.send(session, slot).await?;
                continue;
            }
            let Some(claimed) = &mut self.claimed else {
                // Nobody is asked, so nothing will come.
                self.lack(self.open.clone());
                continue;
            };
            let event = tokio::select! {
                // What brings chunks comes before the word that there are none.
                biased;
                () = session.gone() => Event::Gone,
                () = sleep_until(claimed.until) => Event::Expired,
                ruling = next_ruling(&mut claimed.rulings) => Event::Ruled(ruling),
                () = claimed.news.grown() => Event::Grown,
                () = freed, if sends => Event::SlotFreed,
                () = sleep_until(self.pending_at) => Event::PendingDue,
            };
            self.on_event(event).await?;
        }
    }

    async fn on_event(&mut self, event: Event) -> Result<(), ServeError> {
        match event {
            Event::Gone => return Err(SessionError::Closed.into()),
            Event::Ruled(Some(ruling)) => self.rule(ruling, &Runs::new()).await,
            Event::Ruled(None) => self.rulings_ended(),
            Event::Grown => self.looks = true,
            Event::SlotFreed => {}
            Event::PendingDue => {
                let now = Instant::now();
                let rest = self.registry_rests_until.saturating_duration_since(now);
                // When the next chunk comes is not known: it depends on the registry or on another node.
                let registry_rests_ms = u32::try_from(rest.as_millis()).unwrap_or(u32::MAX);
                Answer::Pending { eta_ms: 0, registry_rests_ms }.encode(&mut self.frames);
                self.pending_at = now + PENDING_EVERY;
            }
            Event::Expired => self.lack(self.open.clone()),
        }
        Ok(())
    }

    /// Takes `chunks` to the desk.
    fn claim(&mut self, chunks: Runs) -> Result<(), Busy> {
        let permit = self.server.gate.claim(self.peer)?;
        // Before the desk may say yes, so that nothing is missed that comes just after a look.
        let news = self.server.progress.subscribe(self.get.layer);
        let claim = Claim {
            peer: self.peer,
            layer: self.get.layer,
            table: self.get.table,
            class: self.get.class,
            want: self.get.want,
            extent: self.get.extent.clone(),
            chunks,
        };
        let rulings = Some(self.server.desk.claim(claim));
        let until = Instant::now() + self.server.limits.claim_timeout;
        self.claimed = Some(Claimed { rulings, news, until, _permit: permit });
        Ok(())
    }

    /// The first look has shown that `missing` are not here.
    fn claim_missing(&mut self, missing: Runs) {
        self.given.remove_all(&missing);
        match self.claim(missing.clone()) {
            Ok(()) => {
                // A desk that never decides: the asker is to turn to another holder at once.
                let rulings = self.claimed.as_ref().and_then(|claimed| claimed.rulings.as_ref());
                if rulings.is_none_or(|rulings| rulings.is_closed() && rulings.is_empty()) {
                    self.claimed = None;
                    self.lack(missing);
                }
            }
            Err(Busy { retry_after_ms }) if self.given.is_empty() => {
                self.finish(&Answer::Busy { retry_after_ms });
            }
            // What is here is worth more than the wait for a place.
            Err(_) => self.lack(missing),
        }
    }

    /// Takes what the desk has decided so far. `sending` is on its way already.
    async fn take_rulings(&mut self, sending: &Runs) {
        while !self.ended
            && let Some(rulings) = self.claimed.as_mut().and_then(|claimed| claimed.rulings.as_mut())
        {
            match rulings.try_recv() {
                Ok(ruling) => self.rule(ruling, sending).await,
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => self.rulings_ended(),
            }
        }
    }

    async fn rule(&mut self, ruling: Ruling, sending: &Runs) {
        let free = |chunks: &Runs| chunks.intersection(&self.open).difference(sending);
        match ruling {
            Ruling::Give(chunks) => {
                let chunks = free(&chunks);
                self.looks |= !chunks.is_empty();
                self.given.insert_all(&chunks);
            }
            Ruling::Lacks(chunks) => self.lack(free(&chunks)),
            Ruling::Refer { chunks, peers } => {
                let chunks = free(&chunks);
                let peers = self.names_of(peers).await;
                if peers.is_empty() {
                    self.lack(chunks);
                } else if !chunks.is_empty() {
                    self.answer(&chunks.clone(), &Answer::Refer { chunks, peers });
                }
            }
            Ruling::Delegate(chunks) => {
                let mine = free(&chunks);
                let mut all = chunks.within(self.get.extent.clone()).difference(&self.get.chunks);
                all.insert_all(&mine);
                if all.run_count() > GET_CHUNKS_MAX as usize {
                    all = mine.clone();
                }
                if !mine.is_empty() {
                    self.answer(&mine, &Answer::Delegate { chunks: all });
                }
            }
            Ruling::RegistryRests(rest) => {
                self.registry_rests_until = Instant::now() + rest.min(REST_MAX);
            }
            Ruling::NotMine { epoch } if self.get.want != Want::Here => self.finish(&Answer::NotMine { epoch }),
            // Nobody said that it was.
            Ruling::NotMine { .. } => self.lack(self.open.difference(sending)),
            Ruling::Denied => self.finish(&Answer::Denied),
        }
    }

    /// The desk has nothing more to say. What it said nothing about is given if it is here.
    fn rulings_ended(&mut self) {
        if let Some(claimed) = &mut self.claimed {
            claimed.rulings = None;
        }
        let silent = self.open.difference(&self.given);
        self.looks |= !silent.is_empty();
        self.given.insert_all(&silent);
        self.last.insert_all(&silent);
    }

    /// Whom to name to the asker, and where they are as far as this node knows.
    async fn names_of(&self, peers: Vec<PeerId>) -> Vec<PeerName> {
        let mut others: Vec<PeerId> = Vec::with_capacity(REFER_PEERS_MAX);
        for peer in peers {
            if peer != self.peer && !others.contains(&peer) && others.len() < REFER_PEERS_MAX {
                others.push(peer);
            }
        }
        let (reply, found) = oneshot::channel();
        let asked = self.server.commands.send(Command::Addresses { peers: others, reply }).await;
        let found = if asked.is_ok() { found.await.unwrap_or_default() } else { Vec::new() };
        found.into_iter().map(|(peer, addresses)| PeerName::new(peer, addresses)).collect()
    }

    /// Sends everything given that is here now.
    async fn send<S: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        session: &mut Session<S>,
        _slot: TransferPermit,
    ) -> Result<(), ServeError> {
        let (server, get) = (self.server, &self.get);
        let upload = self.upload.take().unwrap_or_else(|| {
            let of = (get.layer, get.table);
            Upload::new(Arc::clone(&server.content), Arc::clone(&server.codecs), of, get.accept)
        });
        let wanted = self.given.clone();
        self.looks = false;
        let core = server.gate.core(get.class).await;
        let (mut upload, missing, mut batch) = tokio::task::spawn_blocking(move || upload.look(&wanted)).await?;
        drop(core);
        if self.claimed.is_some() {
            let last = std::mem::take(&mut self.last);
            self.lack(missing.intersection(&last));
        } else if !missing.is_empty() {
            self.claim_missing(missing);
        }
        loop {
            self.answered(&batch.answered);
            let ahead = if batch.rest.is_empty() {
                self.upload = Some(upload);
                None
            } else {
                // The next batch is read while this one is written.
                Some(read_ahead(upload, Arc::clone(&server.gate), self.get.class))
            };
            // Before what is ruled: a refusal is the last frame.
            self.frames.append(&mut batch.frames);
            self.take_rulings(&batch.rest).await;
            self.end_when_answered();
            server.gate.pace(self.get.class, self.frames.len()).await;
            server.gate.note_sent(self.peer, self.frames.len());
            self.write(session).await?;
            let Some(ahead) = ahead.filter(|_| !self.ended) else { return Ok(()) };
            (upload, batch) = ahead.await??;
        }
    }

    fn answered(&mut self, chunks: &Runs) {
        for set in [&mut self.open, &mut self.given, &mut self.last] {
            set.remove_all(chunks);
        }
    }

    fn answer(&mut self, chunks: &Runs, answer: &Answer) {
        answer.encode(&mut self.frames);
        self.answered(chunks);
    }

    fn lack(&mut self, chunks: Runs) {
        if !chunks.is_empty() {
            self.answer(&chunks.clone(), &Answer::Lacks { chunks });
        }
    }

    fn end_when_answered(&mut self) {
        if self.open.is_empty() && !self.ended {
            self.finish(&Answer::End);
        }
    }

    /// `answer` is the last frame.
    fn finish(&mut self, answer: &Answer) {
        answer.encode(&mut self.frames);
        self.ended = true;
    }

    async fn write<S: AsyncRead + AsyncWrite + Unpin>(&mut self, session: &mut Session<S>) -> Result<(), SessionError> {
        if self.frames.is_empty() {
            return Ok(());
        }
        let frames = std::mem::take(&mut self.frames);
        session.write_frames(&frames, self.server.limits.stall_timeout).await
    }
}

fn read_ahead(upload: Upload, gate: Arc<Gate>, class: Class) -> JoinHandle<Result<(Upload, Batch), JoinError>> {
    tokio::spawn(async move {
        let _core = gate.core(class).await;
        tokio::task::spawn_blocking(move || upload.next_batch()).await
    })
}

/// The next ruling; `None` when there will be none. Cancel safe.
async fn next_ruling(rulings: &mut Option<mpsc::Receiver<Ruling>>) -> Option<Ruling> {
    match rulings {
        Some(rulings) => rulings.recv().await,
        None => std::future::pending().await,
    }
}
