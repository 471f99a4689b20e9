//! Which repository name means which layout.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::layout::{Layout, LayoutError};
use crate::oci::is_repository_name;

/// Components that a repository name may have below the served folder; real names have two or three.
const MAX_DEPTH: usize = 6;

/// Layouts that one server holds; the scan at the start ends with an error beyond it.
const MAX_LAYOUTS: usize = 10_000;

/// The name under which a single layout is listed when its folder's name is not a repository name.
const FALLBACK_NAME: &str = "image";

/// Why a folder cannot be served.
#[derive(Debug, Error)]
pub enum OpenError {
    /// A layout in it, or the folder itself, cannot be read.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Neither the folder nor any folder in it is a layout.
    #[error("{} is not an OCI image layout and holds none; make one with 'skopeo copy docker://IMAGE oci:{}/NAME:TAG'", .path.display(), .path.display())]
    NothingToServe {
        /// The folder.
        path: PathBuf,
    },
    /// More layouts than one server takes.
    #[error("{} holds more than {MAX_LAYOUTS} layouts; serve a part of it", .path.display())]
    TooMany {
        /// The folder.
        path: PathBuf,
    },
}

/// The layouts that are served.
#[derive(Debug)]
pub(crate) enum Repositories {
    /// One layout, under any name.
    One {
        /// The name in the catalogue.
        name: String,
        layout: Layout,
    },
    /// Several, each under the path of its folder. Never empty.
    Several(BTreeMap<String, Layout>),
}

impl Repositories {
    /// Looks at `path`: a layout itself, or a folder with layouts in it, at any depth up to [`MAX_DEPTH`].
    pub(crate) fn open(path: &Path) -> Result<Self, OpenError> {
        if path.join("oci-layout").exists() {
            let folder = path.canonicalize().ok();
            let name = folder.as_deref().and_then(Path::file_name).and_then(|name| name.to_str());
            let name = name.filter(|name| is_repository_name(name)).unwrap_or(FALLBACK_NAME).to_owned();
            return Ok(Self::One { name, layout: Layout::open(path)? });
        }
        let mut found = BTreeMap::new();
        scan(path, path, 1, &mut found)?;
        if found.is_empty() {
            return Err(OpenError::NothingToServe { path: path.to_owned() });
        }
        Ok(Self::Several(found))
    }

    /// The layout that `name` means.
    pub(crate) fn find(&self, name: &str) -> Option<&Layout> {
        match self {
            Self::One { layout, .. } => Some(layout),
            Self::Several(layouts) => layouts.get(name),
        }
    }

    /// All names, sorted.
    pub(crate) fn names(&self) -> Vec<String> {
        match self {
            Self::One { name, .. } => vec![name.clone()],
            Self::Several(layouts) => layouts.keys().cloned().collect(),
        }
    }
}

fn scan(root: &Path, folder: &Path, depth: usize, found: &mut BTreeMap<String, Layout>) -> Result<(), OpenError> {
    let unreadable = |source| LayoutError::NoFolder { path: folder.to_owned(), source };
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if !path.is_dir() {
            continue;
        }
        if !path.join("oci-layout").exists() {
            if depth < MAX_DEPTH {
                scan(root, &path, depth + 1, found)?;
            }
            continue;
        }
        match path.strip_prefix(root).ok().and_then(Path::to_str).filter(|name| is_repository_name(name)) {
            Some(name) => found.insert(name.to_owned(), Layout::open(&path)?),
            None => {
                tracing::warn!(path = %path.display(), "this layout is not served: its folder is no repository name");
                None
            }
        };
        if found.len() > MAX_LAYOUTS {
            return Err(OpenError::TooMany { path: root.to_owned() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::writer::LayoutWriter;

    #[test]
    fn folders_become_names() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = Repositories::open(folder.path()).expect_err("nothing there");
        assert!(matches!(error, OpenError::NothingToServe { .. }), "{error}");
        for name in ["app", "library/redis", "Not-A-Name"] {
            LayoutWriter::create(folder.path().join(name)).expect("a layout");
        }
        std::fs::write(folder.path().join("notes.txt"), "not a folder").expect("written");
        let several = Repositories::open(folder.path()).expect("two layouts");
        assert_eq!(several.names(), ["app", "library/redis"]);
        assert!(several.find("library/redis").is_some() && several.find("redis").is_none());
        let one = Repositories::open(&folder.path().join("app")).expect("one layout");
        assert_eq!(one.names(), ["app"]);
        assert!(one.find("any/name").is_some());
        let odd = Repositories::open(&folder.path().join("Not-A-Name")).expect("one layout");
        assert_eq!(odd.names(), ["image"]);
    }

    #[test]
    fn a_broken_layout_is_an_error_at_the_start() {
        let folder = tempfile::tempdir().expect("a folder");
        LayoutWriter::create(folder.path().join("good")).expect("a layout");
        LayoutWriter::create(folder.path().join("bad")).expect("a layout");
        std::fs::remove_file(folder.path().join("bad/index.json")).expect("removed");
        let error = Repositories::open(folder.path()).expect_err("a broken layout").to_string();
        assert!(error.contains("bad") && error.contains("index.json"), "{error}");
    }
}
