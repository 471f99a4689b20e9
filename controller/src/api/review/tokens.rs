//! Join tokens in a file, for clusters without Kubernetes, and tokens of people who look at the status page.
//!
//! ```text
//! # NODE   TOKEN (16 to 512 characters without white space)   UNTIL (RFC 3339, optional)
//! node-1   3f1c...
//! *        9b2e...                                            2026-12-31T00:00:00Z
//! @viewer  77aa...
//! ```
//!
//! A token for `*` is good for any node. Whoever has any of them may look at the status page; one for `@viewer`, which can be no
//! node's name, may do nothing else. The file is read again for every review, so a token is added or taken back by
//! writing it. Tokens are compared by their hashes, which take the same time whatever differs.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use futures::future::BoxFuture;
use hermes_p2p::unix_now;
use zeroize::Zeroizing;

use super::super::numbers::Refusal;
use super::{ReviewError, Reviewer, Viewers};

/// Longest file: a line for each of 1,000 nodes.
const FILE_LEN_MAX_BYTES: u64 = 1 << 20;
/// Fewest characters of a token: what cannot be guessed over a network.
const TOKEN_LEN_MIN: usize = 16;

/// The file.
#[derive(Debug, Clone)]
pub struct TokenFile {
    path: PathBuf,
}

impl TokenFile {
    /// The file at `path`, mode 0600.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    fn read(&self) -> Result<Zeroizing<String>, ReviewError> {
        let failed = |reason: String| ReviewError::Unavailable { reason: format!("{}: {reason}", self.path.display()) };
        let file = File::open(&self.path).map_err(|error| failed(error.to_string()))?;
        let mode = file.metadata().map_err(|error| failed(error.to_string()))?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(failed(format!("it has mode {mode:04o}, so others can read it; chmod 600 it")));
        }
        let mut text = Zeroizing::new(String::new());
        file.take(FILE_LEN_MAX_BYTES).read_to_string(&mut text).map_err(|error| failed(error.to_string()))?;
        Ok(text)
    }

    /// Looks `token` up, for `node` or, without one, for somebody who looks at the page.
    fn look(&self, token: &str, node: Option<&str>) -> Result<(), ReviewError> {
        let text = self.read()?;
        let hash = blake3::hash(token.as_bytes());
        let mut refused = ReviewError::refused(Refusal::UnknownToken, "nobody has been given this join token");
        for line in text.lines().filter(|line| !line.trim_start().starts_with('#')) {
            let mut words = line.split_whitespace();
            let (Some(name), Some(known), until) = (words.next(), words.next(), words.next()) else { continue };
            if known.len() < TOKEN_LEN_MIN || blake3::hash(known.as_bytes()) != hash {
                continue;
            }
            if node.is_some_and(|node| name != "*" && name != node) {
                refused = ReviewError::refused(Refusal::OtherNode, "this join token is another node's");
                continue;
            }
            let over = until.is_some_and(|until| {
                until.parse::<jiff::Timestamp>().map_or(true, |until| until.as_second() < unix_now().cast_signed())
            });
            if !over {
                return Ok(());
            }
            refused = ReviewError::refused(Refusal::Expired, "this join token has ended; get a new one");
        }
        Err(refused)
    }

    fn look_aside(&self, token: &str, node: Option<&str>) -> BoxFuture<'static, Result<(), ReviewError>> {
        let (this, token, node) = (self.clone(), Zeroizing::new(token.to_owned()), node.map(str::to_owned));
        Box::pin(async move {
            let looked = tokio::task::spawn_blocking(move || this.look(&token, node.as_deref())).await;
            looked.unwrap_or_else(|error| Err(ReviewError::Unavailable { reason: error.to_string() }))
        })
    }
}

impl Reviewer for TokenFile {
    fn review<'a>(&'a self, token: &'a str, node: &'a str) -> BoxFuture<'a, Result<(), ReviewError>> {
        self.look_aside(token, Some(node))
    }
}

impl Viewers for TokenFile {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<(), ReviewError>> {
        self.look_aside(token, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_is_good_for_its_node_and_its_time() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tokens");
        let text = "# comment\nnode-1 aaaaaaaaaaaaaaaa\n* bbbbbbbbbbbbbbbb\nnode-1 cccccccccccccccc 2020-01-01T00:00:00Z\n\
                    node-1 dddddddddddddddd 2200-01-01T00:00:00Z\nnode-1 short\nnode-1 eeeeeeeeeeeeeeee never\n@viewer ffffffffffffffff\n";
        std::fs::write(&path, text).expect("writes");
        let file = TokenFile::new(path.clone());
        let why = |review: Result<(), ReviewError>| match review {
            Ok(()) => None,
            Err(ReviewError::Refused { why, .. }) => Some(why),
            Err(ReviewError::Unavailable { reason }) => panic!("{reason}"),
        };
        assert!(
            matches!(Reviewer::review(&file, "a", "b").await, Err(ReviewError::Unavailable { .. })),
            "an open file was read"
        );
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("protects");
        let cases = [
            ("aaaaaaaaaaaaaaaa", "node-1", None),
            ("aaaaaaaaaaaaaaaa", "node-2", Some(Refusal::OtherNode)),
            ("bbbbbbbbbbbbbbbb", "node-2", None),
            ("cccccccccccccccc", "node-1", Some(Refusal::Expired)),
            ("dddddddddddddddd", "node-1", None),
            ("eeeeeeeeeeeeeeee", "node-1", Some(Refusal::Expired)),
            ("short", "node-1", Some(Refusal::UnknownToken)),
            ("# comment", "node-1", Some(Refusal::UnknownToken)),
            ("aaaaaaaaaaaaaaab", "node-1", Some(Refusal::UnknownToken)),
        ];
        for (token, node, expected) in cases {
            assert_eq!(why(Reviewer::review(&file, token, node).await), expected, "{token} for {node}");
        }
        let viewers = [
            ("aaaaaaaaaaaaaaaa", None),
            ("bbbbbbbbbbbbbbbb", None),
            ("ffffffffffffffff", None),
            ("cccccccccccccccc", Some(Refusal::Expired)),
            ("aaaaaaaaaaaaaaab", Some(Refusal::UnknownToken)),
        ];
        for (token, expected) in viewers {
            assert_eq!(why(Viewers::review(&file, token).await), expected, "{token} for the page");
        }
        // Who may look alone can be no node, whatever it says that it is called.
        assert_eq!(why(Reviewer::review(&file, "ffffffffffffffff", "node-1").await), Some(Refusal::OtherNode));
        assert!(!crate::authority::is_node_name("@viewer"));
        std::fs::write(&path, "").expect("writes");
        assert_eq!(
            why(Reviewer::review(&file, "aaaaaaaaaaaaaaaa", "node-1").await),
            Some(Refusal::UnknownToken),
            "taken back"
        );
    }
}
