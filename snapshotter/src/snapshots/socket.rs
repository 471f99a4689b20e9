//! The service's socket: made for root alone, in one step, and taken away again.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::Stream;
use tokio::net::{UnixListener, UnixStream};

use super::error::ServiceError;

/// Where containerd looks for the service when nothing else is configured.
pub const DEFAULT_SOCKET: &str = "/run/hermes/snapshotter.sock";
/// Pause after a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket that is listened on. Dropping it takes its file away, unless another daemon has put its own there.
#[derive(Debug)]
pub struct Listener {
    listener: UnixListener,
    file: SocketFile,
}

#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Listener {
    /// Listens on `path`, for root alone (mode 0600). Takes the place of a socket that nobody listens on; makes the
    /// folder when there is none.
    ///
    /// # Errors
    /// [`ServiceError::SocketInUse`] when somebody answers there; [`ServiceError::NoSocket`] when something else has
    /// the name; when the system refuses.
    pub fn bind(path: &Path) -> Result<Self, ServiceError> {
        if let Some(folder) = path.parent() {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
            made.map_err(ServiceError::io("make the folder", folder))?;
        }
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(ServiceError::NoSocket { path: path.to_owned() });
            }
            Ok(_) if std::os::unix::net::UnixStream::connect(path).is_ok() => {
                return Err(ServiceError::SocketInUse { path: path.to_owned() });
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(ServiceError::io("look at", path)(error));
            }
            _ => {}
        }
        // Made under another name, so that nobody finds it before it has its mode.
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}", std::process::id()));
        let temporary = PathBuf::from(temporary);
        let _ = fs::remove_file(&temporary);
        let listener = UnixListener::bind(&temporary).map_err(ServiceError::io("listen on", path))?;
        let placed = fs::set_permissions(&temporary, Permissions::from_mode(0o600))
            .and_then(|()| fs::symlink_metadata(&temporary))
            .and_then(|made| fs::rename(&temporary, path).map(|()| made.ino()));
        let inode = placed.map_err(|error| {
            let _ = fs::remove_file(&temporary);
            ServiceError::io("listen on", path)(error)
        })?;
        Ok(Self { listener, file: SocketFile { path: path.to_owned(), inode } })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// The connections. It never ends: what cannot be accepted now is tried again.
    pub(super) fn connections(&self) -> impl Stream<Item = io::Result<UnixStream>> + '_ {
        futures::stream::unfold(&self.listener, |listener| async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => return Some((Ok(stream), listener)),
                    // Such as too many open files, which passes.
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a connection of containerd");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stale_sockets_are_replaced_and_live_ones_are_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("run/hermes.sock");
        let first = Listener::bind(&path).expect("binds");
        assert_eq!(fs::symlink_metadata(&path).expect("a socket").permissions().mode() & 0o777, 0o600);
        assert!(matches!(Listener::bind(&path), Err(ServiceError::SocketInUse { .. })));
        drop(first);
        assert!(!path.exists());
        drop(std::os::unix::net::UnixListener::bind(&path).expect("a stale socket"));
        let second = Listener::bind(&path).expect("replaces it");
        assert_eq!(second.path(), path);
        fs::remove_file(&path).expect("removes");
        fs::write(&path, "mine").expect("writes");
        assert!(matches!(Listener::bind(&path), Err(ServiceError::NoSocket { .. })));
        drop(second);
        assert!(path.exists(), "what is not ours stays");
    }
}
