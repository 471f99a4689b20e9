//! One 512-byte header block, in any of the formats that Go's `archive/tar` knows.

use super::number::{c_string, numeric, octal};

/// A header block.
pub(super) type Block = [u8; 512];

/// The layout of a header, by its magic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// No magic: the fields that every format has.
    V7,
    /// POSIX ustar, also under PAX.
    Ustar,
    /// star: ustar magic and a trailer.
    Star,
    /// Old GNU.
    Gnu,
}

/// A header block that is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeaderFault {
    /// The checksum is wrong.
    Checksum,
    /// This field is no number.
    Number(&'static str),
}

/// The fields of a header, unchecked but for being numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) format: Format,
    pub(super) type_flag: u8,
    pub(super) name: Vec<u8>,
    pub(super) link_name: Vec<u8>,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) size: i64,
    pub(super) mtime: i64,
    pub(super) major: i64,
    pub(super) minor: i64,
}

/// The name in a block, for messages about a block that cannot be read.
pub(super) fn name_field(block: &Block) -> &[u8] {
    c_string(&block[..100])
}

fn format_of(block: &Block) -> Option<Format> {
    let stated = octal(&block[148..156])?;
    // The field itself counts as spaces. Some old writers summed signed bytes, and Go takes both.
    let (mut unsigned, mut signed) = (0_i64, 0_i64);
    for (at, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { *byte };
        unsigned += i64::from(byte);
        signed += i64::from(byte as i8);
    }
    if stated != unsigned && stated != signed {
        return None;
    }
    Some(match (&block[257..263], &block[263..265], &block[508..512]) {
        (b"ustar\0", _, b"tar\0") => Format::Star,
        (b"ustar\0", _, _) => Format::Ustar,
        (b"ustar ", b" \0", _) => Format::Gnu,
        _ => Format::V7,
    })
}

/// The name prefix of a GNU header, which has none: versions of Go before 1.8 wrote one over the access and change
/// times, and their archives are told apart by times that are no numbers.
fn misplaced_prefix(block: &Block) -> &[u8] {
    let is_time = |field: &[u8]| field[0] == 0 || numeric(field).is_some();
    if is_time(&block[345..357]) && is_time(&block[357..369]) {
        return &[];
    }
    let prefix = c_string(&block[345..500]);
    if prefix.is_ascii() { prefix } else { &[] }
}

impl Header {
    pub(super) fn parse(block: &Block) -> Result<Self, HeaderFault> {
        let format = format_of(block).ok_or(HeaderFault::Checksum)?;
        let number = |range: std::ops::Range<usize>, field| numeric(&block[range]).ok_or(HeaderFault::Number(field));
        let mut header = Self {
            format,
            type_flag: block[156],
            name: name_field(block).to_vec(),
            link_name: c_string(&block[157..257]).to_vec(),
            mode: number(100..108, "mode")?,
            uid: number(108..116, "owner")?,
            gid: number(116..124, "group")?,
            size: number(124..136, "size")?,
            mtime: number(136..148, "modification time")?,
            major: 0,
            minor: 0,
        };
        if format == Format::V7 {
            return Ok(header);
        }
        header.major = number(329..337, "device major number")?;
        header.minor = number(337..345, "device minor number")?;
        let prefix = match format {
            Format::Star => {
                number(476..488, "access time")?;
                number(488..500, "change time")?;
                c_string(&block[345..476])
            }
            Format::Gnu => misplaced_prefix(block),
            Format::Ustar | Format::V7 => c_string(&block[345..500]),
        };
        if !prefix.is_empty() {
            header.name = [prefix, b"/", &header.name].concat();
        }
        Ok(header)
    }

    /// Kinds that have no data, whatever their size field says.
    pub(super) fn is_header_only(&self) -> bool {
        matches!(self.type_flag, b'1'..=b'6')
    }
}
