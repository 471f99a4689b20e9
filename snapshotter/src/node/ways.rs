//! Which ways to show a tree work on this kernel, and choosing among them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hermes_image::ids::ChunkNo;
use hermes_image::verify::Verified;
use hermes_store::{LayerUse, Store};
use parking_lot::Mutex;

use super::NodeError;
use crate::fetch::FetchHandle;
use crate::fs::layers::{LayerCaching, LayerDirectory, LayerFs};
use crate::fs::read::{LayerFile, Reader};
use crate::fs::session::{FuseSession, SessionConfig};
use crate::mounts::erofs::Backing;
use crate::mounts::probe;
use crate::status::{Way, WayStatus};

/// What was found out at start, and the connection that serves layer files.
#[derive(Debug)]
pub(super) struct Ways {
    /// How EROFS can be mounted over plain files, if at all.
    pub(super) files: Result<Backing, String>,
    /// How EROFS can be mounted over files of FUSE, if at all.
    pub(super) fuse: Result<Backing, String>,
    /// Whether there is FUSE.
    pub(super) tree: Result<(), String>,
    /// Where layer files are served.
    pub(super) layers_dir: PathBuf,
    session: Mutex<Option<FuseSession>>,
    _probe: LayerUse,
}

impl Ways {
    /// Starts serving layer files below `state` and tries each way.
    pub(super) async fn probe(
        state: &Path,
        store: &Arc<Store>,
        fetch: &FetchHandle,
        directory: &Arc<LayerDirectory>,
        reader: &Reader,
        backing: Option<Backing>,
    ) -> Result<Self, NodeError> {
        let (state, store, fetch) = (state.to_owned(), Arc::clone(store), fetch.clone());
        let (directory, reader) = (Arc::clone(directory), reader.clone());
        let probed = tokio::task::spawn_blocking(move || {
            Self::probe_blocking(&state, &store, fetch, directory, reader, backing)
        });
        probed.await.map_err(|_| NodeError::Interrupted)?
    }

    fn probe_blocking(
        state: &Path,
        store: &Arc<Store>,
        fetch: FetchHandle,
        directory: Arc<LayerDirectory>,
        reader: Reader,
        wanted: Option<Backing>,
    ) -> Result<Self, NodeError> {
        let (layers_dir, scratch, image) = (state.join("layers"), state.join("probe"), state.join("probe.erofs"));
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| NodeError::Io { what, path, source }
        };
        for folder in [&layers_dir, &scratch] {
            std::fs::create_dir_all(folder).map_err(io("make", folder))?;
        }
        let layer = store.layer(&probe::chunk_table())?;
        let held = layer.hold();
        let bytes = Verified::chunk(layer.table().chunk_id(ChunkNo(0)), probe::layer_bytes());
        layer.put(ChunkNo(0), &bytes.map_err(|_| NodeError::Interrupted)?)?;
        let name = layer.diff_id().hex();
        let plain = layer.path().to_owned();
        directory.insert(Arc::new(LayerFile { layer, fetch, marks: Arc::default() }));
        let tree = probe::tree_image().map_err(|error| NodeError::Damaged {
            image: "the probe".to_owned(),
            what: "tree",
            reason: error.to_string(),
        })?;
        std::fs::write(&image, tree).map_err(io("write", &image))?;

        let session = FuseSession::start(
            LayerFs::new(directory, reader, LayerCaching::default()),
            &layers_dir,
            SessionConfig::default(),
        );
        let through = |device: &Path| {
            let tried = Backing::ALL.into_iter().filter(|backing| wanted.is_none_or(|wanted| wanted == *backing));
            let mut reasons = Vec::new();
            for backing in tried {
                match probe::try_erofs(&image, device, &scratch, backing) {
                    Ok(()) => return Ok(backing),
                    Err(reason) => reasons.push(format!("through {}: {reason}", backing.name())),
                }
            }
            Err(reasons.join("; "))
        };
        let files = through(&plain);
        let (fuse, tree, session) = match session {
            Ok(session) => (through(&layers_dir.join(name)), Ok(()), Some(session)),
            Err(error) => (Err(error.to_string()), Err(error.to_string()), None),
        };
        let ways = Self { files, fuse, tree, layers_dir, session: Mutex::new(session), _probe: held };
        tracing::info!(ways = ?ways.status(), "probed the kernel");
        Ok(ways)
    }

    /// For `hermes status`.
    pub(super) fn status(&self) -> Vec<WayStatus> {
        let backing = |backing: &Result<Backing, String>| match backing {
            Ok(backing) => (true, format!("through {}", backing.name())),
            Err(reason) => (false, reason.clone()),
        };
        let tree = match &self.tree {
            Ok(()) => (true, "any kernel with FUSE".to_owned()),
            Err(reason) => (false, reason.clone()),
        };
        let ways =
            [(Way::ErofsFiles, backing(&self.files)), (Way::ErofsFuse, backing(&self.fuse)), (Way::FuseTree, tree)];
        ways.into_iter().map(|(way, (available, detail))| WayStatus { way, available, detail }).collect()
    }

    /// The best way that works, or the one that was asked for.
    ///
    /// # Errors
    /// When the one that was asked for, or every one, does not work.
    pub(super) fn choose(&self, wanted: Option<Way>, complete: bool) -> Result<Way, NodeError> {
        let check = |way: Way| match way {
            Way::ErofsFiles if !complete => {
                Err("the image is not complete on this node; `hermes complete` fetches the rest".to_owned())
            }
            Way::ErofsFiles => self.files.clone().map(drop),
            Way::ErofsFuse => self.fuse.clone().map(drop),
            Way::FuseTree => self.tree.clone(),
        };
        if let Some(way) = wanted {
            return check(way).map(|()| way).map_err(|reason| NodeError::Way { way, reason });
        }
        let mut last = String::new();
        for way in [Way::ErofsFiles, Way::ErofsFuse, Way::FuseTree] {
            match check(way) {
                Ok(()) => return Ok(way),
                Err(reason) => last = reason,
            }
        }
        Err(NodeError::Way { way: Way::FuseTree, reason: last })
    }

    /// Ends the connection that serves layer files.
    pub(super) async fn stop(&self) {
        let session = self.session.lock().take();
        let _ = tokio::task::spawn_blocking(move || drop(session)).await;
    }
}
