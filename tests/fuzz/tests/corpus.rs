//! Every target: its corpus, and then mutations of it for `HERMES_FUZZ_SECONDS` (1 by default).

use hermes_fuzz::memory::Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

macro_rules! targets {
    ($($test:ident = $target:literal),+ $(,)?) => {
        $(
            #[test]
            fn $test() {
                hermes_fuzz::exercise($target);
            }
        )+

        #[test]
        fn every_target_has_a_test() {
            let tested = [$($target),+];
            let missing = hermes_fuzz::TARGETS.iter().find(|target| !tested.contains(&target.name));
            assert!(missing.is_none(), "{missing:?}");
        }
    };
}

targets! {
    fuzz_tar = "tar",
    fuzz_tar_pushes = "tar_pushes",
    fuzz_inflate_gzip = "inflate_gzip",
    fuzz_inflate_zstd = "inflate_zstd",
    fuzz_layer_builder = "layer_builder",
    fuzz_span_decoder = "span_decoder",
    fuzz_toc = "toc",
    fuzz_chunk_table = "chunk_table",
    fuzz_seek_table = "seek_table",
    fuzz_wire = "wire",
    fuzz_runs = "runs",
    fuzz_statement = "statement",
    fuzz_erofs_reader = "erofs_reader",
    fuzz_exchange_codec = "exchange_codec",
    fuzz_start_profile = "start_profile",
    fuzz_merge = "merge",
    fuzz_guess = "guess",
    fuzz_certificate = "certificate",
    fuzz_grant = "grant",
    fuzz_revocation = "revocation",
    fuzz_member_entry = "member_entry",
    fuzz_member_message = "member_message",
}

#[test]
fn more_memory_than_the_limit_fails() {
    let hoarder = hermes_fuzz::Target {
        name: "hoarder",
        run: |data| drop(std::hint::black_box(vec![1_u8; 10 * data.len()])),
        live_base_bytes: 0,
        live_per_input_byte: 9,
    };
    let caught = std::panic::catch_unwind(|| hermes_fuzz::run(&hoarder, &[0; 1000]));
    assert!(caught.is_err(), "10,000 bytes passed for 9,000");
    hermes_fuzz::run(&hermes_fuzz::Target { live_per_input_byte: 10, ..hoarder }, &[0; 1000]);
}
