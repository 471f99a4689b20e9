//! The other way to start a container, as every node does it today: download all layers, then unpack one by one.
//!
//! Layers are downloaded side by side and unpacked in order, each when it is there, by GNU tar and the usual
//! decompressors, each into a folder of its own; overlayfs then shows them as one. That is what containerd does, less its
//! bookkeeping. A layer never sees the folder of another one, and its whiteouts are looked up inside its own folder only,
//! so no name in an image can reach anything of this machine.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use futures::StreamExt as _;
use hermes_origin::{LayerDescriptor, Origin};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, XattrFlags};

use crate::commands::ImageArgs;

/// Prefix of names that delete (image-spec, layer.md, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// Name that empties its folder.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Pulls `reference` and unpacks it below `layers`, keeping blobs in `blobs`. Returns the layers' folders, uppermost
/// first, as overlayfs wants them.
pub(super) async fn pull_and_unpack(reference: &str, blobs: &Path, layers: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let image = ImageArgs { image: reference.to_owned(), platform: None, plain_http: true };
    let (origin, image) = crate::commands::index::resolve(&image).await?;
    let downloads = image.layers.iter().enumerate().map(|(number, layer)| {
        let path = blobs.join(number.to_string());
        let (origin, layer, to) = (Arc::clone(&origin), layer.clone(), path.clone());
        (path, tokio::spawn(async move { download(&origin, &layer, &to).await }))
    });
    let mut folders = Vec::new();
    for (number, (path, download)) in downloads.collect::<Vec<_>>().into_iter().enumerate() {
        download.await.context("a download was interrupted")??;
        let folder = layers.join(number.to_string());
        fs::create_dir(&folder)?;
        folders.insert(0, folder.clone());
        tokio::task::spawn_blocking(move || unpack(&path, &folder)).await.context("unpacking was interrupted")??;
    }
    Ok(folders)
}

async fn download(origin: &Origin, layer: &LayerDescriptor, to: &Path) -> anyhow::Result<()> {
    let mut file = File::create(to)?;
    let mut body = std::pin::pin!(origin.read_all(layer, (Instant::now() + super::LAYER_TIMEOUT).into()));
    while let Some(piece) = body.next().await {
        file.write_all(&piece?)?;
    }
    Ok(())
}

fn unpack(blob: &Path, folder: &Path) -> anyhow::Result<()> {
    let output = Command::new("tar")
        .args([
            "--extract",
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
            "--same-permissions",
            "--exclude=.wh.*",
        ])
        .arg("--file")
        .arg(blob)
        .arg("--directory")
        .arg(folder)
        .output()
        .context("cannot start tar")?;
    if !output.status.success() {
        bail!("tar could not unpack a layer: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    for path in whiteouts(blob)? {
        apply_whiteout(folder, &path).with_context(|| format!("cannot apply {}", path.display()))?;
    }
    fs::remove_file(blob)?;
    Ok(())
}

/// The whiteouts of a layer.
fn whiteouts(blob: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let output = Command::new("tar").args(["--list", "--quoting-style=literal", "--file"]).arg(blob).output()?;
    if !output.status.success() {
        bail!("tar could not list a layer: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let names = output.stdout.split(|byte| *byte == b'\n').map(|line| PathBuf::from(OsStr::from_bytes(line)));
    Ok(names.filter(|path| path.file_name().is_some_and(|name| name.as_bytes().starts_with(WHITEOUT))).collect())
}

/// Makes what overlayfs knows as a deletion.
fn apply_whiteout(folder: &Path, path: &Path) -> anyhow::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let parent = inside(folder, parent)?;
    if name.as_bytes() == OPAQUE {
        rustix::fs::fsetxattr(&parent, "trusted.overlay.opaque", b"y", XattrFlags::empty())?;
    } else {
        let hidden = OsStr::from_bytes(&name.as_bytes()[WHITEOUT.len()..]);
        rustix::fs::mknodat(&parent, hidden, FileType::CharacterDevice, Mode::empty(), 0)?;
    }
    Ok(())
}

/// Opens `path` below `folder`, making what is missing. Neither `..` nor a link leads out of it.
fn inside(folder: &Path, path: &Path) -> anyhow::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let mut at = rustix::fs::open(folder, flags, Mode::empty())?;
    for part in path.components() {
        let Component::Normal(name) = part else { continue };
        let _ = rustix::fs::mkdirat(&at, name, Mode::from_raw_mode(0o755));
        at = rustix::fs::openat2(&at, name, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)?;
    }
    Ok(at)
}
