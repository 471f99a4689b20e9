//! Logins for registries, one at a time and by name.
//!
//! Secrets are neither listed nor watched nor kept: each is read when an image that names it is resolved or read, so that
//! one that was changed counts at once and the controller needs no right to look around. What is read is in memory only,
//! wiped when it is dropped, and in no log or error.

use std::time::Duration;

use k8s_openapi::api::core::v1::Secret;
use kube::{Api, Client};
use thiserror::Error;
use zeroize::{Zeroize as _, Zeroizing};

use crate::event::{FailureClass, SecretRef};

/// Longest document that is taken, in bytes: what Kubernetes allows a whole secret.
const DOCUMENT_LEN_MAX_BYTES: usize = 1 << 20;
/// How long the API server may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The type of a secret with a `config.json`, and the key that has it.
const CURRENT: (&str, &str) = ("kubernetes.io/dockerconfigjson", ".dockerconfigjson");
/// The same in Docker's older form, which is what stands under `auths` in the other.
const LEGACY: (&str, &str) = ("kubernetes.io/dockercfg", ".dockercfg");

/// Why there is no login.
#[derive(Debug, Error)]
pub enum SecretError {
    /// No such secret.
    #[error("pull secret {secret} does not exist")]
    NotFound {
        /// The secret.
        secret: SecretRef,
    },
    /// The controller may not read it.
    #[error(
        "pull secret {secret} may not be read by the controller: bind hermes-controller-pull-secrets in its namespace"
    )]
    Forbidden {
        /// The secret.
        secret: SecretRef,
    },
    /// It holds no logins.
    #[error(
        "pull secret {secret} holds no logins: its type is not kubernetes.io/dockerconfigjson, or its key is missing"
    )]
    NoLogins {
        /// The secret.
        secret: SecretRef,
    },
    /// The API server did not answer.
    #[error("cannot read pull secret {secret}: {problem}")]
    Unreachable {
        /// The secret.
        secret: SecretRef,
        /// What the API server said, or what the connection did.
        problem: String,
    },
}

impl SecretError {
    /// What trying again is worth.
    pub fn class(&self) -> FailureClass {
        match self {
            Self::NotFound { .. } | Self::Forbidden { .. } | Self::NoLogins { .. } => FailureClass::Denied,
            Self::Unreachable { .. } => FailureClass::Transient,
        }
    }

    /// One word for conditions and Events.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotFound { .. } => "PullSecretNotFound",
            Self::Forbidden { .. } => "PullSecretForbidden",
            Self::NoLogins { .. } => "PullSecretInvalid",
            Self::Unreachable { .. } => "PullSecretUnreachable",
        }
    }
}

/// Reads secrets with logins.
#[derive(Clone)]
pub struct Secrets {
    client: Client,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Secrets").finish_non_exhaustive()
    }
}

impl Secrets {
    /// Reads with `client`.
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// The logins in a secret, as a document of the form of Docker's `config.json`. It is not parsed. Cancel safe.
    ///
    /// # Errors
    /// When the secret is not there, may not be read, or holds no logins.
    pub async fn logins(&self, secret: &SecretRef) -> Result<Zeroizing<Vec<u8>>, SecretError> {
        let api = Api::<Secret>::namespaced(self.client.clone(), &secret.namespace);
        let problem = |problem: String| SecretError::Unreachable { secret: secret.clone(), problem };
        let answer = tokio::time::timeout(TIMEOUT, api.get(&secret.name)).await;
        let answer = answer.map_err(|_| problem(format!("no answer within {} s", TIMEOUT.as_secs())))?;
        match answer {
            Ok(found) => document(found).ok_or_else(|| SecretError::NoLogins { secret: secret.clone() }),
            Err(error) => Err(match super::status_code(&error) {
                Some(404) => SecretError::NotFound { secret: secret.clone() },
                Some(401 | 403) => SecretError::Forbidden { secret: secret.clone() },
                // Of a body that cannot be read, the parser's message may quote some.
                _ if matches!(error, kube::Error::SerdeError(_)) => problem("the answer is no Secret".to_owned()),
                _ => problem(super::one_line(&error)),
            }),
        }
    }
}

/// The logins of a secret; everything else of it is wiped.
fn document(mut secret: Secret) -> Option<Zeroizing<Vec<u8>>> {
    let kind = secret.type_.take().unwrap_or_default();
    let mut data = secret.data.take().unwrap_or_default();
    let mut take = |key: &str| data.remove(key).map(|bytes| Zeroizing::new(bytes.0));
    let document = match kind.as_str() {
        kind if kind == CURRENT.0 => take(CURRENT.1),
        kind if kind == LEGACY.0 => {
            take(LEGACY.1).map(|logins| Zeroizing::new([br#"{"auths":"#.as_slice(), logins.as_slice(), b"}"].concat()))
        }
        _ => None,
    };
    data.values_mut().for_each(|bytes| bytes.0.zeroize());
    document.filter(|document| document.len() <= DOCUMENT_LEN_MAX_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(kind: &str, key: &str, bytes: &[u8]) -> Option<String> {
        let data = [(key.to_owned(), k8s_openapi::ByteString(bytes.to_vec()))].into();
        let secret = Secret { type_: Some(kind.to_owned()), data: Some(data), ..Secret::default() };
        document(secret).map(|document| String::from_utf8(document.to_vec()).expect("text"))
    }

    #[test]
    fn both_forms_give_one_and_nothing_else_gives_any() {
        let current = br#"{"auths":{"r":{"auth":"x"}}}"#;
        assert_eq!(read(CURRENT.0, CURRENT.1, current).as_deref(), std::str::from_utf8(current).ok());
        assert_eq!(read(LEGACY.0, LEGACY.1, br#"{"r":{"auth":"x"}}"#).as_deref(), std::str::from_utf8(current).ok());
        assert_eq!(read("Opaque", CURRENT.1, current), None);
        assert_eq!(read(CURRENT.0, "other", current), None);
        assert_eq!(read(CURRENT.0, CURRENT.1, &vec![b' '; DOCUMENT_LEN_MAX_BYTES + 1]), None);
    }
}
