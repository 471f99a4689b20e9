//! Names of extended attributes: EROFS stores a well-known prefix as one byte.

use std::fmt;

/// Prefixes by `e_name_index` (`EROFS_XATTR_INDEX_*`, fs/erofs/erofs_fs.h). The two ACLs are whole names. Lustre's (5)
/// is missing because the kernel has no handler that would show it.
const PREFIXES: [(u8, &str); 5] =
    [(1, "user."), (2, "system.posix_acl_access"), (3, "system.posix_acl_default"), (4, "trusted."), (6, "security.")];

/// Index of the two names that are their own prefix.
fn is_whole_name(index: u8) -> bool {
    index == 2 || index == 3
}

/// The index of a full name's prefix and what is left of the name; `None` for a name that no kernel shows on EROFS (nor
/// lets anybody set on ext4 or xfs).
pub(super) fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    PREFIXES.iter().find_map(|&(index, prefix)| {
        let suffix = name.strip_prefix(prefix.as_bytes())?;
        (suffix.is_empty() == is_whole_name(index)).then_some((index, suffix))
    })
}

/// The full name of an attribute in an image, in two parts so that nothing is copied.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct XattrName<'a> {
    prefix: &'static str,
    suffix: &'a [u8],
}

impl<'a> XattrName<'a> {
    /// The name with prefix number `index`; `None` for a number that the kernel has no handler for, which it hides.
    pub(super) fn new(index: u8, suffix: &'a [u8]) -> Option<Self> {
        let (_, prefix) = PREFIXES.iter().find(|(known, _)| *known == index)?;
        Some(Self { prefix, suffix })
    }

    /// Length of the full name in bytes.
    #[allow(clippy::len_without_is_empty)] // a name is never empty
    pub fn len(&self) -> usize {
        self.prefix.len() + self.suffix.len()
    }

    /// The namespace part, such as `security.`.
    pub fn prefix(&self) -> &'static str {
        self.prefix
    }

    /// What follows the prefix.
    pub fn suffix(&self) -> &'a [u8] {
        self.suffix
    }

    /// Appends the full name to `out`.
    pub fn append_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(self.prefix.as_bytes());
        out.extend_from_slice(self.suffix);
    }

    /// The full name in one piece.
    pub fn to_vec(&self) -> Vec<u8> {
        [self.prefix.as_bytes(), self.suffix].concat()
    }
}

impl PartialEq<[u8]> for XattrName<'_> {
    fn eq(&self, name: &[u8]) -> bool {
        name.strip_prefix(self.prefix.as_bytes()) == Some(self.suffix)
    }
}

impl fmt::Debug for XattrName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.prefix, self.suffix.escape_ascii())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_split_and_join() {
        for (name, index, suffix) in [
            ("user.a", 1, "a"),
            ("user.a.b", 1, "a.b"),
            ("system.posix_acl_access", 2, ""),
            ("system.posix_acl_default", 3, ""),
            ("trusted.overlay.opaque", 4, "overlay.opaque"),
            ("security.capability", 6, "capability"),
        ] {
            assert_eq!(split(name.as_bytes()), Some((index, suffix.as_bytes())), "{name}");
            let joined = XattrName::new(index, suffix.as_bytes()).expect("a known prefix");
            assert_eq!(joined.to_vec(), name.as_bytes());
            assert_eq!(joined.len(), name.len());
            assert!(joined == *name.as_bytes() && joined != b"user.other"[..]);
        }
    }

    #[test]
    fn names_that_no_kernel_shows_are_none() {
        for name in
            ["", "user.", "trusted.", "user", "system.posix_acl_accessory", "system.nfs4_acl", "lustre.lov", "x"]
        {
            assert_eq!(split(name.as_bytes()), None, "{name}");
        }
    }
}
