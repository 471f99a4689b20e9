//! GNU tar, layer by layer: an oracle for images as builders write them, where the order of entries within a layer has
//! no odd meaning. Whiteouts, which tar does not know, are applied first, by their definition in the image-spec.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt as _};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::command::{create, filter, run};
use crate::guard::ScratchDir;
use crate::layout::{Layout, LayoutLayer};

/// What the name of a deleting entry begins with (image-spec, layer.md, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// The name of the entry that empties its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Unpacks the image `tag` of `layout` into `target`, which is created.
///
/// Only for layers in which a whiteout never names what the same layer brings, as no builder writes them.
///
/// # Errors
///
/// When tar or a decompressor fails, or an entry's path leaves the tree.
pub fn gnu_tar(layout: &Layout, tag: &str, target: &Path) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("make {}", target.display()))?;
    let scratch = ScratchDir::new("gnu-tar")?;
    for layer in layout.image(tag)?.layers {
        let tar = scratch.path().join("layer.tar");
        decompress(&layer, &tar)?;
        make_room(&tar, target)?;
        run(Command::new("tar")
            .arg("--extract")
            .arg("--file")
            .arg(&tar)
            .arg("--directory")
            .arg(target)
            .args(["--numeric-owner", "--same-owner", "--preserve-permissions"])
            .args(["--xattrs", "--xattrs-include=*", "--exclude=.wh.*"]))
        .with_context(|| format!("extract the layer {}", layer.layer_id))?;
    }
    Ok(())
}

/// Writes a layer's tar, uncompressed, to `tar`.
///
/// # Errors
///
/// When the decompressor fails or the media type is not known.
pub fn decompress(layer: &LayoutLayer, tar: &Path) -> Result<()> {
    let program = match layer.media_type.rsplit_once("tar") {
        Some((_, "+gzip")) => "gzip",
        Some((_, "+zstd")) => "zstd",
        Some((_, "")) => {
            fs::copy(&layer.path, tar).with_context(|| format!("copy {}", layer.path.display()))?;
            return Ok(());
        }
        _ => bail!("{} is no media type of a layer", layer.media_type),
    };
    let input = File::open(&layer.path).with_context(|| format!("open {}", layer.path.display()))?;
    filter(Command::new(program).args(["--decompress", "--stdout"]), input, create(tar)?)
}

/// Removes what the layer deletes, and directories that it replaces by something else.
fn make_room(tar: &Path, target: &Path) -> Result<()> {
    // Literal names; no layer that builders write holds a newline in one.
    let list = run(Command::new("tar").args(["--list", "--quoting-style=literal", "--file"]).arg(tar))?;
    for name in list.split(|&byte| byte == b'\n').filter(|name| !name.is_empty()) {
        let path = Path::new(OsStr::from_bytes(name));
        let parent = inside(target, path.parent().unwrap_or(Path::new("")))?;
        let base = path.file_name().map(OsStrExt::as_bytes).unwrap_or_default();
        if base == OPAQUE {
            empty(&parent)?;
        } else if let Some(deleted) = base.strip_prefix(WHITEOUT) {
            remove(&parent.join(OsString::from_vec(deleted.to_vec())))?;
        } else if name.last() != Some(&b'/') && is_directory(&parent.join(OsStr::from_bytes(base))) {
            remove(&parent.join(OsStr::from_bytes(base)))?;
        }
    }
    Ok(())
}

/// `path` below `target`, which it must not leave: neither by its text nor through a symbolic link of a lower layer.
fn inside(target: &Path, path: &Path) -> Result<PathBuf> {
    let mut inside = target.to_owned();
    for part in path.components() {
        match part {
            Component::Normal(name) => inside.push(name),
            Component::CurDir | Component::RootDir => continue,
            Component::ParentDir | Component::Prefix(_) => bail!("the entry {} leaves the tree", path.display()),
        }
        if fs::symlink_metadata(&inside).is_ok_and(|metadata| metadata.is_symlink()) {
            bail!("the entry {} goes through the symbolic link {}", path.display(), inside.display());
        }
    }
    Ok(inside)
}

fn is_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

fn empty(dir: &Path) -> Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.with_context(|| format!("list {}", dir.display()))?,
    };
    for entry in entries {
        remove(&entry.with_context(|| format!("list {}", dir.display()))?.path())?;
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    removed.with_context(|| format!("remove {}", path.display()))
}
