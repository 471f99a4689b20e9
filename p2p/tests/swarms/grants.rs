//! Private layers: who shows which grant when, and who is denied.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use hermes_image::ids::{ArtifactId, DiffId, Digest};
use hermes_p2p::admission::grants::Grants;
use hermes_p2p::admission::issuer::Issuer;
use hermes_p2p::admission::join_secret::JoinSecret;
use hermes_p2p::{Asking, Claim, Class, Desk, ErrorClass, ExchangeError, PeerId, Ruling, unix_now};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::admission::issuer;
use crate::common::{Layer, Look, PATIENCE, TestNode, collect, deadline, start_with, wait_for};

const HOUR: Duration = Duration::from_secs(3600);

/// Lets in everybody to public layers, and to the private ones whoever holds a grant. Index and statement are those of the
/// first private layer.
#[derive(Default)]
struct PrivateDesk {
    private: Mutex<HashSet<DiffId>>,
    grants: OnceLock<Arc<Grants>>,
    presented: AtomicUsize,
}

impl PrivateDesk {
    fn allows_first(&self, peer: PeerId) -> bool {
        let first = self.private.lock().iter().min().copied();
        first.is_none_or(|layer| self.allows(peer, layer))
    }

    fn presented(&self) -> usize {
        self.presented.load(Ordering::SeqCst)
    }
}

impl Desk for PrivateDesk {
    fn claim(&self, _: Claim) -> mpsc::Receiver<Ruling> {
        mpsc::channel(1).1
    }

    fn allows(&self, peer: PeerId, layer: DiffId) -> bool {
        let holds = || self.grants.get().is_some_and(|grants| grants.allows(&peer, layer));
        !self.private.lock().contains(&layer) || holds()
    }

    fn allows_artifact(&self, peer: PeerId, _: ArtifactId) -> bool {
        self.allows_first(peer)
    }

    fn allows_statement(&self, peer: PeerId, _: Digest) -> bool {
        self.allows_first(peer)
    }

    fn grant(&self, peer: PeerId, grant: &[u8]) -> bool {
        self.presented.fetch_add(1, Ordering::SeqCst);
        self.grants.get().is_some_and(|grants| grants.present(&peer, grant).is_ok())
    }
}

struct Swarm {
    issuer: Arc<JoinSecret>,
    holder: TestNode,
    desk: Arc<PrivateDesk>,
    private: Layer,
    public: Layer,
}

async fn node(issuer: &Arc<JoinSecret>, desk: Arc<dyn Desk>) -> TestNode {
    let issuer = Arc::clone(issuer);
    start_with(desk, move |config| config.issuer = Some(issuer)).await
}

impl Swarm {
    async fn start() -> Self {
        let issuer = issuer("test", 's');
        let desk = Arc::<PrivateDesk>::default();
        let holder = node(&issuer, Arc::clone(&desk) as Arc<dyn Desk>).await;
        let _ = desk.grants.set(Arc::clone(holder.node.grants()));
        let (private, public) = (Layer::new(1, 8, 4096, Look::Text), Layer::new(2, 8, 4096, Look::Text));
        for layer in [&private, &public] {
            holder.made.add(layer, layer.all());
        }
        desk.private.lock().insert(private.table.diff_id());
        Self { issuer, holder, desk, private, public }
    }

    async fn asker(&self) -> TestNode {
        let asker = node(&self.issuer, Arc::new(hermes_p2p::OpenDesk)).await;
        asker.meet(&self.holder).await;
        asker
    }

    async fn have(&self, asker: &TestNode, layer: &Layer) -> Result<(), ExchangeError> {
        asker.node.have(self.holder.peer(), &layer.table, deadline()).await.map(drop)
    }

    /// Whether it is denied to `asker` in every way in which a layer is asked for.
    async fn denies_all(&self, asker: &TestNode) {
        let (peer, table) = (self.holder.peer(), &self.private.table);
        let denied = |error: ExchangeError| assert_eq!((error.class(), error.kind()), (ErrorClass::Denied, "denied"));
        denied(self.have(asker, &self.private).await.expect_err("is private"));
        let asking = Asking::here(self.private.all(), Class::Demand);
        let got = collect(asker.node.fetch(peer, table, asking, deadline()), &self.private).await;
        denied(got.error.expect("is private"));
        let mut watch = asker.node.watch(peer, table);
        denied(timeout(PATIENCE, watch.next()).await.expect("in time").expect("an end").expect_err("is private"));
    }

    /// A grant of this cluster for `peer` that ends so many seconds from now, or before.
    fn granted(&self, peer: PeerId, layer: &Layer, ends_in: i64) -> Bytes {
        let cluster = "test".parse().expect("a cluster id");
        let from = unix_now().saturating_add_signed(ends_in) - HOUR.as_secs();
        let granted = self.issuer.grant(&cluster, peer, layer.table.diff_id(), from, HOUR).expect("grants");
        granted.encode().into()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_is_shown_once_when_something_is_denied_and_never_for_public_layers() {
    let swarm = Swarm::start().await;
    let (asker, stranger) = (swarm.asker().await, swarm.asker().await);
    let (peer, all) = (swarm.holder.peer(), vec![swarm.private.table.diff_id(), swarm.public.table.diff_id()]);
    asker.node.grant_own(all, HOUR).await.expect("granted");
    let fetch = async |layer: &Layer| {
        let asking = Asking::here(layer.all(), Class::Demand);
        let got = collect(asker.node.fetch(peer, &layer.table, asking, deadline()), layer).await;
        assert!(got.error.is_none() && got.chunks.len() == 8, "{got:?}");
    };
    swarm.have(&asker, &swarm.public).await.expect("is public");
    fetch(&swarm.public).await;
    assert_eq!(swarm.desk.presented(), 0, "a grant was shown for a public layer");

    fetch(&swarm.private).await;
    swarm.have(&asker, &swarm.private).await.expect("is granted");
    fetch(&swarm.private).await;
    let mut watch = asker.node.watch(peer, &swarm.private.table);
    timeout(PATIENCE, watch.next()).await.expect("in time").expect("news").expect("is granted");
    assert_eq!(swarm.desk.presented(), 1, "the grant was not shown exactly once");
    swarm.denies_all(&stranger).await;
    assert_eq!(swarm.desk.presented(), 1, "the stranger has something to show");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn index_and_statement_are_denied_and_had_after_showing_grants() {
    let swarm = Swarm::start().await;
    let (asker, stranger) = (swarm.asker().await, swarm.asker().await);
    let (peer, layer) = (swarm.holder.peer(), swarm.private.table.diff_id());
    let id = swarm.holder.made.add_artifact(Bytes::from_static(b"names of files"));
    let manifest = Digest([3; 32]);
    swarm.holder.made.add_statement(manifest, Bytes::from_static(b"a statement"));
    asker.node.grant_own(vec![layer], HOUR).await.expect("granted");
    for node in [&asker, &stranger] {
        let denied = |error: ExchangeError| assert_eq!(error.kind(), "denied");
        denied(node.node.artifact(peer, id, None, deadline()).await.expect_err("is private"));
        denied(node.node.artifact_range(peer, id, 0..5, deadline()).await.expect_err("is private"));
        denied(node.node.statement(peer, manifest, deadline()).await.expect_err("is private"));
        // What is not there is only that, so nobody is asked for a proof in vain.
        let missing = node.node.artifact(peer, ArtifactId([9; 32]), None, deadline()).await.expect_err("is not there");
        assert_eq!(missing.kind(), "not_found");
    }
    assert!(!stranger.node.show_grants(peer, &[layer], deadline()).await.expect("nothing to show"));
    for _ in 0..2 {
        assert!(asker.node.show_grants(peer, &[layer], deadline()).await.expect("shown"));
    }
    assert_eq!(swarm.desk.presented(), 1);
    asker.node.artifact(peer, id, None, deadline()).await.expect("is granted");
    asker.node.statement(peer, manifest, deadline()).await.expect("is granted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_of_somebody_else_or_for_another_layer_or_that_has_ended_opens_nothing() {
    let swarm = Swarm::start().await;
    let (asker, thief) = (swarm.asker().await, swarm.asker().await);
    let peer = swarm.holder.peer();
    let show = |node: &TestNode, grant: Bytes| {
        let node = node.node.clone();
        async move { node.present_grant(peer, grant, deadline()).await.expect("is judged") }
    };
    let good = swarm.granted(asker.peer(), &swarm.private, 60);
    assert!(show(&asker, good.clone()).await);
    assert!(!show(&thief, good).await, "a grant was replayed by another peer");
    assert!(show(&thief, swarm.granted(thief.peer(), &swarm.public, 60)).await);
    assert!(!show(&thief, swarm.granted(thief.peer(), &swarm.private, -61)).await, "a grant was good after its end");
    swarm.denies_all(&thief).await;
    swarm.have(&asker, &swarm.private).await.expect("is granted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_granted_ends_with_the_grant_also_for_a_watch() {
    let swarm = Swarm::start().await;
    let asker = swarm.asker().await;
    let peer = swarm.holder.peer();
    swarm.holder.made.add(&swarm.private, hermes_image::runs::Runs::one(0..4));
    // Clocks may differ by a minute, of which some seconds are left.
    let ending = swarm.granted(asker.peer(), &swarm.private, -56);
    assert!(asker.node.present_grant(peer, ending, deadline()).await.expect("is judged"));
    let mut watch = asker.node.watch(peer, &swarm.private.table);
    timeout(PATIENCE, watch.next()).await.expect("in time").expect("news").expect("is granted");
    let ended = async || swarm.have(&asker, &swarm.private).await.err();
    assert_eq!(wait_for("the end of the grant", ended).await.kind(), "denied");
    swarm.holder.made.add(&swarm.private, swarm.private.all());
    swarm.holder.node.grown(swarm.private.table.diff_id());
    let next = timeout(PATIENCE, watch.next()).await.expect("in time");
    assert!(!matches!(next, Some(Ok(_))), "news of a private layer after the end of the grant: {next:?}");
    // A new one is shown by itself.
    asker.node.grant_own(vec![swarm.private.table.diff_id()], HOUR).await.expect("granted");
    swarm.have(&asker, &swarm.private).await.expect("is granted again");
}
