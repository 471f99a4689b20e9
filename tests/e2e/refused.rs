//! Images that cannot be shown lazily, for every reason that there is: containerd pulls them as ever, at once, containers
//! run, and people are told why. Beside each stands the same pull by a containerd without Hermes.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hermes_image::ids::Digest;
use hermes_tests::compress::Compression;
use hermes_tests::containerds::{Host, RunningContainerd};
use hermes_tests::cri::Cri;
use hermes_tests::daemon::Daemon;
use hermes_tests::faulty::{Fault, FaultyRegistry};
use hermes_tests::layout::{Layout, NewLayer};
use hermes_tests::node::Index;
use hermes_tests::sample::content;
use hermes_tests::stage::Stage;
use hermes_tests::tarball::{Entry, Tarball};
use hermes_tests::{runnable, web};
use serde_json::{Value, json};

/// The line of containerd.
const LINE: &str = "1.7";
/// A layer that most images have: larger than what a client would throw away of a registry that ignores ranges.
const LARGE_LEN_BYTES: u64 = 6_000_000;
/// Whom the registry lets in, where it wants a login.
const LOGIN: (&str, &str) = ("kubelet", "right");

/// What is wrong, and how that is called in `hermes status` and in the metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    /// Nobody has an index.
    Missing,
    /// Its signatures were taken away.
    Unsigned,
    /// Somebody has signed it whom the node does not know.
    Stranger,
    /// It was changed after it had been signed.
    Forged,
    /// It is another image's, under this one's name.
    OtherImage,
    /// It breaks off.
    CutStatement,
    /// What it names is something else.
    DamagedArtifacts,
    /// The registry says 416.
    RangesRefused,
    /// The registry sends everything for a part.
    RangesIgnored,
    /// The registry does not answer for a part.
    RangesHang,
    /// The node has an old password; the kubelet has the right one.
    WrongLogin,
}

const CASES: [(Case, &str); 11] = [
    (Case::Missing, "small"),
    (Case::Unsigned, "unsigned"),
    (Case::Stranger, "unsigned"),
    (Case::Forged, "unsigned"),
    (Case::OtherImage, "other_image"),
    (Case::CutStatement, "corrupt"),
    (Case::DamagedArtifacts, "corrupt"),
    (Case::RangesRefused, "no_ranges"),
    (Case::RangesIgnored, "no_ranges"),
    (Case::RangesHang, "unreachable"),
    (Case::WrongLogin, "denied"),
];

impl Case {
    fn tag(self) -> String {
        format!("{self:?}").to_lowercase()
    }
}

fn hermes() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hermes"))
}

/// An image for each case: the decision about an image is remembered for a while. And one that nothing is wrong with.
fn images(dir: &Path) -> Result<Layout> {
    let layout = Layout::create(dir)?;
    let programs = runnable::programs()?;
    runnable::add_pause(&layout, &programs)?;
    let large = Tarball::of([Entry::file("opt/large", content("large", LARGE_LEN_BYTES))]);
    let large = NewLayer { tar: large, compression: Compression::Plain };
    for tag in CASES.map(|(case, _)| case.tag()).into_iter().chain(["well".to_owned()]) {
        let own = Tarball::of([Entry::file("etc/own", tag.clone())]);
        let own = NewLayer { tar: own, compression: Compression::Plain };
        layout.add(&tag, &[programs.clone(), large.clone(), own], &json!({}))?;
    }
    Ok(layout)
}

fn statement(folder: &Path, manifest: Digest) -> PathBuf {
    folder.join("statements").join(format!("{}.json", manifest.hex()))
}

/// Changes the JSON of a signed statement.
fn change(path: &Path, change: impl FnOnce(&mut Value)) -> Result<()> {
    let mut signed: Value = serde_json::from_slice(&fs::read(path)?)?;
    change(&mut signed);
    Ok(fs::write(path, serde_json::to_vec(&signed)?)?)
}

/// Does to the index of an image what `case` says.
fn spoil(stage: &Stage, case: Case) -> Result<()> {
    let image = stage.registry.image(&case.tag());
    if case == Case::Missing {
        return Ok(());
    }
    let other = stage.scratch().join("other");
    if case == Case::Stranger {
        Index::build(hermes(), &image, &other)?;
    } else {
        Index::build(hermes(), &image, &stage.index.folder)?;
    }
    let manifest = stage.layout.image(&case.tag())?.manifest;
    let path = statement(&stage.index.folder, manifest);
    match case {
        Case::Stranger => {
            // What it names is in the folder already, but for the layer that only this image has.
            for entry in fs::read_dir(other.join("artifacts"))? {
                let entry = entry?;
                fs::copy(entry.path(), stage.index.folder.join("artifacts").join(entry.file_name()))?;
            }
            fs::copy(statement(&other, manifest), path)?;
        }
        Case::Unsigned => change(&path, |signed| signed["signatures"] = json!([]))?,
        Case::Forged => change(&path, |signed| {
            let text = signed["statement"].as_str().unwrap_or_default().replacen("linux", "Linux", 1);
            signed["statement"] = json!(text);
        })?,
        Case::OtherImage => {
            let well = stage.layout.image("well")?.manifest;
            fs::copy(statement(&stage.index.folder, well), path)?;
        }
        Case::CutStatement => fs::write(&path, &fs::read(&path)?[..100])?,
        // Whatever artifacts the other images need were read before; these are the ones of the last layer.
        Case::DamagedArtifacts => {
            let signed: Value = serde_json::from_slice(&fs::read(&path)?)?;
            let text: Value = serde_json::from_str(signed["statement"].as_str().context("a statement")?)?;
            let layer = text["layers"].as_array().and_then(|layers| layers.last()).context("layers")?.clone();
            for name in layer.as_object().context("a layer")?.values().filter_map(Value::as_str) {
                let hex = name.rsplit(':').next().unwrap_or(name);
                let artifact = stage.index.folder.join("artifacts").join(hex);
                if artifact.exists() {
                    fs::write(artifact, "something else")?;
                }
            }
        }
        _ => {}
    }
    Ok(())
}

/// Has the registry do what `case` says.
fn trouble(registry: &FaultyRegistry, case: Case) {
    registry.always(match case {
        Case::RangesRefused => Fault::RefuseRange,
        Case::RangesIgnored => Fault::IgnoreRange,
        Case::RangesHang => Fault::HangRange,
        _ => Fault::Pass,
    });
    if case == Case::WrongLogin {
        registry.want_login(LOGIN.0, LOGIN.1);
    }
}

/// A pull: how long until the registry was asked for a whole layer, and how long in all.
fn timed_pull(stage: &Stage, containerd: &RunningContainerd<'_>, case: Case) -> Result<(Duration, Duration)> {
    let (tag, cri) = (case.tag(), Cri::connect(&containerd.socket())?);
    let image = stage.registry.image(&tag);
    trouble(&stage.registry, case);
    let begun = Instant::now();
    match case {
        Case::WrongLogin => cri.pull_as(&image, LOGIN.0, LOGIN.1)?,
        _ => cri.pull(&image)?,
    }
    let took = begun.elapsed();
    let layers = stage.layout.image(&tag)?.layers;
    let is_layer = |path: &str| layers.iter().any(|layer| path.ends_with(&layer.layer_id.to_string()));
    let log = stage.registry.blob_log();
    let first = log.iter().find(|request| !request.is_range && is_layer(&request.path));
    let first = first.with_context(|| format!("no layer was asked for: {log:?}"))?;
    let whole = log.iter().filter(|request| !request.is_range && is_layer(&request.path)).count();
    ensure!(whole == layers.len(), "{whole} of {} layers were downloaded", layers.len());
    Ok((first.at.duration_since(begun), took))
}

/// A host with containerd as it comes.
fn host_without() -> Result<Host> {
    let host = Host::new(LINE)?;
    fs::write(host.config(), host.default_config()?)?;
    Ok(host)
}

fn docker_config(stage: &Stage) -> Result<PathBuf> {
    let path = stage.scratch().join("config.json");
    let auths = json!({ "auths": { stage.registry.host(): { "username": LOGIN.0, "password": "wrong" } } });
    fs::write(&path, serde_json::to_vec(&auths)?)?;
    Ok(path)
}

/// Pulls the image of `case` with Hermes, and checks what came of it.
fn case(
    stage: &Stage,
    daemon: &Daemon,
    containerd: &RunningContainerd<'_>,
    (case, expected): (Case, &str),
) -> Result<(Duration, Duration)> {
    let address = web::metrics_address(&daemon.log()).context("the log names no address for metrics")?;
    let series = format!("hermes_lazy_decisions_total{{reason=\"{expected}\"}}");
    let count = || Ok::<_, anyhow::Error>(web::metric(&web::get(&address, "/metrics")?, &series).unwrap_or(0.0));
    let before = count()?;
    let timed = timed_pull(stage, containerd, case).with_context(|| daemon.log())?;
    let image = stage.registry.image(&case.tag());
    let pulls = daemon.status()?.pulls;
    let decided = pulls.iter().find(|pull| pull.reference == image).context("it is not among the pulls")?;
    ensure!(decided.decision == expected && decided.reason.is_some(), "{decided:?}");
    ensure!(count()? == before + 1.0, "{series} was not counted");
    let said = String::from_utf8(daemon.run(&["status"])?.stdout)?;
    let reason = decided.reason.as_deref().unwrap_or_default();
    ensure!(said.contains(reason), "status does not say '{reason}': {said}");
    println!("{case:?}: {expected}: {reason}");
    let own = containerd.once(&image, "cat /etc/own; cksum < /opt/large")?;
    let sum = hermes_tests::stage::cksum(&content("large", LARGE_LEN_BYTES))?;
    ensure!(own == format!("{}{sum}", case.tag()), "the container read {own}");
    ensure!(stage.trees()? == 0, "a tree is mounted for an image that was unpacked");
    containerd.remove_all_images()?;
    Ok(timed)
}

#[test]
fn what_cannot_be_shown_lazily_is_pulled_as_ever_and_says_why() -> Result<()> {
    let stage = Stage::with(hermes(), LINE, &["well"], FaultyRegistry::start, images)?;
    CASES.iter().try_for_each(|(case, _)| spoil(&stage, *case).with_context(|| format!("{case:?}")))?;
    let docker_config = docker_config(&stage)?;
    let docker_config = docker_config.to_str().context("UTF-8")?;
    let daemon = stage.daemon(&["--metrics-listen", "0", "--docker-config", docker_config])?;
    let containerd = stage.host.start()?;
    let host_without = host_without()?;
    let without = host_without.start()?;
    let mut table = Vec::new();
    // Both the first time, in which containerd reads its own program from the disk.
    timed_pull(&stage, &without, Case::Missing)?;
    without.remove_names()?;
    for (each, expected) in CASES {
        let alone = timed_pull(&stage, &without, each).with_context(|| format!("{each:?} by overlayfs"))?;
        without.remove_names()?;
        let with = case(&stage, &daemon, &containerd, (each, expected)).with_context(|| format!("{each:?}"))?;
        table.push((each, with, alone));
    }
    println!("{:18} {:>28} {:>28}", "", "first layer asked for", "pulled");
    println!("{:18} {:>14} {:>13} {:>14} {:>13}", "", "hermes", "overlayfs", "hermes", "overlayfs");
    let ms = |time: Duration| format!("{} ms", time.as_millis());
    for (case, with, alone) in table {
        let name = format!("{case:?}");
        println!("{name:18} {:>14} {:>13} {:>14} {:>13}", ms(with.0), ms(alone.0), ms(with.1), ms(alone.1));
    }
    drop((containerd, without));
    daemon.stop().map(drop)
}
