//! What names stand for: resolved at first sight, and again, because tags move.

use std::collections::BTreeSet;

use super::reference::is_pinned;
use super::retry::{next_attempt, spread};
use super::wants::Wish;
use super::{Core, Timer, Turn};
use crate::event::{Action, Failure, FailureClass, ImageKey, Name, Phase, Resolved, SecretRef, Subject, UnixMillis};

/// Workloads that are told of a failure, beside the policies: the first few are enough to find the others.
const TOLD_WORKLOADS_MAX: usize = 8;

/// A name that is wanted.
#[derive(Debug, Default)]
pub(super) struct NameState {
    pub(super) policies: BTreeSet<String>,
    /// Whether a policy that is not paused wants it.
    pub(super) active: bool,
    /// Workloads that wait for it.
    pub(super) waiting: u32,
    pub(super) secrets: Vec<SecretRef>,
    /// What it stands for.
    pub(super) image: Option<ImageKey>,
    /// Why it was not resolved when that was tried last.
    pub(super) failure: Option<Failure>,
    pub(super) failed_at: UnixMillis,
    failures: u32,
    /// When it is resolved again.
    due: Option<UnixMillis>,
    /// The logins have changed since it was asked.
    ask_again: bool,
    /// The reason that people were told last.
    told: Option<&'static str>,
}

impl Core {
    pub(super) fn names_of<'a>(&'a self, reference: &str) -> impl Iterator<Item = Name> + use<'a> {
        let first = Name { reference: reference.to_owned(), platform: String::new() };
        let reference = reference.to_owned();
        self.names.range(first..).map(|(name, _)| name.clone()).take_while(move |name| name.reference == reference)
    }

    /// A name is wanted, by whom `wish` says.
    pub(super) fn name_wanted(
        &mut self,
        turn: &mut Turn<'_>,
        name: &Name,
        wish: Wish,
        secrets: &[SecretRef],
        waiting: u32,
    ) {
        let state = self.names.entry(name.clone()).or_default();
        let logins_changed = state.secrets != secrets;
        let begins = wish.active && !state.active;
        self.changed_policies.extend(state.policies.difference(&wish.policies).cloned());
        if state.policies != wish.policies {
            self.changed_policies.extend(wish.policies.iter().cloned());
        }
        state.policies = wish.policies;
        state.active = wish.active;
        state.waiting = waiting;
        state.secrets = secrets.to_vec();
        let class = state.failure.as_ref().map(|failure| failure.class);
        let refused = matches!(class, Some(FailureClass::Denied | FailureClass::NotFound));
        let (is_new, image) = (state.image.is_none() && state.failure.is_none(), state.image.clone());
        if self.resolving.contains(name) {
            state.ask_again |= logins_changed;
        } else if begins && (is_new || state.due.is_none() && !is_pinned(&name.reference)) || logins_changed && refused
        {
            self.set_due(name, Some(turn.now));
        }
        self.changed_images.extend(self.kept.get(name).into_iter().flatten().cloned());
        self.changed_images.extend(self.stand_ins.get(name).into_iter().flatten().cloned());
        if let Some(image) = image {
            if logins_changed {
                self.logins_changed(turn, &image);
            }
            self.changed_images.insert(image);
        }
        if self.names.get(name).is_some_and(|state| state.active && state.due.is_some_and(|due| due <= turn.now)) {
            self.due.put(name, waiting, turn.now);
        }
    }

    /// Nobody wants a name any more.
    pub(super) fn name_unwanted(&mut self, name: &Name) {
        self.set_due(name, None);
        let Some(state) = self.names.remove(name) else { return };
        self.changed_policies.extend(state.policies);
        // There is room for another one.
        self.changed_references.extend(self.left_out.first_key_value().map(|(name, _)| name.reference.clone()));
        self.changed_images.extend(self.kept.get(name).into_iter().flatten().cloned());
        if let Some(key) = state.image {
            if let Some(image) = self.images.get_mut(&key) {
                image.names.remove(name);
            }
            self.changed_images.insert(key);
        }
        self.relieve(name);
    }

    fn set_due(&mut self, name: &Name, moment: Option<UnixMillis>) {
        self.due.remove(name);
        let Some(state) = self.names.get_mut(name) else { return };
        let before = std::mem::replace(&mut state.due, moment);
        if let Some(before) = before {
            self.timers.remove(&(before, Timer::Name(name.clone())));
        }
        if let Some(moment) = moment {
            self.timers.insert((moment, Timer::Name(name.clone())));
        }
    }

    /// The moment has come; the turn may not.
    pub(super) fn name_due(&mut self, turn: &Turn<'_>, name: &Name) {
        let Some(state) = self.names.get(name) else { return };
        if state.active && !self.resolving.contains(name) {
            self.due.put(name, state.waiting, turn.now);
        }
    }

    pub(super) fn start_resolving(&mut self, turn: &mut Turn<'_>) {
        // Moments that have just been set to now are due without being woken.
        let due: Vec<Name> = self
            .timers
            .iter()
            .take_while(|(moment, _)| *moment <= turn.now)
            .filter_map(|(_, timer)| if let Timer::Name(name) = timer { Some(name.clone()) } else { None })
            .collect();
        for name in due {
            self.name_due(turn, &name);
            let moment = self.names.get(&name).and_then(|state| state.due);
            moment.map(|moment| self.timers.remove(&(moment, Timer::Name(name))));
        }
        while self.resolving.len() < self.settings.resolves_max {
            let (registries, resolving) = (&self.registries, &self.resolving);
            let most = self.settings.resolves_max;
            let Some(name) = self.due.pop(|name| registries.may_ask(name, most, resolving.iter())) else { break };
            // One that is paused stays due.
            let Some(state) = self.names.get_mut(&name).filter(|state| state.active) else { continue };
            state.ask_again = false;
            let secrets = state.secrets.clone();
            self.set_due(&name, None);
            self.resolving.insert(name.clone());
            turn.out.push(Action::Resolve { name, secrets });
        }
    }

    pub(super) fn name_resolved(&mut self, turn: &mut Turn<'_>, name: Name, outcome: Result<Resolved, Failure>) {
        self.resolving.remove(&name);
        self.registries.answered(&name, outcome.as_ref().err());
        if !self.names.contains_key(&name) {
            return;
        }
        match outcome {
            Ok(resolved) => self.name_stands_for(turn, &name, resolved),
            Err(failure) => self.name_failed(turn, &name, failure),
        }
        // Whoever asked with other logins may have been told something else.
        let Some(state) = self.names.get_mut(&name) else { return };
        if std::mem::take(&mut state.ask_again) && state.failure.is_some() {
            self.set_due(&name, Some(turn.now));
        }
    }

    fn name_stands_for(&mut self, turn: &mut Turn<'_>, name: &Name, resolved: Resolved) {
        let Some(state) = self.names.get_mut(name) else { return };
        let key = resolved.image.clone();
        if state.failure.take().is_some() {
            self.changed_policies.extend(state.policies.iter().cloned());
        }
        (state.failures, state.told) = (0, None);
        let before = state.image.replace(key.clone());
        let policies = state.policies.clone();
        let again = UnixMillis(turn.now.0 + spread(self.settings.refresh, turn.rng));
        self.set_due(name, (!is_pinned(&name.reference)).then_some(again));
        self.changed_policies.extend(policies.iter().cloned());

        let mut earlier: BTreeSet<ImageKey> = self.kept.remove(name).unwrap_or_default();
        for image in &earlier {
            if let Some(state) = self.images.get_mut(image) {
                state.kept_for = None;
            }
        }
        if let Some(before) = before.filter(|before| *before != key) {
            for policy in &policies {
                let message = format!(
                    "{name} has moved from {} to {}; the new image is made ready",
                    before.manifest, key.manifest
                );
                turn.tell(Subject::Policy(policy.clone()), false, "TagMoved", message);
            }
            earlier.insert(before);
        }
        self.changed_images.extend(earlier.iter().cloned());
        earlier.remove(&key);
        for image in earlier {
            self.hold(&image, name);
        }
        self.image_named(turn, name, resolved);
    }

    /// An image does not have this name any more. Pods that may run it keep it, and so does the name until what it stands
    /// for now is ready.
    fn hold(&mut self, key: &ImageKey, name: &Name) {
        let pods = self.running_pods(&name.reference);
        let Some(image) = self.images.get_mut(key) else { return };
        image.names.remove(name);
        if image.phase != Phase::Ready {
            return;
        }
        self.stand_in(key, name);
        let Some(image) = self.images.get_mut(key) else { return };
        for (pod, policies) in pods {
            image.holders.entry(pod.clone()).or_default().extend(policies);
            self.held.entry(pod).or_default().insert(key.clone());
        }
    }

    fn name_failed(&mut self, turn: &mut Turn<'_>, name: &Name, failure: Failure) {
        let refresh = self.settings.refresh;
        let Some(state) = self.names.get_mut(name) else { return };
        state.failures = state.failures.saturating_add(1);
        let mut next = next_attempt(turn.now, &failure, state.failures, refresh, turn.rng);
        if next.is_none() && !is_pinned(&name.reference) {
            // What the tag stands for is of no use, but tags move.
            next = Some(UnixMillis(turn.now.0 + spread(refresh, turn.rng)));
        }
        let tell = state.told.replace(failure.reason) != Some(failure.reason);
        let policies = state.policies.clone();
        state.failed_at = turn.now;
        state.failure = Some(failure.clone());
        self.set_due(name, next);
        self.changed_policies.extend(policies.iter().cloned());
        if !tell {
            return;
        }
        for policy in policies {
            turn.tell(Subject::Policy(policy), true, failure.reason, failure.message.clone());
        }
        let workloads: Vec<_> =
            self.workloads_of(&name.reference).take(TOLD_WORKLOADS_MAX).map(|workload| workload.id.clone()).collect();
        for workload in workloads {
            turn.tell(Subject::Workload(workload), true, failure.reason, failure.message.clone());
        }
    }
}
