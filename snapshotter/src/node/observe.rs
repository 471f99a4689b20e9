//! What others see of a node: its numbers, whether it is ready, which reads wait.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use hermes_metrics::server::{self, Pages};
use hermes_metrics::{Values, resident_bytes};
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::{Inner, NodeError};
use crate::metrics::{RECORDED, expose};
use crate::status::{CompletionState, WaitingRead, Way};

/// Waiting reads whose files are looked up for one dump: each lookup walks a tree.
const FILES_MAX: usize = 32;

/// What has to be up before a node is ready.
#[derive(Debug, Default)]
pub struct Readiness {
    store: AtomicBool,
    control: AtomicBool,
    snapshots_wanted: AtomicBool,
    snapshots: AtomicBool,
}

impl Readiness {
    /// The store is open.
    pub(super) fn store_is_open(&self) {
        self.store.store(true, Ordering::Release);
    }

    /// The control socket answers, or does no more.
    pub(super) fn control_is(&self, up: bool) {
        self.control.store(up, Ordering::Release);
    }

    /// The node is not ready without its snapshots service.
    pub fn want_snapshots(&self) {
        self.snapshots_wanted.store(true, Ordering::Release);
    }

    /// The snapshots service answers, or does no more.
    pub fn snapshots_are(&self, up: bool) {
        self.snapshots.store(up, Ordering::Release);
    }

    /// What is missing; `None` when the node is ready.
    pub fn missing(&self) -> Option<String> {
        let is = |flag: &AtomicBool| flag.load(Ordering::Acquire);
        let parts = [
            (is(&self.store), "the store"),
            (is(&self.control), "the control socket"),
            (!is(&self.snapshots_wanted) || is(&self.snapshots), "the snapshots service"),
        ];
        let missing: Vec<_> = parts.into_iter().filter(|(up, _)| !up).map(|(_, name)| name).collect();
        (!missing.is_empty()).then(|| missing.join(", "))
    }
}

/// The server of metrics and probes, which begins before the node is ready. Ends when dropped.
#[derive(Debug, Default)]
pub(super) struct Observer {
    pub(super) readiness: Arc<Readiness>,
    node: Arc<OnceLock<Weak<Inner>>>,
    serving: JoinSet<()>,
}

impl Observer {
    /// Listens on `address`, if there is one.
    pub(super) async fn start(address: Option<SocketAddr>) -> Result<Self, NodeError> {
        let mut observer = Self::default();
        let Some(address) = address else { return Ok(observer) };
        let listener = TcpListener::bind(address).await;
        let listener = listener.map_err(|error| {
            NodeError::Address(format!("metrics_listen: cannot listen on {address}: {error}; choose another address"))
        })?;
        let address = listener.local_addr().unwrap_or(address);
        tracing::info!(%address, "serving metrics");
        let (node, readiness) = (Arc::clone(&observer.node), Arc::clone(&observer.readiness));
        let pages = Pages {
            metrics: Arc::new(move || {
                let node = node.get().and_then(Weak::upgrade);
                Box::pin(async move {
                    let mut values = Values::default();
                    RECORDED.fill(&mut values);
                    if let Some(node) = node {
                        node.fill(&mut values).await;
                    }
                    expose(&values)
                })
            }),
            unready: Arc::new(move || readiness.missing()),
        };
        observer.serving.spawn(server::serve(listener, pages));
        Ok(observer)
    }

    /// From now on `node` is what is shown.
    pub(super) fn show(&self, node: &Arc<Inner>) {
        let _ = self.node.set(Arc::downgrade(node));
    }
}

/// Counts one more start in the state folder, and says how many there were. A count that cannot be kept begins anew: it
/// is for people, and must not keep a node from starting.
pub(super) fn count_start(state: &Path) -> u64 {
    let (path, new) = (state.join("starts"), state.join("starts.new"));
    let before = std::fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let starts = before.unwrap_or(0).saturating_add(1);
    let kept = std::fs::write(&new, format!("{starts}\n")).and_then(|()| std::fs::rename(&new, &path));
    if let Err(error) = kept {
        tracing::warn!(%error, path = %path.display(), "the number of starts cannot be kept");
    }
    starts
}

/// A number of a name, another one for each.
pub(super) fn number_of(name: &[u8]) -> u64 {
    use sha2::Digest as _;
    let hash: [u8; 32] = sha2::Sha256::digest(name).into();
    u64::from_le_bytes(hash[..8].try_into().expect("eight bytes of 32"))
}

impl Inner {
    /// Sets what the parts of the node count themselves.
    async fn fill(&self, values: &mut Values) {
        values.set_seconds("hermes_start_time_seconds", "", self.started_at_seconds);
        values.set("hermes_starts_total", "", self.starts);
        values.set("hermes_memory_bytes", "", resident_bytes());
        let fetch = self.fetch.status().await;
        values.set("hermes_reads_waiting", "demand", fetch.waiting_demand as u64);
        values.set("hermes_reads_waiting", "prefetch", fetch.waiting_prefetch as u64);
        values.set("hermes_asks_running", "local", fetch.asks_local as u64);
        values.set("hermes_asks_running", "peer", fetch.asks_peer as u64);
        values.set("hermes_asks_running", "registry", fetch.asks_origin as u64);
        let connected = self.controller.as_ref().is_some_and(|controller| controller.is_connected());
        values.set("hermes_controller_connected", "", u64::from(connected));
        values.set("hermes_peers_connected", "", fetch.peers_up as u64);
        values.set("hermes_peers_banned", "", fetch.peers_banned as u64);
        values.set("hermes_claims_waiting", "", fetch.claims as u64);
        let members = self.peers.members().borrow().clone();
        values.set(
            "hermes_members",
            "eligible",
            members.members().iter().filter(|member| member.eligible()).count() as u64,
        );
        values.set("hermes_members", "drain", members.members().iter().filter(|member| member.drain).count() as u64);
        values.set("hermes_members", "full", members.members().iter().filter(|member| member.full).count() as u64);
        let suspected = members.members().iter().filter(|member| member.suspected).count();
        values.set("hermes_members", "suspected", suspected as u64);
        for (refusal, count) in self.peers.admission().refusals() {
            values.set("hermes_peers_refused_total", refusal.name(), count);
        }
        let origin = self.origin_client.counters();
        values.set("hermes_registry_requests_total", "", origin.requests);
        values.set("hermes_registry_received_bytes_total", "", origin.bytes);
        values.set("hermes_registry_retries_total", "", origin.resends);
        values.set("hermes_registry_redirects_total", "", origin.redirects);
        values.set("hermes_registry_token_requests_total", "", origin.token_requests);
        values.set("hermes_registry_refusals_total", "denied", origin.refused_denied);
        values.set("hermes_registry_refusals_total", "not_found", origin.refused_not_found);
        values.set("hermes_registry_refusals_total", "throttled", origin.refused_throttled);
        values.set("hermes_registry_refusals_total", "other", origin.refused_other);
        values.set("hermes_mirror_failures_total", "", origin.mirror_failures);
        for counters in self.origin_client.credentials().counters() {
            values.set("hermes_credentials_requests_total", counters.provider.name(), counters.asked);
            values.set("hermes_credentials_failures_total", counters.provider.name(), counters.failed);
        }
        let images = self.images.lock().await;
        for way in [Way::ErofsFiles, Way::ErofsFuse, Way::FuseTree] {
            let count = images.iter().filter(|image| image.way == way).count();
            values.set("hermes_images_mounted", way.name(), count as u64);
        }
        for name in CompletionState::NAMES {
            let is_it =
                |image: &&super::MountedImage| self.completion.state_of(image.number, &image.layers).name() == name;
            values.set("hermes_images_completion", name, images.iter().filter(is_it).count() as u64);
        }
        drop(images);
        let completion = self.completion.status();
        values.set("hermes_completion_bytes_total", "", completion.fetched_bytes);
        values.set("hermes_completed_images_total", "", completion.completed_images);
        values.set("hermes_completion_paused", "", u64::from(completion.paused));
        values.set("hermes_first_pulls_running", "", self.first_pulls.status().len() as u64);
        let (store, counters) = (&self.store, self.store.counters());
        values.set("hermes_store_bytes", "", store.layers().iter().map(|layer| layer.present_bytes()).sum());
        values.set("hermes_store_budget_bytes", "", self.config.store_budget_bytes.unwrap_or(0));
        values.set("hermes_store_evicted_bytes_total", "", counters.evicted_bytes.get());
        values.set("hermes_store_evicted_chunks_total", "", counters.evicted_chunks.get());
        values.set("hermes_store_full_chunks_total", "", counters.full_chunks.get());
        values.set("hermes_store_damaged_chunks_total", "", counters.damaged_chunks.get());
    }

    /// The reads that wait, with their files where these are found.
    pub(super) async fn waiting(self: &Arc<Self>) -> Vec<WaitingRead> {
        let mut reads = self.fetch.waiting().await;
        let node = Arc::clone(self);
        let named = tokio::task::spawn_blocking(move || {
            for read in reads.iter_mut().take(FILES_MAX) {
                read.file = node.reader.locator().find(&read.image, read.layer, read.offset);
            }
            reads
        });
        named.await.unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_names_what_is_missing() {
        let readiness = Readiness::default();
        assert_eq!(readiness.missing().as_deref(), Some("the store, the control socket"));
        readiness.store_is_open();
        readiness.control_is(true);
        assert_eq!(readiness.missing(), None);
        readiness.want_snapshots();
        assert_eq!(readiness.missing().as_deref(), Some("the snapshots service"));
        readiness.snapshots_are(true);
        assert_eq!(readiness.missing(), None);
    }

    #[test]
    fn starts_are_counted_across_restarts() {
        let state = tempfile::tempdir().expect("a folder");
        assert_eq!([count_start(state.path()), count_start(state.path())], [1, 2]);
        std::fs::write(state.path().join("starts"), "nonsense").expect("written");
        assert_eq!(count_start(state.path()), 1);
    }
}
