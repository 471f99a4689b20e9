//! Bytes that are what their name says.

use std::ops::Deref;

use bytes::Bytes;
use thiserror::Error;

use crate::ids::{ArtifactId, ChunkId};

/// Bytes that are not what their name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Mismatch {
    /// The bytes hash to something else.
    #[error("the bytes do not have the hash that names them")]
    Hash,
    /// The bytes have another length than the index says.
    #[error("{actual} bytes where the index says {expected}")]
    Length {
        /// Length by the index.
        expected: u64,
        /// Length that came.
        actual: u64,
    },
}

/// A value that was checked against its name. The only ways to one are the constructors below, so what is stored,
/// served to a reader or passed on to a peer is right by construction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified<T>(T);

impl Verified<Bytes> {
    /// `bytes`, if they are the chunk `id`.
    ///
    /// # Errors
    /// When they are not.
    pub fn chunk(id: ChunkId, bytes: Bytes) -> Result<Self, Mismatch> {
        if ChunkId::of(&bytes) == id { Ok(Self(bytes)) } else { Err(Mismatch::Hash) }
    }

    /// `bytes`, if they are the artifact `id`.
    ///
    /// # Errors
    /// When they are not.
    pub fn artifact(id: ArtifactId, bytes: Bytes) -> Result<Self, Mismatch> {
        if ArtifactId::of(&bytes) == id { Ok(Self(bytes)) } else { Err(Mismatch::Hash) }
    }

    /// Names what this process has itself just made, which is the other way to know what bytes are.
    pub fn named(bytes: Bytes) -> (ArtifactId, Self) {
        (ArtifactId::of(&bytes), Self(bytes))
    }
}

impl<T> Verified<T> {
    /// The checked value.
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T> Deref for Verified<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_named_bytes_pass() {
        let bytes = Bytes::from_static(b"chunk");
        assert!(Verified::chunk(ChunkId::of(&bytes), bytes.clone()).is_ok());
        assert_eq!(Verified::chunk(ChunkId::of(b"other"), bytes), Err(Mismatch::Hash));
    }
}
