//! Requests: who asks, for what, and what is answered.
//!
//! A browser signs in with a form, which puts the token into a cookie that scripts cannot read and that other sites'
//! requests do not carry; a script shows the token itself. Both are reviewed alike with every request ([`super::access`]).

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Extension, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::{get, post};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::access::{Refused, TOKEN_LEN_MAX};
use super::document::{self, Document, Notice};
use super::{PATH, Page, Question, Window};
use crate::api::Caller;

/// The cookie's name. Browsers take this prefix only for cookies of one host that never go in clear (RFC 6265bis).
const COOKIE: &str = "__Host-hermes-status";
/// How long a browser keeps it, in seconds: a working day. The token's own end may come before.
const COOKIE_LIFE_SECONDS: u32 = 8 * 3600;
/// Where one signs in.
const LOGIN: &str = "/status/login";
/// Longest form: a token of which each byte is written with three, and some room.
const FORM_LEN_MAX_BYTES: usize = 3 * TOKEN_LEN_MAX + 1024;
/// What a script shows the token with.
const SCHEME: &str = "Bearer ";

const HTML: HeaderValue = HeaderValue::from_static("text/html; charset=utf-8");
const JSON: HeaderValue = HeaderValue::from_static("application/json");
const BYTES: HeaderValue = HeaderValue::from_static("application/octet-stream");
/// May be kept by the browser, and is asked for again each time.
const ASK_AGAIN: HeaderValue = HeaderValue::from_static("private, no-cache");
const KEEP_NOT: HeaderValue = HeaderValue::from_static("no-store");

/// Who asks: known by how the connection was made, and absent where a test makes none.
type Asker = Option<Extension<Caller>>;

pub(super) fn routes(page: Arc<Page>) -> Router {
    Router::new()
        .route("/", get(async || redirect(PATH)))
        .route(PATH, get(show))
        .route(LOGIN, get(async || form(Notice::Nothing)).post(sign_in))
        .route("/status/logout", post(sign_out))
        .route(
            "/status/api/v1/summary",
            get(async |s: Of, f: Asker, h: HeaderMap| s.data(f, &h, Question::Summary).await),
        )
        .route(
            "/status/api/v1/policies",
            get(async |s: Of, f: Asker, h: HeaderMap| s.data(f, &h, Question::Policies).await),
        )
        .route(
            "/status/api/v1/images",
            get(async |s: Of, f: Asker, h: HeaderMap| s.data(f, &h, Question::Images).await),
        )
        .route("/status/api/v1/nodes", get(async |s: Of, f: Asker, h: HeaderMap| s.data(f, &h, Question::Nodes).await))
        .route("/status/api/v1/map", get(async |s: Of, f: Asker, h: HeaderMap| s.data(f, &h, Question::Map).await))
        .route("/status/api/v1/traffic", get(traffic))
        .layer(DefaultBodyLimit::max(FORM_LEN_MAX_BYTES))
        .with_state(page)
}

type Of = State<Arc<Page>>;

impl Page {
    /// Whether whoever sent `headers` may look. Its connection may then stay for a while.
    async fn admit(&self, from: Asker, headers: &HeaderMap) -> Result<(), Refused> {
        self.gate.admit(token_of(headers).as_ref().map(|token| token.as_str())).await?;
        if let Some(Extension(Caller::Anonymous(recognised))) = from {
            recognised.set();
        }
        Ok(())
    }

    async fn data(&self, from: Asker, headers: &HeaderMap, question: Question) -> Response {
        if let Err(refused) = self.admit(from, headers).await {
            return refusal(refused);
        }
        let answer = self.answer(question);
        if is_known(headers, &answer.tag) {
            return tagged(StatusCode::NOT_MODIFIED, &answer.tag, Body::empty());
        }
        let mut response = tagged(StatusCode::OK, &answer.tag, answer.body.into());
        let kind = if question == Question::Map { BYTES } else { JSON };
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        response
    }
}

#[derive(Debug, Deserialize)]
struct TrafficQuery {
    window: Option<String>,
}

async fn traffic(page: Of, from: Asker, headers: HeaderMap, Query(query): Query<TrafficQuery>) -> Response {
    let wanted = query.window.as_deref();
    match Window::ALL.into_iter().find(|window| wanted.is_none_or(|wanted| wanted == window.name())) {
        Some(window) => {
            let window = if wanted.is_none() { Window::default() } else { window };
            page.data(from, &headers, Question::Traffic(window)).await
        }
        // Whoever may not look is told so first.
        None => match page.admit(from, &headers).await {
            Err(refused) => refusal(refused),
            Ok(()) => problem(StatusCode::BAD_REQUEST, "the window is 1h, 6h or 24h"),
        },
    }
}

async fn show(page: Of, from: Asker, headers: HeaderMap) -> Response {
    match page.admit(from, &headers).await {
        Ok(()) if is_known(&headers, &document::PAGE.tag) => {
            tagged(StatusCode::NOT_MODIFIED, &document::PAGE.tag, Body::empty())
        }
        Ok(()) => {
            let mut response = html(StatusCode::OK, &document::PAGE, ASK_AGAIN);
            response.headers_mut().insert(header::ETAG, document::PAGE.tag.clone());
            response
        }
        Err(refused @ (Refused::TooMany | Refused::Unavailable)) => refusal(refused),
        Err(refused) if headers.contains_key(header::AUTHORIZATION) => refusal(refused),
        Err(_) => redirect(LOGIN),
    }
}

fn form(notice: Notice) -> Response {
    let status = match notice {
        Notice::Nothing => StatusCode::OK,
        Notice::Refused => StatusCode::UNAUTHORIZED,
        Notice::NotAllowed => StatusCode::FORBIDDEN,
        Notice::TooMany => StatusCode::TOO_MANY_REQUESTS,
        Notice::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
    };
    html(status, &document::login(notice), KEEP_NOT)
}

async fn sign_in(page: Of, from: Asker, headers: HeaderMap, body: Bytes) -> Response {
    if is_from_elsewhere(&headers) {
        return problem(StatusCode::FORBIDDEN, "sign in on the page itself");
    }
    let token = field(&body, b"token").unwrap_or_default();
    let token = token.trim();
    let token = token.strip_prefix(SCHEME).unwrap_or(token);
    // The form may be signed with by whoever has been shown the page, too.
    let mut shown = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_str(&Zeroizing::new(format!("{SCHEME}{token}"))) {
        shown.insert(header::AUTHORIZATION, value);
    }
    match page.admit(from, &shown).await {
        Ok(()) => with_cookie(redirect(PATH), &URL_SAFE_NO_PAD.encode(token), COOKIE_LIFE_SECONDS),
        Err(Refused::Nothing | Refused::Token) => form(Notice::Refused),
        Err(Refused::NotAllowed) => form(Notice::NotAllowed),
        Err(Refused::TooMany) => form(Notice::TooMany),
        Err(Refused::Unavailable) => form(Notice::Unavailable),
    }
}

async fn sign_out(headers: HeaderMap) -> Response {
    if is_from_elsewhere(&headers) {
        return problem(StatusCode::FORBIDDEN, "sign out on the page itself");
    }
    with_cookie(redirect(LOGIN), "", 0)
}

/// Whether a browser says that another site has sent this.
fn is_from_elsewhere(headers: &HeaderMap) -> bool {
    headers.get("sec-fetch-site").is_some_and(|site| site != "same-origin" && site != "none")
}

fn token_of(headers: &HeaderMap) -> Option<Zeroizing<String>> {
    if let Some(shown) = headers.get(header::AUTHORIZATION) {
        return Some(Zeroizing::new(shown.to_str().ok()?.strip_prefix(SCHEME)?.trim().to_owned()));
    }
    let cookies = headers.get_all(header::COOKIE).iter().filter_map(|value| value.to_str().ok());
    let mut pairs = cookies.flat_map(|value| value.split(';')).filter_map(|pair| pair.trim().split_once('='));
    let (_, value) = pairs.find(|(name, _)| *name == COOKIE)?;
    String::from_utf8(URL_SAFE_NO_PAD.decode(value).ok()?).ok().map(Zeroizing::new)
}

/// The field `name` of a form (`application/x-www-form-urlencoded`), if it is text.
fn field(body: &[u8], name: &[u8]) -> Option<Zeroizing<String>> {
    let mut pairs = body.split(|byte| *byte == b'&');
    let value = pairs.find_map(|pair| pair.strip_prefix(name)?.strip_prefix(b"="))?;
    let mut plain = Zeroizing::new(Vec::with_capacity(value.len()));
    let mut rest = value;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'+' => plain.push(b' '),
            b'%' => {
                let (digits, after) = rest.split_first_chunk::<2>()?;
                plain.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
                rest = after;
            }
            byte => plain.push(*byte),
        }
    }
    std::str::from_utf8(&plain).ok().map(|text| Zeroizing::new(text.to_owned()))
}

fn is_known(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    let Ok(tag) = tag.to_str() else { return false };
    let known = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    known.flat_map(|value| value.split(',')).any(|known| known.trim().trim_start_matches("W/") == tag)
}

fn tagged(status: StatusCode, tag: &HeaderValue, body: Body) -> Response {
    let mut response = sealed(status, body, ASK_AGAIN);
    response.headers_mut().insert(header::ETAG, tag.clone());
    response
}

fn html(status: StatusCode, document: &Document, cache: HeaderValue) -> Response {
    let mut response = sealed(status, document.body.clone().into(), cache);
    response.headers_mut().insert(header::CONTENT_TYPE, HTML);
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, document.policy.clone());
    response
}

fn redirect(to: &'static str) -> Response {
    let mut response = sealed(StatusCode::SEE_OTHER, Body::empty(), KEEP_NOT);
    response.headers_mut().insert(header::LOCATION, HeaderValue::from_static(to));
    response
}

fn with_cookie(mut response: Response, value: &str, life_seconds: u32) -> Response {
    let cookie = format!("{COOKIE}={value}; Path=/; Max-Age={life_seconds}; Secure; HttpOnly; SameSite=Strict");
    let cookie = HeaderValue::from_str(&cookie).expect("base64 may stand in a header");
    response.headers_mut().insert(header::SET_COOKIE, cookie);
    response
}

fn refusal(refused: Refused) -> Response {
    let (status, message) = match refused {
        Refused::Nothing => (StatusCode::UNAUTHORIZED, "show a token: Authorization: Bearer TOKEN"),
        Refused::Token => (StatusCode::UNAUTHORIZED, "the token is not known or has ended; get a new one"),
        Refused::NotAllowed => {
            (StatusCode::FORBIDDEN, "the token's owner may not get /status; bind hermes-viewer to it")
        }
        Refused::TooMany => (StatusCode::TOO_MANY_REQUESTS, "too many requests; ask again later"),
        Refused::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "the token cannot be checked now; ask again"),
    };
    let mut response = problem(status, message);
    match status {
        StatusCode::UNAUTHORIZED => {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
        }
        _ => {}
    }
    response
}

fn problem(status: StatusCode, message: &str) -> Response {
    let mut response = sealed(status, serde_json::json!({ "error": message }).to_string().into(), KEEP_NOT);
    response.headers_mut().insert(header::CONTENT_TYPE, JSON);
    response
}

/// An answer that no other site can read, frame or guess the kind of.
fn sealed(status: StatusCode, body: Body, cache: HeaderValue) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, cache);
    headers.insert(header::VARY, HeaderValue::from_static("authorization, cookie"));
    for (name, value) in [
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-opener-policy", "same-origin"),
        ("cross-origin-resource-policy", "same-origin"),
    ] {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_read_as_browsers_write_them() {
        let read = |body: &[u8]| field(body, b"token").map(|text| text.to_string());
        assert_eq!(read(b"token=abc"), Some("abc".to_owned()));
        assert_eq!(read(b"x=1&token=a%2Bb+c%0A&y="), Some("a+b c\n".to_owned()));
        assert_eq!(read(b"token="), Some(String::new()));
        for wrong in [b"".as_slice(), b"tokens=abc", b"token=%", b"token=%4", b"token=%zz", b"token=%ff"] {
            assert_eq!(read(wrong), None, "{}", wrong.escape_ascii());
        }
    }

    #[test]
    fn a_token_is_read_from_the_header_or_else_the_cookie() {
        let token = |name: HeaderName, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_str(value).expect("a header"));
            token_of(&headers).map(|token| token.to_string())
        };
        assert_eq!(token(header::AUTHORIZATION, "Bearer abc"), Some("abc".to_owned()));
        assert_eq!(token(header::AUTHORIZATION, "Basic abc"), None);
        let cookie = format!("a=b; {COOKIE}={}; c=d", URL_SAFE_NO_PAD.encode("t;o k"));
        assert_eq!(token(header::COOKIE, &cookie), Some("t;o k".to_owned()));
        assert_eq!(token(header::COOKIE, &format!("{COOKIE}=**")), None);
        assert_eq!(token(header::COOKIE, "other=x"), None);
    }
}
