//! Every fault that a registry, its storage, a proxy or the network can make: the right bytes or a complete error, within
//! the deadline.

use std::time::{Duration, SystemTime};

use hermes_registry::Auth;
use http::StatusCode;
use http::header::{CONTENT_RANGE, HeaderName, RETRY_AFTER};
use tokio::time::Instant;

use super::harness::{Fault, IMPATIENT, LAYER_BYTES, MakeFault, Rig, assert_complete, collect, ramp, soon};
use crate::{ErrorClass, OriginError, Timeouts};

/// Reads bytes 1000..5000 while blobs meet `fault`, twice: the first time and always after.
async fn read_against(rig: &Rig, timeouts: Timeouts, fault: MakeFault) -> Result<Vec<u8>, OriginError> {
    let (_, origin, layer) = rig.opened(timeouts).await;
    rig.server.plan_blobs(move |_| fault());
    let begun = Instant::now();
    let result = collect(origin.read(&layer, 1000..5000, soon())).await;
    assert!(begun.elapsed() < Duration::from_secs(10), "too slow: {:?}", begun.elapsed());
    if let Err(error) = &result {
        assert_complete(error, &rig.image(), Some(&layer), &rig.server.address.to_string());
    }
    rig.server.plan(|_| Fault::Pass);
    let whole = collect(origin.read_all(&layer, soon())).await.unwrap_or_else(|error| panic!("after a fault: {error}"));
    assert!(whole == ramp(), "after a fault all is well again");
    result
}

#[tokio::test]
async fn statuses_become_classes() {
    let rig = Rig::new(Auth::Open).await;
    let cases: [(MakeFault, ErrorClass, &str, &str); 10] = [
        (|| Fault::status(401), ErrorClass::Denied, "denied", "docker login"),
        (|| Fault::status(403), ErrorClass::Denied, "denied", "without a login, as none was asked for"),
        (|| Fault::status(404), ErrorClass::NotFound, "not_found", "WHY: because"),
        (|| Fault::status(410), ErrorClass::NotFound, "not_found", "deleted"),
        (|| Fault::status(429), ErrorClass::Transient, "throttled", "limits requests"),
        (|| Fault::status(503), ErrorClass::Transient, "throttled", "WHY: because"),
        (|| Fault::status(500), ErrorClass::Transient, "server", "500"),
        (|| Fault::status(502), ErrorClass::Transient, "server", "try again"),
        (|| Fault::status(400), ErrorClass::PeerFault, "unexpected", "400"),
        (|| Fault::status(204), ErrorClass::PeerFault, "unexpected", "204"),
    ];
    for (fault, class, kind, part) in cases {
        let error = read_against(&rig, Timeouts::default(), fault).await.expect_err(kind);
        let text = error.to_string();
        assert_eq!((error.class(), error.kind()), (class, kind), "{text}");
        assert!(text.contains(part), "{text}");
        assert_eq!(error.retry_after(), None);
    }
}

#[tokio::test]
async fn rest_that_is_asked_for_is_reported() {
    let rig = Rig::new(Auth::Open).await;
    let fault = || Fault::status(429).with(RETRY_AFTER, "17");
    let error = read_against(&rig, Timeouts::default(), fault).await.expect_err("throttled");
    assert_eq!(error.retry_after(), Some(Duration::from_secs(17)));
    assert!(error.to_string().contains("asking for 17 s of rest"), "{error}");
    let fault = || {
        let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(100));
        Fault::status(503).with(RETRY_AFTER, &date)
    };
    let error = read_against(&rig, Timeouts::default(), fault).await.expect_err("throttled");
    let rest = error.retry_after().expect("a rest");
    assert!((80..=100).contains(&rest.as_secs()), "{rest:?}");
}

#[tokio::test]
async fn a_refused_range_names_range_and_lengths() {
    let rig = Rig::new(Auth::Open).await;
    let fault = || Fault::status(416).with(CONTENT_RANGE, "bytes */500");
    let error = read_against(&rig, Timeouts::default(), fault).await.expect_err("416");
    assert_eq!((error.class(), error.kind()), (ErrorClass::PeerFault, "range_refused"));
    let text = error.to_string();
    for part in ["bytes 1000-4999", &LAYER_BYTES.to_string(), "500 by the server"] {
        assert!(text.contains(part), "{text}");
    }
}

#[tokio::test]
async fn hanging_servers_are_given_up() {
    let rig = Rig::new(Auth::Open).await;
    let error = read_against(&rig, IMPATIENT, || Fault::HangBeforeHeaders).await.expect_err("no head");
    assert_eq!((error.class(), error.kind()), (ErrorClass::Transient, "timeout"));
    assert!(error.to_string().contains("did not begin to answer"), "{error}");
    let error = read_against(&rig, IMPATIENT, || Fault::HangAfter(1234)).await.expect_err("no more body");
    assert_eq!((error.class(), error.kind()), (ErrorClass::Transient, "timeout"));
    let text = error.to_string();
    assert!(text.contains("stopped sending") && text.contains("after 1234 bytes"), "{text}");
}

#[tokio::test]
async fn the_callers_deadline_holds_in_every_phase() {
    let rig = Rig::new(Auth::Open).await;
    let (_, origin, layer) = rig.opened(Timeouts::default()).await;
    for fault in [|| Fault::HangBeforeHeaders, || Fault::HangAfter(10)] {
        rig.server.plan_blobs(move |_| fault());
        let begun = Instant::now();
        let error = collect(origin.read(&layer, 0..100, begun + Duration::from_millis(300))).await.expect_err("late");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        assert!(error.to_string().contains("the deadline passed"), "{error}");
    }
    let past = Instant::now().checked_sub(Duration::from_secs(1)).unwrap_or_else(Instant::now);
    assert_eq!(collect(origin.read(&layer, 0..100, past)).await.expect_err("late").kind(), "timeout");
}

#[tokio::test]
async fn cut_and_short_bodies_say_how_much_came() {
    let rig = Rig::new(Auth::Open).await;
    let cases: [(MakeFault, &str); 2] = [
        (|| Fault::CutAfter(1234), "cut after 1234 of 4000 bytes"),
        (|| Fault::ShortenUncounted(100), "cut after 3900 of 4000 bytes"),
    ];
    for (fault, part) in cases {
        let error = read_against(&rig, Timeouts::default(), fault).await.expect_err(part);
        assert_eq!((error.class(), error.kind()), (ErrorClass::Transient, "truncated"), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[tokio::test]
async fn bodies_of_another_length_or_place_are_refused() {
    let rig = Rig::new(Auth::Open).await;
    let cases: [(MakeFault, &str, &str); 3] = [
        (|| Fault::Shorten(100), "wrong_length", "3900 bytes where 4000"),
        (|| Fault::LengthenUncounted, "wrong_length", "4004 bytes where 4000"),
        (|| Fault::ShiftRange, "wrong_range", "bytes 1000-4999 were asked for, the answer is 'bytes 0-9/300007'"),
    ];
    for (fault, kind, part) in cases {
        let error = read_against(&rig, Timeouts::default(), fault).await.expect_err(part);
        assert_eq!((error.class(), error.kind()), (ErrorClass::PeerFault, kind), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[tokio::test]
async fn servers_without_ranges_are_read_within_a_bound() {
    let rig = Rig::new(Auth::Open).await;
    for fault in [|| Fault::IgnoreRange, || Fault::IgnoreRangeUncounted] {
        let part = read_against(&rig, Timeouts::default(), fault).await.unwrap_or_else(|error| panic!("{error}"));
        assert!(part == ramp()[1000..5000], "the range is cut out of the whole");
    }
    let config = crate::OriginConfig { max_skip_bytes: 999, ..rig.config(Timeouts::default()) };
    let (_, _, layer) = rig.opened(Timeouts::default()).await;
    let client = crate::OriginClient::new(config).expect("a client");
    let origin = client.open(&rig.source()).await.expect("an origin");
    rig.server.plan_blobs(|_| Fault::IgnoreRange);
    let error = collect(origin.read(&layer, 1000..5000, soon())).await.expect_err("too much to throw away");
    assert_eq!((error.class(), error.kind()), (ErrorClass::PeerFault, "ranges_ignored"));
    assert!(error.to_string().contains("1000 bytes would have to be thrown away (at most 999)"), "{error}");
    assert!(collect(origin.read(&layer, 999..5000, soon())).await.expect("within the bound") == ramp()[999..5000]);
}

#[tokio::test]
async fn a_dead_connection_is_replaced_once() {
    let rig = Rig::new(Auth::Open).await;
    let (client, origin, layer) = rig.opened(Timeouts::default()).await;
    // A server that reads the request on the kept connection and closes it without a word, as one does that has just
    // given up an idle connection.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let upstream = rig.server.address;
    let task = tokio::spawn(async move {
        let mut connections = 0;
        loop {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            connections += 1;
            if connections == 1 {
                let mut buffer = [0; 16 << 10];
                let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut buffer).await;
                continue;
            }
            let mut up = tokio::net::TcpStream::connect(upstream).await.expect("the registry");
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut stream, &mut up).await });
        }
    });
    let source = format!("{address}/team/app:v1").parse().expect("a reference");
    let through = client.open(&source).await.expect("an origin");
    let before = client.counters();
    let part = collect(through.read(&layer, 5..10, soon())).await.unwrap_or_else(|error| panic!("{error}"));
    assert!(part == ramp()[5..10]);
    assert_eq!(client.counters().resends - before.resends, 1);
    task.abort();
    drop(origin);
}

fn blob_url(storage: &super::harness::Server, path: &str, signature: usize) -> String {
    format!("http://{}{path}?signature={signature}", storage.address)
}

#[tokio::test]
async fn redirects_are_kept_and_never_get_the_authorization() {
    let lifetime = Duration::from_secs(60);
    let rig = Rig::new(Auth::Token { login: None, lifetime }).await;
    let storage = rig.storage().await;
    let (client, origin, layer) = rig.opened(Timeouts::default()).await;
    let target = storage.address;
    rig.server.plan(move |seen| match seen.is_blob() {
        true => Fault::redirect(&format!("http://{target}{}?signature=1", seen.path)),
        false => Fault::Pass,
    });
    for at in [0, 1000, 2000] {
        let part = collect(origin.read(&layer, at..at + 10, soon())).await.unwrap_or_else(|error| panic!("{error}"));
        assert!(part == ramp()[at as usize..at as usize + 10]);
    }
    let home = rig.server.seen();
    assert_eq!(home.len(), 1, "the registry is asked once, then the address is kept: {home:?}");
    assert!(home[0].authorization.as_ref().is_some_and(|header| header.starts_with("Bearer ")));
    let away = storage.seen();
    assert_eq!(away.len(), 3);
    assert!(away.iter().all(|seen| seen.authorization.is_none()), "{away:?}");
    assert!(away.iter().all(|seen| seen.range.is_some()), "the range goes along");
    assert_eq!(client.counters().redirects, 1);

    storage.plan(|_| Fault::status(500));
    let error = collect(origin.read(&layer, 0..10, soon())).await.expect_err("the storage fails");
    assert_complete(&error, &rig.image(), Some(&layer), &storage.address.to_string());
    assert!(!error.to_string().contains("signature"), "{error}");
}

#[tokio::test]
async fn redirects_that_end_are_asked_for_again_once() {
    let rig = Rig::new(Auth::Open).await;
    let storage = rig.storage().await;
    let (_, origin, layer) = rig.opened(Timeouts::default()).await;
    let path = format!("/v2/team/app/blobs/{}", layer.layer);
    let urls: Vec<String> = (0..9).map(|signature| blob_url(&storage, &path, signature)).collect();
    rig.server.plan_blobs(move |count| Fault::redirect(&urls[count]));
    let read = async |at: u64| collect(origin.read(&layer, at..at + 10, soon())).await;
    assert!(read(0).await.expect("through the first address") == ramp()[..10]);
    for status in [403, 400, 404] {
        rig.server.seen();
        let mut refused = false;
        storage.plan(move |_| match std::mem::replace(&mut refused, true) {
            true => Fault::Pass,
            false => Fault::status(status),
        });
        assert!(read(10).await.unwrap_or_else(|error| panic!("{status}: {error}")) == ramp()[10..20]);
        assert_eq!(rig.server.seen().len(), 1, "{status}: the registry is asked once more");
    }
    // A fresh address that is refused as well is the end.
    storage.seen();
    storage.plan(|_| Fault::status(403));
    let error = read(20).await.expect_err("refused for good");
    assert_eq!(error.class(), ErrorClass::Denied);
    assert_eq!(storage.seen().len(), 2, "the kept address and one fresh one");
    // An address whose host is gone.
    storage.plan(|_| Fault::Pass);
    assert!(read(30).await.expect("well again") == ramp()[30..40]);
    drop(storage);
    rig.server.plan(|_| Fault::Pass);
    assert!(read(40).await.unwrap_or_else(|error| panic!("{error}")) == ramp()[40..50]);
}

#[tokio::test]
async fn redirects_that_lead_nowhere_are_refused() {
    let rig = Rig::new(Auth::Open).await;
    let (_, origin, layer) = rig.opened(Timeouts::default()).await;
    let cases = [
        ("/v2/team/app/blobs/round", "too many in a row"),
        ("file:///etc/passwd", "something other than http"),
        ("http://[bad", "malformed"),
    ];
    for (location, part) in cases {
        rig.server.plan_blobs(move |_| Fault::redirect(location));
        let error = collect(origin.read(&layer, 0..10, soon())).await.expect_err(part);
        assert_eq!((error.class(), error.kind()), (ErrorClass::PeerFault, "bad_redirect"), "{error}");
        assert!(error.to_string().contains(part), "{error}");
        assert!(rig.server.seen().len() <= 6, "redirects are bounded");
    }
    rig.server.plan_blobs(|_| Fault::status(302));
    assert!(collect(origin.read(&layer, 0..10, soon())).await.expect_err("no place").to_string().contains("no place"));
}

#[tokio::test]
async fn hostile_messages_stay_harmless() {
    let rig = Rig::new(Auth::Open).await;
    let fault = || {
        let body = format!("\u{1b}]0;owned\u{7}{}", "x".repeat(1 << 20));
        Fault::Answer(StatusCode::INTERNAL_SERVER_ERROR, vec![(HeaderName::from_static("x"), "y".to_owned())], body)
    };
    let error = read_against(&rig, Timeouts::default(), fault).await.expect_err("500");
    let text = error.to_string();
    assert!(text.len() < 1000 && !text.contains('\u{1b}'), "{} bytes: {text:.200}", text.len());
}
