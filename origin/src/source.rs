//! Where an image is: in a registry, or in an OCI layout on this machine.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use hermes_image::ids::Digest;
use hermes_registry::oci::is_tag;
use oci_client::Reference;
use thiserror::Error;

/// A text that names no image.
#[derive(Debug, Error)]
#[error(
    "'{text}' does not name an image: {reason}; write a reference such as docker.io/library/redis:7, or oci:FOLDER:TAG for an OCI layout"
)]
pub struct ParseSourceError {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Which image of a layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayoutSelector {
    /// The one with this tag; `latest` also means the only one.
    Tag(String),
    /// The one with this digest, of a manifest or an index.
    Digest(Digest),
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageSource {
    /// In a registry.
    Registry(Reference),
    /// In a layout: `oci:FOLDER`, `oci:FOLDER:TAG` or `oci:FOLDER@sha256:...`.
    Layout {
        /// The folder.
        path: PathBuf,
        /// Which image of it.
        selector: LayoutSelector,
    },
}

impl FromStr for ImageSource {
    type Err = ParseSourceError;

    /// What follows the last colon of a layout is a tag if it can be one: a folder whose name ends in `:word` needs its
    /// tag spelled out.
    fn from_str(text: &str) -> Result<Self, ParseSourceError> {
        let error = |reason: String| ParseSourceError { text: text.to_owned(), reason };
        let Some(rest) = text.strip_prefix("oci:") else {
            let reference: Reference = text.parse().map_err(|cause| error(format!("{cause}")))?;
            if let Some(digest) = reference.digest() {
                digest.parse::<Digest>().map_err(|cause| error(cause.to_string()))?;
            }
            return Ok(Self::Registry(reference));
        };
        let (path, selector) = if let Some((path, digest)) = rest.rsplit_once('@')
            && digest.contains(':')
        {
            let digest = digest.parse().map_err(|cause| error(format!("{cause}")))?;
            (path, LayoutSelector::Digest(digest))
        } else {
            match rest.rsplit_once(':') {
                Some((path, tag)) if is_tag(tag) => (path, LayoutSelector::Tag(tag.to_owned())),
                _ => (rest, LayoutSelector::Tag("latest".to_owned())),
            }
        };
        if path.is_empty() {
            return Err(error("the folder is missing".to_owned()));
        }
        Ok(Self::Layout { path: path.into(), selector })
    }
}

impl fmt::Display for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => write!(f, "{reference}"),
            Self::Layout { path, selector: LayoutSelector::Tag(tag) } => write!(f, "oci:{}:{tag}", path.display()),
            Self::Layout { path, selector: LayoutSelector::Digest(digest) } => {
                write!(f, "oci:{}@{digest}", path.display())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_told_apart() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        let pinned = format!("oci:/l@{digest}");
        let reference = format!("registry.test:5000/a/b@{digest}");
        let cases = [
            ("redis", "docker.io/library/redis:latest"),
            ("127.0.0.1:5000/app:v1", "127.0.0.1:5000/app:v1"),
            ("oci:/var/images", "oci:/var/images:latest"),
            ("oci:images:v1.2", "oci:images:v1.2"),
            ("oci:/a:b/c", "oci:/a:b/c:latest"),
            ("oci:/a:b/c:d", "oci:/a:b/c:d"),
            (&pinned, &pinned),
            (&reference, &reference),
        ];
        for (text, expected) in cases {
            let source: ImageSource = text.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(source.to_string(), expected);
            assert_eq!(matches!(source, ImageSource::Layout { .. }), text.starts_with("oci:"));
        }
    }

    #[test]
    fn nonsense_is_refused_with_an_example() {
        let long = format!("app@sha512:{}", "0".repeat(128));
        for text in ["", "oci:", "oci::tag", "Not A Name", "app:", "app@sha256:short", "oci:/l@sha256:00", &long] {
            let error = text.parse::<ImageSource>().expect_err(text).to_string();
            assert!(error.contains(text) && error.contains("oci:FOLDER:TAG"), "{error}");
        }
    }
}
