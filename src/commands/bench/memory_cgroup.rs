//! A control group of one's own, to see what the kernel charges to whom: version 2, or the memory hierarchy of version 1.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// How long the kernel may take until a group whose processes have ended can be removed.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);
/// Pause between two attempts.
const REMOVE_INTERVAL: Duration = Duration::from_millis(20);

/// What a group is charged, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Charge {
    /// Everything.
    pub(super) all: u64,
    /// Most that it was.
    pub(super) peak: u64,
    /// Pages of the page cache.
    pub(super) file: u64,
    /// Of these, what the kernel takes back first.
    pub(super) inactive_file: u64,
    /// Of these, what was used more than once.
    pub(super) active_file: u64,
    /// Memory of the processes themselves.
    pub(super) anon: u64,
    /// The kernel's own objects: inodes, names, page tables.
    pub(super) kernel: u64,
    /// Buffers of sockets.
    pub(super) sock: u64,
}

/// Which interface the kernel offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// Where groups can be made.
#[derive(Debug, Clone)]
pub(super) struct Hierarchy {
    root: PathBuf,
    version: Version,
}

impl Hierarchy {
    /// Finds it.
    ///
    /// # Errors
    /// When the kernel or this container has no memory controller that can be used.
    pub(super) fn find() -> anyhow::Result<Self> {
        let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mount table")?;
        let found = mounted(&table);
        let two = found.iter().find(|hierarchy| {
            let controllers = fs::read_to_string(hierarchy.root.join("cgroup.controllers")).unwrap_or_default();
            hierarchy.version == Version::Two && controllers.split_whitespace().any(|name| name == "memory")
        });
        if let Some(two) = two {
            // Where it is on already, or a manager has it, this changes nothing.
            let _ = fs::write(two.root.join("cgroup.subtree_control"), "+memory");
            return Ok(two.clone());
        }
        let one = found.into_iter().find(|hierarchy| hierarchy.version == Version::One);
        one.context("no cgroup hierarchy with the memory controller is mounted; charges cannot be measured here")
    }

    /// What it is, for the conditions of a measurement.
    pub(super) fn name(&self) -> &'static str {
        match self.version {
            Version::One => "cgroup v1",
            Version::Two => "cgroup v2",
        }
    }

    /// Makes an empty group.
    ///
    /// # Errors
    /// When it cannot be made, or has no memory controller.
    pub(super) fn group(&self, name: &str) -> anyhow::Result<MemoryCgroup> {
        let dir = self.root.join(format!("hermes-bench-{}-{name}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("cannot make {}; run the benchmark as root", dir.display()))?;
        let group = MemoryCgroup { dir, hierarchy: self.clone() };
        group.charge().context("the group has no memory controller")?;
        Ok(group)
    }
}

/// The hierarchies in a mount table (proc_pid_mountinfo(5)) that may have the memory controller.
fn mounted(table: &str) -> Vec<Hierarchy> {
    let hierarchy = |line: &str| {
        let (mount, file_system) = line.split_once(" - ")?;
        let root = PathBuf::from(mount.split(' ').nth(4)?);
        let mut fields = file_system.split(' ');
        match (fields.next()?, fields.nth(1)?) {
            ("cgroup2", _) => Some(Hierarchy { root, version: Version::Two }),
            ("cgroup", options) if options.split(',').any(|option| option == "memory") => {
                Some(Hierarchy { root, version: Version::One })
            }
            _ => None,
        }
    };
    table.lines().filter_map(hierarchy).collect()
}

/// A group. Dropping it moves its processes to the root group and removes it.
#[derive(Debug)]
pub(super) struct MemoryCgroup {
    dir: PathBuf,
    hierarchy: Hierarchy,
}

impl MemoryCgroup {
    /// The file into which a process writes its number to become a member.
    pub(super) fn members(&self) -> PathBuf {
        self.dir.join("cgroup.procs")
    }

    /// Makes a process a member; what it is charged from now on is charged here.
    ///
    /// # Errors
    /// When the process has ended.
    pub(super) fn add(&self, pid: u32) -> anyhow::Result<()> {
        fs::write(self.members(), pid.to_string()).with_context(|| format!("cannot move process {pid}"))
    }

    /// Limits what may be charged, in bytes.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn limit(&self, bytes: u64) -> anyhow::Result<()> {
        let name = match self.hierarchy.version {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        };
        fs::write(self.dir.join(name), bytes.to_string()).context("cannot limit a group")
    }

    /// What it is charged now.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub(super) fn charge(&self) -> anyhow::Result<Charge> {
        let stat = fs::read_to_string(self.dir.join("memory.stat")).context("no memory.stat")?;
        let of = |name: &str| number(&stat, name);
        let counter = |name: &str| -> u64 {
            // Older kernels have no peak, and some no account of their own objects.
            fs::read_to_string(self.dir.join(name)).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
        };
        let (inactive_file, active_file) = (of("inactive_file"), of("active_file"));
        Ok(match self.hierarchy.version {
            Version::One => Charge {
                all: counter("memory.usage_in_bytes"),
                peak: counter("memory.max_usage_in_bytes"),
                file: of("cache"),
                anon: of("rss"),
                kernel: counter("memory.kmem.usage_in_bytes"),
                sock: counter("memory.kmem.tcp.usage_in_bytes"),
                inactive_file,
                active_file,
            },
            Version::Two => Charge {
                all: counter("memory.current"),
                peak: counter("memory.peak"),
                file: of("file"),
                anon: of("anon"),
                kernel: of("kernel"),
                sock: of("sock"),
                inactive_file,
                active_file,
            },
        })
    }
}

impl Drop for MemoryCgroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + REMOVE_DEADLINE;
        loop {
            for pid in fs::read_to_string(self.members()).unwrap_or_default().lines() {
                let _ = fs::write(Path::join(&self.hierarchy.root, "cgroup.procs"), pid);
            }
            match fs::remove_dir(&self.dir) {
                Ok(()) => return,
                Err(error) if Instant::now() > deadline => {
                    eprintln!("cannot remove {} ({error}); remove it by hand", self.dir.display());
                    return;
                }
                Err(_) => std::thread::sleep(REMOVE_INTERVAL),
            }
        }
    }
}

/// The number behind `name` in a file of names and numbers; zero when the kernel does not count it.
fn number(stat: &str, name: &str) -> u64 {
    let mut pairs = stat.lines().filter_map(|line| line.split_once(' '));
    pairs.find(|(found, _)| *found == name).and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
}

/// Runs a program as a member of `group`, to its end.
///
/// # Errors
/// When it fails; a process that the kernel has killed for its memory is one that failed.
pub(super) fn run_in(group: &MemoryCgroup, program: &[&OsStr]) -> anyhow::Result<()> {
    // The shell joins first, so that nothing of the program is charged elsewhere.
    let script = "echo $$ >\"$1\" && shift && exec \"$@\"";
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script, "sh"]).arg(group.members()).args(program);
    let output = command.stdin(Stdio::null()).stdout(Stdio::null()).output()?;
    if !output.status.success() {
        bail!("{program:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_in_both_versions() {
        let table = "31 22 0:25 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                     32 22 0:26 / /sys/fs/cgroup/memory rw,relatime shared:3 - cgroup cgroup rw,memory\n\
                     33 22 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = mounted(table);
        assert_eq!(found.iter().map(|found| found.version).collect::<Vec<_>>(), [Version::One, Version::Two]);
        assert_eq!(found[0].root, Path::new("/sys/fs/cgroup/memory"));
    }

    #[test]
    fn numbers_are_found_by_their_whole_name() {
        let stat = "inactive_file 7\nfile_mapped 9\nfile 4096\n";
        assert_eq!((number(stat, "file"), number(stat, "anon")), (4096, 0));
    }
}
