//! Mirrors, certificates and logins, over real TLS on loopback.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hermes_registry::{Auth, Login, Options, Registry};
use rcgen::{BasicConstraints, Certificate, CertificateParams, IsCa, KeyPair};
use rustls::RootCertStore;
use rustls::pki_types::PrivateKeyDer;
use rustls::server::WebPkiClientVerifier;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use super::harness::{Fault, Rig, amd64, collect, ramp, soon};
use crate::{ClientCertificate, ErrorClass, OriginClient, OriginConfig, Timeouts};

/// A CA of its own, and files of what it has signed.
struct Ca {
    certificate: Certificate,
    key: KeyPair,
}

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        Self { certificate: params.self_signed(&key).expect("a CA"), key }
    }

    fn sign(&self, name: &str) -> (Certificate, KeyPair) {
        let params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        let key = KeyPair::generate().expect("a key");
        (params.signed_by(&key, &self.certificate, &self.key).expect("signed"), key)
    }
}

/// A registry over TLS, which ends with the test.
struct Tls {
    address: SocketAddr,
    registry: Registry,
    _serving: JoinSet<()>,
}

impl Tls {
    /// Serves `layout`; with `clients`, only to those that this CA has signed.
    async fn start(layout: &Path, auth: Auth, ca: &Ca, clients: Option<&Ca>) -> Self {
        // The ring provider, as in the client.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (certificate, key) = ca.sign("127.0.0.1");
        let key = PrivateKeyDer::try_from(key.serialize_der()).expect("a key");
        let builder = rustls::ServerConfig::builder();
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(clients) => {
                let mut roots = RootCertStore::empty();
                roots.add(clients.certificate.der().clone()).expect("a root");
                builder
                    .with_client_cert_verifier(WebPkiClientVerifier::builder(roots.into()).build().expect("a verifier"))
            }
        };
        let config = builder.with_single_cert(vec![certificate.der().clone()], key).expect("a configuration");
        let registry = Registry::open(layout, Options { auth, ..Options::default() }).expect("a registry");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("an address");
        let (served, mut serving) = (registry.clone(), JoinSet::new());
        serving.spawn(async move { served.serve_tls(listener, Arc::new(config), std::future::pending()).await });
        Self { address, registry, _serving: serving }
    }
}

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    std::fs::write(path, text).expect("written");
}

/// A configuration whose `hosts.toml` for the rig's server is `text`.
fn with_hosts(rig: &Rig, text: &str) -> OriginConfig {
    let hosts_dir = rig.folder.path().join("certs.d");
    write(&hosts_dir.join(rig.server.address.to_string()).join("hosts.toml"), text);
    let timeouts = Timeouts { connect: Duration::from_secs(2), ..Timeouts::default() };
    OriginConfig { hosts_dir: Some(hosts_dir), ..rig.config(timeouts) }
}

async fn read_all(rig: &Rig, config: OriginConfig) -> Result<(OriginClient, Vec<u8>), crate::OriginError> {
    let client = OriginClient::new(config).expect("a client");
    let origin = client.open(&rig.source()).await?;
    let image = origin.resolve(&amd64(), soon()).await?;
    let bytes = collect(origin.read_all(&image.layers[0], soon())).await?;
    Ok((client, bytes))
}

/// An address where nobody listens.
async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.expect("a free port").local_addr().expect("an address")
}

#[tokio::test]
async fn mirrors_are_asked_in_order_for_what_they_may_give() {
    let rig = Rig::new(Auth::Open).await;
    let (pulls, all) = (rig.storage().await, rig.storage().await);
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n[host.\"http://{}\"]\n[host.\"http://{}\".header]\nx-team = \"blue\"\n",
        rig.server.address,
        pulls.address,
        all.address,
        nobody().await,
    );
    let (_, bytes) = read_all(&rig, with_hosts(&rig, &text)).await.unwrap_or_else(|error| panic!("{error}"));
    assert!(bytes == ramp());
    assert!(rig.server.seen().is_empty(), "the registry itself was not needed");
    let namespace = format!("ns={}", rig.server.address.to_string().replace(':', "%3A"));
    let (pulls, all) = (pulls.seen(), all.seen());
    assert!(all.iter().all(|seen| seen.path.contains("/manifests/v1?")) && all.len() == 1, "{all:?}");
    assert_eq!(pulls.len(), 3, "manifest, configuration, layer: {pulls:?}");
    assert!(pulls.iter().chain(&all).all(|seen| seen.path.ends_with(&namespace)), "{pulls:?}");
}

#[tokio::test]
async fn a_mirror_that_fails_is_followed_by_the_next_and_rests() {
    let rig = Rig::new(Auth::Open).await;
    let mirror = rig.storage().await;
    let text = format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", rig.server.address, mirror.address);
    let client = OriginClient::new(with_hosts(&rig, &text)).expect("a client");
    let origin = client.open(&rig.source()).await.expect("an origin");
    let image = origin.resolve(&amd64(), soon()).await.unwrap_or_else(|error| panic!("{error}"));
    assert!(rig.server.seen().is_empty());
    // What it does not have is asked for elsewhere each time; that is no failure.
    mirror.plan(|_| Fault::status(404));
    for _ in 0..2 {
        mirror.seen();
        let part =
            collect(origin.read(&image.layers[0], 5..50, soon())).await.unwrap_or_else(|error| panic!("{error}"));
        assert!(part == ramp()[5..50]);
        assert_eq!((mirror.seen().len(), rig.server.seen().len()), (1, 1));
    }
    // A body that breaks is the reader's to ask for again; by then the mirror rests.
    mirror.plan(|_| Fault::CutAfter(10));
    let error = collect(origin.read(&image.layers[0], 0..1000, soon())).await.expect_err("cut");
    assert_eq!((error.class(), error.host()), (ErrorClass::Transient, mirror.address.to_string().as_str()));
    // One that wants to be left alone is.
    mirror.plan(|_| Fault::status(429).with(http::header::RETRY_AFTER, "50"));
    mirror.seen();
    let begun = tokio::time::Instant::now();
    let read = async || {
        let part = collect(origin.read(&image.layers[0], 0..1000, soon())).await;
        assert!(part.unwrap_or_else(|error| panic!("{error}")) == ramp()[..1000]);
        mirror.seen().len()
    };
    while read().await == 0 {
        assert!(begun.elapsed() < Duration::from_secs(30), "the rest after a broken body never ends");
    }
    assert_eq!(read().await, 0, "a mirror that rests is passed over");
    // One that sent other bytes than were indexed, as whoever decodes them knows, is not asked for more.
    let changing = rig.storage().await;
    let text = format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", rig.server.address, changing.address);
    let client = OriginClient::new(with_hosts(&rig, &text)).expect("a client");
    let origin = client.open(&rig.source()).await.expect("an origin");
    for (is_mirror, expected) in [(true, 1), (false, 0)] {
        changing.seen();
        let part = collect(origin.read(&image.layers[0], 0..10, soon())).await;
        assert!(part.is_ok() && changing.seen().len() == expected);
        assert_eq!(origin.distrust(&image.layers[0]), is_mirror);
    }
    // A mirror that lies about a document is one that failed.
    let lying = rig.storage().await;
    lying.plan(|_| Fault::Answer(http::StatusCode::OK, Vec::new(), "{}".to_owned()));
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\"]\n",
        rig.server.address, lying.address
    );
    let (client, bytes) = {
        let client = OriginClient::new(with_hosts(&rig, &text)).expect("a client");
        let origin = client.open(&rig.source()).await.expect("an origin");
        let image = origin.resolve(&amd64(), soon()).await.unwrap_or_else(|error| panic!("{error}"));
        (client, collect(origin.read_all(&image.layers[0], soon())).await)
    };
    assert!(bytes.unwrap_or_else(|error| panic!("{error}")) == ramp());
    assert!(client.counters().mirror_failures >= 1 && !lying.seen().is_empty(), "it was asked, and not believed");
}

#[tokio::test]
async fn a_login_goes_to_the_host_that_it_is_stored_for_and_to_no_other() {
    let login = Login { user: "ann".to_owned(), password: "s3cret".to_owned() };
    let rig = Rig::new(Auth::Basic(login)).await;
    rig.store_login(r#"{"username":"ann","password":"s3cret"}"#);
    let mirror = rig.storage().await;
    // A mirror that asks for a login, for which there is none.
    mirror.plan(|_| Fault::status(401).with(http::header::WWW_AUTHENTICATE, "Basic realm=\"mirror\""));
    let text = format!("server = \"http://{}\"\n[host.\"http://{}\"]\n", rig.server.address, mirror.address);
    let (_, bytes) = read_all(&rig, with_hosts(&rig, &text)).await.unwrap_or_else(|error| panic!("{error}"));
    assert!(bytes == ramp());
    let seen = mirror.seen();
    assert!(!seen.is_empty() && seen.iter().all(|seen| seen.authorization.is_none()), "{seen:?}");
}

#[tokio::test]
async fn tls_is_believed_by_the_ca_that_was_given_and_by_no_other() {
    let rig = Rig::new(Auth::Open).await;
    let (ca, other) = (Ca::new(), Ca::new());
    let server = Tls::start(&rig.layout(), Auth::Open, &ca, None).await;
    let folder = rig.folder.path();
    write(&folder.join("ca.pem"), &ca.certificate.pem());
    write(&folder.join("other.pem"), &other.certificate.pem());
    let hosts = |more: &str| with_hosts(&rig, &format!("server = \"https://{}\"\n{more}", server.address));
    let ca_line = |name: &str| format!("ca = \"{}\"\n", folder.join(name).display());
    for more in ["".to_owned(), ca_line("other.pem")] {
        let error = read_all(&rig, hosts(&more)).await.expect_err("not believed");
        assert_eq!(error.kind(), "connect", "{error}");
    }
    for more in [ca_line("ca.pem"), "skip_verify = true\n".to_owned()] {
        let (_, bytes) = read_all(&rig, hosts(&more)).await.unwrap_or_else(|error| panic!("{error}"));
        assert!(bytes == ramp());
    }
    // By the node's own settings.
    let mut config = hosts("");
    config.tls.entry(server.address.to_string()).or_default().ca.push(folder.join("ca.pem"));
    read_all(&rig, config).await.unwrap_or_else(|error| panic!("{error}"));
    // Files that cannot be used are named.
    for (name, content) in [("missing.pem", None), ("empty.pem", Some(""))] {
        if let Some(content) = content {
            write(&folder.join(name), content);
        }
        let error = read_all(&rig, hosts(&ca_line(name))).await.expect_err(name);
        assert_eq!((error.class(), error.kind()), (ErrorClass::Local, "tls"), "{error}");
        assert!(error.to_string().contains(name), "{error}");
    }
    assert!(server.registry.counters().blob_requests > 0);
}

#[tokio::test]
async fn a_client_certificate_is_shown_in_every_form() {
    let rig = Rig::new(Auth::Open).await;
    let (ca, clients) = (Ca::new(), Ca::new());
    let server = Tls::start(&rig.layout(), Auth::Open, &ca, Some(&clients)).await;
    let folder = rig.folder.path().join("certs.d").join(rig.server.address.to_string());
    let (certificate, key) = clients.sign("node.test");
    write(&folder.join("ca.pem"), &ca.certificate.pem());
    write(&folder.join("me.cert"), &certificate.pem());
    write(&folder.join("me.key"), &key.serialize_pem());
    write(&folder.join("both.pem"), &format!("{}{}", certificate.pem(), key.serialize_pem()));
    let hosts =
        |more: &str| with_hosts(&rig, &format!("server = \"https://{}\"\nca = \"ca.pem\"\n{more}", server.address));
    assert!(read_all(&rig, hosts("")).await.is_err(), "nobody without a certificate");
    for client in ["\"both.pem\"", "[\"both.pem\"]", "[[\"me.cert\", \"me.key\"]]", "[[\"both.pem\", \"\"]]"] {
        let (_, bytes) = read_all(&rig, hosts(&format!("client = {client}\n")))
            .await
            .unwrap_or_else(|error| panic!("{client}: {error}"));
        assert!(bytes == ramp(), "{client}");
    }
    let mut config = hosts("");
    let path = |name: &str| -> PathBuf { folder.join(name) };
    let own = ClientCertificate { certificate: path("me.cert"), key: Some(path("me.key")) };
    config.tls.entry(server.address.to_string()).or_default().client.push(own);
    read_all(&rig, config).await.unwrap_or_else(|error| panic!("{error}"));
}

#[tokio::test]
async fn tokens_that_end_while_reading_fail_no_read() {
    let login = Login { user: "ann".to_owned(), password: "s3cret".to_owned() };
    let auth = Auth::Token { login: Some(login), lifetime: Duration::from_secs(1) };
    let rig = Rig::new(auth).await;
    rig.store_login(r#"{"username":"ann","password":"s3cret"}"#);
    let (client, origin, layer) = rig.opened(Timeouts::default()).await;
    let before = client.counters().token_requests;
    let begun = tokio::time::Instant::now();
    let mut at = 0;
    while client.counters().token_requests < before + 3 {
        assert!(begun.elapsed() < Duration::from_secs(30), "no token was ever renewed");
        let part = collect(origin.read(&layer, at..at + 100, soon())).await.unwrap_or_else(|error| panic!("{error}"));
        assert!(part == ramp()[at as usize..at as usize + 100]);
        at = (at + 100) % 300_000;
    }
}
