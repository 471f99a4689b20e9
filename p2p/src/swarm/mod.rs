//! The one task that owns the swarm.
//!
//! It waits for what comes next (an event of the swarm, a command of a [`Node`](crate::Node), a name that was resolved,
//! a time that has come) and applies it. Nothing heavy happens here: chunk bytes never pass through this task, and it
//! never waits for anything else. When it ends, the swarm is dropped and with it every connection.

mod commands;
mod events;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use hermes_image::ids::DiffId;
use libp2p::kad::{QueryId, RecordKey};
use libp2p::swarm::{ConnectionId, Swarm, SwarmEvent};
use libp2p::{Multiaddr, PeerId};
use parking_lot::RwLock;
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::address::AddressError;
use crate::behaviour::{Behaviour, BehaviourEvent};
use crate::book::AddressBook;
use crate::bootstrap::Seeds;
use crate::config::NodeConfig;
use crate::error::NodeError;
use crate::lookup::{Lookups, Reply};
use crate::members::MemberList;
use crate::node::PeerEvent;
use crate::publish::Schedule;

/// Commands that may wait for the owner task. Each takes microseconds; callers wait when it is full.
pub(crate) const COMMANDS_MAX: usize = 256;
/// News of peers that a slow listener may be behind; beyond it the oldest are lost and the listener is told so.
pub(crate) const EVENTS_MAX: usize = 256;
/// Most publications on their way. Each is a lookup and up to 20 messages.
const PUBLICATIONS_MAX: usize = 8;
/// Most peers banned at once; beyond it the ban that ends first is lifted.
const BANS_MAX: usize = 4096;
/// Most callers that wait for one dial, and most peers being dialled for callers.
const DIAL_WAITERS_MAX: usize = 256;
/// A connection with this many unanswered pings in a row is closed: its host is dead or cut off, and TCP alone would
/// take a quarter of an hour to say so.
const UNANSWERED_PINGS_MAX: u32 = 2;
/// How far apart the layers of a node are announced when it meets its first peer.
const REANNOUNCE_SPREAD: Duration = Duration::from_secs(2);

/// Where the outcome of a dial goes.
pub(crate) type DialReply = oneshot::Sender<Result<PeerId, NodeError>>;

/// What a node may ask of its owner task.
#[derive(Debug)]
pub(crate) enum Command {
    /// Connect to an address and say who is there.
    Connect { address: Multiaddr, reply: DialReply },
    /// See that there is a connection to a peer.
    Reach { peer: PeerId, reply: DialReply },
    /// Remember where a peer may be.
    Learn { peer: PeerId, address: Multiaddr },
    /// Remember where a peer may be, by the word of another.
    Hear { from: PeerId, peer: PeerId, addresses: Vec<Multiaddr> },
    /// Say where peers may be, to tell others.
    Addresses { peers: Vec<PeerId>, reply: oneshot::Sender<Vec<(PeerId, Vec<Multiaddr>)>> },
    /// Find holders of a layer.
    FindHolders { layer: DiffId, reply: Reply },
    /// Announce a layer.
    Provide { layer: DiffId, reply: oneshot::Sender<Result<(), NodeError>> },
    /// Announce a layer no longer.
    Withdraw { layer: DiffId },
    /// How many bytes the records of others take.
    RecordsLen { reply: oneshot::Sender<usize> },
    /// Close all connections to a peer.
    Close { peer: PeerId },
    /// Refuse a peer until a time.
    Ban { peer: PeerId, until: Instant },
}

/// What everybody may read without asking the owner task, which alone writes it.
#[derive(Debug)]
pub(crate) struct Shared {
    /// The peers that this node is connected to, each with what is cancelled when the last connection to it is gone.
    links: RwLock<BTreeMap<PeerId, CancellationToken>>,
    /// Banned peers that there is a connection to: they are answered, and nothing else is known of them.
    shunned: RwLock<BTreeSet<PeerId>>,
    pub(crate) listen: RwLock<Vec<Multiaddr>>,
    /// The addresses that others are told.
    pub(crate) announced: watch::Sender<Vec<Multiaddr>>,
    pub(crate) events: broadcast::Sender<PeerEvent>,
}

impl Shared {
    pub(crate) fn new() -> Self {
        let (events, _) = broadcast::channel(EVENTS_MAX);
        let (announced, _) = watch::channel(Vec::new());
        Self { links: RwLock::default(), shunned: RwLock::default(), listen: RwLock::default(), announced, events }
    }

    /// Whether there is a connection to `peer`.
    pub(crate) fn is_connected(&self, peer: &PeerId) -> bool {
        self.links.read().contains_key(peer)
    }

    /// All peers that there is a connection to, without those that are banned.
    pub(crate) fn connected<C: FromIterator<PeerId>>(&self) -> C {
        self.links.read().keys().copied().collect()
    }

    /// All peers that there is a connection to.
    pub(crate) fn everybody<C: FromIterator<PeerId>>(&self) -> C {
        self.links.read().keys().chain(self.shunned.read().iter()).copied().collect()
    }

    /// What is cancelled when the last connection to `peer` is gone; `None` when there is none.
    pub(crate) fn gone(&self, peer: &PeerId) -> Option<CancellationToken> {
        self.links.read().get(peer).cloned()
    }

    /// There is a connection to `peer` now, which is not banned. Whether it is the only peer.
    fn up(&self, peer: PeerId) -> bool {
        self.shunned.write().remove(&peer);
        let mut links = self.links.write();
        links.entry(peer).or_default();
        // Nobody may be listening, which is no error.
        let _ = self.events.send(PeerEvent::Up(peer));
        links.len() == 1
    }

    /// The last connection to `peer` is gone.
    fn down(&self, peer: &PeerId) {
        self.shunned.write().remove(peer);
        if let Some(gone) = self.links.write().remove(peer) {
            gone.cancel();
            let _ = self.events.send(PeerEvent::Down(*peer));
        }
    }

    /// There is a connection to `peer`, which is banned.
    fn shun(&self, peer: PeerId) {
        self.down(&peer);
        self.shunned.write().insert(peer);
    }
}

/// What a query of Kademlia is for.
#[derive(Debug, Clone, Copy)]
enum Query {
    Find(DiffId),
    Publish(DiffId),
}

/// What the owner knows of a connection.
#[derive(Debug)]
struct Link {
    /// Who is at the other end.
    peer: PeerId,
    /// Where that is.
    remote: Option<IpAddr>,
    /// Pings in a row without an answer.
    unanswered: u32,
}

type Resolved = (usize, Result<Vec<Multiaddr>, AddressError>);

/// How often the routing table is refreshed beyond what traffic does.
const REFRESH_EVERY: Duration = Duration::from_secs(300);

/// The owner of the swarm and of everything that only it may change.
pub(crate) struct Owner {
    swarm: Swarm<Behaviour>,
    config: NodeConfig,
    shared: Arc<Shared>,
    commands: mpsc::Receiver<Command>,
    members: watch::Receiver<Arc<MemberList>>,
    cancel: CancellationToken,
    book: AddressBook,
    seeds: Seeds,
    resolving: JoinSet<Resolved>,
    lookups: Lookups,
    schedule: Schedule,
    queries: HashMap<QueryId, Query>,
    publications: usize,
    connects: HashMap<ConnectionId, (Multiaddr, DialReply)>,
    reaches: HashMap<PeerId, Vec<DialReply>>,
    bans: BTreeMap<PeerId, Instant>,
    links: HashMap<ConnectionId, Link>,
    next_sweep: Instant,
    next_refresh: Instant,
    /// What happened before this task began.
    early: Vec<SwarmEvent<Event>>,
}

impl Owner {
    /// Owns `swarm`, which has its listeners already; `early` is what [`listen`] has seen.
    pub(crate) fn new(
        swarm: Swarm<Behaviour>,
        config: NodeConfig,
        shared: Arc<Shared>,
        commands: mpsc::Receiver<Command>,
        members: watch::Receiver<Arc<MemberList>>,
        cancel: CancellationToken,
        early: Vec<SwarmEvent<Event>>,
    ) -> Self {
        let now = Instant::now();
        let discovery = &config.discovery;
        // Before the task runs, so that whoever has started the node sees its addresses.
        let bound = early.iter().filter_map(|event| match event {
            SwarmEvent::NewListenAddr { address, .. } => Some(address.clone()),
            _ => None,
        });
        shared.listen.write().extend(bound);
        Self {
            book: AddressBook::default(),
            seeds: Seeds::new(config.peers.clone(), now),
            resolving: JoinSet::new(),
            lookups: Lookups::new(discovery.holders_enough, discovery.found_ttl, discovery.missing_ttl),
            schedule: Schedule::new(discovery.republish_every, discovery.provided_max),
            queries: HashMap::new(),
            publications: 0,
            connects: HashMap::new(),
            reaches: HashMap::new(),
            bans: BTreeMap::new(),
            links: HashMap::new(),
            next_sweep: now + discovery.sweep_every,
            next_refresh: now + REFRESH_EVERY,
            swarm,
            config,
            shared,
            commands,
            members,
            cancel,
            early,
        }
    }

    /// Runs until the node is shut down or its last handle is dropped.
    pub(crate) async fn run(mut self) {
        for event in std::mem::take(&mut self.early) {
            self.on_swarm_event(event);
        }
        self.on_time(Instant::now());
        loop {
            let wake = tokio::time::Instant::from_std(self.next_wake());
            tokio::select! {
                () = self.cancel.cancelled() => break,
                event = self.swarm.select_next_some() => self.on_swarm_event(event),
                command = self.commands.recv() => match command {
                    Some(command) => self.on_command(command),
                    None => break,
                },
                Some(resolved) = self.resolving.join_next(), if !self.resolving.is_empty() => self.on_resolved(resolved),
                () = tokio::time::sleep_until(wake) => {}
            }
            self.on_time(Instant::now());
        }
        for (_, gone) in std::mem::take(&mut *self.shared.links.write()) {
            gone.cancel();
        }
        self.shared.listen.write().clear();
    }

    fn next_wake(&self) -> Instant {
        let publication = if self.publications < PUBLICATIONS_MAX { self.schedule.next_due() } else { None };
        let ban = self.bans.values().min().copied();
        [publication, self.seeds.next_due(), ban]
            .into_iter()
            .flatten()
            .fold(self.next_sweep.min(self.next_refresh), Instant::min)
    }

    /// Does everything whose time has come.
    fn on_time(&mut self, now: Instant) {
        for (index, address) in self.seeds.take_due(now) {
            let timeout = self.config.transport.connect_timeout;
            self.resolving.spawn(async move {
                let resolved = tokio::time::timeout(timeout, address.resolve()).await.unwrap_or_else(|_| {
                    let source = std::io::ErrorKind::TimedOut.into();
                    Err(AddressError::Resolve { host: address.to_string(), source })
                });
                (index, resolved)
            });
        }
        while self.publications < PUBLICATIONS_MAX
            && let Some(layer) = self.schedule.take_due(now)
        {
            match self.swarm.behaviour_mut().kad.start_providing(key_of(layer)) {
                Ok(query) => {
                    self.publications += 1;
                    self.queries.insert(query, Query::Publish(layer));
                }
                Err(error) => {
                    tracing::warn!(%layer, %error, "cannot announce layer");
                    self.schedule.finished(layer, false, now, rand::random());
                }
            }
        }
        if self.next_refresh <= now {
            self.next_refresh = now + REFRESH_EVERY;
            let kad = &mut self.swarm.behaviour_mut().kad;
            let knows_anybody = kad.kbuckets().any(|bucket| !bucket.is_empty());
            if knows_anybody && let Err(error) = kad.bootstrap() {
                tracing::debug!(%error, "the routing table is not refreshed");
            }
        }
        if self.next_sweep <= now {
            self.next_sweep = now + self.config.discovery.sweep_every;
            let count = self.swarm.behaviour_mut().kad.store_mut().sweep(now);
            if count > 0 {
                tracing::debug!(count, "swept expired provider records");
            }
        }
        let ended: Vec<PeerId> = self.bans.iter().filter(|(_, until)| **until <= now).map(|(peer, _)| *peer).collect();
        for peer in ended {
            self.unban(peer);
            tracing::info!(%peer, "ban has ended");
        }
    }
}

/// The DHT key of a layer.
fn key_of(layer: DiffId) -> RecordKey {
    RecordKey::new(&layer.0)
}

/// Waits until `swarm` listens on everything that it was told to, and gives back all events that came meanwhile, for
/// the owner task.
///
/// # Errors
/// When an address cannot be bound, or nothing happens for five seconds.
pub(crate) async fn listen(
    swarm: &mut Swarm<Behaviour>,
    config: &NodeConfig,
) -> Result<Vec<SwarmEvent<Event>>, NodeError> {
    /// Binding is one system call; five seconds are for a host that thrashes.
    const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);

    let mut waiting = HashMap::new();
    for address in &config.listen {
        let listener = swarm.listen_on(address.clone()).map_err(|error| NodeError::Listen {
            address: address.clone(),
            source: match error {
                libp2p::TransportError::Other(source) => source,
                other => std::io::Error::other(other.to_string()),
            },
        })?;
        waiting.insert(listener, address.clone());
    }
    let mut early = Vec::new();
    let all = async {
        while !waiting.is_empty() {
            let event = swarm.select_next_some().await;
            match &event {
                SwarmEvent::NewListenAddr { listener_id, .. } => {
                    waiting.remove(listener_id);
                }
                SwarmEvent::ListenerClosed { listener_id, reason, .. } => {
                    if let Some(address) = waiting.remove(listener_id) {
                        let kind = reason.as_ref().err().map_or(std::io::ErrorKind::AddrNotAvailable, |e| e.kind());
                        return Err(NodeError::Listen { address, source: kind.into() });
                    }
                }
                _ => {}
            }
            early.push(event);
        }
        Ok(())
    };
    tokio::time::timeout(LISTEN_TIMEOUT, all).await.map_err(|_| NodeError::Timeout { doing: "listening" })??;
    Ok(early)
}

/// The event type of [`Behaviour`], for the submodules.
pub(crate) type Event = BehaviourEvent;
