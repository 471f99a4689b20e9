//! The keys that sign indexes.
//!
//! A [`KeySet`] holds the keys of one controller, oldest first. The newest is the one whose signature stands first; older
//! ones sign beside it until they retire, so that whoever knows only one of them takes every index during an exchange.
//! All that have not retired are trusted, by nodes as by the controller itself, which opens with them what it has kept.
//!
//! ```text
//! new -> rotate -> (both sign, both are trusted, for the overlap) -> retire -> what one of them signed alone is refused
//! ```
//!
//! A set is one document: a file of its owner's alone ([`KeySet::load_or_make`]), or the content of a Kubernetes Secret.
//! Whoever reads it can sign for the cluster; nothing prints it. A crash in a rotation leaves the set before or after it.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hermes_files::{OWNER_ONLY, write_whole};
use hermes_image::statement::{PublicKey, SigningKey, Statement, sign_text};
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::{Zeroize as _, Zeroizing};

use crate::event::UnixMillis;

/// Keys of a set at once: fewer than the signatures that a reader looks at (8).
pub const KEYS_MAX: usize = 4;
/// How long a key that was succeeded stays trusted unless told otherwise: long enough for every node to have been
/// connected once, and for people to carry a key to nodes that have no controller.
pub const OVERLAP: Duration = Duration::from_secs(7 * 24 * 3600);
/// Longest document that is read: four keys take 500 bytes.
const DOCUMENT_LEN_MAX_BYTES: u64 = 16 * 1024;
/// The format of the document.
const FORMAT: u32 = 1;

/// A set of keys that cannot be had.
#[derive(Debug, Error)]
pub enum SigningError {
    /// The file system refused.
    #[error("cannot {action} the signing keys {}: {source}; check the folder and its owner", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Others can read the file.
    #[error("others can read the signing keys {} (mode {mode:04o}); chmod 600 it, and rotate them if they did", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Not a document of keys. What it holds is not shown.
    #[error(
        "the document of signing keys is malformed: {0}; restore it from a backup, or remove it to begin with a new key"
    )]
    Malformed(&'static str),
    /// There are as many keys as there may be.
    #[error("{KEYS_MAX} signing keys have not retired yet; wait until the oldest has")]
    TooMany,
}

/// One key.
#[derive(Debug)]
struct Key {
    secret: SigningKey,
    made: UnixMillis,
    /// When it stops being used; never for the newest.
    retires: Option<UnixMillis>,
}

/// What is known of a key, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyInfo {
    /// The key that checks its signatures.
    pub public: PublicKey,
    /// When it was made.
    pub made: UnixMillis,
    /// When it retires; `None` for the newest.
    pub retires: Option<UnixMillis>,
}

/// The keys of one controller. Never empty.
#[derive(Debug)]
pub struct KeySet {
    /// Oldest first.
    keys: Vec<Key>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: u32,
    keys: Vec<KeyDocument>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyDocument {
    seed: String,
    made_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    retires_ms: Option<u64>,
}

impl Drop for KeyDocument {
    fn drop(&mut self) {
        self.seed.zeroize();
    }
}

impl KeySet {
    /// One new key.
    pub fn new(now: UnixMillis) -> Self {
        Self { keys: vec![Key::make(now)] }
    }

    /// Makes a new key; those before it retire after `overlap`, or earlier if that was said before.
    ///
    /// # Errors
    /// When there are [`KEYS_MAX`] keys already.
    pub fn rotate(&mut self, now: UnixMillis, overlap: Duration) -> Result<PublicKey, SigningError> {
        if self.keys.len() >= KEYS_MAX {
            return Err(SigningError::TooMany);
        }
        let retires = UnixMillis(now.0.saturating_add(u64::try_from(overlap.as_millis()).unwrap_or(u64::MAX)));
        for key in &mut self.keys {
            key.retires = Some(key.retires.map_or(retires, |earlier| earlier.min(retires)));
        }
        self.keys.push(Key::make(now));
        Ok(self.newest().public())
    }

    /// Gives up the keys whose time has come. Whether there were any.
    pub fn retire(&mut self, now: UnixMillis) -> bool {
        let before = self.keys.len();
        self.keys.retain(|key| key.retires.is_none_or(|retires| retires > now));
        self.keys.len() != before
    }

    /// The keys to trust, newest first.
    pub fn public_keys(&self) -> Vec<PublicKey> {
        self.keys.iter().rev().map(|key| key.secret.public()).collect()
    }

    /// What is known of each key, newest first.
    pub fn list(&self) -> Vec<KeyInfo> {
        let info = |key: &Key| KeyInfo { public: key.secret.public(), made: key.made, retires: key.retires };
        self.keys.iter().rev().map(info).collect()
    }

    fn newest(&self) -> &SigningKey {
        &self.keys.last().expect("a set is never empty").secret
    }

    fn newest_first(&self) -> Vec<&SigningKey> {
        self.keys.iter().rev().map(|key| &key.secret).collect()
    }

    /// Signs an index, the newest key first.
    pub fn sign(&self, statement: &Statement) -> Vec<u8> {
        statement.signed_by(&self.newest_first())
    }

    /// Signs a document of the controller's own, of the kind `domain`.
    pub fn sign_text(&self, domain: &[u8], text: String) -> Vec<u8> {
        sign_text(&self.newest_first(), domain, text)
    }

    /// For safekeeping: everything that is secret about it.
    pub fn to_document(&self) -> Zeroizing<String> {
        let keys = self.keys.iter().map(|key| KeyDocument {
            seed: hex::encode(key.secret.seed()),
            made_ms: key.made.0,
            retires_ms: key.retires.map(|retires| retires.0),
        });
        let document = Document { format: FORMAT, keys: keys.collect() };
        Zeroizing::new(serde_json::to_string(&document).expect("texts and numbers only"))
    }

    /// The set of a document.
    ///
    /// # Errors
    /// When it is none, or of a later version.
    pub fn from_document(document: &str) -> Result<Self, SigningError> {
        if document.len() as u64 > DOCUMENT_LEN_MAX_BYTES {
            return Err(SigningError::Malformed("it is too long"));
        }
        let parsed: Document =
            serde_json::from_str(document).map_err(|_| SigningError::Malformed("it is not the JSON expected"))?;
        if parsed.format != FORMAT {
            return Err(SigningError::Malformed("it is of a later version"));
        }
        if parsed.keys.is_empty() || parsed.keys.len() > KEYS_MAX {
            return Err(SigningError::Malformed("it has no keys, or too many"));
        }
        let keys = parsed.keys.iter().map(|key| {
            let mut seed = Zeroizing::new([0_u8; 32]);
            hex::decode_to_slice(key.seed.as_bytes(), seed.as_mut_slice())
                .map_err(|_| SigningError::Malformed("a key is not 64 hexadecimal digits"))?;
            let secret = SigningKey::from_seed(&seed);
            Ok(Key { secret, made: UnixMillis(key.made_ms), retires: key.retires_ms.map(UnixMillis) })
        });
        let keys = keys.collect::<Result<Vec<_>, SigningError>>()?;
        if keys.last().is_some_and(|newest| newest.retires.is_some()) {
            return Err(SigningError::Malformed("its newest key retires"));
        }
        Ok(Self { keys })
    }

    /// The set in the file `path`; a new one is made and written when there is none.
    ///
    /// # Errors
    /// When the file cannot be read or written, holds something else, or is open to others.
    pub fn load_or_make(path: &Path, now: UnixMillis) -> Result<Self, SigningError> {
        match Self::load(path) {
            Err(SigningError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                let made = Self::new(now);
                made.save(path)?;
                Ok(made)
            }
            other => other,
        }
    }

    /// The set in the file `path`.
    ///
    /// # Errors
    /// When the file is not there or cannot be read, holds something else, or is open to others.
    pub fn load(path: &Path) -> Result<Self, SigningError> {
        let failed = |source| SigningError::Io { action: "read", path: path.to_owned(), source };
        let mut file = File::open(path).map_err(failed)?;
        let mode = file.metadata().map_err(failed)?.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(SigningError::Open { path: path.to_owned(), mode });
        }
        let mut text = Zeroizing::new(String::new());
        (&mut file).take(DOCUMENT_LEN_MAX_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
        Self::from_document(&text)
    }

    /// Writes the set to the file `path`, whole, for its owner alone.
    ///
    /// # Errors
    /// When it cannot be written; what was there stays.
    pub fn save(&self, path: &Path) -> Result<(), SigningError> {
        let failed = |source| SigningError::Io { action: "write", path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        write_whole(path, OWNER_ONLY, self.to_document().as_bytes()).map_err(failed)
    }
}

impl Key {
    fn make(now: UnixMillis) -> Self {
        let seed = Zeroizing::new(rand::random::<[u8; 32]>());
        Self { secret: SigningKey::from_seed(&seed), made: now, retires: None }
    }
}

/// The set that is in use, for everybody who signs or checks. Cheap to clone; clones share it.
#[derive(Debug, Clone)]
pub struct Keys(Arc<RwLock<KeySet>>);

impl Keys {
    /// Puts `set` to use.
    pub fn new(set: KeySet) -> Self {
        Self(Arc::new(RwLock::new(set)))
    }

    /// Puts another set to use.
    pub fn replace(&self, set: KeySet) {
        *self.0.write() = set;
    }

    /// The keys to trust, newest first.
    pub fn public_keys(&self) -> Vec<PublicKey> {
        self.0.read().public_keys()
    }

    /// See [`KeySet::sign`].
    pub fn sign(&self, statement: &Statement) -> Vec<u8> {
        self.0.read().sign(statement)
    }

    /// See [`KeySet::sign_text`].
    pub fn sign_text(&self, domain: &[u8], text: String) -> Vec<u8> {
        self.0.read().sign_text(domain, text)
    }

    /// Whether `signers` of something are all the keys that would sign it now, in their order.
    pub fn would_sign_as(&self, signers: &[PublicKey]) -> bool {
        self.0.read().public_keys() == signers
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use hermes_image::ids::Digest;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn statement() -> Statement {
        Statement::new(Digest([9; 32]), "linux/amd64".to_owned(), Vec::new())
    }

    #[test]
    fn keys_are_exchanged_without_a_gap() {
        let mut set = KeySet::new(UnixMillis(0));
        let first = set.public_keys()[0];
        let before = set.sign(&statement());
        let second = set.rotate(UnixMillis(1000), HOUR).expect("room");
        assert_eq!(set.public_keys(), [second, first]);
        let during = set.sign(&statement());
        for trusted in [first, second] {
            assert!(Statement::open(&during, Digest([9; 32]), &[trusted]).is_ok(), "{trusted}");
        }
        assert!(Statement::open(&before, Digest([9; 32]), &set.public_keys()).is_ok());
        assert!(!set.retire(UnixMillis(3_600_999)));
        assert!(set.retire(UnixMillis(3_601_000)));
        assert_eq!(set.public_keys(), [second]);
        assert!(Statement::open(&before, Digest([9; 32]), &set.public_keys()).is_err());
        assert!(Statement::open(&during, Digest([9; 32]), &set.public_keys()).is_ok());
        assert!(!set.retire(UnixMillis(u64::MAX)), "the newest never retires");
    }

    #[test]
    fn keys_are_bounded_and_a_second_rotation_delays_nobodys_retirement() {
        let mut set = KeySet::new(UnixMillis(0));
        for turn in 1..KEYS_MAX as u64 {
            set.rotate(UnixMillis(turn), HOUR).expect("room");
        }
        assert!(matches!(set.rotate(UnixMillis(9), HOUR), Err(SigningError::TooMany)));
        let retires: Vec<_> = set.list().iter().rev().filter_map(|key| key.retires).collect();
        assert_eq!(retires, [UnixMillis(3_600_001), UnixMillis(3_600_002), UnixMillis(3_600_003)]);
    }

    #[test]
    fn documents_round_trip_and_others_are_refused_without_showing_them() {
        let mut set = KeySet::new(UnixMillis(5));
        set.rotate(UnixMillis(6), HOUR).expect("room");
        let document = set.to_document();
        assert_eq!(KeySet::from_document(&document).expect("its own").list(), set.list());
        let seed = hex::encode(set.newest().seed());
        assert!(!format!("{set:?}").contains(&seed));
        let cases = [
            document.replace(&seed, &format!("{}zz", &seed[2..])),
            document.replace("\"format\":1", "\"format\":2"),
            "{\"format\":1,\"keys\":[]}".to_owned(),
            " ".repeat(DOCUMENT_LEN_MAX_BYTES as usize + 1),
            document[..document.len() - 2].to_owned(),
        ];
        for malformed in cases {
            let error = KeySet::from_document(&malformed).expect_err("refused").to_string();
            assert!(!error.contains(&seed[2..]), "{error}");
        }
    }

    #[test]
    fn files_are_of_their_owner_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("state/signing-keys.json");
        let made = KeySet::load_or_make(&path, UnixMillis(1)).expect("made");
        assert_eq!(KeySet::load_or_make(&path, UnixMillis(2)).expect("read").list(), made.list());
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("changed");
        assert!(matches!(KeySet::load_or_make(&path, UnixMillis(2)), Err(SigningError::Open { mode: 0o644, .. })));
    }
}
