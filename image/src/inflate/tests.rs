use super::raw::gzip;
use super::*;

/// A boundary that a decoder passed: output and input before it, and what it is.
type Passed = (usize, usize, Boundary);

/// Decodes all of `blob`, `input_len` and `output_len`
/// bytes at a time.
fn decode(blob: &[u8], input_len: usize, output_len: usize) -> Result<(Vec<u8>, Vec<Passed>), InflateError> {
    let mut decoder = Decoder::new(Compression::detect(blob))?;
    let (mut out, mut boundaries, mut at) = (Vec::new(), Vec::new(), 0);
    let mut room = vec![0; output_len];
    loop {
        let step = decoder.step(&blob[at..blob.len().min(at + input_len)], &mut room)?;
        at += step.consumed;
        out.extend_from_slice(&room[..step.produced]);
        boundaries.extend(step.boundary.map(|boundary| (out.len(), at, boundary)));
        if step.is_stuck() {
            assert_eq!(at, blob.len(), "stuck before the end");
            return decoder.finish().map(|()| (out, boundaries));
        }
    }
}

/// Text-like bytes with repetitions near and far, and some noise.
fn sample(len: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut draw = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize
    };
    let mut bytes: Vec<u8> = Vec::with_capacity(len + 300);
    while bytes.len() < len {
        let run = 4 + draw() % 200;
        match draw() % 4 {
            0 => bytes.extend((0..run).map(|_| draw() as u8)),
            1 | 2 if bytes.len() > 300 => {
                let start = bytes.len() - 1 - draw() % bytes.len().min(32_000);
                bytes.extend_from_within(start..bytes.len().min(start + run));
            }
            _ => bytes.extend(format!("line {run} of a text\n").bytes()),
        }
    }
    bytes.truncate(len);
    bytes
}

fn zstd_frames(parts: &[&[u8]]) -> Vec<u8> {
    parts.iter().flat_map(|part| ::zstd::bulk::compress(part, 3).expect("compresses")).collect()
}

#[test]
fn compression_is_told_by_content() {
    assert_eq!(Compression::detect(&gzip(b"x", 6, 8)), Compression::Gzip);
    assert_eq!(Compression::detect(&zstd_frames(&[b"x"])), Compression::Zstd);
    assert_eq!(Compression::detect(&[0x5f, 0x2a, 0x4d, 0x18, 0, 0, 0, 0]), Compression::Zstd);
    for plain in [&b""[..], b"\x1f", b"\x1f\x8b", b"usr/bin/thing", &[0; 512]] {
        assert_eq!(Compression::detect(plain), Compression::Plain);
    }
}

#[test]
fn every_kind_decodes_in_any_portions() {
    let bytes = sample(300_000);
    let (first, second) = bytes.split_at(100_000);
    let blobs = [
        bytes.clone(),
        gzip(&bytes, 0, 8),
        gzip(&bytes, 1, 8),
        gzip(&bytes, 9, 1),
        [gzip(first, 6, 8), gzip(b"", 6, 8), gzip(second, 6, 8)].concat(),
        zstd_frames(&[&bytes]),
        [zstd_frames(&[first]), vec![0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3], zstd_frames(&[second])].concat(),
    ];
    for blob in &blobs {
        for (input_len, output_len) in [(1, 32_768), (1000, 7), (blob.len(), 500_000), (blob.len(), 16_384)] {
            let (out, _) = decode(blob, input_len, output_len).expect("decodes");
            assert!(out == bytes, "wrong bytes");
        }
    }
}

#[test]
fn a_decoder_can_begin_at_every_boundary_with_what_was_kept_of_the_window() {
    let bytes = sample(400_000);
    let (first, second) = bytes.split_at(150_000);
    let blobs = [
        gzip(&bytes, 0, 8),
        gzip(&bytes, 6, 8),
        gzip(&bytes, 9, 2),
        [gzip(first, 6, 4), gzip(second, 1, 6)].concat(),
        zstd_frames(&[first, second]),
    ];
    let mut finder = window::UseFinder::new().expect("memory");
    for blob in &blobs {
        let compression = Compression::detect(blob);
        let (_, boundaries) = decode(blob, blob.len(), 65_536).expect("decodes");
        assert!(!boundaries.is_empty());
        let mut member_start = 0;
        for (logical, at, resume) in boundaries {
            if resume == Boundary::Start {
                member_start = logical;
            }
            let window_start = member_start.max(logical.saturating_sub(window::WINDOW_LEN_MAX_BYTES));
            let head = &blob[at..blob.len().min(at + 100_000)];
            let window = match resume {
                Boundary::Start => Vec::new(),
                Boundary::Block { bits, value } => {
                    let kept = finder.kept(bits, value, &bytes[window_start..logical], head).expect("memory");
                    let len = bytes.len() - logical;
                    finder.start(bits, value, logical - window_start, len).expect("a window");
                    let told = head.chunks(777).any(|part| finder.push(part).expect("intact"));
                    assert!(told, "the data does not tell its window");
                    finder.fill(&kept).expect("as many places as bytes")
                }
            };
            let mut decoder = Decoder::resume(compression, resume, &window).expect("resumes");
            let (mut at, mut out) = (at, vec![0; bytes.len() - logical]);
            let mut filled = 0;
            while filled < out.len() {
                let step = decoder.step(&blob[at..], &mut out[filled..]).expect("decodes");
                assert!(!step.is_stuck());
                at += step.consumed;
                filled += step.produced;
            }
            assert!(out == bytes[logical..], "wrong bytes after a restart at {logical}");
        }
    }
}

#[test]
fn windows_keep_what_is_used_and_little_else() {
    // After the first 32 KiB of noise come 32 KiB of noise with one copied piece.
    let mut state = 7_u32;
    let mut noise = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) as u8
    };
    let mut bytes: Vec<u8> = (0..65_536).map(|_| noise()).collect();
    let piece = bytes[50_000..50_100].to_vec();
    bytes.extend((0..1000).map(|_| noise()));
    bytes.extend(piece);
    bytes.extend((0..60_000).map(|_| noise()));
    let blob = gzip(&bytes, 6, 8);
    let (_, boundaries) = decode(&blob, blob.len(), 1 << 20).expect("decodes");
    let mut finder = window::UseFinder::new().expect("memory");
    for (logical, at, resume) in boundaries.into_iter().filter(|(logical, ..)| (60_000..66_000).contains(logical)) {
        let Boundary::Block { bits, value } = resume else { panic!("a block") };
        let window = &bytes[logical.saturating_sub(32_768)..logical];
        let kept = finder.kept(bits, value, window, &blob[at..]).expect("memory");
        assert!((60..200).contains(&kept.len()), "{} bytes kept of a window of which 100 are used", kept.len());
        assert!(finder.fill(&kept[1..]).is_none());
    }
}

/// A gzip header with the given flags and optional parts, then an empty deflate stream and its trailer.
fn member(flags: u8, parts: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 255];
    bytes.extend_from_slice(parts);
    bytes.extend_from_slice(&[3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    bytes
}

#[test]
fn gzip_headers_are_as_strict_as_gos() {
    let crc_of = |flags: u8, parts: &[u8]| {
        let header = [&[0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 255], parts].concat();
        [parts, &(raw::crc32(0, &header) as u16).to_le_bytes()].concat()
    };
    let long_name = |len: usize| [vec![b'a'; len], vec![0]].concat();
    let accepted = [
        member(0, b""),
        member(1, b""),
        member(0xe0, b""),
        member(4, b"\x03\x00abc"),
        member(4, b"\x00\x00"),
        member(8, b"name\0"),
        member(16, b"comment\0"),
        member(28, b"\x01\x00xname\0comment\0"),
        member(2, &crc_of(2, b"")),
        member(31, &crc_of(31, b"\x01\x00xname\0\0")),
        member(8, &long_name(511)),
    ];
    for (case, blob) in accepted.iter().enumerate() {
        for input_len in [1, blob.len()] {
            assert!(decode(blob, input_len, 10).is_ok(), "case {case} was refused");
        }
    }
    let mut wrong_crc = member(2, &crc_of(2, b""));
    wrong_crc[10] ^= 1;
    for (case, blob) in [wrong_crc, member(8, &long_name(512)), member(16, &long_name(600))].iter().enumerate() {
        assert!(matches!(decode(blob, 1, 10), Err(InflateError::GzipHeader { .. })), "case {case}");
    }
    let mut method = member(0, b"");
    method[2] = 7;
    assert!(Decoder::new(Compression::Gzip).expect("memory").step(&method, &mut [0; 9]).is_err());
}

#[test]
fn damage_truncation_and_garbage_are_errors() {
    let bytes = sample(50_000);
    let blobs = [gzip(&bytes, 6, 8), [gzip(&bytes, 6, 8), gzip(&bytes, 1, 8)].concat(), zstd_frames(&[&bytes])];
    for blob in &blobs {
        for garbage in [&b"\0"[..], b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", b"garbage"] {
            assert!(decode(&[blob, garbage].concat(), 1000, 1000).is_err());
        }
    }
    for blob in [&blobs[0], &blobs[2]] {
        for len in (4..blob.len()).step_by(97).chain(blob.len() - 12..blob.len()) {
            assert_eq!(decode(&blob[..len], 1000, 1000), Err(InflateError::Truncated), "cut to {len}");
        }
    }
    let gzip = &blobs[0];
    for at in (10..gzip.len()).step_by(61).chain(gzip.len() - 8..gzip.len()) {
        let mut damaged = gzip.clone();
        damaged[at] ^= 0x10;
        // A flipped bit may leave the same bytes only where the data says the same in two ways; it never passes else.
        assert!(decode(&damaged, 1000, 1000).is_err(), "damage at {at} passed");
    }
}

#[test]
fn huge_zstd_windows_are_refused_before_they_are_allocated() {
    // A frame header with a window of 2^31 bytes (RFC 8878, section 3.1.1.1.2: exponent 21, mantissa 0).
    let blob = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 21 << 3, 1, 0, 0];
    assert!(matches!(decode(&blob, 9, 100), Err(InflateError::Zstd { .. })));
}
