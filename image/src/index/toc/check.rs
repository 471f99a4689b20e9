//! The one check of a table, after which every accessor reads without looking again.

use super::format::{
    FLAG_IMPLIED, FLAG_OPAQUE, INLINE_FLAG, KIND_BLOCK_DEVICE, KIND_CHAR_DEVICE, KIND_DIRECTORY, KIND_FIFO,
    KIND_HARD_LINK, KIND_REGULAR, KIND_SPARSE, KIND_SYMLINK, KIND_WHITEOUT, u32_at,
};
use super::node::{Node, Xattrs};
use super::{NodeNo, Toc, TocError};
use crate::tar::{BLOCK_LEN_BYTES, SPARSE_SIZE_MAX_BYTES, SYMLINK_LEN_MAX_BYTES, XATTR_VALUE_LEN_MAX_BYTES};

type Fault = &'static str;

impl Toc {
    /// Checks everything that the header does not say.
    pub(super) fn check(&self) -> Result<(), TocError> {
        self.check_xattr_sets()?;
        self.check_order().map_err(|(node, fault)| TocError::Node { node, fault })?;
        for node in self.nodes() {
            self.check_node(&node).map_err(|fault| TocError::Node { node: node.no(), fault })?;
        }
        Ok(())
    }

    fn check_xattr_sets(&self) -> Result<(), TocError> {
        let count = self.layout.set_count;
        let end = |set: u32| u32_at(&self.bytes, self.layout.set_ends + 4 * set as usize);
        if end(0) != 0 || end(count) != self.layout.xattrs_len {
            return Err(TocError::XattrSet { set: count });
        }
        for set in 1..=count {
            if end(set - 1) >= end(set) || end(set) > self.layout.xattrs_len {
                return Err(TocError::XattrSet { set });
            }
            let mut xattrs = Xattrs { bytes: self.xattr_set(set) };
            let mut last: &[u8] = &[];
            for xattr in xattrs.by_ref() {
                if xattr.name <= last || xattr.name.contains(&0) || xattr.value.len() > XATTR_VALUE_LEN_MAX_BYTES {
                    return Err(TocError::XattrSet { set });
                }
                last = xattr.name;
            }
            if !xattrs.bytes.is_empty() {
                return Err(TocError::XattrSet { set });
            }
        }
        Ok(())
    }

    /// Names are in bounds, and nodes are one tree in breadth-first order.
    fn check_order(&self) -> Result<(), (NodeNo, Fault)> {
        let mut next = 1;
        for node in self.nodes() {
            let (no, record) = (node.no(), node.record());
            let (start, len) = (u32_at(record, 0), u32::from(record[4]));
            if u64::from(start) + u64::from(len) > u64::from(self.layout.strings_len) {
                return Err((no, "its name lies outside the string section"));
            }
            let name = node.name();
            let is_name = if no == 0 {
                name.is_empty()
            } else {
                !matches!(name, b"" | b"." | b"..") && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
            };
            if !is_name {
                return Err((no, "its name is not one"));
            }
            if record[5] != KIND_DIRECTORY {
                continue;
            }
            let (first, count, _) = node.content();
            if first != next || count > self.layout.node_count - next {
                return Err((no, "its children do not follow those of the directory before it"));
            }
            next += count;
        }
        if next != self.layout.node_count {
            return Err((next, "it is in no directory"));
        }
        Ok(())
    }

    fn check_node(&self, node: &Node<'_>) -> Result<(), Fault> {
        let record = node.record();
        if matches!(record[5], KIND_HARD_LINK | KIND_WHITEOUT) {
            if record[6..32].iter().any(|byte| *byte != 0) {
                return Err("it has metadata that its kind does not have");
            }
        } else {
            let metadata_fits = node.permissions() <= 0o7777
                && node.mtime().nanoseconds < 1_000_000_000
                && u32_at(record, 28) <= self.layout.set_count;
            if !metadata_fits {
                return Err("its mode, time or attribute set is out of range");
            }
        }
        self.check_content(node)
    }

    fn check_content(&self, node: &Node<'_>) -> Result<(), Fault> {
        let (a, b, c) = node.content();
        let fits = match node.record()[5] {
            KIND_DIRECTORY => {
                let sorted = (a..a + b).is_sorted_by(|left, right| self.node(*left).name() < self.node(*right).name());
                sorted && c & !(FLAG_IMPLIED | FLAG_OPAQUE) == 0
            }
            // The root has no place but at the top, and must be able to hold names.
            _ if node.no() == 0 => return Err("the root is not a directory"),
            KIND_REGULAR => {
                let end = (u64::from(a) * BLOCK_LEN_BYTES).checked_add(c);
                b == 0 && (c > 0 || a == 0) && end.is_some_and(|end| end <= self.layout.logical_len_bytes)
            }
            KIND_SPARSE => return self.check_sparse(a, b, c),
            KIND_SYMLINK => {
                let in_section = u64::from(a) + u64::from(b) <= u64::from(self.layout.strings_len);
                let len_fits = (1..=SYMLINK_LEN_MAX_BYTES).contains(&(b as usize));
                in_section && len_fits && c == 0 && !self.string(a, b).contains(&0)
            }
            KIND_CHAR_DEVICE => a < 1 << 12 && b < 1 << 20 && c == 0 && (a, b) != (0, 0),
            KIND_BLOCK_DEVICE => a < 1 << 12 && b < 1 << 20 && c == 0,
            KIND_FIFO | KIND_WHITEOUT => (a, b, c) == (0, 0, 0),
            KIND_HARD_LINK => {
                let kind_of_target = (a < node.no()).then(|| self.node(a).record()[5]);
                (b, c) == (0, 0) && kind_of_target.is_some_and(|kind| (KIND_REGULAR..=KIND_FIFO).contains(&kind))
            }
            _ => return Err("its kind is not known"),
        };
        if fits { Ok(()) } else { Err("its content is malformed or out of bounds") }
    }

    fn check_sparse(&self, first: u32, count: u32, size: u64) -> Result<(), Fault> {
        let end = u64::from(first) + u64::from(count);
        if end > u64::from(self.layout.extent_count) || size > SPARSE_SIZE_MAX_BYTES {
            return Err("its extents or its size are out of bounds");
        }
        let mut covered = 0;
        for no in first..first + count {
            let (file_offset, len, place) = self.raw_extent(no);
            let file_end = file_offset.checked_add(len).filter(|end| *end <= size);
            let (Some(file_end), true) = (file_end, file_offset >= covered && len > 0) else {
                return Err("its extents are out of order or beyond its size");
            };
            let aligned = file_offset % BLOCK_LEN_BYTES == 0 && (file_end == size || file_end % BLOCK_LEN_BYTES == 0);
            let (place, limit, place_aligned) = if place & INLINE_FLAG == 0 {
                (place, self.layout.logical_len_bytes, place % BLOCK_LEN_BYTES == 0)
            } else {
                (place ^ INLINE_FLAG, u64::from(self.layout.inline_len), true)
            };
            let in_bounds = place.checked_add(len).is_some_and(|end| end <= limit);
            if !(aligned && place_aligned && in_bounds) {
                return Err("its extents are not aligned or point outside the layer");
            }
            covered = file_end;
        }
        Ok(())
    }
}
