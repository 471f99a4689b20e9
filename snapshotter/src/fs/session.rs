//! One FUSE connection: its mount, its threads, its end.
//!
//! The mount is made with the new mount API on a descriptor of ours, so that the descriptor can outlive this process
//! one day. The end never hangs: the mount is detached, and when the threads do not see the end of the connection
//! (another mount namespace may still hold a copy of the mount), the connection is aborted.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{Config, Filesystem, InitFlags, KernelConfig, Session, SessionACL};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};
use thiserror::Error;

/// Requests that the kernel may have under way in the background. The default of 16 stalls readahead at 12
/// (measured); 64 keeps both threads busy and bounds what waits in the daemon.
const BACKGROUND_REQUESTS_MAX: u16 = 64;
/// Nice value of FUSE threads: on a node that starts pods they would otherwise queue behind the pods they serve
/// (throughput fell to a half or a fifth under load without it, measured).
const FUSE_THREAD_NICE: i32 = -10;
/// How long the threads may take to see the end of the connection before it is aborted.
const END_GRACE: Duration = Duration::from_millis(500);

/// A FUSE mount that could not be made.
#[derive(Debug, Error)]
pub enum SessionError {
    /// There is no FUSE here.
    #[error("cannot open /dev/fuse: {0}; load the kernel module (modprobe fuse) or give the container the device")]
    Device(#[source] io::Error),
    /// The kernel refused the mount.
    #[error(
        "cannot mount FUSE at {}: {source}; check that /dev/fuse is the FUSE device and that this process may mount",
        path.display()
    )]
    Mount {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The handshake or the threads failed.
    #[error("cannot start serving FUSE at {}: {source}", path.display())]
    Start {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// How a connection is served.
#[derive(Debug, Clone, Copy)]
pub struct SessionConfig {
    /// Threads that read requests.
    pub threads: usize,
    /// Kernel readahead in KiB; `None` leaves the kernel's 128.
    pub read_ahead_kib: Option<u32>,
    /// A name for the mount table, such as `hermes`.
    pub source: &'static str,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self { threads: 2, read_ahead_kib: None, source: "hermes" }
    }
}

/// A running FUSE connection. Dropping it unmounts.
#[derive(Debug)]
pub struct FuseSession {
    path: PathBuf,
    connection: u32,
    unmounted: bool,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl FuseSession {
    /// Mounts `filesystem` at `path`, a directory, and serves it on its own threads.
    ///
    /// # Errors
    /// When there is no FUSE, or the kernel refuses.
    pub fn start<F: Filesystem>(filesystem: F, path: &Path, config: SessionConfig) -> Result<Self, SessionError> {
        let device = File::options().read(true).write(true).open("/dev/fuse").map_err(SessionError::Device)?;
        let mount_error =
            |source: rustix::io::Errno| SessionError::Mount { path: path.to_owned(), source: source.into() };
        let device = OwnedFd::from(device);
        let mounted = mount(&device, config.source).map_err(mount_error)?;
        move_mount(&mounted, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(mount_error)?;
        // Copies of the mount in other namespaces would keep the connection alive after it is unmounted here.
        let _ = mount_change(path, MountPropagationFlags::PRIVATE);
        let start_error = |source| SessionError::Start { path: path.to_owned(), source };
        let started = serve(filesystem, device, config);
        let thread = match started {
            Ok(thread) => thread,
            Err(source) => {
                let _ = unmount(path, UnmountFlags::DETACH);
                return Err(start_error(source));
            }
        };
        let mut session = Self { path: path.to_owned(), connection: 0, unmounted: false, thread: Some(thread) };
        let device_number = std::fs::metadata(path).map_err(start_error)?.dev();
        session.connection = rustix::fs::minor(device_number);
        if let Some(kib) = config.read_ahead_kib {
            set_read_ahead(device_number, kib).map_err(start_error)?;
        }
        Ok(session)
    }

    /// Where the file system is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unmounts, unless somebody uses the mount.
    ///
    /// # Errors
    /// [`io::ErrorKind::ResourceBusy`] while a process has a file of it open; the mount stays.
    pub fn unmount(&mut self) -> io::Result<()> {
        unmount(&self.path, UnmountFlags::empty())?;
        self.unmounted = true;
        self.stop();
        Ok(())
    }

    /// Unmounts and waits for the threads, aborting the connection when they do not see the end in time.
    pub fn stop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if !self.unmounted
            && let Err(error) = unmount(&self.path, UnmountFlags::DETACH)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot unmount FUSE");
        }
        let deadline = Instant::now() + END_GRACE;
        while !thread.is_finished() {
            if Instant::now() > deadline {
                abort_connection(self.connection);
            }
            std::thread::sleep(Duration::from_millis(2));
            if Instant::now() > deadline + END_GRACE {
                tracing::warn!(path = %self.path.display(), "FUSE threads still run after their connection was aborted");
                return;
            }
        }
        if let Ok(Err(error)) = thread.join() {
            tracing::debug!(path = %self.path.display(), %error, "FUSE session ended");
        }
    }
}

impl Drop for FuseSession {
    fn drop(&mut self) {
        self.stop();
    }
}

fn mount(device: &OwnedFd, source: &str) -> rustix::io::Result<OwnedFd> {
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let fd = device.as_raw_fd().to_string();
    for (key, value) in [
        ("source", source),
        ("subtype", "hermes"),
        ("fd", fd.as_str()),
        ("rootmode", "40755"),
        ("user_id", "0"),
        ("group_id", "0"),
    ] {
        fsconfig_set_string(&context, key, value)?;
    }
    // Containers run as any user, and the kernel checks the permissions that the tree says.
    for flag in ["ro", "allow_other", "default_permissions"] {
        fsconfig_set_flag(&context, flag)?;
    }
    fsconfig_create(&context)?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, super::super::mounts::attributes())
}

fn serve<F: Filesystem>(
    filesystem: F,
    device: OwnedFd,
    config: SessionConfig,
) -> io::Result<JoinHandle<io::Result<()>>> {
    let mut options = Config::default();
    options.acl = SessionACL::All;
    options.n_threads = Some(config.threads);
    options.clone_fd = config.threads > 1;
    let session = Session::from_fd(filesystem, device, SessionACL::All, options)?;
    std::thread::Builder::new().name("hermes-fuse".to_owned()).spawn(move || session.run())
}

/// Takes of `wanted` what the kernel has; each on its own, because one unknown bit refuses all of a set.
pub(super) fn negotiate(config: &mut KernelConfig, wanted: &[InitFlags]) {
    for capability in wanted {
        let _ = config.add_capabilities(*capability);
    }
    let _ = config.set_max_background(BACKGROUND_REQUESTS_MAX);
    let _ = config.set_congestion_threshold(BACKGROUND_REQUESTS_MAX / 4 * 3);
}

/// Raises the calling FUSE thread's priority, once.
pub(super) fn raise_priority() {
    thread_local!(static RAISED: Cell<bool> = const { Cell::new(false) });
    RAISED.with(|raised| {
        if !raised.replace(true)
            // On Linux this is the thread, not the process.
            && let Err(error) = rustix::process::setpriority_process(None, FUSE_THREAD_NICE)
        {
            tracing::debug!(%error, "FUSE threads run at normal priority");
        }
    });
}

/// Sets the readahead of the mount whose files have `device_number`, in KiB.
///
/// # Errors
/// When the kernel has no such knob for this mount, or refuses.
pub fn set_read_ahead(device_number: u64, kib: u32) -> io::Result<()> {
    let (major, minor) = (rustix::fs::major(device_number), rustix::fs::minor(device_number));
    std::fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), kib.to_string())
}

fn abort_connection(connection: u32) {
    let control = Path::new("/sys/fs/fuse/connections");
    if !control.join(connection.to_string()).exists() {
        // Not mounted by default in containers; harmless when it is already.
        let _ = rustix::mount::mount("fusectl", control, "fusectl", rustix::mount::MountFlags::empty(), None);
    }
    if let Err(error) = std::fs::write(control.join(connection.to_string()).join("abort"), "1") {
        tracing::debug!(connection, %error, "cannot abort a FUSE connection");
    }
}
