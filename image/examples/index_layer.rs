//! Measures the layer index on a real blob: `index_layer BLOB inflate|build|sizes|verify [ROUNDS]`.
//!
//! * `inflate`: decompression alone, with this crate's decoder.
//! * `build`: the index build with 1 and with 2 threads, beside `inflate` in turns, and their ratio.
//! * `sizes`: length of the seek table and its windows for several lengths of spans.
//! * `verify`: every chunk decoded through the seek table, span by span in a shuffled order, then in runs of 16 spans.
//!
//! Times are wall times; `cpu` is the whole process's CPU time over the same part. Peak memory: run one mode under
//! `/usr/bin/time -v`. The blob is read piece by piece from the page cache, as a builder would get it.

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hermes_image::build::{Expect, LayerBuilder, LayerIndex, Options, SpanLimits};
use hermes_image::ids::{DiffId, LayerId, SpanNo};
use hermes_image::inflate::{Compression, Decoder};
use hermes_image::span::SpanDecoder;
use sha2::{Digest, Sha256};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const PORTION_LEN_BYTES: usize = 128 * 1024;
const MIB: f64 = 1024.0 * 1024.0;

/// Wall and CPU time of a part of the run.
struct Took {
    wall: Duration,
    cpu: Duration,
}

fn cpu_time() -> Result<Duration> {
    // Fields 14 and 15 of proc(5) stat are user and system time in ticks of 10 ms; the name in field 2 may hold spaces.
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let after_name = stat.rsplit_once(')').ok_or("no name in /proc/self/stat")?.1;
    let ticks: u64 =
        after_name.split_whitespace().skip(11).take(2).map(str::parse::<u64>).sum::<std::result::Result<_, _>>()?;
    Ok(Duration::from_millis(10 * ticks))
}

fn timed<T>(part: impl FnOnce() -> Result<T>) -> Result<(T, Took)> {
    let (cpu, start) = (cpu_time()?, Instant::now());
    let value = part()?;
    Ok((value, Took { wall: start.elapsed(), cpu: cpu_time()? - cpu }))
}

/// Reads `path` portion by portion.
fn each_portion(path: &str, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let (mut file, mut portion) = (File::open(path)?, vec![0; PORTION_LEN_BYTES]);
    loop {
        match file.read(&mut portion)? {
            0 => return Ok(()),
            len => take(&portion[..len])?,
        }
    }
}

/// Decompresses `path` and gives every piece of output to `take`.
fn inflate(path: &str, mut take: impl FnMut(&[u8])) -> Result<()> {
    let mut decoder = None;
    let mut room = vec![0; 256 * 1024];
    each_portion(path, |mut input| {
        if decoder.is_none() {
            decoder = Some(Decoder::new(Compression::detect(input))?);
        }
        let Some(decoder) = &mut decoder else { return Ok(()) };
        loop {
            let step = decoder.step(input, &mut room)?;
            input = &input[step.consumed..];
            take(&room[..step.produced]);
            if step.is_stuck() {
                return Ok(());
            }
        }
    })
}

fn expect(path: &str) -> Result<(Expect, u64)> {
    let (mut blob, mut tar, mut blob_len, mut tar_len) = (Sha256::new(), Sha256::new(), 0, 0);
    each_portion(path, |bytes| {
        blob.update(bytes);
        blob_len += bytes.len() as u64;
        Ok(())
    })?;
    inflate(path, |bytes| {
        tar.update(bytes);
        tar_len += bytes.len() as u64;
    })?;
    let (layer, diff_id) = (LayerId(blob.finalize().into()), DiffId(tar.finalize().into()));
    Ok((Expect { layer, diff_id, compressed_len_bytes: blob_len }, tar_len))
}

fn build(path: &str, expect: Expect, threads: usize, spans: SpanLimits) -> Result<LayerIndex> {
    let mut builder = LayerBuilder::new(expect, Options { threads, spans, ..Options::default() })?;
    each_portion(path, |bytes| Ok(builder.push(bytes)?))?;
    Ok(builder.finish()?)
}

fn report(what: &str, tar_len: u64, took: &Took) {
    let speed = |time: Duration| tar_len as f64 / 1e6 / time.as_secs_f64();
    let (wall, cpu) = (took.wall.as_secs_f64(), took.cpu.as_secs_f64());
    println!(
        "{what:<22} {wall:6.2} s wall {:6.0} MB/s   {cpu:6.2} s cpu {:6.0} MB/s",
        speed(took.wall),
        speed(took.cpu)
    );
}

fn measure_build(path: &str, rounds: usize) -> Result<()> {
    let (expect, tar_len) = expect(path)?;
    println!("{} bytes compressed, {tar_len} bytes of tar", expect.compressed_len_bytes);
    for _ in 0..rounds {
        let ((), alone) = timed(|| inflate(path, |_| {}))?;
        report("inflate alone", tar_len, &alone);
        for threads in [1, 2] {
            let (_, took) = timed(|| build(path, expect, threads, SpanLimits::default()))?;
            report(&format!("index, {threads} thread(s)"), tar_len, &took);
            println!("{:>22} {:.2} of the speed of inflate", "", alone.wall.as_secs_f64() / took.wall.as_secs_f64());
        }
    }
    Ok(())
}

fn measure_sizes(path: &str) -> Result<()> {
    let (expect, _) = expect(path)?;
    println!(
        "span KiB (min-max, joined) | spans | mean KiB of output | compressed bytes read, all spans one by one | directory | windows | of the blob"
    );
    for (min_kib, max_kib, joined_kib) in [
        (32, 96, 512),
        (64, 128, 512),
        (96, 192, 512),
        (128, 256, 512),
        (64, 128, 0),
        (128, 256, 0),
        (256, 512, 0),
        (384, 512, 0),
        (768, 1024, 0),
        (1536, 2048, 0),
    ] {
        let spans = SpanLimits {
            min_len_bytes: min_kib * 1024,
            max_len_bytes: max_kib * 1024,
            joined_len_bytes: joined_kib * 1024,
        };
        let index = build(path, expect, 2, spans)?;
        let blob_len = expect.compressed_len_bytes as f64;
        let read: u64 = index.seek.spans().map(|span| span.blob.end - span.blob.start).sum();
        let (directory, windows) = (index.seek.bytes().len(), index.windows.len());
        println!(
            "{min_kib}-{max_kib}, {joined_kib} | {} | {:.0} | {:.3} x | {directory} | {windows} | {:.3} %",
            index.seek.count(),
            index.chunks.logical_len_bytes() as f64 / 1024.0 / f64::from(index.seek.count().max(1)),
            read as f64 / blob_len,
            100.0 * (directory + windows) as f64 / blob_len,
        );
        if spans == SpanLimits::default() {
            let chunk_table = index.chunks.bytes().len();
            println!(
                "    chunks {} (mean {:.1} KiB), chunk table {chunk_table} bytes, {:.3} % of the blob; entries {}",
                index.chunks.count(),
                index.chunks.logical_len_bytes() as f64 / 1024.0 / f64::from(index.chunks.count().max(1)),
                100.0 * chunk_table as f64 / blob_len,
                index.stats.entries,
            );
        }
    }
    Ok(())
}

fn verify(path: &str) -> Result<()> {
    let (expect, _) = expect(path)?;
    let index = build(path, expect, 2, SpanLimits::default())?;
    let blob = Bytes::from(std::fs::read(path)?);
    let count = index.seek.count();
    // A stride that shares no factor with the number of spans visits each of them once, far from the one before.
    let stride = (count / 2 + 1..).find(|stride| gcd(*stride, count) == 1).ok_or("no stride")?;
    let decode = |spans: std::ops::Range<u32>| -> Result<u64> {
        let range = index.seek.window_range(SpanNo(spans.start));
        let window = index.windows.slice(range.start as usize..range.end as usize);
        let window = index.seek.verify_window(SpanNo(spans.start), window)?;
        let blob_range = index.seek.blob_range(spans.clone());
        let mut decoder = SpanDecoder::run(&index.seek, &index.chunks, spans, &window)?;
        let mut chunks = Vec::new();
        let mut seen = 0;
        for portion in blob[blob_range.start as usize..blob_range.end as usize].chunks(PORTION_LEN_BYTES) {
            decoder.push(portion, &mut chunks)?;
            seen += chunks.drain(..).count() as u64;
        }
        decoder.finish()?;
        Ok(seen)
    };
    let (chunks, took) = timed(|| {
        (0..count).try_fold(0, |seen, turn| {
            let span = (u64::from(turn) * u64::from(stride) % u64::from(count)) as u32;
            Ok(seen + decode(span..span + 1)?)
        })
    })?;
    println!("{chunks} of {} chunks in {count} spans, all verified", index.chunks.count());
    report("decode, span by span", index.chunks.logical_len_bytes(), &took);
    println!(
        "{:.2} ms per span of {:.2} MiB",
        took.wall.as_secs_f64() * 1e3 / f64::from(count),
        index.chunks.logical_len_bytes() as f64 / MIB / f64::from(count)
    );
    let (chunks, took) = timed(|| {
        let starts = (0..count).step_by(16);
        starts.map(|start| decode(start..(start + 16).min(count))).try_fold(0, |seen, run| Ok(seen + run?))
    })?;
    println!("{chunks} chunks in runs of 16 spans");
    report("decode, runs of spans", index.chunks.logical_len_bytes(), &took);
    Ok(())
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [path, mode, rest @ ..] = arguments.as_slice() else {
        return Err("usage: index_layer BLOB inflate|build|sizes|verify [ROUNDS]".into());
    };
    let rounds = rest.first().map_or(Ok(1), |rounds| rounds.parse())?;
    match mode.as_str() {
        "inflate" => {
            for _ in 0..rounds {
                let mut len = 0;
                let ((), took) = timed(|| inflate(path, |bytes| len += bytes.len() as u64))?;
                report("inflate alone", len, &took);
            }
            Ok(())
        }
        "build" => measure_build(path, rounds),
        "sizes" => measure_sizes(path),
        "verify" => verify(path),
        other => Err(format!("unknown mode '{other}'").into()),
    }
}
