//! Who may read: everybody, who knows a password (Basic), or who holds a short-lived token (Bearer).
//!
//! Tokens are random, live in memory only, and are bound to the repositories that were asked for. A restart forgets
//! them; clients then get a 401 with a challenge and ask for a new one, as they do when one runs out.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use http::header::{AUTHORIZATION, HOST};
use sha2::{Digest as _, Sha256};
use tokio::time::Instant;

use crate::answer::Refusal;

/// Tokens that may be valid at once; the one that runs out first makes room. Far more than clients of a test, a demo or
/// an air-gapped cluster hold (one per client and repository), at about 200 bytes each.
const MAX_TOKENS: usize = 10_000;

/// What the challenge calls this registry.
const SERVICE: &str = "hermes-registry";

/// A user's name and password.
#[derive(Clone, PartialEq, Eq)]
pub struct Login {
    /// The user's name.
    pub user: String,
    /// The password, in clear.
    pub password: String,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").field("user", &self.user).finish_non_exhaustive()
    }
}

/// Who may read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Auth {
    /// Everybody.
    #[default]
    Open,
    /// Who sends the login with each request.
    Basic(Login),
    /// Who holds a token of this registry's `/token`.
    Token {
        /// What `/token` asks for; `None` gives a token to everybody, as public repositories do.
        login: Option<Login>,
        /// How long a token is valid.
        lifetime: Duration,
    },
}

/// What a request wants to read, in the words of token scopes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Scope<'a> {
    /// Whether the registry speaks the protocol: any valid token does.
    Base,
    /// The content of a repository.
    Repository(&'a str),
    /// The list of repositories.
    Catalog,
}

impl Scope<'_> {
    fn text(self) -> Option<String> {
        match self {
            Scope::Base => None,
            Scope::Repository(name) => Some(format!("repository:{name}:pull")),
            Scope::Catalog => Some("registry:catalog:*".to_owned()),
        }
    }
}

struct Grant {
    scopes: BTreeSet<String>,
    expires_at: Instant,
}

/// The guard at the door.
pub(crate) struct Guard {
    auth: Auth,
    tokens: Mutex<BTreeMap<String, Grant>>,
}

/// A token for the answer of `/token`.
pub(crate) struct Issued {
    pub(crate) token: String,
    pub(crate) expires_in_secs: u64,
}

impl Guard {
    pub(crate) fn new(auth: Auth) -> Self {
        Self { auth, tokens: Mutex::new(BTreeMap::new()) }
    }

    /// Lets a request pass, or says how to be let in.
    pub(crate) fn admit(&self, headers: &HeaderMap, scope: Scope<'_>) -> Result<(), Refusal> {
        match &self.auth {
            Auth::Open => Ok(()),
            Auth::Basic(login) if knows(headers, login) => Ok(()),
            Auth::Basic(_) => Err(Refusal::unauthorized(&format!("Basic realm=\"{SERVICE}\""))),
            Auth::Token { .. } => {
                let reason = match credentials(headers, "bearer").map(|token| self.check(token, scope)) {
                    Some(Ok(())) => return Ok(()),
                    Some(Err(reason)) => Some(reason),
                    None => None,
                };
                Err(Refusal::unauthorized(&challenge(headers, scope, reason)))
            }
        }
    }

    fn check(&self, token: &str, scope: Scope<'_>) -> Result<(), &'static str> {
        let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        let grant = tokens.get(token).filter(|grant| grant.expires_at > Instant::now()).ok_or("invalid_token")?;
        match scope.text() {
            Some(scope) if !grant.scopes.contains(&scope) => Err("insufficient_scope"),
            _ => Ok(()),
        }
    }

    /// Gives out a token for `scopes` (as in the query of the request), reduced to what this registry knows: pulling
    /// and listing.
    pub(crate) fn issue<'a>(
        &self,
        headers: &HeaderMap,
        scopes: impl Iterator<Item = &'a str>,
    ) -> Result<Issued, Refusal> {
        let Auth::Token { login, lifetime } = &self.auth else { return Err(Refusal::no_such_place()) };
        if login.as_ref().is_some_and(|login| !knows(headers, login)) {
            return Err(Refusal::unauthorized(&format!("Basic realm=\"{SERVICE}\"")));
        }
        let scopes = scopes.flat_map(|list| list.split(' ')).filter_map(read_only).collect();
        let token = hex::encode(rand::random::<[u8; 32]>());
        let now = Instant::now();
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() >= MAX_TOKENS {
            tokens.retain(|_, grant| grant.expires_at > now);
        }
        if tokens.len() >= MAX_TOKENS {
            let first = tokens.iter().min_by_key(|(_, grant)| grant.expires_at).map(|(token, _)| token.clone());
            first.and_then(|first| tokens.remove(&first));
        }
        tokens.insert(token.clone(), Grant { scopes, expires_at: now + *lifetime });
        Ok(Issued { token, expires_in_secs: lifetime.as_secs() })
    }
}

/// Reduces a scope to reading: `repository:NAME:pull,push` becomes `repository:NAME:pull`.
fn read_only(scope: &str) -> Option<String> {
    let (resource, actions) = scope.rsplit_once(':')?;
    let pulls = actions.split(',').any(|action| action == "pull" || action == "*");
    match resource.split_once(':')? {
        ("repository", name) if pulls => Some(format!("repository:{name}:pull")),
        ("registry", "catalog") => Some("registry:catalog:*".to_owned()),
        _ => None,
    }
}

fn challenge(headers: &HeaderMap, scope: Scope<'_>, reason: Option<&str>) -> String {
    // The client reached us under this name, so it will reach `/token` there as well. What is no plain host name would
    // break out of the quotes and is left out: the client then has a relative place, which it may refuse.
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let plain = host.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:[]_".contains(&b));
    let origin = if plain && !host.is_empty() { format!("http://{host}") } else { String::new() };
    let mut text = format!("Bearer realm=\"{origin}/token\",service=\"{SERVICE}\"");
    if let Some(scope) = scope.text() {
        text.push_str(&format!(",scope=\"{scope}\""));
    }
    if let Some(reason) = reason {
        text.push_str(&format!(",error=\"{reason}\""));
    }
    text
}

/// The credentials that a request sends by `scheme`; the scheme's case does not matter.
fn credentials<'a>(headers: &'a HeaderMap, scheme: &str) -> Option<&'a str> {
    let (sent, credentials) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    sent.eq_ignore_ascii_case(scheme).then(|| credentials.trim())
}

fn knows(headers: &HeaderMap, login: &Login) -> bool {
    let Some(sent) = credentials(headers, "basic").and_then(|text| STANDARD.decode(text).ok()) else { return false };
    let expected = format!("{}:{}", login.user, login.password);
    // Hashes are compared, so that the time taken tells nothing about how much of a guess was right.
    Sha256::digest(&sent) == Sha256::digest(expected.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::response::IntoResponse;
    use http::HeaderValue;
    use http::header::WWW_AUTHENTICATE;

    fn headers(authorization: &str) -> HeaderMap {
        let mut headers = HeaderMap::from_iter([(HOST, HeaderValue::from_static("registry.test:5000"))]);
        if !authorization.is_empty() {
            headers.insert(AUTHORIZATION, HeaderValue::from_str(authorization).expect("a header"));
        }
        headers
    }

    fn basic(user: &str, password: &str) -> HeaderMap {
        headers(&format!("Basic {}", STANDARD.encode(format!("{user}:{password}"))))
    }

    fn login() -> Login {
        Login { user: "ann".to_owned(), password: "s3cret".to_owned() }
    }

    fn refused(result: Result<(), Refusal>) -> String {
        let response = result.expect_err("refused").into_response();
        response.headers()[WWW_AUTHENTICATE].to_str().expect("text").to_owned()
    }

    #[test]
    fn a_password_is_asked_for_and_checked() {
        let guard = Guard::new(Auth::Basic(login()));
        assert!(guard.admit(&basic("ann", "s3cret"), Scope::Base).is_ok());
        for headers in [headers(""), basic("ann", "S3cret"), headers("Basic !"), headers("Bearer x"), headers("Basic")]
        {
            assert_eq!(refused(guard.admit(&headers, Scope::Base)), "Basic realm=\"hermes-registry\"");
        }
        assert!(!format!("{:?}", login()).contains("s3cret"));
    }

    #[tokio::test]
    async fn a_token_opens_what_it_was_asked_for() {
        let guard = Guard::new(Auth::Token { login: Some(login()), lifetime: Duration::from_secs(60) });
        let scope = Scope::Repository("library/app");
        assert_eq!(
            refused(guard.admit(&headers(""), scope)),
            "Bearer realm=\"http://registry.test:5000/token\",service=\"hermes-registry\",\
             scope=\"repository:library/app:pull\""
        );
        let wanted = || ["repository:library/app:push,pull", "registry:catalog:*"].into_iter();
        assert!(guard.issue(&headers(""), wanted()).is_err(), "a token without the password");
        let issued = guard.issue(&basic("ann", "s3cret"), wanted()).unwrap_or_else(|_| panic!("the password is right"));
        let token = headers(&format!("bearer {}", issued.token));
        assert!(guard.admit(&token, scope).is_ok());
        assert!(guard.admit(&token, Scope::Catalog).is_ok());
        assert!(guard.admit(&token, Scope::Base).is_ok());
        assert!(refused(guard.admit(&token, Scope::Repository("other"))).contains("insufficient_scope"));
        assert!(refused(guard.admit(&headers("Bearer guess"), scope)).contains("invalid_token"));
    }

    #[tokio::test]
    async fn tokens_run_out_and_are_bounded() {
        let guard = Guard::new(Auth::Token { login: None, lifetime: Duration::ZERO });
        let issued = guard.issue(&headers(""), std::iter::empty()).unwrap_or_else(|_| panic!("everybody gets one"));
        let token = headers(&format!("Bearer {}", issued.token));
        assert!(refused(guard.admit(&token, Scope::Base)).contains("invalid_token"));
        let guard = Guard::new(Auth::Token { login: None, lifetime: Duration::from_secs(60) });
        for _ in 0..MAX_TOKENS + 10 {
            assert!(guard.issue(&headers(""), std::iter::empty()).is_ok());
        }
        assert_eq!(guard.tokens.lock().expect("no panic").len(), MAX_TOKENS);
    }

    #[test]
    fn a_hostile_host_does_not_leave_the_quotes() {
        let mut headers = headers("");
        headers.insert(HOST, HeaderValue::from_static("evil\",error=\"x"));
        let text = challenge(&headers, Scope::Base, None);
        assert_eq!(text, "Bearer realm=\"/token\",service=\"hermes-registry\"");
    }
}
