//! Extended attributes: which of a tar's records end up on the file, as containerd and the kernel decide, and sets of
//! them, stored once.

use std::collections::HashMap;
use std::sync::Arc;

use super::error::XattrFault;
use super::{NAME_LEN_MAX_BYTES, XATTR_VALUE_LEN_MAX_BYTES};
use crate::tree::Xattr;

/// Bytes that a table of contents spends on an attribute beside its name and value.
const RECORD_LEN: usize = 5;
/// Name of the file capability attribute.
pub(super) const CAPABILITY: &[u8] = b"security.capability";

/// Whether a file can have `user.*` attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum UserXattrs {
    /// Regular files and directories.
    Allowed,
    /// All others: such attributes are left out.
    LeftOut,
}

/// Whether `xattr` ends up on the file. Attributes of namespaces that the kernel does not have are left out, and so
/// are `trusted.*`, which containerd never sets: an image cannot mark a directory opaque by a record.
pub(super) fn admit(xattr: &Xattr, user: UserXattrs) -> Result<bool, XattrFault> {
    let name = xattr.name.as_slice();
    if name.is_empty() || name.len() > NAME_LEN_MAX_BYTES {
        return Err(XattrFault::Name);
    }
    if xattr.value.len() > XATTR_VALUE_LEN_MAX_BYTES {
        return Err(XattrFault::ValueTooLong);
    }
    let kept = match name {
        b"user." | b"security." => return Err(XattrFault::Name),
        CAPABILITY if is_capability(&xattr.value) => true,
        CAPABILITY => return Err(XattrFault::Capability),
        b"system.posix_acl_access" | b"system.posix_acl_default" => is_acl(&xattr.value),
        _ if name.starts_with(b"user.") => user == UserXattrs::Allowed,
        _ => name.starts_with(b"security."),
    };
    Ok(kept)
}

/// `struct vfs_cap_data` of version 2 (20 bytes) or 3 (24 bytes), the only ones that the kernel takes.
fn is_capability(value: &[u8]) -> bool {
    let version = value.get(3).copied();
    matches!((value.len(), version), (20, Some(2)) | (24, Some(3)))
}

/// `struct posix_acl_xattr_header` of version 2 with entries of 8 bytes.
fn is_acl(value: &[u8]) -> bool {
    value.starts_with(&[2, 0, 0, 0]) && value.len() % 8 == 4
}

/// Sets of attributes, each sorted by name and stored once. Set 0 is the empty one.
#[derive(Debug, Default)]
pub(super) struct XattrSets {
    sets: Vec<Arc<[Xattr]>>,
    numbers: HashMap<Arc<[Xattr]>, u32>,
    len_bytes: u64,
}

/// The sets are over their limit of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SetsFull;

impl XattrSets {
    /// The number of the set.
    pub(super) fn intern(&mut self, xattrs: Vec<Xattr>, limit_bytes: u64) -> Result<u32, SetsFull> {
        if xattrs.is_empty() {
            return Ok(0);
        }
        if let Some(number) = self.numbers.get(xattrs.as_slice()) {
            return Ok(*number);
        }
        let len: usize = xattrs.iter().map(|xattr| RECORD_LEN + xattr.name.len() + xattr.value.len()).sum();
        self.len_bytes += len as u64;
        if self.len_bytes > limit_bytes {
            return Err(SetsFull);
        }
        let set: Arc<[Xattr]> = xattrs.into();
        self.sets.push(Arc::clone(&set));
        // At most one new set an entry, so the number of sets fits.
        let number = self.sets.len() as u32;
        self.numbers.insert(set, number);
        Ok(number)
    }

    /// The set `number`.
    pub(super) fn get(&self, number: u32) -> &[Xattr] {
        number.checked_sub(1).and_then(|index| self.sets.get(index as usize)).map_or(&[], |set| set)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Case = (&'static [u8], &'static [u8], UserXattrs, Result<bool, XattrFault>);

    #[test]
    fn attributes_are_admitted_as_the_kernel_does() {
        const TOO_LONG: &[u8] = &[0; 65537];
        const CAPABILITY_2: &[u8] = &[1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let cases: [Case; 12] = [
            (b"user.a", b"", UserXattrs::Allowed, Ok(true)),
            (b"user.a", b"", UserXattrs::LeftOut, Ok(false)),
            (b"user.overlay.opaque", b"y", UserXattrs::Allowed, Ok(true)),
            (b"trusted.overlay.opaque", b"y", UserXattrs::Allowed, Ok(false)),
            (b"unknown", b"", UserXattrs::Allowed, Ok(false)),
            (b"security.selinux", b"x\0", UserXattrs::LeftOut, Ok(true)),
            (CAPABILITY, CAPABILITY_2, UserXattrs::LeftOut, Ok(true)),
            (CAPABILITY, b"x", UserXattrs::LeftOut, Err(XattrFault::Capability)),
            (b"system.posix_acl_access", &[2, 0, 0, 0], UserXattrs::Allowed, Ok(true)),
            (b"system.posix_acl_access", &[1, 0, 0, 0], UserXattrs::Allowed, Ok(false)),
            (b"user.", b"", UserXattrs::Allowed, Err(XattrFault::Name)),
            (b"user.a", TOO_LONG, UserXattrs::Allowed, Err(XattrFault::ValueTooLong)),
        ];
        for (name, value, user, expected) in cases {
            let xattr = Xattr { name: name.to_vec(), value: value.to_vec() };
            assert_eq!(admit(&xattr, user), expected, "{}", name.escape_ascii());
        }
    }

    #[test]
    fn equal_sets_are_stored_once_within_the_limit() {
        let set = |value: &[u8]| vec![Xattr { name: b"user.a".to_vec(), value: value.to_vec() }];
        let mut sets = XattrSets::default();
        assert_eq!(sets.intern(Vec::new(), 0), Ok(0));
        assert_eq!(sets.intern(set(b"1"), 24), Ok(1));
        assert_eq!(sets.intern(set(b"2"), 24), Ok(2));
        assert_eq!(sets.intern(set(b"1"), 24), Ok(1));
        assert_eq!(sets.intern(set(b"3"), 24), Err(SetsFull));
        assert_eq!(sets.get(2), set(b"2").as_slice());
        assert!(sets.get(0).is_empty());
    }
}
