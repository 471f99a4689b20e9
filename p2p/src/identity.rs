//! The node's Ed25519 key, which is its name in the swarm.
//!
//! The key is made once and kept in a file that only its owner may read, so that a restart keeps the `PeerId`: records
//! and grants of other nodes stay valid. The file holds the libp2p protobuf encoding of the private key (68 bytes).
//!
//! A key is written to a file beside its place and linked there when it is on disk. So a crash leaves no half key, at
//! most a file that ends in `.new`; and of two processes that start at once, both use the key that came first.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use libp2p::identity::{KeyType, Keypair};
use thiserror::Error;

/// Longest key file, in bytes. An Ed25519 key has 68.
const KEY_LEN_MAX_BYTES: u64 = 256;
/// Owner may read and write, nobody else anything.
const KEY_MODE: u32 = 0o600;

/// A key that cannot be used.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// The file cannot be read or written.
    #[error("cannot {doing} the node key {path}")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// Others may read the key.
    #[error("the node key {path} has mode {mode:04o}, so others can read it; delete it, or chmod 600 if you trust it")]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file holds something else.
    #[error("{path} holds no Ed25519 node key; delete it to get a new identity")]
    Malformed {
        /// The file.
        path: PathBuf,
    },
}

/// Reads the key at `path`, or makes one there when there is none.
///
/// # Errors
/// When the file cannot be read or made, is readable by others, or holds no Ed25519 key.
pub fn load_or_create(path: &Path) -> Result<Keypair, IdentityError> {
    match load(path) {
        Err(IdentityError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            create(path)?;
            load(path)
        }
        result => result,
    }
}

/// What stands before the 32 bytes of a seed in the PKCS #8 form of an Ed25519 key (RFC 8410, section 7).
const PKCS8_HEAD: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// The key as PKCS #8 in DER, for TLS: a node shows its controller the same key that its name is made of. `None` when it
/// is no Ed25519 key, as no node's is.
///
/// Each protocol signs in a domain of its own (TLS 1.3: RFC 8446, section 4.4.3; Noise: its static keys after a prefix;
/// the swarm's documents), so that no signature is good in another.
pub fn pkcs8(key: &Keypair) -> Option<Vec<u8>> {
    let secret = key.clone().try_into_ed25519().ok()?.secret();
    let seed: &[u8; 32] = secret.as_ref().try_into().ok()?;
    Some(pkcs8_of_seed(seed))
}

/// The same of the key of this seed.
pub fn pkcs8_of_seed(seed: &[u8; 32]) -> Vec<u8> {
    [PKCS8_HEAD.as_slice(), seed].concat()
}

fn load(path: &Path) -> Result<Keypair, IdentityError> {
    let failed = |doing| move |source| IdentityError::Io { doing, path: path.to_owned(), source };
    let file = File::open(path).map_err(failed("open"))?;
    let mode = file.metadata().map_err(failed("inspect"))?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(IdentityError::Exposed { path: path.to_owned(), mode });
    }
    let mut bytes = Vec::new();
    file.take(KEY_LEN_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed("read"))?;
    let key = Keypair::from_protobuf_encoding(&bytes).ok().filter(|key| key.key_type() == KeyType::Ed25519);
    key.ok_or_else(|| IdentityError::Malformed { path: path.to_owned() })
}

fn create(path: &Path) -> Result<(), IdentityError> {
    let failed = |doing| move |source| IdentityError::Io { doing, path: path.to_owned(), source };
    let Ok(encoded) = Keypair::generate_ed25519().to_protobuf_encoding() else {
        return Err(IdentityError::Malformed { path: path.to_owned() });
    };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.{:08x}.new", std::process::id(), rand::random::<u32>()));
    let fresh = path.with_file_name(name);
    let made = write_new(&fresh, &encoded).and_then(|()| match fs::hard_link(&fresh, path) {
        // Another process was quicker: its key is the one.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    });
    let removed = fs::remove_file(&fresh);
    made.map_err(failed("create"))?;
    removed.map_err(failed("clean up after"))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed("sync the folder of"))
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(KEY_MODE).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_is_made_once_for_its_owner_only() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("node.key");
        let first = load_or_create(&path).expect("makes a key");
        let second = load_or_create(&path).expect("reads the key");
        assert_eq!(first.public(), second.public());
        assert_eq!(fs::metadata(&path).expect("is there").permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(folder.path()).expect("lists").count(), 1, "something was left behind");
    }

    #[test]
    fn many_that_start_at_once_get_one_key() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("node.key");
        let keys: Vec<_> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8).map(|_| scope.spawn(|| load_or_create(&path).expect("a key"))).collect();
            starts.into_iter().map(|start| start.join().expect("no panic").public()).collect()
        });
        assert!(keys.iter().all(|key| *key == keys[0]));
    }

    #[test]
    fn an_exposed_or_broken_key_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("node.key");
        load_or_create(&path).expect("makes a key");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("changes the mode");
        assert!(matches!(load_or_create(&path), Err(IdentityError::Exposed { mode: 0o640, .. })));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("changes the mode");
        fs::write(&path, vec![7; 10_000]).expect("overwrites");
        assert!(matches!(load_or_create(&path), Err(IdentityError::Malformed { .. })));
        let missing = folder.path().join("no/such/folder/node.key");
        assert!(matches!(load_or_create(&missing), Err(IdentityError::Io { .. })));
    }
}
