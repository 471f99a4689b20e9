//! Figures of the EROFS writer and reader, over a tree of 30,000 files: `cargo run --release -p hermes-image --example
//! erofs [-- FOLDER]`. As root it also mounts the image, and, where mkfs.erofs 1.8 or newer is on PATH, the tar index
//! that it makes of the same files, and compares cold walks.
//!
//! The tar, the images and nothing else are written to FOLDER (default: a new folder in the system's place for
//! temporary files, removed at the end).

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hermes_image::erofs::{FileType, Image, write};
use hermes_image::ids::{DiffId, LogicalOffset};
use hermes_image::tree::{Extent, ExtentSource, Inode, InodeKind, Timestamp, Tree, TreeLayer};
use rustix::fs::{Advice, fadvise};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};

/// Directories, and files in each: the shape of a large Python image.
const DIRECTORIES: u32 = 1_500;
const FILES: u32 = 20;
/// Cold walks of each image; the median counts.
const ROUNDS: usize = 15;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let folder = std::env::args_os().nth(1).map_or_else(|| temporary.path().to_owned(), PathBuf::from);
    let tar = folder.join("layer.tar");
    for (what, times) in
        [("one time for all files", 1), ("times of 50 packages", 50), ("a time for every file", u32::MAX)]
    {
        println!("\n{what}:");
        let tree = write_tar(&tar, times)?;
        let ours = folder.join("ours.erofs");
        figures(&tree, &ours)?;
        compare_mounts(&folder, &tar, &ours)?;
    }
    Ok(())
}

/// Writes a tar of the tree that it returns: directories of small files, a few large ones.
fn write_tar(path: &Path, times: u32) -> Result<Tree> {
    let mut tar = BufWriter::new(File::create(path)?);
    let mut at = 0_u64;
    let mut tree =
        Tree { layers: Vec::new(), inodes: vec![inode(0, InodeKind::Directory { entries: vec![], parent: 0 })] };
    header(&mut tar, "./", 0, 0, b'5')?;
    at += 512;
    let mut root_entries = Vec::new();
    for d in 0..DIRECTORIES {
        let directory = tree.inodes.len() as u32;
        let name = format!("package-{d:04}");
        header(&mut tar, &format!("./{name}/"), 0, 0, b'5')?;
        at += 512;
        tree.inodes.push(inode(0, InodeKind::Directory { entries: vec![], parent: 0 }));
        let mut entries = Vec::new();
        for f in 0..FILES {
            let file_name = format!("module_{:x}_{f}.py", (d * 31 + f * 7919) % 65_521);
            let size = u64::from((d * 7 + f * 131) % 9_000 + 1);
            let mtime = (d * FILES + f) % times.max(1) * u32::from(times > 1);
            header(&mut tar, &format!("./{name}/{file_name}"), size, mtime, b'0')?;
            let padded = size.next_multiple_of(512);
            tar.write_all(&vec![f as u8; padded as usize])?;
            let source = ExtentSource::Layer { layer: 0, offset: LogicalOffset(at + 512) };
            let extents = vec![Extent { file_offset: 0, len_bytes: size, source }];
            entries.push((file_name.into_bytes(), tree.inodes.len() as u32));
            tree.inodes.push(inode(mtime, InodeKind::Regular { size_bytes: size, extents }));
            at += 512 + padded;
        }
        entries.sort();
        tree.inodes[directory as usize].kind = InodeKind::Directory { entries, parent: 0 };
        tree.inodes[directory as usize].link_count = 2;
        root_entries.push((name.into_bytes(), directory));
    }
    tar.write_all(&[0; 1024])?;
    tar.into_inner().map_err(|error| error.into_error())?.sync_all()?;
    tree.inodes[0].kind = InodeKind::Directory { entries: root_entries, parent: 0 };
    tree.inodes[0].link_count = 2 + DIRECTORIES;
    tree.layers = vec![TreeLayer { diff_id: DiffId([1; 32]), logical_len_bytes: at + 1024 }];
    Ok(tree)
}

fn inode(mtime: u32, kind: InodeKind) -> Inode {
    let mtime = Timestamp { seconds: 1_700_000_000 + i64::from(mtime), nanoseconds: 0 };
    Inode { permissions: 0o755, uid: 0, gid: 0, mtime, link_count: 1, xattrs: vec![], kind }
}

/// One ustar header (POSIX.1-1988, pax utility).
fn header(tar: &mut impl Write, path: &str, size: u64, mtime: u32, kind: u8) -> Result<()> {
    let mut block = [0; 512];
    let mut put = |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, path);
    put(100, "0000755");
    put(108, "0000000");
    put(116, "0000000");
    put(124, &format!("{size:011o}"));
    put(136, &format!("{:011o}", 1_700_000_000 + u64::from(mtime)));
    put(148, "        ");
    put(257, "ustar");
    put(263, "00");
    block[156] = kind;
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    tar.write_all(&block)?;
    Ok(())
}

/// Size of the image, and how fast it is written and read in memory.
fn figures(tree: &Tree, ours: &Path) -> Result<()> {
    let mut best = Duration::MAX;
    let mut bytes = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        bytes = write(tree)?;
        best = best.min(start.elapsed());
    }
    fs::write(ours, &bytes)?;
    let inodes = tree.inodes.len() as f64;
    println!("  image: {} bytes, {:.1} bytes an inode", bytes.len(), bytes.len() as f64 / inodes);
    println!("  write: {:.1} ms, {:.0} inodes/s", best.as_secs_f64() * 1e3, inodes / best.as_secs_f64());

    let image = Image::open(bytes)?;
    let mut names = Vec::new();
    let mut directories = vec![image.root()];
    let start = Instant::now();
    while let Some(directory) = directories.pop() {
        for entry in image.readdir(directory, 0)? {
            let entry = entry?;
            image.stat(entry.nid)?;
            if entry.kind == FileType::Directory && !entry.name.starts_with(b".") {
                directories.push(entry.nid);
            }
            names.push((directory, entry.name));
        }
    }
    let walk = start.elapsed();
    println!("  readdir + stat: {:.0} entries/s", names.len() as f64 / walk.as_secs_f64());
    let start = Instant::now();
    for (directory, name) in &names {
        image.lookup(*directory, name)?.ok_or("a name is missing")?;
    }
    println!("  lookup: {:.0} ns", start.elapsed().as_nanos() as f64 / names.len() as f64);
    Ok(())
}

/// Cold walks by the kernel: of our image, and of the tar index that mkfs.erofs makes of the same tar.
fn compare_mounts(folder: &Path, tar: &Path, ours: &Path) -> Result<()> {
    let theirs = folder.join("mkfs.erofs");
    let made = Command::new("mkfs.erofs").arg("--tar=i").arg(&theirs).arg(tar).output();
    let mut images = vec![("ours", ours.to_owned(), false), ("ours, in the page cache", ours.to_owned(), true)];
    match made {
        Ok(made) if made.status.success() => {
            let len = fs::metadata(&theirs)?.len();
            println!(
                "  mkfs.erofs --tar=i: {len} bytes, {:.1} an inode",
                len as f64 / f64::from(DIRECTORIES * (FILES + 1) + 1)
            );
            images.push(("mkfs.erofs", theirs.clone(), false));
            images.push(("mkfs.erofs, in the page cache", theirs, true));
        }
        _ => println!("  no mkfs.erofs 1.8 or newer on PATH: nothing to compare with"),
    }
    let mut times = vec![Vec::new(); images.len()];
    for _ in 0..ROUNDS {
        for ((_, image, read_ahead), times) in images.iter().zip(&mut times) {
            // Neither the image in the page cache nor an inode in the kernel's: the mount is new.
            let file = File::open(image)?;
            file.sync_all()?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
            if *read_ahead {
                io::copy(&mut &file, &mut io::sink())?;
            }
            let Some(mount) = mount(image, tar) else {
                println!("  no EROFS mounts here (root on Linux 6.12 or newer): no walk by the kernel");
                return Ok(());
            };
            let start = Instant::now();
            let count = walk(&PathBuf::from(format!("/proc/self/fd/{}/.", mount.as_raw_fd())))?;
            times.push(start.elapsed());
            assert_eq!(count, DIRECTORIES * (FILES + 1), "the walk missed something");
        }
    }
    let medians: Vec<f64> = times
        .iter_mut()
        .map(|times| {
            times.sort();
            times[times.len() / 2].as_secs_f64() * 1e3
        })
        .collect();
    for ((name, ..), median) in images.iter().zip(&medians) {
        println!("  kernel, cold walk with stat, {name}: {median:.1} ms");
    }
    if let [ours, ours_cached, theirs, theirs_cached] = medians[..] {
        println!("  mkfs.erofs / ours: {:.2}, in the page cache {:.2}", theirs / ours, theirs_cached / ours_cached);
    }
    Ok(())
}

fn mount(image: &Path, device: &Path) -> Option<OwnedFd> {
    let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).ok()?;
    fsconfig_set_flag(&context, "ro").ok()?;
    fsconfig_set_string(&context, "source", image).ok()?;
    fsconfig_set_string(&context, "device", device).ok()?;
    fsconfig_create(&context).ok()?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_RDONLY).ok()
}

/// What `find -newer` does: each directory's entries, then the metadata of each.
fn walk(path: &Path) -> Result<u32> {
    let mut count = 0;
    let mut waiting = vec![path.to_owned()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            count += 1;
            if entry.metadata()?.is_dir() {
                waiting.push(entry.path());
            }
        }
    }
    Ok(count)
}
