//! What the end of an ask says about its source. The chunks that it did not bring are free again; the scheduler gives
//! them to the next source in the same call.

use hermes_image::runs::Runs;

use super::table::Ask;
use super::{Flight, Turn};
use crate::class::{Class, ErrorClass};
use crate::event::{Action, AskId, Outcome, PeerNo, Source, Want};
use crate::time::{Duration, Instant};

impl Flight {
    pub(super) fn ask_ended(&mut self, id: AskId, outcome: Outcome, turn: &mut Turn<'_>) {
        let Some(ask) = self.drop_ask(id) else { return };
        self.settle(&ask, outcome, turn);
    }

    /// The driver has shown no sign of life of an ask for too long: the lease ends, the chunks go elsewhere.
    pub(super) fn lease_ended(&mut self, id: AskId, turn: &mut Turn<'_>) {
        let Some(ask) = self.drop_ask(id) else { return };
        if let Source::Peer(peer) = ask.source
            && ask.was_pending
            && self.readings.overtake(&ask)
        {
            // It would leave the next reader waiting as long.
            self.peers.slow(peer, turn.now, &self.limits);
        }
        turn.out.push(Action::Cancel { ask: id });
        if self.stands_in_line(&ask, turn.now) {
            return;
        }
        self.settle(&ask, Outcome::Failed { class: ErrorClass::Transient, retry_after: None }, turn);
    }

    /// Whether what readers wait for was asked for as prefetch, of a peer that lives and sends something else first: asked for as
    /// demand it comes before that.
    fn stands_in_line(&self, ask: &Ask, now: Instant) -> bool {
        let Source::Peer(peer) = ask.source else { return false };
        ask.class == Class::Prefetch && ask.want == Want::Here && self.peers.sends_something(peer, now, &self.limits)
    }

    fn settle(&mut self, ask: &Ask, outcome: Outcome, turn: &mut Turn<'_>) {
        // Readahead is a guess: what fails is not guessed again.
        if let Some(layer) = self.layers.get_mut(&ask.layer) {
            layer.ahead.remove_all(&ask.chunks);
            if layer.ahead.is_empty() {
                self.ahead_layers.remove(&ask.layer);
            }
        }
        match outcome {
            Outcome::Done { bytes } if ask.chunks.is_empty() => self.succeeded(ask, bytes, turn),
            // It says that all came, and it did not: believe what arrived.
            Outcome::Done { .. } => self.lacks(ask, &ask.chunks, turn),
            Outcome::Lacks { chunks } => {
                let mut lacking = chunks;
                // A source that lacks nothing of what it was asked for, and did not bring it, would be asked for ever.
                if lacking.intersection(&ask.chunks).is_empty() {
                    lacking.insert_all(&ask.chunks);
                }
                self.lacks(ask, &lacking, turn);
            }
            Outcome::Busy { retry_after } => match ask.source {
                Source::Peer(peer) => self.peers.busy(peer, turn.now, retry_after, &self.limits),
                Source::Origin => self.failed(ask, ErrorClass::Transient, Some(retry_after), turn),
                Source::Local => self.failed(ask, ErrorClass::Local, Some(retry_after), turn),
            },
            Outcome::NotMine { .. } => {
                if let Source::Peer(peer) = ask.source {
                    self.not_mine(ask, peer);
                }
            }
            Outcome::Failed { class, retry_after } => self.failed(ask, class, retry_after, turn),
        }
    }

    fn succeeded(&mut self, ask: &Ask, bytes: u64, turn: &mut Turn<'_>) {
        if let Source::Peer(peer) = ask.source {
            let elapsed = turn.now.since(ask.sent);
            let latency = ask.first_sign.map_or(elapsed, |at| at.since(ask.sent));
            self.peers.answered(peer, latency, elapsed, bytes);
        }
        let Some(layer) = self.layers.get_mut(&ask.layer) else { return };
        layer.troubles.remove(&ask.source);
        if layer.own.resting(turn.now).is_some() || layer.origin.backoff.resting(turn.now).is_some() {
            layer.quiet = None;
        }
        layer.own.succeed();
        if ask.source == Source::Origin {
            layer.origin.backoff.succeed();
            layer.origin.wrong_bytes = 0;
        }
    }

    fn lacks(&mut self, ask: &Ask, chunks: &Runs, turn: &mut Turn<'_>) {
        if let Source::Peer(peer) = ask.source {
            match ask.want {
                Want::Owner { .. } => self.owner_failed(ask, peer, ErrorClass::Local),
                Want::Here => self.named_in_vain(ask.layer, chunks),
            }
        }
        let Some(layer) = self.layers.get_mut(&ask.layer) else { return };
        match ask.source {
            Source::Local => layer.local.remove_all(chunks),
            Source::Peer(peer) => {
                if let Some(holder) = layer.holders.get_mut(&peer) {
                    holder.lacks(chunks);
                    if holder.is_empty() && holder.denied_until.is_none() {
                        layer.holders.remove(&peer);
                    }
                }
            }
            // A blob is whole; a registry that leaves something out has failed.
            Source::Origin => self.failed(ask, ErrorClass::Transient, None, turn),
        }
    }

    fn failed(&mut self, ask: &Ask, class: ErrorClass, retry_after: Option<Duration>, turn: &mut Turn<'_>) {
        let limits = &self.limits;
        let Some(layer) = self.layers.get_mut(&ask.layer) else { return };
        if ask.source == Source::Origin && ask.sent < layer.origin.changed_at && class != ErrorClass::Local {
            // It speaks of what was the registry, or of credentials that were.
            return;
        }
        layer.trouble(ask.source, class, limits);
        if class == ErrorClass::Local && ask.source != Source::Local {
            layer.own.fail(turn.now, ask.sent, retry_after, &limits.own_backoff, turn.rng);
            return;
        }
        match ask.source {
            // Whatever is wrong with the copy, the chunks can come from elsewhere; if our disk is full, that will say.
            Source::Local => layer.local.remove_all(&ask.chunks),
            Source::Peer(peer) => self.peer_failed(ask, peer, class, retry_after, turn),
            Source::Origin => self.origin_failed(ask, class, retry_after, turn),
        }
    }

    fn peer_failed(
        &mut self,
        ask: &Ask,
        peer: PeerNo,
        class: ErrorClass,
        retry_after: Option<Duration>,
        turn: &mut Turn<'_>,
    ) {
        if matches!(ask.want, Want::Owner { .. }) {
            self.owner_failed(ask, peer, class);
        }
        let Some(layer) = self.layers.get_mut(&ask.layer) else { return };
        match class {
            ErrorClass::Transient | ErrorClass::Local => {
                self.peers.failed(peer, turn.now, ask.sent, retry_after, &self.limits, turn.rng);
                if let Some(sign) = ask.first_sign.filter(|_| ask.is_waited_for()) {
                    self.peers.went_on(turn.now.since(ask.progress_at().max(sign)));
                }
                if ask.first_sign.is_none() {
                    // One that fails at once says so; one that says nothing costs the next reader as much time again.
                    if turn.now.since(ask.sent) >= self.limits.rank_wait_min {
                        self.peers.silent(peer, turn.now, &self.limits);
                    }
                    if self.peers.is_member(peer) {
                        turn.out.push(Action::Suspect { peer });
                    }
                }
            }
            ErrorClass::PeerFault => {
                let until = turn.now + self.limits.ban;
                self.peers.ban(peer, until);
                turn.out.push(Action::Ban { peer, until });
                self.forget_peer(peer, turn);
            }
            ErrorClass::NotFound => {
                layer.holders.remove(&peer);
            }
            ErrorClass::Denied => {
                if let Some(holder) = layer.holders.get_mut(&peer) {
                    holder.denied_until = Some(turn.now + self.limits.refusal);
                }
            }
        }
    }

    fn origin_failed(&mut self, ask: &Ask, class: ErrorClass, retry_after: Option<Duration>, turn: &mut Turn<'_>) {
        let limits = &self.limits;
        let Some(layer) = self.layers.get_mut(&ask.layer) else { return };
        let origin = &mut layer.origin;
        let refused = match class {
            ErrorClass::Transient | ErrorClass::Local => false,
            ErrorClass::PeerFault => {
                origin.wrong_bytes += 1;
                origin.wrong_bytes >= limits.origin_wrong_bytes
            }
            ErrorClass::NotFound | ErrorClass::Denied => true,
        };
        if refused {
            origin.refused_until = Some(turn.now + limits.refusal);
            return;
        }
        origin.backoff.fail(turn.now, ask.sent, retry_after, &limits.origin_backoff, turn.rng);
        // One layer's failure is its own; a registry that says when to come back speaks for all of its layers.
        if let Some(wait) = retry_after
            && let Some(shared) = ask.origin.and_then(|no| self.origins.get_mut(&no))
        {
            let until = turn.now + wait.min(limits.origin_backoff.retry_after_max);
            shared.rest_until = shared.rest_until.max(until);
        }
    }
}
