//! What a node's daemon is told.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use hermes_image::statement::PublicKey;
use hermes_p2p::{ClusterId, PeerAddress, Zone};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::mounts::erofs::Backing;
use crate::status::Way;
use hermes_origin::credentials::CredentialsConfig;
use hermes_origin::{HOSTS_DIR, OriginConfig, TlsSettings};

/// Default of [`NodeConfig::unused_images_max`]: the versions of some dozen services, whose indexes take some hundred
/// megabytes.
pub const UNUSED_IMAGES_MAX: usize = 100;
/// Default of [`NodeConfig::index_on_first_pull_min_bytes`]: below it, containerd has the image within seconds anyway, and
/// no later node gains much by being lazy.
pub const FIRST_PULL_MIN_BYTES: u64 = 64_000_000;

/// Default of [`NodeConfig::complete_rate_bytes_per_second`]: with images that compress to 40 %, about 160 Mbit/s.
pub const COMPLETE_RATE_BYTES_PER_SECOND: u64 = 50_000_000;

/// Whether what nobody has read of a mounted image is fetched as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CompleteMode {
    /// Only when somebody asks for it.
    Never,
    /// When a start has settled, slowly, while no reader waits.
    #[default]
    Idle,
    /// At once, and as fast as the link and the cores go; readers still come first.
    Full,
}

impl CompleteMode {
    /// The name on the command line and in the output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Idle => "idle",
            Self::Full => "full",
        }
    }
}

impl std::str::FromStr for CompleteMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = [Self::Never, Self::Idle, Self::Full].into_iter().find(|mode| mode.name() == text);
        found.ok_or_else(|| format!("'{text}' says not when to complete images; it is never, idle or full"))
    }
}

/// A setting that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{setting}: {reason}")]
pub struct ConfigError {
    /// The setting.
    pub setting: &'static str,
    /// What is wrong and what would be right.
    pub reason: String,
}

/// A node's settings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NodeConfig {
    /// The folder for the store, the keys and the control socket.
    pub state: PathBuf,
    /// Where peers reach this node, as `host:port` or a multiaddress (port 0: any). Without it the node dials out only
    /// as far as it knows peers, on a port of the kernel's choice on loopback.
    pub listen: Option<String>,
    /// Peers that are known from the start.
    pub peers: Vec<String>,
    /// The swarm that the node belongs to; nodes of different clusters do not understand each other.
    pub cluster: String,
    /// The file with the secret that all nodes of the cluster have, by which they let each other in.
    pub join_secret: Option<PathBuf>,
    /// Let everybody in, though this node listens beyond loopback.
    pub open_swarm: bool,
    /// The zone (rack, availability zone) of this node; empty where there are none.
    pub zone: String,
    /// A TOML file that lists members of the swarm; read again when it changes.
    pub members_file: Option<PathBuf>,
    /// A name whose addresses are those of members, as `NAME:PORT`; resolved again and again.
    pub members_dns: Option<String>,
    /// Controllers, as `host:port`, of which one is enough; none when empty.
    pub controller: Vec<String>,
    /// The file (PEM) with the roots that the controller's certificate must be of.
    pub controller_ca: Option<PathBuf>,
    /// The file with the token that proves to the controller which node this is; read at each join.
    pub controller_token: Option<PathBuf>,
    /// The name of this node in the cluster.
    pub node_name: Option<String>,
    /// Folders of indexes to look in.
    pub index_folders: Vec<PathBuf>,
    /// Keys whose index statements are accepted, beside the node's own.
    pub trusted_keys: Vec<String>,
    /// The file with the secret key that this node signs indexes with, and whose statements it takes: the same on all
    /// nodes of a fleet. A key of its own, made in the state folder, when absent.
    pub signing_key: Option<PathBuf>,
    /// Take the pull of an image that nobody has an index of: read its layers once, keep all of them, build the index.
    pub index_on_first_pull: bool,
    /// The smallest image whose pull is taken, in compressed bytes of its layers.
    pub index_on_first_pull_min_bytes: u64,
    /// Images that nothing needs any more of which index and layers are kept, as far as the budget lets them.
    pub unused_images_max: usize,
    /// Most bytes that the store may hold; no limit when absent.
    pub store_budget_bytes: Option<u64>,
    /// Whether what nobody has read of a mounted image is fetched as well.
    pub complete: CompleteMode,
    /// Most uncompressed bytes per second that are fetched so; 0 for no limit.
    pub complete_rate_bytes_per_second: u64,
    /// Fetch what a start is likely to read, as far as the image itself tells, when its first container is prepared.
    pub guess_starts: bool,
    /// How long a read waits for a source, in milliseconds, before it fails with EIO.
    pub read_deadline_ms: u64,
    /// Show trees this way; the best that works when absent.
    pub way: Option<Way>,
    /// Mount EROFS through this only; through whatever works, files first, when absent.
    pub erofs_backing: Option<Backing>,
    /// End when the last image is unmounted.
    pub exit_when_unused: bool,
    /// Where to answer containerd as a snapshotter; not at all when absent. The snapshots are kept in `snapshots` below
    /// the state folder.
    pub snapshotter_socket: Option<PathBuf>,
    /// Let containerd pull every image as ever.
    pub plain: bool,
    /// Where `/metrics`, `/healthz` and `/readyz` are served; nowhere when absent.
    pub metrics_listen: Option<SocketAddr>,
    /// Where all that the fetch policy is told and asks for is written down, for `hermes simulate replay`; nowhere when absent.
    pub record_decisions: Option<PathBuf>,
    /// How registries are reached.
    pub registries: RegistrySettings,
}

/// How registries are reached: mirrors, certificates, logins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RegistrySettings {
    /// The folder with containerd's `hosts.toml` files.
    pub hosts_dir: PathBuf,
    /// Certificates by host (with port, as in references), beside those that `hosts.toml` names.
    pub tls: BTreeMap<String, TlsSettings>,
    /// Folders with Kubernetes' image pull secrets.
    pub pull_secret_folders: Vec<PathBuf>,
    /// The kubelet's `--image-credential-provider-config`.
    pub credential_provider_config: Option<PathBuf>,
    /// The kubelet's `--image-credential-provider-bin-dir`.
    pub credential_provider_bin_dir: Option<PathBuf>,
    /// Docker's `config.json`; the usual one when absent.
    pub docker_config: Option<PathBuf>,
    /// The folder with docker's credential helpers; those that `PATH` leads to when absent.
    pub docker_helper_dir: Option<PathBuf>,
}

impl Default for RegistrySettings {
    fn default() -> Self {
        Self {
            hosts_dir: PathBuf::from(HOSTS_DIR),
            tls: BTreeMap::new(),
            pull_secret_folders: Vec::new(),
            credential_provider_config: None,
            credential_provider_bin_dir: None,
            docker_config: None,
            docker_helper_dir: None,
        }
    }
}

impl RegistrySettings {
    /// What the registry client is told.
    pub fn origin_config(&self) -> OriginConfig {
        let credentials = CredentialsConfig {
            pull_secret_folders: self.pull_secret_folders.clone(),
            provider_config: self.credential_provider_config.clone(),
            provider_bin_dir: self.credential_provider_bin_dir.clone(),
            docker_config: self.docker_config.clone(),
            docker_helper_dir: self.docker_helper_dir.clone(),
        };
        let (hosts_dir, tls) = (Some(self.hosts_dir.clone()), self.tls.clone());
        OriginConfig { credentials, hosts_dir, tls, ..OriginConfig::default() }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |setting, reason: &str| Err(ConfigError { setting, reason: reason.to_owned() });
        // Beside a relative folder, a plugin's name would be looked for along PATH.
        if self.credential_provider_bin_dir.as_ref().is_some_and(|dir| !dir.is_absolute()) {
            return wrong("credential_provider_bin_dir", "give an absolute path");
        }
        if self.credential_provider_config.is_some() != self.credential_provider_bin_dir.is_some() {
            return wrong("credential_provider_config", "give it together with credential_provider_bin_dir");
        }
        if self.docker_helper_dir.as_ref().is_some_and(|dir| !dir.is_absolute()) {
            return wrong("docker_helper_dir", "give an absolute path");
        }
        Ok(())
    }
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            state: PathBuf::from("/var/lib/hermes"),
            listen: None,
            peers: Vec::new(),
            cluster: "default".to_owned(),
            join_secret: None,
            open_swarm: false,
            zone: String::new(),
            members_file: None,
            members_dns: None,
            controller: Vec::new(),
            controller_ca: None,
            controller_token: None,
            node_name: None,
            index_folders: Vec::new(),
            trusted_keys: Vec::new(),
            signing_key: None,
            index_on_first_pull: true,
            index_on_first_pull_min_bytes: FIRST_PULL_MIN_BYTES,
            unused_images_max: UNUSED_IMAGES_MAX,
            store_budget_bytes: None,
            complete: CompleteMode::default(),
            guess_starts: true,
            complete_rate_bytes_per_second: COMPLETE_RATE_BYTES_PER_SECOND,
            // Design, section 5.
            read_deadline_ms: 60_000,
            way: None,
            erofs_backing: None,
            exit_when_unused: false,
            metrics_listen: None,
            record_decisions: None,
            registries: RegistrySettings::default(),
            snapshotter_socket: None,
            plain: false,
        }
    }
}

impl NodeConfig {
    /// Checks what can be checked without touching anything.
    ///
    /// # Errors
    /// With the first setting that cannot be.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let wrong = |setting, reason: &str| Err(ConfigError { setting, reason: reason.to_owned() });
        if !self.state.is_absolute() {
            return wrong("state", "give an absolute path");
        }
        if !(100..=3_600_000).contains(&self.read_deadline_ms) {
            return wrong("read_deadline_ms", "give 100 (0.1 s) to 3600000 (an hour)");
        }
        self.cluster_id()?;
        self.zone_name()?;
        self.members_name()?;
        if self.join_secret.is_some() && self.open_swarm {
            return wrong("open_swarm", "a swarm with a join secret is closed; leave one of them out");
        }
        self.validate_controller()?;
        let paths = [
            ("join_secret", &self.join_secret),
            ("members_file", &self.members_file),
            ("controller_ca", &self.controller_ca),
            ("controller_token", &self.controller_token),
        ];
        for (setting, path) in paths {
            if path.as_ref().is_some_and(|path| !path.is_absolute()) {
                return wrong(setting, "give an absolute path");
            }
        }
        // A chunk, its neighbours of one span, and what is being decoded must fit at once.
        if self.store_budget_bytes.is_some_and(|budget| budget < 16 << 20) {
            return wrong("store_budget_bytes", "give at least 16 MiB");
        }
        self.registries.validate()?;
        if self.signing_key.as_ref().is_some_and(|path| !path.is_absolute()) {
            return wrong("signing_key", "give an absolute path");
        }
        if self.snapshotter_socket.as_ref().is_some_and(|socket| !socket.is_absolute()) {
            return wrong("snapshotter_socket", "give an absolute path");
        }
        if self.snapshotter_socket.is_some() && self.exit_when_unused {
            return wrong(
                "exit_when_unused",
                "a node that answers containerd never ends by itself; leave one of them out",
            );
        }
        self.public_keys().map(drop)
    }

    fn validate_controller(&self) -> Result<(), ConfigError> {
        let wrong = |setting, reason: &str| Err(ConfigError { setting, reason: reason.to_owned() });
        if self.controller.is_empty() {
            return match (&self.controller_ca, &self.controller_token) {
                (None, None) => Ok(()),
                _ => wrong("controller", "give the controller's address as well"),
            };
        }
        if self.controller_ca.is_none() {
            return wrong("controller_ca", "give the file with the roots that the controller's certificate is of");
        }
        if self.node_name.is_none() {
            return wrong("node_name", "the controller knows nodes by name; give this node's");
        }
        if self.join_secret.is_some() || self.open_swarm {
            return wrong(
                "join_secret",
                "the controller says who is a member; leave the join secret and open_swarm out",
            );
        }
        self.controller_addresses().map(drop)
    }

    /// The addresses of controllers, as URLs.
    ///
    /// # Errors
    /// When one is none.
    pub fn controller_addresses(&self) -> Result<Vec<String>, ConfigError> {
        let url = |text: &String| {
            let place = text.strip_prefix("https://").unwrap_or(text).trim_end_matches('/');
            let is_place = place.rsplit_once(':').is_some_and(|(host, port)| {
                !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok_and(|port| port > 0)
            });
            if is_place {
                return Ok(format!("https://{place}"));
            }
            let reason = format!("'{text}' is no address; write HOST:PORT or https://HOST:PORT");
            Err(ConfigError { setting: "controller", reason })
        };
        self.controller.iter().map(url).collect()
    }

    /// The cluster's name, by the swarm's own rule for it.
    ///
    /// # Errors
    /// When it is none.
    pub fn cluster_id(&self) -> Result<ClusterId, ConfigError> {
        let parsed: Result<_, hermes_p2p::config::ConfigError> = self.cluster.parse();
        parsed.map_err(|error| ConfigError { setting: "cluster", reason: error.to_string() })
    }

    /// The zone, by the swarm's own rule for it.
    ///
    /// # Errors
    /// When it is none.
    pub fn zone_name(&self) -> Result<Zone, ConfigError> {
        let parsed: Result<_, hermes_p2p::admission::certificate::ZoneError> = self.zone.parse();
        parsed.map_err(|error| ConfigError { setting: "zone", reason: error.to_string() })
    }

    /// The name and the port of [`Self::members_dns`].
    ///
    /// # Errors
    /// When it is no name and port.
    pub fn members_name(&self) -> Result<Option<(String, u16)>, ConfigError> {
        let Some(text) = &self.members_dns else { return Ok(None) };
        match text.parse() {
            Ok(PeerAddress::Host { host, port, .. }) => Ok(Some((host, port))),
            _ => Err(ConfigError { setting: "members_dns", reason: format!("'{text}' is no NAME:PORT") }),
        }
    }

    /// The trusted keys, parsed.
    ///
    /// # Errors
    /// With the first that is none.
    pub fn public_keys(&self) -> Result<Vec<PublicKey>, ConfigError> {
        let parse = |text: &String| {
            text.parse().map_err(|error| ConfigError { setting: "trusted_keys", reason: format!("{error}") })
        };
        self.trusted_keys.iter().map(parse).collect()
    }

    /// [`Self::read_deadline_ms`] as a duration.
    pub fn read_deadline(&self) -> Duration {
        Duration::from_millis(self.read_deadline_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_controller() -> NodeConfig {
        NodeConfig {
            controller: vec!["controller:4200".to_owned(), "https://10.0.0.1:4200/".to_owned()],
            controller_ca: Some("/ca.pem".into()),
            node_name: Some("node-1".to_owned()),
            ..NodeConfig::default()
        }
    }

    #[test]
    fn a_controller_is_named_with_and_without_a_scheme() {
        assert_eq!(with_controller().validate(), Ok(()));
        let addresses = with_controller().controller_addresses();
        assert_eq!(addresses, Ok(vec!["https://controller:4200".to_owned(), "https://10.0.0.1:4200".to_owned()]));
    }

    #[test]
    fn the_defaults_are_valid_and_nonsense_is_named() {
        assert_eq!(NodeConfig::default().validate(), Ok(()));
        type Change = fn(&mut NodeConfig);
        let cases: [(Change, &str); 19] = [
            (|config| config.state = PathBuf::from("relative"), "state"),
            (|config| config.read_deadline_ms = 0, "read_deadline_ms"),
            (|config| config.cluster = "a b".to_owned(), "cluster"),
            (|config| config.cluster = "Prod".to_owned(), "cluster"),
            (|config| config.cluster = "-a".to_owned(), "cluster"),
            (|config| config.zone = "a b".to_owned(), "zone"),
            (|config| config.members_dns = Some("10.0.0.1:1".to_owned()), "members_dns"),
            (|config| config.join_secret = Some(PathBuf::from("relative")), "join_secret"),
            (|config| (config.join_secret, config.open_swarm) = (Some("/secret".into()), true), "open_swarm"),
            (|config| config.store_budget_bytes = Some(1), "store_budget_bytes"),
            (
                |config| config.registries.credential_provider_bin_dir = Some("rel".into()),
                "credential_provider_bin_dir",
            ),
            (|config| config.controller = vec!["c:1".to_owned()], "controller_ca"),
            (|config| config.controller_token = Some("/token".into()), "controller"),
            (
                |config| (config.controller, config.controller_ca) = (vec!["c:1".into()], Some("/ca".into())),
                "node_name",
            ),
            (
                |config| *config = NodeConfig { controller: vec!["http://c:1".into()], ..with_controller() },
                "controller",
            ),
            (|config| *config = NodeConfig { join_secret: Some("/secret".into()), ..with_controller() }, "join_secret"),
            (|config| config.trusted_keys = vec!["key".to_owned()], "trusted_keys"),
            (|config| config.signing_key = Some(PathBuf::from("relative")), "signing_key"),
            (|config| config.snapshotter_socket = Some(PathBuf::from("relative")), "snapshotter_socket"),
        ];
        for (change, setting) in cases {
            let mut config = NodeConfig::default();
            change(&mut config);
            assert_eq!(config.validate().expect_err("refused").setting, setting);
        }
    }
}
