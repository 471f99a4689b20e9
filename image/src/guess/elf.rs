//! ELF programs and libraries, found by the rules of the loader (ld.so(8)).
//!
//! Four small parts of a file are read: the header, the program headers, the dynamic section, and the part of its string
//! table that names what it needs. That is why no library for object files stands here: those want the whole file in
//! memory, and a start may not read but a tenth of it.

use std::iter;
use std::ops::Range;
use std::rc::Rc;

use super::files::File;
use super::{Environment, Guesser, HEAD_BYTES, PLACES_MAX};

/// How an ELF file begins.
pub(super) const MAGIC: &[u8] = b"\x7fELF";
/// Program headers, dynamic entries and libraries of one file that are looked at. Real files have some 10, 40 and 30 of
/// them; programs of browsers have 150 libraries.
const HEADERS_MAX: u64 = 128;
const DYNAMIC_MAX: u64 = 512;
const NEEDED_MAX: usize = 256;
/// Longest name of a library. String tables of C++ libraries are megabytes, so names are read one by one.
const NAME_MAX_BYTES: u64 = 256;
/// Up to this length a file is read as a whole: of those of 256 KiB to 2 MiB that were recorded, 86 % was.
pub(super) const WHOLE_MAX_BYTES: u64 = 2 << 20;
/// Longest code of a library that a module of an interpreter brings, in bytes. Those of programs were read to 60 to 100 %
/// (`libnode.so`, `libjvm.so`, `libcrypto.so`), OpenBLAS, which has everything once for every processor, to 12 %.
const MODULE_CODE_MAX_BYTES: u64 = 8 << 20;
/// Longest read-only data: `libicudata.so` has 30 MB, of which 6 % were read.
const CONSTANTS_MAX_BYTES: u64 = 16 << 20;
/// Lists of library paths, and where they include others from as a rule.
const CONFIG: &str = "/etc/ld.so.conf";
const CONFIG_FOLDER: &str = "/etc/ld.so.conf.d";
/// Longest list of library paths that is read.
const CONFIG_MAX_BYTES: u64 = 64 << 10;
/// Files that `ld.so.conf` may include.
const INCLUDES_MAX: usize = 64;

// elf.h.
const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const PF_X: u64 = 1;
const PF_W: u64 = 2;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_RPATH: u64 = 15;
const DT_RUNPATH: u64 = 29;

/// What an ELF file says of what it needs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    pub(super) interpreter: Option<String>,
    pub(super) libraries: Vec<String>,
    pub(super) rpath: Vec<String>,
    pub(super) runpath: Vec<String>,
    pub(super) is_64: bool,
}

/// A part of the file that the loader maps.
struct Segment {
    /// Of the file.
    part: Range<u64>,
    /// In memory.
    address: u64,
    is_code: bool,
    is_written: bool,
}

/// An ELF file that is to be looked at.
pub(super) struct Binary {
    path: String,
    reason: String,
    depth: u32,
    environment: Rc<Environment>,
    /// The search paths that libraries inherit from what needs them.
    inherited: Vec<String>,
    /// Whether it belongs to a module of an interpreter, not to a program.
    is_module: bool,
}

impl Binary {
    pub(super) fn new(path: &str, reason: &str, depth: u32, environment: Rc<Environment>) -> Self {
        Self {
            path: path.to_owned(),
            reason: reason.to_owned(),
            depth,
            environment,
            inherited: Vec::new(),
            is_module: false,
        }
    }

    /// A module that an interpreter loads.
    pub(super) fn module(path: &str, reason: &str, depth: u32, environment: Rc<Environment>) -> Self {
        Self { is_module: true, ..Self::new(path, reason, depth, environment) }
    }
}

/// Numbers in the file's own width and order.
#[derive(Clone, Copy)]
struct Numbers {
    is_64: bool,
    is_big: bool,
}

impl Numbers {
    fn number(self, bytes: &[u8], at: usize, len: usize) -> Option<u64> {
        let bytes = bytes.get(at..at.checked_add(len)?)?;
        let fold = |value: u64, byte: &u8| (value << 8) | u64::from(*byte);
        Some(if self.is_big { bytes.iter().fold(0, fold) } else { bytes.iter().rev().fold(0, fold) })
    }

    /// A number that is 8 bytes at `at_64` of a 64-bit structure, or 4 at `at_32`.
    fn word(self, bytes: &[u8], at_64: usize, at_32: usize) -> Option<u64> {
        if self.is_64 { self.number(bytes, at_64, 8) } else { self.number(bytes, at_32, 4) }
    }
}

/// What the headers of an ELF file say.
struct Headers {
    numbers: Numbers,
    segments: Vec<Segment>,
    /// Offset and length.
    dynamic: Option<(u64, u64)>,
    interpreter: Option<(u64, u64)>,
}

impl Headers {
    fn read(read: &mut dyn FnMut(Range<u64>) -> Option<Vec<u8>>) -> Option<Self> {
        let header = read(0..64)?;
        header.starts_with(MAGIC).then_some(())?;
        let numbers = Numbers { is_64: *header.get(4)? == 2, is_big: *header.get(5)? == 2 };
        let table = numbers.word(&header, 32, 28)?;
        let (entry_len, count) = if numbers.is_64 {
            (numbers.number(&header, 54, 2)?, numbers.number(&header, 56, 2)?)
        } else {
            (numbers.number(&header, 42, 2)?, numbers.number(&header, 44, 2)?)
        };
        let count = count.min(HEADERS_MAX);
        let bytes = read(table..table.checked_add(entry_len.checked_mul(count)?)?)?;
        let mut headers = Self { numbers, segments: Vec::new(), dynamic: None, interpreter: None };
        for header in bytes.chunks_exact(usize::try_from(entry_len).ok().filter(|len| *len >= 32)?) {
            let (offset, address) = (numbers.word(header, 8, 4)?, numbers.word(header, 16, 8)?);
            let len = numbers.word(header, 32, 16)?;
            match u32::try_from(numbers.number(header, 0, 4)?).ok()? {
                PT_LOAD => {
                    let flags = numbers.number(header, if numbers.is_64 { 4 } else { 24 }, 4)?;
                    let part = offset..offset.checked_add(len)?;
                    let (is_code, is_written) = (flags & PF_X != 0, flags & PF_W != 0);
                    headers.segments.push(Segment { part, address, is_code, is_written });
                }
                PT_DYNAMIC => headers.dynamic = Some((offset, len)),
                PT_INTERP => headers.interpreter = Some((offset, len)),
                _ => {}
            }
        }
        Some(headers)
    }

    /// The parts of a long file that are likely to be read: what the loader looks up and writes, and code and constants
    /// unless there is very much of them.
    fn mapped(&self, is_module: bool) -> Vec<Range<u64>> {
        let mut parts: Vec<Range<u64>> = iter::once(0..HEAD_BYTES).collect();
        for (at, Segment { part, is_code, is_written, .. }) in self.segments.iter().enumerate() {
            let len = part.end - part.start;
            let is_left_out = match (is_code, is_written) {
                (true, _) => is_module && len > MODULE_CODE_MAX_BYTES,
                // The first one has the symbols.
                (false, false) => at > 0 && len > CONSTANTS_MAX_BYTES,
                (false, true) => false,
            };
            let end = parts.last().map_or(0, |last| last.end);
            if !is_left_out && part.end > end {
                parts.push(part.start.max(end)..part.end);
            }
        }
        parts
    }
}

/// What an ELF file needs. `read` gives parts of it, cut at its end.
pub(super) fn needs(mut read: impl FnMut(Range<u64>) -> Option<Vec<u8>>) -> Option<Needs> {
    let headers = Headers::read(&mut read)?;
    let numbers = headers.numbers;
    let mut found = Needs { is_64: numbers.is_64, ..Needs::default() };
    if let Some((offset, len)) = headers.interpreter {
        found.interpreter = text(&read(offset..offset.checked_add(len.min(NAME_MAX_BYTES))?)?);
    }
    let Some((offset, len)) = headers.dynamic else { return Some(found) };
    let pair = if numbers.is_64 { 16 } else { 8 };
    let bytes = read(offset..offset.checked_add(len.min(DYNAMIC_MAX * pair))?)?;
    let entries = bytes.chunks_exact(pair as usize).map_while(|entry| {
        let tag = numbers.word(entry, 0, 0)?;
        (tag != 0).then_some((tag, numbers.word(entry, 8, 4)?))
    });
    let entries: Vec<(u64, u64)> = entries.collect();
    let strings = entries.iter().find(|(tag, _)| *tag == DT_STRTAB).map(|(_, address)| *address)?;
    let strings = headers.segments.iter().find_map(|Segment { part, address, .. }| {
        let within = strings.checked_sub(*address).filter(|within| *within < part.end - part.start)?;
        part.start.checked_add(within)
    })?;
    for (tag, value) in entries {
        let mut name = || {
            let start = strings.checked_add(value)?;
            text(&read(start..start.checked_add(NAME_MAX_BYTES)?)?)
        };
        match tag {
            DT_NEEDED if found.libraries.len() < NEEDED_MAX => found.libraries.extend(name()),
            DT_RPATH => found.rpath = paths(name()),
            DT_RUNPATH => found.runpath = paths(name()),
            _ => {}
        }
    }
    Some(found)
}

/// The text up to the first zero byte.
fn text(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|byte| *byte == 0)?;
    String::from_utf8(bytes[..end].to_vec()).ok()
}

fn paths(list: Option<String>) -> Vec<String> {
    list.iter().flat_map(|list| list.split(':')).take(PLACES_MAX).map(str::to_owned).collect()
}

impl<B: AsRef<[u8]>> Guesser<'_, '_, B> {
    /// Looks at the ELF files that wait for it; what the loader loads with them waits then. That is breadth first, as the
    /// loader does it, and one step at a time, so that whatever else is followed goes on meanwhile.
    pub(super) fn load(&mut self) {
        let mut new = Vec::new();
        for binary in std::mem::take(&mut self.binaries) {
            let Some(file) = self.files.regular(&binary.path) else { continue };
            if self.looked_at.insert(file.path.clone()) {
                new.push((file, binary));
            }
        }
        // Their headers first: by them it goes on.
        self.files.ahead(new.iter().map(|(file, _)| (file.clone(), 0..HEAD_BYTES)).collect());
        let (short, long): (Vec<_>, Vec<_>) = new.iter().partition(|(file, _)| file.size_bytes <= WHOLE_MAX_BYTES);
        for (file, binary) in short {
            self.add(&file.path, &binary.reason);
        }
        for (file, binary) in long {
            let files = &mut self.files;
            let headers = Headers::read(&mut |part| files.read(file, part));
            match headers {
                Some(headers) => self.add_parts(&file.path, &headers.mapped(binary.is_module), &binary.reason),
                None => self.add(&file.path, &binary.reason),
            };
        }
        for (file, binary) in new {
            if !self.listed.contains(&file.path) {
                continue;
            }
            if binary.depth >= self.limits.depth {
                self.guess.is_cut = true;
                continue;
            }
            let files = &mut self.files;
            let Some(needs) = needs(|part| files.read(&file, part)) else { continue };
            let needed = self.needed(&file, binary, needs);
            self.binaries.extend(needed);
        }
    }

    /// What one file needs.
    fn needed(&mut self, file: &File, binary: Binary, needs: Needs) -> Vec<Binary> {
        let Binary { path, inherited, environment, depth, is_module, .. } = binary;
        let next = |path, reason, inherited| {
            let environment = Rc::clone(&environment);
            Binary { path, reason, depth: depth + 1, environment, inherited, is_module }
        };
        let mut found = Vec::new();
        let Search { own, inherited } = self.search(file, &needs, inherited, &environment);
        if let Some(interpreter) = needs.interpreter {
            found.push(next(interpreter, format!("the loader that {path} names"), Vec::new()));
        }
        for library in &needs.libraries {
            if let Some(place) = self.library(library, &own, needs.is_64) {
                found.push(next(place, format!("{path} needs {library}"), inherited.clone()));
            }
        }
        found
    }

    /// Where the loader looks for what a file needs, before its own places.
    fn search(&self, file: &File, needs: &Needs, inherited: Vec<String>, environment: &Environment) -> Search {
        let origin = file.path.rsplit_once('/').map_or("", |(folder, _)| folder).to_owned();
        let expand = |path: &String| path.replace("${ORIGIN}", &origin).replace("$ORIGIN", &origin);
        let environment = paths(environment.get("LD_LIBRARY_PATH").cloned());
        let runpath: Vec<String> = needs.runpath.iter().map(expand).collect();
        let mut own = Vec::new();
        let mut passed = inherited.clone();
        // DT_RPATH counts only without DT_RUNPATH, and for libraries of libraries, too.
        if runpath.is_empty() {
            let rpath: Vec<String> = needs.rpath.iter().map(expand).collect();
            own.extend(rpath.iter().cloned());
            own.extend(inherited);
            passed.extend(rpath);
        }
        own.extend(environment);
        own.extend(runpath);
        Search { own, inherited: passed }
    }

    /// The file that the loader takes for `name`.
    fn library(&mut self, name: &str, own: &[String], is_64: bool) -> Option<String> {
        if name.contains('/') {
            return Some(self.absolute(name));
        }
        let configured = self.configured_paths();
        let default: &[&str] = if is_64 {
            &["/lib64", "/usr/lib64", "/lib", "/usr/lib"]
        } else {
            &["/lib", "/usr/lib", "/lib32", "/usr/lib32"]
        };
        let places = own.iter().map(String::as_str).chain(configured.iter().map(String::as_str));
        let places = places.chain(default.iter().copied()).filter(|place| place.starts_with('/'));
        let mut found = places.map(|place| format!("{place}/{name}"));
        found.find(|path| self.files.regular(path).is_some())
    }

    /// Says that the lists of library paths will be read.
    pub(super) fn configured_ahead(&mut self) {
        let names = self.files.names(CONFIG_FOLDER).into_iter().take(INCLUDES_MAX);
        let paths = names.map(|name| format!("{CONFIG_FOLDER}/{name}")).chain([CONFIG.to_owned()]);
        let files = paths.filter_map(|path| Some((self.files.regular(&path)?, 0..CONFIG_MAX_BYTES)));
        self.files.ahead(files.collect());
    }

    /// The places of `ld.so.conf`, from which `ld.so.cache` is made, and those that distributions compile in.
    fn configured_paths(&mut self) -> Vec<String> {
        if let Some(known) = &self.library_paths {
            return known.clone();
        }
        let mut places = Vec::new();
        let mut files = vec![CONFIG.to_owned()];
        let mut read = 0;
        while let Some(path) = files.pop().filter(|_| read < INCLUDES_MAX) {
            read += 1;
            let Some(file) = self.files.regular(&path) else { continue };
            for line in self.files.text(&file, CONFIG_MAX_BYTES).unwrap_or_default().lines() {
                let line = line.split('#').next().unwrap_or_default().trim();
                match line.strip_prefix("include ") {
                    Some(pattern) => files.extend(self.included(pattern.trim())),
                    None if line.starts_with('/') => places.push(line.to_owned()),
                    None => {}
                }
            }
        }
        // Debian and its descendants compile these in.
        let triples = ["x86_64", "aarch64", "i386", "arm", "riscv64", "powerpc64le", "s390x"];
        for triple in triples {
            let abi = if triple == "arm" { "gnueabihf" } else { "gnu" };
            places.extend(["/lib", "/usr/lib"].map(|lib| format!("{lib}/{triple}-linux-{abi}")));
        }
        places.retain(|place| self.files.is_folder(place));
        self.library_paths = Some(places.clone());
        places
    }

    /// The files that `folder/*.ending` means.
    fn included(&self, pattern: &str) -> Vec<String> {
        let Some((folder, name)) = pattern.rsplit_once('/') else { return Vec::new() };
        let folder = if folder.starts_with('/') { folder.to_owned() } else { format!("/etc/{folder}") };
        let Some(ending) = name.strip_prefix('*') else { return vec![format!("{folder}/{name}")] };
        let names = self.files.names(&folder).into_iter().filter(|name| name.ends_with(ending));
        names.take(INCLUDES_MAX).map(|name| format!("{folder}/{name}")).collect()
    }
}

/// Search paths.
struct Search {
    /// For what the file itself needs.
    own: Vec<String>,
    /// For what these need, in turn.
    inherited: Vec<String>,
}
