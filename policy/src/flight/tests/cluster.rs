//! Many nodes of the production policy in one made-up network: what the registry sees when they start together, and what
//! comes of reads when nodes die, are cut off, have old lists, or lack a login.
//!
//! Data, have-maps and claims travel as the exchange protocol has them; uplinks carry one chunk at a time. Times are made up,
//! bytes are counted.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::{ProptestConfig, any, prop_assert, proptest};

use super::*;
use crate::event::{ClaimId, Ruling, Want};
use crate::members::{Member, Members, ZoneNo};

/// One way between two nodes.
const LAN: Duration = Duration::from_micros(200);
/// To the registry and back, with its work.
const REGISTRY: Duration = Duration::from_millis(30);
/// A chunk on an uplink: 1 Gbit/s.
const CHUNK_TIME: Duration = Duration::from_micros(524);
/// A span on a node's way to the registry.
const SPAN_TIME: Duration = Duration::from_millis(8);
/// How often news of progress are told.
const NEWS: Duration = Duration::from_millis(50);
/// How long a dial to a node that is gone takes.
const DIAL: Duration = Duration::from_millis(250);
/// How long the word that a node is dead takes to get around.
const SPREAD: Duration = Duration::from_millis(300);
/// How often a holder says that it works on it.
const PENDING: Duration = Duration::from_millis(100);
const SPANS: u32 = 100;
const CHUNKS: u32 = SPANS * SPAN_CHUNKS;

#[derive(Debug, Clone)]
enum Happening {
    Tell(Event),
    Timer,
    /// A question arrives.
    Asked {
        from: usize,
        ask: AskId,
        chunks: Runs,
        want: Want,
        extent: std::ops::Range<u32>,
        class: Class,
    },
    /// A chunk arrives for an ask.
    Data {
        ask: AskId,
        chunk: u32,
    },
    /// Chunks of an ask were answered in another way; `true` when they are lacking.
    Answered {
        ask: AskId,
        chunks: Runs,
        lacking: bool,
    },
    /// A holder still works on it.
    Working {
        claim: ClaimId,
    },
    /// A span comes from the registry.
    Span {
        ask: AskId,
        span: u32,
        last: bool,
    },
    News,
    Withdrawn {
        from: usize,
        ask: AskId,
    },
    /// Everybody knows of the dead.
    Spread,
    /// Whether an ask has been silent for too long.
    Silent {
        ask: AskId,
        timeout: Duration,
    },
}

#[derive(Debug)]
struct Open {
    to: Option<usize>,
    left: Runs,
    lacking: Runs,
    sign: Instant,
}

#[derive(Debug)]
struct Waiting {
    from: usize,
    ask: AskId,
    awaited: Runs,
}

struct Machine {
    flight: Flight,
    rng: Rng,
    timer: Option<Instant>,
    is_open: bool,
    has_login: bool,
    have: Runs,
    told: Runs,
    asks: BTreeMap<AskId, Open>,
    claims: BTreeMap<ClaimId, Waiting>,
    uplink_free: Instant,
    link_free: Instant,
    chunk_time: Duration,
    reads: BTreeMap<ReadId, Instant>,
    longest: Duration,
    failed: Vec<FailCause>,
    sent: BTreeMap<usize, u64>,
}

struct Cluster {
    machines: Vec<Machine>,
    zones: u32,
    coming: BTreeMap<(Instant, u64), (usize, Happening)>,
    next: u64,
    now: Instant,
    dead: BTreeSet<usize>,
    paused_until: BTreeMap<usize, Instant>,
    /// Nodes in different groups do not reach each other.
    group: Vec<u32>,
    /// How often each span was read from the registry.
    spans_read: Vec<u32>,
    requests: u32,
    /// The registry asks for rest until then.
    registry_rests_until: Instant,
    /// Who, and by whom.
    suspected: BTreeSet<(usize, usize)>,
}

fn no_readahead() -> Limits {
    Limits { readahead_first_bytes: 0, ..Limits::default() }
}

impl Cluster {
    fn new(count: usize, zones: u32, open: usize, seed: u64) -> Self {
        let machine = |no: usize| Machine {
            flight: Flight::new(no_readahead()),
            rng: Rng::new(seed.wrapping_mul(1000).wrapping_add(no as u64)),
            timer: None,
            is_open: no < open,
            has_login: true,
            have: Runs::new(),
            told: Runs::new(),
            asks: BTreeMap::new(),
            claims: BTreeMap::new(),
            uplink_free: Instant::ZERO,
            link_free: Instant::ZERO,
            chunk_time: CHUNK_TIME,
            reads: BTreeMap::new(),
            longest: Duration::ZERO,
            failed: Vec::new(),
            sent: BTreeMap::new(),
        };
        let mut cluster = Self {
            machines: (0..count).map(machine).collect(),
            zones,
            coming: BTreeMap::new(),
            next: 0,
            now: Instant(1_000_000_000),
            dead: BTreeSet::new(),
            paused_until: BTreeMap::new(),
            group: vec![0; count],
            spans_read: vec![0; SPANS as usize],
            requests: 0,
            registry_rests_until: Instant::ZERO,
            suspected: BTreeSet::new(),
        };
        for no in 0..count {
            cluster.tell_members(no, &BTreeSet::new(), 1);
            for other in (0..count).filter(|other| *other != no) {
                cluster.tell(no, Event::PeerUp { peer: PeerNo(other as u32) });
            }
            if no < open {
                let (present, local) = (Runs::new(), Runs::new());
                let geometry = Arc::new(geometry(SPANS));
                cluster
                    .tell(no, Event::LayerOpened { layer: LAYER, geometry, present, local, origin: Some(OriginNo(0)) });
            }
        }
        cluster
    }

    fn tell_members(&mut self, no: usize, without: &BTreeSet<usize>, epoch: u64) {
        let member = |other: usize| Member {
            peer: PeerNo(other as u32),
            key: Rng::new(other as u64 + 77).next_u64(),
            zone: ZoneNo(other as u32 % self.zones),
            eligible: !without.contains(&other),
        };
        let members = Arc::new(Members::new(epoch, PeerNo(no as u32), (0..self.machines.len()).map(member).collect()));
        self.tell(no, Event::MembersChanged { members });
    }

    fn after(&mut self, wait: Duration, no: usize, happening: Happening) {
        self.at(self.now + wait, no, happening);
    }

    fn at(&mut self, at: Instant, no: usize, happening: Happening) {
        self.coming.insert((at, self.next), (no, happening));
        self.next += 1;
    }

    fn reach(&self, from: usize, to: usize) -> bool {
        !self.dead.contains(&from) && !self.dead.contains(&to) && self.group[from] == self.group[to]
    }

    fn tell(&mut self, no: usize, event: Event) {
        if self.dead.contains(&no) {
            return;
        }
        if let Event::Arrived { chunks, .. } = &event {
            self.machines[no].have.insert_all(chunks);
        }
        let mut out = Vec::new();
        let machine = &mut self.machines[no];
        machine.flight.handle(self.now, event, &mut machine.rng, &mut out);
        for action in out {
            self.obey(no, action);
        }
        self.serve(no);
    }

    fn obey(&mut self, no: usize, action: Action) {
        match action {
            Action::Arm { at } => {
                self.machines[no].timer = Some(at);
                self.at(at, no, Happening::Timer);
            }
            Action::Deliver { read } => {
                let since = self.machines[no].reads.remove(&read).expect("a read ends once");
                let waited = self.now.since(since);
                self.machines[no].longest = self.machines[no].longest.max(waited);
            }
            Action::Fail { read, cause } => {
                self.machines[no].reads.remove(&read).expect("a read ends once");
                self.machines[no].failed.push(cause);
            }
            Action::AskPeer { ask, peer, chunks, class, want, extent, timeout, .. } => {
                assert_ne!(peer.0 as usize, no, "a node asks itself");
                let to = peer.0 as usize;
                let open = Open { to: Some(to), left: chunks.clone(), lacking: Runs::new(), sign: self.now };
                self.machines[no].asks.insert(ask, open);
                self.after(timeout, no, Happening::Silent { ask, timeout });
                if self.reach(no, to) {
                    self.after(LAN, to, Happening::Asked { from: no, ask, chunks, want, extent, class });
                } else {
                    let outcome = Outcome::Failed { class: ErrorClass::Transient, retry_after: None };
                    self.after(DIAL, no, Happening::Tell(Event::AskEnded { ask, outcome }));
                }
            }
            Action::AskOrigin { ask, spans, .. } => self.ask_registry(no, ask, spans),
            Action::Cancel { ask } => {
                if let Some(to) = self.machines[no].asks.remove(&ask).and_then(|open| open.to) {
                    self.after(LAN, to, Happening::Withdrawn { from: no, ask });
                }
            }
            Action::FindHolders { layer } => {
                for other in 0..self.machines.len() {
                    if other != no && self.reach(no, other) && !self.machines[other].have.is_empty() {
                        let (peer, chunks) = (PeerNo(other as u32), self.machines[other].have.clone());
                        self.after(LAN * 4, no, Happening::Tell(Event::PeerHas { peer, layer, chunks }));
                    }
                }
                self.after(LAN * 5, no, Happening::Tell(Event::HoldersFound { layer }));
            }
            Action::Rule { claim, ruling } => self.rule(no, claim, ruling),
            Action::Suspect { peer } => {
                self.suspected.insert((peer.0 as usize, no));
                if self.dead.contains(&(peer.0 as usize)) {
                    // The members tell each other.
                    self.after(SPREAD, no, Happening::Spread);
                }
            }
            Action::Watch { .. } | Action::Ban { .. } => {}
            Action::AskLocal { .. } | Action::FindSpans { .. } => {
                unreachable!("nothing is local here, and spans are known")
            }
        }
    }

    fn ask_registry(&mut self, no: usize, ask: AskId, spans: std::ops::Range<u32>) {
        self.requests += 1;
        self.machines[no].asks.insert(ask, Open { to: None, left: Runs::new(), lacking: Runs::new(), sign: self.now });
        let rests = self.registry_rests_until.since(self.now);
        let refusal = if !self.machines[no].has_login {
            Some((ErrorClass::Denied, None))
        } else if rests > Duration::ZERO {
            Some((ErrorClass::Transient, Some(rests)))
        } else {
            None
        };
        if let Some((class, retry_after)) = refusal {
            let outcome = Outcome::Failed { class, retry_after };
            return self.after(REGISTRY, no, Happening::Tell(Event::AskEnded { ask, outcome }));
        }
        let mut at = self.machines[no].link_free.max(self.now + REGISTRY);
        for span in spans.clone() {
            self.spans_read[span as usize] += 1;
            at = at + SPAN_TIME;
            self.at(at, no, Happening::Span { ask, span, last: span + 1 == spans.end });
        }
        self.machines[no].link_free = at;
    }

    fn rule(&mut self, no: usize, claim: ClaimId, ruling: Ruling) {
        let Some(waiting) = self.machines[no].claims.get_mut(&claim) else { return };
        let (from, ask) = (waiting.from, waiting.ask);
        let answered = |chunks, lacking| Happening::Answered { ask, chunks, lacking };
        match ruling {
            Ruling::Give(chunks) => {
                waiting.awaited.insert_all(&chunks);
                self.after(Duration::ZERO, no, Happening::Working { claim });
            }
            Ruling::Lacks(chunks) => {
                waiting.awaited.remove_all(&chunks);
                self.after(LAN, from, answered(chunks, true));
            }
            Ruling::Refer { chunks, peers } => {
                assert!(!peers.contains(&PeerNo(from as u32)) && !peers.is_empty(), "{from} is sent to {peers:?}");
                self.after(LAN, from, Happening::Tell(Event::AskReferred { ask, chunks: chunks.clone(), peers }));
                self.after(LAN, from, answered(chunks, false));
            }
            Ruling::Delegate(chunks) => {
                self.after(LAN, from, Happening::Tell(Event::AskDelegated { ask, chunks: chunks.clone() }));
                self.after(LAN, from, answered(chunks, false));
            }
            Ruling::RegistryRests(wait) => {
                self.after(LAN, from, Happening::Tell(Event::AskPending { ask, registry_rests: Some(wait) }));
            }
            Ruling::NotMine { epoch } => {
                self.after(LAN, from, Happening::Tell(Event::AskEnded { ask, outcome: Outcome::NotMine { epoch } }));
            }
        }
    }

    /// Sends what claims wait for and is here now.
    fn serve(&mut self, no: usize) {
        let machine = &mut self.machines[no];
        let mut out = Vec::new();
        for waiting in machine.claims.values_mut() {
            let ready = waiting.awaited.intersection(&machine.have);
            waiting.awaited.remove_all(&ready);
            out.extend(ready.chunks().map(|chunk| (waiting.from, waiting.ask, chunk)).collect::<Vec<_>>());
        }
        for (from, ask, chunk) in out {
            self.send(no, from, ask, chunk);
        }
    }

    fn send(&mut self, no: usize, to: usize, ask: AskId, chunk: u32) {
        let machine = &mut self.machines[no];
        let done = machine.uplink_free.max(self.now) + machine.chunk_time;
        machine.uplink_free = done;
        *machine.sent.entry(to).or_default() += 1;
        self.at(done + LAN, to, Happening::Data { ask, chunk });
    }

    fn happens(&mut self, no: usize, happening: Happening) {
        match happening {
            Happening::Tell(Event::AskEnded { ask, outcome }) => {
                if self.machines[no].asks.remove(&ask).is_some() {
                    self.tell(no, Event::AskEnded { ask, outcome });
                }
            }
            Happening::Tell(event) => {
                if let Event::AskPending { ask, .. } | Event::AskReferred { ask, .. } | Event::AskDelegated { ask, .. } =
                    &event
                    && let Some(open) = self.machines[no].asks.get_mut(ask)
                {
                    open.sign = self.now;
                }
                self.tell(no, event);
            }
            Happening::Silent { ask, timeout } => {
                let Some(open) = self.machines[no].asks.get(&ask) else { return };
                let (to, until) = (open.to, open.sign + timeout);
                if until > self.now {
                    return self.at(until, no, Happening::Silent { ask, timeout });
                }
                self.machines[no].asks.remove(&ask);
                let outcome = Outcome::Failed { class: ErrorClass::Transient, retry_after: None };
                self.tell(no, Event::AskEnded { ask, outcome });
                if let Some(to) = to {
                    self.after(LAN, to, Happening::Withdrawn { from: no, ask });
                }
            }
            Happening::Timer => {
                if self.machines[no].timer == Some(self.now) {
                    self.machines[no].timer = None;
                    self.tell(no, Event::TimerFired);
                }
            }
            Happening::Asked { from, ask, chunks, want, extent, class } => {
                let present = match want {
                    Want::Here => chunks.intersection(&self.machines[no].have),
                    Want::Owner { .. } => Runs::new(),
                };
                for chunk in present.chunks() {
                    self.send(no, from, ask, chunk);
                }
                let missing = chunks.difference(&present);
                if !missing.is_empty() {
                    let claim = ClaimId(self.next);
                    self.machines[no].claims.insert(claim, Waiting { from, ask, awaited: Runs::new() });
                    let peer = PeerNo(from as u32);
                    self.tell(no, Event::Claimed { claim, peer, layer: LAYER, chunks: missing, extent, class, want });
                }
            }
            Happening::Data { ask, chunk } => {
                let chunks = Runs::one(chunk..chunk + 1);
                if self.machines[no].asks.contains_key(&ask) {
                    self.tell(no, Event::Arrived { layer: LAYER, chunks: chunks.clone() });
                    self.answered(no, ask, &chunks, false);
                }
            }
            Happening::Answered { ask, chunks, lacking } => self.answered(no, ask, &chunks, lacking),
            Happening::Working { claim } => {
                if let Some(waiting) =
                    self.machines[no].claims.get(&claim).filter(|waiting| !waiting.awaited.is_empty())
                {
                    let (from, ask) = (waiting.from, waiting.ask);
                    self.after(LAN, from, Happening::Tell(Event::AskPending { ask, registry_rests: None }));
                    self.after(PENDING, no, Happening::Working { claim });
                }
            }
            Happening::Span { ask, span, last } => {
                if self.machines[no].asks.contains_key(&ask) {
                    let chunks = Runs::one(span * SPAN_CHUNKS..(span + 1) * SPAN_CHUNKS);
                    self.tell(no, Event::Arrived { layer: LAYER, chunks });
                    if last {
                        self.machines[no].asks.remove(&ask);
                        self.tell(no, Event::AskEnded { ask, outcome: Outcome::Done { bytes: 1 } });
                    }
                }
            }
            Happening::News => {
                let machine = &mut self.machines[no];
                let more = machine.have.difference(&machine.told);
                machine.told.insert_all(&more);
                for other in (0..self.machines.len()).filter(|other| *other != no && !more.is_empty()) {
                    if self.reach(no, other) && self.machines[other].is_open {
                        let event = Event::PeerHas { peer: PeerNo(no as u32), layer: LAYER, chunks: more.clone() };
                        self.after(LAN, other, Happening::Tell(event));
                    }
                }
                self.after(NEWS, no, Happening::News);
            }
            Happening::Spread => {
                let dead = self.dead.clone();
                (0..self.machines.len()).for_each(|other| self.tell_members(other, &dead, 50));
            }
            Happening::Withdrawn { from, ask } => self.end_claim(no, from, ask),
        }
    }

    /// Chunks of an ask are settled; the ask ends with the last of them.
    fn answered(&mut self, no: usize, ask: AskId, chunks: &Runs, lacking: bool) {
        let Some(open) = self.machines[no].asks.get_mut(&ask) else { return };
        open.left.remove_all(chunks);
        open.sign = self.now;
        if lacking {
            open.lacking.insert_all(chunks);
        }
        if open.left.is_empty() {
            let open = self.machines[no].asks.remove(&ask).expect("is open");
            let to = open.to.expect("asked of a peer");
            let outcome = if open.lacking.is_empty() {
                Outcome::Done { bytes: CHUNK }
            } else {
                Outcome::Lacks { chunks: open.lacking }
            };
            self.tell(no, Event::AskEnded { ask, outcome });
            self.end_claim(to, no, ask);
        }
    }

    fn end_claim(&mut self, no: usize, from: usize, ask: AskId) {
        let found = self.machines[no].claims.iter().find(|(_, waiting)| waiting.from == from && waiting.ask == ask);
        if let Some(claim) = found.map(|(claim, _)| *claim) {
            self.machines[no].claims.remove(&claim);
            self.tell(no, Event::ClaimEnded { claim });
        }
    }

    fn run(&mut self, duration: Duration) {
        let end = self.now + duration;
        while let Some(((at, _), _)) = self.coming.first_key_value().filter(|((at, _), _)| *at <= end) {
            self.now = *at;
            let (_, (no, happening)) = self.coming.pop_first().expect("is not empty");
            if self.dead.contains(&no) {
                continue;
            }
            match self.paused_until.get(&no) {
                Some(until) if *until > self.now => self.at(*until, no, happening),
                _ => self.happens(no, happening),
            }
        }
        self.now = end;
    }

    fn kill(&mut self, no: usize) {
        self.dead.insert(no);
        for other in 0..self.machines.len() {
            self.connection_lost(other, no);
        }
    }

    fn connection_lost(&mut self, no: usize, other: usize) {
        if self.dead.contains(&no) {
            return;
        }
        self.machines[no].asks.retain(|_, open| open.to != Some(other));
        self.tell(no, Event::PeerDown { peer: PeerNo(other as u32) });
        let gone: Vec<ClaimId> =
            self.machines[no].claims.iter().filter(|(_, waiting)| waiting.from == other).map(|(id, _)| *id).collect();
        for claim in gone {
            self.machines[no].claims.remove(&claim);
            self.tell(no, Event::ClaimEnded { claim });
        }
    }

    /// Readers that read all of the layer, `step` chunks at a time and each when the one before has come, beginning
    /// together.
    fn all_read(&mut self, readers: &[usize], step: u32, class: Class, meanwhile: impl Fn(&mut Self, u32)) {
        for no in 0..self.machines.len() {
            self.after(NEWS, no, Happening::News);
        }
        let mut at = vec![0_u32; readers.len()];
        // Bounded: 120 s in steps of a millisecond.
        for tick in 0..120_000 {
            meanwhile(self, tick);
            let mut done = true;
            for (place, no) in readers.iter().enumerate() {
                if self.dead.contains(no) {
                    continue;
                }
                if self.machines[*no].reads.is_empty() && at[place] < CHUNKS {
                    let chunks = Runs::one(at[place]..(at[place] + step).min(CHUNKS));
                    at[place] += step;
                    let read = ReadId(u64::from(at[place]));
                    self.machines[*no].reads.insert(read, self.now);
                    let deadline = self.now + Duration::from_secs(60);
                    self.tell(*no, Event::ReadNeeds { read, layer: LAYER, chunks, class, deadline });
                }
                done &= self.machines[*no].reads.is_empty() && at[place] >= CHUNKS;
            }
            if done {
                break;
            }
            self.run(Duration::from_millis(1));
        }
        for no in readers.iter().filter(|no| !self.dead.contains(no)) {
            let machine = &self.machines[*no];
            assert!(machine.failed.is_empty(), "node {no}: {:?}", machine.failed);
            assert!(machine.have.contains_all(0..CHUNKS), "node {no} has {:?}", machine.have);
        }
    }

    /// Spans read from the registry for each span of the layer, in hundredths.
    fn egress(&self) -> u32 {
        self.spans_read.iter().sum::<u32>() * 100 / SPANS
    }

    fn longest(&self) -> Duration {
        let alive = self.machines.iter().enumerate().filter(|(no, _)| !self.dead.contains(no));
        alive.map(|(_, machine)| machine.longest).max().unwrap_or_default()
    }
}

fn all(count: usize) -> Vec<usize> {
    (0..count).collect()
}

#[test]
fn nodes_that_start_together_read_the_registry_once() {
    for (count, class, step) in [
        (12, Class::Demand, 2),
        (12, Class::Prefetch, CHUNKS),
        (3, Class::Demand, 5),
        (2, Class::Demand, 1),
        (40, Class::Demand, 8),
    ] {
        let mut cluster = Cluster::new(count, 1, count, 1);
        cluster.all_read(&all(count), step, class, |_, _| {});
        assert!(cluster.egress() <= 110, "{count} nodes, {class:?}: {} %", cluster.egress());
    }
}

#[test]
fn a_node_that_is_alone_waits_for_nobody() {
    let mut cluster = Cluster::new(1, 1, 1, 1);
    cluster.all_read(&[0], 2, Class::Demand, |_, _| {});
    assert_eq!((cluster.egress(), cluster.longest() < ms(100)), (100, true), "{:?}", cluster.longest());
}

#[test]
fn owners_without_the_layer_leave_it_to_the_readers() {
    let mut cluster = Cluster::new(60, 1, 6, 2);
    cluster.all_read(&all(6), 2, Class::Demand, |_, _| {});
    assert!(cluster.egress() <= 110, "{} %", cluster.egress());
    assert!(cluster.machines[6..].iter().all(|machine| machine.have.is_empty()), "an owner read what it does not need");
}

#[test]
fn owners_without_a_login_leave_it_to_those_who_have_one() {
    let mut cluster = Cluster::new(12, 1, 12, 3);
    for no in 0..9 {
        cluster.machines[no].has_login = false;
    }
    cluster.all_read(&all(12), 2, Class::Demand, |_, _| {});
    assert!(cluster.egress() <= 115, "{} %", cluster.egress());
}

#[test]
fn zones_see_each_byte_about_once() {
    let mut cluster = Cluster::new(12, 3, 12, 4);
    cluster.all_read(&all(12), 2, Class::Demand, |_, _| {});
    let crossing: u64 = cluster
        .machines
        .iter()
        .enumerate()
        .flat_map(|(from, machine)| machine.sent.iter().filter(move |(to, _)| *to % 3 != from % 3))
        .map(|(_, chunks)| chunks)
        .sum();
    let most = 3 * u64::from(CHUNKS) * 11 / 10;
    assert!(crossing <= most, "{crossing} chunks crossed zones, {most} may");
    assert!(cluster.egress() <= 110, "{} %", cluster.egress());
}

#[test]
fn two_of_twelve_may_die() {
    for seed in 0..20 {
        let mut cluster = Cluster::new(12, 1, 12, seed);
        let mut dice = Rng::new(seed);
        let (first, second, at) = (dice.below(12) as usize, dice.below(12) as usize, dice.below(400) as u32);
        cluster.all_read(&all(12), 2, Class::Demand, |cluster, tick| {
            if tick == at {
                cluster.kill(first);
                cluster.kill(second);
            }
        });
        assert!(cluster.egress() <= 120, "seed {seed}: {} %", cluster.egress());
        assert!(cluster.longest() <= Duration::from_secs(1), "seed {seed}: {:?}", cluster.longest());
    }
}

#[test]
fn a_partition_reads_once_on_each_side_and_heals() {
    let mut cluster = Cluster::new(12, 1, 12, 5);
    let lose = |cluster: &mut Cluster| {
        for no in 0..12 {
            for other in (0..12).filter(|other| other % 2 != no % 2) {
                cluster.connection_lost(no, other);
            }
        }
    };
    cluster.all_read(&all(12), 2, Class::Demand, |cluster, tick| match tick {
        100 => {
            cluster.group = (0..12).map(|no| no % 2).collect();
            lose(cluster);
        }
        // The swarm has noticed.
        1500 => (0..12).for_each(|no| {
            let others = (0..12).filter(|other| other % 2 != no % 2).collect();
            cluster.tell_members(no, &others, 2 + no as u64 % 2);
        }),
        3000 => {
            cluster.group = vec![0; 12];
            (0..12).for_each(|no| cluster.tell_members(no, &BTreeSet::new(), 4));
        }
        _ => {}
    });
    assert!(cluster.egress() <= 210, "{} %", cluster.egress());
}

#[test]
fn a_node_that_pauses_is_passed_over() {
    for seed in 0..8 {
        let mut cluster = Cluster::new(12, 1, 12, seed);
        let paused = Rng::new(seed).below(12) as usize;
        cluster.all_read(&all(12), 2, Class::Demand, |cluster, tick| {
            if tick == 50 {
                let until = cluster.now + Duration::from_secs(10);
                cluster.paused_until.insert(paused, until);
            }
        });
        let others = cluster.machines.iter().enumerate().filter(|(no, _)| *no != paused);
        let longest = others.map(|(_, machine)| machine.longest).max().unwrap_or_default();
        assert!(longest <= Duration::from_secs(1), "seed {seed}: {longest:?}");
        assert!(cluster.egress() <= 120, "seed {seed}: {} %", cluster.egress());
        let wrong = cluster.suspected.iter().find(|(peer, by)| *peer != paused && *by != paused);
        assert_eq!(wrong, None, "seed {seed}");
    }
}

#[test]
fn one_slow_uploader_holds_up_nobody_for_long() {
    for seed in 0..8 {
        let mut cluster = Cluster::new(12, 1, 12, seed);
        let slow = Rng::new(seed).below(12) as usize;
        cluster.machines[slow].chunk_time = CHUNK_TIME * 100;
        cluster.all_read(&all(12), 2, Class::Demand, |_, _| {});
        assert!(cluster.longest() <= Duration::from_secs(1), "seed {seed}: {:?}", cluster.longest());
        assert!(cluster.egress() <= 120, "seed {seed}: {} %", cluster.egress());
    }
}

#[test]
fn old_lists_cost_little() {
    let mut cluster = Cluster::new(12, 1, 12, 6);
    // Two nodes of ten do not know the two newest.
    for no in [3, 8] {
        cluster.tell_members(no, &BTreeSet::from([10, 11]), 9);
    }
    cluster.all_read(&all(12), 2, Class::Demand, |_, _| {});
    assert!(cluster.egress() <= 120, "{} %", cluster.egress());
    assert!(cluster.longest() <= Duration::from_secs(1), "{:?}", cluster.longest());
}

#[test]
fn a_registry_that_asks_for_rest_is_left_alone_by_all() {
    let mut cluster = Cluster::new(12, 1, 12, 7);
    cluster.registry_rests_until = cluster.now + Duration::from_secs(3);
    cluster.all_read(&all(12), 2, Class::Demand, |_, _| {});
    assert!(cluster.egress() <= 110, "{} %", cluster.egress());
    // At most one that hears it first for each extent owner, before the word has spread.
    assert!(cluster.requests <= SPANS + 12, "{} requests", cluster.requests);
}

#[test]
fn a_cold_node_among_warm_ones_asks_the_registry_for_nothing() {
    let mut cluster = Cluster::new(12, 1, 12, 8);
    for no in 1..12 {
        cluster.tell(no, Event::Arrived { layer: LAYER, chunks: Runs::one(0..CHUNKS) });
    }
    cluster.all_read(&[0], 2, Class::Demand, |_, _| {});
    assert_eq!((cluster.egress(), cluster.longest() < ms(60)), (0, true), "{:?}", cluster.longest());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever happens to some of the nodes, the reads of those that live end with their chunks as long as one of them
    /// reaches the registry with a login, and nobody waits in a circle: that would take five seconds a time.
    #[test]
    fn readers_that_live_get_their_chunks(
        seed in any::<u64>(),
        count in 2_usize..14,
        zones in 1_u32..4,
        prefetch in any::<bool>(),
        step in 1_u32..24,
        faults in proptest::collection::vec((0_u32..600, 0_u32..5, any::<u8>()), 0..6),
    ) {
        let open = 1 + seed as usize % count;
        let mut cluster = Cluster::new(count, zones, open, seed);
        let class = if prefetch { Class::Prefetch } else { Class::Demand };
        for no in 1..open {
            cluster.machines[no].has_login = !(seed >> no).is_multiple_of(3);
        }
        cluster.all_read(&all(open), step, class, |cluster, tick| {
            for (_, fault, which) in faults.iter().filter(|(at, ..)| *at == tick) {
                let no = usize::from(*which) % count;
                match fault {
                    // The first one lives: it can read the registry.
                    0 if no > 0 => cluster.kill(no),
                    1 if no > 0 => {
                        let until = cluster.now + Duration::from_secs(3);
                        cluster.paused_until.insert(no, until);
                    }
                    2 => {
                        // Everybody knows the one that can read the registry.
                        let unknown = [no, (no + 1) % count].into_iter().filter(|no| *no > 0).collect();
                        cluster.tell_members((no + 2) % count, &unknown, 100 + u64::from(*which));
                    }
                    3 => cluster.machines[no].chunk_time = CHUNK_TIME * 20,
                    _ => cluster.registry_rests_until = cluster.now + Duration::from_secs(1),
                }
            }
        });
        let most = if faults.iter().any(|(_, fault, _)| *fault < 2) { 4 } else { 2 };
        prop_assert!(cluster.egress() <= 100 * most, "{} %", cluster.egress());
    }
}
