//! A registry as the source of one image: its hosts, asked in order.
//!
//! The hosts are those of `hosts.toml`, mirrors first and the registry itself last; without one it is the registry alone.
//! Each is an [`Endpoint`] with its own authorization, redirects and TLS. A host that does not have it, refuses it, fails
//! or sends what is not what its digest says is followed by the next; one that rests after failures is passed over, but
//! for the last.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use hermes_image::access::Access;
use hermes_image::ids::Digest;
use oci_client::Reference;
use reqwest::Url;
use sha2::Digest as _;
use tokio::time::Instant;

use super::body::{RangeBody, Wanted};
use super::endpoint::Endpoint;
use super::error::{Failure, OriginError, Subject};
use super::hosts::{Capabilities, Host};
use super::tls::Transports;
use super::token::{Authority, host_and_port};
use super::transport::is_loopback;
use super::{LayerDescriptor, OriginConfig};
use crate::credentials::Credentials;

/// Docker Hub's name in references, and the host that serves it.
const DOCKER_HUB: (&str, &str) = ("docker.io", "registry-1.docker.io");

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
    reference: Reference,
    /// In the order in which they are asked.
    endpoints: Vec<Arc<Endpoint>>,
    transports: Transports,
    /// Which host each layer was read from last.
    read_from: parking_lot::Mutex<BTreeMap<Digest, Arc<Endpoint>>>,
    subject: Subject,
    max_skip_bytes: u64,
}

impl std::fmt::Debug for RegistryOrigin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegistryOrigin").field("reference", &self.inner.reference).finish_non_exhaustive()
    }
}

impl RegistryOrigin {
    /// The image `reference` at `hosts`, of which the last is the registry itself.
    pub(super) fn new(
        (transports, credentials): (&Transports, &Credentials),
        reference: Reference,
        hosts: Vec<Host>,
        config: &OriginConfig,
    ) -> Result<Self, OriginError> {
        let registry = reference.registry();
        let subject = Subject { image: reference.to_string().into(), layer: None, source: registry.into() };
        let endpoint = |host| endpoint((transports, credentials), &reference, host, config, &subject).map(Arc::new);
        let endpoints = hosts.into_iter().map(endpoint).collect::<Result<_, _>>()?;
        let (transports, max_skip_bytes) = (transports.clone(), config.max_skip_bytes);
        let read_from = parking_lot::Mutex::default();
        Ok(Self { inner: Arc::new(Inner { reference, endpoints, transports, read_from, subject, max_skip_bytes }) })
    }

    pub(super) fn subject(&self) -> &Subject {
        &self.inner.subject
    }

    /// To whom its hosts have given it so far; `None` when none was asked for anything.
    pub(super) fn access(&self) -> Option<Access> {
        let told = self.inner.endpoints.iter().filter_map(|endpoint| *endpoint.access.lock());
        told.reduce(|one, other| if one == Access::Private { one } else { other })
    }

    /// The document that the reference names: an index or a manifest.
    pub(super) async fn target(&self, deadline: Instant) -> Result<Document, OriginError> {
        let inner = &*self.inner;
        if let Some(digest) = inner.reference.digest() {
            let unsupported =
                |_| inner.subject.error(Failure::Unsupported(format!("the digest {digest} is not sha256")));
            return self.manifest(digest.parse().map_err(unsupported)?, deadline).await;
        }
        let ask = |endpoint: Arc<Endpoint>| {
            let tag = inner.reference.tag().unwrap_or("latest");
            async move {
                let (bytes, named) = endpoint.manifest(tag, deadline).await?;
                let digest = Digest(sha2::Sha256::digest(&bytes).into());
                checked(&endpoint, "manifest", named.unwrap_or(digest), bytes)
            }
        };
        inner.first(|capabilities| capabilities.resolve, deadline, ask).await
    }

    /// The index or manifest `digest`, checked.
    pub(super) async fn manifest(&self, digest: Digest, deadline: Instant) -> Result<Document, OriginError> {
        let ask = |endpoint: Arc<Endpoint>| async move {
            let (bytes, _) = endpoint.manifest(&digest.to_string(), deadline).await?;
            checked(&endpoint, "manifest", digest, bytes)
        };
        self.inner.first(|capabilities| capabilities.pull, deadline, ask).await
    }

    /// The blob `digest`, which is the document `what` of at most `limit_bytes`, checked.
    pub(super) async fn small_blob(
        &self,
        what: &'static str,
        digest: Digest,
        limit_bytes: u64,
        deadline: Instant,
    ) -> Result<Document, OriginError> {
        let ask = |endpoint: Arc<Endpoint>| async move {
            let bytes = endpoint.small_blob(what, digest, limit_bytes, deadline).await?;
            checked(&endpoint, what, digest, bytes)
        };
        self.inner.first(|capabilities| capabilities.pull, deadline, ask).await
    }

    /// Begins to read the part `wanted` of `layer`.
    pub(super) async fn read(
        self,
        layer: LayerDescriptor,
        wanted: Wanted,
        deadline: Instant,
    ) -> Result<RangeBody, OriginError> {
        let inner = &*self.inner;
        let wanted = Wanted { max_skip_bytes: inner.max_skip_bytes.min(wanted.max_skip_bytes), ..wanted };
        let ask = |endpoint: Arc<Endpoint>| {
            let (digest, wanted) = (layer.layer.into(), wanted.clone());
            async move {
                let body = endpoint.read(digest, &wanted, deadline).await?;
                Ok((endpoint, body))
            }
        };
        let (endpoint, body) = inner.first(|capabilities| capabilities.pull, deadline, ask).await?;
        inner.read_from.lock().insert(layer.layer.into(), endpoint);
        Ok(body)
    }

    /// The bytes that came of `layer` are not the ones that were indexed. Whether they were a mirror's, which rests now,
    /// so that reading again asks another host.
    pub(super) fn distrust(&self, layer: &LayerDescriptor) -> bool {
        let Some(endpoint) = self.inner.read_from.lock().remove(&layer.layer.into()) else { return false };
        let is_last = self.inner.endpoints.last().is_some_and(|last| Arc::ptr_eq(last, &endpoint));
        if !is_last {
            tracing::error!(layer = %layer.layer, mirror = %endpoint.subject.source, "a mirror sends other bytes than were indexed; the next host is asked");
            endpoint.rest.distrust();
        }
        !is_last
    }
}

impl Inner {
    /// What the first host that can gives. The error is the last host's, which is the registry itself.
    async fn first<T, F, R>(&self, can: fn(&Capabilities) -> bool, deadline: Instant, ask: F) -> Result<T, OriginError>
    where
        F: Fn(Arc<Endpoint>) -> R,
        R: Future<Output = Result<T, OriginError>>,
    {
        let capable: Vec<_> = self.endpoints.iter().filter(|endpoint| can(&endpoint.capabilities)).collect();
        let Some((last, mirrors)) = capable.split_last() else {
            let reason = "none of its hosts in hosts.toml may be asked for this".to_owned();
            return Err(self.subject.error(Failure::Unsupported(reason)));
        };
        for mirror in mirrors.iter().filter(|mirror| mirror.rest.is_over()) {
            match ask(Arc::clone(mirror)).await {
                Ok(answer) => {
                    mirror.rest.succeeded();
                    return Ok(answer);
                }
                Err(error) if deadline <= Instant::now() => return Err(error),
                Err(error) => {
                    self.transports.meters().mirror_failure();
                    match mirror.rest.failed(&error) {
                        Some(rest) => tracing::warn!(%error, ?rest, "a mirror failed; the next host is asked"),
                        None => tracing::debug!(%error, "a mirror cannot help; the next host is asked"),
                    }
                }
            }
        }
        ask(Arc::clone(last)).await
    }
}

/// The document `bytes` from `endpoint`, if it is what `expected` names.
fn checked(endpoint: &Endpoint, what: &'static str, expected: Digest, bytes: Bytes) -> Result<Document, OriginError> {
    let actual = Digest(sha2::Sha256::digest(&bytes).into());
    if actual == expected {
        Ok(Document { digest: actual, bytes })
    } else {
        Err(endpoint.subject.error(Failure::WrongDigest { what, expected, actual }))
    }
}

/// `host` as a place to ask for `reference`.
pub(super) fn endpoint(
    (transports, credentials): (&Transports, &Credentials),
    reference: &Reference,
    host: Host,
    config: &OriginConfig,
    subject: &Subject,
) -> Result<Endpoint, OriginError> {
    let (registry, repository) = (reference.registry(), reference.repository());
    let own_host = if registry == DOCKER_HUB.0 { DOCKER_HUB.1 } else { registry };
    let asked = host.base.as_ref().map_or_else(|| own_host.to_owned(), host_and_port);
    let tls = host.tls.or(config.tls.get(if asked == own_host { registry } else { &asked }));
    let text = match &host.base {
        Some(base) => format!("{}/{repository}/", base.as_str().trim_end_matches('/')),
        // Certificates are for TLS.
        None if tls.is_default() && speaks_plain_http(own_host, &config.plain_http_hosts) => {
            format!("http://{own_host}/v2/{repository}/")
        }
        None => format!("https://{own_host}/v2/{repository}/"),
    };
    let base: Url = text
        .parse()
        .map_err(|error| subject.error(Failure::Unsupported(format!("'{asked}' is not a host: {error}"))))?;
    let is_own = asked == own_host;
    // Logins are stored under the name in references; a mirror's under its own, and the registry's are not for it.
    let login_host = if is_own { registry.to_owned() } else { asked.clone() };
    let authority = Authority::new(
        (transports.clone(), tls.clone()),
        credentials.clone(),
        login_host,
        repository.to_owned(),
        base.scheme() == "http",
    );
    Ok(Endpoint {
        transports: transports.clone(),
        tls,
        base,
        capabilities: host.capabilities,
        headers: host.headers,
        namespace: (!is_own).then(|| registry.to_owned()),
        authority,
        redirects: super::redirects::Redirects::default(),
        subject: if is_own { subject.clone() } else { subject.at(&asked) },
        rest: Arc::default(),
        access: parking_lot::Mutex::default(),
    })
}

/// Whether `host` (with port) is talked to in clear: this machine, or one of those `listed`, with or without port.
pub fn speaks_plain_http(host: &str, listed: &[String]) -> bool {
    let without_port = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    is_loopback(without_port) || listed.iter().any(|name| name == host || name == without_port)
}

#[cfg(test)]
mod tests {
    use super::*;

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
