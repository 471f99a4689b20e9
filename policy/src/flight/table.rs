//! The single-flight table: layers, the reads that wait, and the asks under way, which lease chunks.
//!
//! A chunk of a layer is in at most one of three states: here (`have`), leased to exactly one ask (`leased`), or
//! neither. Reads never own asks: a read that ends leaves the ask to those that still wait, and an ask that ends leaves
//! its chunks to be leased anew. So nobody waits on a promise that nobody keeps.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use hermes_image::ids::{ChunkRange, DiffId};
use hermes_image::runs::Runs;

use crate::class::{Backoff, Class, ErrorClass};
use crate::event::{AskId, FailCause, FailReason, OriginNo, OriginStanding, PeerNo, ReadId, Source, Want};
use crate::geometry::LayerGeometry;
use crate::limits::{Limits, Load};
use crate::members::Duty;
use crate::peers::smooth;
use crate::readahead::Readahead;
use crate::time::{Duration, Instant, nanos};

use super::owners::Quests;
use super::prefetching::Quiet;
use super::resting::Rest;
use super::waiters::Waiters;

/// Another node's want that this node acts on as an owner.
#[derive(Debug, Clone, Copy)]
pub(super) struct ForOthers {
    pub(super) duty: Duty,
    /// The claimant was answered before, and comes back.
    pub(super) again: bool,
}

/// A read that waits.
#[derive(Debug, Clone)]
pub(super) struct Read {
    pub(super) layer: DiffId,
    /// All that it wants, so that what is evicted while it waits is fetched again.
    pub(super) needs: Runs,
    /// What is not here yet; never empty.
    pub(super) missing: Runs,
    pub(super) class: Class,
    /// For whom this node acts as an owner, when another node wants them.
    pub(super) acts_for: Option<Duty>,
    pub(super) since: Instant,
    pub(super) deadline: Instant,
    /// Its place in the queue of its class.
    pub(super) place: u64,
    /// All was asked for that could be, when a reader waits for it.
    pub(super) rest: Option<Rest>,
}

/// How much an ask's answer depends on others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Certainty {
    /// Somebody was named who may have it.
    Hoped,
    /// An owner was asked: it may be promised to those who ask for what is here, and not as an owner.
    Firm,
    /// The source has it.
    Sure,
}

/// A question under way.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) layer: DiffId,
    pub(super) source: Source,
    /// The origin's number, for asks to the origin.
    pub(super) origin: Option<OriginNo>,
    pub(super) class: Class,
    /// What the peer is expected to do, and for which extent.
    pub(super) want: Want,
    pub(super) extent: ChunkRange,
    pub(super) certainty: Certainty,
    /// The chunks that it leases: asked for and not here yet.
    pub(super) chunks: Runs,
    /// Chunks that it was asked for and whose lease has moved to a second ask.
    pub(super) shadow: Runs,
    /// Bytes of it that were asked for twice.
    pub(super) hedged_bytes: u64,
    /// Since when readers wait for what was asked for as prefetch.
    pub(super) joined: Option<Instant>,
    /// Bytes that were asked for, for the books of the source.
    pub(super) bytes: u64,
    /// Logical bytes that it has brought so far.
    pub(super) brought_bytes: u64,
    pub(super) sent: Instant,
    pub(super) first_sign: Option<Instant>,
    /// The last sign of life; when it was sent, before the first.
    pub(super) last_sign: Instant,
    /// When it brought something last; when it was sent, before that.
    pub(super) last_brought: Instant,
    /// The peer has said that it works on it, and has brought nothing since.
    pub(super) was_pending: bool,
    /// Longest silence before the lease ends.
    pub(super) silence: Duration,
    pub(super) lease_until: Instant,
    /// Whether it decodes the layer from its start, so that its far chunks come late whatever its class.
    pub(super) whole_stream: bool,
}

impl Ask {
    /// Notes a sign of life.
    pub(super) fn renew(&mut self, now: Instant) {
        self.first_sign.get_or_insert(now);
        self.last_sign = now;
        self.lease_until = now + self.silence;
    }

    /// Notes that the peer works on it. A word is a sign of life only for so long: as long as `overtaken` says when what was asked of
    /// others later has come from the registry.
    pub(super) fn renew_pending(&mut self, now: Instant, overtaken: Option<Duration>, limits: &Limits) {
        self.first_sign.get_or_insert(now);
        self.last_sign = now;
        self.was_pending = true;
        let patience = match self.is_waited_for() {
            true => overtaken.unwrap_or(Duration::MAX).min(limits.pending_patience.demand),
            false => limits.pending_patience.prefetch,
        };
        self.lease_until = (now + self.silence).min(self.progress_at() + patience).max(now);
    }

    /// Readers wait for it from now on. It was asked for as prefetch, which may be silent for long: now it may no longer than
    /// `stall`, counted from its last sign of life.
    pub(super) fn join(&mut self, now: Instant, stall: Duration) {
        self.joined.get_or_insert(now);
        self.silence = self.silence.min(stall);
        self.lease_until = self.lease_until.min(self.last_sign + self.silence).max(now);
    }

    /// Whether a reader waits for what it brings.
    pub(super) fn is_waited_for(&self) -> bool {
        self.class == Class::Demand || self.joined.is_some()
    }

    /// When it brought something last, or readers began to wait for it.
    pub(super) fn progress_at(&self) -> Instant {
        self.joined.map_or(self.last_brought, |at| at.max(self.last_brought))
    }

    /// How far behind its head a demand read may find a chunk and still wait for it, in logical bytes: what it brings
    /// within `wait` at its speed so far, and no less than [`Limits::join_bytes`].
    pub(super) fn joinable_bytes(&self, now: Instant, wait: Duration, limits: &Limits) -> u64 {
        let Some(since) = self.first_sign else { return limits.join_bytes };
        let elapsed = now.since(since).as_nanos().max(1);
        let soon = u128::from(self.brought_bytes) * wait.as_nanos() / elapsed;
        u64::try_from(soon).unwrap_or(u64::MAX).max(limits.join_bytes)
    }

    /// Whether a demand read may take chunks out of this ask's lease.
    pub(super) fn can_be_overtaken(&self) -> bool {
        self.class == Class::Prefetch || self.whole_stream
    }
}

static NOTHING: Runs = Runs::new();

/// What matters of an asker to what a holder offers it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asker {
    /// It acts as an owner.
    pub(super) acts_for_others: bool,
    /// It has time: what only other zones are known to have comes by way of its zone's owner, once for all.
    pub(super) can_wait: bool,
}

/// What a peer has of a layer.
#[derive(Debug, Clone, Default)]
pub(super) struct Holder {
    /// What it has said that it has.
    pub(super) chunks: Runs,
    /// What an owner has said that it has, or will have, and is not here.
    pub(super) promised: Runs,
    /// When an owner named it last.
    pub(super) named: Instant,
    /// It is in another zone.
    pub(super) is_far: bool,
    /// When it last said that it has more than before.
    pub(super) grew: Instant,
    /// The peer refuses us this layer until then.
    pub(super) denied_until: Option<Instant>,
}

impl Holder {
    /// Whether nothing is to be had from it.
    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.promised.is_empty()
    }

    /// Whether anything is known of it.
    fn is_worth_keeping(&self) -> bool {
        !self.is_empty() || self.denied_until.is_some()
    }

    /// Whether it has said what it has.
    fn has_told(&self) -> bool {
        !self.chunks.is_empty()
    }

    /// What of `wanted` may be asked of it.
    pub(super) fn offer(&self, wanted: &Runs, asker: Asker) -> Runs {
        let mut offer = wanted.intersection(self.told(asker));
        if !self.promised.is_empty() {
            offer.insert_all(&wanted.intersection(self.promised_to(asker)));
        }
        offer
    }

    /// What it has said that it has and this asker may ask it for.
    pub(super) fn told(&self, asker: Asker) -> &Runs {
        if self.is_far && asker.can_wait && !asker.acts_for_others { &NOTHING } else { &self.chunks }
    }

    /// What it was named for and this asker may ask it for: an owner that acts for others relies on what is there.
    fn promised_to(&self, asker: Asker) -> &Runs {
        if asker.acts_for_others { &NOTHING } else { &self.promised }
    }

    /// The first chunk of [`Self::offer`].
    pub(super) fn first_offered(&self, wanted: &Runs, asker: Asker) -> Option<u32> {
        let offers = [self.told(asker), self.promised_to(asker)];
        offers.into_iter().filter_map(|offer| wanted.first_common(offer)).min()
    }

    /// Takes [`Self::offer`] out of `wanted`.
    pub(super) fn take_offer_from(&self, wanted: &mut Runs, asker: Asker) {
        for offer in [self.told(asker), self.promised_to(asker)] {
            wanted.remove_all(offer);
        }
    }

    /// Whether it has gone beyond `chunks` and come to rest: what it does not have, its readers did not need.
    fn has_settled_beyond(&self, chunks: &Runs, now: Instant, limits: &Limits) -> bool {
        now >= self.grew + limits.settled && chunks.difference(&self.chunks).is_empty()
    }

    /// It does not have these.
    pub(super) fn lacks(&mut self, chunks: &Runs) {
        self.chunks.remove_all(chunks);
        self.promised.remove_all(chunks);
    }
}

/// The search for holders of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lookup {
    /// Nobody has searched.
    Never,
    /// A search is under way, and demand may wait for it or not.
    Asked {
        at: Instant,
        demand_waits: bool,
    },
    Ended {
        at: Instant,
    },
}

/// How the layer's registry stands.
#[derive(Debug, Clone, Default)]
pub(super) struct OriginState {
    pub(super) no: Option<OriginNo>,
    pub(super) usable: bool,
    /// When the driver last said which registry it is.
    pub(super) changed_at: Instant,
    pub(super) refused_until: Option<Instant>,
    pub(super) backoff: Backoff,
    /// Wrong bytes in a row.
    pub(super) wrong_bytes: u32,
    /// When the spans were asked for.
    pub(super) spans_asked: Option<Instant>,
}

impl OriginState {
    pub(super) fn is_refused(&self, now: Instant) -> bool {
        self.refused_until.is_some_and(|until| until > now)
    }
}

#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) geometry: Arc<LayerGeometry>,
    pub(super) have: Runs,
    /// Chunks that another local layer holds.
    pub(super) local: Runs,
    /// The chunks of all asks of this layer.
    pub(super) leased: Runs,
    pub(super) asks: BTreeSet<AskId>,
    /// Those that can be overtaken.
    pub(super) overtakable: BTreeSet<AskId>,
    pub(super) reads: Waiters,
    pub(super) holders: BTreeMap<PeerNo, Holder>,
    pub(super) lookup: Lookup,
    /// Demand waits for the next search: nobody has looked yet, or a new peer came. When a holder was lost, readers
    /// have waited enough.
    pub(super) search_is_worth_waiting: bool,
    pub(super) origin: OriginState,
    /// Failures of our own disk.
    pub(super) own: Backoff,
    pub(super) troubles: BTreeMap<Source, ErrorClass>,
    pub(super) readahead: Readahead,
    /// Chunks that readahead wants.
    pub(super) ahead: Runs,
    /// What is under way with the owners of its extents.
    pub(super) quests: Quests,
    /// Its prefetch found nothing to ask, and what has to change first.
    pub(super) quiet: Option<Quiet>,
    /// What readahead wants was asked for as far as it could be.
    pub(super) ahead_rest: Option<Rest>,
    /// How often something happened that may change what its reads can ask for.
    pub(super) changes: u64,
}

impl Layer {
    pub(super) fn new(geometry: Arc<LayerGeometry>, present: &Runs, local: &Runs, origin: Option<OriginNo>) -> Self {
        let all = 0..geometry.chunk_count();
        Self {
            have: present.within(all.clone()),
            local: local.within(all),
            geometry,
            leased: Runs::new(),
            asks: BTreeSet::new(),
            overtakable: BTreeSet::new(),
            reads: Waiters::default(),
            holders: BTreeMap::new(),
            lookup: Lookup::Never,
            search_is_worth_waiting: true,
            origin: OriginState { no: origin, usable: true, ..OriginState::default() },
            own: Backoff::default(),
            troubles: BTreeMap::new(),
            readahead: Readahead::default(),
            ahead: Runs::new(),
            quests: Quests::new(),
            quiet: None,
            ahead_rest: None,
            changes: 0,
        }
    }

    /// Logical bytes of a set of chunks.
    pub(super) fn bytes(&self, chunks: &Runs) -> u64 {
        chunks.iter().map(|run| self.geometry.len_bytes(&run)).sum()
    }

    /// What of a guess at the next chunks is worth fetching after a read of `chunks`: all of it, unless a holder that has come
    /// to rest has read the same; then what holders have.
    pub(super) fn worth_guessing(&self, ahead: Runs, chunks: &Runs, now: Instant, limits: &Limits) -> Runs {
        if !self.holders.values().any(|holder| holder.has_settled_beyond(chunks, now, limits)) {
            return ahead;
        }
        let mut held = Runs::new();
        for holder in self.holders.values() {
            held.insert_all(&ahead.intersection(&holder.chunks));
        }
        held
    }

    /// Notes that a source failed, for the report of reads that fail.
    pub(super) fn trouble(&mut self, source: Source, class: ErrorClass, limits: &Limits) {
        if self.troubles.len() < limits.troubles_per_layer || self.troubles.contains_key(&source) {
            self.troubles.insert(source, class);
        }
    }

    /// What an owner has promised of these chunks matters no more: they are here.
    pub(super) fn redeem_promises(&mut self, arrived: &Runs) {
        let mut is_done = false;
        for holder in self.holders.values_mut() {
            if holder.promised.first_common(arrived).is_some() {
                holder.promised.remove_all(arrived);
                is_done |= !holder.is_worth_keeping();
            }
        }
        if is_done {
            self.holders.retain(|_, holder| holder.is_worth_keeping());
        }
    }

    /// The record of a peer that says what it has, if there is room for one.
    pub(super) fn telling_holder(&mut self, peer: PeerNo, is_far: bool, limits: &Limits) -> Option<&mut Holder> {
        let is_known = self.holders.get(&peer).is_some_and(Holder::has_told);
        let told = || self.holders.values().filter(|holder| holder.has_told()).count();
        let has_room = is_known || told() < limits.holders_per_layer;
        has_room.then(|| self.holders.entry(peer).or_insert_with(|| Holder { is_far, ..Holder::default() }))
    }

    /// The record of a peer that an owner has named. Where too many were named, the one of which nobody has spoken for longest
    /// makes room.
    pub(super) fn named_holder(&mut self, peer: PeerNo, is_far: bool, now: Instant, limits: &Limits) -> &mut Holder {
        if !self.holders.contains_key(&peer) {
            let named = || self.holders.iter().filter(|(_, holder)| !holder.has_told());
            if self.holders.len() >= limits.named_per_layer
                && named().count() >= limits.named_per_layer
                && let Some(first) = named().min_by_key(|(_, holder)| holder.named).map(|(peer, _)| *peer)
            {
                self.holders.remove(&first);
            }
        }
        let holder = self.holders.entry(peer).or_insert_with(|| Holder { is_far, ..Holder::default() });
        holder.named = now;
        holder
    }

    /// Forgets all that is known of a peer.
    pub(super) fn forget_peer(&mut self, peer: PeerNo) {
        if self.holders.remove(&peer).is_some() {
            self.search_is_worth_waiting = false;
        }
    }

    pub(super) fn standing(&self, now: Instant) -> OriginStanding {
        match &self.origin {
            OriginState { no: None, .. } => OriginStanding::Absent,
            origin if !origin.usable => OriginStanding::Unusable,
            origin if origin.is_refused(now) => OriginStanding::Refused,
            _ if self.geometry.span_count().is_none() => OriginStanding::SpansUnknown,
            origin if origin.backoff.resting(now).is_some() => OriginStanding::Resting,
            _ => OriginStanding::Ready,
        }
    }

    pub(super) fn cause(&self, reason: FailReason, now: Instant) -> FailCause {
        FailCause {
            reason,
            tried: self.troubles.iter().map(|(source, class)| (*source, *class)).collect(),
            origin: self.standing(now),
            holders: self.holders.values().filter(|holder| !holder.chunks.is_empty()).count(),
        }
    }
}

/// What the layers of one registry share.
#[derive(Debug, Clone, Default)]
pub(super) struct OriginRecord {
    pub(super) load: Load,
    /// What its `Retry-After` said.
    pub(super) rest_until: Instant,
    /// Open layers that use it.
    pub(super) layers: usize,
    /// How long it takes to send a first byte, smoothed; zero before the first answer.
    pub(super) latency_ns: u64,
}

impl OriginRecord {
    /// Learns from the time to a first byte.
    pub(super) fn learn(&mut self, latency: Duration) {
        if self.latency_ns == 0 {
            self.latency_ns = nanos(latency);
        } else {
            smooth(&mut self.latency_ns, nanos(latency));
        }
    }

    /// How long a reader gives an ask under way before it asks anew: on a link that is full, every answer is late, and
    /// another ask makes it later.
    pub(super) fn patience(&self, least: Duration) -> Duration {
        Duration::from_nanos(self.latency_ns.saturating_mul(3)).max(least)
    }

    /// Whether no layer uses it and nothing is asked of it.
    pub(super) fn is_unused(&self) -> bool {
        self.layers == 0 && self.load == Load::default()
    }
}

/// Places of reads behind those that came first.
const BEHIND: u64 = 1 << 63;

/// The waiting reads, by name, by place in their queue, and by deadline.
#[derive(Debug, Clone, Default)]
pub(super) struct Reads {
    by_id: BTreeMap<ReadId, Read>,
    queue: BTreeMap<(Class, u64), ReadId>,
    deadlines: BTreeSet<(Instant, ReadId)>,
    next_place: u64,
    prefetch: usize,
    /// Reads of each class and layer; never zero.
    waiting_of: BTreeMap<(Class, DiffId), usize>,
}

impl Reads {
    /// Puts a read at the end of the queue of its class, or behind those that came `first`.
    pub(super) fn insert(&mut self, id: ReadId, mut read: Read, first: bool) {
        read.place = self.next_place | if first { 0 } else { BEHIND };
        self.next_place += 1;
        self.prefetch += usize::from(read.class == Class::Prefetch);
        *self.waiting_of.entry((read.class, read.layer)).or_default() += 1;
        self.queue.insert((read.class, read.place), id);
        self.deadlines.insert((read.deadline, id));
        self.by_id.insert(id, read);
    }

    pub(super) fn remove(&mut self, id: ReadId) -> Option<Read> {
        let read = self.by_id.remove(&id)?;
        self.prefetch -= usize::from(read.class == Class::Prefetch);
        if let Some(count) = self.waiting_of.get_mut(&(read.class, read.layer)) {
            *count -= 1;
            if *count == 0 {
                self.waiting_of.remove(&(read.class, read.layer));
            }
        }
        self.queue.remove(&(read.class, read.place));
        self.deadlines.remove(&(read.deadline, id));
        Some(read)
    }

    pub(super) fn get(&self, id: ReadId) -> Option<&Read> {
        self.by_id.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: ReadId) -> Option<&mut Read> {
        self.by_id.get_mut(&id)
    }

    /// The first read of `class` at or after `place`.
    pub(super) fn at_or_after(&self, class: Class, place: u64) -> Option<(u64, ReadId)> {
        self.queue.range((class, place)..=(class, u64::MAX)).next().map(|((_, place), id)| (*place, *id))
    }

    /// The reads of `class` at or after `place`, in order.
    pub(super) fn queued_from(&self, class: Class, place: u64) -> impl Iterator<Item = &Read> {
        let range: Range<_> = (class, place)..(class, u64::MAX);
        self.queue.range(range).filter_map(|(_, id)| self.by_id.get(id))
    }

    /// The prefetch read that came last.
    pub(super) fn last_prefetch(&self) -> Option<ReadId> {
        self.queue.range((Class::Prefetch, 0)..).next_back().map(|(_, id)| *id)
    }

    pub(super) fn first_deadline(&self) -> Option<(Instant, ReadId)> {
        self.deadlines.first().copied()
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn prefetch_len(&self) -> usize {
        self.prefetch
    }

    /// Layers that reads of `class` wait for.
    pub(super) fn layers(&self, class: Class) -> impl Iterator<Item = DiffId> {
        self.waiting_of.keys().filter(move |(other, _)| *other == class).map(|(_, layer)| *layer)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (ReadId, &Read)> {
        self.by_id.iter().map(|(id, read)| (*id, read))
    }
}
