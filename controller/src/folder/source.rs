//! What a folder of documents wants: read at the start, and again when a file changes.
//!
//! Files are told apart by their time, length and inode, which are looked at every two seconds: that works on every file
//! system. A file that cannot be read keeps what it said before, as an object keeps its spec when a change of it is refused;
//! and as long as some file cannot be read, nothing is given up that it may have meant.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::documents::{Declared, parse};
use crate::crd::HermesPolicySpec;
use crate::event::{Event, Policy, Workload, WorkloadId};

/// How often the folder is looked at.
const INTERVAL: Duration = Duration::from_secs(2);
/// Longest file that is read, in bytes.
const FILE_LEN_MAX_BYTES: u64 = 4 << 20;
/// Files that are read.
const FILES_MAX: usize = 10_000;
/// The ends of the names of files that are read.
const EXTENSIONS: [&str; 3] = ["yaml", "yml", "json"];

/// A folder that cannot be read.
#[derive(Debug, Error)]
#[error("cannot read the policies in {}: {source}; check the folder and its permissions", path.display())]
pub struct FolderSourceError {
    /// The folder.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

/// What tells versions of a file apart.
type Signature = (i64, i64, u64, u64);

/// A file, and what it said when it could be read last.
#[derive(Debug)]
struct FileState {
    signature: Signature,
    declared: Vec<Declared>,
    is_read: bool,
}

/// The folder.
#[derive(Debug)]
pub struct FolderSource {
    path: PathBuf,
    files: BTreeMap<PathBuf, FileState>,
    policies: BTreeMap<String, HermesPolicySpec>,
    lists: BTreeMap<WorkloadId, Workload>,
    /// The newest generation of all policies, so that one that comes back is newer than it was.
    generation: i64,
    is_synced: bool,
}

impl FolderSource {
    /// The folder `path`. Nothing is read yet, but it has to be there.
    ///
    /// # Errors
    /// When it is not there, or cannot be read.
    pub fn open(path: &Path) -> Result<Self, FolderSourceError> {
        fs::read_dir(path).map_err(|source| FolderSourceError { path: path.to_owned(), source })?;
        Ok(Self {
            path: path.to_owned(),
            files: BTreeMap::new(),
            policies: BTreeMap::new(),
            lists: BTreeMap::new(),
            generation: 0,
            is_synced: false,
        })
    }

    /// Says what the folder wants, until nobody listens or `ending` is cancelled.
    pub async fn run(mut self, events: mpsc::Sender<Event>, ending: CancellationToken) {
        let mut ticks = tokio::time::interval(INTERVAL);
        loop {
            tokio::select! {
                () = ending.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let looking = tokio::task::spawn_blocking(move || {
                let changed = self.look();
                (self, changed)
            });
            let Ok((source, changed)) = looking.await else {
                tracing::error!("reading the folder of policies has panicked; it is not followed any more");
                return;
            };
            self = source;
            for event in changed {
                let said = tokio::select! {
                    () = ending.cancelled() => return,
                    said = events.send(event) => said,
                };
                if said.is_err() {
                    return;
                }
            }
        }
    }

    /// Reads what has changed, and returns what is to be said about it.
    fn look(&mut self) -> Vec<Event> {
        match self.read_files() {
            Ok(()) => self.compare(),
            Err(source) => {
                let error = FolderSourceError { path: self.path.clone(), source };
                tracing::error!(%error, "the policies stay as they were");
                Vec::new()
            }
        }
    }

    fn read_files(&mut self) -> io::Result<()> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            let extension = path.extension().and_then(|extension| extension.to_str());
            if hidden || !extension.is_some_and(|extension| EXTENSIONS.contains(&extension)) {
                continue;
            }
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_file() => {
                    let signature = (metadata.mtime(), metadata.mtime_nsec(), metadata.len(), metadata.ino());
                    found.insert(path, signature);
                }
                Ok(_) => {}
                // It has just gone.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            if found.len() > FILES_MAX {
                return Err(io::Error::other(format!("there are more than {FILES_MAX} files")));
            }
        }
        self.files.retain(|path, _| found.contains_key(path));
        for (path, signature) in found {
            let known = self.files.get(&path);
            if known.is_some_and(|known| known.signature == signature) {
                continue;
            }
            let state = match read(&path) {
                Ok(declared) => FileState { signature, declared, is_read: true },
                Err(reason) => {
                    tracing::error!(file = %path.display(), reason, "a file of policies cannot be read; it is as it was");
                    let declared = self.files.remove(&path).map(|known| known.declared).unwrap_or_default();
                    FileState { signature, declared, is_read: false }
                }
            };
            self.files.insert(path, state);
        }
        Ok(())
    }

    /// What is to be said, so that whoever listens knows what the files say now.
    fn compare(&mut self) -> Vec<Event> {
        let mut policies: BTreeMap<String, HermesPolicySpec> = BTreeMap::new();
        let mut lists: BTreeMap<WorkloadId, Workload> = BTreeMap::new();
        for declared in self.files.values().flat_map(|file| &file.declared) {
            // The first file with a name has it, so that the same files mean the same in any order of writing.
            match declared {
                Declared::Policy(name, spec) => {
                    policies.entry(name.clone()).or_insert_with(|| (**spec).clone());
                }
                Declared::Images(list) => {
                    lists.entry(list.id.clone()).or_insert_with(|| list.clone());
                }
            }
        }
        let mut events = Vec::new();
        let gone: Vec<String> = self.policies.keys().filter(|name| !policies.contains_key(*name)).cloned().collect();
        for name in gone {
            self.policies.remove(&name);
            events.push(Event::PolicyGone(name));
        }
        for (name, spec) in policies {
            if self.policies.get(&name) == Some(&spec) {
                continue;
            }
            self.generation += 1;
            let generation = self.generation;
            self.policies.insert(name.clone(), spec.clone());
            events.push(Event::Policy(Policy { name, generation, spec }));
        }
        events.extend(self.lists.keys().filter(|id| !lists.contains_key(*id)).cloned().map(Event::WorkloadGone));
        let changed = lists.iter().filter(|(id, list)| self.lists.get(*id) != Some(list));
        events.extend(changed.map(|(_, list)| Event::Workload(list.clone())));
        self.lists = lists;
        if !self.is_synced && self.files.values().all(|file| file.is_read) {
            self.is_synced = true;
            events.push(Event::Synced);
        }
        events
    }
}

fn read(path: &Path) -> Result<Vec<Declared>, String> {
    let mut text = String::new();
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    file.take(FILE_LEN_MAX_BYTES + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if text.len() as u64 > FILE_LEN_MAX_BYTES {
        return Err(format!("it is longer than {FILE_LEN_MAX_BYTES} bytes"));
    }
    parse(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(name: &str, regex: &str) -> String {
        format!(
            "apiVersion: hermes.cloudpilot.ai/v1alpha1\nkind: HermesPolicy\nmetadata: {{name: {name}}}\nspec: {{imageSelectors: [{{imageRegex: {regex}}}]}}\n"
        )
    }

    fn list(images: &str) -> String {
        format!(
            "apiVersion: hermes.cloudpilot.ai/v1alpha1\nkind: ImageList\nmetadata: {{name: l}}\nimages: [{images}]\n"
        )
    }

    fn summary(events: &[Event]) -> Vec<String> {
        let one = |event: &Event| match event {
            Event::Policy(policy) => format!("policy {} {}", policy.name, policy.generation),
            Event::PolicyGone(name) => format!("policy {name} gone"),
            Event::Workload(list) => format!("list {:?}", list.images),
            Event::WorkloadGone(id) => format!("list {} gone", id.name),
            Event::Synced => "synced".to_owned(),
            other => panic!("{other:?}"),
        };
        events.iter().map(one).collect()
    }

    #[test]
    fn changes_are_said_once_and_what_cannot_be_read_stays() {
        let folder = tempfile::tempdir().expect("a folder");
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).expect("written");
        write("a.yaml", &policy("a", "x"));
        write("b.yml", &format!("{}---\n{}", policy("a", "other"), list("r:1")));
        write("broken.json", "{");
        write("notes.txt", "not ours");
        let mut source = FolderSource::open(folder.path()).expect("there");
        assert_eq!(summary(&source.look()), ["policy a 1", "list {\"r:1\"}"]);
        fs::remove_file(folder.path().join("broken.json")).expect("removed");
        assert_eq!(summary(&source.look()), ["synced"]);
        assert!(source.look().is_empty());
        write("a.yaml", &policy("a", "longer"));
        assert_eq!(summary(&source.look()), ["policy a 2"]);
        write("a.yaml", "kind: [");
        assert!(source.look().is_empty(), "it is as it was");
        fs::remove_file(folder.path().join("a.yaml")).expect("removed");
        assert_eq!(summary(&source.look()), ["policy a 3"], "the second file's");
        fs::remove_file(folder.path().join("b.yml")).expect("removed");
        assert_eq!(summary(&source.look()), ["policy a gone", "list l gone"]);
        write("c.yaml", &policy("a", "x"));
        assert_eq!(summary(&source.look()), ["policy a 4"]);
        fs::remove_dir_all(folder.path()).expect("removed");
        assert!(source.look().is_empty(), "a folder that is away means nothing");
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = FolderSource::open(Path::new("/nonexistent/policies")).expect_err("not there").to_string();
        assert!(error.contains("/nonexistent/policies"), "{error}");
    }
}
