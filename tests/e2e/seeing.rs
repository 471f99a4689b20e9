//! What people see of a swarm: who gave an image's chunks and why, as answer, table and picture; and what is known of peers.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use hermes_snapshotter::status::{AskOutcome, AskReason, ImageTrace, PeerDetail, SourceKind, TracedAsk};
use hermes_tests::fleet::rig::{Plan, Rig};
use hermes_tests::fleet::{Fleet, Shape};

/// Twelve megabytes in three layers, all of which is read: some extents for each node.
const PLAN: Plan =
    Plan { layers: 3, rounds: 1, lengths: &[2_000_000, 1_000_000, 250_000, 60_000, 500_000, 100_000, 20_000] };
/// Where the picture of the manual is, below the sources.
const PICTURE: &str = "docs/trace.svg";

fn run(fleet: &Fleet<'_>, node: usize, arguments: &[&str]) -> Result<Vec<u8>> {
    let output = fleet.daemon(node).run(arguments)?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

fn trace(fleet: &Fleet<'_>, node: usize) -> Result<ImageTrace> {
    let answer = run(fleet, node, &["trace", &fleet.registry().image(hermes_tests::sample::TAG), "--json"])?;
    serde_json::from_slice(&answer).context("parse the trace")
}

fn asks_of(trace: &ImageTrace, kind: SourceKind) -> impl Iterator<Item = &TracedAsk> {
    trace.asks.iter().filter(move |ask| trace.sources[ask.source as usize].kind == kind)
}

/// Three nodes read an image at once, and then a fourth. Each says what it took from the registry, and why it was to do so
/// and nobody else; the last one took nothing from there, and each of its peers counts what it has given.
#[test]
fn a_trace_tells_the_registry_from_peers_and_why() -> Result<()> {
    let rig = Rig::new(Path::new(env!("CARGO_BIN_EXE_hermes")), PLAN)?;
    let fleet = Fleet::start(&rig, &Shape { zones: vec![4], ..Shape::default() })?;
    let (first, last) = ([0, 1, 2], 3);
    fleet.mount(&first)?;
    let found = fleet.read(&first, &rig.read, || Ok(()))?;
    ensure!(found.iter().all(|node| node.failed.is_empty() && node.wrong.is_empty()), "{found:?}");
    // Who owns all extents has asked nobody.
    let (mut registry_bytes, mut asker) = (0, None);
    for node in first {
        let trace = trace(&fleet, node)?;
        ensure!(trace.layers.len() == PLAN.layers && trace.left_out == 0, "{trace:?}");
        let sources = fleet.daemon(node).sources()?;
        let of = |kind| asks_of(&trace, kind).map(|ask| ask.bytes).sum::<u64>();
        // What came for asks that were cancelled meanwhile counts for no ask.
        let (registry, peer) = (of(SourceKind::Registry), of(SourceKind::Peer));
        ensure!(registry <= sources.registry_bytes && peer <= sources.peer_bytes, "{sources:?} {trace:?}");
        ensure!(registry + peer > 0, "{sources:?} {trace:?}");
        registry_bytes += registry;
        for ask in asks_of(&trace, SourceKind::Registry) {
            let known = [AskReason::OwnTurn, AskReason::Delegated, AskReason::ForOthers, AskReason::NobodyOwns];
            ensure!(known.contains(&ask.reason), "{ask:?}");
            ensure!(trace.sources[ask.source as usize].name == fleet.registry().host(), "{:?}", trace.sources);
        }
        for ask in asks_of(&trace, SourceKind::Peer) {
            let known = [AskReason::Owner, AskReason::Named, AskReason::Holder, AskReason::Hedge];
            ensure!(known.contains(&ask.reason) && (ask.reason == AskReason::Owner) == ask.rank.is_some(), "{ask:?}");
            asker = Some(node);
        }
    }
    ensure!(registry_bytes > 0, "somebody has read the registry");
    let svg = run_picture(&fleet, asker.context("nobody has asked a peer")?)?;
    ensure!(svg.contains(&fleet.registry().host()) && svg.contains("peer …"), "{svg}");

    fleet.mount(&[last])?;
    let found = fleet.read(&[last], &rig.read, || Ok(()))?;
    ensure!(found.iter().all(|node| node.failed.is_empty() && node.wrong.is_empty()), "{found:?}");
    let trace = trace(&fleet, last)?;
    let brought = asks_of(&trace, SourceKind::Peer).filter(|ask| ask.outcome == AskOutcome::Done && ask.bytes > 0);
    let brought: u64 = brought.map(|ask| ask.bytes).sum();
    let from_registry: u64 = asks_of(&trace, SourceKind::Registry).map(|ask| ask.bytes).sum();
    ensure!(brought > from_registry, "{brought} and {from_registry} bytes: {trace:?}");
    let peers: Vec<PeerDetail> = serde_json::from_slice(&run(&fleet, last, &["status", "--peers", "--json"])?)?;
    ensure!(peers.len() == 3 && peers.iter().all(|peer| peer.member), "{peers:?}");
    ensure!(peers.iter().map(|peer| peer.from_bytes).sum::<u64>() >= brought, "{peers:?}");
    let mut given = 0;
    for node in first {
        let peers: Vec<PeerDetail> = serde_json::from_slice(&run(&fleet, node, &["status", "--peers", "--json"])?)?;
        given += peers.iter().map(|peer| peer.to_bytes).sum::<u64>();
    }
    ensure!(given > 0, "somebody has given something");
    let table = String::from_utf8(run(&fleet, last, &["status", "--peers"])?)?;
    ensure!(table.contains("3 peers, "), "{table}");
    let unknown = fleet.daemon(last).run(&["trace", "registry.example/unknown:1"])?;
    ensure!(unknown.status.code() == Some(3), "{unknown:?}");
    Ok(())
}

/// Draws the trace of a node; into the manual as well, when its documents are to be written anew.
fn run_picture(fleet: &Fleet<'_>, node: usize) -> Result<String> {
    let path = fleet.scratch().join("trace.svg");
    let path = path.to_str().context("UTF-8")?;
    let image = fleet.registry().image(hermes_tests::sample::TAG);
    let table = String::from_utf8(run(fleet, node, &["trace", &image, "--svg", path])?)?;
    for part in ["SOURCE", "WHY", "FIRST SIGN P50", "OUTCOME"] {
        ensure!(table.contains(part), "'{part}' is missing in:\n{table}");
    }
    println!("{table}");
    let svg = std::fs::read_to_string(path)?;
    if std::env::var_os("HERMES_UPDATE_DOCS").is_some() {
        std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join(PICTURE), &svg)?;
    }
    Ok(svg)
}
