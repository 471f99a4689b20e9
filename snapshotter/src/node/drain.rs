//! Emptying a node: which trees are in use, and unmounting those that are not.

use std::path::PathBuf;

use super::{Inner, NodeError};
use crate::mounts::users::{TreeUse, overlay_users};

impl Inner {
    /// Which trees are in use. With `unmount`, those that are not are unmounted; without, all that is mounted counts as
    /// used, because whoever mounted it by hand wants it there.
    pub(super) async fn drain(&self, unmount: bool) -> Result<Vec<TreeUse>, NodeError> {
        let mounted: Vec<(PathBuf, String)> = {
            let images = self.images.lock().await;
            images.iter().map(|image| (image.dir.clone(), image.reference.clone())).collect()
        };
        let mut in_use = Vec::new();
        for (dir, reference) in mounted {
            let overlays = overlay_users(&dir).map_err(|source| NodeError::Io {
                what: "read",
                path: PathBuf::from("/proc/self/mountinfo"),
                source,
            })?;
            if !overlays.is_empty() {
                in_use.extend(overlays);
                continue;
            }
            let user = match unmount {
                false => format!("hermes mount {reference}"),
                true => match self.unmount(&dir).await {
                    // Somebody else may have unmounted it meanwhile.
                    Ok(()) | Err(NodeError::NotMounted { .. }) => continue,
                    Err(NodeError::Busy { .. }) => format!("open files of {reference}"),
                    Err(error) => return Err(error),
                },
            };
            in_use.push(TreeUse { tree: dir, user });
        }
        Ok(in_use)
    }
}
