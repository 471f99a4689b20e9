//! Directories: blocks of sorted entries, searched by halves.

use std::cmp::Ordering;

use zerocopy::FromBytes;

use super::inode::{FileType, Flat, Inode};
use super::{Nid, ReadError, View};
use crate::erofs::layout::{
    DIRENT_LEN, Dirent, ENTRY_BLOCK_DEVICE, ENTRY_CHAR_DEVICE, ENTRY_DIRECTORY, ENTRY_FIFO, ENTRY_REGULAR,
    ENTRY_SOCKET, ENTRY_SYMLINK, NAME_LEN_MAX,
};

/// An entry of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// The name, without slash or zero byte in our own images.
    pub name: &'a [u8],
    /// The inode that it names.
    pub nid: Nid,
    /// What the inode is.
    pub kind: FileType,
    /// Where the next entry is, for [`Image::readdir`](super::Image::readdir).
    pub next_offset: u64,
}

/// A directory whose bytes were found.
#[derive(Debug, Clone, Copy)]
pub(super) struct Directory<'a> {
    nid: Nid,
    flat: Flat<'a>,
    block_len: u64,
    size: u64,
}

/// One block of entries.
#[derive(Debug, Clone, Copy)]
struct Block<'a> {
    nid: Nid,
    bytes: &'a [u8],
    entries: &'a [Dirent],
}

impl<'a> Directory<'a> {
    pub(super) fn open(view: View<'a>, nid: Nid) -> Result<Self, ReadError> {
        let inode = Inode::read(view, nid)?;
        if inode.file_type()? != FileType::Directory {
            return Err(ReadError::Kind { nid, expected: "directory" });
        }
        Ok(Self { nid, flat: inode.flat_data()?, block_len: view.block_len(), size: inode.size })
    }

    fn block(&self, no: u64) -> Result<Block<'a>, ReadError> {
        let damaged = |what| ReadError::Damaged { nid: self.nid, what };
        let start = no * self.block_len;
        let in_blocks = self.flat.blocks.len() as u64;
        let bytes = if start < in_blocks {
            // Both ends are within a slice in memory.
            &self.flat.blocks[start as usize..(start + self.block_len).min(in_blocks) as usize]
        } else {
            self.flat.tail
        };
        let first: &Dirent = bytes
            .get(..DIRENT_LEN)
            .and_then(|bytes| Dirent::ref_from_bytes(bytes).ok())
            .ok_or_else(|| damaged("a block is too short for an entry"))?;
        // The first name stands right behind the last entry, so it says how many entries there are.
        let count = usize::from(first.name_offset.get()) / DIRENT_LEN;
        let entries = bytes
            .get(..count * DIRENT_LEN)
            .and_then(|bytes| <[Dirent]>::ref_from_bytes(bytes).ok())
            .filter(|entries| !entries.is_empty())
            .ok_or_else(|| damaged("the first name of a block lies outside of it"))?;
        Ok(Block { nid: self.nid, bytes, entries })
    }

    pub(super) fn lookup(&self, name: &[u8]) -> Result<Option<Nid>, ReadError> {
        if name.is_empty() || name.len() > NAME_LEN_MAX {
            return Ok(None);
        }
        // The last block whose first name is not behind `name`.
        let mut low = 0;
        let mut high = self.size.div_ceil(self.block_len);
        let mut candidate = None;
        while low < high {
            let middle = low + (high - low) / 2;
            let block = self.block(middle)?;
            match block.name(0)?.cmp(name) {
                Ordering::Equal => return Ok(Some(block.nid_of(0))),
                Ordering::Less => {
                    candidate = Some(block);
                    low = middle + 1;
                }
                Ordering::Greater => high = middle,
            }
        }
        candidate.map_or(Ok(None), |block| block.lookup(name))
    }

    pub(super) fn entries_from(self, offset: u64) -> ReadDir<'a> {
        ReadDir { directory: self, offset, block: None }
    }
}

impl<'a> Block<'a> {
    fn name(&self, no: usize) -> Result<&'a [u8], ReadError> {
        let damaged = ReadError::Damaged { nid: self.nid, what: "a name lies outside of its block" };
        let start = usize::from(self.entries[no].name_offset.get());
        let name = match self.entries.get(no + 1) {
            Some(next) => self.bytes.get(start..usize::from(next.name_offset.get())).ok_or(damaged)?,
            // The last name ends with the block, or with the zeros that fill it.
            None => {
                let rest = self.bytes.get(start..).ok_or(damaged)?;
                rest.split(|byte| *byte == 0).next().unwrap_or(rest)
            }
        };
        if name.is_empty() || name.len() > NAME_LEN_MAX { Err(damaged) } else { Ok(name) }
    }

    fn nid_of(&self, no: usize) -> Nid {
        Nid(self.entries[no].nid.get())
    }

    /// Searches all entries but the first, which the caller has seen.
    fn lookup(&self, name: &[u8]) -> Result<Option<Nid>, ReadError> {
        let (mut low, mut high) = (1, self.entries.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match self.name(middle)?.cmp(name) {
                Ordering::Equal => return Ok(Some(self.nid_of(middle))),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }
}

/// Entries of a directory in order. Ends after the first error.
#[derive(Debug, Clone)]
pub struct ReadDir<'a> {
    directory: Directory<'a>,
    offset: u64,
    /// The block that `offset` lies in, with its number, once it was looked at.
    block: Option<(u64, Block<'a>)>,
}

impl<'a> ReadDir<'a> {
    fn advance(&mut self) -> Result<Option<DirEntry<'a>>, ReadError> {
        let block_len = self.directory.block_len;
        while self.offset < self.directory.size {
            let block_no = self.offset / block_len;
            let block = match self.block {
                Some((no, block)) if no == block_no => block,
                _ => self.directory.block(block_no)?,
            };
            self.block = Some((block_no, block));
            let next_block = (block_no + 1).saturating_mul(block_len);
            let no = (self.offset % block_len).div_ceil(DIRENT_LEN as u64) as usize;
            let Some(entry) = block.entries.get(no) else {
                self.offset = next_block;
                continue;
            };
            let name = block.name(no)?;
            let kind = kind_of(entry.file_type)
                .ok_or(ReadError::Damaged { nid: self.directory.nid, what: "an entry has no file type" })?;
            let is_last = no + 1 == block.entries.len();
            let behind = block_no * block_len + (no + 1) as u64 * DIRENT_LEN as u64;
            self.offset = if is_last { next_block } else { behind };
            return Ok(Some(DirEntry { name, nid: Nid(entry.nid.get()), kind, next_offset: self.offset }));
        }
        Ok(None)
    }
}

impl<'a> Iterator for ReadDir<'a> {
    type Item = Result<DirEntry<'a>, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.advance().transpose();
        if matches!(item, Some(Err(_))) {
            self.offset = u64::MAX;
        }
        item
    }
}

fn kind_of(file_type: u8) -> Option<FileType> {
    Some(match file_type {
        ENTRY_REGULAR => FileType::Regular,
        ENTRY_DIRECTORY => FileType::Directory,
        ENTRY_CHAR_DEVICE => FileType::CharDevice,
        ENTRY_BLOCK_DEVICE => FileType::BlockDevice,
        ENTRY_FIFO => FileType::Fifo,
        ENTRY_SOCKET => FileType::Socket,
        ENTRY_SYMLINK => FileType::Symlink,
        _ => return None,
    })
}
