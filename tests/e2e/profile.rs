//! Profiles end to end: a start is recorded, the next node fetches ahead by it and its readers wait for nothing; nothing of
//! it is needed, and none of it can do harm.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use hermes_policy::profile::{Profile, Step, codec};
use hermes_snapshotter::index_folder::IndexFolder;
use hermes_snapshotter::status::{ImageTrace, ProfileOrigin, ProfileReport, StartStatus, Way};
use hermes_tests::compress::Compression;
use hermes_tests::cri::Cri;
use hermes_tests::daemon::{Daemon, HANG, Reading};
use hermes_tests::faulty::{Fault, FaultyRegistry};
use hermes_tests::guard::{ScratchDir, wait_for};
use hermes_tests::images::{RealImage, TAG as REAL_TAG};
use hermes_tests::layout::{Layout, NewLayer};
use hermes_tests::node::{Index, Mount, TestNode};
use hermes_tests::runnable::LARGE;
use hermes_tests::sample::{SampleIndex, content};
use hermes_tests::stage::{Stage, last_pull};
use hermes_tests::tarball::{Entry, Tarball};
use serde_json::json;

/// Files of the base layer, in both versions.
const BASE: &[(&str, u64)] = &[("base/first", 6_000_000), ("base/second", 3_000_000), ("base/unread", 9_000_000)];
/// Files of the first version's own layer.
const FIRST: &[(&str, u64)] = &[("app/same", 2_500_000), ("app/changed", 1_000_000), ("app/unread", 4_000_000)];
/// Files of the second version's: one is the same, one has the same name alone.
const SECOND: &[(&str, u64)] = &[("app/new", 700_000), ("app/same", 2_500_000), ("app/changed", 1_100_000)];
/// What a start reads, in its order.
const READ: &[&str] = &["base/second", "app/same", "base/first"];

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// Two versions of an image behind a registry, with their indexes.
struct Versions {
    scratch: ScratchDir,
    registry: FaultyRegistry,
    index: SampleIndex,
}

impl Versions {
    fn new(name: &str) -> Result<Self> {
        let scratch = ScratchDir::new(name)?;
        let layout = Layout::create(&scratch.path().join("layout"))?;
        let layer = |files: &[(&str, u64)]| NewLayer {
            tar: Tarball::of(files.iter().map(|(name, len)| Entry::file(name, content(name, *len)))),
            compression: Compression::Gzip(1),
        };
        let base = layout.put_layer(&layer(BASE))?;
        for (tag, files) in [("v1", FIRST), ("v2", SECOND)] {
            let own = layout.put_layer(&layer(files))?;
            layout.add_stored(tag, &[base.clone(), own], &json!({}))?;
        }
        let registry = FaultyRegistry::start(layout.dir())?;
        let folder = scratch.path().join("index");
        let index = ["v1", "v2"].map(|tag| Index::build(hermes(), &registry.image(tag), &folder));
        let [Ok(index), Ok(_)] = index else { anyhow::bail!("an index is not built: {index:?}") };
        Ok(Self { scratch, registry, index: SampleIndex { folder: index.folder, key: index.key } })
    }

    /// Starts a daemon of its own that is to show trees over FUSE.
    fn daemon(&self, name: &str) -> Result<Daemon> {
        let state = self.scratch.path().join(name).join("state");
        fs::create_dir_all(&state)?;
        Daemon::start(hermes(), &state, &["--way", "fuse-tree", "--listen", "127.0.0.1:0"])
    }

    fn mount(&self, daemon: &Daemon, name: &str, tag: &str, more: &[&str]) -> Result<PathBuf> {
        let dir = self.scratch.path().join(name).join(tag);
        daemon.mount(&self.registry.image(tag), &dir, &self.index, more)?;
        Ok(dir)
    }

    /// A node that has recorded one start of the first version, which has ended.
    fn recorded(&self, name: &str) -> Result<Daemon> {
        let daemon = self.daemon(name)?;
        let dir = self.mount(&daemon, name, "v1", &[])?;
        read(&dir, READ)?;
        unmount(&daemon, &dir)?;
        Ok(daemon)
    }

    fn report(&self, daemon: &Daemon, tag: &str, command: &str) -> Result<ProfileReport> {
        let output = daemon.run(&["profile", command, &self.registry.image(tag), "--json"])?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

/// Reads `files` below `dir`, one after another, and checks every byte.
fn read(dir: &Path, files: &[&str]) -> Result<()> {
    let all = [BASE, FIRST, SECOND].concat();
    for file in files {
        // Versions have files of one name and different lengths: the tree says which it is.
        let len = fs::metadata(dir.join(file))?.len();
        ensure!(all.contains(&(file, len)), "{file} has {len} bytes");
        let (bytes, _) = Reading::start(&dir.join(file)).end()?;
        ensure!(bytes? == content(file, len), "{file} came wrong");
    }
    Ok(())
}

fn unmount(daemon: &Daemon, dir: &Path) -> Result<()> {
    let dir = dir.to_str().context("UTF-8")?;
    let output = daemon.run(&["unmount", dir])?;
    ensure!(output.status.success(), "unmount: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The start of the only mounted image, once its prefetch has ended.
fn fetched_ahead(daemon: &Daemon) -> Result<StartStatus> {
    let ended =
        || daemon.status().ok()?.images.into_iter().next()?.start.filter(|start| start.prefetch_ended.is_some());
    wait_for("the end of the prefetch", HANG, ended).with_context(|| daemon.log())
}

fn total(files: &[&str]) -> u64 {
    let all = [BASE, FIRST].concat();
    all.iter().filter(|(name, _)| files.contains(name)).map(|(_, len)| len).sum()
}

#[test]
fn a_start_is_recorded_and_the_next_one_elsewhere_waits_for_nothing() -> Result<()> {
    let versions = Versions::new("profile")?;
    let first = versions.recorded("first")?;
    let report = versions.report(&first, "v1", "explain")?;
    ensure!((report.origin, report.records, report.starts.len()) == (Some(ProfileOrigin::Own), 1, 1), "{report:?}");
    let bytes: u64 = report.steps.iter().map(|step| step.bytes).sum();
    // A chunk at either end of a file may hold the next one's beginning.
    let read_bytes = total(READ);
    ensure!((read_bytes..read_bytes + read_bytes / 10).contains(&bytes), "{bytes} bytes in the profile");
    let files: Vec<&str> = report.steps.iter().flat_map(|step| &step.files).map(String::as_str).collect();
    let place = |name: &str| files.iter().position(|file| file.ends_with(name)).with_context(|| format!("{files:?}"));
    ensure!(place("base/second")? < place("app/same")? && place("app/same")? < place("base/first")?, "{files:?}");
    ensure!(report.touches.iter().all(|touch| touch.source == "registry"), "{:?}", report.touches);
    ensure!(report.starts[0].waited_bytes > 0, "{:?}", report.starts);

    // From the registry, by a profile that lies in the folder of indexes: no swarm is needed.
    let folder = &versions.index.folder;
    let arguments = ["profile", "export", &versions.registry.image("v1"), "--output"];
    let output = first.run(&[&arguments[..], &[folder.to_str().context("UTF-8")?]].concat())?;
    ensure!(output.status.success(), "export: {}", String::from_utf8_lossy(&output.stderr));
    let second = versions.daemon("second")?;
    let dir = versions.mount(&second, "second", "v1", &[])?;
    let start = fetched_ahead(&second)?;
    ensure!(start.profile == Some(ProfileOrigin::Given), "{start:?}");
    // What lies in the same spans as something else of the profile comes without being asked for.
    ensure!((bytes * 9 / 10..=bytes).contains(&start.prefetched_bytes), "{start:?}, {bytes} bytes in the profile");
    ensure!(start.used_bytes == 0 && start.prefetch_ended.as_deref() == Some("done"), "{start:?}");
    // Whoever waited for anything now would wait for ever.
    versions.registry.always(Fault::Hang);
    read(&dir, READ)?;
    versions.registry.always(Fault::Pass);
    let used = second.status()?.images[0].start.clone().context("a start")?.used_bytes;
    ensure!(used == start.prefetched_bytes, "{used} of {start:?} were used");
    read(&dir, &["base/unread"])?;
    unmount(&second, &dir)?;
    let own = versions.report(&second, "v1", "show")?;
    ensure!((own.starts.len(), own.origin) == (1, Some(ProfileOrigin::Own)), "{own:?}");
    ensure!(own.starts[0].waited_bytes < own.starts[0].bytes, "{:?}", own.starts);
    second.stop()?;
    first.stop().map(drop)
}

#[test]
fn a_profile_comes_from_a_peer_and_so_do_the_bytes() -> Result<()> {
    let versions = Versions::new("profile-peer")?;
    let first = versions.recorded("first")?;
    let peer = wait_for("an address", HANG, || first.status().ok()?.listen.into_iter().next())?;
    let second = versions.daemon("second")?;
    let before = versions.registry.blob_log().len();
    let dir = versions.mount(&second, "second", "v1", &["--peer", &peer])?;
    let start = fetched_ahead(&second)?;
    ensure!(start.profile == Some(ProfileOrigin::Given), "{start:?}");
    ensure!(start.prefetched_bytes >= total(READ), "{start:?}");
    let sources = second.sources()?;
    ensure!((sources.registry_wire_bytes, sources.peer_bytes) == (0, start.prefetched_bytes), "{sources:?}");
    // The image's configuration alone.
    ensure!(versions.registry.blob_log().len() <= before + 1, "{:?}", versions.registry.blob_log());
    versions.registry.always(Fault::Hang);
    read(&dir, READ)?;
    versions.registry.always(Fault::Pass);
    read(&dir, &["app/unread"])?;
    second.stop()?;
    first.stop().map(drop)
}

#[test]
fn the_next_version_starts_by_the_profile_of_the_last_one() -> Result<()> {
    let versions = Versions::new("profile-version")?;
    let daemon = versions.recorded("node")?;
    let dir = versions.mount(&daemon, "node", "v2", &[])?;
    let start = fetched_ahead(&daemon)?;
    ensure!(start.profile == Some(ProfileOrigin::EarlierVersion), "{start:?}");
    // What was read of the base layer is here; of the file that did not change the chunks have their names, and are copied.
    versions.registry.always(Fault::Hang);
    read(&dir, READ)?;
    versions.registry.always(Fault::Pass);
    read(&dir, &["app/new", "app/changed"])?;
    daemon.stop().map(drop)
}

/// Most chunks of a layer that was rebuilt are those of the last version's, which others have under its name.
#[test]
fn what_did_not_change_comes_from_who_has_the_last_version() -> Result<()> {
    let versions = Versions::new("profile-donor")?;
    let first = versions.recorded("first")?;
    let peer = wait_for("an address", HANG, || first.status().ok()?.listen.into_iter().next())?;
    let v1 = versions.registry.image("v1");
    let file = versions.scratch.path().join("profile");
    let file = file.to_str().context("UTF-8")?;
    let output = first.run(&["profile", "export", &v1, "--output", file])?;
    ensure!(output.status.success(), "export: {}", String::from_utf8_lossy(&output.stderr));
    // It knows the old version, and has nothing of it.
    let second = versions.daemon("second")?;
    let dir = versions.mount(&second, "second", "v1", &[])?;
    let output = second.run(&["profile", "import", &v1, file])?;
    ensure!(output.status.success(), "import: {}", String::from_utf8_lossy(&output.stderr));
    unmount(&second, &dir)?;
    let dir = versions.mount(&second, "second", "v2", &["--peer", &peer])?;
    let start = fetched_ahead(&second)?;
    ensure!(start.profile == Some(ProfileOrigin::EarlierVersion), "{start:?}");
    let sources = second.sources()?;
    ensure!((sources.registry_wire_bytes, sources.peer_bytes) == (0, start.prefetched_bytes), "{sources:?}");
    versions.registry.always(Fault::Hang);
    read(&dir, READ)?;
    versions.registry.always(Fault::Pass);
    read(&dir, &["app/new", "app/changed"])?;
    // The first file is in no old version; of the other one most is, and the peer may have some.
    ensure!(second.sources()?.registry_bytes >= 700_000, "{:?}", second.sources()?);
    second.stop()?;
    first.stop().map(drop)
}

#[test]
fn a_crash_loses_the_record_under_way_and_no_other() -> Result<()> {
    let versions = Versions::new("profile-crash")?;
    let daemon = versions.recorded("node")?;
    let known = versions.report(&daemon, "v1", "show")?;
    let dir = versions.mount(&daemon, "node", "v1", &[])?;
    read(&dir, &["base/unread"])?;
    ensure!(daemon.status()?.images[0].start.as_ref().is_some_and(|start| start.recording), "it is recorded");
    daemon.kill(versions.scratch.path())?;
    let daemon = versions.daemon("node")?;
    let report = versions.report(&daemon, "v1", "show")?;
    ensure!((&report.starts, &report.steps) == (&known.starts, &known.steps), "{report:?}");
    let dir = versions.mount(&daemon, "node", "v1", &[])?;
    read(&dir, READ)?;
    unmount(&daemon, &dir)?;
    ensure!(versions.report(&daemon, "v1", "show")?.starts.len() == 2, "recording goes on");
    daemon.stop().map(drop)
}

#[test]
fn a_wrong_profile_costs_bytes_at_most() -> Result<()> {
    let versions = Versions::new("profile-wrong")?;
    let first = versions.recorded("first")?;
    let report = versions.report(&first, "v1", "show")?;
    let good = codec::decode(&hex::decode(&report.encoded)?)?;
    first.stop()?;
    let folder = IndexFolder::new(&versions.index.folder);
    // Everything, with chunks and layers that there are not; then nothing that anybody can read.
    let step = |layer, chunks| Step { layer, chunks, at_ms: 0, weight: 100, spread_ms: 0 };
    let mut layers = good.layers.clone();
    layers.push(hermes_image::ids::DiffId([7; 32]));
    let steps = (0..layers.len() as u16).map(|layer| step(layer, 0..70_000)).collect();
    let hostile = Profile { records: 255, newest_seconds: u64::MAX, layers, steps, donors: Vec::new() };
    for (name, bytes) in [("hostile", codec::encode(&hostile)), ("garbage", b"HPRF\x01\xff\xff".to_vec())] {
        folder.put_profile(report.manifest, &bytes)?;
        let daemon = versions.daemon(name)?;
        let dir = versions.mount(&daemon, name, "v1", &[])?;
        read(&dir, READ)?;
        read(&dir, &["base/unread", "app/changed", "app/unread"])?;
        let refused = daemon.run(&["profile", "import", &versions.registry.image("v1"), "Cargo.toml"])?;
        ensure!(!refused.status.success(), "{refused:?}");
        daemon.stop()?;
    }
    Ok(())
}

#[test]
fn a_container_of_containerd_is_recorded() -> Result<()> {
    let stage = Stage::new(hermes(), "2")?;
    // What is complete is read without the daemon in the kernel's way, and then there is nothing to record.
    let daemon = stage.daemon(&["--way", "fuse-tree"])?;
    let containerd = stage.host.start()?;
    let image = stage.registry.image("v1");
    Cri::connect(&containerd.socket())?.pull(&image)?;
    let decided = last_pull(daemon.status()?).with_context(|| daemon.log())?;
    ensure!(decided.decision == "lazy", "{decided:?}");
    containerd.once(&image, &format!("cksum < /{}", LARGE.0))?;
    containerd.remove_all_images()?;
    wait_for("the end of all trees", HANG, || (stage.trees().ok()? == 0).then_some(()))?;
    let recorded = || {
        let output = daemon.run(&["profile", "explain", &image, "--json"]).ok()?;
        serde_json::from_slice::<ProfileReport>(&output.stdout).ok().filter(|report| !report.starts.is_empty())
    };
    let report = wait_for("the record", HANG, recorded).with_context(|| daemon.log())?;
    ensure!(report.starts[0].bytes >= LARGE.1, "{:?}", report.starts);
    let names: Vec<&String> = report.steps.iter().flat_map(|step| &step.files).collect();
    ensure!(names.iter().any(|name| name.ends_with(LARGE.0)), "{names:?}");
    drop(containerd);
    daemon.stop().map(drop)
}

/// A real image, in the kernel's way: the second node, beside the first, has what its readers want before they want it.
#[test]
fn a_real_image_is_fetched_ahead_from_a_warm_peer() -> Result<()> {
    let layout = RealImage::Web.layout()?;
    let scratch = ScratchDir::new("profile-real")?;
    let source = format!("oci:{}:{REAL_TAG}", layout.dir().display());
    let index = Index::build(hermes(), &source, &scratch.make("indexes")?)?;
    let way = Some(Way::ErofsFuse);
    let mount = Mount { image: &source, way, index_folder: Some(&index.folder), trusted_key: &index.key, peers: &[] };
    let first = TestNode::start(hermes(), "first")?;
    let dir = first.mount("image", &mount)?;
    let files = some_files(&dir)?;
    let expected: Vec<Vec<u8>> = files.iter().map(|file| Ok(fs::read(dir.join(file))?)).collect::<Result<_>>()?;
    first.unmount(&dir)?;
    let peers = wait_for("an address", HANG, || {
        first.status().ok().map(|status| status.listen).filter(|listen| !listen.is_empty())
    })?;

    let second = TestNode::start(hermes(), "second")?;
    let dir = second.mount("image", &Mount { index_folder: None, peers: &peers, ..mount })?;
    let start = wait_for("the end of the prefetch", HANG, || {
        second.image(&dir).ok()?.start.filter(|start| start.prefetch_ended.is_some())
    })?;
    for (file, expected) in files.iter().zip(&expected) {
        ensure!(&fs::read(dir.join(file))? == expected, "{} came wrong", file.display());
    }
    let status = second.image(&dir)?;
    ensure!(status.sources.registry_bytes == 0, "{status:?}");
    let output = hermes_tests::command::run(
        std::process::Command::new(hermes()).args(["trace", "--json", "--state"]).arg(second.state()).arg(&dir),
    )?;
    let trace: ImageTrace = serde_json::from_slice(&output)?;
    let waited: u64 = trace.asks.iter().filter(|ask| ask.demand).map(|ask| ask.bytes).sum();
    println!("{} bytes ahead, {waited} on demand", start.prefetched_bytes);
    ensure!(waited * 20 <= start.prefetched_bytes, "{waited} of {start:?} came on demand");
    Ok(())
}

/// Some regular files of an image: every seventh, up to 40 MB of them.
fn some_files(root: &Path) -> Result<Vec<PathBuf>> {
    let (mut folders, mut files, mut bytes) = (vec![root.to_owned()], Vec::new(), 0);
    while let Some(folder) = folders.pop() {
        let mut entries = fs::read_dir(&folder)?.collect::<std::io::Result<Vec<_>>>()?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for (no, entry) in entries.iter().enumerate() {
            let metadata = entry.path().symlink_metadata()?;
            if metadata.is_dir() {
                folders.push(entry.path());
            } else if metadata.is_file() && no % 7 == 0 && bytes < 40_000_000 {
                bytes += metadata.len();
                files.push(entry.path().strip_prefix(root)?.to_owned());
            }
        }
    }
    Ok(files)
}
