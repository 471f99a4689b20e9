//! `hermes trace`: who gave the chunks of an image, when, and why they were asked.

mod picture;
mod table;
mod timescale;

pub(super) use picture::{cut, escaped, text};

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use hermes_snapshotter::control::{self, Answer, Request};
use hermes_snapshotter::status::{SourceKind, TraceSource, TracedAsk};

use super::StateArgs;
use super::mount::expect_done;

/// Arguments of `hermes trace`.
#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    /// A mounted image, by the name with which it was mounted or by its folder.
    #[arg(value_name = "IMAGE|DIR")]
    image: String,
    #[command(flatten)]
    state: StateArgs,
    /// Draw a timeline, one lane for each source, into this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// List every request, not only the latest.
    #[arg(long)]
    all: bool,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

/// Shows the trace.
pub(crate) async fn run(args: TraceArgs) -> anyhow::Result<()> {
    let dir = std::path::absolute(&args.image)?;
    let request = Request::Trace { image: args.image, dir };
    let answer = expect_done(control::ask(&std::path::absolute(&args.state.state)?, &request, |_| ()).await)?;
    let Answer::Trace(trace) = answer else { anyhow::bail!("the daemon answered something else: {answer:?}") };
    if let Some(path) = &args.svg {
        std::fs::write(path, picture::draw(&trace)).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&trace)?);
    } else {
        print!("{}", table::render(&trace, args.all));
    }
    Ok(())
}

/// Characters of a PeerId that tell peers apart: its end, as all ids of one kind begin alike.
const PEER_ID_SHOWN: usize = 8;

/// The end of a PeerId.
pub(super) fn short_peer(id: &str) -> String {
    let skipped = id.chars().count().saturating_sub(PEER_ID_SHOWN);
    let end: String = id.chars().skip(skipped).collect();
    if skipped == 0 { end } else { format!("…{end}") }
}

/// A source, for people.
fn source_name(source: &TraceSource) -> String {
    match source.kind {
        SourceKind::Local => "this node".to_owned(),
        SourceKind::Peer => format!("peer {}", short_peer(&source.name)),
        SourceKind::Registry => source.name.clone(),
    }
}

/// Why a source was asked, with its rank and how often others were named before.
fn reason(ask: &TracedAsk) -> String {
    let mut text = ask.reason.name().to_owned();
    if let Some(rank) = ask.rank {
        text += &format!(", rank {rank}");
    }
    match ask.referrals {
        0 => {}
        1 => text += ", after 1 referral",
        more => text += &format!(", after {more} referrals"),
    }
    text
}

/// A length of time, in microseconds, for people.
pub(super) fn span(micros: u64) -> String {
    match micros {
        0..1_000 => format!("{micros} us"),
        1_000..100_000 => format!("{:.1} ms", micros as f64 / 1e3),
        100_000..1_000_000 => format!("{:.0} ms", micros as f64 / 1e3),
        1_000_000..120_000_000 => format!("{:.2} s", micros as f64 / 1e6),
        _ => format!("{:.1} min", micros as f64 / 60e6),
    }
}

#[cfg(test)]
mod sample {
    use hermes_image::ids::DiffId;
    use hermes_snapshotter::status::{AskOutcome, AskReason, ImageTrace, SourceKind, TraceSource, TracedAsk};

    /// One request, to the given source, between the given milliseconds.
    pub(super) fn ask(source: u32, reason: AskReason, sent_ms: u64, ended_ms: u64, bytes: u64) -> TracedAsk {
        TracedAsk {
            layer: 0,
            source,
            demand: source == 0,
            reason,
            rank: (reason == AskReason::Owner).then_some(1),
            referrals: u8::from(reason == AskReason::Named),
            sent_us: sent_ms * 1000,
            first_us: Some(sent_ms * 1000 + 2000),
            ended_us: Some(ended_ms * 1000),
            chunks: 4,
            asked_bytes: bytes.max(1000),
            bytes,
            outcome: if bytes == 0 { AskOutcome::Referred } else { AskOutcome::Done },
        }
    }

    /// A registry with a name that is markup, and two peers.
    pub(super) fn trace() -> ImageTrace {
        let source = |kind, name: &str, zone: &str| TraceSource { kind, name: name.to_owned(), zone: zone.to_owned() };
        ImageTrace {
            image: "registry.example/<script>&\"app\"\u{7}:1".to_owned(),
            now_us: 10_000_000,
            layers: vec![DiffId([7; 32])],
            sources: vec![
                source(SourceKind::Registry, "registry.example:5000", ""),
                source(SourceKind::Peer, "12D3KooWAAAAAAAAAAAAAAAAabcdefgh", "zone-<a>"),
                source(SourceKind::Peer, "12D3KooWAAAAAAAAAAAAAAAAijklmnop", "zone-b"),
            ],
            asks: vec![
                ask(0, AskReason::OwnTurn, 0, 50, 3_000_000),
                ask(1, AskReason::Owner, 1, 4, 0),
                ask(2, AskReason::Named, 4, 30, 1_000_000),
                TracedAsk { ended_us: None, outcome: AskOutcome::UnderWay, ..ask(2, AskReason::Holder, 9_900, 0, 500) },
            ],
            left_out: 3,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_times_are_short() {
        assert_eq!(short_peer("12D3KooWabcdefgh"), "…abcdefgh");
        assert_eq!(short_peer("abc"), "abc");
        let times = [0, 999, 1_500, 250_000, 1_234_000, 600_000_000].map(span);
        assert_eq!(times, ["0 us", "999 us", "1.5 ms", "250 ms", "1.23 s", "10.0 min"]);
        let trace = sample::trace();
        assert_eq!(
            trace.asks.iter().map(reason).collect::<Vec<_>>()[1..3],
            ["owner, rank 1".to_owned(), "named by owner, after 1 referral".to_owned()]
        );
    }
}
