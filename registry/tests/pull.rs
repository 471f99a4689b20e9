//! The registry over real connections, asked by reqwest and by an independent client of the protocol.

use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::path::Path;
use std::time::{Duration, Instant};

use hermes_image::ids::{DiffId, Digest};
use hermes_registry::oci::{Descriptor, Platform, media_type};
use hermes_registry::{Auth, Handle, LayoutWriter, Login, Options, Registry};
use oci_client::client::{ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use reqwest::header::{ACCEPT, HeaderMap, IF_NONE_MATCH, IF_RANGE, RANGE};
use reqwest::{Response, StatusCode};
use serde_json::{Value, json};
use sha2::Digest as _;
use tempfile::TempDir;

const LAYER_BYTES: usize = 700_001;

/// Each byte a function of its place, so that a misplaced one shows.
fn ramp() -> Vec<u8> {
    (0..LAYER_BYTES).map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8).collect()
}

struct Image {
    manifest: Digest,
    layer: Descriptor,
}

fn write_image(folder: &Path, tag: &str) -> Image {
    let writer = LayoutWriter::create(folder).expect("a layout");
    let layer = writer.layer_tar(ramp().as_slice()).expect("a layer");
    let packed = writer.layer_blob(&b"packed"[..], media_type::OCI_LAYER_GZIP, DiffId([3; 32])).expect("a layer");
    let config = json!({ "Cmd": ["/app"] });
    let image = writer.image(&Platform::host(), &config, &[layer.clone(), packed]).expect("an image");
    writer.tag(image.clone(), tag).expect("tagged");
    Image { manifest: image.digest, layer: layer.descriptor }
}

fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

struct Served {
    _folder: TempDir,
    image: Image,
    handle: Handle,
    client: reqwest::Client,
}

async fn served(options: Options) -> Served {
    // Another test of this process may have been first; then it is installed, which is all that matters.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = tempfile::tempdir().expect("a folder");
    let image = write_image(folder.path(), "v1");
    let registry = Registry::open(folder.path(), options).expect("a registry");
    let handle = registry.start(loopback()).await.expect("a free port");
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(30)).build().expect("a client");
    Served { _folder: folder, image, handle, client }
}

impl Served {
    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.handle.address())
    }

    async fn get(&self, path: &str, headers: HeaderMap) -> Response {
        self.client.get(self.url(path)).headers(headers).send().await.expect("an answer")
    }

    fn blob(&self) -> String {
        format!("/v2/any/name/blobs/{}", self.image.layer.digest)
    }
}

fn header(name: reqwest::header::HeaderName, value: &str) -> HeaderMap {
    HeaderMap::from_iter([(name, value.parse().expect("a header"))])
}

fn text<'a>(response: &'a Response, name: &str) -> &'a str {
    response.headers().get(name).map_or("", |value| value.to_str().expect("text"))
}

async fn error_code(response: Response) -> (StatusCode, String) {
    let status = response.status();
    let body: Value = serde_json::from_slice(&response.bytes().await.expect("a body")).expect("JSON");
    (status, body["errors"][0]["code"].as_str().expect("a code").to_owned())
}

#[tokio::test]
async fn manifests_are_found_by_tag_and_digest() {
    let served = served(Options::default()).await;
    let digest = served.image.manifest.to_string();
    for reference in ["v1", "latest", &digest] {
        let path = format!("/v2/some/app/manifests/{reference}");
        let response = served.get(&path, header(ACCEPT, media_type::OCI_MANIFEST)).await;
        assert_eq!(response.status(), StatusCode::OK, "{reference}");
        assert_eq!(text(&response, "content-type"), media_type::OCI_MANIFEST);
        assert_eq!(text(&response, "docker-content-digest"), digest);
        let len_bytes = response.content_length().expect("a length");
        let body = response.bytes().await.expect("a body");
        assert_eq!(body.len() as u64, len_bytes);
        assert_eq!(Digest(sha2::Sha256::digest(&body).into()).to_string(), digest);

        let head = served.client.head(served.url(&path)).send().await.expect("an answer");
        assert_eq!(head.status(), StatusCode::OK);
        assert_eq!(text(&head, "content-length"), len_bytes.to_string());
        assert_eq!(text(&head, "docker-content-digest"), digest);
        assert!(head.bytes().await.expect("no body").is_empty());
    }
    let known = served.get("/v2/app/manifests/v1", header(IF_NONE_MATCH, &format!("\"{digest}\""))).await;
    assert_eq!(known.status(), StatusCode::NOT_MODIFIED);
    served.handle.shutdown().await;
}

#[tokio::test]
async fn errors_have_the_form_of_the_specification() {
    let served = served(Options::default()).await;
    let zero = format!("sha256:{}", "0".repeat(64));
    let layer = served.image.layer.digest;
    let cases = [
        ("/v2/app/manifests/v2".to_owned(), 404, "MANIFEST_UNKNOWN"),
        (format!("/v2/app/manifests/{zero}"), 404, "MANIFEST_UNKNOWN"),
        (format!("/v2/app/manifests/{layer}"), 404, "MANIFEST_UNKNOWN"),
        ("/v2/app/manifests/..bad".to_owned(), 400, "MANIFEST_INVALID"),
        (format!("/v2/app/blobs/{zero}"), 404, "BLOB_UNKNOWN"),
        ("/v2/app/blobs/sha256:short".to_owned(), 400, "DIGEST_INVALID"),
        ("/v2/app/blobs/..%2f..%2findex.json".to_owned(), 404, "UNSUPPORTED"),
        ("/v2/App/tags/list".to_owned(), 400, "NAME_INVALID"),
        ("/v2/_catalog?n=x".to_owned(), 400, "PAGINATION_NUMBER_INVALID"),
        ("/v2/app/unknown".to_owned(), 404, "UNSUPPORTED"),
        ("/v1/_ping".to_owned(), 404, "UNSUPPORTED"),
        ("/token".to_owned(), 404, "UNSUPPORTED"),
    ];
    for (path, status, code) in cases {
        let response = served.get(&path, HeaderMap::new()).await;
        let (got_status, got_code) = error_code(response).await;
        assert_eq!((got_status.as_u16(), got_code.as_str()), (status, code), "{path}");
    }
    let refused = served.get("/v2/app/manifests/v1", header(ACCEPT, media_type::OCI_INDEX)).await;
    assert_eq!(error_code(refused).await.1, "MANIFEST_UNKNOWN");
    let upload = served.client.post(served.url("/v2/app/blobs/uploads/")).send().await.expect("an answer");
    assert_eq!(text(&upload, "allow"), "GET, HEAD");
    assert_eq!(error_code(upload).await, (StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED".to_owned()));
    served.handle.shutdown().await;
}

#[tokio::test]
async fn blobs_are_served_whole_and_in_parts() {
    let served = served(Options::default()).await;
    let ramp = ramp();
    let whole = served.get(&served.blob(), HeaderMap::new()).await;
    assert_eq!(whole.status(), StatusCode::OK);
    assert_eq!(text(&whole, "accept-ranges"), "bytes");
    assert_eq!(text(&whole, "docker-content-digest"), served.image.layer.digest.to_string());
    let etag = text(&whole, "etag").to_owned();
    assert!(whole.bytes().await.expect("a body") == ramp, "the whole layer");

    let cases = [
        ("bytes=0-0", 0..1),
        ("bytes=131071-262145", 131_071..262_146),
        ("bytes=700000-", 700_000..LAYER_BYTES),
        ("bytes=-5", LAYER_BYTES - 5..LAYER_BYTES),
        ("bytes=5-99999999", 5..LAYER_BYTES),
    ];
    for (range, part) in cases {
        let response = served.get(&served.blob(), header(RANGE, range)).await;
        assert_eq!(response.status(), StatusCode::PARTIAL_CONTENT, "{range}");
        let expected = format!("bytes {}-{}/{LAYER_BYTES}", part.start, part.end - 1);
        assert_eq!(text(&response, "content-range"), expected, "{range}");
        assert!(response.bytes().await.expect("a body") == ramp[part], "{range}");
    }
    let beyond = served.get(&served.blob(), header(RANGE, "bytes=700001-")).await;
    assert_eq!(text(&beyond, "content-range"), format!("bytes */{LAYER_BYTES}"));
    assert_eq!(error_code(beyond).await, (StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID".to_owned()));

    let mut changed = header(RANGE, "bytes=0-9");
    changed.insert(IF_RANGE, "\"other\"".parse().expect("a header"));
    assert_eq!(served.get(&served.blob(), changed).await.status(), StatusCode::OK);
    let known = served.get(&served.blob(), header(IF_NONE_MATCH, &etag)).await;
    assert_eq!(known.status(), StatusCode::NOT_MODIFIED);
    let head = served.client.head(served.url(&served.blob())).send().await.expect("an answer");
    assert_eq!(text(&head, "content-length"), LAYER_BYTES.to_string());
    served.handle.shutdown().await;
}

#[tokio::test]
async fn counters_tell_kinds_apart() {
    let served = served(Options::default()).await;
    let manifest = served.get("/v2/a/manifests/v1", HeaderMap::new()).await.bytes().await.expect("a body");
    served.get(&served.blob(), header(RANGE, "bytes=0-999")).await.bytes().await.expect("a body");
    served.get("/v2/", HeaderMap::new()).await;
    let counters = served.handle.counters();
    assert_eq!(counters.manifest_requests, 1);
    assert_eq!(counters.manifest_bytes, manifest.len() as u64);
    assert_eq!((counters.blob_requests, counters.blob_bytes), (1, 1000));
    assert_eq!((counters.other_requests, counters.denied_requests), (1, 0));
    served.handle.shutdown().await;
}

#[tokio::test]
async fn listings_come_in_pages() {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["a", "b/c", "d"] {
        let image = write_image(&folder.path().join(name), "v1");
        let writer = LayoutWriter::create(folder.path().join(name)).expect("the layout");
        writer.tag(Descriptor { digest: image.manifest, ..image.layer }, "v2").expect("tagged");
    }
    let registry = Registry::open(folder.path(), Options::default()).expect("a registry");
    let handle = registry.start(loopback()).await.expect("a free port");
    let get = async |path: &str| {
        let response = reqwest::get(format!("http://{}{path}", handle.address())).await.expect("an answer");
        let link = text(&response, "link").to_owned();
        let body: Value = serde_json::from_slice(&response.bytes().await.expect("a body")).expect("JSON");
        (body, link)
    };
    assert_eq!(get("/v2/_catalog").await, (json!({ "repositories": ["a", "b/c", "d"] }), String::new()));
    let (page, link) = get("/v2/_catalog?n=2").await;
    assert_eq!(page, json!({ "repositories": ["a", "b/c"] }));
    assert_eq!(link, "</v2/_catalog?n=2&last=b/c>; rel=\"next\"");
    assert_eq!(get("/v2/_catalog?n=2&last=b/c").await.0, json!({ "repositories": ["d"] }));
    assert_eq!(get("/v2/b/c/tags/list").await.0, json!({ "name": "b/c", "tags": ["v1", "v2"] }));
    assert_eq!(get("/v2/b/c/tags/list?n=1").await.0, json!({ "name": "b/c", "tags": ["v1"] }));
    assert_eq!(get("/v2/b/tags/list").await.0["errors"][0]["code"], "NAME_UNKNOWN");
    handle.shutdown().await;
}

fn login() -> Login {
    Login { user: "ann".to_owned(), password: "s3cret".to_owned() }
}

async fn pull_with_oci_client(served: &Served, auth: RegistryAuth) -> Result<(), String> {
    let config = ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() };
    let client = oci_client::Client::new(config);
    let reference = format!("{}/team/app:v1", served.handle.address()).parse().expect("a reference");
    let types = vec![media_type::OCI_LAYER_TAR, media_type::OCI_LAYER_GZIP];
    let image = client.pull(&reference, &auth, types).await.map_err(|error| error.to_string())?;
    assert_eq!(image.digest, Some(served.image.manifest.to_string()));
    // That client downloads layers side by side and gives them back as they end.
    assert!(image.layers.iter().any(|layer| layer.data == ramp()), "the layer is changed");
    Ok(())
}

#[tokio::test]
async fn an_independent_client_pulls_with_each_kind_of_login() {
    let basic = RegistryAuth::Basic("ann".to_owned(), "s3cret".to_owned());
    let lifetime = Duration::from_secs(60);
    let cases = [
        (Auth::Open, RegistryAuth::Anonymous),
        (Auth::Basic(login()), basic.clone()),
        (Auth::Token { login: None, lifetime }, RegistryAuth::Anonymous),
        (Auth::Token { login: Some(login()), lifetime }, basic),
    ];
    for (auth, login) in cases {
        let served = served(Options { auth: auth.clone(), ..Options::default() }).await;
        pull_with_oci_client(&served, login).await.unwrap_or_else(|error| panic!("{auth:?}: {error}"));
        if auth != Auth::Open {
            let wrong = RegistryAuth::Basic("ann".to_owned(), "guess".to_owned());
            let result = pull_with_oci_client(&served, wrong).await;
            assert_eq!(result.is_err(), !matches!(auth, Auth::Token { login: None, .. }), "{auth:?}");
            assert!(served.handle.counters().denied_requests > 0);
        }
        served.handle.shutdown().await;
    }
}

#[tokio::test]
async fn the_link_has_the_bandwidth_and_latency_that_were_asked_for() {
    let served = served(Options {
        // The layer takes 0.7 s.
        bandwidth_bits_per_second: NonZeroU64::new(8_000_000),
        latency: Duration::from_millis(50),
        ..Options::default()
    })
    .await;
    let begun = Instant::now();
    served.get("/v2/", HeaderMap::new()).await;
    assert!(begun.elapsed() >= Duration::from_millis(50), "latency: {:?}", begun.elapsed());

    let begun = Instant::now();
    let half = async |range| {
        let body = served.get(&served.blob(), header(RANGE, range)).await.bytes().await;
        body.expect("a body").len()
    };
    let (first, second) = tokio::join!(half("bytes=0-349999"), half("bytes=350000-"));
    let took = begun.elapsed();
    assert_eq!(first + second, LAYER_BYTES);
    // The lower bound is exact but for the burst; the upper one leaves room for a machine under load.
    assert!(took >= Duration::from_millis(680), "two connections share the link: {took:?}");
    assert!(took < Duration::from_secs(5), "the link is not slower than asked for: {took:?}");
    served.handle.shutdown().await;
}

#[tokio::test]
async fn the_end_does_not_wait_for_idle_clients_and_frees_the_port() {
    let served = served(Options::default()).await;
    // A kept-alive connection, idle.
    served.get("/v2/", HeaderMap::new()).await.bytes().await.expect("a body");
    let address = served.handle.address();
    let begun = Instant::now();
    served.handle.shutdown().await;
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    tokio::net::TcpListener::bind(address).await.expect("the port is free again");
}
