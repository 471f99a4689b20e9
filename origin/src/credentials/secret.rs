//! Secrets, and the ways to show who we are. Memory that held one is overwritten when it is dropped; nothing here can be
//! printed.

use std::fmt;

use serde::{Deserialize, Deserializer};
use zeroize::Zeroizing;

/// Docker's user name for an entry whose password is an identity token.
const TOKEN_USER: &str = "<token>";

/// A secret. It can be used, but not be printed.
#[derive(Clone, PartialEq, Eq, Default)]
pub(crate) struct Secret(Zeroizing<String>);

impl Secret {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(Zeroizing::new(text.into()))
    }

    /// The secret itself, for a request.
    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// How to show who we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Credential {
    /// Not at all.
    Anonymous,
    /// By name and password.
    Basic { user: String, password: Secret },
    /// By a refresh token, which a token service exchanges for access tokens.
    Identity(Secret),
    /// By an access token that is ready for use.
    Access(Secret),
}

impl Credential {
    /// What a name and a password stand for in docker's files and protocols.
    pub(super) fn of_pair(user: &str, password: Secret) -> Self {
        match user {
            "" => Self::Anonymous,
            TOKEN_USER => Self::Identity(password),
            _ => Self::Basic { user: user.to_owned(), password },
        }
    }

    /// Who that is, for messages: `the login of 'ann'`.
    pub(super) fn who(&self) -> String {
        match self {
            Self::Anonymous => "no login".to_owned(),
            Self::Basic { user, .. } => format!("the login of '{}'", super::printable(user)),
            Self::Identity(_) | Self::Access(_) => "the token".to_owned(),
        }
    }
}
