//! An EROFS image, read in place.
//!
//! Opening checks the superblock and the device table once; every question after that follows a few offsets, checks
//! each against the length of the image, and answers with slices of it. Nothing is allocated, except for a symlink
//! target in two pieces, which our own writer never makes. What an inode says is believed only as far as it stays
//! inside the image, so a damaged or hostile image gives errors or wrong names, never a panic or a loop without end.
//!
//! Beside our own images it reads what `mkfs.erofs --tar=i` makes: flat and chunk-based inodes, any block size,
//! no compression.

mod directory;
mod error;
mod extents;
mod inode;
mod xattrs;

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use zerocopy::{FromBytes, IntoBytes};

pub use self::directory::{DirEntry, ReadDir};
pub use self::error::ReadError;
pub use self::extents::{Extents, MappedRange, RangeSource};
pub use self::inode::{Attributes, DeviceNumber, FileType};
pub use self::xattrs::{XattrEntries, XattrEntry};

use self::directory::Directory;
use self::inode::Inode;
use super::crc32c::crc32c;
use super::layout::{
    BLOCK_BITS, BLOCK_BITS_MAX, DEVICE_SLOT_LEN, DeviceTableSlot, FEATURE_COMPAT_CHECKSUM,
    FEATURE_INCOMPAT_CHUNKED_FILE, FEATURE_INCOMPAT_DEVICE_TABLE, FEATURE_INCOMPAT_ZERO_PADDING, MAGIC,
    SUPERBLOCK_OFFSET, Superblock, VOLUME_WITHOUT_XATTRS,
};
use crate::ids::DiffId;
use crate::tree::Timestamp;

/// Features that this reader knows.
const FEATURES: u32 = FEATURE_INCOMPAT_ZERO_PADDING | FEATURE_INCOMPAT_CHUNKED_FILE | FEATURE_INCOMPAT_DEVICE_TABLE;

/// An inode of an image, by its place: what the kernel shows as `st_ino`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nid(pub u64);

impl fmt::Display for Nid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// An external device, in the order of the tree's layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSlot {
    /// What the image calls it; ours write the diffID's 64 hexadecimal digits.
    pub tag: [u8; 64],
    /// The layer that the tag names, if it is a diffID.
    pub diff_id: Option<DiffId>,
    /// Its length in blocks of the image, rounded up.
    pub blocks: u32,
}

/// What the superblock says, checked.
#[derive(Debug, Clone, Copy)]
struct Geometry {
    block_bits: u8,
    meta_start: u64,
    xattr_start: u64,
    root: Nid,
    inode_count: u64,
    epoch: Timestamp,
    devices_start: u64,
    device_count: u16,
    /// Bits of a device number that count (`device_id_mask`, fs/erofs/super.c).
    device_mask: u16,
    has_any_xattr: bool,
}

/// The image's bytes and what they are divided into: what all questions work on.
#[derive(Debug, Clone, Copy)]
struct View<'a> {
    bytes: &'a [u8],
    geometry: &'a Geometry,
}

impl<'a> View<'a> {
    /// `len` bytes from `at`, if the image has them.
    fn slice(self, at: u64, len: u64) -> Option<&'a [u8]> {
        let start = usize::try_from(at).ok()?;
        let len = usize::try_from(len).ok()?;
        self.bytes.get(start..start.checked_add(len)?)
    }

    /// A fixed part at `at`.
    fn get<T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned>(
        self,
        at: u64,
    ) -> Option<&'a T> {
        T::ref_from_bytes(self.slice(at, size_of::<T>() as u64)?).ok()
    }

    fn block_len(self) -> u64 {
        1 << self.geometry.block_bits
    }

    fn device_blocks(self, index: u16) -> Option<u32> {
        (index < self.geometry.device_count).then_some(())?;
        let slot: &DeviceTableSlot = self.get(self.geometry.devices_start + u64::from(index) * DEVICE_SLOT_LEN)?;
        Some(slot.blocks.get())
    }
}

/// An EROFS image in `bytes`: a memory map, [`bytes::Bytes`], or a slice.
///
/// All questions take `&self` and may be asked from many threads at once.
#[derive(Debug, Clone)]
pub struct Image<B> {
    bytes: B,
    geometry: Geometry,
}

impl<B: AsRef<[u8]>> Image<B> {
    /// Opens an image.
    ///
    /// # Errors
    /// When the superblock is missing, damaged, or asks for features that this reader does not know, or when the root
    /// is no directory.
    pub fn open(bytes: B) -> Result<Self, ReadError> {
        let geometry = Geometry::read(bytes.as_ref())?;
        let image = Self { bytes, geometry };
        Directory::open(image.view(), image.root())?;
        Ok(image)
    }

    fn view(&self) -> View<'_> {
        View { bytes: self.bytes.as_ref(), geometry: &self.geometry }
    }

    /// The bytes of the whole image.
    pub fn bytes(&self) -> &B {
        &self.bytes
    }

    /// The external devices, first the one that extents call index 0.
    pub fn devices(&self) -> impl ExactSizeIterator<Item = DeviceSlot> + '_ {
        let view = self.view();
        // The table's bounds were checked when the image was opened.
        let table = view.slice(view.geometry.devices_start, u64::from(view.geometry.device_count) * DEVICE_SLOT_LEN);
        let slots = table.and_then(|table| <[DeviceTableSlot]>::ref_from_bytes(table).ok()).unwrap_or_default();
        slots.iter().map(|slot| DeviceSlot { tag: slot.tag, diff_id: diff_id_of(&slot.tag), blocks: slot.blocks.get() })
    }

    /// The root directory.
    pub fn root(&self) -> Nid {
        self.geometry.root
    }

    /// Number of inodes, by the superblock.
    pub fn inode_count(&self) -> u64 {
        self.geometry.inode_count
    }

    /// Length of a block in bytes; 512 in our own images.
    pub fn block_len_bytes(&self) -> u64 {
        self.view().block_len()
    }

    /// Whether any inode may have an extended attribute. `false` allows to answer all questions for one without a look.
    ///
    /// Our writer knows, and says so in the volume name; an image with another volume name is taken to have some.
    pub fn has_any_xattr(&self) -> bool {
        self.geometry.has_any_xattr
    }

    /// What stat(2) says of an inode.
    ///
    /// # Errors
    /// When there is no such inode, or it is damaged.
    pub fn stat(&self, nid: Nid) -> Result<Attributes, ReadError> {
        Inode::read(self.view(), nid)?.attributes()
    }

    /// The inode that `directory` calls `name`, `.` and `..` included.
    ///
    /// # Errors
    /// When `directory` is none, or damaged on the way to the name.
    pub fn lookup(&self, directory: Nid, name: &[u8]) -> Result<Option<Nid>, ReadError> {
        Directory::open(self.view(), directory)?.lookup(name)
    }

    /// The entries of `directory` from `offset` on, `.` and `..` included. Offsets are 0 for the first entry, or the
    /// [`next_offset`](DirEntry::next_offset) of the last one seen; any other gives the entries behind it.
    ///
    /// # Errors
    /// When `directory` is none, or damaged.
    pub fn readdir(&self, directory: Nid, offset: u64) -> Result<ReadDir<'_>, ReadError> {
        Ok(Directory::open(self.view(), directory)?.entries_from(offset))
    }

    /// The target of a symlink, borrowed from the image except where another writer cut it in two.
    ///
    /// # Errors
    /// When the inode is no symlink, or damaged.
    pub fn readlink(&self, nid: Nid) -> Result<Cow<'_, [u8]>, ReadError> {
        let inode = Inode::read(self.view(), nid)?;
        if inode.file_type()? != FileType::Symlink {
            return Err(ReadError::Kind { nid, expected: "symlink" });
        }
        let flat = inode.flat_data()?;
        Ok(match (flat.blocks, flat.tail) {
            (blocks, []) => Cow::Borrowed(blocks),
            ([], tail) => Cow::Borrowed(tail),
            (blocks, tail) => Cow::Owned([blocks, tail].concat()),
        })
    }

    /// All extended attributes of an inode that the kernel would show to root.
    ///
    /// # Errors
    /// When the inode is damaged.
    pub fn xattrs(&self, nid: Nid) -> Result<XattrEntries<'_>, ReadError> {
        XattrEntries::new(&Inode::read(self.view(), nid)?)
    }

    /// The names of an inode's extended attributes.
    ///
    /// # Errors
    /// When the inode is damaged.
    pub fn xattr_names(
        &self,
        nid: Nid,
    ) -> Result<impl Iterator<Item = Result<super::XattrName<'_>, ReadError>>, ReadError> {
        Ok(self.xattrs(nid)?.map(|entry| entry.map(|entry| entry.name)))
    }

    /// The value of the extended attribute with the full name `name`.
    ///
    /// # Errors
    /// When the inode is damaged.
    pub fn xattr(&self, nid: Nid, name: &[u8]) -> Result<Option<&[u8]>, ReadError> {
        for entry in self.xattrs(nid)? {
            let entry = entry?;
            if entry.name == *name {
                return Ok(Some(entry.value));
            }
        }
        Ok(None)
    }

    /// Where the bytes `range` of a regular file are, cut at the file's end: ranges in order, without gaps, neighbours
    /// in one piece joined.
    ///
    /// # Errors
    /// When the inode is no regular file, or damaged.
    pub fn extents(&self, nid: Nid, range: Range<u64>) -> Result<Extents<'_>, ReadError> {
        Extents::new(self.view(), nid, range)
    }
}

impl Geometry {
    fn read(bytes: &[u8]) -> Result<Self, ReadError> {
        let len_bytes = bytes.len() as u64;
        let truncated = |what| ReadError::Truncated { len_bytes, what };
        let from_superblock = bytes.get(SUPERBLOCK_OFFSET..).ok_or_else(|| truncated("superblock"))?;
        let (superblock, _) = Superblock::ref_from_prefix(from_superblock).map_err(|_| truncated("superblock"))?;
        if superblock.magic.get() != MAGIC {
            return Err(ReadError::Magic);
        }
        let block_bits = superblock.block_bits;
        if !(BLOCK_BITS..=BLOCK_BITS_MAX).contains(&block_bits) || superblock.directory_block_bits != 0 {
            return Err(ReadError::BlockSize(block_bits.saturating_add(superblock.directory_block_bits)));
        }
        if superblock.feature_compat.get() & FEATURE_COMPAT_CHECKSUM != 0 {
            check_checksum(superblock, from_superblock, len_bytes)?;
        }
        let unknown = superblock.feature_incompat.get() & !FEATURES;
        if unknown != 0 {
            return Err(ReadError::Features(unknown));
        }
        let has_devices = superblock.feature_incompat.get() & FEATURE_INCOMPAT_DEVICE_TABLE != 0;
        let device_count = if has_devices { superblock.extra_devices.get() } else { 0 };
        let devices_start = u64::from(superblock.device_table_slot.get()) * DEVICE_SLOT_LEN;
        if device_count > 0 && devices_start + u64::from(device_count) * DEVICE_SLOT_LEN > len_bytes {
            return Err(truncated("device table"));
        }
        Ok(Self {
            block_bits,
            meta_start: u64::from(superblock.meta_block.get()) << block_bits,
            xattr_start: u64::from(superblock.xattr_block.get()) << block_bits,
            root: Nid(u64::from(superblock.root_nid.get())),
            inode_count: superblock.inode_count.get(),
            epoch: Timestamp {
                // Seconds before 1970 are two's complement.
                seconds: superblock.build_time.get() as i64,
                nanoseconds: superblock.build_time_nanoseconds.get(),
            },
            devices_start,
            device_count,
            device_mask: (u32::from(device_count) + 1).next_power_of_two().wrapping_sub(1) as u16,
            has_any_xattr: superblock.volume_name != VOLUME_WITHOUT_XATTRS,
        })
    }
}

/// Checks the sum over the rest of the superblock's block (fs/erofs/super.c, `erofs_superblock_csum_verify`).
fn check_checksum(superblock: &Superblock, from_superblock: &[u8], len_bytes: u64) -> Result<(), ReadError> {
    let block_len = 1_usize << superblock.block_bits;
    let covered = if block_len > SUPERBLOCK_OFFSET { block_len - SUPERBLOCK_OFFSET } else { block_len };
    let covered =
        from_superblock.get(..covered).ok_or(ReadError::Truncated { len_bytes, what: "superblock's block" })?;
    let mut summed = covered.to_vec();
    let expected = superblock.checksum.get();
    let without = Superblock { checksum: 0.into(), ..*superblock };
    summed[..size_of::<Superblock>()].copy_from_slice(without.as_bytes());
    let actual = crc32c(&summed);
    if actual == expected { Ok(()) } else { Err(ReadError::Checksum { expected, actual }) }
}

fn diff_id_of(tag: &[u8; 64]) -> Option<DiffId> {
    DiffId::from_str(&format!("sha256:{}", std::str::from_utf8(tag).ok()?)).ok()
}
