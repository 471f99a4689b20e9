//! What a start reads, guessed of an image that may say anything.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use hermes_image::erofs::{self, Image};
use hermes_image::guess::{self, Command, GuessedFile, LIMITS, Limits, Source};
use hermes_image::ids::{DiffId, LogicalOffset};
use hermes_image::tree::{Extent, ExtentSource, Inode, InodeKind, Timestamp, Tree, TreeLayer};

use crate::parts::split;

/// The files of the image, each with one of the three contents of an input: what is run, what runs it, what that needs.
const FILES: [(&str, usize); 17] = [
    ("/app/main", 0),
    ("/app/main.js", 0),
    ("/app/main.py", 0),
    ("/app/one.py", 2),
    ("/app/node_modules/p/index.js", 2),
    ("/app/node_modules/p/package.json", 1),
    ("/app/jars/a.jar", 1),
    ("/bin/a", 1),
    ("/bin/java", 1),
    ("/bin/node", 1),
    ("/bin/python3", 1),
    ("/bin/sh", 1),
    ("/etc/ld.so.conf", 2),
    ("/lib/liba.so", 2),
    ("/lib/libb.so", 1),
    ("/usr/lib/python3.11/encodings/__init__.py", 2),
    ("/usr/lib/python3.11/os.py", 2),
];
/// Bounds that an input can meet.
const TIGHT: Limits = Limits { files: 5, bytes: 3000, file_bytes: 1000, depth: 2, read_bytes: 5000 };

/// Whatever an image says, a guess of it ends, stays within its bounds, and is the same every time.
pub fn guess(data: &[u8]) {
    let [command, contents @ ..] = split::<4>(data);
    let (tree, layer) = tree(contents);
    let written = erofs::write(&tree).expect("a small tree can be written");
    let image = Image::open(written.as_slice()).expect("our own image can be read");
    // The first line is the command, the others are the environment.
    let text = String::from_utf8_lossy(command);
    let mut lines = text.lines();
    let words = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let command = Command {
        entrypoint: words.collect(),
        env: lines.map(str::to_owned).collect(),
        working_dir: "/app".to_owned(),
        ..Command::default()
    };
    for limits in [LIMITS, TIGHT] {
        let (guessed, said) = within(&image, &command, limits, &layer);
        assert_eq!(guessed.files, said, "the list is not what was told");
        assert!(guessed.files.len() <= limits.files);
        let bytes: u64 = guessed.files.iter().map(GuessedFile::len_bytes).sum();
        assert!(bytes <= limits.bytes);
        let paths: BTreeSet<&str> = guessed.files.iter().map(|file| file.path.as_str()).collect();
        assert_eq!(paths.len(), guessed.files.len(), "a file is in the list twice");
        assert!(paths.iter().all(|path| FILES.iter().any(|(file, _)| file == path)));
        assert_eq!(within(&image, &command, limits, &layer).0, guessed, "another guess of the same image");
    }
}

fn within(image: &Image<&[u8]>, command: &Command, limits: Limits, layer: &[u8]) -> (guess::Guess, Vec<GuessedFile>) {
    let mut bytes = Bytes { layer, left_bytes: limits.read_bytes, found: Vec::new() };
    let guessed = guess::guess(image, command, limits, &mut bytes);
    (guessed, bytes.found)
}

/// The bytes of the one layer.
struct Bytes<'a> {
    layer: &'a [u8],
    left_bytes: u64,
    found: Vec<GuessedFile>,
}

impl Bytes<'_> {
    fn part(&self, layer: u16, range: &Range<u64>) -> &[u8] {
        assert_eq!(layer, 0);
        &self.layer[range.start as usize..range.end as usize]
    }
}

impl Source for Bytes<'_> {
    fn read(&mut self, layer: u16, range: Range<u64>) -> Option<Vec<u8>> {
        let len_bytes = range.end - range.start;
        self.left_bytes = self.left_bytes.checked_sub(len_bytes).expect("no more is read than the limit");
        Some(self.part(layer, &range).to_vec())
    }

    fn ahead(&mut self, parts: &[(u16, Range<u64>)]) {
        for (layer, range) in parts {
            self.part(*layer, range);
        }
    }

    fn found(&mut self, file: &GuessedFile) {
        self.ahead(&file.pieces);
        self.found.push(file.clone());
    }
}

/// The image, and its layer.
fn tree(contents: [&[u8]; 3]) -> (Tree, Vec<u8>) {
    let (mut layer, mut offsets) = (Vec::new(), Vec::new());
    for content in contents {
        offsets.push(LogicalOffset(layer.len() as u64));
        layer.extend_from_slice(content);
        layer.resize(layer.len().next_multiple_of(512).max(512), 0);
    }
    let inode = |kind| Inode {
        permissions: 0o755,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        link_count: 1,
        xattrs: Vec::new(),
        kind,
    };
    let folder = |parent| inode(InodeKind::Directory { entries: Vec::new(), parent });
    let mut inodes = vec![folder(0)];
    let mut folders: BTreeMap<&str, u32> = BTreeMap::from([("", 0)]);
    for (path, content) in FILES {
        let mut above = 0;
        for (at, _) in path.match_indices('/').skip(1) {
            above = match folders.get(&path[..at]) {
                Some(known) => *known,
                None => {
                    let new = add(&mut inodes, above, &path[..at], folder(above));
                    folders.insert(&path[..at], new);
                    new
                }
            };
        }
        let size_bytes = contents[content].len() as u64;
        let source = ExtentSource::Layer { layer: 0, offset: offsets[content] };
        let extent = Extent { file_offset: 0, len_bytes: size_bytes, source };
        let extents = if size_bytes == 0 { Vec::new() } else { vec![extent] };
        add(&mut inodes, above, path, inode(InodeKind::Regular { size_bytes, extents }));
    }
    for inode in &mut inodes {
        if let InodeKind::Directory { entries, .. } = &mut inode.kind {
            entries.sort_unstable();
        }
    }
    let layers = vec![TreeLayer { diff_id: DiffId([1; 32]), logical_len_bytes: layer.len() as u64 }];
    (Tree { layers, inodes }, layer)
}

fn add(inodes: &mut Vec<Inode>, above: u32, path: &str, inode: Inode) -> u32 {
    let number = inodes.len() as u32;
    inodes.push(inode);
    let name = path.rsplit('/').next().unwrap_or_default().as_bytes().to_vec();
    if let InodeKind::Directory { entries, .. } = &mut inodes[above as usize].kind {
        entries.push((name, number));
    }
    number
}
