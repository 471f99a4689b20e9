//! The task that keeps the member list: when to exchange with whom.
//!
//! Every node has up to eight *partners*, drawn at random from the list and changed one a minute, so that all nodes
//! together form a random graph whatever they started from. About once a second it compares its list with one of them.
//! What changes is told four others at once, who tell four others. Partners that cannot be reached are suspected. Who is
//! suspected and connected is asked: a connection alone does not show that anybody is there, as when a network parts. A peer
//! that connects and is no member yet is compared with at once: that is how a node joins.
//!
//! Gathering is async, in tasks of their own with a bound; deciding happens here.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::stream::{BoxStream, SelectAll};
use futures::{FutureExt as _, StreamExt as _};
use libp2p::multiaddr::Protocol;
use libp2p::swarm::DialError;
use libp2p::{Multiaddr, PeerId, StreamProtocol};
use libp2p_stream::{Control, IncomingStreams};
use rand::seq::IndexedRandom as _;
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::MembersConfig;
use super::candidates::Candidates;
use super::codec::News;
use super::provider::Seed;
use super::roster::Roster;
use super::saved::Saved;
use super::sync::{self, EXCHANGE_TIMEOUT};
use crate::canonical::unix_now;
use crate::error::NodeError;
use crate::node::PeerEvent;
use crate::swarm::Command;

/// Partners of a node. A random graph of this degree is connected, and stays so when half of its nodes are gone.
const PARTNERS_MAX: usize = 8;
/// How often one partner is changed. A connection stays for 15 minutes without use, so some 15 linger each way.
const PARTNER_FOR: Duration = Duration::from_secs(60);
/// How many others are told at once: by then who tell others, all of 10,000 hear it in eight steps, but for about two in a
/// hundred, who hear it by comparing.
const TELL: usize = 4;
/// Changes of this long are told together.
const TELL_AFTER: Duration = Duration::from_millis(10);
/// Most exchanges that this node has opened and are on their way.
const OPENED_MAX: usize = 32;
/// How long a peer that is suspected may take to answer: ten times what one with a full link takes. The suspicion counts from then
/// on, for as long as the peer does not answer when it is asked again.
const ANSWER_WAIT: Duration = Duration::from_secs(2);
/// Most connected suspects that are asked again at once, every second.
const ASKED_AGAIN: usize = 4;
/// Most exchanges that others have opened.
const ANSWERED_MAX: usize = 32;
/// Most peers that have connected and wait to be compared with; others compare with this node instead.
const WAITING_MAX: usize = 256;
/// Most places tried at once where members may be.
const TRIED_MAX: usize = 4;
/// A changed list is saved at most this often.
const SAVE_EVERY: Duration = Duration::from_secs(30);
/// And this long after the first change.
const SAVE_AFTER: Duration = Duration::from_secs(2);
/// Wait before a certificate that was not issued is asked for again.
const RENEW_AGAIN: Duration = Duration::from_secs(5);

/// What came of an exchange that this node has opened.
#[derive(Debug)]
enum Outcome {
    Done,
    /// Nobody answers there.
    Unreachable,
    /// There is a connection, of which nothing comes.
    Silent,
    /// There is somebody, but it did not work.
    Failed,
}

/// What the task needs of the node.
pub(crate) struct Wires {
    pub(crate) control: Control,
    pub(crate) protocol: StreamProtocol,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) events: broadcast::Receiver<PeerEvent>,
    pub(crate) announced: watch::Receiver<Vec<Multiaddr>>,
    pub(crate) cancel: CancellationToken,
}

/// The task.
pub(crate) struct Task {
    roster: Arc<Roster>,
    config: MembersConfig,
    wires: Wires,
    candidates: Candidates,
    partners: VecDeque<PeerId>,
    partners_changed: Instant,
    waiting: VecDeque<PeerId>,
    opened: JoinSet<(PeerId, Outcome)>,
    tried: JoinSet<()>,
    renewing: JoinSet<bool>,
    renew_at: Option<Instant>,
    saving: JoinSet<()>,
    /// Number of the newest notice that was seen.
    notice: u64,
    shown_changes: u64,
    saved_changes: u64,
    save_at: Option<Instant>,
    last_save: Option<Instant>,
}

/// Answers the exchanges that others open, each in a task of its own. libp2p drops streams that come while nobody looks,
/// so this does nothing else.
pub(crate) async fn answer(roster: Arc<Roster>, mut incoming: IncomingStreams, cancel: CancellationToken) {
    let places = Arc::new(Semaphore::new(ANSWERED_MAX));
    let mut answering = JoinSet::new();
    loop {
        let (peer, mut stream) = tokio::select! {
            () = cancel.cancelled() => return,
            Some(_) = answering.join_next() => continue,
            stream = incoming.next() => match stream {
                Some(stream) => stream,
                None => return,
            },
        };
        // Dropped: whoever has opened it tries again with somebody else.
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let roster = Arc::clone(&roster);
        answering.spawn(async move {
            let _place = place;
            let answered = tokio::time::timeout(EXCHANGE_TIMEOUT, sync::answer(&roster, &mut stream)).await;
            if let Ok(Err(error)) = answered {
                tracing::debug!(%peer, %error, "an exchange of members has ended early");
            }
        });
    }
}

impl Task {
    /// A task that starts from `saved`, of which what can be believed is in the roster already.
    pub(crate) fn new(roster: Arc<Roster>, config: MembersConfig, wires: Wires, saved: &Saved) -> Self {
        let now = Instant::now();
        let mut candidates = Candidates::default();
        for signed in &saved.entries {
            let is_member = roster.table().get(&signed.entry.key).is_some();
            let Some(peer) = signed.entry.key.peer().filter(|_| !is_member) else { continue };
            for address in signed.entry.multiaddrs() {
                candidates.left(Seed { peer: Some(peer), address }, now);
            }
        }
        let is_missing = !roster.admission().is_open() && roster.admission().own().is_none();
        let renew_at = if is_missing { Some(now + RENEW_AGAIN) } else { next_renewal(&roster, now) };
        Self {
            roster,
            config,
            wires,
            candidates,
            partners: VecDeque::new(),
            partners_changed: now,
            waiting: VecDeque::new(),
            opened: JoinSet::new(),
            tried: JoinSet::new(),
            renewing: JoinSet::new(),
            renew_at,
            saving: JoinSet::new(),
            notice: saved.notice.as_ref().map_or(0, |notice| notice.said().number),
            shown_changes: 0,
            saved_changes: 0,
            save_at: None,
            last_save: None,
        }
    }

    /// Runs until the node ends.
    pub(crate) async fn run(mut self) {
        let mut places: SelectAll<BoxStream<'static, (usize, Vec<Seed>)>> = SelectAll::new();
        for (no, provider) in self.config.providers.iter().enumerate() {
            places.push(provider.places().map(move |seeds| (no, seeds)).boxed());
        }
        let announced = self.wires.announced.borrow_and_update().clone();
        self.roster.set_addresses(&announced);
        self.roster.publish();
        let mut next_round = tokio::time::Instant::now();
        loop {
            let roster = Arc::clone(&self.roster);
            tokio::select! {
                () = self.wires.cancel.cancelled() => break,
                () = tokio::time::sleep_until(next_round) => {
                    let wait = self.config.compare_every.mul_f64(0.75 + 0.5 * rand::random::<f64>());
                    next_round = tokio::time::Instant::now() + wait;
                    self.round(Instant::now());
                }
                () = roster.changed.notified() => {
                    tokio::time::sleep(TELL_AFTER).await;
                    // What has come meanwhile is told with it.
                    let _ = roster.changed.notified().now_or_never();
                    self.on_changed(Instant::now());
                }
                event = self.wires.events.recv() => match event {
                    Ok(event) => self.on_peer(event),
                    Err(broadcast::error::RecvError::Lagged(_)) => self.roster.changed.notify_one(),
                    Err(broadcast::error::RecvError::Closed) => break,
                },
                Ok(()) = self.wires.announced.changed() => {
                    let announced = self.wires.announced.borrow_and_update().clone();
                    self.roster.set_addresses(&announced);
                }
                Some((no, seeds)) = places.next(), if !places.is_empty() => {
                    self.candidates.provided(no, seeds, Instant::now());
                    self.try_places(Instant::now());
                }
                Some(ended) = self.opened.join_next(), if !self.opened.is_empty() => {
                    if let Ok((peer, outcome)) = ended {
                        self.on_outcome(peer, &outcome);
                    }
                }
                Some(_) = self.tried.join_next(), if !self.tried.is_empty() => {}
                Some(_) = self.saving.join_next(), if !self.saving.is_empty() => {}
                Some(renewed) = self.renewing.join_next(), if !self.renewing.is_empty() => {
                    self.on_renewed(matches!(renewed, Ok(true)));
                }
            }
        }
        self.save_now();
        while self.saving.join_next().await.is_some() {}
    }

    /// What is done about once a second.
    fn round(&mut self, now: Instant) {
        for (peer, old) in self.roster.sweep() {
            tracing::info!(%peer, "a member has left the list");
            self.partners.retain(|partner| *partner != peer);
            for address in old.entry.multiaddrs() {
                self.candidates.left(Seed { peer: Some(peer), address }, now);
            }
        }
        if self.roster.changes() != self.shown_changes {
            self.roster.publish();
            self.note_changes(now);
        }
        self.close_who_must_go();
        self.roster.grants().sweep(unix_now());
        if self.renew_at.is_some_and(|due| due <= now) && self.renewing.is_empty() {
            self.renew();
        }
        if self.save_at.is_some_and(|due| due <= now) && self.saving.is_empty() {
            self.last_save = Some(now);
            self.save_now();
        }
        self.choose_partners(now);
        self.try_places(now);
        for peer in self.roster.suspects().sample(&mut rand::rng(), ASKED_AGAIN).copied() {
            self.ask(peer);
        }
        while self.opened.len() < OPENED_MAX
            && let Some(peer) = self.waiting.pop_front()
        {
            self.compare(peer);
        }
        if self.opened.len() < OPENED_MAX
            && let Some(peer) = self.pick_partner()
        {
            self.compare(peer);
        }
    }

    /// What has changed is shown, and is saved soon.
    fn note_changes(&mut self, now: Instant) {
        self.shown_changes = self.roster.changes();
        if self.shown_changes != self.saved_changes && self.config.state_path.is_some() && self.save_at.is_none() {
            let next = self.last_save.map_or(now + SAVE_AFTER, |last| (last + SAVE_EVERY).max(now + SAVE_AFTER));
            self.save_at = Some(next);
        }
        let notice = self.roster.admission().revocation().map_or(0, |notice| notice.said().number);
        if notice != self.notice {
            self.notice = notice;
            // Who was taken out must stay out, whenever this node ends.
            self.save_at = self.save_at.map(|_| now);
            if self.roster.admission().is_outdated() {
                self.renew_at = Some(now);
            }
        }
    }

    /// Closes the connections of those whose certificates have ended or were taken back.
    fn close_who_must_go(&self) {
        let (admission, now) = (self.roster.admission(), unix_now());
        for peer in self.roster.everybody() {
            if let Some(refusal) = admission.must_go(&peer, now) {
                admission.refused(peer, refusal);
                // A full queue is emptied within milliseconds, and this is done again in a second.
                let _ = self.wires.commands.try_send(Command::Close { peer });
            }
        }
    }

    fn choose_partners(&mut self, now: Instant) {
        if now.duration_since(self.partners_changed) >= PARTNER_FOR {
            self.partners_changed = now;
            self.partners.pop_front();
        }
        if self.partners.len() >= PARTNERS_MAX {
            return;
        }
        let list = self.roster.list().borrow().clone();
        let me = self.roster.local();
        // A few draws; whoever is not found now is found in a second.
        for _ in 0..4 * PARTNERS_MAX {
            let Some(member) = list.members().choose(&mut rand::rng()) else { return };
            if member.peer != me && !member.suspected && !self.partners.contains(&member.peer) {
                self.partners.push_back(member.peer);
            }
            if self.partners.len() >= PARTNERS_MAX {
                return;
            }
        }
    }

    /// A partner, or anybody who is connected.
    fn pick_partner(&self) -> Option<PeerId> {
        let partners: Vec<PeerId> = self.partners.iter().copied().collect();
        let connected = || self.roster.connected().choose(&mut rand::rng()).copied();
        partners.choose(&mut rand::rng()).copied().or_else(connected)
    }

    fn on_peer(&mut self, event: PeerEvent) {
        // Who is connected counts as not suspected.
        self.roster.changed.notify_one();
        let (PeerEvent::Up(peer) | PeerEvent::Down(peer)) = event;
        self.roster.note_answer(&peer, true);
        match event {
            PeerEvent::Up(peer) => {
                if self.roster.is_member(&peer) {
                    return;
                }
                if self.opened.len() < OPENED_MAX {
                    self.compare(peer);
                } else if self.waiting.len() < WAITING_MAX && !self.waiting.contains(&peer) {
                    self.waiting.push_back(peer);
                }
            }
            // If it is only the connection that is gone, there is a new one in a moment.
            PeerEvent::Down(peer) if self.partners.contains(&peer) && self.opened.len() < OPENED_MAX => {
                self.compare(peer);
            }
            PeerEvent::Down(_) => {}
        }
    }

    fn on_outcome(&mut self, peer: PeerId, outcome: &Outcome) {
        if !matches!(outcome, Outcome::Done) {
            self.partners.retain(|partner| *partner != peer);
        }
        match outcome {
            Outcome::Done => self.roster.note_answer(&peer, true),
            Outcome::Silent => self.roster.note_answer(&peer, false),
            Outcome::Unreachable => self.roster.suspect(&peer),
            Outcome::Failed => {}
        }
    }

    fn on_changed(&mut self, now: Instant) {
        // Who is connected counts too, which is no change of the roster's own.
        self.roster.publish();
        self.note_changes(now);
        let Some(passing) = self.roster.take_outbox() else { return };
        for peer in passing.also {
            self.ask(peer);
        }
        let members: Vec<PeerId> = {
            let connected = self.roster.connected();
            connected.into_iter().filter(|peer| self.roster.is_member(peer)).collect()
        };
        let others: Vec<PeerId> = self.partners.iter().copied().chain(members).collect();
        let others: Vec<PeerId> = others.into_iter().collect::<HashSet<_>>().into_iter().collect();
        for peer in others.sample(&mut rand::rng(), TELL).copied() {
            // Twice the bound, as this goes before comparing.
            if self.opened.len() < 2 * OPENED_MAX {
                self.tell(peer, passing.news.clone());
            }
        }
    }

    /// Compares with a peer that may be gone, or does so later: there is room left for telling.
    fn ask(&mut self, peer: PeerId) {
        if self.opened.len() >= OPENED_MAX {
            return;
        }
        let (roster, opening) = (Arc::clone(&self.roster), self.opening(peer));
        self.compare_over(peer, async move {
            let stream = tokio::time::timeout(ANSWER_WAIT, opening).await.map_err(|_| Outcome::Silent)??;
            // It has answered, and may have a long list.
            roster.note_answer(&peer, true);
            Ok(stream)
        });
    }

    fn compare(&mut self, peer: PeerId) {
        let opening = self.opening(peer);
        self.compare_over(peer, opening);
    }

    fn compare_over(
        &mut self,
        peer: PeerId,
        opening: impl Future<Output = Result<libp2p::Stream, Outcome>> + Send + 'static,
    ) {
        let roster = Arc::clone(&self.roster);
        self.talk(peer, opening, async move |mut stream| sync::compare(&roster, &mut stream).await);
    }

    fn tell(&mut self, peer: PeerId, news: News) {
        let opening = self.opening(peer);
        self.talk(peer, opening, async move |mut stream| sync::tell_only(&mut stream, news).await);
    }

    /// One exchange, over the stream that `opening` gives.
    fn talk<T>(
        &mut self,
        peer: PeerId,
        opening: impl Future<Output = Result<libp2p::Stream, Outcome>> + Send + 'static,
        exchange: impl FnOnce(libp2p::Stream) -> T + Send + 'static,
    ) where
        T: Future<Output = Result<(), sync::SyncError>> + Send,
    {
        self.opened.spawn(async move {
            let outcome = match opening.await {
                Ok(stream) => outcome_of(peer, tokio::time::timeout(EXCHANGE_TIMEOUT, exchange(stream)).await),
                Err(outcome) => outcome,
            };
            (peer, outcome)
        });
    }

    /// A stream to `peer`, with a connection first if there is none.
    fn opening(&self, peer: PeerId) -> impl Future<Output = Result<libp2p::Stream, Outcome>> + Send + use<> {
        let (commands, mut control) = (self.wires.commands.clone(), self.wires.control.clone());
        let protocol = self.wires.protocol.clone();
        async move {
            reach(&commands, peer).await.map_err(|error| match error {
                NodeError::Dial { source, .. } if says_nobody_is_there(&source) => Outcome::Unreachable,
                _ => Outcome::Failed,
            })?;
            let opened = tokio::time::timeout(EXCHANGE_TIMEOUT, control.open_stream(peer, protocol)).await;
            opened.map_err(|_| Outcome::Failed)?.map_err(|_| Outcome::Failed)
        }
    }

    /// Tries places where members may be.
    fn try_places(&mut self, now: Instant) {
        if !self.candidates.any_due(now) || self.tried.len() >= TRIED_MAX {
            return;
        }
        let taken = {
            let table = self.roster.table();
            let own = table.own().entry.addresses.clone();
            table.others().flat_map(|(_, signed)| signed.entry.addresses.clone()).chain(own).collect()
        };
        for seed in self.candidates.take_due(TRIED_MAX - self.tried.len(), &taken, now) {
            let commands = self.wires.commands.clone();
            self.tried.spawn(async move {
                let address = match seed.peer {
                    Some(peer) if crate::address::peer_of(&seed.address).is_none() => {
                        seed.address.with(Protocol::P2p(peer))
                    }
                    _ => seed.address,
                };
                let (reply, answer) = oneshot::channel();
                let shown = address.to_string();
                if commands.send(Command::Connect { address, reply }).await.is_ok()
                    && let Ok(Err(error)) = answer.await
                {
                    tracing::debug!(address = shown, %error, "nobody is where a member may be");
                }
            });
        }
    }

    fn renew(&mut self) {
        let roster = Arc::clone(&self.roster);
        self.renewing.spawn_blocking(move || {
            let zone = roster.table().own().entry.zone.clone();
            let renewed = roster.admission().renew(roster.local(), zone);
            if let Err(error) = &renewed {
                tracing::warn!(%error, "the certificate of this node is not renewed; it is asked for again");
            }
            renewed.is_ok()
        });
    }

    fn on_renewed(&mut self, renewed: bool) {
        let now = Instant::now();
        if renewed {
            // Others hear of it when they compare.
            self.roster.speak(|_| ());
        }
        // One that was issued while a notice came may be of an epoch that is not believed any more.
        let is_good = renewed && !self.roster.admission().is_outdated();
        self.renew_at = if is_good { next_renewal(&self.roster, now) } else { Some(now + RENEW_AGAIN) };
    }

    fn save_now(&mut self) {
        self.save_at = None;
        let changes = self.roster.changes();
        let Some(path) = self.config.state_path.clone().filter(|_| changes != self.saved_changes) else { return };
        self.saved_changes = changes;
        let roster = Arc::clone(&self.roster);
        self.saving.spawn_blocking(move || {
            let saved = {
                let table = roster.table();
                let entries = table.others().map(|(_, signed)| Arc::clone(signed)).collect();
                Saved { incarnation: table.own().entry.incarnation, notice: roster.admission().revocation(), entries }
            };
            if let Err(error) = saved.store(&path) {
                tracing::warn!(%error, "after a restart this node starts from its configured peers");
            }
        });
    }
}

fn outcome_of(peer: PeerId, ended: Result<Result<(), sync::SyncError>, tokio::time::error::Elapsed>) -> Outcome {
    match ended {
        Ok(Ok(())) => Outcome::Done,
        Ok(Err(error)) => {
            tracing::debug!(%peer, %error, "an exchange of members did not come to its end");
            Outcome::Failed
        }
        Err(_) => Outcome::Failed,
    }
}

/// When to renew this node's certificate: at half of what is left of its life, give or take a fifth, so that the nodes of a
/// cluster that started together do not renew together.
fn next_renewal(roster: &Roster, now: Instant) -> Option<Instant> {
    let own = roster.admission().own()?;
    let left = Duration::from_secs(own.said().not_after.saturating_sub(unix_now()));
    Some(now + left.mul_f64(0.4 + 0.2 * rand::random::<f64>()))
}

/// See that there is a connection to `peer`.
async fn reach(commands: &mpsc::Sender<Command>, peer: PeerId) -> Result<(), NodeError> {
    let (reply, answer) = oneshot::channel();
    commands.send(Command::Reach { peer, reply }).await.map_err(|_| NodeError::Closed)?;
    answer.await.map_err(|_| NodeError::Closed)?.map(drop)
}

/// Whether a failed dial says something about the other node, and not about this one.
fn says_nobody_is_there(error: &DialError) -> bool {
    matches!(error, DialError::Transport(_) | DialError::WrongPeerId { .. } | DialError::Aborted)
}
