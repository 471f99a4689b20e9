//! A registry as the source of one image.
//!
//! Every request goes the same way: with the current authorization to the registry; a 401 or 403 renews that once; a
//! redirect is followed here, and gets the authorization only if it stays on the registry's own host. For blobs the
//! redirect's end is kept, see [`Redirects`]; when it fails with a status that may mean "ended", the registry is asked
//! again, once.

use std::sync::Arc;

use bytes::Bytes;
use hermes_image::ids::Digest;
use hermes_registry::oci::{MAX_MANIFEST_BYTES, media_type};
use http::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RANGE};
use http::{Method, StatusCode};
use oci_client::Reference;
use reqwest::{Response, Url};
use sha2::Digest as _;
use tokio::time::Instant;

use super::body::{RangeBody, Wanted};
use super::credentials::Logins;
use super::error::{Failure, OriginError, Subject};
use super::redirects::Redirects;
use super::token::{Authority, host_and_port};
use super::transport::{Transport, is_loopback, length_of_416};
use super::{LayerDescriptor, OriginConfig};

/// Redirects in a row that are followed; registries make one, some two.
const MAX_REDIRECTS: usize = 5;

/// Docker Hub's name in references, and the host that serves it.
const DOCKER_HUB: (&str, &str) = ("docker.io", "registry-1.docker.io");

/// A header with the digest of a manifest.
const DOCKER_CONTENT_DIGEST: &str = "docker-content-digest";

/// A document with its name.
#[derive(Debug, Clone)]
pub(super) struct Document {
    pub(super) digest: Digest,
    pub(super) bytes: Bytes,
}

/// One image in a registry. Cheap to clone; clones share connections, authorization and redirects.
#[derive(Clone)]
pub struct RegistryOrigin {
    inner: Arc<Inner>,
}

struct Inner {
    transport: Transport,
    reference: Reference,
    /// The registry's `/v2/NAME/`.
    base: Url,
    authority: Authority,
    redirects: Redirects,
    subject: Subject,
    max_skip_bytes: u64,
}

impl std::fmt::Debug for RegistryOrigin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryOrigin").field("reference", &self.inner.reference).finish_non_exhaustive()
    }
}

impl RegistryOrigin {
    pub(super) fn new(transport: Transport, reference: Reference, config: &OriginConfig) -> Result<Self, OriginError> {
        let registry = reference.registry();
        let subject = Subject { image: reference.to_string().into(), layer: None, source: registry.into() };
        let host = if registry == DOCKER_HUB.0 { DOCKER_HUB.1 } else { registry };
        let in_clear = speaks_plain_http(host, &config.plain_http_hosts);
        let scheme = if in_clear { "http" } else { "https" };
        let base: Url = format!("{scheme}://{host}/v2/{}/", reference.repository())
            .parse()
            .map_err(|error| subject.error(Failure::Unsupported(format!("'{host}' is not a host: {error}"))))?;
        let logins = Logins::at(config.docker_config.clone());
        let (name, repository) = (registry.to_owned(), reference.repository().to_owned());
        let authority = Authority::new(transport.clone(), logins, name, repository, in_clear);
        let max_skip_bytes = config.max_skip_bytes;
        let redirects = Redirects::default();
        let inner = Inner { transport, reference, base, authority, redirects, subject, max_skip_bytes };
        Ok(Self { inner: Arc::new(inner) })
    }

    pub(super) fn subject(&self) -> &Subject {
        &self.inner.subject
    }

    /// The document that the reference names: an index or a manifest.
    pub(super) async fn target(&self, deadline: Instant) -> Result<Document, OriginError> {
        let inner = &*self.inner;
        match inner.reference.digest() {
            Some(digest) => {
                let unsupported =
                    |_| inner.subject.error(Failure::Unsupported(format!("the digest {digest} is not sha256")));
                self.manifest(digest.parse().map_err(unsupported)?, deadline).await
            }
            None => {
                let tag = inner.reference.tag().unwrap_or("latest");
                let (bytes, named) = inner.fetch_manifest(tag, deadline).await?;
                let actual = Digest(sha2::Sha256::digest(&bytes).into());
                match named {
                    Some(expected) if expected != actual => {
                        Err(inner.subject.error(Failure::WrongDigest { what: "manifest", expected, actual }))
                    }
                    _ => Ok(Document { digest: actual, bytes }),
                }
            }
        }
    }

    /// The index or manifest `digest`, checked.
    pub(super) async fn manifest(&self, digest: Digest, deadline: Instant) -> Result<Document, OriginError> {
        let (bytes, _) = self.inner.fetch_manifest(&digest.to_string(), deadline).await?;
        self.inner.checked("manifest", digest, bytes)
    }

    /// The blob `digest`, which is the document `what` of at most `limit_bytes`, checked.
    pub(super) async fn small_blob(
        &self,
        what: &'static str,
        digest: Digest,
        limit_bytes: u64,
        deadline: Instant,
    ) -> Result<Document, OriginError> {
        let inner = &*self.inner;
        let (mut response, subject) = inner.fetch_blob(digest, None, &inner.subject, deadline).await?;
        if response.status() != StatusCode::OK {
            return Err(inner.refusal(response, &subject, deadline).await);
        }
        let bytes = inner.transport.document(&mut response, what, limit_bytes, deadline).await;
        inner.checked(what, digest, bytes.map_err(|failure| subject.error(failure))?)
    }

    /// Begins to read the part `wanted` of `layer`.
    pub(super) async fn read(
        self,
        layer: LayerDescriptor,
        wanted: Wanted,
        deadline: Instant,
    ) -> Result<RangeBody, OriginError> {
        let inner = &*self.inner;
        let wanted = Wanted { max_skip_bytes: inner.max_skip_bytes, ..wanted };
        let subject = inner.subject.of_layer(layer.layer);
        let range = (!wanted.is_whole()).then_some(&wanted);
        let (response, subject) = inner.fetch_blob(layer.layer.into(), range, &subject, deadline).await?;
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => {
                RangeBody::begin(inner.transport.clone(), subject.clone(), response, &wanted, deadline)
                    .map_err(|failure| subject.error(failure))
            }
            StatusCode::RANGE_NOT_SATISFIABLE => Err(subject.error(Failure::RangeRefused {
                range: wanted.range.clone(),
                len_bytes: wanted.len_bytes,
                server_len_bytes: length_of_416(response.headers()),
            })),
            _ => Err(inner.refusal(response, &subject, deadline).await),
        }
    }
}

/// Whether `host` (with port) is talked to in clear: this machine, or one of those `listed`, with or without port.
fn speaks_plain_http(host: &str, listed: &[String]) -> bool {
    let without_port = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    is_loopback(without_port) || listed.iter().any(|name| name == host || name == without_port)
}

impl Inner {
    fn url(&self, kind: &str, name: &str) -> Result<Url, OriginError> {
        let url = self.base.join(&format!("{kind}/{name}"));
        url.map_err(|error| self.subject.error(Failure::Unsupported(format!("'{name}' makes no address: {error}"))))
    }

    fn checked(&self, what: &'static str, expected: Digest, bytes: Bytes) -> Result<Document, OriginError> {
        let actual = Digest(sha2::Sha256::digest(&bytes).into());
        if actual == expected {
            Ok(Document { digest: actual, bytes })
        } else {
            Err(self.subject.error(Failure::WrongDigest { what, expected, actual }))
        }
    }

    async fn refusal(&self, response: Response, subject: &Subject, deadline: Instant) -> OriginError {
        let login = self.authority.login();
        subject.error(self.transport.refusal(response, &login, deadline).await)
    }

    async fn fetch_manifest(&self, name: &str, deadline: Instant) -> Result<(Bytes, Option<Digest>), OriginError> {
        let url = self.url("manifests", name)?;
        let accept = HeaderValue::from_str(&media_type::ACCEPT_MANIFESTS.join(", ")).ok();
        let headers: HeaderMap = accept.map(|accept| (ACCEPT, accept)).into_iter().collect();
        let (mut response, url, _) = self.follow(url, &headers, &self.subject, deadline).await?;
        let subject = self.subject_at(&self.subject, &url);
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response, &subject, deadline).await);
        }
        let named = response.headers().get(DOCKER_CONTENT_DIGEST).and_then(|digest| digest.to_str().ok()?.parse().ok());
        let bytes = self.transport.document(&mut response, "manifest", MAX_MANIFEST_BYTES, deadline).await;
        Ok((bytes.map_err(|failure| subject.error(failure))?, named))
    }

    /// The answer for the blob `digest` or a part of it, of whatever status, and what to call its source.
    async fn fetch_blob(
        &self,
        digest: Digest,
        part: Option<&Wanted>,
        subject: &Subject,
        deadline: Instant,
    ) -> Result<(Response, Subject), OriginError> {
        let mut headers = HeaderMap::new();
        if let Some(Wanted { range, .. }) = part {
            let range = HeaderValue::from_str(&format!("bytes={}-{}", range.start, range.end - 1));
            headers.extend(range.ok().map(|range| (RANGE, range)));
        }
        if let Some(url) = self.redirects.get(&digest) {
            let request = self.transport.request(Method::GET, url.clone(), headers.clone());
            match self.transport.send(request, deadline).await {
                Ok(response) if !may_have_ended(response.status()) => {
                    return Ok((response, self.subject_at(subject, &url)));
                }
                // The registry may know a better place, unless there is no time left to ask.
                Ok(_) | Err(Failure::Connect(_) | Failure::Broken(_)) => self.redirects.forget(&digest, &url),
                Err(failure) => {
                    self.redirects.forget(&digest, &url);
                    return Err(self.subject_at(subject, &url).error(failure));
                }
            }
        }
        let home = self.url("blobs", &digest.to_string())?;
        let (response, url, redirect) = self.follow(home, &headers, subject, deadline).await?;
        if let Some(redirect) = redirect.filter(|_| response.status().is_success() && !self.is_home(&url)) {
            self.redirects.keep(digest, url.clone(), &redirect);
        }
        let subject = self.subject_at(subject, &url);
        Ok((response, subject))
    }

    /// Sends a GET to `url` and follows redirects. Returns the answer, where it is from, and the headers of the last
    /// redirect.
    async fn follow(
        &self,
        mut url: Url,
        headers: &HeaderMap,
        subject: &Subject,
        deadline: Instant,
    ) -> Result<(Response, Url, Option<HeaderMap>), OriginError> {
        let mut redirect = None;
        for _ in 0..=MAX_REDIRECTS {
            let here = self.subject_at(subject, &url);
            let response = if self.is_home(&url) {
                self.send_authorized(&url, headers, &here, deadline).await?
            } else {
                let request = self.transport.request(Method::GET, url.clone(), headers.clone());
                self.transport.send(request, deadline).await.map_err(|failure| here.error(failure))?
            };
            if !is_redirect(response.status()) {
                return Ok((response, url, redirect));
            }
            let bad = |reason| here.error(Failure::BadRedirect(reason));
            let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
            let location = location.ok_or_else(|| bad("it names no place"))?;
            let next = url.join(location).map_err(|_| bad("the place it names is malformed"))?;
            check_redirect(&url, &next).map_err(bad)?;
            self.transport.meters.redirect();
            redirect = Some(response.headers().clone());
            url = next;
        }
        Err(self.subject_at(subject, &url).error(Failure::BadRedirect("there were too many in a row")))
    }

    /// Sends a GET to the registry itself; renews the authorization once if it is refused.
    async fn send_authorized(
        &self,
        url: &Url,
        headers: &HeaderMap,
        subject: &Subject,
        deadline: Instant,
    ) -> Result<Response, OriginError> {
        let mut renewed = false;
        loop {
            let permit = self.authority.permit(subject, deadline).await?;
            let mut headers = headers.clone();
            headers.extend(permit.header.clone().map(|header| (AUTHORIZATION, header)));
            let request = self.transport.request(Method::GET, url.clone(), headers);
            let response = self.transport.send(request, deadline).await.map_err(|failure| subject.error(failure))?;
            let refused = matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            if !refused || renewed {
                return Ok(response);
            }
            if !self.authority.renew(&permit, Some(response.headers()), subject, deadline).await? {
                return Ok(response);
            }
            renewed = true;
        }
    }

    /// Whether `url` is on the registry's own host, scheme and port: the only place that may see the authorization.
    fn is_home(&self, url: &Url) -> bool {
        url.origin() == self.base.origin()
    }

    /// `subject`, with the host that was really asked.
    fn subject_at(&self, subject: &Subject, url: &Url) -> Subject {
        if self.is_home(url) { subject.clone() } else { subject.at(&host_and_port(url)) }
    }
}

/// Whether a redirect may be followed. Content is checked against its digest or its chunks' hashes, but after a step
/// from https to http all could see what is read.
fn check_redirect(from: &Url, to: &Url) -> Result<(), &'static str> {
    match (from.scheme(), to.scheme()) {
        (_, "https") | ("http", "http") => Ok(()),
        (_, "http") => Err("it leads from https to http"),
        _ => Err("it leads to something other than http or https"),
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Whether a kept address may have ended by this answer. Storage services say 403 (Amazon, Azure), 400 (Google) or 404;
/// a 416 or 429 is about this request.
fn may_have_ended(status: StatusCode) -> bool {
    !status.is_success()
        && !status.is_server_error()
        && !matches!(status, StatusCode::RANGE_NOT_SATISFIABLE | StatusCode::TOO_MANY_REQUESTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_stay_as_safe_as_they_began() {
        let cases = [
            ("https://a.test/", "https://b.test/", true),
            ("http://a.test/", "https://b.test/", true),
            ("http://a.test/", "http://b.test/", true),
            ("https://a.test/", "http://a.test/", false),
            ("https://a.test/", "file:///etc/passwd", false),
            ("http://a.test/", "data:text/plain,x", false),
        ];
        for (from, to, allowed) in cases {
            let (from, to) = (from.parse().expect("an address"), to.parse().expect("an address"));
            assert_eq!(check_redirect(&from, &to).is_ok(), allowed, "{from} to {to}");
        }
    }

    #[test]
    fn only_named_hosts_are_talked_to_in_clear() {
        let listed = ["plain.test".to_owned(), "odd.test:5000".to_owned()];
        let cases = [
            ("localhost", true),
            ("localhost:5000", true),
            ("127.0.0.1:80", true),
            ("[::1]:5000", true),
            ("plain.test", true),
            ("plain.test:5000", true),
            ("odd.test:5000", true),
            ("odd.test", false),
            ("odd.test:5001", false),
            ("registry.test", false),
            ("registry-1.docker.io", false),
        ];
        for (host, expected) in cases {
            assert_eq!(speaks_plain_http(host, &listed), expected, "{host}");
        }
    }
}
