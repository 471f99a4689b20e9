//! What can go wrong with what is kept.

use std::path::PathBuf;

use hermes_image::ids::{Digest, LayerId};
use thiserror::Error;

/// Artifacts that cannot be kept or read.
#[derive(Debug, Error)]
pub enum ArtifactsError {
    /// The place is not usable.
    #[error("artifacts cannot be kept at '{location}': {reason}")]
    Location {
        /// The place.
        location: String,
        /// Why.
        reason: String,
    },
    /// The folder cannot be made.
    #[error("artifacts cannot be kept in {}: {source}; check the disk and the permissions", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The place holds somebody else's indexes.
    #[error(
        "{location} holds indexes that no controller has made, and a controller deletes what it does not need; choose an empty place"
    )]
    NotOurs {
        /// The place.
        location: String,
    },
    /// The store failed.
    #[error(
        "cannot {action} {object} at {location}: {source}; check the disk, or the bucket or registry and its permissions"
    )]
    Store {
        /// What was tried.
        action: &'static str,
        /// With which object.
        object: String,
        /// Where.
        location: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// There is no room.
    #[error(
        "the quota of {quota_bytes} bytes for artifacts is used up ({used_bytes} bytes); raise it, or narrow the policies"
    )]
    Quota {
        /// The most that may be kept.
        quota_bytes: u64,
        /// What is kept.
        used_bytes: u64,
    },
    /// An object is not what its name says.
    #[error("{object} was damaged ({reason}) and is removed; its images are built again")]
    Damaged {
        /// The object.
        object: String,
        /// How.
        reason: String,
    },
    /// Something is longer than anything of its kind.
    #[error("{object} is longer than {limit_bytes} bytes")]
    TooLong {
        /// The object.
        object: String,
        /// The limit.
        limit_bytes: u64,
    },
    /// A statement names a layer that is not kept.
    #[error("layer {0} is not kept; build the image again")]
    LayerMissing(LayerId),
    /// No build of the image has begun.
    #[error("no build of {0} has begun")]
    NotBegun(Digest),
    /// A task of this process was lost.
    #[error("a task of this process failed: {0}")]
    Task(#[source] tokio::task::JoinError),
}
