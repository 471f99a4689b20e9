//! What is given to whom: artifacts, private images, grants, reports.

use std::ops::Range;

use super::*;

async fn read(
    client: &mut ControllerClient<Channel>,
    id: ArtifactId,
    range: Range<u64>,
    grants: Vec<Bytes>,
) -> Result<(u64, Vec<u8>), Status> {
    let id = Bytes::copy_from_slice(&id.0);
    let (offset, length) = (range.start, range.end - range.start);
    let asked = client.read_artifact(v1::ReadArtifactRequest { id, offset, length, grants }).await;
    let mut parts = asked?.into_inner();
    let (mut total, mut bytes) = (0, Vec::new());
    while let Some(part) = parts.message().await? {
        total = total.max(part.packed_length);
        bytes.extend_from_slice(&part.data);
    }
    Ok((total, bytes))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn artifacts_are_read_whole_and_in_parts() {
    let stage = Stage::new().await;
    stage.ready(1, Access::Public).await;
    let (_, mut client) = TestNode::joined("node-1", &stage).await;
    let (statement, artifacts) = layer(1, 1);
    let (total, packed) = read(&mut client, statement.toc, 0..0, Vec::new()).await.expect("read");
    assert_eq!(total, packed.len() as u64);
    let plain = hermes_image::index::wire::unpack(&packed, 1 << 20).expect("unpacked");
    assert_eq!(&plain, &*artifacts[0].bytes);
    let part = 100_000..200_000;
    let (_, some) = read(&mut client, statement.toc, part.clone(), Vec::new()).await.expect("read");
    assert_eq!(some, packed[part.start as usize..part.end as usize]);
    for (range, expected) in [(total..total + 5, 0), (total - 1..u64::MAX, 1), (u64::MAX - 1..u64::MAX, 0)] {
        assert_eq!(read(&mut client, statement.toc, range, Vec::new()).await.expect("read").1.len(), expected);
    }
    is(&read(&mut client, ArtifactId([9; 32]), 0..0, Vec::new()).await.expect_err("unknown"), Code::NotFound);
    // What no image needs any more is nobody's.
    stage.hub.hear(&Action::Withdraw(ImageKey { manifest: Digest([1; 32]) }));
    is(&read(&mut client, statement.toc, 0..0, Vec::new()).await.expect_err("withdrawn"), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_private_image_is_given_for_grants_of_ones_own() {
    let stage = Stage::new().await;
    let view = stage.ready(1, Access::Private).await;
    let (_, mut client) = TestNode::joined("node-1", &stage).await;
    let (_, mut other) = TestNode::joined("node-2", &stage).await;
    let (first, second) = (layer(1, 1).0, layer(1, 2).0);
    let manifest = Bytes::copy_from_slice(&view.image.manifest.0);
    let ask = |grants: Vec<Bytes>| v1::GetImageRequest { manifest: manifest.clone(), grants };
    is(&client.get_image(ask(Vec::new())).await.expect_err("without"), Code::PermissionDenied);
    is(&read(&mut client, first.toc, 0..0, Vec::new()).await.expect_err("without"), Code::PermissionDenied);
    let layers = [first.diff_id, second.diff_id].map(|layer| Bytes::copy_from_slice(&layer.0)).to_vec();
    let request = v1::GrantRequest { layers, life_seconds: 600 };
    let mine = client.grant(request.clone()).await.expect("granted").into_inner().grants;
    let theirs = other.grant(request).await.expect("granted").into_inner().grants;
    // Somebody else's, and one of two, are not enough for the image.
    is(&client.get_image(ask(theirs)).await.expect_err("another's"), Code::PermissionDenied);
    is(&client.get_image(ask(mine[..1].to_vec())).await.expect_err("one of two"), Code::PermissionDenied);
    let given = client.get_image(ask(mine.clone())).await.expect("given").into_inner();
    let statement = Statement::open(&given.statement, view.image.manifest, &stage.keys.public_keys());
    assert_eq!(statement.expect("signed").layers.len(), 2);
    assert_eq!(
        (given.profile.as_ref(), given.references.as_slice()),
        (b"profile".as_slice(), ["registry.test/app:1".to_owned()].as_slice())
    );
    assert!(read(&mut client, first.toc, 0..0, mine[..1].to_vec()).await.is_ok());
    is(
        &read(&mut client, first.toc, 0..0, mine[1..].to_vec()).await.expect_err("another layer's"),
        Code::PermissionDenied,
    );
    // An image of which no statement can be read is nobody's.
    assert!(stage.numbers.refusals(Refusal::NoGrant) >= 5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_private_image_is_given_to_whom_a_policy_lets_hold_it() {
    let stage = Stage::new().await;
    let mut view = stage.index(1, Access::Private).await;
    view.seeds.insert("node-1".to_owned(), SeedMode::Full);
    stage.hub.hear(&Action::Publish(Arc::new(view)));
    let request = v1::GetImageRequest { manifest: Bytes::from(vec![1; 32]), grants: Vec::new() };
    let (_, mut seed) = TestNode::joined("node-1", &stage).await;
    let (_, mut other) = TestNode::joined("node-2", &stage).await;
    assert!(seed.get_image(request.clone()).await.is_ok());
    assert!(read(&mut seed, layer(1, 1).0.toc, 0..0, Vec::new()).await.is_ok());
    is(&other.get_image(request).await.expect_err("no seed"), Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reports_and_starts_reach_the_core_and_silence_is_noticed() {
    let limits = ApiLimits { silent_after: Duration::from_millis(200), ..ApiLimits::default() };
    let mut stage = Stage::with(limits).await;
    stage.ready(1, Access::Public).await;
    let (node, mut client) = TestNode::joined("node-1", &stage).await;
    let report = v1::ReportRequest {
        version: "1.0".to_owned(),
        ways: vec!["fuse-tree".to_owned()],
        images: vec![v1::HeldImage { manifest: Bytes::from(vec![1; 32]), percent: 40 }],
        ..Default::default()
    };
    let stream = client.watch(v1::WatchRequest::default()).await.expect("watches");
    client.report(report.clone()).await.expect("reported");
    let Some(Event::Reported { node: name, report: heard }) = within("the report", stage.events.recv()).await else {
        panic!("no report");
    };
    assert_eq!((name.as_str(), heard.peer, heard.images[&Digest([1; 32])]), ("node-1", node.peer.to_string(), 40));
    is(&client.report(report).await.expect_err("at once again"), Code::ResourceExhausted);

    let record = hermes_policy::profile::StartRecord::of(1, vec![DiffId([1; 32])], Vec::new());
    let record = Bytes::from(codec_of(&record));
    let start = v1::UploadStartRequest { manifest: Bytes::from(vec![1; 32]), record: record.clone() };
    client.upload_start(start).await.expect("taken");
    let Some(Event::Started { record: heard, .. }) = within("the start", stage.events.recv()).await else {
        panic!("no start");
    };
    assert_eq!(heard.as_ref(), record.as_ref());
    let unknown = v1::UploadStartRequest { manifest: Bytes::from(vec![2; 32]), record };
    is(&client.upload_start(unknown).await.expect_err("no such image"), Code::NotFound);
    let nonsense = v1::UploadStartRequest { manifest: Bytes::from(vec![1; 32]), record: Bytes::from_static(b"no") };
    is(&client.upload_start(nonsense).await.expect_err("no record"), Code::InvalidArgument);

    drop((stream, client));
    let Some(Event::NodeSilent(name)) = within("silence", stage.events.recv()).await else { panic!("not silent") };
    assert_eq!(name, "node-1");
}

fn codec_of(record: &hermes_policy::profile::StartRecord) -> Vec<u8> {
    hermes_policy::profile::codec::encode_record(record)
}
