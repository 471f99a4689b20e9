//! The documents: one for who may look, one to sign in. Each is whole in itself, style and script included, so that it is
//! painted after one answer and may load nothing from anywhere.
//!
//! No document holds anything that is not in this binary: data comes later, as data. So the content security policy names
//! the hash of the one style and the one script, and forbids all else, turning text into markup included.

use std::sync::LazyLock;

use axum::http::HeaderValue;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use sha2::{Digest as _, Sha256};

const STYLE: &str = concat!(include_str!("assets/base.css"), include_str!("assets/page.css"));
const SCRIPT: &str = concat!(
    "\"use strict\";\n(() => {\n",
    include_str!("assets/base.js"),
    include_str!("assets/map.js"),
    include_str!("assets/chart.js"),
    include_str!("assets/tables.js"),
    include_str!("assets/main.js"),
    "})();\n"
);
const LOGIN_STYLE: &str = concat!(include_str!("assets/base.css"), include_str!("assets/login.css"));

/// A document with its headers.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) body: Bytes,
    /// What it may load and do.
    pub(super) policy: HeaderValue,
    pub(super) tag: HeaderValue,
}

/// The page.
pub(super) static PAGE: LazyLock<Document> =
    LazyLock::new(|| document(include_str!("assets/page.html"), STYLE, SCRIPT, ""));

/// What the form to sign in says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    Nothing,
    Refused,
    NotAllowed,
    TooMany,
    Unavailable,
}

/// The form to sign in.
pub(super) fn login(notice: Notice) -> Document {
    let text = match notice {
        Notice::Nothing => "",
        Notice::Refused => "This token is not known, or has ended. Get a new one.",
        Notice::NotAllowed => {
            "This token is good, but its owner may not see the page. Ask for the ClusterRole hermes-viewer."
        }
        Notice::TooMany => "Too many tries just now. Wait a few seconds.",
        Notice::Unavailable => "The token cannot be checked now. Try again, or look at the controller's log.",
    };
    document(include_str!("assets/login.html"), LOGIN_STYLE, "", text)
}

fn document(frame: &str, style: &str, script: &str, notice: &str) -> Document {
    let html = frame.replace("{style}", style).replace("{notice}", notice).replace("{script}", script);
    let hash = |text: &str| STANDARD.encode(Sha256::digest(text.as_bytes()));
    let scripts = if script.is_empty() { "'none'".to_owned() } else { format!("'sha256-{}'", hash(script)) };
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src {scripts}; connect-src 'self'; img-src data:; \
         form-action 'self'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
         trusted-types 'none'",
        hash(style)
    );
    let tag = format!("\"{}\"", hash(&html));
    let header = |text: &str| HeaderValue::from_str(text).expect("base64 and the names of directives are plain text");
    Document { policy: header(&policy), tag: header(&tag), body: html.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_load_nothing_and_their_policy_names_what_is_in_them() {
        let (page, login) = (&*PAGE, login(Notice::Refused));
        for document in [page, &login] {
            let html = std::str::from_utf8(&document.body).expect("text");
            let policy = document.policy.to_str().expect("text");
            for (open, close, directive) in
                [("<style>", "</style>", "style-src"), ("<script>", "</script>", "script-src")]
            {
                let Some((_, rest)) = html.split_once(open) else { continue };
                let inner = rest.split_once(close).expect("it is closed").0;
                let named = format!("{directive} 'sha256-{}'", STANDARD.encode(Sha256::digest(inner.as_bytes())));
                assert!(policy.contains(&named), "{policy} does not have {named}");
            }
            for outside in ["http://", "https://", "src=\"/", "@import", "url(", "{style}", "{script}", "{notice}"] {
                let found = html.replace("http://www.w3.org/2000/svg", "").contains(outside);
                assert!(!found, "the document has {outside}");
            }
            for markup in [".innerHTML", ".outerHTML", "insertAdjacentHTML", "document.write", "eval("] {
                assert!(!html.contains(markup), "the document has {markup}");
            }
        }
        assert!(std::str::from_utf8(&login.body).expect("text").contains("is not known"));
    }
}
