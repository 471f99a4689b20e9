//! The requests of the distribution specification's pulling half.
//!
//! A repository name has slashes in it, so everything below `/v2/` is one route, taken apart from its end. Documents are
//! read on blocking threads; blobs flow in pieces from their file through the link, each read when the client took the
//! one before.

use std::fs::File;
use std::io::{self, SeekFrom};
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use bytes::{Bytes, BytesMut};
use futures::stream;
use hermes_image::ids::Digest;
use http::header::{
    ACCEPT, ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH, IF_RANGE, LINK, RANGE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use crate::answer::Refusal;
use crate::auth::Scope;
use crate::layout::{Layout, LayoutError};
use crate::oci::{MAX_MANIFEST_BYTES, document_kind, is_repository_name, is_tag};
use crate::range::{Wanted, wanted};
use crate::server::Shared;

/// Names in one answer of a listing; more are reached by following the `Link` header.
const MAX_LISTED: usize = 1000;

const DOCKER_CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const DOCKER_API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

type Answer = Result<Response, Refusal>;

pub(crate) fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v2", any(base))
        .route("/v2/", any(base))
        .route("/v2/{*path}", any(content))
        .route("/token", any(token))
        .fallback(async || Refusal::no_such_place())
        .with_state(shared)
}

async fn base(State(shared): State<Arc<Shared>>, method: Method, headers: HeaderMap) -> Answer {
    shared.link.round_trip().await;
    shared.counters.other_request();
    reading(&method)?;
    shared.admit(&headers, Scope::Base)?;
    let mut response = json_answer(&json!({}));
    response.headers_mut().insert(DOCKER_API_VERSION, HeaderValue::from_static("registry/2.0"));
    Ok(response)
}

async fn token(
    State(shared): State<Arc<Shared>>,
    Query(query): Query<Vec<(String, String)>>,
    method: Method,
    headers: HeaderMap,
) -> Answer {
    shared.link.round_trip().await;
    shared.counters.other_request();
    reading(&method)?;
    let scopes = query.iter().filter(|(name, _)| name == "scope").map(|(_, scope)| scope.as_str());
    let issued = shared.guard.issue(&headers, scopes).inspect_err(|_| shared.counters.denied())?;
    Ok(json_answer(&json!({
        "token": issued.token,
        "access_token": issued.token,
        "expires_in": issued.expires_in_secs,
    })))
}

/// A place below `/v2/`.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Catalog,
    Tags { name: &'a str },
    Manifest { name: &'a str, reference: &'a str },
    Blob { name: &'a str, digest: &'a str },
}

fn place(path: &str) -> Option<Place<'_>> {
    if path == "_catalog" {
        return Some(Place::Catalog);
    }
    if let Some(name) = path.strip_suffix("/tags/list") {
        return Some(Place::Tags { name });
    }
    let (head, last) = path.rsplit_once('/')?;
    let (name, kind) = head.rsplit_once('/')?;
    match kind {
        "manifests" => Some(Place::Manifest { name, reference: last }),
        "blobs" => Some(Place::Blob { name, digest: last }),
        _ => None,
    }
}

async fn content(
    State(shared): State<Arc<Shared>>,
    Path(path): Path<String>,
    Query(query): Query<Vec<(String, String)>>,
    method: Method,
    headers: HeaderMap,
) -> Answer {
    shared.link.round_trip().await;
    reading(&method)?;
    let place = place(&path).ok_or_else(Refusal::no_such_place)?;
    match place {
        Place::Manifest { .. } => shared.counters.manifest_request(),
        Place::Blob { .. } => shared.counters.blob_request(),
        Place::Catalog | Place::Tags { .. } => shared.counters.other_request(),
    }
    let (Place::Tags { name } | Place::Manifest { name, .. } | Place::Blob { name, .. }) = place else {
        shared.admit(&headers, Scope::Catalog)?;
        return listing("/v2/_catalog", "repositories", shared.repositories.names(), &query, json!({}));
    };
    if !is_repository_name(name) {
        return Err(Refusal::name_invalid(name));
    }
    shared.admit(&headers, Scope::Repository(name))?;
    let layout = shared.repositories.find(name).ok_or_else(|| Refusal::name_unknown(name))?.clone();
    match place {
        Place::Manifest { reference, .. } => manifest(&shared, layout, name, reference, &method, &headers).await,
        Place::Blob { digest, .. } => blob(&shared, layout, name, digest, &method, &headers).await,
        Place::Catalog | Place::Tags { .. } => {
            let tags = blocking(move || layout.tags()).await?.map_err(|error| Refusal::internal(&error))?;
            listing(&format!("/v2/{name}/tags/list"), "tags", tags, &query, json!({ "name": name }))
        }
    }
}

fn reading(method: &Method) -> Result<(), Refusal> {
    match *method {
        Method::GET | Method::HEAD => Ok(()),
        _ => Err(Refusal::unsupported("this registry only serves what its layouts hold; it takes no uploads")),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Refusal::internal(&error))
}

fn json_answer(body: &Value) -> Response {
    ([(CONTENT_TYPE, HeaderValue::from_static("application/json"))], body.to_string()).into_response()
}

/// A sorted list in pages: `n` names after `last`, and a `Link` to the next page.
fn listing(place: &str, key: &str, names: Vec<String>, query: &[(String, String)], mut body: Value) -> Answer {
    let parameter = |wanted: &str| query.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str());
    let count: usize = match parameter("n") {
        None => MAX_LISTED,
        Some(text) => text.parse().map_err(|_| Refusal::bad_query("n is not a number of names"))?,
    };
    let count = count.min(MAX_LISTED);
    let after: Vec<String> =
        names.into_iter().filter(|name| parameter("last").is_none_or(|last| name.as_str() > last)).collect();
    let page = &after[..count.min(after.len())];
    body[key] = json!(page);
    let mut response = json_answer(&body);
    // Names and tags hold no character that would need escaping in a query.
    if let Some(last) = page.last().filter(|_| page.len() < after.len())
        && let Ok(link) = HeaderValue::from_str(&format!("<{place}?n={count}&last={last}>; rel=\"next\""))
    {
        response.headers_mut().insert(LINK, link);
    }
    Ok(response)
}

async fn manifest(
    shared: &Shared,
    layout: Layout,
    name: &str,
    reference: &str,
    method: &Method,
    headers: &HeaderMap,
) -> Answer {
    let known: Option<Digest> = reference.parse().ok();
    if known.is_none() && !is_tag(reference) {
        return Err(Refusal::manifest_invalid(reference, "this is neither a tag nor a sha256 digest"));
    }
    let tag = reference.to_owned();
    let read = blocking(move || -> Result<(Digest, Vec<u8>), LayoutError> {
        let digest = match known {
            Some(digest) => digest,
            None => layout.find(&tag)?.digest,
        };
        Ok((digest, layout.document(&digest, MAX_MANIFEST_BYTES)?))
    });
    let (digest, bytes) = read.await?.map_err(|error| match &error {
        LayoutError::UnknownTag { .. } | LayoutError::AmbiguousTag { .. } => {
            Refusal::manifest_unknown(name, reference, "there is no such tag, or it means several images")
        }
        // Longer than any manifest: the digest of a layer.
        LayoutError::NoBlob { .. } | LayoutError::TooLong { .. } => {
            Refusal::manifest_unknown(name, reference, "there is no manifest of this digest")
        }
        _ => Refusal::internal(&error),
    })?;
    let (_, media_type) =
        document_kind(&bytes).map_err(|error| Refusal::manifest_unknown(name, reference, error.to_string()))?;
    if !accepts(headers, &media_type) {
        let message = format!("the manifest is of type {media_type}, which the request does not accept");
        return Err(Refusal::manifest_unknown(name, reference, message));
    }
    let etag = etag(&digest);
    if unchanged(headers, &etag) {
        return Ok((StatusCode::NOT_MODIFIED, [(ETAG, etag)]).into_response());
    }
    let body = if *method == Method::HEAD {
        Body::empty()
    } else {
        shared.link.carry(bytes.len() as u64).await;
        shared.counters.manifest_bytes(bytes.len() as u64);
        Body::from(bytes.clone())
    };
    let mut response = Response::new(body);
    let head = response.headers_mut();
    head.insert(CONTENT_LENGTH, HeaderValue::from(bytes.len()));
    head.insert(CONTENT_TYPE, HeaderValue::from_str(&media_type).map_err(|error| Refusal::internal(&error))?);
    insert_names(head, &digest, etag);
    Ok(response)
}

fn insert_names(head: &mut HeaderMap, digest: &Digest, etag: HeaderValue) {
    if let Ok(digest) = HeaderValue::from_str(&digest.to_string()) {
        head.insert(DOCKER_CONTENT_DIGEST, digest);
    }
    head.insert(ETAG, etag);
}

fn etag(digest: &Digest) -> HeaderValue {
    HeaderValue::from_str(&format!("\"{digest}\"")).expect("a digest is plain ASCII")
}

/// Whether the request already has this content.
fn unchanged(headers: &HeaderMap, etag: &HeaderValue) -> bool {
    let Some(Ok(known)) = headers.get(IF_NONE_MATCH).map(HeaderValue::to_str) else { return false };
    known.split(',').any(|known| known.trim() == "*" || known.trim().as_bytes() == etag.as_bytes())
}

fn accepts(headers: &HeaderMap, media_type: &str) -> bool {
    let mut said_anything = false;
    for value in headers.get_all(ACCEPT) {
        for accepted in value.to_str().unwrap_or_default().split(',') {
            let accepted = accepted.split(';').next().unwrap_or_default().trim();
            said_anything |= !accepted.is_empty();
            if matches!(accepted, "*/*" | "application/*") || accepted.eq_ignore_ascii_case(media_type) {
                return true;
            }
        }
    }
    !said_anything
}

async fn blob(
    shared: &Arc<Shared>,
    layout: Layout,
    name: &str,
    digest_text: &str,
    method: &Method,
    headers: &HeaderMap,
) -> Answer {
    let digest: Digest = digest_text.parse().map_err(|_| Refusal::digest_invalid(digest_text))?;
    let opened = blocking(move || layout.open_blob(&digest)).await?;
    let (file, len_bytes) = opened.map_err(|error| match error {
        LayoutError::NoBlob { .. } => Refusal::blob_unknown(name, digest_text),
        _ => Refusal::internal(&error),
    })?;
    let etag = etag(&digest);
    if unchanged(headers, &etag) {
        return Ok((StatusCode::NOT_MODIFIED, [(ETAG, etag)]).into_response());
    }
    let same = headers.get(IF_RANGE).is_none_or(|known| *known == etag);
    let wanted = match headers.get(RANGE).and_then(|range| range.to_str().ok()) {
        Some(range) if same => wanted(range, len_bytes),
        _ => Wanted::Everything,
    };
    let (status, part) = match wanted {
        Wanted::Everything => (StatusCode::OK, 0..len_bytes),
        Wanted::Part(part) => (StatusCode::PARTIAL_CONTENT, part),
        Wanted::Unsatisfiable => return Err(Refusal::range_unsatisfiable(len_bytes)),
    };
    let part_bytes = part.end - part.start;
    let mut response = if *method == Method::HEAD {
        Response::new(Body::empty())
    } else {
        let pieces = Pieces::begin(file, part.start, part_bytes, Arc::clone(shared)).await;
        let pieces = pieces.map_err(|error| Refusal::internal(&error))?;
        Response::new(Body::from_stream(stream::try_unfold(pieces, Pieces::next)))
    };
    *response.status_mut() = status;
    let head = response.headers_mut();
    head.insert(CONTENT_LENGTH, HeaderValue::from(part_bytes));
    head.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    head.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    if status == StatusCode::PARTIAL_CONTENT {
        let range = format!("bytes {}-{}/{len_bytes}", part.start, part.end - 1);
        head.insert(CONTENT_RANGE, HeaderValue::from_str(&range).map_err(|error| Refusal::internal(&error))?);
    }
    insert_names(head, &digest, etag);
    Ok(response)
}

/// A part of a blob on its way to a client.
struct Pieces {
    file: tokio::fs::File,
    left_bytes: u64,
    shared: Arc<Shared>,
}

impl Pieces {
    async fn begin(file: File, start: u64, left_bytes: u64, shared: Arc<Shared>) -> io::Result<Self> {
        let mut file = tokio::fs::File::from_std(file);
        if start > 0 {
            file.seek(SeekFrom::Start(start)).await?;
        }
        Ok(Self { file, left_bytes, shared })
    }

    async fn next(mut self) -> io::Result<Option<(Bytes, Self)>> {
        let piece_bytes = self.left_bytes.min(self.shared.link.piece_bytes());
        if piece_bytes == 0 {
            return Ok(None);
        }
        // At most `MAX_PIECE_BYTES`, so it fits.
        let mut piece = BytesMut::with_capacity(usize::try_from(piece_bytes).unwrap_or_default());
        while (piece.len() as u64) < piece_bytes {
            let missing = piece_bytes - piece.len() as u64;
            if (&mut self.file).take(missing).read_buf(&mut piece).await? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the blob's file became shorter"));
            }
        }
        self.shared.link.carry(piece_bytes).await;
        self.shared.counters.blob_bytes(piece_bytes);
        self.left_bytes -= piece_bytes;
        Ok(Some((piece.freeze(), self)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_apart_from_the_end() {
        let cases = [
            ("_catalog", Some(Place::Catalog)),
            ("a/tags/list", Some(Place::Tags { name: "a" })),
            ("a/b/c/manifests/v1", Some(Place::Manifest { name: "a/b/c", reference: "v1" })),
            ("blobs/manifests/v1", Some(Place::Manifest { name: "blobs", reference: "v1" })),
            ("a/blobs/sha256:00", Some(Place::Blob { name: "a", digest: "sha256:00" })),
            ("manifests/v1", None),
            ("a/referrers/sha256:00", None),
            ("a", None),
            ("", None),
        ];
        for (path, expected) in cases {
            assert_eq!(place(path), expected, "{path}");
        }
    }

    #[test]
    fn accept_is_honoured() {
        let cases = [
            (&[][..], true),
            (&["*/*"], true),
            (&["application/json, application/vnd.a;q=0.5"], true),
            (&["application/json", "application/VND.a"], true),
            (&["application/json"], false),
            (&[""], true),
        ];
        for (values, expected) in cases {
            let headers = values.iter().map(|value| (ACCEPT, HeaderValue::from_static(value)));
            let mut map = HeaderMap::new();
            headers.for_each(|(name, value)| {
                map.append(name, value);
            });
            assert_eq!(accepts(&map, "application/vnd.a"), expected, "{values:?}");
        }
    }
}
