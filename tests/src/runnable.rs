//! Images that can run: some programs of this machine with their libraries, and layers that change and delete files of
//! the ones below.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde_json::json;

use crate::command::run;
use crate::compress::Compression;
use crate::layout::{Layout, NewLayer};
use crate::sample::content;
use crate::tarball::{Entry, Tarball};

/// A file that no program reads by itself, and its length in bytes.
pub const LARGE: (&str, u64) = ("opt/large", 6_000_000);

/// The tar of a layer with a shell, `cat`, `sleep` and `cksum`.
///
/// # Errors
/// When one of them is not on this machine.
pub fn programs() -> Result<Vec<u8>> {
    let mut entries: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for program in ["sh", "cat", "sleep", "cksum"] {
        let path = String::from_utf8(run(Command::new("which").arg(program))?)?;
        let path = fs::canonicalize(path.trim())?;
        entries.insert(format!("bin/{program}"), fs::read(&path)?);
        let libraries = String::from_utf8(run(Command::new("ldd").arg(&path))?)?;
        for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
            entries.insert(library[1..].to_owned(), fs::read(library)?);
        }
    }
    Ok(Tarball::of(entries.into_iter().map(|(name, data)| Entry::file(name, data).mode(0o755))))
}

/// Makes a layout with `v1` and `v2`, which share their two lower layers.
///
/// # Errors
/// When a program is not on this machine, or the layout cannot be written.
pub fn images(dir: &Path) -> Result<Layout> {
    let programs = programs()?;
    let (large, len) = LARGE;
    let files = [
        Entry::file("etc/a", "a1"),
        Entry::file("etc/b", "b1"),
        Entry::file("gone/c", "c"),
        Entry::file(large, content(large, len)),
    ];
    let changes = [Entry::file("etc/a", "a2"), Entry::whiteout("etc/b"), Entry::opaque("gone")];
    let other = Entry::file("etc/a", "other");
    let layout = Layout::create(dir)?;
    let layer = |tar: &[u8], compression| NewLayer { tar: tar.to_vec(), compression };
    let (files, changes) = (Tarball::of(files), Tarball::of(changes));
    let shared = [layer(&programs, Compression::Gzip(1)), layer(&files, Compression::Gzip(6))];
    let [low, middle] = shared.clone();
    layout.add("v1", &[low, middle, layer(&changes, Compression::Plain)], &json!({}))?;
    let [low, middle] = shared;
    layout.add("v2", &[low, middle, layer(&Tarball::of([other]), Compression::Gzip(6))], &json!({}))?;
    Ok(layout)
}
