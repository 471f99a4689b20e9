//! The calls: who may make them, what they say, within which limits.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use hermes_controller_api::v1::{self, controller_server::Controller};
use hermes_controller_api::{VERSION_MAX, VERSION_MIN};
use hermes_image::ids::{ArtifactId, DiffId, Digest};
use hermes_p2p::{Multiaddr, PeerId, PeerKey, Zone, unix_now};
use hermes_policy::profile::{RECORD_LEN_MAX_BYTES, codec};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::connections::Caller;
use super::custody::Custody;
use super::hub::{self, Cursor, Hub};
use super::limits::ApiLimits;
use super::nodes::{NodeGuard, Nodes};
use super::numbers::{Call, Numbers, Refusal};
use super::review::{ReviewError, Reviewer};
use crate::artifacts::Artifacts;
use crate::authority::identity::NodeIdentity;
use crate::authority::{Authority, is_node_name};
use crate::event::{Event, ImageKey, NodeReport, Traffic};

/// Longest request: a start's record, and room for its head.
pub(super) const REQUEST_LEN_MAX_BYTES: usize = RECORD_LEN_MAX_BYTES + 4096;
/// Bytes of an artifact that are sent at once, and held for each reader.
const PART_LEN_BYTES: u64 = 128 * 1024;
/// Longest token. Those of Kubernetes have some 1,200 characters.
const TOKEN_LEN_MAX: usize = 16 * 1024;
/// Most addresses of a node.
const ADDRESSES_MAX: usize = 8;
/// Most images that a node holds and tells of.
const HELD_MAX: usize = 4096;
/// Most ways to show trees.
const WAYS_MAX: usize = 16;
/// Longest version or name of a way.
const WORD_LEN_MAX: usize = 64;
/// Most layers that are granted at once: of the largest image that there can be.
const LAYERS_MAX: usize = 1024;
/// Longest time that a layer is granted for: as long as members' certificates.
const GRANT_LIFE_MAX_SECONDS: u32 = 3600;
/// Most images that a stream names: 80 KB.
const KNOWN_MAX: usize = 10_000;
/// What a start's record costs, in requests: the core reads and merges it.
const RECORD_COST: u32 = 5;

/// What all calls share.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) custody: Arc<Custody>,
    pub(super) reviewer: Arc<dyn Reviewer>,
    pub(super) hub: Arc<Hub>,
    pub(super) artifacts: Artifacts,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) nodes: Arc<Nodes>,
    pub(super) numbers: Arc<Numbers>,
    pub(super) limits: ApiLimits,
    pub(super) reviews: Semaphore,
    pub(super) cancel: CancellationToken,
}

/// Cheap to clone, as the generated server wants it.
#[derive(Debug, Clone)]
pub(super) struct Calls(pub(super) Arc<Service>);

type Parts<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl Service {
    /// Counts a refusal and says it.
    fn refuse(&self, why: Refusal, message: impl Into<String>) -> Status {
        self.numbers.refused(why);
        let message = message.into();
        match why {
            Refusal::NoCertificate | Refusal::NoNode | Refusal::NoToken => Status::unauthenticated(message),
            Refusal::Version => Status::failed_precondition(message),
            Refusal::Malformed => Status::invalid_argument(message),
            Refusal::TooMany => Status::resource_exhausted(message),
            Refusal::OtherAudience
            | Refusal::OtherAccount
            | Refusal::OtherNode
            | Refusal::Expired
            | Refusal::UnknownToken
            | Refusal::OtherCluster
            | Refusal::Revoked
            | Refusal::NoGrant
            | Refusal::NotAllowed
            | Refusal::Handshake => Status::permission_denied(message),
        }
    }

    fn malformed(&self, message: impl Into<String>) -> Status {
        self.refuse(Refusal::Malformed, message)
    }

    /// The node that makes this call, if it may, now.
    fn node<T>(&self, request: &Request<T>, cost: u32) -> Result<Arc<NodeIdentity>, Status> {
        let identity = match request.extensions().get::<Caller>() {
            Some(Caller::Node(identity)) => Arc::clone(identity),
            Some(Caller::Stranger) => {
                return Err(
                    self.refuse(Refusal::NoNode, "the certificate is no node's; join and show the one that is given")
                );
            }
            Some(Caller::Anonymous(_)) | None => {
                return Err(self
                    .refuse(Refusal::NoCertificate, "only nodes may do that; join, and connect with the certificate"));
            }
        };
        self.check_member(&self.custody.current(), &identity.peer)?;
        self.spend(&identity.node, identity.peer, cost)?;
        Ok(identity)
    }

    fn check_member(&self, authority: &Authority, peer: &PeerId) -> Result<(), Status> {
        let message = "this node was taken out of the cluster; remove its identity and join anew";
        if authority.has_revoked(peer) { Err(self.refuse(Refusal::Revoked, message)) } else { Ok(()) }
    }

    fn spend(&self, node: &str, peer: PeerId, cost: u32) -> Result<(), Status> {
        let spent = self.nodes.spend(node, peer, cost);
        spent.map_err(|why| self.refuse(why, "too many requests of this node; ask again later"))
    }

    async fn join(&self, caller: Option<Caller>, request: v1::JoinRequest) -> Result<v1::JoinResponse, Status> {
        let versions = request.versions.unwrap_or_default();
        if versions.min > VERSION_MAX || versions.max < VERSION_MIN || versions.min > versions.max {
            let (min, max) = (versions.min, versions.max);
            let message = format!(
                "the node speaks versions {min} to {max}, and this controller {VERSION_MIN} to {VERSION_MAX}; upgrade the older one"
            );
            return Err(self.refuse(Refusal::Version, message));
        }
        let authority = self.custody.current();
        if request.cluster != authority.cluster().as_str() {
            let message = format!("this is cluster '{}'; start the node with --cluster {0}", authority.cluster());
            return Err(self.refuse(Refusal::OtherCluster, message));
        }
        if !is_node_name(&request.node) {
            return Err(self.malformed("the name is no node's; give --node-name the node's name in the cluster"));
        }
        let peer = PeerId::from_bytes(&request.peer).ok().filter(|peer| PeerKey::of(peer).is_some());
        let peer = peer.ok_or_else(|| self.malformed("the PeerId has no Ed25519 key"))?;
        let zone: Zone = request.zone.parse().map_err(|error| self.malformed(format!("{error}")))?;
        let addresses = self.addresses(&request.addresses)?;
        self.check_member(&authority, &peer)?;
        let renews = match &caller {
            Some(Caller::Node(identity)) => identity.node == request.node && identity.peer == peer,
            _ => false,
        };
        if !renews || !request.token.is_empty() {
            self.review(&request.token, &request.node).await?;
        }
        self.spend(&request.node, peer, 1)?;
        let answer = self.admit(&authority, &request.node, peer, zone)?;
        if !addresses.is_empty() {
            self.hub.set_member(peer, Some(&addresses));
        }
        self.numbers.joins.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(node = request.node, %peer, "a node has joined");
        Ok(answer)
    }

    async fn review(&self, token: &str, node: &str) -> Result<(), Status> {
        if token.is_empty() {
            return Err(self.refuse(Refusal::NoToken, "a node has to show a token; give it --controller-token"));
        }
        if token.len() > TOKEN_LEN_MAX {
            return Err(self.malformed(format!("the token is longer than {TOKEN_LEN_MAX} characters")));
        }
        let reviewed = tokio::time::timeout(self.limits.join_timeout, async {
            let _place = self.reviews.acquire().await.map_err(|_| Status::unavailable("the controller ends"))?;
            match self.reviewer.review(token, node).await {
                Ok(()) => Ok(()),
                Err(ReviewError::Refused { why, message }) => Err(self.refuse(why, message)),
                Err(error @ ReviewError::Unavailable { .. }) => {
                    tracing::warn!(node, %error, "a node cannot join now");
                    Err(Status::unavailable("the token cannot be reviewed now; ask again"))
                }
            }
        });
        reviewed.await.unwrap_or_else(|_| Err(Status::unavailable("the token was not reviewed in time; ask again")))
    }

    fn admit(&self, authority: &Authority, node: &str, peer: PeerId, zone: Zone) -> Result<v1::JoinResponse, Status> {
        let now = unix_now();
        let certificate = authority.node_certificate(node, &peer, now).map_err(|error| {
            tracing::error!(node, %error, "no certificate is issued");
            Status::internal("no certificate could be issued; look at the controller's log")
        })?;
        Ok(v1::JoinResponse {
            version: VERSION_MAX,
            certificate: certificate.into(),
            member_certificate: authority.member_certificate(peer, zone, now).encode().into(),
            trust: Some(super::trust_of(authority, &self.hub)),
        })
    }

    fn addresses(&self, texts: &[String]) -> Result<Vec<Multiaddr>, Status> {
        if texts.len() > ADDRESSES_MAX {
            return Err(self.malformed(format!("a node has at most {ADDRESSES_MAX} addresses")));
        }
        let parse = |text: &String| {
            let parsed = if text.len() > 256 { None } else { text.parse().ok() };
            parsed.ok_or_else(|| self.malformed("an address is no multiaddress"))
        };
        texts.iter().map(parse).collect()
    }

    /// The layers that `peer` has grants for, among those that it shows.
    fn granted(&self, grants: &[Bytes], peer: &PeerId) -> Result<HashSet<DiffId>, Status> {
        if grants.len() > LAYERS_MAX {
            return Err(self.malformed(format!("at most {LAYERS_MAX} grants are looked at")));
        }
        let (authority, now) = (self.custody.current(), unix_now());
        Ok(grants.iter().filter_map(|grant| authority.granted(grant, peer, now)).collect())
    }

    fn report(&self, identity: &NodeIdentity, request: v1::ReportRequest) -> Result<(), Status> {
        let too_long = |text: &String| text.len() > WORD_LEN_MAX;
        if too_long(&request.version) || request.ways.len() > WAYS_MAX || request.ways.iter().any(too_long) {
            return Err(self.malformed("a version or a way of the report is too long"));
        }
        if request.images.len() > HELD_MAX {
            return Err(self.malformed(format!("a node tells of at most {HELD_MAX} images")));
        }
        let addresses = self.addresses(&request.addresses)?;
        let mut images = std::collections::BTreeMap::new();
        for image in &request.images {
            let manifest = digest(&image.manifest).ok_or_else(|| self.malformed("a manifest is no digest"))?;
            let percent = u8::try_from(image.percent).ok().filter(|percent| *percent <= 100);
            images.insert(manifest, percent.ok_or_else(|| self.malformed("a share is more than 100 percent"))?);
        }
        let limited = self.nodes.report(&identity.node);
        limited.map_err(|why| self.refuse(why, "a node reports every ten seconds; wait"))?;
        let report = NodeReport {
            version: request.version,
            peer: identity.peer.to_string(),
            ways: request.ways,
            store_used_bytes: request.store_used_bytes,
            store_budget_bytes: request.store_budget_bytes,
            images,
            peer_bytes: request.peer_bytes,
            registry_bytes: request.registry_bytes,
            traffic: request.traffic.as_ref().map(traffic),
        };
        let node = identity.node.clone();
        self.tell(Event::Reported { node, report }).inspect_err(|_| self.nodes.take_report_back(&identity.node))?;
        if !addresses.is_empty() {
            self.hub.set_member(identity.peer, Some(&addresses));
        }
        Ok(())
    }

    /// The core hears of it, or the node repeats it later.
    fn tell(&self, event: Event) -> Result<(), Status> {
        let told = self.events.try_send(event);
        told.map_err(|_| self.refuse(Refusal::TooMany, "the controller is busy; say it again later"))
    }

    fn grant(&self, identity: &NodeIdentity, request: &v1::GrantRequest) -> Result<v1::GrantResponse, Status> {
        let life = request.life_seconds;
        if request.layers.len() > LAYERS_MAX || life == 0 || life > GRANT_LIFE_MAX_SECONDS {
            let message = format!("at most {LAYERS_MAX} layers are granted, for 1 to {GRANT_LIFE_MAX_SECONDS} seconds");
            return Err(self.malformed(message));
        }
        let (authority, now) = (self.custody.current(), unix_now());
        let one = |layer: &Bytes| {
            let layer = DiffId(layer.as_ref().try_into().map_err(|_| self.malformed("a layer is no diffID"))?);
            let granted = authority.grant(identity.peer, layer, now, Duration::from_secs(life.into()));
            Ok(Bytes::from(granted.encode()))
        };
        let grants = request.layers.iter().map(one).collect::<Result<Vec<_>, Status>>()?;
        // Who said when that its registry gives it what: the trace of a node that lies.
        tracing::info!(node = identity.node, peer = %identity.peer, layers = grants.len(), "layers are granted");
        Ok(v1::GrantResponse { grants })
    }

    /// Parts of an artifact that exists and that the node may have.
    fn parts(
        self: &Arc<Self>,
        id: ArtifactId,
        range: std::ops::Range<u64>,
        total: u64,
        guard: NodeGuard,
    ) -> Parts<v1::ArtifactPart> {
        let end_at = tokio::time::Instant::now() + self.limits.read_timeout;
        let state = (Arc::clone(self), range, true, guard);
        Box::pin(futures::stream::try_unfold(state, move |(service, mut range, first, guard)| async move {
            if range.is_empty() && !first {
                return Ok(None);
            }
            let end = range.end.min(range.start + PART_LEN_BYTES);
            let read = service.artifacts.read_packed_range(id, range.start..end);
            let read = tokio::time::timeout_at(end_at, read).await;
            let read = read.map_err(|_| Status::deadline_exceeded("an artifact was not read in time"))?;
            let data = match read {
                Ok(Some(data)) if data.len() as u64 == end - range.start => data,
                Ok(_) => return Err(Status::not_found("the artifact is gone")),
                Err(error) => {
                    tracing::warn!(%id, %error, "an artifact is not given");
                    return Err(Status::unavailable("the artifact cannot be read now; ask again"));
                }
            };
            service.numbers.artifact_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
            range.start = end;
            let packed_length = if first { total } else { 0 };
            Ok(Some((v1::ArtifactPart { packed_length, data }, (service, range, false, guard))))
        }))
    }
}

fn traffic(said: &v1::Traffic) -> Traffic {
    Traffic {
        run: said.run,
        read_at_once: said.read_at_once,
        read_after_waiting: said.read_after_waiting,
        from_peers: said.from_peers,
        from_registries: said.from_registries,
        from_other_layers: said.from_other_layers,
        ahead: said.ahead,
        registry_wire: said.registry_wire,
    }
}

fn digest(bytes: &[u8]) -> Option<Digest> {
    bytes.try_into().ok().map(Digest)
}

/// A stream of updates.
struct Watching {
    service: Arc<Service>,
    cursor: Cursor,
    changes: watch::Receiver<u64>,
    authority: watch::Receiver<Arc<Authority>>,
    peer: PeerId,
    _guard: NodeGuard,
}

impl Watching {
    /// The next update; `None` when the controller ends.
    async fn next(mut self) -> Result<Option<(v1::WatchResponse, Self)>, Status> {
        loop {
            self.changes.mark_unchanged();
            if self.authority.borrow_and_update().has_revoked(&self.peer) {
                return Err(self.service.refuse(Refusal::Revoked, "this node was taken out of the cluster"));
            }
            if let Some(update) = self.service.hub.next(&mut self.cursor) {
                let numbers = &self.service.numbers;
                numbers.updates.fetch_add(1, Ordering::Relaxed);
                numbers.update_bytes.fetch_add(update.len() as u64, Ordering::Relaxed);
                if let Some(waited) = self.cursor.waited() {
                    numbers.told_after(waited);
                }
                return Ok(Some((v1::WatchResponse { update }, self)));
            }
            let service = Arc::clone(&self.service);
            tokio::select! {
                () = service.cancel.cancelled() => return Ok(None),
                changed = self.changes.changed() => if changed.is_err() { return Ok(None) },
                changed = self.authority.changed() => if changed.is_err() { return Ok(None) },
            }
        }
    }
}

#[tonic::async_trait]
impl Controller for Calls {
    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        self.0.numbers.called(Call::Join);
        let caller = request.extensions().get::<Caller>().cloned();
        self.0.join(caller, request.into_inner()).await.map(Response::new)
    }

    type WatchStream = Parts<v1::WatchResponse>;

    async fn watch(&self, request: Request<v1::WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        self.0.numbers.called(Call::Watch);
        let service = &self.0;
        let identity = service.node(&request, 1)?;
        let request = request.into_inner();
        if request.known.len() > KNOWN_MAX {
            return Err(service.malformed(format!("a node names at most {KNOWN_MAX} images")));
        }
        let guard = service.nodes.watch(&identity.node);
        let guard = guard.map_err(|why| service.refuse(why, "this node watches already; end the other streams"))?;
        let watching = Watching {
            cursor: service.hub.cursor(request.history, request.revision, request.known),
            changes: service.hub.changes(),
            authority: service.custody.changes(),
            service: Arc::clone(service),
            peer: identity.peer,
            _guard: guard,
        };
        Ok(Response::new(Box::pin(futures::stream::try_unfold(watching, Watching::next))))
    }

    async fn get_image(&self, request: Request<v1::GetImageRequest>) -> Result<Response<v1::Image>, Status> {
        self.0.numbers.called(Call::GetImage);
        let service = &self.0;
        let identity = service.node(&request, 1)?;
        let request = request.into_inner();
        let manifest = digest(&request.manifest).ok_or_else(|| service.malformed("the manifest is no digest"))?;
        let image = service.hub.image(manifest).ok_or_else(|| Status::not_found("the image is not ready here"))?;
        if !image.may_be_given(&identity.node, &service.granted(&request.grants, &identity.peer)?) {
            let message = "the image is private; show grants for its layers, which a login at its registry gets";
            return Err(service.refuse(Refusal::NoGrant, message));
        }
        Ok(Response::new(hub::whole(&image.view)))
    }

    type ReadArtifactStream = Parts<v1::ArtifactPart>;

    async fn read_artifact(
        &self,
        request: Request<v1::ReadArtifactRequest>,
    ) -> Result<Response<Self::ReadArtifactStream>, Status> {
        self.0.numbers.called(Call::ReadArtifact);
        let service = &self.0;
        let identity = service.node(&request, 1)?;
        let request = request.into_inner();
        let id = request.id.as_ref().try_into().map(ArtifactId);
        let id = id.map_err(|_| service.malformed("the id is no artifact's"))?;
        let images = service.hub.images_with(id);
        if images.is_empty() {
            return Err(Status::not_found("no image that is ready here has the artifact"));
        }
        let granted = service.granted(&request.grants, &identity.peer)?;
        if !images.iter().any(|image| image.may_give_artifact(id, &identity.node, &granted)) {
            let message = "the artifact is of a private image; show a grant for the layer that it is of";
            return Err(service.refuse(Refusal::NoGrant, message));
        }
        let total = service.artifacts.packed_len_bytes(id);
        let total = total.ok_or_else(|| Status::not_found("the artifact is not kept here"))?;
        let start = request.offset.min(total);
        let end = if request.length == 0 { total } else { start.saturating_add(request.length).min(total) };
        let guard = service.nodes.read(&identity.node);
        let guard = guard.map_err(|why| service.refuse(why, "too many artifacts are read at once; ask again later"))?;
        Ok(Response::new(service.parts(id, start..end, total, guard)))
    }

    async fn report(&self, request: Request<v1::ReportRequest>) -> Result<Response<v1::ReportResponse>, Status> {
        self.0.numbers.called(Call::Report);
        let identity = self.0.node(&request, 1)?;
        self.0.report(&identity, request.into_inner())?;
        Ok(Response::new(v1::ReportResponse {}))
    }

    async fn upload_start(
        &self,
        request: Request<v1::UploadStartRequest>,
    ) -> Result<Response<v1::UploadStartResponse>, Status> {
        self.0.numbers.called(Call::UploadStart);
        let service = &self.0;
        service.node(&request, RECORD_COST)?;
        let request = request.into_inner();
        let manifest = digest(&request.manifest).ok_or_else(|| service.malformed("the manifest is no digest"))?;
        if service.hub.image(manifest).is_none() {
            return Err(Status::not_found("the image is not ready here, so nobody needs its starts"));
        }
        if request.record.len() > RECORD_LEN_MAX_BYTES || codec::decode_record(&request.record).is_err() {
            return Err(service.malformed("the record is no start's"));
        }
        service.tell(Event::Started { image: ImageKey { manifest }, record: Arc::from(request.record.as_ref()) })?;
        Ok(Response::new(v1::UploadStartResponse {}))
    }

    async fn grant(&self, request: Request<v1::GrantRequest>) -> Result<Response<v1::GrantResponse>, Status> {
        self.0.numbers.called(Call::Grant);
        let identity = self.0.node(&request, 1)?;
        self.0.grant(&identity, request.get_ref()).map(Response::new)
    }

    async fn revoke(&self, request: Request<v1::RevokeRequest>) -> Result<Response<v1::RevokeResponse>, Status> {
        self.0.numbers.called(Call::Revoke);
        let service = &self.0;
        let identity = service.node(&request, 1)?;
        if request.get_ref().peer != identity.peer.to_bytes() {
            let message = "a node takes itself out alone; take others out where the controller is administered";
            return Err(service.refuse(Refusal::OtherNode, message));
        }
        service.custody.revoke(identity.peer).await.map_err(|error| Status::internal(error.to_string()))?;
        let authority = service.custody.current();
        let notice = authority.revocation().map(|notice| Bytes::from(notice.encode())).unwrap_or_default();
        Ok(Response::new(v1::RevokeResponse { revocation: notice }))
    }
}
