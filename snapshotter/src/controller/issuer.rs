//! The swarm's certificates, grants and members by the controller.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hermes_image::ids::DiffId;
use hermes_p2p::admission::certificate::{SignedCertificate, Trust};
use hermes_p2p::admission::grants::SignedGrant;
use hermes_p2p::admission::issuer::{CertificateRequest, IssueError, Issuer};
use hermes_p2p::admission::revocation::{Revocation, SignedRevocation};
use hermes_p2p::members::provider::{Provider, Seed};
use hermes_p2p::{ClusterId, PeerId};

use super::Controller;

/// How long the swarm waits for a connection to the controller when this node has no certificate: at its first start.
const FIRST_PATIENCE: Duration = Duration::from_secs(3);

impl Controller {
    /// The certificate that is here, if it serves `request` for a while yet, or for the rest of its time.
    fn certificate(&self, request: &CertificateRequest, for_a_while: bool) -> Option<SignedCertificate> {
        let member = self.known.read().member.clone()?;
        let said = member.said();
        let life = said.not_after.saturating_sub(said.not_before);
        let least = if for_a_while { life * 3 / 5 } else { 0 };
        let is_good = request.now.saturating_add(least) < said.not_after
            && said.epoch >= request.epoch_min
            && said.peer == request.peer
            && said.zone == request.zone;
        is_good.then_some(member)
    }

    async fn renewed(&self) -> Result<(), String> {
        let mut clients = self.client.subscribe();
        let connected = tokio::time::timeout(FIRST_PATIENCE, clients.wait_for(Option::is_some)).await;
        let client = match connected {
            Ok(Ok(client)) => client.clone(),
            _ => None,
        };
        let mut client = client.ok_or("the controller is away")?;
        self.join(&mut client, true).await.map_err(|error| error.to_string())
    }
}

impl Issuer for Controller {
    fn issue(&self, request: &CertificateRequest) -> Result<SignedCertificate, IssueError> {
        if let Some(fresh) = self.certificate(request, true) {
            return Ok(fresh);
        }
        let renewed = self.runtime.block_on(self.renewed());
        let here = self.certificate(request, renewed.is_ok()).or_else(|| self.certificate(request, false));
        here.ok_or_else(|| IssueError::Failed {
            reason: renewed.err().unwrap_or_else(|| "the controller's certificate is not for this node".to_owned()),
        })
    }

    fn trust(&self) -> Trust {
        self.known.read().swarm_trust()
    }

    fn revoke(&self, _: Revocation) -> Result<SignedRevocation, IssueError> {
        Err(IssueError::NotHere { what: "take out members of a cluster with a controller" })
    }

    fn grant(
        &self,
        cluster: &ClusterId,
        peer: PeerId,
        layer: DiffId,
        now: u64,
        life: Duration,
    ) -> Result<SignedGrant, IssueError> {
        let granted = self.grant_all(cluster, peer, &[layer], now, life)?.pop();
        granted.ok_or_else(|| IssueError::Failed { reason: "the controller grants nothing".to_owned() })
    }

    fn grant_all(
        &self,
        _: &ClusterId,
        _: PeerId,
        layers: &[DiffId],
        _: u64,
        life: Duration,
    ) -> Result<Vec<SignedGrant>, IssueError> {
        let granted = self.runtime.block_on(self.grants(layers, life));
        granted.map_err(|reason| IssueError::Failed { reason })
    }
}

/// Where the controller says that members are.
#[derive(Debug)]
pub(crate) struct Places(pub(crate) Arc<Controller>);

impl Provider for Places {
    fn places(&self) -> BoxStream<'static, Vec<Seed>> {
        let mut places = self.0.places.subscribe();
        places.mark_changed();
        let next = |mut places: tokio::sync::watch::Receiver<Vec<Seed>>| async {
            if places.changed().await.is_err() {
                // The node ends, and so does whoever looks.
                std::future::pending::<()>().await;
            }
            let now = places.borrow_and_update().clone();
            Some((now, places))
        };
        stream::unfold(places, next).boxed()
    }
}
