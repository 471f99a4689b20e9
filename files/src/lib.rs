//! Files that are there whole or not at all, also after a power cut: what nodes, members and the controller write down.
//!
//! The bytes go beside their place, to the disk, and then to their name; the folder is synced last, so that the name is
//! durable when the call returns. A crash leaves what was there before, and perhaps a file beside it, named after the
//! process, which nobody reads.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Mode of a file that only its owner may read.
pub const OWNER_ONLY: u32 = 0o600;
/// Mode of a file that everybody may read.
pub const READABLE: u32 = 0o644;

/// Writes `bytes` to `path` with `mode`, whose folder exists, in the place of what was there. One at a time for one path.
///
/// # Errors
/// When the file system refuses; what was there stays.
pub fn write_whole(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".new{}", std::process::id()));
    let beside = path.with_file_name(name);
    // What a process of the same number has left may have another mode.
    let _ = fs::remove_file(&beside);
    let mut file = File::options().write(true).create_new(true).mode(mode).open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_file_is_replaced_with_its_mode_and_nothing_stays_beside_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file.txt");
        for (mode, text) in [(READABLE, "first"), (OWNER_ONLY, "second, longer"), (OWNER_ONLY, "third")] {
            write_whole(&path, mode, text.as_bytes()).expect("written");
            assert_eq!(fs::read_to_string(&path).expect("reads"), text);
            // The umask may take rights away, and gives none.
            assert_eq!(fs::metadata(&path).expect("there").permissions().mode() & 0o777 & !mode, 0);
        }
        assert_eq!(fs::read_dir(folder.path()).expect("lists").count(), 1);
        assert!(write_whole(&folder.path().join("missing/file"), OWNER_ONLY, b"").is_err());
    }
}
