//! Compressed layers in every shape that registries hold, made by the ordinary programs; only what no program writes
//! (stored blocks, odd gzip headers, zstd frames that are skipped) is put together here.

use std::io::{Read as _, Seek as _, Write as _};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::command::filter;

/// Longest stored deflate block, in bytes (RFC 1951, section 3.2.4).
const STORED_MAX_BYTES: usize = 65535;
/// First of the sixteen magic numbers of skippable zstd frames (RFC 8878, section 3.1.2).
const ZSTD_SKIPPABLE_MAGIC: u32 = 0x184D_2A50;

/// How a layer's tar becomes its blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Compression {
    /// The tar itself.
    Plain,
    /// One gzip member of this level, 1 to 9.
    Gzip(u8),
    /// gzip level 0: stored blocks only.
    GzipStored,
    /// Several gzip members (level 6), each of so many bytes of input, with an empty member after the first and a file
    /// name, a comment and extra data in the header of the last.
    GzipMembers {
        /// Input bytes of each member.
        member_len_bytes: usize,
    },
    /// One zstd frame.
    Zstd,
    /// Several zstd frames, each of so many bytes of input, with skippable frames between them.
    ZstdFrames {
        /// Input bytes of each frame.
        frame_len_bytes: usize,
    },
}

impl Compression {
    /// The media type of a layer that is compressed this way.
    pub fn media_type(&self) -> &'static str {
        match self {
            Self::Plain => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip(_) | Self::GzipStored | Self::GzipMembers { .. } => {
                "application/vnd.oci.image.layer.v1.tar+gzip"
            }
            Self::Zstd | Self::ZstdFrames { .. } => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }

    /// One of each kind, gzip in all levels.
    pub fn all() -> Vec<Self> {
        let mut all: Vec<Self> = (1..=9).map(Self::Gzip).collect();
        all.extend([Self::Plain, Self::GzipStored, Self::Zstd]);
        all.extend([10_000, 300_001].map(|member_len_bytes| Self::GzipMembers { member_len_bytes }));
        all.push(Self::ZstdFrames { frame_len_bytes: 100_000 });
        all
    }
}

/// Compresses `tar`.
///
/// # Errors
///
/// When gzip or zstd is missing or fails.
pub fn compress(tar: &[u8], compression: &Compression) -> Result<Vec<u8>> {
    match compression {
        Compression::Plain => Ok(tar.to_vec()),
        Compression::Gzip(level) => gzip(tar, *level),
        Compression::GzipStored => Ok(gzip_stored(tar)),
        Compression::GzipMembers { member_len_bytes } => gzip_members(tar, *member_len_bytes),
        Compression::Zstd => through(Command::new("zstd").args(["--quiet", "--stdout", "-3"]), tar),
        Compression::ZstdFrames { frame_len_bytes } => {
            let mut blob = skippable_frame(0, b"before the first frame");
            for (index, part) in tar.chunks(*frame_len_bytes).enumerate() {
                blob.extend(through(Command::new("zstd").args(["--quiet", "--stdout", "-3"]), part)?);
                // Empty ones, too: the length of a skippable frame may be 0.
                blob.extend(skippable_frame((index % 16) as u32, &vec![0xAA; index % 3 * 100]));
            }
            Ok(blob)
        }
    }
}

/// Runs a filter program over bytes in memory.
fn through(command: &mut Command, input: &[u8]) -> Result<Vec<u8>> {
    // Through files: neither end can block the other.
    let mut source = tempfile::tempfile().context("make a temporary file")?;
    let mut sink = tempfile::tempfile().context("make a temporary file")?;
    source.write_all(input)?;
    source.rewind()?;
    filter(command, source, sink.try_clone()?)?;
    sink.rewind()?;
    let mut output = Vec::new();
    sink.read_to_end(&mut output)?;
    Ok(output)
}

fn gzip(input: &[u8], level: u8) -> Result<Vec<u8>> {
    through(Command::new("gzip").args(["--no-name", "--stdout"]).arg(format!("-{level}")), input)
}

fn gzip_members(tar: &[u8], member_len_bytes: usize) -> Result<Vec<u8>> {
    let parts: Vec<&[u8]> = tar.chunks(member_len_bytes).collect();
    let mut blob = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        let member = gzip(part, 6)?;
        if index + 1 == parts.len() {
            blob.extend(with_long_header(&member));
        } else {
            blob.extend(member);
        }
        if index == 0 {
            blob.extend(gzip(b"", 6)?);
        }
    }
    Ok(blob)
}

/// Replaces the ten plain header bytes of a member by a header with every optional field (RFC 1952, section 2.3).
fn with_long_header(member: &[u8]) -> Vec<u8> {
    // Text, header checksum, extra, name and comment.
    const ALL_FLAGS: u8 = 0x1F;
    let mut header = member[..10].to_vec();
    header[3] = ALL_FLAGS;
    let extra = b"AB\x04\x00\x00\xFF\x1F\x8B";
    header.extend((extra.len() as u16).to_le_bytes());
    header.extend(extra);
    header.extend(b"layer.tar\0\xE9 comment\0");
    let checksum = crc32(&header) as u16;
    header.extend(checksum.to_le_bytes());
    header.extend(&member[10..]);
    header
}

fn gzip_stored(input: &[u8]) -> Vec<u8> {
    let mut blob = vec![0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 255];
    // Blocks of unequal length, an empty one among them, so that boundaries fall everywhere.
    let mut rest = input;
    for turn in 0_usize.. {
        let len = [STORED_MAX_BYTES, 1, 0, 4096, 32768][turn % 5].min(rest.len());
        let (block, tail) = rest.split_at(len);
        rest = tail;
        let is_last = rest.is_empty();
        blob.push(u8::from(is_last));
        blob.extend((len as u16).to_le_bytes());
        blob.extend((!(len as u16)).to_le_bytes());
        blob.extend(block);
        if is_last {
            break;
        }
    }
    blob.extend(crc32(input).to_le_bytes());
    blob.extend((input.len() as u32).to_le_bytes());
    blob
}

fn skippable_frame(kind: u32, content: &[u8]) -> Vec<u8> {
    let mut frame = (ZSTD_SKIPPABLE_MAGIC + kind).to_le_bytes().to_vec();
    frame.extend((content.len() as u32).to_le_bytes());
    frame.extend(content);
    frame
}

/// The checksum of gzip (RFC 1952, section 8), bit by bit: test data is small.
fn crc32(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0xEDB8_8320;
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_together_by_hand_is_read_by_the_ordinary_programs() {
        let input: Vec<u8> = (0..400_000_u32).flat_map(|word| (word / 7).to_le_bytes()).collect();
        for compression in Compression::all() {
            let blob = compress(&input, &compression).expect("compresses");
            let program = match compression.media_type() {
                kind if kind.ends_with("+gzip") => "gzip",
                kind if kind.ends_with("+zstd") => "zstd",
                _ => "cat",
            };
            let mut command = Command::new(program);
            if program != "cat" {
                command.args(["--decompress", "--stdout"]);
            }
            assert!(through(&mut command, &blob).expect("decompresses") == input, "{compression:?}");
        }
    }
}
