//! An image, the registry that serves it, and the faults in between.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};
use hermes_image::ids::{DiffId, Digest};
use hermes_registry::oci::{Platform, media_type};
use hermes_registry::{Auth, LayoutWriter, Options, Registry};
use http::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, LOCATION, RANGE};
use http::{HeaderValue, StatusCode};
use serde_json::json;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::credentials::CredentialsConfig;
use crate::{ByteStream, ImageSource, LayerDescriptor, Origin, OriginClient, OriginConfig, OriginError, Timeouts};

pub(super) const LAYER_BYTES: usize = 300_007;

/// Each byte a function of its place, so that a misplaced one shows.
pub(super) fn ramp() -> Vec<u8> {
    (0..LAYER_BYTES).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect()
}

/// Far more than any test needs, so that only a hang reaches it.
pub(super) fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// Steps that a hanging server may take in tests.
pub(super) const IMPATIENT: Timeouts =
    Timeouts { connect: Duration::from_secs(5), headers: Duration::from_millis(300), idle: Duration::from_millis(300) };

/// What a request was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) path: String,
    pub(super) authorization: Option<String>,
    pub(super) range: Option<String>,
}

impl Seen {
    pub(super) fn is_blob(&self) -> bool {
        self.path.contains("/blobs/")
    }
}

/// What is done to a request.
pub(super) enum Fault {
    /// Nothing.
    Pass,
    /// This answer, without asking the registry.
    Answer(StatusCode, Vec<(http::HeaderName, String)>, String),
    /// No answer, ever.
    HangBeforeHeaders,
    /// So many bytes of the body, then silence.
    HangAfter(usize),
    /// So many bytes of the body, then a broken connection.
    CutAfter(usize),
    /// The whole blob, whatever range was asked for.
    IgnoreRange,
    /// The whole blob without a length.
    IgnoreRangeUncounted,
    /// A body that is this much shorter than it should be, in good order.
    Shorten(usize),
    /// The same without a length in the head.
    ShortenUncounted(usize),
    /// More than was asked for, without a length in the head.
    LengthenUncounted,
    /// Another part's `Content-Range`.
    ShiftRange,
}

impl Fault {
    pub(super) fn status(status: u16) -> Self {
        let status = StatusCode::from_u16(status).expect("a status");
        Self::Answer(status, Vec::new(), r#"{"errors":[{"code":"WHY","message":"because"}]}"#.to_owned())
    }

    pub(super) fn with(self, name: http::HeaderName, value: &str) -> Self {
        match self {
            Self::Answer(status, mut headers, body) => {
                headers.push((name, value.to_owned()));
                Self::Answer(status, headers, body)
            }
            other => other,
        }
    }

    pub(super) fn redirect(to: &str) -> Self {
        Self::status(307).with(LOCATION, to)
    }
}

/// Makes the same fault again and again.
pub(super) type MakeFault = fn() -> Fault;

type Plan = Box<dyn FnMut(&Seen) -> Fault + Send>;

/// The faults, and what came by.
pub(super) struct Faults {
    plan: Mutex<Plan>,
    seen: Mutex<Vec<Seen>>,
}

fn look_at(request: &Request) -> Seen {
    let header = |name| request.headers().get(name).map(|value: &HeaderValue| value.to_str().expect("text").to_owned());
    let path = request.uri().path_and_query().expect("a path").to_string();
    Seen { path, authorization: header(AUTHORIZATION), range: header(RANGE) }
}

async fn interfere(State(faults): State<Arc<Faults>>, mut request: Request, next: Next) -> Response {
    let seen = look_at(&request);
    let fault = (faults.plan.lock().expect("no panic"))(&seen);
    faults.seen.lock().expect("no panic").push(seen);
    match fault {
        Fault::Answer(status, headers, body) => {
            let mut response = (status, body).into_response();
            for (name, value) in headers {
                response.headers_mut().append(name, value.parse().expect("a header"));
            }
            return response;
        }
        Fault::HangBeforeHeaders => return std::future::pending().await,
        Fault::IgnoreRange | Fault::IgnoreRangeUncounted => {
            request.headers_mut().remove(RANGE);
        }
        _ => {}
    }
    let response = next.run(request).await;
    let (mut head, body) = response.into_parts();
    let whole = axum::body::to_bytes(body, usize::MAX).await.expect("the registry's body");
    let body = match fault {
        Fault::HangAfter(count) => {
            let start = stream::iter([Ok::<_, std::io::Error>(whole.slice(..count))]);
            Body::from_stream(start.chain(stream::pending()))
        }
        Fault::CutAfter(count) => {
            let start = stream::iter([Ok(whole.slice(..count))]);
            // The bytes go out before the connection is broken.
            let broken = stream::once(async {
                tokio::task::yield_now().await;
                Err(std::io::Error::other("cut"))
            });
            Body::from_stream(start.chain(broken))
        }
        Fault::IgnoreRangeUncounted => uncounted(&mut head, whole),
        Fault::Shorten(count) => {
            let short = whole.slice(..whole.len() - count);
            head.headers.insert(CONTENT_LENGTH, short.len().into());
            Body::from(short)
        }
        Fault::ShortenUncounted(count) => uncounted(&mut head, whole.slice(..whole.len() - count)),
        Fault::LengthenUncounted => uncounted(&mut head, [whole, Bytes::from_static(b"more")].concat().into()),
        Fault::ShiftRange => {
            head.headers.insert(CONTENT_RANGE, HeaderValue::from_static("bytes 0-9/300007"));
            Body::from(whole)
        }
        _ => Body::from(whole),
    };
    Response::from_parts(head, body)
}

fn uncounted(head: &mut http::response::Parts, bytes: Bytes) -> Body {
    head.headers.remove(CONTENT_LENGTH);
    Body::from_stream(stream::iter([Ok::<_, std::io::Error>(bytes)]))
}

/// A server that ends with the test.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    faults: Arc<Faults>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start(router: Router) -> Self {
        let faults = Arc::new(Faults { plan: Mutex::new(Box::new(|_| Fault::Pass)), seen: Mutex::default() });
        let router = router.layer(middleware::from_fn_with_state(Arc::clone(&faults), interfere));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let task = tokio::spawn(async move { axum::serve(listener, router).await.expect("serves") });
        Self { address, faults, task }
    }

    /// From now on requests go by `plan`.
    pub(super) fn plan(&self, plan: impl FnMut(&Seen) -> Fault + Send + 'static) {
        *self.faults.plan.lock().expect("no panic") = Box::new(plan);
    }

    /// From now on blobs go by `plan`, which gets the number of the request among those for blobs, from 0.
    pub(super) fn plan_blobs(&self, plan: impl Fn(usize) -> Fault + Send + 'static) {
        let mut count = 0;
        self.plan(move |seen| {
            if !seen.is_blob() {
                return Fault::Pass;
            }
            count += 1;
            plan(count - 1)
        });
    }

    /// What came by since the last look.
    pub(super) fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *self.faults.seen.lock().expect("no panic"))
    }
}

/// An image with one layer, and a server for it.
pub(super) struct Rig {
    pub(super) folder: TempDir,
    pub(super) manifest: Digest,
    pub(super) server: Server,
    registry: Registry,
}

/// Writes an image of one layer, tagged `v1`, behind an index, into `folder`.
pub(super) fn write_image(folder: &Path) -> Digest {
    let writer = LayoutWriter::create(folder).expect("a layout");
    let layer = writer.layer_blob(ramp().as_slice(), media_type::OCI_LAYER_GZIP, DiffId([5; 32])).expect("a layer");
    let platform: Platform = "linux/amd64".parse().expect("a platform");
    let image = writer.image(&platform, &json!({}), &[layer]).expect("an image");
    let index = writer.index(vec![image.clone()]).expect("an index");
    writer.tag(index, "v1").expect("tagged");
    image.digest
}

impl Rig {
    pub(super) async fn new(auth: Auth) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let manifest = write_image(&folder.path().join("layout"));
        let options = Options { auth, ..Options::default() };
        let registry = Registry::open(folder.path().join("layout"), options).expect("a registry");
        let server = Server::start(registry.router()).await;
        Self { folder, manifest, server, registry }
    }

    /// Another server for the same blobs, as storage behind a registry is. It wants no login.
    pub(super) async fn storage(&self) -> Server {
        let registry = Registry::open(self.layout(), Options::default()).expect("a registry");
        Server::start(registry.router()).await
    }

    pub(super) fn layout(&self) -> PathBuf {
        self.folder.path().join("layout")
    }

    pub(super) fn served(&self) -> hermes_registry::Counters {
        self.registry.counters()
    }

    pub(super) fn image(&self) -> String {
        format!("{}/team/app:v1", self.server.address)
    }

    pub(super) fn source(&self) -> ImageSource {
        self.image().parse().expect("a reference")
    }

    /// The file with logins that clients of this rig read.
    pub(super) fn logins(&self) -> PathBuf {
        self.folder.path().join("config.json")
    }

    /// Stores `entry` (JSON) as the login for the server.
    pub(super) fn store_login(&self, entry: &str) {
        let text = format!(r#"{{"auths":{{"{}":{entry}}}}}"#, self.server.address);
        std::fs::write(self.logins(), text).expect("written");
    }

    pub(super) fn config(&self, timeouts: Timeouts) -> OriginConfig {
        let credentials = CredentialsConfig { docker_config: Some(self.logins()), ..CredentialsConfig::default() };
        OriginConfig { credentials, timeouts, hosts_dir: None, ..OriginConfig::default() }
    }

    pub(super) fn client(&self, timeouts: Timeouts) -> OriginClient {
        OriginClient::new(self.config(timeouts)).expect("a client")
    }

    /// A client, the image through it, and the image's layer.
    pub(super) async fn opened(&self, timeouts: Timeouts) -> (OriginClient, Origin, LayerDescriptor) {
        let client = self.client(timeouts);
        let origin = client.open(&self.source()).await.expect("an origin");
        let image = origin.resolve(&amd64(), soon()).await.unwrap_or_else(|error| panic!("{error}"));
        self.server.seen();
        let layer = image.layers.into_iter().next().expect("a layer");
        (client, origin, layer)
    }
}

pub(super) fn amd64() -> Platform {
    Platform::new("linux", "amd64")
}

pub(super) async fn collect(stream: ByteStream) -> Result<Vec<u8>, OriginError> {
    stream
        .try_fold(Vec::new(), async |mut all, piece| {
            assert!(!piece.is_empty(), "an empty piece");
            all.extend_from_slice(&piece);
            Ok(all)
        })
        .await
}

/// Checks that an error's text names the image, the layer, the source and a next step.
pub(super) fn assert_complete(error: &OriginError, image: &str, layer: Option<&LayerDescriptor>, source: &str) {
    let text = error.to_string();
    let layer = layer.map_or_else(String::new, |layer| layer.layer.to_string());
    for part in [image, &layer, source, "; "] {
        assert!(text.contains(part), "'{part}' is missing in: {text}");
    }
    assert_eq!((error.image(), error.host()), (image, source));
}
