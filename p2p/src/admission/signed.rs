//! A document of the cluster's issuer, with its signature.
//!
//! Certificates, grants and revocation notices are the same thing with different fields: a version, the cluster, the
//! fields, and a signature of the issuing key over all of that in the domain of its kind. So there is one place that
//! signs, writes, limits and reads them, and a kind of document says only what is its own.

use libp2p::identity::ed25519;

use super::certificate::Trust;
use crate::canonical::{DecodeError, Reader, SIGNATURE_LEN_BYTES, Writer, sign};
use crate::config::ClusterId;

/// What an issuer signs. [`Reader`] and [`Writer`] have no name outside this crate, so the kinds here are all there are.
pub trait Document: Sized {
    /// What precedes the signed bytes, so that a signature is good for one kind only.
    const DOMAIN: &'static [u8];
    /// The version of the encoding.
    const VERSION: u8;
    /// Most bytes that one takes with its signature.
    const LEN_MAX_BYTES: usize;

    /// Where it is good.
    fn cluster(&self) -> &ClusterId;

    /// Writes what follows the cluster.
    fn write(&self, out: &mut Writer);

    /// Reads what [`Self::write`] has written.
    ///
    /// # Errors
    /// When a field ends too early or cannot be.
    fn read(cluster: ClusterId, fields: &mut Reader<'_>) -> Result<Self, DecodeError>;

    /// Signs it with the issuing `key`.
    fn sign(self, key: &ed25519::Keypair) -> Signed<Self> {
        let signature = sign(key, Self::DOMAIN, &body(&self));
        Signed { said: self, signature }
    }
}

/// The signed bytes.
fn body<T: Document>(said: &T) -> Vec<u8> {
    let mut out = Writer::default();
    out.u8(T::VERSION).short(said.cluster().as_str().as_bytes());
    said.write(&mut out);
    out.finish()
}

/// A document and its issuer's signature, which is not checked by reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signed<T> {
    pub(crate) said: T,
    pub(crate) signature: [u8; SIGNATURE_LEN_BYTES],
}

impl<T: Document> Signed<T> {
    /// What it says, believed or not.
    pub fn said(&self) -> &T {
        &self.said
    }

    /// The bytes that are sent and kept, at most [`Document::LEN_MAX_BYTES`].
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = body(&self.said);
        bytes.extend_from_slice(&self.signature);
        bytes
    }

    /// Reads what [`Self::encode`] has written, and nothing else.
    ///
    /// # Errors
    /// When the bytes are too many or not of that form.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Reader::versioned(bytes, T::LEN_MAX_BYTES, T::VERSION)?;
        let cluster = fields.parsed("cluster")?;
        let said = T::read(cluster, &mut fields)?;
        let signature = fields.array()?;
        fields.end()?;
        Ok(Self { said, signature })
    }

    /// Whether an issuer that is believed has signed it, for whatever cluster.
    pub(crate) fn is_by(&self, trust: &Trust) -> bool {
        trust.has_signed(T::DOMAIN, &body(&self.said), &self.signature)
    }
}
