//! What a node and its controller tell each other while both are there.
//!
//! Three tasks, each of which ends with the node: reports of what this node is and holds, when that has changed, at most
//! every ten seconds; notices of who was taken out, which go into the swarm; and images that this node is to hold
//! ([`super::seed`]). None of them is in anybody's way, and what fails is tried again.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use hermes_controller_api::v1;
use hermes_image::ids::Digest;
use tokio::task::JoinSet;

use super::{Inner, NodeError};
use crate::controller::{Controller, Wanted};
use crate::metrics::{ArrivedFrom, RECORDED};

/// How often it is looked whether there is anything to report. The controller takes no more than that.
const REPORT_EVERY: Duration = Duration::from_secs(10);
/// How long a report waits that has nothing new but counts: the controller adds them up by the minute, and containers that read
/// must not make every node report all the time.
const COUNTS_EVERY: Duration = Duration::from_secs(60);
/// How long an image is left alone that could not be fetched.
const SEED_REST: Duration = Duration::from_secs(60);

/// Starts the tasks, if there is a controller.
pub(super) fn spawn(node: &Arc<Inner>, tasks: &mut JoinSet<()>) {
    let Some(controller) = &node.controller else { return };
    tasks.spawn(report(Arc::downgrade(node), Arc::clone(controller)));
    tasks.spawn(follow_notices(Arc::downgrade(node), Arc::clone(controller)));
    tasks.spawn(follow_seeds(Arc::downgrade(node), Arc::clone(controller)));
}

async fn report(node: Weak<Inner>, controller: Arc<Controller>) {
    let mut connections = controller.connections();
    let run = rand::random();
    let mut last: Option<(v1::ReportRequest, u64, Instant)> = None;
    let mut connection = 0_u64;
    loop {
        let Some(inner) = node.upgrade() else { return };
        let addresses = inner.peers.members().borrow().me().addresses.iter().map(ToString::to_string).collect();
        controller.set_addresses(addresses);
        if controller.is_connected() {
            match inner.report(run).await {
                Ok(report) if is_due(&report, connection, last.as_ref()) => {
                    match controller.report(report.clone()).await {
                        Ok(()) => last = Some((report, connection, Instant::now())),
                        Err(error) => tracing::debug!(error, "a report is not taken; it is said again"),
                    }
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "nothing is reported to the controller"),
            }
        }
        drop(inner);
        tokio::select! {
            () = tokio::time::sleep(REPORT_EVERY) => {}
            changed = connections.changed() => match changed {
                Ok(()) => connection += 1,
                Err(_) => return,
            },
        }
    }
}

/// Whether `report` is worth saying on this connection, after the last one, where and when that was said.
fn is_due(report: &v1::ReportRequest, connection: u64, last: Option<&(v1::ReportRequest, u64, Instant)>) -> bool {
    let Some((known, said_to, said_at)) = last else { return true };
    // Another connection may be with another controller, which has not heard it.
    if *said_to != connection {
        return true;
    }
    let uncounted = |report: &v1::ReportRequest| v1::ReportRequest {
        traffic: None,
        peer_bytes: 0,
        registry_bytes: 0,
        ..report.clone()
    };
    report != known && (said_at.elapsed() >= COUNTS_EVERY || uncounted(report) != uncounted(known))
}

/// What this process has counted so far.
fn traffic(run: u64) -> v1::Traffic {
    let [read_at_once, read_after_waiting] = RECORDED.answered_bytes();
    v1::Traffic {
        run,
        read_at_once,
        read_after_waiting,
        from_peers: RECORDED.arrived_bytes(ArrivedFrom::Peer),
        from_registries: RECORDED.arrived_bytes(ArrivedFrom::Registry),
        from_other_layers: RECORDED.arrived_bytes(ArrivedFrom::Local),
        ahead: RECORDED.ahead_bytes(),
        registry_wire: RECORDED.received_bytes(),
    }
}

async fn follow_notices(node: Weak<Inner>, controller: Arc<Controller>) {
    let mut notices = controller.notices();
    notices.mark_changed();
    while notices.changed().await.is_ok() {
        let notice = notices.borrow_and_update().clone();
        let Some(inner) = node.upgrade() else { return };
        if !notice.is_empty() && !inner.peers.learn_revocation(notice).await {
            tracing::warn!("the controller's notice of who was taken out cannot be believed");
        }
    }
}

async fn follow_seeds(node: Weak<Inner>, controller: Arc<Controller>) {
    let mut changes = controller.image_changes();
    // What was done, and what is to rest until when.
    let mut held: BTreeMap<Digest, Wanted> = BTreeMap::new();
    let mut rests: BTreeMap<Digest, Instant> = BTreeMap::new();
    loop {
        changes.mark_unchanged();
        let wanted = controller.wanted();
        held.retain(|manifest, _| wanted.iter().any(|wanted| wanted.manifest == *manifest));
        rests.retain(|manifest, until| {
            *until > Instant::now() && wanted.iter().any(|wanted| wanted.manifest == *manifest)
        });
        let Some(inner) = node.upgrade() else { return };
        inner.release_seeds(&wanted);
        let next = wanted
            .into_iter()
            .find(|wanted| held.get(&wanted.manifest) != Some(wanted) && !rests.contains_key(&wanted.manifest));
        if let Some(wanted) = next {
            let manifest = wanted.manifest;
            match inner.hold_seed(&wanted).await {
                Ok(()) => drop(held.insert(manifest, wanted)),
                Err(error) => {
                    tracing::warn!(%manifest, %error, "an image that this node is to hold does not come; trying again");
                    rests.insert(manifest, Instant::now() + SEED_REST);
                }
            }
            continue;
        }
        drop(inner);
        let rest = rests.values().min().map_or(Duration::from_secs(3600), |until| until.duration_since(Instant::now()));
        tokio::select! {
            () = tokio::time::sleep(rest) => {}
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

impl Inner {
    /// What this node is and holds now. `run` names this run of the daemon.
    async fn report(self: &Arc<Self>, run: u64) -> Result<v1::ReportRequest, NodeError> {
        let node = Arc::clone(self);
        let made = tokio::task::spawn_blocking(move || -> Result<v1::ReportRequest, NodeError> {
            let mut images = BTreeMap::new();
            for record in node.store.images()? {
                let (mut present, mut total) = (0_u64, 0_u64);
                for layer in record.layers.iter().filter_map(|layer| node.store.open_layer(layer.diff_id)) {
                    present += layer.present_bytes();
                    total += layer.table().logical_len_bytes();
                }
                // A layer of which nothing was ever asked has no file yet.
                let known = record.layers.iter().all(|layer| node.store.open_layer(layer.diff_id).is_some());
                let percent = (present * 100).checked_div(total).filter(|_| known).unwrap_or(0);
                images.insert(record.manifest, u32::try_from(percent.min(100)).unwrap_or(100));
            }
            let held =
                |(manifest, percent): (Digest, u32)| v1::HeldImage { manifest: manifest.0.to_vec().into(), percent };
            let ways = node.ways.status().into_iter().filter(|way| way.available);
            Ok(v1::ReportRequest {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                ways: ways.map(|way| way.way.name().to_owned()).collect(),
                store_used_bytes: node.store.usage()?.used_bytes,
                store_budget_bytes: node.config.store_budget_bytes,
                images: images.into_iter().map(held).collect(),
                peer_bytes: RECORDED.arrived_bytes(ArrivedFrom::Peer),
                registry_bytes: RECORDED.arrived_bytes(ArrivedFrom::Registry),
                addresses: Vec::new(),
                traffic: Some(traffic(run)),
            })
        });
        made.await.map_err(|_| NodeError::Interrupted)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_alone_are_said_once_a_minute_and_all_else_at_once() {
        let report = |used, registry| v1::ReportRequest {
            store_used_bytes: used,
            registry_bytes: registry,
            traffic: Some(v1::Traffic { from_registries: registry, ..v1::Traffic::default() }),
            ..v1::ReportRequest::default()
        };
        let said = |ago| Some((report(1, 1), 7, Instant::now().checked_sub(ago).expect("the machine runs for longer")));
        let now = Duration::ZERO;
        assert!(is_due(&report(1, 1), 7, None), "the first");
        assert!(!is_due(&report(1, 1), 7, said(COUNTS_EVERY).as_ref()), "the same again");
        assert!(is_due(&report(1, 1), 8, said(now).as_ref()), "another connection");
        assert!(!is_due(&report(1, 2), 7, said(now).as_ref()), "counts alone, at once");
        assert!(is_due(&report(1, 2), 7, said(COUNTS_EVERY).as_ref()), "counts alone, later");
        assert!(is_due(&report(2, 2), 7, said(now).as_ref()), "something else");
    }
}
