//! What is known of an earlier version's starts, said of the next one: by layers that both have, by chunks of the same name,
//! and by files of the same path (`hermes_policy::profile::carry_over`).
//!
//! The indexes of both versions are read from the artifacts, one image at a time. Tables of contents that are longer than
//! [`TOC_LEN_MAX_BYTES`] are left out, for a hint is not worth the memory: then chunks are found by layer and name alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use hermes_image::ids::{ArtifactId, DiffId};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::index::toc::Toc;
use hermes_image::statement::{LayerStatement, Statement, signers};
use hermes_policy::profile::codec::{decode, encode};
use hermes_policy::profile::files::Files;
use hermes_policy::profile::paths::PathMap;
use hermes_policy::profile::{Profile, carry_over};

use super::images::Tools;
use crate::event::ImageKey;

/// Longest table of contents that is read, in bytes of its packed form: some 300,000 files.
const TOC_LEN_MAX_BYTES: u64 = 16 << 20;
/// Bytes of paths that are held of one version.
const PATHS_MAX_BYTES: usize = 32 << 20;

/// What is known of one version.
#[derive(Default)]
struct Version {
    tables: Vec<ChunkTable>,
    /// By layer; of those that the other version does not have.
    tocs: BTreeMap<DiffId, Toc>,
}

impl Tools {
    /// What the profile `from` of `earlier` means for `image`; `None` when nothing of it applies.
    pub(super) async fn carry_profile(&self, image: &ImageKey, earlier: &ImageKey, from: &[u8]) -> Option<Arc<[u8]>> {
        let old = decode(from).ok()?;
        let _one = self.carrying.acquire().await.ok()?;
        let (now_layers, old_layers) = (self.layers(image)?, self.layers(earlier).unwrap_or_default());
        let shared = |layers: &[LayerStatement]| layers.iter().map(|layer| layer.diff_id).collect::<BTreeSet<_>>();
        let (in_now, in_old) = (shared(&now_layers), shared(&old_layers));
        // An image without a table cannot be spoken of; of the earlier one, what can be read is enough.
        let now = self.version(&now_layers, |_| true, |layer| !in_old.contains(&layer)).await;
        let before =
            self.version(&old_layers, |layer| !in_now.contains(&layer), |layer| !in_now.contains(&layer)).await;
        if now.tables.len() != now_layers.len() {
            return None;
        }
        let carrying = tokio::task::spawn_blocking(move || carry(&old, &before, &now));
        let profile = carrying.await.ok()?;
        (!profile.steps.is_empty()).then(|| encode(&profile).into())
    }

    fn layers(&self, image: &ImageKey) -> Option<Vec<LayerStatement>> {
        let statement = self.artifacts.index(image)?.statement;
        // It was opened with the controller's keys when it was kept.
        Statement::open(&statement, image.manifest, &signers(&statement)).ok().map(|statement| statement.layers)
    }

    /// The chunk tables of the layers that `wants_table`, and the tables of contents of those that `wants_files`.
    async fn version(
        &self,
        layers: &[LayerStatement],
        wants_table: impl Fn(DiffId) -> bool,
        wants_files: impl Fn(DiffId) -> bool,
    ) -> Version {
        let mut version = Version::default();
        for layer in layers.iter().filter(|layer| wants_table(layer.diff_id)) {
            let Some(table) = self.plain(layer.chunks).await.and_then(|bytes| ChunkTable::decode(bytes).ok()) else {
                continue;
            };
            version.tables.push(table);
            let is_short = self.artifacts.packed_len_bytes(layer.toc).is_some_and(|len| len <= TOC_LEN_MAX_BYTES);
            if wants_files(layer.diff_id)
                && is_short
                && let Some(toc) = self.plain(layer.toc).await.and_then(|bytes| Toc::decode(bytes).ok())
            {
                version.tocs.insert(layer.diff_id, toc);
            }
        }
        version
    }

    async fn plain(&self, id: ArtifactId) -> Option<bytes::Bytes> {
        match self.artifacts.read(id).await {
            Ok(bytes) => bytes.map(hermes_image::verify::Verified::into_inner),
            Err(error) => {
                tracing::warn!(%error, "a profile is carried over as far as indexes can be read");
                None
            }
        }
    }
}

impl Version {
    fn files(&self) -> Files {
        let mut files = Files::new(PATHS_MAX_BYTES);
        for table in &self.tables {
            if let Some(toc) = self.tocs.get(&table.diff_id()) {
                files.add(toc, table);
            }
        }
        files
    }
}

fn carry(old: &Profile, before: &Version, now: &Version) -> Profile {
    let tables: BTreeMap<DiffId, &ChunkTable> = before.tables.iter().map(|table| (table.diff_id(), table)).collect();
    let (files_before, files_now) = (before.files(), now.files());
    let paths = PathMap::new(files_before.iter(), files_now.iter());
    carry_over(old, |layer| tables.get(&layer).copied(), &now.tables.iter().collect::<Vec<_>>(), &paths)
}

#[cfg(test)]
mod tests {
    use hermes_image::build::{Expect, LayerBuilder, Options};
    use hermes_policy::profile::{FirstTouch, StartRecord, TouchSource, merge};
    use hermes_tests::compress::Compression;
    use hermes_tests::layout::{Layout, LayoutLayer, NewLayer};
    use hermes_tests::sample::content;
    use hermes_tests::tarball::{Entry, Tarball};

    use super::*;

    /// A version with one layer of these files, all of whose files may be looked for.
    fn version(files: &[(&str, &[u8])]) -> Version {
        let folder = tempfile::tempdir().expect("a folder");
        let layout = Layout::create(folder.path()).expect("made");
        let tar = Tarball::of(files.iter().map(|(name, data)| Entry::file(name, *data)));
        let new = NewLayer { tar: tar.clone(), compression: Compression::Plain };
        let LayoutLayer { layer_id: layer, diff_id, .. } = layout.put_layer(&new).expect("written");
        let expect = Expect { layer, diff_id, compressed_len_bytes: tar.len() as u64 };
        let mut builder = LayerBuilder::new(expect, Options::default()).expect("a builder");
        builder.push(&tar).expect("a tar");
        let built = builder.finish().expect("a layer");
        Version { tables: vec![built.chunks], tocs: [(diff_id, built.toc)].into() }
    }

    /// The chunks of `version` in which the bytes of `data` begin.
    fn chunks_of(version: &Version, path: &[u8]) -> Vec<u32> {
        let files = version.files();
        let places = files.iter().filter(|(name, _)| *name == path).flat_map(|(_, place)| place.chunks);
        places.collect()
    }

    #[test]
    fn what_an_earlier_version_read_is_found_by_content_and_by_path() {
        let (same, first, second) = (content("same", 3_000_000), content("first", 900_000), content("second", 900_000));
        let before = version(&[("a/moved", &same), ("b/changed", &first), ("c/gone", &content("gone", 900_000))]);
        let now = version(&[("b/changed", &second), ("z/elsewhere", &same)]);
        let all = 0..before.tables[0].count();
        let touches =
            all.map(|chunk| FirstTouch { at_ms: chunk, layer: 0, chunk, waited: true, source: TouchSource::Registry });
        let record = StartRecord::of(1, vec![before.tables[0].diff_id()], touches.collect());
        let old = merge(&[record]).expect("one start counts");
        let carried = carry(&old, &before, &now);
        let found: BTreeSet<u32> = carried.steps.iter().flat_map(|step| step.chunks.clone()).collect();
        for path in [b"/b/changed".as_slice(), b"/z/elsewhere"] {
            let wanted = chunks_of(&now, path);
            assert!(!wanted.is_empty() && wanted.iter().all(|chunk| found.contains(chunk)), "{path:?}: {found:?}");
        }
        // Who has the earlier version can give what is in both.
        let donors: Vec<_> = carried.donors.iter().map(|donor| donor.diff_id).collect();
        assert_eq!(donors, [before.tables[0].diff_id()]);
        // What is read of neither: the headers between files, of which some are the same in both.
        assert!(found.len() as u32 <= now.tables[0].count());
        // Of an earlier version that nobody knows any more, only shared layers say something.
        assert!(carry(&old, &Version::default(), &now).steps.is_empty());
        assert_eq!(carry(&old, &Version::default(), &before).steps.len(), old.steps.len());
    }
}
