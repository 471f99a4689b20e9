//! What crosses crates, without the command. One binary, because each would be linked with everything.

mod compare;
mod lazy_snapshots;
mod odd;
mod real_images;
mod snapshotter;
