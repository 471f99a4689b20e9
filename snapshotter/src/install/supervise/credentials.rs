//! What the daemon joins with: the pod's token and the controller's roots, copied to the host when they change.
//!
//! The daemon reads both at each join, so they are written whole. The token is good for the controller alone, as long as the
//! pod is there.

use std::fs;
use std::path::{Path, PathBuf};

use hermes_files::{OWNER_ONLY, write_whole};

use super::{Membership, SuperviseError, io_error};
use crate::install::root::Root;

/// The folder below the state folder.
pub(super) const FOLDER: &str = "controller";
/// The roots, in it.
pub(super) const ROOTS: &str = "api-roots.pem";
/// The token, in it.
pub(super) const TOKEN: &str = "token";
/// Longest of the two, in bytes: some roots of a kilobyte each.
const LEN_MAX_BYTES: u64 = 256 * 1024;

/// Where they come from and go to.
#[derive(Debug)]
pub(super) struct Credentials {
    folder: PathBuf,
    pairs: [(PathBuf, PathBuf); 2],
}

impl Credentials {
    /// Those of `membership`, for the daemon with the host's folder `state`.
    pub(super) fn new(root: &Root, state: &Path, membership: &Membership) -> Self {
        let folder = root.at(&state.join(FOLDER));
        let pairs = [(membership.roots.clone(), folder.join(ROOTS)), (membership.token.clone(), folder.join(TOKEN))];
        Self { folder, pairs }
    }

    /// Copies what has changed.
    ///
    /// # Errors
    /// When one of the files cannot be read or written.
    pub(super) fn refresh(&self) -> Result<(), SuperviseError> {
        use std::os::unix::fs::DirBuilderExt as _;
        let mut folder = fs::DirBuilder::new();
        folder.recursive(true).mode(0o700).create(&self.folder).map_err(io_error("make", &self.folder))?;
        for (from, to) in &self.pairs {
            let len = fs::metadata(from).map_err(io_error("read", from))?.len();
            if len > LEN_MAX_BYTES {
                let wrong = std::io::Error::other(format!("it has {len} bytes, more than {LEN_MAX_BYTES}"));
                return Err(io_error("take", from)(wrong));
            }
            let now = fs::read(from).map_err(io_error("read", from))?;
            if fs::read(to).ok().as_ref() != Some(&now) {
                write_whole(to, OWNER_ONLY, &now).map_err(io_error("write", to))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_changes_is_copied() {
        let dir = tempfile::tempdir().expect("a folder");
        let (roots, token) = (dir.path().join("r"), dir.path().join("t"));
        fs::write(&roots, "roots").expect("written");
        fs::write(&token, "one").expect("written");
        let host = dir.path().join("host");
        fs::create_dir(&host).expect("a folder");
        let root = Root::new(&host).expect("a root");
        let membership = Membership {
            node: String::new(),
            address: [127, 0, 0, 1].into(),
            swarm_port: 1,
            metrics_port: 2,
            cluster: String::new(),
            zone: String::new(),
            controllers: Vec::new(),
            roots,
            token: token.clone(),
        };
        let credentials = Credentials::new(&root, Path::new("/var/lib/hermes"), &membership);
        credentials.refresh().expect("copied");
        let there = host.join("var/lib/hermes/controller/token");
        assert_eq!(fs::read(&there).expect("there"), b"one");
        assert_eq!(fs::metadata(&there).expect("there").permissions().mode() & 0o777, 0o600);
        fs::write(&token, "two").expect("written");
        credentials.refresh().expect("copied");
        assert_eq!(fs::read(&there).expect("there"), b"two");
        fs::remove_file(&token).expect("removed");
        assert!(credentials.refresh().expect_err("gone").to_string().contains("/t"));
        assert_eq!(fs::read(&there).expect("kept"), b"two");
    }
}
