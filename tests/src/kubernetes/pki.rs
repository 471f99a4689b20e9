//! The certificates and keys of a cluster: one authority for servers and clients, and a key that signs tokens.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    SanType,
};

/// Who issues ServiceAccounts' tokens, and for whom they are by default.
pub const ISSUER: &str = "https://kubernetes.default.svc";

/// Who somebody is to the API server.
#[derive(Debug, Clone, Copy)]
pub struct Identity<'a> {
    /// The user, such as `system:node:n1`.
    pub user: &'a str,
    /// The user's group.
    pub group: &'a str,
}

impl Identity<'static> {
    /// Somebody who may do everything.
    pub fn admin() -> Self {
        Self { user: "admin", group: "system:masters" }
    }
}

/// A certificate and its key, in PEM.
pub struct Issued {
    /// The certificate.
    pub certificate: String,
    /// Its key.
    pub key: String,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued").finish_non_exhaustive()
    }
}

/// The authority of a cluster, with the files that the API server reads.
pub struct Pki {
    dir: PathBuf,
    authority: Certificate,
    key: KeyPair,
}

impl fmt::Debug for Pki {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pki").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Pki {
    /// Makes one, with its files in `dir`: `ca.crt`, `server.crt` and `.key`, by which the API server is known at loopback
    /// and at `addresses`, `kubelets.crt` and `.key`, by which it asks kubelets, and `tokens.key` and `.pub`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn new(dir: &Path, addresses: &[IpAddr]) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, "test-authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let authority = params.self_signed(&key)?;
        let pki = Self { dir: dir.to_owned(), authority, key };
        let tokens = KeyPair::generate()?;
        let server = pki.server(addresses)?;
        let kubelets = pki.issue(&Identity { user: "kube-apiserver", group: "system:masters" })?;
        for (name, text) in [
            ("ca.crt", pki.authority.pem()),
            ("server.crt", server.certificate),
            ("server.key", server.key),
            ("kubelets.crt", kubelets.certificate),
            ("kubelets.key", kubelets.key),
            ("tokens.key", tokens.serialize_pem()),
            ("tokens.pub", tokens.public_key_pem()),
        ] {
            fs::write(pki.path(name), text)?;
        }
        Ok(pki)
    }

    /// Where a file is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A certificate by which somebody logs in.
    ///
    /// # Errors
    /// When there is no randomness to make a key of.
    pub fn issue(&self, identity: &Identity<'_>) -> Result<Issued> {
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, identity.user);
        params.distinguished_name.push(DnType::OrganizationName, identity.group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params)
    }

    fn server(&self, addresses: &[IpAddr]) -> Result<Issued> {
        let names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"];
        let mut params = CertificateParams::new(names.map(str::to_owned).to_vec())?;
        params.distinguished_name.push(DnType::CommonName, "kube-apiserver");
        let addresses = [IpAddr::V4(Ipv4Addr::LOCALHOST)].into_iter().chain(addresses.iter().copied());
        params.subject_alt_names.extend(addresses.map(SanType::IpAddress));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(params)
    }

    fn sign(&self, mut params: CertificateParams) -> Result<Issued> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.authority, &self.key)?;
        Ok(Issued { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}
