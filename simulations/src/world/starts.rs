//! What programs read, and when they start.
//!
//! A start opens the image's layers, asks for its prefetch, and reads the shape's reads in order, some at once. A read of what
//! is here costs nothing; one that finds a mark of the policy is told as a hit; one that misses waits. The node is ready when
//! the last read is done. A read that fails is counted and made again after a second, as programs do.

use std::sync::Arc;

use hermes_image::runs::Runs;
use hermes_policy::class::Class;
use hermes_policy::event::{Event, FailCause, OriginNo, PeerNo, ReadId};
use hermes_policy::rng::Rng;

use super::{Happening, World};
use crate::node::{Node, Start, Waiting};
use crate::queue::{Nanos, SECOND};
use crate::scenario::{Prefetch, WorkloadKind};
use crate::shape::Shape;
use crate::strategy::Strategy;

/// How long prefetch is worth waiting for: as long as `hermes complete` waits for one layer.
const PREFETCH_DEADLINE: Nanos = 600 * SECOND;
/// A node has run for so long when the first start comes, so that connections stand.
const SETTLED: Nanos = SECOND;

/// Where the images of jobs are drawn from, beside the seed.
const JOBS_SEED: u64 = 0x4a4f_4253_0000_0001;

/// One of so many, of which the first is drawn twice as often as the second, three times as often as the third, and so on.
fn popular(count: usize, rng: &mut Rng) -> usize {
    let weight = |rank: usize| 1_000_000 / (rank as u64 + 1);
    let mut left = rng.below((0..count).map(weight).sum());
    for rank in 0..count {
        if left < weight(rank) {
            return rank;
        }
        left -= weight(rank);
    }
    0
}

impl World {
    /// Plans the whole run.
    pub(super) fn begin(&mut self) {
        let work = self.scenario.workload.clone();
        let nodes = self.scenario.cluster.nodes;
        let strategy = self.strategy();
        let settled = SETTLED + if strategy == Strategy::Preload { work.lead.0 } else { 0 };
        self.begin_hosts();
        let members = if work.kind == WorkloadKind::Autoscaler { work.warm } else { nodes };
        for no in 0..members {
            let node = &mut self.nodes[no as usize];
            (node.joined, node.up) = (true, true);
        }
        (0..members).for_each(|no| self.join(no));
        let first = if work.kind == WorkloadKind::Autoscaler { work.warm } else { 0 };
        if strategy != Strategy::HermesNoSeeds {
            (0..first).for_each(|no| self.have_everything(no));
        }
        self.starts = if work.kind == WorkloadKind::CiChurn { work.jobs } else { nodes - first };
        let interval = 60 * SECOND / u64::from(work.per_minute.max(1));
        if work.kind == WorkloadKind::CiChurn {
            let mut rng = Rng::new(self.checkers.seed() ^ JOBS_SEED);
            for no in 0..work.jobs {
                let (at, image) = (settled + interval * u64::from(no), popular(self.shape.images.len(), &mut rng));
                self.last_change = at;
                self.queue.at(at, Happening::Job { image });
            }
        }
        for no in first..nodes {
            let place = u64::from(no - first);
            let at = match work.kind {
                WorkloadKind::CiChurn => {
                    self.free.push_back(no);
                    continue;
                }
                WorkloadKind::FlashCrowd => work.spread.0 * place / u64::from(self.starts.max(1)),
                WorkloadKind::Staggered | WorkloadKind::Autoscaler => interval * place,
                WorkloadKind::RollingUpdate => {
                    self.have_version_before(no);
                    if place >= u64::from(work.surge) {
                        self.to_roll.push(no);
                        continue;
                    }
                    0
                }
            };
            self.last_change = self.last_change.max(settled + at);
            self.queue.at(settled + at, Happening::Arrives { node: no });
        }
        self.to_roll.reverse();
        if strategy == Strategy::Preload {
            (first..members).for_each(|no| self.preload(no, SETTLED));
        }
        self.plan_faults(settled);
        self.queue.at(SETTLED, Happening::Check);
    }

    /// A node that runs the image already: all that a start reads is here.
    fn have_everything(&mut self, no: u32) {
        for place in 0..self.shape.layers.len() {
            self.nodes[no as usize].layers[place].have = self.shape.layers[place].hot.clone();
        }
        self.has_layers(no, 0..self.shape.layers.len());
        if self.strategy().is_policy() {
            self.open_layers(no, None);
        }
    }

    /// A node that runs the version before has the layers that have not changed.
    fn have_version_before(&mut self, no: u32) {
        let kept = self.shape.layers.len().saturating_sub(usize::from(self.scenario.workload.changed_layers));
        for place in 0..kept {
            self.nodes[no as usize].layers[place].have = self.shape.layers[place].hot.clone();
        }
        self.has_layers(no, 0..kept);
    }

    /// What of a changed layer the version before has, in other places: the same on all nodes.
    fn kept_chunks(&self, place: usize) -> Runs {
        let count = self.shape.layers[place].geometry.chunk_count();
        let changed = self.scenario.workload.changed.of(u64::from(count)) as u32;
        Runs::one(changed.min(count)..count)
    }

    fn open_layers(&mut self, no: u32, begins: Option<&Prefetch>) {
        let rolls = self.scenario.workload.kind == WorkloadKind::RollingUpdate;
        let kept = self.shape.layers.len().saturating_sub(usize::from(self.scenario.workload.changed_layers));
        let shape = Arc::clone(&self.shape);
        for (place, hot) in Self::parts(&shape, &self.nodes[no as usize]) {
            let (layer, geometry) = (shape.layers[place].diff_id, shape.layers[place].geometry.clone());
            let here = &mut self.nodes[no as usize].layers[place];
            let was_open = std::mem::replace(&mut here.open, true);
            let present = here.have.clone();
            let local = if rolls && place >= kept { self.kept_chunks(place) } else { Runs::new() };
            if begins.is_some() {
                self.checkers.needs(place, &hot.difference(&present).difference(&local));
            }
            // Images that were started here stay mounted.
            if was_open {
                continue;
            }
            self.tell(no, Event::LayerOpened { layer, geometry, present, local, origin: Some(OriginNo(0)) });
            self.provide(no, place as u16);
            let near: Vec<u32> = self.nodes[no as usize].connected.iter().copied().collect();
            near.into_iter().for_each(|peer| self.watch(no, place as u16, peer));
        }
    }

    /// The layers of the image that a node starts, with what a start reads of them; of all images when it starts none.
    pub(super) fn parts<'a>(shape: &'a Shape, node: &Node) -> Vec<(usize, &'a Runs)> {
        match &node.start {
            Some(start) => {
                let image = &shape.images[start.image];
                image.layers.iter().copied().zip(&image.hot).collect()
            }
            None => shape.layers.iter().map(|layer| &layer.hot).enumerate().collect(),
        }
    }

    /// A job comes: the node that has been free for longest has it, or the next one that will be.
    pub(super) fn job_comes(&mut self, image: usize) {
        // Who died while it was free comes back by itself: see `resume`.
        while let Some(no) = self.free.pop_front() {
            if self.nodes[no as usize].up {
                return self.arrives(no, image);
            }
        }
        self.jobs.push_back(image);
    }

    /// A node's job is over.
    pub(super) fn is_free(&mut self, no: u32) {
        match self.jobs.pop_front() {
            Some(image) => self.arrives(no, image),
            None => self.free.push_back(no),
        }
    }

    /// A pod lands on a node.
    pub(super) fn arrives(&mut self, no: u32, image: usize) {
        if self.scenario.workload.kind == WorkloadKind::Autoscaler && !self.nodes[no as usize].joined {
            self.join(no);
            self.change_members(self.scenario.cluster.gossip.0);
        }
        if !self.nodes[no as usize].up {
            // Died before: the pod goes elsewhere.
            self.nodes[no as usize].lost = true;
            self.lost += 1;
            return;
        }
        let now = self.queue.now();
        let next = self.shape.images[image].reads.start;
        let start = Start { began: now, image, next, done: 0, ready: None, again: Vec::new(), at: Default::default() };
        self.nodes[no as usize].start = Some(start);
        self.first_start.get_or_insert(now);
        self.begun += 1;
        if !self.strategy().is_policy() {
            return self.rival_starts(no);
        }
        let prefetch = self.scenario.start.prefetch;
        self.open_layers(no, Some(&prefetch));
        self.prefetch(no);
        (0..self.scenario.start.parallel).for_each(|_| self.read_on(no));
    }

    fn prefetch(&mut self, no: u32) {
        let shape = Arc::clone(&self.shape);
        for (place, hot) in Self::parts(&shape, &self.nodes[no as usize]) {
            let all = 0..shape.layers[place].geometry.chunk_count();
            let prefetch = match self.strategy() {
                Strategy::HermesNoProfile => Prefetch::None,
                _ => self.scenario.start.prefetch,
            };
            let wanted = match prefetch {
                Prefetch::None => Runs::new(),
                Prefetch::Profile => hot.clone(),
                Prefetch::All => Runs::one(all),
            };
            let missing = wanted.difference(&self.nodes[no as usize].layers[place].have);
            if !missing.is_empty() {
                self.need(no, place as u16, missing, Class::Prefetch, PREFETCH_DEADLINE);
            }
        }
    }

    fn need(&mut self, no: u32, layer: u16, chunks: Runs, class: Class, patience: Nanos) -> ReadId {
        let now = self.queue.now();
        let node = &mut self.nodes[no as usize];
        let read = node.read_id();
        node.reads.insert(read, Waiting { layer, chunks: chunks.clone(), class, since: now });
        if !self.scenario.cluster.strategy.is_policy() {
            self.lazy_need(no, layer, &chunks);
            return read;
        }
        let deadline = node.clock(now + patience);
        let layer = self.shape.layers[usize::from(layer)].diff_id;
        self.tell(no, Event::ReadNeeds { read, layer, chunks, class, deadline });
        read
    }

    /// One of a program's threads reads on, until it has to wait.
    pub(super) fn read_on(&mut self, no: u32) {
        let now = self.queue.now();
        loop {
            let node = &mut self.nodes[no as usize];
            let Some(start) = node.start.as_mut().filter(|_| node.up) else { return };
            let place = match start.again.pop() {
                Some(place) => place,
                None if start.next < self.shape.images[start.image].reads.end => {
                    start.next += 1;
                    start.next - 1
                }
                None => return self.is_ready(no),
            };
            let read = self.shape.reads[place].clone();
            let here = &mut node.layers[usize::from(read.layer)];
            if !here.have.contains_all(read.chunks.clone()) {
                let id = ReadId(node.next_read + 1);
                start.at.insert(id, place);
                let deadline = self.scenario.start.deadline.0;
                self.need(no, read.layer, Runs::one(read.chunks), Class::Demand, deadline);
                return;
            }
            start.done += 1;
            self.hits += 1;
            let marked: Vec<usize> =
                here.marks.iter().filter(|(_, chunk)| read.chunks.contains(chunk)).map(|(mark, _)| *mark).collect();
            here.marks.retain(|mark, _| !marked.contains(mark));
            if !marked.is_empty() {
                let layer = self.shape.layers[usize::from(read.layer)].diff_id;
                let (first_chunk, end_chunk) = (read.chunks.start, read.chunks.end);
                self.tell(no, Event::ReadHit { layer, first_chunk, end_chunk });
            }
            let think = self.think(no);
            if think > 0 {
                return self.queue.at(now + think, Happening::Read { node: no });
            }
        }
    }

    /// What one thread computes between two reads.
    fn think(&self, no: u32) -> Nanos {
        let image = self.nodes[no as usize].start.as_ref().map_or(0, |start| start.image);
        let reads = (self.shape.images[image].reads.len() as u64).max(1);
        self.scenario.start.work.0 * u64::from(self.scenario.start.parallel) / reads
    }

    fn is_ready(&mut self, no: u32) {
        let now = self.queue.now();
        let node = &mut self.nodes[no as usize];
        let Some(start) = &mut node.start else { return };
        if start.done < self.shape.images[start.image].reads.len() || start.ready.is_some() {
            return;
        }
        start.ready = Some(now);
        self.took.push((start.began, now));
        self.ready += 1;
        let life = node.life;
        self.tell_all(no);
        if self.scenario.workload.kind == WorkloadKind::CiChurn {
            // What the last job to come needs is counted from when it can begin.
            self.last_change = self.last_change.max(now);
            self.queue.after(self.scenario.workload.job.0, Happening::JobEnds { node: no, life });
        }
        if let Some(next) = self.to_roll.pop() {
            self.last_change = now;
            self.queue.after(0, Happening::Arrives { node: next });
        }
    }

    /// A read has all its chunks.
    pub(super) fn delivered(&mut self, no: u32, read: ReadId) {
        let now = self.queue.now();
        let node = &mut self.nodes[no as usize];
        let Some(waiting) = node.reads.remove(&read) else {
            return self.violated("reads", format!("node {no}: {read:?} ends twice"));
        };
        let here = &node.layers[usize::from(waiting.layer)];
        let lacking = waiting.chunks.difference(&here.have);
        if !lacking.is_empty() {
            return self.violated("verified", format!("node {no}: {read:?} gets {lacking:?}, which is not stored"));
        }
        if let Some(what) = self.checkers.check_delivery(no, waiting.layer, &waiting.chunks) {
            return self.violated("verified", what);
        }
        if waiting.class == Class::Prefetch {
            return;
        }
        let wait = now - waiting.since;
        self.waits.push((wait, self.len_bytes(waiting.layer, &waiting.chunks) as u32));
        if wait > self.scenario.expect.demand_wait.0 {
            let waited = crate::units::show_nanos(wait);
            self.violated(
                "starved",
                format!("node {no}: {:?} of layer {} came after {waited}", waiting.chunks, waiting.layer),
            );
        }
        let think = self.think(no);
        let node = &mut self.nodes[no as usize];
        if let Some(start) = &mut node.start
            && start.at.remove(&read).is_some()
        {
            start.done += 1;
        }
        self.queue.at(now + think, Happening::Read { node: no });
    }

    /// A read has failed: the program tries again.
    pub(super) fn read_failed(&mut self, no: u32, read: ReadId, cause: &FailCause) {
        let node = &mut self.nodes[no as usize];
        let Some(waiting) = node.reads.remove(&read) else {
            return self.violated("reads", format!("node {no}: {read:?} ends twice"));
        };
        if waiting.class == Class::Prefetch {
            return;
        }
        if let Some(start) = &mut node.start
            && let Some(place) = start.at.remove(&read)
        {
            start.again.push(place);
        }
        self.checkers.read_failed();
        if !self.scenario.expect.failures {
            let why = Self::describe(cause);
            return self
                .violated("failed", format!("node {no}: {:?} of layer {}: {why}", waiting.chunks, waiting.layer));
        }
        self.queue.after(SECOND, Happening::Read { node: no });
    }

    /// A daemon that has started again opens what it has, and its containers' reads are made again.
    pub(super) fn resume(&mut self, no: u32) {
        self.join(no);
        let near: Vec<u32> = self.nodes[no as usize].connected.iter().copied().collect();
        near.into_iter().for_each(|peer| self.tell(no, Event::PeerUp { peer: PeerNo(peer) }));
        let start = self.nodes[no as usize].start.as_ref();
        let (has_started, works) = (start.is_some(), start.is_some_and(|start| start.ready.is_none()));
        if has_started && self.strategy().is_policy() {
            self.open_layers(no, Some(&Prefetch::None));
            self.prefetch(no);
            (0..self.scenario.start.parallel).for_each(|_| self.read_on(no));
        } else if has_started {
            self.rival_starts(no);
        }
        if self.scenario.workload.kind == WorkloadKind::CiChurn && !works && !self.free.contains(&no) {
            // Its job ended with it.
            self.is_free(no);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_drawn_as_often_as_zipf_says() {
        let mut rng = Rng::new(1);
        let mut drawn = [0_u32; 4];
        (0..25_000).for_each(|_| drawn[popular(4, &mut rng)] += 1);
        // 12, 6, 4 and 3 of 25.
        for (count, expected) in drawn.into_iter().zip([12_000_u32, 6_000, 4_000, 3_000]) {
            assert!(count.abs_diff(expected) < 400, "{drawn:?}");
        }
        assert_eq!(popular(1, &mut rng), 0);
    }
}
