//! Where blobs really are: registries redirect to storage, by an address that is signed and valid for a while.
//!
//! Such an address is kept until it ends by its own words, was kept for [`LONGEST`], or fails; so a layer costs one
//! redirect, not one per read.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use hermes_image::ids::Digest;
use http::header::{CACHE_CONTROL, HeaderMap};
use reqwest::Url;
use tokio::time::Instant;

/// Addresses kept; images have at most a hundred-odd layers. The one that ends first makes room.
const MAX_KEPT: usize = 512;

/// How long an address is kept whatever it says. Common registries sign for 5 to 60 minutes; asking again every ten
/// costs nothing, and lets a registry move its storage.
const LONGEST: Duration = Duration::from_secs(600);

/// How long an address is kept that does not say when it ends.
const UNKNOWN: Duration = Duration::from_secs(120);

/// An address is not used this shortly before it ends, as a long body begins with it.
const MARGIN: Duration = Duration::from_secs(10);

struct Kept {
    url: Url,
    ends_at: Instant,
}

/// The addresses of one image's blobs.
#[derive(Default)]
pub(super) struct Redirects {
    kept: parking_lot::Mutex<BTreeMap<Digest, Kept>>,
}

impl Redirects {
    /// The address of `blob`, if a valid one is known.
    pub(super) fn get(&self, blob: &Digest) -> Option<Url> {
        let kept = self.kept.lock();
        kept.get(blob).filter(|kept| kept.ends_at > Instant::now()).map(|kept| kept.url.clone())
    }

    /// Keeps `url`, which the redirect with these `headers` led to.
    pub(super) fn keep(&self, blob: Digest, url: Url, headers: &HeaderMap) {
        let Some(lifetime) = lifetime(&url, headers, SystemTime::now()) else { return };
        let ends_at = Instant::now() + lifetime;
        let mut kept = self.kept.lock();
        if kept.len() >= MAX_KEPT && !kept.contains_key(&blob) {
            let first = kept.iter().min_by_key(|(_, kept)| kept.ends_at).map(|(blob, _)| *blob);
            first.and_then(|first| kept.remove(&first));
        }
        kept.insert(blob, Kept { url, ends_at });
    }

    /// Forgets the address of `blob` if it still is `url`.
    pub(super) fn forget(&self, blob: &Digest, url: &Url) {
        let mut kept = self.kept.lock();
        if kept.get(blob).is_some_and(|kept| kept.url == *url) {
            kept.remove(blob);
        }
    }
}

/// How long an address may be kept; `None` for not at all.
fn lifetime(url: &Url, headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let cache_control = headers.get(CACHE_CONTROL).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut said = None;
    for directive in cache_control.split(',').map(str::trim) {
        if directive.eq_ignore_ascii_case("no-store") || directive.eq_ignore_ascii_case("no-cache") {
            // Said of redirects to signed addresses, lest browsers share them; the signature's end is what counts.
            continue;
        }
        if let Some(seconds) = directive.strip_prefix("max-age=").and_then(|seconds| seconds.parse().ok()) {
            said = Some(Duration::from_secs(seconds)).filter(|age| !age.is_zero());
        }
    }
    let left = signed_lifetime(url, now).or(said).unwrap_or(UNKNOWN).min(LONGEST);
    left.checked_sub(MARGIN).filter(|left| !left.is_zero())
}

/// What the signature says: seconds from now (S3 and Google's version 4), or the time it ends (CloudFront and Google's
/// version 2).
fn signed_lifetime(url: &Url, now: SystemTime) -> Option<Duration> {
    url.query_pairs().find_map(|(name, value)| match name.as_ref() {
        "X-Amz-Expires" | "X-Goog-Expires" => value.parse().ok().map(Duration::from_secs),
        "Expires" => {
            let ends_at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(value.parse().ok()?))?;
            Some(ends_at.duration_since(now).unwrap_or_default())
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn url(query: &str) -> Url {
        format!("https://storage.test/blob?{query}").parse().expect("an address")
    }

    #[test]
    fn addresses_end_when_they_say() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let cases = [
            ("X-Amz-Date=x&X-Amz-Expires=300", "", Some(290)),
            ("X-Goog-Expires=86400", "", Some(590)),
            ("Expires=1000100", "", Some(90)),
            ("Expires=999999", "", None),
            ("X-Amz-Expires=5", "", None),
            ("X-Amz-Expires=100", "public, max-age=20", Some(90)),
            ("sig=1", "max-age=60", Some(50)),
            ("sig=1", "no-store", Some(110)),
            ("", "", Some(110)),
            ("Expires=never", "", Some(110)),
        ];
        for (query, cache_control, expected) in cases {
            let headers = HeaderMap::from_iter([(CACHE_CONTROL, HeaderValue::from_static(cache_control))]);
            let got = lifetime(&url(query), &headers, now);
            assert_eq!(got, expected.map(Duration::from_secs), "'{query}' '{cache_control}'");
        }
    }

    #[test]
    fn what_is_kept_is_bounded_and_forgotten_by_address() {
        let redirects = Redirects::default();
        for number in 0..MAX_KEPT + 5 {
            let mut digest = [0; 32];
            digest[..8].copy_from_slice(&number.to_be_bytes());
            redirects.keep(Digest(digest), url(&format!("n={number}")), &HeaderMap::new());
        }
        assert_eq!(redirects.kept.lock().len(), MAX_KEPT);
        let blob = Digest([9; 32]);
        redirects.keep(blob, url("new"), &HeaderMap::new());
        redirects.forget(&blob, &url("old"));
        assert_eq!(redirects.get(&blob), Some(url("new")));
        redirects.forget(&blob, &url("new"));
        assert_eq!(redirects.get(&blob), None);
    }
}
