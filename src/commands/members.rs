//! `hermes members`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use hermes_snapshotter::control::{self, Answer, Request};
use hermes_snapshotter::status::MemberStatus;

use super::StateArgs;
use super::mount::expect_done;
use crate::output;

/// Arguments of `hermes members`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct MembersArgs {
    #[command(subcommand)]
    command: Option<MembersCommand>,
    #[command(flatten)]
    state: StateArgs,
    /// Print the answer as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum MembersCommand {
    /// Take a node's certificates back: nobody lets it in any more. Do so on one node at a time; the others hear of it.
    Revoke(RevokeArgs),
    /// Tell all members that this node is about to leave, so that they ask others. Nothing is unmounted: see
    /// `hermes node drain`.
    Drain(DrainArgs),
}

#[derive(Debug, Args)]
struct RevokeArgs {
    /// The node's PeerId, as `hermes members` shows it.
    #[arg(value_name = "PEER")]
    peer: String,
    #[command(flatten)]
    state: StateArgs,
}

#[derive(Debug, Args)]
struct DrainArgs {
    /// Tell them that it stays.
    #[arg(long)]
    off: bool,
    #[command(flatten)]
    state: StateArgs,
}

/// Shows the members, or does what is asked.
pub(crate) async fn run(args: MembersArgs) -> anyhow::Result<()> {
    let (state, request) = match args.command {
        None => (args.state, Request::Members),
        Some(MembersCommand::Revoke(revoke)) => (revoke.state, Request::RevokeMember { peer: revoke.peer }),
        Some(MembersCommand::Drain(drain)) => (drain.state, Request::DrainMember { drain: !drain.off }),
    };
    let answer = expect_done(control::ask(&std::path::absolute(&state.state)?, &request, |_| ()).await)?;
    match answer {
        Answer::Members { epoch, members } if args.json => {
            println!("{}", serde_json::to_string_pretty(&serde_json::json!({ "epoch": epoch, "members": members }))?);
        }
        Answer::Members { members, .. } => print!("{}", render(&members, SystemTime::now())),
        Answer::Done => {}
        other => anyhow::bail!("the daemon answered something else: {other:?}"),
    }
    Ok(())
}

fn render(members: &[MemberStatus], now: SystemTime) -> String {
    let rows = members.iter().map(|member| {
        let flags = [(member.drain, "drain"), (member.full, "full"), (member.suspected, "suspected")];
        let flags: Vec<&str> = flags.into_iter().filter(|(is, _)| *is).map(|(_, name)| name).collect();
        let connected = match (member.me, member.connected) {
            (true, _) => "this node",
            (false, true) => "yes",
            (false, false) => "no",
        };
        vec![
            member.peer.clone(),
            member.addresses.join(" "),
            if member.zone.is_empty() { "-".to_owned() } else { member.zone.clone() },
            if flags.is_empty() { "-".to_owned() } else { flags.join(" ") },
            connected.to_owned(),
            member.certificate_until.map_or_else(|| "none".to_owned(), |end| ends(end, now)),
        ]
    });
    let header = ["peer", "at", "zone", "flags", "connected", "certificate"];
    format!("{}\nmembers: {}\n", output::table(&header, rows.collect()), members.len())
}

/// When something ends, counted from `now`.
fn ends(end: u64, now: SystemTime) -> String {
    match (UNIX_EPOCH + Duration::from_secs(end)).duration_since(now) {
        Ok(left) => format!("{} min left", left.as_secs().div_ceil(60)),
        Err(_) => "has ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_one_line() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let member = MemberStatus {
            peer: "12D3KooWone".into(),
            me: false,
            addresses: vec!["/ip4/10.0.0.1/tcp/4001".into()],
            zone: String::new(),
            drain: true,
            full: false,
            suspected: true,
            connected: false,
            certificate_until: Some(1_000_061),
        };
        let text = render(&[member], now);
        for part in ["12D3KooWone", "/ip4/10.0.0.1/tcp/4001", "drain suspected", "no", "2 min left", "members: 1"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(ends(999_999, now), "has ended");
    }
}
