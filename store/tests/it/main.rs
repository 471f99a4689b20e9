//! The store from outside: killed at random points, also while layers are staged, on a filesystem that fills up, and in the page cache.

mod cache;
mod full;
mod harness;
mod kill;
mod ramp;
mod staged;
