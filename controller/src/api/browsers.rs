//! Connections by HTTP/1.1, which nodes never make: browsers without HTTP/2, scripts, and what stands between.
//!
//! They get the status page's routes and nothing of gRPC. Heads are short and come soon, and there are few such connections
//! at once, so that none of them costs more than one by HTTP/2.

use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::connections::Connection;
use super::numbers::{Numbers, Refusal};

/// What TLS calls HTTP/1.1 (RFC 7301, section 6).
pub(super) const PROTOCOL: &[u8] = b"http/1.1";
/// Most such connections: some hundred people.
const CONNECTIONS_MAX: usize = 256;
/// Longest head of a request: as much as by HTTP/2.
const HEAD_LEN_MAX_BYTES: usize = 16 * 1024;
/// How long a head may take, from the end of the request before.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// Serves them.
#[derive(Debug, Clone)]
pub(super) struct Browsers {
    routes: Router,
    places: Arc<Semaphore>,
}

impl Browsers {
    pub(super) fn new(routes: Router) -> Self {
        Self { routes, places: Arc::new(Semaphore::new(CONNECTIONS_MAX)) }
    }

    /// Answers on `connection` until it ends; when `cancel` is, the request under way is answered first.
    pub(super) async fn serve(&self, connection: Connection, cancel: &CancellationToken, numbers: &Numbers) {
        let Ok(_place) = self.places.try_acquire() else { return numbers.refused(Refusal::TooMany) };
        let routes = self.routes.clone().layer(Extension(connection.caller()));
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_LEN_MAX_BYTES);
        let serving = builder.serve_connection(TokioIo::new(connection), TowerToHyperService::new(routes));
        let mut serving = std::pin::pin!(serving);
        let served = tokio::select! {
            served = serving.as_mut() => served,
            () = cancel.cancelled() => {
                serving.as_mut().graceful_shutdown();
                serving.await
            }
        };
        if let Err(error) = served {
            tracing::debug!(%error, "a connection of a browser has ended");
        }
    }
}
