//! How layers act on each other: whiteouts, opaque directories, replaced types, missing parents, duplicates; and layers
//! with nothing in them.

use super::{OddImage, Oracles, ramp};
use crate::tarball::{Entry, Tarball};

pub(super) fn images(seed: u64) -> Vec<OddImage> {
    let base = || base(seed);
    vec![
        OddImage::new("whiteouts", [base(), whiteouts(), whiteouts_taken_back(seed)]),
        OddImage::new("opaque", [base(), opaque(seed), opaque_again(seed)]),
        OddImage::new("opaque-late", [base(), opaque_late(seed)]),
        OddImage::new("whiteout-then-file", [base(), whiteout_then_file(seed)]),
        OddImage::new("whiteout-then-directory", [base(), whiteout_then_directory(seed)]).oracles(Oracles::Overlayfs),
        OddImage::new("replaced", [base(), replaced(seed), replaced_back(seed)]),
        OddImage::new("directory-metadata", [base(), directory_metadata()]),
        OddImage::new("directory-xattrs", directory_xattrs(seed)).oracles(Oracles::Overlayfs),
        OddImage::new("missing-parents", [missing_parents(seed), missing_again(seed)]),
        OddImage::new("duplicates", [duplicates(seed)]),
        OddImage::new("empty-layers", empty_layers(seed)),
        OddImage::new("fifty-layers", (0..50).map(|layer| one_of_fifty(seed, layer))),
        OddImage::new("odd-ends", odd_ends(seed)),
    ]
}

/// What later layers work on.
fn base(seed: u64) -> Vec<u8> {
    let mut entries = vec![Entry::file("file", ramp(seed, 900)), Entry::symlink("link", "file")];
    for top in ["a", "b", "c"] {
        entries.push(Entry::directory(top).mode(0o750).owner(1, 2).mtime(5000, 5));
        for name in ["one", "two", "three"] {
            entries.push(Entry::file(format!("{top}/{name}"), ramp(seed, 100)));
        }
        entries.push(Entry::directory(format!("{top}/sub")).mode(0o700).mtime(6000, 6));
        entries.push(Entry::file(format!("{top}/sub/leaf"), ramp(seed, 200)));
        entries.push(Entry::hard_link(format!("{top}/hard"), format!("{top}/one")));
        entries.push(Entry::new(b'6', format!("{top}/pipe")));
        entries.push(Entry::symlink(format!("{top}/up"), "../file"));
    }
    Tarball::of(entries)
}

fn whiteouts() -> Vec<u8> {
    let names = ["file", "link", "a/one", "a/sub", "a/pipe", "a/up", "b", "c/sub/leaf", "c/no-such", "c/none/nor-this"];
    Tarball::of(names.map(Entry::whiteout))
}

fn whiteouts_taken_back(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::file("file", ramp(seed, 901)),
        // What was deleted below stays deleted when its directory comes back.
        Entry::directory("b").mode(0o711),
        Entry::file("b/four", ramp(seed, 902)),
        Entry::directory("a/sub"),
        Entry::symlink("a/one", "two"),
        Entry::whiteout("c/two"),
    ])
}

fn opaque(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::directory("a").mode(0o755),
        Entry::opaque("a"),
        Entry::file("a/new", ramp(seed, 300)),
        Entry::directory("a/sub"),
        Entry::file("a/sub/fresh", ramp(seed, 301)),
        Entry::directory("b/sub"),
        Entry::opaque("b/sub"),
    ])
}

/// An opaque directory over an opaque one, and one over nothing.
fn opaque_again(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::directory("a").mode(0o700),
        Entry::opaque("a"),
        Entry::file("a/one", ramp(seed, 302)),
        Entry::directory("d"),
        Entry::opaque("d"),
        Entry::file("d/file", ramp(seed, 303)),
    ])
}

/// The marker hides the layers below, not what its own layer brought before it.
fn opaque_late(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::directory("a").mode(0o755),
        Entry::file("a/before", ramp(seed, 304)),
        Entry::file("a/one", ramp(seed, 305)),
        Entry::directory("a/sub"),
        Entry::file("a/sub/before", ramp(seed, 306)),
        Entry::opaque("a"),
        Entry::file("a/after", ramp(seed, 307)),
    ])
}

/// A name that is deleted and brought again by one layer.
fn whiteout_then_file(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::whiteout("a"),
        Entry::file("a", ramp(seed, 310)),
        Entry::whiteout("b/one"),
        Entry::file("b/one", ramp(seed, 311)),
        Entry::whiteout("c/sub"),
        Entry::symlink("c/sub", "../a"),
        Entry::whiteout("link"),
        Entry::hard_link("link", "b/one"),
    ])
}

/// The spec says that the directory is new; containerd's overlay way forgets the deletion, because overlayfs has one
/// mark for both.
fn whiteout_then_directory(seed: u64) -> Vec<u8> {
    Tarball::of([Entry::whiteout("a"), Entry::directory("a").mode(0o755), Entry::file("a/fresh", ramp(seed, 312))])
}

/// Every type replaced by another, without a whiteout.
fn replaced(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::file("a", ramp(seed, 320)),
        Entry::symlink("b", "c"),
        Entry::directory("file"),
        Entry::file("file/inner", ramp(seed, 321)),
        Entry::directory("link").mode(0o700),
        Entry::directory("c/one"),
        Entry::new(b'6', "c/two"),
        Entry::new(b'3', "c/pipe").device(1, 3),
        Entry::file("c/up", ramp(seed, 322)),
        Entry::file("c/sub", ramp(seed, 323)),
    ])
}

/// What was hidden by a file stays hidden when a directory of that name returns.
fn replaced_back(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::directory("a"),
        Entry::file("a/again", ramp(seed, 324)),
        Entry::directory("b"),
        Entry::file("b/again", ramp(seed, 325)),
        Entry::file("file", ramp(seed, 326)),
        Entry::directory("c/sub"),
    ])
}

fn directory_metadata() -> Vec<u8> {
    Tarball::of([
        Entry::directory("a").mode(0o1777).owner(50, 60).mtime(7000, 7),
        Entry::directory("b/sub").mode(0o2755).mtime(8000, 8).xattr("user.new", "second layer"),
        // The root itself, which containerd leaves as it is.
        Entry::directory("./").mode(0o700).owner(9, 9).mtime(9000, 9),
    ])
}

/// A directory that a later layer names has that layer's attributes only; one into which it merely writes keeps its own.
fn directory_xattrs(seed: u64) -> [Vec<u8>; 2] {
    [
        Tarball::of([
            Entry::directory("named").xattr("user.lower", "1").xattr("user.both", "1"),
            Entry::directory("unnamed").xattr("user.lower", "1"),
        ]),
        Tarball::of([
            Entry::directory("named").xattr("user.upper", "2").xattr("user.both", "2"),
            Entry::file("unnamed/file", ramp(seed, 30)),
        ]),
    ]
}

fn missing_parents(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::file("x/y/z/file", ramp(seed, 400)),
        Entry::symlink("p/q/link", "target"),
        Entry::new(b'6', "r/s/pipe"),
        Entry::directory("t/u/v").mode(0o700),
        // Named only after something was put into it.
        Entry::file("late/first", ramp(seed, 401)),
        Entry::directory("late").mode(0o705).owner(3, 4).mtime(3000, 3),
        Entry::hard_link("w/hard", "x/y/z/file"),
        Entry::whiteout("m/n/nothing"),
    ])
}

/// A later layer writes into directories that it does not name; their metadata stays.
fn missing_again(seed: u64) -> Vec<u8> {
    Tarball::of([Entry::file("late/second", ramp(seed, 402)), Entry::file("x/y/other", ramp(seed, 403))])
}

/// The last entry of a name wins, whatever it was before; directories are merged.
fn duplicates(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::file("file", ramp(seed, 500)).mode(0o600),
        Entry::file("file", ramp(seed, 501)).mode(0o640).owner(1, 1),
        Entry::file("file-then-directory", ramp(seed, 502)),
        Entry::directory("file-then-directory"),
        Entry::file("file-then-directory/inner", ramp(seed, 503)),
        Entry::directory("directory-then-file"),
        Entry::file("directory-then-file/inner", ramp(seed, 504)),
        Entry::file("directory-then-file", ramp(seed, 505)),
        Entry::directory("directory-then-link"),
        Entry::file("directory-then-link/inner", ramp(seed, 506)),
        Entry::symlink("directory-then-link", "file"),
        Entry::directory("merged").mode(0o700).mtime(100, 0),
        Entry::file("merged/one", ramp(seed, 507)),
        Entry::directory("merged").mode(0o755).mtime(200, 0),
        Entry::file("merged/two", ramp(seed, 508)),
        Entry::symlink("link", "one"),
        Entry::symlink("link", "two"),
        Entry::new(b'6', "pipe"),
        Entry::new(b'3', "pipe").device(1, 9),
        // A shorter file leaves nothing of a longer one; its hard link keeps the longer.
        Entry::file("long", ramp(seed, 5000)),
        Entry::hard_link("long-kept", "long"),
        Entry::file("long", ramp(seed, 10)),
        Entry::file("./long", ramp(seed, 11)),
    ])
}

fn empty_layers(seed: u64) -> Vec<Vec<u8>> {
    vec![
        Tarball::new().finish(),
        Tarball::of([Entry::file("file", ramp(seed, 600))]),
        // Nothing at all, not even an end.
        Vec::new(),
        Tarball::of([Entry::directory("./")]),
        Tarball::of([Entry::whiteout("no-such")]),
    ]
}

fn one_of_fifty(seed: u64, layer: u64) -> Vec<u8> {
    Tarball::of([
        Entry::directory("all"),
        Entry::file(format!("all/{layer}"), ramp(seed ^ layer, 1000)),
        Entry::file("newest", ramp(seed ^ layer, 500)),
        Entry::whiteout(&format!("all/{}", (layer + 49) % 50 / 2)),
    ])
}

/// Streams that end otherwise than with two blocks of zeros.
fn odd_ends(seed: u64) -> Vec<Vec<u8>> {
    let tarball = |name: &str| {
        let mut tarball = Tarball::new();
        tarball.add(&Entry::file(name, ramp(seed, 700)));
        tarball
    };
    let with_tail = |name, tail: &[u8]| [tarball(name).unfinished(), tail.to_vec()].concat();
    vec![
        with_tail("no-end", &[]),
        with_tail("one-block", &[0; 512]),
        // GNU tar pads to records of 10 KiB.
        with_tail("padded", &[0; 10_240]),
        // Behind the end anything may stand: it belongs to the diffID, not to the tree.
        with_tail("garbage", &[&[0; 1024][..], &ramp(seed, 3000)].concat()),
        with_tail("entry-behind-end", &[&[0; 1024][..], &tarball("unseen").finish()].concat()),
    ]
}
