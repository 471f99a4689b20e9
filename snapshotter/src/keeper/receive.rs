//! The supervisor's side of the notification socket.
//!
//! Only processes that can enter the state folder can send here (it is root's alone). A message that is too long, has
//! descriptors without a name, or says nothing that is known is dropped with everything in it.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};

/// Longest message; the daemon's are a tenth of it.
const MESSAGE_MAX_BYTES: usize = 1024;
/// Longest name of a descriptor (sd_pid_notify_with_fds(3)).
const NAME_MAX_BYTES: usize = 255;

/// What the daemon says.
#[derive(Debug)]
pub(super) enum Message {
    /// It answers.
    Ready,
    /// It ends for good.
    Stopping,
    /// Keep this.
    Store {
        /// Its name.
        name: String,
        /// The descriptor.
        descriptor: OwnedFd,
    },
    /// Keep what is called so no longer.
    Remove {
        /// The name.
        name: String,
    },
}

/// The socket.
#[derive(Debug)]
pub(super) struct Socket {
    socket: UnixDatagram,
}

impl Socket {
    /// Listens at `path`; what is there from a keeper before is replaced.
    ///
    /// # Errors
    /// When the folder cannot be written, or the path is too long for a socket.
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        let _ = std::fs::remove_file(path);
        let socket = UnixDatagram::bind(path)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket })
    }

    /// The next message; `None` when there is none now.
    ///
    /// # Errors
    /// When the socket breaks.
    pub(super) fn receive(&self) -> io::Result<Option<Message>> {
        loop {
            let mut bytes = [0; MESSAGE_MAX_BYTES];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let received = match rustix::net::recvmsg(&self.socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
            {
                Ok(received) => received,
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let mut descriptors = Vec::new();
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    descriptors.extend(rights);
                }
            }
            let is_cut = received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC);
            let message = std::str::from_utf8(&bytes[..received.bytes]).ok().filter(|_| !is_cut);
            match message.and_then(|text| parse(text, descriptors.pop())) {
                Some(message) => return Ok(Some(message)),
                None => tracing::debug!("a notification that is not understood was dropped"),
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn parse(text: &str, descriptor: Option<OwnedFd>) -> Option<Message> {
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let is_set = |name| value(name) == Some("1");
    let name = value("FDNAME").filter(|name| {
        let is_plain = |c: char| !c.is_control() && c != ':';
        !name.is_empty() && name.len() <= NAME_MAX_BYTES && name.chars().all(is_plain)
    });
    match (is_set("FDSTORE"), is_set("FDSTOREREMOVE")) {
        (true, _) => Some(Message::Store { name: name?.to_owned(), descriptor: descriptor? }),
        (_, true) => Some(Message::Remove { name: name?.to_owned() }),
        _ if is_set("READY") => Some(Message::Ready),
        _ if is_set("STOPPING") => Some(Message::Stopping),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Seek as _, Write as _};

    use super::*;
    use crate::keeper::notify::Notifier;

    #[test]
    fn what_the_daemon_says_arrives_with_its_descriptor() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let socket = Socket::bind(&path).expect("binds");
        let notifier = Notifier::new(path.as_os_str()).expect("a notifier");
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"the same file").expect("written");
        notifier.store("hermes.layers.7", &file.into()).expect("stored");
        notifier.ready().expect("sent");
        notifier.remove("hermes.layers.7").expect("sent");
        notifier.stopping().expect("sent");
        match socket.receive().expect("receives") {
            Some(Message::Store { name, descriptor }) => {
                assert_eq!(name, "hermes.layers.7");
                let mut text = String::new();
                let mut file = File::from(descriptor);
                file.rewind().expect("rewinds");
                file.read_to_string(&mut text).expect("reads");
                assert_eq!(text, "the same file");
            }
            other => panic!("{other:?}"),
        }
        assert!(matches!(socket.receive(), Ok(Some(Message::Ready))));
        assert!(matches!(socket.receive(), Ok(Some(Message::Remove { name })) if name == "hermes.layers.7"));
        assert!(matches!(socket.receive(), Ok(Some(Message::Stopping))));
        assert!(matches!(socket.receive(), Ok(None)));
    }

    #[test]
    fn nonsense_is_dropped() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let socket = Socket::bind(&path).expect("binds");
        let sender = UnixDatagram::unbound().expect("a socket");
        let long = format!("FDSTOREREMOVE=1\nFDNAME={}", "n".repeat(NAME_MAX_BYTES + 1));
        let huge = "READY=1\n".repeat(MESSAGE_MAX_BYTES);
        let nonsense = [
            "",
            "READY=0",
            "FDSTORE=1\nFDNAME=without",
            "FDSTOREREMOVE=1",
            "FDSTOREREMOVE=1\nFDNAME=a:b",
            &long,
            &huge,
        ];
        for text in nonsense {
            sender.send_to(text.as_bytes(), &path).expect("sent");
            assert!(matches!(socket.receive(), Ok(None)), "{text}");
        }
    }
}
