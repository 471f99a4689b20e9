//! A registry that goes wrong on command: the real one, with faults between it and its client.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use futures::stream::{self, StreamExt as _};
use hermes_registry::{Auth, Counters, Options, Registry};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, RETRY_AFTER};
use http::{HeaderValue, StatusCode};
use tokio::runtime::Runtime;

/// How long a token is valid: longer than any test.
const TOKEN_LIFETIME: Duration = Duration::from_secs(600);

/// What becomes of a request for a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is answered as it should be.
    Pass,
    /// This status, without more.
    Status(u16),
    /// 429, with a rest of so many seconds.
    Throttle(u32),
    /// The login is lost on the way, so that the answer is 401 with a challenge.
    LoseLogin,
    /// No answer, ever.
    Hang,
    /// So many bytes of the body, then silence.
    HangAfter(usize),
    /// So many bytes of the body, then a broken connection.
    CutAfter(usize),
    /// A body in good order, and so much shorter than it should be.
    Shorten(usize),
    /// A body of the right length with other bytes.
    Change,
}

type Plan = Box<dyn FnMut(usize) -> Fault + Send>;

struct Faults {
    plan: Mutex<Plan>,
    blob_requests: AtomicUsize,
}

/// A running registry, on a runtime of its own. Dropping it ends it.
pub struct FaultyRegistry {
    address: SocketAddr,
    faults: Arc<Faults>,
    registry: Registry,
    runtime: Option<Runtime>,
}

impl FaultyRegistry {
    /// Serves the layout in `dir`, at first without faults. It gives a token to everybody, and wants one, as public
    /// registries do.
    ///
    /// # Errors
    /// When there is no layout, or no port.
    pub fn start(dir: &Path) -> Result<Self> {
        let options = Options { auth: Auth::Token { login: None, lifetime: TOKEN_LIFETIME }, ..Options::default() };
        Self::with_options(dir, options)
    }

    /// The same with options.
    ///
    /// # Errors
    /// When there is no layout, or no port.
    pub fn with_options(dir: &Path, options: Options) -> Result<Self> {
        let registry = Registry::open(dir, options)?;
        let faults =
            Arc::new(Faults { plan: Mutex::new(Box::new(|_| Fault::Pass)), blob_requests: AtomicUsize::new(0) });
        let router = registry.router();
        let router: Router = router.layer(middleware::from_fn_with_state(Arc::clone(&faults), interfere));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).context("listen")?;
        let address = listener.local_addr()?;
        runtime.spawn(async move { axum::serve(listener, router).await });
        Ok(Self { address, faults, registry, runtime: Some(runtime) })
    }

    /// Host and port.
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// The reference of the image with `tag`.
    pub fn image(&self, tag: &str) -> String {
        format!("{}/team/app:{tag}", self.address)
    }

    /// From now on requests for blobs go by `plan`, which gets the number of the request, from 0.
    pub fn plan(&self, plan: impl FnMut(usize) -> Fault + Send + 'static) {
        let mut current = self.faults.plan.lock().unwrap_or_else(PoisonError::into_inner);
        self.faults.blob_requests.store(0, Ordering::Relaxed);
        *current = Box::new(plan);
    }

    /// All requests for blobs meet `fault`.
    pub fn always(&self, fault: Fault) {
        self.plan(move |_| fault);
    }

    /// The first request for a blob meets `fault`.
    pub fn once(&self, fault: Fault) {
        self.plan(move |request| if request == 0 { fault } else { Fault::Pass });
    }

    /// Requests for blobs since the last plan was made.
    pub fn blob_requests(&self) -> usize {
        self.faults.blob_requests.load(Ordering::Relaxed)
    }

    /// What the registry behind the faults has served.
    pub fn counters(&self) -> Counters {
        self.registry.counters()
    }
}

impl Drop for FaultyRegistry {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

async fn interfere(State(faults): State<Arc<Faults>>, mut request: Request, next: Next) -> Response {
    if !request.uri().path().contains("/blobs/") {
        return next.run(request).await;
    }
    let fault = {
        let mut plan = faults.plan.lock().unwrap_or_else(PoisonError::into_inner);
        plan(faults.blob_requests.fetch_add(1, Ordering::Relaxed))
    };
    match fault {
        Fault::Pass => return next.run(request).await,
        Fault::Status(status) => return status_answer(status),
        Fault::Throttle(seconds) => {
            let mut answer = status_answer(429);
            answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
            return answer;
        }
        Fault::LoseLogin => {
            request.headers_mut().remove(AUTHORIZATION);
            return next.run(request).await;
        }
        Fault::Hang => return std::future::pending().await,
        _ => {}
    }
    let (mut head, body) = next.run(request).await.into_parts();
    let Ok(whole) = axum::body::to_bytes(body, usize::MAX).await else { return status_answer(500) };
    let body = match fault {
        Fault::HangAfter(count) => Body::from_stream(beginning(&whole, count).chain(stream::pending())),
        Fault::CutAfter(count) => {
            // The bytes go out before the connection is broken.
            let broken = stream::once(async {
                tokio::task::yield_now().await;
                Err(std::io::Error::other("cut"))
            });
            Body::from_stream(beginning(&whole, count).chain(broken))
        }
        Fault::Shorten(count) => {
            let short = whole.slice(..whole.len().saturating_sub(count));
            head.headers.insert(CONTENT_LENGTH, short.len().into());
            Body::from(short)
        }
        _ => Body::from(whole.iter().enumerate().map(change).collect::<Vec<u8>>()),
    };
    Response::from_parts(head, body)
}

fn beginning(whole: &Bytes, count: usize) -> impl stream::Stream<Item = std::io::Result<Bytes>> + Send + use<> {
    stream::iter([Ok(whole.slice(..count.min(whole.len())))])
}

/// Every 64th byte is another one.
fn change((place, byte): (usize, &u8)) -> u8 {
    if place % 64 == 63 { !byte } else { *byte }
}

fn status_answer(status: u16) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, r#"{"errors":[{"code":"FAULT","message":"a fault of the test"}]}"#).into_response()
}
