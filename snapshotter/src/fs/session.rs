//! One FUSE connection: its mount, its threads, its end.
//!
//! The mount is made with the new mount API on a descriptor of ours. The end never hangs: the mount is detached, and when
//! the threads do not see the end of the connection (another mount namespace may still hold a copy of the mount), the
//! connection is aborted.
//!
//! A connection can outlive its process. Then a supervisor keeps a copy of its descriptor ([`crate::keeper`]), stored
//! *before* anybody can see the mount, and the next daemon goes on with it ([`FuseSession::resume`]). Until it does,
//! requests wait in the kernel. Without a supervisor all copies end with the process, and the mount answers ENOTCONN.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use fuser::{Config, Filesystem, InitFlags, KernelConfig, Session, SessionACL};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};
use thiserror::Error;

use super::resume::{self, Unanswered};
use crate::keeper::{notify::Notifier, system};

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
    /// The supervisor does not keep the descriptor.
    #[error("cannot give the FUSE connection of {} to the supervisor: {source}; see whether it still runs", path.display())]
    Keep {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Requests are lost with the process that read them.
    #[error(
        "requests at {} were read by the daemon before this one, and this kernel (before 6.9) cannot ask them again",
        path.display()
    )]
    Lost {
        /// Where.
        path: PathBuf,
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

/// How a connection outlives its process.
#[derive(Debug, Clone)]
pub struct Keeping {
    /// The supervisor.
    pub notifier: Arc<Notifier>,
    /// What the descriptor is called there, without the number of its connection, which is added.
    pub name: String,
}

impl Keeping {
    /// The name under which the descriptor of `connection` is kept. The number is the way to end a connection whose
    /// processes do not end (`/sys/fs/fuse/connections`).
    fn name_of(&self, connection: u32) -> String {
        format!("{}.{connection}", self.name)
    }

    /// Has the supervisor close its copy of the descriptor of `connection`.
    pub fn forget(&self, connection: u32) {
        if let Err(error) = self.notifier.remove(&self.name_of(connection)) {
            tracing::warn!(name = %self.name, connection, %error, "the supervisor still keeps a connection");
        }
    }
}

/// A running FUSE connection. Dropping it unmounts.
#[derive(Debug)]
pub struct FuseSession {
    path: PathBuf,
    connection: u32,
    unmounted: bool,
    keeping: Option<Keeping>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl FuseSession {
    /// Mounts `filesystem` at `path`, a directory, and serves it on its own threads. With `keeping` the supervisor has
    /// the descriptor before the mount can be seen.
    ///
    /// # Errors
    /// When there is no FUSE, the kernel refuses, or the supervisor does not answer.
    pub fn start<F: Filesystem>(
        filesystem: F,
        path: &Path,
        config: SessionConfig,
        keeping: Option<Keeping>,
    ) -> Result<Self, SessionError> {
        let device = File::options().read(true).write(true).open("/dev/fuse").map_err(SessionError::Device)?;
        let mount_error =
            |source: rustix::io::Errno| SessionError::Mount { path: path.to_owned(), source: source.into() };
        let start_error = |source| SessionError::Start { path: path.to_owned(), source };
        let device = OwnedFd::from(device);
        let mounted = mount(&device, config.source).map_err(mount_error)?;
        let kept = device.try_clone().map_err(start_error)?;
        let session = Session::from_fd(filesystem, device, SessionACL::All, options(config, keeping.is_some()));
        // From here on the root can be asked: the device's number is the connection's.
        let thread = run(session.map_err(start_error)?).map_err(start_error)?;
        let device_number = rustix::fs::fstat(&mounted).map_err(|error| start_error(error.into()))?.st_dev;
        let connection = rustix::fs::minor(device_number);
        let mut session =
            Self { path: path.to_owned(), connection, unmounted: true, keeping: None, thread: Some(thread) };
        if let Some(keeping) = keeping {
            let stored = keeping.notifier.store(&keeping.name_of(connection), &kept);
            stored.map_err(|source| SessionError::Keep { path: path.to_owned(), source })?;
            session.keeping = Some(keeping);
        }
        drop(kept);
        move_mount(&mounted, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(mount_error)?;
        session.unmounted = false;
        // Copies of the mount in other namespaces would keep the connection alive after it is unmounted here.
        let _ = mount_change(path, MountPropagationFlags::PRIVATE);
        if let Some(kib) = config.read_ahead_kib {
            set_read_ahead(device_number, kib).map_err(start_error)?;
        }
        Ok(session)
    }

    /// Goes on with the connection `device`, which another process has mounted at `path`. What that process had not
    /// answered is answered by this one. `path` is not looked at: nobody would answer.
    ///
    /// # Errors
    /// When the connection is no more, or requests of it are lost (kernels before 6.9): then it is of no use to anybody,
    /// and the caller ends it by dropping every copy of the descriptor.
    pub fn resume<F: Filesystem>(
        filesystem: F,
        path: &Path,
        device: OwnedFd,
        connection: u32,
        config: SessionConfig,
        keeping: Keeping,
    ) -> Result<Self, SessionError> {
        let start_error = |source| SessionError::Start { path: path.to_owned(), source };
        if system::has_ended(&device) {
            return Err(start_error(io::ErrorKind::NotConnected.into()));
        }
        if resume::resend(&device).map_err(start_error)? == Unanswered::Lost && waiting_requests(connection) != Some(0)
        {
            return Err(SessionError::Lost { path: path.to_owned() });
        }
        let session = resume::session(filesystem, &device, options(config, true)).map_err(start_error)?;
        let thread = run(session).map_err(start_error)?;
        let keeping = Some(keeping);
        Ok(Self { path: path.to_owned(), connection, unmounted: false, keeping, thread: Some(thread) })
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
        let keeping = self.keeping.take();
        if !self.unmounted
            && let Err(error) = unmount(&self.path, UnmountFlags::DETACH)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot unmount FUSE");
        }
        if let Some(keeping) = keeping {
            keeping.forget(self.connection);
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

fn options(config: SessionConfig, is_kept: bool) -> Config {
    let mut options = Config::default();
    options.acl = SessionACL::All;
    options.n_threads = Some(config.threads);
    // A request that was read through a clone fails when the clone's process ends: see `resume`.
    options.clone_fd = config.threads > 1 && !is_kept;
    options
}

fn run<F: Filesystem>(session: Session<F>) -> io::Result<JoinHandle<io::Result<()>>> {
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

/// The kernel's folder of `connection`.
fn control_folder(connection: u32) -> PathBuf {
    let control = Path::new("/sys/fs/fuse/connections");
    let folder = control.join(connection.to_string());
    if !folder.exists() {
        // Not mounted by default in containers; harmless when it is already.
        let _ = rustix::mount::mount("fusectl", control, "fusectl", rustix::mount::MountFlags::empty(), None);
    }
    folder
}

/// Requests of `connection` that nobody has answered; `None` when the kernel does not say.
fn waiting_requests(connection: u32) -> Option<u64> {
    std::fs::read_to_string(control_folder(connection).join("waiting")).ok()?.trim().parse().ok()
}

/// Ends a connection: everything that waits for it fails.
pub(crate) fn abort_connection(connection: u32) {
    if let Err(error) = std::fs::write(control_folder(connection).join("abort"), "1") {
        tracing::debug!(connection, %error, "cannot abort a FUSE connection");
    }
}
