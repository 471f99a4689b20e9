//! What the sources of images were asked for and gave.

use std::sync::atomic::{AtomicU64, Ordering};

use http::StatusCode;

/// Requests and bytes since the start of the client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OriginCounters {
    /// Requests sent to registries, to where they redirect, and to their token services; reads of layouts.
    pub requests: u64,
    /// Bytes of bodies received, of documents and layers, also those thrown away.
    pub bytes: u64,
    /// Requests among these that asked for a token.
    pub token_requests: u64,
    /// Redirects followed.
    pub redirects: u64,
    /// Requests that were sent again because their connection turned out to be dead.
    pub resends: u64,
    /// Answers 401 and 403 that stayed so.
    pub refused_denied: u64,
    /// Answers 404 and 410.
    pub refused_not_found: u64,
    /// Answers 429 and 503.
    pub refused_throttled: u64,
    /// Answers of any other status that was not asked for.
    pub refused_other: u64,
    /// Times that a mirror failed and the next host was asked.
    pub mirror_failures: u64,
}

/// The counters while they count. Independent of each other, so no ordering is needed.
#[derive(Debug, Default)]
pub(super) struct Meters {
    requests: AtomicU64,
    bytes: AtomicU64,
    token_requests: AtomicU64,
    redirects: AtomicU64,
    resends: AtomicU64,
    refused_denied: AtomicU64,
    refused_not_found: AtomicU64,
    refused_throttled: AtomicU64,
    refused_other: AtomicU64,
    mirror_failures: AtomicU64,
}

impl Meters {
    pub(super) fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn bytes(&self, count: usize) {
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
    }

    pub(super) fn token_request(&self) {
        self.token_requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn redirect(&self) {
        self.redirects.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn resend(&self) {
        self.resends.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn refusal(&self, status: StatusCode) {
        let meter = match status.as_u16() {
            401 | 403 => &self.refused_denied,
            404 | 410 => &self.refused_not_found,
            429 | 503 => &self.refused_throttled,
            _ => &self.refused_other,
        };
        meter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn mirror_failure(&self) {
        self.mirror_failures.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> OriginCounters {
        let read = |meter: &AtomicU64| meter.load(Ordering::Relaxed);
        OriginCounters {
            requests: read(&self.requests),
            bytes: read(&self.bytes),
            token_requests: read(&self.token_requests),
            redirects: read(&self.redirects),
            resends: read(&self.resends),
            refused_denied: read(&self.refused_denied),
            refused_not_found: read(&self.refused_not_found),
            refused_throttled: read(&self.refused_throttled),
            refused_other: read(&self.refused_other),
            mirror_failures: read(&self.mirror_failures),
        }
    }
}
