//! Logins that docker's tools have stored: `config.json`, in the folder that `DOCKER_CONFIG` names or in `.docker` of the
//! home directory.
//!
//! The file is read each time a login is needed, so a login that is renewed on the disk is used without a restart.
//! Secrets are kept in types that do not show them.

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use serde::Deserialize;
use thiserror::Error;

/// Bytes: the largest file that is read; one with a hundred logins has some 20 KiB.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Docker's user name for an entry whose password is an identity token.
const TOKEN_USER: &str = "<token>";

/// Names under which docker's tools have stored logins for Docker Hub over the years.
const DOCKER_HUB_NAMES: [&str; 3] = ["docker.io", "index.docker.io", "registry-1.docker.io"];

/// Why stored logins could not be read.
#[derive(Debug, Error)]
pub enum CredentialsError {
    /// The file is there but cannot be read.
    #[error("the logins in {} cannot be read: {source}; check its permissions, or name another folder with DOCKER_CONFIG", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file makes no sense. Its content is not repeated here, since it holds secrets.
    #[error("the logins in {} are malformed ({reason}); mend the file, or name another folder with DOCKER_CONFIG", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, without content.
        reason: String,
    },
}

/// A secret. It can be used, but not be printed.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Secret(String);

impl Secret {
    pub(super) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The secret itself, for a request.
    pub(super) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// How to show who we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Credential {
    /// Not at all.
    Anonymous,
    /// By name and password.
    Basic { user: String, password: Secret },
    /// By a refresh token, which a token service exchanges for access tokens.
    Identity(Secret),
    /// By an access token that is ready for use.
    Access(Secret),
}

/// A credential, and where it is from, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Login {
    pub(super) credential: Credential,
    /// Such as `with the login of ann from /home/ann/.docker/config.json`.
    pub(super) description: String,
}

#[derive(Deserialize)]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
    #[serde(default, rename = "credsStore")]
    store: Option<String>,
    #[serde(default, rename = "credHelpers")]
    helpers: BTreeMap<String, String>,
}

#[derive(Default, Deserialize)]
struct Entry {
    #[serde(default)]
    auth: String,
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    identitytoken: String,
    #[serde(default)]
    registrytoken: String,
}

/// Where logins are stored.
#[derive(Debug, Clone)]
pub(super) struct Logins {
    path: Option<PathBuf>,
}

impl Logins {
    /// The file `path`, or the one that docker's tools use in this environment.
    pub(super) fn at(path: Option<PathBuf>) -> Self {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let usual = || set("DOCKER_CONFIG").or_else(|| Some(set("HOME")?.join(".docker")));
        Self { path: path.or_else(|| Some(usual()?.join("config.json"))) }
    }

    /// The login for `repository` at the registry `host` (with port). Without a stored one it is anonymous. Blocks on
    /// the disk.
    pub(super) fn find(&self, host: &str, repository: &str) -> Result<Login, CredentialsError> {
        let anonymous = |reason: String| Login { credential: Credential::Anonymous, description: reason };
        let Some(path) = &self.path else {
            return Ok(anonymous("without a login, as neither DOCKER_CONFIG nor HOME is set".to_owned()));
        };
        let Some(config) = read(path)? else {
            return Ok(anonymous(format!("without a login, as {} does not exist", path.display())));
        };
        let keys = keys(host, repository);
        for key in &keys {
            let Some(entry) = config.auths.iter().find(|(name, _)| plain(name) == key).map(|(_, entry)| entry) else {
                continue;
            };
            let credential = entry.credential().map_err(|reason| CredentialsError::Malformed {
                path: path.clone(),
                reason: format!("the entry for {key}: {reason}"),
            })?;
            let from = path.display();
            let description = match &credential {
                // An entry without content: the secret is with a helper.
                Credential::Anonymous => continue,
                Credential::Basic { user, .. } => format!("with the login of '{user}' from {from}"),
                Credential::Identity(_) | Credential::Access(_) => format!("with the token for {key} from {from}"),
            };
            return Ok(Login { credential, description });
        }
        let helped = config.store.is_some() || config.helpers.keys().any(|name| keys.iter().any(|key| key == name));
        let note = if helped { ", and its credential helper is not supported; store a login there" } else { "" };
        Ok(anonymous(format!("without a login, as {} has none for {host}{note}", path.display())))
    }
}

fn read(path: &Path) -> Result<Option<DockerConfig>, CredentialsError> {
    let failed = |source| CredentialsError::Io { path: path.to_owned(), source };
    let malformed = |reason: String| CredentialsError::Malformed { path: path.to_owned(), reason };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        return Err(malformed(format!("it is longer than {MAX_FILE_BYTES} bytes")));
    }
    // The parser's own message may quote a value, and the value may be a password.
    let config = serde_json::from_slice(&bytes);
    let config = config.map_err(|error| malformed(format!("line {}, column {}", error.line(), error.column())))?;
    Ok(Some(config))
}

/// The names that an entry may have, the most special first: `host/team/app`, `host/team`, `host`.
fn keys(host: &str, repository: &str) -> Vec<String> {
    let mut keys = Vec::new();
    let mut path = Some(repository);
    while let Some(prefix) = path {
        keys.push(format!("{host}/{prefix}"));
        path = prefix.rsplit_once('/').map(|(parent, _)| parent);
    }
    keys.push(host.to_owned());
    if DOCKER_HUB_NAMES.contains(&host) {
        keys.extend(DOCKER_HUB_NAMES.iter().filter(|name| **name != host).map(|name| (*name).to_owned()));
    }
    keys
}

/// An entry's name without the parts that old tools wrote around it: `https://index.docker.io/v1/` is `index.docker.io`.
fn plain(name: &str) -> &str {
    let name = name.strip_prefix("https://").or_else(|| name.strip_prefix("http://")).unwrap_or(name);
    let name = name.trim_end_matches('/');
    name.strip_suffix("/v1").or_else(|| name.strip_suffix("/v2")).unwrap_or(name)
}

impl Entry {
    fn credential(&self) -> Result<Credential, &'static str> {
        if !self.registrytoken.is_empty() {
            return Ok(Credential::Access(Secret::new(&self.registrytoken)));
        }
        if !self.identitytoken.is_empty() {
            return Ok(Credential::Identity(Secret::new(&self.identitytoken)));
        }
        let (user, password) = if self.auth.is_empty() {
            (self.username.clone(), self.password.clone())
        } else {
            let decoded = STANDARD.decode(&self.auth).or_else(|_| STANDARD_NO_PAD.decode(&self.auth));
            let text = decoded.ok().and_then(|bytes| String::from_utf8(bytes).ok()).ok_or("auth is not base64 text")?;
            let (user, password) = text.split_once(':').ok_or("auth holds no colon")?;
            // Old tools padded with zero bytes.
            (user.to_owned(), password.trim_end_matches('\0').to_owned())
        };
        Ok(match user.as_str() {
            "" => Credential::Anonymous,
            TOKEN_USER => Credential::Identity(Secret::new(password)),
            _ => Credential::Basic { user, password: Secret::new(password) },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logins(text: &str) -> (tempfile::TempDir, Logins) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("config.json");
        std::fs::write(&path, text).expect("written");
        (folder, Logins::at(Some(path)))
    }

    fn basic(user: &str, password: &str) -> Credential {
        Credential::Basic { user: user.to_owned(), password: Secret::new(password) }
    }

    #[test]
    fn the_most_special_entry_wins() {
        let text = format!(
            r#"{{"auths":{{"r.test:5000":{{"auth":"{}"}},"r.test:5000/team":{{"username":"bob","password":"b"}},
                "https://index.docker.io/v1/":{{"auth":"{}"}},"id.test":{{"auth":"{}","identitytoken":"refresh"}},
                "old.test":{{"auth":"{}"}},"access.test":{{"registrytoken":"ready"}}}}}}"#,
            STANDARD.encode("ann:a:b"),
            STANDARD.encode("hub:h\0\0"),
            STANDARD.encode("ann:"),
            STANDARD.encode("<token>:refresh"),
        );
        let (_folder, logins) = logins(&text);
        let cases = [
            ("r.test:5000", "app", basic("ann", "a:b")),
            ("r.test:5000", "team/app", basic("bob", "b")),
            ("r.test:5000", "teamster/app", basic("ann", "a:b")),
            ("docker.io", "library/redis", basic("hub", "h")),
            ("id.test", "app", Credential::Identity(Secret::new("refresh"))),
            ("old.test", "app", Credential::Identity(Secret::new("refresh"))),
            ("access.test", "app", Credential::Access(Secret::new("ready"))),
            ("r.test", "app", Credential::Anonymous),
        ];
        for (host, repository, expected) in cases {
            let login = logins.find(host, repository).expect("readable");
            assert_eq!(login.credential, expected, "{host}/{repository}");
            let shown = format!("{login:?}");
            assert!(!shown.contains("a:b") && !shown.contains("refresh") && !shown.contains("ready"), "{shown}");
        }
    }

    #[test]
    fn no_login_says_why() {
        let missing = Logins::at(Some("/nonexistent/config.json".into())).find("r.test", "app").expect("anonymous");
        assert!(missing.description.contains("/nonexistent/config.json does not exist"), "{}", missing.description);
        let (_folder, logins) = logins(r#"{"auths":{"r.test":{}},"credsStore":"pass"}"#);
        let login = logins.find("r.test", "app").expect("anonymous");
        assert!(login.description.contains("credential helper is not supported"), "{}", login.description);
    }

    #[test]
    fn broken_files_are_named_without_their_secrets() {
        let cases = [
            r#"{"auths":{"r.test":{"auth":{"secret":"hunter2"}}}}"#,
            r#"{"auths":{"r.test":{"auth":"hunter2!"}}}"#,
            r#"{"auths":"hunter2"}"#,
            "hunter2",
        ];
        for text in cases {
            let (folder, logins) = logins(text);
            let error = logins.find("r.test", "app").expect_err(text).to_string();
            assert!(error.contains(&folder.path().display().to_string()) && error.contains("DOCKER_CONFIG"), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
