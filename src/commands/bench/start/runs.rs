//! The sessions: what is done to a node, and what is measured of it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use hermes_lab::containerds::RunningContainerd;
use hermes_lab::guard::wait_for;
use hermes_lab::lazy_host::NewContainer;
use hermes_snapshotter::status::CompletionState;

use super::rig::{Node, OURS, Rig, THEIRS, Times, service};
use super::sample::Sample;
use super::subject::{NEW, OLD, Subject};
use super::way::{Session, Way};

/// How long an image may take to become complete.
const COMPLETE_MAX: Duration = Duration::from_secs(300);
/// Files that the odd program reads: about as many as a start.
const ODD_FILES: u32 = 200;
/// The daemon's settings where the image is completed before it is started.
const COMPLETE: [&str; 4] = ["--complete", "full", "--complete-rate", "0"];

/// What a session needs beside the rig.
pub(super) struct Turn<'a> {
    /// The image.
    pub(super) subject: &'a Subject,
    /// The registry's link.
    pub(super) link_mbit: u64,
    /// The round, from 1.
    pub(super) round: u32,
    /// Bytes of the changed chunks that a start of the next version reads; 0 where it is not known.
    pub(super) changed_bytes: u64,
}

impl Rig {
    /// Runs a session on a new node.
    pub(super) fn run(&self, session: Session, turn: &Turn<'_>) -> anyhow::Result<Vec<Sample>> {
        self.limit(turn.link_mbit)?;
        let subject = turn.subject;
        let samples = match session {
            Session::Containerd => self.eager(subject),
            Session::Soci => self.soci_start(subject),
            Session::Cold => self.lazy(subject, Way::Cold),
            Session::ColdPeer => self.lazy(subject, Way::ColdPeer),
            Session::Profile => self.lazy(subject, Way::Profile),
            Session::Peer => self.lazy(subject, Way::Peer),
            Session::Complete => self.complete(subject),
            Session::Next => self.next(turn),
            Session::Odd => self.odd(turn),
        };
        let named = |sample: Sample| Sample { link_mbit: turn.link_mbit, round: turn.round, ..sample };
        Ok(samples?.into_iter().map(named).collect())
    }

    /// containerd pulls, unpacks and starts; what is unpacked is started again, with dropped caches and with hot ones.
    fn eager(&self, subject: &Subject) -> anyhow::Result<Vec<Sample>> {
        let host = self.plain_host()?;
        let containerd = self.containerd(&host)?;
        let image = self.reference(subject, OLD);
        self.drop_caches(subject, false)?;
        let (before, begun) = (self.sent()?, Instant::now());
        self.pull(&containerd, &image, THEIRS)?;
        let ready = Instant::now();
        let container = service(&image, THEIRS).start(&containerd, "service")?;
        let started = Instant::now();
        let answered = self.wait_for_answer(subject.port)?;
        let pulled = self.sample(subject, Way::Containerd, Times { begun, ready, started, answered }, before)?;
        drop(container);
        self.drop_caches(subject, false)?;
        let cold = self.restart(&containerd, subject, Way::Unpacked, THEIRS)?;
        let hot = self.restart(&containerd, subject, Way::UnpackedHot, THEIRS)?;
        Ok(vec![pulled, cold, hot])
    }

    /// Starts what is there.
    fn restart(
        &self,
        containerd: &RunningContainerd<'_>,
        subject: &Subject,
        way: Way,
        snapshotter: &str,
    ) -> anyhow::Result<Sample> {
        let image = self.reference(subject, OLD);
        let (before, begun) = (self.sent()?, Instant::now());
        let container = service(&image, snapshotter).start(containerd, "service")?;
        let started = Instant::now();
        let answered = self.wait_for_answer(subject.port)?;
        let sample = self.sample(subject, way, Times { begun, ready: begun, started, answered }, before)?;
        drop(container);
        Ok(sample)
    }

    /// A node that has nothing of the image.
    fn lazy(&self, subject: &Subject, way: Way) -> anyhow::Result<Vec<Sample>> {
        let index = if matches!(way, Way::Cold | Way::ColdPeer) { &self.plain } else { &self.profiled };
        let has_peer = matches!(way, Way::ColdPeer | Way::Peer);
        let node = self.node(index, &["--complete", "idle"], has_peer)?;
        let containerd = self.containerd(&node.host)?;
        self.drop_caches(subject, has_peer)?;
        let (sample, sources) = node.start(&containerd, subject, OLD, way)?;
        if has_peer {
            ensure!(sources.peer_bytes > 0, "nothing came from the peer: {sources:?}\n{}", node.daemon.log());
        }
        Ok(vec![sample])
    }

    /// A node that has all of the image, which comes from the neighbour before it is measured.
    fn complete(&self, subject: &Subject) -> anyhow::Result<Vec<Sample>> {
        let node = self.node(&self.plain, &COMPLETE, true)?;
        let containerd = self.containerd(&node.host)?;
        let image = self.reference(subject, OLD);
        self.pull(&containerd, &image, OURS)?;
        // A tree is there for as long as a container is.
        let container = service(&image, OURS).start(&containerd, "service")?;
        self.wait_for_answer(subject.port)?;
        wait_for("a complete image", COMPLETE_MAX, || {
            let status = node.daemon.status().ok()?;
            let is_complete = |state: &CompletionState| *state == CompletionState::Complete;
            (!status.images.is_empty() && status.images.iter().all(|image| is_complete(&image.completion)))
                .then_some(())
        })?;
        drop(container);
        self.drop_caches(subject, false)?;
        let cold = self.restart(&containerd, subject, Way::Complete, OURS)?;
        let hot = self.restart(&containerd, subject, Way::CompleteHot, OURS)?;
        node.is_lazy()?;
        Ok(vec![cold, hot])
    }

    /// A node that knows the old version and its profile, and holds nothing of its content; the neighbour holds all of the old
    /// version.
    fn next(&self, turn: &Turn<'_>) -> anyhow::Result<Vec<Sample>> {
        let subject = turn.subject;
        // What a guess would fetch is not to be here when the new version comes.
        let node = self.node(&self.plain, &["--no-guess"], true)?;
        let (old, dir) = (self.reference(subject, OLD), self.work.join("old-version"));
        node.daemon.mount(&old, &dir, &self.plain, &["--plain-http"])?;
        node.says(&["profile", "import", &old, &self.profile(subject).display().to_string()])?;
        node.says(&["unmount", dir.to_str().context("a folder whose name is no text")?])?;
        let containerd = self.containerd(&node.host)?;
        self.drop_caches(subject, true)?;
        let (sample, sources) = node.start(&containerd, subject, NEW, Way::Next)?;
        let changed_ratio = (turn.changed_bytes > 0).then(|| sources.registry_bytes as f64 / turn.changed_bytes as f64);
        Ok(vec![Sample { changed_ratio, ..sample }])
    }

    /// A program that reads files which nobody could foresee, the same in both ways of a round.
    fn odd(&self, turn: &Turn<'_>) -> anyhow::Result<Vec<Sample>> {
        let ways = [(Way::OddPlain, &self.plain), (Way::OddProfile, &self.profiled)];
        let mut samples = Vec::new();
        // In turns, since the second way finds a warmer machine.
        let order = if turn.round.is_multiple_of(2) { [1, 0] } else { [0, 1] };
        for (way, index) in order.map(|place| ways[place]) {
            // A guess is about the image's own program as well, and there is none where there is a profile.
            let node = self.node(index, &["--no-guess"], false)?;
            let containerd = self.containerd(&node.host)?;
            self.drop_caches(turn.subject, false)?;
            samples.push(self.odd_start(&node, &containerd, turn, way)?);
        }
        Ok(samples)
    }

    fn odd_start(
        &self,
        node: &Node<'_>,
        containerd: &RunningContainerd<'_>,
        turn: &Turn<'_>,
        way: Way,
    ) -> anyhow::Result<Sample> {
        let (image, script) = (self.reference(turn.subject, OLD), odd_script(turn.round));
        let command = ["/bin/sh", "-c", &script];
        let program = NewContainer { image: &image, snapshotter: OURS, options: &["--user", "0"], command: &command };
        let (before, begun) = (self.sent()?, Instant::now());
        self.pull(containerd, &image, OURS)?;
        let ready = Instant::now();
        let printed = program.run(containerd, "odd")?;
        let answered = Instant::now();
        let sample = self.sample(turn.subject, way, Times { begun, ready, started: ready, answered }, before)?;
        let read: u64 = printed.trim().parse().with_context(|| format!("the odd program printed '{printed}'"))?;
        ensure!(read > 0, "the odd program read nothing");
        node.is_lazy()?;
        let (_, unused_bytes) = node.fetched()?;
        Ok(Sample { unused_bytes, ..sample })
    }
}

/// Reads files that a draw with `seed` has chosen, and prints how many bytes they have.
fn odd_script(seed: u32) -> String {
    format!(
        "find /usr /opt /app /var/lib -xdev -type f -size +1 2>/dev/null | sort | \
         awk 'BEGIN {{ srand({seed}) }} {{ print rand() \"\\t\" $0 }}' | sort | head -n {ODD_FILES} | cut -f 2- | \
         tr '\\n' '\\0' | xargs -0 cat | wc -c"
    )
}
