//! What benchmarks do to a folder: the same reads, whatever file system it is.
#![allow(unsafe_code, reason = "reading through a memory map is one of the things that are measured")]

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// Reads of 1 MiB: what `cat` and loaders of large files do.
const SEQUENTIAL_LEN_BYTES: usize = 1 << 20;
/// Page-sized random reads: what mapped libraries and databases do.
const RANDOM_LEN_BYTES: u64 = 4096;
/// Random reads in one measurement; enough to last longer than the clock's noise on a fast disk.
const RANDOM_COUNT: u64 = 20_000;

/// A measured amount of work.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    /// How much, in the unit of the measurement (bytes, reads, files, entries).
    pub(super) amount: u64,
    /// How long it took.
    pub(super) elapsed: Duration,
}

impl Measured {
    /// Amount per second.
    pub(super) fn rate(&self) -> f64 {
        self.amount as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Makes `work` count what it does, and times it.
fn measure(work: impl FnOnce() -> anyhow::Result<u64>) -> anyhow::Result<Measured> {
    let start = Instant::now();
    let amount = work()?;
    Ok(Measured { amount, elapsed: start.elapsed() })
}

/// Empties the kernel's caches of pages, names and inodes, after writing back what is dirty.
pub(super) fn drop_caches() -> anyhow::Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop caches; run the benchmark as root")
}

/// Bytes in the page cache now.
pub(super) fn page_cache_bytes() -> anyhow::Result<u64> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    let line =
        meminfo.lines().find_map(|line| line.strip_prefix("Cached:")).context("no Cached line in /proc/meminfo")?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kib * 1024)
}

/// Reads a file from its start to its end.
pub(super) fn sequential(path: &Path) -> anyhow::Result<Measured> {
    measure(|| {
        let mut file = File::open(path)?;
        let mut buffer = vec![0; SEQUENTIAL_LEN_BYTES];
        let mut total = 0;
        loop {
            let len = file.read(&mut buffer)?;
            if len == 0 {
                return Ok(total);
            }
            total += len as u64;
        }
    })
}

/// Reads pages of a file in random order, one after the other.
pub(super) fn random(path: &Path) -> anyhow::Result<Measured> {
    let file = File::open(path)?;
    let pages = file.metadata()?.len() / RANDOM_LEN_BYTES;
    let mut state = 0x9e37_79b9_7f4a_7c15;
    measure(|| {
        let mut buffer = [0; RANDOM_LEN_BYTES as usize];
        for _ in 0..RANDOM_COUNT {
            file.read_exact_at(&mut buffer, next_random(&mut state) % pages * RANDOM_LEN_BYTES)?;
        }
        Ok(RANDOM_COUNT)
    })
}

/// Touches every page of a file through a memory map, in order.
pub(super) fn mapped(path: &Path) -> anyhow::Result<Measured> {
    let file = File::open(path)?;
    measure(|| {
        // SAFETY: the file is a benchmark's own and read-only; nobody truncates it while it is mapped.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        let mut sum = 0_u64;
        for at in (0..map.len()).step_by(RANDOM_LEN_BYTES as usize) {
            sum = sum.wrapping_add(u64::from(map[at]));
        }
        std::hint::black_box(sum);
        Ok(map.len() as u64)
    })
}

/// Opens and reads each of `files`.
pub(super) fn read_files(files: &[PathBuf]) -> anyhow::Result<Measured> {
    measure(|| {
        let mut buffer = Vec::new();
        for path in files {
            buffer.clear();
            File::open(path)?.read_to_end(&mut buffer)?;
        }
        Ok(files.len() as u64)
    })
}

/// Lists a tree and asks for the attributes of every entry, like `find -size`.
pub(super) fn walk(root: &Path) -> anyhow::Result<Measured> {
    measure(|| {
        let mut folders = vec![root.to_owned()];
        let mut entries = 0;
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder)? {
                let path = entry?.path();
                let metadata = fs::symlink_metadata(&path)?;
                entries += 1;
                std::hint::black_box(metadata.mode());
                if metadata.is_dir() {
                    folders.push(path);
                }
            }
        }
        Ok(entries)
    })
}

/// The regular files below `root`, in an order that is the same each time and has no neighbours next to each other.
pub(super) fn shuffled_files(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut folders = vec![root.to_owned()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    let mut state = 0x2545_f491_4f6c_dd1d;
    for at in (1..files.len()).rev() {
        files.swap(at, (next_random(&mut state) % (at as u64 + 1)) as usize);
    }
    Ok(files)
}

/// xorshift64*: a benchmark wants the same sequence each time, not good randomness.
pub(super) fn next_random(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_f491_4f6c_dd1d)
}
