//! The server: connections, counters, and its end.
//!
//! One task accepts; each connection is a task of its own, owned by the accepting one. At the end no more connections
//! are taken, idle ones close, requests under way may finish within [`DRAIN_DEADLINE`], and what is left is cut off.

use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use http::HeaderMap;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use crate::answer::Refusal;
use crate::auth::{Auth, Guard, Scope};
use crate::link::Link;
use crate::repositories::{OpenError, Repositories};
use crate::router::router;

/// Connections at once; more wait in the kernel's queue. Each costs a descriptor, its blob's descriptor, and a few
/// buffers of some 100 KiB.
const MAX_CONNECTIONS: usize = 1024;

/// Time that a client has for a TLS handshake, to send a request's head, and that an idle connection is kept.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// Time that requests under way have to finish once the server is told to end.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// Pause after a failed accept, such as for lack of descriptors, which passes when connections end.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How a registry behaves.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Who may read.
    pub auth: Auth,
    /// Bits per second that all connections share; `None` for as fast as the machine allows. Bodies count, heads do not.
    pub bandwidth_bits_per_second: Option<NonZeroU64>,
    /// Added to each connection before it is served, and to each request before the first byte of its answer, as round
    /// trips to a distant registry would be.
    pub latency: Duration,
}

/// What a registry has served so far. Requests that were refused for lack of credentials count as requests as well.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests for manifests, with GET or HEAD.
    pub manifest_requests: u64,
    /// Bytes of manifests sent.
    pub manifest_bytes: u64,
    /// Requests for blobs (layers and configurations), with GET or HEAD.
    pub blob_requests: u64,
    /// Bytes of blobs handed to connections.
    pub blob_bytes: u64,
    /// Requests for tokens, listings and the base.
    pub other_requests: u64,
    /// Requests among all of these that were answered with 401.
    pub denied_requests: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Meters {
    manifest_requests: AtomicU64,
    manifest_bytes: AtomicU64,
    blob_requests: AtomicU64,
    blob_bytes: AtomicU64,
    other_requests: AtomicU64,
    denied_requests: AtomicU64,
}

// The counters are independent of each other and of everything else, so no ordering is needed.
impl Meters {
    pub(crate) fn manifest_request(&self) {
        self.manifest_requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn manifest_bytes(&self, count: u64) {
        self.manifest_bytes.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn blob_request(&self) {
        self.blob_requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn blob_bytes(&self, count: u64) {
        self.blob_bytes.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn other_request(&self) {
        self.other_requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn denied(&self) {
        self.denied_requests.fetch_add(1, Ordering::Relaxed);
    }

    fn read(&self) -> Counters {
        let read = |meter: &AtomicU64| meter.load(Ordering::Relaxed);
        Counters {
            manifest_requests: read(&self.manifest_requests),
            manifest_bytes: read(&self.manifest_bytes),
            blob_requests: read(&self.blob_requests),
            blob_bytes: read(&self.blob_bytes),
            other_requests: read(&self.other_requests),
            denied_requests: read(&self.denied_requests),
        }
    }
}

/// What all requests share.
pub(crate) struct Shared {
    pub(crate) repositories: Repositories,
    pub(crate) guard: Guard,
    pub(crate) link: Link,
    pub(crate) counters: Meters,
}

impl Shared {
    pub(crate) fn admit(&self, headers: &HeaderMap, scope: Scope<'_>) -> Result<(), Refusal> {
        self.guard.admit(headers, scope).inspect_err(|_| self.counters.denied())
    }
}

/// A registry over one layout, served under any name, or over a folder of layouts, each served under its path.
#[derive(Clone)]
pub struct Registry {
    shared: Arc<Shared>,
}

impl Registry {
    /// Looks at the folder `path` and the layouts in it. Images may be added to these layouts later; layouts that are
    /// added later are not seen. Blocks on the disk.
    ///
    /// # Errors
    /// When the folder holds no layout, or one that cannot be read.
    pub fn open(path: impl AsRef<Path>, options: Options) -> Result<Self, OpenError> {
        let shared = Shared {
            repositories: Repositories::open(path.as_ref())?,
            guard: Guard::new(options.auth),
            link: Link::new(options.bandwidth_bits_per_second, options.latency),
            counters: Meters::default(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The names of the repositories, sorted.
    pub fn repositories(&self) -> Vec<String> {
        self.shared.repositories.names()
    }

    /// What was served so far.
    pub fn counters(&self) -> Counters {
        self.shared.counters.read()
    }

    /// The requests as a service, for those who bring their own server.
    pub fn router(&self) -> Router {
        router(Arc::clone(&self.shared))
    }

    /// Serves `listener` until `shutdown` is over and requests under way are done or cut off. Dropping the future cuts
    /// off everything at once.
    pub async fn serve(&self, listener: TcpListener, shutdown: impl Future<Output = ()>) {
        self.accept(listener, None, shutdown).await;
    }

    /// The same over TLS. The latency counts once for the connection; the flights of the handshake are not delayed.
    pub async fn serve_tls(
        &self,
        listener: TcpListener,
        config: Arc<ServerConfig>,
        shutdown: impl Future<Output = ()>,
    ) {
        self.accept(listener, Some(TlsAcceptor::from(config)), shutdown).await;
    }

    async fn accept(&self, listener: TcpListener, tls: Option<TlsAcceptor>, shutdown: impl Future<Output = ()>) {
        let router = self.router();
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let draining = CancellationToken::new();
        let mut connections = JoinSet::new();
        let mut shutdown = pin!(shutdown);
        loop {
            let accept = async {
                let slot = Arc::clone(&slots).acquire_owned().await;
                (listener.accept().await, slot)
            };
            let (accepted, slot) = tokio::select! {
                () = &mut shutdown => break,
                Some(_) = connections.join_next() => continue,
                accepted = accept => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    let (router, draining, shared) = (router.clone(), draining.clone(), Arc::clone(&self.shared));
                    let tls = tls.clone();
                    connections.spawn(async move {
                        shared.link.round_trip().await;
                        connection(stream, tls, router, draining).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        drop(listener);
        draining.cancel();
        let drained = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN_DEADLINE, drained).await.is_err() {
            tracing::warn!(left = connections.len(), "requests did not finish in time and are cut off");
            connections.shutdown().await;
        }
    }

    /// Listens on `address` (port 0 for any free one) and serves in a task of its own.
    ///
    /// # Errors
    /// When the address cannot be listened on.
    pub async fn start(&self, address: SocketAddr) -> io::Result<Handle> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let ending = CancellationToken::new();
        let (registry, ended) = (self.clone(), ending.clone());
        let task = tokio::spawn(async move { registry.serve(listener, ended.cancelled_owned()).await });
        Ok(Handle { address, registry: self.clone(), ending, task })
    }
}

async fn connection(stream: TcpStream, tls: Option<TlsAcceptor>, router: Router, draining: CancellationToken) {
    // Small answers must not wait for the acknowledgement of the one before.
    let _ = stream.set_nodelay(true);
    let Some(tls) = tls else { return requests(stream, router, draining).await };
    match tokio::time::timeout(HEAD_TIMEOUT, tls.accept(stream)).await {
        Ok(Ok(stream)) => requests(stream, router, draining).await,
        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
        Err(_) => tracing::debug!("a TLS handshake took too long"),
    }
}

async fn requests(stream: impl AsyncRead + AsyncWrite + Unpin, router: Router, draining: CancellationToken) {
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = &mut connection => result,
        () = draining.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection broke");
    }
}

/// A registry that is running. Dropped, it ends by itself soon after.
#[derive(Debug)]
pub struct Handle {
    address: SocketAddr,
    registry: Registry,
    ending: CancellationToken,
    task: JoinHandle<()>,
}

impl Handle {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What was served so far.
    pub fn counters(&self) -> Counters {
        self.registry.counters()
    }

    /// Ends the server and waits until its connections are closed, at most a few seconds.
    pub async fn shutdown(mut self) {
        self.ending.cancel();
        if let Err(error) = (&mut self.task).await {
            tracing::error!(%error, "the registry's task failed");
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.ending.cancel();
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").field("repositories", &self.shared.repositories).finish_non_exhaustive()
    }
}
