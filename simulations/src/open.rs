//! A scenario by its name or from a file, with its image: what is simulated, ready to run.
//!
//! Files are read whole, up to a bound; an image's shape is one of the library, or lies beside its scenario.

use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use crate::library::{self, SCENARIOS, SHAPES};
use crate::scenario::{Scenario, ScenarioError};
use crate::shape::{FILE_LEN_MAX_BYTES, Shape, ShapeError};

/// Longest file of a scenario: the longest that is shipped has 1 KB.
const SCENARIO_LEN_MAX_BYTES: u64 = 1 << 20;

/// Why there is nothing to run.
#[derive(Debug, Error)]
pub enum OpenError {
    /// Neither a scenario that comes with this version nor a file.
    #[error("{0:?} is neither a file nor one of the scenarios {names}", names = library::names(SCENARIOS))]
    Unknown(String),
    /// A file that cannot be read.
    #[error("{} cannot be read", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Neither an image of the library nor a file.
    #[error("{} cannot be read; images that come with this version are {names}", path.display(), names = library::names(SHAPES))]
    Image {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file that is too long for what it should be.
    #[error("{} is longer than {limit_bytes} bytes, the most that {what} may have", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// What it should be.
        what: &'static str,
        /// The most.
        limit_bytes: u64,
    },
    /// The scenario is none, or not with these changes.
    #[error(transparent)]
    Scenario(#[from] ScenarioError),
    /// The image is none.
    #[error(transparent)]
    Shape(#[from] ShapeError),
}

/// The scenario of a name or a file, with `changes` (`section.field=value`) made to it, and its image, drawn from `seed`
/// unless it has a shape's file.
///
/// # Errors
/// When there is no such scenario, or it or its image cannot be read.
pub fn open(name: &str, changes: &[String], seed: u64) -> Result<(Arc<Scenario>, Arc<Shape>), OpenError> {
    let path = Path::new(name);
    let text = match library::text(SCENARIOS, name) {
        Some(text) => text.to_owned(),
        None if !path.exists() => return Err(OpenError::Unknown(name.to_owned())),
        None => {
            let text = read(path, "a scenario", SCENARIO_LEN_MAX_BYTES)?;
            let no_text = |error| OpenError::File { path: path.into(), source: io::Error::other(error) };
            String::from_utf8(text).map_err(no_text)?
        }
    };
    let scenario = Scenario::parse(&text, changes)?;
    let shape = match &scenario.image.shape {
        Some(name) => {
            let shape = match library::text(SHAPES, name) {
                Some(file) => Shape::parse(file.as_bytes())?,
                None => {
                    let path = path.parent().unwrap_or(Path::new("")).join(name);
                    let text = read(&path, "a shape", FILE_LEN_MAX_BYTES).map_err(|error| match error {
                        OpenError::File { path, source } => OpenError::Image { path, source },
                        other => other,
                    })?;
                    Shape::parse(&text)?
                }
            };
            Arc::new(shape.or_drawn(scenario.image.start_chunks, seed)?)
        }
        None => crate::synthetic_shape(&scenario, seed)?,
    };
    Ok((Arc::new(scenario), shape))
}

fn read(path: &Path, what: &'static str, limit_bytes: u64) -> Result<Vec<u8>, OpenError> {
    let failed = |source| OpenError::File { path: path.into(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(limit_bytes + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit_bytes {
        return Err(OpenError::TooLong { path: path.into(), what, limit_bytes });
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_and_a_change_open_a_scenario() {
        let (scenario, shape) = open("start-100", &["cluster.nodes=3".to_owned()], 1).expect("it is shipped");
        assert_eq!((scenario.cluster.nodes, shape.layers.len()), (3, 10));
    }

    #[test]
    fn an_image_of_the_library_stands_in_for_a_synthetic_one() {
        let (scenario, shape) = open("start-100", &["image.shape=node-web".to_owned()], 1).expect("it is shipped");
        assert_eq!((scenario.image.shape.as_deref(), shape.layers.len()), (Some("node-web"), 4));
        let error =
            open("start-100", &["image.shape=web".to_owned()], 1).expect_err("neither image nor file").to_string();
        assert_eq!(
            error,
            "web cannot be read; images that come with this version are node-web, python-science, spark-master"
        );
    }

    #[test]
    fn what_is_unknown_is_answered_with_what_there_is() {
        let error = open("start-99", &[], 1).expect_err("there is none").to_string();
        assert!(error.starts_with("\"start-99\" is neither") && error.contains("start-100, start-1000"), "{error}");
        let error = open("start-100", &["cluster.nodes=many".to_owned()], 1).expect_err("no number");
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        assert!(cause.contains("`cluster.nodes`"), "{error}: {cause}");
    }
}
