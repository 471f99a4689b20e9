//! What is measured: the ways to start an image, and the sessions in which they are run.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// What is done to one node from its wiping to the next one's; some sessions measure several ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Session {
    /// containerd pulls and unpacks; then starts of the image as it lies there unpacked.
    Containerd,
    /// SOCI, another lazy loader, by an index that was made before.
    Soci,
    /// The first start ever: nothing is known of the program but the image itself.
    Cold,
    /// The first start ever, from one node that has the whole image.
    ColdPeer,
    /// By a profile, from the registry.
    Profile,
    /// By a profile, from one node that has the whole image.
    Peer,
    /// All of the image is here, and the kernel reads it without the daemon.
    Complete,
    /// The next version: one layer has changed, the profile is the old version's, and a peer has the old version.
    Next,
    /// A program that reads something else every time, without and with the profile of the image's own program.
    Odd,
}

impl Session {
    /// Which of them depend on the speed of the registry's link alone, so that slow links are worth the time.
    pub(super) fn is_of_slow_links(self) -> bool {
        matches!(self, Self::Containerd | Self::Soci | Self::Cold | Self::Profile)
    }
}

/// A way to start an image: a row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Way {
    /// Pull, unpack and start on overlayfs.
    Containerd,
    /// SOCI's index from the registry, and what is read of the layers.
    Soci,
    /// Start on overlayfs of what is unpacked, with dropped caches.
    Unpacked,
    /// The same with what the start before has left in the caches.
    UnpackedHot,
    /// Hermes, the first start ever.
    Cold,
    /// Hermes, the first start ever, from a peer.
    ColdPeer,
    /// Hermes by a profile from the registry.
    Profile,
    /// Hermes by a profile from a peer.
    Peer,
    /// Hermes, the next version.
    Next,
    /// Hermes, restart of a complete image with dropped caches.
    Complete,
    /// The same with what the start before has left in the caches.
    CompleteHot,
    /// Hermes, another program, nothing known.
    OddPlain,
    /// Hermes, another program, with the profile of the image's own.
    OddProfile,
}

impl Way {
    /// All of them, in the order of the table.
    pub(super) const ALL: [Self; 13] = [
        Self::Containerd,
        Self::Soci,
        Self::Cold,
        Self::ColdPeer,
        Self::Profile,
        Self::Peer,
        Self::Next,
        Self::Unpacked,
        Self::Complete,
        Self::UnpackedHot,
        Self::CompleteHot,
        Self::OddPlain,
        Self::OddProfile,
    ];

    /// For tables.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Containerd => "containerd: pull, unpack, start",
            Self::Soci => "SOCI, index made before, from the registry",
            Self::Unpacked => "overlayfs, already unpacked, caches dropped",
            Self::UnpackedHot => "overlayfs, already unpacked, caches hot",
            Self::Cold => "Hermes, first start ever",
            Self::ColdPeer => "Hermes, first start ever, from one warm peer",
            Self::Profile => "Hermes, profile, from the registry",
            Self::Peer => "Hermes, profile, from one warm peer",
            Self::Next => "Hermes, next version, peer with the old one",
            Self::Complete => "Hermes, complete, caches dropped",
            Self::CompleteHot => "Hermes, complete, caches hot",
            Self::OddPlain => "Hermes, another program, no profile",
            Self::OddProfile => "Hermes, another program, the image's profile",
        }
    }

    /// Whether it is Hermes.
    pub(super) fn is_ours(self) -> bool {
        !matches!(self, Self::Containerd | Self::Soci | Self::Unpacked | Self::UnpackedHot)
    }

    /// Whether it starts on a node that has nothing of the image.
    pub(super) fn is_cold(self) -> bool {
        !matches!(self, Self::Unpacked | Self::UnpackedHot | Self::Complete | Self::CompleteHot)
    }
}
