//! A cluster with the controller's definitions and rights, and what a test waits for.

use std::path::Path;
use std::sync::Once;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hermes_controller::crd::definitions;
use hermes_controller::kubernetes::connect;
use hermes_tests::kubernetes::Cluster;
use kube::Client;
use tokio::runtime::Runtime;

/// What the controller may do.
pub(crate) const RIGHTS: &str = include_str!("../../../deploy/rbac.yaml");
/// The controller's namespace, and its ServiceAccount in it.
pub(crate) const CONTROLLER: (&str, &str) = ("hermes-system", "hermes-controller");
/// How long anything may take, on a machine that is busy with other tests.
pub(crate) const DEADLINE: Duration = Duration::from_secs(90);
/// Pause between two looks at something that nothing announces.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// A cluster, and a runtime for those who talk to it.
#[derive(Debug)]
pub(crate) struct World {
    // Its tasks end first.
    pub(crate) runtime: Runtime,
    pub(crate) cluster: Cluster,
}

impl World {
    /// Installs the definitions and the rights.
    pub(crate) fn new() -> Result<Self> {
        let world = Self::empty()?;
        install(&world.cluster)?;
        world.cluster.apply(RIGHTS)?;
        Ok(world)
    }

    /// Installs nothing.
    pub(crate) fn empty() -> Result<Self> {
        static PROVIDER: Once = Once::new();
        PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        Ok(Self { runtime, cluster: Cluster::start()? })
    }

    /// A client as somebody who may do everything.
    pub(crate) fn admin(&self) -> Result<Client> {
        self.client(&self.cluster.admin())
    }

    /// A client as the controller.
    pub(crate) fn controller(&self) -> Result<Client> {
        self.client(&self.cluster.service_account(CONTROLLER.0, CONTROLLER.1)?)
    }

    pub(crate) fn client(&self, kubeconfig: &Path) -> Result<Client> {
        Ok(self.runtime.block_on(connect(Some(kubeconfig)))?)
    }

    /// Looks at what kubectl prints until it is as wanted.
    pub(crate) fn see(&self, arguments: &[&str], wanted: impl Fn(&str) -> bool) -> Result<String> {
        let mut seen = String::new();
        let looked = hermes_tests::guard::wait_for("what is wanted", DEADLINE, || {
            seen = self.cluster.get(arguments).unwrap_or_else(|error| format!("{error:#}"));
            std::thread::sleep(LOOK_INTERVAL);
            wanted(&seen).then_some(())
        });
        match looked {
            Ok(()) => Ok(seen),
            Err(error) => bail!("{error:#}; {arguments:?} says: {seen}"),
        }
    }
}

/// Installs our definitions and waits until they are served.
pub(crate) fn install(cluster: &Cluster) -> Result<()> {
    for each in definitions() {
        cluster.apply(&each.yaml())?;
        let name = each.definition.metadata.name.context("a name")?;
        cluster.get(&["wait", "--for=condition=Established", "--timeout=60s", &format!("crd/{name}")])?;
    }
    Ok(())
}
