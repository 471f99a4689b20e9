//! How the commands talk to a node's daemon: JSON lines over a unix socket that only root can open.
//!
//! A client writes one [`Request`] line; the daemon answers with any number of [`Answer::Progress`] lines and one last
//! line of another kind. One request a connection, so a client that goes away cancels just its own.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use crate::mounts::users::TreeUse;
use crate::status::{ImageTrace, MemberStatus, NodeStatus, PeerDetail, ProfileReport, WaitingRead, Way};

/// Longest line either way, in bytes: the status of a thousand mounted images.
const LINE_LEN_MAX_BYTES: u64 = 4 << 20;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Mount an image.
    Mount(MountRequest),
    /// Unmount what is mounted at a folder.
    Unmount {
        /// The folder.
        dir: PathBuf,
    },
    /// Fetch what is missing of a mounted image.
    Complete {
        /// The image, as the user named it when it was mounted.
        image: String,
        /// Or where it is mounted.
        dir: PathBuf,
    },
    /// Pause completing images in the background, or go on with it.
    PauseCompletion {
        /// Pause it.
        paused: bool,
    },
    /// Tell how things stand.
    Status,
    /// Tell which reads wait, for what, and who is asked.
    Waiting,
    /// Tell who was asked for an image's chunks, when and why.
    Trace {
        /// The image, as the user named it when it was mounted.
        image: String,
        /// Or where it is mounted.
        dir: PathBuf,
    },
    /// Tell what starts of an image read.
    Profile {
        /// The image, as the user named it, or its digest.
        image: String,
        /// Or where it is mounted.
        dir: PathBuf,
        /// With the names of files, which walks the whole tree.
        files: bool,
    },
    /// Take a profile of an image that somebody else has made.
    ImportProfile {
        /// The image, as the user named it, or its digest.
        image: String,
        /// Or where it is mounted.
        dir: PathBuf,
        /// The profile, in hexadecimal digits.
        profile: String,
    },
    /// Tell what is known of each peer.
    Peers,
    /// Change the log's filter.
    LogLevel {
        /// A level, or a filter in the syntax of `HERMES_LOG`.
        filter: String,
    },
    /// Tell who the members of the swarm are.
    Members,
    /// Take the certificates of a member back.
    RevokeMember {
        /// Its PeerId.
        peer: String,
    },
    /// Tell the members that this node is about to leave, or that it stays.
    DrainMember {
        /// It is about to leave.
        drain: bool,
    },
    /// Tell which trees are in use.
    Drain {
        /// Unmount those that are not.
        unmount: bool,
    },
    /// Unmount everything and end.
    Shutdown,
}

/// What to mount, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRequest {
    /// A registry reference, or `oci:PATH[:TAG]`.
    pub image: String,
    /// An empty folder.
    pub dir: PathBuf,
    /// `os/architecture[/variant]`; the node's own when absent.
    pub platform: Option<String>,
    /// Speak plain HTTP to the registry, also when it is not on loopback.
    pub plain_http: bool,
    /// Peers to ask, as addresses or `host:port`.
    pub peers: Vec<String>,
    /// Folders of indexes to look in, beside the node's own.
    pub index_folders: Vec<PathBuf>,
    /// Keys whose index statements are accepted, beside the node's own.
    pub trusted_keys: Vec<String>,
    /// Build the index here when nobody has one.
    pub build_missing_index: bool,
    /// Show the tree this way; the best that works when absent.
    pub way: Option<Way>,
}

/// What the daemon answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// Under way.
    Progress {
        /// What is being done.
        step: String,
        /// How much of it is done, in bytes.
        done_bytes: u64,
        /// How much there is to do, in bytes; 0 when unknown.
        total_bytes: u64,
    },
    /// An image is mounted.
    Mounted {
        /// The folder.
        dir: PathBuf,
        /// How the tree is shown.
        way: Way,
        /// Why not in a better way, if so.
        detail: String,
    },
    /// Done, with nothing to say.
    Done,
    /// How things stand.
    Status(Box<NodeStatus>),
    /// The reads that wait.
    Waiting {
        /// The longest first; a thousand of them at most.
        reads: Vec<WaitingRead>,
    },
    /// Who was asked for an image's chunks.
    Trace(Box<ImageTrace>),
    /// What starts of an image read.
    Profile(Box<ProfileReport>),
    /// The peers.
    Peers {
        /// Each of them, this node not among them.
        peers: Vec<PeerDetail>,
    },
    /// The members of the swarm.
    Members {
        /// Changes whenever somebody joins, leaves, drains or is suspected; the same on all nodes that agree.
        epoch: u64,
        /// Each of them, this node among them.
        members: Vec<MemberStatus>,
    },
    /// Which trees are in use; those that were not may be unmounted.
    Drained {
        /// Each use.
        in_use: Vec<TreeUse>,
    },
    /// It failed.
    Failed(Failure),
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// One line, with what to do.
    pub message: String,
    /// Which class of failure, for the exit code.
    pub class: FailureClass,
}

/// Classes of failure; each has its own exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureClass {
    /// The request itself is wrong.
    Usage,
    /// The image, platform or index does not exist.
    NotFound,
    /// Credentials or privileges are missing.
    Denied,
    /// A registry or a peer does not answer.
    Unreachable,
    /// Bytes are not what their name says.
    Corrupt,
    /// This machine lacks something: FUSE, disk space, a free mount point.
    Local,
}

impl FailureClass {
    /// The exit code of a command that fails so. 1 is left for what nobody foresaw, 2 for what clap refuses.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Denied => 4,
            Self::Unreachable => 5,
            Self::Corrupt => 6,
            Self::Local => 7,
        }
    }
}

/// The daemon could not be asked.
#[derive(Debug, Error)]
pub enum ControlError {
    /// Nobody listens.
    #[error("no hermes node runs with state folder {}: {source}", state.display())]
    NotRunning {
        /// The state folder.
        state: PathBuf,
        /// What connecting said.
        source: io::Error,
    },
    /// The socket is there, and not for this user.
    #[error("only root may talk to the hermes node with state folder {}; run it with sudo", state.display())]
    Denied {
        /// The state folder.
        state: PathBuf,
    },
    /// The connection broke.
    #[error("the hermes node went away before it answered: {0}")]
    Broken(#[source] io::Error),
    /// The other side speaks another language.
    #[error("the hermes node answers in a way that this version does not know: {0}; use the same version of both")]
    Malformed(#[source] serde_json::Error),
    /// It ended without an answer.
    #[error("the hermes node ended without an answer; its log says why")]
    NoAnswer,
}

/// Where the daemon of a state folder listens.
pub fn socket_path(state: &Path) -> PathBuf {
    state.join("control.sock")
}

/// Sends `request` to the daemon of `state`; `progress` sees what comes before the last answer.
///
/// Not cancel safe: dropping it withdraws the request, which may be half done.
///
/// # Errors
/// When the daemon cannot be asked. A request that failed is an [`Answer::Failed`].
pub async fn ask(state: &Path, request: &Request, mut progress: impl FnMut(&Answer)) -> Result<Answer, ControlError> {
    let stream = UnixStream::connect(socket_path(state)).await.map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => ControlError::Denied { state: state.to_owned() },
        _ => ControlError::NotRunning { state: state.to_owned(), source },
    })?;
    let (read, mut write) = stream.into_split();
    write_line(&mut write, request).await.map_err(ControlError::Broken)?;
    let mut read = BufReader::new(read);
    loop {
        let line = read_line(&mut read).await.map_err(ControlError::Broken)?.ok_or(ControlError::NoAnswer)?;
        let answer: Answer = serde_json::from_str(&line).map_err(ControlError::Malformed)?;
        match answer {
            Answer::Progress { .. } => progress(&answer),
            last => return Ok(last),
        }
    }
}

/// Writes one line.
pub(crate) async fn write_line<W: tokio::io::AsyncWrite + Unpin>(
    write: &mut W,
    value: &impl Serialize,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    write.write_all(&line).await
}

/// Reads one line; `None` at the end.
pub(crate) async fn read_line<R: tokio::io::AsyncRead + Unpin>(read: &mut BufReader<R>) -> io::Result<Option<String>> {
    let mut line = String::new();
    let len = read.take(LINE_LEN_MAX_BYTES).read_line(&mut line).await?;
    match (len, line.ends_with('\n')) {
        (0, _) => Ok(None),
        (_, true) => Ok(Some(line)),
        (_, false) => Err(io::Error::new(io::ErrorKind::InvalidData, "a line without an end")),
    }
}
