//! Paths as Go's `filepath.Clean` sees them: text, of which `.`, `..` and double slashes are taken out before anything
//! is looked up.

use super::{NAME_LEN_MAX_BYTES, PATH_LEN_MAX_BYTES};

/// The names of `path`, cleaned against the root: a `..` takes the name before it away, and nothing above the root.
pub(super) fn clean(path: &[u8]) -> Vec<&[u8]> {
    let mut names = Vec::new();
    append_cleaned(&mut names, path);
    names
}

/// Appends the names of `path` to `names`, cleaned against the root.
pub(super) fn append_cleaned<'a>(names: &mut Vec<&'a [u8]>, path: &'a [u8]) {
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => {
                names.pop();
            }
            name => names.push(name),
        }
    }
}

/// Whether the kernel takes a path of these names.
pub(super) fn fits(names: &[&[u8]]) -> bool {
    let len: usize = names.iter().map(|name| name.len() + 1).sum();
    len <= PATH_LEN_MAX_BYTES && names.iter().all(|name| name.len() <= NAME_LEN_MAX_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_against_the_root() {
        let cases: [(&[u8], &[&[u8]]); 9] = [
            (b"", &[]),
            (b"./", &[]),
            (b"/", &[]),
            (b"../..", &[]),
            (b"a/..", &[]),
            (b"./a//b/./c/", &[b"a", b"b", b"c"]),
            (b"/../a", &[b"a"]),
            (b"a/../../b", &[b"b"]),
            (b"...", &[b"..."]),
        ];
        for (path, names) in cases {
            assert_eq!(clean(path), names, "{}", path.escape_ascii());
        }
    }
}
