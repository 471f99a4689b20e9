//! A bucket for tests: as much of S3's protocol as a store of objects needs, on loopback.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::Response;
use http::header::{ETAG, LAST_MODIFIED, RANGE};
use http::{HeaderMap, Method, StatusCode, Uri};
use parking_lot::Mutex;
use tokio::task::AbortHandle;

const NAME: &str = "bucket";
const MOMENT: &str = "Sat, 01 Jan 2000 00:00:00 GMT";

type Objects = Arc<Mutex<BTreeMap<String, Bytes>>>;

/// A running bucket. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Bucket {
    address: SocketAddr,
    objects: Objects,
    server: AbortHandle,
}

impl Drop for Bucket {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Bucket {
    pub(super) async fn start() -> Self {
        let objects = Objects::default();
        let router = Router::new().fallback(answer).with_state(Arc::clone(&objects));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let server =
            tokio::spawn(async move { axum::serve(listener, router).await.expect("it serves") }).abort_handle();
        Self { address, objects, server }
    }

    /// What a process that uses it has in its environment.
    pub(super) fn environment(&self) -> impl Iterator<Item = (OsString, OsString)> + use<> {
        let endpoint = format!("http://{}", self.address);
        let pairs = [
            ("AWS_ENDPOINT", endpoint.as_str()),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", "id"),
            ("AWS_SECRET_ACCESS_KEY", "secret"),
            ("PATH", "/usr/bin"),
        ];
        pairs.map(|(name, value)| (name.into(), value.into())).into_iter()
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.objects.lock().keys().cloned().collect()
    }
}

fn respond(status: StatusCode, body: impl Into<Body>) -> Response {
    let head = Response::builder().status(status).header(ETAG, "\"tag\"").header(LAST_MODIFIED, MOMENT);
    head.body(body.into()).expect("a response")
}

fn query(uri: &Uri, name: &str) -> Option<String> {
    let pairs = uri.query().unwrap_or_default().split('&');
    let value = pairs.filter_map(|pair| pair.split_once('=')).find(|(key, _)| *key == name)?.1;
    Some(value.replace("%2F", "/"))
}

async fn answer(State(objects): State<Objects>, method: Method, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    assert!(headers.contains_key("authorization"), "requests are signed");
    let path = uri.path().trim_start_matches('/');
    let (bucket, key) = path.split_once('/').unwrap_or((path, ""));
    assert_eq!(bucket, NAME);
    let mut objects = objects.lock();
    match (method, key.is_empty()) {
        (Method::PUT, false) => {
            objects.insert(key.to_owned(), body);
            respond(StatusCode::OK, "")
        }
        (Method::GET, false) => match objects.get(key) {
            None => respond(StatusCode::NOT_FOUND, "<Error><Code>NoSuchKey</Code></Error>"),
            Some(object) => give(object, headers.get(RANGE).and_then(|range| range.to_str().ok())),
        },
        (Method::DELETE, false) => {
            objects.remove(key);
            respond(StatusCode::NO_CONTENT, "")
        }
        (Method::GET, true) => respond(StatusCode::OK, listing(&objects, &query(&uri, "prefix").unwrap_or_default())),
        (Method::POST, true) => {
            let text = String::from_utf8_lossy(&body).into_owned();
            let keys = text.split("<Key>").skip(1).filter_map(|rest| rest.split_once("</Key>"));
            let deleted = keys.map(|(key, _)| {
                objects.remove(key);
                format!("<Deleted><Key>{key}</Key></Deleted>")
            });
            let deleted: String = deleted.collect();
            respond(StatusCode::OK, format!("<DeleteResult>{deleted}</DeleteResult>"))
        }
        (method, _) => panic!("{method} {uri} is not expected"),
    }
}

fn give(object: &Bytes, range: Option<&str>) -> Response {
    let Some((first, last)) = range.and_then(|range| range.strip_prefix("bytes=")?.split_once('-')) else {
        return respond(StatusCode::OK, object.clone());
    };
    let first: usize = first.parse().expect("a number");
    let last = last.parse().map_or(object.len() - 1, |last: usize| last.min(object.len() - 1));
    let mut response = respond(StatusCode::PARTIAL_CONTENT, object.slice(first..=last));
    let content_range = format!("bytes {first}-{last}/{}", object.len());
    response.headers_mut().insert("content-range", content_range.parse().expect("a header"));
    response
}

fn listing(objects: &BTreeMap<String, Bytes>, prefix: &str) -> String {
    let found = objects.iter().filter(|(name, _)| name.starts_with(prefix));
    let contents = found.map(|(name, object)| {
        format!(
            "<Contents><Key>{name}</Key><Size>{}</Size><LastModified>2000-01-01T00:00:00.000Z</LastModified><ETag>tag</ETag></Contents>",
            object.len()
        )
    });
    let contents: String = contents.collect();
    format!("<ListBucketResult><Name>{NAME}</Name><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>")
}
