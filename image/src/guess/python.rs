//! Python: the interpreter's own first imports, the script or module that it is told to run, and what that imports.
//!
//! Imports are found by a scan of lines, at any indent and on one line each, which is how nearly all of them are written.
//! The compiled file beside a module is what the interpreter reads, where there is one; the source is then only looked at
//! here, to go on.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::elf::Binary;
use super::files::Files;
use super::{Guesser, PLACES_MAX, SCRIPT_MAX_BYTES, is_version};

/// Modules that are followed.
const MODULES_MAX: usize = 3000;
/// Names that are looked for: most of what is imported from a package is no module.
const NAMES_MAX: usize = 30_000;
/// Of one module, so many imports.
const IMPORTS_MAX: usize = 200;
/// What every interpreter imports before it runs anything (`python3 -v -c pass`, 3.9 to 3.13).
const FIRST: [&str; 14] = [
    "encodings",
    "encodings.aliases",
    "encodings.utf_8",
    "codecs",
    "io",
    "abc",
    "site",
    "os",
    "stat",
    "posixpath",
    "genericpath",
    "_collections_abc",
    "_sitebuiltins",
    "sitecustomize",
];
/// And when it runs a module by name.
const FOR_MODULES: [&str; 8] = [
    "runpy",
    "importlib",
    "importlib.machinery",
    "importlib.util",
    "importlib._bootstrap",
    "pkgutil",
    "types",
    "warnings",
];

/// Where one interpreter finds things.
struct Roots {
    /// In the order of `sys.path`.
    places: Vec<String>,
    /// As in names of compiled files, such as `cpython-311`.
    tag: String,
    /// What names of native modules end in.
    extensions: Vec<String>,
}

/// A module that was found.
struct Module {
    /// Its source, or the extension itself.
    path: String,
    /// Its package's name, for imports that begin with a dot.
    package: String,
    is_extension: bool,
}

impl Module {
    /// Where modules of it are, when it is a package.
    fn places(&self) -> Option<Vec<String>> {
        Some(vec![self.path.strip_suffix("/__init__.py")?.to_owned()])
    }
}

impl<B: AsRef<[u8]>> Guesser<'_, '_, B> {
    /// What `interpreter` reads with these arguments.
    pub(super) fn python(&mut self, interpreter: &str, arguments: &[String], depth: u32) {
        let Some(mut roots) = self.python_roots(interpreter) else { return };
        let mut imports: Vec<(String, String)> =
            FIRST.iter().map(|name| ((*name).to_owned(), "every interpreter imports it".to_owned())).collect();
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "-m" => {
                    let Some(module) = rest.next() else { break };
                    roots.places.insert(0, self.working_dir.clone());
                    imports.extend(FOR_MODULES.iter().map(|name| ((*name).to_owned(), "-m needs it".to_owned())));
                    let reason = format!("python -m {module} runs it");
                    imports.push((module.clone(), reason.clone()));
                    imports.push((format!("{module}.__main__"), reason));
                    break;
                }
                "-c" => {
                    let code = rest.next().cloned().unwrap_or_default();
                    imports.extend(
                        imports_of(&code, "").into_iter().map(|name| (name, "python -c imports it".to_owned())),
                    );
                    break;
                }
                "-W" | "-X" => {
                    rest.next();
                }
                option if option.starts_with('-') => {}
                script => {
                    let path = self.absolute(script);
                    if let Some(file) = self.files.regular(&path) {
                        self.add(&path, "python runs it");
                        let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder).to_owned();
                        roots.places.insert(0, folder);
                        let text = self.files.text(&file, SCRIPT_MAX_BYTES).unwrap_or_default();
                        let names = imports_of(&text, "").into_iter();
                        imports.extend(names.map(|name| (name, format!("{path} imports it"))));
                    }
                    break;
                }
            }
        }
        self.python_imports(&roots, imports, depth);
    }

    /// The folders of an interpreter's libraries: `lib/pythonX.Y` beside its `bin`, with what lies below, or in `/usr`.
    fn python_roots(&self, interpreter: &str) -> Option<Roots> {
        let file = self.files.regular(interpreter)?;
        // A virtual environment is known by the link; its packages come before those of its base.
        let mut prefixes: Vec<String> = Vec::new();
        let own = [interpreter, file.path.as_str()].into_iter().filter_map(|path| Some(path.rsplit_once("/bin/")?.0));
        for prefix in own.chain(["/usr/local", "/usr"]) {
            if !prefixes.iter().any(|known| known == prefix) {
                prefixes.push(prefix.to_owned());
            }
        }
        let version = prefixes.iter().find_map(|prefix| {
            let names = self.files.names(&format!("{prefix}/lib"));
            names.into_iter().find(|name| {
                let version = name.strip_prefix("python3.");
                let has_library = || self.files.regular(&format!("{prefix}/lib/{name}/os.py")).is_some();
                version.is_some_and(|version| !version.is_empty() && version.chars().all(is_version)) && has_library()
            })
        })?;
        let mut places: Vec<String> = paths(self.environment.get("PYTHONPATH"));
        for prefix in &prefixes {
            let lib = format!("{prefix}/lib/{version}");
            places.push(lib.clone());
            places.push(format!("{lib}/lib-dynload"));
            places.push(format!("{lib}/site-packages"));
            places.push(format!("{lib}/dist-packages"));
        }
        places.push("/usr/lib/python3/dist-packages".to_owned());
        places.retain(|place| self.files.is_folder(place));
        let tag = version.replace("python3.", "cpython-3");
        let machines = ["x86_64-linux-gnu", "aarch64-linux-gnu", "x86_64-linux-musl", "aarch64-linux-musl"];
        let mut extensions: Vec<String> = machines.iter().map(|machine| format!(".{tag}-{machine}.so")).collect();
        extensions.extend([".abi3.so".to_owned(), ".so".to_owned()]);
        Some(Roots { places, tag, extensions })
    }

    /// Follows imports, all that are known at a time.
    fn python_imports(&mut self, roots: &Roots, mut imports: Vec<(String, String)>, depth: u32) {
        // Names, with the folder of those that are packages.
        let mut known: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut count = 0;
        while !imports.is_empty() {
            let mut modules = Vec::new();
            for (name, reason) in imports {
                if count + modules.len() >= MODULES_MAX || known.len() >= NAMES_MAX || self.is_full() {
                    self.guess.is_cut = true;
                    break;
                }
                // Importing a.b.c imports a and a.b first, and what is in a package is looked for nowhere else.
                let ends = name.match_indices('.').map(|(at, _)| at).chain([name.len()]);
                let mut places = &roots.places;
                for name in ends.map(|end| &name[..end]).filter(|name| !name.is_empty()) {
                    if !known.contains_key(name) {
                        let module = python_module(&self.files, roots, places, name);
                        let inner = module.as_ref().and_then(Module::places).unwrap_or_default();
                        known.insert(name.to_owned(), inner);
                        modules.extend(module.map(|module| (module, reason.clone())));
                    }
                    places = &known[name];
                    if places.is_empty() {
                        break;
                    }
                }
            }
            count += modules.len();
            imports = self.python_reads(roots, modules, depth);
        }
    }

    /// Adds modules; what they import.
    fn python_reads(&mut self, roots: &Roots, modules: Vec<(Module, String)>, depth: u32) -> Vec<(String, String)> {
        let sources = modules.iter().filter(|(module, _)| !module.is_extension);
        let sources = sources.filter_map(|(module, _)| Some((self.files.regular(&module.path)?, 0..SCRIPT_MAX_BYTES)));
        self.files.ahead(sources.collect());
        for (module, reason) in &modules {
            if module.is_extension {
                let environment = Rc::clone(&self.environment);
                self.binaries.push(Binary::module(&module.path, reason, depth + 1, environment));
                continue;
            }
            let (folder, file) = module.path.rsplit_once('/').unwrap_or(("", &module.path));
            let stem = file.strip_suffix(".py").unwrap_or(file);
            let compiled = format!("{folder}/__pycache__/{stem}.{}.pyc", roots.tag);
            let is_compiled = self.files.regular(&compiled).is_some();
            self.add(if is_compiled { &compiled } else { &module.path }, reason);
        }
        self.load();
        let mut imports = Vec::new();
        for (module, _) in modules.iter().filter(|(module, _)| !module.is_extension) {
            let Some(source) = self.files.regular(&module.path) else { continue };
            let text = self.files.text(&source, SCRIPT_MAX_BYTES).unwrap_or_default();
            let reason = format!("{} imports it", module.path);
            imports.extend(imports_of(&text, &module.package).into_iter().map(|name| (name, reason.clone())));
        }
        imports
    }
}

/// The module `name` in one of `places`.
fn python_module<B: AsRef<[u8]>>(
    files: &Files<'_, '_, B>,
    roots: &Roots,
    places: &[String],
    name: &str,
) -> Option<Module> {
    let (package, last) = name.rsplit_once('.').unwrap_or(("", name));
    let is_there = |path: &String| files.regular(path).is_some();
    places.iter().find_map(|place| {
        let at = format!("{place}/{last}");
        let module =
            |path: String, package: &str, is_extension| Module { path, package: package.to_owned(), is_extension };
        let init = Some(format!("{at}/__init__.py")).filter(is_there).map(|path| module(path, name, false));
        let extension = || roots.extensions.iter().map(|ending| format!("{at}{ending}")).find(is_there);
        let source = || Some(format!("{at}.py")).filter(is_there).map(|path| module(path, package, false));
        init.or_else(|| extension().map(|path| module(path, package, true))).or_else(source)
    })
}

fn paths(list: Option<&String>) -> Vec<String> {
    let places = list.map(String::as_str).unwrap_or_default().split(':').filter(|place| place.starts_with('/'));
    places.take(PLACES_MAX).map(str::to_owned).collect()
}

/// The modules that lines of `text` import at the top level; `package` is what leading dots begin from. Imports within
/// functions are left out: many of them are never reached.
fn imports_of(text: &str, package: &str) -> Vec<String> {
    let mut found = Vec::new();
    let has_lines = text.contains('\n');
    // Within a function, or in what is there for checkers of types alone.
    let mut is_skipped = false;
    for line in text.split(['\n', ';']) {
        if found.len() >= IMPORTS_MAX {
            break;
        }
        let is_indented = line.starts_with([' ', '\t']) && has_lines;
        if !is_indented && !line.is_empty() && !line.starts_with([')', '#']) {
            is_skipped = ["def ", "async def "].iter().any(|begin| line.starts_with(begin))
                || (line.starts_with("if ") && line.contains("TYPE_CHECKING"));
        }
        if is_indented && is_skipped {
            continue;
        }
        let mut words = line.split_whitespace();
        match words.next() {
            // An indent of a `try` or `if` at the top level is seldom more than four.
            Some("import") if !is_indented || indent(line) <= 4 => {
                let names = line.trim_start().strip_prefix("import").unwrap_or_default();
                let names = names.split('#').next().unwrap_or_default().split(',');
                found.extend(names.filter_map(|name| Some(name.split_whitespace().next()?.to_owned())));
            }
            Some("from") if !is_indented || indent(line) <= 4 => {
                let Some(from) = words.next().and_then(|from| absolute(from, package)) else { continue };
                let names = line.split_once(" import ").map_or("", |(_, names)| names).trim_start_matches('(');
                found.push(from.clone());
                // What is imported from a package may be a module of it.
                let names = names.split('#').next().unwrap_or_default().split(',').take(16);
                let names = names.filter_map(|name| name.split_whitespace().next());
                let is_name = |name: &&str| name.chars().all(|it| it.is_alphanumeric() || it == '_');
                found.extend(names.filter(is_name).map(|name| format!("{from}.{name}")));
            }
            _ => {}
        }
    }
    let is_name = |name: &String| name.chars().all(|it| it.is_alphanumeric() || it == '_' || it == '.');
    found.retain(|name| !name.is_empty() && name.len() < 256 && is_name(name));
    found
}

fn indent(line: &str) -> usize {
    line.len() - line.trim_start().len()
}

/// A name without leading dots.
fn absolute(name: &str, package: &str) -> Option<String> {
    let dots = name.len() - name.trim_start_matches('.').len();
    if dots == 0 {
        return Some(name.to_owned());
    }
    let mut base = package;
    for _ in 1..dots {
        base = base.rsplit_once('.').map_or("", |(above, _)| above);
    }
    let rest = &name[dots..];
    match (base.is_empty(), rest.is_empty()) {
        (true, _) => None,
        (false, true) => Some(base.to_owned()),
        (false, false) => Some(format!("{base}.{rest}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imports_are_found_by_line() {
        let text = "import os, sys as s\nfrom a.b import c, d\nfrom . import e\nfrom ..f import g\n\
                    try:\n    import h\nexcept ImportError:\n    pass\ndef i(\n    k\n):\n    import j\n\n    import l\n\
                    if TYPE_CHECKING:\n    import m\nelse:\n    import n\n";
        let expected = ["os", "sys", "a.b", "a.b.c", "a.b.d", "p.q", "p.q.e", "p.f", "p.f.g", "h", "n"];
        assert_eq!(imports_of(text, "p.q"), expected);
        assert_eq!(imports_of("import numpy; print(1)", ""), ["numpy"]);
    }

    #[test]
    fn dots_go_up() {
        assert_eq!(absolute("..x", "a.b.c").as_deref(), Some("a.b.x"));
        assert_eq!(absolute(".", "a").as_deref(), Some("a"));
        assert_eq!(absolute("....x", "a"), None);
    }
}
