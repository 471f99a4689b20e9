//! What errors of registries, layers and the store mean for an image: a class, a reason in one word, and a line that says
//! what to do.

use hermes_image::build::BuildError;
use hermes_origin::indexing::IndexingError;
use hermes_origin::{ErrorClass, Failure as Cause, OriginError};
use hermes_p2p::error::in_full;

use crate::artifacts::ArtifactsError;
use crate::event::{Failure, FailureClass};

pub(super) fn failure(class: FailureClass, reason: &'static str, message: String) -> Failure {
    Failure { class, reason, message, retry_after: None }
}

/// A defect of this program.
pub(super) fn internal(what: &str) -> Failure {
    failure(FailureClass::Local, "InternalError", format!("{what}; this is a defect of hermes, please report it"))
}

pub(super) fn of_origin(error: &OriginError) -> Failure {
    let (class, reason) = match (error.failure(), error.class()) {
        (Cause::Unsupported(_), _) => (FailureClass::Unfit, "UnsupportedMediaType"),
        (Cause::PlatformMissing { .. }, _) => (FailureClass::NotFound, "PlatformMissing"),
        (Cause::Malformed { .. } | Cause::LayerCount { .. } | Cause::TooLong { .. }, _) => {
            (FailureClass::Unfit, "ManifestInvalid")
        }
        (Cause::Throttled { .. }, _) => (FailureClass::Transient, "RegistryThrottles"),
        (Cause::Hosts(_) | Cause::Tls(_), _) => (FailureClass::Local, "RegistryConfigInvalid"),
        (_, ErrorClass::Denied) => (FailureClass::Denied, "AccessDenied"),
        (_, ErrorClass::NotFound) => (FailureClass::NotFound, "ImageNotFound"),
        (_, ErrorClass::Transient) => (FailureClass::Transient, "RegistryUnavailable"),
        // What a registry or a proxy answers wrongly today, it may answer rightly when somebody has looked at it.
        (_, ErrorClass::PeerFault) => (FailureClass::Transient, "RegistryMisbehaves"),
        (_, _) => (FailureClass::Local, "InternalError"),
    };
    Failure { class, reason, message: error.to_string(), retry_after: error.retry_after() }
}

pub(super) fn of_artifacts(error: &ArtifactsError) -> Failure {
    let reason = match error {
        ArtifactsError::Quota { .. } => "QuotaExceeded",
        _ => "ArtifactsUnavailable",
    };
    failure(FailureClass::Local, reason, in_full(error))
}

/// Whether the content of a layer was found wrong before all of it was compared with its digest, so that it is worth a
/// second look before the image is given up: a proxy may have changed it.
pub(super) fn is_content(error: &IndexingError) -> bool {
    let IndexingError::Build { source, .. } = error else { return false };
    matches!(
        source,
        BuildError::DiffId { .. } | BuildError::Inflate { .. } | BuildError::Tar(_) | BuildError::TooLong { .. }
    )
}

pub(super) fn of_indexing(error: &IndexingError) -> Failure {
    match error {
        IndexingError::Origin(error) => of_origin(error),
        IndexingError::Build { source: BuildError::BlobLength { .. } | BuildError::BlobDigest { .. }, .. } => {
            let advice = "check the registry and any proxy in between";
            failure(FailureClass::Transient, "RegistryMisbehaves", format!("{}; {advice}", in_full(error)))
        }
        error if is_content(error) => {
            let advice = "build and push the image again; until then it is pulled the ordinary way";
            failure(FailureClass::Unfit, "LayerInvalid", format!("{}; {advice}", in_full(error)))
        }
        error => internal(&in_full(error)),
    }
}
