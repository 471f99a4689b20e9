//! What is known of each peer, and the choice among several.
//!
//! The peer with the lowest expected completion time is asked: its smoothed latency, plus the bytes that it still owes
//! us and the new ones at its smoothed cost per KiB. Once in a while any other is taken, so that a peer which was slow
//! once is measured again. Integers only; time and randomness are arguments.
//!
//! Members of the cluster may be asked without a connection: one is made then. So may those that an owner has named.
//!
//! A peer that fails rests (backoff with full jitter); one that is busy rests as long as it says; one that sends wrong
//! bytes is banned for a while, and stays banned when its connection comes back.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use crate::class::{Backoff, Class};
use crate::event::{PeerNo, PeerView};
use crate::limits::{Limits, Load};
use crate::members::{Members, mix};
use crate::rng::Rng;
use crate::time::{Duration, Instant, nanos};

/// Whether a peer may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// Now.
    Ready,
    /// When one of its asks ends.
    Full,
    /// It said when it will have time.
    Busy(Instant),
    /// It failed and rests.
    Resting(Instant),
    /// Neither connected nor a member, or banned.
    Gone,
}

impl Readiness {
    /// When that changes by time alone.
    pub(crate) fn until(self) -> Option<Instant> {
        match self {
            Self::Busy(until) | Self::Resting(until) => Some(until),
            Self::Ready | Self::Full | Self::Gone => None,
        }
    }
}

/// How often the rest of a peer that is silent or slow is doubled: it ends at sixteen times the first.
const DOUBLINGS_MAX: u32 = 4;

#[derive(Debug, Clone)]
struct Peer {
    up: bool,
    /// An owner has named it.
    named: bool,
    latency_ns: u32,
    cost_ns_per_kib: u32,
    /// KiB of all asks under way.
    owed_kib: u32,
    load: Load,
    /// The last sign of life.
    heard_at: Instant,
    brought: Brought,
    /// Most peers of a large cluster never are any.
    trouble: Option<Box<Trouble>>,
}

/// Why a peer is not asked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Trouble {
    backoff: Backoff,
    busy_until: Instant,
    banned_until: Option<Instant>,
    /// A member whose connection was lost, or that was silent, rests until then.
    lost_until: Instant,
    /// How often in a row it was silent.
    silences: u32,
    /// It left a reader waiting for what it has, and rests until then; and how often.
    slow_until: Instant,
    slow: u32,
}

impl Trouble {
    fn is_over(&self, now: Instant) -> bool {
        let until =
            self.busy_until.max(self.lost_until).max(self.slow_until).max(self.banned_until.unwrap_or_default());
        until <= now && self.backoff.resting(now).is_none()
    }
}

/// What came from a peer lately.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Brought {
    /// The period, by its number since the clock's zero, in which something came last.
    period: u32,
    /// KiB of that period, and of the one before it; less than one counts as one.
    kib: u32,
    before_kib: u32,
}

impl Brought {
    fn add(&mut self, period: u32, bytes: u64) {
        let before_kib = self.before(period);
        let so_far = if self.period == period { self.kib } else { 0 };
        *self = Self { period, kib: so_far.saturating_add(kib(bytes)), before_kib };
    }

    /// KiB of the period before `period`.
    fn before(&self, period: u32) -> u32 {
        match period.saturating_sub(self.period) {
            0 => self.before_kib,
            1 => self.kib,
            _ => 0,
        }
    }

    /// KiB of `period` and the one before it.
    fn lately(&self, period: u32) -> u32 {
        self.before(period).saturating_add(if self.period == period { self.kib } else { 0 })
    }
}

/// The period of [`Brought`]: as long as a reader waits for a peer that says nothing.
fn period(now: Instant, limits: &Limits) -> u32 {
    short(now.0 / nanos(limits.rank_wait_min).max(1))
}

/// A number that a record of a peer has four bytes for: there are thousands of records.
fn short(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// One step of [`smooth`] for such a number.
fn smooth_short(average: &mut u32, sample: u64) {
    let mut smoothed = u64::from(*average);
    smooth(&mut smoothed, sample);
    *average = short(smoothed);
}

impl Peer {
    fn new(limits: &Limits) -> Self {
        Self {
            up: false,
            named: false,
            latency_ns: short(nanos(limits.peer_latency)),
            cost_ns_per_kib: short(nanos(limits.peer_cost_per_kib)),
            load: Load::default(),
            owed_kib: 0,
            heard_at: Instant::ZERO,
            brought: Brought::default(),
            trouble: None,
        }
    }

    /// Its trouble, to note some.
    fn trouble(&mut self) -> &mut Trouble {
        self.trouble.get_or_insert_default()
    }

    /// Ends some of its trouble.
    fn mend(&mut self, mend: impl FnOnce(&mut Trouble)) {
        if let Some(trouble) = &mut self.trouble {
            mend(trouble);
            if **trouble == Trouble::default() {
                self.trouble = None;
            }
        }
    }

    /// Whether it must be remembered: it is banned, or asks are under way.
    fn is_owed_to(&self, now: Instant) -> bool {
        self.is_banned(now) || self.load != Load::default()
    }

    fn is_banned(&self, now: Instant) -> bool {
        let until = self.trouble.as_ref().and_then(|trouble| trouble.banned_until);
        until.is_some_and(|until| until > now)
    }

    fn lost_until(&self) -> Instant {
        self.trouble.as_ref().map_or(Instant::ZERO, |trouble| trouble.lost_until)
    }

    fn silences(&self) -> u32 {
        self.trouble.as_ref().map_or(0, |trouble| trouble.silences)
    }

    fn expected_ns(&self, kib: u32) -> u64 {
        let owed_kib = u64::from(self.owed_kib) + u64::from(kib);
        u64::from(self.latency_ns).saturating_add(u64::from(self.cost_ns_per_kib).saturating_mul(owed_kib))
    }
}

/// The time that nine in ten samples keep, followed step by step (Ma, Muthukrishnan, Sandler 2013, with steps that are a
/// share of the value): no samples are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct P90 {
    ns: u64,
}

impl P90 {
    /// Samples above the value raise it nine times as much as samples below it lower it.
    fn add(&mut self, sample: Duration) {
        let step = (self.ns / 128).max(1_000);
        if nanos(sample) > self.ns {
            self.ns = self.ns.saturating_add(step * 9 / 2);
        } else {
            self.ns = self.ns.saturating_sub(step / 2);
        }
    }
}

/// How long a peer that sends may pause between two chunks: the mean and four mean deviations, as TCP bounds its round trips
/// (RFC 6298). Links that are shared by many make it long for all of them, one slow peer only for some samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Pauses {
    mean_ns: u64,
    deviation_ns: u64,
}

impl Pauses {
    fn add(&mut self, pause: Duration) {
        let pause = nanos(pause);
        let off = self.mean_ns.abs_diff(pause);
        self.deviation_ns = self.deviation_ns - self.deviation_ns / 4 + off / 4;
        smooth(&mut self.mean_ns, pause);
    }

    fn bound(&self) -> Duration {
        Duration::from_nanos(self.mean_ns.saturating_add(self.deviation_ns.saturating_mul(4)))
    }
}

/// Silences of peers that follow on each other: as when a network parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Silences {
    /// Who was heard of since then is not behind the same fault.
    since: Instant,
    /// When they are over, unless there is another one.
    until: Instant,
}

/// Hashes the driver's own numbers, which nobody else chooses.
#[derive(Debug, Clone, Copy, Default)]
struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u32(u32::from(*byte)));
    }

    fn write_u32(&mut self, number: u32) {
        self.0 = mix(self.0 ^ u64::from(number));
    }
}

/// Every pass asks for dozens of peers. Nothing depends on the order of the records.
type Records = HashMap<PeerNo, Peer, BuildHasherDefault<NumberHasher>>;

/// All peers. Beside the members at most [`Limits::peers`]: those that come beyond are not used. Of a member nothing is kept
/// until it is dealt with, and of about [`Limits::peers_met`] of them at most.
#[derive(Debug, Clone)]
pub struct Peers {
    records: Records,
    /// So many records there may be before some are forgotten, if that is more than [`Limits::peers_met`].
    room: usize,
    members: Arc<Members>,
    /// A member that was not dealt with.
    unmet: Peer,
    latency_p90: P90,
    pauses: Pauses,
    silences: Silences,
}

impl Default for Peers {
    fn default() -> Self {
        // As if peers were as quick as one that was never asked; a few dozen answers correct it.
        Self {
            records: Records::default(),
            room: 0,
            members: Arc::default(),
            unmet: Peer::new(&Limits::default()),
            latency_p90: P90 { ns: 10_000_000 },
            pauses: Pauses::default(),
            silences: Silences::default(),
        }
    }
}

/// KiB of `bytes`, at least one.
fn kib(bytes: u64) -> u32 {
    short(bytes.div_ceil(1024).max(1))
}

/// One step of a moving average with weight 1/8, as TCP smooths its round trips (RFC 6298).
pub(crate) fn smooth(average: &mut u64, sample: u64) {
    *average = average.saturating_sub(*average / 8).saturating_add(sample / 8);
}

impl Peers {
    /// Notes a connection. Says whether the peer is usable: known, and not banned.
    pub fn up(&mut self, peer: PeerNo, now: Instant, limits: &Limits) -> bool {
        let Some(record) = self.record(peer, now, limits) else { return false };
        (record.up, record.heard_at) = (true, now);
        record.mend(|trouble| (trouble.lost_until, trouble.silences) = (Instant::ZERO, 0));
        !record.is_banned(now)
    }

    /// Notes that an owner has named the peer. Says whether it can be asked.
    pub fn named(&mut self, peer: PeerNo, now: Instant, limits: &Limits) -> bool {
        let Some(record) = self.record(peer, now, limits) else { return false };
        // Whoever names it has heard of it.
        (record.named, record.heard_at) = (true, now);
        !record.is_banned(now)
    }

    /// Makes room for more records: of members that nothing is under way with and that are in no trouble, those that were heard of
    /// longest ago are forgotten.
    fn make_room(&mut self, now: Instant, limits: &Limits) {
        if self.records.len() < self.room.max(limits.peers_met) {
            return;
        }
        let fresh = Records::with_capacity_and_hasher(limits.peers_met, BuildHasherDefault::default());
        let records = std::mem::replace(&mut self.records, fresh);
        let may_go = |(peer, record): &(PeerNo, Peer)| {
            let is_well = record.trouble.as_ref().is_none_or(|trouble| trouble.is_over(now));
            is_well && record.load == Load::default() && self.members.contains(*peer)
        };
        let (mut going, kept): (Vec<_>, Vec<_>) = records.into_iter().partition(may_go);
        going.sort_unstable_by_key(|(peer, record)| (record.heard_at, *peer));
        // A quarter at a time, and not before another quarter has come, so that this is seldom done.
        let quarter = limits.peers_met / 4;
        going.drain(..quarter.min(going.len()));
        self.records.extend(kept.into_iter().chain(going));
        self.room = self.records.len() + quarter;
    }

    /// The record of a peer, if there is room for one.
    fn record(&mut self, peer: PeerNo, now: Instant, limits: &Limits) -> Option<&mut Peer> {
        self.make_room(now, limits);
        let most = limits.peers + self.members.len();
        if !self.records.contains_key(&peer) && self.records.len() >= most {
            let members = &self.members;
            let is_kept = |peer: &PeerNo, record: &Peer| record.up || members.contains(*peer) || record.is_owed_to(now);
            self.records.retain(|peer, record| is_kept(peer, record));
            if self.records.len() >= most {
                return None;
            }
        }
        Some(self.records.entry(peer).or_insert_with(|| Peer::new(limits)))
    }

    /// What is known of a peer; `None` for one that is neither a member nor remembered.
    fn seen(&self, peer: PeerNo) -> Option<&Peer> {
        self.records.get(&peer).or_else(|| self.members.contains(peer).then_some(&self.unmet))
    }

    /// The record of a peer that something is to be noted of; `None` for one that is neither a member nor remembered.
    fn met(&mut self, peer: PeerNo) -> Option<&mut Peer> {
        if !self.records.contains_key(&peer) && self.members.contains(peer) {
            self.records.insert(peer, self.unmet.clone());
        }
        self.records.get_mut(&peer)
    }

    /// Takes over the member list.
    pub fn set_members(&mut self, members: Arc<Members>, now: Instant, limits: &Limits) {
        (self.members, self.unmet) = (members, Peer::new(limits));
        let members = &self.members;
        let is_kept = |peer: &PeerNo, record: &Peer| {
            record.up || record.named || members.contains(*peer) || record.is_owed_to(now)
        };
        self.records.retain(|peer, record| is_kept(peer, record));
    }

    /// Whether the peer is in the member list.
    pub(crate) fn is_member(&self, peer: PeerNo) -> bool {
        self.members.contains(peer)
    }

    /// Number of members.
    pub(crate) fn member_count(&self) -> usize {
        self.members.len()
    }

    /// The time within which nine in ten peers send their first byte.
    pub fn latency_p90(&self) -> Duration {
        Duration::from_nanos(self.latency_p90.ns)
    }

    /// How long peers that send pause between two chunks, at most times.
    pub(crate) fn pause_bound(&self) -> Duration {
        self.pauses.bound()
    }

    /// Notes that a peer has gone on sending after `pause`.
    pub(crate) fn went_on(&mut self, pause: Duration) {
        self.pauses.add(pause);
    }

    /// Notes a lost connection. Keeps the record only of a member and of a banned peer. The caller has ended the peer's asks.
    pub fn down(&mut self, peer: PeerNo, now: Instant, limits: &Limits) {
        let Some(record) = self.met(peer) else { return };
        debug_assert_eq!(record.load, Load::default(), "{peer:?} went down with asks under way");
        (record.up, record.named) = (false, false);
        record.trouble().lost_until = now + limits.owner_rest;
        if !record.is_banned(now) && !self.members.contains(peer) {
            self.records.remove(&peer);
        }
    }

    /// Bans the peer.
    pub fn ban(&mut self, peer: PeerNo, until: Instant) {
        if let Some(record) = self.met(peer) {
            record.trouble().banned_until = Some(until);
        }
    }

    /// Whether the peer may be asked.
    pub fn readiness(&self, peer: PeerNo, class: Class, now: Instant, limits: &Limits) -> Readiness {
        let Some(record) = self.seen(peer) else { return Readiness::Gone };
        if record.is_banned(now) || !(record.up || record.named || self.is_member(peer)) {
            return Readiness::Gone;
        }
        if let Some(trouble) = &record.trouble {
            let rests = trouble.lost_until.max(trouble.slow_until);
            if rests > now {
                return Readiness::Resting(rests);
            }
            if let Some(until) = trouble.backoff.resting(now) {
                return Readiness::Resting(until);
            }
            if trouble.busy_until > now {
                return Readiness::Busy(trouble.busy_until);
            }
        }
        if record.load.has_room(class, &limits.peer) { Readiness::Ready } else { Readiness::Full }
    }

    /// The best of `candidates` for an ask of `bytes`; `None` when there are none.
    pub fn choose(
        &self,
        candidates: &[PeerNo],
        bytes: u64,
        class: Class,
        limits: &Limits,
        rng: &mut Rng,
    ) -> Option<PeerNo> {
        let explore_one_in = match class {
            Class::Demand => limits.explore_demand_one_in,
            Class::Prefetch => limits.explore_prefetch_one_in,
        };
        if candidates.len() > 1 && rng.one_in(explore_one_in) {
            return candidates.get(rng.below(candidates.len() as u64) as usize).copied();
        }
        // Equal peers share the work: the first of the best is taken from a random place on.
        let turn = rng.below(candidates.len() as u64) as usize;
        let rotated = candidates.iter().cycle().skip(turn).take(candidates.len());
        let expected = |peer: &&PeerNo| self.seen(**peer).map_or(u64::MAX, |peer| peer.expected_ns(kib(bytes)));
        rotated.min_by_key(expected).copied()
    }

    /// Notes an ask.
    pub(crate) fn asked(&mut self, peer: PeerNo, class: Class, bytes: u64) {
        if let Some(record) = self.met(peer) {
            record.load.add(class);
            record.owed_kib = record.owed_kib.saturating_add(kib(bytes));
        }
    }

    /// Notes the end of an ask, whatever it brought.
    pub(crate) fn ended(&mut self, peer: PeerNo, class: Class, bytes: u64) {
        if let Some(record) = self.records.get_mut(&peer) {
            record.load.sub(class);
            record.owed_kib = record.owed_kib.saturating_sub(kib(bytes));
        }
    }

    /// Learns from an answer: the first byte came after `latency`, all `bytes` after `elapsed`.
    pub(crate) fn answered(&mut self, peer: PeerNo, latency: Duration, elapsed: Duration, bytes: u64) {
        self.latency_p90.add(latency);
        if let Some(record) = self.records.get_mut(&peer) {
            record.mend(|trouble| {
                trouble.backoff.succeed();
                trouble.busy_until = Instant::ZERO;
            });
            smooth_short(&mut record.latency_ns, nanos(latency));
            let cost_ns = nanos(elapsed.saturating_sub(latency)) / u64::from(kib(bytes));
            smooth_short(&mut record.cost_ns_per_kib, cost_ns);
        }
    }

    /// Rests the peer after a failure.
    pub(crate) fn failed(
        &mut self,
        peer: PeerNo,
        now: Instant,
        sent: Instant,
        retry_after: Option<Duration>,
        limits: &Limits,
        rng: &mut Rng,
    ) {
        if let Some(record) = self.records.get_mut(&peer) {
            record.trouble().backoff.fail(now, sent, retry_after, &limits.peer_backoff, rng);
            // As slow as it would be if it had answered a moment later, and twice as slow the next time.
            let elapsed = nanos(now.since(sent));
            let slower = u64::from(record.latency_ns).saturating_mul(2).max(elapsed);
            record.latency_ns = short(slower.min(nanos(limits.peer_latency_max)));
        }
    }

    /// Notes that the peer gave no sign of life: as with a lost connection, it is asked again after a while, which doubles
    /// as long as it goes on so.
    pub(crate) fn silent(&mut self, peer: PeerNo, now: Instant, limits: &Limits) {
        let record = self.records.get_mut(&peer);
        // Of one that was silent before and has said nothing since, it is the same silence.
        if now >= self.silences.until && record.as_ref().is_none_or(|record| record.silences() == 0) {
            self.silences.since = now - limits.doubt_silence;
        }
        self.silences.until = now + limits.doubt;
        if let Some(trouble) = record.filter(|record| record.lost_until() <= now).map(Peer::trouble) {
            trouble.lost_until = now + limits.owner_rest * (1 << trouble.silences);
            trouble.silences = (trouble.silences + 1).min(DOUBLINGS_MAX);
        }
    }

    /// Notes a sign of life. Says whether it ends the rest of a peer that was silent.
    pub(crate) fn alive(&mut self, peer: PeerNo, now: Instant) -> bool {
        let Some(record) = self.met(peer) else { return false };
        record.heard_at = now;
        let was_silent = record.silences() > 0;
        if was_silent {
            record.mend(|trouble| (trouble.lost_until, trouble.silences) = (Instant::ZERO, 0));
        }
        was_silent
    }

    /// Whether the peer may be gone as well: others are silent, and nothing was heard of this one since they are. When a network
    /// parts, those of the other side would else be tried one after the other.
    pub(crate) fn is_doubtful(&self, peer: PeerNo, now: Instant) -> bool {
        let heard = || self.records.get(&peer).map_or(Instant::ZERO, |record| record.heard_at);
        now < self.silences.until && heard() < self.silences.since && !self.members.is_empty()
    }

    /// Whether the peer rests because its connection was lost or it was silent, and nothing was heard of it since.
    pub(crate) fn is_lost(&self, peer: PeerNo, now: Instant) -> bool {
        self.records.get(&peer).is_some_and(|record| record.lost_until() > now)
    }

    /// When doubts end by themselves.
    pub(crate) fn doubts_end(&self) -> Instant {
        self.silences.until
    }

    /// Notes that chunks came from the peer, for whichever ask.
    pub(crate) fn brought(&mut self, peer: PeerNo, now: Instant, bytes: u64, limits: &Limits) {
        if let Some(record) = self.records.get_mut(&peer) {
            record.brought.add(period(now, limits), bytes);
        }
    }

    /// Whether the peer has brought as much as a demand ask wants within the last one or two waits for a rank: what it has not
    /// sent yet stands in line behind that.
    pub(crate) fn is_sending(&self, peer: PeerNo, now: Instant, limits: &Limits) -> bool {
        self.brought_lately_kib(peer, now, limits) >= kib(limits.peer_size.demand_bytes)
    }

    /// Whether the peer has brought anything within the last one or two waits for a rank.
    pub(crate) fn sends_something(&self, peer: PeerNo, now: Instant, limits: &Limits) -> bool {
        self.brought_lately_kib(peer, now, limits) > 0
    }

    fn brought_lately_kib(&self, peer: PeerNo, now: Instant, limits: &Limits) -> u32 {
        self.records.get(&peer).map_or(0, |record| record.brought.lately(period(now, limits)))
    }

    /// Notes that the peer lives and leaves a reader waiting for what it has.
    pub(crate) fn slow(&mut self, peer: PeerNo, now: Instant, limits: &Limits) {
        let trouble = self.records.get_mut(&peer).map(Peer::trouble);
        if let Some(trouble) = trouble.filter(|trouble| trouble.slow_until <= now) {
            if now.since(trouble.slow_until) > limits.claim_patience {
                trouble.slow = 0;
            }
            trouble.slow_until = now + limits.owner_rest * (1 << trouble.slow);
            trouble.slow = (trouble.slow + 1).min(DOUBLINGS_MAX);
        }
    }

    /// Rests the peer for as long as it asked for, within bounds.
    pub(crate) fn busy(&mut self, peer: PeerNo, now: Instant, retry_after: Duration, limits: &Limits) {
        if let Some(trouble) = self.records.get_mut(&peer).map(Peer::trouble) {
            let until = now + retry_after.clamp(limits.busy_min, limits.busy_max);
            trouble.busy_until = trouble.busy_until.max(until);
        }
    }

    /// Whether any peer could have something.
    pub fn any_up(&self, now: Instant) -> bool {
        self.records.values().any(|record| record.up && !record.is_banned(now))
    }

    /// Whether the peer is connected, a member or named, and not banned.
    pub fn is_usable(&self, peer: PeerNo, now: Instant) -> bool {
        match self.records.get(&peer) {
            Some(record) => (record.up || record.named || self.is_member(peer)) && !record.is_banned(now),
            None => self.is_member(peer),
        }
    }

    /// Whether there is a connection to the peer.
    pub fn is_up(&self, peer: PeerNo) -> bool {
        self.records.get(&peer).is_some_and(|record| record.up)
    }

    /// The peer as it is seen, without what it holds; `None` for one that is not remembered.
    pub(crate) fn view(&self, peer: PeerNo, now: Instant) -> Option<PeerView> {
        let record = self.seen(peer)?;
        let trouble = record.trouble.as_deref().cloned().unwrap_or_default();
        let rests = trouble.backoff.resting(now).unwrap_or_default().max(trouble.busy_until).max(trouble.lost_until);
        let rests = rests.max(trouble.slow_until);
        Some(PeerView {
            latency: Duration::from_nanos(record.latency_ns.into()),
            cost_per_kib: Duration::from_nanos(record.cost_ns_per_kib.into()),
            asks: (record.load.demand + record.load.prefetch) as usize,
            holds: 0,
            rests: rests.since(now),
            banned: trouble.banned_until.unwrap_or_default().since(now),
        })
    }

    /// Connected peers, and banned ones.
    pub fn counts(&self, now: Instant) -> (usize, usize) {
        let up = self.records.values().filter(|record| record.up).count();
        (up, self.records.values().filter(|record| record.is_banned(now)).count())
    }

    /// The asks under way at a peer.
    pub fn load(&self, peer: PeerNo) -> Load {
        self.records.get(&peer).map(|record| record.load).unwrap_or_default()
    }

    /// Number of remembered peers.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether no peer is remembered.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::members::{Member, ZoneNo};

    const A: PeerNo = PeerNo(1);
    const B: PeerNo = PeerNo(2);
    const NOW: Instant = Instant(1_000_000_000);

    fn limits() -> Limits {
        Limits { explore_demand_one_in: 0, explore_prefetch_one_in: 0, ..Limits::default() }
    }

    fn list(peers: &[PeerNo]) -> Arc<Members> {
        let member = |peer: &PeerNo| Member { peer: *peer, key: 0, zone: ZoneNo(0), eligible: true };
        Arc::new(Members::new(1, PeerNo(99), peers.iter().map(member).collect()))
    }

    fn two() -> Peers {
        let mut peers = Peers::default();
        assert!(peers.up(A, NOW, &limits()) && peers.up(B, NOW, &limits()));
        peers
    }

    fn share_of_a(peers: &Peers, limits: &Limits, class: Class) -> usize {
        let mut rng = Rng::new(9);
        (0..1000).filter(|_| peers.choose(&[A, B], 65_536, class, limits, &mut rng) == Some(A)).count()
    }

    #[test]
    fn the_quicker_peer_is_chosen_and_equals_share() {
        let mut peers = two();
        let even = share_of_a(&peers, &limits(), Class::Demand);
        assert!((400..600).contains(&even), "{even} of 1000");
        for _ in 0..20 {
            peers.answered(A, Duration::from_millis(50), Duration::from_millis(60), 65_536);
            peers.answered(B, Duration::from_millis(1), Duration::from_millis(2), 65_536);
        }
        assert_eq!(share_of_a(&peers, &limits(), Class::Demand), 0);
        let exploring = Limits::default();
        let explored = share_of_a(&peers, &exploring, Class::Prefetch);
        assert!((10..80).contains(&explored), "{explored} of 1000, about 31 expected");
        let explored = share_of_a(&peers, &exploring, Class::Demand);
        assert!((1..30).contains(&explored), "{explored} of 1000, about 8 expected");
    }

    #[test]
    fn what_a_peer_owes_makes_it_slower() {
        let mut peers = two();
        peers.asked(A, Class::Demand, 1 << 20);
        assert_eq!(share_of_a(&peers, &limits(), Class::Demand), 0);
        peers.ended(A, Class::Demand, 1 << 20);
        assert!(share_of_a(&peers, &limits(), Class::Demand) > 0);
    }

    #[test]
    fn readiness_follows_load_rest_and_ban() {
        let limits = limits();
        let mut rng = Rng::new(1);
        let mut peers = two();
        assert_eq!(peers.readiness(PeerNo(9), Class::Demand, NOW, &limits), Readiness::Gone);
        for _ in 0..limits.peer.asks - limits.peer.reserved_for_demand {
            assert_eq!(peers.readiness(A, Class::Prefetch, NOW, &limits), Readiness::Ready);
            peers.asked(A, Class::Prefetch, 1);
        }
        assert_eq!(peers.readiness(A, Class::Prefetch, NOW, &limits), Readiness::Full);
        assert_eq!(peers.readiness(A, Class::Demand, NOW, &limits), Readiness::Ready);
        peers.busy(A, NOW, Duration::from_millis(20), &limits);
        let until = NOW + Duration::from_millis(20);
        assert_eq!(peers.readiness(A, Class::Demand, NOW, &limits), Readiness::Busy(until));
        assert_eq!(peers.readiness(A, Class::Demand, until, &limits), Readiness::Ready);
        peers.failed(B, NOW, NOW, Some(Duration::from_secs(3)), &limits, &mut rng);
        assert_eq!(peers.readiness(B, Class::Demand, NOW, &limits), Readiness::Resting(NOW + Duration::from_secs(3)));
        peers.answered(B, Duration::ZERO, Duration::ZERO, 1);
        assert_eq!(peers.readiness(B, Class::Demand, NOW, &limits), Readiness::Ready);
    }

    #[test]
    fn a_ban_outlives_the_connection_and_then_ends() {
        let limits = limits();
        let mut peers = two();
        let until = NOW + limits.ban;
        peers.ban(A, until);
        assert_eq!(peers.counts(NOW), (2, 1));
        peers.down(A, NOW, &limits);
        assert!(!peers.up(A, NOW, &limits));
        assert_eq!(peers.readiness(A, Class::Demand, NOW, &limits), Readiness::Gone);
        assert_eq!(peers.readiness(A, Class::Demand, until, &limits), Readiness::Ready);
        assert_eq!(peers.counts(until), (2, 0));
    }

    #[test]
    fn members_can_be_asked_without_a_connection_and_keep_what_is_known_of_them() {
        let limits = limits();
        let mut peers = Peers::default();
        let ready = |peers: &Peers, peer| peers.readiness(peer, Class::Demand, NOW, &limits);
        peers.set_members(list(&[A, B]), NOW, &limits);
        assert_eq!((ready(&peers, A), peers.is_up(A)), (Readiness::Ready, false));
        peers.ban(A, NOW + limits.ban);
        assert_eq!(ready(&peers, A), Readiness::Gone);
        peers.up(B, NOW, &limits);
        peers.down(B, NOW, &limits);
        assert_eq!(ready(&peers, B), Readiness::Resting(NOW + limits.owner_rest), "it may be gone");
        assert_eq!(ready(&peers, PeerNo(3)), Readiness::Gone);
        assert!(peers.named(PeerNo(3), NOW, &limits));
        assert_eq!(ready(&peers, PeerNo(3)), Readiness::Ready);
        peers.set_members(list(&[PeerNo(3)]), NOW, &limits);
        assert_eq!(peers.len(), 2, "the banned one and the member");
        let many: Vec<PeerNo> = (10..10_000).map(PeerNo).collect();
        peers.set_members(list(&many), NOW, &limits);
        assert_eq!(
            (peers.len(), ready(&peers, PeerNo(77))),
            (2, Readiness::Ready),
            "nothing is kept of members that were not met"
        );
        peers.asked(PeerNo(77), Class::Demand, 1);
        assert_eq!((peers.len(), peers.load(PeerNo(77)).demand), (3, 1));
    }

    /// Of 10,000 nodes that start at once each meets thousands, and records of them took a sixth of the simulation's memory.
    #[test]
    fn members_that_have_been_quiet_for_longest_are_forgotten_unless_something_is_owed_or_wrong() {
        let limits = limits();
        let mut peers = Peers::default();
        let many: Vec<PeerNo> = (1..10_000).map(PeerNo).collect();
        peers.set_members(list(&many), NOW, &limits);
        let at = |no: u32| NOW + Duration::from_millis(u64::from(no));
        let (asked, banned, quiet) = (PeerNo(1), PeerNo(2), PeerNo(3));
        for peer in &many {
            assert!(peers.up(*peer, at(peer.0), &limits));
            match *peer {
                peer if peer == asked => peers.asked(peer, Class::Demand, 1),
                peer if peer == banned => peers.ban(peer, at(20_000)),
                _ => {}
            }
            assert!(peers.len() <= limits.peers_met, "{}", peers.len());
        }
        let now = at(10_000);
        assert_eq!((peers.load(asked).demand, peers.is_up(quiet)), (1, false));
        assert_eq!(peers.readiness(banned, Class::Demand, now, &limits), Readiness::Gone);
        assert!((9_500..10_000).all(|no| peers.is_up(PeerNo(no))), "those that were heard of last are known");
        assert_eq!(peers.readiness(quiet, Class::Demand, now, &limits), Readiness::Ready, "as one that was never met");
        peers.down(quiet, now, &limits);
        assert_eq!(peers.readiness(quiet, Class::Demand, now, &limits), Readiness::Resting(now + limits.owner_rest));
    }

    #[test]
    fn the_p90_is_followed() {
        let mut peers = two();
        let mut rng = Rng::new(3);
        for _ in 0..4000 {
            let latency = Duration::from_micros(rng.below(100_000));
            peers.answered(A, latency, latency, 1);
        }
        let p90 = peers.latency_p90().as_millis();
        assert!((75..100).contains(&p90), "{p90} ms");
    }

    #[test]
    fn pauses_are_followed_within_a_few_samples_both_ways() {
        let mut peers = two();
        assert_eq!(peers.pause_bound(), Duration::ZERO, "nothing was seen");
        peers.went_on(Duration::from_millis(190));
        assert!(peers.pause_bound() > Duration::from_millis(190));
        (0..40).for_each(|_| peers.went_on(Duration::from_millis(1)));
        assert!(peers.pause_bound() < Duration::from_millis(10), "{:?}", peers.pause_bound());
    }

    #[test]
    fn one_silence_makes_those_doubtful_of_whom_nothing_was_heard() {
        let (limits, mut peers) = (limits(), two());
        peers.set_members(list(&[A, B, PeerNo(3)]), NOW, &limits);
        let later = NOW + Duration::from_secs(5);
        peers.alive(B, later);
        assert!(!peers.is_doubtful(PeerNo(3), later), "nobody was silent");
        peers.silent(A, later, &limits);
        assert!(peers.is_doubtful(PeerNo(3), later));
        assert!(!peers.is_doubtful(B, later), "it was heard of");
        assert!(!peers.is_doubtful(PeerNo(3), later + limits.doubt), "and not for ever");
    }

    #[test]
    fn a_peer_is_sending_while_it_brings_a_demand_ask_in_two_periods() {
        let (limits, mut peers) = (limits(), two());
        let (period, enough) = (limits.rank_wait_min, limits.peer_size.demand_bytes);
        assert!(!peers.is_sending(A, NOW, &limits));
        peers.brought(A, NOW, enough / 2, &limits);
        peers.brought(A, NOW + period, enough / 2, &limits);
        assert!(peers.is_sending(A, NOW + period, &limits) && !peers.is_sending(B, NOW + period, &limits));
        assert!(!peers.is_sending(A, NOW + period * 2, &limits), "half of it is too long ago");
        peers.brought(A, NOW + period * 2, enough / 2, &limits);
        assert!(peers.is_sending(A, NOW + period * 2, &limits));
        assert!(!peers.is_sending(A, NOW + period * 4, &limits));
    }

    #[test]
    fn the_table_is_bounded() {
        let limits = Limits { peers: 2, ..limits() };
        let mut peers = two();
        assert!(!peers.up(PeerNo(3), NOW, &limits));
        peers.down(A, NOW, &limits);
        assert!(peers.up(PeerNo(3), NOW, &limits));
        assert_eq!(peers.len(), 2);
        peers.ban(B, NOW + Duration::from_secs(1));
        peers.down(B, NOW, &limits);
        assert!(!peers.up(A, NOW, &limits), "the banned one is remembered");
        assert!(peers.up(A, NOW + Duration::from_secs(1), &limits), "until the ban ends");
    }
}
