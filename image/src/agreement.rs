//! Whether the parts of an index belong together, and to the image.
//!
//! A signed statement names a manifest, and artifacts by hash. That does not make it consistent: whoever signed it may
//! have signed parts of different layers. What a statement says is compared with the manifest that the reference led to
//! ([`Statement::check_image`]), and each part with the statement ([`LayerStatement::check_toc`] and its neighbours),
//! before any of it is used.

use std::fmt;

use thiserror::Error;

use crate::ids::{ArtifactId, DiffId, LayerId};
use crate::index::chunks::ChunkTable;
use crate::index::seek::SeekTable;
use crate::index::toc::Toc;
use crate::statement::{LayerStatement, Statement};

/// Two documents that should say the same.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{what}: {found} where {expected} is right")]
pub struct Disagreement {
    /// What it is about.
    pub what: String,
    /// What was found.
    pub found: String,
    /// What the document that counts says.
    pub expected: String,
}

/// What a manifest, with its configuration, says of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManifestLayer {
    /// The blob.
    pub layer: LayerId,
    /// The uncompressed tar stream.
    pub diff_id: DiffId,
    /// Length of the blob in bytes.
    pub len_bytes: u64,
}

fn same<T: PartialEq + fmt::Display>(what: impl fmt::Display, found: T, expected: T) -> Result<(), Disagreement> {
    if found == expected {
        return Ok(());
    }
    Err(Disagreement { what: what.to_string(), found: found.to_string(), expected: expected.to_string() })
}

impl Statement {
    /// Compares the statement with the image that the reference led to: it is the manifest that counts.
    ///
    /// # Errors
    /// With the first thing in which they differ: platform, number of layers, or a layer's digests or length.
    pub fn check_image(
        &self,
        platform: &str,
        layers: impl ExactSizeIterator<Item = ManifestLayer>,
    ) -> Result<(), Disagreement> {
        same("platform", self.platform.as_str(), platform)?;
        same("number of layers", self.layers.len(), layers.len())?;
        for (number, (indexed, layer)) in self.layers.iter().zip(layers).enumerate() {
            same(format_args!("digest of layer {number}"), indexed.layer, layer.layer)?;
            same(format_args!("diffID of layer {number}"), indexed.diff_id, layer.diff_id)?;
            same(format_args!("length of layer {number} in bytes"), indexed.blob_len_bytes, layer.len_bytes)?;
        }
        Ok(())
    }
}

impl LayerStatement {
    /// What the manifest must say of this layer.
    pub fn manifest_layer(&self) -> ManifestLayer {
        ManifestLayer { layer: self.layer, diff_id: self.diff_id, len_bytes: self.blob_len_bytes }
    }

    /// Compares a table of contents with the statement.
    ///
    /// # Errors
    /// With the first thing in which they differ.
    pub fn check_toc(&self, toc: &Toc) -> Result<(), Disagreement> {
        same("diffID of the table of contents", toc.diff_id(), self.diff_id)?;
        same("logical length of the table of contents", toc.logical_len_bytes(), self.logical_len_bytes)
    }

    /// Compares a chunk table with the statement.
    ///
    /// # Errors
    /// With the first thing in which they differ.
    pub fn check_chunks(&self, chunks: &ChunkTable) -> Result<(), Disagreement> {
        same("diffID of the chunk table", chunks.diff_id(), self.diff_id)?;
        same("logical length of the chunk table", chunks.logical_len_bytes(), self.logical_len_bytes)
    }

    /// Compares a seek table with the statement, and with the layer's chunk table.
    ///
    /// # Errors
    /// With the first thing in which they differ.
    pub fn check_seek(&self, seek: &SeekTable, chunks: &ChunkTable) -> Result<(), Disagreement> {
        let header = seek.header();
        same("blob of the seek table", header.layer, self.layer)?;
        same("diffID of the seek table", header.diff_id, self.diff_id)?;
        same("blob length of the seek table", header.blob_len_bytes, self.blob_len_bytes)?;
        same("logical length of the seek table", header.logical_len_bytes, self.logical_len_bytes)?;
        same("number of chunks of the seek table", header.chunk_count, chunks.count())?;
        same::<ArtifactId>("windows of the seek table", seek.windows_id(), self.windows)
    }
}

#[cfg(test)]
mod tests {
    use crate::build::{Expect, LayerBuilder, LayerIndex, Options};
    use crate::ids::Digest;

    use super::*;

    fn sha256(bytes: &[u8]) -> [u8; 32] {
        use sha2::Digest as _;
        sha2::Sha256::digest(bytes).into()
    }

    /// The index of an empty tar of `blocks` blocks, which is its own blob.
    fn index(blocks: usize) -> (LayerIndex, LayerStatement) {
        let tar = vec![0; blocks * 512];
        let (layer, diff_id) = (LayerId(sha256(&tar)), DiffId(sha256(&tar)));
        let expect = Expect { layer, diff_id, compressed_len_bytes: tar.len() as u64 };
        let mut builder = LayerBuilder::new(expect, Options::default()).expect("options");
        builder.push(&tar).expect("a tar");
        let built = builder.finish().expect("a layer");
        let statement = LayerStatement {
            layer,
            diff_id,
            blob_len_bytes: tar.len() as u64,
            logical_len_bytes: built.chunks.logical_len_bytes(),
            toc: built.toc.id(),
            chunks: built.chunks.id(),
            seek: built.seek.id(),
            windows: built.seek.windows_id(),
        };
        (built, statement)
    }

    #[test]
    fn an_index_fits_its_own_statement_and_no_other() {
        let ((first, right), (second, other)) = (index(20), index(40));
        assert_eq!(right.check_toc(&first.toc), Ok(()));
        assert_eq!(right.check_chunks(&first.chunks), Ok(()));
        assert_eq!(right.check_seek(&first.seek, &first.chunks), Ok(()));
        assert!(other.check_toc(&first.toc).is_err());
        assert!(other.check_chunks(&first.chunks).is_err());
        assert!(other.check_seek(&first.seek, &second.chunks).is_err());
    }

    #[test]
    fn every_field_of_a_seek_table_counts() {
        let (built, right) = index(20);
        type Change = fn(&mut LayerStatement);
        let changes: [(Change, &str); 5] = [
            (|statement| statement.layer = LayerId([7; 32]), "blob of the seek table"),
            (|statement| statement.diff_id = DiffId([7; 32]), "diffID"),
            (|statement| statement.blob_len_bytes += 1, "blob length"),
            (|statement| statement.logical_len_bytes += 512, "logical length"),
            (|statement| statement.windows = ArtifactId([7; 32]), "windows"),
        ];
        for (change, what) in changes {
            let mut statement = right.clone();
            change(&mut statement);
            let error = statement.check_seek(&built.seek, &built.chunks).expect_err("refused");
            assert!(error.what.contains(what), "{error}");
        }
    }

    #[test]
    fn a_statement_fits_its_manifest_in_everything() {
        let (_, layer) = index(20);
        let right = Statement::new(Digest([9; 32]), "linux/amd64".to_owned(), vec![layer.clone()]);
        let manifest = [layer.manifest_layer()];
        assert_eq!(right.check_image("linux/amd64", manifest.into_iter()), Ok(()));
        let wrong = |platform: &str, layers: &[ManifestLayer]| {
            right.check_image(platform, layers.iter().copied()).expect_err("refused").what
        };
        assert_eq!(wrong("linux/arm64", &manifest), "platform");
        assert_eq!(wrong("linux/amd64", &[]), "number of layers");
        assert_eq!(
            wrong("linux/amd64", &[ManifestLayer { layer: LayerId([7; 32]), ..manifest[0] }]),
            "digest of layer 0"
        );
        assert_eq!(
            wrong("linux/amd64", &[ManifestLayer { diff_id: DiffId([7; 32]), ..manifest[0] }]),
            "diffID of layer 0"
        );
        let longer = ManifestLayer { len_bytes: manifest[0].len_bytes + 1, ..manifest[0] };
        assert_eq!(wrong("linux/amd64", &[longer]), "length of layer 0 in bytes");
    }
}
