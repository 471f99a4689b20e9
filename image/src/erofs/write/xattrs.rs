//! Extended attributes: those of one inode behind it, those of several inodes once in an area of their own.

use std::collections::HashMap;

use zerocopy::IntoBytes;

use super::error::{FileProblem, WriteError, printable};
use super::walk::{Step, Walk};
use crate::erofs::layout::{NAME_LEN_MAX, XATTR_ENTRY_LEN, XATTR_HEADER_LEN, XattrEntryHeader, XattrHeader};
use crate::erofs::xattr_name::split;
use crate::tree::{Inode, Tree, Xattr};

/// `i_xattr_icount` counts the header as 1 and then 4-byte words, in 16 bits.
const BODY_LEN_MAX: u64 = XATTR_HEADER_LEN as u64 + 4 * (u16::MAX as u64 - 1);
/// `h_shared_count` has 8 bits.
const SHARED_COUNT_MAX: usize = u8::MAX as usize;

/// The attributes that more than one inode has, and where they stand.
#[derive(Debug, Default)]
pub(super) struct SharedXattrs<'a> {
    /// The shared area.
    pub(super) area: Vec<u8>,
    /// Whether any inode has an attribute, shared or not.
    pub(super) any: bool,
    /// Place of each in the area, in 4-byte words.
    ids: HashMap<&'a Xattr, u32>,
}

/// The attributes of one inode.
#[derive(Debug, Default)]
pub(super) struct Body<'a> {
    shared: Vec<u32>,
    inline: Vec<&'a Xattr>,
    len: u64,
}

impl<'a> SharedXattrs<'a> {
    /// Checks all attributes of the tree and collects those that occur twice, in the order of the walk.
    pub(super) fn new(tree: &'a Tree, walk: &Walk) -> Result<Self, WriteError> {
        let mut pool = Self::default();
        let mut counts: HashMap<&Xattr, u32> = HashMap::new();
        for index in walk.steps.iter().filter_map(|step| match step {
            Step::Inode(index) => Some(*index),
            Step::Entries(_) => None,
        }) {
            for xattr in &tree.inodes[index as usize].xattrs {
                check(xattr).map_err(|problem| walk.problem(tree, index, problem))?;
                if split(&xattr.name).is_none() {
                    continue;
                }
                pool.any = true;
                let count = counts.entry(xattr).or_default();
                *count += 1;
                // An attribute of the area costs each inode four bytes more than none; one byte of suffix is enough
                // to gain from the second inode on.
                if *count == 2 && pool.area.len() / 4 < u32::MAX as usize {
                    pool.ids.insert(xattr, (pool.area.len() / 4) as u32);
                    append_entry(xattr, &mut pool.area);
                }
            }
        }
        Ok(pool)
    }

    /// The attributes of `inode`, sorted into shared and its own.
    pub(super) fn body(&self, inode: &'a Inode) -> Result<Body<'a>, FileProblem> {
        let mut body = Body::default();
        for xattr in &inode.xattrs {
            if split(&xattr.name).is_none() {
                continue;
            }
            match self.ids.get(xattr) {
                Some(id) if body.shared.len() < SHARED_COUNT_MAX => {
                    body.shared.push(*id);
                    body.len += 4;
                }
                _ => {
                    body.inline.push(xattr);
                    body.len += entry_len(xattr);
                }
            }
        }
        if body.len > 0 {
            body.len += XATTR_HEADER_LEN as u64;
        }
        if body.len > BODY_LEN_MAX {
            return Err(FileProblem::XattrSpace(body.len));
        }
        Ok(body)
    }
}

impl Body<'_> {
    /// Length in bytes; 0 without attributes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// `i_xattr_icount` for it.
    pub(super) fn count(&self) -> u16 {
        if self.len == 0 { 0 } else { 1 + ((self.len - XATTR_HEADER_LEN as u64) / 4) as u16 }
    }

    /// Its bytes, at the start of `out`.
    pub(super) fn write(&self, out: &mut [u8]) {
        if self.len == 0 {
            return;
        }
        let header = XattrHeader { shared_count: self.shared.len() as u8, ..XattrHeader::default() };
        let mut bytes = Vec::with_capacity(self.len as usize);
        bytes.extend_from_slice(header.as_bytes());
        for id in &self.shared {
            bytes.extend_from_slice(&id.to_le_bytes());
        }
        for xattr in &self.inline {
            append_entry(xattr, &mut bytes);
        }
        out[..bytes.len()].copy_from_slice(&bytes);
    }
}

/// Refuses what setxattr(2) refuses (`XATTR_NAME_MAX`, `XATTR_SIZE_MAX`), and the one value length of 65,536 that has
/// no place in 16 bits.
fn check(xattr: &Xattr) -> Result<(), FileProblem> {
    let name = &xattr.name;
    if name.is_empty() || name.len() > NAME_LEN_MAX || name.contains(&0) || xattr.value.len() > usize::from(u16::MAX) {
        return Err(FileProblem::Xattr { name: printable(name) });
    }
    Ok(())
}

/// Length of an entry, a multiple of 4.
fn entry_len(xattr: &Xattr) -> u64 {
    let suffix_len = split(&xattr.name).map_or(0, |(_, suffix)| suffix.len());
    (XATTR_ENTRY_LEN + suffix_len + xattr.value.len()).next_multiple_of(4) as u64
}

fn append_entry(xattr: &Xattr, out: &mut Vec<u8>) {
    let Some((name_index, suffix)) = split(&xattr.name) else { return };
    // Both lengths were checked.
    let header =
        XattrEntryHeader { name_len: suffix.len() as u8, name_index, value_len: (xattr.value.len() as u16).into() };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(suffix);
    out.extend_from_slice(&xattr.value);
    out.resize(out.len().next_multiple_of(4), 0);
}
