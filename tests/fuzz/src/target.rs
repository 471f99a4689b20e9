//! The table of targets, and the ways to run one.

use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{env, fs};

use crate::memory::peak_of;
use crate::mutate::{Random, mutate};

/// Longest input, in bytes. All decoders are small state machines; what goes wrong with more goes wrong with this much.
pub const INPUT_LEN_MAX_BYTES: usize = 32 * 1024;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// One target.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// What it is called on the command line; also the name of its corpus folder.
    pub name: &'static str,
    /// Panics when a property does not hold.
    pub run: fn(&[u8]),
    /// An input may make this many bytes live at once, whatever its length, ...
    pub live_base_bytes: usize,
    /// ... and this many for each of its own bytes. The table says why.
    pub live_per_input_byte: usize,
}

/// All targets.
///
/// The memory limits count the copies that the targets themselves make, two as a rule.
pub const TARGETS: [Target; 22] = [
    // An entry of a few bytes of PAX sparse map is 48 bytes, in vectors that double; the base is one extension header.
    Target { name: "tar", run: crate::tar, live_base_bytes: MIB, live_per_input_byte: 64 },
    Target { name: "tar_pushes", run: crate::tar_pushes, live_base_bytes: MIB, live_per_input_byte: 96 },
    // Two outputs of 1 MiB in doubling vectors; libz's state is below 100 KiB, and an output is bounded, not the ratio.
    Target { name: "inflate_gzip", run: crate::inflate_gzip, live_base_bytes: 8 * MIB, live_per_input_byte: 4 },
    Target { name: "inflate_zstd", run: crate::inflate_zstd, live_base_bytes: 8 * MIB, live_per_input_byte: 4 },
    // The content (2 MiB, doubling), the builder's buffers of 10 MiB, the chunks of one span.
    Target { name: "layer_builder", run: crate::layer_builder, live_base_bytes: 24 * MIB, live_per_input_byte: 96 },
    // Twice the chunks that come out, at most 1,000 times the input (deflate's limit) but never beyond the spans asked for.
    Target { name: "span_decoder", run: crate::span_decoder, live_base_bytes: 2 * MIB, live_per_input_byte: 2200 },
    // Read in place: the target's own copy, and the payload of one panic message.
    Target { name: "toc", run: crate::toc, live_base_bytes: 4 * KIB, live_per_input_byte: 3 },
    Target { name: "chunk_table", run: crate::chunk_table, live_base_bytes: 4 * KIB, live_per_input_byte: 6 },
    Target { name: "seek_table", run: crate::seek_table, live_base_bytes: 4 * KIB, live_per_input_byte: 3 },
    // The limit of 1 MiB twice, packed once; zstd's own contexts are C memory.
    Target { name: "wire", run: crate::wire, live_base_bytes: 4 * MIB, live_per_input_byte: 4 },
    // Two bytes are a run of eight; five sets of them.
    Target { name: "runs", run: crate::runs, live_base_bytes: 4 * KIB, live_per_input_byte: 64 },
    // JSON text as values and in two escaped copies, in vectors that double.
    Target { name: "statement", run: crate::statement, live_base_bytes: 16 * KIB, live_per_input_byte: 96 },
    // The target's own list of inodes, a copy of the image, and a symlink's target as long as that in two pieces.
    Target { name: "erofs_reader", run: crate::erofs_reader, live_base_bytes: 128 * KIB, live_per_input_byte: 3 },
    Target { name: "exchange_codec", run: crate::exchange_codec, live_base_bytes: 4 * KIB, live_per_input_byte: 16 },
    // A few names of 64 bytes, and copies of at most the longest document.
    Target { name: "certificate", run: crate::certificate, live_base_bytes: 8 * KIB, live_per_input_byte: 8 },
    Target { name: "grant", run: crate::grant, live_base_bytes: 8 * KIB, live_per_input_byte: 8 },
    // Three sets of names, 32 bytes each in B-tree nodes that may be half full, a list of them as peers (64 bytes of
    // multihash, 80 with its frame), and their encodings.
    Target { name: "revocation", run: crate::revocation, live_base_bytes: 16 * KIB, live_per_input_byte: 24 },
    Target { name: "member_entry", run: crate::member_entry, live_base_bytes: 8 * KIB, live_per_input_byte: 8 },
    // Two bytes may ask for a pointer; an entry of 109 bytes is 250 and the bytes themselves. Vectors double, also the
    // frame that is written.
    Target { name: "member_message", run: crate::member_message, live_base_bytes: 8 * KIB, live_per_input_byte: 16 },
    // A run of five bytes is one of 24, in a list of up to 8; a merge of 16,384 chunks keeps 150 bytes for each.
    Target { name: "start_profile", run: crate::start_profile, live_base_bytes: 8 * MIB, live_per_input_byte: 64 },
    // The image, its layer and the contents again; words and values of scripts are at most 4 KiB, and a shell that is copied
    // shares them.
    Target { name: "guess", run: crate::guess, live_base_bytes: 24 * MIB, live_per_input_byte: 128 },
    // Two trees (an inode of 150 bytes for a node of 48, twice while a vector grows), an image with the index of 64 MiB of
    // sparse files (8 bytes for each 512, 1 MiB) and its copies, and 1 MiB of attributes in each.
    Target { name: "merge", run: crate::merge, live_base_bytes: 16 * MIB, live_per_input_byte: 64 },
];

/// The target called `name`.
pub fn find(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// Tries one input.
///
/// # Panics
/// When a property does not hold, or more memory was live at once than the target's limit.
pub fn run(target: &Target, data: &[u8]) {
    let data = &data[..data.len().min(INPUT_LEN_MAX_BYTES)];
    let limit = (target.live_base_bytes + target.live_per_input_byte * data.len()) as u64;
    let peak = peak_of(|| (target.run)(data));
    assert!(peak <= limit, "{}: {} bytes of input made {peak} live, {limit} are allowed", target.name, data.len());
}

/// The folder of the target's corpus.
fn corpus_folder(target: &Target) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name)
}

/// Tries the whole corpus of the target `name`, and then mutations of it, always the same ones, for as many seconds as
/// `HERMES_FUZZ_SECONDS` says, or one.
///
/// # Panics
/// When an input fails; it is written to a file which the panic message names. Also when there is no such target, its
/// corpus is empty, or holds a file longer than [`INPUT_LEN_MAX_BYTES`].
pub fn exercise(name: &str) {
    let target = find(name).expect("the test names a target of the table");
    let mut corpus = Vec::new();
    for entry in fs::read_dir(corpus_folder(target)).expect("the target has a corpus") {
        let path = entry.expect("the corpus can be read").path();
        let data = fs::read(&path).expect("the corpus can be read");
        assert!(data.len() <= INPUT_LEN_MAX_BYTES, "{} is longer than inputs may be", path.display());
        corpus.push((path, data));
    }
    assert!(!corpus.is_empty(), "the corpus of {name} is empty");
    corpus.sort();
    for (path, data) in &corpus {
        attempt(target, data, || path.clone());
    }
    let seconds = env::var("HERMES_FUZZ_SECONDS").map_or(1, |text| text.parse().expect("a number of seconds"));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut random = Random::new(1);
    while Instant::now() < end {
        let mut data = corpus[random.below(corpus.len())].1.clone();
        let other = &corpus[random.below(corpus.len())].1;
        mutate(&mut random, &mut data, other, INPUT_LEN_MAX_BYTES);
        attempt(target, &data, || {
            let path = env::temp_dir().join(format!("hermes-fuzz-{name}-{}", std::process::id()));
            fs::write(&path, &data).expect("the input can be kept");
            path
        });
    }
}

fn attempt(target: &Target, data: &[u8], place: impl FnOnce() -> PathBuf) {
    if let Err(panic) = panic::catch_unwind(AssertUnwindSafe(|| run(target, data))) {
        eprintln!("the failing input of {} is {}", target.name, place().display());
        panic::resume_unwind(panic);
    }
}
