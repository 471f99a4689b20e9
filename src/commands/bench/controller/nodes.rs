//! The nodes: each joins, connects with its certificate, and watches.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use hermes_controller_api::v1::controller_client::ControllerClient;
use hermes_controller_api::{SERVER_NAME, VERSION_MAX, VERSION_MIN, pem, v1};
use hermes_p2p::admission::issuing::IssuingKey;
use hermes_p2p::identity::pkcs8_of_seed;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// The cluster.
pub(super) const CLUSTER: &str = "bench";
/// What every node joins with.
pub(super) const TOKEN: &str = "a-token-for-benchmarks-alone";
/// Where the controller keeps it, below its folder.
pub(super) const TOKENS_FILE: &str = "tokens";
/// Nodes that join at once: a rolling restart, not all of them in one second.
const JOINS_AT_ONCE: usize = 64;
/// Nothing came for so long: the nodes know what there is.
const QUIET: Duration = Duration::from_secs(3);
/// News that wait to be counted.
const NEWS_MAX: usize = 65_536;

/// What a node says.
enum News {
    /// It watches.
    Watches,
    /// It was told something at that time, in nanoseconds since 1970; the end of an update's bytes, if it is a short one.
    Told(u128, Bytes),
    /// It has ended.
    Ended(anyhow::Error),
}

/// When nodes heard of an image, after it was published.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heard {
    pub(super) p50: Duration,
    pub(super) p99: Duration,
    pub(super) max: Duration,
}

/// What the node of a number among so many reports.
pub(super) type Reports = fn(usize, usize) -> v1::ReportRequest;

/// All nodes. They end when this is dropped.
pub(super) struct Cluster {
    count: usize,
    news: mpsc::Receiver<News>,
    _nodes: JoinSet<()>,
}

impl Cluster {
    /// Starts `count` nodes, which know the controller's roots from its folder, and report if they are told what.
    pub(super) fn start(address: &str, folder: &Path, count: usize, reports: Option<Reports>) -> Self {
        let (tell, news) = mpsc::channel(NEWS_MAX);
        let places = Arc::new(Semaphore::new(JOINS_AT_ONCE));
        let mut nodes = JoinSet::new();
        let roots = folder.join("authority/ca.pem");
        for number in 0..count {
            let report = reports.map(|of| of(number, count));
            let node = Node { number, address: format!("https://{address}"), roots: roots.clone(), report };
            let (tell, places) = (tell.clone(), Arc::clone(&places));
            nodes.spawn(async move {
                if let Err(error) = node.run(&tell, &places).await {
                    let _ = tell.send(News::Ended(error)).await;
                }
            });
        }
        Self { count, news, _nodes: nodes }
    }

    /// All nodes watch, and nothing more comes.
    pub(super) async fn settled(&mut self) -> anyhow::Result<()> {
        let mut watching = 0;
        loop {
            match tokio::time::timeout(QUIET, self.news.recv()).await {
                Err(_) if watching == self.count => return Ok(()),
                Err(_) | Ok(Some(News::Told(..))) => {}
                Ok(Some(News::Watches)) => watching += 1,
                Ok(Some(News::Ended(error))) => return Err(error.context("a node has ended")),
                Ok(None) => bail!("all nodes have ended"),
            }
        }
    }

    /// Every node has heard of `manifest`, which was published at `at`.
    pub(super) async fn heard(&mut self, manifest: [u8; 32], at: u128) -> anyhow::Result<Heard> {
        let mut times = Vec::with_capacity(self.count);
        while times.len() < self.count {
            match self.news.recv().await.context("all nodes have ended")? {
                News::Told(when, update) if update.windows(32).any(|window| window == manifest) => {
                    times.push(Duration::from_nanos(u64::try_from(when.saturating_sub(at)).unwrap_or(u64::MAX)));
                }
                News::Told(..) | News::Watches => {}
                News::Ended(error) => return Err(error.context("a node has ended")),
            }
        }
        times.sort_unstable();
        let at = |share: usize| times[(times.len() * share / 100).min(times.len() - 1)];
        Ok(Heard { p50: at(50), p99: at(99), max: at(100) })
    }
}

/// One node.
struct Node {
    number: usize,
    address: String,
    roots: std::path::PathBuf,
    report: Option<v1::ReportRequest>,
}

impl Node {
    async fn run(&self, tell: &mpsc::Sender<News>, places: &Semaphore) -> anyhow::Result<()> {
        let seed: [u8; 32] = rand::random();
        let peer = IssuingKey::from_seed(seed).public().peer().context("a key is a peer")?;
        let key = pem("PRIVATE KEY", &pkcs8_of_seed(&seed));
        let mut updates = {
            let _place = places.acquire().await?;
            let mut client = self.connect(None).await?;
            let joined = client.join(v1::JoinRequest {
                versions: Some(v1::Versions { min: VERSION_MIN, max: VERSION_MAX }),
                cluster: CLUSTER.to_owned(),
                node: format!("node-{:04}", self.number),
                peer: peer.to_bytes().into(),
                zone: String::new(),
                token: TOKEN.to_owned(),
                addresses: vec![format!("/ip4/10.{}.{}.1/tcp/4100", self.number / 250, self.number % 250)],
            });
            let joined = joined.await.context("join")?.into_inner();
            let identity = Identity::from_pem(pem("CERTIFICATE", &joined.certificate), key);
            let mut client = self.connect(Some(identity)).await?;
            let updates = client.watch(v1::WatchRequest::default()).await.context("watch")?.into_inner();
            if let Some(report) = &self.report {
                client.report(report.clone()).await.context("report")?;
            }
            updates
        };
        tell.send(News::Watches).await?;
        let mut last = Instant::now();
        while let Some(told) = updates.message().await.context("the stream")? {
            let at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
            // Of snapshots and of lists of members it is enough that something came.
            let is_short = told.update.len() < 16 * 1024;
            if is_short || last.elapsed() > Duration::from_secs(1) {
                last = Instant::now();
                tell.send(News::Told(at, if is_short { told.update } else { Bytes::new() })).await?;
            }
        }
        bail!("the controller has ended the stream")
    }

    async fn connect(&self, identity: Option<Identity>) -> anyhow::Result<ControllerClient<Channel>> {
        let roots = tokio::fs::read(&self.roots).await?;
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots)).domain_name(SERVER_NAME);
        if let Some(identity) = identity {
            tls = tls.identity(identity);
        }
        let endpoint = Endpoint::from_shared(self.address.clone())?.tls_config(tls)?;
        // A node's: one update is small, and 5,000 of them are in one process here.
        let endpoint = endpoint.initial_stream_window_size(64 * 1024).tcp_nodelay(true);
        Ok(ControllerClient::new(endpoint.connect().await.context("connect")?))
    }
}
