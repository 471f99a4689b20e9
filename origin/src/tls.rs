//! Whom a host is believed by, and how it is shown who asks: CA files and client certificates, for each host its own.
//!
//! Hosts without settings of their own share one client. The others share one for equal settings; their files are looked
//! at again now and then, and a client is made anew when one has changed, so certificates rotate without a restart. When
//! new files cannot be used, the old client goes on and says so.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::{Certificate, ClientBuilder, Identity};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::counters::Meters;
use super::transport::Transport;
use super::{OriginConfig, SetupError};

/// How often files are looked at for changes.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);

/// Clients kept: as many as registries and mirrors a node has. The one that was looked at longest ago makes room.
const MAX_CLIENTS: usize = 256;

/// Bytes: the longest file of certificates that is read; the largest bundle of all public CAs has 250 KiB.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Certificates that cannot be used.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("the certificate file {} cannot be read: {source}; check the path and its permissions", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file makes no sense.
    #[error("the certificate file {} cannot be used: {reason}; it should be PEM", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The client could not be made of them.
    #[error("the certificates cannot be used: {0}")]
    Client(#[from] reqwest::Error),
}

/// A client's certificate: one file with its key, or two files.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientCertificate {
    /// The certificate and those that vouch for it, PEM.
    pub certificate: PathBuf,
    /// Its key, PEM; in the same file when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,
}

/// How one host is talked to over TLS.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsSettings {
    /// CAs that are believed beside the system's, PEM.
    pub ca: Vec<PathBuf>,
    /// Certificates that are shown when the host asks for one. The first is used.
    pub client: Vec<ClientCertificate>,
    /// Do not check who the host is. Anybody in between can then read the credentials.
    pub skip_verify: bool,
}

impl TlsSettings {
    /// Whether nothing is special.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Takes from `other` what is not said here.
    pub(super) fn or(mut self, other: Option<&Self>) -> Self {
        if let Some(other) = other {
            self.ca.extend(other.ca.iter().cloned());
            if self.client.is_empty() {
                self.client.clone_from(&other.client);
            }
            self.skip_verify |= other.skip_verify;
        }
        self
    }

    fn paths(&self) -> impl Iterator<Item = &Path> {
        let client = self.client.iter().take(1);
        let client = client.flat_map(|client| [Some(client.certificate.as_path()), client.key.as_deref()]).flatten();
        self.ca.iter().map(PathBuf::as_path).chain(client)
    }

    /// What tells that a file has changed.
    fn stamp(&self) -> Vec<Option<(SystemTime, u64)>> {
        let about = |path: &Path| {
            let about = std::fs::metadata(path).ok()?;
            Some((about.modified().ok()?, about.len()))
        };
        self.paths().map(about).collect()
    }

    fn apply(&self, mut builder: ClientBuilder) -> Result<ClientBuilder, TlsError> {
        for path in &self.ca {
            let malformed = |error: reqwest::Error| malformed(path, &error);
            let certificates = Certificate::from_pem_bundle(&read(path)?).map_err(malformed)?;
            if certificates.is_empty() {
                let reason = "there is no certificate in it".to_owned();
                return Err(TlsError::Malformed { path: path.clone(), reason });
            }
            builder = builder.tls_certs_merge(certificates);
        }
        if let Some(client) = self.client.first() {
            let mut pem = read(&client.certificate)?;
            if let Some(key) = &client.key {
                pem.push(b'\n');
                pem.extend_from_slice(&read(key)?);
            }
            let identity = Identity::from_pem(&pem).map_err(|error| malformed(&client.certificate, &error))?;
            builder = builder.identity(identity);
        }
        if self.skip_verify {
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
        Ok(builder)
    }
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    use std::io::Read as _;
    let failed = |source| TlsError::Io { path: path.to_owned(), source };
    let mut bytes = Zeroizing::new(Vec::new());
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let reason = format!("it is longer than {MAX_FILE_BYTES} bytes");
        return Err(TlsError::Malformed { path: path.to_owned(), reason });
    }
    Ok(bytes)
}

fn malformed(path: &Path, error: &reqwest::Error) -> TlsError {
    TlsError::Malformed { path: path.to_owned(), reason: error.to_string() }
}

/// A client for special settings.
#[derive(Debug)]
struct Kept {
    transport: Transport,
    stamp: Vec<Option<(SystemTime, u64)>>,
    looked_at: Instant,
}

/// All clients of this process. Cheap to clone; clones share them.
#[derive(Debug, Clone)]
pub(super) struct Transports {
    usual: Transport,
    config: Arc<OriginConfig>,
    special: Arc<parking_lot::Mutex<BTreeMap<TlsSettings, Kept>>>,
}

impl Transports {
    pub(super) fn new(config: Arc<OriginConfig>, meters: Arc<Meters>) -> Result<Self, SetupError> {
        let usual = Transport::new(&config, meters, Ok::<_, reqwest::Error>).map_err(SetupError)?;
        Ok(Self { usual, config, special: Arc::default() })
    }

    pub(super) fn meters(&self) -> &Meters {
        &self.usual.meters
    }

    /// The client for `tls`. Looks at files at most now and then, for microseconds.
    pub(super) fn get(&self, tls: &TlsSettings) -> Result<Transport, TlsError> {
        if tls.is_default() {
            return Ok(self.usual.clone());
        }
        let now = Instant::now();
        let mut special = self.special.lock();
        if let Some(kept) = special.get_mut(tls) {
            if now.duration_since(kept.looked_at) < LOOK_INTERVAL {
                return Ok(kept.transport.clone());
            }
            kept.looked_at = now;
            let stamp = tls.stamp();
            if stamp == kept.stamp {
                return Ok(kept.transport.clone());
            }
            match self.make(tls) {
                Ok(transport) => (kept.transport, kept.stamp) = (transport, stamp),
                Err(error) => tracing::warn!(%error, "changed certificates are not used yet"),
            }
            return Ok(kept.transport.clone());
        }
        let (stamp, transport) = (tls.stamp(), self.make(tls)?);
        if special.len() >= MAX_CLIENTS {
            let oldest = special.iter().min_by_key(|(_, kept)| kept.looked_at).map(|(tls, _)| tls.clone());
            oldest.and_then(|oldest| special.remove(&oldest));
        }
        special.insert(tls.clone(), Kept { transport: transport.clone(), stamp, looked_at: now });
        Ok(transport)
    }

    fn make(&self, tls: &TlsSettings) -> Result<Transport, TlsError> {
        Transport::new(&self.config, Arc::clone(&self.usual.meters), |builder| tls.apply(builder))
    }
}
