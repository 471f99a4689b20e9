//! Whether containerd has still to read its configuration: a file whose time is compared with containerd's start.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hermes_files::{OWNER_ONLY, write_whole};

use super::{SuperviseError, io_error};
use crate::install::root::Root;

/// The host's path of the file: beside the record of the install, and not in its folder, which goes with that.
const PATH: &str = "/etc/hermes.containerd-restart-due";
/// Processes that are looked at to find containerd.
const PROCESSES_MAX: usize = 100_000;

#[derive(Debug)]
pub(super) struct Due {
    path: PathBuf,
    processes: PathBuf,
}

impl Due {
    pub(super) fn new(root: &Root) -> Self {
        // The pod shares the host's processes, so its own /proc tells of them.
        Self { path: root.at(Path::new(PATH)), processes: "/proc".into() }
    }

    /// Whether it is.
    pub(super) fn is_due(&self) -> bool {
        self.path.exists()
    }

    /// From now on it is, unless it was before: that time counts on.
    pub(super) fn begin(&self) -> Result<(), SuperviseError> {
        if self.is_due() {
            return Ok(());
        }
        let text = b"containerd's configuration was changed for hermes; restart containerd, and this file goes\n";
        write_whole(&self.path, OWNER_ONLY, text).map_err(io_error("write", &self.path))
    }

    /// It is no more.
    pub(super) fn end(&self) -> Result<(), SuperviseError> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(io_error("remove", &self.path)(error)),
            _ => Ok(()),
        }
    }

    /// Whether a containerd runs, and each has started after [`Self::begin`].
    pub(super) fn containerd_has_started_since(&self) -> bool {
        let since = fs::metadata(&self.path).and_then(|metadata| metadata.modified());
        let Ok(since) = since else { return false };
        let starts: Vec<SystemTime> = self.starts();
        // The kernel counts starts in hundredths of a second since a boot that it knows to the second.
        !starts.is_empty() && starts.iter().all(|start| *start > since + Duration::from_secs(1))
    }

    fn starts(&self) -> Vec<SystemTime> {
        let Some(boot) = boot_time(&fs::read_to_string(self.processes.join("stat")).unwrap_or_default()) else {
            return Vec::new();
        };
        let entries = fs::read_dir(&self.processes).into_iter().flatten().take(PROCESSES_MAX).flatten();
        let stats = entries.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
        stats.filter_map(|stat| start_of_containerd(&stat)).map(|since_boot| boot + since_boot).collect()
    }
}

/// When the machine was booted, by /proc/stat.
fn boot_time(stat: &str) -> Option<SystemTime> {
    let seconds = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(UNIX_EPOCH + Duration::from_secs(seconds))
}

/// How long after the boot a process was started, if it is containerd, by its /proc/PID/stat (proc_pid_stat(5)): the name
/// stands in brackets and may hold anything, the start is the twentieth field after it, in hundredths of a second.
fn start_of_containerd(stat: &str) -> Option<Duration> {
    let (head, rest) = stat.rsplit_once(") ")?;
    let (_, name) = head.split_once('(')?;
    if name != "containerd" {
        return None;
    }
    let ticks: u64 = rest.split_whitespace().nth(19)?.parse().ok()?;
    Some(Duration::from_millis(ticks.saturating_mul(10)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_due_until_containerd_starts_again() {
        let dir = tempfile::tempdir().expect("a folder");
        let (path, processes) = (dir.path().join("due"), dir.path().join("proc"));
        fs::create_dir_all(processes.join("7")).expect("a folder");
        let due = Due { path, processes: processes.clone() };
        assert!(!due.is_due() && !due.containerd_has_started_since());
        due.begin().expect("written");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        fs::write(processes.join("stat"), format!("cpu 1\nbtime {}\n", now - 1000)).expect("written");
        let started = |name: &str, seconds: u64| {
            let fields = "S 1 7 7 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 9 0";
            fs::write(processes.join("7/stat"), format!("7 ({name}) {fields} {} 1 1\n", seconds * 100))
                .expect("written");
        };
        started("containerd-shim", 1100);
        assert!(!due.containerd_has_started_since(), "not containerd");
        started("containerd", 900);
        assert!(!due.containerd_has_started_since(), "before");
        started("containerd", 1100);
        assert!(due.containerd_has_started_since(), "after");
        due.end().expect("removed");
        due.end().expect("nothing to remove");
        assert!(!due.is_due());
    }
}
