//! Who this node says it is to registries.
//!
//! [`Credentials`] asks its providers in one order, always the same: the cluster's image pull secrets, the kubelet's
//! credential provider plugins, docker's `config.json` with its helpers. All logins that fit an image come back in that
//! order, so that whoever asks goes on to the next when a registry refuses one; when none fits, nobody is logged in. A
//! provider that fails is named in the answer and does not stop the next.
//!
//! Secrets stay in memory, in types that no log can show and that are overwritten when dropped. They go to the registry
//! that they are stored for and to the token service that it names, and nowhere else. Nothing here is written to a
//! disk; a restart asks the providers again.

mod cache;
mod docker;
mod error;
mod kubelet;
mod matching;
mod process;
mod pull_secrets;
mod secret;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::time::Instant;

pub use error::CredentialsError;
pub use pull_secrets::PullSecrets;

pub(crate) use secret::Credential;

use cache::Problem;
use docker::DockerLogins;
use kubelet::KubeletPlugins;

/// Characters of foreign text that are shown in a message.
const SHOWN_CHARACTERS: usize = 200;

/// Where logins are looked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CredentialsConfig {
    /// Folders with image pull secrets.
    pub pull_secret_folders: Vec<PathBuf>,
    /// The kubelet's `--image-credential-provider-config`: a file, or a folder of files.
    pub provider_config: Option<PathBuf>,
    /// The kubelet's `--image-credential-provider-bin-dir`: the folder with the plugins.
    pub provider_bin_dir: Option<PathBuf>,
    /// The file with docker's logins; `None` for the usual one (`DOCKER_CONFIG`, or `.docker` of the home directory).
    pub docker_config: Option<PathBuf>,
    /// The folder with docker's helpers (`docker-credential-NAME`); `None` for those that `PATH` leads to.
    pub docker_helper_dir: Option<PathBuf>,
}

/// Where a login is from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Provider {
    /// A Kubernetes image pull secret.
    PullSecret,
    /// A credential provider plugin of the kubelet.
    KubeletPlugin,
    /// A credential helper of docker's.
    DockerHelper,
    /// Docker's `config.json` itself.
    DockerConfig,
}

impl Provider {
    /// All of them, in the order in which they are asked.
    pub const ALL: [Self; 4] = [Self::PullSecret, Self::KubeletPlugin, Self::DockerHelper, Self::DockerConfig];

    /// The metric label.
    pub const fn name(self) -> &'static str {
        match self {
            Self::PullSecret => "pull_secret",
            Self::KubeletPlugin => "kubelet_plugin",
            Self::DockerHelper => "docker_helper",
            Self::DockerConfig => "docker_config",
        }
    }
}

/// How often each provider was asked, and failed, since the start.
#[derive(Debug, Default)]
struct Meters {
    asked: [AtomicU64; Provider::ALL.len()],
    failed: [AtomicU64; Provider::ALL.len()],
}

impl Meters {
    fn asked(&self, provider: Provider) {
        self.asked[provider as usize].fetch_add(1, Ordering::Relaxed);
    }
}

/// How often one provider was asked for logins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProviderCounters {
    /// The provider.
    pub provider: Provider,
    /// Times it was asked: files read, programs run. What is still known is not asked for.
    pub asked: u64,
    /// Answers that named it as failed.
    pub failed: u64,
}

/// A credential, and where it is from, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Login {
    pub(crate) credential: Credential,
    /// Such as `with the login of 'ann' from /home/ann/.docker/config.json`.
    pub(crate) description: String,
    /// When to ask for it again; `None` for when it is refused.
    pub(crate) renew_at: Option<Instant>,
    pub(crate) provider: Provider,
}

/// What the providers have for an image.
#[derive(Debug)]
pub(crate) struct Found {
    /// In the order in which they are to be tried; none that was refused.
    pub(crate) logins: Vec<Login>,
    /// Why there are no more, for messages.
    notes: Vec<String>,
    problems: Vec<Problem>,
}

impl Found {
    /// How nobody is logged in, for messages.
    pub(crate) fn anonymous(&self) -> String {
        format!("without a login, as {}{}", self.notes.join(", "), self.problems_text())
    }

    /// Which providers have failed, as the end of a message; empty when none has.
    pub(crate) fn problems_text(&self) -> String {
        self.problems.iter().map(|problem| format!("; {problem}")).collect()
    }
}

/// An image whose logins are wanted.
struct Wanted<'a> {
    registry: &'a str,
    repository: &'a str,
    /// Credentials that the registry has refused.
    refused: &'a [Credential],
    deadline: Instant,
}

impl Wanted<'_> {
    /// Whether a key of a stored login, which may be a pattern, means this image.
    fn is_meant_by(&self, key: &str) -> bool {
        matching::aliases(self.registry).iter().any(|registry| matching::matches(key, registry, self.repository))
    }

    fn has_refused(&self, credentials: &[Credential]) -> bool {
        credentials.iter().any(|credential| self.refused.contains(credential))
    }
}

/// What providers add to.
struct Answers {
    meters: Arc<Meters>,
    refused: Vec<Credential>,
    found: Found,
}

impl Answers {
    fn meters(&self) -> Arc<Meters> {
        Arc::clone(&self.meters)
    }

    fn asked(&self, provider: Provider) {
        self.meters.asked(provider);
    }

    fn add(&mut self, login: Login) {
        if self.refused.contains(&login.credential) {
            return self.found.notes.push(format!("the one {} was refused", login.description));
        }
        if self.found.logins.iter().all(|known| known.credential != login.credential) {
            self.found.logins.push(login);
        }
    }

    fn note(&mut self, note: String) {
        self.found.notes.push(note);
    }

    fn problem(&mut self, provider: Provider, problem: Problem) {
        self.meters.failed[provider as usize].fetch_add(1, Ordering::Relaxed);
        tracing::warn!(provider = provider.name(), error = %problem, "logins cannot be had from a provider");
        self.found.problems.push(problem);
    }
}

/// The providers. Cheap to clone; clones share what they know.
#[derive(Debug, Clone)]
pub struct Credentials {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pull_secrets: PullSecrets,
    kubelet: Option<KubeletPlugins>,
    docker: DockerLogins,
    meters: Arc<Meters>,
}

impl Credentials {
    /// Reads nothing yet: what is wrong shows when a login is needed.
    pub fn new(config: CredentialsConfig) -> Self {
        let bin_dir = config.provider_bin_dir.unwrap_or_default();
        let inner = Inner {
            pull_secrets: PullSecrets::in_folders(config.pull_secret_folders),
            kubelet: config.provider_config.map(|path| KubeletPlugins::new(path, bin_dir)),
            docker: DockerLogins::at(config.docker_config, config.docker_helper_dir.unwrap_or_default()),
            meters: Arc::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The pull secrets, for whoever hands them in.
    pub fn pull_secrets(&self) -> &PullSecrets {
        &self.inner.pull_secrets
    }

    /// How often each provider was asked.
    pub fn counters(&self) -> [ProviderCounters; Provider::ALL.len()] {
        let read = |meters: &[AtomicU64], provider: Provider| meters[provider as usize].load(Ordering::Relaxed);
        let meters = &self.inner.meters;
        Provider::ALL.map(|provider| ProviderCounters {
            provider,
            asked: read(&meters.asked, provider),
            failed: read(&meters.failed, provider),
        })
    }

    /// The logins for `repository` at `registry` (host with port, as in references), without those that were `refused`:
    /// a provider that still gives one of them is asked again. Cancel safe.
    pub(crate) async fn find(
        &self,
        registry: &str,
        repository: &str,
        refused: &[Credential],
        deadline: Instant,
    ) -> Found {
        let wanted = Wanted { registry, repository, refused, deadline };
        let found = Found { logins: Vec::new(), notes: Vec::new(), problems: Vec::new() };
        let mut answers = Answers { meters: Arc::clone(&self.inner.meters), refused: refused.to_vec(), found };
        self.inner.pull_secrets.find(&wanted, &mut answers).await;
        if let Some(kubelet) = &self.inner.kubelet {
            kubelet.find(&wanted, &mut answers).await;
        }
        self.inner.docker.find(&wanted, &mut answers).await;
        answers.found
    }
}

/// Foreign text, fit for a message: what could play tricks on a terminal is taken out, and it is short.
fn printable(text: &str) -> String {
    text.trim().chars().filter(|c| !c.is_control()).take(SHOWN_CHARACTERS).collect()
}
