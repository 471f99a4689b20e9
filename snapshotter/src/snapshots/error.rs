//! What a call can fail with, and which gRPC status that is.

use std::io;
use std::path::{Path, PathBuf};

use hermes_store::{SnapshotError, StoreError};
use thiserror::Error;
use tonic::{Code, Status};

use super::filter::FilterError;
use super::id_map::IdMapError;
use super::images::ImagesError;

/// Why the service cannot start or go on.
#[derive(Debug, Error)]
pub enum ServiceError {
    /// Another daemon answers on the socket.
    #[error("another snapshotter answers on {}; stop it or choose another socket", path.display())]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket has its name.
    #[error("{} is there and is no socket; move it away or choose another path", path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
    },
    /// The folder's path would break the mounts' options.
    #[error(
        "the snapshots' folder {} cannot stand in mount options; choose a path in UTF-8 without colon, comma and \
         backslash", path.display()
    )]
    Path {
        /// The folder.
        path: PathBuf,
    },
    /// The filesystem does not say what its entries are, which overlayfs needs.
    #[error(
        "the filesystem of {} does not tell the types of its entries, which overlayfs needs; use ext4, or xfs made with \
         ftype=1", path.display()
    )]
    NoFileTypes {
        /// The folder.
        path: PathBuf,
    },
    /// The operating system refused something.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The catalogue failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The server failed.
    #[error("the snapshots service broke: {0}")]
    Server(#[source] tonic::transport::Error),
    /// The runtime is ending.
    #[error("the snapshots service was interrupted")]
    Interrupted,
}

impl ServiceError {
    /// For `map_err` on a system call.
    pub(super) fn io<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { what, path: path.to_owned(), source: source.into() }
    }
}

/// Why a call failed.
#[derive(Debug, Error)]
pub(super) enum CallError {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A filter that cannot be read.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// A mapping that cannot be read.
    #[error(transparent)]
    IdMap(#[from] IdMapError),
    /// The kernel cannot do what the labels ask for.
    #[error(
        "this kernel's overlay takes no id-mapped layers (5.19 does); take 'remap-ids' out of the plugin's capabilities"
    )]
    NoIdMappedLayers,
    /// The rules between snapshots.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// What containerd takes for success: the layer is there and need not be downloaded.
    #[error("snapshot {target} is shown lazily")]
    ShownLazily {
        /// What containerd would have unpacked.
        target: String,
    },
    /// The parent given with a commit is not committed.
    #[error("parent snapshot {name} is not committed")]
    NewParentNotCommitted {
        /// The parent.
        name: String,
    },
    /// A tree could not be shown.
    #[error(transparent)]
    Images(#[from] ImagesError),
    /// The directories.
    #[error(transparent)]
    Service(#[from] ServiceError),
}

impl From<StoreError> for CallError {
    fn from(error: StoreError) -> Self {
        Self::Snapshot(SnapshotError::Store(error))
    }
}

impl CallError {
    /// The status that containerd's error package makes the same error of.
    fn code(&self) -> Code {
        match self {
            Self::Invalid(_) | Self::Filter(_) | Self::IdMap(_) => Code::InvalidArgument,
            Self::NoIdMappedLayers | Self::NewParentNotCommitted { .. } => Code::FailedPrecondition,
            Self::ShownLazily { .. } => Code::AlreadyExists,
            Self::Snapshot(error) => match error {
                SnapshotError::NotFound { .. } | SnapshotError::ParentNotFound { .. } => Code::NotFound,
                SnapshotError::Exists { .. } => Code::AlreadyExists,
                SnapshotError::NotActive { .. } | SnapshotError::HasChildren { .. } => Code::FailedPrecondition,
                SnapshotError::ParentNotCommitted { .. } | SnapshotError::ParentChanged { .. } => Code::InvalidArgument,
                SnapshotError::Store(error) if error.is_full() => Code::ResourceExhausted,
                SnapshotError::Store(_) => Code::Internal,
            },
            Self::Images(ImagesError::Unavailable(_)) => Code::Unavailable,
            Self::Images(ImagesError::Failed(_)) => Code::Unknown,
            Self::Service(ServiceError::Io { source, .. }) if source.kind() == io::ErrorKind::StorageFull => {
                Code::ResourceExhausted
            }
            Self::Service(ServiceError::Interrupted) => Code::Unavailable,
            Self::Service(_) => Code::Internal,
        }
    }
}

impl From<CallError> for Status {
    fn from(error: CallError) -> Self {
        // `Display` of a source that is not part of the message.
        let message = match &error {
            CallError::Snapshot(SnapshotError::Store(inner)) => match std::error::Error::source(inner) {
                Some(source) => format!("{inner}: {source}"),
                None => inner.to_string(),
            },
            _ => error.to_string(),
        };
        let code = error.code();
        if matches!(code, Code::Internal | Code::ResourceExhausted | Code::Unavailable | Code::Unknown) {
            tracing::warn!(code = code as i32, error = message, "a snapshot call failed");
        } else {
            tracing::debug!(code = code as i32, error = message, "a snapshot call was refused");
        }
        Self::new(code, message)
    }
}
