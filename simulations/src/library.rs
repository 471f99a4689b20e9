//! Shapes of real images that come with the binary.
//!
//! The images are those of `tools/images`, which makes them of Debian's, PyPI's and npm's packages; `hermes index export-shape` wrote the files,
//! with the profile of three recorded starts. They hold no content.

/// Names and files.
pub const SHAPES: &[(&str, &str)] = &[
    ("node-web", include_str!("../shapes/node-web.json")),
    ("python-science", include_str!("../shapes/python-science.json")),
    ("spark-master", include_str!("../shapes/spark-master.json")),
];

/// The file of a shape that comes with the binary.
pub fn shape(name: &str) -> Option<&'static str> {
    SHAPES.iter().find(|(other, _)| *other == name).map(|(_, file)| *file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Shape;

    #[test]
    fn all_of_them_are_images_of_which_a_start_reads_a_part() {
        for (name, file) in SHAPES {
            let shape = Shape::parse(file.as_bytes()).unwrap_or_else(|error| panic!("{name}: {error}"));
            let (chunks, bytes) = shape.start_size();
            assert!(chunks > 0 && chunks < shape.chunk_count() / 3, "{name}: {chunks} of {}", shape.chunk_count());
            assert!(bytes > 50_000_000 && !shape.name.contains('/'), "{name}: {bytes} bytes, {}", shape.name);
            let needed = |place: usize| shape.compressed_bytes(place, &shape.layers[place].hot);
            let needed: u64 = (0..shape.layers.len()).map(needed).sum();
            assert!(needed > 0 && needed < bytes, "{name}: {needed} compressed bytes of {bytes}");
        }
        assert!(shape("spark-master").is_some() && shape("none").is_none());
    }
}
