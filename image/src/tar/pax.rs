//! PAX extended headers: `length key=value\n` records, of which the last one with a key counts.

use std::collections::BTreeMap;

use super::number::decimal;

const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// The records that matter, as they stand in the header. An empty value is the same as none, except for attributes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Pax {
    pub(super) path: Vec<u8>,
    pub(super) link_path: Vec<u8>,
    pub(super) uid: Vec<u8>,
    pub(super) gid: Vec<u8>,
    pub(super) size: Vec<u8>,
    pub(super) mtime: Vec<u8>,
    pub(super) atime: Vec<u8>,
    pub(super) ctime: Vec<u8>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse_major: Vec<u8>,
    pub(super) sparse_minor: Vec<u8>,
    pub(super) sparse_name: Vec<u8>,
    pub(super) sparse_size: Vec<u8>,
    pub(super) sparse_real_size: Vec<u8>,
    pub(super) sparse_count: Vec<u8>,
    /// Offsets and lengths with commas between them: the form of version 0.1, to which 0.0 is brought.
    pub(super) sparse_map: Vec<u8>,
}

/// Records that Go would refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

impl Pax {
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self, Malformed> {
        let mut pax = Self::default();
        // Version 0.0 repeats two keys, which PAX does not foresee.
        let mut pairs: Vec<u8> = Vec::new();
        let mut pair_numbers = 0_usize;
        while !bytes.is_empty() {
            let Record { key, value, rest } = record(bytes)?;
            bytes = rest;
            let number_in_pair: &[u8] =
                if pair_numbers.is_multiple_of(2) { b"GNU.sparse.offset" } else { b"GNU.sparse.numbytes" };
            if matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes") {
                if key != number_in_pair || value.contains(&b',') {
                    return Err(Malformed);
                }
                if pair_numbers > 0 {
                    pairs.push(b',');
                }
                pairs.extend_from_slice(value);
                pair_numbers += 1;
            } else {
                pax.set(key, value);
            }
        }
        if pair_numbers > 0 {
            pax.sparse_map = pairs;
        }
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) {
        let field = match key {
            b"path" => &mut self.path,
            b"linkpath" => &mut self.link_path,
            b"uid" => &mut self.uid,
            b"gid" => &mut self.gid,
            b"size" => &mut self.size,
            b"mtime" => &mut self.mtime,
            b"atime" => &mut self.atime,
            b"ctime" => &mut self.ctime,
            b"GNU.sparse.major" => &mut self.sparse_major,
            b"GNU.sparse.minor" => &mut self.sparse_minor,
            b"GNU.sparse.name" => &mut self.sparse_name,
            b"GNU.sparse.size" => &mut self.sparse_size,
            b"GNU.sparse.realsize" => &mut self.sparse_real_size,
            b"GNU.sparse.numblocks" => &mut self.sparse_count,
            b"GNU.sparse.map" => &mut self.sparse_map,
            _ => {
                if let Some(name) = key.strip_prefix(XATTR_PREFIX) {
                    self.xattrs.insert(name.to_vec(), value.to_vec());
                }
                return;
            }
        };
        *field = value.to_vec();
    }
}

/// One record, and the bytes after it.
struct Record<'a> {
    key: &'a [u8],
    value: &'a [u8],
    rest: &'a [u8],
}

/// The first record.
fn record(bytes: &[u8]) -> Result<Record<'_>, Malformed> {
    let space = bytes.iter().position(|byte| *byte == b' ').ok_or(Malformed)?;
    let len = decimal(&bytes[..space]).and_then(|len| usize::try_from(len).ok()).ok_or(Malformed)?;
    if len < 5 || len > bytes.len() || len <= space + 1 {
        return Err(Malformed);
    }
    let (record, rest) = bytes.split_at(len);
    let body = record[space + 1..].strip_suffix(b"\n").ok_or(Malformed)?;
    let equals = body.iter().position(|byte| *byte == b'=').ok_or(Malformed)?;
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    let text_value = matches!(key, b"path" | b"linkpath" | b"uname" | b"gname");
    if key.is_empty() || key.contains(&0) || (text_value && value.contains(&0)) {
        return Err(Malformed);
    }
    Ok(Record { key, value, rest })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_and_the_last_one_counts() {
        let pax = Pax::parse(b"12 path=abc\n11 path=de\n28 SCHILY.xattr.user.a=\0\n=\xff\n").expect("well formed");
        assert_eq!(pax.path, b"de");
        assert_eq!(pax.xattrs, BTreeMap::from([(b"user.a".to_vec(), b"\0\n=\xff".to_vec())]));
    }

    #[test]
    fn version_0_0_maps_become_0_1() {
        let pax = Pax::parse(
            b"23 GNU.sparse.offset=1\n25 GNU.sparse.numbytes=2\n23 GNU.sparse.offset=3\n25 GNU.sparse.numbytes=4\n",
        );
        assert_eq!(pax.expect("well formed").sparse_map, b"1,2,3,4");
    }

    #[test]
    fn malformed_records_are_refused() {
        let cases: [&[u8]; 12] = [
            b"x",
            b"5 a=b\n",
            b"7 a=b\n",
            b"06 a=b\nx",
            b"-6 a=b\n",
            b"5 ab\n",
            b"5 =b\n",
            b"7 a\0=b\n",
            b"10 path=\0\n",
            b"1 a=b\n",
            b"25 GNU.sparse.numbytes=2\n",
            b"99999999999999999999 a=b\n",
        ];
        for bytes in cases {
            assert_eq!(Pax::parse(bytes), Err(Malformed), "{}", bytes.escape_ascii());
        }
        assert!(Pax::parse(b"6 a=b\n").is_ok());
    }
}
