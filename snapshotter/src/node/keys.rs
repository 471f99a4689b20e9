//! The key with which a node signs the indexes that it builds itself, and therefore trusts: its own, made when it first
//! starts, or one that the settings name, which all nodes of a fleet share so that each takes what another has signed.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use hermes_files::{OWNER_ONLY, write_whole};
use hermes_image::statement::SigningKey;

use super::NodeError;

/// A key file is 64 digits and a line's end; what is longer is something else.
const KEY_FILE_MAX_BYTES: u64 = 1024;

/// Reads the key at `path`, or makes one that only root can read.
///
/// # Errors
/// When the file cannot be read or made, or holds something else.
pub fn load_or_create(path: &Path) -> Result<SigningKey, NodeError> {
    match std::fs::read_to_string(path) {
        Ok(text) => parse(&text).ok_or_else(|| NodeError::Key { path: path.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            create(path).map_err(|source| NodeError::Io { what: "make the key", path: path.to_owned(), source })
        }
        Err(source) => Err(NodeError::Io { what: "read the key", path: path.to_owned(), source }),
    }
}

/// Reads the key at `path`, which somebody else has made, if only its owner can read it.
///
/// # Errors
/// When the file is not there, holds something else, or is open to others: whoever reads it can sign for the fleet.
pub fn load_shared(path: &Path) -> Result<SigningKey, NodeError> {
    let wrong = |reason: String| NodeError::SigningKey { path: path.to_owned(), reason };
    let read = || {
        let mut file = File::open(path)?;
        let mode = file.metadata()?.mode();
        let mut text = String::new();
        (&mut file).take(KEY_FILE_MAX_BYTES).read_to_string(&mut text)?;
        Ok((mode, text))
    };
    let (mode, text) = read().map_err(|error: io::Error| wrong(error.to_string()))?;
    if mode & 0o077 != 0 {
        let found = mode & 0o777;
        return Err(wrong(format!(
            "others can read it (mode {found:04o}); chmod 600 it, and make a new one if they did"
        )));
    }
    let reason = "it holds no key; make one with `hermes index build --key`, or from 64 random hexadecimal digits";
    parse(&text).ok_or_else(|| wrong(reason.to_owned()))
}

fn parse(text: &str) -> Option<SigningKey> {
    let mut seed = [0; 32];
    hex::decode_to_slice(text.trim(), &mut seed).ok()?;
    Some(SigningKey::from_seed(&seed))
}

fn create(path: &Path) -> io::Result<SigningKey> {
    let key = SigningKey::from_seed(&rand::random());
    // Whole or not at all: a key that is half written would be refused for ever.
    write_whole(path, OWNER_ONLY, format!("{}\n", hex::encode(key.seed())).as_bytes())?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_key_is_made_once_and_nobody_else_can_read_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("key");
        let made = load_or_create(&path).expect("made");
        assert_eq!(load_or_create(&path).expect("read").public(), made.public());
        assert_eq!(std::fs::metadata(&path).expect("there").permissions().mode() & 0o777, 0o600);
        std::fs::write(&path, "no key").expect("written");
        assert!(matches!(load_or_create(&path), Err(NodeError::Key { .. })));
    }

    #[test]
    fn a_shared_key_is_refused_when_others_can_read_it() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("key");
        let reason = |path: &Path| load_shared(path).expect_err("refused").to_string();
        assert!(reason(&path).contains("No such file"));
        let made = load_or_create(&path).expect("made");
        assert_eq!(load_shared(&path).expect("read").public(), made.public());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).expect("set");
        assert!(reason(&path).contains("0640") && reason(&path).contains("chmod 600"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("set");
        std::fs::write(&path, "zz".repeat(5000)).expect("written");
        assert!(reason(&path).contains("holds no key"));
    }
}
