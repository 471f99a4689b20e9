//! What can go wrong between this node and an image's source.
//!
//! An [`OriginError`] always names the image, the layer where there is one, and the host or folder that was asked; the
//! [`Failure`] says what happened, and the text ends with the next step. Secrets never get in: addresses lose their
//! query (signed addresses are credentials), and logins show the user's name at most.

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hermes_image::ids::{Digest, LayerId};
pub use hermes_policy::class::ErrorClass;
use hermes_registry::LayoutError;
use hermes_registry::oci::Platform;
use http::StatusCode;
use thiserror::Error;

use super::hosts::HostsError;
use super::tls::TlsError;

/// Which part of a request took too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nobody took the connection.
    Connect,
    /// The head of the answer did not come.
    Headers,
    /// The body stopped coming.
    Body,
    /// All of it together reached the deadline of the caller.
    Deadline,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Connect => "no connection was made",
            Phase::Headers => "the server did not begin to answer",
            Phase::Body => "the server stopped sending",
            Phase::Deadline => "the deadline passed",
        })
    }
}

/// What happened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Failure {
    /// No connection.
    #[error("no connection: {}", root_cause(.0))]
    Connect(#[source] reqwest::Error),
    /// The connection broke before an answer began.
    #[error("the connection broke before an answer came: {}", root_cause(.0))]
    Broken(#[source] reqwest::Error),
    /// Something took too long.
    #[error("{phase} within {:.1} s, after {received_bytes} bytes", .waited.as_secs_f64())]
    Timeout {
        /// Which part.
        phase: Phase,
        /// How long this part was waited for.
        waited: Duration,
        /// Bytes of the body that had come.
        received_bytes: u64,
    },
    /// 401 or 403, and new credentials did not help.
    #[error("access was refused with {status}{} ({login})", said(.message))]
    Denied {
        /// 401 or 403.
        status: StatusCode,
        /// What the server said.
        message: String,
        /// Which login was used, without its secret.
        login: String,
    },
    /// 404 or 410.
    #[error("it is not there: {status}{}", said(.message))]
    NotFound {
        /// 404 or 410.
        status: StatusCode,
        /// What the server said.
        message: String,
    },
    /// 416, although the range lies within the layer by its descriptor.
    #[error("bytes {}-{} were refused with 416; the layer has {len_bytes} bytes by its manifest, and {} by the server", .range.start, .range.end.saturating_sub(1), known(.server_len_bytes))]
    RangeRefused {
        /// What was asked for.
        range: Range<u64>,
        /// The layer's length by its descriptor.
        len_bytes: u64,
        /// The length that the server gave.
        server_len_bytes: Option<u64>,
    },
    /// 429 or 503: too many requests.
    #[error("the server is overloaded or limits requests: {status}{}{}", said(.message), wait(.retry_after))]
    Throttled {
        /// 429 or 503.
        status: StatusCode,
        /// What the server said.
        message: String,
        /// How long the server wants to be left alone.
        retry_after: Option<Duration>,
    },
    /// Another 5xx.
    #[error("the server failed with {status}{}", said(.message))]
    Server {
        /// The status.
        status: StatusCode,
        /// What the server said.
        message: String,
    },
    /// A status that means nothing here.
    #[error("the server answered {status}{}, which this request cannot lead to", said(.message))]
    Unexpected {
        /// The status.
        status: StatusCode,
        /// What the server said.
        message: String,
    },
    /// The body ended early, cleanly or by a broken connection.
    #[error("the answer was cut after {received_bytes} of {wanted_bytes} bytes")]
    Truncated {
        /// Bytes that should have come.
        wanted_bytes: u64,
        /// Bytes that came.
        received_bytes: u64,
        /// How the connection broke.
        #[source]
        source: Option<reqwest::Error>,
    },
    /// The answer's length is not what was asked for.
    #[error("the answer has {actual_bytes} bytes where {wanted_bytes} were to come")]
    WrongLength {
        /// Bytes that should come.
        wanted_bytes: u64,
        /// Bytes announced, or bytes that came so far when there are more.
        actual_bytes: u64,
    },
    /// The answer is another part of the layer.
    #[error("bytes {}-{} were asked for, the answer is '{answer}'", .range.start, .range.end.saturating_sub(1))]
    WrongRange {
        /// What was asked for.
        range: Range<u64>,
        /// The `Content-Range` of the answer, empty if it had none.
        answer: String,
    },
    /// The server ignores ranges, and the wanted one begins too far in.
    #[error(
        "the server does not serve ranges, and {skip_bytes} bytes would have to be thrown away (at most {limit_bytes})"
    )]
    RangesIgnored {
        /// Bytes before the range.
        skip_bytes: u64,
        /// The most that is thrown away.
        limit_bytes: u64,
    },
    /// A redirect that is not followed.
    #[error("the redirect was not followed: {0}")]
    BadRedirect(&'static str),
    /// The way to a token cannot be gone.
    #[error("no token can be had: {0}")]
    BadChallenge(&'static str),
    /// A document is longer than any of its kind.
    #[error("the {what} is longer than {limit_bytes} bytes")]
    TooLong {
        /// Which document.
        what: &'static str,
        /// The limit.
        limit_bytes: u64,
    },
    /// Bytes that are not what their name says.
    #[error("the {what} has the digest {actual} where {expected} was asked for")]
    WrongDigest {
        /// Which document.
        what: &'static str,
        /// Its name.
        expected: Digest,
        /// What its bytes hash to.
        actual: Digest,
    },
    /// A document that cannot be read.
    #[error("the {what} is malformed: {reason}")]
    Malformed {
        /// Which document.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// An image of a kind that cannot be used.
    #[error("{0}")]
    Unsupported(String),
    /// No image for the wanted platform.
    #[error("it has no image for {wanted}; it has {}", list(.available))]
    PlatformMissing {
        /// What was wanted.
        wanted: Platform,
        /// What there is.
        available: Vec<Platform>,
    },
    /// The configuration does not belong to the manifest.
    #[error("the manifest has {layers} layers, its configuration {diff_ids}")]
    LayerCount {
        /// Layers in the manifest.
        layers: usize,
        /// Layers in the configuration.
        diff_ids: usize,
    },
    /// A layout cannot be read.
    #[error(transparent)]
    Layout(LayoutError),
    /// A layout's file cannot be read.
    #[error("reading {} failed: {source}", .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The mirrors of the registry cannot be known.
    #[error(transparent)]
    Hosts(HostsError),
    /// The certificates for a host cannot be used.
    #[error(transparent)]
    Tls(TlsError),
    /// The caller asked for bytes that the layer does not have.
    #[error("bytes {}..{} do not lie within the layer's {len_bytes} bytes", .range.start, .range.end)]
    OutOfBounds {
        /// What was asked for.
        range: Range<u64>,
        /// The layer's length.
        len_bytes: u64,
    },
    /// A worker thread was lost.
    #[error("a task of this process failed: {0}")]
    Task(#[source] tokio::task::JoinError),
}

/// The innermost cause, which is the telling one ("connection refused"); the outer ones only repeat that a request failed.
fn root_cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn StdError = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(", saying '{message}'") }
}

fn known(len_bytes: &Option<u64>) -> String {
    len_bytes.map_or_else(|| "an unknown number".to_owned(), |len| len.to_string())
}

fn wait(retry_after: &Option<Duration>) -> String {
    retry_after.map_or_else(String::new, |wait| format!(", asking for {} s of rest", wait.as_secs()))
}

fn list(platforms: &[Platform]) -> String {
    if platforms.is_empty() {
        return "none that are named".to_owned();
    }
    platforms.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl Failure {
    /// The metric label.
    pub fn kind(&self) -> &'static str {
        match self {
            Failure::Connect(_) => "connect",
            Failure::Broken(_) => "broken",
            Failure::Timeout { .. } => "timeout",
            Failure::Denied { .. } => "denied",
            Failure::NotFound { .. } => "not_found",
            Failure::RangeRefused { .. } => "range_refused",
            Failure::Throttled { .. } => "throttled",
            Failure::Server { .. } => "server",
            Failure::Unexpected { .. } => "unexpected",
            Failure::Truncated { .. } => "truncated",
            Failure::WrongLength { .. } => "wrong_length",
            Failure::WrongRange { .. } => "wrong_range",
            Failure::RangesIgnored { .. } => "ranges_ignored",
            Failure::BadRedirect(_) => "bad_redirect",
            Failure::BadChallenge(_) => "bad_challenge",
            Failure::TooLong { .. } => "too_long",
            Failure::WrongDigest { .. } => "wrong_digest",
            Failure::Malformed { .. } => "malformed",
            Failure::Unsupported(_) => "unsupported",
            Failure::PlatformMissing { .. } => "platform_missing",
            Failure::LayerCount { .. } => "layer_count",
            Failure::Layout(_) => "layout",
            Failure::File { .. } => "file",
            Failure::Hosts(_) => "hosts",
            Failure::Tls(_) => "tls",
            Failure::OutOfBounds { .. } => "out_of_bounds",
            Failure::Task(_) => "task",
        }
    }

    /// What it means for the next step.
    pub fn class(&self) -> ErrorClass {
        match self {
            Failure::Connect(_)
            | Failure::Broken(_)
            | Failure::Timeout { .. }
            | Failure::Throttled { .. }
            | Failure::Server { .. }
            | Failure::Truncated { .. } => ErrorClass::Transient,
            Failure::Denied { .. } => ErrorClass::Denied,
            Failure::NotFound { .. } | Failure::Unsupported(_) | Failure::PlatformMissing { .. } => {
                ErrorClass::NotFound
            }
            Failure::RangeRefused { .. }
            | Failure::Unexpected { .. }
            | Failure::WrongLength { .. }
            | Failure::WrongRange { .. }
            | Failure::RangesIgnored { .. }
            | Failure::BadRedirect(_)
            | Failure::BadChallenge(_)
            | Failure::TooLong { .. }
            | Failure::WrongDigest { .. }
            | Failure::Malformed { .. }
            | Failure::LayerCount { .. } => ErrorClass::PeerFault,
            Failure::Layout(error) => match error {
                LayoutError::NoFolder { .. }
                | LayoutError::NotALayout { .. }
                | LayoutError::UnknownTag { .. }
                | LayoutError::AmbiguousTag { .. }
                | LayoutError::NoBlob { .. } => ErrorClass::NotFound,
                LayoutError::TooLong { .. } | LayoutError::Damaged { .. } => ErrorClass::PeerFault,
                LayoutError::Io { .. } => ErrorClass::Local,
            },
            Failure::File { .. }
            | Failure::Hosts(_)
            | Failure::Tls(_)
            | Failure::OutOfBounds { .. }
            | Failure::Task(_) => ErrorClass::Local,
        }
    }

    /// What to do about it; `None` where the text of the failure says so already.
    fn advice(&self, source: &str) -> Option<String> {
        let text = match self {
            Failure::Connect(_) | Failure::Broken(_) | Failure::Timeout { .. } => {
                format!("check that {source} can be reached from this node and is not overloaded, then try again")
            }
            Failure::Denied { .. } => {
                format!("check that this login may pull the image, or log in with 'docker login {source}'")
            }
            Failure::NotFound { .. } => "check the name, tag and digest, and whether it was deleted there".to_owned(),
            Failure::Throttled { .. } => "wait, use a mirror, or log in for a higher limit".to_owned(),
            Failure::Server { .. } | Failure::Truncated { .. } => {
                format!("try again; if it stays, look at the logs of {source}")
            }
            Failure::RangeRefused { .. }
            | Failure::Unexpected { .. }
            | Failure::WrongLength { .. }
            | Failure::WrongRange { .. }
            | Failure::BadRedirect(_)
            | Failure::BadChallenge(_) => {
                format!("check that {source} speaks the OCI distribution protocol, and any proxy in between")
            }
            Failure::RangesIgnored { .. } => {
                "use a registry or proxy that serves ranges, or pull the image the ordinary way".to_owned()
            }
            Failure::TooLong { .. }
            | Failure::WrongDigest { .. }
            | Failure::Malformed { .. }
            | Failure::LayerCount { .. } => "push the image again, and check any proxy in between".to_owned(),
            Failure::Unsupported(_) => "pull the image the ordinary way, or push it in the OCI format".to_owned(),
            Failure::PlatformMissing { .. } => "choose one of these with --platform".to_owned(),
            Failure::File { .. } => "check the disk and the permissions".to_owned(),
            Failure::OutOfBounds { .. } | Failure::Task(_) => "this is a defect of hermes, please report it".to_owned(),
            Failure::Layout(_) | Failure::Hosts(_) | Failure::Tls(_) => return None,
        };
        Some(text)
    }
}

/// What an error is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Subject {
    /// The image's reference.
    pub(super) image: Arc<str>,
    /// The layer, if it is about one.
    pub(super) layer: Option<LayerId>,
    /// The host (with port) or folder that was asked.
    pub(super) source: Arc<str>,
}

impl Subject {
    pub(super) fn of_layer(&self, layer: LayerId) -> Self {
        Self { layer: Some(layer), ..self.clone() }
    }

    pub(super) fn at(&self, source: &str) -> Self {
        Self { source: source.into(), ..self.clone() }
    }

    pub(super) fn error(&self, failure: Failure) -> OriginError {
        OriginError(Box::new(Inner { subject: self.clone(), failure }))
    }
}

#[derive(Debug)]
struct Inner {
    subject: Subject,
    failure: Failure,
}

/// A failure, and what it is about. Its text names image, layer, source and next step.
#[derive(Debug)]
pub struct OriginError(Box<Inner>);

impl OriginError {
    /// The image's reference.
    pub fn image(&self) -> &str {
        &self.0.subject.image
    }

    /// The layer, if the error is about one.
    pub fn layer(&self) -> Option<LayerId> {
        self.0.subject.layer
    }

    /// The host (with port) or folder that was asked.
    pub fn host(&self) -> &str {
        &self.0.subject.source
    }

    /// What happened.
    pub fn failure(&self) -> &Failure {
        &self.0.failure
    }

    /// What it means for the next step.
    pub fn class(&self) -> ErrorClass {
        self.0.failure.class()
    }

    /// The metric label.
    pub fn kind(&self) -> &'static str {
        self.0.failure.kind()
    }

    /// How long the source wants to be left alone, where it said so.
    pub fn retry_after(&self) -> Option<Duration> {
        match self.0.failure {
            Failure::Throttled { retry_after, .. } => retry_after,
            _ => None,
        }
    }
}

impl fmt::Display for OriginError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { subject, failure } = &*self.0;
        match subject.layer {
            Some(layer) => write!(f, "layer {layer} of {} from {}: {failure}", subject.image, subject.source)?,
            None => write!(f, "image {} from {}: {failure}", subject.image, subject.source)?,
        }
        match failure.advice(&subject.source) {
            Some(advice) => write!(f, "; {advice}"),
            None => Ok(()),
        }
    }
}

impl StdError for OriginError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.failure.source()
    }
}
