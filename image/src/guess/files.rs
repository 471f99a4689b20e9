//! Files of a tree by path, and what they hold as far as somebody gives it.

use std::ops::Range;

use super::{GuessedFile, Source};
use crate::erofs::{FileType, Image, Nid, RangeSource};

/// Links in one path, as Linux counts (`MAXSYMLINKS`).
const LINKS_MAX: u32 = 40;
/// Longest path, as Linux counts (`PATH_MAX`).
const PATH_MAX: usize = 4096;
/// Entries of a folder that are looked at.
const ENTRIES_MAX: usize = 16 << 10;

/// A regular file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File {
    /// Links resolved.
    pub(super) path: String,
    pub(super) nid: Nid,
    pub(super) size_bytes: u64,
}

/// The files of a tree.
pub(super) struct Files<'a, 'r, B> {
    image: &'a Image<B>,
    source: &'a mut (dyn Source + 'r),
    /// Bytes that may still be read.
    left_bytes: u64,
    is_exhausted: bool,
}

impl<'a, 'r, B: AsRef<[u8]>> Files<'a, 'r, B> {
    pub(super) fn new(image: &'a Image<B>, source: &'a mut (dyn Source + 'r), read_bytes: u64) -> Self {
        Self { image, source, left_bytes: read_bytes, is_exhausted: false }
    }

    /// Whether something was not read for lack of room.
    pub(super) fn is_exhausted(&self) -> bool {
        self.is_exhausted
    }

    /// What is at an absolute path, links followed.
    fn resolve(&self, path: &str) -> Option<(String, Nid, FileType)> {
        let mut rest: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        let mut at: Vec<(String, Nid)> = Vec::new();
        let mut links = 0;
        while let Some(name) = rest.pop() {
            match name.as_str() {
                "" | "." => continue,
                ".." => {
                    at.pop();
                    continue;
                }
                _ => {}
            }
            let folder = at.last().map_or(self.image.root(), |(_, nid)| *nid);
            let nid = self.image.lookup(folder, name.as_bytes()).ok()??;
            if self.image.stat(nid).ok()?.kind != FileType::Symlink {
                at.push((name, nid));
                continue;
            }
            links += 1;
            let target = String::from_utf8(self.image.readlink(nid).ok()?.into_owned()).ok()?;
            if links > LINKS_MAX || target.len() > PATH_MAX {
                return None;
            }
            if target.starts_with('/') {
                at.clear();
            }
            rest.extend(target.split('/').rev().map(str::to_owned));
        }
        let nid = at.last().map_or(self.image.root(), |(_, nid)| *nid);
        let path = at.iter().map(|(name, _)| format!("/{name}")).collect::<String>();
        (path.len() <= PATH_MAX).then_some(())?;
        Some((path, nid, self.image.stat(nid).ok()?.kind))
    }

    /// The regular file at `path`.
    pub(super) fn regular(&self, path: &str) -> Option<File> {
        let (path, nid, kind) = self.resolve(path)?;
        (kind == FileType::Regular).then_some(())?;
        Some(File { path, nid, size_bytes: self.image.stat(nid).ok()?.size_bytes })
    }

    /// `path` without links, when there is something.
    pub(super) fn real_path(&self, path: &str) -> Option<String> {
        Some(self.resolve(path)?.0)
    }

    /// Whether there is a folder at `path`.
    pub(super) fn is_folder(&self, path: &str) -> bool {
        self.resolve(path).is_some_and(|(_, _, kind)| kind == FileType::Directory)
    }

    /// The names in the folder at `path`, in order; none when there is no such folder.
    pub(super) fn names(&self, path: &str) -> Vec<String> {
        let Some((_, nid, FileType::Directory)) = self.resolve(path) else { return Vec::new() };
        let Ok(entries) = self.image.readdir(nid, 0) else { return Vec::new() };
        let names = entries.take(ENTRIES_MAX).filter_map(|entry| String::from_utf8(entry.ok()?.name.to_vec()).ok());
        let mut names: Vec<String> = names.filter(|name| name != "." && name != "..").collect();
        names.sort_unstable();
        names
    }

    /// Where a part of a file is.
    pub(super) fn pieces(&self, file: &File, part: Range<u64>) -> Vec<(u16, Range<u64>)> {
        let Ok(extents) = self.image.extents(file.nid, part) else { return Vec::new() };
        let pieces = extents.map_while(Result::ok).filter_map(|piece| match piece.source {
            RangeSource::Device { index, offset } => Some((index, offset.0..offset.0.checked_add(piece.len_bytes)?)),
            RangeSource::Hole | RangeSource::Image { .. } => None,
        });
        pieces.collect()
    }

    /// Says that these parts of files will be read next.
    pub(super) fn ahead(&mut self, parts: Vec<(File, Range<u64>)>) {
        let parts = parts.into_iter().flat_map(|(file, part)| self.pieces(&file, part));
        let parts: Vec<_> = parts.collect();
        if !parts.is_empty() {
            self.source.ahead(&parts);
        }
    }

    /// Says that a file is in the list.
    pub(super) fn found(&mut self, file: &GuessedFile) {
        self.source.found(file);
    }

    /// A part of a file, cut at its end; `None` when it cannot be had or too much was read already.
    pub(super) fn read(&mut self, file: &File, part: Range<u64>) -> Option<Vec<u8>> {
        let part = part.start.min(file.size_bytes)..part.end.min(file.size_bytes);
        let len = part.end.checked_sub(part.start)?;
        if len > self.left_bytes {
            self.is_exhausted = true;
            return None;
        }
        self.left_bytes -= len;
        let mut bytes = Vec::with_capacity(usize::try_from(len).ok()?);
        for piece in self.image.extents(file.nid, part).ok()? {
            let piece = piece.ok()?;
            let piece_len = usize::try_from(piece.len_bytes).ok()?;
            match piece.source {
                RangeSource::Hole => bytes.resize(bytes.len() + piece_len, 0),
                RangeSource::Image { offset } => {
                    let start = usize::try_from(offset).ok()?;
                    bytes.extend_from_slice(self.image.bytes().as_ref().get(start..start.checked_add(piece_len)?)?);
                }
                RangeSource::Device { index, offset } => {
                    let read = self.source.read(index, offset.0..offset.0.checked_add(piece.len_bytes)?)?;
                    (read.len() == piece_len).then_some(())?;
                    bytes.extend_from_slice(&read);
                }
            }
        }
        Some(bytes)
    }

    /// All of a file as text, up to `max_bytes`; what is no UTF-8 is replaced.
    pub(super) fn text(&mut self, file: &File, max_bytes: u64) -> Option<String> {
        Some(String::from_utf8_lossy(&self.read(file, 0..max_bytes)?).into_owned())
    }
}
