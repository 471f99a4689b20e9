//! `hermes status`.

use clap::Args;
use hermes_snapshotter::control::{self, Answer, Request};
use hermes_snapshotter::status::{NodeStatus, PeerDetail, StartStatus, WaitingRead};

use super::StateArgs;
use super::mount::expect_done;
use super::trace::{short_peer, span};
use crate::output;

/// Arguments of `hermes status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    state: StateArgs,
    /// Show the reads that wait instead: of which file, for how long, and who is asked.
    #[arg(long)]
    waiting: bool,
    /// Show the peers instead: how quick they are, what came from them and went to them, and whether they are left alone.
    #[arg(long, conflicts_with = "waiting")]
    peers: bool,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Arguments of `hermes log-level`.
#[derive(Debug, Args)]
pub(crate) struct LogLevelArgs {
    /// A level (error, warn, info, debug, trace), or a filter in the syntax of HERMES_LOG.
    #[arg(value_name = "LEVEL")]
    filter: String,
    #[command(flatten)]
    state: StateArgs,
}

/// Changes what the daemon logs from now on.
pub(crate) async fn log_level(args: LogLevelArgs) -> anyhow::Result<()> {
    let request = Request::LogLevel { filter: args.filter };
    expect_done(control::ask(&std::path::absolute(&args.state.state)?, &request, |_| ()).await)?;
    Ok(())
}

async fn waiting(args: &StatusArgs) -> anyhow::Result<()> {
    let state = std::path::absolute(&args.state.state)?;
    let answer = expect_done(control::ask(&state, &Request::Waiting, |_| ()).await)?;
    let Answer::Waiting { reads } = answer else { anyhow::bail!("the daemon answered something else: {answer:?}") };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&reads)?);
    } else {
        print!("{}", render_waiting(&reads));
    }
    Ok(())
}

fn render_waiting(reads: &[WaitingRead]) -> String {
    if reads.is_empty() {
        return "no read waits\n".to_owned();
    }
    let rows = reads.iter().map(|read| {
        let place = format!("layer {} at {}", read.layer, read.offset);
        vec![
            format!("{:.1} s", read.waiting_ms as f64 / 1000.0),
            if read.demand { "demand" } else { "prefetch" }.to_owned(),
            read.image.clone(),
            read.file.as_ref().map_or(place, |file| file.display().to_string()),
            output::bytes(read.missing_bytes),
            if read.asking.is_empty() { "nobody".to_owned() } else { read.asking.join(", ") },
        ]
    });
    format!("{}\n", output::table(&["for", "class", "image", "file", "missing", "asking"], rows.collect()))
}

async fn peers(args: &StatusArgs) -> anyhow::Result<()> {
    let state = std::path::absolute(&args.state.state)?;
    let answer = expect_done(control::ask(&state, &Request::Peers, |_| ()).await)?;
    let Answer::Peers { peers } = answer else { anyhow::bail!("the daemon answered something else: {answer:?}") };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&peers)?);
    } else {
        print!("{}", render_peers(&peers));
    }
    Ok(())
}

fn render_peers(peers: &[PeerDetail]) -> String {
    if peers.is_empty() {
        return "no peer is known\n".to_owned();
    }
    let or_dash = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    let rows = peers.iter().map(|peer| {
        let flags =
            [(peer.member, "member"), (peer.drain, "drain"), (peer.full, "full"), (peer.suspected, "suspected")];
        let flags: Vec<&str> = flags.into_iter().filter(|(is, _)| *is).map(|(_, name)| name).collect();
        let left_alone = match (peer.banned_ms, peer.rests_ms) {
            (0, 0) => "-".to_owned(),
            (0, rests) => format!("rests {}", span(rests * 1000)),
            (banned, _) => format!("banned {}", span(banned * 1000)),
        };
        vec![
            short_peer(&peer.id),
            or_dash(peer.addresses.first().cloned().unwrap_or_default()),
            or_dash(peer.zone.clone()),
            or_dash(flags.join(" ")),
            if peer.connected { "yes" } else { "no" }.to_owned(),
            span(peer.latency_us),
            span(peer.cost_us_per_mib),
            peer.asks.to_string(),
            output::bytes(peer.from_bytes),
            output::bytes(peer.to_bytes),
            peer.holds_layers.to_string(),
            left_alone,
        ]
    });
    let header = [
        "peer",
        "at",
        "zone",
        "flags",
        "connected",
        "latency",
        "per MiB",
        "asks",
        "from it",
        "to it",
        "layers",
        "left alone",
    ];
    let sum = |of: fn(&PeerDetail) -> u64| peers.iter().map(of).sum::<u64>();
    format!(
        "{}\n{} peers, {} connected, {} requests under way, {} from them, {} to them\n",
        output::table(&header, rows.collect()),
        peers.len(),
        peers.iter().filter(|peer| peer.connected).count(),
        sum(|peer| peer.asks),
        output::bytes(sum(|peer| peer.from_bytes)),
        output::bytes(sum(|peer| peer.to_bytes)),
    )
}

/// Shows how things stand.
pub(crate) async fn run(args: StatusArgs) -> anyhow::Result<()> {
    if args.waiting {
        return waiting(&args).await;
    }
    if args.peers {
        return peers(&args).await;
    }
    let answer = expect_done(control::ask(&std::path::absolute(&args.state.state)?, &Request::Status, |_| ()).await)?;
    let Answer::Status(status) = answer else { anyhow::bail!("the daemon answered something else: {answer:?}") };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        print!("{}", render(&status));
    }
    Ok(())
}

fn render(status: &NodeStatus) -> String {
    let mut out = String::new();
    let budget = status
        .store_budget_bytes
        .map_or_else(|| "no budget".to_owned(), |budget| format!("of {}", output::bytes(budget)));
    out += &format!(
        "hermes {} (pid {}), {} memory, store {} ({budget}), waiting reads: {} demand, {} prefetch\n",
        status.version,
        status.pid,
        output::bytes(status.memory_bytes),
        output::bytes(status.store_bytes),
        status.waiting.demand,
        status.waiting.prefetch
    );
    let ways = status.ways.iter().map(|way| {
        let mark = if way.available { "yes" } else { "no" };
        format!("{} {mark} ({})", way.way, way.detail)
    });
    out += &format!("ways to show a tree: {}\n", ways.collect::<Vec<_>>().join(", "));
    let completion = &status.completion;
    let rate = match completion.rate_bytes_per_second {
        0 => "no limit".to_owned(),
        rate => format!("{}/s", output::bytes(rate)),
    };
    out += &format!(
        "completing images: {}{} ({rate}), {} fetched so, {} completed\n",
        completion.mode.name(),
        if completion.paused { ", paused" } else { "" },
        output::bytes(completion.fetched_bytes),
        completion.completed_images
    );
    if let Some(peer_id) = &status.peer_id {
        out += &format!("peer {peer_id} at {}\n", status.listen.join(", "));
    }
    for pull in &status.pulls {
        let name = if pull.reference.is_empty() { pull.manifest.to_string() } else { pull.reference.clone() };
        out += &match &pull.reason {
            None => format!("containerd pulled {name}: {}\n", pull.decision),
            Some(reason) => format!("containerd pulled {name}: as ever ({}): {reason}\n", pull.decision),
        };
    }
    for pull in &status.first_pulls {
        let (done, total) = (output::bytes(pull.done_bytes), output::bytes(pull.total_bytes));
        out += &format!("taking the pull of {} and building its index: {done} of {total}\n", pull.reference);
    }
    if status.images.is_empty() {
        out += "\nno image is mounted\n";
    } else {
        let rows = status.images.iter().map(|image| {
            vec![
                image.reference.clone(),
                image.dir.clone(),
                image.way.to_string(),
                format!("{:.1} %", image.percent_present()),
                image.completion.name().replace('_', " "),
                output::bytes(image.total_bytes),
                output::bytes(image.sources.local_bytes),
                output::bytes(image.sources.peer_bytes),
                output::bytes(image.sources.registry_bytes),
                image.start.as_ref().map_or_else(|| "-".to_owned(), ahead),
            ]
        });
        let header = ["image", "at", "way", "present", "rest", "size", "local", "peer", "registry", "ahead"];
        out += &format!("\n{}\n", output::table(&header, rows.collect()));
    }
    if !status.peers.is_empty() {
        let peers: Vec<_> = status.peers.iter().map(|peer| peer.id.as_str()).collect();
        out += &format!("\nconnected peers: {}\n", peers.join(", "));
    }
    out
}

/// What was fetched ahead by a profile, how much of it was read, and whether the start is still being recorded.
fn ahead(start: &StartStatus) -> String {
    let mut text = match start.profile {
        None => "no profile".to_owned(),
        Some(_) => format!("{}, {} used", output::bytes(start.prefetched_bytes), output::bytes(start.used_bytes)),
    };
    if start.recording {
        text += ", recording";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_one_line_and_there_is_a_sum() {
        let peer = PeerDetail {
            id: "12D3KooWabcdefgh".into(),
            addresses: vec!["/ip4/10.0.0.1/tcp/4001".into()],
            member: true,
            drain: true,
            connected: true,
            latency_us: 1_500,
            cost_us_per_mib: 9_000,
            asks: 2,
            from_bytes: 5_000_000,
            to_bytes: 1_000,
            holds_layers: 3,
            banned_ms: 90_000,
            ..PeerDetail::default()
        };
        let text = render_peers(&[peer.clone(), PeerDetail { connected: false, banned_ms: 0, rests_ms: 20, ..peer }]);
        for part in [
            "…abcdefgh",
            "/ip4/10.0.0.1/tcp/4001",
            "member drain",
            "1.5 ms",
            "banned 90.00 s",
            "rests 20.0 ms",
            "2 peers, 1 connected, 4 requests under way, 10.0 MB from them, 2.0 kB to them",
        ] {
            assert!(text.contains(part), "'{part}' is missing in:\n{text}");
        }
        assert_eq!(render_peers(&[]), "no peer is known\n");
    }
}
