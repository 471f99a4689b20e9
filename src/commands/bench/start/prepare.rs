//! What is known of an image before it is measured: the profile of its own program, and which of its chunks a start reads.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use hermes_image::ids::{ChunkNo, DiffId};
use hermes_lab::guard::wait_for;
use hermes_snapshotter::status::ProfileReport;

use super::rig::Rig;
use super::subject::{NEW, OLD, Subject, names};
use super::way::Way;

/// How many starts the profile is made of: with three, one that reads something else has no say (docs/profiles.md).
const STARTS: usize = 3;
/// How long a record may take to be kept.
const RECORDED_MAX: Duration = Duration::from_secs(30);

/// What starts of an image read.
pub(super) struct Recorded {
    /// Uncompressed bytes by layer, of the chunks that the old version's start had read when it answered.
    pub(super) touched: BTreeMap<DiffId, u64>,
    /// Bytes of the chunks that the old version does not have and a start of the next version reads; 0 without one.
    pub(super) changed_bytes: u64,
}

impl Rig {
    /// The profile of the old version.
    pub(super) fn profile(&self, subject: &Subject) -> PathBuf {
        self.work.join(format!("{}.profile", subject.name))
    }

    /// Has starts recorded, on a node that fetches nothing but what is read, and exports what is made of them into the folder
    /// of indexes with profiles.
    pub(super) fn record(&self, subject: &Subject) -> anyhow::Result<Recorded> {
        let node = self.node(&self.plain, &["--complete", "never", "--no-guess"], false)?;
        let containerd = self.containerd(&node.host)?;
        let mut reports = BTreeMap::new();
        let mut answered_ms = BTreeMap::new();
        let mut recorded = BTreeMap::new();
        let starts = [OLD; STARTS].into_iter().chain(subject.has_next.then_some(NEW));
        for tag in starts {
            let (sample, _) = node.start(&containerd, subject, tag, Way::Cold)?;
            // With its tree a start ends, and so does its record.
            containerd.remove_all_images()?;
            let image = self.reference(subject, tag);
            let known = *recorded.entry(tag).and_modify(|count| *count += 1).or_insert(1_usize);
            let report = wait_for("the record of a start", RECORDED_MAX, || {
                let report = node.says(&["profile", "show", &image, "--json"]).ok()?;
                let report: ProfileReport = serde_json::from_str(&report).ok()?;
                (report.starts.len() >= known).then_some(report)
            });
            let report = report.with_context(|| format!("{image}: {}", node.daemon.log()))?;
            reports.entry(tag).or_insert(report);
            answered_ms.entry(tag).or_insert((sample.answer_s * 1000.0) as u32);
        }
        let image = self.reference(subject, OLD);
        let profile = self.profile(subject);
        for output in [&self.profiled.folder, &profile] {
            node.says(&["profile", "export", &image, "--output", &output.display().to_string()])?;
        }
        fs::metadata(&profile).with_context(|| format!("no profile of {image}"))?;
        let mut touched = BTreeMap::new();
        // The first record is of the cold start, whose reads were all seen.
        let old = reports.get(OLD).context("no start was recorded")?;
        for touch in old.touches.iter().filter(|touch| touch.at_ms <= answered_ms[OLD]) {
            *touched.entry(touch.layer).or_default() += touch.bytes;
        }
        let changed_bytes = match reports.get(NEW) {
            Some(report) => self.changed(subject, report, answered_ms[NEW])?,
            None => 0,
        };
        Ok(Recorded { touched, changed_bytes })
    }

    /// Bytes of the chunks that the start in `report` had read when it answered and that the old version has nowhere.
    fn changed(&self, subject: &Subject, report: &ProfileReport, answered_ms: u32) -> anyhow::Result<u64> {
        let (old, new) = (names(&subject.chunks(&self.plain, OLD)?), subject.chunks(&self.plain, NEW)?);
        let mut changed_bytes = 0;
        for touch in report.touches.iter().filter(|touch| touch.at_ms <= answered_ms) {
            let Some(table) = new.get(&touch.layer) else { continue };
            let (mut chunk, mut left) = (touch.first_chunk, touch.bytes);
            while left > 0 && chunk < table.count() {
                let range = table.range(ChunkNo(chunk));
                let len_bytes = range.end - range.start;
                if !old.contains(&table.chunk_id(ChunkNo(chunk))) {
                    changed_bytes += len_bytes;
                }
                left = left.saturating_sub(len_bytes);
                chunk += 1;
            }
        }
        Ok(changed_bytes)
    }
}
