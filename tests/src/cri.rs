//! Kubernetes' container runtime interface, as far as tests need it: asking containerd as a kubelet does. That is also
//! how containerd comes to tell a snapshotter which image a layer is of. Pods are in [`crate::pods`].
//!
//! Messages are those of `runtime.v1` of `cri-api`, with the fields that matter.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::runtime::Runtime;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

/// How long a call may take, on a machine that is busy with other tests.
const TIMEOUT: Duration = Duration::from_secs(60);

/// `ImageSpec`.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ImageSpec {
    #[prost(string, tag = "1")]
    pub(crate) image: String,
}

impl ImageSpec {
    pub(crate) fn of(image: &str) -> Option<Self> {
        Some(Self { image: image.to_owned() })
    }
}

#[derive(Clone, PartialEq, prost::Message)]
struct AuthConfig {
    #[prost(string, tag = "1")]
    username: String,
    #[prost(string, tag = "2")]
    password: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
    #[prost(message, optional, tag = "2")]
    auth: Option<AuthConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PullImageResponse {
    #[prost(string, tag = "1")]
    image_ref: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RemoveImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

/// An answer that says nothing, or nothing that is looked at.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Nothing {}

/// A connection to a runtime, for tests that wait for each answer.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    channel: Channel,
}

impl Cri {
    /// Connects to the runtime that listens on `socket`.
    ///
    /// # Errors
    /// When nobody answers.
    pub fn connect(socket: &Path) -> Result<Self> {
        Self::connect_within(TIMEOUT, socket)
    }

    /// The same, with another limit for each call.
    fn connect_within(timeout: Duration, socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?.timeout(timeout);
        let channel = runtime.block_on(endpoint.connect()).with_context(|| format!("connect {}", socket.display()))?;
        Ok(Self { runtime, channel })
    }

    /// Calls `method`, such as `ImageService/PullImage`.
    pub(crate) fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A>
    where
        Q: prost::Message + Default + 'static,
        A: prost::Message + Default + 'static,
    {
        self.runtime.block_on(async {
            let mut client = Grpc::new(self.channel.clone());
            client.ready().await?;
            let path = PathAndQuery::try_from(format!("/runtime.v1.{method}"))?;
            let codec: ProstCodec<Q, A> = ProstCodec::default();
            let answer = client.unary(tonic::Request::new(request), path, codec).await;
            Ok(answer.with_context(|| method.to_owned())?.into_inner())
        })
    }

    /// Pulls `image`.
    ///
    /// # Errors
    /// With what the runtime says.
    pub fn pull(&self, image: &str) -> Result<()> {
        self.pull_with(image, None)
    }

    /// Pulls `image` with a login, as a kubelet that has found one does.
    ///
    /// # Errors
    /// With what the runtime says.
    pub fn pull_as(&self, image: &str, user: &str, password: &str) -> Result<()> {
        self.pull_with(image, Some(AuthConfig { username: user.to_owned(), password: password.to_owned() }))
    }

    fn pull_with(&self, image: &str, auth: Option<AuthConfig>) -> Result<()> {
        let request = PullImageRequest { image: ImageSpec::of(image), auth };
        let pulled: Result<PullImageResponse> = self.call("ImageService/PullImage", request);
        pulled.map(drop).with_context(|| format!("pull {image}"))
    }

    /// Removes `image`; one that is not there is removed.
    ///
    /// # Errors
    /// With what the runtime says.
    pub fn remove_image(&self, image: &str) -> Result<()> {
        let request = RemoveImageRequest { image: ImageSpec::of(image) };
        let removed: Result<Nothing> = self.call("ImageService/RemoveImage", request);
        removed.map(drop).with_context(|| format!("remove {image}"))
    }
}

/// Pulls `image` through the runtime that listens on `socket`.
///
/// # Errors
/// With what the runtime says.
pub fn pull(socket: &Path, image: &str) -> Result<()> {
    Cri::connect(socket)?.pull(image)
}

/// The same for a client that gives up after `timeout`.
///
/// # Errors
/// With what the runtime says, or that it was given up.
pub fn pull_within(timeout: Duration, socket: &Path, image: &str) -> Result<()> {
    Cri::connect_within(timeout, socket)?.pull(image)
}
