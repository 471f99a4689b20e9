//! Going on where the daemon before this one ended.
//!
//! What it showed stands in the store ([`super::record`]); what the kernel still shows stands in the mount table; which
//! connections are alive is what the supervisor has kept. A tree that all three agree on goes on: its layers are opened,
//! then its connection is read again. Nothing else comes before that but opening the store and listening for peers, and
//! nothing of it asks anybody outside this machine, because readers wait. What else a start does (probing the kernel,
//! connecting to peers, announcing layers) comes later or beside.
//!
//! The rest is cleared away: a mount whose connection ended with its daemon answers ENOTCONN to everybody and for ever.
//! Trees that the kernel reads from plain files need no daemon and stay.
//!
//! **Invariant:** until a connection is read again, its mount point must not be touched from here, not even by stat(2):
//! this process would wait for itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hermes_image::erofs::Image;
use hermes_image::statement::LayerStatement;
use hermes_store::{LayerUse, Store};

use super::mount::MOUNT_PIN;
use super::record::{LAYERS_CONNECTION, MountRecord, tree_connection};
use super::{MountedImage, NodeError, OpenLayers, Shown};
use crate::artifacts::Artifacts;
use crate::fetch::{FetchHandle, LayerOrigin, LayerUser, MountNo, OpenLayer, OriginNumbers};
use crate::fs::layers::{LayerCaching, LayerDirectory, LayerFs};
use crate::fs::locate::ShownTree;
use crate::fs::read::{LayerFile, Reader};
use crate::fs::session::{FuseSession, Keeping, SessionConfig};
use crate::fs::tree::TreeFs;
use crate::index_folder::IndexFolder;
use crate::keeper::notify::{Inherited, Notifier};
use crate::mounts::{self, Mounted};
use crate::status::Way;
use hermes_origin::OriginClient;

/// What the mount table calls EROFS mounts, and this program's FUSE mounts.
const EROFS: &str = "erofs";
const FUSE: &str = "fuse.hermes";

/// What restoring works with.
pub(super) struct Parts<'a> {
    pub(super) layers_dir: &'a Path,
    pub(super) store: &'a Arc<Store>,
    pub(super) artifacts: &'a Artifacts,
    pub(super) fetch: &'a FetchHandle,
    pub(super) reader: &'a Reader,
    pub(super) directory: &'a Arc<LayerDirectory>,
    pub(super) origin_client: &'a OriginClient,
    pub(super) notifier: Option<Arc<Notifier>>,
}

/// What goes on.
#[derive(Default)]
pub(super) struct Restored {
    pub(super) images: Vec<MountedImage>,
    pub(super) layers: OpenLayers,
    /// The number of the next mount.
    pub(super) next_mount: u64,
    pub(super) origins: OriginNumbers,
    /// The connection that serves layer files.
    pub(super) session: Option<FuseSession>,
    /// Peers that were named for the images.
    pub(super) peers: Vec<String>,
}

/// A tree whose layers are open.
struct Prepared {
    number: MountNo,
    dir: PathBuf,
    record: MountRecord,
    layers: Vec<Arc<OpenLayer>>,
    files: Vec<Arc<LayerFile>>,
    uses: Vec<LayerUse>,
}

impl Parts<'_> {
    /// Goes on with what is alive, clears away what is not.
    ///
    /// # Errors
    /// When the catalogue or the mount table cannot be read.
    pub(super) async fn restore(&self, mut inherited: Inherited) -> Result<Restored, NodeError> {
        let table = mounts::types().map_err(|source| NodeError::Io {
            what: "read",
            path: PathBuf::from("/proc/self/mountinfo"),
            source,
        })?;
        let type_at = |dir: &Path| table.get(&resolved(dir)).map(String::as_str);
        // Without a supervisor there is nobody who could take the descriptors back.
        let has_layers =
            self.notifier.is_some() && inherited.has(LAYERS_CONNECTION) && type_at(self.layers_dir) == Some(FUSE);
        let mut restored = Restored::default();
        let mut prepared = Vec::new();
        for (dir, note) in self.store.mounts()? {
            let shown = type_at(&dir);
            let record = MountRecord::decode(&note).and_then(|record| {
                let (wanted, is_served) = match record.way {
                    Way::ErofsFiles => (EROFS, true),
                    Way::ErofsFuse => (EROFS, has_layers),
                    Way::FuseTree => (FUSE, self.notifier.is_some() && inherited.has(&tree_connection(&dir))),
                };
                match shown {
                    None => Err("it is mounted no more".to_owned()),
                    Some(shown) if shown != wanted => Err(format!("{shown} is mounted there instead")),
                    Some(_) if !is_served => Err("its connection ended with the daemon before".to_owned()),
                    Some(_) => Ok(record),
                }
            });
            let number = MountNo(restored.next_mount);
            restored.next_mount += 1;
            let opened = match record {
                Ok(record) => self.prepare(number, &dir, record, &mut restored).await,
                Err(reason) => Err(reason),
            };
            match opened {
                Ok(tree) => prepared.push(tree),
                Err(reason) => {
                    self.close(number, &mut restored).await;
                    self.clear(&dir, shown, &reason)?;
                }
            }
        }
        if has_layers {
            restored.session = self.resume_layers(&mut inherited);
        }
        for tree in prepared {
            let (number, dir) = (tree.number, tree.dir.clone());
            match self.show(tree, restored.session.is_some(), &mut inherited) {
                Ok(image) => {
                    tracing::info!(image = %image.reference, dir = %dir.display(), way = %image.way, "went on showing");
                    restored.images.push(image);
                }
                Err(reason) => {
                    self.close(number, &mut restored).await;
                    self.clear(&dir, type_at(&dir), &reason)?;
                }
            }
        }
        if let Some(notifier) = &self.notifier {
            inherited.release(notifier);
        }
        Ok(restored)
    }

    /// Opens the layers of a tree, so that reads can be answered.
    async fn prepare(
        &self,
        number: MountNo,
        dir: &Path,
        record: MountRecord,
        restored: &mut Restored,
    ) -> Result<Prepared, String> {
        for folder in &record.index_folders {
            self.artifacts.add_folder(IndexFolder::new(folder));
        }
        restored.peers.extend(record.peers.iter().cloned());
        // A registry is not asked for that; a layout that is gone can be done without as long as nothing is missing.
        let origin = match self.origin_client.open_image(&record.reference, record.plain_http).await {
            Ok(origin) => Some(origin),
            Err(error) => {
                tracing::warn!(image = %record.reference, %error, "nothing can be fetched from where the image is from");
                None
            }
        };
        let origin = origin.map(|origin| LayerOrigin { number: restored.origins.number(origin.host()), origin });
        let (mut layers, mut files, mut uses) = (Vec::new(), Vec::new(), Vec::new());
        for user in LayerUser::of_image(number, &record.reference, &record.layers, origin.as_ref()) {
            let (open, file, held) = self.open(user, restored).await?;
            files.push(file);
            layers.push(open);
            uses.push(held);
        }
        self.store.pin(record.manifest, MOUNT_PIN).map_err(|error| error.to_string())?;
        Ok(Prepared { number, dir: dir.to_owned(), record, layers, files, uses })
    }

    async fn open(
        &self,
        user: LayerUser,
        restored: &mut Restored,
    ) -> Result<(Arc<OpenLayer>, Arc<LayerFile>, LayerUse), String> {
        let LayerStatement { diff_id, chunks, .. } = user.statement;
        let stored = self.store.open_layer(diff_id).filter(|stored| stored.table().id() == chunks);
        let stored = stored.ok_or_else(|| format!("the store has lost layer {diff_id}"))?;
        let held = stored.hold();
        if let Some((open, file)) = restored.layers.get(&diff_id) {
            open.add_user(user);
            return Ok((Arc::clone(open), Arc::clone(file), held));
        }
        let open = OpenLayer::new(Arc::clone(&stored), user, self.artifacts.clone());
        let open = Arc::new(open.map_err(|error| error.to_string())?);
        let (fetch, marks, touches) = (self.fetch.clone(), Arc::clone(&open.marks), Arc::clone(&open.touches));
        let file = Arc::new(LayerFile { layer: stored, fetch, marks, touches });
        self.directory.insert(Arc::clone(&file));
        // Readers wait: they first get what is there.
        self.fetch.open(Arc::clone(&open), Duration::ZERO).await;
        restored.layers.insert(diff_id, (Arc::clone(&open), Arc::clone(&file)));
        Ok((open, file, held))
    }

    /// Closes the layers of a tree that does not go on, but for those that another one reads.
    async fn close(&self, number: MountNo, restored: &mut Restored) {
        let unused = restored.layers.extract_if(.., |_, (open, _)| open.remove_user(number) == 0);
        for diff_id in unused.map(|(diff_id, _)| diff_id).collect::<Vec<_>>() {
            self.directory.remove(diff_id);
            self.fetch.close(diff_id).await;
        }
    }

    fn resume_layers(&self, inherited: &mut Inherited) -> Option<FuseSession> {
        let keeping = Keeping { notifier: Arc::clone(self.notifier.as_ref()?), name: LAYERS_CONNECTION.to_owned() };
        let (device, connection) = inherited.take(LAYERS_CONNECTION)?;
        let filesystem = LayerFs::new(Arc::clone(self.directory), self.reader.clone(), LayerCaching::default());
        let config = SessionConfig::default();
        let resumed = FuseSession::resume(filesystem, self.layers_dir, device, connection, config, keeping.clone());
        match resumed {
            Ok(session) => Some(session),
            Err(error) => {
                tracing::error!(%error, "the connection that served layers cannot go on; what it served is cleared away");
                keeping.forget(connection);
                detach(self.layers_dir);
                None
            }
        }
    }

    /// Shows a tree again, in the way in which the kernel has it mounted.
    fn show(&self, tree: Prepared, has_layers: bool, inherited: &mut Inherited) -> Result<MountedImage, String> {
        let Prepared { number, dir, record, layers, files, uses } = tree;
        let shown = match record.way {
            Way::ErofsFuse if !has_layers => return Err("its layers are served no more".to_owned()),
            Way::ErofsFiles | Way::ErofsFuse => Shown::Erofs(Mounted::adopt(&dir)),
            Way::FuseTree => Shown::Fuse(self.resume_tree(&dir, &record, files, inherited)?),
        };
        let tree_path = self.store.artifact_path(record.tree);
        let located = ShownTree {
            image: record.reference.clone(),
            tree_path: tree_path.clone(),
            layers: layers.iter().map(|layer| layer.diff_id()).collect(),
        };
        self.reader.locator().insert(located.clone());
        Ok(MountedImage {
            number,
            located,
            shown,
            // Some of it was read already.
            start: None,
            reference: record.reference,
            manifest: record.manifest,
            chain: record.chain,
            dir,
            way: record.way,
            prepared: Instant::now(),
            tree_path,
            layers,
            _uses: uses,
        })
    }

    fn resume_tree(
        &self,
        dir: &Path,
        record: &MountRecord,
        files: Vec<Arc<LayerFile>>,
        inherited: &mut Inherited,
    ) -> Result<FuseSession, String> {
        let name = tree_connection(dir);
        let notifier = self.notifier.as_ref().ok_or("nobody supervises this daemon")?;
        let keeping = Keeping { notifier: Arc::clone(notifier), name: name.clone() };
        let (device, connection) = inherited.take(&name).ok_or("its connection was not kept")?;
        let resume = || {
            let bytes = self.store.artifact(record.tree).map_err(|error| error.to_string())?;
            let image = Image::open(bytes.ok_or("the store has lost its tree")?).map_err(|error| error.to_string())?;
            let filesystem = TreeFs::new(image, files, self.reader.clone());
            let config = SessionConfig { read_ahead_kib: TreeFs::READ_AHEAD_KIB, ..SessionConfig::default() };
            FuseSession::resume(filesystem, dir, device, connection, config, keeping.clone())
                .map_err(|error| error.to_string())
        };
        resume().inspect_err(|_: &String| keeping.forget(connection))
    }

    /// Clears away what is left of a tree that cannot go on. `shown` is what the mount table has there: what is not of
    /// this program's kind is somebody else's.
    fn clear(&self, dir: &Path, shown: Option<&str>, reason: &str) -> Result<(), NodeError> {
        tracing::warn!(dir = %dir.display(), reason, "a tree that was mounted does not go on");
        if shown.is_some_and(|shown| shown == EROFS || shown == FUSE) {
            detach(dir);
        }
        Ok(self.store.remove_mount(dir)?)
    }
}

fn detach(dir: &Path) {
    if let Err(error) = rustix::mount::unmount(dir, rustix::mount::UnmountFlags::DETACH) {
        tracing::warn!(dir = %dir.display(), %error, "cannot unmount what an earlier daemon left");
    }
}

/// `dir` as the mount table has it. The last part is not resolved: it is a mount point, and nobody may answer there.
fn resolved(dir: &Path) -> PathBuf {
    let real = dir.parent().and_then(|parent| parent.canonicalize().ok());
    match (real, dir.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => dir.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_resolved_up_to_themselves() {
        let folder = tempfile::tempdir().expect("a folder");
        let real = folder.path().canonicalize().expect("resolves");
        std::os::unix::fs::symlink(&real, real.join("link")).expect("a link");
        assert_eq!(resolved(&real.join("link/tree")), real.join("tree"));
        assert_eq!(resolved(Path::new("/nowhere/tree")), Path::new("/nowhere/tree"));
    }
}
