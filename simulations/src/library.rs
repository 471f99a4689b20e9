//! Scenarios, and shapes of real images, that come with the binary.
//!
//! The images are those of `tools/images`, which makes them of Debian's, PyPI's and npm's packages; `hermes index export-shape` wrote the files,
//! with the profile of three recorded starts. They hold no content.

/// Texts by their names.
pub type Named = [(&'static str, &'static str)];

/// Scenarios, the simplest first.
pub const SCENARIOS: &[(&str, &str)] = &[
    ("start-100", include_str!("../scenarios/start-100.toml")),
    ("start-1000", include_str!("../scenarios/start-1000.toml")),
    ("start-10000", include_str!("../scenarios/start-10000.toml")),
    ("three-zones", include_str!("../scenarios/three-zones.toml")),
    ("killed", include_str!("../scenarios/killed.toml")),
    ("registry-down", include_str!("../scenarios/registry-down.toml")),
    ("registry-busy", include_str!("../scenarios/registry-busy.toml")),
    ("partition", include_str!("../scenarios/partition.toml")),
    ("stale-lists", include_str!("../scenarios/stale-lists.toml")),
    ("corrupt-peers", include_str!("../scenarios/corrupt-peers.toml")),
    ("rolling-update", include_str!("../scenarios/rolling-update.toml")),
    ("ci-churn", include_str!("../scenarios/ci-churn.toml")),
    ("pods-200", include_str!("../scenarios/pods-200.toml")),
    ("slow-disks", include_str!("../scenarios/slow-disks.toml")),
    ("recycled", include_str!("../scenarios/recycled.toml")),
    ("zone-loss", include_str!("../scenarios/zone-loss.toml")),
    ("spark-burst", include_str!("../scenarios/spark-burst.toml")),
    ("gpu-scale-up", include_str!("../scenarios/gpu-scale-up.toml")),
];

/// Shapes.
pub const SHAPES: &[(&str, &str)] = &[
    ("node-web", include_str!("../shapes/node-web.json")),
    ("python-science", include_str!("../shapes/python-science.json")),
    ("spark-master", include_str!("../shapes/spark-master.json")),
];

/// The text of this name.
pub fn text(of: &Named, name: &str) -> Option<&'static str> {
    of.iter().find(|(other, _)| *other == name).map(|(_, text)| *text)
}

/// All names, for people.
pub fn names(of: &Named) -> String {
    of.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Scenario;
    use crate::shape::Shape;

    #[test]
    fn all_scenarios_can_be_read_and_say_what_they_are() {
        for (name, text) in SCENARIOS {
            let scenario = Scenario::parse(text, &[]).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(!scenario.name.is_empty(), "{name}");
            assert!(text.starts_with('#'), "{name} has a comment that says what it is for");
            crate::open::open(name, &[], 1).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        assert!(text(SCENARIOS, "start-1000").is_some() && text(SCENARIOS, "none").is_none());
    }

    #[test]
    fn all_shapes_are_of_images_of_which_a_start_reads_a_part() {
        for (name, file) in SHAPES {
            let shape = Shape::parse(file.as_bytes()).unwrap_or_else(|error| panic!("{name}: {error}"));
            let (chunks, bytes) = shape.start_size();
            assert!(chunks > 0 && chunks < shape.chunk_count() / 3, "{name}: {chunks} of {}", shape.chunk_count());
            assert!(bytes > 50_000_000 && !shape.name.contains('/'), "{name}: {bytes} bytes, {}", shape.name);
            let needed = |place: usize| shape.compressed_bytes(place, &shape.layers[place].hot);
            let needed: u64 = (0..shape.layers.len()).map(needed).sum();
            assert!(needed > 0 && needed < bytes, "{name}: {needed} compressed bytes of {bytes}");
        }
        assert!(text(SHAPES, "spark-master").is_some() && text(SHAPES, "none").is_none());
    }
}
