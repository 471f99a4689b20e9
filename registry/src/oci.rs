//! The documents of an OCI image, as registries and layouts hold them: descriptors, indexes, manifests, and the choice
//! of a platform.
//!
//! Docker's schema 2 documents have the same shape and are read by the same types. Every list may be missing or `null`
//! (encoders written in Go write `null` for an empty list). Only sha256 digests are understood: an entry with another
//! algorithm makes its document unreadable, with an error that names the digest.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use hermes_image::ids::{DiffId, Digest};
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

/// Media types, as they stand in the image specification and in Docker's.
pub mod media_type {
    /// An OCI image index.
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// An OCI image manifest.
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// An OCI image configuration.
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// An OCI layer, not compressed.
    pub const OCI_LAYER_TAR: &str = "application/vnd.oci.image.layer.v1.tar";
    /// An OCI layer, compressed with gzip.
    pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    /// An OCI layer, compressed with zstd.
    pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
    /// A Docker manifest list, the counterpart of an index.
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// A Docker manifest, schema 2.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// A Docker layer, not compressed.
    pub const DOCKER_LAYER_TAR: &str = "application/vnd.docker.image.rootfs.diff.tar";
    /// A Docker layer, compressed with gzip.
    pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    /// A Docker layer, compressed with zstd.
    pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";
    /// Docker's first manifest format, without content addressing of its layers' content. Refused everywhere.
    pub const DOCKER_SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1+json";
    /// The same with a signature.
    pub const DOCKER_SCHEMA1_SIGNED: &str = "application/vnd.docker.distribution.manifest.v1+prettyjws";

    /// What a client that can read indexes and manifests of both kinds accepts.
    pub const ACCEPT_MANIFESTS: [&str; 4] = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST];
}

/// The annotation that names an entry of a layout's index: a tag, or with some tools a whole reference.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// Bytes: the largest manifest or index that is read. The distribution specification asks registries to take at least
/// 4 MiB and common registries take no more.
pub const MAX_MANIFEST_BYTES: u64 = 4 << 20;

/// Bytes: the largest image configuration that is read. Configurations of a few hundred KiB occur (long histories);
/// this leaves room for ten times that.
pub const MAX_CONFIG_BYTES: u64 = 8 << 20;

fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// What a platform's entry, a manifest's layer or a configuration is: type, name and length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// The media type; empty where the document has none.
    #[serde(default, deserialize_with = "null_is_default")]
    pub media_type: String,
    /// The digest of the bytes.
    pub digest: Digest,
    /// The number of bytes.
    pub size: u64,
    /// Where else the bytes are to be had; only foreign layers have these.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Free notes, among them [`REF_NAME`].
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// The platform that an index's entry is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

/// An image index or Docker manifest list; a layout's `index.json` is one as well.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// The media type; may be missing.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// The entries, in the order of the document.
    #[serde(default, deserialize_with = "null_is_default")]
    pub manifests: Vec<Descriptor>,
}

/// An image manifest: one configuration and the layers, lowest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// The media type; may be missing.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub media_type: String,
    /// The image configuration.
    pub config: Descriptor,
    /// The layers, lowest first.
    #[serde(default, deserialize_with = "null_is_default")]
    pub layers: Vec<Descriptor>,
}

/// The part of an image configuration that says what the layers hold and where they run.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ImageConfig {
    /// The platform; flattened in the document. Parts may be empty in very old images.
    #[serde(flatten)]
    pub platform: Platform,
    /// The layers' content.
    pub rootfs: RootFs,
}

/// The `rootfs` of an image configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct RootFs {
    /// The layers' uncompressed digests, lowest first.
    #[serde(default, deserialize_with = "null_is_default")]
    pub diff_ids: Vec<DiffId>,
}

/// Operating system and processor that an image is for, such as `linux/amd64` or `linux/arm/v7`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// The operating system by Go's name.
    #[serde(default, deserialize_with = "null_is_default")]
    pub os: String,
    /// The processor by Go's name.
    #[serde(default, deserialize_with = "null_is_default")]
    pub architecture: String,
    /// The processor's variant, such as `v7`; empty where the processor has but one.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

/// A text that is no platform.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{0}' is not a platform; write os/architecture or os/architecture/variant, such as linux/amd64")]
pub struct ParsePlatformError(pub String);

impl Platform {
    /// The platform `os/architecture`, without variant.
    pub fn new(os: &str, architecture: &str) -> Self {
        Self { os: os.to_owned(), architecture: architecture.to_owned(), variant: String::new() }
    }

    /// The platform that this process runs on.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Self::new(std::env::consts::OS, architecture)
    }

    /// Whether the document said nothing: then nothing can be held against it.
    pub fn is_unknown(&self) -> bool {
        self.os.is_empty() || self.architecture.is_empty() || self.os == "unknown"
    }

    /// How well an image for `self` serves a node of platform `wanted`: `None` not at all, larger is better.
    /// A processor of variant `v7` runs images for `v6`; the other way round does not work.
    fn serves(&self, wanted: &Self) -> Option<u32> {
        if self.os != wanted.os || self.architecture != wanted.architecture {
            return None;
        }
        match (self.variant_rank(), wanted.variant_rank()) {
            (Some(image), Some(node)) => (image <= node).then_some(image),
            _ => (self.variant == wanted.variant).then_some(0),
        }
    }

    fn variant_rank(&self) -> Option<u32> {
        match (self.variant.as_str(), self.architecture.as_str()) {
            ("", "arm64") => Some(8),
            ("", "arm") => Some(7),
            ("", _) => Some(1),
            (variant, _) => variant.strip_prefix('v')?.parse().ok(),
        }
    }

    /// Whether an image for `self` runs on a node of platform `wanted`.
    pub fn runs_on(&self, wanted: &Self) -> bool {
        self.serves(wanted).is_some()
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if self.variant.is_empty() { Ok(()) } else { write!(f, "/{}", self.variant) }
    }
}

impl FromStr for Platform {
    type Err = ParsePlatformError;

    fn from_str(text: &str) -> Result<Self, ParsePlatformError> {
        let parts: Vec<&str> = text.split('/').collect();
        let plain =
            |part: &&str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        match parts.as_slice() {
            [os, architecture] if parts.iter().all(plain) => Ok(Self::new(os, architecture)),
            [os, architecture, variant] if parts.iter().all(plain) => {
                Ok(Self { variant: (*variant).to_owned(), ..Self::new(os, architecture) })
            }
            _ => Err(ParsePlatformError(text.to_owned())),
        }
    }
}

impl Index {
    /// The entry that serves a node of platform `wanted` best.
    ///
    /// # Errors
    /// When there is none: the platforms that the index does have, without attestations (`unknown/unknown`).
    pub fn select(&self, wanted: &Platform) -> Result<&Descriptor, Vec<Platform>> {
        let mut best: Option<(u32, &Descriptor)> = None;
        for entry in &self.manifests {
            let Some(rank) = entry.platform.as_ref().and_then(|platform| platform.serves(wanted)) else { continue };
            if best.is_none_or(|(best_rank, _)| rank > best_rank) {
                best = Some((rank, entry));
            }
        }
        // An index with one entry that names no platform can only mean that entry.
        let only = match self.manifests.as_slice() {
            [entry] if entry.platform.is_none() => Some(entry),
            _ => None,
        };
        best.map(|(_, entry)| entry).or(only).ok_or_else(|| {
            let platforms = self.manifests.iter().filter_map(|entry| entry.platform.clone());
            platforms.filter(|platform| !platform.is_unknown()).collect()
        })
    }
}

/// What kind of document a manifest's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DocumentKind {
    /// An index or manifest list.
    Index,
    /// An image manifest.
    Manifest,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Shape {
    #[serde(default)]
    schema_version: u32,
    #[serde(default, deserialize_with = "null_is_default")]
    media_type: String,
    #[serde(default)]
    manifests: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    config: Option<serde::de::IgnoredAny>,
}

/// Why bytes are no manifest that can be used.
#[derive(Debug, Error)]
pub enum DocumentError {
    /// Not JSON, or not of the expected shape.
    #[error("it is not a valid document: {0}")]
    Malformed(#[from] serde_json::Error),
    /// A format that is not supported, by its media type or schema version.
    #[error("its format '{0}' is not supported; use an OCI image or a Docker image of schema 2")]
    Unsupported(String),
}

/// Tells what `bytes` are, and their media type. A document's own type counts; without one its shape decides.
///
/// # Errors
/// When the bytes are no JSON, or neither index nor manifest, among them Docker's schema 1.
pub fn document_kind(bytes: &[u8]) -> Result<(DocumentKind, String), DocumentError> {
    let shape: Shape = serde_json::from_slice(bytes)?;
    if shape.schema_version == 1 {
        return Err(DocumentError::Unsupported("Docker manifest, schema 1".to_owned()));
    }
    let kind = match shape.media_type.as_str() {
        media_type::OCI_INDEX | media_type::DOCKER_LIST => DocumentKind::Index,
        media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST => DocumentKind::Manifest,
        "" if shape.manifests.is_some() => return Ok((DocumentKind::Index, media_type::OCI_INDEX.to_owned())),
        "" if shape.config.is_some() => return Ok((DocumentKind::Manifest, media_type::OCI_MANIFEST.to_owned())),
        "" => return Err(DocumentError::Unsupported("neither an index nor a manifest".to_owned())),
        _ => return Err(DocumentError::Unsupported(shape.media_type)),
    };
    Ok((kind, shape.media_type))
}

/// Whether `text` is a tag (distribution specification: a letter, digit or underscore, then at most 127 of those,
/// dots and dashes).
pub fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let mut bytes = text.bytes();
    bytes.next().is_some_and(word) && text.len() <= 128 && bytes.all(|b| word(b) || b == b'.' || b == b'-')
}

/// Whether `text` is a repository name (distribution specification): lower-case words, joined by `.`, `_`, `__` or
/// dashes, in components joined by `/`. Such a name can never climb out of a folder.
pub fn is_repository_name(text: &str) -> bool {
    !text.is_empty() && text.len() <= 255 && text.split('/').all(is_name_component)
}

fn is_name_component(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let edges = text.bytes().next().is_some_and(word) && text.bytes().next_back().is_some_and(word);
    let separators = text.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    edges && separators.into_iter().all(|s| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(platform: Option<&str>) -> Descriptor {
        Descriptor {
            media_type: media_type::OCI_MANIFEST.to_owned(),
            digest: Digest([platform.map_or(0, |p| p.len() as u8); 32]),
            size: 1,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
            platform: platform.map(|p| p.parse().expect("a platform")),
        }
    }

    fn index(platforms: &[&str]) -> Index {
        let manifests = platforms.iter().map(|p| entry(Some(p))).collect();
        Index { schema_version: 2, media_type: String::new(), manifests }
    }

    #[test]
    fn the_best_platform_is_chosen() {
        let cases: [(&[&str], &str, Option<&str>); 9] = [
            (&["linux/arm64", "linux/amd64"], "linux/amd64", Some("linux/amd64")),
            (&["linux/arm64/v8"], "linux/arm64", Some("linux/arm64/v8")),
            (&["linux/arm/v5", "linux/arm/v7", "linux/arm/v6"], "linux/arm/v6", Some("linux/arm/v6")),
            (&["linux/arm/v5", "linux/arm/v7"], "linux/arm/v6", Some("linux/arm/v5")),
            (&["linux/arm/v5", "linux/arm/v7"], "linux/arm", Some("linux/arm/v7")),
            (&["linux/amd64/v3"], "linux/amd64", None),
            (&["linux/amd64/v3", "linux/amd64"], "linux/amd64/v2", Some("linux/amd64")),
            (&["windows/amd64", "unknown/unknown"], "linux/amd64", None),
            (&[], "linux/amd64", None),
        ];
        for (platforms, wanted, expected) in cases {
            let index = index(platforms);
            let got = index.select(&wanted.parse().expect("a platform"));
            let name = got.as_ref().ok().and_then(|d| d.platform.as_ref()).map(ToString::to_string);
            assert_eq!(name.as_deref(), expected, "{platforms:?} for {wanted}");
            if let Err(available) = got {
                assert!(available.iter().all(|p| !p.is_unknown()), "attestations are no platform");
            }
        }
    }

    #[test]
    fn a_single_entry_without_platform_is_meant() {
        let index = Index { schema_version: 2, media_type: String::new(), manifests: vec![entry(None)] };
        assert!(index.select(&Platform::host()).is_ok());
    }

    #[test]
    fn platforms_round_trip_and_nonsense_is_refused() {
        for text in ["linux/amd64", "linux/arm/v7", "windows/amd64"] {
            assert_eq!(text.parse::<Platform>().expect("a platform").to_string(), text);
        }
        for text in ["", "linux", "linux/", "/amd64", "a/b/c/d", "linux/amd 64"] {
            assert!(text.parse::<Platform>().is_err(), "{text} was accepted");
        }
    }

    #[test]
    fn null_lists_are_empty() {
        let index: Index = serde_json::from_str(r#"{"schemaVersion":2,"manifests":null}"#).expect("an index");
        assert!(index.manifests.is_empty());
    }

    #[test]
    fn documents_are_told_apart() {
        let cases = [
            (r#"{"schemaVersion":2,"manifests":[]}"#, Some(DocumentKind::Index)),
            (r#"{"schemaVersion":2,"config":{},"layers":[]}"#, Some(DocumentKind::Manifest)),
            (
                r#"{"schemaVersion":2,"mediaType":"application/vnd.docker.distribution.manifest.list.v2+json"}"#,
                Some(DocumentKind::Index),
            ),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#, None),
            (r#"{"schemaVersion":2,"mediaType":"application/vnd.other"}"#, None),
            (r#"{}"#, None),
            ("[]", None),
            ("", None),
        ];
        for (text, expected) in cases {
            assert_eq!(document_kind(text.as_bytes()).ok().map(|(kind, _)| kind), expected, "{text}");
        }
    }

    #[test]
    fn names_and_tags_follow_the_specification() {
        for name in ["a", "library/redis", "a.b/c__d/e-f", "a---b", "0/1"] {
            assert!(is_repository_name(name), "{name} was refused");
        }
        for name in ["", "/", "a/", "/a", "..", "a/../b", "A", "a..b", "a___b", "-a", "a-", "a b", "a%2fb"] {
            assert!(!is_repository_name(name), "{name} was accepted");
        }
        for tag in ["latest", "1.2-3", "_x", "A"] {
            assert!(is_tag(tag), "{tag} was refused");
        }
        for tag in ["", ".a", "-a", "a/b", "a:b", &"a".repeat(129)] {
            assert!(!is_tag(tag), "{tag} was accepted");
        }
    }
}
