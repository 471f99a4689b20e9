//! Connections to the controller, one after the other: join, watch, renew, save.
//!
//! A session ends when the connection does, when the controller drains, or when there is a new certificate to be shown;
//! then the next address is tried, after a random wait that grows from half a second to a minute. A watch goes on where
//! the last one was, so what a session costs is what has changed.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use hermes_controller_api::v1::controller_client::ControllerClient;
use hermes_controller_api::{Message as _, SERVER_NAME, VERSION_MAX, VERSION_MIN, pem, v1};
use hermes_p2p::admission::certificate::SignedCertificate;
use hermes_p2p::error::in_full;
use hermes_p2p::unix_now;
use thiserror::Error;
use tokio::time::Instant;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};
use zeroize::Zeroizing;

use super::Controller;
use super::known::{self, Changed};

/// Longest first wait before a connection is tried again.
const WAIT_FIRST: Duration = Duration::from_millis(500);
/// Longest wait.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Time for TCP and TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for a join: the controller asks the API server.
const JOIN_TIMEOUT: Duration = Duration::from_secs(30);
/// How often a quiet connection is asked whether anybody is there.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);
/// How long the answer may take.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long what was told waits to be saved: a burst is written once.
const SAVE_AFTER: Duration = Duration::from_secs(1);
/// A session of this length was a good one: the next wait is short again.
const GOOD_AFTER: Duration = Duration::from_secs(10);
/// How long a certificate is good that this node has just been given, unless the member's says less. See the controller's authority.
const CERTIFICATE_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Longest token file. Tokens of Kubernetes have some 1,200 characters.
const TOKEN_LEN_MAX_BYTES: u64 = 16 * 1024;
/// How much of an update is taken before it is read.
const WINDOW_LEN_BYTES: u32 = 1 << 20;

/// Why a session ended.
#[derive(Debug, Error)]
pub(super) enum SessionError {
    #[error("cannot read {path}: {source}")]
    File { path: std::path::PathBuf, source: std::io::Error },
    #[error("cannot connect: {}", in_full(.0))]
    Connect(#[from] tonic::transport::Error),
    #[error("{}: {}", .0.code(), .0.message())]
    Refused(#[from] Box<Status>),
    #[error("it does not answer")]
    Silent,
    #[error("it sends what cannot be read: {0}")]
    Malformed(String),
}

fn refused(status: Status) -> SessionError {
    Box::new(status).into()
}

/// There is no connection any more.
struct Disconnect<'a>(&'a Controller);

impl Drop for Disconnect<'_> {
    fn drop(&mut self) {
        self.0.client.send_replace(None);
    }
}

impl Controller {
    /// Stays connected. Never ends by itself.
    pub async fn run(self: Arc<Self>) {
        let (mut failures, mut last) = (0_u32, String::new());
        // Not all nodes at the same one.
        let mut place = rand::random::<u32>() as usize;
        loop {
            let address = &self.settings.addresses[place % self.settings.addresses.len()];
            let began = Instant::now();
            let ended = self.session(address).await;
            self.save().await;
            if began.elapsed() >= GOOD_AFTER {
                failures = 0;
            }
            match ended {
                Ok(()) => last.clear(),
                Err(error) => {
                    let text = error.to_string();
                    // Once for each reason: a controller that is away for a night is no news each minute.
                    if text == last {
                        tracing::debug!(address, error = text, "the controller is away");
                    } else {
                        tracing::warn!(
                            address,
                            error = text,
                            "the controller is away; this node goes on with what it knows"
                        );
                        last = text;
                    }
                    place = place.wrapping_add(1);
                }
            }
            let longest = WAIT_FIRST.saturating_mul(1 << failures.min(10)).min(WAIT_MAX);
            failures = failures.saturating_add(1);
            // All of it is random, so that a fleet comes back spread out.
            tokio::time::sleep(longest.mul_f64(rand::random())).await;
        }
    }

    async fn session(&self, address: &str) -> Result<(), SessionError> {
        let shows = !self.known.read().certificate.is_empty() && !self.distrusted.load(Ordering::Relaxed);
        let doubt = |error: &SessionError| self.distrust(shows && is_about_certificate(error));
        let mut client = self.connect(address, shows).await.inspect_err(doubt)?;
        if !shows || self.is_renewal_due() {
            self.join(&mut client, shows).await.inspect_err(doubt)?;
            self.distrust(false);
            client = self.connect(address, true).await?;
        }
        let request = {
            let mut known = self.known.write();
            known.begin();
            known.request()
        };
        let watched = client.watch(request).await.map_err(refused);
        let mut updates = watched.inspect_err(|error| self.distrust(is_about_certificate(error)))?.into_inner();
        self.client.send_replace(Some(client.clone()));
        let _disconnect = Disconnect(self);
        tracing::info!(address, "connected with the controller");
        let renew_at = self.renew_at();
        let mut save_at: Option<Instant> = None;
        loop {
            let save = async { tokio::time::sleep_until(save_at.unwrap_or_else(Instant::now)).await };
            tokio::select! {
                update = updates.message() => match update.map_err(refused)? {
                    Some(update) => {
                        self.take(update)?;
                        save_at.get_or_insert_with(|| Instant::now() + SAVE_AFTER);
                    }
                    None => return Ok(()),
                },
                () = tokio::time::sleep_until(renew_at) => {
                    self.join(&mut client, true).await?;
                    return Ok(());
                }
                () = save, if save_at.is_some() => {
                    save_at = None;
                    self.save().await;
                }
                () = self.starts_due.notified() => self.send_starts(&mut client).await,
            }
        }
    }

    /// Whether the certificate that was shown may be why it did not work: then the next session joins anew.
    fn distrust(&self, doubtful: bool) {
        self.distrusted.store(doubtful, Ordering::Relaxed);
    }

    fn is_renewal_due(&self) -> bool {
        self.renew_at() <= Instant::now()
    }

    /// At half of what the certificate's life was. Its end is known by the member's, which was issued with it.
    fn renew_at(&self) -> Instant {
        let issued = self.known.read().issued_at();
        let age = Duration::from_secs(unix_now().saturating_sub(issued));
        // Give or take a tenth, so that nodes that started together do not renew together.
        let at = CERTIFICATE_LIFE.mul_f64(0.45 + 0.1 * rand::random::<f64>());
        Instant::now() + at.saturating_sub(age)
    }

    async fn connect(&self, address: &str, shows: bool) -> Result<ControllerClient<Channel>, SessionError> {
        let path = &self.settings.ca;
        let file = tokio::fs::read(path).await.map_err(|source| SessionError::File { path: path.clone(), source });
        let mut roots = String::new();
        let certificate = {
            let known = self.known.read();
            known.roots().iter().for_each(|root| roots.push_str(&pem("CERTIFICATE", root)));
            known.certificate.clone()
        };
        // What the controller has named replaces the file, which may be of a root that was given up; and a node that was
        // away for so long that it knows none of today's roots finds them there.
        if roots.is_empty() || !shows {
            roots.push_str(&String::from_utf8_lossy(&file?));
        }
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(roots)).domain_name(SERVER_NAME);
        if shows {
            tls = tls.identity(Identity::from_pem(pem("CERTIFICATE", &certificate), self.key.as_str()));
        }
        let endpoint = Endpoint::from_shared(address.to_owned())?
            .tls_config(tls)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE_EVERY)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(WINDOW_LEN_BYTES)
            .initial_connection_window_size(4 * WINDOW_LEN_BYTES);
        Ok(ControllerClient::new(endpoint.connect().await?))
    }

    /// Joins, or renews by the certificate that is shown.
    pub(super) async fn join(&self, client: &mut ControllerClient<Channel>, renews: bool) -> Result<(), SessionError> {
        let token = match &self.settings.token {
            Some(path) if !renews => read_token(path).await?,
            _ => Zeroizing::new(String::new()),
        };
        let request = v1::JoinRequest {
            versions: Some(v1::Versions { min: VERSION_MIN, max: VERSION_MAX }),
            cluster: self.settings.cluster.to_string(),
            node: self.settings.node.clone(),
            peer: self.peer.to_bytes().into(),
            zone: self.settings.zone.clone(),
            token: token.to_string(),
            addresses: self.addresses.read().clone(),
        };
        let joined =
            tokio::time::timeout(JOIN_TIMEOUT, client.join(request)).await.map_err(|_| SessionError::Silent)?;
        let answer = joined.map_err(refused)?.into_inner();
        if !(VERSION_MIN..=VERSION_MAX).contains(&answer.version) {
            return Err(SessionError::Malformed(format!("version {}", answer.version)));
        }
        let member = SignedCertificate::decode(&answer.member_certificate);
        let member = member.map_err(|error| SessionError::Malformed(error.to_string()))?;
        if member.said().peer != self.peer || answer.certificate.is_empty() {
            return Err(SessionError::Malformed("a certificate for another node".to_owned()));
        }
        {
            let mut known = self.known.write();
            if let Some(trust) = answer.trust {
                known.set_trust(trust);
            }
            known.certificate = answer.certificate;
            known.member = Some(member);
        }
        self.changes.fetch_add(1, Ordering::Relaxed);
        self.tell(Changed { trust: true, ..Changed::default() });
        self.save().await;
        Ok(())
    }

    fn take(&self, update: v1::WatchResponse) -> Result<(), SessionError> {
        let update =
            v1::WatchUpdate::decode(update.update).map_err(|error| SessionError::Malformed(error.to_string()))?;
        let changed = self.known.write().take(update);
        self.changes.fetch_add(1, Ordering::Relaxed);
        self.tell(changed);
        Ok(())
    }

    fn tell(&self, changed: Changed) {
        let known = self.known.read();
        if changed.members {
            self.places.send_replace(known.places());
        }
        if changed.trust {
            self.notice.send_if_modified(|last| {
                let newer = known.notice();
                let is_new = *last != newer;
                *last = newer;
                is_new
            });
        }
        if changed.images || changed.trust {
            self.images.send_modify(|count| *count += 1);
        }
    }

    /// Saves what was told, unless that was done.
    async fn save(&self) {
        if self.changes.swap(0, Ordering::Relaxed) == 0 {
            return;
        }
        let (path, bytes) = (self.settings.state_path.clone(), self.known.read().encode());
        let saved = tokio::task::spawn_blocking(move || known::save(&path, &bytes)).await;
        if let Ok(Err(error)) = saved {
            tracing::warn!(%error, "after a restart this node asks the controller for everything again");
        }
    }

    async fn send_starts(&self, client: &mut ControllerClient<Channel>) {
        loop {
            let Some((manifest, record)) = self.starts.lock().pop_front() else { return };
            let request = v1::UploadStartRequest { manifest: manifest.0.to_vec().into(), record: record.into() };
            // Others start as well: what is lost is one record of many.
            if let Ok(Err(status)) = tokio::time::timeout(JOIN_TIMEOUT, client.upload_start(request)).await {
                tracing::debug!(%manifest, code = %status.code(), error = status.message(), "a start's record is lost");
            }
        }
    }
}

/// Whether another certificate, or other roots, may help.
fn is_about_certificate(error: &SessionError) -> bool {
    match error {
        // A refused certificate of a node is told after the handshake, by a connection that is cut.
        SessionError::Refused(status) => {
            matches!(status.code(), Code::Unauthenticated | Code::Unknown | Code::Unavailable)
        }
        // One of the controller is refused here, which is no matter of being reached.
        SessionError::Connect(error) => {
            let mut cause = std::error::Error::source(error);
            while let Some(error) = cause {
                let io = error.downcast_ref::<std::io::Error>();
                if io.is_some_and(|error| error.kind() == std::io::ErrorKind::InvalidData) {
                    return true;
                }
                cause = error.source();
            }
            false
        }
        SessionError::File { .. } | SessionError::Silent | SessionError::Malformed(_) => false,
    }
}

async fn read_token(path: &std::path::Path) -> Result<Zeroizing<String>, SessionError> {
    use tokio::io::AsyncReadExt as _;
    let failed = |source| SessionError::File { path: path.to_owned(), source };
    let file = tokio::fs::File::open(path).await.map_err(failed)?;
    let mut text = Zeroizing::new(String::new());
    file.take(TOKEN_LEN_MAX_BYTES).read_to_string(&mut text).await.map_err(failed)?;
    Ok(Zeroizing::new(text.trim().to_owned()))
}
