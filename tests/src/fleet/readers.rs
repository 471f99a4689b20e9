//! All nodes read at once, and what came of each read.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::Fleet;
use super::rig::KnownFile;

/// Bytes of one read(2): what programs that copy files ask for at once.
pub(super) const READ_BYTES: usize = 128 << 10;
/// When reads that have not come to an end count as hanging: far above what the slowest scenario takes.
const DEADLINE: Duration = Duration::from_secs(600);

/// What a node's reader has found.
#[derive(Debug, Clone, Default)]
pub struct Findings {
    /// Which node.
    pub node: usize,
    /// Calls of open(2) and read(2) that it waited for.
    pub reads: usize,
    /// Bytes that it has read.
    pub bytes: u64,
    /// Files that could not be read, and why.
    pub failed: Vec<String>,
    /// Files that held other bytes than they should.
    pub wrong: Vec<String>,
    /// The longest of the calls.
    pub longest: Duration,
    /// From the common start to its end.
    pub took: Duration,
    /// The node was killed before it came to its end.
    pub was_killed: bool,
}

impl Findings {
    /// Waits for one call.
    fn timed<T>(&mut self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let begun = Instant::now();
        let answer = call();
        self.reads += 1;
        self.longest = self.longest.max(begun.elapsed());
        answer
    }

    /// Reads `files` below `root` to their ends, or until the node is no more.
    fn read_all(&mut self, root: &Path, files: &[KnownFile], is_alive: impl Fn() -> bool) {
        let begun = Instant::now();
        let mut buffer = vec![0; READ_BYTES];
        for file in files {
            let before = self.longest;
            match self.read(&root.join(&file.name), &mut buffer) {
                Ok(hash) if hash == file.hash => {}
                Ok(_) => self.wrong.push(format!("node {}: {}", self.node, file.name)),
                Err(_) if !is_alive() => {
                    self.longest = before;
                    self.was_killed = true;
                    break;
                }
                Err(error) => self.failed.push(format!("node {}: {}: {error}", self.node, file.name)),
            }
        }
        self.took = begun.elapsed();
    }

    fn read(&mut self, path: &Path, buffer: &mut [u8]) -> io::Result<blake3::Hash> {
        let mut file = self.timed(|| File::open(path))?;
        let mut hasher = blake3::Hasher::new();
        loop {
            let count = self.timed(|| file.read(buffer))?;
            if count == 0 {
                return Ok(hasher.finalize());
            }
            hasher.update(&buffer[..count]);
            self.bytes += count as u64;
        }
    }
}

impl Fleet<'_> {
    /// Has a reader on each of `nodes` read `files` from beginning to end, one after the other, all beginning at the
    /// same time. `meanwhile` runs beside them, from that time on.
    ///
    /// # Errors
    /// With what `meanwhile` says; when reads hang, after which all nodes are killed.
    pub fn read(
        &self,
        nodes: &[usize],
        files: &[KnownFile],
        meanwhile: impl FnOnce() -> Result<()>,
    ) -> Result<Vec<Findings>> {
        let barrier = Barrier::new(nodes.len() + 1);
        let (tell, told) = mpsc::sync_channel(nodes.len());
        thread::scope(|scope| {
            for node in nodes {
                let (tell, barrier) = (tell.clone(), &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    let _ = tell.send(self.read_one(*node, files));
                });
            }
            drop(tell);
            barrier.wait();
            let begun = Instant::now();
            let done = meanwhile();
            let mut found = Vec::new();
            while found.len() < nodes.len() {
                match told.recv_timeout(DEADLINE.saturating_sub(begun.elapsed())) {
                    Ok(findings) => found.push(findings),
                    Err(_) => {
                        // Their readers get errors, so that this scope comes to its end.
                        nodes.iter().filter(|node| self.is_alive(**node)).try_for_each(|node| self.kill(*node))?;
                        bail!("reads hang for {DEADLINE:?}: {} of {} nodes have ended", found.len(), nodes.len());
                    }
                }
            }
            done.context("what was to happen meanwhile")?;
            found.sort_by_key(|findings: &Findings| findings.node);
            Ok(found)
        })
    }

    fn read_one(&self, node: usize, files: &[KnownFile]) -> Findings {
        let mut findings = Findings { node, ..Findings::default() };
        findings.read_all(&self.root(node), files, || self.is_alive(node));
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::ScratchDir;

    #[test]
    fn what_is_wrong_and_what_fails_is_found() -> Result<()> {
        let scratch = ScratchDir::new("readers")?;
        let known = |name: &str, content: &[u8]| KnownFile { name: name.to_owned(), hash: blake3::hash(content) };
        std::fs::write(scratch.path().join("right"), vec![7; READ_BYTES + 1])?;
        std::fs::write(scratch.path().join("wrong"), b"other bytes")?;
        let files = [known("missing", b""), known("wrong", b"these bytes"), known("right", &[7; READ_BYTES + 1])];

        let mut found = Findings::default();
        found.read_all(scratch.path(), &files, || true);
        assert_eq!((found.failed.len(), found.wrong.len(), found.was_killed), (1, 1, false), "{found:?}");
        assert!(found.wrong[0].ends_with("wrong") && found.failed[0].contains("missing"), "{found:?}");
        // One open that fails, then each file's open and its reads, of which the last gives nothing.
        assert_eq!((found.reads, found.bytes), (1 + 3 + 4, READ_BYTES as u64 + 1 + 11), "{found:?}");

        let mut killed = Findings::default();
        killed.read_all(scratch.path(), &files, || false);
        assert!(killed.failed.is_empty() && killed.was_killed, "{killed:?}");
        Ok(())
    }
}
