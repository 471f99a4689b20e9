//! The contract: what the core hears, and what it asks for.
//!
//! Events are facts, actions are requests; neither holds a secret, a handle or a clock. Whoever carries out an action
//! answers with an event, if the action says so, and never decides anything. All of it is plain data, so that a recorded
//! list of events gives the same actions again.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use hermes_image::access::Access;
use hermes_image::ids::{ArtifactId, DiffId, Digest, LayerId};

use crate::crd::{HermesPolicySpec, HermesPolicyStatus, SeedMode};

/// A moment, in milliseconds since 1970. The core is told what time it is and never looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct UnixMillis(pub u64);

/// A Secret with logins, by its place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SecretRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// A policy as somebody wrote it. Nothing of it is checked yet.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Its name, of which there is one in a cluster.
    pub name: String,
    /// The version of its spec.
    pub generation: i64,
    /// What it says.
    pub spec: HermesPolicySpec,
}

/// What can name images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkloadKind {
    /// A pod.
    Pod,
    /// The pod template of a Deployment.
    Deployment,
    /// The pod template of a StatefulSet.
    StatefulSet,
    /// The pod template of a DaemonSet.
    DaemonSet,
    /// The pod template of a Job.
    Job,
    /// The pod template of a CronJob.
    CronJob,
}

/// The place of something that names images.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkloadId {
    /// What it is.
    pub kind: WorkloadKind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// Something that names images: a pod, or a template of pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    /// Its place.
    pub id: WorkloadId,
    /// The images of all its containers (init, normal, ephemeral), as they are written.
    pub images: BTreeSet<String>,
    /// Its pull secrets; when it names none, those of its service account, as Kubernetes does it.
    pub pull_secrets: Vec<SecretRef>,
    /// Whether pods wait for these images now: a pod that is pending, on a node or not.
    pub waiting: bool,
}

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterNode {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// `topology.kubernetes.io/zone`; empty when it has none.
    pub zone: String,
    /// Whether pods can be scheduled to it: ready, and neither cordoned nor about to go.
    pub schedulable: bool,
}

/// An image for one platform, by the digest of its manifest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageKey {
    /// The digest of the platform's manifest.
    pub manifest: Digest,
}

/// A name to resolve: a reference in full, for one platform.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name {
    /// Such as `docker.io/library/redis:7`.
    pub reference: String,
    /// Such as `linux/amd64`.
    pub platform: String,
}

/// What is worth doing about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureClass {
    /// Trying again.
    Transient,
    /// Other credentials.
    Denied,
    /// Another name: the image, or its platform, is not there.
    NotFound,
    /// Nothing: the image is of a kind, or breaks rules, that no further attempt changes.
    Unfit,
    /// Looking at this controller: its disk, its keys.
    Local,
}

/// Why something could not be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What trying again is worth.
    pub class: FailureClass,
    /// One word in CamelCase for conditions and Events, such as `ImageNotFound`.
    pub reason: &'static str,
    /// One line that names the thing and the next step.
    pub message: String,
    /// What the registry asked to wait.
    pub retry_after: Option<Duration>,
}

/// One layer of an image that was resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResolvedLayer {
    /// The compressed blob.
    pub layer: LayerId,
    /// Its content.
    pub diff_id: DiffId,
    /// Compressed bytes.
    pub len_bytes: u64,
}

/// What a name stands for now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    /// The image.
    pub image: ImageKey,
    /// Its layers, lowest first.
    pub layers: Arc<[ResolvedLayer]>,
    /// To whom its registry gives it.
    pub access: Access,
}

/// An index that is kept and signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadyIndex {
    /// The signed statement.
    pub statement: Arc<[u8]>,
    /// Its artifacts.
    pub artifacts: Arc<[ArtifactId]>,
    /// Bytes of all artifacts as they are kept.
    pub index_len_bytes: u64,
    /// Compressed bytes of the layers.
    pub image_len_bytes: u64,
}

/// Bytes of layers that went through a node since its daemon started, uncompressed unless said otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Names the run of the daemon: in another one all counts began at zero again.
    pub run: u64,
    /// Given to containers at once, because they were here.
    pub read_at_once: u64,
    /// Given to containers after something had to come.
    pub read_after_waiting: u64,
    /// From peers.
    pub from_peers: u64,
    /// From registries.
    pub from_registries: u64,
    /// Copied from other layers of the same node.
    pub from_other_layers: u64,
    /// Of the three before: what came ahead of any reader.
    pub ahead: u64,
    /// As registries sent them, compressed.
    pub registry_wire: u64,
}

/// What a node says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NodeReport {
    /// The daemon's version.
    pub version: String,
    /// Its PeerId.
    pub peer: String,
    /// How it can show trees, such as `erofs-files`.
    pub ways: Vec<String>,
    /// Bytes that its store holds.
    pub store_used_bytes: u64,
    /// Bytes that its store may hold; `None` without a limit.
    pub store_budget_bytes: Option<u64>,
    /// Percent present of each image that it shows or keeps, 0 to 100.
    pub images: BTreeMap<Digest, u8>,
    /// Bytes that came from peers, since the daemon's start.
    pub peer_bytes: u64,
    /// Bytes that came from registries, since the daemon's start.
    pub registry_bytes: u64,
    /// All that is counted of bytes; `None` from nodes that count less.
    pub traffic: Option<Traffic>,
}

/// A fact.
#[derive(Debug, Clone)]
pub enum Event {
    /// A policy is there, or has changed.
    Policy(Policy),
    /// A policy is gone.
    PolicyGone(String),
    /// A workload is there, or has changed.
    Workload(Workload),
    /// A workload is gone.
    WorkloadGone(WorkloadId),
    /// A node is there, or has changed.
    Node(ClusterNode),
    /// A node is gone.
    NodeGone(String),
    /// Everything that is there has been said. Nothing is released before.
    Synced,
    /// An index of an earlier run was found in the artifacts, checked; said before anything else.
    Kept {
        /// The image.
        image: ImageKey,
        /// Where it was indexed from.
        name: Name,
        /// The index.
        index: ReadyIndex,
        /// The compressed layers.
        layers: Arc<[ResolvedLayer]>,
        /// To whom its registry gives it.
        access: Access,
        /// What its starts read, if known, in the wire form of profiles.
        profile: Option<Arc<[u8]>>,
    },
    /// The answer to [`Action::Resolve`].
    Resolved {
        /// What was asked.
        name: Name,
        /// What came of it.
        outcome: Result<Resolved, Failure>,
    },
    /// How far a build is.
    Progress {
        /// The image.
        image: ImageKey,
        /// Compressed bytes read.
        read_bytes: u64,
    },
    /// The answer to [`Action::Build`], unless it was cancelled before; also said, unasked, of an index that was signed
    /// again because keys were exchanged.
    Built {
        /// The image.
        image: ImageKey,
        /// What came of it.
        outcome: Result<ReadyIndex, Failure>,
    },
    /// A node has reported.
    Reported {
        /// Its name in the cluster.
        node: String,
        /// What it says.
        report: NodeReport,
    },
    /// A node's stream has ended and not come back.
    NodeSilent(String),
    /// A start of an image was recorded on a node.
    Started {
        /// The image.
        image: ImageKey,
        /// What it read, in the wire form of profiles; checked.
        record: Arc<[u8]>,
    },
    /// The answer to [`Action::CarryProfile`].
    Carried {
        /// The image.
        image: ImageKey,
        /// What its starts will read, in the wire form of profiles; `None` when nothing of the earlier one applies.
        profile: Option<Arc<[u8]>>,
    },
    /// The index of an image that was ready is gone: what is kept of it was found damaged.
    Lost(ImageKey),
    /// Time has passed; the moment of the last [`Action::WakeAt`] has come.
    Woken,
}

/// The object that an [`Action::Tell`] is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// A policy.
    Policy(String),
    /// A `HermesImage`.
    Image(ImageKey),
    /// A pod or a template.
    Workload(WorkloadId),
}

/// How an image is, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Waits for its turn.
    Pending,
    /// Its layers are being read.
    Building,
    /// Indexed, signed, handed out.
    Ready,
    /// Not to be had now; tried again at a time that the view says, or when something changes.
    Failed,
}

/// All that is known of an image, for objects, nodes and the page.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageView {
    /// The image.
    pub image: ImageKey,
    /// Names that stand for it now.
    pub names: BTreeSet<Name>,
    /// The policies that want it.
    pub policies: BTreeSet<String>,
    /// How it is.
    pub phase: Phase,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// Builds that were begun for it.
    pub attempts: u32,
    /// When it is tried again.
    pub next_attempt: Option<UnixMillis>,
    /// Compressed bytes of its layers.
    pub image_len_bytes: u64,
    /// Compressed bytes read by the build that runs.
    pub read_bytes: u64,
    /// When it became what it is.
    pub since: UnixMillis,
    /// Its index, once ready.
    pub index: Option<ReadyIndex>,
    /// To whom its registry gives it.
    pub access: Access,
    /// What its starts read, in the wire form of profiles.
    pub profile: Option<Arc<[u8]>>,
    /// Which nodes are to hold what of it.
    pub seeds: BTreeMap<String, SeedMode>,
}

/// A request.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Find out what a name stands for, with the first of these logins that is accepted. Answered by [`Event::Resolved`].
    Resolve {
        /// What to resolve.
        name: Name,
        /// Where logins are, in the order in which they are tried; none is without a login.
        secrets: Vec<SecretRef>,
    },
    /// Build, keep and sign the index of an image. Answered by [`Event::Built`].
    Build {
        /// The image.
        image: ImageKey,
        /// Where to read it from.
        name: Name,
        /// Where logins are.
        secrets: Vec<SecretRef>,
    },
    /// Nobody wants this build any more; stop it. Not answered.
    Cancel {
        /// The image.
        image: ImageKey,
    },
    /// Give up what is kept of an image; artifacts that no other image uses may go.
    Release {
        /// The image.
        image: ImageKey,
    },
    /// Keep what starts of an image read.
    KeepProfile {
        /// The image.
        image: ImageKey,
        /// In the wire form of profiles.
        profile: Arc<[u8]>,
    },
    /// Say what the profile of an earlier version of an image means for this one, whose index is kept. Answered by
    /// [`Event::Carried`]; the earlier version is kept until then, unless nobody wants either.
    CarryProfile {
        /// The image.
        image: ImageKey,
        /// The earlier version.
        earlier: ImageKey,
        /// The profile of the earlier version, in the wire form of profiles.
        from: Arc<[u8]>,
    },
    /// An image has changed; nodes, objects and the page learn of it.
    Publish(Arc<ImageView>),
    /// An image is wanted no more.
    Withdraw(ImageKey),
    /// A policy's status has changed.
    PolicyStatus {
        /// The policy.
        policy: String,
        /// What is now so.
        status: HermesPolicyStatus,
    },
    /// Tell people, as an Event of the cluster or a line of the log.
    Tell {
        /// Whom it concerns.
        about: Subject,
        /// Whether something is wrong.
        warning: bool,
        /// One word in CamelCase.
        reason: &'static str,
        /// One line.
        message: String,
    },
    /// Say [`Event::Woken`] then; replaces an earlier wish.
    WakeAt(UnixMillis),
}

impl fmt::Display for SecretRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Display for WorkloadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}/{}", self.kind, self.namespace, self.name)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} for {}", self.reference, self.platform)
    }
}

/// Who hears what has become of things: objects, nodes, the page.
pub trait Audience: fmt::Debug + Send + Sync + 'static {
    /// Hears a [`Action::Publish`], [`Action::Withdraw`], [`Action::PolicyStatus`] or [`Action::Tell`]. Never waits: who is slow
    /// keeps the newest word on each thing and drops older ones.
    fn hear(&self, action: &Action);

    /// Learns of a fact that the core has just been told and has drawn its consequences from, for audiences that have to
    /// know what is gone. Never waits either.
    fn learn(&self, _event: &Event) {}
}
