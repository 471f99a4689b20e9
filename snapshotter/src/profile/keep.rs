//! Where records and profiles are kept, and where a profile is looked for.
//!
//! A node's own records lie in the store's catalogue beside the image, with the profile that is made of them. A profile of
//! others comes from an index folder or a peer, or was imported; the last one that came is kept too. Either goes to peers
//! that ask. What is damaged counts as not there: it is a hint.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hermes_image::ids::{DiffId, Digest};
use hermes_image::index::chunks::ChunkTable;
use hermes_policy::profile::codec::{self, ProfileError};
use hermes_policy::profile::{Profile, StartRecord, choose, keep_newest, merge};
use hermes_store::{ProfilePart, Store, StoreError};

use super::version;
use crate::artifacts::Artifacts;
use crate::metrics::{RECORDED, StartRecordEnd};
use crate::status::ProfileOrigin;

/// How long a container's start waits, at most, to hear from peers what it is going to read. It reads meanwhile.
const ASK_PEERS_MAX: Duration = Duration::from_secs(2);

/// What is known of the starts of an image.
#[derive(Debug, Clone, Default)]
pub struct Kept {
    /// This node's own starts, the newest first.
    pub records: Vec<StartRecord>,
    /// What these have in common.
    pub own: Option<Profile>,
    /// What others have given.
    pub given: Option<Profile>,
}

impl Kept {
    /// The profile that is used and given on, and whose it is.
    pub fn chosen(&self) -> Option<(Profile, ProfileOrigin)> {
        let chosen = choose(self.own.clone(), self.given.clone())?;
        let origin = if self.own.as_ref() == Some(&chosen) { ProfileOrigin::Own } else { ProfileOrigin::Given };
        Some((chosen, origin))
    }
}

/// The image whose profile is looked for.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// The image.
    pub(crate) manifest: Digest,
    /// As the user named it.
    pub(crate) reference: String,
    /// Its layers' chunk tables, lowest first.
    pub(crate) tables: Vec<ChunkTable>,
}

/// Records and profiles of a node. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Profiles {
    store: Arc<Store>,
    artifacts: Artifacts,
}

impl Profiles {
    /// Kept in `store`, and looked for where `artifacts` are.
    pub fn new(store: Arc<Store>, artifacts: Artifacts) -> Self {
        Self { store, artifacts }
    }

    /// What is known of the image `manifest`. Reads the catalogue.
    pub fn kept(&self, manifest: Digest) -> Kept {
        kept(&self.store, manifest)
    }

    /// Keeps one more start, durably, and makes the profile anew.
    ///
    /// # Errors
    /// When the catalogue cannot be written; then it was as if the start had not been.
    pub fn add_record(&self, manifest: Digest, record: StartRecord) -> Result<(), StoreError> {
        let mut records = self.kept(manifest).records;
        records.push(record);
        let records = keep_newest(records);
        let own = merge(&records).map(|own| codec::encode(&own)).unwrap_or_default();
        let list = codec::encode_records(&records);
        self.store.put_profile(manifest, &[(ProfilePart::Records, &list), (ProfilePart::Own, &own)])?;
        RECORDED.start_recorded(StartRecordEnd::Kept);
        Ok(())
    }

    /// Keeps what somebody else has made of the starts of an image.
    ///
    /// # Errors
    /// When the catalogue cannot be written.
    pub fn put_given(&self, manifest: Digest, profile: &Profile) -> Result<(), StoreError> {
        self.store.put_profile(manifest, &[(ProfilePart::Given, &codec::encode(profile))])
    }

    /// Looks for a profile of `manifest` in the index folders and with peers, unless one is here, and keeps what it finds.
    /// `proof` are the image's layers, for peers that want to see grants. Cancel safe.
    pub async fn fetch(&self, manifest: Digest, proof: &[DiffId]) -> Option<(Profile, ProfileOrigin)> {
        if let Some(chosen) = self.blocking(move |profiles| profiles.kept(manifest).chosen()).await {
            return Some(chosen);
        }
        let found = tokio::time::timeout(ASK_PEERS_MAX, self.artifacts.profile(manifest, proof)).await.ok()??;
        self.blocking(move |profiles| {
            if let Err(error) = profiles.put_given(manifest, &found) {
                tracing::warn!(%manifest, %error, "a profile is not kept; it is looked for again at the next start");
            }
            Some((found, ProfileOrigin::Given))
        })
        .await
    }

    /// The profile by which to prefetch `wanted`: what is here, what others have, or what an earlier version of it read.
    /// Cancel safe.
    pub(crate) async fn find(&self, wanted: Wanted) -> Option<(Profile, ProfileOrigin)> {
        let proof: Vec<DiffId> = wanted.tables.iter().map(ChunkTable::diff_id).collect();
        if let Some(found) = self.fetch(wanted.manifest, &proof).await {
            return Some(found);
        }
        self.blocking(move |profiles| {
            let carried = version::carried(&profiles.store, &wanted);
            carried.map(|profile| (profile, ProfileOrigin::EarlierVersion))
        })
        .await
    }

    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Self) -> Option<T> + Send + 'static) -> Option<T> {
        let profiles = self.clone();
        tokio::task::spawn_blocking(move || work(&profiles)).await.ok().flatten()
    }
}

/// What `store` knows of the starts of `manifest`.
pub(super) fn kept(store: &Store, manifest: Digest) -> Kept {
    let profile = |part| read(store, manifest, part, codec::decode);
    Kept {
        records: read(store, manifest, ProfilePart::Records, codec::decode_records).unwrap_or_default(),
        own: profile(ProfilePart::Own),
        given: profile(ProfilePart::Given),
    }
}

/// What peers are given of `manifest`.
pub(crate) fn to_give(store: &Store, manifest: Digest) -> Option<Bytes> {
    let profile = |part| read(store, manifest, part, codec::decode);
    let chosen = choose(profile(ProfilePart::Own), profile(ProfilePart::Given))?;
    Some(codec::encode(&chosen).into())
}

fn read<T>(
    store: &Store,
    manifest: Digest,
    part: ProfilePart,
    decode: impl Fn(&[u8]) -> Result<T, ProfileError>,
) -> Option<T> {
    let bytes = store.profile(manifest, part).unwrap_or_else(|error| {
        tracing::warn!(%manifest, %error, "what starts of an image read is not known");
        None
    });
    let bytes = bytes.filter(|bytes| !bytes.is_empty())?;
    decode(&bytes).inspect_err(|error| tracing::warn!(%manifest, %error, "what starts of an image read is lost")).ok()
}
