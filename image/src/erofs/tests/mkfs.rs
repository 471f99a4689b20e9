//! What `mkfs.erofs` makes, read by our reader and by the kernel.

use std::fs;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;
use std::process::Command;

use super::entries::{from_directory, from_image};
use super::judges::{Mount, tool};
use crate::erofs::{Image, ReadError};

/// Fills `source` with what both ways of making an image are tried on: 209 paths.
fn fill(source: &Path) {
    fs::create_dir_all(source.join("deep/er")).expect("a directory");
    for no in 0..200_u32 {
        let bytes: Vec<u8> = (0..no * 37).map(|at| (at ^ no) as u8).collect();
        fs::write(source.join(format!("deep/file-{no}")), bytes).expect("a file");
    }
    for len in [5, 400, 600, 1500] {
        symlink("t".repeat(len), source.join(format!("link-{len}"))).expect("a symlink");
    }
    fs::hard_link(source.join("deep/file-9"), source.join("deep/er/same")).expect("a hard link");
    let pipe = source.join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("a pipe");
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(source.join("deep"), "trusted.test", b"value", flags).expect("an attribute");
}

fn run(command: &mut Command) {
    let output = command.output().expect("the program runs");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_tar_index_of_mkfs() {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let (source, tar, image) = (folder.path().join("s"), folder.path().join("layer.tar"), folder.path().join("image"));
    fill(&source);
    run(Command::new("tar").args(["--xattrs", "--format=pax", "-C"]).arg(&source).arg("-cf").arg(&tar).arg("."));
    run(Command::new(tool("mkfs.erofs")).arg("--tar=i").arg(&image).arg(&tar));

    let mount = Mount::new(&image, std::slice::from_ref(&tar));
    let tar = fs::File::open(&tar).expect("opens");
    let read = |layer: u16, offset: u64, out: &mut [u8]| {
        assert_eq!(layer, 0);
        tar.read_exact_at(out, offset).expect("bytes of the tar");
    };
    let ours = from_image(&Image::open(fs::read(&image).expect("reads")).expect("opens"), &read);
    assert_eq!(ours.len(), 209);
    assert_eq!(ours, from_directory(&mount.path()));
}

#[test]
fn a_whole_image_of_mkfs_with_pages_for_blocks_and_a_checksum() {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let (source, image) = (folder.path().join("s"), folder.path().join("image"));
    fill(&source);
    run(Command::new(tool("mkfs.erofs")).arg("-b4096").arg(&image).arg(&source));

    let mut bytes = fs::read(&image).expect("reads");
    let opened = Image::open(bytes.clone()).expect("opens");
    assert_eq!((opened.block_len_bytes(), opened.devices().len(), opened.has_any_xattr()), (4096, 0, true));
    let ours = from_image(&opened, &|_, _, _| panic!("there are no layers"));
    assert_eq!(ours.len(), 209);
    assert_eq!(ours, from_directory(&Mount::new(&image, &[]).path()));

    bytes[2000] ^= 1;
    assert!(matches!(Image::open(bytes), Err(ReadError::Checksum { .. })));
}
