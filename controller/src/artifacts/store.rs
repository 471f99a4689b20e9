//! Objects by name: in a folder or a bucket, or in a repository of a registry. Each is there whole or not at all.

use std::collections::BTreeMap;
use std::error::Error;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt as _};

use super::repository::RepositoryStore;

/// What a store says went wrong.
pub(super) type StoreError = Box<dyn Error + Send + Sync>;

/// Where objects are.
#[derive(Debug)]
pub(super) enum Store {
    /// A folder or a bucket.
    Objects(Arc<dyn ObjectStore>),
    /// A repository.
    Repository(Box<RepositoryStore>),
}

/// What a read has found.
#[derive(Debug)]
pub(super) enum Found {
    /// There is no such object.
    Nothing,
    /// It is longer than was allowed.
    TooLong,
    /// All of it.
    Object(Bytes),
}

impl Store {
    /// An object of at most `limit_bytes`.
    pub(super) async fn get(&self, path: &Path, limit_bytes: u64) -> Result<Found, StoreError> {
        match self {
            Self::Objects(objects) => {
                let found = match objects.get(path).await {
                    Ok(found) => found,
                    Err(object_store::Error::NotFound { .. }) => return Ok(Found::Nothing),
                    Err(error) => return Err(error.into()),
                };
                if found.meta.size > limit_bytes {
                    return Ok(Found::TooLong);
                }
                Ok(Found::Object(found.bytes().await?))
            }
            Self::Repository(repository) => Ok(repository.get(path.as_ref(), limit_bytes).await?),
        }
    }

    /// A part of an object, within its length; `None` when there is no such object.
    pub(super) async fn get_range(&self, path: &Path, range: Range<u64>) -> Result<Option<Bytes>, StoreError> {
        match self {
            Self::Objects(objects) => match objects.get_range(path, range).await {
                Ok(bytes) => Ok(Some(bytes)),
                Err(object_store::Error::NotFound { .. }) => Ok(None),
                Err(error) => Err(error.into()),
            },
            Self::Repository(repository) => Ok(repository.get_range(path.as_ref(), range).await?),
        }
    }

    /// Writes an object in the place of what was there.
    pub(super) async fn put(&self, path: &Path, bytes: Bytes) -> Result<(), StoreError> {
        match self {
            Self::Objects(objects) => Ok(objects.put(path, bytes.into()).await.map(drop)?),
            Self::Repository(repository) => Ok(repository.put(path.as_ref(), bytes).await?),
        }
    }

    /// Deletes an object, which need not be there.
    pub(super) async fn delete(&self, path: &Path) -> Result<(), StoreError> {
        match self {
            Self::Objects(objects) => match objects.delete(path).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(error.into()),
            },
            Self::Repository(repository) => Ok(repository.delete(path.as_ref()).await?),
        }
    }

    /// The names of the objects in the folder `kind` and their lengths in bytes; a few more than `count_max` at most. What
    /// lies deeper is not ours.
    pub(super) async fn list(&self, kind: &str, count_max: usize) -> Result<BTreeMap<String, u64>, StoreError> {
        let objects = match self {
            Self::Objects(objects) => objects,
            Self::Repository(repository) => return Ok(repository.list(kind)),
        };
        let mut names = BTreeMap::new();
        let mut listed = objects.list(Some(&Path::from(kind)));
        while let Some(object) = listed.next().await {
            let object = object?;
            let name = object.location.as_ref().strip_prefix(kind).and_then(|rest| rest.strip_prefix('/'));
            if let Some(name) = name.filter(|name| !name.contains('/')) {
                names.insert(name.to_owned(), object.size);
            }
            if names.len() > count_max {
                break;
            }
        }
        Ok(names)
    }
}
