//! A containerd of the test's own: its root, state, socket and configuration stand in a scratch folder.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use hermes_image::ids::{ChainId, DiffId};

use crate::command::run;
use crate::guard::{MountGuard, ProcessGuard, ScratchDir, wait_for};
use crate::layout::{Layout, LayoutImage};

/// How long containerd may take to answer on its socket. It takes 0.3 s alone; a loaded machine is slow.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// The namespace that tests work in.
const NAMESPACE: &str = "hermes-tests";
/// The repository under which imported images are known.
const REPOSITORY: &str = "hermes.test/image";

/// How containerd keeps what it unpacked. The two apply layers by different code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Snapshotter {
    /// One folder per layer, joined by overlayfs: the default of every cluster, and the one that Hermes must equal.
    Overlayfs,
    /// A full copy per layer; shows a tree without overlayfs' peculiarities (link counts, device numbers of inodes).
    Native,
}

impl Snapshotter {
    fn name(self) -> &'static str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Native => "native",
        }
    }
}

/// A running containerd. It stops, and everything it unpacked goes, when this is dropped.
#[derive(Debug)]
pub struct Containerd {
    socket: PathBuf,
    // The order is that of the clean-up: the process ends before its folder goes.
    _process: ProcessGuard,
    dir: ScratchDir,
}

/// An image that containerd unpacked and mounted read-only; unmounted on drop. Drop it before its [`Containerd`].
#[derive(Debug)]
pub struct MountedImage {
    mount: MountGuard,
}

impl MountedImage {
    /// Where the tree is.
    pub fn path(&self) -> &Path {
        self.mount.path()
    }
}

impl Containerd {
    /// Starts it and waits until it answers.
    ///
    /// # Errors
    ///
    /// When it is not installed, this is not root, or it ends or does not answer in time; the message holds its log.
    pub fn start() -> Result<Self> {
        Self::with_configuration("")
    }

    /// Starts it with a snapshotter named `hermes`, which answers on `socket`.
    ///
    /// # Errors
    ///
    /// As [`Self::start`].
    pub fn with_snapshotter(socket: &Path) -> Result<Self> {
        let address = socket.display();
        Self::with_configuration(&format!(
            "[proxy_plugins]\n[proxy_plugins.hermes]\ntype = \"snapshot\"\naddress = \"{address}\"\n"
        ))
    }

    fn with_configuration(more: &str) -> Result<Self> {
        let dir = ScratchDir::new("containerd")?;
        let socket = dir.path().join("containerd.sock");
        let log_path = dir.path().join("containerd.log");
        let config = dir.path().join("config.toml");
        let top = dir.path().display();
        // Only what unpacking needs: no CRI, and no snapshotter that would look for other file systems.
        let text = format!(
            r#"version = 2
root = "{top}/root"
state = "{top}/state"
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.internal.v1.opt",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "{top}/containerd.sock"
[ttrpc]
address = "{top}/containerd.sock.ttrpc"
{more}"#
        );
        fs::write(&config, text).with_context(|| format!("write {}", config.display()))?;
        let log = File::create(&log_path).with_context(|| format!("create {}", log_path.display()))?;
        let mut process = ProcessGuard::start(
            Command::new("containerd")
                .arg("--config")
                .arg(&config)
                .stdin(Stdio::null())
                .stdout(log.try_clone().context("share containerd's log")?)
                .stderr(log),
        )?;
        let answers = wait_for("an answer of containerd", START_DEADLINE, || {
            if let Ok(Some(status)) = process.ended() {
                return Some(Err(anyhow::anyhow!("containerd ended with {status}")));
            }
            let asked = socket.exists().then(|| run(ctr_on(&socket).arg("version")));
            asked.is_some_and(|answer| answer.is_ok()).then_some(Ok(()))
        });
        match answers {
            Ok(Ok(())) => Ok(Self { socket, _process: process, dir }),
            Ok(Err(error)) | Err(error) => {
                let log = fs::read_to_string(&log_path).unwrap_or_default();
                Err(error.context(format!("containerd's log: {log}")))
            }
        }
    }

    /// Its gRPC socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// A `ctr` command for this containerd, in the tests' namespace.
    pub fn ctr(&self) -> Command {
        ctr_on(&self.socket)
    }

    /// Imports the image `tag` of `layout`, unpacks it, and mounts its tree read-only at `target`, an empty folder.
    ///
    /// # Errors
    ///
    /// When containerd refuses the image or one of its layers; its message is part of the error.
    pub fn unpack(&self, layout: &Layout, tag: &str, snapshotter: Snapshotter, target: &Path) -> Result<MountedImage> {
        let image = layout.image(tag)?;
        self.import(layout, tag, &image, snapshotter)
            .with_context(|| format!("import the image '{tag}' of {}", layout.dir().display()))?;
        let diff_ids: Vec<DiffId> = image.layers.iter().map(|layer| layer.diff_id).collect();
        let chain = ChainId::of(&diff_ids).context("the image has no layers")?;
        self.view(&chain.to_string(), snapshotter, target)
    }

    fn import(&self, layout: &Layout, tag: &str, image: &LayoutImage, snapshotter: Snapshotter) -> Result<()> {
        // ctr imports every image of an archive: give it one that holds this tag only.
        let alone = ScratchDir::new("import")?;
        let archive = alone.path().join("archive.tar");
        let index = serde_json::json!({
            "schemaVersion": 2,
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": image.manifest.to_string(),
                "size": fs::metadata(layout.blob_path(image.manifest)).context("look at the manifest")?.len(),
                "platform": {"architecture": "amd64", "os": "linux"},
                "annotations": {"org.opencontainers.image.ref.name": tag},
            }]
        });
        fs::write(alone.path().join("index.json"), serde_json::to_vec(&index)?).context("write an index")?;
        run(Command::new("tar")
            .arg("--create")
            .arg("--file")
            .arg(&archive)
            .arg("--directory")
            .arg(layout.dir())
            .args(["oci-layout", "blobs", "--directory"])
            .arg(alone.path())
            .arg("index.json"))?;
        let import = ["images", "import", "--base-name", REPOSITORY, "--snapshotter", snapshotter.name()];
        run(self.ctr().args(import).arg(&archive)).map(drop)
    }

    /// Mounts a committed snapshot. Not by `ctr images mount`, which in 1.6 takes the default snapshotter whatever it is
    /// told.
    fn view(&self, chain: &str, snapshotter: Snapshotter, target: &Path) -> Result<MountedImage> {
        let key = target.display().to_string();
        let view = ["snapshots", "--snapshotter", snapshotter.name(), "view", "--target", &key, &key, chain];
        let answer = String::from_utf8(run(self.ctr().args(view))?).context("ctr's answer is not text")?;
        // "mount -t TYPE SOURCE TARGET -o OPTIONS"
        let parsed = answer.trim().strip_prefix("mount -t ").and_then(|rest| {
            let (kind, rest) = rest.split_once(' ')?;
            let (source, options) = rest.split_once(&format!(" {key} -o "))?;
            Some((kind, source, options))
        });
        let (kind, source, options) = parsed.with_context(|| format!("ctr answered '{answer}'"))?;
        // Relative to the snapshots, as containerd does it: the kernel takes one page of options, and 50 layers with
        // full paths are longer.
        let snapshots =
            self.dir.path().join(format!("root/io.containerd.snapshotter.v1.{}/snapshots", snapshotter.name()));
        let options = options.replace(&format!("{}/", snapshots.display()), "");
        run(Command::new("mount")
            .current_dir(&snapshots)
            .args(["-t", kind, source])
            .arg(target)
            .args(["-o", &options]))?;
        Ok(MountedImage { mount: MountGuard::adopt(target) })
    }
}

fn ctr_on(socket: &Path) -> Command {
    let mut command = Command::new("ctr");
    command.arg("--address").arg(socket).args(["--namespace", NAMESPACE]);
    command
}
