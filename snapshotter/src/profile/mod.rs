//! Starts of images: recording what they read, and fetching ahead of the next one by it.
//!
//! ```text
//!  mount --> Start (claims a slot of each layer's Touches) --> settles --> StartRecord --> store: records, merged profile
//!    |                 ^ first reads, by the FUSE threads                                        |
//!    |                 | arrivals, by the fetch driver                                           v
//!    +--> profile: own, given, index folder, peers, earlier version --> Prefetch --> fetch driver (class prefetch)
//! ```
//!
//! [`Touches`] is the only part in the path of reads: one relaxed load while nothing is recorded, and while something is, a
//! load for each chunk that was read before and one exchange for each that was not. It takes no lock and allocates nothing.
//!
//! A start is recorded from the mount of its tree on, because only then every read of it is seen: what the kernel has in its
//! page cache it does not ask for again, so a second container of a tree that is still mounted tells nothing, and neither does
//! a tree that a restarted daemon goes on with. Layers that the kernel reads without the daemon (complete ones) are left out of
//! the record, which then says nothing about them. What two starts of images with a common layer read at the same time
//! counts for both; the merge of several records sorts that out.
//!
//! A crash loses the record under way, and nothing else: a record is in the store, with the profile that is made of it, when
//! it counts, in one write.

mod keep;
mod prefetch;
mod report;
mod start;
mod touches;
mod version;

pub use keep::{Kept, Profiles};
pub use report::{PathIndex, report_steps};
pub use start::{Look, Start, StartLayer};
pub use touches::{Claim, Touched, Touches};

pub(crate) use keep::{Wanted, to_give};
pub(crate) use prefetch::{PrefetchEnd, PrefetchJob};
pub(crate) use report::{summary, touches};
