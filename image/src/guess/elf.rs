//! ELF programs and libraries, found by the rules of the loader (ld.so(8)).
//!
//! Four small parts of a file are read: the header, the program headers, the dynamic section, and the part of its string
//! table that names what it needs. That is why no library for object files stands here: those want the whole file in
//! memory, and a start may not read but a tenth of it.

use std::ops::Range;

use super::files::File;
use super::{Guesser, PLACES_MAX};

/// How an ELF file begins.
pub(super) const MAGIC: &[u8] = b"\x7fELF";
/// Program headers, dynamic entries and libraries of one file that are looked at. Real files have some 10, 40 and 30 of
/// them; programs of browsers have 150 libraries.
const HEADERS_MAX: u64 = 128;
const DYNAMIC_MAX: u64 = 512;
const NEEDED_MAX: usize = 256;
/// Longest name of a library. String tables of C++ libraries are megabytes, so names are read one by one.
const NAME_MAX_BYTES: u64 = 256;
/// Longest list of library paths that is read.
const CONFIG_MAX_BYTES: u64 = 64 << 10;
/// Files that `ld.so.conf` may include.
const INCLUDES_MAX: usize = 64;

// elf.h.
const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
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

/// What an ELF file needs. `read` gives parts of it, cut at its end.
pub(super) fn needs(mut read: impl FnMut(Range<u64>) -> Option<Vec<u8>>) -> Option<Needs> {
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
    let mut found = Needs { is_64: numbers.is_64, ..Needs::default() };
    let (mut loads, mut dynamic) = (Vec::new(), None);
    for segment in bytes.chunks_exact(usize::try_from(entry_len).ok().filter(|len| *len >= 32)?) {
        let kind = u32::try_from(numbers.number(segment, 0, 4)?).ok()?;
        let (offset, address) = (numbers.word(segment, 8, 4)?, numbers.word(segment, 16, 8)?);
        let len = numbers.word(segment, 32, 16)?;
        match kind {
            PT_LOAD => loads.push((address, len, offset)),
            PT_DYNAMIC => dynamic = Some((offset, len)),
            PT_INTERP => {
                let name = read(offset..offset.checked_add(len.min(NAME_MAX_BYTES))?)?;
                found.interpreter = text(&name);
            }
            _ => {}
        }
    }
    let Some((offset, len)) = dynamic else { return Some(found) };
    let pair = if numbers.is_64 { 16 } else { 8 };
    let bytes = read(offset..offset.checked_add(len.min(DYNAMIC_MAX * pair))?)?;
    let entries = bytes.chunks_exact(pair as usize).map_while(|entry| {
        let tag = numbers.word(entry, 0, 0)?;
        (tag != 0).then_some((tag, numbers.word(entry, 8, 4)?))
    });
    let entries: Vec<(u64, u64)> = entries.collect();
    let strings = entries.iter().find(|(tag, _)| *tag == DT_STRTAB).map(|(_, address)| *address)?;
    let strings = loads.iter().find_map(|(address, len, offset)| {
        let within = strings.checked_sub(*address).filter(|within| within < len)?;
        offset.checked_add(within)
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
    /// An ELF program or library and all that the loader loads with it.
    pub(super) fn elf(&mut self, path: &str, reason: &str, depth: u32) {
        // The search paths that libraries inherit from what needs them.
        let mut queue = vec![(path.to_owned(), reason.to_owned(), Vec::new(), depth)];
        while let Some((path, reason, inherited, depth)) = queue.pop() {
            let Some(file) = self.files.regular(&path) else { continue };
            if !self.add(&path, &reason) {
                continue;
            }
            if depth >= self.limits.depth {
                self.guess.is_cut = true;
                continue;
            }
            let files = &mut self.files;
            let Some(needs) = needs(|part| files.read(&file, part)) else { continue };
            let Search { own, inherited } = self.search(&file, &needs, inherited);
            // The last that is pushed is followed first: the loader, then libraries in their order.
            for library in needs.libraries.iter().rev() {
                if let Some(found) = self.library(library, &own, needs.is_64) {
                    queue.push((found, format!("{path} needs {library}"), inherited.clone(), depth + 1));
                }
            }
            if let Some(interpreter) = needs.interpreter {
                queue.push((interpreter, format!("the loader that {path} names"), Vec::new(), depth + 1));
            }
        }
    }

    /// Where the loader looks for what a file needs, before its own places.
    fn search(&self, file: &File, needs: &Needs, inherited: Vec<String>) -> Search {
        let origin = file.path.rsplit_once('/').map_or("", |(folder, _)| folder).to_owned();
        let expand = |path: &String| path.replace("${ORIGIN}", &origin).replace("$ORIGIN", &origin);
        let environment = paths(self.env.get("LD_LIBRARY_PATH").cloned());
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

    /// The places of `ld.so.conf`, from which `ld.so.cache` is made, and those that distributions compile in.
    fn configured_paths(&mut self) -> Vec<String> {
        if let Some(known) = &self.library_paths {
            return known.clone();
        }
        let mut places = Vec::new();
        let mut files = vec!["/etc/ld.so.conf".to_owned()];
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
