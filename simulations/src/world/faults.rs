//! What goes wrong, and when it is over.
//!
//! The nodes that a fault hits are drawn when it begins, from those that are there; a fault with a share above zero hits one at
//! least, and none hits all but where it is asked to. The run's patience counts from the end of the last fault, because what
//! must hold before it is safety, and what must come after it is progress.

use hermes_policy::event::AskId;

use super::{Happening, World};
use crate::queue::{MILLISECOND, Nanos, SECOND};
use crate::report::Mark;
use crate::scenario::{FaultConfig, FaultKind};
use crate::units::Rate;

/// When other systems find out that a host is gone with which they have a connection: an assumption, and kind to them.
const RIVALS_KEEP_ALIVE: Nanos = 10 * SECOND;

impl World {
    pub(super) fn plan_faults(&mut self, from: Nanos) {
        for no in 0..self.scenario.faults.len() {
            let fault = &self.scenario.faults[no];
            let begins = from + fault.at.0;
            self.last_change = self.last_change.max(begins + fault.lasts.map_or(0, |lasts| lasts.0));
            if let Some(lasts) = fault.lasts {
                let ends = begins + lasts.0;
                self.queue.at(ends, Happening::Fault { no, ends: true });
            }
            self.queue.at(begins, Happening::Fault { no, ends: false });
        }
    }

    pub(super) fn fault(&mut self, no: usize, ends: bool) {
        let scenario = std::sync::Arc::clone(&self.scenario);
        let fault = &scenario.faults[no];
        let (now, what) = (self.queue.now(), fault.kind.describe());
        let verb = if ends { "ends" } else { "begins" };
        self.marks.push(Mark { at_ns: now, what: format!("{what} {verb}") });
        if ends {
            self.fault_ends(no, fault);
        } else {
            self.hit[no] = self.draw(fault);
            self.fault_begins(no, fault);
        }
        if ends || fault.lasts.is_none() {
            self.faults_left -= 1;
        }
    }

    fn draw(&mut self, fault: &FaultConfig) -> Vec<u32> {
        let mut there: Vec<u32> = (0..self.nodes.len() as u32)
            .filter(|no| self.nodes[*no as usize].joined && self.nodes[*no as usize].up)
            .collect();
        if fault.kind == FaultKind::ZoneLoss {
            let last = self.scenario.cluster.zones - 1;
            there.retain(|no| self.nodes[*no as usize].zone == last);
            return there;
        }
        let wanted = fault.share.of(there.len() as u64).max(u64::from(fault.share.0 > 0)) as usize;
        let mut drawn = Vec::with_capacity(wanted);
        while drawn.len() < wanted && !there.is_empty() {
            drawn.push(there.swap_remove(self.rng.below(there.len() as u64) as usize));
        }
        drawn
    }

    fn fault_begins(&mut self, no: usize, fault: &FaultConfig) {
        let now = self.queue.now();
        let until = fault.lasts.map_or(Nanos::MAX, |lasts| now + lasts.0);
        let hit = self.hit[no].clone();
        let detection = self.scenario.cluster.failure_detection.0;
        match fault.kind {
            FaultKind::Kill => hit.iter().for_each(|node| self.kill(*node, true, fault.lasts.is_some())),
            FaultKind::PowerLoss | FaultKind::ZoneLoss => {
                hit.iter().for_each(|node| self.kill(*node, false, fault.lasts.is_some()))
            }
            FaultKind::Pause => {
                let until = until.min(now + 3600 * SECOND);
                for node in &hit {
                    let paused = &mut self.nodes[*node as usize].paused_until;
                    *paused = (*paused).max(until);
                }
                self.change_members(detection);
            }
            FaultKind::Slow => hit.iter().for_each(|node| self.slow_down(*node, fault.factor)),
            FaultKind::Corrupt => hit.iter().for_each(|node| self.nodes[*node as usize].corrupt = true),
            FaultKind::Partition | FaultKind::Deaf => {
                let one_way = fault.kind == FaultKind::Deaf;
                self.parts.insert(no, (hit.iter().copied().collect(), one_way));
                self.change_members(detection);
            }
            FaultKind::StaleList => hit.iter().for_each(|node| self.nodes[*node as usize].stale = true),
            FaultKind::Drift => {
                // A clock never runs backwards, so the quicker of two drifts counts.
                for node in hit {
                    let drift = &mut self.nodes[node as usize].drift_ppm;
                    *drift = (*drift).max(fault.factor);
                }
            }
            FaultKind::RegistryDown => {
                self.registry.down_until = until;
                self.cut_registry();
            }
            FaultKind::RegistryBusy => {
                let retry = fault.retry_after.unwrap_or(self.scenario.registry.retry_after).0;
                (self.registry.busy_until, self.registry.busy_retry) = (until, retry);
            }
            FaultKind::RegistryCut => self.cut_registry(),
        }
    }

    fn fault_ends(&mut self, no: usize, fault: &FaultConfig) {
        let hit = std::mem::take(&mut self.hit[no]);
        let gossip = self.scenario.cluster.gossip.0;
        match fault.kind {
            FaultKind::Kill | FaultKind::PowerLoss | FaultKind::ZoneLoss => {
                for node in hit {
                    if !self.nodes[node as usize].up {
                        self.resume(node);
                    }
                }
                self.change_members(gossip);
            }
            FaultKind::Pause => self.change_members(gossip),
            FaultKind::Slow => hit.into_iter().for_each(|node| self.slow_down(node, 1)),
            FaultKind::Corrupt => hit.into_iter().for_each(|node| self.nodes[node as usize].corrupt = false),
            FaultKind::Partition | FaultKind::Deaf => {
                self.parts.remove(&no);
                self.change_members(gossip);
            }
            FaultKind::StaleList => {
                for node in hit {
                    self.nodes[node as usize].stale = false;
                    self.tell_list(node);
                }
            }
            // A clock that is put right may not run backwards; it stays as it is.
            FaultKind::Drift => {}
            FaultKind::RegistryDown => self.registry.down_until = 0,
            FaultKind::RegistryBusy => self.registry.busy_until = 0,
            FaultKind::RegistryCut => {}
        }
    }

    fn slow_down(&mut self, no: u32, factor: u32) {
        let (up, down) = super::card_of(&self.scenario.cluster);
        let (uplink, downlink) = (self.nodes[no as usize].uplink, self.nodes[no as usize].downlink);
        self.net.set_rate(uplink, Rate((up.0 / u64::from(factor)).max(1)));
        self.net.set_rate(downlink, Rate((down.0 / u64::from(factor)).max(1)));
        self.membership.slow.insert(no, factor);
    }

    /// A daemon ends. The kernel closes its connections, when there still is one.
    fn kill(&mut self, no: u32, resets: bool, comes_back: bool) {
        let connected: Vec<u32> = self.nodes[no as usize].connected.iter().copied().collect();
        let dialing: Vec<u32> = self.nodes[no as usize].dialing.keys().copied().collect();
        for peer in connected {
            // Whoever hears nothing finds out when pings are not answered.
            let wait = if resets { self.latency(no, peer) } else { self.scenario.cluster.failure_detection.0 };
            let life = self.nodes[peer as usize].life;
            self.queue.after(wait, Happening::Lost { node: peer, life, peer: no });
        }
        for peer in dialing {
            self.nodes[peer as usize].dialing.remove(&no);
        }
        if !self.strategy().is_policy() {
            self.rival_dies(no, |world, other| match resets {
                true => world.latency(no, other),
                false => RIVALS_KEEP_ALIVE,
            });
        }
        self.net.close_all(|purpose| purpose.from == Some(no));
        let asks: Vec<AskId> = self.nodes[no as usize].asks.keys().copied().collect();
        for ask in asks {
            if let Some(flow) = self.nodes[no as usize].asks.remove(&ask).and_then(|open| open.flow) {
                self.net.close(flow);
            }
        }
        let limits = self.strategy().limits();
        let node = &mut self.nodes[no as usize];
        node.die(limits);
        if !comes_back {
            if node.start.as_ref().is_some_and(|start| start.ready.is_none()) && !node.lost {
                node.lost = true;
                self.lost += 1;
            }
            // A pod that waits for its turn in a rolling update lands on a node that is gone: see `arrives`.
            if let Some(next) = self.to_roll.pop() {
                self.queue.after(MILLISECOND, Happening::Arrives { node: next });
            }
        }
        // Whose connection was closed is dialled at once, and nobody is there.
        self.change_members(if resets { 0 } else { self.scenario.cluster.failure_detection.0 });
    }
}
