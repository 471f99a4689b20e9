//! What people see of a profile.

use std::collections::BTreeMap;
use std::ops::Range;

use bytes::Bytes;
use hermes_image::erofs::{FileType, Image, Nid, RangeSource};
use hermes_image::ids::DiffId;
use hermes_image::index::chunks::ChunkTable;
use hermes_policy::profile::{Profile, StartRecord};

use crate::status::{ProfileStep, RecordedTouch, StartSummary};

/// Names of files for one step; further ones are counted.
const FILES_MAX: usize = 2;
/// Longest name that is shown, in characters; longer ones lose their beginning.
const NAME_MAX: usize = 160;
/// Entries of a tree that are looked at, as for messages about reads.
const ENTRIES_MAX: u32 = 4_000_000;

/// The steps of `profile`, with their files where `paths` are given. Chunks that do not exist are left out.
pub fn report_steps(
    profile: &Profile,
    tables: &BTreeMap<DiffId, ChunkTable>,
    paths: Option<&PathIndex>,
) -> Vec<ProfileStep> {
    let steps = profile.steps.iter().filter_map(|step| {
        let layer = *profile.layers.get(usize::from(step.layer))?;
        let table = tables.get(&layer)?;
        let chunks = step.chunks.start.min(table.count())..step.chunks.end.min(table.count());
        let range = table.run_range(chunks.clone());
        let (files, more_files) = paths.map_or_else(Default::default, |paths| paths.files(layer, &range));
        (!chunks.is_empty()).then(|| ProfileStep {
            layer,
            first_chunk: chunks.start,
            chunks: chunks.end - chunks.start,
            bytes: range.end - range.start,
            at_ms: step.at_ms,
            spread_ms: step.spread_ms,
            weight_percent: step.weight,
            files,
            more_files,
        })
    });
    steps.collect()
}

/// What a start read, in short.
pub(crate) fn summary(record: &StartRecord, tables: &BTreeMap<DiffId, ChunkTable>) -> StartSummary {
    let touches = touches(record, tables);
    StartSummary {
        ended_seconds: record.ended_seconds,
        length_ms: record.length_ms(),
        bytes: touches.iter().map(|touch| touch.bytes).sum(),
        waited_bytes: touches.iter().filter(|touch| touch.waited).map(|touch| touch.bytes).sum(),
    }
}

/// What a start read, run by run.
pub(crate) fn touches(record: &StartRecord, tables: &BTreeMap<DiffId, ChunkTable>) -> Vec<RecordedTouch> {
    let touches = record.touches().iter().filter_map(|touch| {
        let layer = *record.layers.get(usize::from(touch.layer))?;
        let table = tables.get(&layer)?;
        let range = table.run_range(touch.chunks.0.min(table.count())..touch.chunks.1.min(table.count()));
        Some(RecordedTouch {
            at_ms: touch.at_ms,
            layer,
            first_chunk: touch.chunks.0,
            bytes: range.end - range.start,
            waited: touch.waited,
            source: touch.source.name().to_owned(),
        })
    });
    touches.collect()
}

/// The files of a tree by where their bytes are.
#[derive(Debug, Default)]
pub struct PathIndex {
    /// Sorted by start, for each layer.
    files: BTreeMap<DiffId, Vec<(Range<u64>, String)>>,
}

impl PathIndex {
    /// Of a tree's image, whose devices are `layers`. A tree that is damaged has the files up to there.
    pub fn of(tree: Bytes, layers: &[DiffId]) -> Self {
        let mut index = Self::default();
        if let Ok(image) = Image::open(tree) {
            let _ = index.walk(&image, layers);
        }
        index.files.values_mut().for_each(|files| files.sort_by_key(|(range, _)| (range.start, range.end)));
        index
    }

    fn walk(&mut self, image: &Image<Bytes>, layers: &[DiffId]) -> Result<(), hermes_image::erofs::ReadError> {
        let mut folders: Vec<(Nid, String)> = vec![(image.root(), String::new())];
        let mut seen = 0;
        while let Some((folder, path)) = folders.pop() {
            for entry in image.readdir(folder, 0)? {
                let entry = entry?;
                seen += 1;
                if seen > ENTRIES_MAX {
                    return Ok(());
                }
                if entry.name == b"." || entry.name == b".." {
                    continue;
                }
                let name = format!("{path}/{}", String::from_utf8_lossy(entry.name));
                match entry.kind {
                    FileType::Directory => folders.push((entry.nid, name)),
                    FileType::Regular => self.add(image, entry.nid, layers, &name)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        image: &Image<Bytes>,
        nid: Nid,
        layers: &[DiffId],
        name: &str,
    ) -> Result<(), hermes_image::erofs::ReadError> {
        for extent in image.extents(nid, 0..image.stat(nid)?.size_bytes)? {
            let extent = extent?;
            let RangeSource::Device { index, offset } = extent.source else { continue };
            let Some(layer) = layers.get(usize::from(index)) else { continue };
            let range = offset.0..offset.0.saturating_add(extent.len_bytes);
            self.files.entry(*layer).or_default().push((range, name.to_owned()));
        }
        Ok(())
    }

    /// Some files with bytes in `range` of `layer`, and how many more there are.
    fn files(&self, layer: DiffId, range: &Range<u64>) -> (Vec<String>, usize) {
        let Some(files) = self.files.get(&layer) else { return Default::default() };
        // Files of a layer do not overlap, but for hard links, which are equal.
        let first = files.partition_point(|(file, _)| file.end <= range.start);
        let mut names: Vec<&str> = files[first..]
            .iter()
            .take_while(|(file, _)| file.start < range.end)
            .filter(|(file, _)| file.end > range.start)
            .map(|(_, name)| name.as_str())
            .collect();
        names.dedup();
        let more = names.len().saturating_sub(FILES_MAX);
        (names.into_iter().take(FILES_MAX).map(shortened).collect(), more)
    }
}

fn shortened(name: &str) -> String {
    let count = name.chars().count();
    if count <= NAME_MAX {
        return name.to_owned();
    }
    let end: String = name.chars().skip(count - NAME_MAX).collect();
    format!("…{end}")
}
