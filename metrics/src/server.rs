//! `/metrics`, `/healthz` and `/readyz` over HTTP, for those who scrape and probe.
//!
//! A connection and each request have their limits, and there are few connections at once: whoever can reach the port can
//! read the numbers, and nothing more. Off unless an address is given.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http::header::{CONTENT_TYPE, HeaderValue};
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Connections at once: a scraper or two, and the kubelet's probes. Further ones wait.
const MAX_CONNECTIONS: usize = 16;

/// Time for the head of a request, and after it for the answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The longest life of a connection: one that is kept open longer than a scrape interval only takes a place.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(120);

/// Bytes of a request's head.
const MAX_HEAD_BYTES: usize = 16 << 10;

/// Pause after a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is served.
#[derive(Clone)]
pub struct Pages {
    /// The exposition.
    pub metrics: Arc<dyn Fn() -> BoxFuture<'static, String> + Send + Sync>,
    /// What is not ready yet; `None` when everything is.
    pub unready: Arc<dyn Fn() -> Option<String> + Send + Sync>,
}

impl std::fmt::Debug for Pages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pages").finish_non_exhaustive()
    }
}

/// Serves `listener` until dropped. Cancel safe: connections end with it.
pub async fn serve(listener: TcpListener, pages: Pages) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let place = tokio::select! {
            place = Arc::clone(&places).acquire_owned() => place,
            Some(_) = connections.join_next() => continue,
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let pages = pages.clone();
                connections.spawn(async move {
                    let _place = place;
                    // A client that goes away or is too slow is no matter of ours.
                    let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection(stream, pages)).await;
                });
            }
            // Such as too many open files, which passes.
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for metrics");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, pages: Pages) {
    let service = service_fn(move |request: Request<Incoming>| {
        let pages = pages.clone();
        async move { Ok::<_, Infallible>(answer(&request, &pages).await) }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(REQUEST_TIMEOUT).max_buf_size(MAX_HEAD_BYTES);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "a connection for metrics ended");
    }
}

async fn answer(request: &Request<Incoming>, pages: &Pages) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return page(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n".to_owned());
    }
    match request.uri().path() {
        "/metrics" => match tokio::time::timeout(REQUEST_TIMEOUT, (pages.metrics)()).await {
            Ok(text) => page(StatusCode::OK, text),
            Err(_) => page(StatusCode::SERVICE_UNAVAILABLE, "the node is too busy to count\n".to_owned()),
        },
        "/healthz" => page(StatusCode::OK, "ok\n".to_owned()),
        "/readyz" => match (pages.unready)() {
            None => page(StatusCode::OK, "ok\n".to_owned()),
            Some(what) => page(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {what}\n")),
        },
        _ => page(StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz\n".to_owned()),
    }
}

fn page(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    // The version is that of Prometheus' text format.
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn pages_are_served() {
        let ready = Arc::new(AtomicBool::new(false));
        let is_ready = Arc::clone(&ready);
        let pages = Pages {
            metrics: Arc::new(|| Box::pin(async { "hermes_x 1\n".to_owned() })),
            unready: Arc::new(move || (!is_ready.load(Ordering::Relaxed)).then(|| "the snapshots service".to_owned())),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let serving = tokio::spawn(serve(listener, pages));
        let ask = async |line: &str| {
            let mut stream = TcpStream::connect(address).await.expect("connected");
            let request = format!("{line} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            stream.write_all(request.as_bytes()).await.expect("sent");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("answered");
            answer
        };
        // Silent connections leave places for others.
        let mut silent = Vec::new();
        for _ in 0..MAX_CONNECTIONS - 1 {
            silent.push(TcpStream::connect(address).await.expect("connected"));
        }
        let metrics = ask("GET /metrics").await;
        assert!(metrics.starts_with("HTTP/1.1 200") && metrics.ends_with("hermes_x 1\n"), "{metrics}");
        assert!(metrics.contains("version=0.0.4"), "{metrics}");
        assert!(ask("GET /healthz").await.starts_with("HTTP/1.1 200"));
        let unready = ask("GET /readyz").await;
        assert!(unready.starts_with("HTTP/1.1 503") && unready.contains("the snapshots service"), "{unready}");
        ready.store(true, Ordering::Relaxed);
        assert!(ask("GET /readyz").await.starts_with("HTTP/1.1 200"));
        assert!(ask("GET /else").await.starts_with("HTTP/1.1 404"));
        assert!(ask("POST /metrics").await.starts_with("HTTP/1.1 405"));
        serving.abort();
    }
}
