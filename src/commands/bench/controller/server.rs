//! The controller's side: a real API over made-up images.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use hermes_controller::api::custody::Custody;
use hermes_controller::api::hub::Hub;
use hermes_controller::api::limits::ApiLimits;
use hermes_controller::api::numbers::Numbers;
use hermes_controller::api::review::Viewers;
use hermes_controller::api::review::tokens::TokenFile;
use hermes_controller::api::{Api, ApiParts};
use hermes_controller::artifacts::{ArtifactSettings, Artifacts};
use hermes_controller::authority::folder::AuthorityFolder;
use hermes_controller::clock;
use hermes_controller::event::{Action, Audience as _, ImageKey, ImageView, Name, Phase, ReadyIndex, UnixMillis};
use hermes_controller::page::{Board, Page};
use hermes_controller::signing::{KeySet, Keys};
use hermes_image::access::Access;
use hermes_image::ids::{ArtifactId, DiffId, Digest, LayerId};
use hermes_image::statement::{LayerStatement, Statement};
use tokio::sync::mpsc;

use super::made_up;
use super::nodes::{CLUSTER, TOKEN, TOKENS_FILE};

/// Layers of each image.
const LAYERS: u32 = 10;

/// Serves until its input ends. Each line of it is a number, and the image of that number becomes ready.
pub(super) async fn run(folder: &Path, nodes: u32, images: u32, has_page: bool) -> anyhow::Result<()> {
    let tokens = folder.join(TOKENS_FILE);
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&tokens)?;
    std::io::Write::write_all(&mut file, format!("* {TOKEN}\n").as_bytes())?;
    let kept = AuthorityFolder::new(folder.join("authority"));
    let authority = kept.load_or_create(&CLUSTER.parse()?, hermes_p2p::unix_now())?;
    let keys = Keys::new(KeySet::new(UnixMillis(0)));
    let place = folder.join("artifacts").display().to_string();
    let (artifacts, _) = Artifacts::open(&place, ArtifactSettings::default(), keys.clone(), UnixMillis(0)).await?;
    let hub = Arc::new(Hub::new(keys.clone()));
    let board = Arc::new(Board::new(clock::now()));
    for number in 0..images {
        let mut view = view(&keys, number);
        if has_page {
            made_up::change(&mut view, number);
            board.hear(&Action::Publish(Arc::new(view.clone())));
        }
        if view.phase == Phase::Ready {
            hub.hear(&Action::Publish(Arc::new(view)));
        }
    }
    let (events, mut heard) = mpsc::channel(1024);
    // Nobody decides anything here.
    let hearing = Arc::clone(&board);
    tokio::spawn(async move {
        while let Some(event) = heard.recv().await {
            hearing.learn(&event);
        }
    });
    let limits = ApiLimits { connections_max: 2 * nodes as usize + 1000, ..ApiLimits::default() };
    let (reviewer, numbers) = (Arc::new(TokenFile::new(tokens)), Arc::new(Numbers::default()));
    if has_page {
        made_up::history(&board, clock::now(), nodes);
        made_up::policies(&board)?;
    }
    let page = has_page.then(|| {
        let viewers = Arc::clone(&reviewer) as Arc<dyn Viewers>;
        Arc::new(Page::new(CLUSTER, board, viewers, Arc::clone(&numbers)))
    });
    let parts = ApiParts {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        custody: Arc::new(Custody::in_folder(authority, kept)),
        reviewer,
        hub: Arc::clone(&hub),
        artifacts,
        events,
        numbers,
        limits,
        page,
    };
    let api = Api::start(parts).await?;
    println!("{}", api.address());
    let told = tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
        for line in std::io::stdin().lines() {
            // Beside those from the start.
            let view = Arc::new(view(&keys, 1_000_000 + line?.trim().parse::<u32>()?));
            let at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos();
            hub.hear(&Action::Publish(Arc::clone(&view)));
            println!("{} {at}", hex::encode(view.image.manifest.0));
        }
        Ok(())
    });
    told.await??;
    api.stop().await;
    Ok(())
}

/// Bytes that no other call gives.
fn name(number: u32, part: u32) -> [u8; 32] {
    let mut bytes = [0x5a; 32];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    bytes[4..8].copy_from_slice(&part.to_be_bytes());
    bytes
}

/// The digest of an image's manifest.
pub(super) fn manifest(number: u32) -> Digest {
    Digest(name(number, u32::MAX))
}

fn view(keys: &Keys, number: u32) -> ImageView {
    let manifest = manifest(number);
    let artifact = |part| ArtifactId(name(number, part));
    let layers = (0..LAYERS).map(|layer| LayerStatement {
        layer: LayerId(name(number, layer)),
        diff_id: DiffId(name(number, 100 + layer)),
        blob_len_bytes: 30_000_000,
        logical_len_bytes: 100_000_000,
        toc: artifact(1000 + layer),
        chunks: artifact(2000 + layer),
        seek: artifact(3000 + layer),
        windows: artifact(4000 + layer),
    });
    let layers: Vec<_> = layers.collect();
    let artifacts = layers.iter().flat_map(|layer| [layer.toc, layer.chunks, layer.seek, layer.windows]).collect();
    let platform = "linux/amd64".to_owned();
    let statement = Statement::new(manifest, platform.clone(), layers);
    let reference = format!("registry.example/team/application-{number}:1.0");
    ImageView {
        image: ImageKey { manifest },
        names: BTreeSet::from([Name { reference, platform }]),
        policies: BTreeSet::from(["all".to_owned()]),
        phase: Phase::Ready,
        failure: None,
        attempts: 1,
        next_attempt: None,
        image_len_bytes: 300_000_000,
        read_bytes: 0,
        since: UnixMillis(0),
        index: Some(ReadyIndex {
            statement: keys.sign(&statement).into(),
            artifacts,
            index_len_bytes: 3_000_000,
            image_len_bytes: 300_000_000,
        }),
        access: Access::Public,
        profile: None,
        seeds: BTreeMap::new(),
    }
}
