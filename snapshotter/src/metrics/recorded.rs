//! What is recorded where it happens: relaxed atomics, nothing else.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hermes_metrics::{Histogram, Values, labels};
use hermes_policy::class::{Class, ErrorClass};
use hermes_policy::event::{Reason, Ruling};

use super::WAIT_BOUNDS_SECONDS;
use crate::status::Way;

labels! {
    /// Where the chunks that a read waited for came from.
    ArrivedFrom {
        /// Another layer on this node.
        Local = "local",
        /// Peers.
        Peer = "peer",
        /// A registry.
        Registry = "registry",
        /// More than one of these.
        Mixed = "mixed",
    }
}

impl ArrivedFrom {
    /// The values without the mixed one: a byte comes from one place.
    pub const BYTE_SOURCES: [&str; 3] = ["local", "peer", "registry"];
}

labels! {
    /// Why a read ended with EIO.
    ReadFailure {
        /// No source answered in time.
        Deadline = "deadline",
        /// Every source refused for good.
        Refused = "refused",
        /// Too many reads waited.
        Overload = "overload",
        /// The image was unmounted, or the node ended.
        Closed = "closed",
        /// The store could not be read.
        Store = "store",
        /// Chunks were evicted faster than they could be read.
        Thrashing = "thrashing",
        /// The tree's image is damaged.
        Tree = "tree",
    }
}

labels! {
    /// How an image is shown to containerd, and why not lazily.
    Decision {
        /// Lazily.
        Lazy = "lazy",
        /// Plain: nobody has an index.
        NoIndex = "no_index",
        /// Plain: the index is not signed, or by nobody who is trusted.
        Unsigned = "unsigned",
        /// Plain: the index is for another manifest or other layers.
        OtherImage = "other_image",
        /// Plain: the index cannot be read.
        Corrupt = "corrupt",
        /// Plain: there is no index for this platform.
        Platform = "platform",
        /// Plain: the registry refuses the credentials.
        Denied = "denied",
        /// Plain: the registry does not answer.
        Unreachable = "unreachable",
        /// Plain: the registry does not serve ranges.
        NoRanges = "no_ranges",
        /// Plain: the image is smaller than is worth it.
        Small = "small",
        /// Plain: nobody has an index, and the store has no room for all of the image.
        NoRoom = "no_room",
        /// Plain: nobody has an index, and this node takes as many other pulls itself as it may.
        Busy = "busy",
        /// Plain: this kernel can show no tree.
        NoWay = "no_way",
        /// Plain: it was switched off.
        Disabled = "disabled",
        /// Plain: deciding failed or took too long.
        Failed = "failed",
    }
}

labels! {
    /// What came of a pull that the node took itself.
    FirstPullEnd {
        /// Everything is here, and so is the index.
        Done = "done",
        /// It failed; containerd pulls as ever.
        Failed = "failed",
    }
}

labels! {
    /// Why a registry was read. What `for_others`, `delegated` and `own_turn` add up to is read once for the whole swarm.
    Egress {
        /// Other nodes asked this one, as the owner.
        ForOthers = "for_others",
        /// An owner left it to this node.
        Delegated = "delegated",
        /// This node is among the owners.
        OwnTurn = "own_turn",
        /// No owner could be reached.
        NobodyOwns = "nobody_owns",
        /// There is no swarm with owners.
        NoSwarm = "no_swarm",
    }
}

impl Egress {
    /// The label of a reason to ask the registry.
    pub fn of(reason: Reason) -> Self {
        match reason {
            Reason::ForOthers => Self::ForOthers,
            Reason::Delegated => Self::Delegated,
            Reason::OwnTurn { .. } => Self::OwnTurn,
            Reason::NobodyOwns => Self::NobodyOwns,
            // The rest are reasons to ask peers.
            Reason::NoSwarm | Reason::Holder | Reason::Named | Reason::Owner { .. } | Reason::Hedge => Self::NoSwarm,
        }
    }
}

labels! {
    /// Why chunks came that were here already.
    Again {
        /// A second peer was asked because the first took too long.
        Hedge = "hedge",
        /// A later ask for the same chunks did not wait for an earlier one.
        Overtaken = "overtaken",
        /// They lie in the same spans of the registry's blob as others that were missing.
        Overread = "overread",
        /// They were on their way when their ask was cancelled.
        Late = "late",
        /// None of these, such as a write by a first pull at the same time.
        Other = "other",
    }
}

labels! {
    /// How often peers named others for chunks before a peer was asked for them.
    Referrals {
        /// Never.
        None = "0",
        /// Once.
        One = "1",
        /// Twice.
        Two = "2",
        /// More often.
        More = "3_or_more",
    }
}

impl Referrals {
    /// The label of a number.
    pub fn of(referrals: usize) -> Self {
        match referrals {
            0 => Self::None,
            1 => Self::One,
            2 => Self::Two,
            _ => Self::More,
        }
    }
}

labels! {
    /// What was answered to a question of another node.
    RulingGiven {
        /// It is here or on its way.
        Give = "give",
        /// It is not here.
        Lacks = "lacks",
        /// Others have it.
        Refer = "refer",
        /// The asker is to read it.
        Delegate = "delegate",
        /// The registry asked for rest.
        RegistryRests = "registry_rests",
        /// This node does not own it.
        NotMine = "not_mine",
    }
}

impl RulingGiven {
    /// The label of a ruling.
    pub fn of(ruling: &Ruling) -> Self {
        match ruling {
            Ruling::Give(_) => Self::Give,
            Ruling::Lacks(_) => Self::Lacks,
            Ruling::Refer { .. } => Self::Refer,
            Ruling::Delegate(_) => Self::Delegate,
            Ruling::RegistryRests(_) => Self::RegistryRests,
            Ruling::NotMine { .. } => Self::NotMine,
        }
    }
}

labels! {
    /// What became of the record of a start.
    StartRecordEnd {
        /// It is in the store.
        Kept = "kept",
        /// Nothing was read.
        Empty = "empty",
        /// It could not be kept.
        Failed = "failed",
    }
}

labels! {
    /// What became of bytes that a profile asked for.
    PrefetchedBytes {
        /// They came.
        Fetched = "fetched",
        /// They were read before the start was over.
        Used = "used",
        /// They were not.
        Wasted = "wasted",
    }
}

labels! {
    /// Why a peer was denied something private.
    Denial {
        /// It has presented no grant that is good now.
        NoGrant = "no_grant",
        /// It presented something that is no grant.
        GrantMalformed = "grant_malformed",
        /// It presented one of another cluster.
        GrantOtherCluster = "grant_other_cluster",
        /// It presented somebody else's.
        GrantOtherPeer = "grant_other_peer",
        /// It presented one that has ended.
        GrantExpired = "grant_expired",
        /// It presented one that nobody who is believed has signed.
        GrantUnknownIssuer = "grant_unknown_issuer",
        /// This node holds as many grants as it may.
        GrantNoRoom = "grant_no_room",
    }
}

/// Counters with one for each label value.
type Counters<const N: usize> = [AtomicU64; N];

const fn zeros<const N: usize>() -> Counters<N> {
    [const { AtomicU64::new(0) }; N]
}

const SOURCES: usize = ArrivedFrom::NAMES.len();
const BUCKETS: usize = WAIT_BOUNDS_SECONDS.len() + 1;
const CLASSES: usize = 5;
const WAYS: usize = 3;

/// The counters.
#[derive(Debug)]
pub struct Recorded {
    hits: AtomicU64,
    misses: AtomicU64,
    bytes: Counters<SOURCES>,
    /// Of `bytes`: those that nobody waited for yet.
    ahead_bytes: AtomicU64,
    /// Bytes of layers that reads were answered with: at once, and after waiting.
    read_bytes: Counters<2>,
    wire_bytes: AtomicU64,
    waits: [Histogram<BUCKETS>; SOURCES],
    ask_failures: Counters<CLASSES>,
    read_failures: Counters<{ ReadFailure::NAMES.len() }>,
    mounts: Counters<WAYS>,
    decisions: Counters<{ Decision::NAMES.len() }>,
    first_pulls: Counters<{ FirstPullEnd::NAMES.len() }>,
    first_pull_bytes: AtomicU64,
    bans: AtomicU64,
    egress: Counters<{ Egress::NAMES.len() }>,
    again: Counters<{ Again::NAMES.len() }>,
    peer_asks: Counters<{ Referrals::NAMES.len() }>,
    rulings: Counters<{ RulingGiven::NAMES.len() }>,
    denials: Counters<{ Denial::NAMES.len() }>,
    starts: Counters<{ StartRecordEnd::NAMES.len() }>,
    prefetched: Counters<{ PrefetchedBytes::NAMES.len() }>,
}

/// The counters of this process, which is one node.
pub static RECORDED: Recorded = Recorded::new();

impl Default for Recorded {
    fn default() -> Self {
        Self::new()
    }
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Recorded {
    /// All zero.
    pub const fn new() -> Self {
        Self {
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            bytes: zeros(),
            ahead_bytes: AtomicU64::new(0),
            read_bytes: zeros(),
            wire_bytes: AtomicU64::new(0),
            waits: [const { Histogram::new(&WAIT_BOUNDS_SECONDS) }; SOURCES],
            ask_failures: zeros(),
            read_failures: zeros(),
            mounts: zeros(),
            decisions: zeros(),
            first_pulls: zeros(),
            first_pull_bytes: AtomicU64::new(0),
            bans: AtomicU64::new(0),
            egress: zeros(),
            again: zeros(),
            peer_asks: zeros(),
            rulings: zeros(),
            denials: zeros(),
            starts: zeros(),
            prefetched: zeros(),
        }
    }

    /// A read of the kernel was answered at once.
    pub fn hit(&self) {
        add(&self.hits, 1);
    }

    /// A read of the kernel has to wait.
    pub fn missed(&self) {
        add(&self.misses, 1);
    }

    /// So many bytes of chunks came, asked for because of a reader or ahead of one.
    pub fn arrived(&self, from: ArrivedFrom, class: Class, bytes: u64) {
        add(&self.bytes[from as usize], bytes);
        if class == Class::Prefetch {
            add(&self.ahead_bytes, bytes);
        }
    }

    /// Of all bytes of chunks that came: those that came ahead of any reader.
    pub fn ahead_bytes(&self) -> u64 {
        get(&self.ahead_bytes)
    }

    /// A read of the kernel was answered with so many bytes of layers, which were all here.
    pub fn read_at_once(&self, bytes: u64) {
        add(&self.read_bytes[0], bytes);
    }

    /// A read of the kernel was answered with so many bytes of layers, some of which had to come first.
    pub fn read_after_waiting(&self, bytes: u64) {
        add(&self.read_bytes[1], bytes);
    }

    /// Bytes of layers that reads of the kernel were answered with, since the daemon started: at once, and after waiting.
    pub fn answered_bytes(&self) -> [u64; 2] {
        self.read_bytes.each_ref().map(get)
    }

    /// How many bytes of chunks came so, since the daemon started.
    pub fn arrived_bytes(&self, from: ArrivedFrom) -> u64 {
        self.bytes[from as usize].load(Ordering::Relaxed)
    }

    /// So many bytes of a layer came from a registry, as it sent them.
    pub fn received(&self, bytes: u64) {
        add(&self.wire_bytes, bytes);
    }

    /// Bytes of layers that registries sent, compressed, since the daemon started.
    pub fn received_bytes(&self) -> u64 {
        get(&self.wire_bytes)
    }

    /// A read on demand has waited for its chunks.
    pub fn waited(&self, from: ArrivedFrom, wait: Duration) {
        self.waits[from as usize].observe(wait);
    }

    /// A request for chunks failed.
    pub fn ask_failed(&self, class: ErrorClass) {
        let at = match class {
            ErrorClass::Transient => 0,
            ErrorClass::PeerFault => 1,
            ErrorClass::NotFound => 2,
            ErrorClass::Denied => 3,
            ErrorClass::Local => 4,
        };
        add(&self.ask_failures[at], 1);
    }

    /// A read ended with EIO.
    pub fn read_failed(&self, reason: ReadFailure) {
        add(&self.read_failures[reason as usize], 1);
    }

    /// An image was mounted.
    pub fn mounted(&self, way: Way) {
        add(&self.mounts[way as usize], 1);
    }

    /// An image that containerd prepares is to be shown lazily, or plainly.
    pub fn decided(&self, decision: Decision) {
        add(&self.decisions[decision as usize], 1);
    }

    /// A pull that the node took itself has ended.
    pub fn first_pull_ended(&self, end: FirstPullEnd) {
        add(&self.first_pulls[end as usize], 1);
    }

    /// So many compressed bytes of a layer came for such a pull.
    pub fn first_pull_received(&self, bytes: u64) {
        add(&self.first_pull_bytes, bytes);
        self.received(bytes);
    }

    /// A peer was banned.
    pub fn banned(&self) {
        add(&self.bans, 1);
    }

    /// So many bytes of chunks came from a registry.
    pub fn left_registry(&self, why: Egress, bytes: u64) {
        add(&self.egress[why as usize], bytes);
    }

    /// So many bytes of chunks came that were here already.
    pub fn arrived_again(&self, why: Again, bytes: u64) {
        add(&self.again[why as usize], bytes);
    }

    /// A peer is asked for chunks.
    pub fn peer_asked(&self, referrals: Referrals) {
        add(&self.peer_asks[referrals as usize], 1);
    }

    /// A question of another node was answered, or a part of it.
    pub fn ruled(&self, ruling: RulingGiven) {
        add(&self.rulings[ruling as usize], 1);
    }

    /// A peer was denied something private, or its grant was not taken.
    pub fn denied(&self, denial: Denial) {
        add(&self.denials[denial as usize], 1);
    }

    /// The record of a start is over.
    pub fn start_recorded(&self, end: StartRecordEnd) {
        add(&self.starts[end as usize], 1);
    }

    /// Something became of so many bytes that a profile asked for.
    pub fn prefetched(&self, what: PrefetchedBytes, bytes: u64) {
        add(&self.prefetched[what as usize], bytes);
    }

    /// Sets everything that is recorded here.
    pub fn fill(&self, values: &mut Values) {
        values.set("hermes_fuse_reads_total", "hit", get(&self.hits));
        values.set("hermes_fuse_reads_total", "miss", get(&self.misses));
        values.set("hermes_fuse_read_bytes_total", "hit", get(&self.read_bytes[0]));
        values.set("hermes_fuse_read_bytes_total", "miss", get(&self.read_bytes[1]));
        values.set("hermes_chunk_bytes_ahead_total", "", get(&self.ahead_bytes));
        values.set("hermes_registry_wire_bytes_total", "", get(&self.wire_bytes));
        values.set("hermes_peer_bans_total", "", get(&self.bans));
        values.set("hermes_first_pull_bytes_total", "", get(&self.first_pull_bytes));
        for (source, waits) in ArrivedFrom::NAMES.iter().zip(&self.waits) {
            values.set_distribution("hermes_demand_wait_seconds", source, waits.read());
        }
        let ways = [Way::ErofsFiles, Way::ErofsFuse, Way::FuseTree].map(Way::name);
        let classes = ["transient", "peer_fault", "not_found", "denied", "local"];
        let lists: [(&'static str, &[&'static str], &[AtomicU64]); 13] = [
            ("hermes_chunk_bytes_total", &ArrivedFrom::BYTE_SOURCES, &self.bytes),
            ("hermes_ask_failures_total", &classes, &self.ask_failures),
            ("hermes_read_failures_total", &ReadFailure::NAMES, &self.read_failures),
            ("hermes_mounts_total", &ways, &self.mounts),
            ("hermes_lazy_decisions_total", &Decision::NAMES, &self.decisions),
            ("hermes_first_pulls_total", &FirstPullEnd::NAMES, &self.first_pulls),
            ("hermes_registry_chunk_bytes_total", &Egress::NAMES, &self.egress),
            ("hermes_duplicate_bytes_total", &Again::NAMES, &self.again),
            ("hermes_peer_asks_total", &Referrals::NAMES, &self.peer_asks),
            ("hermes_rulings_total", &RulingGiven::NAMES, &self.rulings),
            ("hermes_peer_denials_total", &Denial::NAMES, &self.denials),
            ("hermes_start_records_total", &StartRecordEnd::NAMES, &self.starts),
            ("hermes_prefetch_bytes_total", &PrefetchedBytes::NAMES, &self.prefetched),
        ];
        for (metric, labels, counters) in lists {
            for (label, counter) in labels.iter().zip(counters) {
                values.set(metric, label, get(counter));
            }
        }
    }
}
