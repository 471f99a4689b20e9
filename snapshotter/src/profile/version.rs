//! The profile of an earlier version of an image, in terms of the new one.

use std::collections::BTreeMap;

use hermes_image::ids::DiffId;
use hermes_image::index::chunks::ChunkTable;
use hermes_image::index::toc::Toc;
use hermes_policy::profile::files::Files;
use hermes_policy::profile::paths::PathMap;
use hermes_policy::profile::{Profile, carry_over};
use hermes_store::{ImageRecord, Store};

use super::keep::{Wanted, kept};

/// Images whose profiles are looked at, the last used first.
const VERSIONS_MAX: usize = 16;
/// Bytes of paths that are held of one image: those of the largest known have 60 MB.
const PATHS_MAX_BYTES: usize = 128 << 20;

/// The profile of the last used image of the repository of `wanted` that has one, as far as it has something in common.
/// Reads indexes from the disk.
pub(super) fn carried(store: &Store, wanted: &Wanted) -> Option<Profile> {
    let repository = repository(&wanted.reference);
    let mut images = store.images().unwrap_or_default();
    images.retain(|image| image.manifest != wanted.manifest && self::repository(&image.reference) == repository);
    images.sort_by_key(|image| std::cmp::Reverse(image.last_use_seconds));
    images.truncate(VERSIONS_MAX);
    images.iter().find_map(|image| {
        let (profile, _) = kept(store, image.manifest).chosen()?;
        let carried = carry(store, image, &profile, wanted);
        (!carried.steps.is_empty()).then_some(carried)
    })
}

fn carry(store: &Store, old: &ImageRecord, profile: &Profile, wanted: &Wanted) -> Profile {
    let is_shared = |layer: &DiffId| wanted.tables.iter().any(|table| table.diff_id() == *layer);
    let gone: Vec<_> = old.layers.iter().filter(|layer| !is_shared(&layer.diff_id)).collect();
    let tables: BTreeMap<DiffId, ChunkTable> = gone
        .iter()
        .filter_map(|layer| {
            let table = ChunkTable::decode(store.artifact(layer.chunks).ok()??).ok()?;
            (table.diff_id() == layer.diff_id).then_some((layer.diff_id, table))
        })
        .collect();
    let toc = |id| Toc::decode(store.artifact(id).ok()??).ok();
    let mut before = Files::new(PATHS_MAX_BYTES);
    for layer in &gone {
        if let (Some(table), Some(toc)) = (tables.get(&layer.diff_id), toc(layer.toc)) {
            before.add(&toc, table);
        }
    }
    let mut now = Files::new(PATHS_MAX_BYTES);
    if let Some(record) = store.image(wanted.manifest).ok().flatten() {
        let layers = record.layers.iter().filter(|layer| !old.layers.iter().any(|old| old.diff_id == layer.diff_id));
        for layer in layers {
            let table = wanted.tables.iter().find(|table| table.diff_id() == layer.diff_id);
            if let (Some(table), Some(toc)) = (table, toc(layer.toc)) {
                now.add(&toc, table);
            }
        }
    }
    let paths = PathMap::new(before.iter(), now.iter());
    carry_over(profile, |layer| tables.get(&layer), &wanted.tables.iter().collect::<Vec<_>>(), &paths)
}

/// A reference without its tag and digest.
fn repository(reference: &str) -> &str {
    let name = reference.split_once('@').map_or(reference, |(name, _)| name);
    let last = name.rfind('/').map_or(0, |slash| slash + 1);
    name[last..].find(':').map_or(name, |colon| &name[..last + colon])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_an_image_have_one_repository() {
        for (reference, expected) in [
            ("registry.test:5000/team/app:1.2", "registry.test:5000/team/app"),
            ("registry.test:5000/team/app", "registry.test:5000/team/app"),
            ("registry.test/app@sha256:abc", "registry.test/app"),
            ("registry.test/app:1@sha256:abc", "registry.test/app"),
            ("oci:/srv/layouts/app:2", "oci:/srv/layouts/app"),
            ("app", "app"),
        ] {
            assert_eq!(repository(reference), expected);
        }
    }
}
