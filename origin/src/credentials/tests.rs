//! The chain, on real files and real programs.

use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;
use tokio::time::Instant;

use super::secret::Secret;
use super::*;

/// A folder with everything that a provider may be configured with.
struct Rig {
    folder: TempDir,
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

fn basic(user: &str, password: &str) -> Credential {
    Credential::Basic { user: user.to_owned(), password: Secret::new(password) }
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["secrets", "plugins", "helpers"] {
            std::fs::create_dir(folder.path().join(name)).expect("made");
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().expect("below the folder")).expect("made");
        std::fs::write(path, text).expect("written");
    }

    /// A program that counts its runs in `NAME.runs` and keeps the last question in `NAME.question`.
    fn program(&self, name: &str, body: &str) {
        let path = self.path(name);
        let (runs, question) = (path.with_extension("runs"), path.with_extension("question"));
        let text = format!("#!/bin/sh\necho run >> '{}'\ncat > '{}'\n{body}\n", runs.display(), question.display());
        self.write(name, &text);
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("executable");
    }

    fn runs(&self, name: &str) -> usize {
        std::fs::read_to_string(self.path(name).with_extension("runs")).map_or(0, |text| text.lines().count())
    }

    fn plugin_config(&self, providers: &[(&str, &str)]) {
        let providers: Vec<_> = providers
            .iter()
            .map(|(name, pattern)| {
                serde_json::json!({
                    "name": name, "matchImages": [pattern], "defaultCacheDuration": "1h",
                    "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
                    "args": ["--from", "test"], "env": [{"name": "FLAVOUR", "value": "vanilla"}],
                })
            })
            .collect();
        let config = serde_json::json!({
            "apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig", "providers": providers,
        });
        self.write("providers.json", &config.to_string());
    }

    fn credentials(&self) -> Credentials {
        Credentials::new(CredentialsConfig {
            pull_secret_folders: vec![self.path("secrets")],
            provider_config: Some(self.path("providers.json")).filter(|path| path.exists()),
            provider_bin_dir: Some(self.path("plugins")),
            docker_config: Some(self.path("config.json")),
            docker_helper_dir: Some(self.path("helpers")),
        })
    }
}

/// What a plugin prints.
fn response(key_type: &str, duration: &str, auth: &str) -> String {
    format!(
        r#"echo '{{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1","cacheKeyType":"{key_type}","cacheDuration":"{duration}","auth":{auth}}}'"#
    )
}

async fn find(credentials: &Credentials, registry: &str, repository: &str) -> Found {
    credentials.find(registry, repository, &[], soon()).await
}

fn who(found: &Found) -> Vec<(Provider, &str)> {
    found.logins.iter().map(|login| (login.provider, user_of(&login.credential))).collect()
}

fn user_of(credential: &Credential) -> &str {
    match credential {
        Credential::Basic { user, .. } => user,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn providers_answer_in_their_order() {
    let rig = Rig::new();
    rig.write("secrets/team", r#"{"auths":{"r.test":{"username":"secret","password":"1"}}}"#);
    rig.plugin_config(&[("plug", "r.test")]);
    rig.program("plugins/plug", &response("Image", "1h", r#"{"r.test":{"username":"plugin","password":"2"}}"#));
    rig.program("helpers/docker-credential-mine", r#"echo '{"Username":"helper","Secret":"3"}'"#);
    rig.write(
        "config.json",
        r#"{"auths":{"r.test":{"username":"stored","password":"4"}},"credHelpers":{"r.test":"mine"}}"#,
    );
    let credentials = rig.credentials();
    let found = find(&credentials, "r.test", "team/app").await;
    let expected = [
        (Provider::PullSecret, "secret"),
        (Provider::KubeletPlugin, "plugin"),
        (Provider::DockerHelper, "helper"),
        (Provider::DockerConfig, "stored"),
    ];
    assert_eq!(who(&found), expected);
    assert!(found.problems.is_empty(), "{:?}", found.problems);
    // What was refused is not offered again.
    let refused = [basic("secret", "1"), basic("plugin", "2")];
    let found = credentials.find("r.test", "team/app", &refused, soon()).await;
    assert_eq!(who(&found), expected[2..]);
    // The plugin was given what the kubelet gives.
    let question = std::fs::read_to_string(rig.path("plugins/plug.question")).expect("asked");
    let question: serde_json::Value = serde_json::from_str(&question).expect("JSON");
    let expected = serde_json::json!({
        "kind": "CredentialProviderRequest", "apiVersion": "credentialprovider.kubelet.k8s.io/v1", "image": "r.test/team/app",
    });
    assert_eq!(question, expected);
    assert_eq!(std::fs::read_to_string(rig.path("helpers/docker-credential-mine.question")).expect("asked"), "r.test");
    let counters = credentials.counters().map(|counters| (counters.asked, counters.failed));
    assert_eq!(counters, [(2, 0), (1, 0), (1, 0), (2, 0)]);
}

#[tokio::test]
async fn each_failure_is_named_and_the_next_provider_is_asked() {
    let rig = Rig::new();
    rig.write("secrets/broken", "hunter2");
    rig.plugin_config(&[("fails", "r.test"), ("prints", "r.test"), ("missing", "r.test"), ("other", "r.test")]);
    rig.program("plugins/fails", "echo hunter2; echo 'no metadata service' >&2; exit 3");
    rig.program("plugins/prints", "echo hunter2");
    rig.program("plugins/other", r#"echo '{"kind":"Pod","apiVersion":"v1","cacheKeyType":"Image"}'"#);
    rig.program("helpers/docker-credential-sad", "echo hunter2; exit 1");
    rig.write("config.json", r#"{"auths":{"r.test":{"username":"last","password":"hunter2"}},"credsStore":"sad"}"#);
    let credentials = rig.credentials();
    let found = find(&credentials, "r.test", "app").await;
    assert_eq!(who(&found), [(Provider::DockerConfig, "last")]);
    let text = found.problems_text();
    for part in [
        "secrets/broken",
        "fails failed",
        "no metadata service",
        "prints",
        "missing cannot be started",
        "not a CredentialProviderResponse",
        "docker-credential-sad failed",
    ] {
        assert!(text.contains(part), "'{part}' is missing in: {text}");
    }
    assert!(!format!("{text} {found:?}").contains("hunter2"), "{text}");
    // A moment later they are not run again.
    find(&credentials, "r.test", "app").await;
    assert_eq!((rig.runs("plugins/fails"), rig.runs("helpers/docker-credential-sad")), (1, 1));
}

#[tokio::test]
async fn answers_are_kept_for_what_they_are_for() {
    for (key_type, expected) in [("Image", 3), ("Registry", 2), ("Global", 1)] {
        let rig = Rig::new();
        rig.plugin_config(&[("plug", "*.test")]);
        let auth = r#"{"*.test":{"username":"u","password":"p"}}"#;
        rig.program("plugins/plug", &response(key_type, "1h", auth));
        let credentials = rig.credentials();
        for _ in 0..2 {
            for (registry, repository) in [("a.test", "one"), ("a.test", "two"), ("b.test", "one")] {
                assert_eq!(who(&find(&credentials, registry, repository).await).len(), 1);
            }
        }
        assert_eq!(rig.runs("plugins/plug"), expected, "{key_type}");
        assert!(find(&credentials, "a.other", "one").await.logins.is_empty());
        assert_eq!(rig.runs("plugins/plug"), expected, "not for images that its patterns do not mean");
    }
    let rig = Rig::new();
    rig.plugin_config(&[("plug", "*.test")]);
    rig.program("plugins/plug", &response("Global", "0s", r#"{"a.test":{"username":"u","password":"p"}}"#));
    let credentials = rig.credentials();
    find(&credentials, "a.test", "one").await;
    find(&credentials, "a.test", "one").await;
    assert_eq!(rig.runs("plugins/plug"), 2, "a duration of zero keeps nothing");
}

#[tokio::test]
async fn an_answer_is_renewed_before_it_ends() {
    let rig = Rig::new();
    rig.plugin_config(&[("plug", "a.test")]);
    rig.program("plugins/plug", &response("Image", "1s", r#"{"a.test":{"username":"u","password":"p"}}"#));
    let credentials = rig.credentials();
    let begun = Instant::now();
    while rig.runs("plugins/plug") < 3 {
        assert!(begun.elapsed() < Duration::from_secs(30), "never renewed");
        assert_eq!(find(&credentials, "a.test", "app").await.logins.len(), 1, "no moment without a login");
    }
}

#[tokio::test]
async fn many_at_once_run_a_program_once() {
    let rig = Rig::new();
    rig.plugin_config(&[("plug", "a.test")]);
    rig.program("plugins/plug", &response("Image", "1h", r#"{"a.test":{"username":"u","password":"p"}}"#));
    let credentials = rig.credentials();
    let asks = (0..16).map(|_| find(&credentials, "a.test", "app"));
    for found in futures::future::join_all(asks).await {
        assert_eq!(found.logins.len(), 1, "{:?}", found.problems);
    }
    assert_eq!(rig.runs("plugins/plug"), 1);
}

#[tokio::test]
async fn programs_that_hang_or_babble_are_ended_with_their_children() {
    let rig = Rig::new();
    rig.plugin_config(&[("hangs", "a.test"), ("babbles", "a.test")]);
    let pid = rig.path("child.pid");
    rig.program("plugins/hangs", &format!("sleep 600 & echo $! > '{}'; wait", pid.display()));
    rig.program("plugins/babbles", "exec cat /dev/zero");
    let credentials = rig.credentials();
    let begun = Instant::now();
    let found = credentials.find("a.test", "app", &[], begun + Duration::from_secs(2)).await;
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    let text = found.problems_text();
    assert!(text.contains("hangs did not answer"), "{text}");
    let child = std::fs::read_to_string(pid).expect("started").trim().to_owned();
    let alive = || {
        let status = std::fs::read_to_string(Path::new("/proc").join(&child).join("status")).unwrap_or_default();
        !status.is_empty() && !status.contains("State:\tZ")
    };
    while alive() {
        assert!(begun.elapsed() < Duration::from_secs(30), "a child was left behind");
        tokio::task::yield_now().await;
    }
    // With time enough, a program that never ends its answer is ended at the limit.
    let found = credentials.find("a.test", "other", &[], begun + Duration::from_secs(25)).await;
    drop(found);
    let babbling = Rig::new();
    babbling.plugin_config(&[("babbles", "a.test")]);
    babbling.program("plugins/babbles", "exec cat /dev/zero");
    let text = find(&babbling.credentials(), "a.test", "app").await.problems_text();
    assert!(text.contains("longer than 1048576 bytes"), "{text}");
}

#[tokio::test]
async fn helpers_speak_dockers_protocol() {
    let rig = Rig::new();
    rig.program("helpers/docker-credential-none", "echo credentials not found in native keychain; exit 1");
    rig.program(
        "helpers/docker-credential-token",
        r#"echo '{"ServerURL":"x","Username":"<token>","Secret":"refresh"}'"#,
    );
    rig.write(
        "config.json",
        r#"{"credsStore":"none","credHelpers":{"t.test":"token","docker.io":"token","bad.test":"../evil"}}"#,
    );
    let credentials = rig.credentials();
    let found = find(&credentials, "t.test", "app").await;
    assert_eq!(found.logins[0].credential, Credential::Identity(Secret::new("refresh")));
    find(&credentials, "docker.io", "library/redis").await;
    let asked = std::fs::read_to_string(rig.path("helpers/docker-credential-token.question")).expect("asked");
    assert_eq!(asked, "https://index.docker.io/v1/");
    let found = find(&credentials, "other.test", "app").await;
    assert!(found.logins.is_empty() && found.problems.is_empty(), "nothing found is no failure: {found:?}");
    assert!(found.anonymous().contains("docker-credential-none has none for other.test"), "{}", found.anonymous());
    let text = find(&credentials, "bad.test", "app").await.problems_text();
    assert!(text.contains("its name may have"), "{text}");
}

#[tokio::test]
async fn the_most_special_entry_of_config_json_wins() {
    let rig = Rig::new();
    let text = format!(
        r#"{{"auths":{{"r.test:5000":{{"auth":"{}"}},"r.test:5000/team":{{"username":"bob","password":"b"}},
            "https://index.docker.io/v1/":{{"auth":"{}"}},"id.test":{{"auth":"{}","identitytoken":"refresh"}},
            "old.test":{{"auth":"{}"}},"access.test":{{"registrytoken":"ready"}}}}}}"#,
        STANDARD.encode("ann:a:b"),
        STANDARD.encode("hub:h\0\0"),
        STANDARD.encode("ann:"),
        STANDARD.encode("<token>:refresh"),
    );
    rig.write("config.json", &text);
    let credentials = rig.credentials();
    let cases = [
        ("r.test:5000", "app", Some(basic("ann", "a:b"))),
        ("r.test:5000", "team/app", Some(basic("bob", "b"))),
        ("r.test:5000", "teamster/app", Some(basic("ann", "a:b"))),
        ("docker.io", "library/redis", Some(basic("hub", "h"))),
        ("id.test", "app", Some(Credential::Identity(Secret::new("refresh")))),
        ("old.test", "app", Some(Credential::Identity(Secret::new("refresh")))),
        ("access.test", "app", Some(Credential::Access(Secret::new("ready")))),
        ("r.test", "app", None),
    ];
    for (registry, repository, expected) in cases {
        let found = find(&credentials, registry, repository).await;
        assert_eq!(found.logins.first().map(|login| &login.credential), expected.as_ref(), "{registry}/{repository}");
        let shown = format!("{found:?}");
        assert!(!shown.contains("a:b") && !shown.contains("refresh") && !shown.contains("ready"), "{shown}");
    }
}

#[tokio::test]
async fn broken_files_are_named_without_their_secrets() {
    let rig = Rig::new();
    let missing = find(&rig.credentials(), "r.test", "app").await.anonymous();
    assert!(missing.contains("config.json does not exist"), "{missing}");
    let cases = [
        r#"{"auths":{"r.test":{"auth":{"secret":"hunter2"}}}}"#,
        r#"{"auths":{"r.test":{"auth":"hunter2!"}}}"#,
        r#"{"auths":"hunter2"}"#,
        "hunter2",
    ];
    for text in cases {
        rig.write("config.json", text);
        rig.write("secrets/one", text);
        let found = find(&rig.credentials(), "r.test", "app").await;
        let shown = found.anonymous();
        assert!(shown.contains("config.json are malformed") && shown.contains("secrets/one"), "{shown}");
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}

#[tokio::test]
async fn pull_secrets_are_found_in_every_form() {
    let rig = Rig::new();
    rig.write("secrets/plain.json", r#"{"auths":{"a.test":{"username":"plain","password":"p"}}}"#);
    rig.write("secrets/mounted/.dockerconfigjson", r#"{"auths":{"*.b.test/team":{"username":"glob","password":"p"}}}"#);
    rig.write("secrets/legacy/.dockercfg", r#"{"https://c.test/v1/":{"username":"legacy","password":"p"}}"#);
    rig.write("secrets/..2026_01_01/x", r#"{"auths":{"a.test":{"username":"old","password":"p"}}}"#);
    let credentials = rig.credentials();
    let document = r#"{"auths":{"https://index.docker.io/v1/":{"username":"given","password":"p"},"a.test/app":{"username":"special","password":"p"}}}"#;
    credentials.pull_secrets().insert("team/hub", document.as_bytes()).expect("a document");
    let users = async |registry: &str, repository: &str| {
        let found = find(&credentials, registry, repository).await;
        who(&found).into_iter().map(|(_, user)| user.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(users("a.test", "app").await, ["special", "plain"]);
    assert_eq!(users("x.b.test", "team/app").await, ["glob"]);
    assert!(users("x.b.test", "other").await.is_empty());
    assert_eq!(users("c.test", "app").await, ["legacy"]);
    assert_eq!(users("docker.io", "library/redis").await, ["given"]);
    // A secret that changes is used without a restart, and one that is gone is forgotten.
    rig.write("secrets/plain.json", r#"{"auths":{"a.test":{"username":"changed","password":"p"}}}"#);
    assert!(credentials.pull_secrets().remove("team/hub") && !credentials.pull_secrets().remove("team/hub"));
    assert_eq!(users("a.test", "app").await, ["changed"]);
    let error = credentials.pull_secrets().insert("team/bad", b"hunter2").expect_err("no document").to_string();
    assert!(error.contains("team/bad") && !error.contains("hunter2"), "{error}");
}

/// Everything that is logged while it lives.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no panic").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn no_log_shows_a_secret() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).finish();
    let _logging = tracing::subscriber::set_default(subscriber);
    let rig = Rig::new();
    rig.write("secrets/good", r#"{"auths":{"r.test":{"username":"a","password":"hunter2"}}}"#);
    rig.write("secrets/bad", r#"{"auths":{"r.test":{"auth":"hunter2"}}}"#);
    rig.plugin_config(&[("fails", "r.test"), ("plug", "r.test")]);
    rig.program("plugins/fails", "echo hunter2; exit 3");
    rig.program("plugins/plug", &response("Image", "1h", r#"{"r.test":{"username":"b","password":"hunter2"}}"#));
    rig.program("helpers/docker-credential-mine", r#"echo '{"Username":"c","Secret":"hunter2"'; exit 0"#);
    rig.write("config.json", r#"{"auths":{"r.test":{"identitytoken":"hunter2"}},"credsStore":"mine"}"#);
    let credentials = rig.credentials();
    let found = find(&credentials, "r.test", "app").await;
    assert_eq!(found.logins.len(), 3);
    tracing::error!(?found, ?credentials, "everything that can be shown");
    let text = String::from_utf8(log.0.lock().expect("no panic").clone()).expect("text");
    assert!(text.contains("logins cannot be had") && text.contains("Secret(..)"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");
}
