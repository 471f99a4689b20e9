//! What the index signer says about an image, and the signature that nodes check.
//!
//! A statement binds a manifest digest to its layers and to the artifacts that describe them. It is the only thing
//! that a node takes on somebody's word: everything below it is checked by hash. A statement never names a tag, so it
//! cannot be carried over to another image.
//!
//! The signed form is one JSON object:
//!
//! ```json
//! {"statement": "{...}", "signatures": [{"key": "ed25519:<hex>", "signature": "<hex>"}]}
//! ```
//!
//! `statement` is the text that was signed, kept as it is, so that no second encoder has to agree with the first.
//! The signed bytes are [`DOMAIN`] and that text; the domain keeps a signature from being valid for anything else
//! that the same key may sign one day. Several signatures allow keys to be rotated with an overlap.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::Signer as _;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::ids::{ArtifactId, DiffId, Digest, LayerId};

/// Longest signed statement, in bytes: about 1,500 layers, far above what overlay or EROFS can mount.
pub const SIGNED_LEN_MAX_BYTES: usize = 1 << 20;
/// What precedes the signed text.
pub const DOMAIN: &[u8] = b"hermes index statement v1\0";
/// Most signatures that are looked at: the keys of one rotation, with room.
const SIGNATURE_COUNT_MAX: usize = 8;
/// The format of the statement's text.
const FORMAT: u32 = 1;

/// What is known of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerStatement {
    /// The blob, as the manifest names it.
    pub layer: LayerId,
    /// The uncompressed tar stream, as the image configuration names it.
    pub diff_id: DiffId,
    /// Length of the blob in bytes.
    pub blob_len_bytes: u64,
    /// Length of the uncompressed tar stream in bytes.
    pub logical_len_bytes: u64,
    /// Table of contents.
    pub toc: ArtifactId,
    /// Chunk table.
    pub chunks: ArtifactId,
    /// Directory of the seek table.
    pub seek: ArtifactId,
    /// Windows of the seek table.
    pub windows: ArtifactId,
}

/// What the signer says about one image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statement {
    /// Version of this structure, 1.
    pub format: u32,
    /// The manifest, of one platform.
    pub manifest: Digest,
    /// The platform, such as `linux/amd64` or `linux/arm64/v8`.
    pub platform: String,
    /// The layers, lowest first.
    pub layers: Vec<LayerStatement>,
}

/// Why a statement was not accepted.
#[derive(Debug, Error)]
pub enum StatementError {
    /// Longer than [`SIGNED_LEN_MAX_BYTES`].
    #[error("signed statement is longer than {SIGNED_LEN_MAX_BYTES} bytes")]
    TooLong,
    /// Not the JSON that was expected.
    #[error("signed statement is malformed: {0}")]
    Malformed(#[source] serde_json::Error),
    /// A format of a later version.
    #[error("statement has format {0}; this version knows {FORMAT}")]
    Format(u32),
    /// Nobody whom this node trusts has signed it.
    #[error("no trusted key has signed the statement; it is signed by {}", list(.signed_by))]
    Untrusted {
        /// Whose signatures it carries, valid or not.
        signed_by: Vec<PublicKey>,
    },
    /// A trusted key is named, but its signature is wrong.
    #[error("the signature of {key} does not fit the statement")]
    BadSignature {
        /// The key that is named.
        key: PublicKey,
    },
    /// About another image than the one asked for.
    #[error("the statement is about {actual}, not about {expected}")]
    OtherImage {
        /// Asked for.
        expected: Digest,
        /// Named by the statement.
        actual: Digest,
    },
}

fn list(keys: &[PublicKey]) -> String {
    if keys.is_empty() {
        return "nobody".to_owned();
    }
    keys.iter().map(PublicKey::to_string).collect::<Vec<_>>().join(", ")
}

/// Text that is no key.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("'{text}' is not an Ed25519 key (ed25519: and 64 hexadecimal digits)")]
pub struct ParseKeyError {
    text: String,
}

/// The key that checks a signature. Holds the 32 bytes of its text; the curve point, six times as long, is made when a
/// signature is checked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey([u8; 32]);

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ed25519:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for PublicKey {
    type Err = ParseKeyError;

    fn from_str(text: &str) -> Result<Self, ParseKeyError> {
        let error = || ParseKeyError { text: text.to_owned() };
        let digits = text.strip_prefix("ed25519:").ok_or_else(error)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| error())?;
        ed25519_dalek::VerifyingKey::from_bytes(&bytes).map_err(|_| error())?;
        Ok(Self(bytes))
    }
}

/// The key that makes signatures. Its text form is the 32-byte seed; nothing prints it by accident.
pub struct SigningKey(ed25519_dalek::SigningKey);

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey(of {})", self.public())
    }
}

impl PublicKey {
    fn accepts(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        let signature = ed25519_dalek::Signature::from_bytes(signature);
        ed25519_dalek::VerifyingKey::from_bytes(&self.0).is_ok_and(|key| key.verify_strict(message, &signature).is_ok())
    }
}

impl SigningKey {
    /// The key of a seed of 32 secret, random bytes.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        Self(ed25519_dalek::SigningKey::from_bytes(seed))
    }

    /// The seed, for safekeeping.
    pub fn seed(&self) -> [u8; 32] {
        self.0.to_bytes()
    }

    /// The key that checks this one's signatures.
    pub fn public(&self) -> PublicKey {
        PublicKey(self.0.verifying_key().to_bytes())
    }

    /// Signs `statement` and returns the signed form.
    pub fn sign(&self, statement: &Statement) -> Vec<u8> {
        statement.signed_by(&[self])
    }
}

/// Signs `text` with each of `keys` and returns the signed form, for documents of the signer's own that are no
/// statements: `domain` tells their kind, so that none can be taken for another.
pub fn sign_text(keys: &[&SigningKey], domain: &[u8], text: String) -> Vec<u8> {
    let message = signed_bytes(domain, &text);
    let signatures = keys.iter().take(SIGNATURE_COUNT_MAX).map(|key| Signature {
        key: key.public().to_string(),
        signature: hex::encode(key.0.sign(&message).to_bytes()),
    });
    let signed = Signed { signatures: signatures.collect(), statement: text };
    serde_json::to_vec(&signed).expect("texts only")
}

/// The text of a signed document of the kind `domain`, if one of `trusted` has signed it.
///
/// # Errors
/// When it is malformed, or not signed by a trusted key. One wrong signature of a trusted key refuses the whole:
/// somebody has tampered with it.
pub fn open_text(signed: &[u8], domain: &[u8], trusted: &[PublicKey]) -> Result<String, StatementError> {
    if signed.len() > SIGNED_LEN_MAX_BYTES {
        return Err(StatementError::TooLong);
    }
    let signed: Signed = serde_json::from_slice(signed).map_err(StatementError::Malformed)?;
    let message = signed_bytes(domain, &signed.statement);
    let mut signed_by = Vec::new();
    let mut accepted = false;
    for signature in signed.signatures.iter().take(SIGNATURE_COUNT_MAX) {
        let Ok(key) = signature.key.parse::<PublicKey>() else { continue };
        signed_by.push(key);
        if !trusted.contains(&key) {
            continue;
        }
        let mut bytes = [0; 64];
        let valid = hex::decode_to_slice(&signature.signature, &mut bytes).is_ok() && key.accepts(&message, &bytes);
        if !valid {
            return Err(StatementError::BadSignature { key });
        }
        accepted = true;
    }
    if accepted { Ok(signed.statement) } else { Err(StatementError::Untrusted { signed_by }) }
}

/// Whose signatures a signed document carries, valid or not, in their order; none when it is malformed.
pub fn signers(signed: &[u8]) -> Vec<PublicKey> {
    if signed.len() > SIGNED_LEN_MAX_BYTES {
        return Vec::new();
    }
    let signed = serde_json::from_slice::<Signed>(signed);
    let signatures = signed.map(|signed| signed.signatures).unwrap_or_default();
    signatures.iter().take(SIGNATURE_COUNT_MAX).filter_map(|signature| signature.key.parse().ok()).collect()
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Signed {
    statement: String,
    signatures: Vec<Signature>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Signature {
    key: String,
    signature: String,
}

fn signed_bytes(domain: &[u8], text: &str) -> Vec<u8> {
    [domain, text.as_bytes()].concat()
}

impl Statement {
    /// A statement of the current format.
    pub fn new(manifest: Digest, platform: String, layers: Vec<LayerStatement>) -> Self {
        Self { format: FORMAT, manifest, platform, layers }
    }

    /// The signed form, with the signature of each of `keys`: several while keys are being exchanged.
    pub fn signed_by(&self, keys: &[&SigningKey]) -> Vec<u8> {
        sign_text(keys, DOMAIN, serde_json::to_string(self).expect("a statement has only texts and numbers"))
    }

    /// Takes a signed statement about `manifest`, if one of `trusted` has signed it.
    ///
    /// # Errors
    /// When it is malformed, about another image, or not signed by a trusted key. One wrong signature of a trusted key
    /// refuses the whole: somebody has tampered with it.
    pub fn open(signed: &[u8], manifest: Digest, trusted: &[PublicKey]) -> Result<Self, StatementError> {
        let text = open_text(signed, DOMAIN, trusted)?;
        let statement: Self = serde_json::from_str(&text).map_err(StatementError::Malformed)?;
        if statement.format != FORMAT {
            return Err(StatementError::Format(statement.format));
        }
        if statement.manifest != manifest {
            return Err(StatementError::OtherImage { expected: manifest, actual: statement.manifest });
        }
        Ok(statement)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statement() -> Statement {
        let layer = LayerStatement {
            layer: LayerId([1; 32]),
            diff_id: DiffId([2; 32]),
            blob_len_bytes: 10,
            logical_len_bytes: 1024,
            toc: ArtifactId([3; 32]),
            chunks: ArtifactId([4; 32]),
            seek: ArtifactId([5; 32]),
            windows: ArtifactId([6; 32]),
        };
        Statement::new(Digest([9; 32]), "linux/amd64".to_owned(), vec![layer])
    }

    fn key(seed: u8) -> SigningKey {
        SigningKey::from_seed(&[seed; 32])
    }

    #[test]
    fn a_trusted_signature_is_accepted() {
        let signed = key(1).sign(&statement());
        let opened = Statement::open(&signed, Digest([9; 32]), &[key(2).public(), key(1).public()]);
        assert_eq!(opened.expect("accepted"), statement());
    }

    #[test]
    fn anything_else_is_refused() {
        let signed = key(1).sign(&statement());
        let trusted = [key(1).public()];
        let open = |signed: &[u8], trusted: &[PublicKey]| Statement::open(signed, Digest([9; 32]), trusted);
        assert!(matches!(open(&signed, &[key(2).public()]), Err(StatementError::Untrusted { .. })));
        assert!(matches!(open(&signed, &[]), Err(StatementError::Untrusted { .. })));
        assert!(matches!(Statement::open(&signed, Digest([8; 32]), &trusted), Err(StatementError::OtherImage { .. })));
        let text = String::from_utf8(signed.clone()).expect("json");
        let moved = text.replace("amd64", "arm64");
        assert!(matches!(open(moved.as_bytes(), &trusted), Err(StatementError::BadSignature { .. })));
        assert!(matches!(open(&signed[1..], &trusted), Err(StatementError::Malformed(_))));
        assert!(matches!(open(&vec![b' '; SIGNED_LEN_MAX_BYTES + 1], &trusted), Err(StatementError::TooLong)));
    }

    #[test]
    fn several_keys_sign_and_kinds_of_documents_are_not_mixed_up() {
        let signed = statement().signed_by(&[&key(2), &key(1)]);
        assert_eq!(signers(&signed), [key(2).public(), key(1).public()]);
        for trusted in [key(1).public(), key(2).public()] {
            assert!(Statement::open(&signed, Digest([9; 32]), &[trusted]).is_ok());
        }
        let other = sign_text(&[&key(1)], b"another kind\0", "{}".to_owned());
        assert_eq!(open_text(&other, b"another kind\0", &[key(1).public()]).expect("its own kind"), "{}");
        assert!(matches!(open_text(&other, DOMAIN, &[key(1).public()]), Err(StatementError::BadSignature { .. })));
        assert!(signers(b"{").is_empty());
    }

    #[test]
    fn keys_round_trip_as_text_and_secrets_are_not_printed() {
        let public = key(7).public();
        assert_eq!(public.to_string().parse(), Ok(public));
        assert!("ed25519:00".parse::<PublicKey>().is_err());
        assert!(!format!("{:?}", key(7)).contains(&hex::encode([7_u8; 32])));
    }
}
