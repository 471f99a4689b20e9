//! Whom pieces are asked of: the part in which the models differ.
//!
//! **Search** (Spegel): a layer is one piece; a search names nodes that have announced it whole, which are tried in turn, then the
//! registry. **Scheduler** (Dragonfly): a peer is named parents among those that came before it or have more; the first one
//! that asks lets a seed peer read the registry, and who is named nobody too often reads it as well. **Tracker** (Kraken): a
//! peer is named others, connects to some, both ways, and takes the rarest piece of each; origins read the registry whole.

use super::Step;
use super::state::{ALL_PIECES, Blob, Neighbour, Search};
use crate::queue::{Nanos, SECOND};
use crate::strategy::model::Way;
use crate::world::{Happening, World};

/// How often a peer asks an origin that still reads the layer, and looks at what its neighbours have (assumed).
const POLL: Nanos = SECOND;

impl World {
    /// Asks for what can be asked for of a layer.
    pub(super) fn fill(&mut self, no: u32, layer: u16) {
        match self.model().way {
            Way::Registry => self.fill_whole(no, layer),
            Way::Search { patience, .. } => self.fill_by_search(no, layer, patience),
            Way::Scheduled { .. } if self.is_host(no) => self.fill_from_registry(no, layer),
            Way::Tracked { .. } if self.is_host(no) => self.fill_all(no, layer),
            Way::Scheduled { .. } if self.blob(no, layer).back_to_source => self.fill_from_registry(no, layer),
            Way::Scheduled { .. } | Way::Tracked { .. } => self.fill_from_neighbours(no, layer),
        }
    }

    fn blob(&mut self, no: u32, layer: u16) -> &mut Blob {
        &mut self.rival_of(no).blobs[usize::from(layer)]
    }

    fn fill_whole(&mut self, no: u32, layer: u16) {
        if self.blob(no, layer).under_way.count() == 0 {
            self.ask_for(no, layer, 0, None);
        }
    }

    /// An origin reads a layer in one request.
    fn fill_all(&mut self, no: u32, layer: u16) {
        if !self.rival_of(no).transfers.values().any(|open| open.layer == layer) {
            self.ask_for(no, layer, ALL_PIECES, None);
        }
    }

    fn fill_from_registry(&mut self, no: u32, layer: u16) {
        let most = self.model().at_once;
        loop {
            let blob = self.blob(no, layer);
            let missing =
                (0..blob.piece_count).find(|piece| !blob.have.contains(*piece) && !blob.under_way.contains(*piece));
            let Some(piece) = missing.filter(|_| blob.under_way.count() < most) else { return };
            self.ask_for(no, layer, piece, None);
        }
    }

    fn fill_by_search(&mut self, no: u32, layer: u16, patience: Nanos) {
        let lookup = self.scenario.cluster.lookup.0;
        let blob = self.blob(no, layer);
        if blob.under_way.count() > 0 {
            return;
        }
        match &mut blob.search {
            Search::UnderWay => {}
            Search::Not => {
                blob.search = Search::UnderWay;
                let life = self.nodes[no as usize].life;
                self.queue
                    .after(lookup.min(patience), Happening::Rival { node: no, life, step: Step::Searched { layer } });
            }
            Search::Found(hosts) => {
                let host = hosts.pop();
                self.ask_for(no, layer, 0, host);
            }
        }
    }

    /// A search has ended, or waited for long enough.
    pub(super) fn searched(&mut self, no: u32, layer: u16) {
        let Way::Search { found, patience, .. } = self.model().way else { return };
        let in_time = self.scenario.cluster.lookup.0 <= patience;
        let known = self.rivals.swarms[usize::from(layer)].providers.clone();
        let mut hosts = if in_time { self.drawn(&known, no, found) } else { Vec::new() };
        // The least used one, as far as this node knows, is tried first: the last of the list.
        let used = |host: &u32| {
            self.nodes[no as usize]
                .rival
                .iter()
                .flat_map(|rival| rival.transfers.values())
                .filter(|open| open.from == Some(*host))
                .count()
        };
        hosts.sort_by_key(|host| std::cmp::Reverse(used(host)));
        self.blob(no, layer).search = Search::Found(hosts);
        self.fill(no, layer);
    }

    /// Up to `count` of some hosts, without `no` and those that are known to be gone.
    fn drawn(&mut self, of: &[u32], no: u32, count: usize) -> Vec<u32> {
        let mut drawn: Vec<u32> = Vec::with_capacity(count);
        for _ in 0..count * 4 {
            if drawn.len() == count || of.is_empty() {
                break;
            }
            let host = of[self.rng.below(of.len() as u64) as usize];
            if host != no && !drawn.contains(&host) && !self.membership.gone.contains(&host) {
                drawn.push(host);
            }
        }
        drawn
    }

    /// Pieces of neighbours, and a question for more of them when there are too few.
    fn fill_from_neighbours(&mut self, no: u32, layer: u16) {
        let (now, life) = (self.queue.now(), self.nodes[no as usize].life);
        let hosts: Vec<u32> = self.blob(no, layer).neighbours.iter().map(|near| near.host).collect();
        for host in hosts {
            self.take_from(no, layer, host);
        }
        let way = self.model().way;
        if let Way::Tracked { idle, .. } = way {
            self.close_idle(no, layer, idle);
        }
        let blob = self.blob(no, layer);
        if blob.is_whole() {
            return;
        }
        let enough = match way {
            Way::Tracked { connections, .. } => blob.neighbours.len() >= connections,
            _ => !blob.neighbours.is_empty(),
        };
        if enough {
            // Words that were lost beyond a partition are made up for.
            return self.plan_look(no, now + POLL);
        }
        if blob.asks_at > now {
            let at = blob.asks_at;
            return self.plan_look(no, at);
        }
        // The answer sets when it may be asked again; until then nobody asks twice.
        blob.asks_at = Nanos::MAX;
        let trip = 2 * self.scenario.cluster.latency.0;
        self.queue.after(trip, Happening::Rival { node: no, life, step: Step::Named { layer } });
    }

    /// The scheduler or the tracker answers.
    pub(super) fn named(&mut self, no: u32, layer: u16) {
        self.seed(layer);
        match self.model().way {
            Way::Scheduled { .. } => self.parents_named(no, layer),
            Way::Tracked { .. } => self.peers_named(no, layer),
            _ => {}
        }
    }

    /// The first question for a layer sends its hosts to the registry.
    fn seed(&mut self, layer: u16) {
        let (hosts, replicas) = match self.model().way {
            Way::Scheduled { seeds, .. } => (seeds, 1),
            Way::Tracked { origins, replicas, .. } => (origins, replicas),
            _ => return,
        };
        if std::mem::replace(&mut self.rivals.swarms[usize::from(layer)].seeded, true) {
            return;
        }
        let first = u32::from(self.shape.layers[usize::from(layer)].diff_id.0[0]);
        for replica in 0..replicas.min(hosts) {
            let host = self.scenario.cluster.nodes + (first + replica) % hosts;
            self.blob(host, layer).wanted = true;
            self.rivals.swarms[usize::from(layer)].members.push(host);
            self.plan_look(host, self.queue.now());
        }
    }

    fn register(&mut self, no: u32, layer: u16) {
        if !std::mem::replace(&mut self.blob(no, layer).registered, true) {
            let members = &mut self.rivals.swarms[usize::from(layer)].members;
            if !members.contains(&no) {
                members.push(no);
            }
        }
    }

    fn parents_named(&mut self, no: u32, layer: u16) {
        let Way::Scheduled { sampled, parents, uploads, seed_uploads, retry, retries, back_to_source, .. } =
            self.model().way
        else {
            return;
        };
        let now = self.queue.now();
        self.register(no, layer);
        let place = usize::from(layer);
        let members = self.rivals.swarms[place].members.clone();
        let mine = members.iter().position(|member| *member == no).unwrap_or(members.len());
        let has = self.blob(no, layer).have.count();
        let mut candidates: Vec<(u32, usize, u32)> = Vec::new();
        for host in self.drawn(&members, no, sampled) {
            let is_seed = self.is_host(host);
            let rival = self.rival_of(host);
            let (used, blob) = (rival.uploads, &rival.blobs[place]);
            let feeds = is_seed || blob.back_to_source || !blob.neighbours.is_empty() || blob.is_whole();
            let before = members.iter().position(|member| *member == host).is_some_and(|at| at < mine);
            // Parents form no circle: those that came later count only with more pieces, whose own parents are not this one.
            let later = blob.have.count() > has && !blob.neighbours.iter().any(|near| near.host == no);
            if feeds && (before || later) && used < if is_seed { seed_uploads } else { uploads } {
                candidates.push((used, blob.takers.len(), host));
            }
        }
        candidates.sort_unstable();
        candidates.truncate(parents);
        let blob = self.blob(no, layer);
        blob.asks_at = now + retry;
        if candidates.is_empty() {
            blob.asked_in_vain += 1;
            if blob.asked_in_vain > retries && self.rivals.swarms[place].back_to_source < back_to_source {
                self.rivals.swarms[place].back_to_source += 1;
                self.blob(no, layer).back_to_source = true;
                return self.fill(no, layer);
            }
        } else {
            blob.asked_in_vain = 0;
        }
        for (_, _, host) in candidates {
            self.add_neighbour(no, layer, host);
        }
        self.fill(no, layer);
    }

    fn peers_named(&mut self, no: u32, layer: u16) {
        let Way::Tracked { announce, handout, connections, idle, .. } = self.model().way else { return };
        let now = self.queue.now();
        let place = usize::from(layer);
        // Who waits for an origin is known already, so that the first answers name the whole crowd (assumed).
        self.register(no, layer);
        if self.rivals.swarms[place].providers.is_empty() {
            // There is no list of pieces before an origin has the layer.
            self.blob(no, layer).asks_at = now + POLL;
            return self.plan_look(no, now + POLL);
        }
        let members = self.rivals.swarms[place].members.clone();
        let mut named = self.drawn(&members, no, handout);
        // The tracker's policy: peers that have it whole, then origins, then those that still download.
        named.sort_by_key(|host| {
            let whole = self.nodes[*host as usize].rival.as_ref().is_some_and(|rival| rival.blobs[place].is_whole());
            (!whole || self.is_host(*host), !self.is_host(*host))
        });
        self.close_idle(no, layer, idle);
        for host in named {
            self.close_idle(host, layer, idle);
            let (mine, theirs) = (self.blob(no, layer).neighbours.len(), self.blob(host, layer).neighbours.len());
            let known = self.blob(no, layer).neighbours.iter().any(|near| near.host == host);
            let there = self.reaches(no, host) && self.reaches(host, no);
            if mine < connections && theirs < connections && !known && there {
                self.add_neighbour(no, layer, host);
                self.add_neighbour(host, layer, no);
            }
        }
        self.blob(no, layer).asks_at = now + announce;
        self.plan_look(no, now + announce);
        let hosts: Vec<u32> = self.blob(no, layer).neighbours.iter().map(|near| near.host).collect();
        for host in hosts {
            self.take_from(no, layer, host);
        }
    }

    fn add_neighbour(&mut self, no: u32, layer: u16, host: u32) {
        let (has, active) = (self.blob(host, layer).have.clone(), self.queue.now());
        self.blob(host, layer).takers.insert(no);
        let blob = self.blob(no, layer);
        if blob.neighbours.iter().any(|near| near.host == host) {
            return;
        }
        blob.neighbours.push(Neighbour { host, under_way: 0, active });
        (0..blob.piece_count).filter(|piece| has.contains(*piece)).for_each(|piece| blob.rarity[piece as usize] += 1);
    }

    /// Closes connections on which no piece has gone either way for `idle`: else those of whole peers would keep others out, and peers
    /// that have nothing yet would stay among themselves.
    fn close_idle(&mut self, no: u32, layer: u16, idle: Nanos) {
        let since = self.queue.now().saturating_sub(idle);
        let is_idle = |near: &Neighbour| near.under_way == 0 && near.active < since;
        let mine: Vec<u32> =
            self.blob(no, layer).neighbours.iter().filter(|near| is_idle(near)).map(|near| near.host).collect();
        for host in mine {
            if self.blob(host, layer).neighbours.iter().filter(|near| near.host == no).all(is_idle) {
                self.drop_neighbour(no, layer, host);
                self.drop_neighbour(host, layer, no);
            }
        }
    }

    /// A host is asked no more.
    pub(super) fn drop_neighbour(&mut self, no: u32, layer: u16, host: u32) {
        let has = self.nodes[host as usize].rival.as_ref().map(|rival| rival.blobs[usize::from(layer)].have.clone());
        let blob = self.blob(no, layer);
        let Some(place) = blob.neighbours.iter().position(|near| near.host == host) else { return };
        blob.neighbours.remove(place);
        let known = has.unwrap_or_default();
        (0..blob.piece_count)
            .filter(|piece| known.contains(*piece))
            .for_each(|piece| blob.rarity[piece as usize] = blob.rarity[piece as usize].saturating_sub(1));
        self.blob(host, layer).takers.remove(&no);
    }

    /// Those that take pieces from here hear of new ones.
    pub(super) fn tell_takers(&mut self, no: u32, layer: u16, piece: u32) {
        if self.blob(no, layer).takers.is_empty() {
            return;
        }
        let takers: Vec<u32> = self.blob(no, layer).takers.iter().copied().collect();
        for taker in takers {
            if !self.nodes[taker as usize].up || !self.reaches(no, taker) {
                continue;
            }
            let blob = self.blob(taker, layer);
            match piece {
                ALL_PIECES => blob.rarity.iter_mut().for_each(|count| *count += 1),
                piece => blob.rarity[piece as usize] += 1,
            }
            if blob.wanted && !blob.is_whole() {
                self.take_from(taker, layer, no);
            }
        }
    }

    /// Asks a neighbour for what it has and this node lacks, as much as may be under way.
    fn take_from(&mut self, no: u32, layer: u16, host: u32) {
        let now = self.queue.now();
        let model = self.model();
        let pipeline = if let Way::Tracked { pipeline, .. } = model.way { pipeline } else { model.at_once };
        loop {
            let rests = self.rival_of(no).rests_until > now;
            let blob = self.blob(no, layer);
            let slots = blob
                .neighbours
                .iter()
                .find(|near| near.host == host)
                .map_or(0, |near| pipeline.saturating_sub(near.under_way));
            if rests || slots == 0 || blob.under_way.count() >= model.at_once {
                return;
            }
            let Some(piece) = self.rarest(no, layer, host) else { return };
            let host = self.idlest(no, layer, piece, host);
            self.ask_for(no, layer, piece, Some(host));
        }
    }

    /// A piece that the neighbour has and this node lacks: the rarest, and of those any.
    fn rarest(&mut self, no: u32, layer: u16, host: u32) -> Option<u32> {
        let place = usize::from(layer);
        let turn = self.rng.next_u64();
        let (mine, theirs) = (self.nodes[no as usize].rival.as_ref()?, self.nodes[host as usize].rival.as_ref()?);
        let (mine, theirs) = (&mine.blobs[place], &theirs.blobs[place]);
        let missing = theirs.have.beyond(&mine.have, &mine.under_way);
        missing.min_by_key(|piece| {
            (mine.rarity[*piece as usize], u64::from(*piece).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ turn)
        })
    }

    /// Of the parents that have a piece the one with the fewest uploads; a tracker's peers keep to their connections.
    fn idlest(&mut self, no: u32, layer: u16, piece: u32, host: u32) -> u32 {
        if !matches!(self.model().way, Way::Scheduled { .. }) {
            return host;
        }
        let near = self.blob(no, layer).neighbours.clone();
        let rival = |host: u32| self.nodes[host as usize].rival.as_deref();
        let able = near
            .iter()
            .map(|near| near.host)
            .filter(|host| rival(*host).is_some_and(|rival| rival.blobs[usize::from(layer)].have.contains(piece)));
        able.min_by_key(|host| rival(*host).map_or(u32::MAX, |rival| rival.uploads)).unwrap_or(host)
    }
}
