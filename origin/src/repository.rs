//! A repository of a registry that is written to: blobs, manifests and tags, by the distribution specification 1.1.
//!
//! Only the registry itself is asked, never a mirror: what is written has to be there when it is read. Requests are
//! authorized as those for images are; a registry asks for the right to push when something is pushed. Nothing is tried
//! again here. What is read is compared with its digest, but for parts of blobs.
//!
//! A blob is sent in one request after its upload was begun, which every registry takes. One that breaks off leaves an upload
//! that the registry forgets; a manifest is there whole or not at all.

use std::ops::Range;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use futures::stream::{self, TryStreamExt as _};
use hermes_image::ids::Digest;
use http::header::{CONTENT_TYPE, HeaderMap, HeaderValue, LINK, LOCATION};
use http::{Method, StatusCode};
use oci_client::Reference;
use reqwest::{Response, Url};
use serde::Deserialize;
use sha2::Digest as _;
use tokio::time::Instant;

use super::body::{RangeBody, Wanted};
use super::endpoint::Endpoint;
use super::error::{Failure, OriginError, Subject};
use super::registry::endpoint;
use super::{ErrorClass, OriginClient};

/// Time for a request, but for the bytes that it sends.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);
/// The slowest line that is waited for, in bytes a second.
const SLOWEST_BYTES: u64 = 256 * 1024;
/// Longest list of tags that is read at once.
const TAGS_LEN_MAX_BYTES: u64 = 4 << 20;
/// Tags that are asked for at once; registries may give fewer.
const TAGS_COUNT: u32 = 1000;
/// Pages of tags that are read.
const PAGES_MAX: usize = 10_000;

/// A repository. Cheap to use from many tasks at once.
pub struct Repository {
    endpoint: Endpoint,
    subject: Subject,
}

impl std::fmt::Debug for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Repository").field("name", &self.subject.image).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Tags {
    tags: Option<Vec<String>>,
}

impl OriginClient {
    /// The repository `name` of `registry` (host and port). Nothing is sent yet. Cancel safe.
    ///
    /// # Errors
    /// When they make no address, or the host's settings cannot be read.
    pub async fn repository(&self, registry: &str, name: &str) -> Result<Repository, OriginError> {
        let text = format!("{registry}/{name}");
        let subject = Subject { image: text.as_str().into(), layer: None, source: registry.into() };
        let mut hosts = self.hosts(registry, &text).await?;
        // The last is the registry itself.
        let Some(host) = hosts.pop() else {
            return Err(subject.error(Failure::Unsupported("it has no host".to_owned())));
        };
        let reference = Reference::with_tag(registry.to_owned(), name.to_owned(), "latest".to_owned());
        let endpoint = endpoint((&self.transports, &self.credentials), &reference, host, &self.config, &subject)?;
        Ok(Repository { endpoint, subject })
    }
}

impl Repository {
    /// Stores a blob, unless it is there, and returns its digest.
    ///
    /// # Errors
    /// When the registry fails or refuses.
    pub async fn put_blob(&self, bytes: Bytes) -> Result<Digest, OriginError> {
        let digest = Digest(sha2::Sha256::digest(&bytes).into());
        let home = self.endpoint.url("blobs", &digest.to_string())?;
        let there = self.send(Method::HEAD, &home, HeaderMap::new(), None).await?;
        if there.status().is_success() || there.status().is_redirection() {
            return Ok(digest);
        }
        let uploads = self.endpoint.url("blobs", "uploads/")?;
        let begun = self.send(Method::POST, &uploads, HeaderMap::new(), Some(Bytes::new())).await?;
        if begun.status() != StatusCode::ACCEPTED {
            return Err(self.refusal(begun).await);
        }
        let location = begun.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        let place = location.and_then(|location| uploads.join(location).ok());
        let bad = || self.subject.error(Failure::BadRedirect("the place for an upload is malformed"));
        let mut place = place.filter(|place| matches!(place.scheme(), "http" | "https")).ok_or_else(bad)?;
        if uploads.scheme() == "https" && place.scheme() == "http" {
            return Err(self.subject.error(Failure::BadRedirect("it leads from https to http")));
        }
        place.query_pairs_mut().append_pair("digest", &digest.to_string());
        let kind = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))]);
        let stored = self.send(Method::PUT, &place, kind, Some(bytes)).await?;
        match stored.status() {
            StatusCode::CREATED => Ok(digest),
            _ => Err(self.refusal(stored).await),
        }
    }

    /// Stores a manifest of type `kind` under a tag, in the place of what was there, and returns its digest.
    ///
    /// # Errors
    /// When the registry fails or refuses; what was there stays.
    pub async fn put_manifest(&self, tag: &str, kind: &'static str, bytes: Bytes) -> Result<Digest, OriginError> {
        let digest = Digest(sha2::Sha256::digest(&bytes).into());
        let url = self.endpoint.url("manifests", tag)?;
        let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))]);
        let stored = self.send(Method::PUT, &url, headers, Some(bytes)).await?;
        match stored.status() {
            StatusCode::CREATED => Ok(digest),
            _ => Err(self.refusal(stored).await),
        }
    }

    /// The manifest under a tag, with its digest; `None` when there is none.
    ///
    /// # Errors
    /// When the registry fails or refuses.
    pub async fn manifest(&self, tag: &str) -> Result<Option<(Digest, Bytes)>, OriginError> {
        match self.endpoint.manifest(tag, Instant::now() + REQUEST_TIMEOUT).await {
            Ok((bytes, _)) => Ok(Some((Digest(sha2::Sha256::digest(&bytes).into()), bytes))),
            Err(error) if error.class() == ErrorClass::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The part `range` of the blob `digest` of `len_bytes`; compared with the digest when it is all of it. `None` when there
    /// is no such blob.
    ///
    /// # Errors
    /// When the registry fails, refuses, or sends something else.
    pub async fn blob(&self, digest: Digest, range: Range<u64>, len_bytes: u64) -> Result<Option<Bytes>, OriginError> {
        let deadline = Instant::now() + patience(range.end - range.start);
        let wanted = Wanted { range: range.clone(), len_bytes, max_skip_bytes: u64::MAX };
        let body = match self.endpoint.read(digest, &wanted, deadline).await {
            Ok(body) => body,
            Err(error) if error.class() == ErrorClass::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let collect = |mut all: BytesMut, piece: Bytes| async move {
            all.extend_from_slice(&piece);
            Ok(all)
        };
        let bytes =
            stream::try_unfold(body, RangeBody::next).boxed().try_fold(BytesMut::new(), collect).await?.freeze();
        let actual = Digest(sha2::Sha256::digest(&bytes).into());
        if wanted.is_whole() && actual != digest {
            return Err(self.subject.error(Failure::WrongDigest { what: "blob", expected: digest, actual }));
        }
        Ok(Some(bytes))
    }

    /// All tags; none when the repository is not there yet.
    ///
    /// # Errors
    /// When the registry fails or refuses.
    pub async fn tags(&self) -> Result<Vec<String>, OriginError> {
        let mut url = self.endpoint.url("tags", "list")?;
        url.query_pairs_mut().append_pair("n", &TAGS_COUNT.to_string());
        let mut tags = Vec::new();
        for _ in 0..PAGES_MAX {
            let mut answer = self.send(Method::GET, &url, HeaderMap::new(), None).await?;
            if answer.status() == StatusCode::NOT_FOUND {
                return Ok(tags);
            }
            if answer.status() != StatusCode::OK {
                return Err(self.refusal(answer).await);
            }
            let next = answer.headers().get(LINK).and_then(|link| next_page(&url, link.to_str().ok()?));
            let deadline = Instant::now() + REQUEST_TIMEOUT;
            let transport = self.endpoint.transport()?;
            let document = transport.document(&mut answer, "list of tags", TAGS_LEN_MAX_BYTES, deadline).await;
            let document = document.map_err(|failure| self.subject.error(failure))?;
            let page: Tags = serde_json::from_slice(&document).map_err(|error| {
                let reason = format!("its list of tags cannot be read: {error}");
                self.subject.error(Failure::Unsupported(reason))
            })?;
            tags.extend(page.tags.unwrap_or_default());
            match next {
                Some(next) => url = next,
                None => return Ok(tags),
            }
        }
        Err(self.subject.error(Failure::Unsupported("its list of tags does not end".to_owned())))
    }

    /// Deletes a manifest, with all its tags. Whether the registry does that at all; one that is not there is deleted.
    ///
    /// # Errors
    /// When the registry fails or refuses.
    pub async fn delete_manifest(&self, digest: Digest) -> Result<bool, OriginError> {
        let url = self.endpoint.url("manifests", &digest.to_string())?;
        let answer = self.send(Method::DELETE, &url, HeaderMap::new(), None).await?;
        match answer.status() {
            StatusCode::NOT_FOUND | StatusCode::GONE => Ok(true),
            status if status.is_success() => Ok(true),
            // The specification's answer of a registry that does not delete; some say 400 with code UNSUPPORTED.
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::BAD_REQUEST | StatusCode::NOT_IMPLEMENTED => Ok(false),
            _ => Err(self.refusal(answer).await),
        }
    }

    async fn send(
        &self,
        method: Method,
        url: &Url,
        headers: HeaderMap,
        body: Option<Bytes>,
    ) -> Result<Response, OriginError> {
        let deadline = Instant::now() + patience(body.as_ref().map_or(0, |body| body.len() as u64));
        self.endpoint.send_body(method, url, &headers, body, &self.subject, deadline).await
    }

    async fn refusal(&self, answer: Response) -> OriginError {
        self.endpoint.refusal(answer, &self.subject, Instant::now() + REQUEST_TIMEOUT).await
    }
}

fn patience(len_bytes: u64) -> Duration {
    REQUEST_TIMEOUT + Duration::from_secs(len_bytes / SLOWEST_BYTES)
}

/// The next page by a `Link` header (RFC 8288) such as `</v2/a/tags/list?n=2&last=b>; rel="next"`, on the same host.
fn next_page(here: &Url, link: &str) -> Option<Url> {
    let (target, rest) = link.strip_prefix('<')?.split_once('>')?;
    let next = here.join(target).ok()?;
    (rest.contains("next") && next.origin() == here.origin()).then_some(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other_on_one_host() {
        let here: Url = "https://registry.test/v2/a/tags/list?n=2".parse().expect("an address");
        let next = |link| next_page(&here, link).map(|url| url.to_string());
        let relative = next("</v2/a/tags/list?last=b&n=2>; rel=\"next\"");
        assert_eq!(relative.as_deref(), Some("https://registry.test/v2/a/tags/list?last=b&n=2"));
        assert_eq!(next("<https://other.test/v2/a/tags/list?last=b>; rel=\"next\""), None);
        assert_eq!(next("</v2/a/tags/list?last=b>; rel=\"prev\""), None);
        assert_eq!(next("nonsense"), None);
    }
}
