//! Logins and tokens.

use std::time::Duration;

use hermes_image::access::Access;
use hermes_registry::{Auth, Login};
use http::header::WWW_AUTHENTICATE;
use tokio::time::Instant;

use super::harness::{Fault, MakeFault, Rig, amd64, assert_complete, collect, ramp, soon};
use crate::{ErrorClass, OriginClient, OriginError, ResolvedImage, Timeouts};

fn login() -> Login {
    Login { user: "ann".to_owned(), password: "s3cret".to_owned() }
}

fn token(login: Option<Login>) -> Auth {
    Auth::Token { login, lifetime: Duration::from_secs(60) }
}

const RIGHT: &str = r#"{"username":"ann","password":"s3cret"}"#;
const WRONG: &str = r#"{"username":"ann","password":"gu3ss"}"#;

async fn resolve(rig: &Rig) -> Result<ResolvedImage, OriginError> {
    let client = rig.client(Timeouts::default());
    client.open(&rig.source()).await?.resolve(&amd64(), soon()).await
}

#[tokio::test]
async fn each_kind_of_login_gets_in() {
    let cases = [
        (token(None), "{}"),
        (token(Some(login())), RIGHT),
        (token(Some(login())), r#"{"auth":"YW5uOnMzY3JldA=="}"#),
        (Auth::Basic(login()), RIGHT),
    ];
    for (auth, entry) in cases {
        let rig = Rig::new(auth.clone()).await;
        rig.store_login(entry);
        let image = resolve(&rig).await.unwrap_or_else(|error| panic!("{auth:?}: {error}"));
        assert_eq!(image.manifest_digest, rig.manifest);
        // One refusal tells what is wanted; from then on every request has it.
        let refused =
            rig.server.seen().iter().filter(|seen| seen.authorization.is_none() && seen.path != "/token").count();
        let tokens = usize::from(matches!(auth, Auth::Token { login: None, .. }));
        assert!(refused <= 1 + tokens, "{auth:?}: {refused} requests without a login");
    }
}

#[tokio::test]
async fn a_wrong_login_is_denied_and_named_without_its_secret() {
    for auth in [token(Some(login())), Auth::Basic(login())] {
        let rig = Rig::new(auth.clone()).await;
        for (entry, who) in [(WRONG, "with the login of 'ann' from"), ("{}", "without a login, as")] {
            rig.store_login(entry);
            rig.server.seen();
            let error = resolve(&rig).await.expect_err("refused");
            assert_eq!((error.class(), error.kind()), (ErrorClass::Denied, "denied"), "{auth:?}: {error}");
            assert_complete(&error, &rig.image(), None, &rig.server.address.to_string());
            let text = format!("{error} {error:?}");
            assert!(text.contains(who) && text.contains(&rig.logins().display().to_string()), "{text}");
            assert!(!text.contains("gu3ss"), "{text}");
            assert!(rig.server.seen().len() <= 3, "refused for good means not asked again");
        }
    }
}

#[tokio::test]
async fn a_refused_token_is_renewed_once() {
    let rig = Rig::new(token(None)).await;
    let (client, origin, layer) = rig.opened(Timeouts::default()).await;
    let before = client.counters();
    // The server forgets the token, as after a restart.
    rig.server.plan_blobs(|count| match count {
        0 => Fault::status(401),
        _ => Fault::Pass,
    });
    let part = collect(origin.read(&layer, 0..10, soon())).await.unwrap_or_else(|error| panic!("{error}"));
    assert!(part == ramp()[..10]);
    assert_eq!(client.counters().token_requests - before.token_requests, 1);

    for status in [401, 403] {
        rig.server.seen();
        rig.server.plan_blobs(move |_| Fault::status(status));
        let error = collect(origin.read(&layer, 0..10, soon())).await.expect_err("refused for ever");
        assert_eq!(error.class(), ErrorClass::Denied);
        assert_complete(&error, &rig.image(), Some(&layer), &rig.server.address.to_string());
        let seen = rig.server.seen();
        let blobs = seen.iter().filter(|seen| seen.is_blob()).count();
        assert_eq!((blobs, seen.len()), (2, 3), "{status}: twice with one renewal between: {seen:?}");
    }
}

#[tokio::test]
async fn a_token_that_has_ended_is_renewed_before_it_is_refused() {
    // A token that ends the moment it comes, and a registry that takes it all the same: the client renews it before
    // each request, and is never refused but for the very first one.
    let rig = Rig::new(token(None)).await;
    rig.server.plan(|seen| match seen.authorization.as_deref() {
        Some("Bearer brief") => Fault::status(404),
        _ if seen.path.starts_with("/token") => {
            Fault::Answer(http::StatusCode::OK, Vec::new(), r#"{"token":"brief","expires_in":0}"#.to_owned())
        }
        _ => Fault::Pass,
    });
    let origin = rig.client(Timeouts::default()).open(&rig.source()).await.expect("an origin");
    for expected in [["/v2/", "/tok", "/v2/"].as_slice(), ["/tok", "/v2/"].as_slice()] {
        let error = origin.resolve(&amd64(), soon()).await.expect_err("the plan says so");
        assert_eq!(error.kind(), "not_found", "{error}");
        let seen = rig.server.seen();
        let mut starts: Vec<&str> = seen.iter().map(|seen| &seen.path[..4]).collect();
        starts.dedup();
        assert_eq!(starts, expected, "{seen:?}");
    }
}

#[tokio::test]
async fn many_at_once_fetch_one_token() {
    let rig = Rig::new(token(None)).await;
    let layer = rig.opened(Timeouts::default()).await.2;
    let client = rig.client(Timeouts::default());
    let origin = client.open(&rig.source()).await.expect("an origin");
    let reads = (0..16_u64).map(|at| collect(origin.read(&layer, at..at + 10, soon())));
    for (at, part) in futures::future::join_all(reads).await.into_iter().enumerate() {
        assert!(part.unwrap_or_else(|error| panic!("{error}")) == ramp()[at..at + 10]);
    }
    assert_eq!(client.counters().token_requests, 1);
}

#[tokio::test]
async fn a_login_that_is_renewed_on_the_disk_is_used() {
    let rig = Rig::new(Auth::Basic(login())).await;
    rig.store_login(WRONG);
    let client = rig.client(Timeouts::default());
    let origin = client.open(&rig.source()).await.expect("an origin");
    assert_eq!(origin.resolve(&amd64(), soon()).await.expect_err("wrong").class(), ErrorClass::Denied);
    rig.store_login(RIGHT);
    origin.resolve(&amd64(), soon()).await.unwrap_or_else(|error| panic!("{error}"));
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let rig = Rig::new(token(None)).await;
    rig.store_login(r#"{"auth":"PHRva2VuPjo=","identitytoken":"r3fresh"}"#);
    rig.server.plan(|seen| match (seen.path.as_str(), seen.authorization.as_deref()) {
        // Only a POST comes without a query.
        ("/token", None) => {
            Fault::Answer(http::StatusCode::OK, Vec::new(), r#"{"access_token":"exchanged"}"#.to_owned())
        }
        (_, Some("Bearer exchanged")) => Fault::status(404),
        _ => Fault::Pass,
    });
    let error = resolve(&rig).await.expect_err("the plan says so");
    assert_eq!(error.kind(), "not_found", "the exchanged token was used: {error}");
}

#[tokio::test]
async fn an_access_token_is_used_as_it_is() {
    let rig = Rig::new(token(None)).await;
    rig.store_login(r#"{"registrytoken":"r3ady"}"#);
    let error = resolve(&rig).await.expect_err("the registry never gave this token");
    assert_eq!(error.class(), ErrorClass::Denied);
    let used: Vec<_> = rig.server.seen().into_iter().filter_map(|seen| seen.authorization).collect();
    assert_eq!(used, ["Bearer r3ady"]);
    assert!(!format!("{error} {error:?}").contains("r3ady"));
}

#[tokio::test]
async fn token_services_that_fail_are_named() {
    let rig = Rig::new(token(None)).await;
    let cases: [(MakeFault, ErrorClass, &str); 5] = [
        (|| Fault::status(503), ErrorClass::Transient, "throttled"),
        (|| Fault::status(500), ErrorClass::Transient, "server"),
        (|| Fault::status(403), ErrorClass::Denied, "denied"),
        (|| Fault::Answer(http::StatusCode::OK, Vec::new(), "{}".to_owned()), ErrorClass::PeerFault, "malformed"),
        (|| Fault::CutAfter(3), ErrorClass::Transient, "truncated"),
    ];
    for (fault, class, kind) in cases {
        rig.server.plan(move |seen| if seen.path.starts_with("/token") { fault() } else { Fault::Pass });
        let error = resolve(&rig).await.expect_err(kind);
        assert_eq!((error.class(), error.kind()), (class, kind), "{error}");
        assert_complete(&error, &rig.image(), None, &rig.server.address.to_string());
    }
    rig.server.plan(|seen| if seen.path.starts_with("/token") { Fault::HangBeforeHeaders } else { Fault::Pass });
    let origin = rig.client(Timeouts::default()).open(&rig.source()).await.expect("an origin");
    let begun = Instant::now();
    let deadline = begun + Duration::from_millis(300);
    // The second one waits for the first one's renewal, and must not wait longer either.
    let platform = amd64();
    let both = tokio::join!(origin.resolve(&platform, deadline), origin.resolve(&platform, deadline));
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    for result in [both.0, both.1] {
        assert_eq!(result.expect_err("late").kind(), "timeout");
    }
}

#[tokio::test]
async fn challenges_that_cannot_be_met_are_refused() {
    let rig = Rig::new(Auth::Open).await;
    for challenge in ["Bearer realm=\"ftp://auth.test/\"", "Bearer realm=\"/token\""] {
        rig.server.plan(move |_| Fault::status(401).with(WWW_AUTHENTICATE, challenge));
        let error = resolve(&rig).await.expect_err("no way to a token");
        assert_eq!((error.class(), error.kind()), (ErrorClass::PeerFault, "bad_challenge"), "{error}");
        assert_complete(&error, &rig.image(), None, &rig.server.address.to_string());
    }
    rig.server.plan(|_| Fault::status(401).with(WWW_AUTHENTICATE, "Negotiate"));
    assert_eq!(resolve(&rig).await.expect_err("unknown scheme").class(), ErrorClass::Denied);
}

#[tokio::test]
async fn a_provider_that_fails_is_named_and_does_not_stop_the_next() {
    // Without a login the image may be had all the same.
    let open = Rig::new(token(None)).await;
    std::fs::write(open.logins(), "{").expect("written");
    resolve(&open).await.unwrap_or_else(|error| panic!("{error}"));
    // Else the error says why there was none.
    let closed = Rig::new(token(Some(login()))).await;
    std::fs::write(closed.logins(), "{").expect("written");
    let error = resolve(&closed).await.expect_err("a broken file");
    assert_eq!((error.class(), error.kind()), (ErrorClass::Denied, "denied"));
    assert_complete(&error, &closed.image(), None, &closed.server.address.to_string());
    let text = error.to_string();
    assert!(text.contains("malformed") && text.contains(&closed.logins().display().to_string()), "{text}");
}

#[tokio::test]
async fn the_next_login_is_tried_when_one_is_refused() {
    for auth in [token(Some(login())), Auth::Basic(login())] {
        let rig = Rig::new(auth.clone()).await;
        let secrets = rig.folder.path().join("secrets");
        std::fs::create_dir(&secrets).expect("made");
        let document = format!(r#"{{"auths":{{"{}":{WRONG}}}}}"#, rig.server.address);
        std::fs::write(secrets.join("team"), document).expect("written");
        rig.store_login(RIGHT);
        let mut config = rig.config(Timeouts::default());
        config.credentials.pull_secret_folders.push(secrets);
        let origin = OriginClient::new(config).expect("a client").open(&rig.source()).await.expect("an origin");
        origin.resolve(&amd64(), soon()).await.unwrap_or_else(|error| panic!("{auth:?}: {error}"));
        // From now on the right one is used at once.
        rig.server.seen();
        let image = origin.resolve(&amd64(), soon()).await.unwrap_or_else(|error| panic!("{auth:?}: {error}"));
        assert_eq!(rig.server.seen().len(), 3, "index, manifest, configuration");
        assert_eq!(image.manifest_digest, rig.manifest);
    }
}

#[tokio::test]
async fn an_authorization_is_used_until_its_end_when_it_cannot_be_renewed_early() {
    // Tokens are renewed a fifth of their life before they end: at once here, by the second one's time.
    let rig = Rig::new(token(None)).await;
    let mut tokens = 0;
    rig.server.plan(move |seen| match (seen.path.starts_with("/token"), seen.authorization.as_deref()) {
        (true, _) => {
            tokens += 1;
            match tokens {
                1 => Fault::Answer(http::StatusCode::OK, Vec::new(), r#"{"token":"a","expires_in":2}"#.to_owned()),
                _ => Fault::status(503),
            }
        }
        (false, Some("Bearer a")) => Fault::status(404),
        _ => Fault::Pass,
    });
    let origin = rig.client(Timeouts::default()).open(&rig.source()).await.expect("an origin");
    let kind = async || origin.resolve(&amd64(), soon()).await.expect_err("the plan says so").kind();
    assert_eq!(kind().await, "not_found");
    let begun = Instant::now();
    // Past the time to renew, before the end: the old one is still sent.
    while rig.server.seen().iter().all(|seen| !seen.path.starts_with("/token")) {
        assert!(begun.elapsed() < Duration::from_secs(30), "never renewed");
        let kind = kind().await;
        assert!(kind == "not_found" || begun.elapsed() >= Duration::from_secs(2), "{kind}");
    }
}

#[tokio::test]
async fn an_image_is_private_when_it_was_given_for_a_login() {
    let cases = [
        (Auth::Open, RIGHT, Access::Public),
        (token(None), "{}", Access::Public),
        (token(None), RIGHT, Access::Private),
        (token(Some(login())), RIGHT, Access::Private),
        (Auth::Basic(login()), RIGHT, Access::Private),
    ];
    for (auth, entry, expected) in cases {
        let rig = Rig::new(auth.clone()).await;
        rig.store_login(entry);
        let origin = rig.client(Timeouts::default()).open(&rig.source()).await.expect("opens");
        assert_eq!(origin.access(), None, "{auth:?}: known before anything was asked for");
        origin.resolve(&amd64(), soon()).await.expect("resolves");
        assert_eq!(origin.access(), Some(expected), "{auth:?}");
    }
    let rig = Rig::new(Auth::Basic(login())).await;
    rig.store_login(WRONG);
    let origin = rig.client(Timeouts::default()).open(&rig.source()).await.expect("opens");
    origin.resolve(&amd64(), soon()).await.expect_err("refused");
    assert_eq!(origin.access(), None, "a refusal proves something");
}
