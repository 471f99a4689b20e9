//! The node's own index key: what it signs when it builds an index itself, and therefore trusts.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use hermes_image::statement::SigningKey;

use super::NodeError;

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

fn parse(text: &str) -> Option<SigningKey> {
    let mut seed = [0; 32];
    hex::decode_to_slice(text.trim(), &mut seed).ok()?;
    Some(SigningKey::from_seed(&seed))
}

fn create(path: &Path) -> io::Result<SigningKey> {
    let key = SigningKey::from_seed(&rand::random());
    // Under another name first: a key that is half written would be refused for ever.
    let temporary = path.with_extension("tmp");
    let _ = std::fs::remove_file(&temporary);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
    writeln!(file, "{}", hex::encode(key.seed()))?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
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
}
