//! Node: the script, and the graph of what it requires.
//!
//! `require("x")`, `import ... from "x"` and `import("x")` are found by a scan of the text; packages by the folders
//! `node_modules` upward from whoever asks, and within them by `main` of `package.json`.

use std::collections::BTreeSet;
use std::rc::Rc;

use serde::Deserialize;

use super::elf::Binary;
use super::{Guesser, SCRIPT_MAX_BYTES};

/// Modules that are followed.
const MODULES_MAX: usize = 2000;
/// Imports of one module.
const IMPORTS_MAX: usize = 200;
/// What a name may lack.
const ENDINGS: [&str; 7] = ["", ".js", ".json", ".cjs", ".mjs", ".node", "/index.js"];

#[derive(Deserialize)]
struct Package {
    #[serde(default)]
    main: serde_json::Value,
}

/// A module that somebody requires.
struct Wanted {
    name: String,
    /// Of who requires it.
    folder: String,
    reason: String,
}

impl<B: AsRef<[u8]>> Guesser<'_, '_, B> {
    /// What node reads with these arguments.
    pub(super) fn javascript(&mut self, arguments: &[String], depth: u32) {
        let mut wanted: Vec<Wanted> = Vec::new();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            let (name, reason) = match argument.as_str() {
                "-r" | "--require" | "--import" => {
                    (rest.next().cloned().unwrap_or_default(), "node --require names it".to_owned())
                }
                option if option.starts_with('-') => continue,
                script => (self.absolute(script), "node runs it".to_owned()),
            };
            wanted.push(Wanted { name, folder: self.working_dir.clone(), reason });
            if !argument.starts_with('-') {
                break;
            }
        }
        let mut known = BTreeSet::new();
        while !wanted.is_empty() {
            let modules = self.module_files(wanted);
            wanted = self.modules_read(modules, &mut known, depth);
        }
    }

    /// Adds modules; what they require.
    fn modules_read(
        &mut self,
        modules: Vec<(String, String)>,
        known: &mut BTreeSet<String>,
        depth: u32,
    ) -> Vec<Wanted> {
        let mut sources = Vec::new();
        for (path, reason) in modules {
            if known.len() >= MODULES_MAX || self.is_full() {
                self.guess.is_cut = true;
                break;
            }
            let Some(file) = self.files.regular(&path).filter(|file| known.insert(file.path.clone())) else { continue };
            if file.path.ends_with(".node") {
                let environment = Rc::clone(&self.environment);
                self.binaries.push(Binary::module(&path, &reason, depth + 1, environment));
                continue;
            }
            self.add(&path, &reason);
            if !file.path.ends_with(".json") {
                sources.push(file);
            }
        }
        self.files.ahead(sources.iter().map(|file| (file.clone(), 0..SCRIPT_MAX_BYTES)).collect());
        self.load();
        let mut wanted = Vec::new();
        for file in sources {
            let text = self.files.text(&file, SCRIPT_MAX_BYTES).unwrap_or_default();
            let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
            let reason = format!("{} requires it", file.path);
            let names = imports_of(&text).into_iter();
            wanted.extend(names.map(|name| Wanted { name, folder: folder.to_owned(), reason: reason.clone() }));
        }
        wanted
    }

    /// The files that names mean, with the reasons.
    fn module_files(&mut self, wanted: Vec<Wanted>) -> Vec<(String, String)> {
        let mut places = BTreeSet::new();
        let mut found = Vec::new();
        for wanted in wanted {
            // Of a package that many require, the place is looked at once.
            let place = self.required(&wanted).filter(|place| places.insert(place.clone()));
            found.extend(place.map(|place| (place, wanted.reason)));
        }
        let manifests = found.iter().filter_map(|(place, _)| self.files.regular(&format!("{place}/package.json")));
        let manifests: Vec<_> = manifests.map(|file| (file, 0..SCRIPT_MAX_BYTES)).collect();
        self.files.ahead(manifests);
        let found = found.into_iter().filter_map(|(place, reason)| Some((self.module_file(&place)?, reason)));
        found.collect()
    }

    /// The path that a name means, of a file, a file without its ending or a package's folder.
    fn required(&self, wanted: &Wanted) -> Option<String> {
        let Wanted { name, folder, .. } = wanted;
        if name.starts_with('/') {
            return Some(name.clone());
        }
        if name.starts_with("./") || name.starts_with("../") || matches!(name.as_str(), "." | "..") {
            return Some(format!("{folder}/{name}"));
        }
        let mut above = folder.as_str();
        loop {
            let place = format!("{above}/node_modules/{name}");
            if self.is_module(&place) {
                return Some(place);
            }
            above = above.rsplit_once('/')?.0;
        }
    }

    fn is_module(&self, place: &str) -> bool {
        let mut endings = ENDINGS.iter().chain(&["/package.json"]);
        endings.any(|ending| self.files.regular(&format!("{place}{ending}")).is_some())
    }

    /// The file that a path without an ending, or of a package's folder, means.
    fn module_file(&mut self, path: &str) -> Option<String> {
        let manifest = format!("{path}/package.json");
        if let Some(file) = self.files.regular(&manifest) {
            self.add(&manifest, "node reads it of each package");
            let text = self.files.text(&file, SCRIPT_MAX_BYTES)?;
            let main = serde_json::from_str::<Package>(&text).ok().and_then(|it| it.main.as_str().map(str::to_owned));
            if let Some(main) = main {
                let path = format!("{path}/{main}");
                let found = ENDINGS.iter().map(|ending| format!("{path}{ending}"));
                let found = found.into_iter().find(|path| self.files.regular(path).is_some());
                if found.is_some() {
                    return found;
                }
            }
        }
        ENDINGS.iter().map(|ending| format!("{path}{ending}")).find(|path| self.files.regular(path).is_some())
    }
}

/// What a module names in its imports.
fn imports_of(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for marker in ["require(", "from ", "import ", "import("] {
        for (at, _) in text.match_indices(marker) {
            if found.len() >= IMPORTS_MAX {
                return found;
            }
            let rest = text[at + marker.len()..].trim_start();
            let Some(quote) = rest.chars().next().filter(|quote| matches!(quote, '"' | '\'' | '`')) else { continue };
            let Some(name) = rest[1..].split(quote).next().filter(|name| name.len() < 256) else { continue };
            if !name.is_empty() && !name.starts_with("node:") && !name.contains(['\n', '$', ' ']) {
                found.push(name.to_owned());
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imports_are_found_in_both_ways_of_writing() {
        let text = "const a = require('./a');\nimport b from \"b\";\nimport 'c';\nawait import(`d`);\nrequire(x); require('node:fs')";
        let mut found = imports_of(text);
        found.sort_unstable();
        assert_eq!(found, ["./a", "b", "c", "d"]);
    }
}
