//! What bytes mean.
//!
//! Owns every format that Hermes reads or writes: layer tars and their compression, chunks, the layer index, the merged
//! tree, EROFS images, and the verification of bytes against their names. It does no I/O, knows no clock, and trusts
//! nothing: every decoder treats its input as hostile, checks limits before it allocates, and never panics on input.
//!
//! Data flows: compressed stream -> [`inflate`] -> tar walk -> chunks and layer tree -> layer index;
//! layer indexes of a chain -> merge -> [`tree`] -> EROFS image; [`guess`] says what a start of it reads.

pub mod access;
pub mod agreement;
pub mod build;
pub mod chunk;
pub mod erofs;
pub mod guess;
pub mod ids;
pub mod index;
pub mod inflate;
pub mod merge;
pub mod runs;
pub mod span;
pub mod statement;
pub mod tar;
pub mod tree;
pub mod verify;
