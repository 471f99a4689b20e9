//! What one start has cost, what several come to, and whether that is what was to be reached.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::super::report::Spread;
use super::way::Way;

/// One start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Sample {
    /// The image's short name.
    pub(super) image: String,
    /// The registry's link, in megabits per second.
    pub(super) link_mbit: u64,
    /// How it was started.
    pub(super) way: Way,
    /// In which round, from 1.
    pub(super) round: u32,
    /// Seconds from the command to pull, or to start where nothing is pulled, until the root file system was there.
    pub(super) ready_s: f64,
    /// The same until the container was started.
    pub(super) started_s: f64,
    /// The same until the first HTTP 200, or the end of a program that is no service.
    pub(super) answer_s: f64,
    /// Bytes of blobs that the registry had sent by then.
    pub(super) registry_bytes: u64,
    /// Requests for blobs that it had taken by then.
    pub(super) registry_requests: u64,
    /// Bytes that the peer had sent by then, headers included.
    pub(super) peer_bytes: u64,
    /// Uncompressed bytes that had been fetched by a profile by then and that nobody had read; `None` where there is no start to ask about.
    pub(super) unused_bytes: Option<u64>,
    /// Of the next version: uncompressed bytes from the registry by then, divided by those of the changed chunks that
    /// the start reads.
    pub(super) changed_ratio: Option<f64>,
}

/// What is known of an image beside its starts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Facts {
    /// What it is.
    pub(super) title: String,
    /// Compressed bytes of its layers.
    pub(super) compressed_bytes: u64,
    /// Uncompressed bytes of its layers.
    pub(super) uncompressed_bytes: u64,
    /// How many layers it has.
    pub(super) layers: usize,
    /// Compressed bytes of the chunks that a start reads until it answers; `None` when none was recorded.
    pub(super) needed_bytes: Option<u64>,
}

/// All starts of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub(super) struct Samples {
    /// The starts, in the order in which they were made.
    pub(super) samples: Vec<Sample>,
    /// The images, by their short names.
    pub(super) facts: BTreeMap<String, Facts>,
    /// What went wrong: starts that are not among the samples.
    pub(super) failures: Vec<String>,
}

/// Megabits per second of a node's own link, and of that to its peer.
pub(super) const NODE_MBIT: u64 = 1000;

impl Samples {
    /// The starts of `image` in this way over this link.
    pub(super) fn of<'a>(&'a self, image: &'a str, link_mbit: u64, way: Way) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |s| s.image == image && s.link_mbit == link_mbit && s.way == way)
    }

    /// The seconds until the first answer.
    pub(super) fn answer(&self, image: &str, link_mbit: u64, way: Way) -> Option<Spread> {
        Spread::of(self.of(image, link_mbit, way).map(|sample| sample.answer_s))
    }

    /// The links over which there are starts, the quickest first.
    pub(super) fn links(&self) -> Vec<u64> {
        let mut links: Vec<u64> = self.samples.iter().map(|sample| sample.link_mbit).collect();
        links.sort_by_key(|link| std::cmp::Reverse(*link));
        links.dedup();
        links
    }

    /// What no system can be quicker than, in seconds: the longer of the start of the unpacked image on this machine, with
    /// dropped caches, and of the bytes that the start reads at the speed of their link. The unpacked start needs no
    /// link, so those of all links count.
    pub(super) fn bound_s(&self, image: &str, link_mbit: u64) -> Option<f64> {
        let unpacked = self.samples.iter().filter(|sample| sample.image == image && sample.way == Way::Unpacked);
        let local_s = Spread::of(unpacked.map(|sample| sample.answer_s))?.median;
        let needed_bytes = self.facts.get(image).and_then(|facts| facts.needed_bytes)?;
        Some(local_s.max(needed_bytes as f64 * 8.0 / (link_mbit as f64 * 1e6)))
    }
}

/// Whether something was reached.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Verdict {
    /// The image.
    pub(super) image: String,
    /// The registry's link.
    pub(super) link_mbit: u64,
    /// Whose figure it is.
    pub(super) way: Way,
    /// What is compared.
    pub(super) what: String,
    /// The figure.
    pub(super) figure: f64,
    /// What it is to be, such as `<= 4.1`.
    pub(super) reach: String,
    /// Whether it is.
    pub(super) met: bool,
}

impl Verdict {
    /// The figure, what is to be reached, and whether it was, for one cell of a table.
    pub(super) fn text(&self) -> String {
        format!("{} {:.2} ({}) {}", self.what, self.figure, self.reach, if self.met { "OK" } else { "MISSED" })
    }
}

/// What is allowed beside a multiple of the bound, in seconds.
const GRACE_S: f64 = 0.3;
/// The image whose starts are compared with those of other systems at the highest factor.
const COMPARED: &str = "spark";

/// Compares what was measured with what is to be reached.
pub(super) fn verdicts(samples: &Samples) -> Vec<Verdict> {
    let mut all = Vec::new();
    for link_mbit in samples.links() {
        for image in samples.facts.keys() {
            of_image(samples, image, link_mbit, &mut all);
        }
    }
    all
}

fn of_image(samples: &Samples, image: &str, link_mbit: u64, all: &mut Vec<Verdict>) {
    let answer = |way| samples.answer(image, link_mbit, way).map(|spread| spread.median);
    let mut add = |way, what: &str, figure: f64, is_most: bool, limit: f64| {
        let (sign, met) = if is_most { ("<=", figure <= limit) } else { (">=", figure >= limit) };
        let reach = format!("{sign} {limit:.2}");
        all.push(Verdict { image: image.to_owned(), link_mbit, way, what: what.to_owned(), figure, reach, met });
    };
    // Over a slow link to the registry, a peer is as near as ever.
    let bounds = [
        (Way::Peer, NODE_MBIT, 1.2),
        (Way::Profile, link_mbit, 1.5),
        (Way::Cold, link_mbit, 2.0),
        (Way::ColdPeer, NODE_MBIT, 1.6),
        (Way::Next, NODE_MBIT, 1.3),
    ];
    for (way, mbit, factor) in bounds {
        // Without a profile, what is asked of a peer is asked of the JVM's image.
        if way == Way::Profile && link_mbit != NODE_MBIT || way == Way::ColdPeer && image != COMPARED {
            continue;
        }
        if let (Some(answer_s), Some(bound_s)) = (answer(way), samples.bound_s(image, mbit)) {
            // The grace is no part of the factor: what is compared is the rest.
            let grace_s = if matches!(way, Way::Next | Way::ColdPeer) { 0.0 } else { GRACE_S };
            add(way, "x bound", (answer_s - grace_s) / bound_s, true, factor);
        }
    }
    let is_compared = image == COMPARED && link_mbit == NODE_MBIT;
    let quicker = [
        (Way::Cold, Way::Containerd, "x quicker than containerd", 2.0, true),
        (Way::Profile, Way::Containerd, "x quicker than containerd", 3.0, is_compared),
        (Way::Profile, Way::Soci, "x quicker than SOCI", 3.0, is_compared),
    ];
    for (ours, theirs, what, factor, _) in quicker.into_iter().filter(|(.., asked)| *asked) {
        if let (Some(ours_s), Some(theirs_s)) = (answer(ours), answer(theirs)) {
            add(ours, what, theirs_s / ours_s, false, factor);
        }
    }
    let no_slower = [
        (Way::Complete, Way::Unpacked, "x overlayfs", 1.0),
        (Way::CompleteHot, Way::UnpackedHot, "x overlayfs", 1.0),
        (Way::OddProfile, Way::OddPlain, "x without the profile", 1.05),
    ];
    for (ours, theirs, what, factor) in no_slower {
        if let (Some(ours_s), Some(theirs_s)) = (answer(ours), answer(theirs)) {
            add(ours, what, ours_s / theirs_s, true, factor);
        }
    }
    let changed = samples.of(image, link_mbit, Way::Next).filter_map(|sample| sample.changed_ratio);
    if let Some(ratio) = Spread::of(changed) {
        add(Way::Next, "x the changed chunks", ratio.median, true, 1.1);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn sample(way: Way, link_mbit: u64, answer_s: f64) -> Sample {
        Sample {
            image: "spark".to_owned(),
            link_mbit,
            way,
            round: 1,
            ready_s: 0.2,
            started_s: 0.4,
            answer_s,
            registry_bytes: 120_000_000,
            registry_requests: 99,
            peer_bytes: 0,
            unused_bytes: way.is_ours().then_some(1_000_000),
            changed_ratio: (way == Way::Next).then_some(1.05),
        }
    }

    pub(in super::super) fn samples() -> Samples {
        let starts = [
            (Way::Containerd, 1000, 12.0),
            (Way::Soci, 1000, 11.0),
            (Way::Unpacked, 1000, 3.0),
            (Way::Unpacked, 1000, 4.0),
            (Way::Unpacked, 1000, 8.0),
            (Way::Cold, 1000, 8.2),
            (Way::Profile, 1000, 4.0),
            (Way::Peer, 1000, 5.3),
            (Way::Next, 1000, 5.0),
            (Way::Complete, 1000, 3.9),
            (Way::OddPlain, 1000, 2.0),
            (Way::OddProfile, 1000, 2.2),
            (Way::Containerd, 200, 31.0),
            (Way::Soci, 200, 23.0),
            (Way::Profile, 200, 9.0),
            (Way::Cold, 200, 9.0),
        ];
        let facts = Facts {
            title: "Apache Spark <master>".to_owned(),
            compressed_bytes: 600_000_000,
            uncompressed_bytes: 950_000_000,
            layers: 6,
            needed_bytes: Some(115_000_000),
        };
        Samples {
            samples: starts.into_iter().map(|(way, link, answer_s)| sample(way, link, answer_s)).collect(),
            facts: BTreeMap::from([("spark".to_owned(), facts)]),
            failures: Vec::new(),
        }
    }

    #[test]
    fn the_bound_is_the_longer_of_disk_and_link() {
        let samples = samples();
        assert_eq!(samples.links(), [1000, 200]);
        assert_eq!(samples.bound_s("spark", 1000), Some(4.0), "the median of the unpacked starts");
        // 115 MB at 25 MB/s.
        assert_eq!(samples.bound_s("spark", 200), Some(4.6));
        assert_eq!(samples.bound_s("web", 200), None);
    }

    #[test]
    fn what_is_reached_and_missed_is_told() {
        let verdicts = verdicts(&samples());
        let of = |way, what: &str, link| {
            let found = verdicts.iter().find(|v| v.way == way && v.what.contains(what) && v.link_mbit == link);
            found.map(|verdict| verdict.met)
        };
        // 1.2 x 4.0 + 0.3 = 5.1; 1.5 x 4.0 + 0.3 = 6.3; 2 x 4.0 + 0.3 = 8.3; 1.3 x 4.0 = 5.2.
        assert_eq!(of(Way::Peer, "bound", 1000), Some(false));
        assert_eq!(of(Way::Profile, "bound", 1000), Some(true));
        assert_eq!(of(Way::Cold, "bound", 1000), Some(true));
        assert_eq!(of(Way::Next, "bound", 1000), Some(true));
        assert_eq!(of(Way::Next, "changed", 1000), Some(true));
        assert_eq!(of(Way::Cold, "containerd", 1000), Some(false), "12.0 / 8.2");
        assert_eq!(of(Way::Profile, "containerd", 1000), Some(true), "12.0 / 4.0");
        assert_eq!(of(Way::Profile, "SOCI", 1000), Some(false), "11.0 / 4.0");
        assert_eq!(of(Way::Profile, "SOCI", 200), None, "asked over the fast link alone");
        assert_eq!(of(Way::Complete, "overlayfs", 1000), Some(true));
        assert_eq!(of(Way::OddProfile, "profile", 1000), Some(false));
        // 2 x 4.6 + 0.3 = 9.5.
        assert_eq!(of(Way::Cold, "bound", 200), Some(true));
    }
}
