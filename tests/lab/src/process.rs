//! What the kernel says of running processes: what they use, who their children are, whose command line says what.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal};

/// What a process uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// Memory in KiB, pages of files included, such as those of its program.
    pub resident_kib: u64,
    /// Memory in KiB that is nobody else's and no file's.
    pub anonymous_kib: u64,
    /// Threads.
    pub threads: usize,
    /// Open descriptors.
    pub descriptors: usize,
}

/// What the process `pid` uses.
///
/// # Errors
/// When it is no more.
pub fn used(pid: u32) -> Result<Used> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).context("read smaps_rollup")?;
    let kib = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let number = line.and_then(|rest| rest.trim().strip_suffix(" kB")).and_then(|number| number.parse().ok());
        number.with_context(|| format!("no {name} in {text}"))
    };
    let count = |folder: &str| fs::read_dir(format!("/proc/{pid}/{folder}")).map(Iterator::count);
    Ok(Used {
        resident_kib: kib("Rss")?,
        anonymous_kib: kib("Anonymous")?,
        threads: count("task")?,
        descriptors: count("fd")?,
    })
}

/// The time that the process `pid` has spent on processors so far, in its own code and in the kernel.
///
/// # Errors
/// When it is no more.
pub fn processor_time(pid: u32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
    // Fields 14 and 15 (proc_pid_stat(5)), counted after the name in parentheses.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().skip(11).take(2));
    let ticks =
        fields.context("no name")?.map(|field| field.parse::<u64>().context("no number")).sum::<Result<u64>>()?;
    Ok(Duration::from_secs(ticks) / u32::try_from(rustix::param::clock_ticks_per_second())?)
}

/// All processes.
fn all() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name, in parentheses, may have anything in it (proc_pid_stat(5)).
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// The processes that come from `ancestor`, itself not among them.
pub fn descendants(ancestor: u32) -> Vec<u32> {
    let all: Vec<(u32, u32)> = all().into_iter().filter_map(|pid| Some((pid, parent(pid)?))).collect();
    let mut found = vec![ancestor];
    let mut next = 0;
    while next < found.len() {
        let of = found[next];
        found.extend(all.iter().filter(|(_, parent)| *parent == of).map(|(pid, _)| *pid));
        next += 1;
    }
    found.split_off(1)
}

/// The processes whose program is called `program` and whose arguments name `path` or something below it.
pub fn with_argument(program: &str, path: &Path) -> Vec<u32> {
    let path = path.as_os_str().as_encoded_bytes();
    let is_meant = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|&byte| byte == 0);
        let name = words.next().and_then(|word| word.rsplit(|&byte| byte == b'/').next());
        name == Some(program.as_bytes()) && words.any(|word| word.starts_with(path))
    };
    all().into_iter().filter(is_meant).collect()
}

/// Kills `processes` at once; those that have ended meanwhile are no failure.
pub fn kill(processes: &[u32]) {
    let pids = processes.iter().filter_map(|pid| Pid::from_raw(i32::try_from(*pid).ok()?));
    for pid in pids {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
}

/// Whether the process has ended, or only waits for its parent to notice.
pub fn has_ended(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::guard::{ProcessGuard, wait_for};

    #[test]
    fn children_are_found_and_killed() {
        let mut shell = ProcessGuard::start(Command::new("sh").args(["-c", "sleep 600 & wait", "/some/where"]))
            .expect("a shell starts");
        let own = std::process::id();
        let deadline = std::time::Duration::from_secs(30);
        let found = wait_for("two descendants", deadline, || {
            let found = descendants(own);
            let sleeps = |pid: &&u32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|it| it.starts_with(b"sleep"));
            let sleep = found.iter().filter(|pid| parent(**pid) == Some(shell.id())).find(sleeps).copied();
            sleep.map(|sleep| (found, sleep))
        });
        let (found, sleep) = found.expect("they start");
        assert!(found.contains(&shell.id()) && with_argument("sh", Path::new("/some")).contains(&shell.id()));
        assert!(!with_argument("sh", Path::new("/other")).contains(&shell.id()));
        assert!(used(own).expect("it runs").threads > 0 && !has_ended(sleep));
        kill(&[sleep, shell.id()]);
        wait_for("their end", deadline, || has_ended(sleep).then_some(())).expect("they end");
        shell.child().wait().expect("it was ours");
    }
}
