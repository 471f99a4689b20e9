//! Builds: few at once, most wanted first, tried again when that is worth something.

use super::retry::next_attempt;
use super::{Core, Timer, Turn};
use crate::event::{Action, Failure, FailureClass, ImageKey, Name, Phase, ReadyIndex, SecretRef, Subject, UnixMillis};

/// Secrets that are tried for one build.
const SECRETS_MAX: usize = 32;

impl Core {
    pub(super) fn start_building(&mut self, turn: &mut Turn<'_>) {
        while self.building.len() < self.settings.builds_max {
            let going: Vec<&Name> =
                self.building.iter().filter_map(|key| Some(&self.images.get(key)?.source)).collect();
            let may_begin = |key: &ImageKey| {
                let most = self.settings.builds_max;
                // One that has no source now is taken out below.
                self.source(key).is_none_or(|(name, _)| self.registries.may_ask(&name, most, going.iter().copied()))
            };
            let Some(key) = self.pending.find(may_begin) else { break };
            self.pending.remove(&key);
            let Some((name, secrets)) = self.source(&key) else { continue };
            let Some(image) = self.images.get_mut(&key) else { continue };
            image.source = name.clone();
            image.enter(turn.now, Phase::Building);
            (image.read_bytes, image.failure) = (0, None);
            image.attempts = image.attempts.saturating_add(1);
            if image.told.is_none() {
                image.told = Some("Building");
                let message = format!("the index of {name} ({}) is being built", key.manifest);
                turn.tell(Subject::Image(key.clone()), false, "Building", message);
            }
            self.building.insert(key.clone());
            self.changed_images.insert(key.clone());
            turn.out.push(Action::Build { image: key, name, secrets });
        }
    }

    /// Where an image is read from, and the logins for it: its names in turn, when one after another fails.
    fn source(&self, key: &ImageKey) -> Option<(Name, Vec<SecretRef>)> {
        let image = self.images.get(key)?;
        let names = image.names.keys().chain(&image.kept_for);
        let active: Vec<&Name> = names.filter(|name| self.names.get(*name).is_some_and(|state| state.active)).collect();
        let name = (*active.get(image.failures as usize % active.len().max(1))?).clone();
        // The logins of this name first: a registry may have blocked the others.
        let own = self.names.get(&name).into_iter();
        let all = own.chain(active.iter().filter_map(|name| self.names.get(*name)));
        let mut secrets: Vec<SecretRef> = Vec::new();
        for secret in all.flat_map(|state| &state.secrets) {
            if secrets.len() < SECRETS_MAX && !secrets.contains(secret) {
                secrets.push(secret.clone());
            }
        }
        Some((name, secrets))
    }

    pub(super) fn build_moved(&mut self, key: &ImageKey, read_bytes: u64) {
        if let Some(image) = self.images.get_mut(key)
            && image.phase == Phase::Building
        {
            image.read_bytes = read_bytes;
            self.changed_images.insert(key.clone());
        }
    }

    pub(super) fn build_ended(&mut self, turn: &mut Turn<'_>, key: ImageKey, outcome: Result<ReadyIndex, Failure>) {
        let was_building = self.building.remove(&key);
        if was_building && let Some(image) = self.images.get(&key) {
            self.registries.answered(&image.source, outcome.as_ref().err());
        }
        let Some(image) = self.images.get_mut(&key) else {
            // It was given up when this was on its way.
            if outcome.is_ok() {
                turn.out.push(Action::Release { image: key });
            }
            return;
        };
        match outcome {
            Ok(index) => {
                let was_ready = image.phase == Phase::Ready;
                let message = format!(
                    "the index of {} ({}) is ready: {} bytes for {} bytes of layers",
                    image.source, key.manifest, index.index_len_bytes, index.image_len_bytes
                );
                image.enter(turn.now, Phase::Ready);
                image.index = Some(index);
                (image.failure, image.failures, image.read_bytes) = (None, 0, 0);
                let attempt = image.next_attempt.take();
                if image.told.replace("IndexReady") != Some("IndexReady") {
                    turn.tell(Subject::Image(key.clone()), false, "IndexReady", message);
                }
                self.forget_attempt(attempt, &key);
                if !was_ready {
                    self.nodes.want_plan();
                    self.inherit_profile(turn, &key);
                    self.relieve_names_of(&key);
                }
            }
            Err(failure) if was_building => self.build_failed(turn, &key, failure),
            Err(_) => {}
        }
        self.changed_images.insert(key);
    }

    fn build_failed(&mut self, turn: &mut Turn<'_>, key: &ImageKey, failure: Failure) {
        let refresh = self.settings.refresh;
        let Some(image) = self.images.get_mut(key) else { return };
        image.enter(turn.now, Phase::Failed);
        image.failures = image.failures.saturating_add(1);
        image.read_bytes = 0;
        image.next_attempt = next_attempt(turn.now, &failure, image.failures, refresh, turn.rng);
        if let Some(moment) = image.next_attempt {
            self.timers.insert((moment, Timer::Image(key.clone())));
        }
        if image.told.replace(failure.reason) != Some(failure.reason) {
            let message = format!("{}: {}", failure.reason, failure.message);
            turn.tell(Subject::Image(key.clone()), true, "IndexFailed", message);
        }
        image.failure = Some(failure);
    }

    /// The moment to try again has come.
    pub(super) fn image_due(&mut self, turn: &Turn<'_>, key: &ImageKey) {
        let Some(image) = self.images.get_mut(key) else { return };
        image.next_attempt = None;
        if image.phase == Phase::Failed {
            image.enter(turn.now, Phase::Pending);
            self.changed_images.insert(key.clone());
        }
    }

    /// An image may be had with other logins, or by another name: what was refused is tried again at once.
    pub(super) fn logins_changed(&mut self, turn: &Turn<'_>, key: &ImageKey) {
        let Some(image) = self.images.get_mut(key) else { return };
        let class = image.failure.as_ref().map(|failure| failure.class);
        if image.phase == Phase::Failed && matches!(class, Some(FailureClass::Denied | FailureClass::NotFound)) {
            let attempt = image.next_attempt.take();
            image.enter(turn.now, Phase::Pending);
            self.forget_attempt(attempt, key);
            self.changed_images.insert(key.clone());
        }
    }

    /// An image is not tried again at the moment that was put down.
    pub(super) fn forget_attempt(&mut self, moment: Option<UnixMillis>, key: &ImageKey) {
        if let Some(moment) = moment {
            self.timers.remove(&(moment, Timer::Image(key.clone())));
        }
    }
}
