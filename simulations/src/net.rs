//! Links, and the bytes on them.
//!
//! **Model.** A flow is one answer on its way: units (a chunk of a peer, a piece of the registry's body) that cross the same
//! few links in order. A link sends one unit at a time, at its rate, from the flows that have one ready there, in turns; a
//! flow has at most [`WINDOW_UNITS`] units beyond its first link. Turns with a window give each flow its max-min fair
//! share where units have the same length (Hahne, "Round-robin scheduling for max-min fairness in data networks", IEEE
//! JSAC 9(7), 1991): a flow that a later link holds back has nothing ready at the earlier ones and leaves them to others.
//! So nothing is ever recomputed: a unit costs one event for each link, and 10,000 nodes cost 10,000 times one node. What it
//! gives up: shares are fair over some turns, not at each instant, and a unit is on one link at a time (store and forward).
//! The test below compares it with max-min shares computed by filling.
//!
//! At its first link a flow of demand goes before prefetch, which still sends a unit every [`PREFETCH_EVERY`]: that is what
//! the exchange server does between batches. Later links know no classes.
//!
//! **Latency** is paid once, before the first unit of a flow that was idle: links are pipes, so it only shifts what follows.
//!
//! **Conservation**: what was pushed was delivered, dropped with a closed flow, or is still here ([`Books`]).

use std::collections::VecDeque;

use crate::queue::{MILLISECOND, Nanos};
use crate::units::Rate;

/// Units of a flow beyond its first link: as much as a socket's buffers at both ends hold, 256 KiB.
const WINDOW_UNITS: u64 = 4;
/// How long prefetch yields to demand at most (`YIELD_MAX` in `p2p/exchange/limits.rs`).
const PREFETCH_EVERY: Nanos = 20 * MILLISECOND;
/// Most links that a flow crosses: out of the node, out of its zone, into the other zone, into the other node.
pub(crate) const HOPS_MAX: usize = 4;

/// A link, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkNo(pub u32);

/// A flow, by number. A number is used again after the flow was closed and nothing of it is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlowNo(pub u32);

#[derive(Debug)]
struct Link {
    rate: Rate,
    /// Demand goes first here.
    ranks: bool,
    sending: Option<FlowNo>,
    /// Flows with a unit ready: demand, and the rest.
    ready: [VecDeque<FlowNo>; 2],
    prefetch_sent_at: Nanos,
    sent_bytes: u64,
    busy: Nanos,
}

#[derive(Debug, Clone, Copy)]
struct Unit {
    len_bytes: u32,
    tag: u32,
}

/// What a flow is for: the world's own names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Purpose {
    /// Who sends; `None` for the registry.
    pub from: Option<u32>,
    /// Who receives, and in which of its lives.
    pub to: u32,
    /// See `to`.
    pub to_life: u32,
    /// The receiver's ask.
    pub ask: u64,
}

#[derive(Debug)]
struct Flow {
    path: [LinkNo; HOPS_MAX],
    hops: usize,
    urgent: bool,
    purpose: Purpose,
    /// Units that have not been delivered, the oldest first.
    units: VecDeque<Unit>,
    pushed: u64,
    delivered: u64,
    started: [u64; HOPS_MAX],
    finished: [u64; HOPS_MAX],
    queued: [bool; HOPS_MAX],
    /// It was told to go, and has not run dry since.
    runs: bool,
    /// Nothing more will be pushed: it is closed when the last unit has arrived.
    ends: bool,
    closed: bool,
    /// Places in queues of links, and units on links.
    held: u32,
}

impl Flow {
    fn ready_at(&self, hop: usize) -> bool {
        if self.closed || !self.runs {
            return false;
        }
        match hop {
            0 => self.started[0] < self.pushed && self.started[0] - self.delivered < WINDOW_UNITS,
            _ => self.started[hop] < self.finished[hop - 1],
        }
    }
}

/// Bytes of all flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Books {
    /// Given to flows.
    pub pushed: u64,
    /// Came out at the other end.
    pub delivered: u64,
    /// Were on their way when their flow was closed.
    pub dropped: u64,
    /// Are on their way.
    pub waiting: u64,
}

/// What comes of a unit that a link has sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// The flow has nothing more to send at its first link.
    pub drained: Option<FlowNo>,
    /// A unit has arrived: the flow, its tag, its length in bytes.
    pub arrived: Option<(FlowNo, u32, u32)>,
}

/// All links and flows.
#[derive(Debug, Default)]
pub struct Network {
    links: Vec<Link>,
    flows: Vec<Flow>,
    free: Vec<u32>,
    books: Books,
    /// Links that have begun to send, and until when: the world plans their ends.
    begun: Vec<(Nanos, LinkNo)>,
}

impl Network {
    /// A new link; `ranks` when demand goes first on it.
    pub fn add_link(&mut self, rate: Rate, ranks: bool) -> LinkNo {
        let no = LinkNo(self.links.len() as u32);
        self.links.push(Link {
            rate,
            ranks,
            sending: None,
            ready: [VecDeque::new(), VecDeque::new()],
            prefetch_sent_at: 0,
            sent_bytes: 0,
            busy: 0,
        });
        no
    }

    /// Changes the rate of a link, from the next unit on.
    pub fn set_rate(&mut self, link: LinkNo, rate: Rate) {
        self.links[link.0 as usize].rate = rate;
    }

    /// The rate of a link.
    pub fn rate(&self, link: LinkNo) -> Rate {
        self.links[link.0 as usize].rate
    }

    /// Bytes that a link has sent, and for how long it was sending.
    pub fn sent(&self, link: LinkNo) -> (u64, Nanos) {
        let link = &self.links[link.0 as usize];
        (link.sent_bytes, link.busy)
    }

    /// Bytes of all flows.
    pub fn books(&self) -> Books {
        self.books
    }

    /// Counts the bytes that wait, for comparison with the books.
    pub fn count_waiting(&self) -> u64 {
        let open = self.flows.iter().filter(|flow| !flow.closed);
        open.flat_map(|flow| &flow.units).map(|unit| u64::from(unit.len_bytes)).sum()
    }

    /// A flow over `path`, with nothing to send yet.
    ///
    /// # Panics
    /// When the path is empty or has more than four links.
    pub fn open(&mut self, path: &[LinkNo], urgent: bool, purpose: Purpose) -> FlowNo {
        assert!(!path.is_empty() && path.len() <= HOPS_MAX, "a flow crosses one to four links");
        let mut links = [LinkNo(0); HOPS_MAX];
        links[..path.len()].copy_from_slice(path);
        let flow = Flow {
            path: links,
            hops: path.len(),
            urgent,
            purpose,
            units: VecDeque::new(),
            pushed: 0,
            delivered: 0,
            started: [0; HOPS_MAX],
            finished: [0; HOPS_MAX],
            queued: [false; HOPS_MAX],
            runs: false,
            ends: false,
            closed: false,
            held: 0,
        };
        match self.free.pop() {
            Some(no) => {
                self.flows[no as usize] = flow;
                FlowNo(no)
            }
            None => {
                self.flows.push(flow);
                FlowNo(self.flows.len() as u32 - 1)
            }
        }
    }

    /// What a flow is for.
    pub fn purpose(&self, flow: FlowNo) -> Purpose {
        self.flows[flow.0 as usize].purpose
    }

    /// Puts a unit at the end of a flow. Says whether the flow was idle, so that [`Network::go`] is needed.
    pub fn push(&mut self, no: FlowNo, len_bytes: u32, tag: u32, now: Nanos) -> bool {
        let flow = &mut self.flows[no.0 as usize];
        let idle = flow.units.is_empty();
        flow.units.push_back(Unit { len_bytes, tag });
        flow.pushed += 1;
        self.books.pushed += u64::from(len_bytes);
        self.books.waiting += u64::from(len_bytes);
        self.offer(no, 0, now);
        idle
    }

    /// Lets a flow that was idle begin.
    pub fn go(&mut self, no: FlowNo, now: Nanos) {
        let flow = &mut self.flows[no.0 as usize];
        if !flow.closed && !flow.units.is_empty() {
            flow.runs = true;
            self.offer(no, 0, now);
        }
    }

    /// Units that the flow has not sent over its first link.
    pub fn unsent(&self, flow: FlowNo) -> u64 {
        let flow = &self.flows[flow.0 as usize];
        flow.pushed - flow.finished[0]
    }

    /// Ends a flow when all that was pushed has arrived.
    pub fn close_when_empty(&mut self, no: FlowNo) {
        let flow = &mut self.flows[no.0 as usize];
        flow.ends = true;
        if flow.units.is_empty() {
            self.close(no);
        }
    }

    /// Whether the flow was not closed.
    pub fn is_open(&self, flow: FlowNo) -> bool {
        !self.flows[flow.0 as usize].closed
    }

    /// Ends all flows with such a purpose.
    pub fn close_all(&mut self, is_meant: impl Fn(&Purpose) -> bool) {
        for no in 0..self.flows.len() {
            if !self.flows[no].closed && is_meant(&self.flows[no].purpose) {
                self.close(FlowNo(no as u32));
            }
        }
    }

    /// Ends a flow and drops what has not arrived.
    pub fn close(&mut self, no: FlowNo) {
        let flow = &mut self.flows[no.0 as usize];
        debug_assert!(!flow.closed, "{no:?} is closed twice");
        let left: u64 = flow.units.iter().map(|unit| u64::from(unit.len_bytes)).sum();
        flow.closed = true;
        self.books.waiting -= left;
        self.books.dropped += left;
        if flow.held == 0 {
            flow.units = VecDeque::new();
            self.free.push(no.0);
        }
    }

    /// The links that have begun to send since the last call, and when they are done.
    pub fn take_begun(&mut self) -> Option<(Nanos, LinkNo)> {
        self.begun.pop()
    }

    /// Puts the flow into the queue of its link at `hop`, if it has a unit ready there.
    fn offer(&mut self, no: FlowNo, hop: usize, now: Nanos) {
        let flow = &mut self.flows[no.0 as usize];
        if flow.queued[hop] || !flow.ready_at(hop) {
            return;
        }
        flow.queued[hop] = true;
        flow.held += 1;
        let link_no = flow.path[hop];
        let link = &mut self.links[link_no.0 as usize];
        let rank = usize::from(link.ranks && !flow.urgent);
        link.ready[rank].push_back(no);
        if link.sending.is_none() {
            self.begin(link_no, now);
        }
    }

    /// Lets a link that is free send the next unit.
    fn begin(&mut self, link_no: LinkNo, now: Nanos) {
        loop {
            let link = &mut self.links[link_no.0 as usize];
            let prefetch_first = !link.ready[1].is_empty() && now >= link.prefetch_sent_at + PREFETCH_EVERY;
            let rank = usize::from(link.ready[0].is_empty() || prefetch_first);
            let Some(no) = link.ready[rank].pop_front() else { return };
            let flow = &mut self.flows[no.0 as usize];
            let hop = flow.path[..flow.hops].iter().position(|other| *other == link_no).unwrap_or(0);
            flow.queued[hop] = false;
            flow.held -= 1;
            if flow.closed {
                if flow.held == 0 {
                    flow.units = VecDeque::new();
                    self.free.push(no.0);
                }
                continue;
            }
            let index = (flow.started[hop] - flow.delivered) as usize;
            let len_bytes = u64::from(flow.units[index].len_bytes);
            flow.started[hop] += 1;
            flow.held += 1;
            let takes = link.rate.time(len_bytes);
            link.sending = Some(no);
            link.sent_bytes += len_bytes;
            link.busy += takes;
            if rank == 1 {
                link.prefetch_sent_at = now;
            }
            self.begun.push((now + takes, link_no));
            return;
        }
    }

    /// A link has sent its unit.
    pub fn sent_one(&mut self, link_no: LinkNo, now: Nanos) -> Sent {
        let mut sent = Sent::default();
        let Some(no) = self.links[link_no.0 as usize].sending.take() else { return sent };
        let flow = &mut self.flows[no.0 as usize];
        flow.held -= 1;
        if flow.closed {
            if flow.held == 0 {
                flow.units = VecDeque::new();
                self.free.push(no.0);
            }
        } else {
            let hop = flow.path[..flow.hops].iter().position(|other| *other == link_no).unwrap_or(0);
            flow.finished[hop] += 1;
            if hop == 0 && flow.finished[0] == flow.pushed {
                sent.drained = Some(no);
            }
            if hop + 1 == flow.hops {
                flow.delivered += 1;
                if let Some(unit) = flow.units.pop_front() {
                    self.books.waiting -= u64::from(unit.len_bytes);
                    self.books.delivered += u64::from(unit.len_bytes);
                    sent.arrived = Some((no, unit.tag, unit.len_bytes));
                }
                flow.runs = !flow.units.is_empty();
                if flow.ends && flow.units.is_empty() {
                    self.close(no);
                }
            } else {
                self.offer(no, hop + 1, now);
            }
            self.offer(no, 0, now);
            self.offer(no, hop, now);
        }
        if self.links[link_no.0 as usize].sending.is_none() {
            self.begin(link_no, now);
        }
        sent
    }
}

#[cfg(test)]
mod tests;
