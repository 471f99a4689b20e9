//! The controller's keys in a Secret, where the replica that takes over finds them.
//!
//! One Secret holds the keys that sign indexes and the authority that admits nodes. It is made once, by whoever leads
//! first. An authority is written only in the place of the one that was read or written here last, so that a replica that has
//! lost its Lease and does not know it yet cannot undo what its successor did; somebody who rotates the signing keys
//! meanwhile is not in the way. Whoever may read the Secret can sign for the cluster: nobody else needs to.
//!
//! The authority's roots are public, and nodes that join for the first time need them: they are applied to a ConfigMap, which
//! whoever installs the controller makes (empty), so that it needs no right to create any.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use hermes_p2p::{ClusterId, unix_now};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use parking_lot::Mutex;
use serde_json::json;

use super::MANAGER;
use crate::authority::{Authority, AuthorityError};
use crate::clock;
use crate::event::UnixMillis;
use crate::run::{Vault, VaultError};
use crate::signing::KeySet;

/// Its name.
pub const NAME: &str = "hermes-controller-keys";
/// The keys in it.
const SIGNING: &str = "signing-keys.json";
const AUTHORITY: &str = "authority.json";
/// The ConfigMap with the roots that nodes believe the controller by, and its key. Nothing in it is secret.
pub const ROOTS_NAME: &str = "hermes-controller-roots";
const ROOTS: &str = "api-roots.pem";
/// How often it is read again: keys are rotated days before the older ones retire, and whoever rotates them waits for it.
const KEYS_INTERVAL: Duration = Duration::from_secs(15);
/// Attempts to write over a version that somebody has just replaced.
const ATTEMPTS_MAX: u32 = 5;

/// The Secret.
#[derive(Clone)]
pub struct SecretVault {
    api: Api<Secret>,
    roots: Api<ConfigMap>,
    /// The hash of the authority that was read or written last.
    known: Arc<Mutex<Option<blake3::Hash>>>,
}

impl std::fmt::Debug for SecretVault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecretVault").finish_non_exhaustive()
    }
}

fn place(doing: &'static str) -> impl Fn(kube::Error) -> VaultError {
    move |error| VaultError::Place { doing, reason: format!("Secret {NAME}: {}", super::one_line(&error)) }
}

fn is_conflict(error: &kube::Error) -> bool {
    super::status_code(error) == Some(409)
}

impl SecretVault {
    /// The Secret in `namespace`.
    pub fn new(client: Client, namespace: &str) -> Self {
        let roots = Api::namespaced(client.clone(), namespace);
        Self { api: Api::namespaced(client, namespace), roots, known: Arc::default() }
    }

    /// The Secret, made empty if it is not there.
    async fn secret(&self) -> Result<Secret, VaultError> {
        for _ in 0..ATTEMPTS_MAX {
            if let Some(secret) = self.api.get_opt(NAME).await.map_err(place("read"))? {
                return Ok(secret);
            }
            let mut empty = Secret::default();
            empty.metadata.name = Some(NAME.to_owned());
            match self.api.create(&PostParams::default(), &empty).await {
                Ok(made) => return Ok(made),
                Err(error) if is_conflict(&error) => {}
                Err(error) => return Err(place("made")(error)),
            }
        }
        Err(VaultError::Place { doing: "made", reason: format!("Secret {NAME} comes and goes") })
    }

    /// The signing keys that the Secret holds; `None` when there are none yet.
    ///
    /// # Errors
    /// When the Secret cannot be read, or holds something else.
    pub async fn signing_keys(&self) -> Result<Option<KeySet>, VaultError> {
        let secret = self.api.get_opt(NAME).await.map_err(place("read"))?;
        let data = secret.and_then(|secret| secret.data).unwrap_or_default();
        data.get(SIGNING).map(|found| document(&found.0)).transpose()
    }

    /// Makes a new key that signs; those before it sign beside it for `overlap`, and are trusted as long. Whoever leads takes
    /// it over, and signs everything again. Other keys that are rotated at the same moment are kept.
    ///
    /// # Errors
    /// When the Secret cannot be read or written, or there are too many keys.
    pub async fn rotate(&self, now: UnixMillis, overlap: Duration) -> Result<KeySet, VaultError> {
        for _ in 0..ATTEMPTS_MAX {
            let mut secret = self.secret().await?;
            let data = secret.data.get_or_insert_with(BTreeMap::new);
            let set = match data.get(SIGNING) {
                None => KeySet::new(now),
                Some(found) => {
                    let mut set = document(&found.0)?;
                    set.retire(now);
                    set.rotate(now, overlap)?;
                    set
                }
            };
            data.insert(SIGNING.to_owned(), ByteString(set.to_document().as_bytes().to_vec()));
            match self.api.replace(NAME, &PostParams::default(), &secret).await {
                Ok(_) => return Ok(set),
                Err(error) if is_conflict(&error) => {}
                Err(error) => return Err(place("written")(error)),
            }
        }
        Err(VaultError::Place { doing: "written", reason: format!("somebody else writes Secret {NAME} all the time") })
    }

    /// What the Secret holds under `key`, put there by `make` if there is nothing.
    async fn load(
        &self,
        key: &str,
        make: impl Fn() -> Result<Vec<u8>, VaultError> + Send,
    ) -> Result<Vec<u8>, VaultError> {
        for _ in 0..ATTEMPTS_MAX {
            let mut secret = self.secret().await?;
            let data = secret.data.get_or_insert_with(BTreeMap::new);
            if let Some(found) = data.get(key) {
                return Ok(found.0.clone());
            }
            let made = make()?;
            data.insert(key.to_owned(), ByteString(made.clone()));
            match self.api.replace(NAME, &PostParams::default(), &secret).await {
                Ok(_) => return Ok(made),
                Err(error) if is_conflict(&error) => {}
                Err(error) => return Err(place("written")(error)),
            }
        }
        Err(VaultError::Place { doing: "written", reason: format!("somebody else writes Secret {NAME} all the time") })
    }
}

fn document(bytes: &[u8]) -> Result<KeySet, VaultError> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| VaultError::Place { doing: "read", reason: format!("Secret {NAME}: {error}") })?;
    Ok(KeySet::from_document(text)?)
}

impl Vault for SecretVault {
    fn keys(&self) -> BoxFuture<'_, Result<KeySet, VaultError>> {
        async {
            let make = || Ok(KeySet::new(clock::now()).to_document().as_bytes().to_vec());
            let mut set = document(&self.load(SIGNING, make).await?)?;
            set.retire(clock::now());
            Ok(set)
        }
        .boxed()
    }

    fn authority<'a>(&'a self, cluster: &'a ClusterId) -> BoxFuture<'a, Result<Authority, VaultError>> {
        async {
            let make = || Ok(Authority::create(cluster.clone(), unix_now())?.to_document().to_vec());
            let document = self.load(AUTHORITY, make).await?;
            *self.known.lock() = Some(blake3::hash(&document));
            Ok(Authority::from_document(&document, cluster)?)
        }
        .boxed()
    }

    fn keep(&self, authority: Arc<Authority>) -> BoxFuture<'static, Result<(), AuthorityError>> {
        let vault = self.clone();
        async move {
            let failed = |reason: String| AuthorityError::Document {
                reason: format!("it cannot be written to Secret {NAME}: {reason}"),
            };
            let document = authority.to_document();
            for _ in 0..ATTEMPTS_MAX {
                let mut secret = vault.api.get(NAME).await.map_err(|error| failed(super::one_line(&error)))?;
                let data = secret.data.get_or_insert_with(BTreeMap::new);
                let found = data.insert(AUTHORITY.to_owned(), ByteString(document.to_vec()));
                if found.map(|found| blake3::hash(&found.0)) != *vault.known.lock() {
                    return Err(failed("somebody else has changed it; another replica decides".to_owned()));
                }
                match vault.api.replace(NAME, &PostParams::default(), &secret).await {
                    Ok(_) => {
                        *vault.known.lock() = Some(blake3::hash(&document));
                        return Ok(());
                    }
                    // Perhaps it was only the signing keys.
                    Err(error) if is_conflict(&error) => {}
                    Err(error) => return Err(failed(super::one_line(&error))),
                }
            }
            Err(failed("somebody else writes it all the time".to_owned()))
        }
        .boxed()
    }

    fn keys_every(&self) -> Duration {
        KEYS_INTERVAL
    }

    fn show_roots<'a>(&'a self, roots: &'a str) -> BoxFuture<'a, Result<(), VaultError>> {
        async move {
            let content = json!({
                "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": ROOTS_NAME }, "data": { ROOTS: roots },
            });
            let parameters = PatchParams::apply(MANAGER).force();
            let applied = self.roots.patch(ROOTS_NAME, &parameters, &Patch::Apply(&content)).await;
            applied.map(drop).map_err(|error| VaultError::Place {
                doing: "shown to nodes",
                reason: format!(
                    "ConfigMap {ROOTS_NAME}: {}; make it, and let this account patch it",
                    super::one_line(&error)
                ),
            })
        }
        .boxed()
    }
}
