//! Connections: TCP, TLS, who is at the other end, and for how long.
//!
//! Handshakes run beside each other within a limit, and whoever has ended one is handed to HTTP/2, or to [`browsers`]. A connection ends with
//! the certificate that it showed, and soon when it showed none, unless it shows tokens for the status page all the time; so
//! no node stays longer than the authority has said.
//! Connections of an earlier generation of the authority go on.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use hermes_p2p::unix_now;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::server::Connected;

use super::browsers::{self, Browsers};
use super::limits::ApiLimits;
use super::numbers::{Counted, Numbers, Refusal};
use crate::authority::identity::NodeIdentity;

/// How long the listener rests when the system has no descriptor to give.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How much later than its certificate a connection ends: as far as two clocks may be apart.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// Whether somebody without a certificate has lately shown a token that lets look at the status page.
#[derive(Debug, Clone, Default)]
pub(crate) struct Recognised(Arc<AtomicBool>);

impl Recognised {
    /// It has.
    pub(crate) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn take(&self) -> bool {
        self.0.swap(false, Ordering::Relaxed)
    }
}

/// Who is at the other end of a connection.
#[derive(Debug, Clone)]
pub(crate) enum Caller {
    /// Somebody without a certificate.
    Anonymous(Recognised),
    /// A node.
    Node(Arc<NodeIdentity>),
    /// Somebody with a certificate of this authority that is no node's.
    Stranger,
}

/// One connection.
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    caller: Caller,
    end: Pin<Box<Sleep>>,
    /// How long somebody without a certificate stays, and stays on.
    anonymous_for: Duration,
    _permit: OwnedSemaphorePermit,
    _counted: Counted,
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl Connection {
    pub(super) fn caller(&self) -> Caller {
        self.caller.clone()
    }

    /// Whether its time is over. Somebody without a certificate who has been recognised since the last look stays on.
    fn is_over(&mut self, cx: &mut Context<'_>) -> bool {
        while self.end.as_mut().poll(cx).is_ready() {
            match &self.caller {
                Caller::Anonymous(recognised) if recognised.take() => {
                    self.end.as_mut().reset(Instant::now() + self.anonymous_for);
                }
                _ => return true,
            }
        }
        false
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.is_over(cx) {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the certificate of this connection has ended",
            )));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// What accepting needs.
pub(super) struct Accepting {
    pub(super) listener: TcpListener,
    pub(super) tls: watch::Receiver<Arc<rustls::ServerConfig>>,
    /// Who serves HTTP/1.1, if anybody.
    pub(super) browsers: Option<Browsers>,
    pub(super) limits: ApiLimits,
    pub(super) numbers: Arc<Numbers>,
    pub(super) cancel: CancellationToken,
    pub(super) tasks: TaskTracker,
}

impl Accepting {
    /// Connections that have shaken hands, until it is cancelled.
    pub(super) fn start(self) -> impl Stream<Item = io::Result<Connection>> + Send + use<> {
        let (ready, connections) = mpsc::channel(self.limits.handshakes_max);
        let tasks = self.tasks.clone();
        tasks.spawn(self.run(ready));
        futures::stream::unfold(connections, |mut connections| async {
            connections.recv().await.map(|connection| (Ok(connection), connections))
        })
    }

    async fn run(self, ready: mpsc::Sender<Connection>) {
        let places = Arc::new(Semaphore::new(self.limits.connections_max));
        let handshakes = Arc::new(Semaphore::new(self.limits.handshakes_max));
        loop {
            // Whoever comes meanwhile waits in the listener's queue.
            let handshake = Arc::clone(&handshakes).acquire_owned().await.expect("nobody closes it");
            let accepted = tokio::select! {
                () = self.cancel.cancelled() => return,
                accepted = self.listener.accept() => accepted,
            };
            let tcp = match accepted {
                Ok((tcp, _)) => tcp,
                Err(error) => {
                    tracing::warn!(%error, "no connection is accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&places).try_acquire_owned() else {
                self.numbers.refused(Refusal::TooMany);
                continue;
            };
            let (tls, ready) = (TlsAcceptor::from(Arc::clone(&self.tls.borrow())), ready.clone());
            let browsers = self.browsers.clone();
            let (limits, numbers, cancel) = (self.limits.clone(), Arc::clone(&self.numbers), self.cancel.clone());
            self.tasks.spawn(async move {
                let shaken = tokio::select! {
                    () = cancel.cancelled() => return,
                    shaken = tokio::time::timeout(limits.handshake_timeout, shake(tls, tcp)) => shaken,
                };
                drop(handshake);
                match shaken {
                    Ok(Ok(stream)) => {
                        let by_http1 = stream.get_ref().1.alpn_protocol() == Some(browsers::PROTOCOL);
                        let connection = Connection::of(stream, permit, &limits, &numbers);
                        match browsers {
                            Some(browsers) if by_http1 => browsers.serve(connection, &cancel, &numbers).await,
                            None if by_http1 => {}
                            _ => drop(ready.send(connection).await),
                        }
                    }
                    Ok(Err(error)) => {
                        tracing::debug!(%error, "a handshake has failed");
                        numbers.refused(Refusal::Handshake);
                    }
                    Err(_) => numbers.refused(Refusal::Handshake),
                }
            });
        }
    }
}

async fn shake(tls: TlsAcceptor, tcp: TcpStream) -> io::Result<TlsStream<TcpStream>> {
    // An update is small and must not wait for more.
    tcp.set_nodelay(true)?;
    tls.accept(tcp).await
}

impl Connection {
    fn of(
        stream: TlsStream<TcpStream>,
        permit: OwnedSemaphorePermit,
        limits: &ApiLimits,
        numbers: &Arc<Numbers>,
    ) -> Self {
        let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let caller = match shown {
            None => Caller::Anonymous(Recognised::default()),
            Some(certificate) => {
                NodeIdentity::of(certificate).map_or(Caller::Stranger, |identity| Caller::Node(Arc::new(identity)))
            }
        };
        let stays = match &caller {
            Caller::Node(identity) => Duration::from_secs(identity.not_after.saturating_sub(unix_now())) + CLOCK_SKEW,
            Caller::Anonymous(_) | Caller::Stranger => limits.anonymous_for,
        };
        let counted = Counted::new(numbers, |numbers| &numbers.connections);
        let end = Box::pin(tokio::time::sleep_until(Instant::now() + stays));
        let anonymous_for = limits.anonymous_for;
        Self { stream, caller, end, anonymous_for, _permit: permit, _counted: counted }
    }
}
