//! A node of the swarm.

use std::sync::Arc;
use std::time::{Duration, Instant as StdInstant};

use bytes::Bytes;
use hermes_image::ids::{ArtifactId, DiffId, Digest};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::runs::Runs;
use hermes_image::verify::Verified;
use libp2p::identity::Keypair;
use libp2p::{Multiaddr, PeerId};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::address::PeerAddress;
use crate::admission::Admission;
use crate::admission::grants::Grants;
use crate::admission::revocation::SignedRevocation;
use crate::behaviour;
use crate::canonical::ed25519_of;
use crate::config::NodeConfig;
use crate::error::NodeError;
use crate::exchange::client::Client;
use crate::exchange::compress::Codecs;
use crate::exchange::limits::Gate;
use crate::exchange::pool::Pool;
use crate::exchange::progress::Progress;
use crate::exchange::proofs::Proofs;
use crate::exchange::server::{self, Server, Sources};
use crate::exchange::{Asking, Content, Desk, ExchangeError, Fetch, Watch};
use crate::identity;
use crate::members::MemberList;
use crate::members::codec::News;
use crate::members::roster::{Own, Roster};
use crate::members::saved::Saved;
use crate::members::task::{self, Task, Wires};
use crate::swarm::{COMMANDS_MAX, Command, Owner, Shared, listen};

/// How long [`Node::shutdown`] waits for tasks to end.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a command may take: dialling, or a lookup, with room for a busy host.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// A peer has come or gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerEvent {
    /// There is a connection to it now.
    Up(PeerId),
    /// The last connection to it is gone.
    Down(PeerId),
}

/// A handle of a node. Clones are cheap and the same node. When the last one is dropped, the node ends.
#[derive(Clone)]
pub struct Node {
    inner: Arc<Inner>,
}

struct Inner {
    local: PeerId,
    client: Arc<Client>,
    progress: Arc<Progress>,
    roster: Arc<Roster>,
    gate: Arc<Gate>,
    _end: DropGuard,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("local", &self.inner.local).finish_non_exhaustive()
    }
}

impl Node {
    /// Starts a node that gives `content` to others, as `desk` allows and decides, and returns when it listens. It looks
    /// for its configured peers from then on.
    ///
    /// # Errors
    /// When the configuration or the identity is not usable, or a listen address cannot be bound.
    pub async fn start(config: NodeConfig, content: Arc<dyn Content>, desk: Arc<dyn Desk>) -> Result<Self, NodeError> {
        config.validate()?;
        let path = config.identity_path.clone();
        let key = tokio::task::spawn_blocking(move || identity::load_or_create(&path)).await;
        let key = key.map_err(|_| NodeError::Closed)??;
        let local = key.public().to_peer_id();
        let (cancel, tasks) = (CancellationToken::new(), TaskTracker::new());
        let shared = Arc::new(Shared::new());
        let (roster, saved) = join(&config, &key, Arc::clone(&shared)).await?;

        let mut swarm = behaviour::build(&config, key, Arc::clone(roster.admission()))?;
        let mut control = swarm.behaviour().streams.new_control();
        let protocol = behaviour::protocol_name(&config.cluster, "exchange");
        // Before listening: a stream of a protocol that nobody accepts is refused.
        let incoming = control.accept(protocol.clone());
        let incoming = incoming.map_err(|_| NodeError::Transport { problem: "exchange is registered twice".into() })?;
        let members_protocol = behaviour::protocol_name(&config.cluster, "members");
        let members_incoming = control.accept(members_protocol.clone());
        let members_incoming =
            members_incoming.map_err(|_| NodeError::Transport { problem: "members is registered twice".into() })?;
        let early = listen(&mut swarm, &config).await?;

        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let codecs = Arc::new(Codecs::default());
        let progress = Arc::new(Progress::default());

        let (queue, queued) = server::queue();
        let stop = cancel.clone();
        tasks.spawn(async move { stop.run_until_cancelled(server::accept(incoming, queue)).await });
        let sources = Sources { content, desk, codecs: Arc::clone(&codecs), progress: Arc::clone(&progress) };
        let server = Server::new(sources, commands.clone(), config.upload.clone());
        let gate = Arc::clone(server.gate());
        tasks.spawn(server.run(queued, tasks.clone(), cancel.clone()));

        tasks.spawn(task::answer(Arc::clone(&roster), members_incoming, cancel.clone()));
        let wires = Wires {
            control: control.clone(),
            protocol: members_protocol,
            commands: commands.clone(),
            events: shared.events.subscribe(),
            announced: shared.announced.subscribe(),
            cancel: cancel.clone(),
        };
        tasks.spawn(Task::new(Arc::clone(&roster), config.members.clone(), wires, &saved).run());

        let client = Arc::new(Client {
            local,
            control,
            protocol,
            pool: Pool::new(config.download.clone()),
            commands,
            shared: Arc::clone(&shared),
            codecs,
            proofs: Proofs::new(Arc::clone(roster.grants())),
            artifact_memory: Client::artifact_memory(&config.download),
            limits: config.download.clone(),
            tasks: tasks.clone(),
            cancel: cancel.clone(),
        });
        tasks.spawn(tidy(Arc::clone(&client)));
        tracing::info!(%local, cluster = %config.cluster, "node started");
        let owner = Owner::new(swarm, config, shared, inbox, roster.list(), cancel.clone(), early);
        tasks.spawn(owner.run());
        tasks.close();
        Ok(Self { inner: Arc::new(Inner { local, client, progress, roster, gate, _end: cancel.drop_guard() }) })
    }

    /// The name of this node.
    pub fn local_peer_id(&self) -> PeerId {
        self.inner.local
    }

    /// The addresses that this node listens on, without its own name.
    pub fn listen_addresses(&self) -> Vec<Multiaddr> {
        self.inner.client.shared.listen.read().clone()
    }

    /// The peers that this node is connected to.
    pub fn peers(&self) -> Vec<PeerId> {
        self.inner.client.shared.connected()
    }

    /// Bytes of chunks that went to `peer` since the node started, as they were sent.
    pub fn sent_bytes(&self, peer: &PeerId) -> u64 {
        self.inner.gate.sent_bytes(peer)
    }

    /// News of peers from now on. A listener that is more than 256 behind loses the oldest and is told so.
    pub fn events(&self) -> broadcast::Receiver<PeerEvent> {
        self.inner.client.shared.events.subscribe()
    }

    /// Connects to an address, `/ip4/../tcp/..` with or without `/p2p/..`, and says who is there.
    ///
    /// Cancel safe: a connection that is on its way may still be made.
    ///
    /// # Errors
    /// When nobody answers there, or somebody else than the address names.
    pub async fn connect(&self, address: Multiaddr) -> Result<PeerId, NodeError> {
        self.command("connecting", |reply| Command::Connect { address, reply }).await?
    }

    /// Connects to a peer as people write it, also by host name; the first address that answers counts.
    ///
    /// # Errors
    /// When the name does not resolve, or none of its addresses answers.
    pub async fn connect_to(&self, address: &PeerAddress) -> Result<PeerId, NodeError> {
        let mut last = NodeError::Timeout { doing: "resolving" };
        for address in address.resolve().await? {
            match self.connect(address).await {
                Ok(peer) => return Ok(peer),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Remembers that `peer` may be found at `address`, as a member list says. It is dialled when it is needed.
    ///
    /// # Errors
    /// When the node is shutting down.
    pub async fn learn(&self, peer: PeerId, address: Multiaddr) -> Result<(), NodeError> {
        let commands = &self.inner.client.commands;
        commands.send(Command::Learn { peer, address }).await.map_err(|_| NodeError::Closed)
    }

    /// Holders of `layer` that the DHT knows, at best effort, in no order, without this node. They may be gone, and there
    /// may be others. Answers of the last seconds are remembered; callers that ask together share one lookup.
    ///
    /// # Errors
    /// When the node is shutting down or already looks for too many layers.
    pub async fn find_holders(&self, layer: DiffId) -> Result<Vec<PeerId>, NodeError> {
        self.command("looking for holders", |reply| Command::FindHolders { layer, reply }).await.map_err(|error| {
            // The owner task drops the reply when it refuses.
            let refused = matches!(error, NodeError::Closed) && !self.inner.client.cancel.is_cancelled();
            let limit = crate::lookup::FLIGHTS_MAX;
            if refused { NodeError::Full { what: "lookups on their way", limit } } else { error }
        })
    }

    /// Tells the DHT, now and again until [`Self::withdraw`], that this node has (some of) `layer`. Returns when it is
    /// scheduled; others find it within a second or two.
    ///
    /// # Errors
    /// When too many layers are announced, or the node is shutting down.
    pub async fn provide(&self, layer: DiffId) -> Result<(), NodeError> {
        self.command("announcing a layer", |reply| Command::Provide { layer, reply }).await?
    }

    /// Announces `layer` no longer. Others forget it when their record expires; until then they learn from the have-map
    /// that it is gone.
    ///
    /// # Errors
    /// When the node is shutting down.
    pub async fn withdraw(&self, layer: DiffId) -> Result<(), NodeError> {
        self.inner.client.commands.send(Command::Withdraw { layer }).await.map_err(|_| NodeError::Closed)
    }

    /// How many bytes the DHT's records of other nodes take here; at most
    /// [`records_len_max_bytes`](crate::Discovery::records_len_max_bytes).
    ///
    /// # Errors
    /// When the node is shutting down.
    pub async fn records_len_bytes(&self) -> Result<usize, NodeError> {
        self.command("counting records", |reply| Command::RecordsLen { reply }).await
    }

    /// The members of the cluster as this node knows them now, itself among them, and every later version.
    pub fn members(&self) -> watch::Receiver<Arc<MemberList>> {
        self.inner.roster.list()
    }

    /// Says that `peer` could not be reached, or has stalled. It is suspected everywhere within a second or two, and
    /// leaves the list unless it answers within [`suspect_for`](crate::MembersConfig::suspect_for). Does nothing when it
    /// is no member or suspected already.
    pub fn suspect(&self, peer: &PeerId) {
        self.inner.roster.suspect(peer);
    }

    /// Tells all members that this node is about to leave (`drain`), or has no room for more (`full`); in either case it
    /// owns nothing new.
    pub fn set_flags(&self, drain: bool, full: bool) {
        self.inner.roster.set_flags(drain, full);
    }

    /// Takes the certificates of `peer` back: its connections are closed, it leaves the list, and nobody who has heard
    /// of it lets it in again. Make such a notice on one node at a time; of two that are made at once one is lost.
    ///
    /// # Errors
    /// When the swarm is open, or the issuer does not sign.
    pub async fn revoke(&self, peer: PeerId) -> Result<(), NodeError> {
        let roster = Arc::clone(&self.inner.roster);
        let revoked = tokio::task::spawn_blocking(move || roster.revoke(&peer)).await;
        Ok(revoked.map_err(|_| NodeError::Closed)??)
    }

    /// Takes an encoded notice of who was taken out, which came from elsewhere than the swarm. Whether it can be believed;
    /// an old one changes nothing.
    pub async fn learn_revocation(&self, notice: Bytes) -> bool {
        let roster = Arc::clone(&self.inner.roster);
        let learned = tokio::task::spawn_blocking(move || {
            let Ok(notice) = SignedRevocation::decode(&notice) else { return false };
            roster.take(News { notice: Some(Arc::new(notice)), ..News::default() }).is_ok()
        });
        learned.await.unwrap_or(false)
    }

    /// What peers have proven that they may read, and this node's own proofs.
    pub fn grants(&self) -> &Arc<Grants> {
        self.inner.roster.grants()
    }

    /// What this node shows to others, whom it has let in, and whom it has refused how often.
    pub fn admission(&self) -> &Arc<Admission> {
        self.inner.roster.admission()
    }

    /// Neither asks `peer` for anything nor finds it for `duration`, and ends what it is asked for now. What it asks is answered.
    ///
    /// # Errors
    /// When the node is shutting down.
    pub async fn ban(&self, peer: PeerId, duration: Duration) -> Result<(), NodeError> {
        // A century is as good as for ever, and no clock overflows.
        let until = StdInstant::now() + duration.min(Duration::from_secs(3_155_760_000));
        self.inner.client.pool.forget(&peer);
        self.inner.client.commands.send(Command::Ban { peer, until }).await.map_err(|_| NodeError::Closed)
    }

    /// Says that chunks of `layer` have come, so that peers which watch it are told. Cheap when nobody does.
    pub fn grown(&self, layer: DiffId) {
        self.inner.progress.grown(layer);
    }

    /// Asks `peer` for chunks of the layer of `table`. Each chunk is checked before it is handed out.
    ///
    /// Must be called within a tokio runtime. Dropping the result cancels the transfer.
    pub fn fetch(&self, peer: PeerId, table: &ChunkTable, asking: Asking, deadline: Instant) -> Fetch {
        Fetch::start(Arc::clone(&self.inner.client), peer, table.clone(), asking, deadline)
    }

    /// Presents `grant`, 1 to 1,024 bytes, to `peer`; whether the peer takes it.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// When the peer is busy, cannot be reached, or breaks the protocol, or the grant is too long.
    pub async fn present_grant(&self, peer: PeerId, grant: Bytes, deadline: Instant) -> Result<bool, ExchangeError> {
        let client = &self.inner.client;
        client.while_open(client.present_grant(peer, grant, deadline)).await
    }

    /// Has the issuer grant `layers` to this node for `life`, and keeps that. What is asked of a layer and denied is asked
    /// again with its grant from then on. Does nothing in an open swarm.
    ///
    /// # Errors
    /// When the issuer does not grant, there is no room, or the node is shutting down.
    pub async fn grant_own(&self, layers: Vec<DiffId>, life: Duration) -> Result<(), NodeError> {
        let (grants, local) = (Arc::clone(self.grants()), self.inner.local);
        let issued = tokio::task::spawn_blocking(move || grants.issue_own(&local, &layers, life)).await;
        Ok(issued.map_err(|_| NodeError::Closed)??)
    }

    /// Shows `peer` this node's own grants for `layers`, as far as the peer has not seen them on this connection: for
    /// artifacts and statements that it denies. Whether there were such and the peer has taken them, so that asking again
    /// is worth it.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// As [`Self::present_grant`].
    pub async fn show_grants(&self, peer: PeerId, layers: &[DiffId], deadline: Instant) -> Result<bool, ExchangeError> {
        let client = &self.inner.client;
        client.while_open(client.show_all(peer, layers, deadline)).await
    }

    /// What `peer` has of the layer of `table`. It may have more: maps in very many pieces are cut short.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// When the peer does not know the layer by this table, is busy, cannot be reached, or breaks the protocol.
    pub async fn have(&self, peer: PeerId, table: &ChunkTable, deadline: Instant) -> Result<Runs, ExchangeError> {
        let client = &self.inner.client;
        client.while_open(client.have(peer, table, deadline)).await
    }

    /// What `peer` has of the layer of `table`, and then what it gets, until it has all of it.
    ///
    /// Must be called within a tokio runtime. Dropping the result ends the watch.
    pub fn watch(&self, peer: PeerId, table: &ChunkTable) -> Watch {
        Watch::start(Arc::clone(&self.inner.client), peer, table.clone())
    }

    /// The artifact `id` from `peer`, checked. With `limit_bytes`, one that is longer counts as not there: for an artifact that was
    /// named by somebody who may lie, that is no fault of the peer's. Without, the configuration says what is too long.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// When the peer does not have it, sends something else or too much, is busy, or cannot be reached.
    pub async fn artifact(
        &self,
        peer: PeerId,
        id: ArtifactId,
        limit_bytes: Option<u64>,
        deadline: Instant,
    ) -> Result<Verified<Bytes>, ExchangeError> {
        let client = &self.inner.client;
        client.while_open(client.artifact(peer, id, limit_bytes, deadline)).await
    }

    /// Part of the index artifact `id` from `peer`, not checked against anything: the caller knows the part's name, as
    /// with the windows of a seek table. Cancel safe.
    ///
    /// # Errors
    /// When the peer does not have all of the part, or does not give it in time.
    pub async fn artifact_range(
        &self,
        peer: PeerId,
        id: ArtifactId,
        range: std::ops::Range<u64>,
        deadline: Instant,
    ) -> Result<Bytes, ExchangeError> {
        self.inner.client.artifact_range(peer, id, range, deadline).await
    }

    /// What starts of the image `manifest` read, by `peer`, at most 64 KiB. Nobody has signed it.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// When the peer does not have it or does not give it.
    pub async fn profile(&self, peer: PeerId, manifest: Digest, deadline: Instant) -> Result<Bytes, ExchangeError> {
        let client = &self.inner.client;
        client.while_open(client.profile(peer, manifest, deadline)).await
    }

    /// The signed statement of `manifest` from `peer`, at most 1 MiB. The signature is *not* checked here.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// When the peer does not have it, sends too much, is busy, or cannot be reached.
    pub async fn statement(&self, peer: PeerId, manifest: Digest, deadline: Instant) -> Result<Bytes, ExchangeError> {
        let client = &self.inner.client;
        client.while_open(client.statement(peer, manifest, deadline)).await
    }

    /// Ends the node: every transfer fails with [`ExchangeError::Closed`], every connection is closed. Returns when all
    /// tasks have ended, or after five seconds.
    pub async fn shutdown(&self) {
        let client = &self.inner.client;
        client.cancel.cancel();
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, client.tasks.wait()).await.is_err() {
            tracing::warn!(tasks = client.tasks.len(), "tasks are still running after shutdown");
        }
    }

    async fn command<T>(
        &self,
        doing: &'static str,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, NodeError> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.inner.client.commands.send(command(reply)).await.map_err(|_| NodeError::Closed)?;
            answer.await.map_err(|_| NodeError::Closed)
        };
        tokio::time::timeout(COMMAND_TIMEOUT, asked).await.map_err(|_| NodeError::Timeout { doing })?
    }
}

/// What this node knew of the members when it ended, as far as it can be believed, and a certificate of its own.
async fn join(config: &NodeConfig, key: &Keypair, shared: Arc<Shared>) -> Result<(Arc<Roster>, Saved), NodeError> {
    let (config, key) = (config.clone(), key.clone());
    let joined = tokio::task::spawn_blocking(move || {
        let pair = ed25519_of(&key).ok_or(NodeError::Transport { problem: "the node key is no Ed25519 key".into() })?;
        let admission = Arc::new(Admission::new(config.cluster.clone(), config.issuer.clone()));
        let saved = config.members.state_path.as_deref().map_or(Ok(Saved::default()), Saved::load);
        let saved = saved.unwrap_or_else(|error| {
            tracing::warn!(%error, "starting without the last member list");
            Saved::default()
        });
        if let Some(notice) = &saved.notice {
            admission.take_revocation((**notice).clone());
        }
        if let Err(error) = admission.renew(key.public().to_peer_id(), config.zone.clone()) {
            // It serves what it has; others let it in once there is a certificate.
            tracing::warn!(%error, "starting without a certificate of this node; it is asked for again");
        }
        let own = Own {
            cluster: config.cluster,
            pair,
            zone: config.zone,
            suspect_for: config.members.suspect_for,
            incarnation: saved.incarnation,
        };
        let grants = Arc::new(Grants::new(Arc::clone(&admission)));
        let roster = Arc::new(Roster::new(own, admission, grants, shared));
        let news = News { entries: saved.entries.clone(), ..News::default() };
        if let Err(error) = roster.take(news) {
            tracing::warn!(%error, "the rest of the last member list is not used");
        }
        roster.publish();
        Ok((roster, saved))
    });
    joined.await.map_err(|_| NodeError::Closed)?
}

/// Closes pooled streams that nobody uses or whose peer is gone.
async fn tidy(client: Arc<Client>) {
    let mut events = client.shared.events.subscribe();
    let mut sweep = tokio::time::interval(client.pool.sweep_every());
    loop {
        tokio::select! {
            () = client.cancel.cancelled() => return,
            event = events.recv() => match event {
                Ok(PeerEvent::Down(peer)) => {
                    client.pool.forget(&peer);
                    client.proofs.forget(&peer);
                }
                Ok(PeerEvent::Up(_)) => {}
                Err(broadcast::error::RecvError::Lagged(_)) => client.proofs.forget_all(),
                Err(broadcast::error::RecvError::Closed) => return,
            },
            now = sweep.tick() => client.pool.sweep(now),
        }
    }
}
