//! Nodes with made-up content, and raw peers that can send anything.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use hermes_image::ids::{ArtifactId, ChunkId, ChunkNo, DiffId, Digest};
use hermes_image::index::chunks::{ChunkTable, ChunkTableBuilder};
use hermes_image::runs::Runs;
use hermes_p2p::admission::Admission;
use hermes_p2p::admission::upgrade::Upgrade;
use hermes_p2p::exchange::codec::{ANSWER_LEN_MAX_BYTES, Answer, REQUEST_LEN_MAX_BYTES, Request, VERSION};
use hermes_p2p::exchange::session::{Session, SessionError};
use hermes_p2p::{Arrival, Content, Desk, ExchangeError, Fetch, Multiaddr, Node, NodeConfig, OpenDesk, PeerId};
use libp2p::identity::Keypair;
use libp2p::swarm::{Swarm, SwarmEvent};
use libp2p::{Stream, StreamProtocol, SwarmBuilder, noise, tcp, yamux};
use parking_lot::{Condvar, Mutex};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Longest wait for anything that should happen. The machine may be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn deadline() -> Instant {
    Instant::now() + PATIENCE
}

/// Polls `condition` until it gives something.
pub(crate) async fn wait_for<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let until = deadline();
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < until, "waited too long for {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What the bytes of a layer look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Look {
    /// Does not compress.
    Noise,
    /// Compresses well.
    Text,
}

/// A made-up layer: every byte is a function of its place, so that every misplaced byte shows.
#[derive(Debug, Clone)]
pub(crate) struct Layer {
    pub(crate) table: ChunkTable,
    seed: u8,
    look: Look,
}

impl Layer {
    /// `count` chunks of `len_bytes`.
    pub(crate) fn new(seed: u8, count: u32, len_bytes: u64, look: Look) -> Self {
        let mut builder = ChunkTableBuilder::default();
        for chunk in 0..count {
            let bytes = place_bytes(seed, chunk, len_bytes, look);
            builder.push(ChunkId::of(&bytes), len_bytes).expect("a valid chunk");
        }
        Self { table: builder.finish(DiffId([seed; 32])), seed, look }
    }

    pub(crate) fn bytes(&self, chunk: ChunkNo) -> Bytes {
        let range = self.table.range(chunk);
        place_bytes(self.seed, chunk.0, range.end - range.start, self.look)
    }

    pub(crate) fn all(&self) -> Runs {
        Runs::one(0..self.table.count())
    }
}

fn place_bytes(seed: u8, chunk: u32, len_bytes: u64, look: Look) -> Bytes {
    let mut bytes = Vec::with_capacity(len_bytes as usize + 64);
    let mut place = u64::from(seed) << 56 | u64::from(chunk) << 24;
    while (bytes.len() as u64) < len_bytes {
        match look {
            Look::Noise => {
                // splitmix64
                let mut mixed = place.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                bytes.extend_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
            }
            Look::Text => bytes.extend_from_slice(format!("the word at place {place} is a long one; ").as_bytes()),
        }
        place += 1;
    }
    bytes.truncate(len_bytes as usize);
    Bytes::from(bytes)
}

/// Content that is made up as it is read. Reads can be held back.
#[derive(Default)]
pub(crate) struct Made {
    layers: Mutex<HashMap<DiffId, (Layer, Runs)>>,
    artifacts: Mutex<HashMap<ArtifactId, Bytes>>,
    statements: Mutex<HashMap<Digest, Bytes>>,
    held: Mutex<Option<DiffId>>,
    released: Condvar,
    waiting: AtomicUsize,
    pub(crate) reads: AtomicUsize,
}

impl Made {
    pub(crate) fn add(&self, layer: &Layer, have: Runs) {
        self.layers.lock().insert(layer.table.diff_id(), (layer.clone(), have));
    }

    pub(crate) fn add_artifact(&self, bytes: Bytes) -> ArtifactId {
        let id = ArtifactId::of(&bytes);
        self.artifacts.lock().insert(id, bytes);
        id
    }

    pub(crate) fn add_statement(&self, manifest: Digest, bytes: Bytes) {
        self.statements.lock().insert(manifest, bytes);
    }

    /// Waits until `count` reads are held back.
    pub(crate) async fn wait_for_held(&self, count: usize) {
        let waiting = async || (self.waiting.load(Ordering::SeqCst) >= count).then_some(());
        wait_for("reads that are held back", waiting).await;
    }

    /// Chunks of `layer` are not read until [`Self::release`].
    pub(crate) fn hold(&self, layer: DiffId) {
        *self.held.lock() = Some(layer);
    }

    pub(crate) fn release(&self) {
        *self.held.lock() = None;
        self.released.notify_all();
    }
}

impl Content for Made {
    fn have(&self, layer: DiffId, table: ArtifactId) -> Option<Runs> {
        let layers = self.layers.lock();
        let (known, have) = layers.get(&layer)?;
        (known.table.id() == table).then(|| have.clone())
    }

    fn chunk(&self, layer: DiffId, _: ArtifactId, chunk: ChunkNo) -> std::io::Result<Option<Bytes>> {
        let mut held = self.held.lock();
        while *held == Some(layer) {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            self.released.wait(&mut held);
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
        drop(held);
        self.reads.fetch_add(1, Ordering::SeqCst);
        let known = self.layers.lock().get(&layer).cloned();
        let Some((known, have)) = known else { return Err(std::io::ErrorKind::NotFound.into()) };
        Ok(have.contains(chunk.0).then(|| known.bytes(chunk)))
    }

    fn artifact(&self, id: ArtifactId) -> std::io::Result<Option<Bytes>> {
        Ok(self.artifacts.lock().get(&id).cloned())
    }

    fn statement(&self, manifest: Digest) -> Option<Bytes> {
        self.statements.lock().get(&manifest).cloned()
    }
}

/// A node, what it has, and the folder of its key.
pub(crate) struct TestNode {
    pub(crate) node: Node,
    pub(crate) made: Arc<Made>,
    pub(crate) folder: TempDir,
}

/// The configuration of a node that listens on loopback, patient with a busy machine.
pub(crate) fn config(folder: &TempDir) -> NodeConfig {
    let listen = "/ip4/127.0.0.1/tcp/0".parse().expect("a multiaddr");
    let cluster = "test".parse().expect("a cluster id");
    let mut config = NodeConfig::new(cluster, folder.path().join("node.key"), listen);
    config.transport.connect_timeout = Duration::from_secs(20);
    config.discovery.query_timeout = Duration::from_secs(20);
    config.discovery.request_timeout = Duration::from_secs(20);
    config.download.open_timeout = Duration::from_secs(30);
    config.download.dial_timeout = Duration::from_secs(20);
    config.download.stall_timeout = Duration::from_secs(30);
    config.upload.stall_timeout = Duration::from_secs(30);
    config
}

pub(crate) async fn start(change: impl FnOnce(&mut NodeConfig)) -> TestNode {
    start_with(Arc::new(OpenDesk), change).await
}

/// One stream to a peer for demand, so that one that is out of step or was never given back shows.
pub(crate) fn single_streamed(config: &mut NodeConfig) {
    (config.download.streams_per_peer_max, config.download.prefetch_streams_per_peer_max) = (2, 1);
}

/// A node whose `desk` decides.
pub(crate) async fn start_with(desk: Arc<dyn Desk>, change: impl FnOnce(&mut NodeConfig)) -> TestNode {
    let folder = tempfile::tempdir().expect("a folder");
    let made = Arc::new(Made::default());
    let mut config = config(&folder);
    change(&mut config);
    let node = Node::start(config, Arc::clone(&made) as Arc<dyn Content>, desk).await.expect("starts");
    TestNode { node, made, folder }
}

impl Drop for TestNode {
    /// A test that fails must not leave its runtime waiting for reads that are held back.
    fn drop(&mut self) {
        self.made.release();
    }
}

impl TestNode {
    pub(crate) fn address(&self) -> Multiaddr {
        self.node.listen_addresses().first().expect("listens").clone()
    }

    pub(crate) fn peer(&self) -> PeerId {
        self.node.local_peer_id()
    }

    /// Connects to `other`.
    pub(crate) async fn meet(&self, other: &Self) {
        let peer = self.node.connect(other.address()).await.expect("connects");
        assert_eq!(peer, other.peer());
    }
}

/// Everything that came of a fetch until its end or its first error.
#[derive(Debug, Default)]
pub(crate) struct Got {
    pub(crate) chunks: Vec<ChunkNo>,
    pub(crate) lacks: Runs,
    pub(crate) referred: Vec<(Runs, Vec<PeerId>)>,
    pub(crate) delegated: Runs,
    /// How often the peer said that it waits, and what it said of the registry last.
    pub(crate) pendings: usize,
    pub(crate) registry_rests: Option<Duration>,
    pub(crate) error: Option<ExchangeError>,
}

/// Collects what a fetch brings, meanwhile.
pub(crate) fn spawn_collect(fetch: Fetch, layer: &Layer) -> JoinHandle<Got> {
    let layer = layer.clone();
    tokio::spawn(async move { collect(fetch, &layer).await })
}

/// Reads `fetch` to its end and compares every byte with `layer`.
pub(crate) async fn collect(mut fetch: Fetch, layer: &Layer) -> Got {
    let mut got = Got::default();
    let all = async {
        while let Some(arrival) = fetch.next().await {
            match arrival {
                Ok(Arrival::Chunk(chunk, bytes)) => {
                    assert_eq!(*bytes, layer.bytes(chunk), "chunk {chunk} has wrong bytes");
                    got.chunks.push(chunk);
                }
                Ok(Arrival::Lacks(chunks)) => got.lacks.insert_all(&chunks),
                Ok(Arrival::Refer { chunks, peers }) => got.referred.push((chunks, peers)),
                Ok(Arrival::Delegate(chunks)) => got.delegated.insert_all(&chunks),
                Ok(Arrival::Pending { registry_rests, .. }) => {
                    got.pendings += 1;
                    got.registry_rests = registry_rests;
                }
                Err(error) => {
                    assert!(got.error.is_none(), "delivered something after an error");
                    got.error = Some(error);
                }
            }
        }
    };
    tokio::time::timeout(PATIENCE, all).await.expect("ends in time");
    got
}

/// A peer that speaks noise and yamux, and over its streams whatever a test wants.
pub(crate) struct RawPeer {
    pub(crate) peer: PeerId,
    pub(crate) address: Multiaddr,
    pub(crate) control: libp2p_stream::Control,
    task: JoinHandle<()>,
}

impl Drop for RawPeer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) type RawSession = Session<Stream>;

pub(crate) fn exchange_protocol() -> StreamProtocol {
    StreamProtocol::new("/hermes/test/exchange/1")
}

impl RawPeer {
    /// A peer that listens, and dials `to` if given.
    pub(crate) async fn start(to: Option<Multiaddr>) -> Self {
        let mut swarm: Swarm<libp2p_stream::Behaviour> = SwarmBuilder::with_new_identity()
            .with_tokio()
            .with_tcp(
                tcp::Config::default(),
                |key: &Keypair| {
                    let open = Admission::new("test".parse().expect("a cluster id"), None);
                    noise::Config::new(key).map(|noise| Upgrade::new(noise, Arc::new(open)))
                },
                yamux::Config::default,
            )
            .expect("a transport")
            .with_behaviour(|_| libp2p_stream::Behaviour::new())
            .expect("a behaviour")
            .with_swarm_config(|config| config.with_idle_connection_timeout(PATIENCE))
            .build();
        swarm.listen_on("/ip4/127.0.0.1/tcp/0".parse().expect("a multiaddr")).expect("listens");
        let address = loop {
            if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
                break address;
            }
        };
        if let Some(to) = to {
            swarm.dial(to).expect("dials");
            while !matches!(swarm.select_next_some().await, SwarmEvent::ConnectionEstablished { .. }) {}
        }
        let (peer, control) = (*swarm.local_peer_id(), swarm.behaviour().new_control());
        let task = tokio::spawn(async move {
            loop {
                swarm.select_next_some().await;
            }
        });
        Self { peer, address, control, task }
    }

    /// Serves streams one after the other with `script`, which gets the number of the stream.
    pub(crate) fn serve<F>(&self, mut script: impl FnMut(usize, RawSession) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let mut incoming = self.control.clone().accept(exchange_protocol()).expect("registers once");
        tokio::spawn(async move {
            let mut count = 0;
            while let Some((_, stream)) = incoming.next().await {
                tokio::spawn(script(count, Session::new(stream)));
                count += 1;
            }
        });
    }

    /// Opens a stream to `peer` without saying anything.
    pub(crate) async fn open(&self, peer: PeerId) -> RawSession {
        let mut control = self.control.clone();
        let stream = control.open_stream(peer, exchange_protocol()).await.expect("opens");
        Session::new(stream)
    }

    /// Opens a stream to `peer` and shakes hands.
    pub(crate) async fn greet(&self, peer: PeerId) -> RawSession {
        let mut session = self.open(peer).await;
        ask(&mut session, &Request::Hello { version: VERSION }).await;
        assert_eq!(hear(&mut session, 0).await.expect("a hello"), Answer::Hello { version: VERSION });
        session
    }
}

pub(crate) async fn write(session: &mut RawSession, bytes: &[u8]) {
    // The other side may have ended the stream, which is what most of these tests are about.
    let _ = session.write_frames(bytes, PATIENCE).await;
}

pub(crate) async fn ask(session: &mut RawSession, request: &Request) {
    let mut frame = Vec::new();
    request.encode(&mut frame);
    write(session, &frame).await;
}

pub(crate) async fn say(session: &mut RawSession, answer: &Answer) {
    let mut frame = Vec::new();
    answer.encode(&mut frame);
    write(session, &frame).await;
}

/// The next answer of the other side.
pub(crate) async fn hear(session: &mut RawSession, chunk_count: u32) -> Result<Answer, SessionError> {
    let frame = session.read_frame(ANSWER_LEN_MAX_BYTES, deadline(), PATIENCE).await?;
    Ok(Answer::decode(&frame, chunk_count)?)
}

/// The next request of the other side; `None` when it has left.
pub(crate) async fn asked(session: &mut RawSession) -> Option<Request> {
    let frame = session.read_frame(REQUEST_LEN_MAX_BYTES, deadline(), PATIENCE).await.ok()?;
    Some(Request::decode(&frame).expect("our own node sends valid requests"))
}

/// Takes the hello of the other side and answers it as this version does.
pub(crate) async fn welcome(session: &mut RawSession) {
    assert_eq!(asked(session).await, Some(Request::Hello { version: VERSION }));
    say(session, &Answer::Hello { version: VERSION }).await;
}
