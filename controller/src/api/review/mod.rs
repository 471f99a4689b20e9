//! Whether whoever joins is the node that it says it is, and whether whoever looks at the page may.

pub mod kubernetes;
pub mod tokens;
pub mod viewers;

use std::fmt;

use futures::future::BoxFuture;

use super::numbers::Refusal;

/// Why somebody is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReviewError {
    /// By what it shows.
    #[error("{message}")]
    Refused {
        /// For the metrics.
        why: Refusal,
        /// One line with the next step, without any part of the token.
        message: String,
    },
    /// It could not be found out.
    #[error("the token cannot be reviewed now: {reason}")]
    Unavailable {
        /// Why.
        reason: String,
    },
}

impl ReviewError {
    pub(crate) fn refused(why: Refusal, message: impl Into<String>) -> Self {
        Self::Refused { why, message: message.into() }
    }
}

/// Says whether a token proves that its bearer is a node.
pub trait Reviewer: fmt::Debug + Send + Sync + 'static {
    /// Whether the bearer of `token` is the node `node`. Cancel safe.
    fn review<'a>(&'a self, token: &'a str, node: &'a str) -> BoxFuture<'a, Result<(), ReviewError>>;
}

/// Says whether a token's bearer may see the status page.
pub trait Viewers: fmt::Debug + Send + Sync + 'static {
    /// Whether the bearer of `token` may look. Cancel safe.
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Result<(), ReviewError>>;
}
