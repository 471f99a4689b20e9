//! The member list on disk, so that a node goes on from it when everything else is gone.
//!
//! One file: the newest notice of what was taken back, this node's last incarnation, and the entries of the others, with
//! a BLAKE3 hash of all of it at the end. It is written beside its place, synced and renamed, so a crash leaves the old
//! one. Nothing in it is believed when it is read: signatures and certificates are checked as if a peer had sent it.
//! Entries whose certificates have ended meanwhile still say where nodes may be.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hermes_files::{OWNER_ONLY, write_whole};
use thiserror::Error;

use super::entry::{ENTRY_LEN_MAX_BYTES, SignedEntry};
use super::table::MEMBERS_MAX;
use crate::admission::revocation::{REVOCATION_LEN_MAX_BYTES, SignedRevocation};
use crate::canonical::{DecodeError, Reader, Writer};

const MAGIC: &[u8; 8] = b"HMEMBER1";
const HASH_LEN_BYTES: usize = 32;
/// Longest file: the longest list and notice.
const FILE_LEN_MAX_BYTES: usize =
    8 + 8 + 4 + REVOCATION_LEN_MAX_BYTES + 4 + MEMBERS_MAX * (2 + ENTRY_LEN_MAX_BYTES) + HASH_LEN_BYTES;

/// A list that could not be read or written.
#[derive(Debug, Error)]
pub(crate) enum SavedError {
    #[error("cannot {doing} the member list {path}: {source}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error("the member list {path} is damaged ({reason}); it is made anew from the swarm")]
    Damaged { path: PathBuf, reason: String },
}

/// What a node knew when it ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Saved {
    /// Of this node's own last entry.
    pub(crate) incarnation: u64,
    pub(crate) notice: Option<Arc<SignedRevocation>>,
    /// The entries of others.
    pub(crate) entries: Vec<Arc<SignedEntry>>,
}

impl Saved {
    fn encode(&self) -> Vec<u8> {
        let mut out = Writer::default();
        out.bytes(MAGIC).u64(self.incarnation);
        let notice = self.notice.as_ref().map(|notice| notice.encode()).unwrap_or_default();
        out.bytes(&u32::try_from(notice.len()).expect("a notice has a limit").to_le_bytes()).bytes(&notice);
        let count = u16::try_from(self.entries.len()).expect("at most MEMBERS_MAX");
        out.u16(count);
        for signed in &self.entries {
            out.u16(u16::try_from(signed.encoded.len()).expect("an entry has a limit")).bytes(&signed.encoded);
        }
        let mut bytes = out.finish();
        let hash = blake3::hash(&bytes);
        bytes.extend_from_slice(hash.as_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let Some((body, hash)) = bytes.split_last_chunk::<HASH_LEN_BYTES>() else { return Err(DecodeError::Short) };
        if blake3::hash(body) != *hash {
            return Err(DecodeError::Field("hash"));
        }
        let mut fields = Reader::new(body);
        if fields.array::<8>()? != *MAGIC {
            return Err(DecodeError::Field("magic"));
        }
        let incarnation = fields.u64()?;
        let notice = match u32::from_le_bytes(fields.array()?) as usize {
            0 => None,
            len => Some(Arc::new(SignedRevocation::decode(fields.bytes(len)?)?)),
        };
        let count = usize::from(fields.u16()?);
        let mut entries = Vec::with_capacity(count.min(MEMBERS_MAX));
        for _ in 0..count {
            let len = usize::from(fields.u16()?);
            entries.push(Arc::new(SignedEntry::decode(fields.bytes(len)?)?));
        }
        fields.end()?;
        Ok(Self { incarnation, notice, entries })
    }

    /// Reads what was saved at `path`; nothing when there is no file. Blocks.
    ///
    /// # Errors
    /// When the file cannot be read, or is not as it was written.
    pub(crate) fn load(path: &Path) -> Result<Self, SavedError> {
        let failed = |source| SavedError::Io { doing: "read", path: path.to_owned(), source };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = Vec::new();
        file.take(FILE_LEN_MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(failed)?;
        let damaged = |reason: String| SavedError::Damaged { path: path.to_owned(), reason };
        if bytes.len() > FILE_LEN_MAX_BYTES {
            return Err(damaged(format!("it is longer than {FILE_LEN_MAX_BYTES} bytes")));
        }
        Self::decode(&bytes).map_err(|error| damaged(error.to_string()))
    }

    /// Writes it to `path`. Blocks until it is on disk.
    ///
    /// # Errors
    /// When it cannot be written; what was there stays.
    pub(crate) fn store(&self, path: &Path) -> Result<(), SavedError> {
        let written = write_whole(path, OWNER_ONLY, &self.encode());
        written.map_err(|source| SavedError::Io { doing: "write", path: path.to_owned(), source })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::entry::tests::{cluster, said};
    use super::*;

    #[test]
    fn what_was_saved_is_read_again_and_damage_is_seen() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("members");
        assert_eq!(Saved::load(&path).expect("no file is no error"), Saved::default());
        let entries = (0..3)
            .map(|no| {
                let (pair, entry) = said(no);
                Arc::new(entry.sign(&cluster(), &pair))
            })
            .collect();
        let saved = Saved { incarnation: 9, notice: None, entries };
        saved.store(&path).expect("saves");
        saved.store(&path).expect("saves again");
        assert_eq!(Saved::load(&path).expect("reads"), saved);
        let bytes = fs::read(&path).expect("reads");
        for at in (0..bytes.len()).step_by(37) {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).expect("writes");
            assert!(matches!(Saved::load(&path), Err(SavedError::Damaged { .. })), "byte {at}");
            fs::write(&path, &bytes[..at]).expect("writes");
            assert!(matches!(Saved::load(&path), Err(SavedError::Damaged { .. })), "cut at {at}");
        }
    }
}
