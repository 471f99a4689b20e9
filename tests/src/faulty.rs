//! A registry that goes wrong on command: the real one, with faults between it and its client.
//!
//! It can stand in another network, and far away ([`Site`]), and keeps a [`Ledger`] of what it has delivered to whom.

mod distance;
mod ledger;

use std::net::{SocketAddr, TcpListener};
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::stream::{self, StreamExt as _};
use hermes_registry::{Auth, Counters, Options, Registry};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, RANGE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, StatusCode};
use tokio::runtime::Runtime;

use crate::network::Network;
use distance::{Client, Distant};
pub use ledger::{Delivered, Ledger, ToClient};

/// How long a token is valid: longer than any test.
const TOKEN_LIFETIME: Duration = Duration::from_secs(600);

/// How long requests under way may take when the registry goes away.
const GOING: Duration = Duration::from_millis(100);

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
    /// The whole blob, whatever range was asked for.
    IgnoreRange,
    /// 416 for a range; whole blobs are answered as they should be.
    RefuseRange,
    /// No answer for a range, ever; whole blobs are answered as they should be.
    HangRange,
}

/// A request for a blob, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobRequest {
    /// When.
    pub at: Instant,
    /// Its path.
    pub path: String,
    /// Whether it was for a part.
    pub is_range: bool,
}

/// What clients of a registry that wants a login have sent it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Logins {
    /// Logins that were right.
    pub taken: usize,
    /// Logins that were once right, or never.
    pub refused: usize,
}

/// The login that is right now, as a header; none has to be sent when there is none.
#[derive(Default)]
struct Door {
    right: Option<String>,
    seen: Logins,
}

type Plan = Box<dyn FnMut(usize) -> Fault + Send>;

struct Faults {
    plan: Mutex<Plan>,
    blob_requests: AtomicUsize,
    log: Mutex<Vec<BlobRequest>>,
    door: Mutex<Door>,
}

impl std::fmt::Debug for Faults {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Faults").field("blob_requests", &self.blob_requests).finish_non_exhaustive()
    }
}

/// Nothing under these locks can break half-way.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where a registry listens.
#[derive(Debug, Clone)]
pub struct Site {
    /// The network; that of the test when absent.
    pub network: Option<Arc<Network>>,
    /// The address in it; port 0 for any.
    pub address: SocketAddr,
    /// How much later what either side sends arrives at the other.
    pub delay: Duration,
}

impl Default for Site {
    fn default() -> Self {
        Self { network: None, address: SocketAddr::from(([127, 0, 0, 1], 0)), delay: Duration::ZERO }
    }
}

/// A running registry, on a runtime of its own. Dropping it ends it.
#[derive(Debug)]
pub struct FaultyRegistry {
    site: Site,
    ledger: Arc<Ledger>,
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

    /// The same behind a link of so many bits per second.
    ///
    /// # Errors
    /// When there is no layout, or no port.
    pub fn with_rate(dir: &Path, bits_per_second: NonZeroU64) -> Result<Self> {
        Self::with_options(dir, Options { bandwidth_bits_per_second: Some(bits_per_second), ..Options::default() })
    }

    /// The same with options.
    ///
    /// # Errors
    /// When there is no layout, or no port.
    pub fn with_options(dir: &Path, options: Options) -> Result<Self> {
        Self::at(dir, options, Site::default())
    }

    /// The same at a place.
    ///
    /// # Errors
    /// When there is no layout, or no such place.
    pub fn at(dir: &Path, options: Options, site: Site) -> Result<Self> {
        let registry = Registry::open(dir, options)?;
        let faults = Arc::new(Faults {
            plan: Mutex::new(Box::new(|_| Fault::Pass)),
            blob_requests: AtomicUsize::new(0),
            log: Mutex::default(),
            door: Mutex::default(),
        });
        let mut served = Self { site, ledger: Arc::default(), faults, registry, runtime: None };
        served.come_back()?;
        Ok(served)
    }

    /// Goes away: connections break, and nobody listens any more.
    pub fn go(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(GOING);
        }
    }

    /// Listens again, where it did before.
    ///
    /// # Errors
    /// When somebody else listens there.
    pub fn come_back(&mut self) -> Result<()> {
        let router = self.registry.router();
        let router: Router = router.layer(middleware::from_fn_with_state(Arc::clone(&self.faults), interfere));
        let router = router.layer(middleware::from_fn_with_state(Arc::clone(&self.ledger), ledger::enter));
        let service = router.into_make_service_with_connect_info::<Client>();
        let listener = self.listen()?;
        self.site.address = listener.local_addr()?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let entered = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener)?;
        drop(entered);
        if self.site.delay.is_zero() {
            runtime.spawn(async move { axum::serve(listener, service).await });
        } else {
            let listener = Distant { listener, delay: self.site.delay };
            runtime.spawn(async move { axum::serve(listener, service).await });
        }
        self.runtime = Some(runtime);
        Ok(())
    }

    fn listen(&self) -> Result<TcpListener> {
        let address = self.site.address;
        let bind = || {
            let listener = TcpListener::bind(address).with_context(|| format!("listen on {address}"))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        self.site.network.as_ref().map_or_else(bind, |network| network.within(bind))
    }

    /// What it has delivered of its blobs since it was started.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// From now on tokens are given for this login only. Tokens that were given stay good for their time.
    pub fn want_login(&self, user: &str, password: &str) {
        locked(&self.faults.door).right = Some(login_header(user, password));
    }

    /// The logins that came since the registry was started.
    pub fn logins(&self) -> Logins {
        locked(&self.faults.door).seen
    }

    /// The requests for blobs since the last plan was made, in the order in which they came.
    pub fn blob_log(&self) -> Vec<BlobRequest> {
        locked(&self.faults.log).clone()
    }

    /// Host and port.
    pub fn host(&self) -> String {
        self.site.address.to_string()
    }

    /// The reference of the image with `tag`.
    pub fn image(&self, tag: &str) -> String {
        format!("{}/team/app:{tag}", self.site.address)
    }

    /// From now on requests for blobs go by `plan`, which gets the number of the request, from 0.
    pub fn plan(&self, plan: impl FnMut(usize) -> Fault + Send + 'static) {
        let mut current = locked(&self.faults.plan);
        self.faults.blob_requests.store(0, Ordering::Relaxed);
        locked(&self.faults.log).clear();
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
    if request.uri().path() == "/token" && !is_let_in(&faults, &request) {
        let challenge = [(WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"test\""))];
        return (StatusCode::UNAUTHORIZED, challenge).into_response();
    }
    if !request.uri().path().contains("/blobs/") {
        return next.run(request).await;
    }
    let fault = {
        let mut plan = locked(&faults.plan);
        let (path, is_range) = (request.uri().path().to_owned(), request.headers().contains_key(RANGE));
        locked(&faults.log).push(BlobRequest { at: Instant::now(), path, is_range });
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
        Fault::RefuseRange | Fault::HangRange if !request.headers().contains_key(RANGE) => {
            return next.run(request).await;
        }
        Fault::RefuseRange => return status_answer(416),
        Fault::HangRange => return std::future::pending().await,
        Fault::IgnoreRange => {
            request.headers_mut().remove(RANGE);
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

/// What a client sends that has this login.
pub fn login_header(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// Whether the login that was sent is the one that is right now.
fn is_let_in(faults: &Faults, request: &Request) -> bool {
    let mut door = locked(&faults.door);
    let Some(right) = &door.right else { return true };
    let sent = request.headers().get(AUTHORIZATION).map(HeaderValue::as_bytes);
    let is_right = sent == Some(right.as_bytes());
    match (sent, is_right) {
        (_, true) => door.seen.taken += 1,
        (Some(_), false) => door.seen.refused += 1,
        (None, false) => {}
    }
    is_right
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
