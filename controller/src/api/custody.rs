//! Who holds the authority: the one place that changes it, keeps it, and says what it is now.

use std::fmt;
use std::sync::Arc;

use futures::future::BoxFuture;
use hermes_p2p::{PeerId, unix_now};
use tokio::sync::{Mutex, watch};

use crate::authority::folder::AuthorityFolder;
use crate::authority::{Authority, AuthorityError};

/// Makes an authority durable, and fails when somebody else has changed it meanwhile.
pub type Keep = Box<dyn Fn(Arc<Authority>) -> BoxFuture<'static, Result<(), AuthorityError>> + Send + Sync>;

/// The authority that is in force.
pub struct Custody {
    current: watch::Sender<Arc<Authority>>,
    keep: Keep,
    /// Held by whoever changes it.
    changing: Mutex<()>,
}

impl fmt::Debug for Custody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Custody").field("current", &self.current).finish_non_exhaustive()
    }
}

impl Custody {
    /// Of `authority`, which is kept already; what it becomes is kept by `keep`.
    pub fn new(authority: Authority, keep: Keep) -> Self {
        Self { current: watch::Sender::new(Arc::new(authority)), keep, changing: Mutex::default() }
    }

    /// Of `authority`, which is kept in `folder`.
    pub fn in_folder(authority: Authority, folder: AuthorityFolder) -> Self {
        Self::new(authority, Box::new(move |authority| folder.keep(authority)))
    }

    /// What is in force.
    pub fn current(&self) -> Arc<Authority> {
        Arc::clone(&self.current.borrow())
    }

    /// Tells whenever that changes.
    pub fn changes(&self) -> watch::Receiver<Arc<Authority>> {
        self.current.subscribe()
    }

    /// Somebody else has changed and kept it.
    pub fn replaced(&self, authority: Authority) {
        self.current.send_replace(Arc::new(authority));
    }

    /// Does what is due.
    ///
    /// # Errors
    /// When it cannot be made or kept; then nothing has changed.
    pub async fn rotate(&self) -> Result<(), AuthorityError> {
        self.change(|authority| authority.rotated(unix_now())).await
    }

    /// Makes a new generation now, before the last one is old.
    ///
    /// # Errors
    /// As [`Self::rotate`].
    pub async fn renew(&self) -> Result<(), AuthorityError> {
        self.change(|authority| authority.renewed(unix_now()).map(Some)).await
    }

    /// Takes `peer` out.
    ///
    /// # Errors
    /// As [`Self::rotate`], and when there is no room.
    pub async fn revoke(&self, peer: PeerId) -> Result<(), AuthorityError> {
        self.change(|authority| {
            let known = authority.has_revoked(&peer);
            if known { Ok(None) } else { authority.without(&peer, unix_now()).map(Some) }
        })
        .await
    }

    async fn change(
        &self,
        make: impl FnOnce(&Authority) -> Result<Option<Authority>, AuthorityError>,
    ) -> Result<(), AuthorityError> {
        let _changing = self.changing.lock().await;
        let Some(next) = make(&self.current())?.map(Arc::new) else { return Ok(()) };
        (self.keep)(Arc::clone(&next)).await?;
        self.current.send_replace(next);
        Ok(())
    }
}
