//! Directory entries in blocks: first the fixed parts, then the names, as many as a block holds.

use zerocopy::IntoBytes;

use crate::erofs::layout::{BLOCK_LEN, DIRENT_LEN, Dirent};
use crate::tree::InodeIndex;

const BLOCK: usize = BLOCK_LEN as usize;

/// All entries in the order in which a block holds them, `.` and `..` among them: bytewise, so that the kernel can
/// search by halves.
pub(super) fn all_entries(
    entries: &[(Vec<u8>, InodeIndex)],
    itself: InodeIndex,
    parent: InodeIndex,
) -> impl Iterator<Item = (&[u8], InodeIndex)> {
    let dot = entries.partition_point(|(name, _)| name.as_slice() < b".".as_slice());
    let dot_dot = entries.partition_point(|(name, _)| name.as_slice() < b"..".as_slice());
    pairs(&entries[..dot])
        .chain([(b".".as_slice(), itself)])
        .chain(pairs(&entries[dot..dot_dot]))
        .chain([(b"..".as_slice(), parent)])
        .chain(pairs(&entries[dot_dot..]))
}

fn pairs(entries: &[(Vec<u8>, InodeIndex)]) -> impl Iterator<Item = (&[u8], InodeIndex)> {
    entries.iter().map(|(name, inode)| (name.as_slice(), *inode))
}

/// Counts the bytes that entries take, block by block.
#[derive(Debug, Default, Clone, Copy)]
struct Packing {
    full_blocks: u64,
    used: usize,
}

impl Packing {
    /// Adds an entry; whether it is the first of a block that is not the first one.
    fn add(&mut self, name_len: usize) -> bool {
        let len = DIRENT_LEN + name_len;
        let opens_block = self.used + len > BLOCK;
        if opens_block {
            self.full_blocks += 1;
            self.used = 0;
        }
        self.used += len;
        opens_block
    }

    fn len(self) -> u64 {
        self.full_blocks * BLOCK_LEN + self.used as u64
    }
}

/// Size of a directory in bytes: whole blocks, and what the last one uses.
pub(super) fn size<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let mut packing = Packing::default();
    for name in names {
        packing.add(name.len());
    }
    packing.len()
}

/// Writes entries into `out`, which has the [`size`] of the same names and holds zeros. Each entry comes with its
/// nid and file type.
pub(super) fn write<'a>(entries: impl Iterator<Item = (&'a [u8], u64, u8)>, out: &mut [u8]) {
    let mut packing = Packing::default();
    let mut block: Vec<(&[u8], u64, u8)> = Vec::with_capacity(BLOCK / DIRENT_LEN);
    let mut start = 0;
    for entry in entries {
        if packing.add(entry.0.len()) {
            write_block(&block, &mut out[start..start + BLOCK]);
            block.clear();
            start += BLOCK;
        }
        block.push(entry);
    }
    write_block(&block, &mut out[start..]);
}

fn write_block(entries: &[(&[u8], u64, u8)], out: &mut [u8]) {
    let mut name_at = entries.len() * DIRENT_LEN;
    for (no, (name, nid, file_type)) in entries.iter().enumerate() {
        // A block has 512 bytes, so every offset in it fits.
        let dirent =
            Dirent { nid: (*nid).into(), name_offset: (name_at as u16).into(), file_type: *file_type, reserved: 0 };
        out[no * DIRENT_LEN..][..DIRENT_LEN].copy_from_slice(dirent.as_bytes());
        out[name_at..name_at + name.len()].copy_from_slice(name);
        name_at += name.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dots_are_sorted_among_the_names() {
        let entries = [(b"!".to_vec(), 3), (b".-".to_vec(), 4), (b"...".to_vec(), 5), (b"a".to_vec(), 6)];
        let names: Vec<&[u8]> = all_entries(&entries, 1, 2).map(|(name, _)| name).collect();
        assert_eq!(names, [b"!".as_slice(), b".", b".-", b"..", b"...", b"a"]);
        assert!(names.is_sorted());
    }

    #[test]
    fn a_block_is_filled_to_the_last_byte_before_the_next_one_starts() {
        let name = [b'x'; 244];
        assert_eq!(size([name.as_slice(), &name].into_iter()), 512);
        assert_eq!(size([name.as_slice(), &name, b"a"].into_iter()), 512 + 13);
        let long = [b'x'; 255];
        assert_eq!(size([long.as_slice(), &long].into_iter()), 512 + 267);
    }
}
