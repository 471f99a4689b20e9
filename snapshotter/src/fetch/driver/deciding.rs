//! The one place where the policy is told something, and what it asks for is done.

use std::sync::Arc;
use std::time::Instant;

use hermes_image::ids::{ChunkNo, DiffId};
use hermes_p2p::{Asking, Ruling};
use hermes_policy::event::{self, Action, AskId, ClaimId, Event, FailCause, OriginStanding, Outcome, ReadId, Source};
use hermes_policy::record::Entry;

use super::super::asks::{self, Ask};
use super::super::layer::OpenLayer;
use super::super::trace;
use super::super::{Answer, Class, Command, Delivered, FetchError, Tried};
use super::{Asked, Driver};
use crate::metrics::{RECORDED, RulingGiven};

impl Driver {
    /// A point in time as the policy counts.
    pub(super) fn policy_time(&self, at: Instant) -> hermes_policy::time::Instant {
        let nanos = at.saturating_duration_since(self.started).as_nanos();
        hermes_policy::time::Instant(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// A point in the policy's time.
    pub(super) fn clock_time(&self, at: hermes_policy::time::Instant) -> Instant {
        self.started + std::time::Duration::from_nanos(at.0)
    }

    /// Tells the policy a fact and carries out what it asks for.
    pub(super) fn tell(&mut self, event: Event) {
        let mut actions = Vec::new();
        let now = self.policy_time(Instant::now());
        match self.recorder.as_mut().filter(|recorder| recorder.is_going()) {
            None => self.flight.handle(now, event, &mut self.rng, &mut actions),
            Some(recorder) => {
                self.flight.handle(now, event.clone(), &mut self.rng, &mut actions);
                recorder.note(Entry { at: now, event, actions: actions.clone() });
            }
        }
        for action in actions {
            self.carry_out(action);
        }
    }

    fn carry_out(&mut self, action: Action) {
        match action {
            Action::AskLocal { ask, layer, chunks, class } => {
                self.trace(ask, layer, trace::Asked::Local, class, None, chunks.clone());
                self.spawn_ask((ask, class), Source::Local, layer, |work, layer| asks::local(work, layer, chunks));
            }
            Action::AskPeer { ask, peer: no, layer, chunks, class, want, reason, extent, timeout } => {
                let Some(peer) = self.peers.id(no) else { return };
                self.trace(ask, layer, trace::Asked::Peer(peer), class, Some(reason), chunks.clone());
                let said = match class {
                    Class::Demand => hermes_p2p::Class::Demand,
                    Class::Prefetch => hermes_p2p::Class::Prefetch,
                };
                let asking = Asking { chunks, extent, want, class: said };
                self.spawn_ask((ask, class), Source::Peer(no), layer, move |work, layer| {
                    asks::peer(work, layer, peer, asking, timeout)
                });
            }
            Action::Rule { claim, ruling } => self.rule(claim, ruling),
            Action::Suspect { peer } => {
                if let (Some(peer), Some(node)) = (self.peers.id(peer), &self.config.peers) {
                    node.suspect(&peer);
                }
            }
            Action::AskOrigin { ask, origin, layer, spans, class, reason, timeout } => {
                self.trace_registry(ask, layer, &spans, class, reason);
                let Some(blob) = self.layers.get(&layer).map(|open| open.blob()) else { return };
                let asked = Arc::clone(&blob);
                self.spawn_ask((ask, class), Source::Origin, layer, move |work, layer| {
                    asks::registry(work, layer, blob, (origin, reason), spans, timeout)
                });
                if let Some(ask) = self.asks.get_mut(&ask) {
                    ask.blob = Some(asked);
                }
            }
            Action::Cancel { ask } => {
                self.tracer.ended(ask, None, Instant::now());
                if let Some(asked) = self.asks.remove(&ask) {
                    asked.task.abort();
                }
            }
            Action::Deliver { read } => self.answer(read, Ok),
            Action::Fail { read, cause } => self.fail(read, cause),
            Action::FindHolders { layer } => {
                if let Some(open) = self.layers.get(&layer).cloned() {
                    self.spawn_detached(|work| asks::holders(work, open));
                }
            }
            Action::FindSpans { layer } => {
                if let Some(open) = self.layers.get(&layer).cloned() {
                    let blob = open.blob();
                    self.spawn_detached(|work| asks::spans(work, open, blob));
                }
            }
            Action::Watch { layer, place, chunk } => {
                if let Some(open) = self.layers.get(&layer) {
                    open.marks.set(place, open.layer.table().range(ChunkNo(chunk)).start);
                }
            }
            Action::Ban { peer, until } => {
                if let (Some(peer), Some(node)) = (self.peers.id(peer), self.config.peers.clone()) {
                    let duration = self.clock_time(until).saturating_duration_since(Instant::now());
                    RECORDED.banned();
                    tracing::warn!(%peer, ?duration, "a peer sent wrong bytes; nothing is taken from it for a while");
                    self.spawn_detached(|_| async move { drop(node.ban(peer, duration).await) });
                }
            }
            Action::Arm { at } => self.timer = Some(self.clock_time(at)),
        }
    }

    fn answer(&mut self, read: ReadId, answer: impl FnOnce(Delivered) -> Answer) {
        if let Some(waiting) = self.reads.remove(&read) {
            if let (Class::Demand, Some(from)) = (waiting.class, waiting.from) {
                RECORDED.waited(from, waiting.since.elapsed());
            }
            let _ = waiting.done.send(answer(waiting.delivered));
        }
    }

    fn fail(&mut self, read: ReadId, cause: FailCause) {
        let Some(layer) = self.reads.get(&read).map(|waiting| waiting.layer) else { return };
        let open = self.layers.get(&layer);
        let image = open.map_or_else(String::new, |open| open.image());
        let name = |source| self.name(source, layer);
        let failed = cause.tried.iter().map(|(source, class)| (*source, Some(*class)));
        let mut tried: Vec<_> = failed.map(|(source, failure)| Tried { name: name(source), source, failure }).collect();
        let is_open = matches!(cause.origin, OriginStanding::Ready | OriginStanding::Resting);
        if is_open && !tried.iter().any(|tried| tried.source == Source::Origin) {
            tried.push(Tried { name: name(Source::Origin), source: Source::Origin, failure: None });
        }
        self.answer(read, |_| Err(FetchError::Failed { image, layer, reason: cause.reason, tried }));
    }

    fn work(&self) -> Option<Ask> {
        let reports = self.reports.upgrade()?;
        Some(Ask {
            id: None,
            class: Class::Prefetch,
            store: Arc::clone(&self.config.store),
            peers: self.config.peers.clone(),
            reports,
        })
    }

    /// Runs `ask` as a task; whatever becomes of it, the policy hears of its end once.
    fn spawn_ask<F, R>(&mut self, (ask, class): (AskId, Class), source: Source, layer: DiffId, run: F)
    where
        F: FnOnce(Ask, Arc<OpenLayer>) -> R,
        R: Future<Output = Outcome> + Send + 'static,
    {
        let (Some(mut work), Some(open)) = (self.work(), self.layers.get(&layer).cloned()) else { return };
        (work.id, work.class) = (Some(ask), class);
        let reports = work.reports.clone();
        let running = run(work, open);
        let task = tokio::spawn(async move {
            let outcome = running.await;
            let _ = reports.send(Command::Ended { ask, outcome }).await;
        });
        self.asks.insert(ask, Asked { task: task.abort_handle(), source, layer, blob: None });
    }

    pub(super) fn spawn_detached<F, R>(&self, run: F)
    where
        F: FnOnce(Ask) -> R,
        R: Future<Output = ()> + Send + 'static,
    {
        if let Some(work) = self.work() {
            tokio::spawn(run(work));
        }
    }

    fn rule(&mut self, claim: ClaimId, ruling: event::Ruling) {
        RECORDED.ruled(RulingGiven::of(&ruling));
        let ruling = match ruling {
            event::Ruling::Give(chunks) => Ruling::Give(chunks),
            event::Ruling::Lacks(chunks) => Ruling::Lacks(chunks),
            event::Ruling::Refer { chunks, peers } => {
                let peers = peers.into_iter().filter_map(|peer| self.peers.id(peer)).collect();
                Ruling::Refer { chunks, peers }
            }
            event::Ruling::Delegate(chunks) => Ruling::Delegate(chunks),
            event::Ruling::RegistryRests(wait) => Ruling::RegistryRests(wait),
            event::Ruling::NotMine { epoch } => Ruling::NotMine { epoch },
        };
        if let Some(rulings) = self.claims.get(&claim)
            && rulings.try_send(ruling).is_err()
        {
            // It has gone, or is too slow to be told: then the server ends it.
            self.claims.remove(&claim);
        }
    }
}
