//! Pods with one container, in the host's network so that nothing but the runtime is needed.

use anyhow::{Context as _, Result, ensure};

use crate::cri::{Cri, ImageSpec, Nothing};

/// `NamespaceMode`: the container has one of its own; it uses the node's.
const CONTAINER: i32 = 1;
const NODE: i32 = 2;
/// Seconds that an exec may take, and that a container has to end by itself before it is killed.
const EXEC_SECONDS: i64 = 60;
const STOP_SECONDS: i64 = 0;

#[derive(Clone, PartialEq, prost::Message)]
struct Metadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NamespaceOption {
    #[prost(int32, tag = "1")]
    network: i32,
    #[prost(int32, tag = "2")]
    pid: i32,
    #[prost(int32, tag = "3")]
    ipc: i32,
}

impl NamespaceOption {
    fn host_network() -> Option<Self> {
        Some(Self { network: NODE, pid: CONTAINER, ipc: NODE })
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct SandboxSecurity {
    #[prost(message, optional, tag = "1")]
    namespaces: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LinuxSandbox {
    #[prost(message, optional, tag = "2")]
    security: Option<SandboxSecurity>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<Metadata>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxSandbox>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<SandboxConfig>,
}

/// `RunPodSandboxResponse`, `CreateContainerResponse`, and every request that names one thing.
#[derive(Clone, PartialEq, prost::Message)]
struct Id {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerSecurity {
    #[prost(message, optional, tag = "3")]
    namespaces: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LinuxContainer {
    #[prost(message, optional, tag = "2")]
    security: Option<ContainerSecurity>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(message, optional, tag = "15")]
    linux: Option<LinuxContainer>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CreateContainerRequest {
    #[prost(string, tag = "1")]
    sandbox: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<SandboxConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StopContainerRequest {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(int64, tag = "2")]
    timeout: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ExecSyncRequest {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, repeated, tag = "2")]
    command: Vec<String>,
    #[prost(int64, tag = "3")]
    timeout: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ExecSyncResponse {
    #[prost(bytes = "vec", tag = "1")]
    stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    exit_code: i32,
}

/// `ListPodSandboxResponse`, with the ids alone.
#[derive(Clone, PartialEq, prost::Message)]
struct Listed {
    #[prost(message, repeated, tag = "1")]
    items: Vec<Id>,
}

/// What a command in a container has come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Executed {
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// Its exit code.
    pub exit_code: i32,
}

/// A pod with its container. It goes on when this is dropped.
#[derive(Debug, Clone)]
pub struct Pod {
    /// The image of its container.
    pub image: String,
    sandbox: String,
    container: String,
}

impl Cri {
    /// Starts a pod called `name` with one container of `image`, which runs `command`.
    ///
    /// # Errors
    /// With what the runtime says. What was made before stays; [`Cri::remove_all_pods`] removes it.
    pub fn run_pod(&self, name: &str, image: &str, command: &[&str]) -> Result<Pod> {
        let metadata = Metadata { name: name.to_owned(), uid: name.to_owned(), namespace: "tests".to_owned() };
        let security = Some(SandboxSecurity { namespaces: NamespaceOption::host_network() });
        let config = SandboxConfig { metadata: Some(metadata), linux: Some(LinuxSandbox { security }) };
        let request = RunPodSandboxRequest { config: Some(config.clone()) };
        let Id { id: sandbox } = self.call("RuntimeService/RunPodSandbox", request).context("the sandbox")?;
        let security = Some(ContainerSecurity { namespaces: NamespaceOption::host_network() });
        let container = ContainerConfig {
            metadata: Some(ContainerMetadata { name: "main".to_owned() }),
            image: ImageSpec::of(image),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            linux: Some(LinuxContainer { security }),
        };
        let request =
            CreateContainerRequest { sandbox: sandbox.clone(), config: Some(container), sandbox_config: Some(config) };
        let Id { id: container } = self.call("RuntimeService/CreateContainer", request)?;
        let _: Nothing = self.call("RuntimeService/StartContainer", Id { id: container.clone() })?;
        Ok(Pod { image: image.to_owned(), sandbox, container })
    }

    /// Runs `command` in the pod's container to its end.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn try_exec(&self, pod: &Pod, command: &[&str]) -> Result<Executed> {
        let command = command.iter().map(|word| (*word).to_owned()).collect();
        let request = ExecSyncRequest { id: pod.container.clone(), command, timeout: EXEC_SECONDS };
        let answer: ExecSyncResponse = self.call("RuntimeService/ExecSync", request)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Executed { stdout: text(&answer.stdout), stderr: text(&answer.stderr), exit_code: answer.exit_code })
    }

    /// What `command` prints in the pod's container, without the end of its last line.
    ///
    /// # Errors
    /// When it fails.
    pub fn exec(&self, pod: &Pod, command: &[&str]) -> Result<String> {
        let executed = self.try_exec(pod, command)?;
        ensure!(executed.exit_code == 0, "{command:?} in {}: {executed:?}", pod.image);
        Ok(executed.stdout.trim_end().to_owned())
    }

    /// Stops the pod's container; the pod stays.
    ///
    /// # Errors
    /// With what the runtime says.
    pub fn stop_container(&self, pod: &Pod) -> Result<()> {
        let request = StopContainerRequest { id: pod.container.clone(), timeout: STOP_SECONDS };
        self.call("RuntimeService/StopContainer", request).map(|Nothing {}| ())
    }

    /// Stops and removes the pod with its container.
    ///
    /// # Errors
    /// With what the runtime says.
    pub fn remove_pod(&self, pod: &Pod) -> Result<()> {
        self.remove_sandbox(&pod.sandbox)
    }

    fn remove_sandbox(&self, sandbox: &str) -> Result<()> {
        let id = || Id { id: sandbox.to_owned() };
        self.call("RuntimeService/StopPodSandbox", id()).map(|Nothing {}| ())?;
        self.call("RuntimeService/RemovePodSandbox", id()).map(|Nothing {}| ())
    }

    /// Stops and removes every pod that the runtime knows; how many.
    ///
    /// # Errors
    /// With what the runtime says.
    pub fn remove_all_pods(&self) -> Result<usize> {
        let listed: Listed = self.call("RuntimeService/ListPodSandbox", Nothing {})?;
        listed.items.iter().try_for_each(|pod| self.remove_sandbox(&pod.id))?;
        Ok(listed.items.len())
    }
}
