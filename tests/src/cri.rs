//! The one call of Kubernetes' container runtime interface that tests need: pulling an image as a kubelet does, which is
//! when containerd tells a snapshotter which image a layer is of.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::Endpoint;
use tonic_prost::ProstCodec;

/// How long a pull may take, on a machine that is busy with other tests.
const PULL_TIMEOUT: Duration = Duration::from_secs(60);

/// `runtime.v1.ImageSpec` of `cri-api`, with the field that matters.
#[derive(Clone, PartialEq, prost::Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

/// `runtime.v1.PullImageRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

/// `runtime.v1.PullImageResponse`.
#[derive(Clone, PartialEq, prost::Message)]
struct PullImageResponse {
    #[prost(string, tag = "1")]
    image_ref: String,
}

/// Pulls `image` through the runtime that listens on `socket`.
///
/// # Errors
/// With what the runtime says.
pub fn pull(socket: &Path, image: &str) -> Result<()> {
    pull_within(PULL_TIMEOUT, socket, image)
}

/// The same for a client that gives up after `timeout`.
///
/// # Errors
/// With what the runtime says, or that it was given up.
pub fn pull_within(timeout: Duration, socket: &Path, image: &str) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?.timeout(timeout);
    runtime.block_on(async {
        let channel = endpoint.connect().await.with_context(|| format!("connect {}", socket.display()))?;
        let mut client = Grpc::new(channel);
        client.ready().await?;
        let request = PullImageRequest { image: Some(ImageSpec { image: image.to_owned() }) };
        let method = PathAndQuery::from_static("/runtime.v1.ImageService/PullImage");
        let codec: ProstCodec<PullImageRequest, PullImageResponse> = ProstCodec::default();
        let answer = client.unary(tonic::Request::new(request), method, codec).await;
        answer.with_context(|| format!("pull {image}")).map(drop)
    })
}
