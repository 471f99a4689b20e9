//! One HTTP request, with all its limits: a deadline, a time for the head, one resend over a dead connection, and answers
//! that are no success turned into failures.
//!
//! Redirects are never followed here, so that an `Authorization` header can never travel to another host unseen.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_RANGE, HeaderMap};
use http::{Method, StatusCode};
use reqwest::{Client, ClientBuilder, Request, Response, Url};
use serde::Deserialize;
use tokio::time::{Instant, timeout_at};

use super::counters::Meters;
use super::error::{Failure, Phase};
use super::retry_after::retry_after;
use super::{OriginConfig, Timeouts};

/// Bytes of a failed answer's body that are looked at for its message.
const MAX_MESSAGE_BYTES: u64 = 16 << 10;

/// Time for a failed answer's body: its message is worth no more.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(2);

/// Characters of a server's message that are shown.
const SHOWN_CHARACTERS: usize = 200;

/// How we name ourselves to servers.
const USER_AGENT: &str = concat!("hermes/", env!("CARGO_PKG_VERSION"));

/// Sends requests. Connections are kept and shared by all images.
#[derive(Debug, Clone)]
pub(super) struct Transport {
    /// For other machines; goes through the proxy that the environment names.
    outward: Client,
    /// For this machine, where a proxy has no business.
    loopback: Client,
    pub(super) timeouts: Timeouts,
    pub(super) meters: Arc<Meters>,
}

impl Transport {
    /// `special` is applied to each client while it is built.
    pub(super) fn new<E: From<reqwest::Error>>(
        config: &OriginConfig,
        meters: Arc<Meters>,
        special: impl Fn(ClientBuilder) -> Result<ClientBuilder, E>,
    ) -> Result<Self, E> {
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            // An error means that another thread was quicker, which serves as well.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let builder = || {
            Client::builder()
                .redirect(reqwest::redirect::Policy::none())
                .connect_timeout(config.timeouts.connect)
                .pool_max_idle_per_host(config.max_idle_connections_per_host)
                .tcp_nodelay(true)
                .user_agent(USER_AGENT)
        };
        let outward = special(builder())?.build()?;
        let loopback = special(builder())?.no_proxy().build()?;
        Ok(Self { outward, loopback, timeouts: config.timeouts, meters })
    }

    fn client(&self, url: &Url) -> &Client {
        if is_loopback(url.host_str().unwrap_or_default()) { &self.loopback } else { &self.outward }
    }

    /// A request to `url`, with `headers`.
    pub(super) fn request(&self, method: Method, url: Url, headers: HeaderMap) -> Request {
        let mut request = Request::new(method, url);
        *request.headers_mut() = headers;
        request
    }

    /// Sends `request` and waits for the head of the answer, whatever its status. A request whose connection breaks
    /// before that is sent once more at once: a kept connection may have been closed by the server meanwhile.
    pub(super) async fn send(&self, request: Request, deadline: Instant) -> Result<Response, Failure> {
        self.send_within(request, self.timeouts.headers, deadline).await
    }

    /// The same, with `patience` for the head of the answer, the sending of a body included.
    pub(super) async fn send_within(
        &self,
        request: Request,
        patience: Duration,
        deadline: Instant,
    ) -> Result<Response, Failure> {
        let begun = Instant::now();
        let (until, phase) = earlier(begun + patience, Phase::Headers, deadline);
        let client = self.client(request.url());
        let again = request.try_clone();
        let timeout = |phase| Failure::Timeout { phase, waited: begun.elapsed(), received_bytes: 0 };
        self.meters.request();
        let first = timeout_at(until, client.execute(request)).await.map_err(|_| timeout(phase))?;
        let error = match (first, again) {
            (Ok(response), _) => return Ok(response),
            (Err(error), Some(again)) if !error.is_connect() && !error.is_timeout() => {
                tracing::debug!(error = %error.without_url(), "a connection broke before its answer; sent again");
                self.meters.request();
                self.meters.resend();
                match timeout_at(until, client.execute(again)).await.map_err(|_| timeout(phase))? {
                    Ok(response) => return Ok(response),
                    Err(error) => error,
                }
            }
            (Err(error), _) => error,
        };
        // An address may be signed, which makes it a secret.
        let error = error.without_url();
        Err(match (error.is_connect(), error.is_timeout()) {
            (_, true) => timeout(Phase::Connect),
            (true, false) => Failure::Connect(error),
            (false, false) => Failure::Broken(error),
        })
    }

    /// The next piece of a body, of which `received_bytes` came before; `None` at its end. The outer error is a timeout,
    /// the inner one a broken connection.
    pub(super) async fn chunk(
        &self,
        response: &mut Response,
        received_bytes: u64,
        deadline: Instant,
    ) -> Result<Result<Option<Bytes>, reqwest::Error>, Failure> {
        let begun = Instant::now();
        let (until, phase) = earlier(begun + self.timeouts.idle, Phase::Body, deadline);
        let chunk = timeout_at(until, response.chunk()).await;
        let chunk = chunk.map_err(|_| Failure::Timeout { phase, waited: begun.elapsed(), received_bytes })?;
        if let Ok(Some(chunk)) = &chunk {
            self.meters.bytes(chunk.len());
        }
        Ok(chunk.map_err(reqwest::Error::without_url))
    }

    /// A whole body, at most `limit_bytes`, as the document `what`.
    pub(super) async fn document(
        &self,
        response: &mut Response,
        what: &'static str,
        limit_bytes: u64,
        deadline: Instant,
    ) -> Result<Bytes, Failure> {
        let too_long = || Failure::TooLong { what, limit_bytes };
        let announced = response.content_length();
        if announced.is_some_and(|len| len > limit_bytes) {
            return Err(too_long());
        }
        let mut body = BytesMut::new();
        loop {
            let received_bytes = body.len() as u64;
            match self.chunk(response, received_bytes, deadline).await? {
                Ok(Some(chunk)) if received_bytes + chunk.len() as u64 > limit_bytes => return Err(too_long()),
                Ok(Some(chunk)) => body.extend_from_slice(&chunk),
                Ok(None) => return Ok(body.freeze()),
                Err(error) => {
                    let wanted_bytes = announced.unwrap_or(received_bytes);
                    return Err(Failure::Truncated { wanted_bytes, received_bytes, source: Some(error) });
                }
            }
        }
    }

    /// What an answer that is no success means. `login` describes who asked.
    pub(super) async fn refusal(&self, mut response: Response, login: &str, deadline: Instant) -> Failure {
        let status = response.status();
        self.meters.refusal(status);
        let rest = retry_after(response.headers(), SystemTime::now());
        let patience = deadline.min(Instant::now() + MESSAGE_TIMEOUT);
        // The body only explains; without it the status says enough.
        let body = timeout_at(patience, self.document(&mut response, "error", MAX_MESSAGE_BYTES, patience)).await;
        let message = body.ok().and_then(Result::ok).map_or_else(String::new, |body| message(&body));
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Failure::Denied { status, message, login: login.to_owned() }
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => Failure::NotFound { status, message },
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                Failure::Throttled { status, message, retry_after: rest }
            }
            _ if status.is_server_error() => Failure::Server { status, message },
            _ => Failure::Unexpected { status, message },
        }
    }
}

/// Which of two ends of patience comes first, and what it is called.
fn earlier(own: Instant, phase: Phase, deadline: Instant) -> (Instant, Phase) {
    if own < deadline { (own, phase) } else { (deadline, Phase::Deadline) }
}

/// Whether `host` (without port) is this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || address.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The blob's length in a 416's `Content-Range: bytes */N`.
pub(super) fn length_of_416(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_RANGE)?.to_str().ok()?.strip_prefix("bytes */")?.parse().ok()
}

#[derive(Deserialize)]
struct ErrorBody {
    errors: Vec<ErrorEntry>,
}

#[derive(Deserialize)]
struct ErrorEntry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The message in a failed answer: the registry's own, or the first line of whatever it is. It comes from outside, so
/// what could play tricks on a terminal is taken out.
fn message(body: &[u8]) -> String {
    let text = match serde_json::from_slice::<ErrorBody>(body) {
        Ok(ErrorBody { errors }) => match errors.into_iter().next() {
            Some(ErrorEntry { code, message }) if message.is_empty() => code,
            Some(ErrorEntry { code, message }) => format!("{code}: {message}"),
            None => String::new(),
        },
        Err(_) => String::from_utf8_lossy(body).lines().next().unwrap_or_default().to_owned(),
    };
    let mut shown: String = text.trim().chars().filter(|c| !c.is_control()).take(SHOWN_CHARACTERS + 1).collect();
    if shown.chars().count() > SHOWN_CHARACTERS {
        shown.pop();
        shown.push_str("...");
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_short_and_harmless() {
        let long = "x".repeat(300);
        let shown = format!("{}...", "x".repeat(200));
        let cases = [
            (r#"{"errors":[{"code":"DENIED","message":"no","detail":null}]}"#, "DENIED: no"),
            (r#"{"errors":[{"code":"DENIED"}]}"#, "DENIED"),
            (r#"{"errors":[]}"#, ""),
            ("<html>\nbusy", "<html>"),
            ("a\u{1b}[31mb", "a[31mb"),
            ("", ""),
            (&long, &shown),
        ];
        for (body, expected) in cases {
            assert_eq!(message(body.as_bytes()), expected, "{body}");
        }
        assert!(!message(&[0xff, 0xfe, b'a']).is_empty());
    }

    #[test]
    fn this_machine_is_recognised() {
        for host in ["localhost", "127.0.0.1", "127.8.9.1", "::1", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["", "localhost.evil.test", "128.0.0.1", "registry.test", "[::2]"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
