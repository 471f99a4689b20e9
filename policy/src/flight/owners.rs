//! What a node does about chunks that nobody is known to have: the owner of their extent is asked, and the registry only by
//! whose turn it is.
//!
//! For each extent the owners of the asker's zone are asked in order of rank, then (by whoever acts for the zone) those of
//! the whole cluster; with one zone there is only the second step. Whoever finds itself in the list is the one to go on: as
//! rank *i* after *i* times the rank wait, so that a higher rank that is merely slow is not overtaken at once. When nothing is
//! heard of any of them, the first behind them of whom something is heard stands in. Whoever is neither and reaches none waits
//! as long as the rank behind the last unless all are silent, and is bounded in number.
//!
//! So the registry sees an extent once while lists agree and owners live; a lost owner costs one rank wait and at most what
//! it had read of the extent; two views of the cluster cost one reading each.
//!
//! An owner may leave the reading to the asker ([`Event::AskDelegated`](crate::event::Event)): then the asker is the one to go
//! on for these chunks until [`Limits::claim_patience`](crate::limits::Limits) has passed.

use std::collections::BTreeMap;

use hermes_image::ids::{ChunkRange, DiffId};
use hermes_image::runs::Runs;

use super::asking::Question;
use super::schedule::Need;
use super::shape::cut_chunks;
use super::table::Ask;
use super::{Flight, Turn};
use crate::class::{Class, ErrorClass};
use crate::event::{AskId, PeerNo, Reason, Source, Want};
use crate::limits::Limits;
use crate::members::Duty;
use crate::peers::Readiness;
use crate::time::Instant;

/// Questions to the owners of an extent after which there are pauses between them, unless they bring something.
const ASKED_MAX: u32 = 16;
/// Owners that failed, remembered for one extent.
const FAILED_MAX: usize = 8;

/// What is under way to get chunks of one extent that nobody is known to have.
#[derive(Debug, Clone, Default)]
pub(super) struct Quest {
    /// When its first chunk was wanted.
    since: Instant,
    used: Instant,
    /// Questions to owners since something came, and when the last was asked.
    asked: u32,
    asked_at: Instant,
    /// A start on an image of 10 GB has thousands of quests, and most of them are never told anything.
    told: Option<Box<Told>>,
}

/// What came of the questions to the owners of an extent, but for chunks and names of holders.
#[derive(Debug, Clone, Default)]
struct Told {
    /// Owners that are passed over, and until when.
    failed: Vec<(PeerNo, Instant)>,
    /// What this node was told to get itself: from the owner among all, and from the registry.
    for_zone: Runs,
    for_cluster: Runs,
    delegated_until: Instant,
    /// Nobody has left it to this node: no owner could be reached.
    nobody_owns: bool,
    /// What those whom the owner named did not have.
    vain: Runs,
}

impl Told {
    fn fail(&mut self, peer: PeerNo, until: Instant) {
        self.failed.retain(|(other, _)| *other != peer);
        if self.failed.len() >= FAILED_MAX {
            self.failed.remove(0);
        }
        self.failed.push((peer, until));
    }

    fn is_over(&self, now: Instant) -> bool {
        self.vain.is_empty() && self.delegated_until <= now && self.failed.iter().all(|(_, until)| *until <= now)
    }
}

impl Quest {
    fn told(&mut self) -> &mut Told {
        self.told.get_or_insert_default()
    }

    fn has_failed(&self, peer: PeerNo, now: Instant) -> bool {
        let mut failed = self.told.iter().flat_map(|told| &told.failed);
        failed.any(|(other, until)| *other == peer && *until > now)
    }

    /// What owners have left to this node, while that holds.
    fn delegated(&self, now: Instant) -> Option<&Told> {
        self.told.as_deref().filter(|told| told.delegated_until > now)
    }

    /// What of `wanted` those whom the owner named did not have.
    fn vain(&self, wanted: &Runs) -> Runs {
        self.told.as_ref().map(|told| wanted.intersection(&told.vain)).unwrap_or_default()
    }

    /// Whether nothing is left to be remembered of it.
    fn is_over(&self, now: Instant) -> bool {
        self.asked == 0 && self.told.as_ref().is_none_or(|told| told.is_over(now))
    }
}

/// The quests of one layer, by the first chunk of their extents.
pub(super) type Quests = BTreeMap<u32, Quest>;

/// Asks of the registry that need no turn, so many a second.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Unowned {
    second: u64,
    asked: u32,
}

impl Unowned {
    fn may_ask(&self, now: Instant, limits: &Limits) -> bool {
        self.second != second(now) || self.asked < limits.unowned_asks_per_second
    }

    fn asked(&mut self, now: Instant) {
        if self.second != second(now) {
            *self = Self { second: second(now), asked: 0 };
        }
        self.asked += 1;
    }
}

/// What was asked last of what has come from the registry by now: of the two sources of which that is latest, when it was asked.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Readings {
    latest: Option<(Source, Instant)>,
    other: Option<(Source, Instant)>,
}

impl Readings {
    /// Notes that an ask brings something, if it is read from the registry.
    pub(super) fn note(&mut self, ask: &Ask) {
        let by_owner = ask.was_pending && matches!(ask.want, Want::Owner { .. });
        if ask.source != Source::Origin && !by_owner {
            return;
        }
        let reading = Some((ask.source, ask.sent));
        match self.latest {
            Some((source, sent)) if source == ask.source => self.latest = Some((source, sent.max(ask.sent))),
            Some((_, sent)) if sent > ask.sent => {
                self.other = self.other.filter(|(_, other)| *other > ask.sent).or(reading);
            }
            _ => (self.latest, self.other) = (reading, self.latest),
        }
    }

    /// Whether an owner that reads for `ask` was overtaken by a reading of another that began later.
    pub(super) fn overtake(&self, ask: &Ask) -> bool {
        let since = ask.progress_at();
        let readings = self.latest.into_iter().chain(self.other);
        matches!(ask.want, Want::Owner { .. })
            && readings.into_iter().any(|(source, sent)| source != ask.source && sent > since)
    }
}

fn second(now: Instant) -> u64 {
    now.0 / 1_000_000_000
}

/// What is done about an extent next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// This owner is asked.
    Ask(PeerNo, Duty),
    /// It is this node's turn.
    Origin,
    /// Something changes then.
    Wait(Instant),
    /// This owner has said that it will have time then.
    WaitFor(PeerNo, Instant),
    /// Something changes when an ask ends: one of this owner, if one is named.
    Later(Option<PeerNo>),
    /// Others rely on this node as an owner, and it cannot read the registry: they have to know.
    Refuse,
}

/// What the owners of one duty lead to.
enum Stage {
    Step(Step),
    /// It is this node's turn.
    Mine,
    /// None of them can be asked, nor any of those who stand in for them.
    Out {
        /// Nothing is heard of any of them, while others are found silent: none of them reads.
        lost: bool,
    },
}

impl Flight {
    /// Asks the owners of what is wanted, as far as it is not this node's turn. Takes out of `wanted` what has to wait, and
    /// leaves what the registry may be asked for, with the extents that this turn is for; `None` when others who rely on it have
    /// to be told that it cannot be had here.
    pub(super) fn ask_owners(&mut self, need: &Need, wanted: &mut Runs, turn: &mut Turn<'_>) -> Option<Runs> {
        let mut mine = Runs::new();
        let mut left = std::mem::take(wanted);
        while let Some(run) = left.first() {
            let Some(extent) = self.extent_of(need.layer, run.start) else { break };
            let mut here = left.within(extent.clone());
            left.remove_all(&here);
            let free = self.delegated(need.layer, &extent, Duty::Cluster, turn.now).intersection(&here);
            if !free.is_empty() && self.can_read(need.layer) {
                mine.insert(extent.clone());
                wanted.insert_all(&free);
                here.remove_all(&free);
            }
            while !here.is_empty() {
                match self.step(need, &extent, &here, turn.now) {
                    Step::Ask(peer, duty) => {
                        let asked = self.ask_owner(need, peer, duty, &extent, &here, turn);
                        here.remove_all(&asked);
                        continue;
                    }
                    Step::Origin => {
                        self.look_to_delegates(need, &extent, &mut here, turn.now);
                        if here.is_empty() {
                            break;
                        }
                        mine.insert(extent.clone());
                        wanted.insert_all(&here);
                    }
                    Step::Wait(at) => self.wake_at(at),
                    Step::WaitFor(owner, at) => {
                        self.wake_for_peer(at);
                        self.note_taken(need, owner, &here);
                    }
                    Step::Later(Some(owner)) => self.note_taken(need, owner, &here),
                    Step::Later(None) => {}
                    Step::Refuse => return None,
                }
                break;
            }
        }
        Some(mine)
    }

    /// Notes what waits for an owner that cannot be asked now.
    fn note_taken(&mut self, need: &Need, owner: PeerNo, chunks: &Runs) {
        if need.class == Class::Prefetch {
            self.taken_owners.entry(owner).or_default().insert_all(chunks);
        }
    }

    /// It is this node's turn, but it has left some of the chunks to others: these are asked first. Takes them out of
    /// `wanted`.
    fn look_to_delegates(&mut self, need: &Need, extent: &ChunkRange, wanted: &mut Runs, now: Instant) {
        if need.acts_for.is_some() {
            return;
        }
        let limits = &self.limits;
        let found = self.desk.delegates(need.layer, extent, now, limits);
        let found: Vec<(PeerNo, Runs)> = found.map(|(peer, chunks)| (peer, wanted.intersection(chunks))).collect();
        let Some(record) = self.layers.get_mut(&need.layer) else { return };
        for (peer, chunks) in found {
            let can_say = matches!(
                self.peers.readiness(peer, need.class, now, limits),
                Readiness::Ready | Readiness::Full | Readiness::Busy(_)
            );
            let was_named =
                record.holders.get(&peer).is_some_and(|holder| chunks.difference(&holder.promised).is_empty());
            let asked_in_vain = record.quests.get(&extent.start).is_some_and(|quest| !quest.vain(&chunks).is_empty());
            if chunks.is_empty() || !can_say || was_named || asked_in_vain {
                continue;
            }
            record.named_holder(peer, self.members.is_far(peer), now, limits).promised.insert_all(&chunks);
            record.look_again(&chunks);
            wanted.remove_all(&chunks);
            self.dirty = true;
        }
    }

    /// The extent of a chunk, in a swarm and while the layer's spans are known.
    fn extent_of(&self, layer: DiffId, chunk: u32) -> Option<ChunkRange> {
        self.layers.get(&layer)?.geometry.extent_of(chunk, self.limits.extent_bytes)
    }

    fn quest(&mut self, layer: DiffId, extent: &ChunkRange, now: Instant) -> Option<&mut Quest> {
        // What nobody has wanted for so long starts anew.
        let forgotten = self.limits.claimant_memory;
        let record = self.layers.get_mut(&layer)?;
        let fresh = || Quest { since: now, used: now, ..Quest::default() };
        let quest = record.quests.entry(extent.start).or_insert_with(fresh);
        if now > quest.used + forgotten && quest.delegated(now).is_none() {
            *quest = fresh();
        }
        quest.used = now;
        Some(quest)
    }

    /// Forgets quests that have come to an end. Called when chunks arrive: the table stays as small as what is missing.
    pub(super) fn end_quests(&mut self, layer: DiffId, arrived: &Runs) {
        let Some(record) = self.layers.get_mut(&layer).filter(|record| !record.quests.is_empty()) else { return };
        let mut at = 0;
        while let Some(chunk) = arrived.within(at..u32::MAX).first().map(|run| run.start) {
            let Some(extent) = record.geometry.extent_of(chunk, self.limits.extent_bytes) else { return };
            at = extent.end;
            let Some(quest) = record.quests.get_mut(&extent.start) else { continue };
            // The next want of the extent has a turn of its own.
            (quest.since, quest.asked) = (self.now, 0);
            if let Some(told) = &mut quest.told {
                told.vain.remove_all(arrived);
            }
            if quest.is_over(self.now) || record.have.contains_all(extent.clone()) {
                record.quests.remove(&extent.start);
            }
        }
    }

    /// Chunks of the extent that an owner of `duty` left to this node.
    pub(super) fn delegated(&self, layer: DiffId, extent: &ChunkRange, duty: Duty, now: Instant) -> Runs {
        let quest = self.layers.get(&layer).and_then(|record| record.quests.get(&extent.start));
        match quest.and_then(|quest| quest.delegated(now)) {
            Some(told) if duty == Duty::Cluster => told.for_cluster.clone(),
            Some(told) => told.for_zone.clone(),
            None => Runs::new(),
        }
    }

    fn step(&mut self, need: &Need, extent: &ChunkRange, wanted: &Runs, now: Instant) -> Step {
        let Some(since) = self.quest(need.layer, extent, now).map(|quest| quest.since) else {
            return Step::Later(None);
        };
        let acts_for_zone = need.acts_for == Some(Duty::Zone)
            || !self.delegated(need.layer, extent, Duty::Zone, now).intersection(wanted).is_empty();
        let duties: &[Duty] = match need.acts_for {
            // Who was asked as the owner among all asks nobody else: so nobody asks in a circle.
            Some(Duty::Cluster) => &[],
            _ if acts_for_zone || !self.members.has_zones() => &[Duty::Cluster],
            _ => &[Duty::Zone, Duty::Cluster],
        };
        let mut nobody_reads = false;
        for duty in duties {
            match self.stage(need, extent, *duty, since, now) {
                Stage::Step(step) => return step,
                Stage::Mine if *duty == Duty::Cluster => return Step::Origin,
                // This node acts for its zone, or the zone has no owner that can be reached.
                Stage::Mine => {}
                Stage::Out { lost } => nobody_reads = lost && *duty == Duty::Cluster,
            }
        }
        if !self.can_read(need.layer) {
            if need.acts_for.is_some() {
                return Step::Refuse;
            }
            // Others may come who can; then an owner knows.
            let gone = since + self.limits.refused_patience;
            return if now >= gone { Step::Origin } else { Step::Wait((now + self.limits.owner_rest / 2).min(gone)) };
        }
        if need.acts_for == Some(Duty::Cluster) {
            let turn = self.turn_of(since, self.ahead_of_me(need.layer, extent, Duty::Cluster, now));
            return if now >= turn { Step::Origin } else { Step::Wait(turn) };
        }
        let turn = self.turn_of(since, self.limits.owner_ranks);
        if now < turn && !nobody_reads {
            return Step::Wait(turn);
        }
        if self.unowned.may_ask(now, &self.limits) {
            self.unowned.asked(now);
            let until = now + self.limits.claim_patience;
            if let Some(quest) = self.quest(need.layer, extent, now) {
                // As if an owner had left it to this node.
                let told = quest.told();
                told.for_cluster.insert(extent.clone());
                (told.delegated_until, told.nobody_owns) = (until, true);
            }
            return Step::Origin;
        }
        Step::Wait(Instant((second(now) + 1) * 1_000_000_000))
    }

    /// Why the registry is asked for a chunk, once it may be.
    pub(super) fn origin_reason(&mut self, need: &Need, chunk: u32, now: Instant) -> Reason {
        if need.acts_for.is_some() {
            return Reason::ForOthers;
        }
        let extent = self.extent_of(need.layer, chunk).filter(|_| self.members.is_swarm());
        let Some(extent) = extent else { return Reason::NoSwarm };
        let quest = self.layers.get(&need.layer).and_then(|record| record.quests.get(&extent.start));
        if self.delegated(need.layer, &extent, Duty::Cluster, now).contains(chunk) {
            let nobody_owns = quest.and_then(|quest| quest.delegated(now)).is_some_and(|told| told.nobody_owns);
            return if nobody_owns { Reason::NobodyOwns } else { Reason::Delegated };
        }
        self.rank(need.layer, &extent, Duty::Cluster).map_or(Reason::NobodyOwns, |rank| Reason::OwnTurn { rank })
    }

    fn stage(&self, need: &Need, extent: &ChunkRange, duty: Duty, since: Instant, now: Instant) -> Stage {
        let owners = self.owners(need.layer, extent.start, duty);
        let limits = &self.limits;
        let quest = self.layers.get(&need.layer).and_then(|record| record.quests.get(&extent.start));
        let room = self.total.has_room(need.class, &limits.total);
        if let Some(quest) = quest.filter(|quest| quest.asked >= ASKED_MAX) {
            let next = quest.asked_at + limits.rank_wait_min;
            if next > now {
                return Stage::Step(Step::Wait(next));
            }
        }
        let is_me = |peer: PeerNo| Some(peer) == self.members.me();
        // Owners that may be gone as well are asked when nobody else can be.
        let doubted =
            |owner: PeerNo| need.class == Class::Demand && !is_me(owner) && self.peers.is_doubtful(owner, now);
        let (last, first): (Vec<_>, Vec<_>) = owners.iter().partition(|owner| doubted(**owner));
        let asked = |owner: PeerNo| {
            let has_failed = || quest.is_some_and(|quest| quest.has_failed(owner, now));
            match self.peers.readiness(owner, need.class, now, limits) {
                _ if has_failed() => None,
                Readiness::Ready if room => Some(Step::Ask(owner, duty)),
                Readiness::Ready | Readiness::Full => Some(Step::Later(Some(owner))),
                Readiness::Busy(until) if need.class == Class::Prefetch || until <= since + limits.busy_patience => {
                    Some(Step::WaitFor(owner, until))
                }
                Readiness::Busy(_) | Readiness::Resting(_) | Readiness::Gone => None,
            }
        };
        let mine = || {
            let turn = self.turn_of(since, self.ahead_of_me(need.layer, extent, duty, now));
            if now >= turn { Stage::Mine } else { Stage::Step(Step::Wait(turn)) }
        };
        let can_act = duty == Duty::Zone || self.can_read(need.layer);
        let stage_of = |peer: PeerNo| if is_me(peer) { can_act.then(mine) } else { asked(peer).map(Stage::Step) };
        let mut lost = !owners.is_empty();
        for owner in first.into_iter().chain(last) {
            if let Some(stage) = stage_of(owner) {
                return stage;
            }
            lost &= is_me(owner) || self.is_away(owner, now);
        }
        let stands_in = || self.live_standbys(need.layer, extent.start, now).find_map(stage_of);
        let standby = if lost && duty == Duty::Cluster { stands_in() } else { None };
        standby.unwrap_or(Stage::Out { lost })
    }

    fn ask_owner(
        &mut self,
        need: &Need,
        peer: PeerNo,
        duty: Duty,
        extent: &ChunkRange,
        wanted: &Runs,
        turn: &mut Turn<'_>,
    ) -> Runs {
        let size = self.limits.peer_size.bytes(need.class);
        let runs = self.limits.runs_per_ask;
        let can_read = self.can_read(need.layer);
        let Some(record) = self.layers.get_mut(&need.layer) else { return wanted.clone() };
        let vain = record.quests.get(&extent.start).map(|quest| quest.vain(wanted)).unwrap_or_default();
        let again = !vain.is_empty();
        let chunks = cut_chunks(&record.geometry, if again { &vain } else { wanted }, size, runs);
        if let Some(quest) = record.quests.get_mut(&extent.start) {
            if again {
                quest.told().vain.remove_all(&chunks);
            }
            (quest.asked, quest.asked_at) = (quest.asked.saturating_add(1), turn.now);
        }
        let owners = self.owners(need.layer, extent.start, duty);
        let rank = owners.iter().position(|owner| *owner == peer).unwrap_or(owners.len());
        let (want, reason) = (Want::Owner { duty, again, can_read }, Reason::Owner { duty, rank });
        let question = Question { peer, chunks: chunks.clone(), want, reason, extent: extent.clone() };
        self.ask_peer(need, question, turn);
        chunks
    }

    /// Passes over an owner for a while, for one extent.
    pub(super) fn pass_over(&mut self, ask: &Ask, peer: PeerNo, until: Instant) {
        let extent = ask.extent.clone();
        if let Some(quest) = self.quest(ask.layer, &extent, self.now) {
            quest.told().fail(peer, until);
        }
    }

    /// The owner did not bring what it was asked for.
    pub(super) fn owner_failed(&mut self, ask: &Ask, peer: PeerNo, class: ErrorClass) {
        let rest = if class.is_permanent() { self.limits.refusal } else { self.limits.owner_rest };
        self.pass_over(ask, peer, self.now + rest);
    }

    /// By its own list the owner owns something else. Members compare their lists every second.
    pub(super) fn not_mine(&mut self, ask: &Ask, peer: PeerNo) {
        self.pass_over(ask, peer, self.now + self.limits.owner_rest);
    }

    /// Whoever was named did not have the chunks: the owner has to know when it is asked again.
    pub(super) fn named_in_vain(&mut self, layer: DiffId, chunks: &Runs) {
        if !self.members.is_swarm() {
            return;
        }
        for run in chunks.iter() {
            let Some(extent) = self.extent_of(layer, run.start) else { continue };
            if let Some(quest) = self.quest(layer, &extent, self.now) {
                quest.told().vain.insert_all(&chunks.within(extent));
            }
        }
    }

    /// The owner names others for chunks of an ask: these are free, and the others are asked.
    pub(super) fn referred(&mut self, id: AskId, chunks: &Runs, peers: &[PeerNo], now: Instant) {
        let Some(class) = self.asks.get(&id).map(|ask| ask.class) else { return };
        let Some((layer, chunks, asked)) = self.release(id, chunks) else { return };
        let me = self.members.me();
        let mut named = Vec::new();
        for peer in peers.iter().copied().filter(|peer| Some(*peer) != me && Some(*peer) != asked) {
            let usable = named.len() < self.limits.referral_peers && self.peers.named(peer, now, &self.limits);
            // One that failed a moment ago is no help.
            if usable && !matches!(self.peers.readiness(peer, class, now, &self.limits), Readiness::Resting(_)) {
                named.push(peer);
            }
        }
        if named.is_empty() {
            self.named_in_vain(layer, &chunks);
        }
        let limits = &self.limits;
        let Some(record) = self.layers.get_mut(&layer) else { return };
        for peer in named {
            let holder = record.named_holder(peer, self.members.is_far(peer), now, limits);
            holder.promised.insert_all(&chunks);
            if holder.promised.run_count() > limits.runs_per_holder {
                holder.promised = chunks.clone();
            }
        }
    }

    /// The owner leaves chunks to this node.
    pub(super) fn was_delegated(&mut self, id: AskId, chunks: &Runs, now: Instant) {
        let Some(ask) = self.asks.get(&id) else { return };
        let Want::Owner { duty, .. } = ask.want else { return };
        let (layer, extent) = (ask.layer, ask.extent.clone());
        let until = now + self.limits.claim_patience;
        self.release(id, chunks);
        let Some(quest) = self.quest(layer, &extent, now) else { return };
        let is_delegated = quest.delegated(now).is_some();
        let told = quest.told();
        if !is_delegated {
            told.for_zone = Runs::new();
            told.for_cluster = Runs::new();
        }
        let delegated = match duty {
            Duty::Zone => &mut told.for_zone,
            Duty::Cluster => &mut told.for_cluster,
        };
        let left = chunks.within(extent);
        delegated.insert_all(&left);
        (told.delegated_until, told.nobody_owns) = (until, false);
        self.stir_chunks(layer, &left);
    }

    /// Frees chunks of an ask to a peer that was answered in another way than by bringing them.
    fn release(&mut self, id: AskId, chunks: &Runs) -> Option<(DiffId, Runs, Option<PeerNo>)> {
        let now = self.now;
        let ask = self.asks.get_mut(&id)?;
        ask.renew(now);
        let freed = ask.chunks.intersection(chunks);
        ask.chunks.remove_all(&freed);
        let asked = match ask.source {
            Source::Peer(peer) => Some(peer),
            Source::Local | Source::Origin => None,
        };
        if let Some(record) = self.layers.get_mut(&ask.layer) {
            record.leased.remove_all(&freed);
            record.changes += 1;
        }
        let layer = ask.layer;
        self.stir_chunks(layer, &freed);
        Some((layer, freed, asked))
    }
}
