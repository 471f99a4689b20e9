//! What people see of the swarm from here: each peer, and who gave the chunks of an image.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use hermes_p2p::PeerId;

use super::{Inner, NodeError};
use crate::status::{ImageTrace, PeerDetail};

/// Peers in one answer: as JSON they take less than half of the longest line.
const PEERS_MAX: usize = 4096;

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Inner {
    /// Who was asked for the chunks of the image that is mounted at `dir` or has the name `image`; of several with one name
    /// the one that was mounted last.
    pub(super) async fn trace(&self, image: &str, dir: &Path) -> Result<ImageTrace, NodeError> {
        let images = self.images.lock().await;
        let found = images.iter().find(|mounted| mounted.dir == dir);
        let found = found.or_else(|| images.iter().rev().find(|mounted| mounted.reference == image));
        let Some(mounted) = found else {
            return Err(NodeError::UnknownImage { image: image.to_owned(), dir: dir.to_owned() });
        };
        let reference = mounted.reference.clone();
        let layers = mounted.layers.iter().map(|layer| layer.diff_id()).collect();
        drop(images);
        let mut trace = self.fetch.trace(layers).await;
        trace.image = reference;
        let list = self.peers.members().borrow().clone();
        let zones: BTreeMap<String, String> =
            list.members().iter().map(|member| (member.peer.to_string(), member.zone.to_string())).collect();
        for source in &mut trace.sources {
            source.zone = zones.get(&source.name).cloned().unwrap_or_default();
        }
        Ok(trace)
    }

    /// What is known of each peer: the connected ones and the members.
    pub(super) async fn peer_details(&self) -> Vec<PeerDetail> {
        let list = self.peers.members().borrow().clone();
        let me = list.me().peer;
        let mut details: BTreeMap<PeerId, PeerDetail> = BTreeMap::new();
        for member in list.members().iter().filter(|member| member.peer != me) {
            let detail = PeerDetail {
                addresses: member.addresses.iter().map(ToString::to_string).collect(),
                zone: member.zone.to_string(),
                member: true,
                drain: member.drain,
                full: member.full,
                suspected: member.suspected,
                ..PeerDetail::default()
            };
            details.insert(member.peer, detail);
        }
        for peer in self.peers.peers() {
            details.entry(peer).or_default().connected = true;
        }
        let asked: Vec<PeerId> = details.keys().copied().take(PEERS_MAX).collect();
        let accounts = self.fetch.peers(asked).await;
        let filled = details.into_iter().zip(accounts).map(|((peer, detail), account)| {
            let view = account.view;
            PeerDetail {
                id: peer.to_string(),
                latency_us: micros(view.latency),
                cost_us_per_mib: micros(view.cost_per_kib.saturating_mul(1024)),
                asks: view.asks as u64,
                from_bytes: account.from_bytes,
                to_bytes: self.peers.sent_bytes(&peer),
                holds_layers: view.holds as u64,
                rests_ms: micros(view.rests).div_ceil(1000),
                banned_ms: micros(view.banned).div_ceil(1000),
                ..detail
            }
        });
        filled.collect()
    }
}
