//! A whole image from a peer: the registry is asked for names only, never for a byte of a layer.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hermes_registry::Registry;
use hermes_snapshotter::status::Way;
use hermes_tests::compare::{Exceptions, compare};
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::images::{RealImage, TAG};
use hermes_tests::layout::Layout;
use hermes_tests::node::{Index, Mount, TestNode};
use hermes_tests::snapshot::Snapshot;

/// How long the first node may take to know the address at which it listens.
const LISTEN_DEADLINE: Duration = Duration::from_secs(10);

/// Copies everything of an image but its layers: what the registry of the second node has.
pub(crate) fn without_layers(layout: &Layout, tag: &str, target: &Path) -> Result<u64> {
    let image = layout.image(tag)?;
    let copy = Layout::create(target)?;
    fs::copy(layout.dir().join("index.json"), target.join("index.json")).context("copy the index")?;
    let manifest = fs::read(layout.blob_path(image.manifest)).context("read the manifest")?;
    let config: serde_json::Value = serde_json::from_slice(&manifest)?;
    let config = config["config"]["digest"].as_str().context("the manifest names no configuration")?.parse()?;
    fs::copy(layout.blob_path(image.manifest), copy.blob_path(image.manifest)).context("copy the manifest")?;
    fs::copy(layout.blob_path(config), copy.blob_path(config)).context("copy the configuration")
}

/// The second node reads every file and then completes the image, from the first node alone; what it shows is what the
/// first one shows, byte for byte. Its registry has no layers at all, and is asked once, for the configuration.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_node_reads_a_whole_image_from_the_first() -> Result<()> {
    let program = Path::new(env!("CARGO_BIN_EXE_hermes"));
    let layout = RealImage::Web.layout()?;
    let scratch = ScratchDir::new("from-peer")?;
    let source = format!("oci:{}:{TAG}", layout.dir().display());
    let index = Index::build(program, &source, &scratch.make("indexes")?)?;

    let first = TestNode::start(program, "first")?;
    let mount = Mount {
        image: &source,
        way: Some(Way::ErofsFuse),
        index_folder: Some(&index.folder),
        trusted_key: &index.key,
        peers: &[],
    };
    let first_dir = first.mount("image", &mount)?;
    first.complete(&first_dir)?;
    let expected = Snapshot::take(&first_dir)?;
    let listens = || first.status().ok().map(|status| status.listen).filter(|listen| !listen.is_empty());
    let peers = wait_for("an address of the first node", LISTEN_DEADLINE, listens)?;

    let stripped = scratch.path().join("stripped");
    let config_len_bytes = without_layers(&layout, TAG, &stripped)?;
    let registry = Registry::open(&stripped, hermes_registry::Options::default())?;
    let registry = registry.start(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))).await?;
    let reference = format!("{}/web:{TAG}", registry.address());
    let second = TestNode::start(program, "second")?;
    for (name, way) in [("tree", Way::FuseTree), ("kernel", Way::ErofsFuse)] {
        let before = registry.counters();
        // The index comes from the peer, too.
        let mount =
            Mount { image: &reference, way: Some(way), index_folder: None, trusted_key: &index.key, peers: &peers };
        let dir = second.mount(name, &mount)?;
        let differences = compare(&expected, &Snapshot::take(&dir)?, &Exceptions::default());
        assert!(differences.is_empty(), "{way}: {differences}");
        second.complete(&dir)?;
        let status = second.image(&dir)?;
        assert_eq!(status.present_bytes, status.total_bytes, "{status:?}");
        assert_eq!((status.sources.registry_bytes, status.sources.registry_wire_bytes), (0, 0), "{status:?}");
        if way == Way::FuseTree {
            let came = status.sources.peer_bytes + status.sources.local_bytes;
            assert!(came >= status.total_bytes, "{came} bytes came, {status:?}");
            assert!(status.sources.peer_bytes > status.total_bytes / 2, "{status:?}");
        }
        let after = registry.counters();
        assert_eq!(after.blob_requests - before.blob_requests, 1, "{way}: {after:?}");
        assert_eq!(after.blob_bytes - before.blob_bytes, config_len_bytes, "{way}: {after:?}");
    }
    drop(second);
    registry.shutdown().await;
    Ok(())
}
