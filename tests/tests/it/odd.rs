//! The odd images mean what `hermes_tests::odd` says that they mean: containerd unpacks them all, its two ways agree
//! where we say so, it refuses what we call refused, and the same seed gives the same images.

use std::time::SystemTime;

use anyhow::{Context as _, Result, ensure};
use hermes_tests::compare::{Exceptions, compare};
use hermes_tests::compress::Compression;
use hermes_tests::guard::ScratchDir;
use hermes_tests::layout::{Layout, NewLayer};
use hermes_tests::odd::{OddImage, Oracles, images, random, refused};
use hermes_tests::snapshot::Snapshot;
use hermes_tests::unpack::{Containerd, Snapshotter, gnu_tar};
use serde_json::json;

const SEED: u64 = 1;

fn unpack(containerd: &Containerd, layout: &Layout, tag: &str, snapshotter: Snapshotter) -> Result<Snapshot> {
    let scratch = ScratchDir::new("odd")?;
    let mounted = containerd.unpack(layout, tag, snapshotter, &scratch.make("tree")?)?;
    let tree = Snapshot::take(mounted.path())?;
    ensure!(tree.nodes.len() > 1, "the tree is empty");
    Ok(tree)
}

/// How containerd's native tree differs from its overlayfs one, or why it is refused.
fn native_differs(containerd: &Containerd, layout: &Layout, tag: &str, overlayfs: &Snapshot) -> Option<String> {
    let since = SystemTime::now();
    let native = match unpack(containerd, layout, tag, Snapshotter::Native) {
        Ok(native) => native,
        Err(error) => return Some(format!("refused: {error:#}")),
    };
    let exceptions = Exceptions {
        // The native way copies whole trees, and leaves "now" at directories with special files in them as well.
        directory_mtimes_since: Some(since),
        root_metadata: true,
        link_counts: true,
        phantoms: true,
        ..Exceptions::default()
    };
    let differences = compare(&native, overlayfs, &exceptions);
    (!differences.is_empty()).then(|| differences.to_string())
}

fn check(containerd: &Containerd, layout: &Layout, image: &OddImage) -> Result<()> {
    image.write(layout)?;
    let overlayfs = unpack(containerd, layout, &image.tag, Snapshotter::Overlayfs);
    match image.oracles {
        Oracles::All => {
            let differs = native_differs(containerd, layout, &image.tag, &overlayfs?);
            ensure!(differs.is_none(), "containerd's two ways differ: {}", differs.unwrap_or_default());
        }
        Oracles::Overlayfs => {
            let differs = native_differs(containerd, layout, &image.tag, &overlayfs?);
            ensure!(differs.is_some(), "containerd's two ways agree, contrary to what is said");
        }
        Oracles::GnuTar => {
            ensure!(overlayfs.is_err(), "containerd accepts it, contrary to what is said");
            let scratch = ScratchDir::new("odd")?;
            gnu_tar(layout, &image.tag, &scratch.path().join("tree"))?;
        }
    }
    Ok(())
}

#[test]
fn containerd_unpacks_every_odd_image() -> Result<()> {
    let containerd = Containerd::start()?;
    let scratch = ScratchDir::new("layout")?;
    let mut failures = Vec::new();
    for image in images(SEED) {
        // A layout of its own: ctr reads all blobs of an archive.
        let layout = Layout::create(&scratch.path().join(&image.tag))?;
        if let Err(error) = check(&containerd, &layout, &image) {
            failures.push(format!("{}: {error:#}", image.tag));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n\n"));
    Ok(())
}

#[test]
fn containerd_unpacks_random_images() -> Result<()> {
    let containerd = Containerd::start()?;
    let scratch = ScratchDir::new("layout")?;
    for seed in 0..20 {
        let image = random(seed);
        let layout = Layout::create(&scratch.path().join(&image.tag))?;
        image.write(&layout)?;
        unpack(&containerd, &layout, &image.tag, Snapshotter::Overlayfs).with_context(|| image.tag)?;
    }
    Ok(())
}

#[test]
fn containerd_refuses_every_refused_layer() -> Result<()> {
    let containerd = Containerd::start()?;
    let scratch = ScratchDir::new("refused")?;
    let mut accepted = Vec::new();
    for layer in refused(SEED) {
        let layout = Layout::create(&scratch.path().join(layer.tag))?;
        layout.add(layer.tag, &[NewLayer { tar: layer.tar, compression: Compression::Gzip(6) }], &json!({}))?;
        if containerd.unpack(&layout, layer.tag, Snapshotter::Overlayfs, &scratch.make("target")?).is_ok() {
            accepted.push(layer.tag);
        }
    }
    assert_eq!(accepted, Vec::<&str>::new());
    Ok(())
}

#[test]
fn equal_seeds_give_equal_images() {
    let tars = |images: Vec<OddImage>| -> Vec<Vec<u8>> {
        images.into_iter().flat_map(|image| image.layers.into_iter().map(|layer| layer.tar)).collect()
    };
    assert!(tars(images(7)) == tars(images(7)));
    assert!(tars(images(7)) != tars(images(8)));
    assert!(tars(vec![random(3)]) == tars(vec![random(3)]));
}
