//! Who is let in, and until when.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_cannot_prove_to_be_the_node_is_refused_and_counted() {
    let stage = Stage::new().await;
    let node = TestNode::new("node-1", stage.folder.path());
    let mut client = node.connect(stage.address(), &stage.custody.current()).await.expect("connected");
    type Change = fn(&mut v1::JoinRequest);
    let cases: [(&str, Change, Code, Refusal); 12] = [
        ("", |_| (), Code::Unauthenticated, Refusal::NoToken),
        ("audience:node-1", |_| (), Code::PermissionDenied, Refusal::OtherAudience),
        ("good:node-2", |_| (), Code::PermissionDenied, Refusal::OtherNode),
        ("expired:node-1", |_| (), Code::PermissionDenied, Refusal::Expired),
        ("nonsense", |_| (), Code::PermissionDenied, Refusal::UnknownToken),
        ("good:node-1", |it| it.cluster = "test".to_owned(), Code::PermissionDenied, Refusal::OtherCluster),
        ("good:node-1", |it| it.versions = None, Code::FailedPrecondition, Refusal::Version),
        (
            "good:node-1",
            |it| it.versions = Some(v1::Versions { min: 2, max: 3 }),
            Code::FailedPrecondition,
            Refusal::Version,
        ),
        ("good:Node", |it| it.node = "Node".to_owned(), Code::InvalidArgument, Refusal::Malformed),
        ("good:node-1", |it| it.peer = Bytes::from_static(b"nobody"), Code::InvalidArgument, Refusal::Malformed),
        ("good:node-1", |it| it.zone = "a b".to_owned(), Code::InvalidArgument, Refusal::Malformed),
        ("good:node-1", |it| it.addresses = vec!["nowhere".to_owned()], Code::InvalidArgument, Refusal::Malformed),
    ];
    for (token, change, code, why) in cases {
        let before = stage.numbers.refusals(why);
        let mut request = node.request(token);
        change(&mut request);
        let status = client.join(request).await.expect_err(token);
        is(&status, code);
        assert_eq!(stage.numbers.refusals(why), before + 1, "{token}: not counted");
        if why == Refusal::Version {
            assert!(status.message().contains("1 to 1"), "both ranges are named: {status:?}");
        }
    }
    is(&client.join(node.request("away:node-1")).await.expect_err("away"), Code::Unavailable);
    let mut values = hermes_metrics::Values::default();
    stage.numbers.fill(&mut values);
    assert_eq!(values.get("hermes_controller_api_refusals_total", "other_node"), 1.0);
    assert!(values.get("hermes_controller_api_requests_total", "join") > 1.0);
    client.join(node.request("good:node-1")).await.expect("joined");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_certificate_there_is_nothing_but_join() {
    let stage = Stage::new().await;
    let view = stage.ready(1, Access::Public).await;
    let node = TestNode::new("node-1", stage.folder.path());
    let mut client = node.connect(stage.address(), &stage.custody.current()).await.expect("connected");
    let id = Bytes::copy_from_slice(&view.index.as_ref().expect("ready").artifacts[0].0);
    let manifest = Bytes::copy_from_slice(&view.image.manifest.0);
    let read = v1::ReadArtifactRequest { id, ..Default::default() };
    is(&client.read_artifact(read).await.expect_err("read"), Code::Unauthenticated);
    is(&client.watch(v1::WatchRequest::default()).await.expect_err("watch"), Code::Unauthenticated);
    let image = v1::GetImageRequest { manifest: manifest.clone(), ..Default::default() };
    is(&client.get_image(image).await.expect_err("image"), Code::Unauthenticated);
    is(&client.report(v1::ReportRequest::default()).await.expect_err("report"), Code::Unauthenticated);
    let start = v1::UploadStartRequest { manifest, ..Default::default() };
    is(&client.upload_start(start).await.expect_err("start"), Code::Unauthenticated);
    is(&client.grant(v1::GrantRequest::default()).await.expect_err("grant"), Code::Unauthenticated);
    is(&client.revoke(v1::RevokeRequest::default()).await.expect_err("revoke"), Code::Unauthenticated);
    assert_eq!(stage.numbers.refusals(Refusal::NoCertificate), 7);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_has_ended_or_is_anothers_opens_nothing() {
    let stage = Stage::new().await;
    let mut node = TestNode::new("node-1", stage.folder.path());
    let (ours, now) = (stage.custody.current(), unix_now());
    let theirs = Authority::create("prod".parse().expect("a cluster"), now).expect("made");
    let ended = ours.node_certificate("node-1", &node.peer, now - 48 * 3600).expect("issued");
    let foreign = theirs.node_certificate("node-1", &node.peer, now).expect("issued");
    // The certificate of another node, shown by who has not its key.
    let other = TestNode::new("node-2", stage.folder.path());
    let stolen = ours.node_certificate("node-2", &other.peer, now).expect("issued");
    for (what, certificate) in [("ended", ended), ("foreign", foreign), ("stolen", stolen)] {
        let before = stage.numbers.refusals(Refusal::Handshake);
        node.certificate = Some(certificate);
        // With TLS 1.3 a client learns with its first answer that it was refused.
        let refused = match node.connect(stage.address(), &ours).await {
            Err(_) => true,
            Ok(mut client) => client.watch(v1::WatchRequest::default()).await.is_err(),
        };
        assert!(refused, "{what} was let in");
        if what != "stolen" {
            within("counting", async {
                while stage.numbers.refusals(Refusal::Handshake) == before {
                    tokio::task::yield_now().await;
                }
            })
            .await;
        }
    }
    // And a node does not believe another authority's server.
    node.certificate = None;
    assert!(node.connect(stage.address(), &theirs).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_renews_by_its_certificate_and_for_itself_alone() {
    let stage = Stage::new().await;
    let (node, mut client) = TestNode::joined("node-1", &stage).await;
    let answer = client.join(node.request("")).await.expect("renewed").into_inner();
    let trust = stage.custody.current().trust();
    let member = hermes_p2p::admission::certificate::SignedCertificate::decode(&answer.member_certificate);
    let cluster = "prod".parse().expect("a cluster");
    member.expect("read").check(&cluster, &node.peer, &trust, None, unix_now()).expect("good in the swarm");
    let other = TestNode::new("node-2", stage.folder.path());
    for request in [
        v1::JoinRequest { node: "node-2".to_owned(), ..node.request("") },
        v1::JoinRequest { peer: other.peer.to_bytes().into(), ..node.request("") },
    ] {
        is(&client.join(request).await.expect_err("for another"), Code::Unauthenticated);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_taken_out_loses_its_stream_and_cannot_come_back() {
    let stage = Stage::new().await;
    let (node, mut client) = TestNode::joined("node-1", &stage).await;
    let (_, mut other) = TestNode::joined("node-2", &stage).await;
    let mut stream = client.watch(v1::WatchRequest::default()).await.expect("watches").into_inner();
    let request = v1::RevokeRequest { peer: node.peer.to_bytes().into() };
    is(&other.revoke(request.clone()).await.expect_err("another's"), Code::PermissionDenied);
    stage.custody.revoke(node.peer).await.expect("revoked");
    let ended = within("the end of the stream", async {
        loop {
            match stream.message().await {
                Ok(Some(_)) => {}
                ended => return ended,
            }
        }
    });
    is(&ended.await.expect_err("it goes on"), Code::PermissionDenied);
    is(&client.watch(v1::WatchRequest::default()).await.expect_err("again"), Code::PermissionDenied);
    is(&client.join(node.request("good:node-1")).await.expect_err("joins"), Code::PermissionDenied);
    // The others hear of it, to keep it out of the swarm.
    let mut stream = other.watch(v1::WatchRequest::default()).await.expect("watches").into_inner();
    within("the notice", async {
        loop {
            let update = stream.message().await.expect("goes on").expect("goes on").update;
            let update = v1::WatchUpdate::decode(update).expect("an update");
            if update.trust.is_some_and(|trust| !trust.revocation.is_empty()) {
                return;
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_tls_1_3_is_spoken() {
    let stage = Stage::new().await;
    let mut roots = rustls::RootCertStore::empty();
    for root in stage.custody.current().roots() {
        roots.add(root.into()).expect("a root");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .expect("TLS 1.2")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let tcp = tokio::net::TcpStream::connect(stage.address()).await.expect("connected");
    let name = SERVER_NAME.try_into().expect("a name");
    let refused = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, tcp).await;
    assert!(refused.is_err(), "TLS 1.2 is spoken");
}
