//! The power goes while an image is completed and handed over to the kernel: whatever the disk had written by then, the
//! next daemon on it starts, gives right bytes only, has what was complete, and completes the rest.
//!
//! The daemon's state lies on a disk that notes every write ([`hermes_tests::cut_disk`]). One daemon works on it; then
//! the disk is built as it was at many places of that, each is mounted (which replays the file system's journal), and a
//! new daemon goes on from there.

use std::num::NonZeroU64;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use hermes_policy::rng::Rng;
use hermes_registry::Options;
use hermes_tests::compress::Compression;
use hermes_tests::cut_disk::{Cut, CutDisk};
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::{LoopGuard, MountGuard, ScratchDir};
use hermes_tests::sample::{Sample, SampleIndex, TAG};
use hermes_tests::soak;
use rustix::mount::MountFlags;

/// Cuts in each way in the short form.
const CUTS: usize = 32;
/// Cuts that are looked at side by side: looking is mostly waiting for processes to start.
const LANES: usize = 4;
/// Chooses the cuts. A cut that goes wrong is named with what chose it.
const SEED: u64 = 6;
/// Link to the registry in bits per second: the image (7.5 MB compressed) takes 4 s, in which the store syncs some times.
const LINK_BITS_PER_SECOND: NonZeroU64 = NonZeroU64::new(15_000_000).expect("not zero");
/// Bytes that a span holds at most besides the chunk that is missing (docs/format.md), for each of the three layers.
const SPAN_ROUNDING_BYTES: u64 = 3 * (1 << 20);

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// A file system that the state lies on.
#[derive(Debug, Clone, Copy)]
struct FileSystem {
    name: &'static str,
    /// The disk in bytes: the 64 MiB that the store leaves alone, the image, the catalogue, and the file system's own.
    disk_len_bytes: u64,
    make: &'static [&'static str],
    options: &'static str,
}

impl FileSystem {
    const fn ext4(options: &'static str) -> Self {
        // What it makes lazily otherwise would be written in the middle of the test.
        let make = &["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"];
        Self { name: "ext4", disk_len_bytes: 192 << 20, make, options }
    }

    /// Its tools make none below 300 MB. The disks of all cuts have one UUID.
    const XFS: Self =
        Self { name: "xfs", disk_len_bytes: 320 << 20, make: &["mkfs.xfs", "-q", "-f", "-K"], options: "nouuid" };

    fn mount(&self, device: &Path, at: &Path) -> Result<MountGuard> {
        MountGuard::mount(device, at, self.name, MountFlags::empty(), self.options)
    }
}

/// What all cuts share.
struct Rig {
    file_system: FileSystem,
    fast: FaultyRegistry,
    index: SampleIndex,
    sample: Sample,
    disk: CutDisk,
    /// The writes by which all had been fetched and synced.
    complete: usize,
    /// Outlives what is mounted and attached in it.
    scratch: ScratchDir,
}

impl Rig {
    /// Records a daemon that completes an image while it is read, and then hands it to the kernel.
    fn record(file_system: FileSystem) -> Result<Self> {
        let scratch = ScratchDir::new("power")?;
        let layers: [(Compression, &[(&str, u64)]); 3] = [
            (Compression::Gzip(6), &[("gzip/a", 2_500_000), ("gzip/b", 2_000_000), ("gzip/small", 99)]),
            (Compression::ZstdFrames { frame_len_bytes: 500_000 }, &[("zstd/a", 1_500_000), ("zstd/b", 1_500_000)]),
            (Compression::Plain, &[("plain/a", 2_000_000), ("plain/b", 1_500_000)]),
        ];
        let sample = Sample::with_layers(&scratch.path().join("layout"), &layers)?;
        let index = sample.build_index(hermes(), scratch.path())?;
        let shaped = Options { bandwidth_bits_per_second: Some(LINK_BITS_PER_SECOND), ..Options::default() };
        let slow = FaultyRegistry::with_options(sample.layout.dir(), shaped)?;
        let fast = FaultyRegistry::start(sample.layout.dir())?;
        let (folder, root) = (scratch.make("disk")?, scratch.make("root")?);
        let mut make = Command::new(file_system.make[0]);
        let disk = CutDisk::new(&folder, file_system.disk_len_bytes, make.args(&file_system.make[1..]))?;
        let mounted = file_system.mount(disk.device(), &root)?;

        let (lazy, whole) = (scratch.make("lazy")?, scratch.make("whole")?);
        let daemon = Daemon::start(hermes(), &root.join("state"), &[])?;
        let image = slow.image(TAG);
        daemon.mount(&image, &lazy, &index, &[])?;
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| sample.check(&lazy));
            completes(&daemon, &lazy)?;
            reader.join().map_err(|_| anyhow::anyhow!("the reader panics"))?
        })
        .with_context(|| daemon.log())?;
        let complete = disk.told();
        daemon.mount(&image, &whole, &index, &["--way", "erofs-files"])?;
        sample.check(&whole)?;
        daemon.stop()?;
        drop(mounted);
        Ok(Self { file_system, fast, index, sample, disk, complete, scratch })
    }

    /// Goes on from what `cut` has left, in the folder `name`.
    fn look(&self, cut: Cut, name: &str) -> Result<Left> {
        let folder = self.scratch.make(name)?;
        let image = folder.join("image");
        let unsafe_writes = self.disk.image(cut, &image)?;
        let device = LoopGuard::attach(&image)?;
        let root = self.scratch.make(folder.join("root"))?;
        let mounted = self.file_system.mount(device.device(), &root)?;
        let present_bytes = self.go_on(cut, &root, &folder)?;
        drop((mounted, device));
        std::fs::remove_dir_all(&folder)?;
        Ok(Left { unsafe_writes, present_bytes })
    }

    fn go_on(&self, cut: Cut, root: &Path, folder: &Path) -> Result<u64> {
        let (lazy, whole) = (folder.join("lazy"), folder.join("whole"));
        let daemon = Daemon::start(hermes(), &root.join("state"), &[])?;
        let reference = self.fast.image(TAG);
        let checked = || -> Result<u64> {
            daemon.mount(&reference, &lazy, &self.index, &[])?;
            let image = daemon.status()?.images.remove(0);
            let (total, present) = (image.total_bytes, image.present_bytes);
            ensure!(cut.at < self.complete || present == total, "{present} of {total} bytes are left of a whole image");
            let names: Vec<_> = self.sample.names().collect();
            // Some are read before the rest comes, some after it.
            names.iter().step_by(2).try_for_each(|name| self.sample.check_file(&lazy, name)).context("lazily")?;
            completes(&daemon, &lazy)?;
            self.sample.check(&lazy).context("when it is complete")?;
            let fetched = daemon.sources()?.registry_bytes;
            let bound = if present == total { 0 } else { total - present + SPAN_ROUNDING_BYTES };
            ensure!(fetched <= bound, "{fetched} bytes were fetched where {} were missing", total - present);
            daemon.mount(&reference, &whole, &self.index, &["--way", "erofs-files"])?;
            self.sample.check(&whole).context("from the files")?;
            Ok(present)
        };
        let present = checked().with_context(|| daemon.log())?;
        daemon.stop()?;
        Ok(present)
    }
}

/// What was found after a cut.
struct Left {
    unsafe_writes: usize,
    present_bytes: u64,
}

fn completes(daemon: &Daemon, dir: &Path) -> Result<()> {
    let output = daemon.run(&["complete", dir.to_str().context("UTF-8")?])?;
    ensure!(output.status.success(), "complete: {output:?}");
    Ok(())
}

/// The cuts that `seed` chooses among `told` commands, the last of them always, because then all is there.
fn cuts(seed: u64, told: usize, count: usize) -> Vec<Cut> {
    let mut rng = Rng::new(seed);
    let mut chosen: Vec<_> =
        (1..count).map(|_| Cut { at: rng.below(told as u64) as usize, seed: rng.next_u64() }).collect();
    chosen.push(Cut { at: told, seed });
    chosen
}

/// Looks at cuts until there are enough of them, or for as long as a soak test goes on.
fn cut_the_power(file_system: FileSystem) -> Result<()> {
    let rig = Rig::record(file_system)?;
    let until = soak::length()?.map(|length| Instant::now() + length);
    let (mut seed, mut lefts) = (SEED, Vec::new());
    loop {
        let chosen = cuts(seed, rig.disk.told(), CUTS);
        lefts.extend(all(&rig, seed, &chosen)?);
        match until {
            Some(until) if Instant::now() < until => seed += 1,
            _ => break,
        }
    }
    let partly = lefts.iter().filter(|left| left.unsafe_writes > 0).count();
    let present: std::collections::BTreeSet<_> = lefts.iter().map(|left| left.present_bytes).collect();
    println!(
        "seed {SEED}: {} cuts, {partly} of them among writes that were not safe, {present:?} bytes left",
        lefts.len()
    );
    ensure!(partly > 0 && present.len() > 2, "the cuts all lie in the same place: {partly} {present:?}");
    Ok(())
}

fn all(rig: &Rig, seed: u64, cuts: &[Cut]) -> Result<Vec<Left>> {
    let next = AtomicUsize::new(0);
    let lane = |lane: usize| -> Result<Vec<Left>> {
        let mut lefts = Vec::new();
        loop {
            let place = next.fetch_add(1, Ordering::Relaxed);
            let Some(cut) = cuts.get(place).copied() else { return Ok(lefts) };
            let left = rig.look(cut, &format!("lane-{lane}"));
            lefts.push(left.with_context(|| format!("cut {place} of seed {seed}: {cut:?} of {}", rig.disk.told()))?);
        }
    };
    std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..LANES).map(|number| scope.spawn(move || lane(number))).collect();
        let mut all = Vec::new();
        for lane in lanes {
            all.extend(lane.join().map_err(|_| anyhow::anyhow!("a lane panics"))??);
        }
        Ok(all)
    })
}

#[test]
fn at_any_write_where_data_is_written_before_the_journal() -> Result<()> {
    cut_the_power(FileSystem::ext4("data=ordered"))
}

#[test]
fn at_any_write_where_data_is_written_when_it_likes() -> Result<()> {
    cut_the_power(FileSystem::ext4("data=writeback"))
}

#[test]
fn at_any_write_on_xfs() -> Result<()> {
    cut_the_power(FileSystem::XFS)
}
