//! The page's routes, as a browser and a script use them.

use std::collections::{BTreeMap, BTreeSet};

use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, Request, StatusCode, header};
use axum::response::Response;
use futures::future::BoxFuture;
use hermes_image::access::Access;
use hermes_image::ids::Digest;
use serde_json::Value;
use tower::Service as _;

use super::*;
use crate::api::numbers::Refusal;
use crate::api::review::ReviewError;
use crate::crd::{HermesPolicySpec, HermesPolicyStatus, PolicyImage, PolicyImagePhase};
use crate::event::{
    Action, Audience as _, Event, Failure, FailureClass, ImageKey, ImageView, Name, NodeReport, Phase, Policy, Traffic,
    UnixMillis,
};

/// Longest answer of these tests.
const ANSWER_MAX: usize = 16 << 20;
const DATA: [&str; 6] = ["summary", "policies", "images", "nodes", "map", "traffic"];

/// Lets `good` look, and knows `other`, who may not.
#[derive(Debug)]
struct Words;

impl Viewers for Words {
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<(), ReviewError>> {
        Box::pin(async move {
            match token {
                "good" => Ok(()),
                "other" => Err(ReviewError::refused(Refusal::NotAllowed, "may not")),
                _ => Err(ReviewError::refused(Refusal::UnknownToken, "unknown")),
            }
        })
    }
}

struct Stage {
    board: Arc<Board>,
    numbers: Arc<Numbers>,
    page: Arc<Page>,
}

impl Stage {
    fn new() -> Self {
        let (board, numbers) = (Arc::new(Board::new(clock::now())), Arc::new(Numbers::default()));
        let page = Arc::new(Page::new("prod", Arc::clone(&board), Arc::new(Words), Arc::clone(&numbers)));
        Self { board, numbers, page }
    }

    async fn send(&self, request: Request<Body>) -> Response {
        Arc::clone(&self.page).routes().call(request).await.expect("routes never fail")
    }

    async fn get(&self, path: &str, headers: &[(header::HeaderName, &str)]) -> Response {
        let mut request = Request::get(path);
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        self.send(request.body(Body::empty()).expect("a request")).await
    }

    async fn json(&self, what: &str) -> Value {
        let response = self.get(&format!("/status/api/v1/{what}"), &[(header::AUTHORIZATION, "Bearer good")]).await;
        assert_eq!(response.status(), StatusCode::OK, "{what}");
        serde_json::from_slice(&body(response).await).expect("JSON")
    }

    async fn sign_in(&self, form: &str, site: &str) -> Response {
        let request = Request::post("/status/login").header("sec-fetch-site", site);
        self.send(request.body(Body::from(form.to_owned())).expect("a request")).await
    }
}

async fn body(response: Response) -> Bytes {
    to_bytes(response.into_body(), ANSWER_MAX).await.expect("a body")
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> String {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}

fn image(number: u32, name: &str) -> Arc<ImageView> {
    let mut manifest = [0x5a; 32];
    manifest[..4].copy_from_slice(&number.to_be_bytes());
    let name = Name { reference: name.to_owned(), platform: "linux/amd64".to_owned() };
    Arc::new(ImageView {
        image: ImageKey { manifest: Digest(manifest) },
        names: BTreeSet::from([name]),
        policies: BTreeSet::from(["all".to_owned()]),
        phase: Phase::Failed,
        failure: Some(Failure {
            class: FailureClass::Denied,
            reason: "AccessDenied",
            message: "log in".to_owned(),
            retry_after: None,
        }),
        attempts: 3,
        next_attempt: None,
        image_len_bytes: u64::MAX,
        read_bytes: 0,
        since: UnixMillis(0),
        index: None,
        access: Access::Private,
        profile: None,
        seeds: BTreeMap::new(),
    })
}

fn report(node: &str, held: &[(&ImageView, u8)], traffic: Traffic) -> Event {
    let images = held.iter().map(|(view, percent)| (view.image.manifest, *percent)).collect();
    let report = NodeReport { images, traffic: Some(traffic), ..NodeReport::default() };
    Event::Reported { node: node.to_owned(), report }
}

#[tokio::test]
async fn without_a_good_token_there_is_the_form_and_nothing_else() {
    let stage = Stage::new();
    stage.board.hear(&Action::Publish(image(1, "secret.example/app:1")));
    let shown = [None, Some("Bearer wrong"), Some("Bearer other"), Some("Basic good"), Some("Bearer ")];
    for authorization in shown {
        for what in DATA {
            let headers: Vec<_> = authorization.iter().map(|value| (header::AUTHORIZATION, *value)).collect();
            let response = stage.get(&format!("/status/api/v1/{what}"), &headers).await;
            let expected = if authorization == Some("Bearer other") { 403 } else { 401 };
            assert!([expected, 429].contains(&response.status().as_u16()), "{what} for {authorization:?}");
            assert_eq!(response.headers().get(header::ETAG), None);
            assert!(!body(response).await.windows(6).any(|part| part == b"secret"));
        }
    }
    let response = stage.get("/status", &[]).await;
    assert_eq!(
        (response.status().as_u16(), text(response.headers(), header::LOCATION)),
        (303, "/status/login".to_owned())
    );
    let response = stage.get("/status/login", &[]).await;
    assert_eq!(response.status(), StatusCode::OK);
    for counted in [Refusal::NoToken, Refusal::UnknownToken, Refusal::NotAllowed] {
        assert!(stage.numbers.refusals(counted) > 0, "{counted:?} is not counted");
    }
}

#[tokio::test]
async fn who_signs_in_gets_a_cookie_that_only_this_host_sees() {
    let stage = Stage::new();
    let response = stage.sign_in("token=Bearer+good%0A", "same-origin").await;
    assert_eq!(response.status(), StatusCode::SEE_OTHER);
    let cookie = text(response.headers(), header::SET_COOKIE);
    for attribute in ["__Host-hermes-status=", "; Path=/;", "Max-Age=28800", "Secure", "HttpOnly", "SameSite=Strict"] {
        assert!(cookie.contains(attribute), "{cookie} has no {attribute}");
    }
    assert!(!cookie.contains("Domain"), "{cookie}");
    let pair = cookie.split(';').next().expect("a pair").to_owned();
    let response = stage.get("/status", &[(header::COOKIE, &pair)]).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(stage.get("/status/api/v1/nodes", &[(header::COOKIE, &pair)]).await.status(), StatusCode::OK);
    for (form, status) in [("token=wrong", 401), ("token=other", 403), ("token=", 401), ("", 401), ("token=%ff", 401)] {
        let response = stage.sign_in(form, "same-origin").await;
        assert_eq!(response.status().as_u16(), status, "{form}");
        assert_eq!(response.headers().get(header::SET_COOKIE), None, "{form}");
    }
    assert_eq!(stage.sign_in("token=good", "cross-site").await.status(), StatusCode::FORBIDDEN);
    assert_eq!(stage.sign_in(&format!("token={}", "x".repeat(20_000)), "none").await.status().as_u16(), 413);
    let out = Request::post("/status/logout").body(Body::empty()).expect("a request");
    let cookie = text(stage.send(out).await.headers(), header::SET_COOKIE);
    assert!(cookie.starts_with("__Host-hermes-status=;") && cookie.contains("Max-Age=0"), "{cookie}");
}

#[tokio::test]
async fn every_answer_is_sealed_and_documents_have_their_policy() {
    let stage = Stage::new();
    let good = (header::AUTHORIZATION, "Bearer good");
    for path in ["/", "/status", "/status/login", "/status/api/v1/map", "/status/api/v1/traffic?window=2h"] {
        let response = stage.get(path, std::slice::from_ref(&good)).await;
        let headers = response.headers();
        for (name, value) in
            [("x-content-type-options", "nosniff"), ("x-frame-options", "DENY"), ("referrer-policy", "no-referrer")]
        {
            assert_eq!(headers.get(name).and_then(|value| value.to_str().ok()), Some(value), "{path}");
        }
        let cache = text(headers, header::CACHE_CONTROL);
        assert!(cache == "private, no-cache" || cache == "no-store", "{path}: {cache}");
        let is_document = text(headers, header::CONTENT_TYPE).starts_with("text/html");
        let policy = text(headers, header::CONTENT_SECURITY_POLICY);
        assert_eq!(is_document, policy.starts_with("default-src 'none'"), "{path}: {policy}");
        assert!(!policy.contains("unsafe"), "{policy}");
    }
    assert_eq!(stage.get("/status/api/v1/traffic?window=2h", &[good]).await.status(), StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn what_has_not_changed_is_not_sent_again() {
    let stage = Stage::new();
    let good = (header::AUTHORIZATION, "Bearer good");
    for what in DATA {
        let path = format!("/status/api/v1/{what}");
        let tag = text(stage.get(&path, std::slice::from_ref(&good)).await.headers(), header::ETAG);
        let known = [good.clone(), (header::IF_NONE_MATCH, tag.as_str())];
        let response = stage.get(&path, &known).await;
        assert_eq!(
            (response.status(), text(response.headers(), header::ETAG)),
            (StatusCode::NOT_MODIFIED, tag.clone())
        );
        assert!(body(response).await.is_empty());
        let other = format!("\"x\", W/{tag}");
        let several = [good.clone(), (header::IF_NONE_MATCH, other.as_str())];
        assert_eq!(stage.get(&path, &several).await.status(), StatusCode::NOT_MODIFIED);
        let view = image(7, "app:1");
        stage.board.hear(&Action::Publish(Arc::clone(&view)));
        stage.board.learn(&Event::Policy(Policy {
            name: "p".to_owned(),
            generation: 1,
            spec: HermesPolicySpec::default(),
        }));
        let traffic = |bytes| Traffic { run: 1, from_peers: bytes, ..Traffic::default() };
        stage.board.learn(&report("node", &[(&view, 5)], traffic(1)));
        stage.board.learn(&report("node", &[(&view, 6)], traffic(u64::from(u32::MAX))));
        let end = Instant::now() + Duration::from_secs(30);
        while stage.get(&path, &known).await.status() == StatusCode::NOT_MODIFIED {
            assert!(Instant::now() < end, "{what} is not sent anew");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        stage.board.hear(&Action::Withdraw(view.image.clone()));
        stage.board.learn(&Event::PolicyGone("p".to_owned()));
    }
}

#[tokio::test]
async fn the_map_has_a_byte_for_each_cell_in_the_order_of_the_lists() {
    let stage = Stage::new();
    let views: Vec<_> = (0..200).map(|number| image(number, &format!("registry.example/app-{number:03}:1"))).collect();
    for view in views.iter().rev() {
        stage.board.hear(&Action::Publish(Arc::clone(view)));
    }
    for node in 0..2000 {
        let held: Vec<_> = views.iter().enumerate().filter(|(at, _)| at % 2 == node % 2).collect();
        let held: Vec<_> = held.iter().map(|(at, view)| (view.as_ref(), (at + node) as u8 % 101)).collect();
        stage.board.learn(&report(&format!("node-{node:04}"), &held, Traffic::default()));
    }
    let response = stage.get("/status/api/v1/map", &[(header::AUTHORIZATION, "Bearer good")]).await;
    let map = body(response).await;
    assert_eq!(map.len(), 32 + 2000 * 200);
    let (images, nodes) = (stage.json("images").await, stage.json("nodes").await);
    let order = |at: usize| u64::from_le_bytes(map[at..at + 8].try_into().expect("eight bytes"));
    assert_eq!((Some(order(8)), Some(order(16))), (nodes["order"].as_u64(), images["order"].as_u64()));
    assert_eq!((&map[..5], &map[24..32]), (b"HMAP\x01".as_slice(), [208, 7, 0, 0, 200, 0, 0, 0].as_slice()));
    for (node, column) in [(0, 0), (0, 1), (1, 1), (1999, 199), (1234, 56)] {
        assert_eq!(nodes["rows"][node][0], format!("node-{node:04}"));
        assert_eq!(images["images"][column]["names"][0], format!("registry.example/app-{column:03}:1"));
        let expected = if node % 2 == column % 2 { (column + node) as u8 % 101 } else { 255 };
        assert_eq!(map[32 + node * 200 + column], expected, "node {node}, image {column}");
    }
}

#[tokio::test]
async fn bytes_are_summed_over_nodes_and_what_is_saved_may_be_less_than_nothing() {
    let stage = Stage::new();
    let traffic =
        |run, read, registries| Traffic { run, read_at_once: read, from_registries: registries, ..Traffic::default() };
    for (node, run, read, registries) in [
        ("a", 1, 100, 1000),
        ("b", 2, 0, 0),
        ("a", 1, 150, 1300),
        ("b", 2, 70, 10),
        // Its daemon was started again.
        ("a", 3, 5, 40),
    ] {
        stage.board.learn(&report(node, &[], traffic(run, read, registries)));
    }
    let summary = stage.json("summary").await;
    assert_eq!(summary["traffic"]["total"]["fromRegistries"], 300 + 10 + 40);
    assert_eq!(summary["traffic"]["total"]["readAtOnce"], 50 + 70 + 5);
    assert_eq!(summary["traffic"]["registryBytesSaved"], 125 - 350);
    let curve = stage.json("traffic?window=1h").await;
    let points = curve["bytes"]["fromRegistries"].as_array().expect("a list");
    assert_eq!((points.len(), curve["stepSeconds"].as_u64()), (60, Some(60)));
    assert_eq!(points.iter().filter_map(Value::as_u64).sum::<u64>(), 350);
}

#[tokio::test]
async fn images_say_why_and_names_that_mean_nothing_are_listed() {
    let stage = Stage::new();
    let view = image(1, "registry.example/<b>app</b>:1");
    stage.board.hear(&Action::Publish(Arc::clone(&view)));
    let failed = |reference: String, error: &str| PolicyImage {
        image_digest_ref: reference,
        platform: "linux/amd64".to_owned(),
        phase: PolicyImagePhase::Failed,
        last_build_time: None,
        error: Some(error.to_owned()),
    };
    let images = vec![
        failed(format!("registry.example/app@{}", view.image.manifest), "AccessDenied: log in"),
        failed("<img src=x>".to_owned(), "NameInvalid: no name"),
    ];
    let status = HermesPolicyStatus { failed: 2, images, ..HermesPolicyStatus::default() };
    stage.board.hear(&Action::PolicyStatus { policy: "all".to_owned(), status });
    let answer = stage.json("images").await;
    let row = &answer["images"][0];
    assert_eq!((row["phase"].as_str(), row["reason"].as_str()), (Some("Failed"), Some("AccessDenied")));
    assert_eq!((row["names"][0].as_str(), row["attempts"].as_u64()), (Some("registry.example/<b>app</b>:1"), Some(3)));
    assert_eq!(row["imageBytes"].as_u64(), Some((1 << 53) - 1), "no larger than a browser can count");
    assert_eq!(answer["unresolved"].as_array().map(Vec::len), Some(1), "{answer}");
    assert_eq!(answer["unresolved"][0]["name"], "<img src=x>");
    let summary = stage.json("summary").await;
    assert_eq!(
        (summary["images"]["phases"]["Failed"].as_u64(), summary["images"]["unresolved"].as_u64()),
        (Some(1), Some(1))
    );
}
