//! One root and one issuing key, which live and are replaced together.

use std::time::Duration;

use hermes_controller_api::SERVER_NAME;
use hermes_p2p::admission::issuing::IssuingKey;
use hermes_p2p::{ClusterId, PeerKey};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PKCS_ED25519, PublicKeyData, SignatureAlgorithm, date_time_ymd,
};
use rustls::pki_types::PrivatePkcs8KeyDer;
use zeroize::Zeroizing;

use super::{AuthorityError, NODE_CERTIFICATE_LIFE, OVERLAP, SERVER_CERTIFICATE_LIFE};

/// How long a root is good by itself. It ends by not being believed any more, long before.
const ROOT_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How far a node's clock may be behind.
const CLOCK_SKEW: Duration = Duration::from_secs(300);

/// A root and an issuing key.
#[derive(Clone)]
pub(super) struct Generation {
    /// Counts from 1.
    pub(super) number: u64,
    /// Seconds since 1970.
    pub(super) made_at: u64,
    /// X.509 in DER.
    root: Vec<u8>,
    /// PKCS #8 in DER.
    key: Zeroizing<Vec<u8>>,
    issuer_seed: Zeroizing<[u8; 32]>,
    /// The name in the root.
    name: String,
    first: bool,
}

impl std::fmt::Debug for Generation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generation")
            .field("number", &self.number)
            .field("made_at", &self.made_at)
            .finish_non_exhaustive()
    }
}

/// The Ed25519 key of a node, as rcgen wants it.
struct NodeKey([u8; 32]);

impl PublicKeyData for NodeKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &SignatureAlgorithm {
        &PKCS_ED25519
    }
}

impl Generation {
    /// A new one, the `number`th of `cluster`, made at `now`.
    pub(super) fn create(cluster: &ClusterId, number: u64, now: u64) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let name = root_name(cluster, number);
        let root = root_params(&name, now)?.self_signed(&key)?;
        let seed: [u8; 32] = rand::random();
        Ok(Self {
            number,
            made_at: now,
            root: root.der().to_vec(),
            key: Zeroizing::new(key.serialize_der()),
            issuer_seed: Zeroizing::new(seed),
            name,
            first: number == 1,
        })
    }

    /// One that was written down.
    pub(super) fn restore(
        cluster: &ClusterId,
        number: u64,
        made_at: u64,
        root: Vec<u8>,
        key: Zeroizing<Vec<u8>>,
        issuer_seed: [u8; 32],
    ) -> Result<Self, AuthorityError> {
        let name = root_name(cluster, number);
        let issuer_seed = Zeroizing::new(issuer_seed);
        let restored = Self { number, made_at, root, key, issuer_seed, name, first: number == 1 };
        restored.key_pair()?;
        Ok(restored)
    }

    /// X.509 in DER.
    pub(super) fn root(&self) -> &[u8] {
        &self.root
    }

    /// The secret key of the root, PKCS #8 in DER.
    pub(super) fn key(&self) -> &[u8] {
        &self.key
    }

    /// The secret of the issuing key.
    pub(super) fn issuer_seed(&self) -> &[u8; 32] {
        &self.issuer_seed
    }

    /// The root as PEM.
    pub(super) fn root_pem(&self) -> String {
        hermes_controller_api::pem("CERTIFICATE", &self.root)
    }

    /// From when it issues, in seconds since 1970: the very first has nobody to wait for.
    pub(super) fn issues_from(&self) -> u64 {
        if self.first { self.made_at } else { self.made_at.saturating_add(OVERLAP.as_secs()) }
    }

    /// The swarm's issuing key.
    pub(super) fn issuer(&self) -> IssuingKey {
        IssuingKey::from_seed(*self.issuer_seed)
    }

    fn key_pair(&self) -> Result<KeyPair, rcgen::Error> {
        KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(self.key.to_vec()), &PKCS_ECDSA_P256_SHA256)
    }

    /// What signs. Only its name and its key's identifier go into what is signed, and those are the root's.
    fn signer(&self) -> Result<(Certificate, KeyPair), rcgen::Error> {
        let key = self.key_pair()?;
        let certificate = root_params(&self.name, self.made_at)?.self_signed(&key)?;
        Ok((certificate, key))
    }

    /// A certificate for `node` with the public key `peer`, X.509 in DER.
    pub(super) fn node_certificate(&self, node: &str, peer: PeerKey, now: u64) -> Result<Vec<u8>, AuthorityError> {
        let mut params = leaf_params(node, now, NODE_CERTIFICATE_LIFE)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let (root, key) = self.signer()?;
        Ok(params.signed_by(&NodeKey(peer.to_bytes()), &root, &key)?.der().to_vec())
    }

    /// A certificate for the server with a key of its own: X.509 and PKCS #8, both in DER.
    pub(super) fn server_certificate(&self, now: u64) -> Result<(Vec<u8>, Vec<u8>), AuthorityError> {
        let mut params = leaf_params(SERVER_NAME, now, SERVER_CERTIFICATE_LIFE)?;
        params.subject_alt_names = vec![rcgen::SanType::DnsName(SERVER_NAME.try_into()?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let own = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let (root, key) = self.signer()?;
        Ok((params.signed_by(&own, &root, &key)?.der().to_vec(), own.serialize_der()))
    }
}

/// Each has a name of its own, so that a chain is never looked for at the wrong root.
fn root_name(cluster: &ClusterId, number: u64) -> String {
    format!("hermes {cluster} {number}")
}

fn root_params(name: &str, made_at: u64) -> Result<CertificateParams, rcgen::Error> {
    let mut params = params(name, made_at, ROOT_LIFE)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    Ok(params)
}

fn leaf_params(name: &str, now: u64, life: Duration) -> Result<CertificateParams, rcgen::Error> {
    let mut params = params(name, now, life)?;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn params(name: &str, from: u64, life: Duration) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.remove(DnType::CommonName);
    params.distinguished_name.push(DnType::CommonName, name);
    let epoch = date_time_ymd(1970, 1, 1);
    params.not_before = epoch + Duration::from_secs(from).saturating_sub(CLOCK_SKEW);
    params.not_after = epoch + Duration::from_secs(from) + life;
    Ok(params)
}
