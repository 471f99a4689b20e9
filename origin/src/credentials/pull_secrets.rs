//! Kubernetes' image pull secrets: documents of type `kubernetes.io/dockerconfigjson` (and the older `dockercfg`), from
//! folders that somebody fills, or handed in by whoever watches the cluster.
//!
//! A folder may be a mounted Secret (`.dockerconfigjson` in it), hold several of them as folders, or hold the documents
//! as files of any name. It is read each time a login is needed, so a secret that changes is used without a restart.
//! Documents that are handed in live in memory alone. Keys match images by the kubelet's rules; the most special key
//! goes first.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::docker::{Document, Entry, parse, read_limited};
use super::error::CredentialsError;
use super::secret::Credential;
use super::{Answers, Login, Provider, Wanted, matching};

/// Documents that are looked at; a node sees the secrets of its own pods.
const MAX_DOCUMENTS: usize = 1024;

/// The name of the document in a secret of each type.
const DOCUMENT_NAMES: [&str; 2] = [".dockerconfigjson", ".dockercfg"];

/// Where pull secrets are. Cheap to clone; clones share what was handed in.
#[derive(Debug, Clone, Default)]
pub struct PullSecrets {
    folders: Vec<PathBuf>,
    given: std::sync::Arc<parking_lot::RwLock<BTreeMap<String, std::sync::Arc<Given>>>>,
}

/// A document that was handed in.
struct Given(Zeroizing<Vec<u8>>);

impl std::fmt::Debug for Given {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Given(..)")
    }
}

impl PullSecrets {
    /// The documents in `folders`.
    pub fn in_folders(folders: Vec<PathBuf>) -> Self {
        Self { folders, ..Self::default() }
    }

    /// Takes over the document of the secret `name` (`namespace/name`), in the place of an earlier one of that name.
    ///
    /// # Errors
    /// When it is no such document, or there are too many.
    pub fn insert(&self, name: &str, document: &[u8]) -> Result<(), CredentialsError> {
        let malformed = |reason: String| CredentialsError::Malformed { path: name.into(), reason };
        parse_secret(document).map_err(malformed)?;
        let mut given = self.given.write();
        if given.len() >= MAX_DOCUMENTS && !given.contains_key(name) {
            return Err(malformed(format!("it would be one more than {MAX_DOCUMENTS} secrets")));
        }
        given.insert(name.to_owned(), std::sync::Arc::new(Given(Zeroizing::new(document.to_vec()))));
        Ok(())
    }

    /// Forgets the secret `name`. Whether it was there.
    pub fn remove(&self, name: &str) -> bool {
        self.given.write().remove(name).is_some()
    }

    pub(super) async fn find(&self, wanted: &Wanted<'_>, answers: &mut Answers) {
        let given = self.given.read().clone();
        if self.folders.is_empty() && given.is_empty() {
            return;
        }
        answers.asked(Provider::PullSecret);
        let folders = self.folders.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let (mut documents, mut problems) = (Vec::new(), Vec::new());
            for (name, bytes) in given {
                match parse_secret(&bytes.0) {
                    Ok(document) => documents.push((name, document)),
                    Err(reason) => problems.push(CredentialsError::Malformed { path: name.into(), reason }),
                }
            }
            for folder in &folders {
                read_folder(folder, 0, &mut documents, &mut problems);
            }
            (documents, problems)
        });
        let (documents, problems) = match reading.await {
            Ok(read) => read,
            Err(error) => return answers.problem(Provider::PullSecret, CredentialsError::Task(error).into()),
        };
        for problem in problems {
            answers.problem(Provider::PullSecret, problem.into());
        }
        let count = documents.len();
        let mut found = Vec::new();
        for (name, document) in documents {
            let fitting = document.auths.iter().filter(|(key, _)| wanted.is_meant_by(&matching::key(key)));
            for (key, entry) in fitting {
                match entry.credential() {
                    Ok(Credential::Anonymous) => {}
                    Ok(credential) => found.push((matching::key(key), name.clone(), credential)),
                    Err(reason) => {
                        let reason = format!("the entry for {}: {reason}", super::printable(key));
                        let error = CredentialsError::Malformed { path: name.clone().into(), reason };
                        answers.problem(Provider::PullSecret, error.into());
                    }
                }
            }
        }
        if found.is_empty() {
            answers.note(format!("none of {count} pull secrets is for {}", wanted.registry));
        }
        found.sort_by(|(a, ..), (b, ..)| b.cmp(a));
        for (_, name, credential) in found {
            let description = format!("with {} from the pull secret {name}", credential.who());
            answers.add(Login { credential, description, renew_at: None, provider: Provider::PullSecret });
        }
    }
}

/// A document of either type.
fn parse_secret(bytes: &[u8]) -> Result<Document, String> {
    let document = parse(bytes)?;
    if document.auths.is_empty()
        && let Ok(auths) = serde_json::from_slice::<BTreeMap<String, Entry>>(bytes)
    {
        return Ok(Document::of_logins(auths));
    }
    Ok(document)
}

/// Reads the documents of `folder`, and of the folders in it.
fn read_folder(
    folder: &Path,
    depth: usize,
    documents: &mut Vec<(String, Document)>,
    problems: &mut Vec<CredentialsError>,
) {
    let failed = |source| CredentialsError::Io { path: folder.to_owned(), source };
    let mut paths = Vec::new();
    match std::fs::read_dir(folder) {
        Ok(entries) => {
            for entry in entries.take(MAX_DOCUMENTS) {
                match entry {
                    Ok(entry) => paths.push(entry.path()),
                    Err(error) => problems.push(failed(error)),
                }
            }
        }
        // Whoever fills it may not have begun.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => problems.push(failed(error)),
    }
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // Mounted secrets have their versions in `..2026_01_01` beside; hidden files are no secrets' names.
        if name.starts_with('.') && !DOCUMENT_NAMES.contains(&name.as_ref()) {
            continue;
        }
        if documents.len() >= MAX_DOCUMENTS {
            let reason = format!("there are more than {MAX_DOCUMENTS} secrets");
            return problems.push(CredentialsError::Malformed { path: folder.to_owned(), reason });
        }
        if path.is_dir() {
            if depth == 0 {
                read_folder(&path, depth + 1, documents, problems);
            }
            continue;
        }
        let read = read_limited(&path).and_then(|bytes| match bytes {
            Some(bytes) => parse_secret(&bytes)
                .map(Some)
                .map_err(|reason| CredentialsError::Malformed { path: path.clone(), reason }),
            None => Ok(None),
        });
        match read {
            Ok(Some(document)) => documents.push((path.display().to_string(), document)),
            Ok(None) => {}
            Err(error) => problems.push(error),
        }
    }
}
