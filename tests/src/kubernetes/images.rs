//! Images for pods: a static busybox for all that is no program of its own, and `hermes` with what it needs of its system.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::node::cni_programs;
use crate::command::{exists, run};
use crate::compress::Compression;
use crate::layout::{Layout, LayoutImage, NewLayer};
use crate::sample::content;
use crate::tarball::{Entry, Tarball};

/// The tag of what holds a pod's namespaces: it sleeps.
pub const PAUSE: &str = "pause";
/// The tag of the image with `hermes`.
pub const HERMES: &str = "hermes";
/// The port on which a [`service`] answers.
pub const SERVICE_PORT: u16 = 8080;
/// What a service reads before it answers, and its length in bytes.
pub const HOT: (&str, u64) = ("opt/hot", 6_000_000);
/// What nobody reads by itself: so many files, each of this length in bytes. They are below `/cold` of the service, too.
pub const COLD: (usize, u64) = (8, 5_000_000);

/// The certificates of public authorities, below the root.
const AUTHORITIES: &str = "etc/ssl/certs/ca-certificates.crt";

/// The path in the image of a file that nobody reads by itself.
fn cold(number: usize) -> String {
    format!("opt/cold-{number}")
}

/// What such a file holds in the services with this `salt`.
pub fn cold_content(salt: &str, number: usize) -> Vec<u8> {
    content(&format!("{salt}/{}", cold(number)), COLD.1)
}

/// A layer with busybox under all of its names.
///
/// # Errors
/// When there is none.
pub fn busybox() -> Result<NewLayer> {
    let program = cni_programs()?.join("busybox");
    let names = String::from_utf8(run(Command::new(&program).arg("--list"))?)?;
    let file = Entry::file("bin/busybox", fs::read(&program)?).mode(0o755);
    let links =
        names.lines().filter(|name| *name != "busybox").map(|name| Entry::symlink(format!("bin/{name}"), "busybox"));
    let accounts =
        Entry::file("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n");
    let folders = ["tmp", "srv", "root"].map(Entry::directory);
    let tar = Tarball::of([file, accounts].into_iter().chain(folders).chain(links));
    Ok(NewLayer { tar, compression: Compression::Gzip(1) })
}

/// Adds [`PAUSE`], whose only layer is `busybox`.
///
/// # Errors
/// When the layout cannot be written.
pub fn add_pause(layout: &Layout, busybox: &NewLayer) -> Result<()> {
    let config = json!({"Entrypoint": ["/bin/busybox", "sleep", "1000000"]});
    layout.add(PAUSE, std::slice::from_ref(busybox), &config).map(drop)
}

/// Adds [`HERMES`]: `hermes` as `/usr/bin/hermes`, without what only a debugger reads, on top of `busybox`.
///
/// # Errors
/// When a library is not on this machine, or the layout cannot be written.
pub fn add_hermes(layout: &Layout, busybox: &NewLayer, hermes: &Path) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let stripped = folder.path().join("hermes");
    if exists("strip") {
        run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(hermes))?;
    } else {
        fs::copy(hermes, &stripped)?;
    }
    let mut files = BTreeMap::from([("usr/bin/hermes".to_owned(), fs::read(&stripped)?)]);
    let libraries = String::from_utf8(run(Command::new("ldd").arg(hermes))?)?;
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        files.insert(library[1..].to_owned(), fs::read(library)?);
    }
    // Without any, nobody is connected with over TLS.
    let authorities = Entry::file(AUTHORITIES, fs::read(Path::new("/").join(AUTHORITIES)).context("ca-certificates")?);
    let files = files.into_iter().map(|(name, data)| Entry::file(name, data).mode(0o755));
    let tar = Tarball::of(files.chain([authorities]));
    let program = NewLayer { tar, compression: Compression::Gzip(1) };
    // As in deploy/Containerfile.
    let config = json!({"Entrypoint": ["/usr/bin/hermes"], "Env": ["PATH=/usr/bin:/bin"], "User": "65532:65532"});
    layout.add(HERMES, &[busybox.clone(), program], &config).map(drop)
}

/// Adds a service under `tag`, which answers `/version` with `version` once it has read [`HOT`]. Its layers are `busybox`, one with
/// what is read, one with [`COLD`], and one with what `version` says; those with the same `salt` share all but the last.
///
/// # Errors
/// When the layout cannot be written.
pub fn add_service(layout: &Layout, busybox: &NewLayer, tag: &str, version: &str, salt: &str) -> Result<LayoutImage> {
    let layer = |tar| NewLayer { tar, compression: Compression::Gzip(1) };
    let hot = Tarball::of([Entry::file(HOT.0, content(&format!("{salt}/{}", HOT.0), HOT.1))]);
    let cold = (0..COLD.0).map(|number| Entry::file(cold(number), cold_content(salt, number)));
    let links = Entry::symlink("srv/cold", "/opt");
    let own = Tarball::of([Entry::file("srv/version", format!("{version}\n")), links]);
    let script = format!("cat /{} >/dev/null; exec httpd -f -p {SERVICE_PORT} -h /srv", HOT.0);
    let config = json!({"Entrypoint": ["/bin/sh", "-ec", script], "Env": ["PATH=/bin"]});
    let layers = [busybox.clone(), layer(hot), layer(Tarball::of(cold)), layer(own)];
    layout.add(tag, &layers, &config).with_context(|| format!("the service {tag}"))
}
