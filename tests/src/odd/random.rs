//! Images of random operations over a small set of names, for differential tests.
//!
//! Names are few, so that operations meet: files over directories, links to files that later go, whiteouts of what a
//! lower layer made, opaque directories. Each layer first deletes, then writes, as builders do, because containerd
//! refuses a whiteout behind an entry of the same name; a hard link names a file that its own layer brought before; and
//! what a layer named as a directory stays one, because containerd sets its mtime in the end, whatever it is then.

use std::collections::BTreeSet;

use super::{OddImage, Oracles, mix, ramp};
use crate::tarball::{Dialect, Entry, Tarball};

/// Most layers of an image.
const LAYERS_MAX: u64 = 6;
/// Most writing operations of a layer.
const WRITES_MAX: u64 = 40;
/// Most deletions of a layer.
const DELETIONS_MAX: u64 = 6;

/// One image, decided by `seed`.
pub fn random(seed: u64) -> OddImage {
    let mut dice = Dice(seed);
    let count = 1 + dice.below(LAYERS_MAX);
    let mut ever_other = BTreeSet::new();
    let layers: Vec<Vec<u8>> = (0..count).map(|index| layer(&mut dice, index, &mut ever_other)).collect();
    // Parents that the lower layer has as links mean different things to containerd's two ways.
    OddImage::new(&format!("random-{seed}"), layers).oracles(Oracles::Overlayfs)
}

/// A random number generator whose sequence is part of the test set: it must never change.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// 0 to `bound - 1`.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A path of one to three names out of four.
    fn path(&mut self) -> String {
        let depth = 1 + self.below(3);
        let names: Vec<&str> = (0..depth).map(|_| ["a", "b", "c", "d"][self.below(4) as usize]).collect();
        names.join("/")
    }

    fn dialect(&mut self) -> Dialect {
        [Dialect::Ustar, Dialect::Gnu, Dialect::Pax][self.below(3) as usize]
    }
}

/// `ever_other` collects the names that some layer had as something else than a directory, or deleted.
fn layer(dice: &mut Dice, index: u64, ever_other: &mut BTreeSet<String>) -> Vec<u8> {
    let mut tarball = Tarball::new();
    // What this layer brought: the kinds decide what may follow under a name.
    let mut files: BTreeSet<String> = BTreeSet::new();
    let mut others: BTreeSet<String> = BTreeSet::new();
    let mut directories: BTreeSet<String> = BTreeSet::new();
    let mut deleted: BTreeSet<String> = BTreeSet::new();
    if index > 0 {
        for _ in 0..dice.below(DELETIONS_MAX) {
            let path = dice.path();
            let hidden = |parent: &str| deleted.contains(parent) || ever_other.contains(parent);
            if deleted.contains(&path) || parents(&path).any(hidden) || deleted.iter().any(|one| is_below(one, &path)) {
                continue;
            }
            tarball.add(&Entry::whiteout(&path));
            ever_other.insert(path.clone());
            deleted.insert(path);
        }
    }
    for _ in 0..1 + dice.below(WRITES_MAX) {
        let path = dice.path();
        // Nothing can stand below what is not a directory, and a deletion hides the directories that it names.
        let blocked = |one: &str| files.contains(one) || others.contains(one) || deleted.contains(one);
        if parents(&path).any(blocked) {
            continue;
        }
        let kind = match dice.below(10) {
            // In the lowest layer containerd lets the marker delete what stands in directories that nobody named.
            6 if index == 0 => 5,
            kind => kind,
        };
        let is_directory = (4..=6).contains(&kind);
        let replaces_directory = directories.iter().any(|one| *one == path || is_below(one, &path));
        if (is_directory && deleted.contains(&path)) || (!is_directory && replaces_directory) {
            continue;
        }
        // containerd looks for an unnamed parent in the layers below, and fails where one has a file above it.
        if parents(&path).any(|parent| ever_other.contains(parent)) {
            for parent in parents(&path) {
                if directories.insert(parent.to_owned()) {
                    tarball.add(&Entry::directory(parent));
                }
            }
        }
        if is_directory {
            directories.insert(path.clone());
        } else {
            ever_other.insert(path.clone());
        }
        let entry = match kind {
            0..=3 => Entry::file(&path, ramp(dice.next(), dice.below(3000) as usize)),
            4..=5 => Entry::directory(&path),
            6 => {
                tarball.add(&Entry::directory(&path));
                Entry::opaque(&path)
            }
            7 => Entry::symlink(&path, dice.path()),
            8 => Entry::new(b'6', &path),
            _ => match files.iter().nth(dice.below(files.len().max(1) as u64) as usize) {
                Some(target) if *target != path && !is_below(target, &path) => Entry::hard_link(&path, target),
                _ => continue,
            },
        };
        let (mode, owner, time) = (0o400 + dice.below(0o400) as u32, dice.below(5), dice.below(1 << 31) as i64);
        tarball.add(&entry.mode(mode).owner(owner, owner + 1).mtime(time, 0).dialect(dice.dialect()));
        remember(kind, path, &mut files, &mut others);
    }
    tarball.finish()
}

fn remember(kind: u64, path: String, files: &mut BTreeSet<String>, others: &mut BTreeSet<String>) {
    // What replaces a directory takes all that was in it.
    if !(4..=6).contains(&kind) {
        files.retain(|one| !is_below(one, &path));
        others.retain(|one| !is_below(one, &path));
    }
    files.remove(&path);
    others.remove(&path);
    match kind {
        0..=3 | 9 => drop(files.insert(path)),
        7 | 8 => drop(others.insert(path)),
        _ => {}
    }
}

/// All proper ancestors of a path.
fn parents(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(at, _)| &path[..at])
}

fn is_below(path: &str, top: &str) -> bool {
    path.strip_prefix(top).is_some_and(|rest| rest.starts_with('/'))
}
