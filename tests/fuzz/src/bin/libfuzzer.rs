//! The targets under libFuzzer: `HERMES_FUZZ_TARGET` names one, arguments are libFuzzer's own. Built by `tools/fuzz`.
#![no_main]
#![allow(unsafe_code)] // libFuzzer finds its entry points by their C names

use std::sync::LazyLock;

use hermes_fuzz::memory::Counting;
use hermes_fuzz::{Target, find, run};
use libfuzzer_sys::fuzz_target;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("HERMES_FUZZ_TARGET").unwrap_or_default();
    find(&name).unwrap_or_else(|| {
        eprintln!("HERMES_FUZZ_TARGET='{name}' is no target");
        std::process::exit(2)
    })
});

fuzz_target!(init: { LazyLock::force(&TARGET); }, |data: &[u8]| -> () { run(*TARGET, data) });
