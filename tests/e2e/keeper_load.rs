//! The daemon is killed, and upgraded, again and again under eight processes that read. None of them sees an error or a
//! wrong byte, whether it reads or maps, whether the bytes are here or have to be fetched; the longest wait is printed.
//!
//! A short while in `make test`, [`soak::length`] in `make soak`.
#![allow(unsafe_code, reason = "reading through a memory map is one of the ways to read")]

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_tests::compress::Compression;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::{ProcessGuard, ScratchDir, wait_for};
use hermes_tests::kept::{Kept, test_process};
use hermes_tests::sample::{Sample, TAG, content};
use hermes_tests::soak;
use rand::RngExt as _;
use rustix::process::Signal;

/// Time from one kill to the next.
const KILL_INTERVAL: Duration = Duration::from_secs(2);
/// How long it goes on unless the environment says otherwise.
const SHORT: Duration = Duration::from_secs(8);
/// Upgrades unless the environment says otherwise, and when it does.
const UPGRADES: (u32, u32) = (5, 20);
/// The files whose chunks are here, and those that the store has no room for: they are fetched for every read.
const PRESENT: [(&str, u64); 2] = [("present/a", 4_000_000), ("present/b", 3_000_001)];
const MISSING: [(&str, u64); 2] = [("missing/a", 24_000_000), ("missing/b", 18_000_001)];
/// The store's room: what is present, and a part of what is missing.
const BUDGET: &str = "25165824";
/// Longest read; the kernel asks for 128 KiB at once.
const READ_MAX_BYTES: u64 = 200_000;
/// How long a read may take before it counts as hanging.
const HANG: Duration = Duration::from_secs(60);

/// What readers are told by, when this program is one.
const READER_DIR: &str = "HERMES_TEST_READER_DIR";
const READER_FILES: &str = "HERMES_TEST_READER_FILES";
const READER_MAPS: &str = "HERMES_TEST_READER_MAPS";
/// Before a reader's result, in what it prints.
const RESULT: &str = "result:";

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// What one reader, or several, have seen.
#[derive(Debug, Default, serde::Serialize, serde::Deserialize)]
struct Seen {
    reads: u64,
    errors: u64,
    wrong: u64,
    longest_ms: u64,
    first_error: Option<String>,
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.reads += other.reads;
        self.errors += other.errors;
        self.wrong += other.wrong;
        self.longest_ms = self.longest_ms.max(other.longest_ms);
        self.first_error = self.first_error.take().or(other.first_error);
    }
}

/// A reader's life, when this program was started as one; a test that passes at once otherwise.
#[test]
fn reader_process() -> Result<()> {
    let Some(dir) = std::env::var_os(READER_DIR).map(PathBuf::from) else { return Ok(()) };
    let maps = std::env::var_os(READER_MAPS).is_some();
    let files = match std::env::var(READER_FILES)?.as_str() {
        "present" => PRESENT,
        _ => MISSING,
    };
    let files = files.map(|(name, len)| (dir.join(name), content(name, len)));
    let (stop, stopped) = std::sync::mpsc::sync_channel(1);
    // The end of the input is the end of the reading.
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = stop.send(());
    });
    let (mut seen, mut random) = (Seen::default(), rand::rng());
    while stopped.try_recv().is_err() {
        let (path, content) = &files[random.random_range(0..files.len())];
        let len = random.random_range(1..=READ_MAX_BYTES);
        let offset = random.random_range(0..content.len() as u64 - len);
        let started = Instant::now();
        let read = read_once(path, offset, len as usize, maps);
        seen.longest_ms = seen.longest_ms.max(started.elapsed().as_millis() as u64);
        seen.reads += 1;
        match read {
            Ok(bytes) => seen.wrong += u64::from(bytes != content[offset as usize..(offset + len) as usize]),
            Err(error) => {
                seen.errors += 1;
                seen.first_error.get_or_insert_with(|| format!("{}: {error}", path.display()));
            }
        }
    }
    println!("\n{RESULT}{}", serde_json::to_string(&seen)?);
    Ok(())
}

/// Reads, and has the kernel forget the pages, so that the next read goes to the daemon again.
fn read_once(path: &Path, offset: u64, len: usize, maps: bool) -> std::io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let bytes = if maps {
        // SAFETY: files of an image do not change. A fault that fails ends this process, which its parent notices.
        let map = unsafe { memmap2::MmapOptions::new().len(offset as usize + len).map(&file)? };
        map[offset as usize..].to_vec()
    } else {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, offset)?;
        bytes
    };
    // SAFETY: the descriptor is open; the advice touches no memory.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    Ok(bytes)
}

/// A mounted image with its readers. Fields drop in this order.
struct Rig {
    present: Vec<ProcessGuard>,
    missing: Vec<ProcessGuard>,
    kept: Kept,
    _registry: FaultyRegistry,
    dir: PathBuf,
    scratch: ScratchDir,
}

impl Rig {
    fn new(way: &str) -> Result<Self> {
        let scratch = ScratchDir::new("keeper-load")?;
        let layers: [(Compression, &[(&str, u64)]); 2] =
            [(Compression::Gzip(1), &PRESENT), (Compression::ZstdFrames { frame_len_bytes: 500_000 }, &MISSING)];
        let sample = Sample::with_layers(&scratch.path().join("layout"), &layers)?;
        let index = sample.build_index(hermes(), scratch.path())?;
        let registry = FaultyRegistry::start(sample.layout.dir())?;
        let state = scratch.path().join("state");
        let kept = Kept::start(hermes(), &state, &[], &["--way", way, "--budget", BUDGET])?;
        let dir = scratch.path().join("image");
        kept.mount(&registry.image(TAG), &dir, &index)?;
        for (name, _) in PRESENT {
            sample.check_file(&dir, name)?;
        }
        // In order, so that what has come is durable.
        let before = kept.signal_daemon(Signal::TERM)?;
        kept.wait_for_another(before)?;
        let mut rig = Self { present: Vec::new(), missing: Vec::new(), kept, _registry: registry, dir, scratch };
        for maps in [false, true, false, true] {
            rig.present.push(rig.reader("present", maps)?);
            rig.missing.push(rig.reader("missing", maps)?);
        }
        Ok(rig)
    }

    fn reader(&self, files: &str, maps: bool) -> Result<ProcessGuard> {
        let mut variables = vec![(READER_DIR, OsString::from(&self.dir)), (READER_FILES, files.into())];
        if maps {
            variables.push((READER_MAPS, "1".into()));
        }
        test_process("keeper_load::reader_process", &variables)
    }

    /// Ends the readers; none of them may have seen anything.
    fn finish(self, what: &str) -> Result<()> {
        let Self { present, missing, kept, scratch, .. } = self;
        let (present, missing) = (results(present)?, results(missing)?);
        let all = [("present", &present), ("missing", &missing)];
        eprintln!("{what}: the keeper has {} KiB in memory besides its program", kept.keeper_memory_kib()?);
        for (chunks, seen) in all {
            eprintln!("{what}, chunks {chunks}: {} reads, longest {} ms", seen.reads, seen.longest_ms);
        }
        for (chunks, seen) in all {
            ensure!(seen.errors == 0 && seen.wrong == 0, "{what}, chunks {chunks}: {seen:?}\n{}", kept.log());
            ensure!(seen.reads > 0, "{what}, chunks {chunks}: nothing was read");
        }
        ensure!(kept.stop()?.success());
        ensure!(hermes_tests::guard::mounts_below(scratch.path())?.is_empty(), "a mount is left");
        Ok(())
    }
}

fn results(readers: Vec<ProcessGuard>) -> Result<Seen> {
    let mut all = Seen::default();
    for mut reader in readers {
        drop(reader.child().stdin.take());
        let mut output = reader.child().stdout.take().context("a pipe")?;
        let status = wait_for("the end of a reader", HANG, || reader.ended().transpose())??;
        let mut text = String::new();
        output.read_to_string(&mut text)?;
        // A mapped read that fails is a signal.
        ensure!(status.success(), "a reader ended with {status}: {text}");
        let result = text.lines().find_map(|line| line.strip_prefix(RESULT));
        all.add(serde_json::from_str(result.context("a reader has no result")?)?);
    }
    Ok(all)
}

fn kills(way: &str) -> Result<()> {
    let rig = Rig::new(way)?;
    let begin = Instant::now();
    let (mut kills, mut longest) = (0, Duration::ZERO);
    while begin.elapsed() < soak::length()?.unwrap_or(SHORT) {
        let next = Instant::now() + KILL_INTERVAL;
        let before = rig.kept.signal_daemon(Signal::KILL)?;
        kills += 1;
        longest = longest.max(rig.kept.wait_for_another(before)?);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    eprintln!("{way}: {kills} kills, longest time from a kill to a daemon that answers commands {longest:?}");
    rig.finish(&format!("{way} under kill -9"))
}

#[test]
fn kills_go_unnoticed_under_erofs() -> Result<()> {
    kills("erofs-fuse")
}

#[test]
fn kills_go_unnoticed_under_fuse() -> Result<()> {
    kills("fuse-tree")
}

fn upgrades(way: &str) -> Result<()> {
    let rig = Rig::new(way)?;
    let other = rig.scratch.path().join("hermes-next");
    std::fs::copy(hermes(), &other)?;
    let count = soak::choose(UPGRADES.0, UPGRADES.1)?;
    for round in 0..count {
        let program = if round % 2 == 0 { other.as_path() } else { hermes() };
        let output = rig.kept.run(&["node", "upgrade", program.to_str().context("UTF-8")?])?;
        ensure!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), rig.kept.log());
        let running = std::fs::read_link(format!("/proc/{}/exe", rig.kept.status()?.pid))?;
        ensure!(running == program.canonicalize()?, "{} runs after the upgrade", running.display());
    }
    rig.finish(&format!("{way} under {count} upgrades"))
}

#[test]
fn upgrades_go_unnoticed_under_erofs() -> Result<()> {
    upgrades("erofs-fuse")
}

#[test]
fn upgrades_go_unnoticed_under_fuse() -> Result<()> {
    upgrades("fuse-tree")
}
