//! The nodes that have spoken lately: what each may still ask for, and which have fallen silent.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use hermes_p2p::PeerId;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::limits::ApiLimits;
use super::numbers::{Counted, Numbers, Refusal};

/// What is known of one.
#[derive(Debug)]
struct Known {
    peer: PeerId,
    watches: usize,
    reads: usize,
    /// Requests that it may send now.
    tokens: f64,
    counted_at: Instant,
    reported_at: Option<Instant>,
    heard_at: Instant,
}

/// All of them, by name.
#[derive(Debug)]
pub(super) struct Nodes {
    limits: ApiLimits,
    numbers: Arc<Numbers>,
    known: Mutex<HashMap<String, Known>>,
    reads: Arc<Semaphore>,
}

/// What a guard gives back.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Watch,
    Read,
}

/// A watch or a read that a node has. Dropping it ends that.
#[derive(Debug)]
pub(super) struct NodeGuard {
    nodes: Arc<Nodes>,
    node: String,
    kind: Kind,
    _permit: Option<OwnedSemaphorePermit>,
    _counted: Option<Counted>,
}

impl Drop for NodeGuard {
    fn drop(&mut self) {
        if let Some(known) = self.nodes.known.lock().get_mut(&self.node) {
            known.heard_at = Instant::now();
            match self.kind {
                Kind::Watch => known.watches -= 1,
                Kind::Read => known.reads -= 1,
            }
        }
    }
}

impl Nodes {
    pub(super) fn new(limits: ApiLimits, numbers: Arc<Numbers>) -> Self {
        let reads = Arc::new(Semaphore::new(limits.reads_max));
        Self { limits, numbers, known: Mutex::default(), reads }
    }

    /// `node` has sent a request that costs `cost` tokens.
    pub(super) fn spend(&self, node: &str, peer: PeerId, cost: u32) -> Result<(), Refusal> {
        let now = Instant::now();
        let burst = f64::from(self.limits.requests_burst);
        let mut all = self.known.lock();
        let known = match all.get_mut(node) {
            Some(known) => known,
            None => all.entry(node.to_owned()).or_insert(Known {
                peer,
                watches: 0,
                reads: 0,
                tokens: burst,
                counted_at: now,
                reported_at: None,
                heard_at: now,
            }),
        };
        // A node that was made anew has another key.
        known.peer = peer;
        known.heard_at = now;
        let came = now.saturating_duration_since(known.counted_at).as_secs_f64();
        known.tokens = (known.tokens + came * f64::from(self.limits.requests_per_second)).min(burst);
        known.counted_at = now;
        if known.tokens < f64::from(cost) {
            return Err(Refusal::TooMany);
        }
        known.tokens -= f64::from(cost);
        Ok(())
    }

    /// `node` reports; refused when it did so just before.
    pub(super) fn report(&self, node: &str) -> Result<(), Refusal> {
        let now = Instant::now();
        let mut all = self.known.lock();
        let Some(known) = all.get_mut(node) else { return Ok(()) };
        let since = known.reported_at.map(|at| now.saturating_duration_since(at));
        if since.is_some_and(|since| since < self.limits.report_every) {
            return Err(Refusal::TooMany);
        }
        known.reported_at = Some(now);
        Ok(())
    }

    /// The report was not taken after all: the node may repeat it.
    pub(super) fn take_report_back(&self, node: &str) {
        if let Some(known) = self.known.lock().get_mut(node) {
            known.reported_at = None;
        }
    }

    pub(super) fn watch(self: &Arc<Self>, node: &str) -> Result<NodeGuard, Refusal> {
        let counted = Counted::new(&self.numbers, |numbers| &numbers.watches);
        self.begin(node, Kind::Watch, self.limits.watches_per_node, None, Some(counted))
    }

    pub(super) fn read(self: &Arc<Self>, node: &str) -> Result<NodeGuard, Refusal> {
        let permit = Arc::clone(&self.reads).try_acquire_owned().map_err(|_| Refusal::TooMany)?;
        self.begin(node, Kind::Read, self.limits.reads_per_node, Some(permit), None)
    }

    fn begin(
        self: &Arc<Self>,
        node: &str,
        kind: Kind,
        limit: usize,
        permit: Option<OwnedSemaphorePermit>,
        counted: Option<Counted>,
    ) -> Result<NodeGuard, Refusal> {
        let mut all = self.known.lock();
        let known = all.get_mut(node).ok_or(Refusal::NoNode)?;
        let count = match kind {
            Kind::Watch => &mut known.watches,
            Kind::Read => &mut known.reads,
        };
        if *count >= limit {
            return Err(Refusal::TooMany);
        }
        *count += 1;
        let nodes = Arc::clone(self);
        Ok(NodeGuard { nodes, node: node.to_owned(), kind, _permit: permit, _counted: counted })
    }

    /// Forgets who has been silent for long, and says who that is.
    pub(super) fn fallen_silent(&self, now: Instant) -> Vec<(String, PeerId)> {
        let mut all = self.known.lock();
        let is_silent = |known: &Known| {
            let quiet = now.saturating_duration_since(known.heard_at);
            known.watches == 0 && known.reads == 0 && quiet >= self.limits.silent_after
        };
        all.extract_if(|_, known| is_silent(known)).map(|(node, known)| (node, known.peer)).collect()
    }
}
