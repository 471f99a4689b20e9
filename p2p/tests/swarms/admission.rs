//! Who is let in, who is not, and what both sides hear about it.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hermes_image::ids::DiffId;
use hermes_p2p::admission::certificate::{Certificate, SignedCertificate, Trust};
use hermes_p2p::admission::grants::{GrantError, SignedGrant};
use hermes_p2p::admission::issuer::{CertificateRequest, IssueError, Issuer};
use hermes_p2p::admission::join_secret::JoinSecret;
use hermes_p2p::admission::revocation::{Revocation, SignedRevocation};
use hermes_p2p::{Asking, ClusterId, Content, Node, NodeConfig, NodeError, OpenDesk, PeerId, Refusal, unix_now};

use crate::common::{Layer, Look, Made, RawPeer, TestNode, collect, deadline, start, wait_for};

/// The issuer of a cluster whose nodes have the same `secret`.
pub(crate) fn issuer(cluster: &str, secret: char) -> Arc<JoinSecret> {
    issuer_for(cluster, secret, Duration::from_secs(3600))
}

fn issuer_for(cluster: &str, secret: char, life: Duration) -> Arc<JoinSecret> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = secret_file(folder.path(), secret);
    let cluster = cluster.parse().expect("a cluster id");
    Arc::new(JoinSecret::load(&path, &cluster).expect("loads").with_life(life))
}

fn secret_file(folder: &Path, secret: char) -> std::path::PathBuf {
    let path = folder.join("secret");
    std::fs::write(&path, secret.to_string().repeat(40)).expect("writes");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("protects");
    path
}

/// Shows a certificate that it was given, whoever asks, and believes the cluster's real key.
#[derive(Debug)]
struct Forger {
    shows: SignedCertificate,
    real: Arc<JoinSecret>,
}

impl Issuer for Forger {
    fn issue(&self, _: &CertificateRequest) -> Result<SignedCertificate, IssueError> {
        Ok(self.shows.clone())
    }

    fn trust(&self) -> Trust {
        self.real.trust()
    }

    fn revoke(&self, _: Revocation) -> Result<SignedRevocation, IssueError> {
        Err(IssueError::NotHere { what: "take certificates back" })
    }

    fn grant(&self, _: &ClusterId, _: PeerId, _: DiffId, _: u64, _: Duration) -> Result<SignedGrant, IssueError> {
        Err(IssueError::NotHere { what: "grant layers" })
    }
}

/// A node that shows what `shows` makes of what the real issuer would give it.
async fn forging(real: &Arc<JoinSecret>, shows: impl FnOnce(Certificate) -> SignedCertificate) -> TestNode {
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = crate::common::config(&folder);
    // The key is made by a first start, so that its name is known.
    let first = Node::start(config.clone(), Arc::new(Made::default()), Arc::new(OpenDesk)).await.expect("starts");
    let peer = first.local_peer_id();
    first.shutdown().await;
    let now = unix_now();
    let cluster = config.cluster.clone();
    let honest =
        Certificate { cluster, peer, zone: config.zone.clone(), epoch: 0, not_before: now, not_after: now + 3600 };
    config.issuer = Some(Arc::new(Forger { shows: shows(honest), real: Arc::clone(real) }));
    let made = Arc::new(Made::default());
    let node = Node::start(config, Arc::clone(&made) as Arc<dyn Content>, Arc::new(OpenDesk)).await.expect("starts");
    TestNode { node, made, folder }
}

fn issued(real: &JoinSecret, certificate: &Certificate) -> SignedCertificate {
    let request = CertificateRequest {
        cluster: certificate.cluster.clone(),
        peer: certificate.peer,
        zone: certificate.zone.clone(),
        epoch_min: certificate.epoch,
        now: certificate.not_before,
    };
    real.issue(&request).expect("issues")
}

fn count(node: &TestNode, refusal: Refusal) -> u64 {
    let counts = node.node.admission().refusals();
    counts.into_iter().find(|(reason, _)| *reason == refusal).expect("all reasons are counted").1
}

/// Everything that an error and its causes say.
fn all_of(error: &NodeError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    format!("{text} {error:?}")
}

async fn member(issuer: &Arc<JoinSecret>) -> TestNode {
    let issuer = Arc::clone(issuer);
    start(move |config| config.issuer = Some(issuer)).await
}

/// `stranger` dials `node` in vain, is told `why`, and reaches nothing.
async fn is_refused(stranger: &TestNode, node: &TestNode, refusal: Refusal, why: &str) {
    let before = count(node, refusal);
    let error = stranger.node.connect(node.address()).await.expect_err("is refused");
    assert!(all_of(&error).contains(why), "it is told: {}", all_of(&error));
    assert_eq!(count(node, refusal), before + 1, "{refusal:?}");
    assert!(node.node.peers().is_empty() && stranger.node.peers().is_empty());
    assert_eq!(node.node.members().borrow().count(), 1, "a stranger became a member");
    // Nor does the node let itself be drawn into talking with a stranger.
    assert!(node.node.connect(stranger.address()).await.is_err());
    assert_eq!(count(node, refusal), before + 2, "{refusal:?}");
}

#[tokio::test]
async fn members_of_one_secret_talk_and_know_each_other() {
    let issuer = issuer("test", 's');
    let (one, two) = (member(&issuer).await, member(&issuer).await);
    let layer = Layer::new(1, 4, 4096, Look::Text);
    two.made.add(&layer, layer.all());
    one.meet(&two).await;
    let fetch =
        one.node.fetch(two.peer(), &layer.table, Asking::here(layer.all(), hermes_p2p::Class::Demand), deadline());
    assert_eq!(collect(fetch, &layer).await.chunks.len(), 4);
    for (node, other) in [(&one, &two), (&two, &one)] {
        let known = node.node.members();
        wait_for("the other", async || {
            let list = known.borrow().clone();
            list.get(&other.peer()).map(|member| assert!(member.certificate_until > Some(unix_now())))
        })
        .await;
    }
    assert_eq!(one.node.members().borrow().epoch(), two.node.members().borrow().epoch());
    assert!(one.node.admission().refusals().iter().all(|(_, count)| *count == 0));
}

#[tokio::test]
async fn a_stranger_without_a_certificate_is_refused() {
    let node = member(&issuer("test", 's')).await;
    let stranger = start(|_| {}).await;
    is_refused(&stranger, &node, Refusal::NoCertificate, "start it with --join-secret").await;
}

#[tokio::test]
async fn a_stranger_reaches_no_protocol() {
    let node = member(&issuer("test", 's')).await;
    let raw = RawPeer::start(None).await;
    let mut control = raw.control.clone();
    assert!(node.node.connect(raw.address.clone()).await.is_err());
    assert!(control.open_stream(node.peer(), crate::common::exchange_protocol()).await.is_err());
    assert_eq!(count(&node, Refusal::NoCertificate), 1);
}

#[tokio::test]
async fn another_secret_is_refused_by_both() {
    let (ours, theirs) = (member(&issuer("test", 's')).await, member(&issuer("test", 't')).await);
    let error = theirs.node.connect(ours.address()).await.expect_err("refused");
    assert!(all_of(&error).contains("give both nodes the same --join-secret"), "{}", all_of(&error));
    wait_for("both to refuse", async || {
        (count(&ours, Refusal::UnknownIssuer) == 1 && count(&theirs, Refusal::UnknownIssuer) == 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn an_expired_certificate_is_refused() {
    let issuer = issuer("test", 's');
    let node = member(&issuer).await;
    let old = |mut honest: Certificate| {
        honest.not_before = unix_now() - 2 * 3600;
        issued(&issuer, &honest)
    };
    let stranger = forging(&issuer, old).await;
    is_refused(&stranger, &node, Refusal::Expired, "has ended").await;
}

#[tokio::test]
async fn a_certificate_of_another_cluster_is_refused() {
    let issuer = issuer("test", 's');
    let node = member(&issuer).await;
    let other = |mut honest: Certificate| {
        honest.cluster = "other".parse().expect("a cluster id");
        issued(&issuer, &honest)
    };
    let stranger = forging(&issuer, other).await;
    is_refused(&stranger, &node, Refusal::OtherCluster, "for another cluster").await;
}

#[tokio::test]
async fn a_replayed_certificate_is_refused() {
    let issuer = issuer("test", 's');
    let node = member(&issuer).await;
    let victim = member(&issuer).await;
    let replayed = |mut honest: Certificate| {
        honest.peer = victim.peer();
        issued(&issuer, &honest)
    };
    let stranger = forging(&issuer, replayed).await;
    is_refused(&stranger, &node, Refusal::OtherPeer, "for another peer").await;
}

#[tokio::test]
async fn a_revoked_node_is_cut_off_everywhere_and_stays_out_over_a_restart() {
    let issuer = issuer("test", 's');
    let meeting_point = member(&issuer).await;
    let seeds = vec![hermes_p2p::PeerAddress::Fixed(meeting_point.address())];
    let joins = |config: &mut NodeConfig| {
        config.issuer = Some(Arc::clone(&issuer) as Arc<dyn Issuer>);
        config.peers = seeds.clone();
        config.members.state_path = Some(config.identity_path.with_file_name("members"));
    };
    let (thief, other) = (start(joins).await, start(joins).await);
    let sees = |node: &TestNode, peer: PeerId| node.node.members().borrow().get(&peer).is_some();
    wait_for("everybody", async || {
        (sees(&other, thief.peer()) && sees(&thief, other.peer()) && sees(&meeting_point, thief.peer())).then_some(())
    })
    .await;
    // The notice is made on one node and reaches the others.
    meeting_point.node.revoke(thief.peer()).await.expect("revokes");
    wait_for("the end of the thief", async || {
        let gone = |node: &TestNode| !sees(node, thief.peer()) && !node.node.peers().contains(&thief.peer());
        (gone(&other) && gone(&meeting_point)).then_some(())
    })
    .await;
    let error = thief.node.connect(other.address()).await.expect_err("refused");
    assert!(all_of(&error).contains("taken back"), "{}", all_of(&error));

    // A node that starts again alone still knows.
    other.node.shutdown().await;
    let mut again = crate::common::config(&other.folder);
    joins(&mut again);
    again.peers.clear();
    let again = Node::start(again, Arc::new(Made::default()), Arc::new(OpenDesk)).await.expect("starts");
    let address = again.listen_addresses()[0].clone();
    assert!(all_of(&thief.node.connect(address).await.expect_err("refused")).contains("taken back"));
}

#[tokio::test]
async fn a_certificate_is_renewed_over_the_connection() {
    let issuer = issuer_for("test", 's', Duration::from_secs(4));
    let (one, two) = (member(&issuer).await, member(&issuer).await);
    one.meet(&two).await;
    let first = one.node.admission().admitted_until(&two.peer()).expect("was let in");
    wait_for("a renewed certificate", async || {
        one.node.admission().admitted_until(&two.peer()).filter(|until| *until > first)
    })
    .await;
    assert_eq!(one.node.peers(), [two.peer()], "the connection was closed meanwhile");
}

#[tokio::test]
async fn a_connection_ends_with_a_certificate_that_is_not_renewed() {
    let issuer = issuer("test", 's');
    let node = member(&issuer).await;
    // Ended, and within what clocks may differ for three seconds more.
    let ending = |mut honest: Certificate| {
        honest.not_before = unix_now() - 3600 - 57;
        issued(&issuer, &honest)
    };
    let other = forging(&issuer, ending).await;
    node.meet(&other).await;
    wait_for("the end", async || node.node.peers().is_empty().then_some(())).await;
    wait_for("it to be counted", async || (count(&node, Refusal::Expired) > 0).then_some(())).await;
    wait_for("it to leave the list", async || (node.node.members().borrow().count() == 1).then_some(())).await;
}

#[tokio::test]
async fn a_stranger_that_comes_again_and_again_is_logged_once() {
    let (log, _guard) = captured_log();
    let node = member(&issuer("test", 's')).await;
    let stranger = start(|_| {}).await;
    for _ in 0..5 {
        stranger.node.connect(node.address()).await.expect_err("refused");
    }
    assert_eq!(count(&node, Refusal::NoCertificate), 5);
    let text = String::from_utf8(log.lock().clone()).expect("text");
    let lines = text.lines().filter(|line| line.contains("peer is refused") && line.contains("no_certificate"));
    assert_eq!(lines.count(), 1, "{text}");
}

type Log = Arc<parking_lot::Mutex<Vec<u8>>>;

/// What this thread logs from now on.
fn captured_log() -> (Log, tracing::subscriber::DefaultGuard) {
    #[derive(Clone)]
    struct Writer(Log);
    impl std::io::Write for Writer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let log = Log::default();
    let writer = Writer(Arc::clone(&log));
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    (log, tracing::subscriber::set_default(subscriber))
}

#[tokio::test]
async fn a_node_beyond_loopback_needs_a_secret_or_a_word() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = crate::common::config(&folder);
    config.listen = vec!["/ip4/0.0.0.0/tcp/0".parse().expect("a multiaddr")];
    let error = Node::start(config.clone(), Arc::new(Made::default()), Arc::new(OpenDesk)).await.expect_err("refused");
    assert!(all_of(&error).contains("--join-secret"), "{}", all_of(&error));
    config.open = true;
    let open = Node::start(config.clone(), Arc::new(Made::default()), Arc::new(OpenDesk)).await.expect("starts");
    open.shutdown().await;
    config.open = false;
    config.issuer = Some(issuer("test", 's'));
    Node::start(config, Arc::new(Made::default()), Arc::new(OpenDesk)).await.expect("starts").shutdown().await;
}

#[tokio::test]
async fn a_grant_of_the_cluster_is_taken_from_its_peer_alone() {
    let issuer = issuer("test", 's');
    let (one, two) = (member(&issuer).await, member(&issuer).await);
    let (layer, hour) = (DiffId([5; 32]), Duration::from_secs(3600));
    let cluster = "test".parse().expect("a cluster id");
    let granted = issuer.grant(&cluster, two.peer(), layer, unix_now(), hour).expect("grants").encode();
    let grants = one.node.grants();
    assert_eq!(grants.present(&one.peer(), &granted), Err(GrantError::OtherPeer));
    assert!(!grants.allows(&two.peer(), layer));
    grants.present(&two.peer(), &granted).expect("taken");
    assert!(grants.allows(&two.peer(), layer));
    two.node.grants().keep_own(&two.peer(), &granted).expect("its own");
    assert_eq!(two.node.grants().own(layer).as_deref(), Some(&granted[..]));
}
