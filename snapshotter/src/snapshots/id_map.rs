//! User id mappings, as containerd writes them into labels.

use thiserror::Error;

/// Most ranges of a mapping; the kernel takes 340 (user_namespaces(7)).
const RANGES_MAX: usize = 340;

/// A mapping that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{0}' is no id mapping; write CONTAINER:HOST:SIZE, with commas between several, one of them from 0")]
pub(super) struct IdMapError(String);

/// The id outside that a container's root has by the mapping `text`: `CONTAINER:HOST:SIZE`, comma-separated.
pub(super) fn root_of(text: &str) -> Result<u32, IdMapError> {
    let wrong = || IdMapError(text.chars().take(256).collect());
    let mut root = None;
    let mut count = 0;
    for range in text.split(',') {
        count += 1;
        let numbers: Vec<u32> = range.split(':').map(str::parse).collect::<Result<_, _>>().map_err(|_| wrong())?;
        let &[container, host, size] = numbers.as_slice() else { return Err(wrong()) };
        let fits = |first: u32| first.checked_add(size).is_some();
        if size == 0 || !fits(container) || !fits(host) || count > RANGES_MAX {
            return Err(wrong());
        }
        if container == 0 {
            root = Some(host);
        }
    }
    root.ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_found_and_nonsense_refused() {
        assert_eq!(root_of("0:1000:65536"), Ok(1000));
        assert_eq!(root_of("1:7:10,0:2000:1"), Ok(2000));
        for wrong in ["", "0", "0:1", "0:1:0", "1:1:1", "a:b:c", "0:1:2:3", "0:4294967295:2", "0:-1:1", "0:1:1,"] {
            assert!(root_of(wrong).is_err(), "{wrong}");
        }
    }
}
