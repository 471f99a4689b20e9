//! The kubelet's credential provider plugins (KEP 2133): the same configuration, the same programs, the same rules.
//!
//! The kubelet runs a program for an image that a pattern of its configuration means: a `CredentialProviderRequest` goes
//! to its standard input, a `CredentialProviderResponse` comes back with logins for patterns of images, with how long
//! they may be kept, and with what they are the answer for (this image, this registry, or everything). The configuration
//! is read again when its files change. Answers are renewed before they end; see [`super::cache`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::cache::{Cache, Fresh, Problem};
use super::docker::read_limited;
use super::error::CredentialsError;
use super::process::Program;
use super::secret::{Credential, Secret};
use super::{Answers, Login, Provider, Wanted, matching, printable};

/// How long a plugin may take, as in the kubelet (pkg/credentialprovider/plugin, `pluginExecTimeout`).
const PLUGIN_TIMEOUT: Duration = Duration::from_secs(60);

/// The longest that a plugin's answer is kept, whatever it says.
const LONGEST_LIFETIME: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Logins in one answer that are looked at.
const MAX_LOGINS: usize = 1000;

/// Files in a configuration folder that are read, and plugins in all of them.
const MAX_PLUGINS: usize = 100;

const CONFIG_KIND: &str = "CredentialProviderConfig";
const CONFIG_VERSIONS: [&str; 3] =
    ["kubelet.config.k8s.io/v1", "kubelet.config.k8s.io/v1beta1", "kubelet.config.k8s.io/v1alpha1"];

const REQUEST_KIND: &str = "CredentialProviderRequest";
const RESPONSE_KIND: &str = "CredentialProviderResponse";
const EXEC_VERSIONS: [&str; 3] = [
    "credentialprovider.kubelet.k8s.io/v1",
    "credentialprovider.kubelet.k8s.io/v1beta1",
    "credentialprovider.kubelet.k8s.io/v1alpha1",
];

// Newer kubelets have fields that are not known here; they must not keep a node from its images.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ConfigFile {
    api_version: String,
    kind: String,
    #[serde(default)]
    providers: Vec<PluginConfig>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PluginConfig {
    name: String,
    match_images: Vec<String>,
    default_cache_duration: String,
    api_version: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<Variable>,
    #[serde(default)]
    token_attributes: Option<TokenAttributes>,
}

#[derive(Debug, Deserialize)]
struct Variable {
    name: String,
    value: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct TokenAttributes {
    #[serde(default)]
    require_service_account: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    kind: &'static str,
    api_version: &'a str,
    image: &'a str,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    api_version: String,
    kind: String,
    cache_key_type: CacheKeyType,
    #[serde(default)]
    cache_duration: Option<String>,
    #[serde(default)]
    auth: Option<BTreeMap<String, AuthConfig>>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
enum CacheKeyType {
    Image,
    Registry,
    Global,
}

#[derive(Deserialize)]
struct AuthConfig {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: Secret,
}

/// A plugin's logins, by the patterns that they are for, the most special first.
type Logins = Arc<Vec<(String, Credential)>>;

/// A plugin, and what it has said.
#[derive(Debug)]
struct Plugin {
    name: String,
    program: Program,
    patterns: Vec<String>,
    version: String,
    default_lifetime: Duration,
    needs_service_account: bool,
    said: Cache<Result<Logins, Problem>>,
}

/// Where the configuration's files are, and whether they have changed.
type Stamp = Vec<(PathBuf, Option<SystemTime>, u64)>;

/// The plugins of a configuration.
#[derive(Debug)]
pub(super) struct KubeletPlugins {
    config: PathBuf,
    bin_dir: PathBuf,
    read: parking_lot::Mutex<Option<(Stamp, Arc<Vec<Plugin>>)>>,
}

impl KubeletPlugins {
    /// The configuration `config`, a file or a folder of them, with the plugins' programs in `bin_dir`.
    pub(super) fn new(config: PathBuf, bin_dir: PathBuf) -> Self {
        Self { config, bin_dir, read: parking_lot::Mutex::default() }
    }

    /// Adds what the plugins have for `wanted`.
    pub(super) async fn find(&self, wanted: &Wanted<'_>, answers: &mut Answers) {
        let plugins = match self.plugins().await {
            Ok(plugins) => plugins,
            Err(error) => return answers.problem(Provider::KubeletPlugin, error.into()),
        };
        let meant = |plugin: &&Plugin| {
            plugin.patterns.iter().any(|pattern| matching::matches(pattern, wanted.registry, wanted.repository))
        };
        let mut asked = 0;
        for plugin in plugins.iter().filter(meant) {
            plugin.find(wanted, answers).await;
            asked += 1;
        }
        if asked == 0 {
            answers.note(format!("no credential provider of {} is for {}", self.config.display(), wanted.registry));
        }
    }

    async fn plugins(&self) -> Result<Arc<Vec<Plugin>>, CredentialsError> {
        let (config, bin_dir) = (self.config.clone(), self.bin_dir.clone());
        let known = self.read.lock().clone();
        let read = tokio::task::spawn_blocking(move || {
            let stamp = stamp(&config)?;
            match known {
                Some((old, plugins)) if old == stamp => Ok((stamp, plugins)),
                _ => {
                    let plugins = read_all(&config, &bin_dir, &stamp)?;
                    Ok((stamp, Arc::new(plugins)))
                }
            }
        });
        let (stamp, plugins) = read.await.map_err(CredentialsError::Task)??;
        let mut read = self.read.lock();
        // Somebody else may have read the same meanwhile; what those plugins have said is worth keeping.
        if let Some((_, plugins)) = read.as_ref().filter(|(known, _)| *known == stamp) {
            return Ok(Arc::clone(plugins));
        }
        *read = Some((stamp, Arc::clone(&plugins)));
        Ok(plugins)
    }
}

/// The configuration's files in order, with what tells that one has changed.
fn stamp(config: &Path) -> Result<Stamp, CredentialsError> {
    let failed = |source| CredentialsError::Io { path: config.to_owned(), source };
    let mut paths = vec![config.to_owned()];
    if std::fs::metadata(config).map_err(failed)?.is_dir() {
        paths.clear();
        for entry in std::fs::read_dir(config).map_err(failed)?.take(MAX_PLUGINS) {
            let path = entry.map_err(failed)?.path();
            // As the kubelet reads a folder: these, in the order of their names.
            if path.extension().is_some_and(|kind| kind == "yaml" || kind == "yml" || kind == "json") {
                paths.push(path);
            }
        }
        paths.sort();
    }
    let stamped = paths.into_iter().map(|path| {
        let about = std::fs::metadata(&path).map_err(failed)?;
        Ok((path, about.modified().ok(), about.len()))
    });
    stamped.collect()
}

fn read_all(config: &Path, bin_dir: &Path, stamp: &Stamp) -> Result<Vec<Plugin>, CredentialsError> {
    let mut plugins: Vec<Plugin> = Vec::new();
    for (path, ..) in stamp {
        let wrong = |reason: String| CredentialsError::Configuration { path: path.clone(), reason };
        let bytes = read_limited(path)?.ok_or_else(|| wrong("it has just disappeared".to_owned()))?;
        let text = std::str::from_utf8(&bytes).map_err(|_| wrong("it is not text".to_owned()))?;
        // Plugins' environments may hold secrets, so the parser's own message, which quotes, is not repeated. JSON is
        // YAML too.
        let parsed: ConfigFile = serde_saphyr::from_str(text).map_err(|error| {
            let place = error.location().map_or_else(String::new, |at| format!(" at line {}", at.line()));
            wrong(format!("it is not the expected YAML or JSON{place}"))
        })?;
        if parsed.kind != CONFIG_KIND || !CONFIG_VERSIONS.contains(&parsed.api_version.as_str()) {
            let (kind, version) = (printable(&parsed.kind), printable(&parsed.api_version));
            return Err(wrong(format!("it is a {kind} of {version}, not a {CONFIG_KIND} of {}", CONFIG_VERSIONS[0])));
        }
        for plugin in parsed.providers {
            let plugin = Plugin::new(plugin, bin_dir).map_err(wrong)?;
            if plugins.len() >= MAX_PLUGINS || plugins.iter().any(|known| known.name == plugin.name) {
                return Err(wrong(format!("the provider {} is there twice, or one too many", plugin.name)));
            }
            plugins.push(plugin);
        }
    }
    if plugins.is_empty() {
        let reason = "it names no provider".to_owned();
        return Err(CredentialsError::Configuration { path: config.to_owned(), reason });
    }
    Ok(plugins)
}

impl Plugin {
    fn new(config: PluginConfig, bin_dir: &Path) -> Result<Self, String> {
        let name = printable(&config.name);
        if name.is_empty() || matches!(name.as_str(), "." | "..") || name.contains(['/', '\\', ' ']) {
            return Err(format!("'{name}' is not the name of a program in the plugins' folder"));
        }
        if !EXEC_VERSIONS.contains(&config.api_version.as_str()) {
            let version = printable(&config.api_version);
            return Err(format!(
                "the provider {name} speaks {version}, which is not one of {}",
                EXEC_VERSIONS.join(", ")
            ));
        }
        if config.match_images.is_empty() {
            return Err(format!("the provider {name} has no matchImages"));
        }
        if let Some(pattern) = config.match_images.iter().find(|pattern| !matching::is_pattern(pattern)) {
            return Err(format!("the provider {name} has the pattern '{}', which names no host", printable(pattern)));
        }
        let default_lifetime = parse_duration(&config.default_cache_duration)
            .ok_or_else(|| format!("the provider {name} has no defaultCacheDuration such as 12h"))?;
        let program = Program {
            name: format!("the credential provider {name}"),
            path: bin_dir.join(&name),
            arguments: config.args,
            environment: config.env.into_iter().map(|variable| (variable.name, variable.value)).collect(),
        };
        Ok(Self {
            name,
            program,
            patterns: config.match_images,
            version: config.api_version,
            default_lifetime,
            needs_service_account: config.token_attributes.is_some_and(|wanted| wanted.require_service_account),
            said: Cache::default(),
        })
    }

    async fn find(&self, wanted: &Wanted<'_>, answers: &mut Answers) {
        if self.needs_service_account {
            let program = self.program.name.clone();
            let reason = "it wants the token of a pod's service account, which a node has not".to_owned();
            return answers.problem(Provider::KubeletPlugin, CredentialsError::Answer { program, reason }.into());
        }
        let image = format!("{}/{}", wanted.registry, wanted.repository);
        let keys = [format!("image {image}"), format!("registry {}", wanted.registry), "global".to_owned()];
        let meters = answers.meters();
        let ask = async {
            meters.asked(Provider::KubeletPlugin);
            self.ask(&image, &keys, wanted).await
        };
        let meant = |logins: &Logins| -> Vec<Credential> {
            let fitting = logins.iter().filter(|(key, _)| wanted.is_meant_by(key));
            fitting.map(|(_, credential)| credential.clone()).collect()
        };
        let is_refused = |logins: &Logins| wanted.has_refused(&meant(logins));
        let (kept, problem) = self.said.answer(&self.program.name, &keys, wanted.deadline, is_refused, ask).await;
        if let Some(problem) = problem {
            answers.problem(Provider::KubeletPlugin, problem);
        }
        let Some(kept) = kept else { return };
        let logins = meant(&kept.value);
        if logins.is_empty() {
            answers.note(format!("{} has none for {}", self.program.name, wanted.registry));
        }
        for credential in logins {
            let description = format!("with {} from {}", credential.who(), self.program.name);
            let (renew_at, provider) = (kept.renew_at(), Provider::KubeletPlugin);
            answers.add(Login { credential, description, renew_at, provider });
        }
    }

    async fn ask(
        &self,
        image: &str,
        keys: &[String; 3],
        wanted: &Wanted<'_>,
    ) -> Result<Fresh<Logins>, CredentialsError> {
        let unusable = |reason: String| CredentialsError::Answer { program: self.program.name.clone(), reason };
        let request = Request { kind: REQUEST_KIND, api_version: &self.version, image };
        let question = serde_json::to_vec(&request).map_err(|error| unusable(format!("no request: {error}")))?;
        let ended = self.program.run(&question, PLUGIN_TIMEOUT, wanted.deadline).await?;
        if !ended.success {
            let (program, status, message) = (self.program.name.clone(), ended.status, ended.message);
            return Err(CredentialsError::Failed { program, status, message });
        }
        // The parser's own message may quote a value, and the value may be a password.
        let response: Response = serde_json::from_slice(&ended.answer).map_err(|error| {
            unusable(format!("it is not the expected JSON, at line {}, column {}", error.line(), error.column()))
        })?;
        if response.kind != RESPONSE_KIND || response.api_version != self.version {
            return Err(unusable(format!("it is not a {RESPONSE_KIND} of {}", self.version)));
        }
        let lifetime = match &response.cache_duration {
            None => self.default_lifetime,
            Some(text) => parse_duration(text).ok_or_else(|| unusable("its cacheDuration is none".to_owned()))?,
        };
        let key = match response.cache_key_type {
            CacheKeyType::Image => &keys[0],
            CacheKeyType::Registry => &keys[1],
            CacheKeyType::Global => &keys[2],
        };
        let auth = response.auth.unwrap_or_default();
        if auth.len() > MAX_LOGINS {
            return Err(unusable(format!("it has more than {MAX_LOGINS} logins")));
        }
        // The most special first, as the kubelet's keyring: keys in reverse order.
        let logins = auth
            .into_iter()
            .rev()
            .map(|(pattern, login)| (matching::key(&pattern), Credential::of_pair(&login.username, login.password)));
        let logins = logins.filter(|(_, credential)| *credential != Credential::Anonymous).collect();
        Ok(Fresh { key: key.clone(), value: Arc::new(logins), lifetime: lifetime.min(LONGEST_LIFETIME) })
    }
}

/// A length of time as Go writes it: `12h`, `1h30m`, `1.5s`, `0`. Not below zero.
fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut seconds = 0.0;
    loop {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
        seconds += number
            * match &rest[..unit] {
                "ns" => 1e-9,
                "us" | "\u{b5}s" | "\u{3bc}s" => 1e-6,
                "ms" => 1e-3,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3600.0,
                _ => return None,
            };
        rest = &rest[unit..];
        if rest.is_empty() {
            return Duration::try_from_secs_f64(seconds).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_gos() {
        let cases = [
            ("12h", Some(43_200_000)),
            ("1h30m", Some(5_400_000)),
            ("12h0m0s", Some(43_200_000)),
            ("1.5s", Some(1500)),
            ("250ms", Some(250)),
            ("0", Some(0)),
            ("0s", Some(0)),
            ("", None),
            ("12", None),
            ("h", None),
            ("-1h", None),
            ("1d", None),
            ("1e400s", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_duration(text), expected.map(Duration::from_millis), "'{text}'");
        }
    }

    #[test]
    fn configurations_are_checked() {
        let provider = "{name: p, matchImages: ['*.test'], defaultCacheDuration: 1h, apiVersion: credentialprovider.kubelet.k8s.io/v1}";
        let config = |version: &str, providers: &str| {
            format!(
                "apiVersion: kubelet.config.k8s.io/{version}\nkind: CredentialProviderConfig\nproviders: [{providers}]\n"
            )
        };
        let folder = tempfile::tempdir().expect("a folder");
        let read = |text: &str| {
            let path = folder.path().join("config.yaml");
            std::fs::write(&path, text).expect("written");
            read_all(&path, Path::new("/plugins"), &stamp(&path).expect("there"))
        };
        for version in ["v1", "v1beta1", "v1alpha1"] {
            let plugins = read(&config(version, provider)).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(plugins[0].program.path, Path::new("/plugins/p"));
        }
        let json = r#"{"kind":"CredentialProviderConfig","apiVersion":"kubelet.config.k8s.io/v1","newField":1,"providers":[
            {"name":"e","matchImages":["a.test"],"defaultCacheDuration":"12h0m0s","args":["get"],
             "apiVersion":"credentialprovider.kubelet.k8s.io/v1beta1","env":[{"name":"A","value":"b"}]}]}"#;
        assert_eq!(read(json).expect("JSON is YAML").len(), 1);
        let wrong = [
            ("hunter2: [".to_owned(), "not the expected"),
            (config("v9", provider), "v9"),
            (config("v1", ""), "no provider"),
            (config("v1", &format!("{provider},{provider}")), "twice"),
            (config("v1", &provider.replace("name: p", "name: ../p")), "name of a program"),
            (config("v1", &provider.replace("'*.test'", "")), "matchImages"),
            (config("v1", &provider.replace("'*.test'", "/path")), "names no host"),
            (config("v1", &provider.replace("1h", "soon")), "defaultCacheDuration"),
            (config("v1", &provider.replace("k8s.io/v1}", "k8s.io/v7}")), "v7"),
        ];
        for (text, expected) in wrong {
            let error = read(&text).expect_err(&text).to_string();
            assert!(error.contains(expected) && !error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_folder_of_configurations_is_read_in_the_order_of_names() {
        let folder = tempfile::tempdir().expect("a folder");
        for (file, name) in [("b.json", "second"), ("a.yaml", "first"), ("c.txt", "never")] {
            let text = format!(
                r#"{{"kind":"CredentialProviderConfig","apiVersion":"kubelet.config.k8s.io/v1","providers":[{{"name":"{name}",
                "matchImages":["a.test"],"defaultCacheDuration":"1h","apiVersion":"credentialprovider.kubelet.k8s.io/v1"}}]}}"#
            );
            std::fs::write(folder.path().join(file), text).expect("written");
        }
        let stamp = stamp(folder.path()).expect("there");
        let plugins = read_all(folder.path(), Path::new("/plugins"), &stamp).expect("right");
        assert_eq!(plugins.iter().map(|plugin| plugin.name.as_str()).collect::<Vec<_>>(), ["first", "second"]);
    }
}
