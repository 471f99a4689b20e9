//! One host that is asked for an image: the registry itself, or a mirror of it.
//!
//! Every request goes the same way: with the current authorization to the host; a 401 or 403 renews that; a redirect is
//! followed here, and gets the authorization and the host's own headers only if it stays on the host. For blobs the
//! redirect's end is kept, see [`Redirects`]; when it fails with a status that may mean "ended", the host is asked again,
//! once.
//!
//! A host that fails in passing rests for a while, longer each time, during which the next one is asked at once.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hermes_image::access::Access;
use hermes_image::ids::Digest;
use hermes_registry::oci::{MAX_MANIFEST_BYTES, media_type};
use http::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RANGE};
use http::{Method, StatusCode};
use reqwest::{Response, Url};
use tokio::time::Instant;

use super::body::{RangeBody, Wanted};
use super::error::{ErrorClass, Failure, OriginError, Subject};
use super::hosts::Capabilities;
use super::redirects::Redirects;
use super::tls::{TlsSettings, Transports};
use super::token::{Authority, Permit, Tries, host_and_port};
use super::transport::{Transport, length_of_416};

/// Redirects in a row that are followed; registries make one, some two.
const MAX_REDIRECTS: usize = 5;

/// A header with the digest of a manifest.
const DOCKER_CONTENT_DIGEST: &str = "docker-content-digest";

/// How long a host rests after its first failure in a row; twice as long after each further one.
const FIRST_REST: Duration = Duration::from_secs(1);

/// The longest rest: a mirror that is back should be used within a minute.
const LONGEST_REST: Duration = Duration::from_secs(60);

/// Whether a host rests.
#[derive(Debug, Default)]
pub(super) struct Rest {
    state: parking_lot::Mutex<(u32, Option<Instant>)>,
}

impl Rest {
    pub(super) fn is_over(&self) -> bool {
        self.state.lock().1.is_none_or(|until| until <= Instant::now())
    }

    pub(super) fn succeeded(&self) {
        *self.state.lock() = (0, None);
    }

    /// Begins the longest rest: the host sent bytes that are not the ones that were indexed.
    pub(super) fn distrust(&self) {
        *self.state.lock() = (16, Some(Instant::now() + LONGEST_REST));
    }

    /// Begins a rest if `error` is one that may pass, or a fault of the host. How long it is, if so.
    pub(super) fn failed(&self, error: &OriginError) -> Option<Duration> {
        if !matches!(error.class(), ErrorClass::Transient | ErrorClass::PeerFault) {
            return None;
        }
        let mut state = self.state.lock();
        let now = Instant::now();
        if state.1.is_some_and(|until| until > now) {
            return None;
        }
        let own = FIRST_REST.saturating_mul(1 << state.0.min(16)).min(LONGEST_REST);
        let rest = error.retry_after().unwrap_or(own).clamp(own, LONGEST_REST);
        *state = (state.0 + 1, Some(now + rest));
        Some(rest)
    }
}

/// A host, with everything that talking to it needs.
pub(super) struct Endpoint {
    pub(super) transports: Transports,
    pub(super) tls: TlsSettings,
    /// The API's `/v2/NAME/` at the host.
    pub(super) base: Url,
    pub(super) capabilities: Capabilities,
    /// Sent with each request to the host.
    pub(super) headers: HeaderMap,
    /// What a mirror is asked for: the registry whose image it is. `None` for the registry itself.
    pub(super) namespace: Option<String>,
    pub(super) authority: Authority,
    pub(super) redirects: Redirects,
    pub(super) subject: Subject,
    pub(super) rest: Arc<Rest>,
    /// To whom it gives the image, as far as it has given anything.
    pub(super) access: parking_lot::Mutex<Option<Access>>,
}

impl Endpoint {
    /// The host has given something. Headers of its own, or a client certificate, may be what it wanted to see.
    fn has_given(&self, permit: &Permit) {
        let is_private = permit.has_login() || !self.headers.is_empty() || !self.tls.client.is_empty();
        let mut access = self.access.lock();
        *access = if is_private { Some(Access::Private) } else { access.or(Some(Access::Public)) };
    }

    pub(super) fn transport(&self) -> Result<Transport, OriginError> {
        self.transports.get(&self.tls).map_err(|error| self.subject.error(Failure::Tls(error)))
    }

    pub(super) fn url(&self, kind: &str, name: &str) -> Result<Url, OriginError> {
        let url = self.base.join(&format!("{kind}/{name}"));
        let mut url = url
            .map_err(|error| self.subject.error(Failure::Unsupported(format!("'{name}' makes no address: {error}"))))?;
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }

    pub(super) async fn refusal(&self, response: Response, subject: &Subject, deadline: Instant) -> OriginError {
        let login = self.authority.login();
        match self.transport() {
            Ok(transport) => subject.error(transport.refusal(response, &login, deadline).await),
            Err(error) => error,
        }
    }

    /// The manifest or index `name` (a tag or a digest), and the digest that the host gives it.
    pub(super) async fn manifest(&self, name: &str, deadline: Instant) -> Result<(Bytes, Option<Digest>), OriginError> {
        let url = self.url("manifests", name)?;
        let accept = HeaderValue::from_str(&media_type::ACCEPT_MANIFESTS.join(", ")).ok();
        let headers: HeaderMap = accept.map(|accept| (ACCEPT, accept)).into_iter().collect();
        let (mut response, url, _) = self.follow(url, &headers, &self.subject, deadline).await?;
        let subject = self.subject_at(&self.subject, &url);
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response, &subject, deadline).await);
        }
        let named = response.headers().get(DOCKER_CONTENT_DIGEST).and_then(|digest| digest.to_str().ok()?.parse().ok());
        let bytes = self.transport()?.document(&mut response, "manifest", MAX_MANIFEST_BYTES, deadline).await;
        Ok((bytes.map_err(|failure| subject.error(failure))?, named))
    }

    /// The whole blob `digest`, which is the document `what` of at most `limit_bytes`.
    pub(super) async fn small_blob(
        &self,
        what: &'static str,
        digest: Digest,
        limit_bytes: u64,
        deadline: Instant,
    ) -> Result<Bytes, OriginError> {
        let (mut response, subject) = self.fetch_blob(digest, None, &self.subject, deadline).await?;
        if response.status() != StatusCode::OK {
            return Err(self.refusal(response, &subject, deadline).await);
        }
        let bytes = self.transport()?.document(&mut response, what, limit_bytes, deadline).await;
        bytes.map_err(|failure| subject.error(failure))
    }

    /// Begins to read the part `wanted` of the layer `digest`, which `subject` is about.
    pub(super) async fn read(
        &self,
        digest: Digest,
        wanted: &Wanted,
        deadline: Instant,
    ) -> Result<RangeBody, OriginError> {
        let subject = self.subject.of_layer(digest.into());
        let range = (!wanted.is_whole()).then_some(wanted);
        let (response, subject) = self.fetch_blob(digest, range, &subject, deadline).await?;
        match response.status() {
            StatusCode::OK | StatusCode::PARTIAL_CONTENT => {
                let rest = Arc::clone(&self.rest);
                RangeBody::begin((self.transport()?, rest), subject.clone(), response, wanted, deadline)
                    .map_err(|failure| subject.error(failure))
            }
            StatusCode::RANGE_NOT_SATISFIABLE => Err(subject.error(Failure::RangeRefused {
                range: wanted.range.clone(),
                len_bytes: wanted.len_bytes,
                server_len_bytes: length_of_416(response.headers()),
            })),
            _ => Err(self.refusal(response, &subject, deadline).await),
        }
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
            let transport = self.transport()?;
            let request = transport.request(Method::GET, url.clone(), headers.clone());
            match transport.send(request, deadline).await {
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
        let transport = self.transport()?;
        let mut redirect = None;
        for _ in 0..=MAX_REDIRECTS {
            let here = self.subject_at(subject, &url);
            let response = if self.is_home(&url) {
                self.send_authorized(&url, headers, &here, deadline).await?
            } else {
                let request = transport.request(Method::GET, url.clone(), headers.clone());
                transport.send(request, deadline).await.map_err(|failure| here.error(failure))?
            };
            if !is_redirect(response.status()) {
                return Ok((response, url, redirect));
            }
            let bad = |reason| here.error(Failure::BadRedirect(reason));
            let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
            let location = location.ok_or_else(|| bad("it names no place"))?;
            let next = url.join(location).map_err(|_| bad("the place it names is malformed"))?;
            check_redirect(&url, &next).map_err(bad)?;
            transport.meters.redirect();
            redirect = Some(response.headers().clone());
            url = next;
        }
        Err(self.subject_at(subject, &url).error(Failure::BadRedirect("there were too many in a row")))
    }

    /// Sends a GET to the host itself; renews the authorization if it is refused.
    async fn send_authorized(
        &self,
        url: &Url,
        headers: &HeaderMap,
        subject: &Subject,
        deadline: Instant,
    ) -> Result<Response, OriginError> {
        let patience = self.transport()?.timeouts.headers;
        let make = |transport: &Transport, headers| transport.request(Method::GET, url.clone(), headers);
        self.send_home(make, headers, patience, subject, deadline).await
    }

    /// Sends a request, with a body if there is one, and waits for the head of the answer as long as the deadline allows:
    /// sending takes its time. Another host gets no authorization. Redirects are not followed.
    pub(super) async fn send_body(
        &self,
        method: Method,
        url: &Url,
        headers: &HeaderMap,
        body: Option<Bytes>,
        subject: &Subject,
        deadline: Instant,
    ) -> Result<Response, OriginError> {
        let patience = deadline.saturating_duration_since(Instant::now());
        let make = |transport: &Transport, headers| {
            let mut request = transport.request(method.clone(), url.clone(), headers);
            *request.body_mut() = body.clone().map(Into::into);
            request
        };
        if self.is_home(url) {
            return self.send_home(make, headers, patience, subject, deadline).await;
        }
        let transport = self.transport()?;
        let request = make(&transport, headers.clone());
        let here = self.subject_at(subject, url);
        transport.send_within(request, patience, deadline).await.map_err(|failure| here.error(failure))
    }

    /// Sends what `make` makes to the host itself; renews the authorization if it is refused.
    async fn send_home(
        &self,
        make: impl Fn(&Transport, HeaderMap) -> reqwest::Request,
        headers: &HeaderMap,
        patience: Duration,
        subject: &Subject,
        deadline: Instant,
    ) -> Result<Response, OriginError> {
        let mut tries = Tries::default();
        loop {
            let permit = self.authority.permit(subject, deadline).await?;
            let transport = self.transport()?;
            let mut headers = headers.clone();
            headers.extend(self.headers.iter().map(|(name, value)| (name.clone(), value.clone())));
            if let Some(header) = permit.header() {
                headers.insert(AUTHORIZATION, header);
            }
            let response = transport.send_within(make(&transport, headers), patience, deadline).await;
            let response = response.map_err(|failure| subject.error(failure))?;
            if response.status().is_success() || is_redirect(response.status()) {
                self.has_given(&permit);
            }
            let refused = matches!(response.status(), StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            if !refused
                || !self.authority.renew(&permit, Some(response.headers()), &mut tries, subject, deadline).await?
            {
                return Ok(response);
            }
        }
    }

    /// Whether `url` is on the host itself, scheme and port: the only place that may see the authorization.
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
    fn rests_grow_and_end_with_success() {
        let subject = Subject { image: "i".into(), layer: None, source: "h".into() };
        let server = || subject.error(Failure::Server { status: StatusCode::BAD_GATEWAY, message: String::new() });
        let rest = Rest::default();
        assert!(rest.is_over());
        assert_eq!(rest.failed(&server()), Some(FIRST_REST));
        assert!(!rest.is_over());
        assert_eq!(rest.failed(&server()), None, "one rest at a time");
        for expected in [2, 4, 8, 16, 32, 60, 60] {
            rest.state.lock().1 = None;
            assert_eq!(rest.failed(&server()), Some(Duration::from_secs(expected)));
        }
        rest.succeeded();
        let message = String::new();
        let throttled = |seconds| Failure::Throttled {
            status: StatusCode::TOO_MANY_REQUESTS,
            message: message.clone(),
            retry_after: Some(Duration::from_secs(seconds)),
        };
        assert_eq!(rest.failed(&subject.error(throttled(30))), Some(Duration::from_secs(30)));
        rest.succeeded();
        let missing = Failure::NotFound { status: StatusCode::NOT_FOUND, message };
        assert_eq!(
            rest.failed(&subject.error(missing)),
            None,
            "an image that a mirror lacks is no failure of the mirror"
        );
    }
}
