//! What a start of an image reads, guessed from the image itself.
//!
//! For the first start ever, when nobody has recorded one. The command of the image's configuration is followed as the
//! kernel and the loader follow it: `PATH`, symlinks, `#!`, the ELF interpreter and the libraries that it loads; then as far
//! as is known of what it runs: shell scripts ([`shell`]), Python ([`python`]), the JVM ([`java`]), Node ([`javascript`]).
//! Every file comes with the reason why it is in the list, and the list is in the order in which they are read.
//!
//! Pure: names, sizes and places come from the tree; what files hold is asked of a [`Source`], a few KiB at a time
//! (headers, tables of libraries, scripts), which a start reads anyway. It goes on in waves: all that is known is named and
//! announced before any of it is read, so that a wave costs one round trip to whoever has the bytes. Nothing is decided by a file's content but what is
//! fetched early: a hostile image can only waste its own start. All of it is bounded: files, bytes, depth, and the bytes
//! that are read ([`LIMITS`]).

mod elf;
mod files;
mod java;
mod javascript;
mod python;
mod shell;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;
use std::slice;

use serde::Deserialize;

use crate::erofs::Image;
use crate::ids::DiffId;
use crate::index::chunks::ChunkTable;
use crate::runs::Runs;
use files::Files;

/// Bounds of a guess.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files in the list.
    pub files: usize,
    /// Bytes of the list.
    pub bytes: u64,
    /// Bytes of one file; what is longer is guessed up to there. Node's library (47 MB) is the longest that starts read
    /// much of.
    pub file_bytes: u64,
    /// How far one file leads to the next: scripts that run scripts, libraries that need libraries.
    pub depth: u32,
    /// Bytes that are read to find out.
    pub read_bytes: u64,
}

/// The bounds that are used. Recorded starts read 139 MB (a Python service with large native libraries), 121 MB (a Spark
/// master) and 57 MB (a Node service); what was recorded is in docs/profiles.md.
pub const LIMITS: Limits =
    Limits { files: 4096, bytes: 192 << 20, file_bytes: 48 << 20, depth: 12, read_bytes: 32 << 20 };

/// The part of an image's configuration that says what is run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Command {
    /// The fixed part of the command.
    #[serde(deserialize_with = "null_is_default")]
    pub entrypoint: Vec<String>,
    /// What follows it unless the container says otherwise.
    #[serde(deserialize_with = "null_is_default")]
    pub cmd: Vec<String>,
    /// The environment, as `NAME=value`.
    #[serde(deserialize_with = "null_is_default")]
    pub env: Vec<String>,
    /// Where it runs.
    #[serde(deserialize_with = "null_is_default")]
    pub working_dir: String,
}

fn null_is_default<'de, D: serde::Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(from)?.unwrap_or_default())
}

impl Command {
    /// From the bytes of an image's configuration; `None` when they say nothing that could be run.
    pub fn of_config(config: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        struct Config {
            config: Option<Command>,
        }
        let command = serde_json::from_slice::<Config>(config).ok()?.config?;
        (!command.entrypoint.is_empty() || !command.cmd.is_empty()).then_some(command)
    }
}

/// A file that a start is expected to read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuessedFile {
    /// Its path in the image, links resolved.
    pub path: String,
    /// Why, in a sentence for people.
    pub reason: String,
    /// The expected part: layers by their place in the tree's table of devices, lowest first, with logical ranges.
    pub pieces: Vec<(u16, Range<u64>)>,
}

impl GuessedFile {
    /// Length of what is expected to be read.
    pub fn len_bytes(&self) -> u64 {
        self.pieces.iter().map(|(_, range)| range.end - range.start).sum()
    }
}

/// What a start reads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Guess {
    /// In the order in which it is read.
    pub files: Vec<GuessedFile>,
    /// Whether a bound was met, so that the list may lack something.
    pub is_cut: bool,
}

impl Guess {
    /// The chunks in order, each once. `tables` are those of the layers, lowest first; pieces of layers without a table
    /// are left out.
    pub fn chunks(&self, tables: &[&ChunkTable]) -> Vec<(DiffId, Runs)> {
        let mut known: BTreeMap<u16, Runs> = BTreeMap::new();
        let mut ordered: Vec<(DiffId, Runs)> = Vec::new();
        for (layer, range) in self.files.iter().flat_map(|file| &file.pieces) {
            let Some(table) = tables.get(usize::from(*layer)) else { continue };
            let known = known.entry(*layer).or_default();
            let new = Runs::one(table.covering(range.clone())).difference(known);
            if new.is_empty() {
                continue;
            }
            known.insert_all(&new);
            match ordered.last_mut() {
                Some((diff_id, runs)) if *diff_id == table.diff_id() => runs.insert_all(&new),
                _ => ordered.push((table.diff_id(), new)),
            }
        }
        ordered
    }
}

/// Where a guess gets bytes from, and who hears of it before it is done.
pub trait Source {
    /// Bytes of a layer, by its place in the tree's table of devices and a logical range; `None` when they cannot be had,
    /// which ends the guess there.
    fn read(&mut self, layer: u16, range: Range<u64>) -> Option<Vec<u8>>;

    /// What will be read next, all of it: whoever has to fetch it can do so side by side.
    fn ahead(&mut self, parts: &[(u16, Range<u64>)]);

    /// A file of the list, as soon as it is found and before any of it is read: nobody need wait for the whole list.
    fn found(&mut self, file: &GuessedFile);
}

/// Guesses what a start of `command` reads of `image`.
pub fn guess<B: AsRef<[u8]>>(image: &Image<B>, command: &Command, limits: Limits, source: &mut dyn Source) -> Guess {
    let environment = command.env.iter().filter_map(|pair| pair.split_once('='));
    let environment: Environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let working_dir = if command.working_dir.is_empty() { "/".to_owned() } else { command.working_dir.clone() };
    let mut guesser = Guesser {
        files: Files::new(image, source, limits.read_bytes),
        limits,
        environment: Rc::new(environment),
        working_dir,
        guess: Guess::default(),
        listed: BTreeSet::new(),
        bytes: 0,
        binaries: Vec::new(),
        looked_at: BTreeSet::new(),
        queue: Vec::new(),
        commands: BTreeSet::new(),
        library_paths: None,
        work_left: shell::WORK_MAX,
    };
    guesser.configured_ahead();
    for (path, reason) in ALWAYS {
        guesser.add(path, reason);
    }
    let words: Vec<String> = command.entrypoint.iter().chain(&command.cmd).cloned().collect();
    guesser.run(words, "the image's command", 0, guesser.place());
    while !guesser.queue.is_empty() || !guesser.binaries.is_empty() {
        let tasks = std::mem::take(&mut guesser.queue);
        guesser.execute(tasks);
        guesser.load();
    }
    guesser.guess.is_cut |= guesser.files.is_exhausted();
    guesser.guess
}

/// What every program of a C library reads.
const ALWAYS: [(&str, &str); 4] = [
    ("/etc/passwd", "runtimes look up the container's user in it"),
    ("/etc/group", "runtimes look up the container's groups in it"),
    ("/etc/ld.so.cache", "the loader finds libraries by it"),
    ("/etc/nsswitch.conf", "the C library looks names up by it"),
];

/// Where commands are looked for when the image does not say it (containerd's own default).
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Places of `PATH` and the like that are looked at.
const PLACES_MAX: usize = 64;
/// Commands that are followed.
const COMMANDS_MAX: usize = 1024;
/// Longest first line of a script (`BINPRM_BUF_SIZE` of the kernel).
const SHEBANG_MAX_BYTES: u64 = 256;
/// Longest script that is read.
const SCRIPT_MAX_BYTES: u64 = 256 << 10;

/// Bytes of a program that are looked at first: an ELF file's headers, or most scripts.
const HEAD_BYTES: u64 = 4 << 10;

/// Variables and their values.
type Environment = BTreeMap<String, String>;

/// Where a command runs.
#[derive(Debug, Clone)]
struct Place {
    environment: Rc<Environment>,
    working_dir: String,
}

/// A command that is to be followed.
struct Task {
    words: Vec<String>,
    reason: String,
    depth: u32,
    place: Place,
}

/// A guess in the making.
struct Guesser<'a, 'r, B> {
    files: Files<'a, 'r, B>,
    limits: Limits,
    /// Of the command that is being followed.
    environment: Rc<Environment>,
    working_dir: String,
    guess: Guess,
    /// Paths in the list.
    listed: BTreeSet<String>,
    bytes: u64,
    /// ELF files that are to be followed.
    binaries: Vec<elf::Binary>,
    /// Those that were.
    looked_at: BTreeSet<String>,
    queue: Vec<Task>,
    /// All that were ever put there.
    commands: BTreeSet<Vec<String>>,
    /// Where the loader looks, once it is known.
    library_paths: Option<Vec<String>>,
    /// What may still be done in shell scripts.
    work_left: u64,
}

impl<B: AsRef<[u8]>> Guesser<'_, '_, B> {
    /// Adds a file; whether it is one, and new.
    fn add(&mut self, path: &str, reason: &str) -> bool {
        self.add_parts(path, slice::from_ref(&(0..u64::MAX)), reason)
    }

    /// Adds parts of a file, in order and without overlap. Only the first time counts.
    fn add_parts(&mut self, path: &str, parts: &[Range<u64>], reason: &str) -> bool {
        let Some(file) = self.files.regular(path) else { return false };
        if self.listed.contains(&file.path) {
            return false;
        }
        let mut room = self.limits.bytes.saturating_sub(self.bytes).min(self.limits.file_bytes);
        if self.guess.files.len() >= self.limits.files || (file.size_bytes > 0 && room == 0) {
            self.guess.is_cut = true;
            return false;
        }
        let mut pieces = Vec::new();
        for part in parts {
            let start = part.start.min(file.size_bytes);
            let len = part.end.min(file.size_bytes).saturating_sub(start).min(room);
            pieces.extend(self.files.pieces(&file, start..start + len));
            room -= len;
            self.bytes += len;
        }
        self.listed.insert(file.path.clone());
        let found = GuessedFile { path: file.path, reason: reason.to_owned(), pieces };
        self.files.found(&found);
        self.guess.files.push(found);
        true
    }

    /// Whether the list has no room for more.
    fn is_full(&self) -> bool {
        self.guess.files.len() >= self.limits.files || self.bytes >= self.limits.bytes
    }

    /// Puts a command behind those that are to be followed.
    fn run(&mut self, words: Vec<String>, reason: &str, depth: u32, place: Place) {
        if depth > self.limits.depth || self.commands.len() >= COMMANDS_MAX {
            self.guess.is_cut = true;
        } else if !words.is_empty() && self.commands.insert(words.clone()) {
            self.queue.push(Task { words, reason: reason.to_owned(), depth, place });
        }
    }

    /// Where the command runs that is being followed.
    fn place(&self) -> Place {
        Place { environment: Rc::clone(&self.environment), working_dir: self.working_dir.clone() }
    }

    /// The file that a command's first word names.
    fn find_command(&self, word: &str) -> Option<String> {
        let path = self.environment.get("PATH").map_or(PATH_DEFAULT, String::as_str);
        self.find_in(path, word, &self.working_dir)
    }

    /// The same in a list of places.
    fn find_in(&self, path: &str, word: &str, working_dir: &str) -> Option<String> {
        if word.contains('/') {
            let file = if word.starts_with('/') { word.to_owned() } else { format!("{working_dir}/{word}") };
            return self.files.regular(&file).map(|_| file);
        }
        (!word.is_empty()).then_some(())?;
        let places = path.split(':').filter(|place| place.starts_with('/')).take(PLACES_MAX);
        places.map(|place| format!("{place}/{word}")).find(|file| self.files.regular(file).is_some())
    }

    fn absolute(&self, path: &str) -> String {
        if path.starts_with('/') { path.to_owned() } else { format!("{}/{path}", self.working_dir) }
    }

    /// Follows commands: all their programs, then what each is told to do.
    fn execute(&mut self, tasks: Vec<Task>) {
        let mut programs = Vec::new();
        for task in tasks {
            (self.environment, self.working_dir) = (Rc::clone(&task.place.environment), task.place.working_dir.clone());
            if let Some(path) = task.words.first().and_then(|word| self.find_command(word)) {
                programs.push((path, task));
            }
        }
        let heads = programs.iter().filter_map(|(path, _)| Some((self.files.regular(path)?, 0..HEAD_BYTES)));
        self.files.ahead(heads.collect());
        for (path, task) in &programs {
            let binary = self.program(path, task);
            self.binaries.extend(binary);
        }
        for (path, task) in programs {
            (self.environment, self.working_dir) = (task.place.environment, task.place.working_dir);
            self.interpret(&path, &task.words, task.depth);
        }
    }

    /// What a program does with its arguments, where that is known.
    fn interpret(&mut self, path: &str, words: &[String], depth: u32) {
        // The interpreter of a script runs it as if it were named on the command line.
        let file = self.files.regular(path).map_or_else(|| path.to_owned(), |file| file.path);
        let name = file.rsplit('/').next().unwrap_or_default();
        match interpreter_of(name) {
            Some(Interpreter::Python) => self.python(path, &words[1..], depth),
            Some(Interpreter::Java) => self.java(path, &words[1..], depth),
            Some(Interpreter::Node) => self.javascript(&words[1..], depth),
            Some(Interpreter::Shell) => self.shell(&words[1..], depth),
            Some(Interpreter::Runs(skip)) => {
                let rest = words.iter().skip(1).skip_while(skip);
                self.run(rest.cloned().collect(), &format!("{name} runs it"), depth + 1, self.place());
            }
            None => {}
        }
    }

    /// Looks at a program: a script leads to its interpreter, an ELF file is given back.
    fn program(&mut self, path: &str, task: &Task) -> Option<elf::Binary> {
        let file = self.files.regular(path)?;
        let head = self.files.read(&file, 0..SHEBANG_MAX_BYTES).unwrap_or_default();
        if let Some(line) = head.strip_prefix(b"#!") {
            self.add(path, &task.reason);
            let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
            let line = String::from_utf8_lossy(line);
            // The kernel takes the first word, and all the rest as one.
            let (interpreter, argument) = line.trim().split_once([' ', '\t']).unwrap_or((line.trim(), ""));
            let mut command = vec![interpreter.to_owned()];
            command.extend((!argument.trim().is_empty()).then(|| argument.trim().to_owned()));
            command.push(path.to_owned());
            command.extend(task.words.iter().skip(1).cloned());
            self.run(command, &format!("the first line of {path} names it"), task.depth + 1, task.place.clone());
            return None;
        }
        if !head.starts_with(elf::MAGIC) {
            self.add(path, &task.reason);
            return None;
        }
        if file.size_bytes <= elf::WHOLE_MAX_BYTES {
            self.add(path, &task.reason);
        }
        let environment = Rc::clone(&task.place.environment);
        Some(elf::Binary::new(path, &task.reason, task.depth, environment))
    }
}

/// Programs that are known to read more than themselves.
enum Interpreter {
    Python,
    Java,
    Node,
    Shell,
    /// Runs the rest of its arguments, after those that this says are its own.
    Runs(fn(&&String) -> bool),
}

fn interpreter_of(name: &str) -> Option<Interpreter> {
    let is_own = |word: &&String| word.starts_with('-') || word.contains('=');
    Some(match name {
        "sh" | "bash" | "dash" | "ash" | "busybox" => Interpreter::Shell,
        "java" => Interpreter::Java,
        "node" | "nodejs" => Interpreter::Node,
        "env" | "tini" | "tini-static" | "dumb-init" | "exec" | "nohup" | "catatonit" => Interpreter::Runs(is_own),
        name if name.strip_prefix("python").is_some_and(|version| version.chars().all(is_version)) => {
            Interpreter::Python
        }
        _ => return None,
    })
}

fn is_version(character: char) -> bool {
    character.is_ascii_digit() || character == '.'
}

#[cfg(test)]
mod tests;
