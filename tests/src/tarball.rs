//! A tar writer that writes what it is told, header by header, and so also what well-behaved writers never write.
//!
//! [`Tarball`] appends entries to a tar stream in memory. [`Entry`] describes one, with the fields as they shall stand
//! in the header; how they are encoded (old, ustar, GNU or PAX) is the entry's [`Dialect`].

/// Length of a tar block in bytes.
pub const BLOCK_LEN_BYTES: usize = 512;
/// Longest name that the header's own field holds, in bytes.
const NAME_MAX_BYTES: usize = 100;
/// Largest number in an 8-byte octal field with its terminator.
const OCTAL_7_MAX: u64 = 0o777_7777;
/// Largest number in a 12-byte octal field with its terminator.
const OCTAL_11_MAX: u64 = 0o777_7777_7777;

/// How an entry's header is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// The seventh edition's: no magic, no owner names, no device numbers.
    Old,
    /// POSIX.1-1988; long names are split into prefix and name.
    Ustar,
    /// GNU: long names in `L` and `K` entries, large numbers in base 256.
    Gnu,
    /// POSIX.1-2001: what does not fit stands in an `x` header.
    Pax,
}

/// One entry to be.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Type flag, such as `b'0'`.
    pub flag: u8,
    /// Name as it shall stand in the stream.
    pub name: Vec<u8>,
    /// Link target.
    pub link: Vec<u8>,
    /// Mode bits.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds after `mtime`, written by the PAX dialect only.
    pub mtime_nanoseconds: u32,
    /// Device numbers: major and minor.
    pub device: (u32, u32),
    /// Content.
    pub data: Vec<u8>,
    /// The header's size where it differs from the content's length.
    pub size_bytes: Option<u64>,
    /// Further PAX records, in this order, whatever the dialect.
    pub records: Vec<(Vec<u8>, Vec<u8>)>,
    /// How it is written.
    pub dialect: Dialect,
}

impl Entry {
    /// An entry of any type.
    pub fn new(flag: u8, name: impl AsRef<[u8]>) -> Self {
        Self {
            flag,
            name: name.as_ref().to_vec(),
            link: Vec::new(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 1_600_000_000,
            mtime_nanoseconds: 0,
            device: (0, 0),
            data: Vec::new(),
            size_bytes: None,
            records: Vec::new(),
            dialect: Dialect::Pax,
        }
    }

    /// A regular file.
    pub fn file(name: impl AsRef<[u8]>, data: impl Into<Vec<u8>>) -> Self {
        Self { data: data.into(), ..Self::new(b'0', name) }
    }

    /// A directory; the name gets the slash that writers put at its end.
    pub fn directory(name: impl AsRef<[u8]>) -> Self {
        let mut entry = Self::new(b'5', name).mode(0o755);
        if entry.name.last() != Some(&b'/') {
            entry.name.push(b'/');
        }
        entry
    }

    /// A symbolic link.
    pub fn symlink(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { link: target.as_ref().to_vec(), ..Self::new(b'2', name).mode(0o777) }
    }

    /// A hard link to another entry's name.
    pub fn hard_link(name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        Self { link: target.as_ref().to_vec(), ..Self::new(b'1', name) }
    }

    /// A whiteout: `name` (in `dir/name` form) is deleted from the layers below.
    pub fn whiteout(name: &str) -> Self {
        let (dir, base) = name.rsplit_once('/').map_or(("", name), |(dir, base)| (&name[..=dir.len()], base));
        Self::file(format!("{dir}.wh.{base}"), [])
    }

    /// Marks `dir` opaque: what the layers below have in it is gone.
    pub fn opaque(dir: &str) -> Self {
        Self::file(format!("{dir}/.wh..wh..opq"), [])
    }

    /// Sets the mode.
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// Sets user and group.
    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        (self.uid, self.gid) = (uid, gid);
        self
    }

    /// Sets the modification time.
    pub fn mtime(mut self, seconds: i64, nanoseconds: u32) -> Self {
        (self.mtime, self.mtime_nanoseconds) = (seconds, nanoseconds);
        self
    }

    /// Sets the device numbers.
    pub fn device(mut self, major: u32, minor: u32) -> Self {
        self.device = (major, minor);
        self
    }

    /// Sets the dialect.
    pub fn dialect(mut self, dialect: Dialect) -> Self {
        self.dialect = dialect;
        self
    }

    /// Adds a PAX record.
    pub fn record(mut self, key: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.records.push((key.as_ref().to_vec(), value.as_ref().to_vec()));
        self
    }

    /// Adds an extended attribute.
    pub fn xattr(self, name: &str, value: impl AsRef<[u8]>) -> Self {
        self.record(format!("SCHILY.xattr.{name}"), value)
    }
}

/// A tar stream in the making.
#[derive(Debug, Clone, Default)]
pub struct Tarball {
    bytes: Vec<u8>,
}

impl Tarball {
    /// An empty stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// A finished stream of these entries.
    pub fn of(entries: impl IntoIterator<Item = Entry>) -> Vec<u8> {
        let mut tarball = Self::new();
        for entry in entries {
            tarball.add(&entry);
        }
        tarball.finish()
    }

    /// Appends an entry with all the headers that its dialect needs.
    pub fn add(&mut self, entry: &Entry) -> &mut Self {
        let mut records = Vec::new();
        match entry.dialect {
            Dialect::Pax => records = overflow_records(entry),
            Dialect::Gnu => {
                for (flag, text) in [(b'K', &entry.link), (b'L', &entry.name)] {
                    if text.len() > NAME_MAX_BYTES {
                        self.add_long_text(flag, text);
                    }
                }
            }
            Dialect::Old | Dialect::Ustar => {}
        }
        records.extend(entry.records.iter().cloned());
        if !records.is_empty() {
            self.add_records(b'x', "PaxHeaders/entry", &records);
        }
        self.raw(&header(entry)).data(&entry.data)
    }

    /// Appends a PAX header: `x` for the next entry, `g` for all that follow.
    pub fn add_records(&mut self, flag: u8, name: &str, records: &[(Vec<u8>, Vec<u8>)]) -> &mut Self {
        let body = records.iter().flat_map(|(key, value)| record(key, value)).collect::<Vec<u8>>();
        let carrier = Entry { data: body, dialect: Dialect::Ustar, ..Entry::new(flag, name) };
        self.raw(&header(&carrier)).data(&carrier.data)
    }

    /// Appends a GNU long name (`L`) or long link target (`K`).
    pub fn add_long_text(&mut self, flag: u8, text: &[u8]) -> &mut Self {
        let mut data = text.to_vec();
        data.push(0);
        let carrier = Entry { data, dialect: Dialect::Gnu, mtime: 0, ..Entry::new(flag, "././@LongLink") };
        self.raw(&header(&carrier)).data(&carrier.data)
    }

    /// Appends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Appends content, padded with zeros to whole blocks.
    pub fn data(&mut self, data: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(data);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK_LEN_BYTES), 0);
        self
    }

    /// The stream with its end: two blocks of zeros.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * BLOCK_LEN_BYTES, 0);
        self.bytes
    }

    /// The stream without an end.
    pub fn unfinished(self) -> Vec<u8> {
        self.bytes
    }
}

/// One PAX record: its own length in decimal, key and value (POSIX.1-2001, pax, "Extended Header").
pub fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    // Blank, equals sign and newline.
    let body = key.len() + value.len() + 3;
    let mut len = body + body.to_string().len();
    if len.to_string().len() > body.to_string().len() {
        len = body + len.to_string().len();
    }
    let mut bytes = format!("{len} ").into_bytes();
    bytes.extend(key);
    bytes.push(b'=');
    bytes.extend(value);
    bytes.push(b'\n');
    bytes
}

/// What the fields of the header cannot hold.
fn overflow_records(entry: &Entry) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut records = Vec::new();
    let mut add = |key: &str, value: Vec<u8>| records.push((key.as_bytes().to_vec(), value));
    if entry.name.len() > NAME_MAX_BYTES || !entry.name.is_ascii() {
        add("path", entry.name.clone());
    }
    if entry.link.len() > NAME_MAX_BYTES || !entry.link.is_ascii() {
        add("linkpath", entry.link.clone());
    }
    for (key, id) in [("uid", entry.uid), ("gid", entry.gid)] {
        if id > OCTAL_7_MAX {
            add(key, id.to_string().into_bytes());
        }
    }
    if entry.mtime_nanoseconds != 0 || entry.mtime < 0 {
        add("mtime", decimal_time(entry.mtime, entry.mtime_nanoseconds).into_bytes());
    }
    records
}

/// A time as PAX writes it: `-1.5` is half a second before -1.
pub fn decimal_time(seconds: i64, nanoseconds: u32) -> String {
    if seconds < 0 && nanoseconds > 0 {
        format!("-{}.{:09}", -(seconds + 1), 1_000_000_000 - nanoseconds)
    } else {
        format!("{seconds}.{nanoseconds:09}")
    }
}

/// The header block of an entry.
pub fn header(entry: &Entry) -> [u8; BLOCK_LEN_BYTES] {
    let mut block = [0; BLOCK_LEN_BYTES];
    let base_256 = entry.dialect == Dialect::Gnu;
    let (prefix, name) = match entry.dialect {
        Dialect::Ustar => split_name(&entry.name),
        _ => (&[][..], &entry.name[..]),
    };
    put_text(&mut block[..NAME_MAX_BYTES], name);
    put_number(&mut block[100..108], i128::from(entry.mode), false);
    put_number(&mut block[108..116], i128::from(entry.uid), base_256);
    put_number(&mut block[116..124], i128::from(entry.gid), base_256);
    let size_bytes = entry.size_bytes.unwrap_or(entry.data.len() as u64);
    put_number(&mut block[124..136], i128::from(size_bytes), base_256);
    put_number(&mut block[136..148], i128::from(entry.mtime), base_256);
    block[156] = entry.flag;
    put_text(&mut block[157..257], &entry.link);
    match entry.dialect {
        Dialect::Old => {}
        Dialect::Gnu => block[257..265].copy_from_slice(b"ustar  \0"),
        Dialect::Ustar | Dialect::Pax => block[257..265].copy_from_slice(b"ustar\x0000"),
    }
    if entry.dialect != Dialect::Old {
        put_number(&mut block[329..337], i128::from(entry.device.0), base_256);
        put_number(&mut block[337..345], i128::from(entry.device.1), base_256);
    }
    put_text(&mut block[345..500], prefix);
    seal(&mut block);
    block
}

/// Writes a header block's checksum, after its last change.
pub fn seal(block: &mut [u8; BLOCK_LEN_BYTES]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Splits a long name at the last slash that leaves at most 100 bytes behind it and 155 before it.
fn split_name(name: &[u8]) -> (&[u8], &[u8]) {
    if name.len() <= NAME_MAX_BYTES {
        return (&[], name);
    }
    let fits = |&at: &usize| name[at] == b'/' && name.len() - at - 1 <= NAME_MAX_BYTES && at <= 155;
    let at = (0..name.len() - 1).find(fits).expect("the test's name can be split");
    (&name[..at], &name[at + 1..])
}

fn put_text(field: &mut [u8], text: &[u8]) {
    let len = text.len().min(field.len());
    field[..len].copy_from_slice(&text[..len]);
}

/// Octal with a terminator; in base 256 what does not fit, if the dialect has that, else 0 (a PAX record says it).
fn put_number(field: &mut [u8], value: i128, base_256: bool) {
    let max = if field.len() == 8 { OCTAL_7_MAX } else { OCTAL_11_MAX };
    if (0..=i128::from(max)).contains(&value) {
        let width = field.len() - 1;
        field[..width].copy_from_slice(format!("{value:0width$o}").as_bytes());
    } else if base_256 {
        let bytes = value.to_be_bytes();
        let start = bytes.len() - field.len();
        field.copy_from_slice(&bytes[start..]);
        field[0] |= 0x80;
    } else {
        let width = field.len() - 1;
        field[..width].fill(b'0');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_count_their_own_length() {
        assert_eq!(record(b"a", b"b"), b"6 a=b\n");
        // 9 bytes with one digit, 10 with two: the length that names itself is 11 (two digits).
        for value_len in 0..2_000 {
            let bytes = record(b"path", &vec![b'x'; value_len]);
            let said = bytes.split(|&byte| byte == b' ').next().expect("a length");
            assert_eq!(std::str::from_utf8(said).expect("digits").parse(), Ok(bytes.len()));
        }
    }

    #[test]
    fn times_before_1970_are_written_as_decimals() {
        assert_eq!(decimal_time(-2, 500_000_000), "-1.500000000");
        assert_eq!(decimal_time(-1, 999_999_999), "-0.000000001");
        assert_eq!(decimal_time(7, 1), "7.000000001");
        assert_eq!(decimal_time(-7, 0), "-7.000000000");
    }
}
