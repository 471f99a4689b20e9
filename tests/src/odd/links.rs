//! Hard links in every order and symbolic links as parents.

use super::{OddImage, Oracles, ramp};
use crate::tarball::{Entry, Tarball};

pub(super) fn images(seed: u64) -> Vec<OddImage> {
    vec![
        OddImage::new("hard-links", [hard_links(seed), links_replaced(seed)]),
        OddImage::new("special-links", [special_links()]),
        OddImage::new("thousand-links", [thousand_links(seed)]),
        OddImage::new("link-metadata", [link_metadata(seed)]),
        OddImage::new("symlinked-parents", [symlinked_parents(seed)]),
        OddImage::new("symlinked-parents-below", [merged_usr(seed), through_lower_link(seed)])
            .oracles(Oracles::Overlayfs),
        OddImage::new("links-removed", [hard_links(seed), names_removed()]),
    ]
}

fn hard_links(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::file("a", ramp(seed, 5000)).mode(0o4755).owner(10, 20).xattr("user.x", "of the inode"),
        Entry::hard_link("b", "a").mode(0o4755).owner(10, 20),
        // A link to a link is a link to the file.
        Entry::hard_link("c", "b").mode(0o4755).owner(10, 20),
        Entry::directory("dir"),
        Entry::hard_link("dir/d", "/c").mode(0o4755).owner(10, 20),
        Entry::file("empty", []),
        Entry::hard_link("empty2", "empty"),
        // A writer may repeat the size of the target; there is no content behind it.
        Entry { size_bytes: Some(0), ..Entry::hard_link("sized", "a").mode(0o4755).owner(10, 20) },
    ])
}

/// Links to what is no regular file. In one layer: containerd's native way copies each such name alone.
fn special_links() -> Vec<u8> {
    Tarball::of([
        Entry::symlink("symlink", "a"),
        Entry::hard_link("symlink2", "symlink").mode(0o777),
        Entry::new(b'6', "pipe"),
        Entry::hard_link("pipe2", "pipe"),
        Entry::new(b'3', "device").device(1, 7),
        Entry::hard_link("device2", "device"),
        Entry::symlink("owned", "file").owner(1, 1).mtime(100, 0),
        Entry::hard_link("owned2", "owned").mode(0o777).owner(4, 5).mtime(300, 0),
    ])
}

/// One of several names gets a file of its own, the other names keep the old one.
fn links_replaced(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::file("b", ramp(seed, 77)),
        Entry::file("x", ramp(seed, 78)),
        Entry::hard_link("y", "x"),
        // In one layer, too: y keeps the first file.
        Entry::file("x", ramp(seed, 79)),
        // A link may replace a name.
        Entry::file("z", ramp(seed, 80)),
        Entry::hard_link("z", "y"),
    ])
}

fn names_removed() -> Vec<u8> {
    Tarball::of([Entry::whiteout("a"), Entry::whiteout("dir/d"), Entry::whiteout("empty2")])
}

fn thousand_links(seed: u64) -> Vec<u8> {
    let links = (0..1000).map(|index| Entry::hard_link(format!("links/{index}"), "file"));
    let tops = [Entry::directory("links"), Entry::file("file", ramp(seed, 70_000))];
    Tarball::of(tops.into_iter().chain(links))
}

/// A link's own header may say other things than its target's. The inode has one set of metadata: the last one.
fn link_metadata(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::file("file", ramp(seed, 50)).mode(0o600).owner(1, 1).mtime(100, 0).xattr("user.first", "1"),
        Entry::hard_link("link", "file").mode(0o755).owner(2, 3).mtime(200, 500).xattr("user.second", "2"),
    ])
}

/// A parent that is a symbolic link of the same layer is followed, within the tree.
fn symlinked_parents(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::directory("usr"),
        Entry::directory("usr/lib"),
        Entry::symlink("lib", "usr/lib"),
        Entry::file("lib/through", ramp(seed, 40)),
        Entry::symlink("absolute", "/usr/lib"),
        Entry::file("absolute/also", ramp(seed, 41)),
        // Above the root is the root, for links as well.
        Entry::symlink("usr/up", "../../../usr/lib"),
        Entry::file("usr/up/third", ramp(seed, 42)),
        Entry::symlink("chain", "lib"),
        Entry::file("chain/fourth", ramp(seed, 43)),
        Entry::hard_link("lib/hard", "chain/through"),
        // A directory entry with the name of a link to a directory replaces the link.
        Entry::symlink("replaced", "usr"),
        Entry::directory("replaced"),
        Entry::file("replaced/inner", ramp(seed, 44)),
    ])
}

fn merged_usr(seed: u64) -> Vec<u8> {
    Tarball::of([
        Entry::directory("usr"),
        Entry::directory("usr/lib"),
        Entry::file("usr/lib/old", ramp(seed, 45)),
        Entry::symlink("lib", "usr/lib"),
    ])
}

/// containerd's overlay way knows nothing of the layers below: the link becomes a directory.
fn through_lower_link(seed: u64) -> Vec<u8> {
    Tarball::of([Entry::file("lib/new", ramp(seed, 46))])
}
