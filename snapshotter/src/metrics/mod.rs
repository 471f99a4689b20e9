//! What a node counts.
//!
//! [`METRICS`] names every metric. What the parts count themselves (store, registry client, credentials) is read from them when
//! somebody asks; the rest is recorded in [`RECORDED`].

mod recorded;
mod table;

use hermes_metrics::Values;

pub use recorded::{
    Again, ArrivedFrom, Decision, Denial, Egress, FirstPullEnd, PrefetchedBytes, RECORDED, ReadFailure, Recorded,
    Referrals, RulingGiven, StartRecordEnd,
};
pub use table::METRICS;

/// Upper bounds of the histogram of waits, in seconds: a local copy takes 1 ms, a peer 2 to 10, a registry 20 to 500, and
/// a read fails after 60.
pub const WAIT_BOUNDS_SECONDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 60.0];

/// The exposition of every metric of a node.
pub fn expose(values: &Values) -> String {
    hermes_metrics::expose(METRICS, env!("CARGO_PKG_VERSION"), values)
}

#[cfg(test)]
mod tests {
    use hermes_policy::class::Class;

    use super::*;

    #[test]
    fn the_table_keeps_prometheus_rules() {
        assert_eq!(hermes_metrics::broken_rules(METRICS), Vec::<String>::new());
    }

    #[test]
    fn what_was_recorded_is_exposed() {
        let recorded = Recorded::new();
        recorded.waited(ArrivedFrom::Peer, std::time::Duration::from_millis(7));
        recorded.waited(ArrivedFrom::Peer, std::time::Duration::from_secs(100));
        recorded.read_failed(ReadFailure::Deadline);
        recorded.decided(Decision::Unsigned);
        recorded.arrived(ArrivedFrom::Registry, Class::Demand, 300);
        recorded.arrived(ArrivedFrom::Registry, Class::Prefetch, 11);
        recorded.read_at_once(40);
        recorded.read_after_waiting(2);
        let mut values = Values::default();
        recorded.fill(&mut values);
        values.set("hermes_store_bytes", "", 12_345_678_901);
        let text = expose(&values);
        for line in [
            "# TYPE hermes_demand_wait_seconds histogram",
            "hermes_demand_wait_seconds_bucket{source=\"peer\",le=\"0.005\"} 0",
            "hermes_demand_wait_seconds_bucket{source=\"peer\",le=\"0.01\"} 1",
            "hermes_demand_wait_seconds_bucket{source=\"peer\",le=\"+Inf\"} 2",
            "hermes_demand_wait_seconds_count{source=\"peer\"} 2",
            "hermes_demand_wait_seconds_count{source=\"local\"} 0",
            "hermes_read_failures_total{reason=\"deadline\"} 1",
            "hermes_lazy_decisions_total{reason=\"unsigned\"} 1",
            "hermes_chunk_bytes_total{source=\"registry\"} 311",
            "hermes_chunk_bytes_ahead_total 11",
            "hermes_fuse_read_bytes_total{result=\"hit\"} 40",
            "hermes_fuse_read_bytes_total{result=\"miss\"} 2",
            "hermes_store_bytes 12345678901",
            concat!("hermes_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        ] {
            assert!(text.lines().any(|known| known == line), "'{line}' is missing in:\n{text}");
        }
        let series = |text: &str| text.lines().filter(|line| !line.starts_with('#')).count();
        let mut nothing = Values::default();
        Recorded::new().fill(&mut nothing);
        assert_eq!(series(&text), series(&expose(&nothing)));
    }
}
