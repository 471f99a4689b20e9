//! A Service's address, for nodes without kube-proxy: each connection is passed on to one of the pods that are behind it now.
//!
//! As kube-proxy does it for what comes from nodes and pods: pods that are not ready get nothing, and who meets one that does
//! not listen is refused and has to come again. The address is on the site's bridge, where all routes lead.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;

use super::Cluster;
use super::site::Site;
use crate::command::run;

/// A Service that can be reached until this is dropped.
#[derive(Debug)]
pub struct ReachableService {
    runtime: Option<Runtime>,
}

/// How its pods are found.
#[derive(Debug)]
struct Endpoints {
    kubectl: Box<Path>,
    kubeconfig: Box<Path>,
    namespace: String,
    name: String,
    next: AtomicUsize,
}

impl Endpoints {
    /// Another one each time.
    fn choose(&self, port: u16) -> Result<SocketAddr> {
        let mut command = Command::new(&*self.kubectl);
        command.arg("--kubeconfig").arg(&*self.kubeconfig);
        command.args(["-n", &self.namespace, "get", "endpoints", &self.name, "-o", "json"]);
        let endpoints: Value = serde_json::from_slice(&run(&mut command)?)?;
        let subsets = endpoints["subsets"].as_array().context("no pod is ready")?;
        let addresses: Vec<&Value> =
            subsets.iter().filter_map(|subset| subset["addresses"].as_array()).flatten().collect();
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % addresses.len().max(1);
        let address: Ipv4Addr =
            addresses.get(turn).and_then(|it| it["ip"].as_str()).context("no pod is ready")?.parse()?;
        Ok(SocketAddr::from((address, port)))
    }
}

impl Cluster {
    /// Makes a Service reachable, whose ports are those of its pods.
    ///
    /// # Errors
    /// When there is no such Service, or it has no address.
    pub fn reach(&self, site: &Site, namespace: &str, name: &str) -> Result<ReachableService> {
        let service: Value =
            serde_json::from_str(&self.get(&["-n", namespace, "get", "service", name, "-o", "json"])?)?;
        let address: Ipv4Addr = service["spec"]["clusterIP"].as_str().context("no address")?.parse()?;
        site.network().batch("ip", &format!("addr add {address}/32 dev bridge\n"))?;
        let network = Arc::clone(site.network());
        // Whatever connects, or starts kubectl, is in the site's network.
        let enter = move || network.enter().unwrap_or_else(|error| eprintln!("service: {error:#}"));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .on_thread_start(enter)
            .enable_all()
            .build()?;
        let endpoints = Arc::new(Endpoints {
            kubectl: self.programs().join("kubectl").into(),
            kubeconfig: self.admin().into(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            next: AtomicUsize::new(0),
        });
        for port in service["spec"]["ports"].as_array().context("no ports")? {
            let port = u16::try_from(port["port"].as_u64().context("a port without a number")?)?;
            let listener = site.network().within(|| {
                let listener = TcpListener::bind((address, port))?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            })?;
            let entered = runtime.enter();
            let listener = tokio::net::TcpListener::from_std(listener)?;
            drop(entered);
            runtime.spawn(pass_on(listener, Arc::clone(&endpoints), port));
        }
        Ok(ReachableService { runtime: Some(runtime) })
    }
}

/// Gives each connection to one of the pods; one that cannot be given ends.
async fn pass_on(listener: tokio::net::TcpListener, endpoints: Arc<Endpoints>, port: u16) {
    while let Ok((mut near, _)) = listener.accept().await {
        let endpoints = Arc::clone(&endpoints);
        tokio::spawn(async move {
            let chosen = tokio::task::spawn_blocking(move || endpoints.choose(port)).await;
            let Ok(Ok(pod)) = chosen else { return };
            if let Ok(mut far) = TcpStream::connect(pod).await {
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            }
        });
    }
}

impl Drop for ReachableService {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
