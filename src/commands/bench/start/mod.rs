//! `hermes bench start`: how long real programs in real images take from the pull to their first answer, in every way there
//! is, on one machine and in one run.
//!
//! The command starts itself again in namespaces of its own ([`isolated`]), where nothing outlives it, however it ends. There
//! it makes the images' next versions ([`subject`]), networks and a registry ([`rig`]), has starts recorded ([`prepare`]) and the
//! images indexed for another lazy loader ([`soci`]), and then runs all [`way`]s in turns, round by round ([`runs`]). What came of it are [`sample`]s, shown as a [`table`] and a
//! [`plot`], and put into a document ([`document`]).

mod document;
mod isolated;
mod plot;
mod prepare;
mod rig;
mod runs;
mod sample;
mod soci;
mod subject;
mod table;
mod way;

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use clap::Args;
use hermes_lab::command::run as run_program;
use hermes_lab::index::Index;
use hermes_snapshotter::control::FailureClass;

use self::rig::Rig;
use self::runs::Turn;
use self::sample::{NODE_MBIT, Samples, verdicts};
use self::subject::{RECIPES, Subject};
use self::way::Session;
use super::tools;
use crate::output::failure;

/// Arguments of `hermes bench start`.
#[derive(Debug, Clone, Args)]
pub(crate) struct StartArgs {
    /// How often each way is run.
    #[arg(long, value_name = "COUNT", default_value = "5")]
    rounds: NonZeroU32,
    /// Only this image: spark, python, web, or oci:PATH[:TAG] of one that answers on the port which it exposes. May be given
    /// more than once.
    #[arg(long = "image", value_name = "NAME")]
    images: Vec<String>,
    /// Only this speed of the registry's link, in megabits per second. May be given more than once.
    #[arg(long = "link", value_name = "MBIT", default_values_t = [NODE_MBIT, 200])]
    links: Vec<u64>,
    /// Only this way. May be given more than once.
    #[arg(long = "way", value_name = "WAY", value_enum)]
    ways: Vec<Session>,
    /// The folder with the tools that make images and unpack containerd, as in the source tree.
    #[arg(long, value_name = "DIR", default_value = "tools")]
    tools: PathBuf,
    /// The hermes that nodes run, to compare builds; this one when absent.
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Where nodes keep what they have; must be on the disk that is to be measured.
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    dir: PathBuf,
    /// Put the table into benchmarks.md of this folder, and the picture beside it.
    #[arg(long, value_name = "DIR")]
    docs: Option<PathBuf>,
    /// Write every single start into this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The folder of the run, which the command makes for itself.
    #[arg(long, value_name = "DIR", hide = true)]
    inside: Option<PathBuf>,
}

impl StartArgs {
    fn sessions(&self) -> Vec<Session> {
        use clap::ValueEnum as _;
        let all = Session::value_variants().iter().copied();
        all.filter(|session| self.ways.is_empty() || self.ways.contains(session)).collect()
    }

    fn made_by(&self, tool: &str, arguments: &[&str]) -> anyhow::Result<PathBuf> {
        tools::made_by(&self.tools, tool, arguments)
    }

    /// Name and layout of each image, with its tag where it is none of ours.
    fn sources(&self) -> anyhow::Result<Vec<Source>> {
        let ours = || RECIPES.iter().map(|recipe| recipe.name.to_owned()).collect();
        let names: Vec<String> = if self.images.is_empty() { ours() } else { self.images.clone() };
        names.iter().map(|name| self.source(name)).collect()
    }

    fn source(&self, name: &str) -> anyhow::Result<Source> {
        if let Some(recipe) = RECIPES.iter().position(|recipe| recipe.name == name) {
            return Ok(Source::Recipe(recipe, self.made_by("images", &[name])?));
        }
        let Some(place) = name.strip_prefix("oci:") else {
            return Err(failure(
                FailureClass::Usage,
                format!("no image '{name}'; give spark, python, web or oci:PATH[:TAG]"),
            ));
        };
        let (path, tag) = match place.rsplit_once(':') {
            Some((path, tag)) if !Path::new(place).exists() => (path, tag),
            _ => (place, "latest"),
        };
        Ok(Source::Layout(std::path::absolute(path)?, tag.to_owned()))
    }
}

/// Where an image comes from.
enum Source {
    /// One of [`RECIPES`], and its layout.
    Recipe(usize, PathBuf),
    /// A layout and a tag.
    Layout(PathBuf, String),
}

/// Runs the benchmark.
pub(super) async fn run(args: StartArgs) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(failure(
            FailureClass::Denied,
            "the benchmark makes networks and starts containers; run it with sudo",
        ));
    }
    match args.inside.clone() {
        // What takes long, or needs the network, is made out here.
        None => {
            args.sources()?;
            args.made_by("containerd", &["2"])?;
            if args.sessions().contains(&Session::Soci) {
                args.made_by("soci", &[]).context("leave SOCI out by naming the other ways with --way")?;
            }
            isolated::run(&args.dir)
        }
        Some(work) => inside(&args, &work).await,
    }
}

async fn inside(args: &StartArgs, work: &Path) -> anyhow::Result<()> {
    isolated::settle()?;
    let (repositories, programs) = (work.join("repositories"), args.made_by("containerd", &["2"])?);
    let mut subjects = Vec::new();
    for source in args.sources()? {
        let subject = match source {
            Source::Recipe(recipe, layout) => Subject::of_recipe(&RECIPES[recipe], &layout, &repositories, work)?,
            Source::Layout(layout, tag) => Subject::make("image", &layout, &tag, &repositories)?,
        };
        eprintln!("{}: making its index", subject.name);
        subjects.push(subject);
    }
    let hermes = match &args.program {
        Some(program) => std::path::absolute(program)?,
        None => std::env::current_exe().context("cannot find this program")?,
    };
    let mut index = None;
    for subject in &subjects {
        for tag in subject.tags() {
            index = Some(Index::build(&hermes, &subject.in_layout(tag), &work.join("indexes"))?);
        }
    }
    let index = index.context("there is no image")?;
    run_program(Command::new("cp").arg("--archive").arg(&index.folder).arg(work.join("profiled")))?;
    let rig = Rig::new(work, hermes, programs, &repositories, index)?;
    let samples = measure(args, rig, subjects)?;
    finish(args, &samples)
}

/// Prepares what the wanted ways need, and runs them in turns.
fn measure(args: &StartArgs, mut rig: Rig, mut subjects: Vec<Subject>) -> anyhow::Result<Samples> {
    let sessions = args.sessions();
    let wants = |wanted: &[Session]| sessions.iter().any(|session| wanted.contains(session));
    let mut samples = Samples::default();
    let mut changed = BTreeMap::new();
    for subject in &mut subjects {
        let index = rig.plain.clone();
        let mut touched = BTreeMap::new();
        if wants(&[Session::Profile, Session::Peer, Session::Next, Session::Odd]) {
            eprintln!("{}: recording starts", subject.name);
            let recorded = rig.record(subject)?;
            changed.insert(subject.name.clone(), recorded.changed_bytes);
            touched = recorded.touched;
        }
        subject.learn(&index, &touched)?;
        samples.facts.insert(subject.name.clone(), subject.facts.clone());
    }
    if wants(&[Session::Soci]) {
        rig.prepare_soci(args.made_by("soci", &[])?, &subjects)?;
    }
    if wants(&[Session::ColdPeer, Session::Peer, Session::Complete, Session::Next]) {
        eprintln!("the peer fetches all images");
        rig.start_neighbour(&subjects)?;
    }
    for round in 1..=args.rounds.get() {
        for &link_mbit in &args.links {
            for subject in &subjects {
                let changed_bytes = changed.get(&subject.name).copied().unwrap_or_default();
                let turn = Turn { subject, link_mbit, round, changed_bytes };
                round_of(&rig, &sessions, &turn, &mut samples);
            }
        }
    }
    Ok(samples)
}

/// One round over one link with one image: each session once. What fails is told, and the rest goes on.
fn round_of(rig: &Rig, sessions: &[Session], turn: &Turn<'_>, samples: &mut Samples) {
    let is_of_link = |session: &&Session| turn.link_mbit == NODE_MBIT || session.is_of_slow_links();
    let has_next = turn.subject.has_next;
    let wanted = sessions.iter().filter(is_of_link).filter(|session| **session != Session::Next || has_next);
    for session in wanted {
        let place = format!("round {}, {} Mbit/s, {}", turn.round, turn.link_mbit, turn.subject.name);
        match rig.run(*session, turn) {
            Ok(measured) => {
                for sample in &measured {
                    eprintln!("{place}, {}: {:.2} s", sample.way.title(), sample.answer_s);
                }
                samples.samples.extend(measured);
            }
            Err(error) => {
                let failed = format!("{place}, {session:?}: {error:#}");
                eprintln!("FAILED {failed}");
                samples.failures.push(failed);
            }
        }
    }
}

/// Prints and writes what came of it.
fn finish(args: &StartArgs, samples: &Samples) -> anyhow::Result<()> {
    let (verdicts, machine) = (verdicts(samples), document::machine(&args.dir, args.rounds.get())?);
    println!("{}\n\n{}", machine, table::text(samples, &verdicts));
    if let Some(file) = &args.json {
        let all = serde_json::json!({"machine": machine, "runs": samples, "verdicts": verdicts});
        std::fs::write(file, serde_json::to_vec_pretty(&all)?).with_context(|| format!("write {}", file.display()))?;
    }
    if let Some(docs) = &args.docs {
        document::write(docs, samples, &verdicts, &machine)?;
    }
    if !samples.failures.is_empty() {
        bail!("{} starts failed: {}", samples.failures.len(), samples.failures.join("; "));
    }
    Ok(())
}
