//! Whether containerd and Hermes know the same snapshots.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::command::run;
use crate::guard::wait_for;
use crate::snapshotter::{Client, directories};

/// How long containerd may take to collect garbage: it forgets what it removes at once, and has it removed later.
const DEADLINE: Duration = Duration::from_secs(60);

/// What both sides know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Agreed {
    /// Snapshots.
    pub snapshots: usize,
    /// Directories of snapshots; one that is shown lazily has none.
    pub directories: usize,
}

/// Where to look.
#[derive(Debug, Clone, Copy)]
pub struct Sides<'a> {
    /// The socket of Hermes' snapshots service.
    pub socket: &'a Path,
    /// Where Hermes has the snapshots' directories.
    pub root: &'a Path,
}

impl Sides<'_> {
    /// Waits until containerd, which `ctr` asks, and Hermes know the same snapshots, and `expected` is content with them.
    ///
    /// # Errors
    /// When that does not come; with what was last seen.
    pub fn agree(&self, ctr: impl Fn() -> Command, expected: impl Fn(Agreed) -> bool) -> Result<Agreed> {
        let mut last = None;
        let agreed = wait_for("equal snapshots", DEADLINE, || {
            let seen = self.compare(ctr());
            let agreed = seen.as_ref().ok().copied().filter(|agreed| expected(*agreed));
            last = Some(seen);
            agreed
        });
        agreed.with_context(|| format!("last seen: {last:?}"))
    }

    fn compare(&self, mut ctr: Command) -> Result<Agreed> {
        let listed = String::from_utf8(run(ctr.args(["snapshots", "--snapshotter", "hermes", "ls"]))?)?;
        let theirs: BTreeSet<String> = listed.lines().skip(1).map(words).collect();
        let client = Client::connect(self.socket)?;
        let ours = client.list(&[])?;
        let lines = ours.iter().map(|info| {
            let kind = match info.kind().as_str_name() {
                "ACTIVE" => "Active",
                "VIEW" => "View",
                _ => "Committed",
            };
            words(&[key(&info.name), key(&info.parent), kind].join(" "))
        });
        let lines: BTreeSet<String> = lines.collect();
        ensure!(lines == theirs, "Hermes has {lines:#?}, containerd {theirs:#?}");
        client.cleanup()?;
        let left = directories(self.root)?;
        ensure!(left.len() <= ours.len(), "{} snapshots have the directories {left:?}", ours.len());
        Ok(Agreed { snapshots: ours.len(), directories: left.len() })
    }
}

/// One blank between two words.
fn words(line: &str) -> String {
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// containerd calls a snapshot NAMESPACE/NUMBER/KEY here and KEY there; a key may have blanks and slashes. One that is
/// shown lazily has got its name from Hermes: the chain ID, which is containerd's key, perhaps with a number.
fn key(name: &str) -> &str {
    match name.splitn(3, '/').nth(2) {
        Some(key) => key,
        None => name.split('@').next().unwrap_or(name),
    }
}
