//! Images for real programs, and the scripts that run in them.
//!
//! `core` is a Debian with Python and apt, and two layers of this module on top: the lower one has every kind of file that
//! a program may care about below `/cases` ([`lower`]), the upper one changes and deletes some ([`upper`]). Each script
//! prints one line per fact, in the form `fact: answer`, and never a time, a process id or a device number, so that what
//! it prints on two snapshotters can be compared as text.
//!
//! The other images are the whole real ones of [`crate::images`], with the commands of their authors.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::command::run;
use crate::compress::Compression;
use crate::images::{RealImage, TAG};
use crate::layout::{Layout, LayoutLayer, NewLayer};
use crate::sample::content;
use crate::tarball::{Entry, Tarball};

/// The tag of the image with the cases.
pub const CORE: &str = "core";
/// The uid that the cases use for somebody who is not root.
const SOMEBODY: u64 = 1000;
/// Length of the file that is read in many ways, in bytes: several chunks.
const LARGE_LEN_BYTES: u64 = 3_000_000;
/// Length of the files that are copied up, in bytes: more than a page.
const SMALL_LEN_BYTES: u64 = 5_000;

/// A script of the cases.
#[derive(Debug, Clone, Copy)]
pub struct Script {
    /// What it is called.
    pub name: &'static str,
    interpreter: &'static str,
    text: &'static str,
}

macro_rules! the_end {
    () => {
        "the end: reached"
    };
}

/// The last line that a script prints which runs to its end.
pub const THE_END: &str = the_end!();

/// A shell script with `fact` to tell what it finds.
macro_rules! shell {
    ($path:literal) => {
        concat!(include_str!("programs/fact.sh"), include_str!($path), "\necho '", the_end!(), "'\n")
    };
}

/// A Python script that tells what it finds.
macro_rules! python {
    ($path:literal) => {
        concat!(include_str!($path), "\nprint('", the_end!(), "')\n")
    };
}

/// What a program sees of the file system.
pub const FILESYSTEM: Script =
    Script { name: "filesystem.py", interpreter: "/usr/bin/python3", text: python!("programs/filesystem.py") };
/// Set-id bits, file capabilities and users.
pub const PRIVILEGES: Script =
    Script { name: "privileges.sh", interpreter: "/bin/sh", text: shell!("programs/privileges.sh") };
/// apt and dpkg.
pub const PACKAGES: Script =
    Script { name: "packages.sh", interpreter: "/bin/sh", text: shell!("programs/packages.sh") };
/// pip, which the Spark image has.
pub const PIP: Script = Script { name: "pip.sh", interpreter: "/bin/sh", text: shell!("programs/pip.sh") };
/// What a user namespace sees.
pub const NAMESPACE: Script =
    Script { name: "namespace.sh", interpreter: "/bin/sh", text: shell!("programs/namespace.sh") };

/// Asks a service that has Python beside it.
pub const ASK_BY_PYTHON: Script =
    Script { name: "ask.py", interpreter: "/usr/bin/python3", text: include_str!("programs/ask.py") };
/// Asks a service that has Node beside it.
pub const ASK_BY_NODE: Script =
    Script { name: "ask.js", interpreter: "/usr/bin/node", text: include_str!("programs/ask.js") };
/// What the native libraries of Python's wheels compute.
pub const NUMBERS: Script =
    Script { name: "numbers.py", interpreter: "/usr/bin/python3", text: python!("programs/numbers.py") };

impl Script {
    /// The command that runs it.
    pub fn command(self) -> [&'static str; 3] {
        let option = if self.interpreter.ends_with("node") { "-e" } else { "-c" };
        [self.interpreter, option, self.text]
    }
}

/// Makes a layout with the image of the cases and those of `whole`, each under its name.
///
/// # Errors
/// When a real image cannot be made, or a file not be written.
pub fn images(dir: &Path, whole: &[RealImage]) -> Result<Layout> {
    let layout = Layout::create(dir)?;
    for image in whole {
        let real = image.layout()?.image(TAG)?;
        let layers = real.layers.iter().map(|layer| layout.share(layer)).collect::<Result<Vec<_>>>()?;
        layout.add_stored(image.name(), &layers, &real.config["config"])?;
    }
    core(&layout)?;
    Ok(layout)
}

fn core(layout: &Layout) -> Result<()> {
    let real = RealImage::Python.layout()?.image(TAG)?;
    // Without the hundreds of megabytes of its libraries.
    let [base, python, ..] = real.layers.as_slice() else { anyhow::bail!("the image has less than two layers") };
    let program = |name: &str| program(base, name);
    let lower = lower(&program("usr/bin/cat")?, &program("usr/bin/id")?);
    let layer = |tar, compression| layout.put_layer(&NewLayer { tar, compression });
    let layers = [
        layout.share(base)?,
        layout.share(python)?,
        layer(Tarball::of(lower), Compression::Gzip(6))?,
        layer(Tarball::of(upper()), Compression::Zstd)?,
    ];
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    layout.add_stored(CORE, &layers, &json!({"Env": [path, "LC_ALL=C.UTF-8"]})).map(drop)
}

/// A program of a layer, to be put into another one with other attributes.
fn program(layer: &LayoutLayer, name: &str) -> Result<Vec<u8>> {
    let mut command = Command::new("tar");
    command.args(["--extract", "--gzip", "--to-stdout", "--occurrence=1", "--file"]).arg(&layer.path);
    run(command.arg(name)).with_context(|| format!("get {name} from {}", layer.path.display()))
}

/// `cap_dac_override` and `cap_net_bind_service`, permitted and effective, as the kernel stores them
/// (`struct vfs_cap_data` of capability.h, revision 2). Both are among those that containers have.
fn capabilities() -> Vec<u8> {
    const REVISION_2_EFFECTIVE: u32 = 0x0200_0001;
    const PERMITTED: u32 = 1 << 1 | 1 << 10;
    [REVISION_2_EFFECTIVE, PERMITTED, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// An access list that lets [`SOMEBODY`] read a file of root's, as the kernel stores it (posix_acl_xattr.h).
fn access_list() -> Vec<u8> {
    const VERSION: u32 = 2;
    const NOBODY_BY_NAME: u32 = u32::MAX;
    let entries: [(u16, u16, u32); 5] = [
        (0x01, 6, NOBODY_BY_NAME), // the owner
        (0x02, 4, SOMEBODY as u32),
        (0x04, 0, NOBODY_BY_NAME), // the group
        (0x10, 4, NOBODY_BY_NAME), // the mask
        (0x20, 0, NOBODY_BY_NAME), // others
    ];
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn file(name: &str, len_bytes: u64) -> Entry {
    Entry::file(format!("cases/{name}"), content(name, len_bytes)).mtime(1_600_000_000, 123_456_789)
}

fn directory(name: &str) -> Entry {
    Entry::directory(format!("cases/{name}"))
}

/// Everything that a program may care about.
fn lower(cat: &[u8], id: &[u8]) -> Vec<Entry> {
    let mut entries = vec![Entry::directory("cases")];
    let named = |name: &str, data: &[u8]| Entry::file(format!("cases/{name}"), data);
    let list = "system.posix_acl_access";
    entries.extend([
        directory("data"),
        file("data/large", LARGE_LEN_BYTES),
        file("data/attributes", 10).xattr("user.first", b"1").xattr("user.second", b"\0\xff\n"),
        file("data/private", 20).mode(0o600),
        // The mask stands where the group's permissions are.
        file("data/listed", 30).mode(0o640).xattr(list, access_list()),
        file("data/locked", 40),
        file("data/writable", 50).mode(0o666),
        file("data/flags", 60),
        directory("closed").mode(0o700),
        file("closed/inside", 70),
        directory("bin"),
        named("bin/capable", cat).mode(0o755).xattr("security.capability", capabilities()),
        named("bin/id-user", id).mode(0o4755),
        named("bin/id-group", id).mode(0o2755).owner(0, 42),
        directory("links"),
        file("links/a", 80),
        Entry::hard_link("cases/links/b", "cases/links/a"),
        Entry::hard_link("cases/links/c", "cases/links/a"),
        Entry::new(b'3', "cases/null").mode(0o666).device(1, 3),
        Entry::new(b'6', "cases/fifo").mode(0o600),
        Entry::symlink("cases/to", "data/large"),
        directory("names"),
        file("names/one", 90),
        file("names/two", 100),
        file("names/three", 110),
        directory("tree"),
        directory("tree/sub"),
        file("tree/sub/deep", 120),
        file("tree/file", 130),
        directory("again"),
        file("again/file", 140),
        file("again/other", 150),
        file("deleted", 160),
        directory("opaque"),
        file("opaque/hidden", 170),
        directory("replaced"),
        file("replaced/old", 180),
        directory("shared").mode(0o2775).owner(0, 1001),
        directory("sticky").mode(0o1777),
        file("sticky/theirs", 190),
        file("sticky/mine", 200).owner(SOMEBODY, SOMEBODY),
        directory("copy-up"),
    ]);
    let changes =
        ["append", "mode", "owner", "time", "attribute", "shorter", "longer", "hole", "nothing", "same", "old", "many"];
    entries.extend(
        changes
            .iter()
            .map(|name| file(&format!("copy-up/{name}"), SMALL_LEN_BYTES).owner(7, 8).xattr("user.kept", b"as it was")),
    );
    entries
}

/// What the uppermost layer deletes, hides and replaces. Every folder is named, because a pull makes up the times of those
/// that are not (docs/semantics.md).
fn upper() -> Vec<Entry> {
    vec![
        Entry::directory("cases"),
        Entry::whiteout("cases/deleted"),
        directory("opaque"),
        Entry::opaque("cases/opaque"),
        directory("replaced"),
        Entry::opaque("cases/replaced"),
        file("replaced/new", 210),
        directory("names"),
        file("names/two", 220),
    ]
}
