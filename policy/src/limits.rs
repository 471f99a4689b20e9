//! Every bound of the fetch policy, with its unit and its reason.
//!
//! A driver may change them (tests and simulations use small ones, which meet their edges sooner); the defaults are
//! for a node.

use serde::{Deserialize, Serialize};

use crate::class::{BackoffRule, Class};
use crate::event::Source;
use crate::time::Duration;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;

/// How many asks may be under way at one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceLimit {
    /// Asks of any class.
    pub asks: u32,
    /// Of these, asks that only demand may use, so that a reader never waits for a prefetch to end.
    pub reserved_for_demand: u32,
    /// Most prefetch asks that may be added while demand asks are under way: they share the link, and each one
    /// slows the reader down.
    pub prefetch_beside_demand: u32,
}

/// How much one ask may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskSize {
    /// For a reader that waits, in bytes: small, so that its first bytes come first and several asks share the work.
    pub demand_bytes: u64,
    /// For prefetch, in bytes: long, so that a request's round trip and headers do not matter.
    pub prefetch_bytes: u64,
}

impl AskSize {
    /// The bound for `class`, in bytes.
    pub const fn bytes(&self, class: Class) -> u64 {
        match class {
            Class::Demand => self.demand_bytes,
            Class::Prefetch => self.prefetch_bytes,
        }
    }
}

/// How long an ask may go without a sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StallTime {
    /// For a reader that waits.
    pub demand: Duration,
    /// For prefetch.
    pub prefetch: Duration,
}

/// All bounds. See [`Limits::default`] for the numbers and where they come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Layers that are open at once.
    pub layers: usize,
    /// Peers that are remembered, up or banned, beside members.
    pub peers: usize,
    /// Peers of which is remembered what they were like before members that have long been quiet are forgotten.
    pub peers_met: usize,
    /// Holders of one layer of which is remembered what they have.
    pub holders_per_layer: usize,
    /// Holders of one layer that owners have named and of which nothing else is known.
    pub named_per_layer: usize,
    /// Runs of chunks remembered of one holder of one layer.
    pub runs_per_holder: usize,
    /// Reads that wait, of both classes.
    pub waiting_reads: usize,
    /// Prefetch reads that wait.
    pub waiting_prefetch_reads: usize,
    /// Runs of chunks in one ask to a peer or to the local store.
    pub runs_per_ask: usize,
    /// Failures per layer that are kept to explain why a read failed, one per source.
    pub troubles_per_layer: usize,
    /// Waiting reads that are looked at to fill one ask.
    pub gather_reads: usize,

    /// All asks under way.
    pub total: SourceLimit,
    /// Copies under way between local layers.
    pub local: SourceLimit,
    /// Asks under way at one peer.
    pub peer: SourceLimit,
    /// Asks under way at one origin.
    pub origin: SourceLimit,

    /// Logical bytes of one local copy.
    pub local_size: AskSize,
    /// Logical bytes of one ask to a peer.
    pub peer_size: AskSize,
    /// Compressed bytes of one ask to the origin. A single span may be larger.
    pub origin_size: AskSize,
    /// Logical bytes that a demand ask to the origin takes along where something near is here, from the start of its first span, by whole
    /// spans.
    pub origin_near_bytes: u64,
    /// Compressed bytes between two needed spans that are read through rather than asked around.
    pub origin_gap: AskSize,

    /// Longest silence of a local copy.
    pub local_stall: StallTime,
    /// Longest silence of a peer.
    pub peer_stall: StallTime,
    /// Longest silence of the origin.
    pub origin_stall: StallTime,
    /// How much longer than its stall time an ask is believed in when the driver does not report its end.
    pub lease_grace: Duration,

    /// Rest of a peer after failures.
    pub peer_backoff: BackoffRule,
    /// Rest of the origin after failures.
    pub origin_backoff: BackoffRule,
    /// Rest of a layer after failures of our own disk.
    pub own_backoff: BackoffRule,
    /// Shortest and longest time that a `Busy` answer of a peer rests it.
    pub busy_min: Duration,
    /// See [`Limits::busy_min`].
    pub busy_max: Duration,
    /// How long a peer that sent wrong bytes is banned.
    pub ban: Duration,
    /// How long `denied` and `not found` are remembered for a source and a layer.
    pub refusal: Duration,
    /// Times in a row that an origin may send wrong bytes before it counts as refused.
    pub origin_wrong_bytes: u32,

    /// Logical bytes of an extent, the unit that has owners. The same on all nodes of a cluster.
    pub extent_bytes: u64,
    /// Owners of an extent that stand in for each other.
    pub owner_ranks: usize,
    /// The owner of rank *i* may turn to the registry *i* times the longer of this and three times the p90 of peers'
    /// latencies after it was first asked (design, section 6).
    pub rank_wait_min: Duration,
    /// Longest that slow senders make a rank wait.
    pub rank_wait_pause_max: Duration,
    /// How long after one peer was silent others are doubted of which nothing was heard since [`Self::doubt_silence`]
    /// before the first of such silences.
    pub doubt: Duration,
    /// Nodes that fetch tell each other of it every 50 ms, and answer at once.
    pub doubt_silence: Duration,
    /// How long an owner that failed is passed over for the extent.
    pub owner_rest: Duration,
    /// How long a read waits for others when its own registry refuses the layer and no owner has it.
    pub refused_patience: Duration,
    /// Most asks a second that a node makes of the registry for extents whose owners are all out of reach.
    pub unowned_asks_per_second: u32,
    /// How long a demand ask that a peer says it works on may bring nothing.
    pub pending_patience: StallTime,
    /// The same for a demand ask to an owner, once another owner has read from the registry what it was asked for later.
    pub overtaken_patience: Duration,
    /// Longest time that another node's word rests the registry; it is said again while it holds.
    pub told_rest_max: Duration,
    /// Claimants of a chunk that an owner serves at least; later ones are sent to these.
    pub direct_claimants: usize,
    /// How long an owner remembers whom it has served or delegated.
    pub claimant_memory: Duration,
    /// Peers named in one referral.
    pub referral_peers: usize,
    /// Claims that wait.
    pub claims: usize,
    /// Extents of which an owner remembers claimants.
    pub books: usize,
    /// How long what another node claims is worth fetching.
    pub claim_patience: Duration,
    /// Bytes asked for twice, in hundredths of what demand asks of peers.
    pub hedge_percent: u64,
    /// Shortest time after which a demand ask is put to a second holder, too; the p90 of peers' latencies otherwise.
    pub hedge_min: Duration,

    /// How long demand waits for the first search for holders of a layer before it asks the origin.
    pub lookup_wait: Duration,
    /// After which a search that brought no answer counts as ended; prefetch waits that long.
    pub lookup_end: Duration,
    /// After which holders are searched again although some were found.
    pub lookup_found: Duration,
    /// After which holders are searched again when none was found.
    pub lookup_negative: Duration,
    /// Shortest time between two searches for one layer, whatever peers come up.
    pub lookup_again: Duration,
    /// How long a demand read waits, from its start, for a holder whose asks are all taken before it asks the origin.
    pub full_patience: Duration,
    /// How long a demand read waits, from its start, for a holder that answered `Busy` before it asks the origin.
    pub busy_patience: Duration,
    /// After which spans that did not come are asked for again.
    pub spans_wait: Duration,
    /// Bytes before a chunk in a prefetch ask under way up to which a demand read joins it, rather than asks anew,
    /// however slow it is.
    pub join_bytes: u64,
    /// How long a demand read waits for a prefetch ask that it joined: for its first sign of life, and for the bytes
    /// before its own at the speed that the ask has shown. Asking anew costs a round trip and decodes part of a span
    /// twice.
    pub join_wait: Duration,

    /// How long prefetch of a layer that found nothing to ask is passed over at most while facts come in.
    pub prefetch_pause: Duration,

    /// Expected latency of a peer that was never asked.
    pub peer_latency: Duration,
    /// Longest latency that is believed of a peer that fails; 4.29 s (32 bits of nanoseconds) at most.
    pub peer_latency_max: Duration,
    /// Expected time per KiB of a peer that was never asked.
    pub peer_cost_per_kib: Duration,
    /// One in so many prefetch choices goes to any holder, to learn of it; 0 for none.
    pub explore_prefetch_one_in: u32,
    /// The same for demand.
    pub explore_demand_one_in: u32,

    /// Readers per layer that are followed.
    pub readahead_streams: usize,
    /// After which a holder whose share of a layer has not grown counts as at rest.
    pub settled: Duration,
    /// First guess ahead of a sequential reader, in bytes; 0 for no readahead.
    pub readahead_first_bytes: u64,
    /// Longest guess, in bytes.
    pub readahead_max_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        let backoff = |base_ms, cap_s| BackoffRule {
            base: Duration::from_millis(base_ms),
            cap: Duration::from_secs(cap_s),
            retry_after_max: Duration::from_secs(300),
        };
        let stall = |demand_s, prefetch_s| StallTime {
            demand: Duration::from_secs(demand_s),
            prefetch: Duration::from_secs(prefetch_s),
        };
        Self {
            // 40 images of 100 layers.
            layers: 4096,
            peers: 1024,
            // As many as a hash table of 2,048 places takes. A node may meet each of 10,000 that start at once.
            peers_met: 1792,
            // The partners that exchange have-maps (design, section 6).
            holders_per_layer: 32,
            // An owner names up to four, for a few chunks, and a start asks some thirty owners at once. With 32 of both kinds 200 nodes that
            // start together forgot nearly all names before they had asked them (docs/decisions/0017).
            named_per_layer: 96,
            // A map of 2,048 runs costs 16 KiB: 32 holders of 100 layers 50 MiB at the very worst, 100 KiB usually.
            runs_per_holder: 2048,
            // FUSE keeps some hundred requests under way; a profile has up to a few thousand runs.
            waiting_reads: 8192,
            waiting_prefetch_reads: 6144,
            runs_per_ask: 64,
            troubles_per_layer: 16,
            gather_reads: 256,

            total: SourceLimit { asks: 128, reserved_for_demand: 32, prefetch_beside_demand: 32 },
            // Copies on one disk gain nothing from many at once.
            local: SourceLimit { asks: 4, reserved_for_demand: 2, prefetch_beside_demand: 1 },
            // Six for prefetch: as many streams as the exchange has for it to one peer, which serves eight transfers at once. With eight
            // a node's own prefetch took all of them, and its readers were told to come again (docs/decisions/0018).
            peer: SourceLimit { asks: 16, reserved_for_demand: 10, prefetch_beside_demand: 2 },
            // Registries answer many connections, but count requests; 8 ranges hide 20 ms at 1 Gbit/s with ease. A reader's own
            // ask leaves the link idle for a round trip: first starts took 1 to 8 % longer with two beside it than with four (three
            // were not compared), with which more of 12,000 random clusters read too much (42; with two and three 36 and 38).
            origin: SourceLimit { asks: 12, reserved_for_demand: 6, prefetch_beside_demand: 3 },

            local_size: AskSize { demand_bytes: MIB, prefetch_bytes: 8 * MIB },
            peer_size: AskSize { demand_bytes: 512 * KIB, prefetch_bytes: 2 * MIB },
            // A span is 96-512 KiB of output, mostly 60-300 KiB compressed: demand takes one to eight of them.
            origin_size: AskSize { demand_bytes: 512 * KIB, prefetch_bytes: 4 * MIB },
            // As long as the longest joined span. A Spark master of whose start nothing is known, fetched by a single daemon over
            // 200 Mbit/s and 20 ms, answered after 16.6 s with one short span (129 MB in 547 requests), 15.3 s with 384 KiB
            // (127 MB, 457) and 14.5 s with 512 KiB (132 MB, 442); 14.1 s where they are taken along only if something near is here, as
            // they are (134 MB, 462).
            origin_near_bytes: 512 * KIB,
            // One span of what hardly compresses: 1.5 ms at 1 Gbit/s, where a request of its own costs
            // both sides work. A Spark master that is fetched by its profile took as long with 16, 64 and 256 KiB for prefetch (105, 105
            // and 108 MB); with less than 192 random world 1191 reads too much.
            origin_gap: AskSize { demand_bytes: 64 * KIB, prefetch_bytes: 192 * KIB },

            local_stall: stall(5, 30),
            peer_stall: stall(2, 10),
            origin_stall: stall(10, 30),
            lease_grace: Duration::from_millis(500),

            peer_backoff: backoff(100, 10),
            origin_backoff: backoff(200, 10),
            own_backoff: backoff(200, 5),
            busy_min: Duration::from_millis(5),
            busy_max: Duration::from_secs(10),
            ban: Duration::from_secs(600),
            refusal: Duration::from_secs(60),
            origin_wrong_bytes: 3,

            // Eight to forty spans. Small enough that an image of 600 MB has 200 of them, for a hundred owners; large enough
            // that an owner reads several spans in one request.
            extent_bytes: 4 * MIB,
            owner_ranks: 3,
            rank_wait_min: Duration::from_millis(250),
            // A reader that waits for a sender which has died is not to wait longer than a second (design, section 10).
            rank_wait_pause_max: Duration::from_millis(800),
            doubt: Duration::from_secs(2),
            // As long as a reader waits for the first word.
            doubt_silence: Duration::from_millis(250),
            owner_rest: Duration::from_secs(1),
            refused_patience: Duration::from_secs(10),
            unowned_asks_per_second: 16,
            pending_patience: stall(5, 15),
            // Design, section 10.
            overtaken_patience: Duration::from_secs(1),
            told_rest_max: Duration::from_secs(10),
            // Depth log_4(10,000) < 7; simulated, a node that serves any number takes 15 times as long for 1,000 claimants.
            direct_claimants: 4,
            claimant_memory: Duration::from_secs(10),
            referral_peers: 4,
            // Twice as many as the exchange holds: that one has ended is said later than the next one comes, and a claimant beyond this
            // passes the owner over (docs/decisions/0022).
            claims: 2048,
            // An image of 10 GB has 2,500 extents.
            books: 8192,
            claim_patience: Duration::from_secs(30),
            // Design, section 6.
            hedge_percent: 5,
            hedge_min: Duration::from_millis(20),

            // A search over the swarm takes 4-10 ms (measured, 50 nodes); the registry is 20 ms away.
            lookup_wait: Duration::from_millis(30),
            lookup_end: Duration::from_secs(2),
            lookup_found: Duration::from_secs(30),
            lookup_negative: Duration::from_secs(5),
            lookup_again: Duration::from_secs(1),
            full_patience: Duration::from_secs(3),
            busy_patience: Duration::from_millis(200),
            spans_wait: Duration::from_secs(5),
            join_bytes: MIB,
            join_wait: Duration::from_millis(50),

            // As often as partners tell what they have.
            prefetch_pause: Duration::from_millis(50),

            peer_latency: Duration::from_millis(2),
            peer_latency_max: Duration::from_secs(4),
            // 1 Gbit/s.
            peer_cost_per_kib: Duration::from_micros(8),
            explore_prefetch_one_in: 16,
            explore_demand_one_in: 64,

            readahead_streams: 8,
            // News come every 50 ms while anything comes at all; a start pauses for a few seconds at most (design, section 5).
            settled: Duration::from_secs(10),
            readahead_first_bytes: MIB / 2,
            readahead_max_bytes: 16 * MIB,
        }
    }
}

impl Limits {
    /// How long an ask of `class` to `source` may go without a sign of life.
    pub const fn stall(&self, source: Source, class: Class) -> Duration {
        let stall = match source {
            Source::Local => &self.local_stall,
            Source::Peer(_) => &self.peer_stall,
            Source::Origin => &self.origin_stall,
        };
        match class {
            Class::Demand => stall.demand,
            Class::Prefetch => stall.prefetch,
        }
    }

    /// How long a source may be silent while a reader waits for it. A peer says at once that it works on it, and a reader is not
    /// to wait longer for one that is gone than `rank_wait`.
    pub fn reader_stall(&self, source: Source, rank_wait: Duration) -> Duration {
        let stall = self.stall(source, Class::Demand);
        if matches!(source, Source::Peer(_)) { stall.min(rank_wait) } else { stall }
    }

    /// The same with its relations put right: at least one ask everywhere, prefetch always possible and never able to
    /// take what is kept for demand.
    pub(crate) fn checked(mut self) -> Self {
        for source in [&mut self.total, &mut self.local, &mut self.peer, &mut self.origin] {
            source.asks = source.asks.max(2);
            source.reserved_for_demand = source.reserved_for_demand.clamp(1, source.asks - 1);
            source.prefetch_beside_demand = source.prefetch_beside_demand.max(1);
        }
        self.waiting_reads = self.waiting_reads.max(1);
        self.waiting_prefetch_reads = self.waiting_prefetch_reads.min(self.waiting_reads);
        self.runs_per_ask = self.runs_per_ask.max(1);
        self.gather_reads = self.gather_reads.max(1);
        self.owner_ranks = self.owner_ranks.max(1);
        self.direct_claimants = self.direct_claimants.max(1);
        self.referral_peers = self.referral_peers.max(1);
        self.busy_max = self.busy_max.max(self.busy_min);
        self
    }
}

/// The asks under way at one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// For readers that wait.
    pub demand: u32,
    /// For prefetch.
    pub prefetch: u32,
}

impl Load {
    /// Whether one more ask of `class` keeps the limit.
    pub fn has_room(&self, class: Class, limit: &SourceLimit) -> bool {
        let room = self.demand + self.prefetch < limit.asks;
        match class {
            Class::Demand => room,
            Class::Prefetch => {
                let quiet = self.demand == 0 || self.prefetch < limit.prefetch_beside_demand;
                room && quiet && self.prefetch < limit.asks - limit.reserved_for_demand
            }
        }
    }

    pub(crate) fn add(&mut self, class: Class) {
        *self.of(class) += 1;
    }

    pub(crate) fn sub(&mut self, class: Class) {
        let count = self.of(class);
        debug_assert!(*count > 0, "an ask ended that was never counted");
        *count = count.saturating_sub(1);
    }

    fn of(&mut self, class: Class) -> &mut u32 {
        match class {
            Class::Demand => &mut self.demand,
            Class::Prefetch => &mut self.prefetch,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_by_class() {
        let limit = SourceLimit { asks: 4, reserved_for_demand: 1, prefetch_beside_demand: 1 };
        for (demand, prefetch, for_demand, for_prefetch) in [
            (0, 0, true, true),
            (0, 2, true, true),
            (0, 3, true, false),
            (1, 0, true, true),
            (1, 1, true, false),
            (1, 3, false, false),
            (4, 0, false, false),
        ] {
            let load = Load { demand, prefetch };
            let room = (load.has_room(Class::Demand, &limit), load.has_room(Class::Prefetch, &limit));
            assert_eq!(room, (for_demand, for_prefetch), "{load:?}");
        }
    }

    #[test]
    fn impossible_limits_are_put_right() {
        let peer = SourceLimit { asks: 0, reserved_for_demand: 9, prefetch_beside_demand: 0 };
        let limits = Limits { peer, waiting_reads: 0, ..Limits::default() }.checked();
        assert!(Load::default().has_room(Class::Prefetch, &limits.peer));
        assert_eq!((limits.waiting_reads, limits.waiting_prefetch_reads), (1, 1));
        assert_eq!(Limits::default().checked(), Limits::default());
    }
}
