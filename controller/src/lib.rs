//! The cluster's side: which images are indexed, signed, handed out and seeded.
//!
//! Owns what the cluster agrees on: policies, images and their indexes, the keys that sign them, the certificates of
//! nodes. It decides nothing about chunks, mounts nothing, and no pod needs it: when it is away, what runs goes on, and
//! new images start as they would without Hermes.
//!
//! ```text
//! kubernetes/ or folder    what is wanted: policies, workloads, nodes, secrets      --Event-->  core/   (pure: decides)
//! pipeline/                resolves tags, builds indexes, keeps and signs them      <--Action-- core/   --Event--> core/
//! api/                     admits nodes, hands out indexes, takes their reports     <--Action-- core/   --Event--> core/
//! kubernetes/ or folder    what people see: status, HermesImages, Events            <--Action-- core/
//! page/                    the same for a browser, on the port of the API           <--Action-- core/
//! ```
//!
//! [`event`] is the contract between them: facts go in, requests come out, and only the core decides.

pub mod api;
pub mod artifacts;
pub mod authority;
pub mod clock;
pub mod core;
pub mod crd;
pub mod event;
pub mod folder;
pub mod kubernetes;
pub mod metrics;
pub mod page;
pub mod pipeline;
pub mod program;
pub mod run;
pub mod signing;
