//! A keeper on a host without systemd, started from a pod and no part of it.
//!
//! It is started in the namespaces of the host's first process, and put into that process' control groups before it runs: what
//! ends a pod is the end of the processes in its groups. Whether that has worked is read back from the kernel, and a keeper that
//! would end with the pod is not started.
//!
//! What it says goes to `keeper.log` below the state folder. After a reboot the host's own init has to start it before containerd:
//! the kubelet cannot start this pod, nor any other, while containerd waits for its snapshotter.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use thiserror::Error;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::Instant;

use super::daemon;
use crate::install::Settings;
use crate::install::root::{self, Root};
use crate::keeper::{self, KeeperError};

/// How long a daemon may take until it answers.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How often it is asked.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// The longest log, in bytes. What is older goes to `keeper.log.1`.
const LOG_MAX_BYTES: u64 = 16 << 20;

/// A keeper that cannot be started.
#[derive(Debug, Error)]
pub enum DetachedError {
    /// A file.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// It would end with the pod.
    #[error(
        "the keeper cannot leave this pod's control group {group}: {reason}; start it on the host before containerd"
    )]
    Captive {
        /// The group.
        group: String,
        /// Why.
        reason: String,
    },
    /// It does not answer.
    #[error("no daemon answers within {} s; {} says why", START_TIMEOUT.as_secs(), log.display())]
    Silent {
        /// Its log.
        log: PathBuf,
    },
    /// The lock that says whether one runs.
    #[error(transparent)]
    Keeper(#[from] KeeperError),
    /// Another program took its place, and could not.
    #[error("the daemon cannot be exchanged: {0}")]
    Exchange(String),
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DetachedError {
    let path = path.to_owned();
    move |source| DetachedError::Io { what, path, source }
}

/// Starts a keeper unless one runs, and waits until its daemon answers. True when none did.
pub(super) async fn keep(root: &Root, settings: &Settings) -> Result<bool, DetachedError> {
    let state = root.at(&settings.state);
    let log = state.join("keeper.log");
    shorten(&log)?;
    if keeper::is_kept(&state)? {
        return Ok(false);
    }
    start(root, settings, &log).await?;
    let deadline = Instant::now() + START_TIMEOUT;
    while daemon(&state).await.is_none() {
        if Instant::now() > deadline {
            return Err(DetachedError::Silent { log });
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
    tracing::info!("started a keeper on the host");
    Ok(true)
}

/// Has the keeper start the program that is installed now. Its arguments stay those that the keeper was started with.
pub(super) async fn exchange(root: &Root, settings: &Settings) -> Result<(), DetachedError> {
    let mut command = root.command(&settings.binary);
    command.args(["node", "upgrade"]).arg(&settings.binary).arg("--state").arg(&settings.state);
    let said = root::run(command, 2 * START_TIMEOUT).await;
    let said = said.map_err(|error| DetachedError::Exchange(error.to_string()))?;
    tracing::info!("{}", said.trim());
    tracing::info!("arguments of the daemon that have changed count from the keeper's next start on");
    Ok(())
}

async fn start(root: &Root, settings: &Settings, log: &Path) -> Result<(), DetachedError> {
    let folder = settings.socket.parent().map_or_else(|| root.at(Path::new("/run")), |folder| root.at(folder));
    fs::create_dir_all(&folder).map_err(io_error("make", &folder))?;
    let file = OpenOptions::new().create(true).append(true).open(log).map_err(io_error("open", log))?;
    // It waits until it is in its groups, and forks into a session of its own. `--fork` of setsid(1) gives it to whoever
    // takes in orphans, which outlives the pod.
    let script =
        "read -r go && exec setsid --fork nsenter --target 1 --mount --uts --ipc --net --root --wd \"$@\" </dev/null";
    let mut shell = Command::new("sh");
    shell.args(["-c", script, "sh"]).arg(&settings.binary).arg("-v").arg("keeper");
    shell.arg("--state").arg(&settings.state).arg("--").arg("--containerd-socket").arg(&settings.socket);
    shell.args(&settings.node_arguments);
    shell.stdin(Stdio::piped()).stdout(copy(&file, log)?).stderr(file).kill_on_drop(true);
    // What the pod was given is not the daemon's.
    shell.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let sh = Path::new("/bin/sh");
    let mut child = shell.spawn().map_err(io_error("start", sh))?;
    let pid = child.id().unwrap_or_default();
    leave_groups(root, pid)?;
    // As systemd's unit has it; without the right to it, the pod's value stays.
    if let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), "-999") {
        tracing::debug!(%error, "the daemon may be killed for memory as this pod may");
    }
    let mut input = child.stdin.take().ok_or_else(|| io_error("tell", sh)(io::ErrorKind::BrokenPipe.into()))?;
    input.write_all(b"go\n").await.map_err(io_error("tell", sh))?;
    drop(input);
    let ended = child.wait().await.map_err(io_error("wait for", sh))?;
    if ended.success() { Ok(()) } else { Err(DetachedError::Silent { log: log.to_owned() }) }
}

fn copy(file: &File, log: &Path) -> Result<File, DetachedError> {
    file.try_clone().map_err(io_error("open", log))
}

/// Keeps one log of the length that it may have and the one before it. The keeper appends, so a file that is cut goes on.
fn shorten(log: &Path) -> Result<(), DetachedError> {
    let len = fs::metadata(log).map_or(0, |metadata| metadata.len());
    if len > LOG_MAX_BYTES {
        fs::copy(log, log.with_extension("log.1")).map_err(io_error("copy", log))?;
        File::options().write(true).truncate(true).open(log).map_err(io_error("shorten", log))?;
    }
    Ok(())
}

/// A process' place in one hierarchy.
#[derive(Debug, PartialEq, Eq)]
struct Place<'a> {
    controllers: &'a str,
    path: &'a str,
}

/// The lines of /proc/PID/cgroup (cgroups(7)).
fn places(text: &str) -> Vec<Place<'_>> {
    let one = |line| {
        let mut parts = str::splitn(line, 3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        Some(Place { controllers, path })
    };
    text.lines().filter_map(one).collect()
}

/// The folder in which the processes of `place` are listed, by the host's mounts (/proc/PID/mountinfo, proc(5)).
fn folder_of(place: &Place<'_>, mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (mount_root, point) = (mount.next()?, mount.next()?);
        let mut kind = kind.split(' ');
        let (name, options) = (kind.next()?, kind.nth(1)?);
        let is_it = match place.controllers {
            "" => name == "cgroup2",
            controllers => {
                name == "cgroup" && controllers.split(',').all(|one| options.split(',').any(|option| option == one))
            }
        };
        let below = Path::new(place.path).strip_prefix(mount_root).ok().filter(|_| is_it)?;
        Some(Path::new(point).join(below))
    })
}

/// Puts the process into the control groups of the host's first process, and makes sure that it is there.
fn leave_groups(root: &Root, pid: u32) -> Result<(), DetachedError> {
    let read = |path: &str| fs::read_to_string(path).map_err(io_error("read", Path::new(path)));
    let (first, own) = (read("/proc/1/cgroup")?, read("/proc/self/cgroup")?);
    let mounts = read("/proc/1/mountinfo")?;
    let own = places(&own);
    let mut last = String::new();
    for place in places(&first) {
        let Some(folder) = folder_of(&place, &mounts) else { continue };
        let list = root.at(&folder).join("cgroup.procs");
        if let Err(error) = fs::write(&list, pid.to_string()) {
            last = format!("{}: {error}", list.display());
        }
    }
    let now = read(&format!("/proc/{pid}/cgroup"))?;
    let (first, now) = (places(&first), places(&now));
    for place in &own {
        let is_in = |all: &[Place<'_>]| all.contains(place);
        if is_in(&now) && !is_in(&first) {
            let group = format!("{}:{}", place.controllers, place.path);
            let reason = if last.is_empty() { "the host has not mounted it".to_owned() } else { last };
            return Err(DetachedError::Captive { group, reason });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
30 23 0:26 / /sys/fs/cgroup rw,nosuid - tmpfs tmpfs rw,mode=755
31 30 0:27 /node-1 /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 / /sys/fs/cgroup/systemd rw - cgroup systemd rw,xattr,name=systemd
34 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
";

    #[test]
    fn groups_are_found_by_the_mounts_of_the_host() {
        let text = "9:memory:/node-1/init\n4:cpu,cpuacct:/\n1:name=systemd:/a\n0::/b\n3:pids:/x\n";
        let found: Vec<_> = places(text).iter().map(|place| folder_of(place, MOUNTS)).collect();
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(
            found,
            [
                path("/sys/fs/cgroup/memory/init"),
                path("/sys/fs/cgroup/cpu,cpuacct/"),
                path("/sys/fs/cgroup/systemd/a"),
                path("/sys/fs/cgroup/unified/b"),
                None,
            ]
        );
        // Outside of what is mounted.
        assert_eq!(folder_of(&Place { controllers: "memory", path: "/other" }, MOUNTS), None);
    }

    #[test]
    fn a_long_log_is_cut_and_kept_once() {
        let dir = tempfile::tempdir().expect("a folder");
        let log = dir.path().join("keeper.log");
        fs::write(&log, vec![b'x'; LOG_MAX_BYTES as usize]).expect("written");
        shorten(&log).expect("looked at");
        assert!(!dir.path().join("keeper.log.1").exists());
        fs::write(&log, vec![b'x'; LOG_MAX_BYTES as usize + 1]).expect("written");
        shorten(&log).expect("cut");
        assert_eq!(fs::metadata(&log).expect("there").len(), 0);
        assert_eq!(fs::metadata(dir.path().join("keeper.log.1")).expect("there").len(), LOG_MAX_BYTES + 1);
    }
}
