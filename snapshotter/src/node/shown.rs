//! Where the trees of containers are shown, and handing them over to the kernel.
//!
//! A tree is first shown at `trees/<chain ID>` below the state folder. Is its image complete by then, the kernel reads
//! the store's files from the first moment. Else it is shown lazily there, and when the image has become complete, and a
//! container is prepared after that, it is shown once more, at `trees/<chain ID>.whole`, by kernel EROFS over the files:
//! no daemon in the path. Containers that run go on at the place that they were given, and the lazy place goes with the
//! last of them ([`crate::snapshots`]).
//!
//! **Invariant:** the kernel reads a layer's file itself only when every chunk is present *and* durable (it is synced
//! before the mount), and as long as it does, the layer is held and its image pinned: nothing of it is evicted, no hole
//! is punched, the layer is not removed. Both are the same as for every other mount ([`super::mount`]), and the mount's
//! record outlives the daemon, so the next one holds the layers again before anything could be evicted.
//!
//! A crash leaves either the lazy place alone, or both with a record each. A machine that lost its power has no mounts;
//! the next daemon shows what snapshots need anew, and finds the image as complete as the catalogue says: what was not
//! synced by then is fetched again, and the tree is shown lazily until it is whole once more.

use std::path::{Path, PathBuf};
use std::time::Instant;

use hermes_image::ids::ChainId;

use super::{Inner, MountedImage, Shown};
use crate::mounts;
use crate::mounts::users::overlay_users;
use crate::status::Way;

/// Where trees are mounted, below the state folder.
const TREES_FOLDER: &str = "trees";
/// What the second place of a tree has after the first one's name.
const WHOLE_SUFFIX: &str = ".whole";

/// The places of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Places {
    /// The first one.
    pub(super) first: PathBuf,
    /// Where it is shown again when it was shown lazily and has become complete.
    pub(super) whole: PathBuf,
}

impl Places {
    /// Those of `chain` for a node with the state folder `state`.
    pub(super) fn of(state: &Path, chain: ChainId) -> Self {
        let (trees, name) = (state.join(TREES_FOLDER), chain.hex());
        Self { whole: trees.join(format!("{name}{WHOLE_SUFFIX}")), first: trees.join(name) }
    }

    /// Both.
    pub(super) fn all(&self) -> [&Path; 2] {
        [&self.first, &self.whole]
    }
}

/// Where somebody who needs a tree now finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    /// It is shown there in the best way that is possible now.
    Shown(PathBuf),
    /// It is shown lazily at `lazy`, and could be shown without the daemon at the other place.
    CanBeWhole {
        /// Where it is.
        lazy: PathBuf,
    },
    /// It is not shown.
    Nowhere,
}

impl MountedImage {
    /// Lets the kernel read far ahead when there is nothing that it could cause to be fetched.
    pub(super) fn lengthen_read_ahead(&self) {
        if let Shown::Erofs(mounted) = &self.shown
            && self.layers.iter().all(|layer| layer.layer.is_complete())
        {
            mounted.set_read_ahead(mounts::erofs::LOCAL_READ_AHEAD_KIB);
        }
    }

    /// Leaves a tree to the containers on it that need no daemon to read it; whether there are any.
    pub(super) fn leave_to_users(&mut self) -> bool {
        let is_direct = self.way == Way::ErofsFiles;
        let Shown::Erofs(mounted) = &mut self.shown else { return false };
        let is_used = is_direct && overlay_users(&self.dir).is_ok_and(|users| !users.is_empty());
        if is_used {
            mounted.leave();
        }
        is_used
    }
}

impl Inner {
    /// Where the tree with these places is shown, and whether there is a better way by now. Notes that a container is
    /// being prepared on it.
    pub(super) async fn find_shown(&self, places: &Places) -> Found {
        let mut images = self.images.lock().await;
        let mut here: Vec<_> = images.iter_mut().filter(|image| places.all().contains(&image.dir.as_path())).collect();
        let is_complete = here.iter().any(|image| image.layers.iter().all(|layer| layer.layer.is_complete()));
        for image in &mut here {
            image.prepared = Instant::now();
        }
        // What is read without the daemon is right as long as everything is here; damage is fetched again.
        if let Some(direct) = here.iter().find(|image| image.way == Way::ErofsFiles)
            && (is_complete || here.len() == 1)
        {
            return Found::Shown(direct.dir.clone());
        }
        let lazy = here.iter().find(|image| image.way != Way::ErofsFiles);
        let Some(lazy) = lazy.map(|image| image.dir.clone()) else { return Found::Nowhere };
        let is_better = is_complete && matches!(self.ways.choose(self.config.way, true), Ok(Way::ErofsFiles));
        if is_better && lazy == places.first { Found::CanBeWhole { lazy } } else { Found::Shown(lazy) }
    }

    /// The places at which a tree is shown.
    pub(super) async fn shown_places(&self, places: &Places) -> Vec<PathBuf> {
        let images = self.images.lock().await;
        let shown = images.iter().filter(|image| places.all().contains(&image.dir.as_path()));
        shown.map(|image| image.dir.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use hermes_image::ids::DiffId;

    use super::*;

    #[test]
    fn no_place_lies_within_another() {
        let chain = ChainId::of(&[DiffId([1; 32])]).expect("a chain");
        let places = Places::of(Path::new("/state"), chain);
        assert_eq!(places.first, Path::new("/state/trees").join(chain.hex()));
        // Uses of one are not taken for uses of the other.
        assert!(!places.whole.starts_with(&places.first) && !places.first.starts_with(&places.whole));
    }
}
