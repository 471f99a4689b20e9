//! Why the node cannot do something, and of which class that is.

use std::io;
use std::path::PathBuf;

use hermes_image::ids::{ArtifactId, Digest};
use hermes_image::statement::StatementError;
use thiserror::Error;

use crate::artifacts::{ArtifactError, StatementLookupError};
use crate::config::ConfigError;
use crate::control::FailureClass;
use crate::fetch::FetchError;
use crate::fs::session::SessionError;
use crate::index_folder::IndexFolderError;
use crate::mounts::MountError;
use crate::status::Way;
use hermes_origin::indexing::IndexingError;
use hermes_origin::{ErrorClass, FindImageError, OriginError};

/// What the node could not do.
#[derive(Debug, Error)]
pub enum NodeError {
    /// Mounting is for root.
    #[error("a node needs root to mount; run it with sudo")]
    NotRoot,
    /// The state folder is of another version.
    #[error(transparent)]
    StateVersion(#[from] crate::state_version::StateVersionError),
    /// The supervisor's socket cannot be used.
    #[error("cannot use the supervisor's socket (NOTIFY_SOCKET): {0}")]
    Supervisor(#[source] io::Error),
    /// A setting is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The controller cannot be talked with.
    #[error(transparent)]
    Controller(#[from] crate::controller::ControllerError),
    /// An address is wrong.
    #[error("{0}")]
    Address(String),
    /// A file of the node's own.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The key file holds something else.
    #[error("{} holds no key; delete it to have a new one made (indexes that this node built must then be built again)", path.display())]
    Key {
        /// The file.
        path: PathBuf,
    },
    /// The key that the settings name cannot be used.
    #[error("cannot sign with {}: {reason}", path.display())]
    SigningKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it and what to do.
        reason: String,
    },
    /// The join secret cannot be used.
    #[error(transparent)]
    JoinSecret(Box<hermes_p2p::admission::join_secret::JoinSecretError>),
    /// containerd's snapshots.
    #[error(transparent)]
    Snapshots(#[from] crate::snapshots::ServiceError),
    /// The store.
    #[error(transparent)]
    Store(#[from] hermes_store::StoreError),
    /// The swarm.
    #[error(transparent)]
    Peers(Box<hermes_p2p::NodeError>),
    /// A peer that was named cannot be reached.
    #[error("cannot reach the peer {peer}: {reason}; start its node or leave out --peer")]
    Peer {
        /// As the user named it.
        peer: String,
        /// Why.
        reason: String,
    },
    /// The image.
    #[error(transparent)]
    Image(#[from] FindImageError),
    /// Building an index.
    #[error(transparent)]
    Indexing(Box<IndexingError>),
    /// Nobody has an index.
    #[error(
        "nobody has an index of {image} ({manifest}); build one with `hermes index build {image}`, name the folder that has it with --index, or leave out --no-build"
    )]
    NoIndex {
        /// As the user named it.
        image: String,
        /// What it resolved to.
        manifest: Digest,
    },
    /// The registry is away, and the image is not known here.
    #[error("{reason}; nor does this node or a peer have an index of {image}")]
    Unknown {
        /// As the user named it.
        image: String,
        /// What the registry's failure was.
        reason: String,
    },
    /// A statement was refused.
    #[error("the index of {image} is not accepted: {source}; {}", statement_advice(.source))]
    Statement {
        /// As the user named it.
        image: String,
        /// Why.
        source: Box<StatementLookupError>,
    },
    /// The statement is about other layers than the manifest.
    #[error("the index of {image} does not fit its manifest ({reason}); build the index again")]
    OtherLayers {
        /// As the user named it.
        image: String,
        /// What differs.
        reason: String,
    },
    /// An artifact that the statement names is nowhere.
    #[error(
        "nobody gives part of the index of {image} now ({what} {id}); see that its controller, or a node that has started it, can be reached, name the folder that has it with --index, or build it again"
    )]
    MissingArtifact {
        /// As the user named it.
        image: String,
        /// Which part.
        what: &'static str,
        /// Its name.
        id: ArtifactId,
    },
    /// An artifact cannot be read.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// An artifact or a tree is not what it should be.
    #[error("the index of {image} is damaged ({what}: {reason}); build the index again")]
    Damaged {
        /// As the user named it.
        image: String,
        /// Which part.
        what: &'static str,
        /// How.
        reason: String,
    },
    /// The mount point is no folder that can be used.
    #[error("cannot mount at {}: {reason}", dir.display())]
    MountPoint {
        /// The folder.
        dir: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Nothing is mounted there by this node.
    #[error("nothing is mounted at {} by this node; `hermes status` lists what is", dir.display())]
    NotMounted {
        /// The folder.
        dir: PathBuf,
    },
    /// No image of that name is mounted.
    #[error("neither an image '{image}' nor one at {} is mounted by this node; `hermes status` lists what is", dir.display())]
    UnknownImage {
        /// The name.
        image: String,
        /// The folder that the name would be.
        dir: PathBuf,
    },
    /// Somebody still uses it.
    #[error("{} is in use; end the processes that have files of it open (fuser -m {0} lists them)", dir.display())]
    Busy {
        /// The folder.
        dir: PathBuf,
    },
    /// The way that was asked for does not work here.
    #[error("the tree cannot be shown as {way}: {reason}")]
    Way {
        /// The way.
        way: Way,
        /// Why not.
        reason: String,
    },
    /// A kernel mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// A FUSE mount.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// Chunks came and there was no room for them.
    #[error(
        "no room to keep all of the image in {}; free space on its disk, give the node a larger --budget, or unmount images",
        store.display()
    )]
    Full {
        /// The store.
        store: PathBuf,
    },
    /// Chunks did not come.
    #[error(transparent)]
    Fetch(Box<FetchError>),
    /// A blocking task did not end well.
    #[error("the request was interrupted; the daemon's log says why")]
    Interrupted,
}

impl From<hermes_p2p::NodeError> for NodeError {
    fn from(error: hermes_p2p::NodeError) -> Self {
        Self::Peers(Box::new(error))
    }
}

impl From<FetchError> for NodeError {
    fn from(error: FetchError) -> Self {
        Self::Fetch(Box::new(error))
    }
}

impl From<IndexingError> for NodeError {
    fn from(error: IndexingError) -> Self {
        Self::Indexing(Box::new(error))
    }
}

impl NodeError {
    /// The class, for the exit code.
    pub fn class(&self) -> FailureClass {
        match self {
            Self::NotRoot => FailureClass::Denied,
            Self::Config(_) | Self::Address(_) => FailureClass::Usage,
            Self::Io { .. } | Self::Key { .. } | Self::SigningKey { .. } | Self::JoinSecret(_) => FailureClass::Local,
            Self::Peers(error) if matches!(**error, hermes_p2p::NodeError::Config(_)) => FailureClass::Usage,
            Self::Store(_) | Self::Peers(_) => FailureClass::Local,
            Self::StateVersion(_) | Self::Supervisor(_) | Self::Controller(_) => FailureClass::Local,
            Self::Peer { .. } | Self::Unknown { .. } => FailureClass::Unreachable,
            Self::Image(error) => find_class(error),
            Self::Indexing(error) => match &**error {
                IndexingError::Origin(error) => origin_class(error),
                IndexingError::Build { .. } => FailureClass::Corrupt,
                IndexingError::Keep { .. } | IndexingError::Interrupted { .. } => FailureClass::Local,
            },
            Self::Interrupted | Self::Snapshots(_) => FailureClass::Local,
            Self::NoIndex { .. }
            | Self::MissingArtifact { .. }
            | Self::NotMounted { .. }
            | Self::UnknownImage { .. } => FailureClass::NotFound,
            Self::Statement { source, .. } => statement_class(source),
            Self::OtherLayers { .. } | Self::Damaged { .. } => FailureClass::Corrupt,
            Self::Artifact(error) => artifact_class(error),
            Self::MountPoint { .. } | Self::Busy { .. } | Self::Way { .. } | Self::Mount(_) | Self::Session(_) => {
                FailureClass::Local
            }
            Self::Full { .. } => FailureClass::Local,
            Self::Fetch(error) => match error.registry_failure() {
                Some(hermes_policy::class::ErrorClass::Denied) => FailureClass::Denied,
                Some(hermes_policy::class::ErrorClass::NotFound) => FailureClass::NotFound,
                Some(hermes_policy::class::ErrorClass::PeerFault) => FailureClass::Corrupt,
                Some(hermes_policy::class::ErrorClass::Local) => FailureClass::Local,
                Some(hermes_policy::class::ErrorClass::Transient) | None => FailureClass::Unreachable,
            },
        }
    }
}

/// What it means that part of an index cannot be read or kept.
fn artifact_class(error: &ArtifactError) -> FailureClass {
    match error {
        ArtifactError::Folder(IndexFolderError::Damaged { .. }) | ArtifactError::Damaged(_) => FailureClass::Corrupt,
        ArtifactError::Folder(IndexFolderError::Io { .. }) | ArtifactError::Store(_) | ArtifactError::Interrupted => {
            FailureClass::Local
        }
    }
}

/// What it means that a statement was not accepted.
fn statement_class(error: &StatementLookupError) -> FailureClass {
    match error {
        StatementLookupError::Folder(_) => FailureClass::Local,
        StatementLookupError::Denied => FailureClass::Denied,
        StatementLookupError::Refused(StatementError::Untrusted { .. }) => FailureClass::Denied,
        StatementLookupError::Refused(
            StatementError::TooLong
            | StatementError::Malformed(_)
            | StatementError::Format(_)
            | StatementError::BadSignature { .. }
            | StatementError::OtherImage { .. },
        ) => FailureClass::Corrupt,
    }
}

/// What to do when a statement was not accepted.
fn statement_advice(error: &StatementLookupError) -> &'static str {
    match statement_class(error) {
        FailureClass::Denied if matches!(error, StatementLookupError::Denied) => "log in to its registry",
        FailureClass::Denied => "name the signer's key with --trust if you trust it",
        FailureClass::Local => "check the folder",
        _ => "build the index again, or name another folder with --index",
    }
}

/// What it means that an image was not found.
pub fn find_class(error: &FindImageError) -> FailureClass {
    match error {
        FindImageError::Name(_) | FindImageError::Platform(_) => FailureClass::Usage,
        FindImageError::Setup(_) => FailureClass::Local,
        FindImageError::Origin(error) => origin_class(error),
    }
}

/// What a registry's failure means to the person at the terminal.
pub fn origin_class(error: &OriginError) -> FailureClass {
    match error.class() {
        ErrorClass::Transient => FailureClass::Unreachable,
        ErrorClass::PeerFault => FailureClass::Corrupt,
        ErrorClass::NotFound => FailureClass::NotFound,
        ErrorClass::Denied => FailureClass::Denied,
        ErrorClass::Local => FailureClass::Local,
    }
}
