//! The JVM: its own library and archives, and the class path.
//!
//! A virtual machine maps its library, its archive of prepared classes, and reads the head of its modules' file, which is
//! their index. Of a class path it opens every archive, looks at its first bytes and reads its directory, which is at the
//! end; which classes are loaded from there is not guessed, but of a small archive that is started.

use std::rc::Rc;
use std::slice;

use super::elf::Binary;
use super::files::File;
use super::{Guesser, HEAD_BYTES};

/// What a virtual machine reads of its own folder, with how much of it (bytes from the start).
const PARTS: [(&str, u64); 16] = [
    ("lib/libjli.so", u64::MAX),
    ("lib/jvm.cfg", u64::MAX),
    ("lib/server/libjvm.so", u64::MAX),
    ("lib/server/classes.jsa", u64::MAX),
    // The index of some 25,000 resources is at its start: 1.4 MB in Debian's OpenJDK 17.
    ("lib/modules", 3 << 19),
    ("lib/libjava.so", u64::MAX),
    ("lib/libjimage.so", u64::MAX),
    ("lib/libverify.so", u64::MAX),
    ("lib/libzip.so", u64::MAX),
    ("lib/libnet.so", u64::MAX),
    ("lib/libnio.so", u64::MAX),
    ("lib/libmanagement.so", u64::MAX),
    ("lib/tzdb.dat", u64::MAX),
    ("conf/security/java.security", u64::MAX),
    ("conf/security/policy/unlimited/default_US_export.policy", u64::MAX),
    ("conf/net.properties", u64::MAX),
];
/// The part of an archive's end that is looked at: the record of where its directory is, 22 bytes and a comment (APPNOTE.TXT 4.3.16).
const END_BYTES: u64 = 1 << 10;
const END_LEN: usize = 22;
const END_SIGNATURE: &[u8] = b"PK\x05\x06";
/// What is taken for the directory where that record is not found: 4 % of the archive, as in archives of classes.
const DIRECTORY_SHARE: u64 = 25;
/// An archive that is started is guessed as a whole up to this length.
const MAIN_MAX_BYTES: u64 = 8 << 20;
/// Archives of one class path.
const ARCHIVES_MAX: usize = 1024;

impl<B: AsRef<[u8]>> Guesser<'_, '_, B> {
    /// What `program` reads with these arguments.
    pub(super) fn java(&mut self, program: &str, arguments: &[String], depth: u32) {
        let Some(file) = self.files.regular(program) else { return };
        if let Some((home, _)) = file.path.rsplit_once("/bin/") {
            let reason = "every virtual machine reads it";
            for (name, len) in PARTS {
                let path = format!("{home}/{name}");
                if name.ends_with(".so") {
                    self.binaries.push(Binary::new(&path, reason, depth + 1, Rc::clone(&self.environment)));
                } else {
                    self.add_parts(&path, slice::from_ref(&(0..len)), reason);
                }
            }
            self.load();
        }
        let mut class_path = self.environment.get("CLASSPATH").cloned().unwrap_or_default();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "-cp" | "-classpath" | "--class-path" => class_path = rest.next().cloned().unwrap_or_default(),
                "-jar" => {
                    let Some(archive) = rest.next().map(|archive| self.absolute(archive)) else { return };
                    match self.files.regular(&archive).filter(|file| file.size_bytes <= MAIN_MAX_BYTES) {
                        Some(_) => {
                            self.add(&archive, "java -jar runs it");
                        }
                        None => self.archives(vec![(archive, "java -jar runs it")]),
                    }
                    return;
                }
                option if option.starts_with('-') || option.starts_with('@') => {}
                // The class; what follows is for it.
                _ => break,
            }
        }
        let mut archives = Vec::new();
        for place in class_path.split(':').filter(|place| !place.is_empty()).take(ARCHIVES_MAX) {
            let place = self.absolute(place);
            match place.strip_suffix("/*") {
                None => archives.push((place, "the class path names it")),
                Some(folder) => {
                    let names = self.files.names(folder).into_iter().filter(|name| name.ends_with(".jar"));
                    archives.extend(names.map(|name| (format!("{folder}/{name}"), "the class path names its folder")));
                }
            }
        }
        archives.truncate(ARCHIVES_MAX);
        self.archives(archives);
    }

    /// The directories of archives, and their first bytes, which are looked at when they are opened.
    fn archives(&mut self, archives: Vec<(String, &str)>) {
        let files = archives.into_iter().filter_map(|(path, reason)| Some((self.files.regular(&path)?, reason)));
        let files: Vec<(File, &str)> = files.collect();
        let end = |file: &File| file.size_bytes.saturating_sub(END_BYTES)..file.size_bytes;
        let heads = files.iter().flat_map(|(file, _)| [(file.clone(), 0..HEAD_BYTES), (file.clone(), end(file))]);
        self.files.ahead(heads.collect());
        for (file, reason) in files {
            let record = self.files.read(&file, end(&file)).unwrap_or_default();
            let start = directory(&record).filter(|start| *start < file.size_bytes);
            let start = start.unwrap_or(file.size_bytes - file.size_bytes / DIRECTORY_SHARE).max(HEAD_BYTES);
            let parts = [0..HEAD_BYTES, start..u64::MAX];
            self.add_parts(&file.path, &parts, &format!("{reason}; its directory"));
        }
    }
}

/// Where an archive's directory begins, from its last bytes.
fn directory(end: &[u8]) -> Option<u64> {
    let at = end.windows(END_LEN).rposition(|record| record.starts_with(END_SIGNATURE))?;
    let start = end.get(at + 16..at + 20)?;
    Some(u64::from(u32::from_le_bytes(start.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_of_archives_are_found() {
        let mut end = vec![7; 40];
        end.extend_from_slice(END_SIGNATURE);
        end.extend_from_slice(&[0; 12]);
        end.extend_from_slice(&[1, 2, 0, 0, 3, 0]);
        end.extend_from_slice(b"end");
        assert_eq!(directory(&end), Some(0x201));
        assert_eq!(directory(&end[..50]), None);
        assert_eq!(directory(b"PK\x05\x06"), None);
    }
}
