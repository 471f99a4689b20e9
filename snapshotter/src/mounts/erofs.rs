//! A tree as a kernel EROFS mount over layer files.
//!
//! util-linux would make a loop device of the image, and an option string ends at 4 KiB, which about 30 layer paths
//! fill; so the mount is made with `fsopen` and one `fsconfig` a device. Devices are given in the order of the image's
//! device table.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount,
    fsopen, move_mount,
};
use serde::{Deserialize, Serialize};

use super::apart::apart;
use super::loops::LoopDevice;
use super::{MountError, Mounted};

/// What EROFS reads the image and the devices through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// The files themselves (Linux 6.12).
    #[serde(rename = "files")]
    File,
    /// Loop devices over them (Linux 6.4, for 512-byte blocks).
    #[serde(rename = "loop-devices")]
    Loop,
}

impl Backing {
    /// In the order in which they are tried: a loop device is one more block layer between the reader and the bytes.
    pub const ALL: [Self; 2] = [Self::File, Self::Loop];

    /// The name on the command line and in the output.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "files",
            Self::Loop => "loop-devices",
        }
    }
}

impl std::str::FromStr for Backing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|backing| backing.name() == text);
        found.ok_or_else(|| format!("'{text}' is nothing that EROFS reads through; it is files or loop-devices"))
    }
}

/// Where the kernel lists what file systems read from.
const BACKING_DEVICES: &str = "/sys/class/bdi";
/// Kernel readahead over complete layers, in KiB. With the kernel's 128 the page cache is made of small folios, and
/// hot reads are slower for it: measured against ext4, 0.82 with 128, 0.92 with 4,096, 0.96 with 8,192 (mapped: 0.33, 0.69,
/// 0.76). What is read too much costs a local disk only; of an incomplete layer it would be fetched, so there the
/// kernel's own stays.
pub const LOCAL_READ_AHEAD_KIB: u32 = 8192;

/// Mounts `image` at `path` over `devices`. Readahead is the kernel's own until [`Mounted::set_read_ahead`].
///
/// # Errors
/// When the kernel refuses, or there is no loop device.
pub fn mount(image: &Path, devices: &[PathBuf], path: &Path, backing: Backing) -> Result<Mounted, MountError> {
    let known = backing_devices();
    let mut attached = Vec::new();
    let mut through = |file: &Path| match backing {
        Backing::File => Ok(file.to_owned()),
        Backing::Loop => {
            let device = LoopDevice::attach(file)?;
            let name = device.path().to_owned();
            attached.push(device);
            Ok(name)
        }
    };
    let source = through(image)?;
    let sources = devices.iter().map(|device| through(device)).collect::<Result<Vec<_>, MountError>>()?;
    // Direct I/O keeps the files' own pages out of memory: EROFS's page cache is the one copy. Kernels before 6.13 do not
    // know the option; there a byte is cached twice.
    let configured = match backing {
        Backing::File => {
            configure(&source, &sources, path, Io::Direct).or_else(|_| configure(&source, &sources, path, Io::Buffered))
        }
        Backing::Loop => configure(&source, &sources, path, Io::Buffered),
    };
    match configured {
        Ok(()) => Ok(Mounted::new(path, attached, read_ahead_knob(&known))),
        Err((error, log)) => Err(MountError::Refused { what: "EROFS", path: path.to_owned(), source: error, log }),
    }
}

/// The names of all EROFS mounts that read files, in the kernel's list of backing devices.
fn backing_devices() -> BTreeSet<OsString> {
    let entries = std::fs::read_dir(BACKING_DEVICES).into_iter().flatten().flatten().map(|entry| entry.file_name());
    entries.filter(|name| name.as_bytes().starts_with(b"erofs-")).collect()
}

/// Where the readahead of the mount is set that was made since `known` was taken. Its name is a running number that no
/// call tells, so when somebody else has mounted EROFS meanwhile, nobody knows. It is a matter of speed only.
fn read_ahead_knob(known: &BTreeSet<OsString>) -> Option<PathBuf> {
    let new: Vec<_> = backing_devices().difference(known).cloned().collect();
    let [name] = new.as_slice() else { return None };
    Some(Path::new(BACKING_DEVICES).join(name).join("read_ahead_kb"))
}

/// How EROFS reads its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Io {
    Direct,
    Buffered,
}

fn configure(image: &Path, devices: &[PathBuf], path: &Path, io: Io) -> Result<(), (io::Error, String)> {
    apart(|| configure_here(image, devices, path, io)).unwrap_or_else(|error| Err((error, String::new())))
}

/// The same, on a thread that may wait for this process's own FUSE files.
fn configure_here(image: &Path, devices: &[PathBuf], path: &Path, io: Io) -> Result<(), (io::Error, String)> {
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|error| (error.into(), String::new()))?;
    let made = (|| {
        fsconfig_set_string(&context, "source", image)?;
        for device in devices {
            fsconfig_set_string(&context, "device", device)?;
        }
        fsconfig_set_flag(&context, "ro")?;
        if io == Io::Direct {
            fsconfig_set_flag(&context, "directio")?;
        }
        fsconfig_create(&context)?;
        let mounted = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, super::attributes())?;
        move_mount(&mounted, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    })();
    made.map_err(|error: rustix::io::Errno| (error.into(), kernel_log(&context)))
}

/// The messages that the kernel left on the context, which say more than an error number.
fn kernel_log(context: &std::os::fd::OwnedFd) -> String {
    let mut log = Vec::new();
    let mut line = [0; 1024];
    // The kernel keeps at most eight messages (fs/fs_context.c, struct fc_log).
    for _ in 0..8 {
        match rustix::io::read(context, &mut line) {
            Ok(len) if len > 0 => log.push(String::from_utf8_lossy(&line[..len]).trim().to_owned()),
            _ => break,
        }
    }
    log.join("; ")
}
