//! User id mappings, as containerd writes them into labels.

use thiserror::Error;

/// Most ranges of a mapping; the kernel takes 340 (user_namespaces(7)).
const RANGES_MAX: usize = 340;

/// A mapping that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{0}' is no id mapping; write CONTAINER:HOST:SIZE, with commas between several, one of them from 0")]
pub(super) struct IdMapError(String);

/// A mapping of ids, with one for root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IdMap {
    /// First id inside, first id outside, and how many.
    ranges: Vec<[u32; 3]>,
    root: u32,
}

impl IdMap {
    /// Reads `CONTAINER:HOST:SIZE`, comma-separated.
    ///
    /// # Errors
    /// When `text` is something else, or says nothing about root.
    pub(super) fn parse(text: &str) -> Result<Self, IdMapError> {
        let wrong = || IdMapError(text.chars().take(256).collect());
        let mut root = None;
        let mut ranges = Vec::new();
        for range in text.split(',') {
            let numbers: Vec<u32> = range.split(':').map(str::parse).collect::<Result<_, _>>().map_err(|_| wrong())?;
            let &[container, host, size] = numbers.as_slice() else { return Err(wrong()) };
            let fits = |first: u32| first.checked_add(size).is_some();
            if size == 0 || !fits(container) || !fits(host) || ranges.len() == RANGES_MAX {
                return Err(wrong());
            }
            if container == 0 {
                root = Some(host);
            }
            ranges.push([container, host, size]);
        }
        Ok(Self { ranges, root: root.ok_or_else(wrong)? })
    }

    /// The id outside that a container's root has.
    pub(super) fn root(&self) -> u32 {
        self.root
    }

    /// What the kernel wants to be written to a process' `uid_map` or `gid_map` (user_namespaces(7)).
    pub(super) fn for_kernel(&self) -> String {
        self.ranges.iter().map(|[container, host, size]| format!("{container} {host} {size}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_found_and_nonsense_refused() {
        let root = |text| IdMap::parse(text).map(|map| map.root());
        assert_eq!(root("0:1000:65536"), Ok(1000));
        assert_eq!(root("1:7:10,0:2000:1"), Ok(2000));
        for wrong in ["", "0", "0:1", "0:1:0", "1:1:1", "a:b:c", "0:1:2:3", "0:4294967295:2", "0:-1:1", "0:1:1,"] {
            assert!(root(wrong).is_err(), "{wrong}");
        }
        let many = vec!["0:1:1"; RANGES_MAX + 1].join(",");
        assert!(root(&many).is_err() && root(&many[6..]).is_ok());
    }

    #[test]
    fn the_kernel_gets_a_line_for_each_range() {
        let map = IdMap::parse("1:7:10,0:2000:1").expect("a mapping");
        assert_eq!(map.for_kernel(), "1 7 10\n0 2000 1\n");
    }
}
