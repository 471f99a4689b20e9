//! What is known of the starts of an image, kept beside its record.
//!
//! The store does not read it: what a part holds is its owner's business. Parts that are put together are there together or
//! not at all, durably when [`Store::put_profile`] returns. They go with the image ([`Store::remove_image`]).

use hermes_image::ids::Digest;

use crate::error::StoreError;
use crate::store::Store;

/// Parts of what is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProfilePart {
    /// The starts that this node has recorded.
    Records,
    /// What these have in common.
    Own,
    /// What somebody else has made of theirs.
    Given,
}

impl ProfilePart {
    /// In the key.
    const fn code(self) -> u8 {
        match self {
            Self::Records => 0,
            Self::Own => 1,
            Self::Given => 2,
        }
    }
}

impl Store {
    /// Keeps parts of what is known of the starts of an image, durably; replaces those that were there.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn put_profile(&self, manifest: Digest, parts: &[(ProfilePart, &[u8])]) -> Result<(), StoreError> {
        let parts: Vec<_> = parts.iter().map(|(part, bytes)| (part.code(), *bytes)).collect();
        self.shared.catalogue.put_profile(manifest, &parts)
    }

    /// A part of what is known of the starts of an image; `None` when there is none.
    ///
    /// # Errors
    /// When the catalogue cannot be read.
    pub fn profile(&self, manifest: Digest, part: ProfilePart) -> Result<Option<Vec<u8>>, StoreError> {
        self.shared.catalogue.profile(manifest, part.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StoreConfig;

    #[test]
    fn parts_are_kept_apart_survive_and_go_with_the_image() {
        let folder = tempfile::tempdir().expect("a folder");
        let (a, b) = (Digest([1; 32]), Digest([2; 32]));
        let store = Store::open(StoreConfig::new(folder.path())).expect("opens");
        store.put_profile(a, &[(ProfilePart::Records, b"runs"), (ProfilePart::Own, b"own")]).expect("kept");
        store.put_profile(b, &[(ProfilePart::Given, b"given")]).expect("kept");
        store.put_profile(a, &[(ProfilePart::Own, b"newer")]).expect("replaced");
        drop(store);
        let store = Store::open(StoreConfig::new(folder.path())).expect("opens again");
        let part = |digest, part| store.profile(digest, part).expect("reads");
        assert_eq!(part(a, ProfilePart::Records).as_deref(), Some(b"runs".as_slice()));
        assert_eq!(part(a, ProfilePart::Own).as_deref(), Some(b"newer".as_slice()));
        assert_eq!(part(a, ProfilePart::Given), None);
        store.remove_image(a).expect("removed");
        assert_eq!([ProfilePart::Records, ProfilePart::Own].map(|of| part(a, of)), [None, None]);
        assert_eq!(part(b, ProfilePart::Given).as_deref(), Some(b"given".as_slice()));
    }
}
