//! Nodes: a real kubelet, containerd, runc and CNI bridge, each under a systemd of its own, in namespaces of their own.
//!
//! A node sees the programs of this machine and has all else for itself (`node.sh`); what a machine has on its disk is in
//! the node's folder, and survives [`Node::power_off`]. It is on a [`site`], joins the cluster with a certificate
//! of `system:nodes`, and may do what NodeRestriction lets it. containerd pulls from registries at the site's address in
//! clear, and makes what holds a pod's namespaces of an image there.
//!
//! Everything in it ends with the node, and with the test: its first process is killed when the test's thread ends, and
//! who kills the first process of a namespace kills all of it. The control groups that are left are removed, too.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::pki::Identity;
use super::site::{self, Site};
use super::{Cluster, tail};
use crate::command::run;
use crate::containerds;
use crate::guard::{ProcessGuard, ScratchDir, Sweeper, wait_for};
use crate::network::Network;
use crate::systemd::first_process;

/// How long a node may take to start, on a machine that is busy with other tests.
const START_DEADLINE: Duration = Duration::from_secs(120);
/// Makes the namespaces and what is seen in them.
const BOOT: &str = include_str!("node.sh");
/// The targets that every service refers to, and the one that services are installed in.
const TARGETS: [&str; 4] = ["sysinit.target", "basic.target", "shutdown.target", "multi-user.target"];
/// Where a node has CNI's programs.
const CNI: &str = "/usr/local/programs/cni";

/// The folder with CNI's plugins and a static busybox.
///
/// # Errors
/// When they are not in the cache and cannot be fetched.
pub fn cni_programs() -> Result<PathBuf> {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/cni");
    let printed = String::from_utf8(run(&mut Command::new(tool))?).context("a path that is no text")?;
    Ok(PathBuf::from(printed.trim_end()))
}

/// How a node is made.
#[derive(Debug, Clone, Copy)]
pub struct Build<'a> {
    /// Its place on the site, from 0.
    pub number: usize,
    /// The line of its containerd: one that speaks CRI's `v1alpha2`, which is all that this kubelet knows.
    pub containerd: &'a str,
    /// The image that holds pods' namespaces.
    pub pause: &'a str,
    /// The registry, as host and port, that it speaks to in clear.
    pub registry: &'a str,
}

/// A node with its disk. What runs on it ends when this is dropped.
#[derive(Debug)]
pub struct Node {
    running: Option<Running>,
    name: String,
    address: Ipv4Addr,
    network: Arc<Network>,
    programs: Vec<(&'static str, PathBuf)>,
    group: String,
    dir: ScratchDir,
    _sweepers: [Sweeper; 2],
}

/// What is gone when the power is.
#[derive(Debug)]
struct Running {
    outer: ProcessGuard,
    first: Pid,
}

impl Node {
    /// Makes a node of `cluster` and starts it. The calling thread is to live as long as the node. [`Node::wait`] says when it
    /// has joined.
    ///
    /// # Errors
    /// When a program is not to be had, or systemd does not start.
    pub fn boot(cluster: &Cluster, site: &Site, build: &Build<'_>) -> Result<Self> {
        let name = format!("node-{}", build.number);
        let dir = ScratchDir::new(&name)?;
        // One that is told by the folder is nobody else's.
        let group = dir.path().file_name().and_then(|name| name.to_str()).context("UTF-8")?.to_owned();
        let sweepers = [Sweeper::watch(dir.path())?, Sweeper::watch_groups(&group)?];
        let programs = vec![
            ("kubernetes", cluster.programs().to_owned()),
            ("containerd", containerds::programs(build.containerd)?),
            ("cni", cni_programs()?),
        ];
        let network = Arc::clone(site.node(build.number));
        let address = site::address(build.number);
        let mut node = Self { running: None, name, address, network, programs, group, dir, _sweepers: sweepers };
        node.write_disk(cluster, build)?;
        node.power_on()?;
        Ok(node)
    }

    /// Its name in the cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Starts it.
    ///
    /// # Errors
    /// When it runs already, or systemd does not start; what it said is in the message.
    pub fn power_on(&mut self) -> Result<()> {
        ensure!(self.running.is_none(), "{} runs already", self.name);
        let log = File::options().create(true).append(true).open(self.dir.path().join("boot.log"))?;
        // As a death of power for all of it when this thread ends, however that comes.
        let mut command = self.network.command("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "sh", "-c", BOOT, "node"]).arg(self.dir.path()).arg(&self.group);
        for (name, folder) in &self.programs {
            command.arg(name).arg(folder);
        }
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let mut outer = ProcessGuard::start(&mut command)?;
        let id = outer.id();
        let first = wait_for("the first process of a node", START_DEADLINE, || match outer.ended() {
            Ok(None) => first_process(id).map(Some),
            _ => Some(None),
        });
        let Some(first) = first? else { bail!("{} does not start: {}", self.name, self.log("../../boot.log")) };
        self.running = Some(Running { outer, first });
        Ok(())
    }

    /// Takes the power away: everything in it is gone at once, and its disk stays.
    ///
    /// # Errors
    /// When its processes do not end.
    pub fn power_off(&mut self) -> Result<()> {
        let Some(mut running) = self.running.take() else { return Ok(()) };
        // The end of the first process is the end of all others.
        let _ = kill_process(running.first, Signal::KILL);
        running.outer.child().wait()?;
        remove_groups(&self.group)
    }

    /// Waits until it has joined `cluster` and takes pods.
    ///
    /// # Errors
    /// When it does not; the ends of its logs are in the message.
    pub fn wait(&self, cluster: &Cluster) -> Result<()> {
        let ready = r#"jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
        wait_for("a node that is ready", START_DEADLINE, || {
            (cluster.get(&["get", "node", &self.name, "-o", ready]).ok()? == "True").then_some(())
        })
        .with_context(|| self.logs())
    }

    /// A program in it, with its view of everything.
    ///
    /// # Errors
    /// When it does not run.
    pub fn command(&self, program: &str) -> Result<Command> {
        let first = self.first()?.as_raw_nonzero().to_string();
        let mut command = Command::new("nsenter");
        command.args(["--target", &first, "--mount", "--pid", "--cgroup", "--net", "--uts", "--ipc", "--"]);
        command.arg(program).env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null());
        Ok(command)
    }

    /// Runs a program in it, which must succeed; what it printed.
    ///
    /// # Errors
    /// With what it says when it fails.
    pub fn must(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let printed = run(self.command(program)?.args(arguments)).with_context(|| self.name.clone())?;
        Ok(String::from_utf8(printed)?.trim().to_owned())
    }

    /// The end of a log of its `/var/log`.
    pub fn log(&self, name: &str) -> String {
        tail(&self.dir.path().join("var/log").join(name))
    }

    /// The ends of the logs of its services.
    pub fn logs(&self) -> String {
        let names = ["containerd.log", "kubelet.log"];
        names.map(|name| format!("{} {name}:\n{}", self.name, self.log(name))).join("\n")
    }

    fn first(&self) -> Result<Pid> {
        Ok(self.running.as_ref().with_context(|| format!("{} has no power", self.name))?.first)
    }

    /// What it has on its disk before its first start.
    fn write_disk(&self, cluster: &Cluster, build: &Build<'_>) -> Result<()> {
        let dir = self.dir.path();
        let at = |path: &str| dir.join(path);
        for folder in [
            "etc/systemd/system/multi-user.target.wants",
            "etc/cni/net.d",
            "etc/containerd",
            "etc/kubernetes",
            "etc-work",
            "var/lib",
            "var/log/pods",
            "var/log/containers",
            "usr/local/bin",
            "opt",
        ] {
            fs::create_dir_all(at(folder))?;
        }
        for (name, folder) in &self.programs[..2] {
            for program in fs::read_dir(folder)? {
                let program = program?.file_name();
                symlink(
                    Path::new("/usr/local/programs").join(name).join(&program),
                    at("usr/local/bin").join(&program),
                )?;
            }
        }
        for target in TARGETS {
            fs::write(at("etc/systemd/system").join(target), "[Unit]\nDefaultDependencies=no\n")?;
        }
        let kubeconfig = cluster
            .client(&self.name, &Identity { user: &format!("system:node:{}", self.name), group: "system:nodes" })?;
        fs::copy(kubeconfig, at("etc/kubernetes/kubelet.kubeconfig"))?;
        fs::copy(cluster.authority(), at("etc/kubernetes/ca.crt"))?;
        fs::write(at("etc/kubernetes/kubelet.yaml"), kubelet_config(build.number))?;
        fs::write(at("etc/hostname"), format!("{}\n", self.name))?;
        fs::write(at("etc/containerd/config.toml"), containerd_config(build.pause))?;
        let hosts = at("etc/containerd/certs.d").join(build.registry);
        fs::create_dir_all(&hosts)?;
        let host = format!("server = \"http://{0}\"\n[host.\"http://{0}\"]\n", build.registry);
        fs::write(hosts.join("hosts.toml"), host + "capabilities = [\"pull\", \"resolve\"]\n")?;
        fs::write(at("etc/cni/net.d/10-bridge.conflist"), cni_config(build.number))?;
        // A service that others install has nobody here who keeps its log.
        fs::create_dir_all(at("etc/systemd/system/hermes.service.d"))?;
        let log = "[Service]\nStandardOutput=append:/var/log/hermes.log\nStandardError=append:/var/log/hermes.log\n";
        fs::write(at("etc/systemd/system/hermes.service.d/log.conf"), log)?;
        self.write_unit(
            "containerd",
            "Type=notify\nDelegate=yes\nKillMode=process\nExecStart=/usr/local/bin/containerd",
        )?;
        let kubelet = format!(
            "ExecStart=/usr/local/bin/kubelet --config=/etc/kubernetes/kubelet.yaml --v=2 \
             --kubeconfig=/etc/kubernetes/kubelet.kubeconfig --hostname-override={} --node-ip={} \
             --container-runtime=remote --container-runtime-endpoint=unix:///run/containerd/containerd.sock \
             --node-labels=topology.kubernetes.io/zone=zone-{}",
            self.name, self.address, build.number,
        );
        self.write_unit("kubelet", &kubelet)
    }

    /// A service that is started with the node, with its log in /var/log.
    fn write_unit(&self, name: &str, lines: &str) -> Result<()> {
        let units = self.dir.path().join("etc/systemd/system");
        let text = format!(
            "[Unit]\nStartLimitIntervalSec=0\n[Service]\nRestart=always\nRestartSec=500ms\n\
             StandardOutput=append:/var/log/{name}.log\nStandardError=append:/var/log/{name}.log\n{lines}\n"
        );
        fs::write(units.join(format!("{name}.service")), text)?;
        symlink(format!("../{name}.service"), units.join(format!("multi-user.target.wants/{name}.service")))?;
        Ok(())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Err(error) = self.power_off() {
            eprintln!("{}: {error:#}", self.name);
        }
    }
}

/// Removes the control groups of this name, which hold nobody any more.
fn remove_groups(name: &str) -> Result<()> {
    for hierarchy in fs::read_dir("/sys/fs/cgroup")? {
        let group = hierarchy?.path().join(name);
        if group.is_dir() {
            run(Command::new("find").arg(&group).args(["-depth", "-type", "d", "-delete"]))?;
        }
    }
    Ok(())
}

fn kubelet_config(number: usize) -> String {
    let config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "address": site::address(number), "healthzBindAddress": "127.0.0.1",
        "authentication": {
            "anonymous": {"enabled": false}, "webhook": {"enabled": true}, "x509": {"clientCAFile": "/etc/kubernetes/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "cgroupDriver": "cgroupfs", "cgroupRoot": "/", "enforceNodeAllocatable": ["pods"],
        "clusterDNS": ["10.96.0.10"], "resolvConf": "",
        // A disk that others fill is not what tests are about.
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "nodefs.inodesFree": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "failSwapOn": false, "makeIPTablesUtilChains": false, "maxPods": 60,
        "nodeStatusUpdateFrequency": "2s", "syncFrequency": "10s",
    });
    config.to_string()
}

fn containerd_config(pause: &str) -> String {
    format!(
        r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
# Where this machine is a container itself, root may not lower the score.
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI}"
[plugins."io.containerd.grpc.v1.cri".registry]
config_path = "/etc/containerd/certs.d"
"#
    )
}

fn cni_config(number: usize) -> String {
    let range = json!({"subnet": site::pods(number)});
    let address =
        json!({"type": "host-local", "ranges": [[range]], "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "/run/cni"});
    let bridge = json!({"type": "bridge", "bridge": "cni0", "isGateway": true, "hairpinMode": true, "ipam": address});
    json!({"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]}).to_string()
}
