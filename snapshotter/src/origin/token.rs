//! Authorization: what a registry demands, and how it is got.
//!
//! A registry that wants to know who asks answers 401 with a challenge: Basic (send the login with each request) or
//! Bearer (fetch a token from a token service and send that). One [`Authority`] per image keeps the current header. When
//! it is refused, the first request to notice renews it and the others wait and use what it got; a request that is
//! dropped while it renews lets the next one do it.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use http::{Method, StatusCode};
use reqwest::{Body, Url};
use serde::Deserialize;
use tokio::time::Instant;

use super::credentials::{Credential, Login, Logins};
use super::error::{Failure, OriginError, Subject};
use super::transport::Transport;

/// Bytes: the largest answer of a token service that is read; tokens have a few KiB.
const MAX_TOKEN_ANSWER_BYTES: u64 = 256 << 10;

/// How long a token is valid when the service does not say (distribution, token authentication specification).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// The longest lifetime that is believed; a token that ends earlier is refused and renewed all the same.
const LONGEST_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// A token is renewed this long before it ends, so that it does not end on the way.
const RENEW_BEFORE: Duration = Duration::from_secs(10);

/// The name that token services log for us.
const CLIENT_ID: &str = "hermes";

/// What a registry demands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String>, scope: Option<String> },
}

/// An `Authorization` header that was got.
#[derive(Clone)]
struct Grant {
    header: HeaderValue,
    expires_at: Option<Instant>,
}

#[derive(Default)]
struct State {
    /// Counts renewals, so that a request knows whether the grant it used is still the current one.
    generation: u64,
    grant: Option<Grant>,
    challenge: Option<Challenge>,
    login: Option<Arc<str>>,
}

/// How a request may show who it is.
pub(super) struct Permit {
    generation: u64,
    pub(super) header: Option<HeaderValue>,
}

/// The authorization for one repository of one registry.
pub(super) struct Authority {
    transport: Transport,
    logins: Logins,
    /// The registry's name as in references, under which logins are stored.
    registry: String,
    repository: String,
    /// Whether the registry itself is talked to in clear; only then may a login travel to a token service in clear.
    in_clear: bool,
    state: parking_lot::Mutex<State>,
    /// Held while one request renews.
    renewing: tokio::sync::Mutex<()>,
}

impl Authority {
    pub(super) fn new(
        transport: Transport,
        logins: Logins,
        registry: String,
        repository: String,
        in_clear: bool,
    ) -> Self {
        let (state, renewing) = Default::default();
        Self { transport, logins, registry, repository, in_clear, state, renewing }
    }

    /// Who asks, for messages.
    pub(super) fn login(&self) -> Arc<str> {
        let login = self.state.lock().login.clone();
        login.unwrap_or_else(|| "without a login, as none was asked for".into())
    }

    /// What a request is to send: nothing until the registry has asked for it, then the current grant. One that is about
    /// to end is renewed first.
    pub(super) async fn permit(&self, subject: &Subject, deadline: Instant) -> Result<Permit, OriginError> {
        let (permit, stale) = self.current();
        if !stale {
            return Ok(permit);
        }
        self.renew(&permit, None, subject, deadline).await?;
        Ok(self.current().0)
    }

    fn current(&self) -> (Permit, bool) {
        let state = self.state.lock();
        let ends = state.grant.as_ref().and_then(|grant| grant.expires_at);
        let stale = ends.is_some_and(|expires_at| expires_at <= Instant::now());
        let header = state.grant.as_ref().map(|grant| grant.header.clone());
        (Permit { generation: state.generation, header }, stale)
    }

    /// Renews what `used` was, after it was refused with `challenge` (the headers of that answer) or has ended. `false`
    /// means that there is nothing else to try: no challenge, or no login that was not tried already.
    pub(super) async fn renew(
        &self,
        used: &Permit,
        challenge: Option<&HeaderMap>,
        subject: &Subject,
        deadline: Instant,
    ) -> Result<bool, OriginError> {
        let waited = tokio::time::timeout_at(deadline, self.renewing.lock()).await;
        let _renewing = waited.map_err(|_| {
            subject.error(Failure::Timeout {
                phase: super::error::Phase::Deadline,
                waited: Duration::ZERO,
                received_bytes: 0,
            })
        })?;
        let known = {
            let state = self.state.lock();
            if state.generation != used.generation {
                return Ok(true);
            }
            state.challenge.clone()
        };
        let Some(challenge) = challenge.and_then(parse_challenge).or(known) else { return Ok(false) };
        let login = self.find_login(subject).await?;
        let grant = self.answer(&challenge, &login, subject, deadline).await;
        let mut state = self.state.lock();
        state.login = Some(login.description.into());
        state.challenge = Some(challenge);
        let Some(grant) = grant? else { return Ok(false) };
        // The same Basic login again would be refused again.
        let other = used.header.as_ref() != Some(&grant.header);
        state.generation += 1;
        state.grant = Some(grant);
        Ok(other)
    }

    async fn find_login(&self, subject: &Subject) -> Result<Login, OriginError> {
        let (logins, registry, repository) = (self.logins.clone(), self.registry.clone(), self.repository.clone());
        let found = tokio::task::spawn_blocking(move || logins.find(&registry, &repository)).await;
        let found = found.map_err(|error| subject.error(Failure::Task(error)))?;
        found.map_err(|error| subject.error(Failure::Credentials(error)))
    }

    /// The header that answers `challenge`; `None` if the login cannot.
    async fn answer(
        &self,
        challenge: &Challenge,
        login: &Login,
        subject: &Subject,
        deadline: Instant,
    ) -> Result<Option<Grant>, OriginError> {
        let header = match (challenge, &login.credential) {
            (_, Credential::Access(token)) => format!("Bearer {}", token.reveal()),
            (Challenge::Basic, Credential::Basic { user, password }) => basic(user, password.reveal()),
            (Challenge::Basic, Credential::Anonymous | Credential::Identity(_)) => return Ok(None),
            (Challenge::Bearer { realm, service, scope }, _) => {
                let scope = scope.clone().unwrap_or_else(|| format!("repository:{}:pull", self.repository));
                let realm: Url = realm
                    .parse()
                    .map_err(|_| subject.error(Failure::BadChallenge("the token service's address is malformed")))?;
                let token = self.fetch_token(realm, service.as_deref(), &scope, login, subject, deadline);
                return token.await.map(Some);
            }
        };
        let header = secret_header(&header).ok_or_else(|| {
            subject.error(Failure::BadChallenge("the stored login has characters that cannot be sent"))
        })?;
        Ok(Some(Grant { header, expires_at: None }))
    }

    async fn fetch_token(
        &self,
        realm: Url,
        service: Option<&str>,
        scope: &str,
        login: &Login,
        subject: &Subject,
        deadline: Instant,
    ) -> Result<Grant, OriginError> {
        if realm.scheme() != "https" && !(realm.scheme() == "http" && self.in_clear) {
            return Err(subject.error(Failure::BadChallenge("the token service would get the login in clear")));
        }
        let subject = subject.at(&host_and_port(&realm));
        let mut request = realm.clone();
        let mut headers = HeaderMap::new();
        let mut pairs: Vec<(&str, &str)> = service.map(|service| ("service", service)).into_iter().collect();
        pairs.push(("scope", scope));
        let body = match &login.credential {
            Credential::Identity(token) => {
                pairs.extend([("grant_type", "refresh_token"), ("refresh_token", token.reveal())]);
                pairs.push(("client_id", CLIENT_ID));
                let mut form = realm.clone();
                form.set_query(None);
                form.query_pairs_mut().extend_pairs(&pairs);
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
                form.query().map(str::to_owned)
            }
            Credential::Basic { user, password } => {
                pairs.push(("account", user));
                request.query_pairs_mut().extend_pairs(&pairs);
                let header = secret_header(&basic(user, password.reveal()));
                headers.extend(header.map(|header| (AUTHORIZATION, header)));
                None
            }
            Credential::Anonymous | Credential::Access(_) => {
                request.query_pairs_mut().extend_pairs(&pairs);
                None
            }
        };
        let method = if body.is_some() { Method::POST } else { Method::GET };
        let mut request = self.transport.request(method, request, headers);
        *request.body_mut() = body.map(Body::from);
        self.transport.meters.token_request();
        let failed = |failure| subject.error(failure);
        let mut response = self.transport.send(request, deadline).await.map_err(failed)?;
        if response.status() != StatusCode::OK {
            return Err(failed(self.transport.refusal(response, &login.description, deadline).await));
        }
        let document = self.transport.document(&mut response, "token", MAX_TOKEN_ANSWER_BYTES, deadline);
        parse_token(&document.await.map_err(failed)?, Instant::now()).map_err(failed)
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

/// A header that no log shows.
fn secret_header(text: &str) -> Option<HeaderValue> {
    let mut header = HeaderValue::from_str(text).ok()?;
    header.set_sensitive(true);
    Some(header)
}

/// `host:port`, or the host alone where the port is the scheme's own.
pub(super) fn host_and_port(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

#[derive(Deserialize)]
struct TokenAnswer {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<u64>,
}

fn parse_token(body: &[u8], now: Instant) -> Result<Grant, Failure> {
    // The parser's message may quote a value, and the value may be a token.
    let malformed = |reason: &str| Failure::Malformed { what: "token", reason: reason.to_owned() };
    let answer: TokenAnswer = serde_json::from_slice(body).map_err(|_| malformed("it is not the expected JSON"))?;
    let tokens = [answer.token, answer.access_token];
    let token = tokens.into_iter().flatten().find(|token| !token.is_empty()).ok_or_else(|| malformed("it is empty"))?;
    let header = secret_header(&format!("Bearer {token}"));
    let header = header.ok_or_else(|| malformed("it has characters that cannot be sent"))?;
    let lifetime = answer.expires_in.map_or(DEFAULT_LIFETIME, Duration::from_secs).min(LONGEST_LIFETIME);
    let expires_at = now + lifetime.saturating_sub(RENEW_BEFORE.min(lifetime / 5));
    Ok(Grant { header, expires_at: Some(expires_at) })
}

/// The challenge in the headers of a 401; a Bearer one goes before a Basic one.
fn parse_challenge(headers: &HeaderMap) -> Option<Challenge> {
    let mut found = None;
    for value in headers.get_all(WWW_AUTHENTICATE) {
        // What is malformed is as good as absent.
        let Ok(challenges) = http_auth::parse_challenges(value.to_str().unwrap_or_default()) else { continue };
        for challenge in challenges {
            let parameter = |wanted: &str| {
                let found = challenge.params.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
                found.map(|(_, value)| value.to_unescaped()).filter(|value| !value.is_empty())
            };
            if challenge.scheme.eq_ignore_ascii_case("bearer") {
                let realm = parameter("realm")?;
                return Some(Challenge::Bearer { realm, service: parameter("service"), scope: parameter("scope") });
            }
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                found = Some(Challenge::Basic);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_login_never_travels_in_clear_for_a_registry_that_does_not() {
        let config = crate::origin::OriginConfig::default();
        let transport = Transport::new(&config, Arc::default()).expect("a client");
        let logins = Logins::at(Some("/nonexistent/config.json".into()));
        let authority = Authority::new(transport.clone(), logins, "r.test".into(), "app".into(), false);
        let subject = Subject { image: "r.test/app".into(), layer: None, source: "r.test".into() };
        // The address is of this machine, where a request would be noticed by the counter.
        let challenge = HeaderValue::from_static(r#"Bearer realm="http://127.0.0.1:1/token""#);
        let headers = HeaderMap::from_iter([(WWW_AUTHENTICATE, challenge)]);
        let used = Permit { generation: 0, header: None };
        let deadline = Instant::now() + Duration::from_secs(5);
        let error = authority.renew(&used, Some(&headers), &subject, deadline).await.expect_err("in clear");
        assert_eq!(error.kind(), "bad_challenge");
        assert!(error.to_string().contains("in clear"), "{error}");
        assert_eq!(transport.meters.read().requests, 0);
    }

    #[test]
    fn challenges_are_read() {
        let bearer = |realm: &str, service: Option<&str>, scope: Option<&str>| Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        };
        let cases: [(&[&'static str], Option<Challenge>); 8] = [
            (
                &[r#"Bearer realm="https://auth.test/token",service="r.test",scope="repository:a/b:pull,push""#],
                Some(bearer("https://auth.test/token", Some("r.test"), Some("repository:a/b:pull,push"))),
            ),
            (&[r#"bearer REALM="https://a.test/""#], Some(bearer("https://a.test/", None, None))),
            (&[r#"Basic realm="r""#, r#"Bearer realm="https://a.test/""#], Some(bearer("https://a.test/", None, None))),
            (&[r#"Basic realm="r", Bearer realm="https://a.test/""#], Some(bearer("https://a.test/", None, None))),
            (&["BASIC realm=x"], Some(Challenge::Basic)),
            (&[r#"Bearer service="x""#], None),
            (&["\"\"\"", ""], None),
            (&["Negotiate"], None),
        ];
        for (values, expected) in cases {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(WWW_AUTHENTICATE, HeaderValue::from_static(value));
            }
            assert_eq!(parse_challenge(&headers), expected, "{values:?}");
        }
    }

    #[test]
    fn tokens_are_read_and_hidden() {
        let now = Instant::now();
        let lives = |body: &str| {
            let grant = parse_token(body.as_bytes(), now).unwrap_or_else(|failure| panic!("{body}: {failure}"));
            assert_eq!(grant.header, "Bearer t0k");
            assert!(!format!("{:?}", grant.header).contains("t0k"));
            (grant.expires_at.expect("an end") - now).as_secs()
        };
        assert_eq!(lives(r#"{"token":"t0k","expires_in":300,"issued_at":"x"}"#), 290);
        assert_eq!(lives(r#"{"access_token":"t0k"}"#), 50);
        assert_eq!(lives(r#"{"token":"","access_token":"t0k","expires_in":5}"#), 4);
        assert_eq!(lives(r#"{"token":"t0k","expires_in":18446744073709551615}"#), 86_390);
        for body in ["", "{}", r#"{"token":"a\nb"}"#, r#"{"token":7}"#, r#"{"token":"t0k","expires_in":-1}"#] {
            let failure = parse_token(body.as_bytes(), now).err().unwrap_or_else(|| panic!("{body} was accepted"));
            assert!(!failure.to_string().contains("t0k"), "{failure}");
        }
    }
}
