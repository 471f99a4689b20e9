//! The daemon's side: giving descriptors to the supervisor, and getting them back.
//!
//! The protocol is systemd's (sd_notify(3), sd_listen_fds(3), sd_pid_notify_with_fds(3)), so systemd and `hermes keeper`
//! are the same to the daemon: datagrams of `NAME=VALUE` lines on the socket that `NOTIFY_SOCKET` names, descriptors
//! beside them as SCM_RIGHTS; descriptors come back as 3, 4, ... with their names in `LISTEN_FDNAMES`.
//!
//! A descriptor is safe as soon as [`Notifier::store`] returns: a datagram that waits in the supervisor's socket holds
//! it, whatever becomes of this process.
#![allow(unsafe_code, reason = "inherited descriptors are numbers until somebody owns them")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix};

/// The first descriptor that is passed (sd_listen_fds(3), `SD_LISTEN_FDS_START`).
pub(super) const FIRST_FD: i32 = 3;
/// Descriptors that are taken at most: one a mounted tree, and the node's own.
pub(super) const FDS_MAX: usize = 4096;
/// How long the supervisor may leave a full queue unread.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);

/// The supervisor's notification socket.
#[derive(Debug)]
pub struct Notifier {
    socket: UnixDatagram,
    address: SocketAddrUnix,
}

impl Notifier {
    /// The socket that the environment names; `None` when nobody supervises this process so.
    ///
    /// # Errors
    /// When the name cannot be a socket, or there are no descriptors left.
    pub fn from_environment() -> io::Result<Option<Self>> {
        match std::env::var_os("NOTIFY_SOCKET") {
            Some(name) if !name.is_empty() => Self::new(&name).map(Some),
            _ => Ok(None),
        }
    }

    /// The socket called `name`: a path, or `@` and an abstract name.
    ///
    /// # Errors
    /// When the name cannot be a socket, or there are no descriptors left.
    pub fn new(name: &OsStr) -> io::Result<Self> {
        let address = match name.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddrUnix::new_abstract_name(name)?,
            None => SocketAddrUnix::new(name.as_bytes())?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(Self { socket, address })
    }

    /// Tells that the daemon answers.
    ///
    /// # Errors
    /// When the supervisor is gone.
    pub fn ready(&self) -> io::Result<()> {
        self.send("READY=1", None)
    }

    /// Tells that the daemon ends because it has nothing left to do, and is not to be started again.
    ///
    /// # Errors
    /// When the supervisor is gone.
    pub fn stopping(&self) -> io::Result<()> {
        self.send("STOPPING=1", None)
    }

    /// Has the supervisor keep a copy of `descriptor` as `name`, which has no colon and no control character.
    ///
    /// # Errors
    /// When the supervisor is gone.
    pub fn store(&self, name: &str, descriptor: &OwnedFd) -> io::Result<()> {
        self.send(&format!("FDSTORE=1\nFDNAME={name}"), Some(descriptor.as_fd()))
    }

    /// Has the supervisor close its copy of what it keeps as `name`.
    ///
    /// # Errors
    /// When the supervisor is gone.
    pub fn remove(&self, name: &str) -> io::Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None)
    }

    fn send(&self, text: &str, descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.as_slice();
        if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::Error::other("a message has room for one descriptor"));
        }
        let text = [IoSlice::new(text.as_bytes())];
        // Not cut short: a datagram is sent whole or not at all.
        let sent = rustix::net::sendmsg_addr(&self.socket, &self.address, &text, &mut ancillary, SendFlags::NOSIGNAL);
        sent.map(drop).map_err(io::Error::from)
    }
}

/// Descriptors that the supervisor kept from the daemon before this one, by name.
#[derive(Debug, Default)]
pub struct Inherited {
    descriptors: BTreeMap<String, OwnedFd>,
}

impl Inherited {
    /// Takes what this process was started with. To be called once, before anything else opens descriptors.
    pub fn from_environment() -> Self {
        let variable = |name| std::env::var(name).ok();
        let is_ours = variable("LISTEN_PID").and_then(|pid| pid.parse().ok()) == Some(std::process::id());
        let count = variable("LISTEN_FDS").and_then(|count| count.parse::<usize>().ok()).unwrap_or(0);
        if !is_ours || count == 0 {
            return Self::default();
        }
        let names = variable("LISTEN_FDNAMES").unwrap_or_default();
        let mut descriptors = BTreeMap::new();
        for (number, name) in (FIRST_FD..).zip(names.split(':')).take(count.min(FDS_MAX)) {
            // SAFETY: whoever started this process says that it has passed these, and nobody here has opened them.
            let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
            // Also finds out whether it is there at all.
            if rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC).is_err() {
                std::mem::forget(descriptor);
                continue;
            }
            descriptors.insert(name.to_owned(), descriptor);
        }
        Self { descriptors }
    }

    /// Whether there is one whose name is `name` and the number of a connection.
    pub fn has(&self, name: &str) -> bool {
        self.find(name).is_some()
    }

    /// Takes the one whose name is `name` and the number of a connection; gives the number too.
    pub fn take(&mut self, name: &str) -> Option<(OwnedFd, u32)> {
        let (full, connection) = self.find(name)?;
        Some((self.descriptors.remove(&full)?, connection))
    }

    fn find(&self, name: &str) -> Option<(String, u32)> {
        self.descriptors.keys().find_map(|full| {
            let connection = connection_of(full).filter(|(prefix, _)| *prefix == name)?.1;
            Some((full.clone(), connection))
        })
    }

    /// What nobody has taken: has the supervisor forget it. Those connections end with that.
    pub fn release(self, notifier: &Notifier) {
        for (name, descriptor) in self.descriptors {
            tracing::warn!(name, "the supervisor kept a connection that belongs to no mounted image; it ends");
            if let Err(error) = notifier.remove(&name) {
                tracing::warn!(name, %error, "the supervisor still keeps it");
            }
            drop(descriptor);
        }
    }
}

/// A descriptor's name without the number of its connection, and that number.
pub(super) fn connection_of(name: &str) -> Option<(&str, u32)> {
    let (prefix, connection) = name.rsplit_once('.')?;
    Some((prefix, connection.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_carry_the_number_of_the_connection() {
        assert_eq!(connection_of("hermes.layers.57"), Some(("hermes.layers", 57)));
        assert_eq!(connection_of("hermes.layers"), None);
        let descriptor = || OwnedFd::from(std::fs::File::open("/dev/null").expect("opens"));
        let mut inherited = Inherited::default();
        inherited.descriptors.insert("hermes.tree-a.3".to_owned(), descriptor());
        inherited.descriptors.insert("stored".to_owned(), descriptor());
        assert!(inherited.has("hermes.tree-a") && !inherited.has("stored") && !inherited.has("hermes.tree"));
        assert_eq!(inherited.take("hermes.tree-a").expect("there").1, 3);
        assert!(inherited.take("hermes.tree-a").is_none());
    }

    #[test]
    fn a_process_without_a_supervisor_has_none_of_it() {
        // The test's own environment: nothing supervises it so, or it is not meant for this process.
        assert!(Inherited::from_environment().descriptors.is_empty());
    }
}
