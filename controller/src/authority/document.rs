//! The authority as one document: what is kept in a file, or in a Secret.

use hermes_p2p::ClusterId;
use hermes_p2p::admission::revocation::SignedRevocation;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use super::generation::Generation;
use super::{Authority, AuthorityError};

/// The version of the form below.
const VERSION: u32 = 1;
/// Longest document: a few generations, and a full notice in hexadecimal digits.
pub(super) const DOCUMENT_LEN_MAX_BYTES: usize = 256 * 1024;
/// Most generations that one can have: nobody renews more often than nodes can hear of it.
const GENERATIONS_MAX: usize = 16;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    cluster: String,
    generations: Vec<Written>,
    /// In hexadecimal digits; empty while there is none.
    revocation: String,
}

/// A generation; bytes in hexadecimal digits.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    number: u64,
    made_at: u64,
    root: String,
    key: String,
    issuer_seed: String,
}

impl Drop for Written {
    fn drop(&mut self) {
        self.key.zeroize();
        self.issuer_seed.zeroize();
    }
}

fn wrong(reason: impl Into<String>) -> AuthorityError {
    AuthorityError::Document { reason: reason.into() }
}

impl Authority {
    /// All of it, secrets included, as JSON. Whoever has it is the cluster.
    pub fn to_document(&self) -> Zeroizing<Vec<u8>> {
        let written = |generation: &Generation| Written {
            number: generation.number,
            made_at: generation.made_at,
            root: hex::encode(generation.root()),
            key: hex::encode(generation.key()),
            issuer_seed: hex::encode(generation.issuer_seed()),
        };
        let document = Document {
            version: VERSION,
            cluster: self.cluster.to_string(),
            generations: self.generations.iter().map(written).collect(),
            revocation: self.revocation.as_ref().map(|notice| hex::encode(notice.encode())).unwrap_or_default(),
        };
        Zeroizing::new(serde_json::to_vec_pretty(&document).expect("numbers and text are always JSON"))
    }

    /// Reads what [`Self::to_document`] has written for `cluster`.
    ///
    /// # Errors
    /// When it is something else, or of another cluster.
    pub fn from_document(bytes: &[u8], cluster: &ClusterId) -> Result<Self, AuthorityError> {
        if bytes.len() > DOCUMENT_LEN_MAX_BYTES {
            return Err(wrong(format!("it is longer than {DOCUMENT_LEN_MAX_BYTES} bytes")));
        }
        let document: Document = serde_json::from_slice(bytes).map_err(|error| wrong(error.to_string()))?;
        if document.version != VERSION {
            return Err(wrong(format!("it has version {}, and this build knows {VERSION}", document.version)));
        }
        if document.cluster != cluster.as_str() {
            let (expected, found) = (cluster.to_string(), document.cluster);
            return Err(AuthorityError::OtherCluster { expected, found });
        }
        let count = document.generations.len();
        if count == 0 || count > GENERATIONS_MAX {
            return Err(wrong(format!("it has {count} generations, and 1 to {GENERATIONS_MAX} can be")));
        }
        if !document.generations.is_sorted_by(|one, next| one.number < next.number) {
            return Err(wrong("its generations are not in order"));
        }
        let generations = document.generations.iter().map(|written| read(cluster, written));
        let generations = generations.collect::<Result<Vec<_>, _>>()?;
        let revocation = match document.revocation.as_str() {
            "" => None,
            text => {
                let bytes = hex::decode(text).map_err(|error| wrong(error.to_string()))?;
                Some(SignedRevocation::decode(&bytes).map_err(|error| wrong(error.to_string()))?)
            }
        };
        Ok(Self { cluster: cluster.clone(), generations, revocation })
    }
}

fn read(cluster: &ClusterId, written: &Written) -> Result<Generation, AuthorityError> {
    let bytes = |text: &str| hex::decode(text).map_err(|error| wrong(error.to_string()));
    let mut seed = Zeroizing::new([0; 32]);
    hex::decode_to_slice(&written.issuer_seed, &mut *seed).map_err(|error| wrong(error.to_string()))?;
    let (root, key) = (bytes(&written.root)?, Zeroizing::new(bytes(&written.key)?));
    Generation::restore(cluster, written.number, written.made_at, root, key, *seed)
}
