//! `hermes controller`: the controller, on Kubernetes or on a folder, and its keys.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use hermes_controller::artifacts::{ArtifactSettings, ArtifactsError};
use hermes_controller::clock;
use hermes_controller::core::Settings;
use hermes_controller::folder::{self, StandaloneConfig, StandaloneError};
use hermes_controller::kubernetes;
use hermes_controller::kubernetes::run::{KubernetesConfig, KubernetesError};
use hermes_controller::kubernetes::vault::SecretVault;
use hermes_controller::metrics::Metrics;
use hermes_controller::run::{ApiConfig, RunConfig, RunError, VaultError};
use hermes_controller::signing::{KeySet, OVERLAP, SigningError};
use hermes_origin::credentials::CredentialsConfig;
use hermes_origin::{HOSTS_DIR, OriginConfig, wanted_platform};
use hermes_p2p::ClusterId;
use hermes_p2p::config::ConfigError;
use hermes_snapshotter::control::FailureClass;
use serde_json::json;

use super::{ending, metrics_address};
use crate::output::failure;

fn usage(message: String) -> anyhow::Error {
    failure(FailureClass::Usage, message)
}

/// Arguments of `hermes controller`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(crate) struct ControllerArgs {
    #[command(subcommand)]
    command: Option<ControllerCommand>,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Without Kubernetes: the folder with HermesPolicy and ImageList documents (YAML or JSON); read again when a file changes.
    #[arg(long, value_name = "DIR", required_unless_present = "kubernetes", conflicts_with = "kubernetes")]
    policies: Option<PathBuf>,
    /// Who this replica is; its host's name and process when absent.
    #[arg(long, value_name = "NAME", env = "POD_NAME")]
    identity: Option<String>,
    /// A ServiceAccount, as NAMESPACE:NAME, whose pods may join as the nodes that they run on. May be given more than once;
    /// hermes-node in the controller's namespace when absent.
    #[arg(long = "node-account", value_name = "ACCOUNT", value_parser = account)]
    node_accounts: Vec<(String, String)>,
    /// Serve nodes there, as IP:PORT.
    #[arg(long, value_name = "ADDR")]
    listen: Option<SocketAddr>,
    /// Serve /metrics, /healthz and /readyz there, as IP:PORT or as a port on loopback.
    #[arg(long, value_name = "ADDR", value_parser = metrics_address)]
    metrics_listen: Option<SocketAddr>,
    /// The swarm that nodes are admitted to.
    #[arg(long = "cluster", value_name = "NAME", default_value = "default")]
    swarm: String,
    /// Without Kubernetes: the file (mode 0600) with the tokens by which nodes join: lines of NODE TOKEN [UNTIL].
    #[arg(long, value_name = "FILE", conflicts_with = "kubernetes")]
    join_tokens: Option<PathBuf>,
    #[command(flatten)]
    state: ControllerState,
    /// Where indexes are kept: a folder; s3://, gs:// or az:// with the usual environment; or oci://HOST[:PORT]/REPOSITORY with
    /// docker's login for that host. `indexes` below the state folder when absent.
    #[arg(long, value_name = "PLACE")]
    artifacts: Option<String>,
    /// Most bytes of indexes that are kept; nothing new is built beyond.
    #[arg(long, value_name = "BYTES")]
    quota: Option<u64>,
    /// The folder with the pull secrets that documents name, as NAMESPACE/NAME.json; `secrets` below the state folder when
    /// absent.
    #[arg(long, value_name = "DIR")]
    secrets: Option<PathBuf>,
    /// A platform of policies that name none. May be given more than once; this machine's when absent.
    #[arg(long = "platform", value_name = "PLATFORM")]
    platforms: Vec<String>,
    /// Builds at once.
    #[arg(long, value_name = "COUNT", default_value_t = Settings::default().builds_max, value_parser = at_least_one)]
    builds: usize,
    /// How long what a tag stands for is believed, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = Settings::default().refresh.as_secs(), value_parser = clap::value_parser!(u64).range(1..))]
    refresh: u64,
    /// A registry, as HOST[:PORT], that is spoken to in clear. May be given more than once; this machine's always are.
    #[arg(long = "plain-http", value_name = "HOST")]
    plain_http_hosts: Vec<String>,
    /// The folder with containerd's hosts.toml files.
    #[arg(long, value_name = "DIR", default_value = HOSTS_DIR)]
    hosts_dir: PathBuf,
    /// Docker's config.json; when absent, that of DOCKER_CONFIG or the home directory, and on Kubernetes docker-config.json in the
    /// state folder.
    #[arg(long, value_name = "FILE")]
    docker_config: Option<PathBuf>,
}

/// Where a controller keeps its state.
#[derive(Debug, Clone, Args)]
struct ControllerState {
    /// The folder with the controller's keys, indexes and reports.
    #[arg(long, value_name = "DIR", env = "HERMES_CONTROLLER_STATE", default_value = "/var/lib/hermes-controller")]
    state: PathBuf,
}

/// Which Kubernetes the controller serves, if any.
#[derive(Debug, Clone, Args)]
struct ClusterArgs {
    /// On Kubernetes: its policies, pods and nodes, and the keys in its Secret, instead of this machine's files. One of several
    /// replicas decides.
    #[arg(long)]
    kubernetes: bool,
    /// The file that names the API server; that of the pod's ServiceAccount, or the user's, when absent.
    #[arg(long, value_name = "FILE", requires = "kubernetes")]
    kubeconfig: Option<PathBuf>,
    /// The controller's namespace, with its keys and the Lease that says which replica decides.
    #[arg(long, value_name = "NAME", env = "POD_NAMESPACE", default_value = "hermes-system")]
    namespace: String,
}

/// What is done beside running it.
#[derive(Debug, Subcommand)]
enum ControllerCommand {
    /// Show the keys that sign indexes, newest first; with --rotate, make a new one first.
    Keys(KeysArgs),
}

/// Arguments of `hermes controller keys`.
#[derive(Debug, Args)]
struct KeysArgs {
    #[command(flatten)]
    state: ControllerState,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// Make a new key. Those before it sign and are trusted beside it until they retire; a running controller takes it over
    /// within seconds, and signs everything again.
    #[arg(long)]
    rotate: bool,
    /// When the older keys retire, in hours from now.
    #[arg(long, value_name = "HOURS", default_value_t = OVERLAP.as_secs() / 3600, requires = "rotate")]
    overlap_hours: u64,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|count| *count > 0).ok_or_else(|| "give a number above 0".to_owned())
}

/// Runs the controller until it is told to end, or does what else is asked.
pub(crate) async fn run(args: ControllerArgs) -> anyhow::Result<()> {
    match args.command {
        Some(ControllerCommand::Keys(args)) if args.cluster.kubernetes => {
            show_keys(&keys_in_cluster(&args).await?, args.json);
            Ok(())
        }
        Some(ControllerCommand::Keys(args)) => {
            show_keys(&keys_in_folder(&args)?, args.json);
            Ok(())
        }
        None => serve(args).await,
    }
}

async fn serve(args: ControllerArgs) -> anyhow::Result<()> {
    let state = std::path::absolute(&args.state.state)?;
    let platforms = match args.platforms.is_empty() {
        true => vec![wanted_platform(None)?.to_string()],
        false => args
            .platforms
            .iter()
            .map(|text| Ok(wanted_platform(Some(text))?.to_string()))
            .collect::<anyhow::Result<_>>()?,
    };
    let settings = Settings {
        platforms,
        builds_max: args.builds,
        refresh: Duration::from_secs(args.refresh),
        ..Settings::default()
    };
    // In a cluster the logins are those of pods and policies; whoever wants one for all puts it there.
    let in_state = args.cluster.kubernetes.then(|| state.join("docker-config.json"));
    let docker_config = args.docker_config.or(in_state);
    let origin = OriginConfig {
        plain_http_hosts: args.plain_http_hosts,
        credentials: CredentialsConfig { docker_config, ..CredentialsConfig::default() },
        hosts_dir: Some(args.hosts_dir),
        ..OriginConfig::default()
    };
    let cluster: ClusterId = args.swarm.parse().map_err(|error: ConfigError| usage(error.to_string()))?;
    let metrics = Metrics::default();
    if let Some(address) = args.metrics_listen {
        metrics.serve(address).await.map_err(|error| failure(FailureClass::Local, error.to_string()))?;
    }
    let run = RunConfig {
        artifacts: args.artifacts,
        artifact_settings: ArtifactSettings { quota_bytes: args.quota },
        settings,
        origin,
        api: args.listen.map(|listen| ApiConfig { listen, cluster }),
        metrics,
        state,
    };
    let ending = ending()?;
    if args.cluster.kubernetes {
        let identity = args.identity.map_or_else(identity, Ok)?;
        let node_accounts = match args.node_accounts.is_empty() {
            true => vec![(args.cluster.namespace.clone(), NODE_ACCOUNT.to_owned())],
            false => args.node_accounts,
        };
        let (kubeconfig, namespace) = (args.cluster.kubeconfig, args.cluster.namespace);
        let config = KubernetesConfig { kubeconfig, namespace, identity, node_accounts, run };
        return kubernetes::run::run(config, ending).await.map_err(|error| match &error {
            KubernetesError::Connect(_) | KubernetesError::LeadershipLost => {
                failure(FailureClass::Unreachable, error.to_string())
            }
            KubernetesError::Run(inner) => failure(class(inner), error.to_string()),
        });
    }
    let config = StandaloneConfig {
        policies: args.policies.unwrap_or_default(),
        secrets: args.secrets.unwrap_or_else(|| run.state.join("secrets")),
        join_tokens: args.join_tokens,
        run,
    };
    folder::run(config, ending).await.map_err(|error| match &error {
        StandaloneError::Source(_) => failure(FailureClass::NotFound, error.to_string()),
        StandaloneError::Run(inner) => failure(class(inner), error.to_string()),
    })
}

/// The ServiceAccount of the nodes' pods, in the controller's namespace.
const NODE_ACCOUNT: &str = "hermes-node";

/// `NAMESPACE:NAME`.
fn account(text: &str) -> Result<(String, String), String> {
    match text.split_once(':') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() => {
            Ok((namespace.to_owned(), name.to_owned()))
        }
        _ => Err("give NAMESPACE:NAME".to_owned()),
    }
}

/// A name that no other process has, also none that follows upon this one on the same host.
fn identity() -> anyhow::Result<String> {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    Ok(format!("{}_{}_{:08x}", host.trim(), std::process::id(), clock::now().0 as u32))
}

fn class(error: &RunError) -> FailureClass {
    match error {
        RunError::Vault(VaultError::Signing(SigningError::Malformed(_))) => FailureClass::Corrupt,
        RunError::Vault(VaultError::Place { .. }) => FailureClass::Unreachable,
        RunError::Artifacts(ArtifactsError::Location { .. } | ArtifactsError::NotOurs { .. })
        | RunError::NobodyJoins => FailureClass::Usage,
        RunError::Artifacts(ArtifactsError::Store { .. }) => FailureClass::Unreachable,
        _ => FailureClass::Local,
    }
}

fn overlap(args: &KeysArgs) -> Duration {
    Duration::from_secs(args.overlap_hours.saturating_mul(3600))
}

fn keys_in_folder(args: &KeysArgs) -> anyhow::Result<KeySet> {
    let (path, now) = (folder::keys_path(&args.state.state), clock::now());
    let failed = |error: SigningError| failure(FailureClass::Local, error.to_string());
    let mut set = match args.rotate {
        true => KeySet::load_or_make(&path, now),
        false => KeySet::load(&path),
    }
    .map_err(failed)?;
    if args.rotate {
        set.retire(now);
        set.rotate(now, overlap(args)).map_err(failed)?;
        set.save(&path).map_err(failed)?;
    }
    Ok(set)
}

async fn keys_in_cluster(args: &KeysArgs) -> anyhow::Result<KeySet> {
    let client = kubernetes::connect(args.cluster.kubeconfig.as_deref()).await;
    let client = client.map_err(|error| failure(FailureClass::Unreachable, error.to_string()))?;
    let vault = SecretVault::new(client, &args.cluster.namespace);
    let failed = |error: VaultError| {
        let message = error.to_string();
        failure(class(&RunError::Vault(error)), message)
    };
    if args.rotate {
        return vault.rotate(clock::now(), overlap(args)).await.map_err(failed);
    }
    let found = vault.signing_keys().await.map_err(failed)?;
    let nothing =
        || format!("no controller has made its keys in namespace '{}'; give --namespace", args.cluster.namespace);
    found.ok_or_else(|| failure(FailureClass::NotFound, nothing()))
}

fn show_keys(set: &KeySet, as_json: bool) {
    let (list, now) = (set.list(), clock::now());
    if as_json {
        let keys: Vec<_> = list
            .iter()
            .map(|key| {
                json!({
                    "key": key.public.to_string(), "made_ms": key.made.0,
                    "retires_ms": key.retires.map(|retires| retires.0),
                })
            })
            .collect();
        println!("{}", json!({ "keys": keys }));
        return;
    }
    for key in list {
        match key.retires {
            None => println!("{}  signs", key.public),
            Some(retires) => {
                let hours = retires.0.saturating_sub(now.0) / 3_600_000;
                println!("{}  signs beside it, retires in {hours} hours", key.public);
            }
        }
    }
}
