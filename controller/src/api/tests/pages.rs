//! The status page on the same port, by HTTP/1.1 (a browser by HTTP/2 is in `tests/e2e/status_page.rs`).

use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::*;

/// A connection as `hermes-controller` that speaks `protocols`.
async fn connect(stage: &Stage, protocols: &[&[u8]]) -> BufReader<TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    for root in stage.custody.current().roots() {
        roots.add(CertificateDer::from(root)).expect("a root");
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = config.expect("versions").with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    let tcp = TcpStream::connect(stage.address()).await.expect("connected");
    let name = ServerName::try_from(SERVER_NAME).expect("a name");
    BufReader::new(TlsConnector::from(Arc::new(config)).connect(name, tcp).await.expect("a handshake"))
}

/// The first line of the answer, once all of it was read; `None` when the connection is over.
async fn ask(stream: &mut BufReader<TlsStream<TcpStream>>, path: &str, token: &str) -> Option<String> {
    let request = format!("GET {path} HTTP/1.1\r\nhost: hermes-controller\r\nauthorization: Bearer {token}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let (mut first, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        let line = line.trim_end().to_ascii_lowercase();
        if first.is_empty() {
            first.clone_from(&line);
        }
        if let Some(value) = line.strip_prefix("content-length: ") {
            length = value.parse().expect("a number");
        }
        if line.is_empty() {
            break;
        }
    }
    stream.read_exact(&mut vec![0; length]).await.ok()?;
    Some(first)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_browser_without_http2_gets_the_page_and_no_call_of_nodes() {
    let stage = Stage::new().await;
    let mut stream = connect(&stage, &[b"http/1.1"]).await;
    assert_eq!(within("the page", ask(&mut stream, "/status", "good:page")).await.as_deref(), Some("http/1.1 200 ok"));
    let said = within("data", ask(&mut stream, "/status/api/v1/summary", "good:page")).await;
    assert_eq!(said.as_deref(), Some("http/1.1 200 ok"));
    let said = within("data", ask(&mut stream, "/status/api/v1/summary", "wrong")).await;
    assert_eq!(said.as_deref(), Some("http/1.1 401 unauthorized"));
    let said = within("a call", ask(&mut stream, "/hermes.controller.v1.Controller/Join", "good:page")).await;
    assert_eq!(said.as_deref(), Some("http/1.1 404 not found"));
    // A head that has no end is not read to its end.
    let mut stream = connect(&stage, &[b"http/1.1"]).await;
    let head = format!("GET /status HTTP/1.1\r\nhost: x\r\na: {}", "a".repeat(1 << 20));
    let _ = stream.write_all(head.as_bytes()).await;
    let mut rest = Vec::new();
    within("the end of a connection", async { drop(stream.read_to_end(&mut rest).await) }).await;
    assert!(!rest.starts_with(b"HTTP/1.1 200"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_viewer_stays_for_as_long_as_it_shows_a_good_token() {
    let short = Duration::from_millis(400);
    let stage = Stage::with(ApiLimits { anonymous_for: short, ..ApiLimits::default() }).await;
    let mut good = connect(&stage, &[b"http/1.1"]).await;
    let mut wrong = connect(&stage, &[b"http/1.1"]).await;
    let began = tokio::time::Instant::now();
    let mut wrong_is_over = false;
    while began.elapsed() < 4 * short {
        assert!(within("an answer", ask(&mut good, "/status/api/v1/summary", "good:page")).await.is_some(), "let go");
        wrong_is_over |= within("an answer", ask(&mut wrong, "/status/api/v1/summary", "wrong")).await.is_none();
        tokio::time::sleep(short / 20).await;
    }
    assert!(wrong_is_over, "who shows nothing good stays");
}
