//! One inode: its fixed part, and data that lies flat in the image.

use super::{Nid, ReadError, View};
use crate::erofs::layout::{
    COMPACT_LEN, CompactInode, EXTENDED_LEN, ExtendedInode, FORMAT_ALL, FORMAT_EXTENDED, FORMAT_LAYOUT_SHIFT,
    INODE_SLOT_LEN, LAYOUT_CHUNK_BASED, LAYOUT_FLAT_INLINE, LAYOUT_FLAT_PLAIN, MODE_BLOCK_DEVICE, MODE_CHAR_DEVICE,
    MODE_DIRECTORY, MODE_FIFO, MODE_REGULAR, MODE_SOCKET, MODE_SYMLINK, MODE_TYPE_MASK, XATTR_HEADER_LEN,
    decode_device,
};
use crate::tree::Timestamp;

/// What kind of file an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileType {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket; no layer holds one, but other writers' images may.
    Socket,
}

/// A device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct DeviceNumber {
    /// Major number, 12 bits.
    pub major: u32,
    /// Minor number, 20 bits.
    pub minor: u32,
}

/// What stat(2) says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// What the inode is.
    pub kind: FileType,
    /// Permission bits including set-id and sticky: `mode & 0o7777`.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time; the kernel shows it as access and change time too.
    pub mtime: Timestamp,
    /// Number of names.
    pub link_count: u32,
    /// Size in bytes: of a directory the bytes of its entries, of a symlink the length of its target.
    pub size_bytes: u64,
    /// Which device; 0:0 for what is none.
    pub rdev: DeviceNumber,
    /// Inode number, the same as the kernel's: the nid.
    pub ino: u64,
}

/// The fixed part of an inode, in whichever of the two forms it stands.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inode<'a> {
    pub(super) view: View<'a>,
    pub(super) nid: Nid,
    pub(super) size: u64,
    /// First block, device number, or chunk format.
    pub(super) union: u32,
    pub(super) layout: u16,
    /// Where extended attributes start in the image.
    pub(super) xattrs_at: u64,
    pub(super) xattrs_len: u64,
    mode: u16,
    link_count: u32,
    uid: u32,
    gid: u32,
    mtime: Timestamp,
}

/// Data that lies in the image in one or two pieces.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flat<'a> {
    /// Whole blocks; the last one may be cut by the size.
    pub(super) blocks: &'a [u8],
    /// The last block, if it lies behind the inode.
    pub(super) tail: &'a [u8],
}

impl<'a> Inode<'a> {
    /// The inode at `nid`.
    pub(super) fn read(view: View<'a>, nid: Nid) -> Result<Self, ReadError> {
        let outside = || ReadError::Damaged { nid, what: "it lies outside of the image" };
        let offset = nid.0.checked_mul(INODE_SLOT_LEN).and_then(|from| from.checked_add(view.geometry.meta_start));
        let offset = offset.filter(|offset| *offset < view.bytes.len() as u64).ok_or_else(outside)?;
        let compact: &CompactInode = view.get(offset).ok_or_else(outside)?;
        let format = compact.format.get();
        let layout = (format & FORMAT_ALL) >> FORMAT_LAYOUT_SHIFT;
        if format & !FORMAT_ALL != 0 || ![LAYOUT_FLAT_PLAIN, LAYOUT_FLAT_INLINE, LAYOUT_CHUNK_BASED].contains(&layout) {
            return Err(ReadError::Damaged { nid, what: "its format is not known" });
        }
        let xattrs_len = match compact.xattr_count.get() {
            0 => 0,
            count => XATTR_HEADER_LEN as u64 + 4 * (u64::from(count) - 1),
        };
        let mode = compact.mode.get();
        Ok(if format & FORMAT_EXTENDED == 0 {
            Self {
                view,
                nid,
                size: compact.size.get().into(),
                union: compact.union.get(),
                layout,
                xattrs_at: offset + COMPACT_LEN as u64,
                xattrs_len,
                mode,
                link_count: compact.link_count.get().into(),
                uid: compact.uid.get().into(),
                gid: compact.gid.get().into(),
                mtime: view.geometry.epoch,
            }
        } else {
            let extended: &ExtendedInode = view.get(offset).ok_or_else(outside)?;
            Self {
                view,
                nid,
                size: extended.size.get(),
                union: extended.union.get(),
                layout,
                xattrs_at: offset + EXTENDED_LEN as u64,
                xattrs_len,
                mode,
                link_count: extended.link_count.get(),
                uid: extended.uid.get(),
                gid: extended.gid.get(),
                // Seconds before 1970 are two's complement.
                mtime: Timestamp {
                    seconds: extended.mtime.get() as i64,
                    nanoseconds: extended.mtime_nanoseconds.get(),
                },
            }
        })
    }

    pub(super) fn damaged(&self, what: &'static str) -> ReadError {
        ReadError::Damaged { nid: self.nid, what }
    }

    /// Where the fixed part and the extended attributes end.
    pub(super) fn end(&self) -> u64 {
        self.xattrs_at + self.xattrs_len
    }

    pub(super) fn file_type(&self) -> Result<FileType, ReadError> {
        Ok(match self.mode & MODE_TYPE_MASK {
            MODE_REGULAR => FileType::Regular,
            MODE_DIRECTORY => FileType::Directory,
            MODE_SYMLINK => FileType::Symlink,
            MODE_CHAR_DEVICE => FileType::CharDevice,
            MODE_BLOCK_DEVICE => FileType::BlockDevice,
            MODE_FIFO => FileType::Fifo,
            MODE_SOCKET => FileType::Socket,
            _ => return Err(self.damaged("its mode has no file type")),
        })
    }

    pub(super) fn attributes(&self) -> Result<Attributes, ReadError> {
        let kind = self.file_type()?;
        let rdev = match kind {
            FileType::CharDevice | FileType::BlockDevice => {
                let (major, minor) = decode_device(self.union);
                DeviceNumber { major, minor }
            }
            _ => DeviceNumber::default(),
        };
        Ok(Attributes {
            kind,
            permissions: self.mode & !MODE_TYPE_MASK,
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime,
            link_count: self.link_count,
            size_bytes: self.size,
            rdev,
            ino: self.nid.0,
        })
    }

    /// How many of the inode's bytes are in blocks, and how many behind the inode.
    pub(super) fn flat_split(&self) -> Result<(u64, u64), ReadError> {
        match self.layout {
            LAYOUT_FLAT_PLAIN => Ok((self.size, 0)),
            LAYOUT_FLAT_INLINE => {
                let block_len = self.view.block_len();
                let in_blocks = self.size.saturating_sub(1) / block_len * block_len;
                let tail_len = self.size - in_blocks;
                if self.end() % block_len + tail_len > block_len {
                    return Err(self.damaged("its inline data crosses a block's end"));
                }
                Ok((in_blocks, tail_len))
            }
            _ => Err(self.damaged("its data is not flat")),
        }
    }

    /// All data of a flat inode.
    pub(super) fn flat_data(&self) -> Result<Flat<'a>, ReadError> {
        let (in_blocks, tail_len) = self.flat_split()?;
        let outside = || self.damaged("its data lies outside of the image");
        let blocks = if in_blocks == 0 {
            &[]
        } else {
            let start = u64::from(self.union) << self.view.geometry.block_bits;
            self.view.slice(start, in_blocks).ok_or_else(outside)?
        };
        let tail = self.view.slice(self.end(), tail_len).ok_or_else(outside)?;
        Ok(Flat { blocks, tail })
    }
}
