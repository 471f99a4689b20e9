//! The demo's image, as an OCI layout on this machine.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail};
use futures::StreamExt as _;
use hermes_registry::oci::media_type;
use hermes_registry::{LayoutWriter, WriteError};
use hermes_snapshotter::control::FailureClass;

use crate::commands::ImageArgs;
use crate::output::{self, failure};

/// What makes the image when none is given: the same scripts and recipe as `tools/images spark` in the source tree.
const RECIPE: [(&str, &str); 5] = [
    ("images", include_str!("../../../tools/images")),
    // Which installs what the script needs.
    ("setup", include_str!("../../../tools/setup")),
    ("recipes/spark/config.json", include_str!("../../../tools/recipes/spark/config.json")),
    ("recipes/spark/entrypoint.sh", include_str!("../../../tools/recipes/spark/entrypoint.sh")),
    ("recipes/spark/requirements.txt", include_str!("../../../tools/recipes/spark/requirements.txt")),
];

/// A layout with one image.
pub(super) struct DemoLayout {
    /// What the demo calls the image.
    pub(super) name: String,
    /// Where the layout is.
    pub(super) path: PathBuf,
}

/// The layout of `image`, copied below `work` when it comes from a registry, made from packages when there is none.
pub(super) async fn layout(image: Option<&str>, work: &Path, talk: bool) -> anyhow::Result<DemoLayout> {
    match image {
        None => make(work, talk),
        Some(image) => copy(image, work).await,
    }
}

fn make(work: &Path, talk: bool) -> anyhow::Result<DemoLayout> {
    if talk {
        eprintln!("making the image from packages, unless an earlier run has (a few minutes the first time) ...");
    }
    let tools = work.join("tools");
    for (name, text) in RECIPE {
        let path = tools.join(name);
        write_script(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let output = Command::new("bash")
        .arg(tools.join("images"))
        .arg("spark")
        .stdin(Stdio::null())
        .stderr(if talk { Stdio::inherit() } else { Stdio::piped() })
        .output()
        .context("cannot start bash")?;
    if !output.status.success() {
        bail!(
            "the image could not be made ({}): {}; `make demo` installs what it needs, IMAGE=... takes another one",
            output.status,
            String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("see above")
        );
    }
    let printed = String::from_utf8(output.stdout)?;
    let path = printed.lines().last().context("the image's recipe did not say where it put the image")?;
    Ok(DemoLayout {
        name: "Apache Spark master (Debian, OpenJDK 17, Python, Spark 4)".to_owned(),
        path: PathBuf::from(path),
    })
}

/// Writes a file that can be run: the scripts start each other, and themselves in other namespaces.
fn write_script(path: &Path, text: &str) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o755).open(path)?;
    file.write_all(text.as_bytes())
}

/// Copies an image, so that it can be served behind the emulated link.
async fn copy(image: &str, work: &Path) -> anyhow::Result<DemoLayout> {
    let name = image.to_owned();
    if let Some(path) = image.strip_prefix("oci:")
        && Path::new(path).join("oci-layout").exists()
    {
        return Ok(DemoLayout { name, path: PathBuf::from(path) });
    }
    let args = ImageArgs { image: image.to_owned(), platform: None, plain_http: false };
    let (origin, resolved) = crate::commands::index::resolve(&args).await?;
    let path = work.join("layout");
    let local = |error: WriteError| failure(FailureClass::Local, error.to_string());
    let writer = LayoutWriter::create(&path).map_err(local)?;
    let bar = output::byte_bar(resolved.layers.iter().map(|layer| layer.len_bytes).sum(), "copying the image");
    for layer in &resolved.layers {
        let mut blob = writer.blob().map_err(local)?;
        let mut body = std::pin::pin!(origin.read_all(layer, (Instant::now() + super::LAYER_TIMEOUT).into()));
        while let Some(piece) = body.next().await {
            let piece = piece?;
            bar.inc(piece.len() as u64);
            blob.copy_from(piece.as_ref()).map_err(local)?;
        }
        let media_type = layer.media_type.as_deref().expect("a layer of a manifest has a media type");
        let written = blob.finish(media_type).map_err(local)?;
        if written.digest.0 != layer.layer.0 {
            return Err(failure(
                FailureClass::Corrupt,
                format!("{image}: layer {} came with other bytes", layer.layer),
            ));
        }
    }
    bar.finish_and_clear();
    writer.document(media_type::OCI_CONFIG, &resolved.config_bytes).map_err(local)?;
    let manifest =
        writer.document(&manifest_type(&resolved.manifest_bytes), &resolved.manifest_bytes).map_err(local)?;
    writer.tag(manifest, "latest").map_err(local)?;
    Ok(DemoLayout { name, path })
}

/// What a manifest says it is; OCI's where it does not say (image-spec, manifest.md, `mediaType`).
fn manifest_type(manifest: &[u8]) -> String {
    let parsed: Option<serde_json::Value> = serde_json::from_slice(manifest).ok();
    let named = parsed.as_ref().and_then(|manifest| manifest.get("mediaType")?.as_str());
    named.unwrap_or(media_type::OCI_MANIFEST).to_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    /// What is there already is not made again, so a file that is missing here is missed on fresh machines only.
    #[test]
    fn the_recipe_has_every_file_that_its_script_names() {
        let script = RECIPE[0].1;
        let named = script.split("$here/").skip(1).map(|rest| {
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && !"-_./".contains(c)).unwrap_or(rest.len());
            rest[..end].trim_end_matches('/')
        });
        let of_other_images = |name: &str| name.starts_with("recipes/web/") || name.starts_with("recipes/python/");
        let named = named.filter(|name| !of_other_images(name)).collect::<Vec<_>>();
        assert!(named.contains(&"setup"), "{named:?}");
        for name in named {
            let is_folder = RECIPE.iter().any(|(known, _)| known.starts_with(&format!("{name}/")));
            assert!(is_folder || RECIPE.iter().any(|(known, _)| *known == name), "{name} is missing");
        }
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tools/one");
        write_script(&path, "#!/usr/bin/env bash\n").expect("written");
        let mode = std::fs::metadata(path).expect("there").permissions().mode();
        assert_eq!(mode & 0o100, 0o100, "{mode:o}");
    }
}
