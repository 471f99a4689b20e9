//! Docker's logins: `config.json`, its credential helpers, and the documents of the same form in Kubernetes secrets.
//!
//! The file is read each time a login is needed, so a login that is renewed on the disk is used without a restart. A
//! helper (`docker-credential-NAME get`, the registry on standard input, JSON on standard output) is asked again when
//! its answer is old or was refused.

use std::collections::BTreeMap;
use std::env;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;
use zeroize::Zeroizing;

use super::cache::{Cache, Fresh, Problem};
use super::error::CredentialsError;
use super::process::Program;
use super::secret::{Credential, Secret};
use super::{Answers, Login, Provider, Wanted, matching, printable};

/// Bytes: the largest file that is read; one with a hundred logins has some 20 KiB.
pub(super) const MAX_FILE_BYTES: u64 = 1 << 20;

/// How long a helper may take. The slow ones ask a cloud's token service.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);

/// How long a helper's login is used before it is asked again. Helpers do not say how long theirs are good, and keep
/// them themselves; the shortest known are good for 15 minutes.
const HELPER_LIFETIME: Duration = Duration::from_secs(300);

/// What a helper says, on standard output, when it has no login (docker-credential-helpers, `credentials/error.go`).
const NOT_FOUND: &str = "credentials not found in native keychain";

/// Docker Hub as helpers know it.
const DOCKER_HUB_SERVER: &str = "https://index.docker.io/v1/";

#[derive(Deserialize)]
pub(super) struct Document {
    #[serde(default)]
    pub(super) auths: BTreeMap<String, Entry>,
    #[serde(default, rename = "credsStore")]
    store: Option<String>,
    #[serde(default, rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
pub(super) struct Entry {
    #[serde(default)]
    auth: Secret,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: Secret,
    #[serde(default)]
    identitytoken: Secret,
    #[serde(default)]
    registrytoken: Secret,
}

#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(rename = "Username", default)]
    user: String,
    #[serde(rename = "Secret", default)]
    secret: Secret,
}

/// Where docker's logins are.
#[derive(Debug)]
pub(super) struct DockerLogins {
    path: Option<PathBuf>,
    /// Where helpers are; empty for wherever `PATH` leads.
    helper_dir: PathBuf,
    helped: Cache<Result<Option<Credential>, Problem>>,
}

impl DockerLogins {
    /// The file `path`, or the one that docker's tools use in this environment, with the helpers in `helper_dir`.
    pub(super) fn at(path: Option<PathBuf>, helper_dir: PathBuf) -> Self {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let usual = || set("DOCKER_CONFIG").or_else(|| Some(set("HOME")?.join(".docker")));
        let path = path.or_else(|| Some(usual()?.join("config.json")));
        Self { path, helper_dir, helped: Cache::default() }
    }

    /// Adds what is stored for `wanted`: a helper's login first, then the file's own.
    pub(super) async fn find(&self, wanted: &Wanted<'_>, answers: &mut Answers) {
        let Some(path) = self.path.clone() else {
            return answers.note("neither DOCKER_CONFIG nor HOME is set".to_owned());
        };
        answers.asked(Provider::DockerConfig);
        let reading = path.clone();
        let document = tokio::task::spawn_blocking(move || read(&reading)).await;
        let document = match document.map_err(CredentialsError::Task) {
            Ok(Ok(Some(document))) => document,
            Ok(Ok(None)) => return answers.note(format!("{} does not exist", path.display())),
            Ok(Err(error)) | Err(error) => return answers.problem(Provider::DockerConfig, error.into()),
        };
        if let Some(helper) = document.helper(wanted.registry) {
            self.ask_helper(helper, wanted, answers).await;
        }
        match document.stored(wanted) {
            Ok(Some((key, credential))) => {
                let description = match &credential {
                    Credential::Basic { .. } => format!("with {} from {}", credential.who(), path.display()),
                    _ => format!("with the token for {key} from {}", path.display()),
                };
                answers.add(Login { credential, description, renew_at: None, provider: Provider::DockerConfig });
            }
            Ok(None) => answers.note(format!("{} has none for {}", path.display(), wanted.registry)),
            Err(reason) => {
                answers.problem(Provider::DockerConfig, CredentialsError::Malformed { path, reason }.into());
            }
        }
    }

    async fn ask_helper(&self, helper: &str, wanted: &Wanted<'_>, answers: &mut Answers) {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        let program = format!("docker-credential-{}", printable(helper));
        if helper.is_empty() || !helper.chars().all(plain) {
            let reason = "its name may have letters, digits, '-', '_' and '.' only".to_owned();
            return answers.problem(Provider::DockerHelper, CredentialsError::Answer { program, reason }.into());
        }
        let hub = matching::aliases(wanted.registry).contains(&"index.docker.io");
        let server = if hub { DOCKER_HUB_SERVER } else { wanted.registry };
        let key = format!("{helper} {server}");
        let meters = answers.meters();
        let ask = async {
            meters.asked(Provider::DockerHelper);
            let credential = self.run_helper(&program, server, wanted).await?;
            Ok(Fresh { key: key.clone(), value: credential, lifetime: HELPER_LIFETIME })
        };
        let is_refused = |credential: &Option<Credential>| wanted.has_refused(credential.as_slice());
        let keys = std::slice::from_ref(&key);
        let (kept, problem) = self.helped.answer(&program, keys, wanted.deadline, is_refused, ask).await;
        if let Some(problem) = problem {
            answers.problem(Provider::DockerHelper, problem);
        }
        let Some(kept) = kept else { return };
        let renew_at = kept.renew_at();
        match kept.value {
            Some(credential) => {
                let description = format!("with {} from {program}", credential.who());
                answers.add(Login { credential, description, renew_at, provider: Provider::DockerHelper });
            }
            None => answers.note(format!("{program} has none for {server}")),
        }
    }

    async fn run_helper(
        &self,
        program: &str,
        server: &str,
        wanted: &Wanted<'_>,
    ) -> Result<Option<Credential>, CredentialsError> {
        let helper = Program {
            name: program.to_owned(),
            path: self.helper_dir.join(program),
            arguments: vec!["get".to_owned()],
            environment: Vec::new(),
        };
        let ended = helper.run(server.as_bytes(), HELPER_TIMEOUT, wanted.deadline).await?;
        if !ended.success {
            if ended.answer.trim_ascii() == NOT_FOUND.as_bytes() {
                return Ok(None);
            }
            let (program, status, message) = (program.to_owned(), ended.status, ended.message);
            return Err(CredentialsError::Failed { program, status, message });
        }
        // The parser's own message may quote a value, and the value may be a password.
        let answer: HelperAnswer = serde_json::from_slice(&ended.answer).map_err(|error| CredentialsError::Answer {
            program: program.to_owned(),
            reason: format!("it is not the expected JSON, at line {}, column {}", error.line(), error.column()),
        })?;
        let credential = Credential::of_pair(&answer.user, answer.secret);
        Ok(Some(credential).filter(|credential| *credential != Credential::Anonymous))
    }
}

/// The document in the file `path`, if there is one.
pub(super) fn read(path: &Path) -> Result<Option<Document>, CredentialsError> {
    let Some(bytes) = read_limited(path)? else { return Ok(None) };
    parse(&bytes).map(Some).map_err(|reason| CredentialsError::Malformed { path: path.to_owned(), reason })
}

/// The bytes of the file `path`, if there is one.
pub(super) fn read_limited(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, CredentialsError> {
    let failed = |source| CredentialsError::Io { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let reason = format!("it is longer than {MAX_FILE_BYTES} bytes");
        return Err(CredentialsError::Malformed { path: path.to_owned(), reason });
    }
    Ok(Some(bytes))
}

/// A document, or where it is malformed: the parser's own message may quote a value, and the value may be a password.
pub(super) fn parse(bytes: &[u8]) -> Result<Document, String> {
    serde_json::from_slice(bytes).map_err(|error| format!("line {}, column {}", error.line(), error.column()))
}

impl Document {
    /// A document of the old form (`.dockercfg`), which is the logins alone.
    pub(super) fn of_logins(auths: BTreeMap<String, Entry>) -> Self {
        Self { auths, store: None, helpers: BTreeMap::new() }
    }

    /// The helper for `registry`: its own, or the one for all.
    fn helper(&self, registry: &str) -> Option<&str> {
        let aliases = matching::aliases(registry);
        let own = self.helpers.iter().find(|(name, _)| aliases.contains(&matching::key(name).as_str()));
        own.map(|(_, helper)| helper).or(self.store.as_ref()).map(String::as_str).filter(|helper| !helper.is_empty())
    }

    /// The login in the file itself: the most special entry that has one, by the rules of docker's and podman's tools.
    fn stored(&self, wanted: &Wanted<'_>) -> Result<Option<(String, Credential)>, String> {
        for key in keys(wanted.registry, wanted.repository) {
            let Some(entry) = self.auths.iter().find(|(name, _)| matching::key(name) == key).map(|(_, entry)| entry)
            else {
                continue;
            };
            match entry.credential().map_err(|reason| format!("the entry for {key}: {reason}"))? {
                // An entry without content: the secret is with a helper.
                Credential::Anonymous => {}
                credential => return Ok(Some((key, credential))),
            }
        }
        Ok(None)
    }
}

/// The names that an entry may have, the most special first: `host/team/app`, `host/team`, `host`.
fn keys(registry: &str, repository: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut path = Some(repository);
    while let Some(prefix) = path {
        keys.push(format!("{registry}/{prefix}"));
        path = prefix.rsplit_once('/').map(|(parent, _)| parent);
    }
    keys.extend(matching::aliases(registry).into_iter().map(str::to_owned));
    keys
}

impl Entry {
    pub(super) fn credential(&self) -> Result<Credential, &'static str> {
        if !self.registrytoken.is_empty() {
            return Ok(Credential::Access(self.registrytoken.clone()));
        }
        if !self.identitytoken.is_empty() {
            return Ok(Credential::Identity(self.identitytoken.clone()));
        }
        if self.auth.is_empty() {
            return Ok(Credential::of_pair(&self.username, self.password.clone()));
        }
        let auth = self.auth.reveal();
        let decoded = STANDARD.decode(auth).or_else(|_| STANDARD_NO_PAD.decode(auth));
        let bytes = Zeroizing::new(decoded.map_err(|_| "auth is not base64 text")?);
        let text = std::str::from_utf8(&bytes).map_err(|_| "auth is not base64 text")?;
        let (user, password) = text.split_once(':').ok_or("auth holds no colon")?;
        // Old tools padded with zero bytes.
        Ok(Credential::of_pair(user, Secret::new(password.trim_end_matches('\0'))))
    }
}
