//! Certificates within the authenticated upgrade of a connection.
//!
//! Noise first proves who is at the other end. Then both ends say HELLO with their certificate, read the other's, and
//! say in one byte what they make of it; each waits for the other's byte. Only when both said yes is the connection given
//! to the multiplexer. An end that says no reads the other's byte before it closes, since what is unread when a socket is
//! closed may take away what was sent last.
//!
//! ```text
//! HELLO:   length (2) | "HADM" | version (1) | certificate, or nothing
//! VERDICT: 0 = welcome, else the number of a `Refusal`
//! ```

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::core::upgrade::{InboundConnectionUpgrade, OutboundConnectionUpgrade, UpgradeInfo};
use libp2p::{PeerId, noise};
use thiserror::Error;

use super::Admission;
use super::certificate::SignedCertificate;
use super::refusal::Refusal;
use crate::canonical::unix_now;

/// What both ends agree on before Noise: libp2p's Noise, followed by certificates.
const PROTOCOL: &str = "/hermes/noise/1";
/// Begins a HELLO.
const MAGIC: &[u8; 4] = b"HADM";
const VERSION: u8 = 1;
/// Longest HELLO. A certificate has at most 320 bytes; a later issuer's may be longer.
pub const HELLO_LEN_MAX_BYTES: usize = 4096;
/// Time for both messages.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What is said of a reason that this version does not know.
pub(crate) const UNKNOWN_REFUSAL: &str =
    "for a reason that this version does not know; run the same version on both nodes";

/// A connection that does not come about.
#[derive(Debug, Error)]
pub enum UpgradeError {
    /// The other end has not proven who it is.
    #[error(transparent)]
    Noise(#[from] noise::Error),
    /// The connection broke, or it took too long.
    #[error("certificates could not be exchanged with {peer}: {source}")]
    Io {
        /// The other end.
        peer: PeerId,
        /// What went wrong.
        source: io::Error,
    },
    /// The other end may not talk with this node.
    #[error("this node refuses {peer}: {refusal}")]
    Refusing {
        /// The other end.
        peer: PeerId,
        /// Why.
        refusal: Refusal,
    },
    /// The other end does not talk with this node.
    #[error("{peer} refuses this node: {}", .refusal.map_or(UNKNOWN_REFUSAL, Refusal::advice))]
    Refused {
        /// The other end.
        peer: PeerId,
        /// Why, if that is known here.
        refusal: Option<Refusal>,
    },
}

/// Noise and then certificates.
#[derive(Clone)]
pub struct Upgrade {
    noise: noise::Config,
    admission: Arc<Admission>,
}

impl std::fmt::Debug for Upgrade {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upgrade").finish_non_exhaustive()
    }
}

impl Upgrade {
    /// `noise`, and then what `admission` says.
    pub fn new(noise: noise::Config, admission: Arc<Admission>) -> Self {
        Self { noise, admission }
    }
}

impl UpgradeInfo for Upgrade {
    type Info = &'static str;
    type InfoIter = std::iter::Once<Self::Info>;

    fn protocol_info(&self) -> Self::InfoIter {
        std::iter::once(PROTOCOL)
    }
}

type Upgrading<T> = Pin<Box<dyn Future<Output = Result<(PeerId, noise::Output<T>), UpgradeError>> + Send>>;

impl<T> InboundConnectionUpgrade<T> for Upgrade
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Output = (PeerId, noise::Output<T>);
    type Error = UpgradeError;
    type Future = Upgrading<T>;

    fn upgrade_inbound(self, socket: T, _: Self::Info) -> Self::Future {
        Box::pin(async move {
            let (peer, mut channel) = self.noise.upgrade_inbound(socket, "/noise").await?;
            admit(&self.admission, peer, &mut channel).await?;
            Ok((peer, channel))
        })
    }
}

impl<T> OutboundConnectionUpgrade<T> for Upgrade
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Output = (PeerId, noise::Output<T>);
    type Error = UpgradeError;
    type Future = Upgrading<T>;

    fn upgrade_outbound(self, socket: T, _: Self::Info) -> Self::Future {
        Box::pin(async move {
            let (peer, mut channel) = self.noise.upgrade_outbound(socket, "/noise").await?;
            admit(&self.admission, peer, &mut channel).await?;
            Ok((peer, channel))
        })
    }
}

/// Both ends show what they have and say what they make of it.
async fn admit<S>(admission: &Admission, peer: PeerId, channel: &mut S) -> Result<(), UpgradeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let exchanged = tokio::time::timeout(TIMEOUT, exchange(admission, peer, channel)).await;
    let outcome = exchanged.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let (ours, theirs) = outcome.map_err(|source| UpgradeError::Io { peer, source })?;
    if let Err(refusal) = ours {
        return Err(UpgradeError::Refusing { peer, refusal });
    }
    if theirs != 0 {
        let refusal = Refusal::of_code(theirs);
        admission.refused_by(peer, refusal);
        return Err(UpgradeError::Refused { peer, refusal });
    }
    Ok(())
}

/// What this end makes of the other, and the byte that the other has said.
async fn exchange<S>(admission: &Admission, peer: PeerId, channel: &mut S) -> io::Result<(Result<(), Refusal>, u8)>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    channel.write_all(&hello(admission)).await?;
    channel.flush().await?;
    let shown = read_hello(channel).await?;
    let verdict = shown.and_then(|shown| admission.check(&peer, shown.as_ref(), unix_now()));
    if let Err(refusal) = verdict {
        admission.refused(peer, refusal);
    }
    channel.write_all(&[verdict.err().map_or(0, Refusal::code)]).await?;
    channel.flush().await?;
    let mut theirs = [0];
    match channel.read_exact(&mut theirs).await {
        Ok(()) => {}
        // It has heard that it is refused and has left.
        Err(_) if verdict.is_err() => {}
        Err(error) => return Err(error),
    }
    if verdict.is_err() || theirs[0] != 0 {
        // Best effort: it is over either way.
        let _ = channel.close().await;
    }
    Ok((verdict, theirs[0]))
}

fn hello(admission: &Admission) -> Vec<u8> {
    let certificate = admission.own().map(|own| own.encode()).unwrap_or_default();
    let len = MAGIC.len() + 1 + certificate.len();
    let head = u16::try_from(len).expect("a certificate has at most 320 bytes").to_le_bytes();
    [&head[..], MAGIC, &[VERSION], &certificate].concat()
}

/// What the other end shows. Bytes that are no HELLO of this version are a refusal, not an error, so that it is told.
async fn read_hello<S: AsyncRead + Unpin>(channel: &mut S) -> io::Result<Result<Option<SignedCertificate>, Refusal>> {
    let mut head = [0; 2];
    channel.read_exact(&mut head).await?;
    let len = usize::from(u16::from_le_bytes(head));
    if len > HELLO_LEN_MAX_BYTES {
        return Ok(Err(Refusal::Malformed));
    }
    let mut body = vec![0; len];
    channel.read_exact(&mut body).await?;
    let Some([VERSION, certificate @ ..]) = body.strip_prefix(MAGIC) else { return Ok(Err(Refusal::Malformed)) };
    if certificate.is_empty() {
        return Ok(Ok(None));
    }
    Ok(SignedCertificate::decode(certificate).map(Some).map_err(|_| Refusal::Malformed))
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;
    use tokio_util::compat::TokioAsyncReadCompatExt;

    use super::*;

    fn open() -> Admission {
        Admission::new("test".parse().expect("a cluster id"), None)
    }

    /// What an open end makes of an other end that sends `bytes`.
    async fn met(bytes: &[u8]) -> Result<(), UpgradeError> {
        let peer = Keypair::generate_ed25519().public().to_peer_id();
        let (near, far) = tokio::io::duplex(8192);
        let (mut near, mut far) = (near.compat(), far.compat());
        let other = async {
            far.write_all(bytes).await.expect("there is room");
            let mut heard = Vec::new();
            let _ = far.close().await;
            let _ = far.read_to_end(&mut heard).await;
        };
        let admission = open();
        let (outcome, ()) = tokio::join!(
            async {
                let outcome = admit(&admission, peer, &mut near).await;
                drop(near);
                outcome
            },
            other
        );
        outcome
    }

    #[tokio::test]
    async fn what_is_no_hello_is_refused_within_bounds() {
        let hello = hello(&open());
        assert!(met(&[&hello[..], &[0]].concat()).await.is_ok());
        let malformed = |outcome| matches!(outcome, Err(UpgradeError::Refusing { refusal: Refusal::Malformed, .. }));
        assert!(malformed(met(&[0xff, 0xff, 0]).await), "a long one was waited for");
        assert!(malformed(met(&[&[5, 0], &b"HTTP1"[..], &[0]].concat()).await));
        assert!(malformed(met(&[&[5, 0], &b"HADM\x02"[..], &[0]].concat()).await), "another version was taken");
        assert!(malformed(met(&[&[6, 0], &b"HADM\x01\x01"[..], &[0]].concat()).await));
        for cut in 0..hello.len() {
            assert!(matches!(met(&hello[..cut]).await, Err(UpgradeError::Io { .. })), "{cut}");
        }
        let told = met(&[&hello[..], &[Refusal::Revoked.code()]].concat()).await.expect_err("refused");
        assert!(matches!(told, UpgradeError::Refused { refusal: Some(Refusal::Revoked), .. }));
        assert!(told.to_string().contains("taken back"));
    }
}
