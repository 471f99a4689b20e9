//! What `hermes status` shows.

use std::path::PathBuf;

use hermes_image::ids::{ChainId, DiffId, Digest};
use hermes_policy::class::ErrorClass;
use serde::{Deserialize, Serialize};

use crate::config::CompleteMode;

/// The three ways to show a tree (design, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// Kernel EROFS over complete layer files; no daemon in the path.
    ErofsFiles,
    /// Kernel EROFS over layer files that FUSE serves.
    ErofsFuse,
    /// The whole tree over FUSE.
    FuseTree,
}

impl Way {
    /// The name on the command line and in the output.
    pub fn name(self) -> &'static str {
        match self {
            Self::ErofsFiles => "erofs-files",
            Self::ErofsFuse => "erofs-fuse",
            Self::FuseTree => "fuse-tree",
        }
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Way {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::ErofsFiles, Self::ErofsFuse, Self::FuseTree].into_iter().find(|way| way.name() == text).ok_or_else(
            || format!("'{text}' is not a way to show a tree; it is one of erofs-files, erofs-fuse, fuse-tree"),
        )
    }
}

/// Whether this node can show a tree in some way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WayStatus {
    /// The way.
    pub way: Way,
    /// Whether a probe of it worked.
    pub available: bool,
    /// Why not, or through what (files or loop devices).
    pub detail: String,
}

/// Bytes of chunks by where they came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BySource {
    /// Copied from another layer on this node.
    pub local_bytes: u64,
    /// From peers.
    pub peer_bytes: u64,
    /// From the registry, decompressed.
    pub registry_bytes: u64,
    /// From the registry, as they came over the link.
    pub registry_wire_bytes: u64,
}

impl BySource {
    /// Adds another count to this one.
    pub fn add(&mut self, other: Self) {
        self.local_bytes += other.local_bytes;
        self.peer_bytes += other.peer_bytes;
        self.registry_bytes += other.registry_bytes;
        self.registry_wire_bytes += other.registry_wire_bytes;
    }
}

/// One mounted image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageStatus {
    /// As the user named it.
    pub reference: String,
    /// What it resolved to.
    pub manifest: Digest,
    /// Name of the merged tree.
    pub chain: ChainId,
    /// Where it is mounted.
    pub dir: String,
    /// How it is shown.
    pub way: Way,
    /// Number of layers.
    pub layers: usize,
    /// The tree's EROFS image, which `fsck.erofs` and `dump.erofs` read.
    pub tree_path: PathBuf,
    /// Its devices: the layer files, lowest first. What is missing of a layer is a hole in its file.
    pub layer_paths: Vec<PathBuf>,
    /// Uncompressed bytes of all layers.
    pub total_bytes: u64,
    /// Of these, here now.
    pub present_bytes: u64,
    /// Where what came since the daemon started came from.
    pub sources: BySource,
    /// Its start, unless an earlier daemon has mounted it or it is shown without the daemon.
    #[serde(default)]
    pub start: Option<StartStatus>,
    /// What becomes of the rest.
    pub completion: CompletionState,
}

/// What becomes of what nobody has read of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum CompletionState {
    /// All of it is here.
    Complete,
    /// It is left where it is, by the node's settings.
    Off,
    /// Somebody has paused it.
    Paused,
    /// Its start has not settled yet, or another image comes first.
    Starting,
    /// It is being fetched.
    Running,
    /// It would take the place of other images' bytes.
    NoRoom {
        /// So many bytes are missing.
        missing_bytes: u64,
    },
    /// It did not come; it is tried again.
    Failed {
        /// Why.
        reason: String,
    },
}

impl CompletionState {
    /// The name in tables and in metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Off => "off",
            Self::Paused => "paused",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::NoRoom { .. } => "no_room",
            Self::Failed { .. } => "failed",
        }
    }

    /// All names.
    pub const NAMES: [&str; 7] = ["complete", "off", "paused", "starting", "running", "no_room", "failed"];
}

/// How images are completed in the background.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompletionStatus {
    /// When.
    pub mode: CompleteMode,
    /// Whether somebody has paused it.
    pub paused: bool,
    /// Most uncompressed bytes per second; 0 for no limit.
    pub rate_bytes_per_second: u64,
    /// Uncompressed bytes that were fetched so since the daemon started.
    pub fetched_bytes: u64,
    /// Images that became complete so since the daemon started.
    pub completed_images: u64,
}

impl ImageStatus {
    /// Percent of the bytes that are here, 0 to 100.
    pub fn percent_present(&self) -> f64 {
        if self.total_bytes == 0 { 100.0 } else { self.present_bytes as f64 * 100.0 / self.total_bytes as f64 }
    }
}

/// One peer that is connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its PeerId.
    pub id: String,
}

/// A peer as `hermes status --peers` shows it: one that is connected, or a member.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PeerDetail {
    /// Its PeerId.
    pub id: String,
    /// Where it says that it is; empty for one that is no member.
    pub addresses: Vec<String>,
    /// Its zone; empty where there are none.
    pub zone: String,
    /// Whether it is in the member list.
    pub member: bool,
    /// It is about to leave.
    pub drain: bool,
    /// It has no room for more.
    pub full: bool,
    /// Somebody could not reach it, and it has not answered to that yet.
    pub suspected: bool,
    /// Whether this node is connected to it.
    pub connected: bool,
    /// Smoothed microseconds until its first byte; a guess until it was asked.
    pub latency_us: u64,
    /// Smoothed microseconds for each MiB after that; a guess until it was asked.
    pub cost_us_per_mib: u64,
    /// Requests for chunks to it that are under way.
    pub asks: u64,
    /// Uncompressed bytes that came from it since the daemon started.
    pub from_bytes: u64,
    /// Bytes of chunks that were sent to it since the daemon started, as they were sent.
    pub to_bytes: u64,
    /// Layers open here of which it is known to have something.
    pub holds_layers: u64,
    /// Milliseconds for which it is still left alone, after a failure or because it is busy.
    pub rests_ms: u64,
    /// Milliseconds for which it is still banned for wrong bytes.
    pub banned_ms: u64,
}

/// A kind of source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceKind {
    /// Another layer on this node.
    Local,
    /// A peer.
    Peer,
    /// A registry.
    Registry,
}

/// Who was asked.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TraceSource {
    /// Which kind it is.
    pub kind: SourceKind,
    /// The PeerId, or the registry's host; empty for the node itself.
    pub name: String,
    /// The zone of a member; empty where there are none.
    pub zone: String,
}

/// Names of a closed list, the same in JSON and for people.
macro_rules! names {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $label:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$variant_doc])* #[serde(rename = $label)] $variant,)*
        }

        impl $name {
            /// All of them, in order.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// Its name.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $label,)*
                }
            }
        }
    };
}

names! {
    /// Why a source was asked.
    AskReason {
        /// Another layer on this node has the same chunks.
        LocalCopy = "local copy",
        /// The peer has said that it has them.
        Holder = "holder",
        /// An owner has named the peer.
        Named = "named by owner",
        /// The peer owns the extent for this node's zone.
        ZoneOwner = "zone owner",
        /// The peer owns the extent for the whole swarm.
        Owner = "owner",
        /// An earlier request takes too long.
        Hedge = "hedge",
        /// Other nodes want them from this one, as the owner.
        ForOthers = "for others",
        /// An owner left them to this node.
        Delegated = "delegated",
        /// This node is among the owners.
        OwnTurn = "own turn",
        /// No owner can be reached.
        NobodyOwns = "nobody owns",
        /// There is no swarm with owners.
        NoSwarm = "no swarm",
    }
}

names! {
    /// What came of asking.
    AskOutcome {
        /// It is not over.
        UnderWay = "under way",
        /// All came that was to come.
        Done = "done",
        /// The source does not have all of it.
        Lacks = "lacks",
        /// The peer named others, and gave nothing itself.
        Referred = "referred",
        /// The peer left it to this node, and gave nothing itself.
        Delegated = "delegated",
        /// The source has too much to do.
        Busy = "busy",
        /// The peer does not own it.
        NotMine = "not mine",
        /// It failed in passing.
        FailedTransient = "failed: transient",
        /// Wrong bytes came.
        FailedPeerFault = "failed: wrong bytes",
        /// The source has never heard of it.
        FailedNotFound = "failed: not found",
        /// The source refuses this node.
        FailedDenied = "failed: denied",
        /// This node's disk or memory failed.
        FailedLocal = "failed: local",
        /// It was stopped: nobody waited any more, another source was quicker, or the source was silent.
        Cancelled = "cancelled",
    }
}

impl AskOutcome {
    /// The failure of a class.
    pub fn of_failure(class: ErrorClass) -> Self {
        match class {
            ErrorClass::Transient => Self::FailedTransient,
            ErrorClass::PeerFault => Self::FailedPeerFault,
            ErrorClass::NotFound => Self::FailedNotFound,
            ErrorClass::Denied => Self::FailedDenied,
            ErrorClass::Local => Self::FailedLocal,
        }
    }
}

/// A request for chunks. Times are microseconds since the first request of the trace was sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedAsk {
    /// The layer, by its place in the trace.
    pub layer: u32,
    /// The source, by its place in the trace.
    pub source: u32,
    /// Whether a process waited; else it was a prefetch.
    pub demand: bool,
    /// Why this source.
    pub reason: AskReason,
    /// How many owners come before the one that was asked, or before this node.
    pub rank: Option<u16>,
    /// How often peers had named others for these chunks, 0 to 3; 3 stands for more, too.
    pub referrals: u8,
    /// When it was sent.
    pub sent_us: u64,
    /// When something came first, if only a word.
    pub first_us: Option<u64>,
    /// When it was over.
    pub ended_us: Option<u64>,
    /// Chunks that were asked for.
    pub chunks: u32,
    /// Uncompressed bytes of these.
    pub asked_bytes: u64,
    /// Uncompressed bytes that came.
    pub bytes: u64,
    /// What came of it.
    pub outcome: AskOutcome,
}

/// Who was asked for the layers of an image since they were opened, when, why, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageTrace {
    /// As the user named it.
    pub image: String,
    /// When the answer was given.
    pub now_us: u64,
    /// The image's layers, lowest first. What other images with the same layers asked for is here, too.
    pub layers: Vec<DiffId>,
    /// Everybody who was asked.
    pub sources: Vec<TraceSource>,
    /// The requests in the order in which they were sent; the latest, where there are too many.
    pub asks: Vec<TracedAsk>,
    /// How many earlier ones are not among them.
    pub left_out: u64,
}

/// Reads that wait for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WaitingReads {
    /// Somebody waits for these.
    pub demand: u64,
    /// Nobody does yet.
    pub prefetch: u64,
}

/// One read that waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingRead {
    /// The image, as the user named it.
    pub image: String,
    /// The file within the image, where it is known.
    pub file: Option<PathBuf>,
    /// The layer, by its diffID.
    pub layer: DiffId,
    /// The first byte that is missing, in the layer's uncompressed tar stream.
    pub offset: u64,
    /// Bytes of the chunks that are missing.
    pub missing_bytes: u64,
    /// Whether a process waits; else it is a prefetch.
    pub demand: bool,
    /// Milliseconds since it began to wait.
    pub waiting_ms: u64,
    /// Who is being asked for this layer now.
    pub asking: Vec<String>,
}

/// What was decided about an image that containerd pulled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullStatus {
    /// Its manifest.
    pub manifest: Digest,
    /// What containerd calls it; empty when it does not say.
    pub reference: String,
    /// `lazy`, or the class of the reason for pulling it as ever (the label of `hermes_lazy_decisions_total`).
    pub decision: String,
    /// Why it is pulled as ever.
    pub reason: Option<String>,
}

/// A pull that this node takes itself because nobody has the image's index.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FirstPullStatus {
    /// The image's manifest.
    pub manifest: Digest,
    /// What containerd calls the image.
    pub reference: String,
    /// Compressed bytes of its layers, each counted once.
    pub total_bytes: u64,
    /// Of these, read and kept, or here before.
    pub done_bytes: u64,
}

/// A member of the swarm.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberStatus {
    /// Its PeerId.
    pub peer: String,
    /// Whether it is this node.
    pub me: bool,
    /// Where it says that it is.
    pub addresses: Vec<String>,
    /// Its zone; empty where there are none.
    pub zone: String,
    /// It is about to leave.
    pub drain: bool,
    /// It has no room for more.
    pub full: bool,
    /// Somebody could not reach it, and it has not answered to that yet.
    pub suspected: bool,
    /// Whether this node is connected to it.
    pub connected: bool,
    /// When its certificate ends, in seconds since 1970; none in an open swarm.
    pub certificate_until: Option<u64>,
}

/// The whole answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Of the daemon.
    pub version: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// Its PeerId, if it talks to peers.
    pub peer_id: Option<String>,
    /// Where peers reach it.
    pub listen: Vec<String>,
    /// What this kernel can do.
    pub ways: Vec<WayStatus>,
    /// Mounted images.
    pub images: Vec<ImageStatus>,
    /// What was decided about images that containerd pulled, the latest last.
    pub pulls: Vec<PullStatus>,
    /// Pulls that this node takes itself now.
    pub first_pulls: Vec<FirstPullStatus>,
    /// Reads that wait now.
    pub waiting: WaitingReads,
    /// Peers that are connected.
    pub peers: Vec<PeerStatus>,
    /// Bytes of chunks at rest.
    pub store_bytes: u64,
    /// The store's budget, if it has one.
    pub store_budget_bytes: Option<u64>,
    /// How images are completed in the background.
    pub completion: CompletionStatus,
    /// Resident memory of the daemon, in bytes.
    pub memory_bytes: u64,
}

/// Whose profile it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProfileOrigin {
    /// Made of this node's own starts.
    Own,
    /// From an index folder, a peer, or imported.
    Given,
    /// Carried over from an earlier version of the image.
    EarlierVersion,
}

impl ProfileOrigin {
    /// For people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Own => "own starts",
            Self::Given => "given by others",
            Self::EarlierVersion => "an earlier version",
        }
    }
}

/// How the start of a mounted image stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartStatus {
    /// Whether its reads are still being recorded.
    pub recording: bool,
    /// Whose profile it is fetched ahead by; `None` when there is none: then a container's start is fetched around what it reads.
    pub profile: Option<ProfileOrigin>,
    /// Whether fetching ahead has ended, and how; `None` while it goes on, or before it begins.
    pub prefetch_ended: Option<String>,
    /// Uncompressed bytes that came ahead.
    pub prefetched_bytes: u64,
    /// Of these, bytes of chunks that were read.
    pub used_bytes: u64,
}

/// A step of a profile, for `hermes profile`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileStep {
    /// The layer.
    pub layer: DiffId,
    /// Its first chunk.
    pub first_chunk: u32,
    /// How many chunks.
    pub chunks: u32,
    /// Their uncompressed bytes.
    pub bytes: u64,
    /// When they are first read, in milliseconds since the first read of the start.
    pub at_ms: u32,
    /// How far the starts differ about that.
    pub spread_ms: u32,
    /// In how many percent of the starts.
    pub weight_percent: u8,
    /// Some of the files that they hold, where these were asked for.
    pub files: Vec<String>,
    /// How many more files they hold.
    pub more_files: usize,
}

/// A recorded start, in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartSummary {
    /// When it had settled, in Unix seconds.
    pub ended_seconds: u64,
    /// From the first read to the last new one, in milliseconds.
    pub length_ms: u32,
    /// Uncompressed bytes of the chunks that it read.
    pub bytes: u64,
    /// Of these, bytes that it waited for.
    pub waited_bytes: u64,
}

/// What was read for the first time at one moment of a start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedTouch {
    /// Milliseconds since the first read.
    pub at_ms: u32,
    /// The layer.
    pub layer: DiffId,
    /// The first chunk.
    pub first_chunk: u32,
    /// Uncompressed bytes.
    pub bytes: u64,
    /// Whether the reader had to wait.
    pub waited: bool,
    /// Where the bytes came from: `here`, `local`, `peer` or `registry`.
    pub source: String,
}

/// What is known of the starts of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileReport {
    /// The image, as it was last asked for.
    pub reference: String,
    /// Its manifest.
    pub manifest: Digest,
    /// Uncompressed bytes of all its layers.
    pub image_bytes: u64,
    /// Whose profile it is; `None` when there is none.
    pub origin: Option<ProfileOrigin>,
    /// How many starts it is made of.
    pub records: u8,
    /// When the newest of them was, in Unix seconds.
    pub newest_seconds: u64,
    /// Its steps, in order.
    pub steps: Vec<ProfileStep>,
    /// The profile as it is written, in hexadecimal digits.
    pub encoded: String,
    /// The starts that this node has recorded, the newest first.
    pub starts: Vec<StartSummary>,
    /// What the newest of them read.
    pub touches: Vec<RecordedTouch>,
}
