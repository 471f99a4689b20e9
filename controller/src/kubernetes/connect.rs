//! The connection to an API server.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{InferConfigError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::{Client, Config};
use thiserror::Error;

use super::watch::WATCH_SECONDS;

/// How long the API server may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a request may take to be sent.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Why there is no connection.
#[derive(Debug, Error)]
pub enum ConnectError {
    /// The kubeconfig cannot be read.
    #[error("cannot read the kubeconfig {}", path.display())]
    Kubeconfig {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: Box<KubeconfigError>,
    },
    /// Nothing says where the API server is.
    #[error("found no API server: run in a pod with a ServiceAccount, or name a kubeconfig")]
    Nowhere(#[source] Box<InferConfigError>),
    /// What the configuration says makes no client.
    #[error("cannot use the configuration of the API server")]
    Client(#[source] Box<kube::Error>),
}

/// A client of the API server that `kubeconfig` names; without one, of that which `KUBECONFIG`, the user's folder or the
/// pod's ServiceAccount names. Does not connect yet. Needs a default cryptography provider of rustls.
///
/// # Errors
/// When the configuration cannot be read or used.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, ConnectError> {
    let mut config = match kubeconfig {
        Some(path) => {
            let failed = |source| ConnectError::Kubeconfig { path: path.to_owned(), source: Box::new(source) };
            let kubeconfig = Kubeconfig::read_from(path).map_err(failed)?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.map_err(failed)?
        }
        None => Config::infer().await.map_err(|source| ConnectError::Nowhere(Box::new(source)))?,
    };
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    config.write_timeout = Some(WRITE_TIMEOUT);
    // Longer than the longest watch that says nothing; a connection whose other side is gone is noticed by this.
    config.read_timeout = Some(Duration::from_secs(u64::from(WATCH_SECONDS) + 15));
    config.reset_reader_on_write = true;
    Client::try_from(config).map_err(|source| ConnectError::Client(Box::new(source)))
}
