//! What is installed in clusters and on hosts: chart, manifests, container image, installer, dashboards, alerts and the
//! documents that are generated.

mod chart;
mod image;
mod installer;
mod metrics;
mod monitoring;
