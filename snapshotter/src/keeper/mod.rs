//! Keeping FUSE connections over the end of the daemon.
//!
//! A FUSE connection lives as long as somebody has its descriptor open. So a process that outlives the daemon keeps a
//! copy of each: systemd, by its descriptor store, or the keeper of this module, a small process with one thread that
//! speaks systemd's protocol where there is no systemd. The daemon does not know which of them it is; all that counts is
//! `NOTIFY_SOCKET` and `LISTEN_FDS` ([`notify`]). While no daemon runs, requests wait in the kernel. The next daemon
//! finds in its store what is mounted where, takes the descriptors, and answers what waits, also what the one before it
//! had read and not answered (`crate::fs::session`).
//!
//! The keeper holds no state but the descriptors and their names, so it has nothing that could be of another version:
//! it is started once and starts daemons of any version. It also does what a supervisor does: starts the daemon again,
//! at once when it had run well, after growing pauses when it had not ([`schedule`]). When no daemon has run well for
//! too long, it ends the connections: then whoever waits gets an error instead of waiting for ever, also those that a
//! kill does not end because the request they wait for was read already.
//!
//! When the keeper itself is killed, the daemon goes on; the connections end with that daemon, as if there had been no
//! keeper. What is left is cleared away by the next start on the same state folder.

pub mod notify;
mod program;
mod receive;
mod schedule;
mod supervise;
pub(crate) mod system;

pub use program::{program, set_program};
pub use supervise::{DEADLINE, KeeperConfig, KeeperError, is_kept, run};
pub use system::exit_at_once;
