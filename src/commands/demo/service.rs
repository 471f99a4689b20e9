//! The image's own program, started as a container start does it: runc over an overlay whose one lower directory is
//! the image, in network and process namespaces of its own.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::Deserialize;
use serde_json::json;

/// How often the service is asked whether it answers.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// What the image's configuration says about starting it.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(super) struct StartConfig {
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    working_dir: Option<String>,
    exposed_ports: Option<std::collections::BTreeMap<String, serde_json::Value>>,
}

impl StartConfig {
    /// Reads the `config` object of an image configuration.
    pub(super) fn of_image(config: &[u8]) -> anyhow::Result<Self> {
        #[derive(Deserialize)]
        struct Image {
            config: Option<StartConfig>,
        }
        let image: Image =
            serde_json::from_slice(config).context("the image configuration is not what it should be")?;
        Ok(image.config.unwrap_or_default())
    }

    /// The port to ask: the first that the image exposes over TCP.
    pub(super) fn port(&self) -> Option<u16> {
        let ports = self.exposed_ports.as_ref()?;
        ports.keys().find_map(|port| port.strip_suffix("/tcp").unwrap_or(port).parse().ok())
    }

    fn arguments(&self) -> Vec<String> {
        [&self.entrypoint, &self.cmd].into_iter().flatten().flatten().cloned().collect()
    }
}

/// A container that runs. Dropping it ends it and removes all that it left.
pub(super) struct Service {
    id: String,
    state: PathBuf,
    merged: PathBuf,
    process: Child,
    log: PathBuf,
}

impl Service {
    /// Starts the program of `config` over the folders `lower`, uppermost first, keeping its own files in `work`.
    pub(super) fn start(lower: &[PathBuf], config: &StartConfig, work: &Path) -> anyhow::Result<Self> {
        let arguments = config.arguments();
        if arguments.is_empty() {
            bail!("the image names no program to start (no entrypoint and no command)");
        }
        let merged = work.join("rootfs");
        for folder in ["rootfs", "upper", "overlay", "runc"] {
            fs::create_dir_all(work.join(folder))?;
        }
        let lower: Vec<_> = lower.iter().map(|folder| folder.display().to_string()).collect();
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.join(":"),
            work.join("upper").display(),
            work.join("overlay").display()
        );
        rustix::mount::mount("overlay", &merged, "overlay", MountFlags::empty(), Some(c_string(&options)?.as_c_str()))
            .context("cannot mount an overlay over the image")?;
        fs::write(work.join("config.json"), serde_json::to_vec(&bundle(config, &arguments))?)?;
        let id = format!("hermes-demo-{}-{}", std::process::id(), unique());
        let log = work.join("program.log");
        let output = File::create(&log)?;
        let process = Command::new("runc")
            .arg("--root")
            .arg(work.join("runc"))
            .args(["run", "--bundle"])
            .arg(work)
            .arg(&id)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .context("cannot start runc; install it (apt-get install runc)");
        match process {
            Ok(process) => Ok(Self { id, state: work.join("runc"), merged, process, log }),
            Err(error) => {
                let _ = rustix::mount::unmount(&merged, UnmountFlags::DETACH);
                Err(error)
            }
        }
    }

    /// Waits until the program answers an HTTP request with 200, and says when that was.
    pub(super) fn wait_for_answer(&mut self, port: u16, timeout: Duration) -> anyhow::Result<Instant> {
        let deadline = Instant::now() + timeout;
        let mut namespace = None;
        loop {
            if namespace.is_none() {
                namespace = self.network_namespace();
            }
            if let Some(namespace) = &namespace
                && answers_ok(namespace, port)
            {
                return Ok(Instant::now());
            }
            if let Some(status) = self.process.try_wait()? {
                bail!("the program ended ({status}) before it answered: {}", self.last_words());
            }
            if Instant::now() > deadline {
                bail!("the program did not answer on port {port} within {timeout:?}: {}", self.last_words());
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    fn last_words(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log[log.len().saturating_sub(600)..]).trim().to_owned();
        if log.is_empty() { "it said nothing".to_owned() } else { log }
    }

    /// The container's network, once runc has made it.
    fn network_namespace(&self) -> Option<File> {
        let state = fs::read(self.state.join(&self.id).join("state.json")).ok()?;
        let state: serde_json::Value = serde_json::from_slice(&state).ok()?;
        let process = state.get("init_process_pid")?.as_i64().filter(|pid| *pid > 0)?;
        File::open(format!("/proc/{process}/ns/net")).ok()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let deleted =
            Command::new("runc").arg("--root").arg(&self.state).args(["delete", "--force", &self.id]).output();
        if !deleted.is_ok_and(|output| output.status.success()) {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
        let _ = rustix::mount::unmount(&self.merged, UnmountFlags::DETACH);
    }
}

/// Asks once, from inside the container's network. A thread of its own, because a thread cannot come back.
fn answers_ok(namespace: &File, port: u16) -> bool {
    let Ok(namespace) = namespace.try_clone() else { return false };
    let ask = move || -> std::io::Result<bool> {
        use std::os::fd::AsFd as _;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        crate::commands::probe::answers_ok(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
    };
    std::thread::spawn(ask).join().is_ok_and(|answer| answer.unwrap_or(false))
}

/// The runtime bundle: what containerd would give runc for such an image, less what needs a pod.
fn bundle(config: &StartConfig, arguments: &[String]) -> serde_json::Value {
    let capabilities =
        ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_SETGID", "CAP_SETUID"];
    let mount = |target: &str, kind: &str, options: &[&str]| json!({"destination": target, "type": kind, "source": kind, "options": options});
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": arguments,
            "env": config.env.clone().unwrap_or_default(),
            "cwd": config.working_dir.as_deref().filter(|dir| !dir.is_empty()).unwrap_or("/"),
            "capabilities": {"bounding": capabilities, "effective": capabilities, "permitted": capabilities},
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs"},
        "hostname": "hermes-demo",
        "mounts": [
            mount("/proc", "proc", &[]),
            mount("/dev", "tmpfs", &["nosuid", "mode=755", "size=65536k"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/tmp", "tmpfs", &["nosuid", "nodev", "mode=1777"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
        },
    })
}

fn c_string(text: &str) -> anyhow::Result<std::ffi::CString> {
    std::ffi::CString::new(text).context("a path with a NUL byte")
}

/// A number that no other container of this process has.
fn unique() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
