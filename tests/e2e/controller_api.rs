//! Real daemons and a controller's API: they join, become members of one swarm, take indexes, hold what they are to hold,
//! and go on when the controller is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hermes_controller::api::custody::Custody;
use hermes_controller::api::hub::Hub;
use hermes_controller::api::limits::ApiLimits;
use hermes_controller::api::numbers::{Numbers, Refusal};
use hermes_controller::api::review::tokens::TokenFile;
use hermes_controller::api::{Api, ApiParts};
use hermes_controller::artifacts::{ArtifactSettings, Artifacts, ImageRecord};
use hermes_controller::authority::folder::AuthorityFolder;
use hermes_controller::crd::SeedMode;
use hermes_controller::event::{
    Action, Audience as _, Event, ImageKey, ImageView, Name, Phase, ResolvedLayer, UnixMillis,
};
use hermes_controller::signing::{KeySet, Keys};
use hermes_image::access::Access;
use hermes_image::statement::Statement;
use hermes_origin::indexing::Artifact;
use hermes_snapshotter::index_folder::IndexFolder;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::FaultyRegistry;
use hermes_tests::guard::ScratchDir;
use hermes_tests::sample::{Sample, TAG};
use tokio::sync::mpsc;

/// Joining, a swarm's first exchange, and a whole image, where others compile.
const PATIENCE: Duration = Duration::from_secs(90);

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// A registry, a controller's API that has the index of its image, and where nodes are.
struct Rig {
    api: Option<Api>,
    hub: Arc<Hub>,
    events: mpsc::Receiver<Event>,
    numbers: Arc<Numbers>,
    view: ImageView,
    address: SocketAddr,
    registry: FaultyRegistry,
    sample: Sample,
    scratch: ScratchDir,
}

impl Rig {
    async fn new(name: &str) -> Result<Self> {
        let scratch = ScratchDir::new(name)?;
        let sample = Sample::new(&scratch.path().join("layout"))?;
        let built = sample.build_index(hermes(), &scratch.make("indexes")?)?;
        let registry = FaultyRegistry::start(sample.layout.dir())?;
        let keys = Keys::new(KeySet::new(UnixMillis(0)));
        let place = scratch.path().join("artifacts").display().to_string();
        let (artifacts, _) = Artifacts::open(&place, ArtifactSettings::default(), keys.clone(), UnixMillis(0)).await?;
        let view = keep(&artifacts, &IndexFolder::new(&built.folder), &built.key, &sample, &registry).await?;
        let tokens = scratch.path().join("tokens");
        fs::write(&tokens, "node-1 token-of-the-first-node\nnode-2 token-of-the-second-node\n")?;
        fs::set_permissions(&tokens, fs::Permissions::from_mode(0o600))?;
        let kept = AuthorityFolder::new(scratch.path().join("authority"));
        let authority = kept.load_or_create(&"prod".parse()?, hermes_p2p::unix_now())?;
        let hub = Arc::new(Hub::new(keys));
        let (tell, events) = mpsc::channel(256);
        let numbers = Arc::new(Numbers::default());
        let parts = ApiParts {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            custody: Arc::new(Custody::in_folder(authority, kept)),
            reviewer: Arc::new(TokenFile::new(tokens)),
            hub: Arc::clone(&hub),
            artifacts,
            events: tell,
            numbers: Arc::clone(&numbers),
            limits: ApiLimits::default(),
            page: None,
        };
        let api = Api::start(parts).await?;
        let address = api.address();
        Ok(Self { api: Some(api), hub, events, numbers, view, address, registry, sample, scratch })
    }

    fn publish(&self, change: impl FnOnce(&mut ImageView)) {
        let mut view = self.view.clone();
        change(&mut view);
        self.hub.hear(&Action::Publish(Arc::new(view)));
    }

    /// A daemon that is `node`, with this token.
    fn daemon(&self, node: &str, token: &str) -> Result<Daemon> {
        let token_file = self.scratch.path().join(format!("{node}.token"));
        fs::write(&token_file, format!("{token}\n"))?;
        let text = |path: PathBuf| path.display().to_string();
        let arguments = [
            ("--listen", format!("{}:0", Ipv4Addr::LOCALHOST)),
            ("--cluster", "prod".to_owned()),
            ("--controller", self.address.to_string()),
            ("--controller-ca", text(self.scratch.path().join("authority/ca.pem"))),
            ("--controller-token", text(token_file)),
            ("--node-name", node.to_owned()),
        ];
        let arguments: Vec<&str> = arguments.iter().flat_map(|(name, value)| [*name, value.as_str()]).collect();
        Daemon::start(hermes(), &self.scratch.path().join(node), &arguments)
    }

    /// Waits for a report of `node` that is as `wanted`.
    async fn reported(&mut self, node: &str, percent: Option<u8>) -> Result<()> {
        let manifest = self.view.image.manifest;
        let waiting = async {
            while let Some(event) = self.events.recv().await {
                let Event::Reported { node: name, report } = event else { continue };
                if name == node && percent.is_none_or(|percent| report.images.get(&manifest) == Some(&percent)) {
                    return Ok(());
                }
            }
            anyhow::bail!("the API has ended")
        };
        tokio::time::timeout(PATIENCE, waiting).await.with_context(|| format!("no such report of {node}"))?
    }

    /// Mounts the image without naming any key, index or peer, once the daemon has heard of it.
    async fn mount(&self, daemon: &Daemon, name: &str) -> Result<PathBuf> {
        let dir = self.scratch.make(name)?;
        let image = self.registry.image(TAG);
        let end = tokio::time::Instant::now() + PATIENCE;
        loop {
            let mut command = daemon.command(&["mount", &image]);
            let mounted = command.arg(&dir).arg("--no-build").output()?;
            if mounted.status.success() {
                return Ok(dir);
            }
            let said = String::from_utf8_lossy(&mounted.stderr).into_owned();
            ensure!(tokio::time::Instant::now() < end, "{said}\n{}", daemon.log());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Puts the index in `folder` where a controller keeps it.
async fn keep(
    artifacts: &Artifacts,
    folder: &IndexFolder,
    key: &str,
    sample: &Sample,
    registry: &FaultyRegistry,
) -> Result<ImageView> {
    let manifest = sample.image.manifest;
    let signed = folder.statement(manifest)?.context("the index has a statement")?;
    let built = Statement::open(&signed, manifest, &[key.parse()?])?;
    let image = ImageKey { manifest };
    let name = Name { reference: registry.image(TAG), platform: built.platform.clone() };
    let layers = built.layers.iter().map(|layer| ResolvedLayer {
        layer: layer.layer,
        diff_id: layer.diff_id,
        len_bytes: layer.blob_len_bytes,
    });
    let (layers, access) = (layers.collect(), Access::Public);
    let record = ImageRecord { image: image.clone(), name: name.clone(), layers, access, begun: UnixMillis(0) };
    artifacts.begin(record).await?;
    for layer in &built.layers {
        let one = |id| {
            let bytes = folder.artifact(id)?.context("the index has its artifacts")?;
            anyhow::Ok(Artifact { id, bytes })
        };
        let all = [one(layer.toc)?, one(layer.chunks)?, one(layer.seek)?, one(layer.windows)?];
        artifacts.put_layer(layer, all).await?;
    }
    let index = artifacts.finish(&built).await?;
    Ok(ImageView {
        image,
        names: BTreeSet::from([name]),
        policies: BTreeSet::new(),
        phase: Phase::Ready,
        failure: None,
        attempts: 1,
        next_attempt: None,
        image_len_bytes: index.image_len_bytes,
        read_bytes: 0,
        since: UnixMillis(0),
        index: Some(index),
        access,
        profile: None,
        seeds: BTreeMap::new(),
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_gets_its_index_through_the_api_and_goes_on_without_it() -> Result<()> {
    let mut rig = Rig::new("controller-api").await?;
    let daemon = rig.daemon("node-1", "token-of-the-first-node")?;
    rig.reported("node-1", None).await.with_context(|| daemon.log())?;
    rig.publish(|_| ());
    let dir = rig.mount(&daemon, "first").await?;
    rig.sample.check(&dir).with_context(|| daemon.log())?;
    ensure!(rig.numbers.artifact_bytes() > 0, "the index came from elsewhere\n{}", daemon.log());

    // Gone, for good: what is shown goes on, and so does what is known, also after a restart.
    rig.api.take().context("it runs")?.stop().await;
    let again = rig.mount(&daemon, "second").await?;
    rig.sample.check(&again)?;
    daemon.stop()?;
    let daemon = rig.daemon("node-1", "token-of-the-first-node")?;
    let dir = rig.mount(&daemon, "third").await?;
    rig.sample.check(&dir).with_context(|| daemon.log())?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_private_index_is_given_to_a_node_whose_registry_gives_it_the_image() -> Result<()> {
    let mut rig = Rig::new("controller-private").await?;
    let daemon = rig.daemon("node-1", "token-of-the-first-node")?;
    rig.reported("node-1", None).await.with_context(|| daemon.log())?;
    rig.publish(|view| view.access = Access::Private);
    // The registry answers, so the node is granted the layers, shows that, and is given statement and artifacts.
    let dir = rig.mount(&daemon, "image").await?;
    rig.sample.check(&dir).with_context(|| daemon.log())?;
    ensure!(rig.numbers.artifact_bytes() > 0, "the index came from elsewhere\n{}", daemon.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_of_a_controller_are_one_swarm_and_hold_what_it_says() -> Result<()> {
    let mut rig = Rig::new("controller-seed").await?;
    let first = rig.daemon("node-1", "token-of-the-first-node")?;
    let second = rig.daemon("node-2", "token-of-the-second-node")?;
    rig.reported("node-1", None).await.with_context(|| first.log())?;
    rig.reported("node-2", None).await.with_context(|| second.log())?;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    // Nobody has named one to the other, and there is no secret that both have.
    while first.status()?.peers.is_empty() {
        ensure!(tokio::time::Instant::now() < deadline, "they do not meet\n{}\n{}", first.log(), second.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    rig.publish(|view| view.seeds = BTreeMap::from([("node-2".to_owned(), SeedMode::Full)]));
    rig.reported("node-2", Some(100)).await.with_context(|| second.log())?;
    // What one holds the other reads, though the registry has it too.
    let dir = rig.mount(&first, "image").await?;
    rig.sample.check(&dir).with_context(|| first.log())?;
    let sources = first.sources()?;
    ensure!(sources.peer_bytes > 0, "{sources:?}\n{}", first.log());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_refused_works_alone() -> Result<()> {
    let rig = Rig::new("controller-refused").await?;
    rig.publish(|_| ());
    let daemon = rig.daemon("node-2", "token-of-the-first-node")?;
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while rig.numbers.refusals(Refusal::OtherNode) == 0 {
        ensure!(tokio::time::Instant::now() < deadline, "it is not refused\n{}", daemon.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Nobody trusts whoever made the index, so there is none; the node builds its own.
    let (dir, image) = (rig.scratch.make("image")?, rig.registry.image(TAG));
    let mounted = daemon.command(&["mount", &image]).arg(&dir).output()?;
    ensure!(mounted.status.success(), "{}\n{}", String::from_utf8_lossy(&mounted.stderr), daemon.log());
    rig.sample.check(&dir)?;
    ensure!(daemon.log().contains("another node's"), "the log does not say why\n{}", daemon.log());
    Ok(())
}
