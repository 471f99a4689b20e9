//! A real Kubernetes: etcd and kube-apiserver, with everything they write in a folder of their own.
//!
//! It authorizes by RBAC and issues and reviews ServiceAccounts' tokens, so whoever talks to it may do what its roles say
//! and no more.
//!
//! [`Cluster::start`] has it on loopback, where nothing runs in it: there is no controller manager, no scheduler and no
//! kubelet, so objects are what somebody has written, pods stay `Pending`, and a namespace has the ServiceAccounts that were
//! made. [`Cluster::on`] has it on a [`site`], a network of its own, with the controller manager and the scheduler; there a
//! [`node`] runs pods. Nodes join with certificates of the same [`pki`].
//!
//! The programs come from `tools/kubernetes`. What they say is in `etcd.log` and `apiserver.log` of the folder, whose end is
//! in the message when one of them does not start. All of it ends with the [`Cluster`], after a failure, too.

pub mod images;
pub mod node;
pub mod pki;
pub mod service;
pub mod site;

use std::fs::{self, File};
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use self::pki::{Identity, Pki};
use self::site::{HOME, Site};
use crate::command::run;
use crate::guard::{ProcessGuard, ScratchDir, Sweeper, wait_for};
use crate::network::Network;

/// How long a server may take to answer, on a machine that is busy with other tests.
const START_DEADLINE: Duration = Duration::from_secs(90);
/// How often a server is started on other ports when somebody has taken those that were free before.
const PORT_ATTEMPTS: u32 = 3;
/// How much of a log a message carries, in bytes.
const LOG_TAIL_BYTES: usize = 2000;
/// How long a token lasts that a test is given, in seconds: longer than any test.
const TOKEN_SECONDS: u32 = 7200;
/// Services' addresses. Only that of the API server leads anywhere, and only on a [`site`].
const SERVICE_RANGE: &str = "10.96.0.0/16";
/// What decides in a cluster: ServiceAccounts with their tokens, pods of workloads, and where pods run.
const DECIDERS: [&str; 2] = ["kube-controller-manager", "kube-scheduler"];

/// The folder with the programs.
///
/// # Errors
/// When they are not in the cache and cannot be built.
pub fn programs() -> Result<PathBuf> {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/kubernetes");
    let printed = String::from_utf8(run(&mut Command::new(tool))?).context("a path that is no text")?;
    Ok(PathBuf::from(printed.trim_end()))
}

/// A running cluster. It ends, and its folder is removed, when this is dropped.
#[derive(Debug)]
pub struct Cluster {
    // Dropped in this order: the API server before etcd, which it would else miss.
    deciders: Vec<ProcessGuard>,
    api_server: Option<ProcessGuard>,
    _etcd: ProcessGuard,
    etcd_port: u16,
    place: Place,
    pki: Pki,
    programs: PathBuf,
    dir: ScratchDir,
    _sweeper: Sweeper,
}

/// Where the API server answers.
#[derive(Debug)]
struct Place {
    /// The network; this machine's when absent.
    network: Option<Arc<Network>>,
    address: Ipv4Addr,
    port: u16,
}

impl Place {
    /// A program, to be run in its network.
    fn command(&self, program: &Path) -> Command {
        self.network.as_ref().map_or_else(|| Command::new(program), |network| network.command(program))
    }

    /// Does something with sockets in its network.
    fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        match &self.network {
            Some(network) => network.within(work),
            None => work(),
        }
    }

    /// A port that nobody listens on now. Somebody may before it is used.
    fn free_port(&self) -> Result<u16> {
        self.within(|| Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port()))
    }
}

impl Cluster {
    /// Starts an empty cluster and waits until it is ready.
    ///
    /// # Errors
    /// When a server does not become ready; the end of its log is in the message.
    pub fn start() -> Result<Self> {
        let mut cluster = Self::with_etcd(Place { network: None, address: Ipv4Addr::LOCALHOST, port: 0 })?;
        let mut attempt = 1;
        loop {
            cluster.place.port = cluster.place.free_port()?;
            match cluster.start_as_admin() {
                Err(error) if attempt < PORT_ATTEMPTS && format!("{error:#}").contains("address already in use") => {}
                started => return started.map(|()| cluster),
            }
            attempt += 1;
        }
    }

    /// Starts a cluster on `site`, where [`node`]s can join it, and waits until pods can be made.
    ///
    /// # Errors
    /// When a server does not become ready; the end of its log is in the message.
    pub fn on(site: &Site) -> Result<Self> {
        let place = Place { network: Some(Arc::clone(site.network())), address: HOME, port: site::API_PORT };
        let mut cluster = Self::with_etcd(place)?;
        cluster.start_as_admin()?;
        for program in DECIDERS {
            let decider = cluster.start_decider(program)?;
            cluster.deciders.push(decider);
        }
        let account = ["get", "serviceaccount", "default", "-o", "jsonpath={.secrets[0].name}"];
        wait_for("the first ServiceAccount", START_DEADLINE, || {
            cluster.get(&account).is_ok_and(|name| !name.is_empty()).then_some(())
        })
        .with_context(|| DECIDERS.map(|program| tail(&cluster.dir.path().join(format!("{program}.log")))).join("\n"))?;
        Ok(cluster)
    }

    fn with_etcd(place: Place) -> Result<Self> {
        let programs = programs()?;
        let dir = ScratchDir::new("kubernetes")?;
        let sweeper = Sweeper::watch(dir.path())?;
        let pki = Pki::new(&dir.make("pki")?, &[IpAddr::V4(place.address), IpAddr::V4(site::API_SERVICE)])?;
        let (etcd, etcd_port) = start_etcd(&place, &programs, dir.path())?;
        let (deciders, api_server) = (Vec::new(), None);
        Ok(Self { deciders, api_server, _etcd: etcd, etcd_port, place, pki, programs, _sweeper: sweeper, dir })
    }

    fn start_as_admin(&mut self) -> Result<()> {
        self.write_kubeconfig("admin", &self.client_certificate(&Identity::admin())?)?;
        self.start_api_server()
    }

    fn start_decider(&self, program: &str) -> Result<ProcessGuard> {
        let user = format!("system:{program}");
        let kubeconfig = self.client(program, &Identity { user: &user, group: "system:deciders" })?;
        let log = File::create(self.dir.path().join(format!("{program}.log")))?;
        let mut command = self.place.command(&self.programs.join(program));
        for option in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
            command.arg(format!("--{option}={}", kubeconfig.display()));
        }
        command.arg(format!("--cert-dir={}", self.dir.path().display()));
        command.args(["--bind-address=127.0.0.1", "--leader-elect=false", "--profiling=false"]);
        if program == DECIDERS[0] {
            let pki = |name: &str| self.pki.path(name).display().to_string();
            command.arg(format!("--service-account-private-key-file={}", pki("tokens.key")));
            command.arg(format!("--root-ca-file={}", pki("ca.crt")));
            command.arg("--use-service-account-credentials=true");
            // A node that says nothing for so long is told of; its pods are not put elsewhere within a test's time.
            command.arg("--node-monitor-grace-period=16s");
            // Claims of volumes that are there are bound at the next of these.
            command.arg("--pvclaimbinder-sync-period=1s");
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        ProcessGuard::start(&mut command)
    }

    /// The kubeconfig, in a file called after `name`, of somebody who logs in with a certificate.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn client(&self, name: &str, identity: &Identity<'_>) -> Result<PathBuf> {
        self.write_kubeconfig(name, &self.client_certificate(identity)?)
    }

    /// The folder with the programs of Kubernetes.
    pub fn programs(&self) -> &Path {
        &self.programs
    }

    /// The file with the certificate of the authority that has signed everybody's.
    pub fn authority(&self) -> PathBuf {
        self.pki.path("ca.crt")
    }

    /// Where the API server answers.
    pub fn url(&self) -> String {
        format!("https://{}:{}", self.place.address, self.place.port)
    }

    /// The kubeconfig of somebody who may do everything.
    pub fn admin(&self) -> PathBuf {
        self.dir.path().join("admin.kubeconfig")
    }

    /// kubectl of the same version, for somebody who may do everything.
    pub fn kubectl(&self) -> Command {
        self.kubectl_as(&self.admin())
    }

    /// kubectl of the same version, for the user of a kubeconfig.
    pub fn kubectl_as(&self, kubeconfig: &Path) -> Command {
        let mut command = self.place.command(&self.programs.join("kubectl"));
        command.env("KUBECONFIG", kubeconfig).env("HOME", self.dir.path());
        command
    }

    /// What kubectl prints.
    ///
    /// # Errors
    /// When it fails; what it says is in the message.
    pub fn get(&self, arguments: &[&str]) -> Result<String> {
        String::from_utf8(run(self.kubectl().args(arguments))?).context("an answer that is no text")
    }

    /// Applies manifests, in YAML or JSON, as somebody who may do everything.
    ///
    /// # Errors
    /// When the API server refuses one; what it says is in the message.
    pub fn apply(&self, manifests: &str) -> Result<()> {
        // A brace at the beginning would make kubectl take all of them for one in JSON.
        feed(self.kubectl().args(["apply", "-f", "-"]), &format!("---\n{manifests}")).map(drop)
    }

    /// Posts `body` to a path of the API, as somebody who may do everything, and gives the answer.
    ///
    /// # Errors
    /// When the API server refuses it; what it says is in the message.
    pub fn create_raw(&self, path: &str, body: &Value) -> Result<Vec<u8>> {
        feed(self.kubectl().args(["create", "--raw", path, "-f", "-"]), &body.to_string())
    }

    /// Puts `body` to a path of the API, such as that of a subresource, as somebody who may do everything.
    ///
    /// # Errors
    /// When the API server refuses it; what it says is in the message.
    pub fn replace_raw(&self, path: &str, body: &Value) -> Result<()> {
        feed(self.kubectl().args(["replace", "--raw", path, "-f", "-"]), &body.to_string()).map(drop)
    }

    /// A kubeconfig with a token of a ServiceAccount, which must be there.
    ///
    /// # Errors
    /// When there is no such ServiceAccount.
    pub fn service_account(&self, namespace: &str, name: &str) -> Result<PathBuf> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token");
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": { "audiences": [pki::ISSUER], "expirationSeconds": TOKEN_SECONDS },
        });
        let answer = self.create_raw(&path, &request)?;
        let answer: Value = serde_json::from_slice(&answer)?;
        let token = answer["status"]["token"].as_str().context("an answer without a token")?;
        self.write_kubeconfig(&format!("{namespace}-{name}"), &json!({ "token": token }))
    }

    /// Kills the API server at once, as a machine that loses its power does. Objects stay in etcd.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill_api_server(&mut self) -> Result<()> {
        let mut server = self.api_server.take().context("the API server does not run")?;
        server.child().kill()?;
        server.child().wait()?;
        Ok(())
    }

    /// Starts the API server, at the same address as before, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not become ready; the end of its log is in the message.
    pub fn start_api_server(&mut self) -> Result<()> {
        let log_path = self.dir.path().join("apiserver.log");
        let log = File::create(&log_path)?;
        let mut command = self.place.command(&self.programs.join("kube-apiserver"));
        command.args(self.api_server_arguments()).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut server = ProcessGuard::start(&mut command)?;
        let ready = wait_for("readiness of the API server", START_DEADLINE, || match server.ended() {
            Ok(None) => run(self.kubectl().args(["get", "--raw", "/readyz"])).is_ok().then_some(true),
            _ => Some(false),
        });
        if !ready.as_ref().is_ok_and(|ready| *ready) {
            bail!("the API server does not run ({ready:?}): {}", tail(&log_path));
        }
        self.api_server = Some(server);
        Ok(())
    }

    fn api_server_arguments(&self) -> Vec<String> {
        let pki = |name: &str| self.pki.path(name).display().to_string();
        let network = match &self.place.network {
            // A Service may not lead to loopback, and nobody looks for this API server by its Service.
            None => ["--bind-address=127.0.0.1".to_owned(), "--endpoint-reconciler-type=none".to_owned()],
            // At the address of its Service, too.
            Some(_) => ["--bind-address=0.0.0.0".to_owned(), "--endpoint-reconciler-type=lease".to_owned()],
        };
        let mut arguments = vec![
            format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
            format!("--advertise-address={}", self.place.address),
            format!("--secure-port={}", self.place.port),
            format!("--service-cluster-ip-range={SERVICE_RANGE}"),
            format!("--cert-dir={}", self.dir.path().display()),
            format!("--client-ca-file={}", pki("ca.crt")),
            format!("--tls-cert-file={}", pki("server.crt")),
            format!("--tls-private-key-file={}", pki("server.key")),
            format!("--service-account-issuer={}", pki::ISSUER),
            format!("--service-account-key-file={}", pki("tokens.pub")),
            format!("--service-account-signing-key-file={}", pki("tokens.key")),
            format!("--kubelet-client-certificate={}", pki("kubelets.crt")),
            format!("--kubelet-client-key={}", pki("kubelets.key")),
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--allow-privileged=true".to_owned(),
            "--profiling=false".to_owned(),
        ];
        arguments.extend(network);
        arguments
    }

    fn client_certificate(&self, identity: &Identity<'_>) -> Result<Value> {
        let issued = self.pki.issue(identity)?;
        Ok(json!({
            "client-certificate-data": STANDARD.encode(issued.certificate),
            "client-key-data": STANDARD.encode(issued.key),
        }))
    }

    fn write_kubeconfig(&self, name: &str, user: &Value) -> Result<PathBuf> {
        let authority = STANDARD.encode(fs::read(self.pki.path("ca.crt"))?);
        let document = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{ "name": "test", "cluster": { "server": self.url(), "certificate-authority-data": authority } }],
            "users": [{ "name": "test", "user": user }],
            "contexts": [{ "name": "test", "context": { "cluster": "test", "user": "test" } }],
        });
        let path = self.dir.path().join(format!("{name}.kubeconfig"));
        fs::write(&path, document.to_string())?;
        Ok(path)
    }
}

/// Starts etcd and says on which port it serves clients.
fn start_etcd(place: &Place, programs: &Path, dir: &Path) -> Result<(ProcessGuard, u16)> {
    let log_path = dir.join("etcd.log");
    let mut attempt = 1;
    loop {
        let (client_port, peer_port) = (place.free_port()?, place.free_port()?);
        let (clients, peers) = (format!("http://127.0.0.1:{client_port}"), format!("http://127.0.0.1:{peer_port}"));
        let log = File::create(&log_path)?;
        let mut command = place.command(&programs.join("etcd"));
        command.arg("--data-dir").arg(dir.join("etcd"));
        command.args(["--name", "test", "--logger", "zap", "--log-level", "warn"]);
        // What is lost with the machine is lost with the test, too; waiting for its disk is for nothing.
        command.arg("--unsafe-no-fsync");
        command.args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
        command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
        command.args(["--initial-cluster", &format!("test={peers}")]);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut etcd = ProcessGuard::start(&mut command)?;
        let healthy = wait_for("health of etcd", START_DEADLINE, || match etcd.ended() {
            Ok(None) => place
                .within(|| crate::web::get(&format!("127.0.0.1:{client_port}"), "/health"))
                .is_ok_and(|answer| answer.contains(r#""health":"true""#))
                .then_some(true),
            _ => Some(false),
        });
        match healthy {
            Ok(true) => return Ok((etcd, client_port)),
            Ok(false) if attempt < PORT_ATTEMPTS && tail(&log_path).contains("address already in use") => attempt += 1,
            other => bail!("etcd does not run ({other:?}): {}", tail(&log_path)),
        }
    }
}

/// Runs `command` with `input` and returns what it prints.
fn feed(command: &mut Command, input: &str) -> Result<Vec<u8>> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let mut stdin = child.stdin.take().context("no input")?;
    let (written, output) = std::thread::scope(|scope| {
        // It may print before it has read all.
        let writer = scope.spawn(move || stdin.write_all(input.as_bytes()));
        (writer.join(), child.wait_with_output())
    });
    let output = output?;
    if !output.status.success() {
        bail!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    written.map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    Ok(output.stdout)
}

/// The end of a log.
fn tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&text[text.len().saturating_sub(LOG_TAIL_BYTES)..]).into_owned()
}
