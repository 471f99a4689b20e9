//! Where images come from: registries, and OCI layouts on this machine.
//!
//! An [`ImageSource`] is a name; [`OriginClient::open`] makes it an [`Origin`], which resolves it to an image
//! ([`Origin::resolve`]) and reads parts of its layers ([`Origin::read`]). Documents are checked against their digests
//! here. Layer bytes are *not*: a part of a layer has no digest, so whoever decodes it checks its chunks, and whoever
//! reads all of it hashes it.
//!
//! Nothing here decides about retries: every request is bounded by the caller's deadline and by the [`Timeouts`], and
//! an error says by its [`ErrorClass`] what trying again is worth. The exceptions are steps of the protocol rather than
//! retries, and each happens at most once per request: a kept connection that is dead is replaced, a refused
//! authorization is renewed, a kept redirect that has ended is asked for again.
//!
//! All state is in memory: a crash or a dropped future leaves nothing behind. Dropping a stream ends its transfer.

mod body;
mod counters;
mod credentials;
mod error;
mod layout;
mod redirects;
mod registry;
mod resolve;
mod retry_after;
mod source;
#[cfg(test)]
mod tests;
mod token;
mod transport;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use hermes_image::ids::Digest;
use hermes_registry::oci::Platform;
use thiserror::Error;
use tokio::time::Instant;

pub use counters::OriginCounters;
pub use credentials::CredentialsError;
pub use error::{ErrorClass, Failure, OriginError, Phase};
pub use layout::LayoutOrigin;
pub use registry::RegistryOrigin;
pub use resolve::{LayerDescriptor, ResolvedImage};
pub use source::{ImageSource, LayoutSelector, ParseSourceError};

use body::Wanted;
use counters::Meters;
use error::Subject;
use registry::Document;
use transport::Transport;

/// A layer's bytes as they come: pieces of any size, none empty, together exactly what was asked for. After an error
/// nothing more comes.
pub type ByteStream = BoxStream<'static, Result<Bytes, OriginError>>;

/// The longest that single steps of a request may take, whatever the caller's deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For a connection, with its TLS.
    pub connect: Duration,
    /// From the request to the head of the answer, connection included.
    pub headers: Duration,
    /// For the next bytes of a body.
    pub idle: Duration,
}

impl Default for Timeouts {
    /// A connection takes three round trips, so 5 s cover even a lost packet; a registry that has not begun to answer
    /// after 15 s, or pauses for 15 s, is worth giving up for a peer or another attempt.
    fn default() -> Self {
        let patience = Duration::from_secs(15);
        Self { connect: Duration::from_secs(5), headers: patience, idle: patience }
    }
}

/// How sources are talked to.
#[derive(Debug, Clone)]
pub struct OriginConfig {
    /// Hosts, with or without port, that are talked to in clear. This machine always is.
    pub plain_http_hosts: Vec<String>,
    /// The file with docker's logins; `None` for the usual one (`DOCKER_CONFIG`, or `.docker` of the home directory).
    pub docker_config: Option<PathBuf>,
    /// The longest that single steps may take.
    pub timeouts: Timeouts,
    /// Bytes that are thrown away at most to get to a range when the server sends the whole layer instead.
    pub max_skip_bytes: u64,
    /// Idle connections kept for each host.
    pub max_idle_connections_per_host: usize,
}

impl Default for OriginConfig {
    fn default() -> Self {
        Self {
            plain_http_hosts: Vec::new(),
            docker_config: None,
            timeouts: Timeouts::default(),
            // Half a second at 1 Gbit/s: dearer than that, and another source or the ordinary pull is better.
            max_skip_bytes: 64 << 20,
            // As many as spans are read at once from one registry.
            max_idle_connections_per_host: 16,
        }
    }
}

/// The HTTP client could not be made.
#[derive(Debug, Error)]
#[error(
    "the HTTP client cannot be set up: {0}; check that the system's certificates are installed (package ca-certificates)"
)]
pub struct SetupError(#[source] reqwest::Error);

/// Opens images. One per process: it owns the connections. Cheap to clone.
#[derive(Debug, Clone)]
pub struct OriginClient {
    transport: Transport,
    config: Arc<OriginConfig>,
    meters: Arc<Meters>,
}

impl OriginClient {
    /// Makes a client. Installs the ring provider for TLS if the process has none yet.
    ///
    /// # Errors
    /// When the system's certificates cannot be loaded.
    pub fn new(config: OriginConfig) -> Result<Self, SetupError> {
        let meters = Arc::new(Meters::default());
        let transport = Transport::new(&config, Arc::clone(&meters))?;
        Ok(Self { transport, config: Arc::new(config), meters })
    }

    /// The image at `source`. For a registry this sends nothing yet. Cancel safe.
    ///
    /// # Errors
    /// When the source is a layout that cannot be read, or a host that is none.
    pub async fn open(&self, source: &ImageSource) -> Result<Origin, OriginError> {
        match source {
            ImageSource::Registry(reference) => {
                RegistryOrigin::new(self.transport.clone(), reference.clone(), &self.config).map(Origin::Registry)
            }
            ImageSource::Layout { path, selector } => {
                let (image, meters) = (source.to_string(), Arc::clone(&self.meters));
                LayoutOrigin::open(path.clone(), selector.clone(), &image, meters).await.map(Origin::Layout)
            }
        }
    }

    /// What was asked for and came, over all images.
    pub fn counters(&self) -> OriginCounters {
        self.meters.read()
    }
}

/// The source of one image. Cheap to clone.
#[derive(Debug, Clone)]
pub enum Origin {
    /// In a registry.
    Registry(RegistryOrigin),
    /// In a layout on this machine.
    Layout(LayoutOrigin),
}

impl Origin {
    /// Finds out what the image is for `platform`. Cancel safe.
    ///
    /// # Errors
    /// When the source fails, refuses or does not have it, when something is not what its digest says, or when it is not
    /// an image that can be used.
    pub async fn resolve(&self, platform: &Platform, deadline: Instant) -> Result<ResolvedImage, OriginError> {
        resolve::resolve(self, platform, deadline).await
    }

    /// The compressed bytes `range` of `layer`, by `deadline`. Nothing is sent before the stream is polled; an empty
    /// range sends nothing at all.
    ///
    /// The stream yields errors of every class; [`ErrorClass::Local`] with the caller to blame when the range is not
    /// within the layer.
    pub fn read(&self, layer: &LayerDescriptor, range: Range<u64>, deadline: Instant) -> ByteStream {
        let len_bytes = layer.len_bytes;
        if range.start > range.end || range.end > len_bytes {
            let error = self.subject().of_layer(layer.layer).error(Failure::OutOfBounds { range, len_bytes });
            return stream::iter([Err(error)]).boxed();
        }
        if range.is_empty() {
            return stream::empty().boxed();
        }
        let wanted = Wanted { range, len_bytes, max_skip_bytes: 0 };
        let layer = layer.clone();
        match self.clone() {
            Origin::Registry(origin) => stream::once(origin.read(layer, wanted, deadline))
                .map_ok(|body| stream::try_unfold(body, body::RangeBody::next))
                .try_flatten()
                .boxed(),
            Origin::Layout(origin) => stream::once(origin.read(layer, wanted, deadline))
                .map_ok(|body| stream::try_unfold(body, layout::FileBody::next))
                .try_flatten()
                .boxed(),
        }
    }

    /// All compressed bytes of `layer`, by `deadline`, in one request. They are not checked against the layer's digest;
    /// the index builder does that.
    pub fn read_all(&self, layer: &LayerDescriptor, deadline: Instant) -> ByteStream {
        self.read(layer, 0..layer.len_bytes, deadline)
    }

    /// The host (with port) or folder that is asked.
    pub fn host(&self) -> &str {
        &self.subject().source
    }

    fn subject(&self) -> &Subject {
        match self {
            Origin::Registry(origin) => origin.subject(),
            Origin::Layout(origin) => origin.subject(),
        }
    }

    async fn target(&self, deadline: Instant) -> Result<Document, OriginError> {
        match self {
            Origin::Registry(origin) => origin.target(deadline).await,
            Origin::Layout(origin) => origin.target().await,
        }
    }

    async fn manifest(&self, digest: Digest, deadline: Instant) -> Result<Document, OriginError> {
        match self {
            Origin::Registry(origin) => origin.manifest(digest, deadline).await,
            Origin::Layout(origin) => origin.document(digest, hermes_registry::oci::MAX_MANIFEST_BYTES).await,
        }
    }

    async fn small_blob(
        &self,
        what: &'static str,
        digest: Digest,
        limit_bytes: u64,
        deadline: Instant,
    ) -> Result<Document, OriginError> {
        match self {
            Origin::Registry(origin) => origin.small_blob(what, digest, limit_bytes, deadline).await,
            Origin::Layout(origin) => origin.document(digest, limit_bytes).await,
        }
    }
}

/// A name that is no image that can be read.
#[derive(Debug, Error)]
pub enum FindImageError {
    /// The name is malformed.
    #[error(transparent)]
    Name(#[from] ParseSourceError),
    /// The platform is malformed.
    #[error(transparent)]
    Platform(#[from] hermes_registry::oci::ParsePlatformError),
    /// The HTTP client.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The registry or the layout.
    #[error(transparent)]
    Origin(#[from] OriginError),
}

/// How long resolving an image may take: a token, an index, a manifest and a configuration.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(30);

/// Resolves `image`, a registry reference or `oci:PATH[:TAG]`, for `platform` (this machine's when absent).
///
/// Cancel safe.
///
/// # Errors
/// When a text is malformed, or the image cannot be had.
pub async fn find_image(
    image: &str,
    platform: Option<&str>,
    plain_http: bool,
) -> Result<(Arc<Origin>, ResolvedImage), FindImageError> {
    let platform = wanted_platform(platform)?;
    let origin = open_image(image, plain_http).await?;
    let resolved = origin.resolve(&platform, Instant::now() + RESOLVE_TIMEOUT).await?;
    Ok((origin, resolved))
}

/// The source of `image`, which is not asked for anything yet unless it is a layout. Cancel safe.
///
/// # Errors
/// When the text is malformed, or the layout cannot be read.
pub async fn open_image(image: &str, plain_http: bool) -> Result<Arc<Origin>, FindImageError> {
    let source: ImageSource = image.parse()?;
    let mut config = OriginConfig::default();
    if let (true, ImageSource::Registry(reference)) = (plain_http, &source) {
        config.plain_http_hosts.push(reference.registry().to_owned());
    }
    Ok(Arc::new(OriginClient::new(config)?.open(&source).await?))
}

/// The platform that a person asks for: this machine's when absent.
///
/// # Errors
/// When the text is malformed.
pub fn wanted_platform(platform: Option<&str>) -> Result<Platform, FindImageError> {
    Ok(platform.map(str::parse).transpose()?.unwrap_or_else(Platform::host))
}
