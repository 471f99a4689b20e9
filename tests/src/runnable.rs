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

/// The tag of the image that only holds a pod's namespaces: it sleeps.
pub const PAUSE: &str = "pause";

/// A layer with `sh`, `cat`, `sleep` and `cksum` of this machine, and the libraries that they need.
///
/// # Errors
/// When one is not on this machine.
pub fn programs() -> Result<NewLayer> {
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
    let tar = Tarball::of(entries.into_iter().map(|(name, data)| Entry::file(name, data).mode(0o755)));
    Ok(NewLayer { tar, compression: Compression::Gzip(1) })
}

/// Adds the image for [`PAUSE`], of which `programs` is the only layer.
///
/// # Errors
/// When the layout cannot be written.
pub fn add_pause(layout: &Layout, programs: &NewLayer) -> Result<()> {
    let config = json!({"Entrypoint": ["/bin/sleep", "1000000"]});
    layout.add(PAUSE, std::slice::from_ref(programs), &config).map(drop)
}

/// Makes a layout with `v1` and `v2`, which share their two lower layers, and [`PAUSE`].
///
/// # Errors
/// When a program is not on this machine, or the layout cannot be written.
pub fn images(dir: &Path) -> Result<Layout> {
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
    let layer = |tar: Vec<u8>, compression| NewLayer { tar, compression };
    let (low, middle) = (programs()?, layer(Tarball::of(files), Compression::Gzip(6)));
    add_pause(&layout, &low)?;
    let changes = layer(Tarball::of(changes), Compression::Plain);
    layout.add("v1", &[low.clone(), middle.clone(), changes], &json!({}))?;
    layout.add("v2", &[low, middle, layer(Tarball::of([other]), Compression::Gzip(6))], &json!({}))?;
    Ok(layout)
}
