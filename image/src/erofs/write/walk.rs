//! The order in which inodes are written, and the checks of the tree's shape.

use super::error::{FileProblem, WriteError, printable};
use crate::erofs::layout::NAME_LEN_MAX;
use crate::tree::{InodeIndex, InodeKind, Tree};

/// One thing to find a place for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// An inode, at its first name.
    Inode(InodeIndex),
    /// The entries of a directory; the inodes that they name follow.
    Entries(InodeIndex),
}

/// The tree in the order in which `find` looks at it: a directory's entries, all inodes that they name, then the same
/// for each subdirectory. Every inode that has a name comes once; inodes without a name do not come at all.
#[derive(Debug)]
pub(super) struct Walk {
    /// What comes when.
    pub(super) steps: Vec<Step>,
    /// Number of inodes that have a name.
    pub(super) inode_count: u32,
    first_names: Vec<Option<FirstName>>,
}

/// Where an inode is named first.
#[derive(Debug, Clone, Copy)]
struct FirstName {
    directory: InodeIndex,
    entry: usize,
}

impl Walk {
    /// Walks `tree`.
    pub(super) fn new(tree: &Tree) -> Result<Self, WriteError> {
        match tree.inodes.first().map(|root| &root.kind) {
            Some(InodeKind::Directory { parent: 0, .. }) => {}
            _ => return Err(WriteError::Root),
        }
        let mut walk = Self {
            steps: Vec::with_capacity(tree.inodes.len() + tree.inodes.len() / 8),
            inode_count: 1,
            first_names: vec![None; tree.inodes.len()],
        };
        walk.steps.push(Step::Inode(0));
        let mut waiting = vec![0];
        while let Some(directory) = waiting.pop() {
            let subdirectories_from = waiting.len();
            walk.steps.push(Step::Entries(directory));
            walk.enter(tree, directory, &mut waiting)?;
            waiting[subdirectories_from..].reverse();
        }
        Ok(walk)
    }

    /// Adds the inodes that `directory` names and that no directory before it did.
    fn enter(&mut self, tree: &Tree, directory: InodeIndex, waiting: &mut Vec<InodeIndex>) -> Result<(), WriteError> {
        let InodeKind::Directory { entries, .. } = &tree.inodes[directory as usize].kind else { return Ok(()) };
        let mut before: &[u8] = b"";
        for (entry, (name, index)) in entries.iter().enumerate() {
            let is_valid = (1..=NAME_LEN_MAX).contains(&name.len())
                && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
                && !matches!(name.as_slice(), b"." | b"..");
            if !is_valid {
                return Err(self.problem(tree, directory, FileProblem::EntryName { name: printable(name) }));
            }
            if before >= name.as_slice() {
                return Err(self.problem(tree, directory, FileProblem::EntryOrder { name: printable(name) }));
            }
            before = name;
            let Some(inode) = tree.inodes.get(*index as usize) else {
                let problem = FileProblem::EntryInode { name: printable(name), inode: *index };
                return Err(self.problem(tree, directory, problem));
            };
            let seen = *index == 0 || self.first_names[*index as usize].is_some();
            if !seen {
                self.first_names[*index as usize] = Some(FirstName { directory, entry });
                self.steps.push(Step::Inode(*index));
                self.inode_count += 1;
            }
            if let InodeKind::Directory { parent, .. } = inode.kind {
                if seen || parent != directory {
                    return Err(self.problem(tree, *index, FileProblem::Parent));
                }
                waiting.push(*index);
            }
        }
        Ok(())
    }

    /// The error that `problem` is, at the first name of inode `index`.
    pub(super) fn problem(&self, tree: &Tree, index: InodeIndex, problem: FileProblem) -> WriteError {
        WriteError::File { path: self.path(tree, index), problem }
    }

    /// The first path of inode `index`, escaped.
    fn path(&self, tree: &Tree, index: InodeIndex) -> String {
        let mut names = Vec::new();
        let mut at = index;
        // A first name is given once and to an inode whose directory had one already, so this ends at the root.
        while let Some(first) = self.first_names[at as usize] {
            if let InodeKind::Directory { entries, .. } = &tree.inodes[first.directory as usize].kind {
                names.push(printable(&entries[first.entry].0));
            }
            at = first.directory;
        }
        names.push(String::new());
        names.reverse();
        if names.len() == 1 { "/".to_owned() } else { names.join("/") }
    }
}
