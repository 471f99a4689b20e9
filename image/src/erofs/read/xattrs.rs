//! Extended attributes of an inode: its own first, then those that it shares.

use zerocopy::FromBytes;

use super::inode::Inode;
use super::{Nid, ReadError, View};
use crate::erofs::XattrName;
use crate::erofs::layout::{XATTR_ENTRY_LEN, XattrEntryHeader, XattrHeader};

/// An extended attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrEntry<'a> {
    /// Full name.
    pub name: XattrName<'a>,
    /// Value, any bytes.
    pub value: &'a [u8],
}

/// The extended attributes of an inode. Ends after the first error.
#[derive(Debug, Clone)]
pub struct XattrEntries<'a> {
    view: View<'a>,
    nid: Nid,
    /// Entries of the inode itself that were not looked at yet.
    inline: &'a [u8],
    /// Ids of shared ones that were not looked at yet, four bytes each.
    shared: &'a [u8],
}

impl<'a> XattrEntries<'a> {
    pub(super) fn new(inode: &Inode<'a>) -> Result<Self, ReadError> {
        let (view, nid) = (inode.view, inode.nid);
        if inode.xattrs_len == 0 {
            return Ok(Self { view, nid, inline: &[], shared: &[] });
        }
        let body = view
            .slice(inode.xattrs_at, inode.xattrs_len)
            .ok_or_else(|| inode.damaged("its extended attributes lie outside of the image"))?;
        let (header, rest) =
            XattrHeader::ref_from_prefix(body).map_err(|_| inode.damaged("its extended attributes have no header"))?;
        let (shared, inline) = rest
            .split_at_checked(4 * usize::from(header.shared_count))
            .ok_or_else(|| inode.damaged("it shares more extended attributes than it has room for"))?;
        Ok(Self { view, nid, inline, shared })
    }

    /// The next entry; `Some(None)` for one that the kernel would hide.
    fn advance(&mut self) -> Option<Result<Option<XattrEntry<'a>>, ReadError>> {
        let outside = ReadError::Damaged { nid: self.nid, what: "an extended attribute lies outside of its area" };
        if !self.inline.is_empty() {
            let parsed = entry_at(self.inline);
            return Some(parsed.map_or(Err(outside), |(entry, len)| {
                self.inline = self.inline.get(len..).unwrap_or_default();
                Ok(entry)
            }));
        }
        let (id, rest) = self.shared.split_first_chunk::<4>()?;
        self.shared = rest;
        let at = self.view.geometry.xattr_start + 4 * u64::from(u32::from_le_bytes(*id));
        let area = usize::try_from(at).ok().and_then(|at| self.view.bytes.get(at..));
        Some(area.and_then(entry_at).map(|(entry, _)| entry).ok_or(outside))
    }
}

/// The entry at the start of `bytes` and its padded length; no entry if its prefix is not known.
fn entry_at(bytes: &[u8]) -> Option<(Option<XattrEntry<'_>>, usize)> {
    let (header, rest) = XattrEntryHeader::ref_from_prefix(bytes).ok()?;
    let (suffix, rest) = rest.split_at_checked(header.name_len.into())?;
    let value = rest.get(..header.value_len.get().into())?;
    let len = (XATTR_ENTRY_LEN + suffix.len() + value.len()).next_multiple_of(4);
    Some((XattrName::new(header.name_index, suffix).map(|name| XattrEntry { name, value }), len))
}

impl<'a> Iterator for XattrEntries<'a> {
    type Item = Result<XattrEntry<'a>, ReadError>;

    fn next(&mut self) -> Option<Self::Item> {
        // Every round takes bytes from one of the two slices.
        loop {
            match self.advance()? {
                Ok(None) => {}
                Ok(Some(entry)) => return Some(Ok(entry)),
                Err(error) => {
                    (self.inline, self.shared) = (&[], &[]);
                    return Some(Err(error));
                }
            }
        }
    }
}
