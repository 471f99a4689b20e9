//! The kernel and `fsck.erofs`, and the files that they look at.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};

use super::trees::{layers, ramp};

/// Layer files that hold the ramp, for all tests of this process.
pub(super) struct LayerFiles {
    folder: tempfile::TempDir,
    devices: Vec<PathBuf>,
}

impl LayerFiles {
    /// A folder of its own with the files of `layer_lens` bytes; nothing is written into them.
    pub(super) fn empty(layer_lens: impl IntoIterator<Item = u64>) -> Self {
        let folder = tempfile::tempdir().expect("a folder for temporary files");
        let devices = layer_lens
            .into_iter()
            .enumerate()
            .map(|(no, len)| {
                let path = folder.path().join(format!("layer-{no}"));
                File::create(&path).and_then(|file| file.set_len(len)).expect("a layer file");
                path
            })
            .collect();
        Self { folder, devices }
    }

    /// The three layers of [`layers`].
    pub(super) fn shared() -> &'static Self {
        static FILES: OnceLock<LayerFiles> = OnceLock::new();
        FILES.get_or_init(|| {
            let files = Self::empty(layers().iter().map(|layer| layer.logical_len_bytes));
            for (no, layer) in layers().iter().enumerate() {
                files.fill(no as u16, 0, layer.logical_len_bytes as usize);
            }
            files
        })
    }

    /// Writes the ramp into `len` bytes of layer `no` from `offset`.
    pub(super) fn fill(&self, no: u16, offset: u64, len: usize) {
        let mut bytes = vec![0; len];
        ramp(no, offset, &mut bytes);
        let file = File::options().write(true).open(&self.devices[usize::from(no)]).expect("a layer file");
        file.write_all_at(&bytes, offset).expect("room for a layer file");
    }

    /// The files, lowest layer first.
    pub(super) fn devices(&self) -> &[PathBuf] {
        &self.devices
    }

    /// Stores an image beside them; it is removed with the guard.
    pub(super) fn store(&self, image: &[u8]) -> (PathBuf, tempfile::TempPath) {
        let mut file = tempfile::NamedTempFile::new_in(self.folder.path()).expect("a temporary file");
        file.write_all(image).expect("room for an image");
        let guard = file.into_temp_path();
        (guard.to_path_buf(), guard)
    }
}

/// A mount that no path leads to but that of its descriptor: it ends with the test, however that ends.
pub(super) struct Mount(OwnedFd);

impl Mount {
    /// Mounts `image` with `devices` from their files, without loop devices.
    pub(super) fn new(image: &Path, devices: &[PathBuf]) -> Self {
        let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC)
            .expect("these tests mount EROFS: run them as root on Linux 6.12 or newer");
        let mounted = (|| {
            fsconfig_set_flag(&context, "ro")?;
            fsconfig_set_string(&context, "source", image)?;
            for device in devices {
                fsconfig_set_string(&context, "device", device)?;
            }
            fsconfig_create(&context)?;
            fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY)
        })();
        match mounted {
            Ok(mount) => Self(mount),
            Err(error) => {
                let mut message = [0; 4096];
                let len = rustix::io::read(&context, &mut message).unwrap_or(0);
                panic!("the kernel refuses {}: {error}: {}", image.display(), String::from_utf8_lossy(&message[..len]));
            }
        }
    }

    /// The root of the mount.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

/// A program of erofs-utils 1.8 or newer: the one that `tools/erofs-utils` built, else the one on PATH.
pub(super) fn tool(name: &str) -> PathBuf {
    let cache = std::env::var_os("HERMES_CACHE")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/hermes")));
    let built = cache.and_then(|cache| fs::read_dir(cache.join("erofs-utils")).ok()).into_iter().flatten();
    let mut folders: Vec<PathBuf> = built
        .filter_map(|folder| Some(folder.ok()?.path()))
        .filter(|folder| folder.join("complete").exists())
        .map(|folder| folder.join("bin"))
        .collect();
    folders.sort();
    let on_path = std::env::var_os("PATH").unwrap_or_default();
    let candidates = folders.into_iter().rev().chain(std::env::split_paths(&on_path));
    candidates.map(|folder| folder.join(name)).find(|program| is_recent(program)).unwrap_or_else(|| {
        panic!("{name} 1.8 or newer is missing: `make test` builds it, and so does tools/erofs-utils")
    })
}

/// Whether `program` runs and calls itself 1.8 or newer: "fsck.erofs (erofs-utils) 1.8.6".
fn is_recent(program: &Path) -> bool {
    let Ok(output) = Command::new(program).arg("--version").output() else { return false };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit() && c != '.')
        .find(|word| word.contains('.') && word.starts_with(|c: char| c.is_ascii_digit()))
        .into_iter()
        .flat_map(|version| version.split('.'))
        .map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (1, 8)
}

/// Lets `fsck.erofs` judge an image, reading all data.
pub(super) fn fsck(image: &Path, devices: &[PathBuf]) {
    let mut command = Command::new(tool("fsck.erofs"));
    command.arg("--extract");
    for device in devices {
        command.arg(format!("--device={}", device.display()));
    }
    let output = command.arg(image).output().expect("fsck.erofs runs");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("<E>"), "fsck.erofs: {}: {said}", output.status);
}
