//! What starts read: records of nodes become the profile of their image.

use std::collections::BTreeSet;
use std::sync::Arc;

use hermes_policy::profile::codec::{decode, decode_record, encode};
use hermes_policy::profile::{choose, keep_newest, merge};

use super::images::ImageState;
use super::reference::repository;
use super::{Core, Turn};
use crate::event::{Action, ImageKey, Name, Phase};

/// Names whose images are versions of one another: their repository and platform.
fn kin(name: &Name) -> (&str, &str) {
    (repository(&name.reference), &name.platform)
}

impl Core {
    /// A node has recorded a start. What it says of layers that the image does not have is nothing.
    pub(super) fn start_recorded(&mut self, turn: &mut Turn<'_>, key: &ImageKey, record: &[u8]) {
        let Some(image) = self.images.get_mut(key) else { return };
        let Ok(record) = decode_record(record) else { return };
        let has = |diff_id| image.layers.iter().any(|layer| layer.diff_id == diff_id);
        if !record.layers.iter().all(|layer| has(*layer)) || image.records.contains(&record) {
            return;
        }
        image.records.push(record);
        image.records = keep_newest(std::mem::take(&mut image.records));
        let known = image.profile.as_deref().and_then(|profile| decode(profile).ok());
        if let Some(profile) = choose(merge(&image.records), known) {
            self.take_profile(turn, key, encode(&profile).into());
        }
    }

    /// Asks what the profile of an earlier version means for an image that is ready and has none: of the images of its
    /// repositories, for its platform, the one that became ready last.
    pub(super) fn inherit_profile(&mut self, turn: &mut Turn<'_>, key: &ImageKey) {
        let Some(image) = self.images.get(key) else { return };
        if image.phase != Phase::Ready || image.profile.is_some() || image.carrying {
            return;
        }
        let wanted: BTreeSet<_> = image.names.keys().chain(&image.kept_for).map(kin).collect();
        let is_kin = |other: &ImageState| {
            let names = other.names.keys().chain(&other.kept_for).chain(&other.stands_in);
            names.chain([&other.source]).any(|name| wanted.contains(&kin(name)))
        };
        let others = self.images.iter().filter(|(other, state)| *other != key && state.phase == Phase::Ready);
        let others = others.filter(|(_, state)| state.profile.is_some() && is_kin(state));
        let Some((earlier, from)) = others.max_by_key(|(_, state)| state.since) else { return };
        let Some(from) = from.profile.clone() else { return };
        let earlier = earlier.clone();
        if let Some(image) = self.images.get_mut(key) {
            image.carrying = true;
            turn.out.push(Action::CarryProfile { image: key.clone(), earlier, from });
        }
    }

    pub(super) fn profile_carried(&mut self, turn: &mut Turn<'_>, key: &ImageKey, profile: Option<Arc<[u8]>>) {
        let Some(image) = self.images.get_mut(key) else { return };
        image.carrying = false;
        // What its own starts have said meanwhile is better.
        let profile = profile.filter(|profile| image.profile.is_none() && decode(profile).is_ok());
        if let Some(profile) = profile {
            self.take_profile(turn, key, profile);
        }
        self.relieve_names_of(key);
    }

    fn take_profile(&mut self, turn: &mut Turn<'_>, key: &ImageKey, profile: Arc<[u8]>) {
        let Some(image) = self.images.get_mut(key) else { return };
        if image.profile.as_ref() == Some(&profile) {
            return;
        }
        image.profile = Some(Arc::clone(&profile));
        self.changed_images.insert(key.clone());
        turn.out.push(Action::KeepProfile { image: key.clone(), profile });
    }
}
