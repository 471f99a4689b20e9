//! The registry of an image: reachable, letting us in, serving ranges, and of the same time.

use std::time::{Duration, SystemTime};

use futures::StreamExt as _;
use hermes_registry::oci::Platform;
use http::header::DATE;
use tokio::time::Instant;

use super::Finding;
use hermes_origin::{ImageSource, OriginClient, OriginConfig, speaks_plain_http};

/// How long each request may take in all.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(15);
/// What is read from the end of a layer, in bytes.
const RANGE_LEN_BYTES: u64 = 64 << 10;
/// How far clocks may be apart before tokens and signed addresses are refused: what their issuers commonly allow.
const SKEW_MAX: Duration = Duration::from_secs(60);

/// Tries to have `image`.
pub(super) async fn image(image: &str, platform: Option<&str>, plain_http: bool) -> Vec<Finding> {
    let source: ImageSource = match image.parse() {
        Ok(source) => source,
        Err(error) => return vec![Finding::fail("registry", format!("{error}"), "")],
    };
    let platform = match platform.map(str::parse::<Platform>).transpose() {
        Ok(platform) => platform.unwrap_or_else(Platform::host),
        Err(error) => return vec![Finding::fail("registry", format!("{error}"), "")],
    };
    // A server that ignores ranges shall be found out, not coped with.
    let mut config = OriginConfig { max_skip_bytes: 0, ..OriginConfig::default() };
    let mut findings = Vec::new();
    if let ImageSource::Registry(reference) = &source {
        if plain_http {
            config.plain_http_hosts.push(reference.registry().to_owned());
        }
        findings.push(skew(reference.resolve_registry(), &config).await);
    }
    findings.extend(read(&source, &platform, config).await);
    findings
}

/// Resolves the image and reads a range of its largest layer.
async fn read(source: &ImageSource, platform: &Platform, config: OriginConfig) -> Vec<Finding> {
    let opened = match OriginClient::new(config) {
        Ok(client) => client.open(source).await,
        Err(error) => return vec![Finding::fail("registry", error.to_string(), "")],
    };
    let origin = match opened {
        Ok(origin) => origin,
        Err(error) => return vec![Finding::fail("registry", error.to_string(), "check the image's name")],
    };
    let image = match origin.resolve(platform, Instant::now() + REQUEST_TIMEOUT * 2).await {
        Ok(image) => image,
        Err(error) => {
            let next = match error.kind() {
                "denied" => "log in where the daemon looks (docker's config.json of root)",
                "not_found" => "check the image's name and tag",
                "connect" | "broken" | "timeout" => "check name, route, proxy and certificates from this node",
                _ => "see what the registry says",
            };
            return vec![Finding::fail("registry", error.to_string(), next)];
        }
    };
    let seen = format!("{} gives {} with {} layers", origin.host(), image.manifest_digest, image.layers.len());
    let mut findings = vec![Finding::ok("registry", seen)];
    let Some(layer) = image.layers.iter().max_by_key(|layer| layer.len_bytes) else { return findings };
    let range = layer.len_bytes.saturating_sub(RANGE_LEN_BYTES).max(1).min(layer.len_bytes)..layer.len_bytes;
    let wanted = range.end - range.start;
    let mut body = origin.read(layer, range, Instant::now() + REQUEST_TIMEOUT);
    let mut came = 0;
    while let Some(piece) = body.next().await {
        match piece {
            Ok(bytes) => came += bytes.len() as u64,
            Err(error) => {
                let next = "images of this registry are pulled as ever; a registry or proxy with ranges lets them start \
                            lazily";
                findings.push(Finding::fail("ranges", error.to_string(), next));
                return findings;
            }
        }
    }
    findings.push(match came == wanted {
        true => Finding::ok("ranges", format!("{came} bytes from within a layer came as asked")),
        false => Finding::fail("ranges", format!("{came} of {wanted} bytes came"), "see the registry's log"),
    });
    findings
}

/// How far the registry's clock is from ours, by the date of any answer.
async fn skew(host: &str, config: &OriginConfig) -> Finding {
    const WHAT: &str = "clock of the registry";
    let asked = match speaks_plain_http(host, &config.plain_http_hosts) {
        // Not through a proxy, as the daemon does with this machine's own.
        true => date_of(reqwest::Client::builder().no_proxy(), format!("http://{host}/v2/")).await,
        false => date_of(reqwest::Client::builder(), format!("https://{host}/v2/")).await,
    };
    match asked {
        Err(reason) => Finding::warn(WHAT, reason, "see the line on the registry"),
        Ok(date) => judge_skew(date, SystemTime::now()),
    }
}

fn judge_skew(theirs: SystemTime, ours: SystemTime) -> Finding {
    const WHAT: &str = "clock of the registry";
    let apart = theirs.duration_since(ours).unwrap_or_else(|error| error.duration());
    let seen = format!("{} s from ours", apart.as_secs());
    match apart > SKEW_MAX {
        true => Finding::fail(WHAT, seen, "set this machine's clock: credentials are refused when it is wrong"),
        false => Finding::ok(WHAT, seen),
    }
}

async fn date_of(client: reqwest::ClientBuilder, url: String) -> Result<SystemTime, String> {
    // Installed by whoever started first; an error means that one is there.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = client.redirect(reqwest::redirect::Policy::none()).timeout(REQUEST_TIMEOUT).build();
    let answer = client.map_err(|error| error.to_string())?.get(url).send().await;
    let answer = answer.map_err(|error| format!("no answer: {}", error.without_url()))?;
    let date = answer.headers().get(DATE).and_then(|date| date.to_str().ok()).ok_or("its answers have no date")?;
    httpdate::parse_http_date(date).map_err(|_| format!("its date '{date}' is none"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::check::Verdict;

    #[test]
    fn clocks_may_differ_a_little_either_way() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        for (seconds, verdict) in [(0, Verdict::Ok), (59, Verdict::Ok), (61, Verdict::Fail)] {
            let apart = Duration::from_secs(seconds);
            assert_eq!(judge_skew(now + apart, now).verdict, verdict, "{seconds} ahead");
            assert_eq!(judge_skew(now - apart, now).verdict, verdict, "{seconds} behind");
        }
    }
}
