//! The FUSE side of the read path.
//!
//! Two file systems over one reader. [`layers`] is a flat directory with one file per layer, each the layer's
//! uncompressed tar stream: EROFS in the kernel reads its devices there. [`tree`] is the whole merged tree, answered
//! from the EROFS image, for kernels that cannot mount EROFS from files. [`read`] turns a request into chunks: what is
//! present is answered on the FUSE thread, what is missing waits on the async side and holds no thread. [`locate`] names files for messages, `failures` says which failures people are told of.
//!
//! Content is immutable, so every reply tells the kernel to keep it for ever.

mod failures;
pub mod layers;
pub mod locate;
pub mod read;
mod resume;
pub mod session;
pub mod tree;

use std::time::Duration;

/// How long the kernel may keep names and attributes. Content never changes, so the longest that the protocol can say
/// without overflowing the kernel's jiffies: a hundred years.
const TTL: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
