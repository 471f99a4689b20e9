//! Who the members of the cluster are, kept fresh through the swarm itself.
//!
//! ```text
//!  entries, signed by their nodes ---+
//!  suspicions, signed by reporters --+--> table --> MemberList (watch) --> policy, `hermes members`
//!  notice of what was taken back ----+      |
//!                                           +--> a few others at once; everybody by comparing, once a second
//! ```
//!
//! | module | what |
//! |---|---|
//! | `list` | the list as the rest of the node sees it, and its epoch |
//! | `entry` | what a node says of itself, and what others say of it |
//! | `table` | merge rules, suspicion, digest; pure |
//! | `codec` | messages, pure |
//! | `roster` | the table, shared; checks signatures |
//! | `sync` | one exchange over a stream |
//! | `task` | when to exchange with whom; renewal, suspicion, saving |
//! | `provider`, `candidates` | where to look for members that nobody has mentioned |
//! | `saved` | the list on disk |
//!
//! A node is a member when its own entry has been seen, whoever has passed it on. Why this is our own code and no SWIM
//! library stands in `docs/decisions/0010-members.md`.

mod candidates;
pub mod codec;
pub mod entry;
mod list;
pub mod provider;
pub(crate) mod roster;
pub(crate) mod saved;
#[cfg(test)]
mod scale;
mod sync;
mod table;
pub(crate) mod task;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use list::{Member, MemberList};
pub use table::MEMBERS_MAX;

use provider::Provider;

/// How the member list is kept.
#[derive(Debug, Clone)]
pub struct MembersConfig {
    /// Where to look for members, beside the peers to start from.
    pub providers: Vec<Arc<dyn Provider>>,
    /// The file that the list is kept in over restarts; in memory alone when absent.
    pub state_path: Option<PathBuf>,
    /// How often this node compares its list with another's, give or take a quarter. A change that a few were told at
    /// once reaches the last of 10,000 nodes within some ten of these.
    pub compare_every: Duration,
    /// How long a node that could not be reached has to answer before it leaves the list. Longer than a daemon takes to
    /// be upgraded.
    pub suspect_for: Duration,
}

impl Default for MembersConfig {
    fn default() -> Self {
        Self {
            providers: Vec::new(),
            state_path: None,
            compare_every: Duration::from_secs(1),
            suspect_for: Duration::from_secs(30),
        }
    }
}
