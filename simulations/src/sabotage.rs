//! Errors that are made on purpose, to know that the checkers see them.
//!
//! Each is an error of a driver, one line in the place where a real one would be. Tests alone put them in; a simulation that
//! people run has none.

/// An error on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// An ask that failed is forgotten: whoever waits for its chunks waits for nobody.
    LostLeader,
    /// A peer that sent wrong bytes is still listened to.
    IgnoredBan,
    /// Each request to the registry is made twice.
    DoubleOriginFetch,
    /// One in four timers is not set.
    DroppedTimer,
    /// Chunks of peers are not checked.
    SkippedCheck,
}

impl Sabotage {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::LostLeader, Self::IgnoredBan, Self::DoubleOriginFetch, Self::DroppedTimer, Self::SkippedCheck];
}
