//! Writes down what the policy is told and asks for, for `hermes simulate replay`.
//!
//! A thread of its own writes the lines, so that deciding never waits for a disk. When it falls too far behind, cannot write
//! or has written [`RECORD_MAX_BYTES`], the record ends there and the log says so: one with a gap would be of no use. What
//! a daemon that is killed leaves ends within the last line, at worst.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};

use hermes_policy::record::{Entry, Header};

/// Entries that wait to be written. Few have more than some hundred bytes.
const WAITING_MAX: usize = 16 * 1024;
/// Longest record: an hour of a busy node, or some ten thousand starts.
const RECORD_MAX_BYTES: u64 = 4 << 30;

/// A record under way.
#[derive(Debug)]
pub(super) struct Recorder {
    /// `None` when the record has ended early.
    entries: Option<SyncSender<Entry>>,
    path: PathBuf,
}

impl Recorder {
    /// Begins a record in the file `path`; what stood there is gone.
    pub(super) fn start(path: &Path, header: &Header) -> io::Result<Self> {
        let mut lines = Lines { file: BufWriter::new(File::create(path)?), written_bytes: 0 };
        lines.write(header)?;
        let (entries, queue) = sync_channel(WAITING_MAX);
        let at = path.to_owned();
        let write = move || match lines.write_all(&queue) {
            Ok(()) => {}
            Err(error) => tracing::warn!(path = %at.display(), %error, "the record of decisions ends here"),
        };
        std::thread::Builder::new().name("record".to_owned()).spawn(write)?;
        Ok(Self { entries: Some(entries), path: path.to_owned() })
    }

    /// Whether anything is still written.
    pub(super) fn is_going(&self) -> bool {
        self.entries.is_some()
    }

    /// Adds to it.
    pub(super) fn note(&mut self, entry: Entry) {
        let Some(entries) = &self.entries else { return };
        let failed = match entries.try_send(entry) {
            Ok(()) => return,
            Err(TrySendError::Full(_)) => "decisions come faster than they are written",
            // The thread has said why.
            Err(TrySendError::Disconnected(_)) => "it is not written any more",
        };
        tracing::warn!(path = %self.path.display(), failed, "the record of decisions ends here");
        self.entries = None;
    }
}

struct Lines {
    file: BufWriter<File>,
    written_bytes: u64,
}

impl Lines {
    fn write(&mut self, line: &impl serde::Serialize) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(line)?;
        bytes.push(b'\n');
        self.written_bytes += bytes.len() as u64;
        if self.written_bytes > RECORD_MAX_BYTES {
            return Err(io::Error::other(format!("it has {} GiB", RECORD_MAX_BYTES >> 30)));
        }
        self.file.write_all(&bytes)
    }

    /// Writes what comes until nobody sends any more; nothing stays in memory while nothing comes.
    fn write_all(&mut self, queue: &Receiver<Entry>) -> io::Result<()> {
        loop {
            let entry = match queue.try_recv() {
                Ok(entry) => entry,
                Err(TryRecvError::Empty) => {
                    self.file.flush()?;
                    match queue.recv() {
                        Ok(entry) => entry,
                        Err(_) => return Ok(()),
                    }
                }
                Err(TryRecvError::Disconnected) => return self.file.flush(),
            };
            self.write(&entry)?;
        }
    }
}
