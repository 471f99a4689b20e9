//! What people see of the driver: the reads that wait, its peers, and the trace of its asks.

use std::ops::Range;
use std::time::Instant;

use hermes_image::ids::{ChunkNo, DiffId};
use hermes_image::runs::Runs;
use hermes_p2p::PeerId;
use hermes_policy::event::{AskId, Reason, Source};

use super::super::trace::{Asked, Sent};
use super::super::{Class, PeerAccount};
use super::{Driver, Waiting};
use crate::status::WaitingRead;

impl Driver {
    /// The reads that wait, for people.
    pub(super) fn waiting(&self) -> Vec<WaitingRead> {
        let mut reads: Vec<_> = self.reads.values().collect();
        reads.sort_by_key(|waiting| waiting.since);
        let describe = |waiting: &&Waiting| {
            let open = self.layers.get(&waiting.layer)?;
            let missing = open.layer.missing(0..open.layer.table().count()).intersection(&waiting.chunks);
            let first = missing.chunks().next().or_else(|| waiting.chunks.chunks().next())?;
            let len = |run: Range<u32>| {
                let range = open.layer.table().run_range(run);
                range.end - range.start
            };
            let asked = self.asks.values().filter(|asked| asked.layer == waiting.layer);
            let mut asking: Vec<String> = asked.map(|asked| self.name(asked.source, asked.layer)).collect();
            asking.sort();
            asking.dedup();
            Some(WaitingRead {
                image: open.image(),
                file: None,
                layer: waiting.layer,
                offset: open.layer.table().range(ChunkNo(first)).start,
                missing_bytes: missing.iter().map(len).sum(),
                demand: waiting.class == Class::Demand,
                waiting_ms: u64::try_from(waiting.since.elapsed().as_millis()).unwrap_or(u64::MAX),
                asking,
            })
        };
        reads.iter().take(super::super::WAITING_MAX).filter_map(describe).collect()
    }

    /// A source, for people.
    pub(super) fn name(&self, source: Source, layer: DiffId) -> String {
        match source {
            Source::Local => "the local store".to_owned(),
            Source::Peer(peer) => self.peers.id(peer).map_or_else(String::new, |id| format!("peer {id}")),
            Source::Origin => {
                let origins = self.layers.get(&layer).map(|open| open.origins()).unwrap_or_default();
                format!("the registry {}", origins.first().map_or("", |origin| origin.origin.host()))
            }
        }
    }

    /// What is known of a peer.
    pub(super) fn peer_account(&self, peer: &PeerId) -> PeerAccount {
        let view = self.peers.known(peer).and_then(|no| self.flight.peer_view(no));
        PeerAccount { view: view.unwrap_or_default(), from_bytes: self.tracer.bytes_from(peer) }
    }

    /// Notes an ask that is about to be sent.
    pub(super) fn trace(
        &mut self,
        ask: AskId,
        layer: DiffId,
        source: Asked,
        class: Class,
        reason: Option<Reason>,
        chunks: Runs,
    ) {
        let Some(open) = self.layers.get(&layer) else { return };
        let range = |run| open.layer.table().run_range(run);
        let asked_bytes = chunks.iter().map(range).map(|range| range.end - range.start).sum();
        self.tracer.sent(ask, Sent { layer, source, class, reason, chunks, asked_bytes }, Instant::now());
    }

    pub(super) fn trace_registry(
        &mut self,
        ask: AskId,
        layer: DiffId,
        spans: &Range<u32>,
        class: Class,
        reason: Reason,
    ) {
        let Some(open) = self.layers.get(&layer) else { return };
        let host = open.origins().first().map_or_else(|| "".into(), |origin| origin.origin.host().into());
        let chunks = Runs::one(open.geometry().span_chunks(spans));
        self.trace(ask, layer, Asked::Registry(host), class, Some(reason), chunks);
    }
}
