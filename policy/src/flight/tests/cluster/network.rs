//! The made-up network: nodes of the production policy, their driver, links and a registry.
//!
//! Data, have-maps and claims travel as the exchange protocol has them; uplinks carry one chunk at a time. Times are made up,
//! bytes are counted.

use std::collections::{BTreeMap, BTreeSet};

use super::super::*;
use crate::event::{ClaimId, Ruling, Want};
use crate::members::{Member, Members, ZoneNo};

/// One way between two nodes.
const LAN: Duration = Duration::from_micros(200);
/// To the registry and back, with its work.
const REGISTRY: Duration = Duration::from_millis(30);
/// A chunk on an uplink: 1 Gbit/s.
pub(super) const CHUNK_TIME: Duration = Duration::from_micros(524);
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
pub(super) const SPANS: u32 = 100;
pub(super) const CHUNKS: u32 = SPANS * SPAN_CHUNKS;

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
    /// What is not answered for yet, and of it what was given.
    open: Runs,
    awaited: Runs,
}

pub(super) struct Machine {
    pub(super) flight: Flight,
    rng: Rng,
    timer: Option<Instant>,
    is_open: bool,
    pub(super) has_login: bool,
    pub(super) have: Runs,
    told: Runs,
    asks: BTreeMap<AskId, Open>,
    claims: BTreeMap<ClaimId, Waiting>,
    uplink_free: Instant,
    link_free: Instant,
    pub(super) chunk_time: Duration,
    reads: BTreeMap<ReadId, Instant>,
    pub(super) longest: Duration,
    failed: Vec<FailCause>,
    pub(super) sent: BTreeMap<usize, u64>,
}

pub(super) struct Cluster {
    pub(super) machines: Vec<Machine>,
    zones: u32,
    coming: BTreeMap<(Instant, u64), (usize, Happening)>,
    next: u64,
    pub(super) now: Instant,
    dead: BTreeSet<usize>,
    pub(super) paused_until: BTreeMap<usize, Instant>,
    /// Nodes in different groups do not reach each other.
    pub(super) group: Vec<u32>,
    /// What is sent to another group is lost without a word; else the connections break.
    pub(super) is_silent: bool,
    /// All read the registry over one link, on which a span takes so long.
    pub(super) registry_span_time: Option<Duration>,
    registry_free: Instant,
    /// How often each span was read from the registry.
    spans_read: Vec<u32>,
    pub(super) requests: u32,
    /// The registry asks for rest until then.
    pub(super) registry_rests_until: Instant,
    /// Who, and by whom.
    pub(super) suspected: BTreeSet<(usize, usize)>,
}

/// Nothing is fetched that nobody asked for.
fn asked_for_only() -> Limits {
    Limits { readahead_first_bytes: 0, origin_near_bytes: 0, ..Limits::default() }
}

impl Cluster {
    pub(super) fn new(count: usize, zones: u32, open: usize, seed: u64) -> Self {
        let machine = |no: usize| Machine {
            flight: Flight::new(asked_for_only()),
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
            is_silent: false,
            registry_span_time: None,
            registry_free: Instant::ZERO,
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

    pub(super) fn tell_members(&mut self, no: usize, without: &BTreeSet<usize>, epoch: u64) {
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

    /// Sends to another node; what does not reach it is lost.
    fn post(&mut self, from: usize, to: usize, at: Instant, happening: Happening) {
        if self.reach(from, to) {
            self.at(at + LAN, to, happening);
        }
    }

    fn reach(&self, from: usize, to: usize) -> bool {
        !self.dead.contains(&from) && !self.dead.contains(&to) && self.group[from] == self.group[to]
    }

    pub(super) fn tell(&mut self, no: usize, event: Event) {
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
                if self.reach(no, to) || self.is_silent && !self.dead.contains(&to) {
                    self.post(no, to, self.now, Happening::Asked { from: no, ask, chunks, want, extent, class });
                } else {
                    let outcome = Outcome::Failed { class: ErrorClass::Transient, retry_after: None };
                    self.after(DIAL, no, Happening::Tell(Event::AskEnded { ask, outcome }));
                }
            }
            Action::AskOrigin { ask, spans, .. } => self.ask_registry(no, ask, spans),
            Action::Cancel { ask } => {
                if let Some(to) = self.machines[no].asks.remove(&ask).and_then(|open| open.to) {
                    self.post(no, to, self.now, Happening::Withdrawn { from: no, ask });
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
        let shared = self.registry_span_time;
        let free = if shared.is_some() { self.registry_free } else { self.machines[no].link_free };
        let mut at = free.max(self.now + REGISTRY);
        for span in spans.clone() {
            self.spans_read[span as usize] += 1;
            at = at + shared.unwrap_or(SPAN_TIME);
            self.at(at, no, Happening::Span { ask, span, last: span + 1 == spans.end });
        }
        if shared.is_some() {
            self.registry_free = at;
        } else {
            self.machines[no].link_free = at;
        }
    }

    fn rule(&mut self, no: usize, claim: ClaimId, ruling: Ruling) {
        let Some(waiting) = self.machines[no].claims.get_mut(&claim) else { return };
        let (from, ask) = (waiting.from, waiting.ask);
        let answered = |chunks, lacking| Happening::Answered { ask, chunks, lacking };
        match ruling {
            Ruling::Give(chunks) => {
                waiting.awaited.insert_all(&chunks);
            }
            Ruling::Lacks(chunks) => {
                waiting.awaited.remove_all(&chunks);
                waiting.open.remove_all(&chunks);
                self.post(no, from, self.now, answered(chunks, true));
            }
            Ruling::Refer { chunks, peers } => {
                assert!(!peers.contains(&PeerNo(from as u32)) && !peers.is_empty(), "{from} is sent to {peers:?}");
                waiting.open.remove_all(&chunks);
                self.post(
                    no,
                    from,
                    self.now,
                    Happening::Tell(Event::AskReferred { ask, chunks: chunks.clone(), peers }),
                );
                self.post(no, from, self.now, answered(chunks, false));
            }
            Ruling::Delegate(chunks) => {
                waiting.open.remove_all(&chunks);
                self.post(no, from, self.now, Happening::Tell(Event::AskDelegated { ask, chunks: chunks.clone() }));
                self.post(no, from, self.now, answered(chunks, false));
            }
            Ruling::RegistryRests(wait) => {
                self.post(no, from, self.now, Happening::Tell(Event::AskPending { ask, registry_rests: Some(wait) }));
            }
            Ruling::NotMine { epoch } => {
                self.post(
                    no,
                    from,
                    self.now,
                    Happening::Tell(Event::AskEnded { ask, outcome: Outcome::NotMine { epoch } }),
                );
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
            waiting.open.remove_all(&ready);
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
        self.post(no, to, done, Happening::Data { ask, chunk });
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
                    self.post(no, to, self.now, Happening::Withdrawn { from: no, ask });
                }
            }
            Happening::Timer => {
                if self.machines[no].timer.is_some_and(|at| at <= self.now) {
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
                    self.next += 1;
                    let waiting = Waiting { from, ask, open: missing.clone(), awaited: Runs::new() };
                    self.machines[no].claims.insert(claim, waiting);
                    let peer = PeerNo(from as u32);
                    self.tell(no, Event::Claimed { claim, peer, layer: LAYER, chunks: missing, extent, class, want });
                    self.after(Duration::ZERO, no, Happening::Working { claim });
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
                if let Some(waiting) = self.machines[no].claims.get(&claim).filter(|waiting| !waiting.open.is_empty()) {
                    let (from, ask) = (waiting.from, waiting.ask);
                    self.post(no, from, self.now, Happening::Tell(Event::AskPending { ask, registry_rests: None }));
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

    pub(super) fn run(&mut self, duration: Duration) {
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

    pub(super) fn kill(&mut self, no: usize) {
        self.dead.insert(no);
        for other in 0..self.machines.len() {
            self.connection_lost(other, no);
        }
    }

    pub(super) fn connection_lost(&mut self, no: usize, other: usize) {
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
    pub(super) fn all_read(&mut self, readers: &[usize], step: u32, class: Class, meanwhile: impl Fn(&mut Self, u32)) {
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
    pub(super) fn egress(&self) -> u32 {
        self.spans_read.iter().sum::<u32>() * 100 / SPANS
    }

    pub(super) fn longest(&self) -> Duration {
        let alive = self.machines.iter().enumerate().filter(|(no, _)| !self.dead.contains(no));
        alive.map(|(_, machine)| machine.longest).max().unwrap_or_default()
    }
}
