//! What must hold between any two calls. Checked at both ends of every call in debug builds.

use hermes_image::runs::Runs;

use super::{Ask, Flight};
use crate::class::Class;
use crate::event::{AskId, Source};
use crate::limits::{Load, SourceLimit};

impl Flight {
    /// Checks the books against each other, in the layers in which anything goes on.
    ///
    /// # Panics
    /// When they disagree: an error in this crate.
    pub fn assert_invariants(&self) {
        self.assert_leases();
        self.assert_reads();
        self.assert_loads();
        assert!(
            self.layers.len() <= self.limits.layers
                && self.peers.len() <= self.limits.peers + self.peers.member_count()
        );
        assert!(self.desk.is_within(&self.limits));
        assert!(self.reads.len() <= self.limits.waiting_reads);
        assert!(self.reads.prefetch_len() <= self.limits.waiting_prefetch_reads);
    }

    /// A chunk is leased once, and only while it is not here.
    fn assert_leases(&self) {
        for layer in self.layers.values().filter(|layer| !layer.asks.is_empty() || !layer.leased.is_empty()) {
            let mut leased = Runs::new();
            for id in &layer.asks {
                let ask = self.asks.get(id);
                assert!(ask.is_some(), "{id:?} is in the layer's book only");
                let Some(ask) = ask else { continue };
                assert!(ask.chunks.intersection(&leased).is_empty(), "{id:?} leases what another ask leases");
                leased.insert_all(&ask.chunks);
            }
            let overtakable = |id: &&AskId| self.asks.get(id).is_some_and(Ask::can_be_overtaken);
            assert!(layer.asks.iter().filter(overtakable).eq(&layer.overtakable), "asks that can be overtaken");
            assert_eq!(leased, layer.leased, "the layer's leases are those of its asks");
            assert!(layer.have.intersection(&leased).is_empty(), "chunks that are here are leased");
        }
        let awaited = self.asks.iter().filter(|(_, ask)| ask.is_waited_for()).map(|(id, _)| id);
        assert!(awaited.eq(&self.awaited), "asks that readers wait for");
        for (id, ask) in &self.asks {
            assert!(self.next_lease <= ask.lease_until, "{id:?} would be forgotten");
            assert!(self.layers.get(&ask.layer).is_some_and(|layer| layer.asks.contains(id)), "{id:?} has no layer");
        }
    }

    /// A read waits for something that is not here, in an open layer.
    fn assert_reads(&self) {
        for (id, read) in self.reads.iter() {
            let layer = self.layers.get(&read.layer).filter(|layer| layer.reads.all().contains(&id));
            assert!(layer.is_some(), "{id:?} has no layer");
            let Some(layer) = layer else { continue };
            assert!(!read.missing.is_empty(), "{id:?} waits for nothing");
            assert!(read.missing.intersection(&layer.have).is_empty(), "{id:?} waits for what is here");
        }
    }

    /// The loads are those of the asks under way, and within the limits.
    fn assert_loads(&self) {
        let count = |wanted: &dyn Fn(&Ask) -> bool| {
            let mut load = Load::default();
            self.asks.values().filter(|ask| wanted(ask)).for_each(|ask| load.add(ask.class));
            load
        };
        let check = |name: &str, booked: Load, counted: Load, limit: &SourceLimit| {
            assert_eq!(booked, counted, "load of {name}");
            assert!(booked.demand + booked.prefetch <= limit.asks, "{name} has more asks than it may");
            assert!(booked.prefetch <= limit.asks - limit.reserved_for_demand, "{name} has more {:?}", Class::Prefetch);
        };
        check("all", self.total, count(&|_| true), &self.limits.total);
        check("local", self.local, count(&|ask| ask.source == Source::Local), &self.limits.local);
        for (no, origin) in &self.origins {
            check("origin", origin.load, count(&|ask| ask.origin == Some(*no)), &self.limits.origin);
        }
        for source in self.asks.values().map(|ask| ask.source) {
            if let Source::Peer(peer) = source {
                check("peer", self.peers.load(peer), count(&|ask| ask.source == source), &self.limits.peer);
            }
        }
    }
}
