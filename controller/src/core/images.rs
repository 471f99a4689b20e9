//! Images: who wants them, what is said of them, and when they are given up.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hermes_image::access::Access;
use hermes_policy::profile::StartRecord;

use super::{Core, Turn};
use crate::crd::SeedMode;
use crate::event::{
    Action, Failure, ImageKey, ImageView, Name, Phase, ReadyIndex, Resolved, ResolvedLayer, Subject, UnixMillis,
    WorkloadId,
};

/// One image for one platform.
#[derive(Debug)]
pub(super) struct ImageState {
    pub(super) layers: Arc<[ResolvedLayer]>,
    /// The names that stand for it now, with what their registry says about who may have it.
    pub(super) names: BTreeMap<Name, Access>,
    /// Where it was read from last, or is to be read from.
    pub(super) source: Name,
    source_access: Access,
    /// The name of an earlier run, as long as nobody knows what it stands for now.
    pub(super) kept_for: Option<Name>,
    /// Pods that may still run it although its tag has moved, with the policies that meant them.
    pub(super) holders: BTreeMap<WorkloadId, BTreeSet<String>>,
    pub(super) phase: Phase,
    pub(super) failure: Option<Failure>,
    pub(super) attempts: u32,
    /// Builds that failed in a row.
    pub(super) failures: u32,
    pub(super) next_attempt: Option<UnixMillis>,
    pub(super) read_bytes: u64,
    pub(super) since: UnixMillis,
    pub(super) index: Option<ReadyIndex>,
    /// Names that it stands in for ([`super::stand_ins`]).
    pub(super) stands_in: BTreeSet<Name>,
    pub(super) profile: Option<Arc<[u8]>>,
    /// What the profile of an earlier version means for it is being found out.
    pub(super) carrying: bool,
    /// The newest starts.
    pub(super) records: Vec<StartRecord>,
    pub(super) seeds: BTreeMap<String, SeedMode>,
    /// The reason that people were told last.
    pub(super) told: Option<&'static str>,
    /// What was published last.
    pub(super) published: Option<Arc<ImageView>>,
}

impl ImageState {
    fn new(now: UnixMillis, layers: Arc<[ResolvedLayer]>, source: Name, source_access: Access) -> Self {
        Self {
            layers,
            names: BTreeMap::new(),
            source,
            source_access,
            kept_for: None,
            holders: BTreeMap::new(),
            phase: Phase::Pending,
            failure: None,
            attempts: 0,
            failures: 0,
            next_attempt: None,
            read_bytes: 0,
            since: now,
            index: None,
            stands_in: BTreeSet::new(),
            profile: None,
            carrying: false,
            records: Vec::new(),
            seeds: BTreeMap::new(),
            told: None,
            published: None,
        }
    }

    /// Compressed bytes of its layers.
    pub(super) fn len_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.len_bytes).sum()
    }

    /// Who may have it: everybody, if one of its names gives it to everybody.
    fn access(&self) -> Access {
        let mut accesses = self.names.values();
        match accesses.any(|access| *access == Access::Public) {
            true => Access::Public,
            false if self.names.is_empty() => self.source_access,
            false => Access::Private,
        }
    }

    pub(super) fn enter(&mut self, now: UnixMillis, phase: Phase) {
        if self.phase != phase {
            self.since = now;
        }
        self.phase = phase;
    }
}

/// What an earlier run has left of an image: its index, its layers, and to whom its registry gives it.
pub(super) type Kept = (ReadyIndex, Arc<[ResolvedLayer]>, Access);

impl Core {
    /// An index of an earlier run is there.
    pub(super) fn image_kept(
        &mut self,
        now: UnixMillis,
        key: ImageKey,
        name: Name,
        kept: Kept,
        profile: Option<Arc<[u8]>>,
    ) {
        if self.images.contains_key(&key) {
            return;
        }
        let (index, layers, access) = kept;
        let mut image = ImageState::new(now, layers, name.clone(), access);
        image.phase = Phase::Ready;
        image.index = Some(index);
        image.profile = profile;
        image.kept_for = Some(name.clone());
        // It was told of when it became ready.
        image.told = Some("IndexReady");
        self.images.insert(key.clone(), image);
        self.kept.entry(name).or_default().insert(key.clone());
        self.changed_images.insert(key);
        self.nodes.want_plan();
    }

    /// A name stands for an image now.
    pub(super) fn image_named(&mut self, turn: &mut Turn<'_>, name: &Name, resolved: Resolved) {
        let Resolved { image: key, layers, access } = resolved;
        let new = || ImageState::new(turn.now, layers, name.clone(), access);
        let image = self.images.entry(key.clone()).or_insert_with(new);
        let joins = image.names.insert(name.clone(), access).is_none();
        self.stop_standing_in(&key, &[name.clone()].into());
        self.changed_images.insert(key.clone());
        if joins {
            self.inherit_profile(turn, &key);
            self.logins_changed(turn, &key);
        }
        self.relieve(name);
    }

    /// The policies that want an image, and whether one of them is not paused.
    pub(super) fn wanted_by(&self, image: &ImageState) -> (BTreeSet<String>, bool) {
        let unresolved = |name: &&Name| self.names.get(*name).is_some_and(|state| state.image.is_none());
        let names = image.names.keys().chain(image.kept_for.iter().filter(unresolved));
        let mut policies: BTreeSet<String> = image.holders.values().flatten().cloned().collect();
        let stands_in = image.stands_in.iter().filter_map(|name| self.names.get(name));
        policies.extend(stands_in.flat_map(|state| state.policies.iter().cloned()));
        let mut active = false;
        for state in names.filter_map(|name| self.names.get(name)) {
            policies.extend(state.policies.iter().cloned());
            active |= state.active;
        }
        (policies, active)
    }

    /// Draws the consequences for the images that have changed.
    pub(super) fn settle_images(&mut self, turn: &mut Turn<'_>) {
        while let Some(key) = self.changed_images.pop_first() {
            let Some(image) = self.images.get(&key) else { continue };
            let (policies, active) = self.wanted_by(image);
            if policies.is_empty() && self.synced {
                self.give_up(turn, &key);
                continue;
            }
            let waiting = image.names.keys().filter_map(|name| self.names.get(name)).map(|state| state.waiting).sum();
            let image = &self.images[&key];
            match image.phase {
                Phase::Pending if active => self.pending.put(&key, waiting, turn.now),
                _ => self.pending.remove(&key),
            }
            self.publish(turn, &key, policies);
        }
    }

    fn publish(&mut self, turn: &mut Turn<'_>, key: &ImageKey, policies: BTreeSet<String>) {
        let Some(image) = self.images.get_mut(key) else { return };
        let view = ImageView {
            image: key.clone(),
            names: image.names.keys().chain(&image.kept_for).cloned().collect(),
            policies,
            phase: image.phase,
            failure: image.failure.clone(),
            attempts: image.attempts,
            next_attempt: image.next_attempt,
            image_len_bytes: image.len_bytes(),
            read_bytes: image.read_bytes,
            since: image.since,
            index: image.index.clone(),
            access: image.access(),
            profile: image.profile.clone(),
            seeds: image.seeds.clone(),
        };
        let before = image.published.take();
        if before.as_deref() == Some(&view) {
            image.published = before;
            return;
        }
        let says_more = before.as_deref().is_none_or(|before| {
            before.policies != view.policies || before.phase != view.phase || before.failure != view.failure
        });
        if says_more {
            self.changed_policies.extend(before.iter().flat_map(|before| before.policies.iter().cloned()));
            self.changed_policies.extend(view.policies.iter().cloned());
        }
        let view = Arc::new(view);
        image.published = Some(Arc::clone(&view));
        turn.out.push(Action::Publish(view));
    }

    /// Nobody wants an image any more.
    fn give_up(&mut self, turn: &mut Turn<'_>, key: &ImageKey) {
        let Some(image) = self.images.remove(key) else { return };
        self.stop_standing_in(key, &image.stands_in);
        self.pending.remove(key);
        self.forget_attempt(image.next_attempt, key);
        if let Some(name) = &image.kept_for
            && let Some(kept) = self.kept.get_mut(name)
        {
            kept.remove(key);
            if kept.is_empty() {
                self.kept.remove(name);
            }
        }
        if self.building.remove(key) {
            turn.out.push(Action::Cancel { image: key.clone() });
        }
        turn.out.push(Action::Release { image: key.clone() });
        if let Some(published) = &image.published {
            self.changed_policies.extend(published.policies.iter().cloned());
            turn.out.push(Action::Withdraw(key.clone()));
            let message =
                format!("{} ({}) is wanted by no policy any more and is given up", image.source, key.manifest);
            turn.tell(Subject::Image(key.clone()), false, "Released", message);
        }
        if !image.seeds.is_empty() {
            self.nodes.want_plan();
        }
    }
}
