//! `hermes bench cgroup`: whose memory it is. What a container's control group is charged for reading a file of a lazily
//! shown image, what the daemon's is charged meanwhile, and what a second container pays, against overlayfs on ext4.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use hermes_registry::Registry;
use hermes_snapshotter::status::Way;
use rustix::mount::{MountFlags, UnmountFlags};

use super::memory_cgroup::{Charge, Hierarchy, MemoryCgroup, run_in};
use super::report::{self, Line};
use super::stage::Stage;
use super::workload;
use crate::commands::child::{ChildMount, ChildNode};
use crate::output;

/// What the daemon may take in all, in bytes: the limit of its group while it is measured.
const DAEMON_BYTES_MAX: u64 = 128 << 20;

/// Arguments of `hermes bench cgroup`.
#[derive(Debug, Args)]
pub(crate) struct CgroupArgs {
    /// Where to make the tree and the nodes; must be on the file system to compare with.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Length of the file that is read, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    big_mib: u64,
    /// Memory limit of the reader that has one, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 64)]
    limit_mib: u64,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// What one reading has cost.
struct Reading {
    /// The first reader's group.
    reader: Charge,
    /// That of a second one, which reads the same while it is in the page cache.
    second: Charge,
    /// A reader with a limit.
    limited: Charge,
}

/// Runs the benchmark.
pub(super) async fn run(args: CgroupArgs) -> anyhow::Result<()> {
    let hierarchy = Hierarchy::find()?;
    let work = tempfile::Builder::new().prefix("hermes-bench-").tempdir_in(&args.dir)?;
    eprintln!("making a file of {} MiB ...", args.big_mib);
    let (dir, len_bytes) = (work.path().to_owned(), args.big_mib << 20);
    let stage = tokio::task::spawn_blocking(move || Stage::make(&dir, len_bytes, 0)).await??;
    // Served by this process, so that the daemon is charged for nothing but its own work.
    let registry = Registry::open(&stage.layout, hermes_registry::Options::default())?;
    let registry = registry.start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await?;
    let bench = Bench {
        hierarchy,
        work: work.path().to_owned(),
        tree: stage.tree,
        image: format!("{}/bench:latest", registry.address()),
        len_bytes,
        limit_bytes: args.limit_mib << 20,
    };
    let title = format!("memory that reading {} MiB is charged, by {}", args.big_mib, bench.hierarchy.name());
    let lines = tokio::task::spawn_blocking(move || bench.measure()).await??;
    registry.shutdown().await;
    report::print(&title, &lines, args.json)
}

struct Bench {
    hierarchy: Hierarchy,
    work: PathBuf,
    tree: PathBuf,
    image: String,
    len_bytes: u64,
    limit_bytes: u64,
}

impl Bench {
    fn measure(&self) -> anyhow::Result<Vec<Line>> {
        eprintln!("measuring overlayfs on ext4 ...");
        let ext4 = self.read(&self.tree, "ext4")?;
        let mut lines = rows("overlayfs on ext4", self.len_bytes, &ext4, &ext4);
        lines.extend(self.just_unpacked()?);
        for way in [Way::ErofsFuse, Way::FuseTree, Way::ErofsFiles] {
            eprintln!("measuring {way} ...");
            // A complete image has nothing to fetch, and only such a one is mounted without the daemon.
            let name = if way == Way::ErofsFiles { format!("{way}, complete") } else { format!("{way}, fetched") };
            let (ours, daemon, resident_bytes) = self.way(way)?;
            lines.extend(rows(&name, self.len_bytes, &ours, &ext4));
            lines.extend(daemon_rows(&name, self.len_bytes, &daemon, resident_bytes));
        }
        Ok(lines)
    }

    /// Reads what was just written, as containers do right after a pull: who unpacked has paid for the pages then.
    fn just_unpacked(&self) -> anyhow::Result<Vec<Line>> {
        let dir = self.work.join("unpacked");
        std::fs::create_dir(&dir)?;
        let (source, target) = (Stage::big(&self.tree), Stage::big(&dir));
        // What is unpacked from is in the page cache and somebody else's.
        workload::sequential(&source)?;
        let (writer, reader) = (self.hierarchy.group("unpacker")?, self.hierarchy.group("unpacked-reader")?);
        run_in(&writer, &["cp".as_ref(), source.as_os_str(), target.as_os_str()])?;
        let overlay = Overlay::mount(&dir, &self.work.join("overlay-unpacked"))?;
        run_in(&reader, &["cat".as_ref(), Stage::big(&overlay.merged).as_os_str()])?;
        let line = |what: &str, bytes: u64| Line {
            what: format!("overlayfs on ext4, just unpacked: {what}"),
            figure: output::bytes(bytes),
            against: "bytes read".to_owned(),
            ratio: bytes as f64 / self.len_bytes as f64,
            reach: "",
        };
        let lines = vec![line("reader, in all", reader.charge()?.all), line("who unpacked", writer.charge()?.all)];
        drop(overlay);
        std::fs::remove_file(target)?;
        Ok(lines)
    }

    /// Reads the image shown in one way; what readers and daemon were charged, and the daemon's resident bytes.
    fn way(&self, way: Way) -> anyhow::Result<(Reading, Charge, u64)> {
        let node = ChildNode::new(&self.work, way.name())?;
        let mount = ChildMount { image: &self.image, way: Some(way), ..ChildMount::default() };
        if way == Way::ErofsFiles {
            node.mount(&ChildMount { way: None, ..mount.clone() })?;
            node.complete()?;
            node.unmount()?;
        }
        node.mount(&mount)?;
        let daemon = self.hierarchy.group(&format!("daemon-{way}"))?;
        daemon.limit(DAEMON_BYTES_MAX)?;
        daemon.add(node.status()?.pid)?;
        let reading = self.read(node.dir(), way.name())?;
        let (charge, resident_bytes) = (daemon.charge()?, node.status()?.memory_bytes);
        node.stop();
        Ok((reading, charge, resident_bytes))
    }

    /// Has containers' worth of readers read the big file of the tree at `lower`, through an overlay as containers do.
    fn read(&self, lower: &Path, name: &str) -> anyhow::Result<Reading> {
        let group = |reader: &str| self.hierarchy.group(&format!("{name}-{reader}"));
        let overlay = Overlay::mount(lower, &self.work.join(format!("overlay-{name}")))?;
        let big = Stage::big(&overlay.merged);
        let measured = |group: &MemoryCgroup| -> anyhow::Result<Charge> {
            run_in(group, &["cat".as_ref(), big.as_os_str()])?;
            group.charge()
        };
        workload::drop_caches()?;
        // All groups stay until the end: the pages of one that goes would be charged to its parent.
        let (first, second, limited) = (group("first")?, group("second")?, group("limited")?);
        let reader = measured(&first)?;
        let second = measured(&second)?;
        workload::drop_caches()?;
        limited.limit(self.limit_bytes)?;
        let limited = measured(&limited).context("a reader with a limit could not read the file")?;
        Ok(Reading { reader, second, limited })
    }
}

fn rows(name: &str, len_bytes: u64, ours: &Reading, ext4: &Reading) -> Vec<Line> {
    let share = |bytes: u64| bytes as f64 / len_bytes as f64;
    let line = |what: &str, ours: u64, theirs: u64, reach: &'static str| Line {
        what: format!("{name}: {what}"),
        figure: output::bytes(ours),
        against: format!("overlayfs on ext4 {}", output::bytes(theirs)),
        ratio: ours as f64 / theirs.max(1) as f64,
        reach,
    };
    let mut lines = vec![
        line("reader, in all", ours.reader.all, ext4.reader.all, "<= 1.1"),
        line("reader, page cache", ours.reader.file, ext4.reader.file, "<= 1.1"),
        line("reader, kernel objects", ours.reader.kernel, ext4.reader.kernel, ""),
        line("reader, peak under its limit", ours.limited.peak, ext4.limited.peak, "<= 1.1"),
    ];
    let parts = [
        ("reader, inactive pages", ours.reader.inactive_file),
        ("reader, active pages", ours.reader.active_file),
        ("reader, sockets", ours.reader.sock),
        ("second reader, in all", ours.second.all),
    ];
    lines.extend(parts.into_iter().map(|(what, bytes)| Line {
        what: format!("{name}: {what}"),
        figure: output::bytes(bytes),
        against: "bytes read".to_owned(),
        ratio: share(bytes),
        reach: if what.starts_with("second") { "<= 0.05" } else { "" },
    }));
    lines
}

fn daemon_rows(name: &str, len_bytes: u64, daemon: &Charge, resident_bytes: u64) -> Vec<Line> {
    let line = |what: &str, bytes: u64, against: String, of: u64, reach: &'static str| Line {
        what: format!("{name}: {what}"),
        figure: output::bytes(bytes),
        against,
        ratio: bytes as f64 / of as f64,
        reach,
    };
    let limit = output::bytes(DAEMON_BYTES_MAX);
    vec![
        // With what it took before it came into the group, which is charged elsewhere.
        line("daemon, resident", resident_bytes, limit.clone(), DAEMON_BYTES_MAX, "<= 1.0"),
        line("daemon, in all", daemon.all, limit.clone(), DAEMON_BYTES_MAX, "<= 1.0"),
        line("daemon, peak under that limit", daemon.peak, limit, DAEMON_BYTES_MAX, "<= 1.0"),
        line("daemon, page cache", daemon.file, "bytes read".to_owned(), len_bytes, ""),
        line("daemon, own memory", daemon.anon, "bytes read".to_owned(), len_bytes, ""),
        line("daemon, sockets", daemon.sock, "bytes read".to_owned(), len_bytes, ""),
    ]
}

/// An overlay mount, as containers have one. Dropping it unmounts it.
struct Overlay {
    merged: PathBuf,
}

impl Overlay {
    fn mount(lower: &Path, dir: &Path) -> anyhow::Result<Self> {
        let [merged, upper, scratch] = ["merged", "upper", "work"].map(|name| dir.join(name));
        for folder in [&merged, &upper, &scratch] {
            std::fs::create_dir_all(folder)?;
        }
        let (lower, upper, scratch) = (lower.display(), upper.display(), scratch.display());
        let options = std::ffi::CString::new(format!("lowerdir={lower},upperdir={upper},workdir={scratch}"))?;
        rustix::mount::mount("overlay", &merged, "overlay", MountFlags::empty(), Some(options.as_c_str()))
            .context("cannot mount an overlay; run the benchmark as root")?;
        Ok(Self { merged })
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.merged, UnmountFlags::DETACH);
    }
}
