//! Peers that lie, that have nothing, and that are slow, in front of a mounted image: readers get the right bytes from
//! elsewhere, and who lies is banned.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use hermes_image::ids::{ArtifactId, ChunkNo, DiffId, Digest};
use hermes_image::index::chunks::ChunkTable;
use hermes_image::runs::Runs;
use hermes_image::statement::Statement;
use hermes_p2p::{Content, Node, NodeConfig, OpenDesk};
use hermes_snapshotter::index_folder::IndexFolder;
use hermes_tests::daemon::{Daemon, HANG, Reading};
use hermes_tests::faulty::{Fault, FaultyRegistry};
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::sample::{Sample, SampleIndex, TAG};
use rustix::io::Errno;
use tokio::runtime::Runtime;

/// How long reads wait: far more than giving up a silent peer takes (2 s), so that only a hang reaches it.
const DEADLINE_MS: &str = "30000";
/// What the daemon logs when it bans.
const BANNED: &str = "a peer sent wrong bytes";

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// What a peer does that says it has everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lie {
    /// It gives chunks of the right length with other bytes.
    WrongBytes,
    /// It gives chunks of other lengths.
    WrongLengths,
    /// It has nothing.
    HasNothing,
    /// It never gets round to answering.
    Silent,
    /// It has no chunks, and gives windows of restart points of the right length with other bytes.
    WrongWindows,
}

/// What a liar gives to others.
struct Lies {
    lie: Lie,
    tables: Vec<ChunkTable>,
    windows: Vec<(ArtifactId, u64)>,
    ends: std::sync::Mutex<std::sync::mpsc::Receiver<()>>,
}

impl Content for Lies {
    fn have(&self, layer: DiffId, table: ArtifactId) -> Option<Runs> {
        if self.lie == Lie::WrongWindows {
            return None;
        }
        let table = self.tables.iter().find(|known| known.diff_id() == layer && known.id() == table)?;
        Some(Runs::one(0..table.count()))
    }

    fn chunk(&self, layer: DiffId, _: ArtifactId, chunk: ChunkNo) -> std::io::Result<Option<Bytes>> {
        let Some(table) = self.tables.iter().find(|known| known.diff_id() == layer) else { return Ok(None) };
        let range = table.range(chunk);
        let len = (range.end - range.start) as usize;
        Ok(match self.lie {
            Lie::WrongBytes => Some(vec![7; len].into()),
            Lie::WrongLengths => Some(vec![7; len / 2 + 1].into()),
            Lie::HasNothing | Lie::WrongWindows => None,
            Lie::Silent => {
                // Returns when the liar is dropped, which closes the channel.
                let _ = self.ends.lock().map(|ends| ends.recv());
                None
            }
        })
    }

    fn artifact(&self, id: ArtifactId) -> std::io::Result<Option<Bytes>> {
        let wanted = self.windows.iter().filter(|_| self.lie == Lie::WrongWindows).find(|(known, _)| *known == id);
        Ok(wanted.map(|(_, len_bytes)| vec![7; *len_bytes as usize].into()))
    }

    fn statement(&self, _: Digest) -> Option<Bytes> {
        None
    }
}

/// A real node of the swarm with made-up content.
struct Liar {
    address: String,
    id: String,
    _ends: std::sync::mpsc::SyncSender<()>,
    _node: Node,
    runtime: Option<Runtime>,
}

impl Liar {
    fn start(lie: Lie, rig: &Rig) -> Result<Self> {
        let (tell, ends) = std::sync::mpsc::sync_channel(1);
        let (tables, windows) = rig.tables()?;
        let content = Lies { lie, tables, windows, ends: std::sync::Mutex::new(ends) };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listen = "/ip4/127.0.0.1/tcp/0".parse().context("an address")?;
        let config = NodeConfig::new("default".parse()?, rig.scratch.path().join(format!("{lie:?}.key")), listen);
        let node = runtime.block_on(Node::start(config, Arc::new(content), Arc::new(OpenDesk)))?;
        let address = node.listen_addresses().first().context("it listens")?.to_string();
        let id = node.local_peer_id().to_string();
        Ok(Self { address, id, _ends: tell, _node: node, runtime: Some(runtime) })
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// An image, its index and its registry.
struct Rig {
    registry: FaultyRegistry,
    index: SampleIndex,
    sample: Sample,
    scratch: ScratchDir,
}

/// The windows of each layer, and their length in bytes.
type Windows = Vec<(ArtifactId, u64)>;

impl Rig {
    fn new() -> Result<Self> {
        let scratch = ScratchDir::new("peers")?;
        let sample = Sample::new(&scratch.path().join("layout"))?;
        let index = sample.build_index(hermes(), scratch.path())?;
        let registry = FaultyRegistry::start(sample.layout.dir())?;
        Ok(Self { registry, index, sample, scratch })
    }

    /// The chunk tables of all layers, and the windows of their restart points with their lengths in bytes.
    fn tables(&self) -> Result<(Vec<ChunkTable>, Windows)> {
        let folder = IndexFolder::new(&self.index.folder);
        let signed = folder.statement(self.sample.image.manifest)?.context("a statement")?;
        let statement = Statement::open(&signed, self.sample.image.manifest, &[self.index.key.parse()?])?;
        let table = |id| -> Result<ChunkTable> {
            let bytes = folder.artifact(id)?.context("a chunk table")?;
            Ok(ChunkTable::decode(bytes.into_inner())?)
        };
        let windows = |id| -> Result<_> { Ok((id, folder.artifact(id)?.context("windows")?.len() as u64)) };
        let tables = statement.layers.iter().map(|layer| table(layer.chunks)).collect::<Result<_>>()?;
        Ok((tables, statement.layers.iter().map(|layer| windows(layer.windows)).collect::<Result<_>>()?))
    }

    fn daemon(&self, name: &str) -> Result<Daemon> {
        Daemon::start(hermes(), &self.scratch.path().join(name), &["--read-deadline-ms", DEADLINE_MS])
    }

    /// Mounts the image with these peers.
    fn mount(&self, daemon: &Daemon, name: &str, peers: &[&str]) -> Result<PathBuf> {
        let dir = self.scratch.path().join(name);
        let peers: Vec<&str> = peers.iter().flat_map(|peer| ["--peer", peer]).collect();
        daemon.mount(&self.registry.image(TAG), &dir, &self.index, &peers)?;
        Ok(dir)
    }
}

fn assert_banned(daemon: &Daemon, liar: &Liar) -> Result<()> {
    ensure!(
        daemon.log().lines().any(|line| line.contains(BANNED) && line.contains(&liar.id)),
        "the log does not say that the liar is banned: {}",
        daemon.log()
    );
    wait_for("the end of the connection to the liar", HANG, || {
        daemon.status().ok().filter(|status| status.peers.iter().all(|peer| peer.id != liar.id))
    })?;
    Ok(())
}

fn right_bytes_from_the_registry(lie: Lie) -> Result<()> {
    let rig = Rig::new()?;
    let liar = Liar::start(lie, &rig)?;
    let daemon = rig.daemon("state")?;
    let dir = rig.mount(&daemon, "image", &[&liar.address])?;
    rig.sample.check(&dir).with_context(|| daemon.log())?;
    let sources = daemon.sources()?;
    ensure!(sources.peer_bytes == 0 && sources.registry_bytes > 0, "{sources:?}");
    match lie {
        Lie::WrongBytes | Lie::WrongLengths => assert_banned(&daemon, &liar)?,
        Lie::HasNothing | Lie::Silent | Lie::WrongWindows => {
            ensure!(!daemon.log().contains(BANNED), "{}", daemon.log())
        }
    }
    Ok(())
}

#[test]
fn wrong_bytes_are_read_elsewhere_and_ban() -> Result<()> {
    right_bytes_from_the_registry(Lie::WrongBytes)
}

#[test]
fn wrong_lengths_are_read_elsewhere_and_ban() -> Result<()> {
    right_bytes_from_the_registry(Lie::WrongLengths)
}

#[test]
fn a_peer_that_has_nothing_of_what_it_claims_costs_a_question() -> Result<()> {
    right_bytes_from_the_registry(Lie::HasNothing)
}

#[test]
fn a_silent_peer_is_given_up() -> Result<()> {
    right_bytes_from_the_registry(Lie::Silent)
}

/// With the registry gone, what a liar spoils an honest node gives.
#[test]
fn an_honest_peer_is_found_beside_a_liar() -> Result<()> {
    let rig = Rig::new()?;
    let honest = rig.daemon("honest")?;
    rig.sample.check(&rig.mount(&honest, "honest-image", &[])?)?;
    let address = honest.status()?.listen.first().cloned().context("it listens")?;
    let liar = Liar::start(Lie::WrongBytes, &rig)?;
    let daemon = rig.daemon("state")?;
    let dir = rig.mount(&daemon, "image", &[&liar.address, &address])?;
    rig.registry.always(Fault::Status(404));
    rig.sample.check(&dir).with_context(|| daemon.log())?;
    let sources = daemon.sources()?;
    ensure!(sources.registry_bytes == 0 && sources.peer_bytes > 0, "{sources:?}");
    Ok(())
}

/// The registry has the blob, a liar the only windows to decode it with: the liar is banned, the read fails well before
/// its deadline, and succeeds once an honest node has the windows.
#[test]
fn wrong_windows_ban_and_are_asked_for_elsewhere() -> Result<()> {
    let rig = Rig::new()?;
    let liar = Liar::start(Lie::WrongWindows, &rig)?;
    // Layers without windows share an empty blob.
    let (_, windows) = rig.tables()?;
    let windows = windows.into_iter().map(|(id, _)| id).collect::<BTreeSet<_>>();
    // An honest node that knows the index and has read nothing.
    let honest = rig.daemon("honest")?;
    rig.mount(&honest, "honest-image", &[])?;
    for id in &windows {
        std::fs::copy(rig.index.folder.join("artifacts").join(id.hex()), rig.scratch.path().join(id.hex()))?;
        std::fs::remove_file(rig.index.folder.join("artifacts").join(id.hex()))?;
    }
    let daemon = rig.daemon("state")?;
    let dir = rig.mount(&daemon, "image", &[&liar.address])?;
    let (read, took) = Reading::start(&dir.join("gzip/first")).end()?;
    ensure!(read.is_err(), "read with wrong windows");
    ensure!(took < Duration::from_secs(15), "it took {took:?}: {}", daemon.log());
    assert_banned(&daemon, &liar)?;
    for id in &windows {
        std::fs::copy(rig.scratch.path().join(id.hex()), rig.index.folder.join("artifacts").join(id.hex()))?;
    }
    // What the honest node reads it has in its store, for others.
    rig.sample.check_file(&rig.scratch.path().join("honest-image"), "gzip/small")?;
    for id in &windows {
        std::fs::remove_file(rig.index.folder.join("artifacts").join(id.hex()))?;
    }
    let address = honest.status()?.listen.first().cloned().context("it listens")?;
    let again = rig.mount(&daemon, "again", &[&address])?;
    rig.sample.check(&again).with_context(|| daemon.log())?;
    ensure!(daemon.sources()?.registry_bytes > 0, "{:?}", daemon.sources()?);
    Ok(())
}

/// When the last source has refused for good, nobody waits for the deadline.
#[test]
fn when_everybody_has_refused_a_read_fails_before_the_deadline() -> Result<()> {
    for lie in [Lie::WrongBytes, Lie::HasNothing] {
        let rig = Rig::new()?;
        let liar = Liar::start(lie, &rig)?;
        let daemon = rig.daemon("state")?;
        let dir = rig.mount(&daemon, "image", &[&liar.address])?;
        rig.registry.always(Fault::Status(404));
        let (read, took) = Reading::start(&dir.join("gzip/first")).end()?;
        let error = read.err().context("the read succeeds")?;
        ensure!(error.raw_os_error() == Some(Errno::IO.raw_os_error()), "{error}");
        ensure!(took < Duration::from_secs(15), "{lie:?}: it took {took:?}: {}", daemon.log());
        let wanted = ["a read failed", "no source can give the bytes", "check that the registry still has the layer"];
        let says = |line: &str| wanted.iter().all(|part| line.contains(part));
        // The reader has its answer before the line is written.
        let said = wait_for("the line about the read", Duration::from_secs(30), || {
            daemon.log().lines().any(says).then_some(())
        });
        said.with_context(|| daemon.log())?;
    }
    Ok(())
}
