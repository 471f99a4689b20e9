//! Authorization: what a registry demands, and how it is got.
//!
//! A registry that wants to know who asks answers 401 with a challenge: Basic (send the login with each request) or
//! Bearer (fetch a token from a token service and send that). One [`Authority`] per image and host keeps the current
//! header. When it is refused, the first request to notice renews it and the others wait and use what it got; a request
//! that is dropped while it renews lets the next one do it.
//!
//! Logins are tried in the order of [`Credentials`]. One that is refused is put aside for this request: its provider is
//! asked again, since what it gave may have ended, and then the next login is tried. Without any, nobody is logged in. A
//! header is renewed shortly before it ends; when that fails, it is used until its end.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use http::{Method, StatusCode};
use reqwest::{Body, Url};
use serde::Deserialize;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::error::{ErrorClass, Failure, OriginError, Phase, Subject};
use super::tls::{TlsSettings, Transports};
use crate::credentials::{Credential, Credentials, Found};

/// Bytes: the largest answer of a token service that is read; tokens have a few KiB.
const MAX_TOKEN_ANSWER_BYTES: u64 = 256 << 10;

/// How long a token is valid when the service does not say (distribution, token authentication specification).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// The longest lifetime that is believed; a token that ends earlier is refused and renewed all the same.
const LONGEST_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// A token is renewed this long before it ends, so that it does not end on the way.
const RENEW_BEFORE: Duration = Duration::from_secs(10);

/// How long a header is used on when renewing it early has failed, before the next try.
const RENEW_RETRY: Duration = Duration::from_secs(2);

/// Renewals that one request may cause: a token that ended, and a handful of logins.
const MAX_RENEWALS: usize = 8;

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
    /// Of which login it is.
    credential: Credential,
    /// Whether it was made of the login by a token service, so that another may be had of the same login.
    is_token: bool,
    renew_at: Option<Instant>,
    ends_at: Option<Instant>,
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
    grant: Option<Grant>,
}

impl Permit {
    /// Whether it shows somebody's login, or a token that was got with one.
    pub(super) fn has_login(&self) -> bool {
        self.grant.as_ref().is_some_and(|grant| !matches!(grant.credential, Credential::Anonymous))
    }

    /// What the request has to send.
    pub(super) fn header(&self) -> Option<HeaderValue> {
        self.grant.as_ref().map(|grant| grant.header.clone())
    }
}

/// What one request has tried so far.
#[derive(Default)]
pub(super) struct Tries {
    renewals: usize,
    /// Logins of which it has got a token.
    minted: Vec<Credential>,
    /// Logins that were refused.
    refused: Vec<Credential>,
}

/// A login that is to be tried.
struct Candidate {
    credential: Credential,
    description: String,
    renew_at: Option<Instant>,
}

/// The authorization for one repository at one host.
pub(super) struct Authority {
    transports: Transports,
    tls: TlsSettings,
    credentials: Credentials,
    /// The host as in references, under which logins are stored.
    registry: String,
    repository: String,
    /// Whether the host itself is talked to in clear; only then may a login travel to a token service in clear.
    in_clear: bool,
    state: parking_lot::Mutex<State>,
    /// Held while one request renews.
    renewing: tokio::sync::Mutex<()>,
}

impl Authority {
    pub(super) fn new(
        (transports, tls): (Transports, TlsSettings),
        credentials: Credentials,
        registry: String,
        repository: String,
        in_clear: bool,
    ) -> Self {
        let (state, renewing) = Default::default();
        Self { transports, tls, credentials, registry, repository, in_clear, state, renewing }
    }

    /// Who asks, for messages.
    pub(super) fn login(&self) -> Arc<str> {
        let login = self.state.lock().login.clone();
        login.unwrap_or_else(|| "without a login, as none was asked for".into())
    }

    /// What a request is to send: nothing until the registry has asked for it, then the current grant. One that is about
    /// to end is renewed first.
    pub(super) async fn permit(&self, subject: &Subject, deadline: Instant) -> Result<Permit, OriginError> {
        let permit = self.current();
        let now = Instant::now();
        let is_past = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let Some(grant) = permit.grant.as_ref().filter(|grant| is_past(grant.renew_at)) else { return Ok(permit) };
        let has_ended = is_past(grant.ends_at);
        match self.renew(&permit, None, &mut Tries::default(), subject, deadline).await {
            Err(error) if !has_ended => {
                tracing::warn!(%error, "an authorization is used until its end, as renewing it failed");
                let mut state = self.state.lock();
                if state.generation == permit.generation
                    && let Some(grant) = &mut state.grant
                {
                    grant.renew_at = Some(Instant::now() + RENEW_RETRY);
                }
                Ok(permit)
            }
            Err(error) => Err(error),
            Ok(_) => Ok(self.current()),
        }
    }

    fn current(&self) -> Permit {
        let state = self.state.lock();
        Permit { generation: state.generation, grant: state.grant.clone() }
    }

    /// Renews what `used` was, after it was refused with `challenge` (the headers of that answer) or is about to end.
    /// `false` means that there is nothing else to try: no challenge, or no login that was not tried already.
    pub(super) async fn renew(
        &self,
        used: &Permit,
        challenge: Option<&HeaderMap>,
        tries: &mut Tries,
        subject: &Subject,
        deadline: Instant,
    ) -> Result<bool, OriginError> {
        tries.renewals += 1;
        if tries.renewals > MAX_RENEWALS {
            return Ok(false);
        }
        let begun = Instant::now();
        let Ok(_renewing) = tokio::time::timeout_at(deadline, self.renewing.lock()).await else {
            let (phase, waited) = (Phase::Deadline, begun.elapsed());
            return Err(subject.error(Failure::Timeout { phase, waited, received_bytes: 0 }));
        };
        let known = {
            let state = self.state.lock();
            if state.generation != used.generation {
                return Ok(true);
            }
            state.challenge.clone()
        };
        let was_refused = challenge.is_some();
        let Some(challenge) = challenge.and_then(parse_challenge).or(known) else { return Ok(false) };
        if let Some(grant) = used.grant.as_ref().filter(|_| was_refused)
            && (!grant.is_token || tries.minted.contains(&grant.credential))
        {
            tries.refused.push(grant.credential.clone());
        }
        let got = self.try_logins(&challenge, tries, subject, deadline).await;
        let mut state = self.state.lock();
        state.challenge = Some(challenge);
        let Some(grant) = got? else { return Ok(false) };
        state.generation += 1;
        state.grant = Some(grant);
        Ok(true)
    }

    /// A grant by the first login that the token service, or the form of the challenge, takes. The registry itself has
    /// yet to see it.
    async fn try_logins(
        &self,
        challenge: &Challenge,
        tries: &mut Tries,
        subject: &Subject,
        deadline: Instant,
    ) -> Result<Option<Grant>, OriginError> {
        let mut denied = None;
        // Each round puts aside what was refused; the bound is for a provider that makes up a new login each time.
        for _ in 0..MAX_RENEWALS {
            let (registry, repository) = (&self.registry, &self.repository);
            let found = self.credentials.find(registry, repository, &tries.refused, deadline).await;
            let candidates = candidates(found, tries);
            if candidates.is_empty() {
                break;
            }
            for candidate in candidates {
                self.state.lock().login = Some(candidate.description.as_str().into());
                match self.answer(challenge, &candidate, subject, deadline).await {
                    Ok(Some(grant)) => {
                        tries.minted.push(candidate.credential);
                        return Ok(Some(grant));
                    }
                    Ok(None) => tries.refused.push(candidate.credential),
                    Err(error) if error.class() == ErrorClass::Denied => {
                        tries.refused.push(candidate.credential);
                        denied.get_or_insert(error);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        denied.map_or(Ok(None), Err)
    }

    /// The header that answers `challenge`; `None` if the login cannot.
    async fn answer(
        &self,
        challenge: &Challenge,
        login: &Candidate,
        subject: &Subject,
        deadline: Instant,
    ) -> Result<Option<Grant>, OriginError> {
        let header = match (challenge, &login.credential) {
            (_, Credential::Access(token)) => Zeroizing::new(format!("Bearer {}", token.reveal())),
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
        let (credential, renew_at) = (login.credential.clone(), login.renew_at);
        Ok(Some(Grant { header, credential, is_token: false, renew_at, ends_at: None }))
    }

    async fn fetch_token(
        &self,
        realm: Url,
        service: Option<&str>,
        scope: &str,
        login: &Candidate,
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
        let failed = |failure| subject.error(failure);
        let transport = self.transports.get(&self.tls).map_err(|error| failed(Failure::Tls(error)))?;
        let mut request = transport.request(method, request, headers);
        *request.body_mut() = body.map(Body::from);
        transport.meters.token_request();
        let mut response = transport.send(request, deadline).await.map_err(failed)?;
        if response.status() != StatusCode::OK {
            return Err(failed(transport.refusal(response, &login.description, deadline).await));
        }
        let document = transport.document(&mut response, "token", MAX_TOKEN_ANSWER_BYTES, deadline);
        let token = parse_token(&document.await.map_err(failed)?, Instant::now()).map_err(failed)?;
        let (credential, renew_at, ends_at) = (login.credential.clone(), Some(token.renew_at), Some(token.ends_at));
        Ok(Grant { header: token.header, credential, is_token: true, renew_at, ends_at })
    }
}

/// The logins to try next: those that were found, or none at all where nobody has ever had one.
fn candidates(found: Found, tries: &Tries) -> Vec<Candidate> {
    let problems = found.problems_text();
    if found.logins.is_empty() && tries.refused.is_empty() {
        let (credential, description) = (Credential::Anonymous, found.anonymous());
        return vec![Candidate { credential, description, renew_at: None }];
    }
    let candidate = |login: crate::credentials::Login| Candidate {
        credential: login.credential,
        description: format!("{}{problems}", login.description),
        renew_at: login.renew_at,
    };
    found.logins.into_iter().map(candidate).collect()
}

fn basic(user: &str, password: &str) -> Zeroizing<String> {
    let pair = Zeroizing::new(format!("{user}:{password}"));
    Zeroizing::new(format!("Basic {}", STANDARD.encode(pair.as_bytes())))
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

/// What a token service gives.
struct Token {
    header: HeaderValue,
    renew_at: Instant,
    ends_at: Instant,
}

fn parse_token(body: &[u8], now: Instant) -> Result<Token, Failure> {
    // The parser's message may quote a value, and the value may be a token.
    let malformed = |reason: &str| Failure::Malformed { what: "token", reason: reason.to_owned() };
    let answer: TokenAnswer = serde_json::from_slice(body).map_err(|_| malformed("it is not the expected JSON"))?;
    let tokens = [answer.token, answer.access_token];
    let token = tokens.into_iter().flatten().find(|token| !token.is_empty()).ok_or_else(|| malformed("it is empty"))?;
    let header = secret_header(&format!("Bearer {token}"));
    let header = header.ok_or_else(|| malformed("it has characters that cannot be sent"))?;
    let lifetime = answer.expires_in.map_or(DEFAULT_LIFETIME, Duration::from_secs).min(LONGEST_LIFETIME);
    let renew_at = now + lifetime.saturating_sub(RENEW_BEFORE.min(lifetime / 5));
    Ok(Token { header, renew_at, ends_at: now + lifetime })
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
    use crate::credentials::CredentialsConfig;

    #[tokio::test]
    async fn a_login_never_travels_in_clear_for_a_registry_that_does_not() {
        let config = crate::OriginConfig::default();
        let meters = Arc::new(crate::counters::Meters::default());
        let transports = Transports::new(Arc::new(config), Arc::clone(&meters)).expect("a client");
        let docker_config = Some("/nonexistent/config.json".into());
        let credentials = Credentials::new(CredentialsConfig { docker_config, ..CredentialsConfig::default() });
        let tls = TlsSettings::default();
        let authority = Authority::new((transports, tls), credentials, "r.test".into(), "app".into(), false);
        let subject = Subject { image: "r.test/app".into(), layer: None, source: "r.test".into() };
        // The address is of this machine, where a request would be noticed by the counter.
        let challenge = HeaderValue::from_static(r#"Bearer realm="http://127.0.0.1:1/token""#);
        let headers = HeaderMap::from_iter([(WWW_AUTHENTICATE, challenge)]);
        let used = Permit { generation: 0, grant: None };
        let deadline = Instant::now() + Duration::from_secs(5);
        let renewed = authority.renew(&used, Some(&headers), &mut Tries::default(), &subject, deadline).await;
        let error = renewed.expect_err("in clear");
        assert_eq!(error.kind(), "bad_challenge");
        assert!(error.to_string().contains("in clear"), "{error}");
        assert_eq!(meters.read().requests, 0);
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
            (grant.renew_at - now).as_secs()
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
