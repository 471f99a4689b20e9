//! Whose memory it is: a container with a limit far below the length of a lazily shown file reads it to its end, because
//! what it is charged are pages that the kernel takes back, and the daemon stays within its own bound meanwhile.
//!
//! `hermes bench cgroup` has the figures.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use hermes_tests::command::run;
use hermes_tests::compress::Compression;
use hermes_tests::containerds::RunningContainerd;
use hermes_tests::cri;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::ScratchDir;
use hermes_tests::layout::{Layout, NewLayer};
use hermes_tests::lazy_host::{self, NewContainer};
use hermes_tests::node::Index;
use hermes_tests::runnable;
use hermes_tests::sample::content;
use hermes_tests::tarball::{Entry, Tarball};
use serde_json::json;

/// The file that is read, and its length in bytes.
const BIG: (&str, u64) = ("opt/big", 210_000_000);
/// What the container may have, in bytes.
const LIMIT_BYTES: u64 = 64 << 20;
/// What the daemon may have, in bytes.
const DAEMON_BYTES_MAX: u64 = 128 << 20;
/// The container's name.
const NAME: &str = "limited";

fn hermes() -> &'static str {
    env!("CARGO_BIN_EXE_hermes")
}

/// The image of [`runnable`] with a big file.
fn layout(dir: &Path) -> Result<Layout> {
    let layout = runnable::images(dir)?;
    let (name, len) = BIG;
    let tar = Tarball::of([Entry::file(name, content(name, len))]);
    let mut layers = layout.image("v1")?.layers;
    layers.push(layout.put_layer(&NewLayer { tar, compression: Compression::Plain })?);
    layout.add_stored("big", &layers, &json!({}))?;
    Ok(layout)
}

#[test]
fn a_container_with_a_small_limit_reads_a_large_file() -> Result<()> {
    let scratch = ScratchDir::new("memory")?;
    let registry = FaultyRegistry::start(layout(&scratch.path().join("layout"))?.dir())?;
    let image = registry.image("big");
    let index = Index::build(Path::new(hermes()), &image, &scratch.path().join("index"))?;
    let host = lazy_host::installed(Path::new(hermes()), "1.7", None)?;
    let arguments = lazy_host::arguments(&host, &index, &index.key);
    let arguments = arguments.iter().map(String::as_str).collect::<Vec<_>>();
    let daemon = Daemon::start(Path::new(hermes()), &scratch.path().join("state"), &arguments)?;
    let containerd = host.start()?;
    cri::pull(&containerd.socket(), &image)?;
    let limit = LIMIT_BYTES.to_string();
    let options = ["--null-io", "--memory-limit", &limit];
    let command = ["/bin/sleep", "600"];
    let container = NewContainer { image: &image, snapshotter: "hermes", options: &options, command: &command };
    {
        let container = container.start(&containerd, NAME)?;
        let cgroup = memory_cgroup(pid(&containerd)?)?;
        let sum = container.exec(&["/bin/sh", "-c", &format!("cksum < /{}", BIG.0)])?;
        ensure!(sum.trim() == cksum(scratch.path())?, "the file came wrong: {sum}");
        let (limit, peak) = (cgroup.limit_bytes()?, cgroup.peak_bytes()?);
        println!("limit {limit} B, peak {peak} B, page cache {} B", cgroup.file_bytes()?);
        ensure!(limit == LIMIT_BYTES && peak <= LIMIT_BYTES, "the container was charged {peak} of {limit} bytes");
        // Most of what it may have went into the file's pages: they are its own, and they were taken back.
        ensure!(cgroup.file_bytes()? > LIMIT_BYTES / 4, "the pages were not charged to the container");
    }
    let peak = status_bytes(daemon.status()?.pid, "VmHWM:")?;
    println!("the daemon's memory was at most {peak} B");
    ensure!(peak <= DAEMON_BYTES_MAX, "the daemon took {peak} bytes");
    containerd.remove_all_images()?;
    drop(containerd);
    daemon.stop().map(drop)
}

/// The sum of the big file, by the same program.
fn cksum(scratch: &Path) -> Result<String> {
    let path = scratch.join("big");
    fs::write(&path, content(BIG.0, BIG.1))?;
    let printed = run(std::process::Command::new("sh").args(["-c", &format!("cksum < {}", path.display())]))?;
    Ok(String::from_utf8(printed)?.trim().to_owned())
}

/// The container's first process.
fn pid(containerd: &RunningContainerd<'_>) -> Result<u32> {
    let listed = containerd.ctr_says(&["tasks", "ls"])?;
    let row = listed.lines().find(|line| line.starts_with(NAME)).context("the container does not run")?;
    Ok(row.split_whitespace().nth(1).context("no process id")?.parse()?)
}

/// A field of /proc/PID/status in bytes.
fn status_bytes(pid: u32, field: &str) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<u64>()? * 1024)
}

/// A control group with the memory controller, of either version.
struct MemoryCgroup {
    dir: PathBuf,
    unified: bool,
}

/// That of a process.
fn memory_cgroup(pid: u32) -> Result<MemoryCgroup> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    // "NUMBER:CONTROLLERS:PATH", without controllers for version 2 (cgroups(7)).
    let rows = groups.lines().map(|line| line.splitn(3, ':').collect::<Vec<_>>()).filter(|row| row.len() == 3);
    let rows = rows.collect::<Vec<_>>();
    let one = rows.iter().find(|row| row[1].split(',').any(|name| name == "memory"));
    let two = rows.iter().find(|row| row[1].is_empty());
    let (root, path, unified) = match (one, two) {
        (Some(row), _) => ("/sys/fs/cgroup/memory", row[2], false),
        (None, Some(row)) => ("/sys/fs/cgroup", row[2], true),
        _ => anyhow::bail!("the container is in no memory cgroup: {groups}"),
    };
    Ok(MemoryCgroup { dir: Path::new(root).join(path.trim_start_matches('/')), unified })
}

impl MemoryCgroup {
    fn number(&self, one: &str, two: &str) -> Result<u64> {
        let path = self.dir.join(if self.unified { two } else { one });
        let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        Ok(text.trim().parse()?)
    }

    fn limit_bytes(&self) -> Result<u64> {
        self.number("memory.limit_in_bytes", "memory.max")
    }

    fn peak_bytes(&self) -> Result<u64> {
        self.number("memory.max_usage_in_bytes", "memory.peak")
    }

    fn file_bytes(&self) -> Result<u64> {
        let name = if self.unified { "file " } else { "cache " };
        let stat = fs::read_to_string(self.dir.join("memory.stat"))?;
        let value = stat.lines().find_map(|line| line.strip_prefix(name)).context("no page cache in memory.stat")?;
        Ok(value.parse()?)
    }
}
