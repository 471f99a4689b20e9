//! An OCI image layout, written.
//!
//! Every file is written beside its place, flushed to the disk, and renamed: a crash leaves either the whole file or a
//! stray temporary one (`.tmp-*`, removed by the next writer), never a part under a final name. `index.json` is written
//! last, so an image is listed only when all its blobs are there. One writer at a time; readers may read meanwhile.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use hermes_image::ids::{DiffId, Digest};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use thiserror::Error;

use crate::layout::{LAYOUT_VERSION, Layout, LayoutError};
use crate::oci::{Descriptor, Index, Manifest, Platform, REF_NAME, media_type};

/// Bytes per read while a stream is copied into a blob; large enough that system calls do not count.
const COPY_BUFFER_BYTES: usize = 256 << 10;

/// Prefix of files that are being written.
const TEMPORARY_PREFIX: &str = ".tmp-";

/// Why a layout could not be written.
#[derive(Debug, Error)]
pub enum WriteError {
    /// The folder holds something else.
    #[error("{} is not empty and not an OCI image layout; name an empty or a new folder", .path.display())]
    Occupied {
        /// The folder.
        path: PathBuf,
    },
    /// The layout that is there already cannot be read.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The source of a blob failed.
    #[error("reading the content of a blob failed: {0}")]
    Source(#[source] io::Error),
    /// The disk failed.
    #[error("writing {} failed: {source}; check free space and permissions", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A document could not be put into JSON.
    #[error("a document cannot be written as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> WriteError + '_ {
    move |source| WriteError::Io { path: path.to_owned(), source }
}

/// A layer that was written, ready for a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenLayer {
    /// The blob.
    pub descriptor: Descriptor,
    /// The digest of its uncompressed tar stream.
    pub diff_id: DiffId,
}

/// Makes or extends an OCI image layout.
#[derive(Debug)]
pub struct LayoutWriter {
    root: PathBuf,
}

impl LayoutWriter {
    /// Makes an empty layout in the folder `path` (created if it is missing), or opens the one that is there.
    ///
    /// # Errors
    /// When the folder holds something else, or cannot be written.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, WriteError> {
        let root: PathBuf = path.into();
        let blobs = root.join("blobs").join("sha256");
        if root.join("oci-layout").exists() {
            Layout::open(&root)?;
            fs::create_dir_all(&blobs).map_err(io_at(&blobs))?;
            remove_leftovers(&root)?;
            remove_leftovers(&blobs)?;
            return Ok(Self { root });
        }
        fs::create_dir_all(&root).map_err(io_at(&root))?;
        if fs::read_dir(&root).map_err(io_at(&root))?.next().is_some() {
            return Err(WriteError::Occupied { path: root });
        }
        fs::create_dir_all(&blobs).map_err(io_at(&blobs))?;
        let writer = Self { root };
        let index = Index { schema_version: 2, media_type: media_type::OCI_INDEX.to_owned(), manifests: Vec::new() };
        writer.replace("index.json", &serde_json::to_vec(&index)?)?;
        writer.replace("oci-layout", &serde_json::to_vec(&json!({ "imageLayoutVersion": LAYOUT_VERSION }))?)?;
        Ok(writer)
    }

    /// The layout, for reading.
    ///
    /// # Errors
    /// When it was damaged meanwhile.
    pub fn layout(&self) -> Result<Layout, WriteError> {
        Ok(Layout::open(&self.root)?)
    }

    /// Begins a blob whose digest shows only when all of it is written, such as the output of a compressor.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn blob(&self) -> Result<BlobWriter, WriteError> {
        BlobWriter::begin(self.root.join("blobs").join("sha256"))
    }

    /// Writes an uncompressed layer from the tar stream `tar`.
    ///
    /// # Errors
    /// When the stream or the disk fails.
    pub fn layer_tar(&self, tar: impl Read) -> Result<WrittenLayer, WriteError> {
        let mut blob = self.blob()?;
        blob.copy_from(tar)?;
        let descriptor = blob.finish(media_type::OCI_LAYER_TAR)?;
        let diff_id = DiffId(descriptor.digest.0);
        Ok(WrittenLayer { descriptor, diff_id })
    }

    /// Writes a layer that is compressed already: the bytes of `blob`, of type `layer_type`, whose uncompressed tar
    /// has the digest `diff_id` (believed, not checked).
    ///
    /// # Errors
    /// When the stream or the disk fails.
    pub fn layer_blob(&self, blob: impl Read, layer_type: &str, diff_id: DiffId) -> Result<WrittenLayer, WriteError> {
        let mut writer = self.blob()?;
        writer.copy_from(blob)?;
        Ok(WrittenLayer { descriptor: writer.finish(layer_type)?, diff_id })
    }

    /// Writes `bytes` as a blob of type `document_type`.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn document(&self, document_type: &str, bytes: &[u8]) -> Result<Descriptor, WriteError> {
        let mut blob = self.blob()?;
        blob.copy_from(bytes)?;
        blob.finish(document_type)
    }

    /// Writes an image: its configuration (`config` is the `config` object of the specification: `Env`, `Entrypoint`,
    /// `Cmd`, ...) and its manifest over `layers`, lowest first. The manifest's descriptor carries the platform; it is
    /// not listed yet, see [`Self::tag`].
    ///
    /// # Errors
    /// When the disk fails.
    pub fn image(
        &self,
        platform: &Platform,
        config: &Value,
        layers: &[WrittenLayer],
    ) -> Result<Descriptor, WriteError> {
        let diff_ids: Vec<DiffId> = layers.iter().map(|layer| layer.diff_id).collect();
        let mut document = serde_json::to_value(platform)?;
        document["config"] = config.clone();
        document["rootfs"] = json!({ "type": "layers", "diff_ids": diff_ids });
        let config = self.document(media_type::OCI_CONFIG, &serde_json::to_vec(&document)?)?;
        let manifest = Manifest {
            schema_version: 2,
            media_type: media_type::OCI_MANIFEST.to_owned(),
            config,
            layers: layers.iter().map(|layer| layer.descriptor.clone()).collect(),
        };
        let descriptor = self.document(media_type::OCI_MANIFEST, &serde_json::to_vec(&manifest)?)?;
        Ok(Descriptor { platform: Some(platform.clone()), ..descriptor })
    }

    /// Writes an index over images of several platforms.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn index(&self, images: Vec<Descriptor>) -> Result<Descriptor, WriteError> {
        let index = Index { schema_version: 2, media_type: media_type::OCI_INDEX.to_owned(), manifests: images };
        self.document(media_type::OCI_INDEX, &serde_json::to_vec(&index)?)
    }

    /// Lists `image` under `tag`, in place of what had that tag before.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn tag(&self, image: Descriptor, tag: &str) -> Result<(), WriteError> {
        let mut index = self.layout()?.index()?;
        index.manifests.retain(|entry| entry.annotations.get(REF_NAME).is_none_or(|name| name != tag));
        let annotations = BTreeMap::from([(REF_NAME.to_owned(), tag.to_owned())]);
        index.manifests.push(Descriptor { annotations, ..image });
        self.replace("index.json", &serde_json::to_vec_pretty(&index)?)
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), WriteError> {
        let temporary = self.root.join(format!("{TEMPORARY_PREFIX}{name}"));
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(io_at(&temporary))?;
        rename(&temporary, &self.root.join(name))
    }
}

fn remove_leftovers(folder: &Path) -> Result<(), WriteError> {
    for entry in fs::read_dir(folder).map_err(io_at(folder))? {
        let path = entry.map_err(io_at(folder))?.path();
        let stray = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(TEMPORARY_PREFIX));
        if stray {
            fs::remove_file(&path).map_err(io_at(&path))?;
        }
    }
    Ok(())
}

/// Renames, and makes the rename itself durable.
fn rename(from: &Path, to: &Path) -> Result<(), WriteError> {
    fs::rename(from, to).map_err(io_at(to))?;
    let Some(folder) = to.parent() else { return Ok(()) };
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_at(folder))
}

/// A blob that is being written. It counts and hashes what it is given; dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub struct BlobWriter {
    folder: PathBuf,
    temporary: PathBuf,
    file: BufWriter<File>,
    hasher: Sha256,
    len_bytes: u64,
}

impl BlobWriter {
    fn begin(folder: PathBuf) -> Result<Self, WriteError> {
        // Random, so that several blobs of one writer can be under way at once.
        let temporary = folder.join(format!("{TEMPORARY_PREFIX}{:016x}", rand::random::<u64>()));
        let file = File::create_new(&temporary).map_err(io_at(&temporary))?;
        let file = BufWriter::with_capacity(COPY_BUFFER_BYTES, file);
        Ok(Self { folder, temporary, file, hasher: Sha256::new(), len_bytes: 0 })
    }

    /// Appends all that `source` holds.
    ///
    /// # Errors
    /// When the source or the disk fails.
    pub fn copy_from(&mut self, mut source: impl Read) -> Result<(), WriteError> {
        let mut buffer = vec![0; COPY_BUFFER_BYTES];
        loop {
            let count = match source.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(WriteError::Source(error)),
            };
            self.write_all(&buffer[..count]).map_err(io_at(&self.temporary))?;
        }
    }

    /// Puts the blob into its place; its descriptor says what it is.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn finish(mut self, blob_type: &str) -> Result<Descriptor, WriteError> {
        let flushed = self.file.flush().and_then(|()| self.file.get_ref().sync_all());
        flushed.map_err(io_at(&self.temporary))?;
        let digest = Digest(std::mem::take(&mut self.hasher).finalize().into());
        rename(&self.temporary, &self.folder.join(digest.hex()))?;
        Ok(Descriptor {
            media_type: blob_type.to_owned(),
            digest,
            size: self.len_bytes,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
            platform: None,
        })
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hasher.update(&bytes[..count]);
        self.len_bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        // After `finish` the file has another name and this finds nothing, which is fine; a file that cannot be
        // removed is removed by the next writer.
        let _ = fs::remove_file(&self.temporary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::{DocumentKind, ImageConfig, MAX_CONFIG_BYTES, MAX_MANIFEST_BYTES, document_kind};

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(folder)
            .expect("a folder")
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn an_image_reads_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let writer = LayoutWriter::create(folder.path().join("new/layout")).expect("a layout");
        let tar = b"a tar stream".repeat(1000);
        let plain = writer.layer_tar(tar.as_slice()).expect("a layer");
        assert_eq!(plain.descriptor.digest.0, plain.diff_id.0);
        assert_eq!(plain.descriptor.size, tar.len() as u64);
        let packed = writer
            .layer_blob(&b"compressed"[..], media_type::OCI_LAYER_GZIP, DiffId([7; 32]))
            .expect("a compressed layer");
        let platform: Platform = "linux/arm/v7".parse().expect("a platform");
        let image =
            writer.image(&platform, &json!({ "Cmd": ["/bin/app"] }), &[plain.clone(), packed]).expect("an image");
        writer.tag(image.clone(), "v1").expect("tagged");
        writer.tag(image, "v1").expect("tagged again");

        let layout = writer.layout().expect("the layout");
        assert_eq!(layout.index().expect("the index").manifests.len(), 1, "a tag is replaced, not added");
        let entry = layout.find("v1").expect("the image");
        let bytes = layout.document(&entry.digest, MAX_MANIFEST_BYTES).expect("the manifest");
        assert_eq!(document_kind(&bytes).expect("known").0, DocumentKind::Manifest);
        let manifest: Manifest = serde_json::from_slice(&bytes).expect("a manifest");
        let bytes = layout.document(&manifest.config.digest, MAX_CONFIG_BYTES).expect("the configuration");
        let config: ImageConfig = serde_json::from_slice(&bytes).expect("a configuration");
        assert_eq!(config.platform, platform);
        assert_eq!(config.rootfs.diff_ids, [plain.diff_id, DiffId([7; 32])]);
        assert_eq!(fs::read(layout.blob_path(&plain.descriptor.digest)).expect("the layer"), tar);
    }

    #[test]
    fn unfinished_blobs_leave_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let writer = LayoutWriter::create(folder.path()).expect("a layout");
        let blobs = folder.path().join("blobs/sha256");
        let mut blob = writer.blob().expect("begun");
        blob.write_all(b"half").expect("written");
        assert_eq!(names(&blobs).len(), 1);
        drop(blob);
        assert!(names(&blobs).is_empty());
        fs::write(blobs.join(".tmp-crashed"), "half").expect("a leftover");
        LayoutWriter::create(folder.path()).expect("opened again");
        assert!(names(&blobs).is_empty());
    }

    #[test]
    fn a_folder_in_use_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("precious"), "data").expect("written");
        assert!(matches!(LayoutWriter::create(folder.path()), Err(WriteError::Occupied { .. })));
        assert_eq!(names(folder.path()), ["precious"]);
    }

    #[test]
    fn a_failing_source_is_told_from_a_failing_disk() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("broken"))
            }
        }
        let folder = tempfile::tempdir().expect("a folder");
        let writer = LayoutWriter::create(folder.path()).expect("a layout");
        assert!(matches!(writer.layer_tar(Broken), Err(WriteError::Source(_))));
    }
}
