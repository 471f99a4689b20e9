//! The push parser: tar stream in pieces -> entries.
//!
//! The walker is a state machine over 512-byte blocks and runs of data. Between two pieces it holds one block, at most
//! one extension header (1 MiB) or sparse map, what earlier extension headers said about the next entry, and, for a
//! sparse file with odd segments, its inline bytes. After an error it gives the same error again.

use std::mem;

use super::entry::{Entry, EntryKind, Metadata};
use super::error::{TarError, shown};
use super::header::{Block, Header, HeaderFault, name_field};
use super::number::{c_string, decimal, pax_time};
use super::pax::Pax;
use super::sparse::{Fault, Layout, MapText, OldMap, OldMapNext, PaxSparse, Segment, map_in_header};
use super::{BLOCK_LEN_BYTES, ENTRY_COUNT_MAX, EXTENSION_LEN_MAX_BYTES, INLINE_LEN_MAX_BYTES, LOGICAL_LEN_MAX_BYTES};
use crate::ids::LogicalOffset;
use crate::tree::{Extent, ExtentSource, Timestamp, Xattr};

const ZERO_BLOCK: Block = [0; 512];

/// A push parser for a layer's uncompressed tar stream.
#[derive(Debug)]
pub struct TarWalker {
    /// Logical offset of the next byte.
    offset: u64,
    state: State,
    block: Box<Block>,
    /// Bytes in `block`.
    filled: usize,
    /// What extension headers said about the entry to come.
    next: Extensions,
    /// Path of the last entry, for messages.
    last_path: Vec<u8>,
    entry_count: u32,
    inline_len: u64,
    failed: Option<TarError>,
}

#[derive(Debug)]
enum State {
    /// A header block comes.
    Header,
    /// One block of zeros has passed.
    ZeroBlock,
    /// The content of an extension header comes.
    Extension { header: Box<Header>, header_start: u64, content: Vec<u8>, left: u64 },
    /// An extension block of an old GNU sparse map comes.
    OldMap { draft: Box<Draft>, map: OldMap },
    /// A block of a version 1.0 sparse map comes.
    MapText { draft: Box<Draft>, map: MapText },
    /// Data comes, that an entry to deliver after it may need.
    Data { left: u64, capture: Option<Box<Capture>> },
    /// Padding comes.
    Padding { left: u64 },
    /// Two blocks of zeros have passed: what follows means nothing.
    End,
}

#[derive(Debug)]
struct Capture {
    entry: Entry,
    size_bytes: u64,
    layout: Layout,
}

/// What the extension headers before an entry say about it.
#[derive(Debug, Default)]
struct Extensions {
    start: Option<u64>,
    pax: Pax,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
}

/// An entry whose sparse map is not known yet.
#[derive(Debug)]
struct Draft {
    entry: Entry,
    /// Size of the file.
    size: i64,
    /// Bytes that follow in the tar.
    stored: u64,
}

impl Default for TarWalker {
    fn default() -> Self {
        Self::new()
    }
}

impl TarWalker {
    /// A walker at the start of a stream.
    pub fn new() -> Self {
        Self {
            offset: 0,
            state: State::Header,
            block: Box::new(ZERO_BLOCK),
            filled: 0,
            next: Extensions::default(),
            last_path: Vec::new(),
            entry_count: 0,
            inline_len: 0,
            failed: None,
        }
    }

    /// Takes the next bytes of the stream, and appends the entries that became known to `out`: each when its header
    /// and sparse map have passed, before its data, except sparse files with inline extents, which come after it.
    ///
    /// # Errors
    /// When the stream is not what containerd would unpack, or beyond a limit of [`crate::tar`]. Entries before the
    /// fault are in `out`. Every later call gives the same error.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<Entry>) -> Result<(), TarError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.step(rest, out) {
                Ok(used) => rest = &rest[used..],
                Err(error) => {
                    self.failed = Some(error.clone());
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Takes the end of the stream.
    ///
    /// # Errors
    /// When the stream ends inside a header or data, or failed before.
    pub fn finish(&mut self, _out: &mut Vec<Entry>) -> Result<(), TarError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let whole = match &self.state {
            State::Header | State::ZeroBlock => self.filled == 0,
            State::Padding { .. } | State::End => true,
            State::Extension { .. } | State::OldMap { .. } | State::MapText { .. } | State::Data { .. } => false,
        };
        if whole {
            self.state = State::End;
            return Ok(());
        }
        Err(TarError::Truncated { offset: self.offset, entry: shown(&self.last_path) })
    }

    /// Number of bytes taken so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Takes at least one of `bytes`, which are not empty, and says how many.
    fn step(&mut self, bytes: &[u8], out: &mut Vec<Entry>) -> Result<usize, TarError> {
        let at_most = |left: u64| bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        match &mut self.state {
            State::End => {
                self.offset += bytes.len() as u64;
                Ok(bytes.len())
            }
            State::Padding { left } => {
                let used = at_most(*left);
                *left -= used as u64;
                self.offset += used as u64;
                if *left == 0 {
                    self.state = State::Header;
                }
                Ok(used)
            }
            State::Data { left, capture } => {
                let used = at_most(*left);
                if let Some(capture) = capture {
                    capture.layout.pass(capture.entry.stored_len_bytes - *left, &bytes[..used]);
                }
                *left -= used as u64;
                self.offset += used as u64;
                if *left == 0 {
                    self.end_of_data(out);
                }
                Ok(used)
            }
            State::Extension { content, left, .. } => {
                let used = at_most(*left);
                content.extend_from_slice(&bytes[..used]);
                *left -= used as u64;
                self.offset += used as u64;
                if *left == 0 {
                    self.end_of_extension(out)?;
                }
                Ok(used)
            }
            State::Header | State::ZeroBlock | State::OldMap { .. } | State::MapText { .. } => {
                let used = bytes.len().min(self.block.len() - self.filled);
                self.block[self.filled..self.filled + used].copy_from_slice(&bytes[..used]);
                self.filled += used;
                self.offset += used as u64;
                if self.filled == self.block.len() {
                    self.filled = 0;
                    self.take_block(out)?;
                }
                Ok(used)
            }
        }
    }

    fn take_block(&mut self, out: &mut Vec<Entry>) -> Result<(), TarError> {
        match mem::replace(&mut self.state, State::Header) {
            State::ZeroBlock => {
                if *self.block != ZERO_BLOCK {
                    let offset = self.offset - BLOCK_LEN_BYTES;
                    return Err(TarError::LoneZeroBlock { offset, after: shown(&self.last_path) });
                }
                self.state = State::End;
                Ok(())
            }
            State::OldMap { draft, mut map } => match map.extend(&self.block) {
                Ok(OldMapNext::Extension) => {
                    self.state = State::OldMap { draft, map };
                    Ok(())
                }
                Ok(OldMapNext::Done) => self.sparse(*draft, &map.into_segments(), out),
                Err(fault) => Err(sparse_error(&draft.entry, fault)),
            },
            State::MapText { mut draft, mut map } => {
                // A map stands in whole blocks of the file's own data.
                let Some(stored) = draft.stored.checked_sub(BLOCK_LEN_BYTES) else {
                    return Err(sparse_error(&draft.entry, "its map is longer than its data"));
                };
                draft.stored = stored;
                match map.push(&self.block) {
                    Ok(Some(segments)) => self.sparse(*draft, &segments, out),
                    Ok(None) => {
                        self.state = State::MapText { draft, map };
                        Ok(())
                    }
                    Err(fault) => Err(sparse_error(&draft.entry, fault)),
                }
            }
            _ if *self.block == ZERO_BLOCK => {
                self.state = State::ZeroBlock;
                Ok(())
            }
            _ => self.header(out),
        }
    }

    fn header(&mut self, out: &mut Vec<Entry>) -> Result<(), TarError> {
        let offset = self.offset - BLOCK_LEN_BYTES;
        let header = Header::parse(&self.block).map_err(|fault| match fault {
            HeaderFault::Checksum => TarError::Checksum { offset, after: shown(&self.last_path) },
            HeaderFault::Number(field) => TarError::Number { entry: shown(name_field(&self.block)), offset, field },
        })?;
        let start = *self.next.start.get_or_insert(offset);
        if !matches!(header.type_flag, b'x' | b'g' | b'L' | b'K') {
            return self.entry(header, start, out);
        }
        let Ok(left) = u64::try_from(header.size) else {
            return Err(TarError::Number { entry: shown(&header.name), offset, field: "size" });
        };
        if left > EXTENSION_LEN_MAX_BYTES {
            return Err(TarError::ExtensionTooLong { entry: shown(&header.name), offset, len_bytes: left });
        }
        self.last_path.clone_from(&header.name);
        let content = Vec::new();
        self.state = State::Extension { header: Box::new(header), header_start: offset, content, left };
        if left == 0 { self.end_of_extension(out) } else { Ok(()) }
    }

    fn end_of_extension(&mut self, out: &mut Vec<Entry>) -> Result<(), TarError> {
        let State::Extension { mut header, header_start, content, .. } = mem::replace(&mut self.state, State::Header)
        else {
            return Ok(());
        };
        self.pad(content.len() as u64);
        let records = |header: &Header| {
            Pax::parse(&content).map_err(|_| TarError::Pax { entry: shown(&header.name), offset: header_start })
        };
        match header.type_flag {
            b'L' => self.next.long_name = c_string(&content).to_vec(),
            b'K' => self.next.long_link = c_string(&content).to_vec(),
            // A later extended header takes the place of an earlier one.
            b'x' => self.next.pax = records(&header)?,
            _ => {
                let records = records(&header)?;
                if !records.path.is_empty() {
                    header.name = records.path;
                }
                // Go hands a global header out at once, and forgets what came before it.
                let start = mem::take(&mut self.next).start.unwrap_or(header_start);
                let entry = Entry {
                    header_start: start,
                    data_start: header_start + BLOCK_LEN_BYTES,
                    stored_len_bytes: content.len() as u64,
                    path: header.name,
                    metadata: Metadata::default(),
                    kind: EntryKind::GlobalHeader,
                };
                self.deliver(entry, out)?;
            }
        }
        Ok(())
    }

    /// Starts an entry proper: applies what the extension headers say, and finds out where its data stands.
    fn entry(&mut self, mut header: Header, header_start: u64, out: &mut Vec<Entry>) -> Result<(), TarError> {
        let header_offset = self.offset - BLOCK_LEN_BYTES;
        let Extensions { pax, long_name, long_link, .. } = mem::take(&mut self.next);
        let mtime = merge(&mut header, &pax, long_name, long_link).map_err(|field| TarError::Number {
            entry: shown(&header.name),
            offset: header_offset,
            field,
        })?;
        self.last_path.clone_from(&header.name);
        if header.type_flag == 0 {
            // Archives from before the directory type mark directories by a slash.
            header.type_flag = if header.name.ends_with(b"/") { b'5' } else { b'0' };
        }
        let stored = if header.is_header_only() { 0 } else { header.size };
        let Ok(stored) = u64::try_from(stored) else {
            return Err(TarError::Number { entry: shown(&header.name), offset: header_offset, field: "size" });
        };
        if self.offset.saturating_add(stored) > LOGICAL_LEN_MAX_BYTES {
            return Err(TarError::TooFar { entry: shown(&header.name) });
        }
        let sparse = if header.type_flag == b'S' { PaxSparse::None } else { PaxSparse::of(&pax) };
        if sparse != PaxSparse::None {
            merge_sparse(&mut header, &pax).map_err(|fault| sparse_fault(&header.name, fault))?;
        }
        let is_sparse = header.type_flag == b'S' || sparse != PaxSparse::None;
        if is_sparse && header.is_header_only() {
            return Err(sparse_fault(&header.name, "only regular files can be sparse"));
        }
        let old_map = (header.type_flag == b'S').then(|| OldMap::start(&header, &self.block));
        let size = header.size;
        let entry = Entry {
            header_start,
            data_start: self.offset,
            stored_len_bytes: stored,
            metadata: metadata(&header, mtime, &pax),
            kind: kind(&mut header, self.offset),
            path: header.name,
        };
        if let Some(start) = old_map {
            let (map, size, next) = start.map_err(|fault| sparse_error(&entry, fault))?;
            let draft = Draft { entry, size, stored };
            if next == OldMapNext::Done {
                return self.sparse(draft, &map.into_segments(), out);
            }
            self.state = State::OldMap { draft: Box::new(draft), map };
            return Ok(());
        }
        match sparse {
            PaxSparse::None => {
                self.state = State::Data { left: stored, capture: None };
                self.deliver(entry, out)?;
                if stored == 0 {
                    self.end_of_data(out);
                }
                Ok(())
            }
            PaxSparse::InHeader => {
                let map = map_in_header(&pax).map_err(|fault| sparse_error(&entry, fault))?;
                self.sparse(Draft { entry, size, stored }, &map, out)
            }
            PaxSparse::BeforeData => {
                let draft = Box::new(Draft { entry, size, stored });
                self.state = State::MapText { draft, map: MapText::default() };
                Ok(())
            }
        }
    }

    /// Lays out a sparse file whose map is known; its data starts here.
    fn sparse(&mut self, draft: Draft, map: &[Segment], out: &mut Vec<Entry>) -> Result<(), TarError> {
        let Draft { mut entry, size, stored } = draft;
        entry.data_start = self.offset;
        entry.stored_len_bytes = stored;
        let budget = INLINE_LEN_MAX_BYTES - self.inline_len;
        let layout =
            Layout::new(map, size, self.offset, stored, budget).map_err(|fault| sparse_error(&entry, fault))?;
        let Some(layout) = layout else {
            return Err(TarError::InlineTooLong { entry: shown(&entry.path) });
        };
        self.inline_len += layout.inline_len();
        // `Layout::new` refuses negative sizes.
        let capture = Capture { entry, size_bytes: size.unsigned_abs(), layout };
        if capture.layout.has_copies() {
            self.state = State::Data { left: stored, capture: Some(Box::new(capture)) };
            return self.count();
        }
        self.state = State::Data { left: stored, capture: None };
        self.deliver(capture.into_entry(), out)?;
        if stored == 0 {
            self.end_of_data(out);
        }
        Ok(())
    }

    fn end_of_data(&mut self, out: &mut Vec<Entry>) {
        if let State::Data { capture: Some(capture), .. } = mem::replace(&mut self.state, State::Header) {
            out.push(capture.into_entry());
        }
        // Data starts at a multiple of 512, so the offset alone says how much padding follows.
        self.pad(self.offset);
    }

    /// Goes on to the padding after `len` bytes of content, or to the next header.
    fn pad(&mut self, len: u64) {
        let left = len.next_multiple_of(BLOCK_LEN_BYTES) - len;
        self.state = if left == 0 { State::Header } else { State::Padding { left } };
    }

    fn count(&mut self) -> Result<(), TarError> {
        if self.entry_count == ENTRY_COUNT_MAX {
            return Err(TarError::TooManyEntries { entry: shown(&self.last_path) });
        }
        self.entry_count += 1;
        Ok(())
    }

    fn deliver(&mut self, entry: Entry, out: &mut Vec<Entry>) -> Result<(), TarError> {
        self.count()?;
        out.push(entry);
        Ok(())
    }
}

impl Capture {
    fn into_entry(self) -> Entry {
        let mut entry = self.entry;
        // An unsupported type stays one, whatever its extended header says about sparseness.
        if let EntryKind::Regular { size_bytes, extents } = &mut entry.kind {
            *size_bytes = self.size_bytes;
            *extents = self.layout.into_extents();
        }
        entry
    }
}

fn sparse_fault(path: &[u8], fault: Fault) -> TarError {
    TarError::Sparse { entry: shown(path), fault }
}

fn sparse_error(entry: &Entry, fault: Fault) -> TarError {
    sparse_fault(&entry.path, fault)
}

/// Brings the extension headers into the header; gives the modification time, or the field that is no number.
fn merge(header: &mut Header, pax: &Pax, name: Vec<u8>, link: Vec<u8>) -> Result<Timestamp, &'static str> {
    let mut mtime = Timestamp { seconds: header.mtime, nanoseconds: 0 };
    for (field, value) in [(&mut header.name, &pax.path), (&mut header.link_name, &pax.link_path)] {
        if !value.is_empty() {
            field.clone_from(value);
        }
    }
    for (field, value, what) in [
        (&mut header.uid, &pax.uid, "owner"),
        (&mut header.gid, &pax.gid, "group"),
        (&mut header.size, &pax.size, "size"),
    ] {
        if !value.is_empty() {
            *field = decimal(value).ok_or(what)?;
        }
    }
    for (value, what) in [(&pax.atime, "access time"), (&pax.ctime, "change time"), (&pax.mtime, "modification time")] {
        if !value.is_empty() {
            mtime = pax_time(value).map(|time| if what == "modification time" { time } else { mtime }).ok_or(what)?;
        }
    }
    // GNU's own extension headers go before PAX records.
    if !name.is_empty() {
        header.name = name;
    }
    if !link.is_empty() {
        header.link_name = link;
    }
    Ok(mtime)
}

/// Brings the name and size of a sparse file into the header.
fn merge_sparse(header: &mut Header, pax: &Pax) -> Result<(), Fault> {
    if !pax.sparse_name.is_empty() {
        header.name.clone_from(&pax.sparse_name);
    }
    let size = if pax.sparse_size.is_empty() { &pax.sparse_real_size } else { &pax.sparse_size };
    if !size.is_empty() {
        header.size = decimal(size).ok_or("its real size is no number")?;
    }
    Ok(())
}

fn metadata(header: &Header, mtime: Timestamp, pax: &Pax) -> Metadata {
    Metadata {
        permissions: (header.mode & 0o7777) as u16,
        // chown(2) takes the low 32 bits, and so does containerd's call of it.
        uid: header.uid as u32,
        gid: header.gid as u32,
        mtime,
        xattrs: pax.xattrs.iter().map(|(name, value)| Xattr { name: name.clone(), value: value.clone() }).collect(),
    }
}

/// The kind of an entry whose data starts at `data_start`; takes the link name out of the header.
fn kind(header: &mut Header, data_start: u64) -> EntryKind {
    // mknod(2) takes 12 bits of major and 20 bits of minor number.
    let (major, minor) = (header.major as u32 & 0xfff, header.minor as u32 & 0xf_ffff);
    match header.type_flag {
        b'0' | b'7' | b'S' => {
            let size_bytes = u64::try_from(header.size).unwrap_or(0);
            let source = ExtentSource::Layer { layer: 0, offset: LogicalOffset(data_start) };
            let extent = Extent { file_offset: 0, len_bytes: size_bytes, source };
            EntryKind::Regular { size_bytes, extents: if size_bytes == 0 { Vec::new() } else { vec![extent] } }
        }
        b'1' => EntryKind::HardLink { target: mem::take(&mut header.link_name) },
        b'2' => EntryKind::Symlink { target: mem::take(&mut header.link_name) },
        b'3' => EntryKind::CharDevice { major, minor },
        b'4' => EntryKind::BlockDevice { major, minor },
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Fifo,
        type_flag => EntryKind::Unsupported { type_flag },
    }
}
