//! Fuzz targets: what must hold for any bytes.
//!
//! A target is a plain function over bytes that calls one decoder and panics when a property does not hold: what
//! decodes encodes to the same bytes, two ways to the same answer agree, outputs stay within their limits. [`run`]
//! also measures the memory that an input makes live and panics above the target's stated limit, when the process has
//! [`memory::Counting`] as its allocator.
//!
//! Three things drive the targets: libFuzzer, guided by coverage (`tools/fuzz`); the tests `fuzz_*`, which try the
//! corpus and then mutations of it ([`exercise`]); and whoever looks at one input. All use the same
//! corpus, `corpus/<target>/`, which `examples/seeds.rs` began and fuzzing goes on with. An input that once broke
//! something stays there under a name that says what.

mod artifacts;
mod erofs;
mod exchange;
mod guess;
mod inflate;
mod layer;
mod members;
pub mod memory;
mod merge;
pub mod mutate;
pub mod parts;
mod profile;
mod statement;
mod tar;
mod target;

pub use artifacts::{chunk_table, runs, seek_table, toc, wire};
pub use erofs::erofs_reader;
pub use exchange::exchange_codec;
pub use guess::guess;
pub use inflate::{inflate_gzip, inflate_zstd};
pub use layer::{layer_builder, span_decoder};
pub use members::{ISSUER_SEED, certificate, grant, member_entry, member_message, revocation};
pub use merge::merge;
pub use profile::start_profile;
pub use statement::{SEED as STATEMENT_KEY_SEED, statement};
pub use tar::{tar, tar_pushes};
pub use target::{INPUT_LEN_MAX_BYTES, TARGETS, Target, exercise, find, run};
