//! Answering commands on the control socket.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hermes_store::Store;
use tokio::io::BufReader;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::mount::MOUNT_PIN;
use super::{Inner, LAYERS_FOLDER, NodeError};
use crate::control::{Answer, Failure, Request, read_line, write_line};
use crate::status::{ImageStatus, NodeStatus, PeerStatus, WaitingReads};

/// Commands that are answered at once; further ones wait in the socket's queue.
const REQUESTS_MAX: usize = 64;
/// Progress lines that wait for a slow client; when it is full, progress is dropped, never the work.
const PROGRESS_MAX: usize = 16;

/// Pause after a connection that could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers until the node is to end.
pub(super) async fn serve(inner: &Arc<Inner>, listener: &UnixListener) -> Result<(), NodeError> {
    let mut requests = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if requests.len() < REQUESTS_MAX => {
                match accepted {
                    Ok((stream, _)) => drop(requests.spawn(answer(Arc::clone(inner), stream))),
                    // Such as too many open files, which passes; ending would unmount everything.
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a command");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
            Some(ended) = requests.join_next() => {
                if matches!(ended, Ok(Ok(After::Shutdown))) {
                    return Ok(());
                }
            }
            () = inner.unused.notified(), if inner.config.exit_when_unused => {
                if inner.images.lock().await.is_empty() {
                    return Ok(());
                }
            }
        }
    }
}

/// What follows an answer.
enum After {
    Nothing,
    Shutdown,
}

async fn answer(inner: Arc<Inner>, stream: UnixStream) -> io::Result<After> {
    let (read, mut write) = stream.into_split();
    let mut read = BufReader::new(read);
    let Some(line) = read_line(&mut read).await? else { return Ok(After::Nothing) };
    let request = match serde_json::from_str::<Request>(&line) {
        Ok(request) => request,
        Err(error) => {
            let message = format!("the request is not understood: {error}; use the same version of both");
            let class = crate::control::FailureClass::Usage;
            write_line(&mut write, &Answer::Failed(Failure { message, class })).await?;
            return Ok(After::Nothing);
        }
    };
    let after = if request == Request::Shutdown { After::Shutdown } else { After::Nothing };
    let mounts = matches!(request, Request::Mount(_));
    // A mount that failed leaves a daemon unused as well.
    let unmounts = matches!(request, Request::Unmount { .. } | Request::Mount(_) | Request::Drain { unmount: true });
    let (progress, mut steps) = mpsc::channel(PROGRESS_MAX);
    let mut working = std::pin::pin!(inner.carry_out(request, progress));
    let last = loop {
        tokio::select! {
            biased;
            Some(step) = steps.recv() => write_line(&mut write, &step).await?,
            last = &mut working => break last,
        }
    };
    let last =
        last.unwrap_or_else(|error| Answer::Failed(Failure { message: error.to_string(), class: error.class() }));
    write_line(&mut write, &last).await?;
    // A node that was started for a mount which failed has nothing to do either.
    if unmounts || (mounts && matches!(last, Answer::Failed(_))) {
        inner.unused.notify_one();
    }
    Ok(after)
}

impl Inner {
    async fn carry_out(
        self: &Arc<Self>,
        request: Request,
        progress: mpsc::Sender<Answer>,
    ) -> Result<Answer, NodeError> {
        match request {
            Request::Mount(request) => self.mount(request, progress).await,
            Request::Unmount { dir } => self.unmount(&dir).await.map(|()| Answer::Done),
            Request::Complete { image, dir } => self.complete(&image, &dir, progress).await.map(|()| Answer::Done),
            Request::PauseCompletion { paused } => self.completion.pause(paused).map(|()| Answer::Done),
            Request::Status => Ok(Answer::Status(Box::new(self.status().await))),
            Request::Waiting => Ok(Answer::Waiting { reads: self.waiting().await }),
            Request::Trace { image, dir } => self.trace(&image, &dir).await.map(|trace| Answer::Trace(Box::new(trace))),
            Request::Profile { image, dir, files } => {
                self.profile_report(&image, &dir, files).await.map(|report| Answer::Profile(Box::new(report)))
            }
            Request::ImportProfile { image, dir, profile } => {
                self.import_profile(&image, &dir, &profile).await.map(|()| Answer::Done)
            }
            Request::Peers => Ok(Answer::Peers { peers: self.peer_details().await }),
            Request::LogLevel { filter } => match crate::telemetry::reload(&filter) {
                Ok(()) => {
                    tracing::warn!(%filter, "the log's filter was changed");
                    Ok(Answer::Done)
                }
                Err(message) => {
                    let class = crate::control::FailureClass::Usage;
                    Ok(Answer::Failed(Failure { message, class }))
                }
            },
            Request::Members => Ok(self.members()),
            Request::RevokeMember { peer } => self.revoke_member(&peer).await,
            Request::DrainMember { drain } => {
                self.drain_member(drain);
                Ok(Answer::Done)
            }
            Request::Drain { unmount } => self.drain(unmount).await.map(|in_use| Answer::Drained { in_use }),
            Request::Shutdown => {
                // Others stop asking this node for what they would have to ask somebody else for in a moment.
                self.drain_member(true);
                Ok(Answer::Done)
            }
        }
    }

    async fn status(&self) -> NodeStatus {
        let images = self.images.lock().await;
        let images = images.iter().map(|image| {
            let mut status = ImageStatus {
                reference: image.reference.clone(),
                manifest: image.manifest,
                chain: image.chain,
                dir: image.dir.display().to_string(),
                way: image.way,
                layers: image.layers.len(),
                tree_path: image.tree_path.clone(),
                layer_paths: image.layers.iter().map(|layer| layer.layer.path().to_owned()).collect(),
                total_bytes: 0,
                present_bytes: 0,
                sources: crate::status::BySource::default(),
                start: image.start.as_ref().map(super::RunningStart::status),
                completion: self.completion.state_of(image.number, &image.layers),
            };
            for layer in &image.layers {
                status.total_bytes += layer.layer.table().logical_len_bytes();
                status.present_bytes += layer.layer.present_bytes();
                status.sources.add(layer.counters.snapshot());
            }
            status
        });
        let waiting = self.fetch.status().await;
        NodeStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            peer_id: Some(self.peers.local_peer_id().to_string()),
            listen: self.peers.listen_addresses().iter().map(ToString::to_string).collect(),
            ways: self.ways.status(),
            images: images.collect(),
            pulls: self.pulls.lock().iter().cloned().collect(),
            first_pulls: self.first_pulls.status(),
            waiting: WaitingReads { demand: waiting.waiting_demand as u64, prefetch: waiting.waiting_prefetch as u64 },
            peers: self.peers.peers().into_iter().map(|peer| PeerStatus { id: peer.to_string() }).collect(),
            store_bytes: self.store.layers().iter().map(|layer| layer.present_bytes()).sum(),
            store_budget_bytes: self.config.store_budget_bytes,
            completion: self.completion.status(),
            memory_bytes: hermes_metrics::resident_bytes(),
        }
    }
}

/// Unpins the images of earlier daemons that are mounted no more. Those whose tree the kernel still shows stay pinned:
/// their processes read the store's files, and nobody here knows until when.
pub(super) fn unpin_what_is_gone(store: &Store) -> Result<(), NodeError> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for (manifest, owner) in store.pins()? {
        if owner != MOUNT_PIN {
            continue;
        }
        let tree = store.image(manifest)?.and_then(|record| record.tree);
        let shown = tree.is_some_and(|tree| mounts.contains(&tree.hex()));
        if !shown {
            store.unpin(manifest, MOUNT_PIN)?;
        }
    }
    Ok(())
}

/// Lets root alone open the socket: whoever can talk to it can mount.
pub(super) fn only_for_root(socket: &Path) -> io::Result<()> {
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))
}

/// Unmounts what a daemon that was killed left below the state folder, except for the layer files if their connection
/// was kept. What it left elsewhere is cleared away by its record.
pub(super) fn clear_leftovers(state: &Path, keeps_layers: bool) {
    for name in ["probe", LAYERS_FOLDER].into_iter().filter(|name| !(keeps_layers && *name == LAYERS_FOLDER)) {
        let path = state.join(name);
        // A dead FUSE mount cannot even be looked at, so unmounting is simply tried.
        while rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH).is_ok() {
            tracing::warn!(path = %path.display(), "cleared away what an earlier daemon left mounted");
        }
    }
}
