//! What a controller counts, and whether it is ready: `/metrics`, `/healthz` and `/readyz` of `--metrics-listen`.
//!
//! ```text
//!  core --Action--> Metrics (an audience) --counts--+
//!  core --Event-->          "                       +--> Values --> exposition, by the table
//!  artifacts, registry client, node API, Lease -----+    (read when somebody asks)
//! ```
//!
//! It is served from before the first Lease is looked at, so a replica that does not lead answers too: it is ready, as a
//! standby, once it has heard who leads. One that leads, or runs without Kubernetes, is ready when everything that is there has
//! been said to its core. Nobody needs it to be: nodes that find nobody go on with what they know.
//!
//! Counters begin at zero with the process, and again in the replica that takes over.

mod table;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use hermes_metrics::server::{self, Pages};
use hermes_metrics::{Values, expose, resident_bytes, seconds_now};
use hermes_origin::OriginClient;
use parking_lot::Mutex;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::api::numbers::Numbers;
use crate::artifacts::Artifacts;
use crate::clock;
use crate::event::{Action, Audience, Event, ImageKey, Phase, UnixMillis};
use crate::program::EVENTS_MAX;

pub use table::METRICS;
use table::{OTHER_REASON, PHASES, REASONS};

/// Metrics that cannot be served.
#[derive(Debug, Error)]
#[error("cannot serve metrics on {address}: {source}; choose another address")]
pub struct MetricsError {
    /// The address.
    pub address: SocketAddr,
    /// What the operating system said.
    pub source: std::io::Error,
}

/// How this process stands among its replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// It has not heard who leads.
    #[default]
    Starting,
    /// Another leads.
    Standby,
    /// It decides. Without Kubernetes, whoever runs does.
    Leader,
}

/// What is read when somebody asks.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) artifacts: Artifacts,
    pub(crate) quota_bytes: Option<u64>,
    pub(crate) origin: OriginClient,
    pub(crate) numbers: Option<Arc<Numbers>>,
    /// The way to the core, to see how much waits in it.
    pub(crate) events: mpsc::WeakSender<Event>,
}

type Counts = [AtomicU64; REASONS.len()];

/// The numbers of this process. Cheap to clone; clones share them.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    started_at_seconds: f64,
    state: Mutex<State>,
    parts: OnceLock<Parts>,
    builds_done: AtomicU64,
    build_failures: Counts,
    names_resolved: AtomicU64,
    name_failures: Counts,
    tags_moved: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    role: Role,
    /// Everything that is there has been said.
    synced: bool,
    images: BTreeMap<ImageKey, (Phase, UnixMillis)>,
    policies: BTreeMap<String, ()>,
    nodes: BTreeMap<String, ()>,
}

impl Default for Metrics {
    fn default() -> Self {
        let zeros = || [const { AtomicU64::new(0) }; REASONS.len()];
        Self(Arc::new(Inner {
            started_at_seconds: seconds_now(),
            state: Mutex::default(),
            parts: OnceLock::new(),
            builds_done: AtomicU64::new(0),
            build_failures: zeros(),
            names_resolved: AtomicU64::new(0),
            name_failures: zeros(),
            tags_moved: AtomicU64::new(0),
        }))
    }
}

fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn count_reason(counts: &Counts, reason: &str) {
    let known = REASONS.iter().position(|(name, _)| *name == reason);
    add(&counts[known.unwrap_or(OTHER_REASON)]);
}

impl Metrics {
    /// Serves them on `address` until the process ends or the handle is aborted. Gives the address too: a port of 0 is any.
    ///
    /// # Errors
    /// When it cannot listen there.
    pub async fn serve(&self, address: SocketAddr) -> Result<(SocketAddr, JoinHandle<()>), MetricsError> {
        let failed = |source| MetricsError { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (shown, looked_at) = (self.clone(), self.clone());
        let pages = Pages {
            metrics: Arc::new(move || {
                let text = shown.text();
                Box::pin(async move { text })
            }),
            unready: Arc::new(move || looked_at.missing()),
        };
        tracing::info!(%address, "serving metrics");
        Ok((address, tokio::spawn(server::serve(listener, pages))))
    }

    /// This process stands so.
    pub fn stands(&self, role: Role) {
        self.0.state.lock().role = role;
    }

    /// From now on these parts are asked. A process decides once in its life, so they never change.
    pub(crate) fn show(&self, parts: Parts) {
        let _ = self.0.parts.set(parts);
    }

    /// What keeps this process from being ready; `None` when it is.
    pub fn missing(&self) -> Option<String> {
        let state = self.0.state.lock();
        match state.role {
            Role::Starting => Some("nobody has said yet which replica leads".to_owned()),
            Role::Leader if !state.synced => Some("what is there is still being read".to_owned()),
            Role::Standby | Role::Leader => None,
        }
    }

    /// The exposition.
    pub fn text(&self) -> String {
        let mut values = Values::default();
        self.0.fill(&mut values);
        expose(METRICS, env!("CARGO_PKG_VERSION"), &values)
    }
}

impl Inner {
    fn fill(&self, values: &mut Values) {
        values.set_seconds("hermes_start_time_seconds", "", self.started_at_seconds);
        values.set("hermes_memory_bytes", "", resident_bytes());
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        values.set("hermes_controller_builds_total", "", get(&self.builds_done));
        values.set("hermes_controller_names_resolved_total", "", get(&self.names_resolved));
        values.set("hermes_controller_tags_moved_total", "", get(&self.tags_moved));
        for (at, (_, label)) in REASONS.iter().enumerate() {
            values.set("hermes_controller_build_failures_total", label, get(&self.build_failures[at]));
            values.set("hermes_controller_name_failures_total", label, get(&self.name_failures[at]));
        }
        self.state.lock().fill(values);
        match self.parts.get() {
            Some(parts) => parts.fill(values),
            None => Numbers::default().fill(values),
        }
    }
}

impl State {
    fn fill(&self, values: &mut Values) {
        values.set("hermes_controller_leader", "", u64::from(self.role == Role::Leader));
        values.set("hermes_controller_policies", "", self.policies.len() as u64);
        values.set("hermes_controller_nodes", "", self.nodes.len() as u64);
        for (phase, label) in PHASES {
            let count = self.images.values().filter(|(known, _)| *known == phase).count();
            values.set("hermes_controller_images", label, count as u64);
        }
        let waits =
            |(phase, since): &(Phase, UnixMillis)| matches!(phase, Phase::Pending | Phase::Building).then_some(since.0);
        let oldest = self.images.values().filter_map(waits).min();
        let waited = oldest.map_or(0, |since| clock::now().0.saturating_sub(since));
        values.set_seconds("hermes_controller_oldest_unready_seconds", "", waited as f64 / 1e3);
    }

    fn published(&mut self, image: &ImageKey, phase: Phase, since: UnixMillis) -> bool {
        let before = self.images.insert(image.clone(), (phase, since));
        phase == Phase::Ready && before.is_some_and(|(before, _)| before == Phase::Building)
    }
}

impl Parts {
    fn fill(&self, values: &mut Values) {
        let usage = self.artifacts.usage();
        values.set("hermes_controller_artifact_bytes", "", usage.used_bytes);
        values.set("hermes_controller_artifact_quota_bytes", "", self.quota_bytes.unwrap_or(0));
        let waiting = self.events.upgrade().map_or(0, |events| EVENTS_MAX - events.capacity());
        values.set("hermes_controller_facts_waiting", "", waiting as u64);
        let origin = self.origin.counters();
        values.set("hermes_controller_registry_requests_total", "", origin.requests);
        values.set("hermes_controller_registry_received_bytes_total", "", origin.bytes);
        for (label, count) in [
            ("denied", origin.refused_denied),
            ("not_found", origin.refused_not_found),
            ("throttled", origin.refused_throttled),
            ("other", origin.refused_other),
        ] {
            values.set("hermes_controller_registry_refusals_total", label, count);
        }
        match &self.numbers {
            Some(numbers) => numbers.fill(values),
            None => Numbers::default().fill(values),
        }
    }
}

impl Audience for Metrics {
    fn hear(&self, action: &Action) {
        match action {
            Action::Publish(view) => {
                let built = self.0.state.lock().published(&view.image, view.phase, view.since);
                if built {
                    add(&self.0.builds_done);
                }
            }
            Action::Withdraw(image) => drop(self.0.state.lock().images.remove(image)),
            Action::Tell { reason: "TagMoved", .. } => add(&self.0.tags_moved),
            _ => {}
        }
    }

    fn learn(&self, event: &Event) {
        match event {
            Event::Built { outcome: Err(failure), .. } => count_reason(&self.0.build_failures, failure.reason),
            Event::Resolved { outcome: Ok(_), .. } => add(&self.0.names_resolved),
            Event::Resolved { outcome: Err(failure), .. } => count_reason(&self.0.name_failures, failure.reason),
            Event::Policy(policy) => drop(self.0.state.lock().policies.insert(policy.name.clone(), ())),
            Event::PolicyGone(name) => drop(self.0.state.lock().policies.remove(name)),
            Event::Reported { node, .. } => drop(self.0.state.lock().nodes.insert(node.clone(), ())),
            Event::NodeSilent(node) | Event::NodeGone(node) => drop(self.0.state.lock().nodes.remove(node)),
            Event::Synced => self.0.state.lock().synced = true,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
