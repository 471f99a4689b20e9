//! The status page: what the controller knows, for people, read only.
//!
//! ```text
//!  core --Action, Event--> board --Snapshot--> answers --bytes, once for all--> sections --ETag--> http --> browser, script
//!  nodes' reports ---------^   \-- series (bytes by the minute)                              access: who may look
//! ```
//!
//! It is served on the port of the API for nodes, over the same TLS, by HTTP/2 or HTTP/1.1. What a section says is encoded
//! when somebody asks for it and it has changed, at most once a second, and given to all who ask; a poll that finds nothing
//! new costs a comparison. The page itself is one document without any other asset; it gets its data from the JSON beside
//! it, which is for scripts, too (`docs/status-page.md`).
//!
//! Invariants: nothing that is known is given to anybody whose token was not found good; nothing here changes anything;
//! neither the core nor a node waits for a viewer. Nothing is kept: after a start what there is is heard again, and the
//! curve of bytes begins anew.

mod access;
mod answers;
mod board;
mod document;
mod http;
mod series;
mod slots;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::HeaderValue;
use bytes::Bytes;
use parking_lot::Mutex;

use self::access::Gate;
pub use self::board::Board;
use self::board::Section;
use crate::api::numbers::Numbers;
use crate::api::review::Viewers;
use crate::clock;

/// The path below which everything is, and the one that viewers need the right to `get` on Kubernetes.
pub const PATH: &str = "/status";

/// Least time between two encodings of one section, however fast it changes and however many look.
const ENCODE_EVERY: Duration = Duration::from_secs(1);

/// How far back the curve of bytes reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Window {
    Hour,
    SixHours,
    #[default]
    Day,
}

impl Window {
    const ALL: [Self; 3] = [Self::Hour, Self::SixHours, Self::Day];

    /// As the API calls it.
    const fn name(self) -> &'static str {
        match self {
            Self::Hour => "1h",
            Self::SixHours => "6h",
            Self::Day => "24h",
        }
    }

    /// How long each point is: some hundred points are what a chart can show.
    const fn step_minutes(self) -> u64 {
        match self {
            Self::Hour => 1,
            Self::SixHours => 5,
            Self::Day => 15,
        }
    }

    const fn points(self) -> u64 {
        match self {
            Self::Hour => 60,
            Self::SixHours => 72,
            Self::Day => 96,
        }
    }
}

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    Summary,
    Policies,
    Images,
    Nodes,
    Map,
    Traffic(Window),
}

impl Question {
    const COUNT: usize = 5 + Window::ALL.len();

    /// Its place among what is kept.
    const fn place(self) -> usize {
        match self {
            Self::Summary => 0,
            Self::Policies => 1,
            Self::Images => 2,
            Self::Nodes => 3,
            Self::Map => 4,
            Self::Traffic(window) => 5 + window as usize,
        }
    }

    const fn section(self) -> Section {
        match self {
            Self::Summary => Section::Summary,
            Self::Policies => Section::Policies,
            Self::Images => Section::Images,
            Self::Nodes => Section::Nodes,
            Self::Map => Section::Map,
            Self::Traffic(_) => Section::Traffic,
        }
    }
}

/// An answer as it was encoded last.
#[derive(Debug, Clone)]
struct Encoded {
    revision: u64,
    body: Bytes,
    tag: HeaderValue,
    made: Instant,
}

/// The page.
#[derive(Debug)]
pub struct Page {
    cluster: String,
    board: Arc<Board>,
    gate: Gate,
    /// Tells the tags of this process from those of another.
    run: u64,
    encoded: [Mutex<Option<Encoded>>; Question::COUNT],
}

impl Page {
    /// The page of `cluster`, of what `board` hears, for those whom `viewers` lets look. Refusals are counted in `numbers`.
    pub fn new(
        cluster: impl fmt::Display,
        board: Arc<Board>,
        viewers: Arc<dyn Viewers>,
        numbers: Arc<Numbers>,
    ) -> Self {
        let (cluster, gate, encoded) = (cluster.to_string(), Gate::new(viewers, numbers), Default::default());
        Self { cluster, board, gate, run: rand::random(), encoded }
    }

    /// Its routes.
    pub(crate) fn routes(self: Arc<Self>) -> axum::Router {
        http::routes(self)
    }

    /// The answer to a question, encoded now if it has changed and was not encoded just before. Whoever asks meanwhile waits
    /// for that, a few milliseconds.
    fn answer(&self, question: Question) -> Encoded {
        let mut kept = self.encoded[question.place()].lock();
        let now = clock::now();
        let revision = match question {
            // The curve moves on when nothing comes, too.
            Question::Traffic(window) => {
                let span = now.0 / 60_000 / window.step_minutes();
                self.board.revisions().of(Section::Traffic).wrapping_mul(1 << 32).wrapping_add(span)
            }
            _ => self.board.revisions().of(question.section()),
        };
        if let Some(known) = kept.as_ref()
            && (known.revision == revision || known.made.elapsed() < ENCODE_EVERY)
        {
            return known.clone();
        }
        let body = match question {
            Question::Summary => answers::summary(&self.cluster, &self.board),
            Question::Policies => answers::policies(&self.board),
            Question::Images => answers::images(&self.board),
            Question::Nodes => answers::nodes(&self.board),
            Question::Map => answers::map(&self.board),
            Question::Traffic(window) => answers::traffic(&self.board, window, now),
        };
        // What has changed since the revision was read is in the body already, and is encoded once more with the next.
        let tag = format!("\"{:016x}-{}-{revision:x}\"", self.run, question.place());
        let tag = HeaderValue::from_str(&tag).expect("hexadecimal digits may stand in a header");
        kept.insert(Encoded { revision, body, tag, made: Instant::now() }).clone()
    }
}
