//! The root of the host: `/`, or a folder below which the host's files are mounted, as in a DaemonSet's pod.
//!
//! Paths in configurations and units are the host's own; [`Root::at`] says where such a path is for this process, and
//! [`Root::resolve`] follows links as the host would. Programs of the host run inside it, through chroot(1), because
//! they need the host's libraries and must see the paths that they will see later.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use tokio::process::Command;

use super::InstallError;

/// How long a program that only prints may take. containerd takes 40 ms; a loaded node is slow.
pub(crate) const PRINT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long `systemctl` may take: the services' own limits for starting and stopping, and some time of its own.
pub(crate) const SERVICE_TIMEOUT: Duration = Duration::from_secs(180);
/// The most of a program's output that is kept, in bytes; a configuration has some kilobytes.
const OUTPUT_MAX_BYTES: usize = 4 << 20;
/// The folders where a host has its programs.
const PROGRAM_DIRS: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The host's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    dir: PathBuf,
}

impl Root {
    /// The root at `dir`.
    ///
    /// # Errors
    /// When there is no such folder.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let dir = dir.canonicalize()?;
        if !dir.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        Ok(Self { dir })
    }

    /// Whether it is this process' own.
    pub fn is_own(&self) -> bool {
        self.dir == Path::new("/")
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the host's `path` is for this process. Links are not followed.
    pub fn at(&self, path: &Path) -> PathBuf {
        self.dir.join(inside(path))
    }

    /// The file that the host's `path` leads to, links followed within the root; `None` when nothing is there.
    ///
    /// # Errors
    /// When a link leads nowhere, or looking is refused.
    pub fn resolve(&self, path: &Path) -> io::Result<Option<PathBuf>> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let root = rustix::fs::open(&self.dir, flags | OFlags::DIRECTORY, Mode::empty())?;
        let open = |flags| rustix::fs::openat2(&root, inside(path), flags, Mode::empty(), ResolveFlags::IN_ROOT);
        let file = match open(flags) {
            Ok(file) => file,
            // Nothing there, unless it is a link: then it leads nowhere.
            Err(rustix::io::Errno::NOENT) if open(flags | OFlags::NOFOLLOW).is_err() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        std::fs::read_link(link).map(Some)
    }

    /// The host's path of the program `name`, if it has it.
    pub fn find_program(&self, name: &str) -> Option<PathBuf> {
        let candidates = PROGRAM_DIRS.iter().map(|dir| Path::new(dir).join(name));
        candidates.into_iter().find(|path| matches!(self.resolve(path), Ok(Some(file)) if file.is_file()))
    }

    /// Whether systemd runs on the host, by the folder that says so (sd_booted(3)).
    pub fn runs_systemd(&self) -> bool {
        self.at(Path::new("/run/systemd/system")).is_dir()
    }

    /// A command that runs the host's `program` inside the root.
    pub(crate) fn command(&self, program: &Path) -> Command {
        if self.is_own() {
            return Command::new(program);
        }
        let mut command = Command::new("chroot");
        command.arg(&self.dir).arg(program);
        command
    }
}

fn inside(path: &Path) -> PathBuf {
    path.components().filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir)).collect()
}

/// Runs `command` to its end, within `timeout`, and gives what it printed.
///
/// Not cancel safe: the program is killed.
///
/// # Errors
/// When it cannot be started, fails, or takes too long; with the end of what it said.
pub(crate) async fn run(mut command: Command, timeout: Duration) -> Result<String, InstallError> {
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    let failed = |reason: String| InstallError::Program { program: program.clone(), reason };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let output = tokio::time::timeout(timeout, command.output()).await;
    let output = output.map_err(|_| failed(format!("it did not end within {} s", timeout.as_secs())))?;
    let output = output.map_err(|error| failed(error.to_string()))?;
    if let Some(signal) = output.status.signal() {
        return Err(InstallError::Ended { program: program.clone(), signal });
    }
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
        return Err(failed(format!("{}: {}", output.status, last.trim())));
    }
    if output.stdout.len() > OUTPUT_MAX_BYTES {
        return Err(failed(format!("it printed more than {OUTPUT_MAX_BYTES} bytes")));
    }
    String::from_utf8(output.stdout).map_err(|_| failed("it printed what is no text".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_and_links_stay_within_the_root() {
        let dir = tempfile::tempdir().expect("a folder");
        let root = Root::new(dir.path()).expect("a root");
        assert_eq!(root.at(Path::new("/etc/x")), root.dir().join("etc/x"));
        std::fs::create_dir_all(root.dir().join("etc/real")).expect("folders");
        std::fs::write(root.dir().join("etc/real/file"), "x").expect("a file");
        std::os::unix::fs::symlink("/etc/real/file", root.dir().join("etc/link")).expect("a link");
        let resolved = root.resolve(Path::new("/etc/link")).expect("resolves");
        assert_eq!(resolved, Some(root.dir().join("etc/real/file")));
        assert_eq!(root.resolve(Path::new("/etc/none")).expect("looks"), None);
        std::os::unix::fs::symlink("/nowhere", root.dir().join("etc/dangling")).expect("a link");
        assert!(root.resolve(Path::new("/etc/dangling")).is_err());
        // One that would leave the root does not.
        std::os::unix::fs::symlink("../../../../../etc/real", root.dir().join("up")).expect("a link");
        assert_eq!(root.resolve(Path::new("/up/file")).expect("resolves"), Some(root.dir().join("etc/real/file")));
    }

    #[tokio::test]
    async fn programs_are_bounded_and_their_last_words_are_kept() {
        let shell = |script: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        assert_eq!(run(shell("echo yes"), PRINT_TIMEOUT).await.expect("runs"), "yes\n");
        let failed = run(shell("echo first >&2; echo last >&2; exit 3"), PRINT_TIMEOUT).await.expect_err("fails");
        assert!(failed.to_string().contains("last"), "{failed}");
        let ended = run(shell("kill -TERM $$"), PRINT_TIMEOUT).await.expect_err("is ended");
        assert!(matches!(ended, InstallError::Ended { signal: 15, .. }), "{ended}");
        let slow = run(shell("sleep 600"), Duration::from_millis(50)).await.expect_err("too slow");
        assert!(slow.to_string().contains("did not end"), "{slow}");
    }
}
