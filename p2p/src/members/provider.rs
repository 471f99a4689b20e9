//! Where a node looks for members that it has not heard of: a file, or a name.
//!
//! A provider gives addresses, not members. Who is there becomes a member by what it says itself, once there is a
//! connection; so a file that is old or wrong can neither add a node that is not there nor remove one that is.

use std::collections::BTreeSet;
use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use libp2p::{Multiaddr, PeerId};
use serde::Deserialize;
use thiserror::Error;

use super::table::MEMBERS_MAX;
use crate::address::{PeerAddress, multiaddr_of};

/// How often a file is looked at.
const FILE_EVERY: Duration = Duration::from_secs(5);
/// How often a name is resolved, give or take a quarter. Endpoints of a headless service change within seconds.
const NAME_EVERY: Duration = Duration::from_secs(15);
/// Time for one resolution.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest file: 10,000 members of 200 bytes, with room.
const FILE_LEN_MAX_BYTES: u64 = 4 << 20;

/// A place where a member may be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Seed {
    /// The only peer to be accepted there, if known.
    pub peer: Option<PeerId>,
    /// Where.
    pub address: Multiaddr,
}

/// Knows places where members may be.
pub trait Provider: fmt::Debug + Send + Sync + 'static {
    /// All places, now and whenever they have changed. Each answer replaces the one before. A provider that cannot look
    /// says nothing, so its last answer stays. The stream never ends.
    fn places(&self) -> BoxStream<'static, Vec<Seed>>;
}

/// A TOML file that lists members, looked at again when it changes:
///
/// ```toml
/// [[member]]
/// address = "10.0.0.7:4001"
/// peer = "12D3KooW..."       # optional
/// ```
#[derive(Debug, Clone)]
pub struct MembersFile {
    path: PathBuf,
    every: Duration,
}

/// A file of members that cannot be used.
#[derive(Debug, Error)]
pub enum MembersFileError {
    /// It cannot be read.
    #[error("cannot read the member file {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// It is no such file.
    #[error("the member file {path} cannot be used: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    #[serde(default)]
    member: Vec<ListedMember>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListedMember {
    address: String,
    peer: Option<String>,
}

impl MembersFile {
    /// The file at `path`.
    pub fn new(path: PathBuf) -> Self {
        Self { path, every: FILE_EVERY }
    }

    /// The same, looked at `every` so often.
    #[must_use]
    pub fn with_interval(self, every: Duration) -> Self {
        Self { every, ..self }
    }

    /// What the file says now. Blocks.
    ///
    /// # Errors
    /// When the file cannot be read, is too long, or holds something else.
    pub fn read(&self) -> Result<Vec<Seed>, MembersFileError> {
        let failed = |source| MembersFileError::Io { path: self.path.clone(), source };
        let malformed = |reason: String| MembersFileError::Malformed { path: self.path.clone(), reason };
        let mut text = String::new();
        let file = std::fs::File::open(&self.path).map_err(failed)?;
        file.take(FILE_LEN_MAX_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > FILE_LEN_MAX_BYTES {
            return Err(malformed(format!("it is longer than {FILE_LEN_MAX_BYTES} bytes")));
        }
        let listed: Listed = toml::from_str(&text).map_err(|error| malformed(error.to_string()))?;
        if listed.member.len() > MEMBERS_MAX {
            return Err(malformed(format!("it lists {} members; at most {MEMBERS_MAX} can be", listed.member.len())));
        }
        let seed = |member: ListedMember| {
            let peer = member.peer.map(|text| text.parse().map_err(|_| malformed(format!("'{text}' is no peer"))));
            let address: PeerAddress = member.address.parse().map_err(|error| malformed(format!("{error}")))?;
            match address {
                PeerAddress::Fixed(address) => Ok(Seed { peer: peer.transpose()?, address }),
                PeerAddress::Host { host, .. } => {
                    Err(malformed(format!("'{host}' is a name; list addresses here, and names with --members-dns")))
                }
            }
        };
        listed.member.into_iter().map(seed).collect()
    }
}

/// What tells one version of a file from the next.
fn version_of(path: &Path) -> Option<(SystemTime, u64)> {
    let metadata = std::fs::metadata(path).ok()?;
    Some((metadata.modified().ok()?, metadata.len()))
}

/// What is remembered of a file between two looks at it.
struct Watched {
    file: MembersFile,
    seen: Option<Option<(SystemTime, u64)>>,
}

impl Watched {
    /// The next version of the file that can be used. Cancel safe: a version that was not delivered is read again.
    async fn next(mut self) -> (Vec<Seed>, Self) {
        loop {
            if self.seen.is_some() {
                tokio::time::sleep(self.file.every).await;
            }
            let (file, last) = (self.file.clone(), self.seen);
            let looked = tokio::task::spawn_blocking(move || {
                let version = version_of(&file.path);
                (version, (last != Some(version)).then(|| file.read()))
            });
            let Ok((version, read)) = looked.await else { continue };
            self.seen = Some(version);
            match read {
                Some(Ok(seeds)) => return (seeds, self),
                Some(Err(error)) => tracing::warn!(%error, "the last list that could be read stays in use"),
                None => {}
            }
        }
    }
}

impl Provider for MembersFile {
    fn places(&self) -> BoxStream<'static, Vec<Seed>> {
        let watched = Watched { file: self.clone(), seen: None };
        stream::unfold(watched, |watched| async { Some(watched.next().await) }).boxed()
    }
}

/// A name whose addresses are those of members, such as a headless service, resolved again and again.
#[derive(Debug, Clone)]
pub struct MembersDns {
    host: String,
    port: u16,
    every: Duration,
}

impl MembersDns {
    /// All addresses of `host`, at `port`.
    pub fn new(host: String, port: u16) -> Self {
        Self { host, port, every: NAME_EVERY }
    }

    /// The same, resolved `every` so often, give or take a quarter.
    #[must_use]
    pub fn with_interval(self, every: Duration) -> Self {
        Self { every, ..self }
    }

    async fn resolve(&self) -> std::io::Result<BTreeSet<Seed>> {
        let lookup = tokio::net::lookup_host((self.host.as_str(), self.port));
        let found = tokio::time::timeout(RESOLVE_TIMEOUT, lookup).await;
        let found = found.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
        Ok(found.take(MEMBERS_MAX).map(|socket| Seed { peer: None, address: multiaddr_of(socket) }).collect())
    }

    /// The next answer that differs from `last`. Cancel safe.
    async fn changed(self, last: Option<BTreeSet<Seed>>) -> (Vec<Seed>, (Self, Option<BTreeSet<Seed>>)) {
        let mut first = last.is_none();
        let mut failing = false;
        loop {
            if !first {
                tokio::time::sleep(self.every.mul_f64(0.75 + 0.5 * rand::random::<f64>())).await;
            }
            first = false;
            match self.resolve().await {
                Ok(found) if last.as_ref() != Some(&found) => {
                    return (found.iter().cloned().collect(), (self, Some(found)));
                }
                Ok(_) => failing = false,
                Err(error) if !failing => {
                    failing = true;
                    tracing::warn!(host = self.host, %error, "members cannot be looked up; the last answer stays in use");
                }
                Err(_) => {}
            }
        }
    }
}

impl Provider for MembersDns {
    fn places(&self) -> BoxStream<'static, Vec<Seed>> {
        stream::unfold((self.clone(), None), |(dns, last)| async { Some(dns.changed(last).await) }).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_is_read_again_when_it_changes_and_an_error_keeps_the_last_list() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("members.toml");
        // At once, as an editor or a ConfigMap does: half a file is another file.
        let write = |text: &str| {
            let written = path.with_extension("new");
            std::fs::write(&written, text).and_then(|()| std::fs::rename(&written, &path)).expect("writes");
        };
        let file = MembersFile::new(path.clone()).with_interval(Duration::from_millis(5));
        let mut places = file.places();
        assert!(futures::poll!(places.next()).is_pending(), "a file that is not there was an answer");
        write("[[member]]\naddress = \"10.0.0.7:4001\"\n");
        let first = places.next().await.expect("goes on");
        assert_eq!(first, [Seed { peer: None, address: "/ip4/10.0.0.7/tcp/4001".parse().expect("a multiaddr") }]);
        write("[[member]]\naddress = 7");
        assert!(file.read().is_err());
        let peer = PeerId::random();
        write(&format!("[[member]]\naddress = \"[fd00::1]:9\"\npeer = \"{peer}\"\n"));
        let second = places.next().await.expect("goes on");
        assert_eq!((second.len(), second[0].peer), (1, Some(peer)));
    }

    #[test]
    fn what_is_no_list_is_refused_with_what_is_wrong() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("members.toml");
        let error = |text: &str| {
            std::fs::write(&path, text).expect("writes");
            MembersFile::new(path.clone()).read().expect_err("refused").to_string()
        };
        assert!(error("[[member]]\naddress = \"10.0.0.7\"").contains("10.0.0.7"));
        assert!(error("[[member]]\naddress = \"node-1:4001\"").contains("--members-dns"));
        assert!(error("[[member]]\naddress = \"10.0.0.7:1\"\npeer = \"x\"").contains("'x' is no peer"));
        assert!(error("[[members]]").contains("members"));
        assert!(error(&"#".repeat(FILE_LEN_MAX_BYTES as usize + 1)).contains("longer"));
    }

    #[tokio::test]
    async fn a_name_gives_all_its_addresses_and_says_nothing_when_it_is_not_known() {
        let dns = MembersDns::new("localhost".into(), 4001);
        let found = dns.places().next().await.expect("goes on");
        assert!(found.iter().any(|seed| seed.address.to_string() == "/ip4/127.0.0.1/tcp/4001"), "{found:?}");
        let unknown = MembersDns::new("no-such-name.invalid".into(), 1).with_interval(Duration::from_millis(5));
        let mut places = unknown.places();
        let said = tokio::time::timeout(Duration::from_millis(100), places.next()).await;
        assert!(said.is_err(), "an unknown name was an answer");
    }
}
