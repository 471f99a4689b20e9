//! The JVM: its own library and archives, and the class path.
//!
//! A virtual machine maps its library, its archive of prepared classes, and reads the head of its modules' file, which is
//! their index. Of a class path it opens every archive to read its directory, which is at the end; which classes are
//! loaded from there is not guessed, but of a small archive that is started.

use super::Guesser;

/// What a virtual machine reads of its own folder, with how much of it (bytes from the start).
const PARTS: [(&str, u64); 16] = [
    ("lib/libjli.so", u64::MAX),
    ("lib/jvm.cfg", u64::MAX),
    ("lib/server/libjvm.so", u64::MAX),
    ("lib/server/classes.jsa", u64::MAX),
    // The index of some 25,000 resources is at its start.
    ("lib/modules", 3 << 20),
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
/// The directory of an archive takes about 80 bytes an entry, some 4 % of archives of classes.
const DIRECTORY_SHARE: u64 = 25;
const DIRECTORY_MIN_BYTES: u64 = 64 << 10;
/// An archive that is started is guessed as a whole up to this length.
const MAIN_MAX_BYTES: u64 = 8 << 20;
/// Archives of one class path.
const ARCHIVES_MAX: usize = 1024;

impl<B: AsRef<[u8]>> Guesser<'_, '_, B> {
    /// What `program` reads with these arguments.
    pub(super) fn java(&mut self, program: &str, arguments: &[String], depth: u32) {
        let Some(file) = self.files.regular(program) else { return };
        if let Some((home, _)) = file.path.rsplit_once("/bin/") {
            for (name, len) in PARTS {
                let path = format!("{home}/{name}");
                let reason = "every virtual machine reads it";
                if name.ends_with(".so") {
                    self.elf(&path, reason, depth + 1);
                } else {
                    self.add_part(&path, 0..len, reason);
                }
            }
        }
        let mut class_path = self.env.get("CLASSPATH").cloned().unwrap_or_default();
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
                        None => self.archive(&archive, "java -jar runs it"),
                    }
                    return;
                }
                option if option.starts_with('-') || option.starts_with('@') => {}
                // The class; what follows is for it.
                _ => break,
            }
        }
        for place in class_path.split(':').filter(|place| !place.is_empty()).take(ARCHIVES_MAX) {
            let place = self.absolute(place);
            match place.strip_suffix("/*") {
                None => self.archive(&place, "the class path names it"),
                Some(folder) => {
                    let names = self.files.names(folder).into_iter().filter(|name| name.ends_with(".jar"));
                    for name in names.take(ARCHIVES_MAX).collect::<Vec<_>>() {
                        self.archive(&format!("{folder}/{name}"), "the class path names its folder");
                    }
                }
            }
        }
    }

    /// The directory of an archive.
    fn archive(&mut self, path: &str, reason: &str) {
        let Some(file) = self.files.regular(path) else { return };
        let directory = (file.size_bytes / DIRECTORY_SHARE).max(DIRECTORY_MIN_BYTES);
        self.add_part(path, file.size_bytes.saturating_sub(directory)..u64::MAX, &format!("{reason}; its directory"));
    }
}
