//! What crosses crates, on real parts.
//!
//! This library holds what integration tests share; the tests themselves stand in `tests/tests/`. It starts the real
//! programs (containerd, umoci, GNU tar, runc) and never re-implements what they decide: they are the oracles that
//! Hermes is compared with.
//!
//! Data flows: [`odd`] makes images with every feature that a layer can have, [`layout`] writes and reads them as OCI
//! layouts ([`images`] has real ones), [`unpack`] has the reference programs unpack them, [`node`] has Hermes mount them,
//! and [`compare`] reports how two trees differ. [`fsck`] judges the trees' own format.
//! [`snapshotter`] does with Hermes' snapshots what containerd does. A [`stage`] is a host of [`containerds`] with Hermes
//! installed and [`runnable`] images, asked through [`cri`] and its [`pods`] as a kubelet asks; [`agree`] compares what
//! both sides know, and [`soak`] says how long that goes on.
//! A [`fleet`] is many daemons on links that have rates, with a registry that counts.
//! [`lazy_host`] is such a host for [`programs`], whose findings are compared as [`facts`]; [`systemd`] is a real one.
//! A [`cut_disk`] is a disk that can be looked at as it was at any of its writes.
//! [`kubernetes`] is a real API server with its etcd.
//! Everything that outlives a function call (mounts, processes, loop devices, folders) is owned by a [`guard`], which
//! cleans up when a test fails, too.

pub mod agree;
pub mod compare;
pub mod compress;
pub mod cri;
pub mod cut_disk;
pub mod facts;
pub mod faulty;
pub mod fleet;
pub mod fsck;
pub mod images;
pub mod kept;
pub mod kubernetes;
pub mod layout;
pub mod node;
pub mod odd;
pub mod pods;
pub mod programs;
pub mod runnable;
pub mod sample;
pub mod sample_image;
pub mod snapshot;
pub mod snapshotter;
pub mod soak;
pub mod stage;
pub mod systemd;
pub mod tarball;
pub mod unpack;
pub mod web;

pub use hermes_lab::{command, containerds, daemon, guard, lazy_host, network, process};
