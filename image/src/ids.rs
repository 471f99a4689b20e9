//! Names and integer spaces.
//!
//! Every space that a number can live in has its own type, so that a byte position in a compressed blob can never be
//! used where a position in the uncompressed tar stream is meant.

use std::cmp::Ordering;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// A text that is not the name it was taken for.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{text}' is not {expected}")]
pub struct ParseIdError {
    /// What was given.
    pub text: String,
    /// What was expected, such as `a sha256 digest (sha256: and 64 hexadecimal digits)`.
    pub expected: &'static str,
}

fn parse_hex32(text: &str, hex_digits: &str, expected: &'static str) -> Result<[u8; 32], ParseIdError> {
    let mut bytes = [0_u8; 32];
    // OCI digests are lower case only (image-spec, descriptor.md, "Registered algorithms").
    let lower = !hex_digits.bytes().any(|b| b.is_ascii_uppercase());
    if !lower || hex::decode_to_slice(hex_digits, &mut bytes).is_err() {
        return Err(ParseIdError { text: text.to_owned(), expected });
    }
    Ok(bytes)
}

macro_rules! text_serde {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    };
}

macro_rules! sha256_name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// The 64 hexadecimal digits, without the algorithm.
            pub fn hex(&self) -> String {
                hex::encode(self.0)
            }
        }

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
                Some(self.cmp(other))
            }
        }

        impl Ord for $name {
            /// The order of the bytes. Policy looks layers up in every step, and the first eight bytes tell hashes apart.
            fn cmp(&self, other: &Self) -> Ordering {
                let head = |name: &Self| name.0.first_chunk().map_or(0, |head| u64::from_be_bytes(*head));
                head(self).cmp(&head(other)).then_with(|| self.0.cmp(&other.0))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "sha256:{}", hex::encode(self.0))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let expected = "a sha256 digest (sha256: and 64 lower-case hexadecimal digits)";
                match text.strip_prefix("sha256:") {
                    Some(digits) => parse_hex32(text, digits, expected).map(Self),
                    None => Err(ParseIdError { text: text.to_owned(), expected }),
                }
            }
        }

        text_serde!($name);
    };
}

sha256_name! {
    /// A sha256 content digest as registries write it, of a manifest, a configuration or any other blob.
    Digest
}
sha256_name! {
    /// A layer blob, by the sha256 of its *compressed* bytes: the digest of its descriptor.
    LayerId
}
sha256_name! {
    /// A layer's content, by the sha256 of its *uncompressed* tar stream. Names the layer's logical space.
    DiffId
}
sha256_name! {
    /// A chain of layers applied in order (image-spec, config.md, "Layer ChainID"). Names a merged tree.
    ChainId
}

impl From<LayerId> for Digest {
    fn from(id: LayerId) -> Self {
        Self(id.0)
    }
}

impl From<Digest> for LayerId {
    fn from(digest: Digest) -> Self {
        Self(digest.0)
    }
}

impl ChainId {
    /// The chain of `diff_ids`, lowest layer first; `None` for no layers.
    pub fn of(diff_ids: &[DiffId]) -> Option<Self> {
        use sha2::Digest as _;
        let (first, rest) = diff_ids.split_first()?;
        let chain = rest
            .iter()
            .fold(Self(first.0), |chain, diff_id| Self(sha2::Sha256::digest(format!("{chain} {diff_id}")).into()));
        Some(chain)
    }
}

macro_rules! blake3_name {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// The name of `bytes`.
            pub fn of(bytes: &[u8]) -> Self {
                Self(*blake3::hash(bytes).as_bytes())
            }

            /// The 64 hexadecimal digits, without the algorithm.
            pub fn hex(&self) -> String {
                hex::encode(self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "blake3:{}", hex::encode(self.0))
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let expected = "a BLAKE3 name (blake3: and 64 lower-case hexadecimal digits)";
                match text.strip_prefix("blake3:") {
                    Some(digits) => parse_hex32(text, digits, expected).map(Self),
                    None => Err(ParseIdError { text: text.to_owned(), expected }),
                }
            }
        }

        text_serde!($name);
    };
}

blake3_name! {
    /// A chunk, by the BLAKE3 hash of its uncompressed bytes.
    ChunkId
}
blake3_name! {
    /// An index artifact (table of contents, chunk table, seek table, tree), by the BLAKE3 hash of its canonical,
    /// uncompressed encoding.
    ArtifactId
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($int:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $int);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number! {
    /// A byte position in a layer's uncompressed tar stream, from 0.
    LogicalOffset(u64)
}
number! {
    /// A byte position in a layer's compressed blob, from 0.
    BlobOffset(u64)
}
number! {
    /// A chunk of one layer, counted from 0 in logical order.
    ChunkNo(u32)
}
number! {
    /// A span of one layer, counted from 0 in logical order.
    SpanNo(u32)
}

/// A run of chunks of one layer: `start..end`, `end` not included.
pub type ChunkRange = Range<u32>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_round_trip_as_text() {
        let text = format!("sha256:{}", "0a".repeat(32));
        let digest: Digest = text.parse().expect("well formed");
        assert_eq!(digest.to_string(), text);
        let json = serde_json::to_string(&digest).expect("serialises");
        assert_eq!(serde_json::from_str::<Digest>(&json).expect("parses"), digest);
    }

    #[test]
    fn malformed_digests_are_refused() {
        for text in ["", "sha256:", "sha256:0a", "md5:0a", &format!("sha256:{}", "0A".repeat(32)), &"0a".repeat(32)] {
            assert!(text.parse::<Digest>().is_err(), "{text} was accepted");
        }
    }

    #[test]
    fn chain_id_follows_the_image_spec() {
        let a = DiffId([1; 32]);
        let b = DiffId([2; 32]);
        assert_eq!(ChainId::of(&[]), None);
        assert_eq!(ChainId::of(&[a]), Some(ChainId([1; 32])));
        use sha2::Digest as _;
        let expected: [u8; 32] = sha2::Sha256::digest(format!("{a} {b}")).into();
        assert_eq!(ChainId::of(&[a, b]), Some(ChainId(expected)));
    }
}
