//! Which replica decides: leadership by a Lease.
//!
//! Every replica runs an [`Election`]. One holds the Lease and renews it; the others look at it and take it when it has not
//! changed for as long as its holder said, by their own clocks: what times it says is never compared with one's own. Who
//! decides follows from [`candidate`], which is pure; writes carry the version that was read, so of two that take the
//! Lease at once the API server refuses one.
//!
//! **Invariant:** a leader stops being one ([`Standing::Follower`]) before anybody else can become it, as long as its clock
//! runs: [`Timing::renew_deadline`] after the last renewal *began*, while others wait for [`Timing::duration`] after they
//! saw it. A machine that is suspended may believe in its leadership until its next renewal is refused; what it writes
//! meanwhile is what it knew, and the next leader writes it anew.
//!
//! A crash leaves a Lease that runs out: another leads within duration + retry, 12 s by default. A clean end gives it back,
//! and another leads within one retry.

mod candidate;

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use self::candidate::{Candidate, Held, Step};
use super::MANAGER;

/// Longest time that is granted to another holder, whatever its Lease says.
const DURATION_MAX: Duration = Duration::from_secs(60);
/// How long giving the Lease back may take at a clean end.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long things take. Hand-over after a crash takes at most `duration` + `retry`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// How long a Lease counts that is not renewed. Kubernetes stores whole seconds.
    pub duration: Duration,
    /// How long after its last renewal a leader still leads. Shorter than `duration`.
    pub renew_deadline: Duration,
    /// How often a leader renews, and the others look. Several fit into `renew_deadline`.
    pub retry: Duration,
}

impl Default for Timing {
    /// 10, 7 and 2 seconds: hand-over within 12 s of a crash, and a leader survives an API server that is away for 5 s.
    fn default() -> Self {
        Self {
            duration: Duration::from_secs(10),
            renew_deadline: Duration::from_secs(7),
            retry: Duration::from_secs(2),
        }
    }
}

/// Where the Lease is and who wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseConfig {
    /// The namespace of the Lease.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Who this is: another text for every process, also for one that follows upon another in the same pod.
    pub identity: String,
    /// How long things take.
    pub timing: Timing,
}

/// How this replica stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// It leads.
    Leader,
    /// Another leads, if that is known; decide nothing.
    Follower {
        /// Who leads.
        leader: Option<String>,
    },
}

/// One replica's part.
pub struct Election {
    api: Api<Lease>,
    config: LeaseConfig,
    candidate: Candidate,
    standing: watch::Sender<Standing>,
}

impl fmt::Debug for Election {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Election")
            .field("config", &self.config)
            .field("candidate", &self.candidate)
            .finish_non_exhaustive()
    }
}

impl Election {
    /// A replica that does not lead yet, and where its standing is to be read.
    pub fn new(client: Client, config: LeaseConfig) -> (Self, watch::Receiver<Standing>) {
        let api = Api::namespaced(client, &config.namespace);
        let (standing, receiver) = watch::channel(Standing::Follower { leader: None });
        let candidate = Candidate::new(config.identity.clone(), config.timing);
        (Self { api, config, candidate, standing }, receiver)
    }

    /// Takes part until `stop` is cancelled, then gives the Lease back if this replica has it. Stop deciding first, and
    /// cancel then: another leads at once.
    ///
    /// Dropped, it leaves the Lease to run out, as a crash does.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut next_try = Instant::now();
        loop {
            let end = self.candidate.leads_until();
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                // Also in the midst of a request that hangs: whether it was carried out, the next look will say.
                () = sleep_until(end.unwrap_or(next_try)), if end.is_some() => {
                    tracing::warn!("lost the leadership: the lease could not be renewed in time");
                    self.candidate.lost();
                    self.publish(None);
                }
                next = round(&self.api, &self.config, &mut self.candidate, next_try) => {
                    next_try = next.at;
                    self.publish(next.leader);
                }
            }
        }
        let leads = self.candidate.leads_until().is_some();
        self.candidate.lost();
        self.publish(None);
        if leads && !matches!(timeout(RELEASE_TIMEOUT, self.release()).await, Ok(Ok(()))) {
            tracing::warn!("could not give the lease back; it runs out by itself");
        }
    }

    fn publish(&self, leader: Option<String>) {
        let now = if self.candidate.leads_until().is_some() { Standing::Leader } else { Standing::Follower { leader } };
        self.standing.send_if_modified(|standing| {
            let changed = *standing != now;
            if changed {
                tracing::info!(standing = ?now, lease = self.config.name, "leadership");
                *standing = now;
            }
            changed
        });
    }

    /// Leaves the Lease without a holder.
    async fn release(&self) -> kube::Result<()> {
        let mut lease = self.api.get(&self.config.name).await?;
        if holder(&lease) == Some(self.config.identity.as_str()) {
            let spec = lease.spec.get_or_insert_default();
            // One second and not none, which the API server refuses.
            (spec.holder_identity, spec.lease_duration_seconds) = (Some(String::new()), Some(1));
            self.api.replace(&self.config.name, &PostParams::default(), &lease).await?;
        }
        Ok(())
    }
}

/// What a round has come to.
struct Next {
    /// When the next one begins.
    at: Instant,
    /// Who leads, if it is another.
    leader: Option<String>,
}

/// Waits until `at`, looks at the Lease, and takes or renews it if that is to be done.
async fn round(api: &Api<Lease>, config: &LeaseConfig, candidate: &mut Candidate, at: Instant) -> Next {
    sleep_until(at).await;
    let began = Instant::now();
    // A request that hangs must not keep a follower from looking.
    match timeout(config.timing.renew_deadline, attempt(api, config, candidate, began)).await {
        Ok(Ok(next)) => next,
        Ok(Err(error)) => {
            tracing::debug!(problem = super::one_line(&error), "cannot read or write the lease; trying again");
            Next { at: Instant::now() + config.timing.retry, leader: None }
        }
        Err(_) => Next { at: Instant::now(), leader: None },
    }
}

async fn attempt(
    api: &Api<Lease>,
    config: &LeaseConfig,
    candidate: &mut Candidate,
    began: Instant,
) -> kube::Result<Next> {
    let there = api.get_opt(&config.name).await?;
    let held = there.as_ref().map(held);
    match candidate.sees(began, held.as_ref()) {
        Step::Wait(until) => {
            let leader = held.map(|held| held.holder).filter(|holder| !holder.is_empty());
            Ok(Next { at: until.min(began + config.timing.retry), leader })
        }
        Step::Take => {
            let wanted = taken(there, config);
            let params = PostParams { field_manager: Some(MANAGER.to_owned()), ..PostParams::default() };
            let written = match wanted.metadata.resource_version {
                Some(_) => api.replace(&config.name, &params, &wanted).await,
                None => api.create(&params, &wanted).await,
            };
            match written {
                Ok(lease) => {
                    candidate.took(began, &held_version(&lease));
                    Ok(Next { at: began + config.timing.retry, leader: None })
                }
                // Another was quicker.
                Err(error) if super::status_code(&error) == Some(409) => {
                    sleep(config.timing.retry / 4).await;
                    Ok(Next { at: Instant::now(), leader: None })
                }
                Err(error) => Err(error),
            }
        }
    }
}

/// The Lease as it is when this replica has it.
fn taken(there: Option<Lease>, config: &LeaseConfig) -> Lease {
    let metadata = ObjectMeta {
        name: Some(config.name.clone()),
        namespace: Some(config.namespace.clone()),
        ..ObjectMeta::default()
    };
    let mut lease = there.unwrap_or(Lease { metadata, spec: None });
    let now = MicroTime(Timestamp::now());
    let is_own = holder(&lease) == Some(config.identity.as_str());
    let before = lease.spec.take().unwrap_or_default();
    lease.spec = Some(LeaseSpec {
        holder_identity: Some(config.identity.clone()),
        lease_duration_seconds: Some(i32::try_from(config.timing.duration.as_secs()).unwrap_or(i32::MAX).max(1)),
        acquire_time: before.acquire_time.filter(|_| is_own).or(Some(now.clone())),
        renew_time: Some(now),
        lease_transitions: Some(before.lease_transitions.unwrap_or_default().saturating_add(i32::from(!is_own))),
        ..before
    });
    lease
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref()
}

fn held_version(lease: &Lease) -> String {
    lease.metadata.resource_version.clone().unwrap_or_default()
}

fn held(lease: &Lease) -> Held {
    let seconds = lease.spec.as_ref().and_then(|spec| spec.lease_duration_seconds).unwrap_or_default();
    Held {
        holder: holder(lease).unwrap_or_default().to_owned(),
        duration: Duration::from_secs(u64::try_from(seconds).unwrap_or_default()).min(DURATION_MAX),
        version: held_version(lease),
    }
}
