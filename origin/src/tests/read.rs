//! Reading parts of layers when all goes well.

use super::harness::{LAYER_BYTES, Rig, amd64, collect, ramp, soon};
use crate::{ErrorClass, ImageSource, LayerDescriptor, Origin, Timeouts};
use hermes_registry::Auth;

async fn read_parts(origin: &Origin, layer: &LayerDescriptor) {
    let (ramp, len) = (ramp(), LAYER_BYTES as u64);
    for range in [0..1, 0..len, len - 1..len, 1..len, 131_071..262_145, 7..8, 0..len - 1] {
        let part = collect(origin.read(layer, range.clone(), soon())).await.unwrap_or_else(|error| panic!("{error}"));
        assert!(part == ramp[range.start as usize..range.end as usize], "{range:?} is not what was asked for");
    }
    assert!(collect(origin.read_all(layer, soon())).await.unwrap_or_else(|error| panic!("{error}")) == ramp);
    for range in [0..0, 5..5, len..len] {
        assert!(collect(origin.read(layer, range, soon())).await.expect("nothing").is_empty());
    }
    // What the caller computed may be anything.
    #[expect(clippy::reversed_empty_ranges, reason = "the case under test")]
    for range in [0..len + 1, len + 1..len + 2, 5..4, u64::MAX - 1..u64::MAX] {
        let error = collect(origin.read(layer, range.clone(), soon())).await.expect_err("out of bounds");
        assert_eq!((error.class(), error.kind()), (ErrorClass::Local, "out_of_bounds"), "{range:?}");
    }
}

#[tokio::test]
async fn any_part_of_a_layer_is_read_from_a_registry() {
    let rig = Rig::new(Auth::Open).await;
    let (client, origin, layer) = rig.opened(Timeouts::default()).await;
    let before = (client.counters(), rig.served());
    read_parts(&origin, &layer).await;
    let after = (client.counters(), rig.served());
    // Seven parts and the whole; empty and impossible ones cost nothing.
    assert_eq!(after.0.requests - before.0.requests, 8);
    assert_eq!(after.1.blob_requests - before.1.blob_requests, 8);
    assert_eq!(after.0.bytes - before.0.bytes, after.1.blob_bytes - before.1.blob_bytes, "each byte is counted once");
    let whole: Vec<_> = rig.server.seen().into_iter().filter(|seen| seen.range.is_none()).collect();
    assert_eq!(whole.len(), 2, "the whole layer is asked for without a range");
}

#[tokio::test]
async fn any_part_of_a_layer_is_read_from_a_layout() {
    let rig = Rig::new(Auth::Open).await;
    let client = rig.client(Timeouts::default());
    let source: ImageSource = format!("oci:{}:v1", rig.layout().display()).parse().expect("a layout");
    let origin = client.open(&source).await.expect("an origin");
    let image = origin.resolve(&amd64(), soon()).await.expect("an image");
    assert_eq!(image.manifest_digest, rig.manifest);
    read_parts(&origin, &image.layers[0]).await;
    assert!(rig.server.seen().is_empty());
    assert!(client.counters().bytes > LAYER_BYTES as u64);
}

#[tokio::test]
async fn nothing_is_sent_before_the_stream_is_polled() {
    let rig = Rig::new(Auth::Open).await;
    let (_, origin, layer) = rig.opened(Timeouts::default()).await;
    drop(origin.read_all(&layer, soon()));
    assert!(rig.server.seen().is_empty());
}

#[tokio::test]
async fn a_layout_that_changed_is_noticed() {
    let rig = Rig::new(Auth::Open).await;
    let client = rig.client(Timeouts::default());
    let source: ImageSource = format!("oci:{}:v1", rig.layout().display()).parse().expect("a layout");
    let origin = client.open(&source).await.expect("an origin");
    let layer = origin.resolve(&amd64(), soon()).await.expect("an image").layers.remove(0);
    let path = rig.layout().join("blobs/sha256").join(layer.layer.hex());
    std::fs::write(&path, "short").expect("written");
    let error = collect(origin.read(&layer, 0..10, soon())).await.expect_err("shorter");
    assert_eq!((error.class(), error.kind()), (ErrorClass::PeerFault, "wrong_length"));
    std::fs::remove_file(&path).expect("removed");
    let error = collect(origin.read(&layer, 0..10, soon())).await.expect_err("gone");
    assert_eq!((error.class(), error.layer()), (ErrorClass::NotFound, Some(layer.layer)));
    let text = error.to_string();
    assert!(text.contains(&source.to_string()) && text.contains("copy the image again"), "{text}");
}

#[tokio::test]
async fn what_is_no_layout_says_so() {
    let rig = Rig::new(Auth::Open).await;
    let client = rig.client(Timeouts::default());
    let cases = [
        (format!("oci:{}", rig.folder.path().display()), "is not an OCI image layout"),
        ("oci:/nonexistent".to_owned(), "is not a folder"),
    ];
    for (source, expected) in cases {
        let source: ImageSource = source.parse().expect("a layout");
        let error = client.open(&source).await.expect_err("no layout");
        assert_eq!(error.class(), ErrorClass::NotFound);
        assert!(error.to_string().contains(expected), "{error}");
    }
    let source: ImageSource = format!("oci:{}:v9", rig.layout().display()).parse().expect("a layout");
    let origin = client.open(&source).await.expect("a layout");
    let error = origin.resolve(&amd64(), soon()).await.expect_err("no such tag").to_string();
    assert!(error.contains("tagged 'v9'; it has v1"), "{error}");
}
