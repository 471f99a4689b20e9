//! Node: the script, and the graph of what it requires.
//!
//! `require("x")`, `import ... from "x"` and `import("x")` are found by a scan of the text; packages by the folders
//! `node_modules` upward from whoever asks, and within them by `main` of `package.json`.

use std::collections::{BTreeSet, VecDeque};

use serde::Deserialize;

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

impl<B: AsRef<[u8]>> Guesser<'_, '_, B> {
    /// What node reads with these arguments.
    pub(super) fn javascript(&mut self, arguments: &[String], depth: u32) {
        let mut queue: VecDeque<(String, String)> = VecDeque::new();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "-r" | "--require" | "--import" => {
                    let name = rest.next().cloned().unwrap_or_default();
                    let from = self.working_dir.clone();
                    queue.extend(self.required(&name, &from).map(|path| (path, "node --require names it".to_owned())));
                }
                option if option.starts_with('-') => {}
                script => {
                    let path = self.absolute(script);
                    queue.extend(self.module_file(&path).map(|path| (path, "node runs it".to_owned())));
                    break;
                }
            }
        }
        let mut known = BTreeSet::new();
        while let Some((path, reason)) = queue.pop_front() {
            if known.len() >= MODULES_MAX || self.is_full() {
                self.guess.is_cut = true;
                return;
            }
            let Some(file) = self.files.regular(&path).filter(|file| known.insert(file.path.clone())) else { continue };
            if file.path.ends_with(".node") {
                self.elf(&path, &reason, depth + 1);
                continue;
            }
            self.add(&path, &reason);
            if file.path.ends_with(".json") {
                continue;
            }
            let text = self.files.text(&file, SCRIPT_MAX_BYTES).unwrap_or_default();
            let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder).to_owned();
            for name in imports_of(&text) {
                let found = self.required(&name, &folder);
                queue.extend(found.map(|found| (found, format!("{} requires it", file.path))));
            }
        }
    }

    /// The file that `name` means in a module of `folder`.
    fn required(&mut self, name: &str, folder: &str) -> Option<String> {
        if name.starts_with('/') {
            return self.module_file(name);
        }
        if name.starts_with("./") || name.starts_with("../") || matches!(name, "." | "..") {
            return self.module_file(&format!("{folder}/{name}"));
        }
        let mut above = folder;
        loop {
            if let Some(found) = self.module_file(&format!("{above}/node_modules/{name}")) {
                return Some(found);
            }
            above = above.rsplit_once('/')?.0;
        }
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
