//! The store from outside: killed at random points, on a filesystem that fills up, and in the page cache.

mod cache;
mod full;
mod harness;
mod kill;
mod ramp;
