//! Which ways to show a tree work on this kernel, and choosing among them.
//!
//! Found out by probing, once a kernel: a daemon that takes the connection of its layer files over from another takes
//! what that one has found too. Probing mounts over the daemon's own files; one that is killed within that waits for
//! itself, and the connection that it would go on with is the one that it waits for.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hermes_image::ids::ChunkNo;
use hermes_image::verify::Verified;
use hermes_store::{LayerUse, Store};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::NodeError;
use super::record::LAYERS_CONNECTION;
use crate::fetch::FetchHandle;
use crate::fs::layers::{LayerCaching, LayerDirectory, LayerFs};
use crate::fs::read::{LayerFile, Reader};
use crate::fs::session::{FuseSession, Keeping, SessionConfig};
use crate::keeper::notify::Notifier;
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
    _probe: Option<LayerUse>,
}

/// What was found out, for the next daemon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Findings {
    /// The kernel's release: another one is probed anew.
    kernel: String,
    /// What EROFS may be mounted through; another choice is probed anew.
    wanted: Option<Backing>,
    files: Result<Backing, String>,
    fuse: Result<Backing, String>,
    tree: Result<(), String>,
}

/// What probing works with.
pub(super) struct Probe {
    pub(super) state: PathBuf,
    pub(super) layers_dir: PathBuf,
    pub(super) store: Arc<Store>,
    pub(super) fetch: FetchHandle,
    pub(super) directory: Arc<LayerDirectory>,
    pub(super) reader: Reader,
    pub(super) notifier: Option<Arc<Notifier>>,
    /// Try EROFS through this only.
    pub(super) wanted: Option<Backing>,
    /// The connection that serves layer files, if it goes on from the daemon before.
    pub(super) session: Option<FuseSession>,
}

impl Probe {
    fn run(mut self) -> Result<Ways, NodeError> {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        if let Some(findings) = self.known(&kernel)
            && let Some(session) = self.session.take()
        {
            return Ok(Ways::new(findings, self.layers_dir, Some(session), None));
        }
        let (scratch, image) = (self.state.join("probe"), self.state.join("probe.erofs"));
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| NodeError::Io { what, path, source }
        };
        for folder in [&self.layers_dir, &scratch] {
            std::fs::create_dir_all(folder).map_err(io("make", folder))?;
        }
        let layer = self.store.layer(&probe::chunk_table())?;
        let held = layer.hold();
        let bytes = Verified::chunk(layer.table().chunk_id(ChunkNo(0)), probe::layer_bytes());
        layer.put(ChunkNo(0), &bytes.map_err(|_| NodeError::Interrupted)?)?;
        let name = layer.diff_id().hex();
        let plain = layer.path().to_owned();
        self.directory.insert(Arc::new(LayerFile {
            layer,
            fetch: self.fetch.clone(),
            marks: Arc::default(),
            touches: Arc::default(),
        }));
        let tree = probe::tree_image().map_err(|error| NodeError::Damaged {
            image: "the probe".to_owned(),
            what: "tree",
            reason: error.to_string(),
        })?;
        std::fs::write(&image, tree).map_err(io("write", &image))?;

        let (session, wanted) = (self.session(), self.wanted);
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
            Ok(session) => (through(&self.layers_dir.join(name)), Ok(()), Some(session)),
            Err(reason) => (Err(reason.clone()), Err(reason), None),
        };
        let findings = Findings { kernel, wanted: self.wanted, files, fuse, tree };
        self.write_down(&findings);
        let ways = Ways::new(findings, self.layers_dir, session, Some(held));
        tracing::info!(ways = ?ways.status(), "probed the kernel");
        Ok(ways)
    }

    /// The connection that serves layer files, started when there is none.
    fn session(&mut self) -> Result<FuseSession, String> {
        if let Some(session) = self.session.take() {
            return Ok(session);
        }
        let filesystem = LayerFs::new(Arc::clone(&self.directory), self.reader.clone(), LayerCaching::default());
        let keeping = self.notifier.clone().map(|notifier| Keeping { notifier, name: LAYERS_CONNECTION.to_owned() });
        FuseSession::start(filesystem, &self.layers_dir, SessionConfig::default(), keeping)
            .map_err(|error| error.to_string())
    }

    fn findings_path(&self) -> PathBuf {
        self.state.join("ways.json")
    }

    /// What the daemon before has found out about this kernel. Of use only with its connection.
    fn known(&self, kernel: &str) -> Option<Findings> {
        self.session.as_ref()?;
        let findings: Findings = serde_json::from_slice(&std::fs::read(self.findings_path()).ok()?).ok()?;
        (findings.kernel == kernel && findings.wanted == self.wanted).then_some(findings)
    }

    /// Without the note the next daemon probes again: nothing depends on it but time.
    fn write_down(&self, findings: &Findings) {
        let path = self.findings_path();
        let json = serde_json::to_vec(findings).map_err(std::io::Error::from);
        if let Err(error) = json.and_then(|json| std::fs::write(&path, json)) {
            tracing::debug!(path = %path.display(), %error, "what the probe found is not written down");
        }
    }
}

impl Ways {
    fn new(findings: Findings, layers_dir: PathBuf, session: Option<FuseSession>, probe: Option<LayerUse>) -> Self {
        let Findings { files, fuse, tree, .. } = findings;
        Self { files, fuse, tree, layers_dir, session: Mutex::new(session), _probe: probe }
    }

    /// Starts serving layer files, unless they are served already, and tries each way.
    pub(super) async fn probe(probe: Probe) -> Result<Self, NodeError> {
        let probed = tokio::task::spawn_blocking(move || probe.run());
        probed.await.map_err(|_| NodeError::Interrupted)?
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

    /// Whether the kernel reads complete layers without the daemon in this way. Who asks for a way gets it; else they are read
    /// so although others are not complete.
    pub(super) fn reads_directly(&self, way: Way, wanted: Option<Way>) -> bool {
        let has_files = self.files == Ok(Backing::File) && self.fuse == Ok(Backing::File);
        way == Way::ErofsFiles || (way == Way::ErofsFuse && wanted.is_none() && has_files)
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
