//! Answers that are no content: errors in the form that the distribution specification gives them.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use serde_json::{Value, json};

/// An error of the distribution specification, with the status that belongs to it. Boxed, as it is returned far less
/// often than what stands beside it in a `Result`.
#[derive(Debug)]
pub(crate) struct Refusal(Box<Inner>);

#[derive(Debug)]
struct Inner {
    status: StatusCode,
    code: &'static str,
    message: String,
    detail: Value,
    headers: HeaderMap,
}

impl Refusal {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        let (message, headers) = (message.into(), HeaderMap::new());
        Self(Box::new(Inner { status, code, message, detail: Value::Null, headers }))
    }

    pub(crate) fn name_unknown(name: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "NAME_UNKNOWN", "there is no repository of this name")
            .detail(json!({ "name": name }))
    }

    pub(crate) fn name_invalid(name: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "NAME_INVALID", "this is not a repository name")
            .detail(json!({ "name": name }))
    }

    pub(crate) fn manifest_unknown(name: &str, reference: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", message)
            .detail(json!({ "name": name, "reference": reference }))
    }

    pub(crate) fn manifest_invalid(reference: &str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message).detail(json!({ "reference": reference }))
    }

    pub(crate) fn blob_unknown(name: &str, digest: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "BLOB_UNKNOWN", "there is no blob of this digest")
            .detail(json!({ "name": name, "digest": digest }))
    }

    pub(crate) fn digest_invalid(digest: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "DIGEST_INVALID", "this is not a sha256 digest")
            .detail(json!({ "digest": digest }))
    }

    pub(crate) fn range_unsatisfiable(len_bytes: u64) -> Self {
        let refusal = Self::new(
            StatusCode::RANGE_NOT_SATISFIABLE,
            "SIZE_INVALID",
            format!("the range lies outside the {len_bytes} bytes of this blob"),
        );
        refusal.header(http::header::CONTENT_RANGE, &format!("bytes */{len_bytes}"))
    }

    pub(crate) fn unauthorized(challenge: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "authentication required")
            .header(http::header::WWW_AUTHENTICATE, challenge)
    }

    pub(crate) fn unsupported(message: &str) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", message).header(http::header::ALLOW, "GET, HEAD")
    }

    pub(crate) fn no_such_place() -> Self {
        Self::new(StatusCode::NOT_FOUND, "UNSUPPORTED", "this registry has no such place")
    }

    pub(crate) fn bad_query(message: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "PAGINATION_NUMBER_INVALID", message)
    }

    /// Something on our side; the reason goes to the log, since it may name files of this machine.
    pub(crate) fn internal(error: &(dyn std::error::Error + 'static)) -> Self {
        tracing::error!(error, "a request failed on the registry's side");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", "the registry could not read its storage")
    }

    fn detail(mut self, detail: Value) -> Self {
        self.0.detail = detail;
        self
    }

    fn header(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.0.headers.insert(name, value);
        }
        self
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Inner { status, code, message, detail, headers } = *self.0;
        let body = json!({ "errors": [{ "code": code, "message": message, "detail": detail }] });
        let mut response = Response::new(Body::from(body.to_string()));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    }
}
