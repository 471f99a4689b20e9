//! The API over real TLS on loopback, with nodes that do as they should and others.

mod access;
mod hostile;
mod joins;
mod pages;
mod watches;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use hermes_controller_api::v1::controller_client::ControllerClient;
use hermes_controller_api::{Message as _, SERVER_NAME, v1};
use hermes_image::access::Access;
use hermes_image::ids::{ArtifactId, DiffId, Digest, LayerId};
use hermes_image::statement::{LayerStatement, Statement};
use hermes_image::verify::Verified;
use hermes_origin::indexing::Artifact;
use hermes_p2p::{PeerId, unix_now};
use tempfile::TempDir;
use tokio::sync::mpsc;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};

use super::custody::Custody;
use super::hub::Hub;
use super::limits::ApiLimits;
use super::numbers::{Numbers, Refusal};
use super::review::{ReviewError, Reviewer, Viewers};
use super::{Api, ApiParts};
use crate::artifacts::{ArtifactSettings, Artifacts, ImageRecord};
use crate::authority::Authority;
use crate::authority::folder::AuthorityFolder;
use crate::crd::SeedMode;
use crate::event::{
    Action, Audience as _, Event, ImageKey, ImageView, Name, Phase, ReadyIndex, ResolvedLayer, UnixMillis,
};
use crate::page::{Board, Page};
use crate::signing::{KeySet, Keys};

/// Nothing here takes longer, also on a machine that compiles.
const PATIENCE: Duration = Duration::from_secs(30);

/// Believes `good:NODE`, and says of other words what is wrong with them.
#[derive(Debug)]
struct Words;

impl Reviewer for Words {
    fn review<'a>(&'a self, token: &'a str, node: &'a str) -> BoxFuture<'a, Result<(), ReviewError>> {
        let refused = |why| Err(ReviewError::refused(why, "refused"));
        Box::pin(async move {
            match token.split_once(':') {
                Some(("good", name)) if name == node => Ok(()),
                Some(("good", _)) => refused(Refusal::OtherNode),
                Some(("audience", _)) => refused(Refusal::OtherAudience),
                Some(("expired", _)) => refused(Refusal::Expired),
                Some(("away", _)) => Err(ReviewError::Unavailable { reason: "away".to_owned() }),
                _ => refused(Refusal::UnknownToken),
            }
        })
    }
}

impl Viewers for Words {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<(), ReviewError>> {
        Reviewer::review(self, token, "page")
    }
}

/// A controller's API with everything it needs.
struct Stage {
    api: Option<Api>,
    hub: Arc<Hub>,
    custody: Arc<Custody>,
    artifacts: Artifacts,
    keys: Keys,
    events: mpsc::Receiver<Event>,
    numbers: Arc<Numbers>,
    limits: ApiLimits,
    folder: TempDir,
}

impl Stage {
    async fn new() -> Self {
        Self::with(ApiLimits::default()).await
    }

    async fn with(limits: ApiLimits) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let keys = Keys::new(KeySet::new(UnixMillis(0)));
        let place = folder.path().join("artifacts").display().to_string();
        let opened = Artifacts::open(&place, ArtifactSettings::default(), keys.clone(), UnixMillis(0)).await;
        let (artifacts, _) = opened.expect("opened");
        let kept = AuthorityFolder::new(folder.path().join("authority"));
        let authority = kept.load_or_create(&"prod".parse().expect("a cluster"), unix_now()).expect("made");
        let custody = Arc::new(Custody::in_folder(authority, kept));
        let hub = Arc::new(Hub::new(keys.clone()));
        let (_, events) = mpsc::channel(1);
        let numbers = Arc::new(Numbers::default());
        let mut stage = Self { api: None, hub, custody, artifacts, keys, events, numbers, limits, folder };
        stage.start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await;
        stage
    }

    async fn start(&mut self, listen: SocketAddr) {
        let (events, heard) = mpsc::channel(64);
        let board = Arc::new(Board::new(UnixMillis(0)));
        let page = Page::new("prod", board, Arc::new(Words), Arc::clone(&self.numbers));
        let parts = ApiParts {
            listen,
            custody: Arc::clone(&self.custody),
            reviewer: Arc::new(Words),
            hub: Arc::clone(&self.hub),
            artifacts: self.artifacts.clone(),
            events,
            numbers: Arc::clone(&self.numbers),
            limits: self.limits.clone(),
            page: Some(Arc::new(page)),
        };
        self.events = heard;
        self.api = Some(Api::start(parts).await.expect("started"));
    }

    fn address(&self) -> SocketAddr {
        self.api.as_ref().expect("it runs").address()
    }

    /// Ends the API and starts another one at the same place, which knows the same images as the first knew.
    async fn restart(&mut self) {
        let address = self.address();
        self.api.take().expect("it runs").stop().await;
        let hub = Arc::new(Hub::new(self.keys.clone()));
        self.hub = hub;
        self.start(address).await;
    }

    /// Keeps an index of two layers and tells of it.
    async fn ready(&self, number: u8, access: Access) -> Arc<ImageView> {
        let view = Arc::new(self.index(number, access).await);
        self.hub.hear(&Action::Publish(Arc::clone(&view)));
        view
    }

    async fn index(&self, number: u8, access: Access) -> ImageView {
        let layers = [layer(number, 1), layer(number, 2)];
        let image = ImageKey { manifest: Digest([number; 32]) };
        let name = Name { reference: format!("registry.test/app:{number}"), platform: "linux/amd64".to_owned() };
        let resolved = layers.iter().map(|(it, _)| ResolvedLayer {
            layer: it.layer,
            diff_id: it.diff_id,
            len_bytes: it.blob_len_bytes,
        });
        let record = ImageRecord {
            image: image.clone(),
            name: name.clone(),
            layers: resolved.collect(),
            access,
            begun: UnixMillis(0),
        };
        self.artifacts.begin(record).await.expect("begun");
        let mut statements = Vec::new();
        for (statement, artifacts) in layers {
            self.artifacts.put_layer(&statement, artifacts).await.expect("kept");
            statements.push(statement);
        }
        let statement = Statement::new(image.manifest, name.platform.clone(), statements);
        let index = self.artifacts.finish(&statement).await.expect("finished");
        view_of(image, name, access, index)
    }
}

fn view_of(image: ImageKey, name: Name, access: Access, index: ReadyIndex) -> ImageView {
    ImageView {
        image,
        names: BTreeSet::from([name]),
        policies: BTreeSet::new(),
        phase: Phase::Ready,
        failure: None,
        attempts: 1,
        next_attempt: None,
        image_len_bytes: index.image_len_bytes,
        read_bytes: 0,
        since: UnixMillis(0),
        index: Some(index),
        access,
        profile: Some(Arc::from(b"profile".as_slice())),
        seeds: BTreeMap::new(),
    }
}

/// A made-up layer of an image with artifacts that no other has; the first is longer than two parts.
fn layer(image: u8, number: u8) -> (LayerStatement, [Artifact; 4]) {
    let artifact = |part: u8, len: u32| {
        let noise = (0..len).flat_map(|at| {
            let hash = blake3::hash(&[&[image, number, part], at.to_le_bytes().as_slice()].concat());
            hash.as_bytes().to_vec()
        });
        let (id, bytes) = Verified::named(Bytes::from(noise.collect::<Vec<_>>()));
        Artifact { id, bytes }
    };
    let artifacts = [artifact(1, 10_000), artifact(2, 10), artifact(3, 10), artifact(4, 10)];
    let statement = LayerStatement {
        layer: LayerId([image ^ number << 4; 32]),
        diff_id: DiffId([image ^ number << 4 ^ 0xff; 32]),
        blob_len_bytes: 100,
        logical_len_bytes: 1024,
        toc: artifacts[0].id,
        chunks: artifacts[1].id,
        seek: artifacts[2].id,
        windows: artifacts[3].id,
    };
    (statement, artifacts)
}

/// A node, by its key.
struct TestNode {
    name: String,
    peer: PeerId,
    key: Vec<u8>,
    certificate: Option<Vec<u8>>,
}

impl TestNode {
    fn new(name: &str, folder: &Path) -> Self {
        let key = hermes_p2p::identity::load_or_create(&folder.join(format!("{name}.key"))).expect("a key");
        let peer = key.public().to_peer_id();
        let key = hermes_p2p::identity::pkcs8(&key).expect("an Ed25519 key");
        Self { name: name.to_owned(), peer, key, certificate: None }
    }

    fn request(&self, token: &str) -> v1::JoinRequest {
        v1::JoinRequest {
            versions: Some(v1::Versions { min: 1, max: 1 }),
            cluster: "prod".to_owned(),
            node: self.name.clone(),
            peer: self.peer.to_bytes().into(),
            zone: "a".to_owned(),
            token: token.to_owned(),
            addresses: vec!["/ip4/10.0.0.1/tcp/4100".to_owned()],
        }
    }

    /// A node that has joined, and its channel.
    async fn joined(name: &str, stage: &Stage) -> (Self, ControllerClient<Channel>) {
        let mut node = Self::new(name, stage.folder.path());
        let mut anonymous = node.connect(stage.address(), &stage.custody.current()).await.expect("connected");
        let answer = anonymous.join(node.request(&format!("good:{name}"))).await.expect("joined").into_inner();
        node.certificate = Some(answer.certificate.to_vec());
        let client = node.connect(stage.address(), &stage.custody.current()).await.expect("connected");
        (node, client)
    }

    async fn connect(
        &self,
        address: SocketAddr,
        authority: &Authority,
    ) -> Result<ControllerClient<Channel>, tonic::transport::Error> {
        let mut tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(authority.roots_pem()))
            .domain_name(SERVER_NAME);
        if let Some(certificate) = &self.certificate {
            let pem = hermes_controller_api::pem;
            tls = tls.identity(Identity::from_pem(pem("CERTIFICATE", certificate), pem("PRIVATE KEY", &self.key)));
        }
        let endpoint = Endpoint::from_shared(format!("https://{address}")).expect("an address").tls_config(tls)?;
        let channel = endpoint.connect_timeout(PATIENCE).connect().await?;
        Ok(ControllerClient::new(channel))
    }
}

async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("{what} takes too long"))
}

fn is(status: &Status, code: Code) {
    assert_eq!(status.code(), code, "{status:?}");
}
