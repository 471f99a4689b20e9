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
//! [`credentials`] finds the logins that are sent, each to its own host only; [`indexing`] streams layers through the index
//! builder, for nodes and for the controller.
//!
//! [`Repository`] is the one thing that writes to a registry: what the controller keeps there.
//!
//! All state is in memory: a crash or a dropped future leaves nothing behind. Dropping a stream ends its transfer.

mod body;
mod counters;
pub mod credentials;
mod endpoint;
mod error;
mod hosts;
pub mod indexing;
mod layout;
mod redirects;
mod registry;
mod repository;
mod resolve;
mod retry_after;
mod source;
#[cfg(test)]
mod tests;
mod tls;
mod token;
mod transport;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use hermes_image::access::Access;
use hermes_image::ids::Digest;
use hermes_registry::oci::Platform;
use thiserror::Error;
use tokio::time::Instant;

pub use counters::OriginCounters;
pub use error::{ErrorClass, Failure, OriginError, Phase};
pub use hosts::HostsError;
pub use layout::LayoutOrigin;
pub use registry::RegistryOrigin;
pub use registry::speaks_plain_http;
pub use repository::Repository;
pub use resolve::{LayerDescriptor, ResolvedImage};
pub use source::{ImageSource, LayoutSelector, ParseSourceError};
pub use tls::{ClientCertificate, TlsError, TlsSettings};

use body::Wanted;
use counters::Meters;
use error::Subject;
use registry::Document;
use tls::Transports;

use crate::credentials::{Credentials, CredentialsConfig};

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

/// Where containerd 1.7 and later look for `hosts.toml` unless told otherwise, and where its documentation puts them.
pub const HOSTS_DIR: &str = "/etc/containerd/certs.d";

/// How sources are talked to.
#[derive(Debug, Clone)]
pub struct OriginConfig {
    /// Hosts, with or without port, that are talked to in clear. This machine always is.
    pub plain_http_hosts: Vec<String>,
    /// Where logins are looked for.
    pub credentials: CredentialsConfig,
    /// The folder with containerd's `hosts.toml` files; `None` for none.
    pub hosts_dir: Option<PathBuf>,
    /// Certificates by host (with port, as in references), beside those that `hosts.toml` names.
    pub tls: BTreeMap<String, TlsSettings>,
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
            credentials: CredentialsConfig::default(),
            hosts_dir: Some(PathBuf::from(HOSTS_DIR)),
            tls: BTreeMap::new(),
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
    transports: Transports,
    credentials: Credentials,
    config: Arc<OriginConfig>,
    meters: Arc<Meters>,
}

impl OriginClient {
    /// Makes a client. Installs the ring provider for TLS if the process has none yet.
    ///
    /// # Errors
    /// When the system's certificates cannot be loaded.
    pub fn new(config: OriginConfig) -> Result<Self, SetupError> {
        let (meters, config) = (Arc::new(Meters::default()), Arc::new(config));
        let transports = Transports::new(Arc::clone(&config), Arc::clone(&meters))?;
        let credentials = Credentials::new(config.credentials.clone());
        Ok(Self { transports, credentials, config, meters })
    }

    /// The same client, which talks to `host` in clear too. It shares everything with this one.
    #[must_use]
    pub fn with_plain_http(&self, host: &str) -> Self {
        let mut config = (*self.config).clone();
        config.plain_http_hosts.push(host.to_owned());
        Self { config: Arc::new(config), ..self.clone() }
    }

    /// A client with logins of its own and no others, which shares connections and counters with this one.
    #[must_use]
    pub fn with_credentials(&self, credentials: CredentialsConfig) -> Self {
        Self { credentials: Credentials::new(credentials), ..self.clone() }
    }

    /// Who this node says it is.
    pub fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    /// The image at `source`. For a registry this sends nothing yet. Cancel safe.
    ///
    /// # Errors
    /// When the source is a layout that cannot be read, or a host that is none.
    pub async fn open(&self, source: &ImageSource) -> Result<Origin, OriginError> {
        match source {
            ImageSource::Registry(reference) => {
                let hosts = self.hosts(reference.registry(), &source.to_string()).await?;
                let with = (&self.transports, &self.credentials);
                RegistryOrigin::new(with, reference.clone(), hosts, &self.config).map(Origin::Registry)
            }
            ImageSource::Layout { path, selector } => {
                let (image, meters) = (source.to_string(), Arc::clone(&self.meters));
                LayoutOrigin::open(path.clone(), selector.clone(), &image, meters).await.map(Origin::Layout)
            }
        }
    }

    /// The hosts that stand for `registry`.
    async fn hosts(&self, registry: &str, image: &str) -> Result<Vec<hosts::Host>, OriginError> {
        let (folder, name) = (self.config.hosts_dir.clone().unwrap_or_default(), registry.to_owned());
        let loading = tokio::task::spawn_blocking(move || hosts::load(&folder, &name)).await;
        let subject = Subject { image: image.into(), layer: None, source: registry.into() };
        let hosts = loading.map_err(|error| subject.error(Failure::Task(error)))?;
        hosts.map_err(|error| subject.error(Failure::Hosts(error)))
    }

    /// Resolves `image`, a registry reference or `oci:PATH[:TAG]`, for `platform` (this machine's when absent).
    ///
    /// Cancel safe.
    ///
    /// # Errors
    /// When a text is malformed, or the image cannot be had.
    pub async fn find_image(
        &self,
        image: &str,
        platform: Option<&str>,
        plain_http: bool,
    ) -> Result<(Arc<Origin>, ResolvedImage), FindImageError> {
        let platform = wanted_platform(platform)?;
        let origin = self.open_image(image, plain_http).await?;
        let resolved = origin.resolve(&platform, Instant::now() + RESOLVE_TIMEOUT).await?;
        Ok((origin, resolved))
    }

    /// The source of `image`, which is not asked for anything yet unless it is a layout. Cancel safe.
    ///
    /// # Errors
    /// When the text is malformed, or the layout cannot be read.
    pub async fn open_image(&self, image: &str, plain_http: bool) -> Result<Arc<Origin>, FindImageError> {
        let source: ImageSource = image.parse()?;
        let origin = match &source {
            ImageSource::Registry(reference) if plain_http => {
                self.with_plain_http(reference.registry()).open(&source).await?
            }
            _ => self.open(&source).await?,
        };
        Ok(Arc::new(origin))
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
        // A source may have a lower limit of its own.
        self.read_skipping(layer, range, u64::MAX, deadline)
    }

    /// The same from a source that serves parts: one that answers with the whole layer is refused, however little of it
    /// would have to be thrown away.
    pub fn read_part(&self, layer: &LayerDescriptor, range: Range<u64>, deadline: Instant) -> ByteStream {
        self.read_skipping(layer, range, 0, deadline)
    }

    fn read_skipping(
        &self,
        layer: &LayerDescriptor,
        range: Range<u64>,
        max_skip_bytes: u64,
        deadline: Instant,
    ) -> ByteStream {
        let len_bytes = layer.len_bytes;
        if range.start > range.end || range.end > len_bytes {
            let error = self.subject().of_layer(layer.layer).error(Failure::OutOfBounds { range, len_bytes });
            return stream::iter([Err(error)]).boxed();
        }
        if range.is_empty() {
            return stream::empty().boxed();
        }
        let wanted = Wanted { range, len_bytes, max_skip_bytes };
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

    /// The bytes that came of `layer` are not the ones that were indexed. Whether reading again asks another host: `true`
    /// when they were a mirror's.
    pub fn distrust(&self, layer: &LayerDescriptor) -> bool {
        match self {
            Origin::Registry(origin) => origin.distrust(layer),
            Origin::Layout(_) => false,
        }
    }

    /// The host (with port) or folder that is asked.
    pub fn host(&self) -> &str {
        &self.subject().source
    }

    /// To whom the source has given the image so far: private when it gave any of it for a login, public when it gave all to
    /// anybody; `None` when it has not been asked for anything, and for a layout on this machine, which proves nothing.
    pub fn access(&self) -> Option<Access> {
        match self {
            Origin::Registry(origin) => origin.access(),
            Origin::Layout(_) => None,
        }
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

/// [`OriginClient::find_image`] with a client of its own and the usual settings, for commands that ask once.
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
    OriginClient::new(OriginConfig::default())?.find_image(image, platform, plain_http).await
}

/// The platform that a person asks for: this machine's when absent.
///
/// # Errors
/// When the text is malformed.
pub fn wanted_platform(platform: Option<&str>) -> Result<Platform, FindImageError> {
    Ok(platform.map(str::parse).transpose()?.unwrap_or_else(Platform::host))
}
