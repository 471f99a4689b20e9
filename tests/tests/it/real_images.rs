//! The reference programs agree on the real images: what Hermes is compared with is not one program's opinion.

use std::time::SystemTime;

use anyhow::{Context as _, Result};
use hermes_tests::compare::{Exceptions, compare};
use hermes_tests::guard::ScratchDir;
use hermes_tests::images::{RealImage, TAG};
use hermes_tests::snapshot::Snapshot;
use hermes_tests::unpack::{Containerd, Snapshotter, gnu_tar, umoci};

/// What a real image must have at least, in bytes.
const CONTENT_MIN_BYTES: u64 = 100_000_000;

/// containerd and GNU tar agree; umoci as well, where it knows the compression.
fn references_agree(image: RealImage) -> Result<()> {
    let layout = image.layout()?;
    let scratch = ScratchDir::new("real")?;
    let containerd = Containerd::start()?;
    let since = SystemTime::now();
    let mounted = containerd.unpack(&layout, TAG, Snapshotter::Overlayfs, &scratch.make("containerd")?)?;
    let expected = Snapshot::take(mounted.path())?;
    assert!(expected.content_len_bytes() >= CONTENT_MIN_BYTES, "{} bytes only", expected.content_len_bytes());

    let exceptions = Exceptions {
        directory_mtimes_since: Some(since),
        root_metadata: true,
        link_counts: true,
        ..Exceptions::default()
    };
    let target = scratch.path().join("gnu-tar");
    gnu_tar(&layout, TAG, &target).context("GNU tar")?;
    let differences = compare(&expected, &Snapshot::take(&target)?, &exceptions);
    assert!(differences.is_empty(), "GNU tar: {differences}");

    let knows = |kind: &str| kind.ends_with("tar") || kind.ends_with("+gzip");
    if layout.image(TAG)?.layers.iter().all(|layer| knows(&layer.media_type)) {
        let target = scratch.path().join("umoci");
        umoci(&layout, TAG, &target).context("umoci")?;
        let differences = compare(&expected, &Snapshot::take(&target)?, &exceptions);
        assert!(differences.is_empty(), "umoci: {differences}");
    }
    Ok(())
}

#[test]
fn references_agree_on_spark() -> Result<()> {
    references_agree(RealImage::Spark)
}

#[test]
fn references_agree_on_web() -> Result<()> {
    references_agree(RealImage::Web)
}

#[test]
fn references_agree_on_python() -> Result<()> {
    references_agree(RealImage::Python)
}
