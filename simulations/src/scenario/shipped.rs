//! The scenarios that come with the binary.

/// Names and texts, the simplest first.
pub const SHIPPED: &[(&str, &str)] = &[
    ("start-100", include_str!("../../scenarios/start-100.toml")),
    ("start-1000", include_str!("../../scenarios/start-1000.toml")),
    ("start-10000", include_str!("../../scenarios/start-10000.toml")),
    ("three-zones", include_str!("../../scenarios/three-zones.toml")),
    ("killed", include_str!("../../scenarios/killed.toml")),
    ("registry-down", include_str!("../../scenarios/registry-down.toml")),
    ("registry-busy", include_str!("../../scenarios/registry-busy.toml")),
    ("partition", include_str!("../../scenarios/partition.toml")),
    ("stale-lists", include_str!("../../scenarios/stale-lists.toml")),
    ("corrupt-peers", include_str!("../../scenarios/corrupt-peers.toml")),
    ("rolling-update", include_str!("../../scenarios/rolling-update.toml")),
    ("ci-churn", include_str!("../../scenarios/ci-churn.toml")),
    ("pods-200", include_str!("../../scenarios/pods-200.toml")),
    ("slow-disks", include_str!("../../scenarios/slow-disks.toml")),
    ("recycled", include_str!("../../scenarios/recycled.toml")),
    ("zone-loss", include_str!("../../scenarios/zone-loss.toml")),
    ("spark-burst", include_str!("../../scenarios/spark-burst.toml")),
    ("gpu-scale-up", include_str!("../../scenarios/gpu-scale-up.toml")),
];

/// The text of a scenario that comes with the binary.
pub fn shipped(name: &str) -> Option<&'static str> {
    SHIPPED.iter().find(|(other, _)| *other == name).map(|(_, text)| *text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Scenario;

    #[test]
    fn all_of_them_can_be_read_and_say_what_they_are() {
        for (name, text) in SHIPPED {
            let scenario = Scenario::parse(text, &[]).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(!scenario.name.is_empty(), "{name}");
            assert!(text.starts_with('#'), "{name} has a comment that says what it is for");
            crate::open::open(name, &[], 1).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        assert!(shipped("start-1000").is_some() && shipped("none").is_none());
    }
}
