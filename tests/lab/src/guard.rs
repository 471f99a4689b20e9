//! Owners of what outlives a process: mounts, child processes, loop devices and folders.
//!
//! Each guard undoes its work when it is dropped, so also when a test panics. Undoing goes from polite to certain: a
//! mount that is busy is detached lazily, a process that ignores its signal is killed. Drop never panics; what it
//! cannot undo it prints. Guards are dropped in the reverse order of their declaration: declare the folder first, then
//! the process, then the mount.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Pid, Signal, kill_process};

use crate::command::run;

/// How long a process may take to end after SIGTERM, before it is killed.
const STOP_DEADLINE: Duration = Duration::from_secs(10);
/// How long a mount may stay busy before it is detached lazily.
const BUSY_DEADLINE: Duration = Duration::from_secs(2);
/// Pause between two looks at a condition that nothing announces.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Looks at `condition` until it gives a value, for at most `deadline`.
///
/// # Errors
///
/// When the deadline passes; `what` names the condition in the message.
pub fn wait_for<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if started.elapsed() > deadline {
            bail!("{what} did not happen within {deadline:?}");
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// A mount point that is unmounted on drop.
#[derive(Debug)]
pub struct MountGuard {
    target: PathBuf,
}

impl MountGuard {
    /// Takes charge of what somebody else mounted at `target`.
    pub fn adopt(target: impl Into<PathBuf>) -> Self {
        Self { target: target.into() }
    }

    /// Mounts `source` at `target` with the kernel's own call (no helper program, no loop device).
    ///
    /// # Errors
    ///
    /// What mount(2) says.
    pub fn mount(source: &Path, target: &Path, kind: &str, flags: MountFlags, options: &str) -> Result<Self> {
        let options = std::ffi::CString::new(options).context("mount options hold a zero byte")?;
        mount(source, target, kind, flags, options.as_c_str())
            .with_context(|| format!("mount {kind} from {} at {}", source.display(), target.display()))?;
        Ok(Self::adopt(target))
    }

    /// Where the mount is.
    pub fn path(&self) -> &Path {
        &self.target
    }
}

impl Drop for MountGuard {
    fn drop(&mut self) {
        unmount_certainly(&self.target);
    }
}

/// Unmounts `target` if it is a mount point; lazily when it stays busy.
fn unmount_certainly(target: &Path) {
    let started = Instant::now();
    loop {
        match unmount(target, UnmountFlags::NOFOLLOW) {
            // Not a mount point (any more), or gone: nothing to undo.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => return,
            Err(rustix::io::Errno::BUSY) if started.elapsed() < BUSY_DEADLINE => thread::sleep(POLL_INTERVAL),
            Err(error) => {
                eprintln!("guard: {} stays mounted ({error}); detaching it", target.display());
                if let Err(error) = unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                    eprintln!("guard: cannot detach {}: {error}", target.display());
                }
                return;
            }
        }
    }
}

/// A child process that is ended on drop: SIGTERM, and SIGKILL when that has no effect.
#[derive(Debug)]
pub struct ProcessGuard {
    child: Child,
    name: String,
}

impl ProcessGuard {
    /// Starts `command`.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let child = command.spawn().with_context(|| format!("start {command:?}"))?;
        Ok(Self { child, name })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child itself, to read its output or to wait for it.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The status with which it ended, or `None` while it runs.
    ///
    /// # Errors
    ///
    /// What waitpid(2) says.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Sends `signal`.
    ///
    /// # Errors
    ///
    /// When the process has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).with_context(|| format!("signal {signal:?} to {} ({pid:?})", self.name))
    }

    /// Ends it now, politely and then certainly, and returns its status.
    ///
    /// # Errors
    ///
    /// What waitpid(2) says.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        if self.child.try_wait()?.is_none() {
            self.signal(Signal::TERM)?;
        }
        let stopped = wait_for("the end of a stopped process", STOP_DEADLINE, || self.child.try_wait().transpose());
        match stopped {
            Ok(status) => Ok(status?),
            Err(_) => {
                eprintln!("guard: {} ignores SIGTERM; killing it", self.name);
                self.child.kill()?;
                Ok(self.child.wait()?)
            }
        }
    }
}

impl Drop for ProcessGuard {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("guard: cannot stop {}: {error}", self.name);
        }
    }
}

/// A loop device over a file, detached on drop.
#[derive(Debug)]
pub struct LoopGuard {
    device: PathBuf,
}

impl LoopGuard {
    /// Attaches `file` to a free loop device.
    ///
    /// # Errors
    ///
    /// When losetup fails: no loop devices, or not root.
    pub fn attach(file: &Path) -> Result<Self> {
        let mut output = run(Command::new("losetup").args(["--find", "--show"]).arg(file))?;
        while output.last() == Some(&b'\n') {
            output.pop();
        }
        Ok(Self { device: PathBuf::from(std::ffi::OsString::from_vec(output)) })
    }

    /// The device, such as `/dev/loop0`.
    pub fn device(&self) -> &Path {
        &self.device
    }
}

impl Drop for LoopGuard {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("losetup").arg("--detach").arg(&self.device)) {
            eprintln!("guard: {error:#}");
        }
    }
}

/// A folder of a test's own, removed on drop with everything that is mounted below it.
#[derive(Debug)]
pub struct ScratchDir {
    path: PathBuf,
}

impl ScratchDir {
    /// Makes one below the system's folder for temporary files (`TMPDIR`).
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn new(name: &str) -> Result<Self> {
        Self::new_in(&std::env::temp_dir(), name)
    }

    /// Makes one below `parent`.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn new_in(parent: &Path, name: &str) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix(&format!("hermes-{name}-")).tempdir_in(parent);
        let dir = dir.with_context(|| format!("make a folder in {}", parent.display()))?;
        // Mount tables hold real paths.
        let path = fs::canonicalize(dir.keep()).context("resolve a temporary folder")?;
        Ok(Self { path })
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a folder of this name in it and returns its path.
    ///
    /// # Errors
    ///
    /// When it cannot be made.
    pub fn make(&self, name: impl AsRef<OsStr>) -> Result<PathBuf> {
        let path = self.path.join(name.as_ref());
        fs::create_dir_all(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        match mounts_below(&self.path) {
            Ok(mounts) => mounts.iter().rev().for_each(|target| unmount_certainly(target)),
            Err(error) => eprintln!("guard: cannot read the mount table: {error:#}"),
        }
        // Never through a mount that could not be undone: those files are not the test's.
        if mounts_below(&self.path).is_ok_and(|left| left.is_empty())
            && let Err(error) = fs::remove_dir_all(&self.path)
            // A sweeper may have been quicker.
            && error.kind() != io::ErrorKind::NotFound
        {
            eprintln!("guard: cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Removes something when this process is no more, however it ended: what a guard cannot do for a test that is killed.
/// Dropped, it does so at once.
#[derive(Debug)]
pub struct Sweeper {
    child: Child,
}

impl Sweeper {
    /// Takes charge of the folder `dir`.
    ///
    /// # Errors
    ///
    /// When there is no shell.
    pub fn watch(dir: &Path) -> Result<Self> {
        // What is killed at the same time may still write for a moment.
        Self::run("for try in 1 2 3 4 5; do rm -rf --one-file-system -- \"$1\" && exit; sleep 1; done", dir.as_os_str())
    }

    /// Takes charge of the control groups of this name, in every hierarchy. A star in it stands for anything.
    ///
    /// # Errors
    ///
    /// When there is no shell.
    pub fn watch_groups(name: &str) -> Result<Self> {
        // A group can be removed when the last of those that were killed is gone.
        let script = "for try in 1 2 3 4 5; do left=; for group in /sys/fs/cgroup/*/$1 /sys/fs/cgroup/$1; do \
                      [ ! -d \"$group\" ] || find \"$group\" -depth -type d -delete || left=1; done; \
                      [ -z \"$left\" ] && exit; sleep 1; done";
        Self::run(script, OsStr::new(name))
    }

    fn run(script: &str, argument: &OsStr) -> Result<Self> {
        let mut command = Command::new("sh");
        // Its input ends with this process. In a group of its own, since test runners kill whole groups, and without
        // their pipes, whose end they wait for.
        command.args(["-c", &format!("cat; {script}"), "sh"]).arg(argument);
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        command.stderr(Stdio::null()).process_group(0);
        Ok(Self { child: command.spawn().context("start a shell")? })
    }
}

impl Drop for Sweeper {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        if let Err(error) = self.child.wait() {
            eprintln!("guard: the sweeper: {error}");
        }
    }
}

/// The mount points at and below `dir`, in the order in which they were mounted.
///
/// # Errors
///
/// When the mount table cannot be read.
pub fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let table = fs::read("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let targets = table.split(|&byte| byte == b'\n').filter_map(|line| {
        // Field 5 (proc_pid_mountinfo(5)) is the mount point, with blanks and the like as \ooo.
        let field = line.split(|&byte| byte == b' ').nth(4)?;
        let path = PathBuf::from(std::ffi::OsString::from_vec(unescape(field)));
        path.starts_with(dir).then_some(path)
    });
    Ok(targets.collect())
}

/// Resolves the `\ooo` of the mount table.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = (byte == b'\\').then(|| tail.get(..3)).flatten();
        let value = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        plain.push(value.unwrap_or(byte));
        rest = if value.is_some() { &tail[3..] } else { tail };
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_table_escapes_are_resolved() {
        assert_eq!(unescape(br"/a\040b\134c\011"), b"/a b\\c\t");
        assert_eq!(unescape(br"/plain\9"), br"/plain\9");
    }

    #[test]
    fn a_panic_unmounts_and_removes() {
        let seen = std::panic::catch_unwind(|| {
            let dir = ScratchDir::new("guard").expect("a folder");
            let target = dir.make("with blank").expect("a folder in it");
            let mounted = MountGuard::mount(Path::new("none"), &target, "tmpfs", MountFlags::empty(), "size=64k");
            std::mem::forget(mounted.expect("root can mount a tmpfs"));
            assert_eq!(mounts_below(dir.path()).expect("table"), [target]);
            std::panic::panic_any(dir.path().to_owned());
        })
        .expect_err("it panics");
        let path = seen.downcast::<PathBuf>().expect("the path");
        assert!(!path.exists());
        assert_eq!(mounts_below(&path).expect("table"), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_busy_mount_is_detached() {
        let dir = ScratchDir::new("guard").expect("a folder");
        let target = dir.make("busy").expect("a folder in it");
        let mounted = MountGuard::mount(Path::new("none"), &target, "tmpfs", MountFlags::empty(), "size=64k");
        let mounted = mounted.expect("root can mount a tmpfs");
        let held = fs::File::create(target.join("held")).expect("a file");
        drop(mounted);
        assert_eq!(mounts_below(&target).expect("table"), Vec::<PathBuf>::new());
        drop(held);
    }

    #[test]
    fn a_stopped_process_is_gone() {
        let mut sleeper = ProcessGuard::start(Command::new("sleep").arg("600")).expect("sleep starts");
        let pid = Pid::from_child(sleeper.child());
        let status = sleeper.stop().expect("it ends");
        assert!(!status.success());
        drop(sleeper);
        assert_eq!(rustix::process::test_kill_process(pid), Err(rustix::io::Errno::SRCH));
    }
}
