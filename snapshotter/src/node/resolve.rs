//! From a request to a manifest: by the registry, and when that is away, by what this node knows.
//!
//! The registry is always asked first, because only it knows what a tag means now. When it cannot be reached, a
//! reference with a digest means that digest, and any other what it meant when it was last mounted here; the user is
//! told so. A registry that answers, even with a refusal, is believed. Layers then come from a signed statement instead
//! of the manifest, which is as good: the statement names the manifest's digest, and a trusted key has signed it.

use std::sync::Arc;

use hermes_image::access::Access;
use hermes_image::ids::{DiffId, Digest};
use hermes_image::statement::Statement;
use hermes_registry::oci::Platform;

use super::{Inner, NodeError};
use crate::control::MountRequest;
use hermes_origin::{ErrorClass, FindImageError, ImageSource, LayerDescriptor, Origin, ResolvedImage, wanted_platform};

/// What a request's image is.
#[derive(Debug)]
pub(super) struct FoundImage {
    /// Its manifest.
    pub(super) manifest: Digest,
    /// Where missing bytes can be read.
    pub(super) origin: Option<Arc<Origin>>,
    /// What the registry says of it now, or why it says nothing.
    pub(super) now: Result<ResolvedImage, Box<FindImageError>>,
    platform: Platform,
}

impl FoundImage {
    /// The image, when its registry answers.
    pub(super) fn resolved(&self) -> Option<(&Arc<Origin>, &ResolvedImage)> {
        Some((self.origin.as_ref()?, self.now.as_ref().ok()?))
    }

    /// The layers that its registry says it has now; none when that does not answer.
    pub(super) fn diff_ids(&self) -> Vec<DiffId> {
        self.now.as_ref().map_or_else(|_| Vec::new(), |image| image.layers.iter().map(|layer| layer.diff_id).collect())
    }

    /// To whom its registry gives it, if that answers.
    pub(super) fn told(&self) -> Option<Access> {
        self.resolved()?.0.access()
    }

    /// What the registry's failure was; empty when it answers.
    pub(super) fn why_not_resolved(&self) -> String {
        self.now.as_ref().err().map_or_else(String::new, ToString::to_string)
    }

    /// Compares a statement with what is known: the manifest, or the platform that was asked for.
    pub(super) fn check(&self, image: &str, statement: &Statement) -> Result<(), NodeError> {
        let other = |reason: String| NodeError::OtherLayers { image: image.to_owned(), reason };
        let Ok(resolved) = &self.now else {
            let platform: Result<Platform, _> = statement.platform.parse();
            let runs = platform.is_ok_and(|platform| platform.runs_on(&self.platform));
            return if runs {
                Ok(())
            } else {
                Err(other(format!("it is for {} where {} is wanted", statement.platform, self.platform)))
            };
        };
        let layers = resolved.layers.iter().map(LayerDescriptor::manifest_layer);
        let same = statement.check_image(&resolved.platform.to_string(), layers);
        same.map_err(|error| other(error.to_string()))
    }
}

impl Inner {
    /// Finds out which image a request is about.
    ///
    /// # Errors
    /// When the registry refuses, or is away and nothing is known of the reference here.
    pub(super) async fn resolve(&self, request: &MountRequest) -> Result<FoundImage, NodeError> {
        let platform = wanted_platform(request.platform.as_deref())?;
        let error = match self.find(request).await {
            Ok((origin, image)) => {
                let manifest = image.manifest_digest;
                return Ok(FoundImage { manifest, origin: Some(origin), now: Ok(image), platform });
            }
            Err(error) => error,
        };
        let is_away = matches!(&error, FindImageError::Origin(error) if error.class() == ErrorClass::Transient);
        let known = if is_away { self.known_manifest(&request.image, &platform).await? } else { None };
        let Some(manifest) = known else { return Err(error.into()) };
        tracing::warn!(
            image = %request.image, %manifest, %error,
            "the registry does not answer; going by what this node knows of the reference"
        );
        let origin = self.origin_client.open_image(&request.image, request.plain_http).await.ok();
        Ok(FoundImage { manifest, origin, now: Err(Box::new(error)), platform })
    }

    async fn find(&self, request: &MountRequest) -> Result<(Arc<Origin>, ResolvedImage), FindImageError> {
        let platform = request.platform.as_deref();
        self.origin_client.find_image(&request.image, platform, request.plain_http).await
    }

    /// The manifest that `image` means without its registry: what it meant when it was last mounted here, or its digest.
    async fn known_manifest(&self, image: &str, platform: &Platform) -> Result<Option<Digest>, NodeError> {
        let store = Arc::clone(&self.store);
        let records = tokio::task::spawn_blocking(move || store.images()).await;
        let records = records.map_err(|_| NodeError::Interrupted)??;
        let runs = |text: &str| text.parse::<Platform>().is_ok_and(|known| known.runs_on(platform));
        let known = records.iter().filter(|record| record.reference == image && runs(&record.platform));
        let last = known.max_by_key(|record| record.last_use_seconds).map(|record| record.manifest);
        let pinned = || match image.parse::<ImageSource>() {
            Ok(ImageSource::Registry(reference)) => reference.digest()?.parse().ok(),
            Ok(ImageSource::Layout { .. }) | Err(_) => None,
        };
        Ok(last.or_else(pinned))
    }
}
