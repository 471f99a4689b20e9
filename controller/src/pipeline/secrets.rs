//! Where the logins of workloads and policies are read.

use std::fmt;
use std::io::{self, Read as _};
use std::path::PathBuf;

use futures::future::BoxFuture;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::event::SecretRef;

/// Longest document that is read, in bytes: what a Kubernetes Secret may hold.
const DOCUMENT_LEN_MAX_BYTES: u64 = 1 << 20;

/// A document with logins, of type `kubernetes.io/dockerconfigjson` or `dockercfg`. It is overwritten when dropped.
pub type Document = Zeroizing<Vec<u8>>;

/// A secret that cannot be read.
#[derive(Debug, Error)]
#[error("the secret {secret} cannot be read: {reason}")]
pub struct SecretsError {
    /// The secret.
    pub secret: SecretRef,
    /// Why, without anything of its content.
    pub reason: String,
}

/// Where secrets are.
pub trait Secrets: fmt::Debug + Send + Sync + 'static {
    /// The document of `secret`; `None` when there is none. Cancel safe.
    fn read<'a>(&'a self, secret: &'a SecretRef) -> BoxFuture<'a, Result<Option<Document>, SecretsError>>;
}

/// Secrets in a folder: `NAMESPACE/NAME.json`, which holds the document itself.
#[derive(Debug, Clone)]
pub struct FolderSecrets {
    folder: PathBuf,
}

impl FolderSecrets {
    /// The secrets below `folder`, which need not exist.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }
}

/// Whether `name` is one of Kubernetes' names, and so no way out of the folder.
fn is_plain(name: &str) -> bool {
    let plain = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-.".contains(&byte));
    plain && !name.is_empty() && !name.starts_with('.') && name.len() <= 253
}

impl Secrets for FolderSecrets {
    fn read<'a>(&'a self, secret: &'a SecretRef) -> BoxFuture<'a, Result<Option<Document>, SecretsError>> {
        let failed = |reason: String| SecretsError { secret: secret.clone(), reason };
        Box::pin(async move {
            if !is_plain(&secret.namespace) || !is_plain(&secret.name) {
                return Err(failed("its name is none that Kubernetes allows".to_owned()));
            }
            let path = self.folder.join(&secret.namespace).join(format!("{}.json", secret.name));
            let reading = tokio::task::spawn_blocking(move || read(&path)).await;
            reading.map_err(|error| failed(error.to_string()))?.map_err(|error| failed(error.to_string()))
        })
    }
}

fn read(path: &std::path::Path) -> io::Result<Option<Document>> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut document = Zeroizing::new(Vec::new());
    file.take(DOCUMENT_LEN_MAX_BYTES + 1).read_to_end(&mut document)?;
    if document.len() as u64 > DOCUMENT_LEN_MAX_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "it is longer than a secret may be"));
    }
    Ok(Some(document))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn secrets_are_files_of_the_folder_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("team")).expect("made");
        std::fs::write(folder.path().join("team/pull.json"), b"{}").expect("written");
        let secrets = FolderSecrets::new(folder.path());
        let secret = |namespace: &str, name: &str| SecretRef { namespace: namespace.to_owned(), name: name.to_owned() };
        let found = secrets.read(&secret("team", "pull")).await.expect("readable").expect("there");
        assert_eq!(found.as_slice(), b"{}");
        assert!(secrets.read(&secret("team", "other")).await.expect("readable").is_none());
        for (namespace, name) in [("..", "pull"), ("team", "../../etc/passwd"), ("", "a"), ("Team", "a")] {
            assert!(secrets.read(&secret(namespace, name)).await.is_err(), "{namespace}/{name}");
        }
    }
}
