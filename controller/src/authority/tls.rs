//! What TLS is told: whose certificates are believed, and which one is shown.

use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};

use super::{Authority, AuthorityError};

impl Authority {
    /// How the API speaks TLS from `now` on: TLS 1.3 alone, with a new certificate of the generation that issues. Who shows
    /// a certificate must show one of a root that is believed; who shows none may only join.
    ///
    /// # Errors
    /// When a library refuses what this authority has made.
    pub fn server_config(&self, now: u64) -> Result<Arc<rustls::ServerConfig>, AuthorityError> {
        let failed = |error: &dyn std::fmt::Display| AuthorityError::Tls(error.to_string());
        let mut roots = RootCertStore::empty();
        for root in self.roots() {
            roots.add(CertificateDer::from(root)).map_err(|error| failed(&error))?;
        }
        let provider = Arc::new(default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
            .allow_unauthenticated()
            .build()
            .map_err(|error| failed(&error))?;
        let (certificate, key) = self.issuing(now).server_certificate(now)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| failed(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![CertificateDer::from(certificate)], key)
            .map_err(|error| failed(&error))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        // A resumed session would not show its certificate again, and each costs memory.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config))
    }
}
