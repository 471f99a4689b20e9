//! Pieces on their way.
//!
//! A request takes the registry's latency, or a round trip to a host; its answer is a flow that ends by itself. What fails is
//! asked for again: of the registry after the model's back-off, of others at once. What came of a broken transfer is kept.

use super::state::{ALL_PIECES, Transfer};
use super::{Step, units};
use crate::net::Purpose;
use crate::queue::{Nanos, SECOND};
use crate::strategy::Strategy;
use crate::strategy::model::{LAZY, PULL_BACKOFF, Way};
use crate::world::{Happening, World};

/// First and longest rest of a host that reads the registry for all (assumed: each of them tries again by itself).
const HOST_BACKOFF: (Nanos, Nanos) = (SECOND, 30 * SECOND);
/// How long a connection to a host that is gone is tried, where the model does not say.
const DIAL_TIMEOUT: Nanos = SECOND;

impl World {
    /// Asks for a piece: of the registry, or of another host.
    pub(super) fn ask_for(&mut self, no: u32, layer: u16, piece: u32, from: Option<u32>) {
        let now = self.queue.now();
        let wait = match from {
            None => self.scenario.registry.latency.0,
            Some(host) => 2 * self.latency(no, host),
        };
        self.trace.note(now, no, &[u64::from(layer), u64::from(piece), from.map_or(u64::MAX, u64::from)]);
        let strategy = self.strategy();
        let spans = (strategy == Strategy::Soci).then(|| self.lazy_len(layer, piece));
        let rival = self.rival_of(no);
        let blob = &mut rival.blobs[usize::from(layer)];
        let len_bytes = spans.unwrap_or_else(|| blob.len_of(piece));
        let left_bytes = len_bytes - blob.broken.get(&piece).copied().unwrap_or(0).min(len_bytes - 1);
        if spans.is_none() && piece != ALL_PIECES {
            blob.under_way.insert(piece);
        }
        if let Some(neighbour) = blob.neighbours.iter_mut().find(|other| Some(other.host) == from) {
            neighbour.under_way += 1;
            neighbour.active = now;
        }
        let transfer = rival.next_transfer;
        rival.next_transfer += 1;
        rival
            .transfers
            .insert(transfer, Transfer { layer, piece, from, left_bytes, flow: None, sign: now, wrong: false });
        let node = &mut self.nodes[no as usize];
        let life = node.life;
        node.counts.registry_asks += u64::from(from.is_none());
        if let Some(host) = from {
            self.rival_of(host).uploads += 1;
        }
        self.queue.after(wait, Happening::Rival { node: no, life, step: Step::Begins { transfer } });
    }

    /// A request has reached whoever is to answer it.
    pub(super) fn transfer_begins(&mut self, no: u32, transfer: u64) {
        let now = self.queue.now();
        let life = self.nodes[no as usize].life;
        let Some(open) = self.rival_of(no).transfers.get(&transfer) else { return };
        let (from, left_bytes) = (open.from, open.left_bytes);
        let purpose = Purpose { from, to: no, to_life: life, ask: transfer };
        let flow = match from {
            None => {
                self.registry.requests += 1;
                self.nodes[no as usize].counts.registry_requests += 1;
                if let Some(retry_after) = self.registry_refuses(now) {
                    return self.transfer_failed(no, transfer, retry_after);
                }
                let path = [self.registry.link, self.nodes[no as usize].downlink];
                self.net.open(&path, true, purpose)
            }
            Some(host) if self.reaches(no, host) && self.reaches(host, no) => {
                let (path, hops) = self.path(host, no);
                self.net.open(&path[..hops], true, purpose)
            }
            Some(_) => {
                let wait = match self.model().way {
                    Way::Search { dial, .. } => dial,
                    _ => DIAL_TIMEOUT,
                };
                return self.queue.after(wait, Happening::Rival { node: no, life, step: Step::Fails { transfer } });
            }
        };
        let mut lens = units(left_bytes).peekable();
        while let Some(len_bytes) = lens.next() {
            let is_last = lens.peek().is_none();
            self.net.push(flow, len_bytes, u32::from(is_last), now);
        }
        self.net.go(flow, now);
        self.net.close_when_empty(flow);
        let stall = self.model().stall;
        if let Some(open) = self.rival_of(no).transfers.get_mut(&transfer) {
            (open.flow, open.sign) = (Some(flow), now);
        }
        self.queue.after(stall, Happening::Rival { node: no, life, step: Step::Silent { transfer } });
    }

    /// A link has brought a unit of a transfer to its end: its flow is over with the last one, whoever takes it.
    pub(in crate::world) fn unit_arrived(&mut self, purpose: Purpose, last: bool, len_bytes: u32) {
        let Purpose { from, to, to_life, ask: transfer } = purpose;
        if last
            && self.nodes[to as usize].life == to_life
            && let Some(open) = self.rival_of(to).transfers.get_mut(&transfer)
        {
            open.flow = None;
        }
        if from.is_none_or(|from| self.reaches(from, to)) {
            let step = Step::Unit { transfer, len_bytes, last };
            if let Some(Happening::Rival { node, step, .. }) =
                self.admitted(Happening::Rival { node: to, life: to_life, step })
            {
                self.rival_step(node, step);
            }
        }
    }

    /// A unit has come.
    pub(super) fn unit_came(&mut self, no: u32, transfer: u64, len_bytes: u32, last: bool) {
        let now = self.queue.now();
        let Some(open) = self.rival_of(no).transfers.get_mut(&transfer) else { return };
        open.sign = now;
        open.left_bytes = open.left_bytes.saturating_sub(u64::from(len_bytes));
        let (from, complete) = (open.from, open.left_bytes == 0);
        let is_wrong = from.is_some_and(|from| self.nodes[from as usize].corrupt);
        if let Some(open) = self.rival_of(no).transfers.get_mut(&transfer) {
            open.wrong |= is_wrong;
        }
        let counts = &mut self.nodes[no as usize].counts;
        let bytes = u64::from(len_bytes);
        match from {
            None => counts.from_registry += bytes,
            Some(_) => counts.from_peers += bytes,
        }
        if last && complete {
            self.piece_is_here(no, transfer);
        }
        // A unit before the last one was lost beyond a partition: the silence shows it.
    }

    /// A transfer is over: forgets it at both ends.
    fn take_transfer(&mut self, no: u32, transfer: u64) -> Option<Transfer> {
        let now = self.queue.now();
        let rival = self.rival_of(no);
        let open = rival.transfers.remove(&transfer)?;
        let blob = &mut rival.blobs[usize::from(open.layer)];
        if open.piece != ALL_PIECES {
            blob.under_way.remove(open.piece);
        }
        if let Some(neighbour) = blob.neighbours.iter_mut().find(|other| Some(other.host) == open.from) {
            neighbour.under_way = neighbour.under_way.saturating_sub(1);
            neighbour.active = now;
        }
        if let Some(host) = open.from {
            let uploads = &mut self.rival_of(host).uploads;
            *uploads = uploads.saturating_sub(1);
        }
        if let Some(flow) = open.flow {
            self.net.close(flow);
        }
        Some(open)
    }

    fn piece_is_here(&mut self, no: u32, transfer: u64) {
        let now = self.queue.now();
        let Some(open) = self.take_transfer(no, transfer) else { return };
        let Transfer { layer, piece, from, wrong, .. } = open;
        if wrong {
            return self.piece_is_wrong(no, layer, piece, from);
        }
        self.trace.note(now, no, &[u64::from(layer), u64::from(piece)]);
        let rival = self.rival_of(no);
        rival.failures = 0;
        if self.strategy() == Strategy::Soci {
            return self.span_is_here(no, layer, piece);
        }
        let blob = &mut self.rival_of(no).blobs[usize::from(layer)];
        blob.broken.remove(&piece);
        match piece {
            ALL_PIECES => (0..blob.piece_count).for_each(|piece| blob.have.insert(piece)),
            piece => blob.have.insert(piece),
        }
        if blob.is_whole() {
            self.blob_whole(no, layer);
        }
        self.tell_takers(no, layer, piece);
        self.plan_look(no, now);
    }

    /// Pieces have sums, so who gave a wrong one is asked for no more; a whole layer fails by its digest, and the pull with it.
    fn piece_is_wrong(&mut self, no: u32, layer: u16, piece: u32, from: Option<u32>) {
        let whole = self.model().pieces.is_none();
        let blob = &mut self.rival_of(no).blobs[usize::from(layer)];
        blob.broken.remove(&piece);
        if let Some(host) = from {
            self.drop_neighbour(no, layer, host);
        }
        if whole {
            self.rests(no, None);
        }
        self.plan_look(no, self.queue.now());
    }

    /// Rests after a failure, as long as the model says, or the registry.
    fn rests(&mut self, no: u32, retry_after: Option<Nanos>) {
        let now = self.queue.now();
        let (first, longest) = match (self.strategy(), self.is_host(no)) {
            (Strategy::Soci, _) => LAZY.backoff,
            (_, true) => HOST_BACKOFF,
            (_, false) => PULL_BACKOFF,
        };
        let rival = self.rival_of(no);
        let rest = (first << rival.failures.min(20)).min(longest).max(retry_after.unwrap_or(0));
        rival.failures += 1;
        rival.rests_until = rival.rests_until.max(now + rest);
    }

    /// A transfer has failed.
    pub(in crate::world) fn transfer_failed(
        &mut self,
        no: u32,
        transfer: u64,
        retry_after: Option<std::time::Duration>,
    ) {
        let Some(open) = self.take_transfer(no, transfer) else { return };
        let Transfer { layer, piece, from, left_bytes, .. } = open;
        let strategy = self.strategy();
        let blob = &mut self.rival_of(no).blobs[usize::from(layer)];
        if strategy != Strategy::Soci {
            let len_bytes = blob.len_of(piece);
            blob.broken.insert(piece, len_bytes - left_bytes.min(len_bytes));
        }
        match from {
            Some(host) => self.drop_neighbour(no, layer, host),
            None => self.rests(no, retry_after.map(hermes_policy::time::nanos)),
        }
        if strategy == Strategy::Soci {
            return self.span_failed(no, layer, piece);
        }
        self.plan_look(no, self.queue.now());
    }

    /// Whether a transfer was silent for too long.
    pub(super) fn transfer_silent(&mut self, no: u32, transfer: u64) {
        let stall = self.model().stall;
        let (now, life) = (self.queue.now(), self.nodes[no as usize].life);
        let Some(open) = self.rival_of(no).transfers.get(&transfer) else { return };
        let due = open.sign + stall;
        if due > now {
            return self.queue.at(due, Happening::Rival { node: no, life, step: Step::Silent { transfer } });
        }
        self.transfer_failed(no, transfer, None);
    }

    /// A daemon ends: its transfers are over at once, and those that took from it hear it after `wait`.
    pub(in crate::world) fn rival_dies(&mut self, no: u32, wait: impl Fn(&Self, u32) -> Nanos) {
        let own: Vec<u64> = self.rival_of(no).transfers.keys().copied().collect();
        for transfer in own {
            self.take_transfer(no, transfer);
        }
        for other in 0..self.nodes.len() as u32 {
            let Some(rival) = &mut self.nodes[other as usize].rival else { continue };
            let mut knows = rival.blobs.iter().any(|blob| blob.neighbours.iter().any(|near| near.host == no));
            for open in rival.transfers.values_mut().filter(|open| open.from == Some(no)) {
                // The world closes all flows of the dead.
                open.flow = None;
                knows = true;
            }
            if knows {
                let (life, wait) = (self.nodes[other as usize].life, wait(self, other));
                self.queue.after(wait, Happening::Rival { node: other, life, step: Step::Lost { host: no } });
            }
        }
    }

    /// A host is gone: what it was to give is asked for elsewhere.
    pub(super) fn host_lost(&mut self, no: u32, host: u32) {
        let of_host = self.rival_of(no).transfers.iter().filter(|(_, open)| open.from == Some(host));
        let lost: Vec<u64> = of_host.map(|(transfer, _)| *transfer).collect();
        lost.into_iter().for_each(|transfer| self.transfer_failed(no, transfer, None));
        (0..self.shape.layers.len() as u16).for_each(|layer| self.drop_neighbour(no, layer, host));
        self.plan_look(no, self.queue.now());
    }

    /// All bodies of the registry break off.
    pub(in crate::world) fn cut_transfers(&mut self) {
        for no in 0..self.nodes.len() as u32 {
            let Some(rival) = &self.nodes[no as usize].rival else { continue };
            let cut = rival.transfers.iter().filter(|(_, open)| open.from.is_none() && open.flow.is_some());
            let cut: Vec<u64> = cut.map(|(transfer, _)| *transfer).collect();
            cut.into_iter().for_each(|transfer| self.transfer_failed(no, transfer, None));
        }
    }
}
