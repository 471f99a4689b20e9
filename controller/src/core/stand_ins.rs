//! What stands in for an image that is not ready yet: the one that its name stood for before.
//!
//! A tag that moves must not take anything away: nodes go on with the older image's index until the new one has its own, and
//! has taken over what is known of the older one's starts, for which the older one's indexes are read. An image that is
//! never ready leaves the older one in its place.

use std::collections::BTreeSet;

use super::{Core, Turn};
use crate::event::{ImageKey, Name, Phase, Subject};

impl Core {
    /// `key` is ready and does not have `name` any more; it stays until what has it now is ready.
    pub(super) fn stand_in(&mut self, key: &ImageKey, name: &Name) {
        if let Some(image) = self.images.get_mut(key) {
            image.stands_in.insert(name.clone());
            self.stand_ins.entry(name.clone()).or_default().insert(key.clone());
        }
    }

    /// `name` stands for `key`, or for nothing that is wanted; perhaps nothing has to stand in for it any more.
    pub(super) fn relieve(&mut self, name: &Name) {
        if let Some(state) = self.names.get(name) {
            let image = state.image.as_ref().and_then(|key| self.images.get(key));
            if !image.is_some_and(|image| image.phase == Phase::Ready && !image.carrying) {
                return;
            }
        }
        for key in self.stand_ins.remove(name).unwrap_or_default() {
            if let Some(image) = self.images.get_mut(&key) {
                image.stands_in.remove(name);
                self.changed_images.insert(key);
            }
        }
    }

    /// The same for all names of `key`, which may have become ready.
    pub(super) fn relieve_names_of(&mut self, key: &ImageKey) {
        let names: Vec<Name> = self.images.get(key).into_iter().flat_map(|image| image.names.keys().cloned()).collect();
        names.iter().for_each(|name| self.relieve(name));
    }

    /// `key` stands in for none of `names` any more.
    pub(super) fn stop_standing_in(&mut self, key: &ImageKey, names: &BTreeSet<Name>) {
        for name in names {
            if let Some(keys) = self.stand_ins.get_mut(name) {
                keys.remove(key);
                if keys.is_empty() {
                    self.stand_ins.remove(name);
                }
            }
            if let Some(image) = self.images.get_mut(key) {
                image.stands_in.remove(name);
            }
        }
    }

    /// What was kept of a ready image is damaged: it is built again at once, if there is a name to read it by.
    pub(super) fn image_lost(&mut self, turn: &mut Turn<'_>, key: &ImageKey) {
        let Some(image) = self.images.get_mut(key).filter(|image| image.phase == Phase::Ready) else { return };
        image.index = None;
        image.enter(turn.now, Phase::Pending);
        image.told = Some("IndexLost");
        let message = format!(
            "what is kept of {} ({}) was damaged and is removed; it is built again; look at the disk if it comes again",
            image.source, key.manifest
        );
        let nameless = image.names.is_empty() && image.kept_for.is_none();
        let (names, holders) = (image.stands_in.clone(), image.holders.clone());
        if nameless {
            // Nothing tells what it could be read by.
            image.holders.clear();
            for pod in holders.keys() {
                self.release_hold(pod, key);
            }
        }
        self.stop_standing_in(key, &names);
        turn.tell(Subject::Image(key.clone()), true, "IndexLost", message);
        self.nodes.want_plan();
        self.changed_images.insert(key.clone());
    }

    fn release_hold(&mut self, pod: &crate::event::WorkloadId, key: &ImageKey) {
        if let Some(keys) = self.held.get_mut(pod) {
            keys.remove(key);
            if keys.is_empty() {
                self.held.remove(pod);
            }
        }
    }
}
