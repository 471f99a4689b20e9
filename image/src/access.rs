//! Who may read an image.

use serde::{Deserialize, Serialize};

/// To whom a registry gives an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// To everybody.
    Public,
    /// To those who log in.
    #[default]
    Private,
}
