use super::*;
use crate::inflate::window::unpack;

/// Spans of a table in these tests.
const SPANS: u32 = 40;
/// Chunks of each.
const CHUNKS: u32 = 3;

fn header(compression: Compression) -> SeekHeader {
    SeekHeader {
        compression,
        layer: LayerId([1; 32]),
        diff_id: DiffId([2; 32]),
        blob_len_bytes: 100_000,
        logical_len_bytes: 400_000,
        chunk_count: SPANS * CHUNKS,
    }
}

/// The kept bytes of a span: none for every seventh, of which the first needs no window at all.
fn kept(span: u32) -> Vec<u8> {
    if span.is_multiple_of(7) { Vec::new() } else { (0..span * 5).map(|i| (i * span) as u8).collect() }
}

fn table() -> (SeekTable, Bytes) {
    let mut builder = SeekTableBuilder::default();
    for span in 0..SPANS {
        let place = u64::from(span);
        let (bits, kept) = ((span % 8) as u8, kept(span));
        builder
            .push(&NewSpan {
                first_chunk: ChunkNo(span * CHUNKS),
                logical_start: LogicalOffset(9000 * place),
                blob_start: BlobOffset(2000 * place),
                blob_end: BlobOffset(2000 * place + 2100),
                resume: if span == 0 { Resume::Start } else { Resume::Block { bits, value: (1 << bits) - 1 } },
                window_len_bytes: if span == 0 { 0 } else { 9000 },
                kept: &kept,
            })
            .expect("a valid span");
    }
    builder.extend_last(BlobOffset(100_000));
    builder.finish(header(Compression::Gzip)).expect("valid spans")
}

#[test]
fn round_trips_and_finds() {
    let (made, windows) = table();
    let read = SeekTable::decode(made.bytes().clone()).expect("decodes");
    assert_eq!((read.id(), read.count(), read.header()), (made.id(), SPANS, &header(Compression::Gzip)));
    assert_eq!((read.windows_id(), read.windows_len_bytes()), (ArtifactId::of(&windows), windows.len() as u64));
    for chunk in 0..SPANS * CHUNKS {
        assert_eq!(read.span_of(ChunkNo(chunk)), SpanNo(chunk / CHUNKS));
    }
    for (span, entry) in (0..).zip(read.spans()) {
        let no = SpanNo(span);
        assert_eq!(entry.chunks, span * CHUNKS..(span + 1) * CHUNKS);
        assert_eq!(entry.blob.start, 2000 * u64::from(span));
        let range = read.window_range(no);
        assert_eq!(range.is_empty(), kept(span).is_empty());
        let packed = windows.slice(range.start as usize..range.end as usize);
        assert!(read.verify_window(no, packed.clone()).is_ok());
        if !range.is_empty() {
            let unpacked = unpack(&packed, read.window_pack(no).unpacked_len_bytes).expect("unpacks");
            assert_eq!(unpacked[entry.kept], kept(span));
            assert!(read.verify_window(no, packed.slice(1..)).is_err());
            assert!(read.verify_window(no, Bytes::from(vec![0; packed.len()])).is_err());
        }
    }
    assert_eq!(read.span(SpanNo(39)).blob, 78_000..100_000);
    assert_eq!(read.blob_range(1..3), 2000..6100);
    assert_eq!(read.window_range(SpanNo(1)), read.window_range(SpanNo(31)));
    assert_ne!(read.window_range(SpanNo(31)), read.window_range(SpanNo(32)));
}

#[test]
fn an_empty_layer_has_no_spans() {
    let empty = SeekHeader { logical_len_bytes: 0, chunk_count: 0, ..header(Compression::Plain) };
    let (made, windows) = SeekTableBuilder::default().finish(empty).expect("empty");
    assert_eq!((made.count(), windows.len(), made.spans().len()), (0, 0, 0));
}

#[test]
fn contradictions_are_refused() {
    let good = table().0.bytes().to_vec();
    let span = |no: usize, offset: usize| HEADER_LEN + no * SPAN_ENTRY_LEN_BYTES + offset;
    let pack = |no: usize, offset: usize| span(SPANS as usize, no * PACK_ENTRY_LEN + offset);
    let refused: &[(&str, usize, &[u8])] = &[
        ("a plain tar with bits and windows", 10, &[0]),
        ("zstd with bits and windows", 10, &[2]),
        ("unknown compression", 10, &[3]),
        ("reserved", 11, &[1]),
        ("reserved", 44, &[1]),
        ("more spans than bytes", 12, &[41]),
        ("windows longer than the packs", 32, &[255, 255, 255]),
        ("fewer chunks than the spans have", 40, &[4]),
        ("blob shorter than the spans", 16, &[255, 0, 0]),
        ("space shorter than the spans", 24, &[255, 0, 0]),
        ("first span not at chunk 0", span(0, 0), &[1]),
        ("bits on a start", span(0, 5), &[1]),
        ("window on a start", span(0, 6), &[1]),
        ("more kept than the window has", span(1, 6), &[4, 0]),
        ("window too long", span(1, 6), &[1, 0x80]),
        ("reserved", span(1, 10), &[1]),
        ("kept bytes elsewhere", span(1, 12), &[1]),
        ("start after end", span(0, 24), &[255, 255]),
        ("end beyond the blob", span(39, 32), &[255, 255, 255]),
        ("a value wider than its bits", span(1, 5), &[2]),
        ("nine bits", span(1, 4), &[10]),
        ("chunks out of order", span(1, 0), &[7]),
        ("restart beyond the space", span(39, 16), &[255, 255, 255]),
        ("restart before the one before", span(2, 16), &[1, 0]),
        ("pack elsewhere", pack(1, 0), &[7]),
        ("pack end overflows", pack(1, 0), &[0xff; 8]),
        ("pack longer", pack(0, 8), &[0xff]),
        ("pack unpacks to less", pack(0, 12), &[1]),
    ];
    for (what, at, bytes) in refused {
        let mut damaged = good.clone();
        damaged[*at..*at + bytes.len()].copy_from_slice(bytes);
        assert!(SeekTable::decode(Bytes::from(damaged)).is_err(), "{what} was accepted");
    }
}

#[test]
fn damage_never_panics_and_never_keeps_the_name() {
    let good = table().0;
    for at in 0..good.bytes().len() {
        for flip in [1, 0x80, 0xff] {
            let mut bytes = good.bytes().to_vec();
            bytes[at] ^= flip;
            if let Ok(other) = SeekTable::decode(Bytes::from(bytes)) {
                assert_ne!(other.id(), good.id());
                assert_eq!(other.spans().len(), SPANS as usize);
                assert!((0..SPANS).all(|span| other.window_range(SpanNo(span)).end <= other.windows_len_bytes()));
            }
        }
    }
    for len in 0..good.bytes().len() {
        assert!(SeekTable::decode(good.bytes().slice(..len)).is_err());
    }
}

#[test]
fn impossible_spans_are_refused_when_pushed() {
    let span = |window_len_bytes, kept| NewSpan {
        first_chunk: ChunkNo(0),
        logical_start: LogicalOffset(0),
        blob_start: BlobOffset(0),
        blob_end: BlobOffset(10),
        resume: Resume::Block { bits: 0, value: 0 },
        window_len_bytes,
        kept,
    };
    let mut builder = SeekTableBuilder::default();
    assert_eq!(builder.push(&span(WINDOW_LEN_MAX_BYTES + 1, b"")), Err(SeekTableError::Span(0)));
    assert_eq!(builder.push(&span(2, b"abc")), Err(SeekTableError::Span(0)));
    assert!(builder.push(&span(3, b"abc")).is_ok());
}
