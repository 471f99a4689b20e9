//! Where index artifacts are looked for: the store, folders of indexes, peers, the controller; in this order.
//!
//! Everything is checked by its name, so it does not matter who had it. What comes from elsewhere is put into the
//! store, except for ranges of artifacts that are never needed whole.
//!
//! Peers are asked a few at once, each a little after the one before: an index is small, and one peer that is slow or
//! gone must not hold up a container. Who sends what cannot be is banned, and the next one is asked.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use hermes_image::ids::{ArtifactId, DiffId, Digest};
use hermes_image::statement::{PublicKey, Statement, StatementError};
use hermes_image::verify::{Mismatch, Verified};
use hermes_p2p::{ExchangeError, PeerId};
use hermes_policy::class::ErrorClass;
use hermes_policy::limits::Limits;
use hermes_policy::profile::{Profile, codec};
use hermes_store::{Store, StoreError};
use parking_lot::RwLock;
use thiserror::Error;
use tokio::time::Instant;

use crate::controller::Controller;
use crate::index_folder::{IndexFolder, IndexFolderError};

/// How long a peer may take to give an artifact: 10 MB, those of a large layer, at 1 Mbit/s. One that goes silent is
/// given up much earlier by the exchange itself.
const ARTIFACT_TIMEOUT: Duration = Duration::from_secs(90);
/// When the next peer is asked besides one that has not answered: some round trips, or 6 MB at 100 Mbit/s.
const STAGGER: Duration = Duration::from_millis(500);
/// Peers that are asked at once; more would only divide a slow link.
const PEERS_AT_ONCE: usize = 3;

/// Peers that are asked for a profile: whoever has started the image has one, and a start does not wait for long.
const PROFILE_PEERS_MAX: usize = 24;

/// How often restart points are asked for after a start, in vain.
const RESTART_POINT_ATTEMPTS: u32 = 9;
/// The first wait between two tries; each is twice as long as the one before it, so the last is after eight minutes.
const RESTART_POINT_WAIT: Duration = Duration::from_secs(1);

fn deadline() -> Instant {
    Instant::now() + ARTIFACT_TIMEOUT
}

/// What a peer gave, and was not accepted.
struct Refused {
    /// Whether no honest node would have given it.
    is_lie: bool,
    /// Why, for the log.
    reason: String,
}

/// Why no peer gave something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum NotGiven {
    /// Nobody had it, or could be asked.
    Lacking,
    /// Somebody has it and does not give it to this node.
    Denied,
}

/// Whether `peer` has seen this node's grants for `layers`, so that it may be asked again.
async fn has_shown(node: &hermes_p2p::Node, peer: PeerId, layers: &[DiffId]) -> bool {
    node.show_grants(peer, layers, deadline()).await.unwrap_or_else(|error| {
        tracing::debug!(%peer, %error, "a peer is not shown what this node may read");
        false
    })
}

/// An artifact that should be here and cannot be read.
#[derive(Debug, Error)]
pub enum ArtifactError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A folder failed.
    #[error(transparent)]
    Folder(#[from] IndexFolderError),
    /// The store gave something else.
    #[error("the store's copy of an index artifact is damaged: {0}")]
    Damaged(#[from] Mismatch),
    /// A blocking task did not end well.
    #[error("reading an index artifact was interrupted")]
    Interrupted,
}

/// The places.
#[derive(Debug, Clone)]
pub struct Artifacts {
    store: Arc<Store>,
    folders: Arc<RwLock<Vec<IndexFolder>>>,
    peers: Option<hermes_p2p::Node>,
    controller: Option<Arc<Controller>>,
}

impl Artifacts {
    /// Looks in `store`, in folders that are added later, and asks `peers`.
    pub fn new(store: Arc<Store>, peers: Option<hermes_p2p::Node>) -> Self {
        Self { store, folders: Arc::default(), peers, controller: None }
    }

    /// The same, asking `controller` too: for statements before peers, as it has said them already, and for artifacts after
    /// them, because it has one link and they have many.
    #[must_use]
    pub fn with_controller(self, controller: Option<Arc<Controller>>) -> Self {
        Self { controller, ..self }
    }

    /// This node's own grants for `layers`, as far as it has any.
    fn grants(&self, layers: &[DiffId]) -> Vec<Bytes> {
        let Some(node) = &self.peers else { return Vec::new() };
        layers.iter().filter_map(|layer| node.grants().own(*layer)).collect()
    }

    async fn ask_controller(&self, id: ArtifactId, layer: DiffId) -> Option<Verified<Bytes>> {
        self.controller.as_ref()?.artifact(id, self.grants(&[layer])).await
    }

    /// Looks in `folder` too.
    pub fn add_folder(&self, folder: IndexFolder) {
        let mut folders = self.folders.write();
        if !folders.iter().any(|known| known.path() == folder.path()) {
            folders.push(folder);
        }
    }

    /// The folders, in the order in which they are looked in.
    pub fn folders(&self) -> Vec<IndexFolder> {
        self.folders.read().clone()
    }

    /// The artifact `id` of `layer`, whole; `None` when nobody gives it. Cancel safe.
    ///
    /// # Errors
    /// When it is on this node and cannot be read. A peer that fails is passed over.
    pub async fn get(&self, id: ArtifactId, layer: DiffId) -> Result<Option<Verified<Bytes>>, ArtifactError> {
        if let Some(found) = self.local(id).await? {
            return Ok(Some(found));
        }
        let Some(found) = self.elsewhere(id, layer, None).await else { return Ok(None) };
        self.keep(found.clone()).await?;
        Ok(Some(found))
    }

    /// What is not on this node: from peers, else from the controller.
    async fn elsewhere(&self, id: ArtifactId, layer: DiffId, limit_bytes: Option<u64>) -> Option<Verified<Bytes>> {
        let ask = |node: hermes_p2p::Node, peer| async move { node.artifact(peer, id, limit_bytes, deadline()).await };
        match self.ask_peers(id.to_string(), &[layer], ask, Ok).await {
            Ok(found) => Some(found),
            Err(_) => self.ask_controller(id, layer).await,
        }
    }

    /// The artifact `id` of `layer`, whole, if it has at most `limit_bytes`; it is not kept. For what somebody named who may lie.
    /// `None` when nobody gives it. Cancel safe.
    ///
    /// # Errors
    /// When it is on this node and cannot be read. A peer that fails is passed over.
    pub async fn glance(
        &self,
        id: ArtifactId,
        layer: DiffId,
        limit_bytes: u64,
    ) -> Result<Option<Verified<Bytes>>, ArtifactError> {
        let found = match self.local(id).await? {
            Some(found) => Some(found),
            None => self.elsewhere(id, layer, Some(limit_bytes)).await,
        };
        Ok(found.filter(|found| found.len() as u64 <= limit_bytes))
    }

    /// Gets what it takes to read the layers of `statement` from a registry, beside what it takes to show them: their restart
    /// points. Says which of them nobody gives. Cancel safe.
    ///
    /// # Errors
    /// When one is on this node and cannot be read.
    pub async fn get_restart_points(&self, statement: &Statement) -> Result<Option<ArtifactId>, ArtifactError> {
        for layer in &statement.layers {
            for id in [layer.seek, layer.windows] {
                if self.get(id, layer.diff_id).await?.is_none() {
                    return Ok(Some(id));
                }
            }
        }
        Ok(None)
    }

    /// The same, tried again for some minutes. A start takes single windows as it needs them; a container that runs is to
    /// need nobody for those of its other files, who may be away by then.
    pub async fn keep_restart_points(self, statement: Statement) {
        for attempt in 0..RESTART_POINT_ATTEMPTS {
            match self.get_restart_points(&statement).await {
                Ok(None) => return,
                Ok(Some(id)) => tracing::debug!(manifest = %statement.manifest, %id, "nobody gives restart points now"),
                Err(error) => tracing::warn!(manifest = %statement.manifest, %error, "restart points cannot be kept"),
            }
            tokio::time::sleep(RESTART_POINT_WAIT.saturating_mul(1 << attempt)).await;
        }
        tracing::warn!(manifest = %statement.manifest, "reads of an image may need the controller or a peer");
    }

    /// Asks the connected peers, the next one when one has failed or takes long, until one gives what `check` accepts.
    /// Who gives what cannot be is banned. A peer that denies it is shown this node's grants for the layers in `proof`, and
    /// asked again. Cancel safe.
    ///
    /// # Errors
    /// When nobody gives it, with whether somebody denied it.
    async fn ask_peers<A, T, R>(
        &self,
        what: String,
        proof: &[DiffId],
        ask: impl Fn(hermes_p2p::Node, PeerId) -> R,
        mut check: impl FnMut(A) -> Result<T, Refused>,
    ) -> Result<T, NotGiven>
    where
        R: Future<Output = Result<A, ExchangeError>>,
    {
        let mut not_given = NotGiven::Lacking;
        let node = self.peers.as_ref().ok_or(not_given)?;
        let mut waiting = node.peers().into_iter();
        let mut asked = FuturesUnordered::new();
        let mut next_at = Instant::now();
        loop {
            let more = asked.len() < PEERS_AT_ONCE && waiting.len() > 0;
            if more && (asked.is_empty() || next_at <= Instant::now()) {
                let peer = waiting.next().ok_or(not_given)?;
                let (node, ask) = (node.clone(), &ask);
                asked.push(async move {
                    let answer = match ask(node.clone(), peer).await {
                        Err(ExchangeError::Denied { .. }) if has_shown(&node, peer, proof).await => {
                            ask(node.clone(), peer).await
                        }
                        answer => answer,
                    };
                    (peer, answer)
                });
                next_at = Instant::now() + STAGGER;
                continue;
            }
            let (peer, answer) = tokio::select! {
                answered = asked.next() => answered.ok_or(not_given)?,
                () = tokio::time::sleep_until(next_at), if more => continue,
            };
            let refused = match answer {
                Ok(answer) => match check(answer) {
                    Ok(found) => return Ok(found),
                    Err(refused) => refused,
                },
                Err(error @ ExchangeError::Denied { .. }) => {
                    not_given = NotGiven::Denied;
                    Refused { is_lie: false, reason: error.to_string() }
                }
                // One that was banned while it was asked is banned already.
                Err(error @ ExchangeError::Unreachable { .. }) => Refused { is_lie: false, reason: error.to_string() },
                Err(error) => Refused { is_lie: error.class() == ErrorClass::PeerFault, reason: error.to_string() },
            };
            next_at = Instant::now();
            if refused.is_lie {
                let duration = Limits::default().ban;
                let reason = refused.reason;
                tracing::warn!(%peer, %what, reason, ?duration, "a peer sent wrong bytes; it is refused for a while");
                let _ = node.ban(peer, duration).await;
            } else {
                tracing::debug!(%peer, %what, reason = refused.reason, "a peer does not give part of an index");
            }
        }
    }

    async fn local(&self, id: ArtifactId) -> Result<Option<Verified<Bytes>>, ArtifactError> {
        let (store, folders) = (Arc::clone(&self.store), self.folders.read().clone());
        let look = move || {
            if let Some(found) = store.artifact(id)? {
                return Ok(Some(Verified::artifact(id, found)?));
            }
            for folder in folders {
                if let Some(found) = folder.artifact(id)? {
                    store.put_artifact(&found)?;
                    return Ok(Some(found));
                }
            }
            Ok(None)
        };
        tokio::task::spawn_blocking(look).await.map_err(|_| ArtifactError::Interrupted)?
    }

    async fn keep(&self, artifact: Verified<Bytes>) -> Result<(), ArtifactError> {
        let store = Arc::clone(&self.store);
        let kept = tokio::task::spawn_blocking(move || store.put_artifact(&artifact).map(drop));
        Ok(kept.await.map_err(|_| ArtifactError::Interrupted)??)
    }

    /// Part of the artifact `id` of `layer`, which `check` accepts by a name that the caller knows; `None` when nobody has it.
    /// Cancel safe.
    ///
    /// # Errors
    /// When it is on this node and cannot be read. A peer that fails or lies is passed over.
    pub async fn range<T>(
        &self,
        id: ArtifactId,
        layer: DiffId,
        range: Range<u64>,
        check: impl Fn(Bytes) -> Result<T, Mismatch>,
    ) -> Result<Option<T>, ArtifactError> {
        if let Some(part) = self.local_part(id, range.clone()).await? {
            return Ok(Some(check(part)?));
        }
        let asked = range.clone();
        let ask = move |node: hermes_p2p::Node, peer| {
            let range = asked.clone();
            async move { node.artifact_range(peer, id, range, deadline()).await }
        };
        let checked = |part| check(part).map_err(|error| Refused { is_lie: true, reason: error.to_string() });
        if let Ok(part) = self.ask_peers(format!("{id} {range:?}"), &[layer], ask, checked).await {
            return Ok(Some(part));
        }
        // The controller keeps artifacts packed, so it gives all or nothing, and the next range is here.
        let Some(whole) = self.ask_controller(id, layer).await else { return Ok(None) };
        self.keep(whole.clone()).await?;
        let whole = whole.into_inner();
        let within = range.start <= range.end && range.end <= whole.len() as u64;
        let part = within.then(|| whole.slice(range.start as usize..range.end as usize));
        Ok(part.map(check).transpose()?)
    }

    /// Part of an artifact that is here.
    async fn local_part(&self, id: ArtifactId, range: Range<u64>) -> Result<Option<Bytes>, ArtifactError> {
        let store = Arc::clone(&self.store);
        let here = tokio::task::spawn_blocking(move || store.artifact_checked_lately(id)).await;
        let whole = match here.map_err(|_| ArtifactError::Interrupted)? {
            Ok(Some(whole)) => Some(whole),
            // A folder may have it.
            Ok(None) => self.local(id).await?.map(Verified::into_inner),
            Err(error) => return Err(error.into()),
        };
        let within = whole.filter(|whole| range.end <= whole.len() as u64);
        Ok(within.map(|whole| whole.slice(range.start as usize..range.end as usize)))
    }

    /// What a key in `trusted` says about `manifest`, with its signed form; `None` when nobody has a statement that is
    /// accepted. `proof` are the image's layers, as far as they are known, for peers that want to see grants. Cancel safe.
    ///
    /// # Errors
    /// When peers have one and do not give it to this node; with the reason why the last statement that was found was refused, when none was accepted.
    pub async fn statement(
        &self,
        manifest: Digest,
        trusted: &[PublicKey],
        proof: &[DiffId],
    ) -> Result<Option<(Statement, Vec<u8>)>, StatementLookupError> {
        let mut refused = None;
        let folders = self.folders.read().clone();
        for folder in folders {
            let Some(signed) = folder.statement(manifest)? else { continue };
            match Statement::open(&signed, manifest, trusted) {
                Ok(statement) => return Ok(Some((statement, signed))),
                Err(error) => refused = Some(error),
            }
        }
        if let Some(signed) = self.told(manifest, proof).await {
            match Statement::open(&signed, manifest, trusted) {
                Ok(statement) => return Ok(Some((statement, signed.to_vec()))),
                Err(error) => refused = Some(error),
            }
        }
        let ask = |node: hermes_p2p::Node, peer| async move { node.statement(peer, manifest, deadline()).await };
        let check = |signed: Bytes| match Statement::open(&signed, manifest, trusted) {
            Ok(statement) => Ok((statement, signed.to_vec())),
            Err(error) => {
                // Others may trust other keys and speak later versions; the rest no honest node passes on.
                let is_lie = match &error {
                    StatementError::Untrusted { .. } | StatementError::Format(_) => false,
                    StatementError::TooLong
                    | StatementError::Malformed(_)
                    | StatementError::BadSignature { .. }
                    | StatementError::OtherImage { .. } => true,
                };
                let reason = error.to_string();
                refused = Some(error);
                Err(Refused { is_lie, reason })
            }
        };
        match (self.ask_peers(manifest.to_string(), proof, ask, check).await, refused) {
            (Ok(found), _) => Ok(Some(found)),
            (Err(_), Some(error)) => Err(error.into()),
            (Err(NotGiven::Denied), None) => Err(StatementLookupError::Denied),
            // The controller has it and wants to see grants, as peers do.
            (Err(NotGiven::Lacking), None) if self.is_held_back(manifest) => Err(StatementLookupError::Denied),
            (Err(NotGiven::Lacking), None) => Ok(None),
        }
    }

    /// The signed statement that the controller has told, or tells for grants of the layers in `proof`.
    async fn told(&self, manifest: Digest, proof: &[DiffId]) -> Option<Bytes> {
        let controller = self.controller.as_ref()?;
        let image = controller.image(manifest)?;
        let signed = match image.private {
            false => image.statement,
            true => controller.whole_image(manifest, self.grants(proof)).await?.statement,
        };
        (!signed.is_empty()).then_some(signed)
    }

    fn is_held_back(&self, manifest: Digest) -> bool {
        let image = self.controller.as_ref().and_then(|controller| controller.image(manifest));
        image.is_some_and(|image| image.private)
    }
}

impl Artifacts {
    /// What starts of `manifest` read, by a folder or a peer; `None` when nobody knows in time. `proof` are the image's layers,
    /// for peers that want to see grants. A peer whose answer makes no sense is passed over and not banned: it may be a later
    /// version, and nothing depends on it. Cancel safe.
    pub async fn profile(&self, manifest: Digest, proof: &[DiffId]) -> Option<Profile> {
        let folders = self.folders.read().clone();
        let look = move || {
            let read = |folder: &IndexFolder| folder.profile(manifest).ok().flatten();
            folders.iter().filter_map(read).find_map(|bytes| codec::decode(&bytes).ok())
        };
        if let Some(found) = tokio::task::spawn_blocking(look).await.ok().flatten() {
            return Some(found);
        }
        if let Some(controller) = &self.controller
            && let Some(bytes) = controller.profile(manifest, self.grants(proof)).await
            && let Ok(profile) = codec::decode(&bytes)
        {
            return Some(profile);
        }
        let node = self.peers.as_ref()?;
        let asked = node.peers().into_iter().take(PROFILE_PEERS_MAX).map(|peer| async move {
            let answer = match node.profile(peer, manifest, deadline()).await {
                Err(ExchangeError::Denied { .. }) if has_shown(node, peer, proof).await => {
                    node.profile(peer, manifest, deadline()).await
                }
                answer => answer,
            };
            answer.ok().and_then(|bytes| codec::decode(&bytes).ok())
        });
        let mut answers = futures::stream::iter(asked).buffer_unordered(PEERS_AT_ONCE);
        while let Some(answer) = answers.next().await {
            if answer.is_some() {
                return answer;
            }
        }
        None
    }
}

/// No statement was accepted.
#[derive(Debug, Error)]
pub enum StatementLookupError {
    /// A folder failed.
    #[error(transparent)]
    Folder(#[from] IndexFolderError),
    /// One was found and refused.
    #[error(transparent)]
    Refused(#[from] StatementError),
    /// Peers have one and hold it back.
    #[error("peers give its index only to nodes that may read the image; give this node a login for its registry")]
    Denied,
}
