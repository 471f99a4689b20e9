//! The driver on a real API server, as the ServiceAccount of `deploy/rbac.yaml` and no more.

mod joining;
mod keys;
mod leading;
mod objects;
mod reporting;
mod secrets;
mod watching;
mod world;
