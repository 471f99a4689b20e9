//! Clients that break the rules.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_long_or_makes_no_sense_is_refused() {
    let stage = Stage::new().await;
    let (_, mut client) = TestNode::joined("node-1", &stage).await;
    let long = v1::UploadStartRequest { manifest: Bytes::new(), record: Bytes::from(vec![0; 2 << 20]) };
    assert!(client.upload_start(long).await.is_err());
    let many = v1::GrantRequest { layers: vec![Bytes::from(vec![0; 32]); 1025], life_seconds: 60 };
    is(&client.grant(many).await.expect_err("too many layers"), Code::InvalidArgument);
    for life_seconds in [0, 3601, u32::MAX] {
        let request = v1::GrantRequest { layers: Vec::new(), life_seconds };
        is(&client.grant(request).await.expect_err("another life"), Code::InvalidArgument);
    }
    let short = v1::GrantRequest { layers: vec![Bytes::from_static(b"x")], life_seconds: 60 };
    is(&client.grant(short).await.expect_err("no layer"), Code::InvalidArgument);
    let known = v1::WatchRequest { known: vec![0; 10_001], ..Default::default() };
    is(&client.watch(known).await.expect_err("too many"), Code::InvalidArgument);
    let held = v1::HeldImage { manifest: Bytes::from(vec![0; 32]), percent: 101 };
    let report = v1::ReportRequest { images: vec![held], ..Default::default() };
    is(&client.report(report).await.expect_err("101 percent"), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_floods_is_slowed_and_others_are_not() {
    let limits = ApiLimits { requests_burst: 20, requests_per_second: 1, ..ApiLimits::default() };
    let stage = Stage::with(limits).await;
    let (_, mut flooding) = TestNode::joined("node-1", &stage).await;
    let (_, mut other) = TestNode::joined("node-2", &stage).await;
    let request = v1::GetImageRequest { manifest: Bytes::from(vec![7; 32]), grants: Vec::new() };
    let mut refused = 0;
    for _ in 0..100 {
        let status = flooding.get_image(request.clone()).await.expect_err("no such image");
        refused += u32::from(status.code() == Code::ResourceExhausted);
    }
    assert!(refused > 50, "{refused} refused");
    is(&other.get_image(request).await.expect_err("no such image"), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_has_a_few_streams_at_once() {
    let stage = Stage::new().await;
    let (_, mut client) = TestNode::joined("node-1", &stage).await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(client.watch(v1::WatchRequest::default()).await.expect("watches"));
    }
    is(&client.watch(v1::WatchRequest::default()).await.expect_err("one too many"), Code::ResourceExhausted);
    streams.pop();
    within("a place", async {
        while client.watch(v1::WatchRequest::default()).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// Closed by the server, whatever it says before.
async fn is_closed(mut stream: TcpStream) {
    within("the end of a connection", async {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_says_nothing_or_something_else_is_let_go() {
    let short = Duration::from_millis(300);
    let limits = ApiLimits { handshake_timeout: short, anonymous_for: short, ..ApiLimits::default() };
    let stage = Stage::with(limits).await;
    let silent = TcpStream::connect(stage.address()).await.expect("connected");
    let mut other = TcpStream::connect(stage.address()).await.expect("connected");
    other.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("sent");
    is_closed(silent).await;
    is_closed(other).await;
    assert_eq!(stage.numbers.refusals(Refusal::Handshake), 2);
    // Without a certificate there is time to join, and no more.
    let node = TestNode::new("node-1", stage.folder.path());
    let _client = node.connect(stage.address(), &stage.custody.current()).await.expect("connected");
    within("the end of the connection", async {
        while stage.numbers.connections() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_have_a_limit_and_give_their_places_back() {
    let limits = ApiLimits { connections_max: 3, ..ApiLimits::default() };
    let stage = Stage::with(limits).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(TcpStream::connect(stage.address()).await.expect("connected"));
    }
    let node = TestNode::new("node-1", stage.folder.path());
    let authority = stage.custody.current();
    assert!(node.connect(stage.address(), &authority).await.is_err(), "one too many");
    assert!(stage.numbers.refusals(Refusal::TooMany) > 0);
    drop(held);
    within("a place", async {
        while node.connect(stage.address(), &authority).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}
