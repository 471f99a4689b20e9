//! What has become of policies and images, as files and as lines of the log.
//!
//! ```text
//! policies/NAME.json            the status of a policy, as `kubectl get -o json` shows it
//! images/<manifest, hex>.json   what is known of an image
//! ```
//!
//! Files are written whole. A writer of its own takes the newest word on each of them, so nobody who says something waits for a
//! disk, and what is said twice in between is written once. Nothing reads them back: the next start begins anew.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::crd::GROUP;
use crate::event::{Action, Audience, Event, ImageKey, ImageView, Phase, UnixMillis};

/// Least time between two rounds of writing.
const INTERVAL: Duration = Duration::from_millis(200);

/// What is to be written; nothing for files that go.
type Words = BTreeMap<PathBuf, Option<Value>>;

/// What the audience and its writer share.
#[derive(Debug, Default)]
struct Shared {
    words: Mutex<Words>,
    said: Notify,
    is_closed: AtomicBool,
}

/// The audience that writes. One word for each policy and image at most waits to be written.
#[derive(Debug, Default)]
pub struct FolderReports {
    shared: Arc<Shared>,
}

impl FolderReports {
    /// Reports into the folder `path`, which is made, and emptied of what an earlier run has said. The task ends when the
    /// audience is dropped, after what was said last is written.
    ///
    /// # Errors
    /// When the folder cannot be made or emptied.
    pub fn start(path: &Path) -> io::Result<(Arc<Self>, JoinHandle<()>)> {
        for kind in ["policies", "images"] {
            let folder = path.join(kind);
            match fs::remove_dir_all(&folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => fs::create_dir_all(&folder)?,
            }
        }
        let reports = Arc::new(Self::default());
        let writer = tokio::spawn(write_words(path.to_owned(), Arc::clone(&reports.shared)));
        Ok((reports, writer))
    }

    fn say(&self, path: PathBuf, word: Option<Value>) {
        self.shared.words.lock().insert(path, word);
        self.shared.said.notify_one();
    }
}

impl Drop for FolderReports {
    fn drop(&mut self) {
        self.shared.is_closed.store(true, Ordering::Release);
        self.shared.said.notify_one();
    }
}

impl Audience for FolderReports {
    fn hear(&self, action: &Action) {
        match action {
            Action::Publish(view) => self.say(image_path(&view.image), Some(image_value(view))),
            Action::Withdraw(image) => self.say(image_path(image), None),
            Action::PolicyStatus { policy, status } => {
                let value = json!({
                    "apiVersion": format!("{GROUP}/v1alpha1"), "kind": "HermesPolicy",
                    "metadata": {"name": policy}, "status": status,
                });
                self.say(policy_path(policy), Some(value));
            }
            Action::Tell { about, warning: true, reason, message } => tracing::warn!(?about, reason, "{message}"),
            Action::Tell { about, warning: false, reason, message } => tracing::info!(?about, reason, "{message}"),
            _ => {}
        }
    }

    fn learn(&self, event: &Event) {
        if let Event::PolicyGone(policy) = event {
            self.say(policy_path(policy), None);
        }
    }
}

fn policy_path(policy: &str) -> PathBuf {
    Path::new("policies").join(format!("{policy}.json"))
}

fn image_path(image: &ImageKey) -> PathBuf {
    Path::new("images").join(format!("{}.json", image.manifest.hex()))
}

fn rfc3339(moment: UnixMillis) -> Option<String> {
    let moment = jiff::Timestamp::from_millisecond(i64::try_from(moment.0).ok()?).ok()?;
    Some(moment.to_string())
}

fn image_value(view: &ImageView) -> Value {
    let names: Vec<Value> =
        view.names.iter().map(|name| json!({"reference": name.reference, "platform": name.platform})).collect();
    let phase = match view.phase {
        Phase::Pending => "Pending",
        Phase::Building => "Building",
        Phase::Ready => "Ready",
        Phase::Failed => "Failed",
    };
    json!({
        "manifest": view.image.manifest, "names": names, "policies": view.policies, "phase": phase,
        "reason": view.failure.as_ref().map(|failure| failure.reason),
        "message": view.failure.as_ref().map(|failure| &failure.message),
        "attempts": view.attempts, "nextAttempt": view.next_attempt.and_then(rfc3339), "since": rfc3339(view.since),
        "imageBytes": view.image_len_bytes, "readBytes": view.read_bytes,
        "indexBytes": view.index.as_ref().map(|index| index.index_len_bytes), "access": view.access,
        "profileBytes": view.profile.as_ref().map(|profile| profile.len()), "seeds": view.seeds,
    })
}

async fn write_words(path: PathBuf, shared: Arc<Shared>) {
    loop {
        let is_closed = shared.is_closed.load(Ordering::Acquire);
        let words = std::mem::take(&mut *shared.words.lock());
        if words.is_empty() {
            if is_closed {
                return;
            }
            shared.said.notified().await;
            continue;
        }
        let folder = path.clone();
        let writing = tokio::task::spawn_blocking(move || {
            for (name, word) in words {
                if let Err(error) = write(&folder.join(&name), word.as_ref()) {
                    tracing::warn!(file = %name.display(), %error, "a status cannot be written");
                }
            }
        });
        if let Err(error) = writing.await {
            tracing::error!(%error, "writing statuses has panicked");
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Writes or removes a file. It is for readers of this moment, so it need not survive a loss of power.
fn write(path: &Path, word: Option<&Value>) -> io::Result<()> {
    let Some(word) = word else {
        return match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    };
    let mut text = serde_json::to_string_pretty(word)?;
    text.push('\n');
    let beside = path.with_extension("new");
    fs::write(&beside, text)?;
    fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crd::HermesPolicyStatus;

    #[tokio::test]
    async fn the_last_word_is_written_and_what_is_gone_goes() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir_all(folder.path().join("policies")).expect("made");
        fs::write(folder.path().join("policies/old.json"), b"{}").expect("written");
        let (reports, writer) = FolderReports::start(folder.path()).expect("started");
        let file = |name: &str| folder.path().join("policies").join(format!("{name}.json"));
        assert!(!file("old").exists());
        for (policy, ready) in [("a", 1), ("a", 2), ("b", 3)] {
            let status = HermesPolicyStatus { ready, ..HermesPolicyStatus::default() };
            reports.hear(&Action::PolicyStatus { policy: policy.to_owned(), status });
        }
        reports.learn(&Event::PolicyGone("b".to_owned()));
        drop(reports);
        writer.await.expect("no panic");
        let text = fs::read_to_string(file("a")).expect("written");
        let value: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!((value["metadata"]["name"].as_str(), value["status"]["ready"].as_i64()), (Some("a"), Some(2)));
        assert!(!file("b").exists());
    }
}
