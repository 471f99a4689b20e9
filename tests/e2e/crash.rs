//! `kill -9` of the daemon while files are read and the image is being completed: it starts again on the same folder,
//! everything it gives is right, and at most what came last is fetched again.

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_registry::Options;
use hermes_tests::compress::Compression;
use hermes_tests::daemon::{Daemon, Reading};
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::ScratchDir;
use hermes_tests::sample::{Sample, SampleIndex, TAG};

/// Rounds in each way that a daemon serves.
const ROUNDS: u32 = 10;
/// Link to the registry in bits per second: the image (9.5 MB compressed) takes 3 s, so that most kills come before
/// its end, and some syncs of the store (one each second) lie before them.
const LINK_BITS_PER_SECOND: NonZeroU64 = NonZeroU64::new(25_000_000).expect("not zero");
/// Pause between two looks at how much has come.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// The latest kill.
const KILL_MAX: Duration = Duration::from_millis(4500);
/// What came longer ago than this must still be there: the store syncs every second, and a sync may take one when the
/// machine is busy.
const DURABLE_AFTER: Duration = Duration::from_millis(2500);
/// Bytes that a span holds at most besides the chunk that is missing (docs/format.md), for each of the three layers.
const SPAN_ROUNDING_BYTES: u64 = 3 * (1 << 20);

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// What all rounds share.
struct Rig {
    slow: FaultyRegistry,
    fast: FaultyRegistry,
    index: SampleIndex,
    sample: Sample,
    scratch: ScratchDir,
}

impl Rig {
    fn new() -> Result<Self> {
        let scratch = ScratchDir::new("crash")?;
        let layers: [(Compression, &[(&str, u64)]); 3] = [
            (Compression::Gzip(6), &[("gzip/a", 3_000_000), ("gzip/b", 3_000_000), ("gzip/small", 99)]),
            (Compression::ZstdFrames { frame_len_bytes: 500_000 }, &[("zstd/a", 2_000_000), ("zstd/b", 2_000_000)]),
            (Compression::Plain, &[("plain/a", 2_500_000), ("plain/b", 1_500_000)]),
        ];
        let sample = Sample::with_layers(&scratch.path().join("layout"), &layers)?;
        let index = sample.build_index(hermes(), scratch.path())?;
        let options = Options { bandwidth_bits_per_second: Some(LINK_BITS_PER_SECOND), ..Options::default() };
        let slow = FaultyRegistry::with_options(sample.layout.dir(), options)?;
        let fast = FaultyRegistry::start(sample.layout.dir())?;
        Ok(Self { slow, fast, index, sample, scratch })
    }
}

/// What a daemon had before it was killed.
struct Before {
    /// Bytes that were present so long before the kill that they are durable.
    durable_bytes: u64,
    /// Whether `hermes complete` had ended well.
    completed: bool,
}

/// Begins to read and to complete an image, and kills the daemon after `kill_after`.
fn fill_and_kill(rig: &Rig, way: &str, state: &Path, dir: &Path, kill_after: Duration) -> Result<Before> {
    let daemon = Daemon::start(hermes(), state, &["--way", way])?;
    daemon.mount(&rig.slow.image(TAG), dir, &rig.index, &[])?;
    let started = Instant::now();
    let mut completing = daemon.command(&["complete", dir.to_str().context("UTF-8")?]);
    let mut completing = completing.stderr(Stdio::null()).spawn()?;
    let mut seen = Vec::new();
    let (reader, killed) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_once(rig, dir));
        while started.elapsed() < kill_after {
            if let Ok(status) = daemon.status() {
                seen.push((Instant::now(), status.images[0].present_bytes));
            }
            std::thread::sleep(LOOK_INTERVAL.min(kill_after.saturating_sub(started.elapsed())));
        }
        let completed = completing.try_wait().is_ok_and(|status| status.is_some_and(|status| status.success()));
        let killed_at = Instant::now();
        let killed = daemon.kill(rig.scratch.path());
        (reader.join(), killed.map(|()| (killed_at, completed)))
    });
    let _ = completing.wait();
    reader.map_err(|_| anyhow::anyhow!("the reader panics"))??;
    let (killed_at, completed) = killed?;
    let old = seen.iter().filter(|(at, _)| *at + DURABLE_AFTER < killed_at);
    Ok(Before { durable_bytes: old.map(|(_, present)| *present).max().unwrap_or(0), completed })
}

/// Reads file after file. Reads may fail, as the daemon dies; what they give must be right.
fn read_once(rig: &Rig, dir: &Path) -> Result<()> {
    for name in rig.sample.names() {
        if let (Ok(found), _) = Reading::start(&dir.join(name)).end()? {
            ensure!(found == rig.sample.content(name), "{name}: wrong bytes while it is filled");
        }
    }
    Ok(())
}

/// Starts again on what a killed daemon left, reads everything, and looks at what had to be fetched.
fn start_again(rig: &Rig, way: &str, state: &Path, dir: &Path, before: &Before) -> Result<()> {
    let daemon = Daemon::start(hermes(), state, &["--way", way])?;
    daemon.mount(&rig.fast.image(TAG), dir, &rig.index, &[])?;
    let image = daemon.status()?.images.remove(0);
    let (total, present) = (image.total_bytes, image.present_bytes);
    ensure!(present >= before.durable_bytes, "{present} bytes are left of {} durable ones", before.durable_bytes);
    ensure!(!before.completed || present == total, "{present} of {total} bytes are left of a completed image");
    rig.sample.check(dir).with_context(|| daemon.log())?;
    let fetched = daemon.sources()?.registry_bytes;
    let missing = total - present;
    let bound = if missing == 0 { 0 } else { missing + SPAN_ROUNDING_BYTES };
    ensure!(fetched <= bound, "{fetched} bytes were fetched where {missing} were missing");
    daemon.stop()?;
    Ok(())
}

fn rounds(way: &str) -> Result<()> {
    let rig = Rig::new()?;
    let mut completed = 0;
    for round in 0..ROUNDS {
        // Spread over the whole of the filling; the scheduler makes each place another one in every run.
        let kill_after = KILL_MAX * (2 * round + 1) / (2 * ROUNDS);
        let state: PathBuf = rig.scratch.path().join(format!("state-{round}"));
        let dir = rig.scratch.make(format!("image-{round}"))?;
        let before = fill_and_kill(&rig, way, &state, &dir, kill_after)?;
        completed += u32::from(before.completed);
        start_again(&rig, way, &state, &dir, &before)
            .with_context(|| format!("{way}, round {round}, killed after {kill_after:?}"))?;
        std::fs::remove_dir_all(&state)?;
    }
    ensure!(completed < ROUNDS, "every kill came after the end");
    Ok(())
}

#[test]
fn a_killed_daemon_starts_again_with_what_it_had_under_erofs() -> Result<()> {
    rounds("erofs-fuse")
}

#[test]
fn a_killed_daemon_starts_again_with_what_it_had_under_fuse() -> Result<()> {
    rounds("fuse-tree")
}
