//! An OCI image layout, read.
//!
//! A layout is a folder: `oci-layout` says the version, `index.json` names the images, `blobs/sha256/` holds the bytes by
//! digest. Documents (indexes, manifests, configurations) are read whole, within a limit, and checked against their
//! digest; layers are handed out as open files and are *not* checked here, since who reads a part of one checks that
//! part. `index.json` is read anew each time, so images that a writer adds appear at once.
//!
//! All functions block on the disk; asynchronous callers run them on a blocking thread.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use hermes_image::ids::Digest;
use serde::Deserialize;
use sha2::Digest as _;
use thiserror::Error;

use crate::oci::{Descriptor, Index, MAX_MANIFEST_BYTES, REF_NAME, is_tag};

/// The only version of the layout format that exists.
pub(crate) const LAYOUT_VERSION: &str = "1.0.0";

/// Why a layout could not be read.
#[derive(Debug, Error)]
pub enum LayoutError {
    /// The folder is missing or no folder.
    #[error("{} is not a folder that can be read: {source}; name the folder of an OCI image layout", .path.display())]
    NoFolder {
        /// What was opened.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The folder is not an OCI image layout.
    #[error("{} is not an OCI image layout: {reason}; make one with 'skopeo copy docker://IMAGE oci:{}:TAG'", .path.display(), .path.display())]
    NotALayout {
        /// The folder.
        path: PathBuf,
        /// What is missing or wrong.
        reason: String,
    },
    /// No image has this tag.
    #[error("no image in {} is tagged '{tag}'; it has {}", .path.display(), list(.available))]
    UnknownTag {
        /// The layout.
        path: PathBuf,
        /// The tag that was asked for.
        tag: String,
        /// The tags that there are.
        available: Vec<String>,
    },
    /// Several images have this tag.
    #[error("{count} images in {} are tagged '{tag}'; name one by its digest", .path.display())]
    AmbiguousTag {
        /// The layout.
        path: PathBuf,
        /// The tag.
        tag: String,
        /// How many different images have it.
        count: usize,
    },
    /// The layout has no such blob.
    #[error("{} has no blob {digest}; the layout is incomplete, copy the image again", .path.display())]
    NoBlob {
        /// The layout.
        path: PathBuf,
        /// The blob.
        digest: Digest,
    },
    /// A document is longer than anything of its kind may be.
    #[error("{digest} in {} has {len_bytes} bytes, more than the {limit_bytes} that its kind may have", .path.display())]
    TooLong {
        /// The layout.
        path: PathBuf,
        /// The document.
        digest: Digest,
        /// Its length.
        len_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// A document's bytes are not what its digest says.
    #[error("{digest} in {} is damaged: its bytes have the digest {actual}; copy the image again", .path.display())]
    Damaged {
        /// The layout.
        path: PathBuf,
        /// The name of the document.
        digest: Digest,
        /// What its bytes hash to.
        actual: Digest,
    },
    /// The disk failed.
    #[error("reading {} failed: {source}; check the disk and the permissions", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn list(tags: &[String]) -> String {
    /// Tags named in an error: enough to see the pattern without filling the terminal.
    const SHOWN: usize = 8;
    match tags {
        [] => "no tags at all; name the image by its digest".to_owned(),
        _ if tags.len() <= SHOWN => tags.join(", "),
        _ => format!("{} and {} more", tags[..SHOWN].join(", "), tags.len() - SHOWN),
    }
}

/// An OCI image layout on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    root: PathBuf,
}

#[derive(Deserialize)]
struct Marker {
    #[serde(rename = "imageLayoutVersion")]
    version: String,
}

impl Layout {
    /// Opens the layout in the folder `path`, after a look at its version and its index.
    ///
    /// # Errors
    /// When the folder cannot be read, or is not a layout.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, LayoutError> {
        let root: PathBuf = path.into();
        if let Err(source) = std::fs::read_dir(&root) {
            return Err(LayoutError::NoFolder { path: root, source });
        }
        let layout = Self { root };
        let marker: Marker = layout.read_json("oci-layout")?;
        if !marker.version.starts_with("1.") {
            return Err(layout.not_a_layout(format!("its version is {}, not {LAYOUT_VERSION}", marker.version)));
        }
        layout.index()?;
        Ok(layout)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.root
    }

    fn not_a_layout(&self, reason: String) -> LayoutError {
        LayoutError::NotALayout { path: self.root.clone(), reason }
    }

    fn read_json<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, LayoutError> {
        let path = self.root.join(name);
        let file = File::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => self.not_a_layout(format!("it has no file '{name}'")),
            _ => LayoutError::Io { path: path.clone(), source },
        })?;
        let mut bytes = Vec::new();
        let read = file.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut bytes);
        read.map_err(|source| LayoutError::Io { path, source })?;
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(self.not_a_layout(format!("'{name}' is longer than {MAX_MANIFEST_BYTES} bytes")));
        }
        serde_json::from_slice(&bytes).map_err(|error| self.not_a_layout(format!("'{name}' is malformed: {error}")))
    }

    /// The layout's list of images.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn index(&self) -> Result<Index, LayoutError> {
        self.read_json("index.json")
    }

    /// The tags of the layout's images, sorted. Where an image is named by a whole reference, its tag counts; a single
    /// image without any tag is `latest`.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn tags(&self) -> Result<Vec<String>, LayoutError> {
        let index = self.index()?;
        let mut tags: Vec<String> = index.manifests.iter().filter_map(tag_of).map(str::to_owned).collect();
        tags.sort();
        tags.dedup();
        if tags.is_empty() && index.manifests.len() == 1 {
            tags.push("latest".to_owned());
        }
        Ok(tags)
    }

    /// The entry tagged `tag`. `latest` also means the only image of a layout that has just one.
    ///
    /// # Errors
    /// When there is no such image, or more than one.
    pub fn find(&self, tag: &str) -> Result<Descriptor, LayoutError> {
        let index = self.index()?;
        let mut found: Vec<&Descriptor> = index.manifests.iter().filter(|entry| tag_of(entry) == Some(tag)).collect();
        found.dedup_by_key(|entry| entry.digest);
        match (found.as_slice(), index.manifests.as_slice()) {
            ([entry], _) => Ok((*entry).clone()),
            ([], [only]) if tag == "latest" => Ok(only.clone()),
            ([], _) => {
                let available = self.tags()?;
                Err(LayoutError::UnknownTag { path: self.root.clone(), tag: tag.to_owned(), available })
            }
            (several, _) => {
                Err(LayoutError::AmbiguousTag { path: self.root.clone(), tag: tag.to_owned(), count: several.len() })
            }
        }
    }

    /// Where the blob `digest` is, or would be.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join("sha256").join(digest.hex())
    }

    /// The blob `digest` as an open file, and its length in bytes. Its content is not checked.
    ///
    /// # Errors
    /// When there is no such blob or it cannot be opened.
    pub fn open_blob(&self, digest: &Digest) -> Result<(File, u64), LayoutError> {
        let path = self.blob_path(digest);
        let missing = || LayoutError::NoBlob { path: self.root.clone(), digest: *digest };
        let file = File::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => missing(),
            _ => LayoutError::Io { path: path.clone(), source },
        })?;
        let metadata = file.metadata().map_err(|source| LayoutError::Io { path, source })?;
        if metadata.is_file() { Ok((file, metadata.len())) } else { Err(missing()) }
    }

    /// The bytes of the document `digest`, at most `limit_bytes`, checked against the digest.
    ///
    /// # Errors
    /// When it is missing, too long, damaged or unreadable.
    pub fn document(&self, digest: &Digest, limit_bytes: u64) -> Result<Vec<u8>, LayoutError> {
        let (file, len_bytes) = self.open_blob(digest)?;
        if len_bytes > limit_bytes {
            return Err(LayoutError::TooLong { path: self.root.clone(), digest: *digest, len_bytes, limit_bytes });
        }
        let mut bytes = Vec::new();
        let read = file.take(limit_bytes).read_to_end(&mut bytes);
        read.map_err(|source| LayoutError::Io { path: self.blob_path(digest), source })?;
        let actual = Digest(sha2::Sha256::digest(&bytes).into());
        if actual == *digest {
            Ok(bytes)
        } else {
            Err(LayoutError::Damaged { path: self.root.clone(), digest: *digest, actual })
        }
    }
}

/// The tag of an index entry. The annotation should hold a tag; some tools write a whole reference, whose tag then
/// counts.
fn tag_of(entry: &Descriptor) -> Option<&str> {
    let name = entry.annotations.get(REF_NAME)?.as_str();
    if is_tag(name) {
        return Some(name);
    }
    let (_, tag) = name.rsplit_once(':')?;
    is_tag(tag).then_some(tag)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::writer::LayoutWriter;

    #[test]
    fn what_is_no_layout_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().expect("a folder");
        let root = folder.path();
        let missing = Layout::open(root.join("missing")).expect_err("no folder");
        assert!(matches!(missing, LayoutError::NoFolder { .. }), "{missing}");
        let steps: [(&str, &str, &str); 5] = [
            ("other", "", "no file 'oci-layout'"),
            ("oci-layout", "{}", "malformed"),
            ("oci-layout", r#"{"imageLayoutVersion":"7.0"}"#, "version is 7.0"),
            ("oci-layout", r#"{"imageLayoutVersion":"1.0.0"}"#, "no file 'index.json'"),
            ("index.json", "[", "'index.json' is malformed"),
        ];
        for (name, text, expected) in steps {
            std::fs::write(root.join(name), text).expect("written");
            let error = Layout::open(root).expect_err("not a layout yet").to_string();
            assert!(error.contains(expected) && error.contains("skopeo"), "{error}");
        }
        std::fs::write(root.join("index.json"), r#"{"schemaVersion":2,"manifests":[]}"#).expect("written");
        Layout::open(root).expect("a layout, if an empty one");
    }

    #[test]
    fn tags_are_found_and_latest_means_the_only_image() {
        let folder = tempfile::tempdir().expect("a folder");
        let writer = LayoutWriter::create(folder.path()).expect("a layout");
        let first = writer.document("application/json", b"{\"a\":1}").expect("written");
        writer.tag(first.clone(), "docker.io/library/app:v1").expect("tagged");
        let layout = Layout::open(folder.path()).expect("a layout");
        assert_eq!(layout.tags().expect("tags"), ["v1"]);
        assert_eq!(layout.find("latest").expect("the only one").digest, first.digest);
        assert_eq!(layout.find("v1").expect("found").digest, first.digest);

        let second = writer.document("application/json", b"{\"a\":2}").expect("written");
        writer.tag(second, "v2").expect("tagged");
        let error = layout.find("latest").expect_err("two images").to_string();
        assert!(error.contains("v1, v2"), "{error}");
    }

    #[test]
    fn documents_are_checked() {
        let folder = tempfile::tempdir().expect("a folder");
        let writer = LayoutWriter::create(folder.path()).expect("a layout");
        let entry = writer.document("application/json", b"{}").expect("written");
        let layout = Layout::open(folder.path()).expect("a layout");
        assert_eq!(layout.document(&entry.digest, 2).expect("the document"), b"{}");
        assert!(matches!(layout.document(&entry.digest, 1), Err(LayoutError::TooLong { .. })));
        std::fs::write(layout.blob_path(&entry.digest), "[]").expect("damaged");
        assert!(matches!(layout.document(&entry.digest, 2), Err(LayoutError::Damaged { .. })));
        std::fs::remove_file(layout.blob_path(&entry.digest)).expect("removed");
        assert!(matches!(layout.document(&entry.digest, 2), Err(LayoutError::NoBlob { .. })));
    }
}
