//! Questions to the controller that somebody waits for. Each has a limit in time; without a connection there is no answer.

use std::time::Duration;

use bytes::Bytes;
use hermes_controller_api::v1;
use hermes_controller_api::v1::controller_client::ControllerClient;
use hermes_image::ids::{ArtifactId, DiffId, Digest};
use hermes_image::index::wire;
use hermes_image::statement::SIGNED_LEN_MAX_BYTES;
use hermes_image::verify::Verified;
use hermes_p2p::admission::grants::SignedGrant;
use tonic::Status;
use tonic::transport::Channel;

use super::Controller;
use crate::index_folder::ARTIFACT_LEN_MAX_BYTES;

/// How long an answer of a few kilobytes may take: a container waits.
const ASK_TIMEOUT: Duration = Duration::from_secs(3);
/// How long an artifact may take, as long as a peer's.
const ARTIFACT_TIMEOUT: Duration = Duration::from_secs(90);
/// Longest packed artifact that is taken.
const PACKED_LEN_MAX_BYTES: u64 = 256 << 20;

impl Controller {
    fn connected(&self) -> Option<ControllerClient<Channel>> {
        self.client.borrow().clone()
    }

    /// All of the image `manifest`, with its profile, for which `grants` speak if it is private; `None` when the controller
    /// is away, does not have it, or does not give it to this node. Cancel safe.
    pub async fn whole_image(&self, manifest: Digest, grants: Vec<Bytes>) -> Option<v1::Image> {
        self.image(manifest)?;
        let mut client = self.connected()?;
        let request = v1::GetImageRequest { manifest: manifest.0.to_vec().into(), grants };
        let image = match tokio::time::timeout(ASK_TIMEOUT, client.get_image(request)).await.ok()? {
            Ok(image) => image.into_inner(),
            Err(status) => {
                tracing::debug!(%manifest, code = %status.code(), error = status.message(), "the controller gives no image");
                return None;
            }
        };
        (image.manifest == manifest.0.as_slice() && image.statement.len() <= SIGNED_LEN_MAX_BYTES).then_some(image)
    }

    /// What starts of `manifest` read, in the wire form of profiles, if the controller knows. Cancel safe.
    pub async fn profile(&self, manifest: Digest, grants: Vec<Bytes>) -> Option<Bytes> {
        let told = self.image(manifest)?;
        if !told.private && told.profile_id.is_empty() {
            return None;
        }
        let profile = self.whole_image(manifest, grants).await?.profile;
        (!profile.is_empty()).then_some(profile)
    }

    /// The artifact `id`, for which `grants` speak if it is private; `None` when the controller does not give it. Cancel safe.
    pub async fn artifact(&self, id: ArtifactId, grants: Vec<Bytes>) -> Option<Verified<Bytes>> {
        let client = self.connected()?;
        let read = tokio::time::timeout(ARTIFACT_TIMEOUT, read(client, id, grants)).await.ok()?;
        let packed = match read {
            Ok(packed) => packed,
            Err(status) => {
                tracing::debug!(%id, code = %status.code(), error = status.message(), "the controller gives no artifact");
                return None;
            }
        };
        let unpacked = tokio::task::spawn_blocking(move || {
            let plain = wire::unpack(&packed, ARTIFACT_LEN_MAX_BYTES).map_err(|error| error.to_string())?;
            Verified::artifact(id, plain).map_err(|error| error.to_string())
        });
        let unpacked = unpacked.await.ok()?;
        unpacked.inspect_err(|error| tracing::warn!(%id, error, "the controller's artifact is damaged")).ok()
    }

    /// Grants for `layers`, which this node's registry has given it, in their order.
    ///
    /// # Errors
    /// When the controller is away or does not grant.
    pub(super) async fn grants(&self, layers: &[DiffId], life: Duration) -> Result<Vec<SignedGrant>, String> {
        let mut client = self.connected().ok_or("the controller is away")?;
        let request = v1::GrantRequest {
            layers: layers.iter().map(|layer| layer.0.to_vec().into()).collect(),
            life_seconds: u32::try_from(life.as_secs()).unwrap_or(u32::MAX),
        };
        let granted = tokio::time::timeout(ASK_TIMEOUT, client.grant(request)).await;
        let granted = granted.map_err(|_| "the controller does not answer")?;
        let granted = granted.map_err(|status| format!("{}: {}", status.code(), status.message()))?.into_inner();
        let decoded = granted.grants.iter().map(|grant| SignedGrant::decode(grant).map_err(|error| error.to_string()));
        let grants = decoded.collect::<Result<Vec<_>, _>>()?;
        let is_right = grants.iter().map(|grant| grant.said().layer).eq(layers.iter().copied());
        if is_right { Ok(grants) } else { Err("it grants other layers than asked for".to_owned()) }
    }

    /// Tells what this node is.
    ///
    /// # Errors
    /// When it was not taken; it may be said again.
    pub(crate) async fn report(&self, mut report: v1::ReportRequest) -> Result<(), String> {
        let mut client = self.connected().ok_or("the controller is away")?;
        report.addresses = self.addresses.read().clone();
        let said = tokio::time::timeout(ASK_TIMEOUT, client.report(report)).await;
        let said = said.map_err(|_| "the controller does not answer")?;
        said.map(drop).map_err(|status| format!("{}: {}", status.code(), status.message()))
    }
}

async fn read(mut client: ControllerClient<Channel>, id: ArtifactId, grants: Vec<Bytes>) -> Result<Vec<u8>, Status> {
    let request = v1::ReadArtifactRequest { id: id.0.to_vec().into(), offset: 0, length: 0, grants };
    let mut parts = client.read_artifact(request).await?.into_inner();
    let (mut total, mut packed) = (None, Vec::new());
    while let Some(part) = parts.message().await? {
        let total = *total.get_or_insert(part.packed_length);
        if total > PACKED_LEN_MAX_BYTES || packed.len() as u64 + part.data.len() as u64 > total {
            return Err(Status::out_of_range("it is longer than it may be, or says"));
        }
        packed.extend_from_slice(&part.data);
    }
    if total == Some(packed.len() as u64) { Ok(packed) } else { Err(Status::data_loss("it ends too early")) }
}
