//! The driver on a real Kubernetes: facts from its objects, and objects that say what has become of them.
//!
//! ```text
//! watch     policies, pods, nodes, templates, names of pull secrets   --Event-->  a bounded queue, to the core
//! secrets   one login, when the pipeline asks for it by name
//! reports   Publish, Withdraw, PolicyStatus, Tell, reports of nodes   -->  HermesPolicy status, HermesImage, HermesNode, Events
//! lease     which replica decides
//! vault     the controller's keys, in a Secret
//! run       all of it together, while this replica leads
//! ```
//!
//! It decides nothing. Everything it keeps is in memory and comes back by listing, so a crash leaves behind objects that
//! the next run compares with what is so, and a Lease that runs out. Servers from Kubernetes 1.20 on are served: CronJobs
//! are looked for where the server has them, lists come in pages, and no object rests on what later servers added.
//!
//! What it may do is in `deploy/rbac.yaml`, with a reason for each rule.

mod backoff;
mod connect;
pub mod lease;
pub mod reports;
pub mod run;
pub mod secrets;
pub mod vault;
pub mod watch;

use hermes_p2p::error::in_full;

pub use connect::{ConnectError, connect};

/// The name by which the API server knows whose fields are whose, and people who wrote an Event.
pub const MANAGER: &str = "hermes-controller";

/// The longest line of an API server's answer that goes into an error or a log, in characters.
const ANSWER_LEN_MAX: usize = 300;

/// One line of what went wrong with a request, without the structure around it.
fn one_line(error: &kube::Error) -> String {
    let text = match error {
        kube::Error::Api(status) => format!("the API server answered {}: {}", status.code, status.message),
        other => in_full(other),
    };
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(ANSWER_LEN_MAX).collect()
}

/// The HTTP status of an answer, if there was one.
fn status_code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}
