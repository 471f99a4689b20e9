//! What is wrong with a node, in plain words, and what to do about each thing: `hermes doctor`.
//!
//! Every check does what it speaks of (it mounts, punches a hole, reads a range) instead of trusting a version number,
//! except where only the version tells; each ends by a deadline of its own. What checks make, they make in a folder of
//! their own beside the store, which they remove. Nothing is changed.

mod clock;
mod host;
mod kernel;
mod registry;
mod store;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use crate::install::check::{Finding, Verdict};
use crate::install::root::Root;

/// The longest that one check of this machine may take.
const LOCAL_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest that the registry's checks may take, after which none of its answers came in time.
const REGISTRY_TIMEOUT: Duration = Duration::from_secs(60);

/// What to examine.
#[derive(Debug, Clone)]
pub struct Examination {
    /// The daemon's state folder.
    pub state: PathBuf,
    /// The host's root.
    pub root: Root,
    /// A containerd to ask instead of the host's.
    pub containerd: Option<PathBuf>,
    /// An image whose registry is tried.
    pub image: Option<String>,
    /// Its platform; this machine's when absent.
    pub platform: Option<String>,
    /// Speak plain HTTP to the registry.
    pub plain_http: bool,
}

/// Examines the node. Findings come in the order in which one should read them.
///
/// Cancel safe, but probes under way leave their scratch folder behind.
pub async fn examine(this: &Examination) -> Vec<Finding> {
    let mut findings = vec![host::root(), kernel::version(), kernel::fuse_timeout()];
    findings.extend(in_scratch(&this.state).await);
    findings.extend(within("clock", LOCAL_TIMEOUT, async { vec![clock::synchronised()] }).await);
    findings.extend(within("daemon", LOCAL_TIMEOUT, host::daemon(&this.state)).await);
    findings.extend(within("containerd", LOCAL_TIMEOUT, host::containerd(&this.root, this.containerd.clone())).await);
    if let Some(image) = &this.image {
        let tried = registry::image(image, this.platform.as_deref(), this.plain_http);
        findings.extend(within("registry", REGISTRY_TIMEOUT, tried).await);
    }
    findings
}

/// What needs a folder beside the store.
async fn in_scratch(state: &Path) -> Vec<Finding> {
    let folder = existing(state);
    let probed = tokio::task::spawn_blocking({
        let folder = folder.clone();
        move || {
            let mut findings = store::folder(&folder);
            match Scratch::new(&folder) {
                Ok(scratch) => {
                    findings.push(store::punch_hole(&scratch.path));
                    findings.extend(kernel::mounts(&scratch.path));
                }
                Err(error) => {
                    let next = "run it as root; the file system must be writable";
                    findings.push(Finding::fail(
                        "store",
                        format!("cannot write in {}: {error}", folder.display()),
                        next,
                    ));
                }
            }
            findings
        }
    });
    let what = "store and mounts";
    within(what, LOCAL_TIMEOUT, async move {
        let ended = |_| vec![Finding::fail(what, "the probe ended early", "report this as a bug")];
        probed.await.unwrap_or_else(ended)
    })
    .await
}

/// `path`, or the nearest folder above it that is there.
fn existing(path: &Path) -> PathBuf {
    path.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/")).to_owned()
}

/// Findings of `check`, or that it took too long.
async fn within(what: &'static str, limit: Duration, check: impl Future<Output = Vec<Finding>>) -> Vec<Finding> {
    tokio::time::timeout(limit, check).await.unwrap_or_else(|_| {
        let seen = format!("no answer within {} s", limit.as_secs());
        vec![Finding::fail(what, seen, "see `dmesg` for a disk or mount that hangs, and try again")]
    })
}

/// A folder that is removed with what is in it.
#[derive(Debug)]
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new(beside: &Path) -> std::io::Result<Self> {
        let path = beside.join(format!(".hermes-doctor-{}", std::process::id()));
        crate::node::private_folder(&path)?;
        Ok(Self { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Mounts have owners that are gone by now; should one be left, nothing is removed through it.
        if crate::mounts::below(&self.path).is_ok_and(|left| left.is_empty())
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a scratch folder");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_check_that_hangs_is_a_finding() {
        let hanging = within("thing", Duration::from_millis(20), std::future::pending()).await;
        assert_eq!(hanging.len(), 1);
        assert_eq!((hanging[0].what, hanging[0].verdict), ("thing", Verdict::Fail));
    }

    #[tokio::test]
    async fn a_store_that_is_not_there_yet_is_examined_where_it_would_be_and_nothing_stays() {
        let dir = tempfile::tempdir().expect("a folder");
        let findings = in_scratch(&dir.path().join("not/there/yet")).await;
        assert!(
            findings.iter().any(|finding| finding.what == "holes" && finding.verdict == Verdict::Ok),
            "{findings:?}"
        );
        assert_eq!(std::fs::read_dir(dir.path()).expect("the folder").count(), 0);
    }
}
