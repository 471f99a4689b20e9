//! Small images with everything that a command may lead to, and hostile ones.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::erofs;
use crate::ids::LogicalOffset;
use crate::tree::{Extent, ExtentSource, Inode, InodeKind, Timestamp, Tree, TreeLayer};

/// An image of one layer, and that layer's bytes.
struct Sample {
    image: Image<Vec<u8>>,
    layer: Vec<u8>,
}

/// What is at a path: a file, or a link to somewhere.
enum Node {
    File(Vec<u8>),
    Link(&'static str),
}

fn file(content: impl AsRef<[u8]>) -> Node {
    Node::File(content.as_ref().to_vec())
}

impl Sample {
    fn new(nodes: Vec<(&str, Node)>) -> Self {
        let mut layer = Vec::new();
        let mut inodes = vec![folder(0)];
        let mut folders: BTreeMap<String, u32> = BTreeMap::from([(String::new(), 0)]);
        let mut entries: BTreeMap<u32, Vec<(Vec<u8>, u32)>> = BTreeMap::from([(0, Vec::new())]);
        for (path, node) in nodes {
            let mut at = 0;
            let mut so_far = String::new();
            let (above, name) = path.rsplit_once('/').expect("an absolute path");
            for part in above.split('/').filter(|part| !part.is_empty()) {
                so_far = format!("{so_far}/{part}");
                at = *folders.entry(so_far.clone()).or_insert_with(|| {
                    let number = inodes.len() as u32;
                    inodes.push(folder(at));
                    entries.get_mut(&at).expect("known").push((part.as_bytes().to_vec(), number));
                    entries.insert(number, Vec::new());
                    number
                });
            }
            let kind = match node {
                Node::Link(target) => InodeKind::Symlink { target: target.as_bytes().to_vec() },
                Node::File(content) => {
                    let offset = LogicalOffset(layer.len() as u64);
                    let len_bytes = content.len() as u64;
                    layer.extend_from_slice(&content);
                    layer.resize(layer.len().next_multiple_of(512), 0);
                    let source = ExtentSource::Layer { layer: 0, offset };
                    let extents =
                        if len_bytes == 0 { Vec::new() } else { vec![Extent { file_offset: 0, len_bytes, source }] };
                    InodeKind::Regular { size_bytes: len_bytes, extents }
                }
            };
            entries.get_mut(&at).expect("known").push((name.as_bytes().to_vec(), inodes.len() as u32));
            inodes.push(Inode { kind, ..folder(0) });
        }
        for (number, mut names) in entries {
            names.sort_unstable();
            let count = names.iter().filter(|(_, of)| matches!(inodes[*of as usize].kind, InodeKind::Directory { .. }));
            let link_count = 2 + count.count() as u32;
            let inode = &mut inodes[number as usize];
            inode.link_count = link_count;
            if let InodeKind::Directory { entries, .. } = &mut inode.kind {
                *entries = names;
            }
        }
        layer.resize(layer.len().max(512), 0);
        let layers = vec![TreeLayer { diff_id: DiffId([1; 32]), logical_len_bytes: layer.len() as u64 }];
        let image = erofs::write(&Tree { layers, inodes }).expect("written");
        Self { image: Image::open(image).expect("opens"), layer }
    }

    fn guess(&self, command: &Command) -> Guess {
        self.guess_within(command, LIMITS)
    }

    fn guess_within(&self, command: &Command, limits: Limits) -> Guess {
        guess(&self.image, command, limits, &mut Bytes(&self.layer))
    }
}

/// The bytes of a layer, at once.
struct Bytes<'a>(&'a [u8]);

impl Source for Bytes<'_> {
    fn read(&mut self, layer: u16, range: Range<u64>) -> Option<Vec<u8>> {
        assert_eq!(layer, 0);
        self.0.get(range.start as usize..range.end as usize).map(<[u8]>::to_vec)
    }

    fn ahead(&mut self, _: &[(u16, Range<u64>)]) {}

    fn found(&mut self, _: &GuessedFile) {}
}

fn folder(parent: u32) -> Inode {
    Inode {
        permissions: 0o755,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        link_count: 1,
        xattrs: Vec::new(),
        kind: InodeKind::Directory { entries: Vec::new(), parent },
    }
}

fn command(words: &[&str], env: &[&str]) -> Command {
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    Command { entrypoint: texts(words), env: texts(env), ..Command::default() }
}

fn paths(guess: &Guess) -> Vec<&str> {
    guess.files.iter().map(|file| file.path.as_str()).collect()
}

/// A 64-bit little-endian ELF file with one loaded segment, all of it.
fn elf(interpreter: Option<&str>, entries: &[(u64, &str)]) -> Vec<u8> {
    let mut strings = vec![0];
    let mut dynamic: Vec<(u64, u64)> = Vec::new();
    for (tag, text) in entries {
        dynamic.push((*tag, strings.len() as u64));
        strings.extend_from_slice(text.as_bytes());
        strings.push(0);
    }
    let headers = 64_u64;
    let interpreter_at = headers + 3 * 56;
    let interpreter = interpreter.map(|text| [text.as_bytes(), &[0]].concat()).unwrap_or_default();
    let strings_at = interpreter_at + interpreter.len() as u64;
    let dynamic_at = strings_at + strings.len() as u64;
    dynamic.push((5, 0x1000 + strings_at));
    dynamic.push((0, 0));
    let mut out = vec![0; 64];
    out[..6].copy_from_slice(b"\x7fELF\x02\x01");
    out[32..40].copy_from_slice(&headers.to_le_bytes());
    out[54..56].copy_from_slice(&56_u16.to_le_bytes());
    out[56..58].copy_from_slice(&3_u16.to_le_bytes());
    let len = dynamic_at + dynamic.len() as u64 * 16;
    let mut segment = |kind: u32, offset: u64, address: u64, len: u64| {
        let mut bytes = [0; 56];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&offset.to_le_bytes());
        bytes[16..24].copy_from_slice(&address.to_le_bytes());
        bytes[32..40].copy_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&bytes);
    };
    segment(1, 0, 0x1000, len);
    segment(2, dynamic_at, 0x1000 + dynamic_at, dynamic.len() as u64 * 16);
    segment(if interpreter.is_empty() { 0 } else { 3 }, interpreter_at, 0, interpreter.len() as u64);
    out.extend_from_slice(&interpreter);
    out.extend_from_slice(&strings);
    for (tag, value) in dynamic {
        out.extend_from_slice(&tag.to_le_bytes());
        out.extend_from_slice(&value.to_le_bytes());
    }
    out
}

#[test]
fn the_loaders_rules_are_followed() {
    let sample = Sample::new(vec![
        ("/etc/ld.so.conf", file("include /etc/ld.so.conf.d/*.conf\n")),
        ("/etc/ld.so.conf.d/own.conf", file("# mine\n/opt/lib\n")),
        ("/bin/tool", Node::Link("../opt/app/bin/tool")),
        (
            "/opt/app/bin/tool",
            file(elf(Some("/lib64/ld.so"), &[(1, "liba.so"), (1, "libd.so"), (29, "$ORIGIN/../lib")])),
        ),
        ("/opt/app/lib/liba.so", file(elf(None, &[(1, "libb.so"), (15, "$ORIGIN/deep")]))),
        ("/opt/app/lib/deep/libb.so", file(elf(None, &[(1, "libc.so")]))),
        // Behind what DT_RPATH of the one that needs it says.
        ("/opt/lib/libb.so", file("not this one")),
        ("/opt/lib/libc.so", file(elf(None, &[]))),
        ("/env/libd.so", file(elf(None, &[]))),
        ("/opt/app/lib/libd.so", file("the environment comes before DT_RUNPATH")),
        ("/lib64/ld.so", file(elf(None, &[]))),
    ]);
    let guess = sample.guess(&command(&["tool"], &["PATH=/bin", "LD_LIBRARY_PATH=/env"]));
    let expected = [
        "/opt/app/bin/tool",
        "/lib64/ld.so",
        "/opt/app/lib/liba.so",
        "/env/libd.so",
        "/opt/app/lib/deep/libb.so",
        "/opt/lib/libc.so",
    ];
    assert_eq!(paths(&guess), expected, "{guess:#?}");
    assert_eq!(guess.files[2].reason, "/bin/tool needs liba.so");
    assert!(!guess.is_cut);
}

#[test]
fn scripts_lead_to_what_they_run() {
    let sample = Sample::new(vec![
        ("/usr/bin/env", file(elf(None, &[]))),
        ("/bin/sh", file(elf(None, &[]))),
        ("/bin/tool", file(elf(None, &[]))),
        ("/bin/other", file(elf(None, &[]))),
        (
            "/app/start.sh",
            file(
                "#!/usr/bin/env sh\nset -e\n. \"$(dirname \"$0\")/vars.sh\"\nif [ -x /nothing ]; then tool a; fi\nexec \"${NEXT:-other}\" \"$@\"\n",
            ),
        ),
        ("/app/vars.sh", file("HOME_DIR=/srv\nNEXT=$HOME_DIR/last\n")),
        ("/srv/last", file("#!/bin/sh\n")),
    ]);
    let guess = sample.guess(&command(&["/app/start.sh", "x"], &["PATH=/bin:/usr/bin"]));
    // Not the tool: the test before it fails.
    let expected = ["/app/start.sh", "/usr/bin/env", "/bin/sh", "/app/vars.sh", "/srv/last"];
    assert_eq!(paths(&guess), expected, "{guess:#?}");
}

/// What `script` leads to in an image with some programs and folders.
fn run_by(script: &str, arguments: &[&str], env: &[&str]) -> Vec<String> {
    let program = || file(elf(None, &[]));
    let sample = Sample::new(vec![
        ("/bin/sh", program()),
        ("/bin/a", program()),
        ("/bin/b", program()),
        ("/bin/c", program()),
        ("/opt/jdk/bin/java", program()),
        ("/opt/app/jars/one.jar", file("1")),
        ("/opt/app/jars/two.jar", file("2")),
        ("/opt/app/home.sh", file("export APP_HOME=/opt/app\nreturn 0\nb\n")),
        ("/conf.d/1.sh", file("a 1\n")),
        ("/conf.d/2.sh", file("#!/bin/sh\nb\n")),
        ("/opt/app/start", file(format!("#!/bin/sh\n{script}"))),
    ]);
    let words: Vec<&str> = ["/opt/app/start"].iter().chain(arguments).copied().collect();
    let env: Vec<&str> = ["PATH=/bin"].iter().chain(env).copied().collect();
    let guess = sample.guess(&command(&words, &env));
    let found = guess.files.into_iter().map(|file| file.path);
    found.filter(|path| path != "/opt/app/start" && path != "/bin/sh").collect()
}

#[test]
fn a_class_path_is_followed_through_variables_and_functions() {
    let script = r#"
if [ -z "${APP_HOME}" ]; then
  source "$(dirname "$0")"/home.sh
fi
if [ -n "${JAVA_HOME}" ]; then
  RUNNER="${JAVA_HOME}/bin/java"
else
  if [ "$(command -v java)" ]; then
    RUNNER="java"
  else
    echo "JAVA_HOME is not set" >&2
    exit 1
  fi
fi
if [ -d "${APP_HOME}/jars" ]; then JARS_DIR="${APP_HOME}/jars"; else JARS_DIR="${APP_HOME}/target/jars"; fi
if [ ! -d "$JARS_DIR" ] && [ -z "$TESTING$SQL_TESTING" ]; then
  exit 1
else
  LAUNCH_CLASSPATH="$JARS_DIR/*"
fi
if [[ -n "$TESTING" ]]; then unset CONF_DIR; fi
build_command() {
  "$RUNNER" -Xmx128m $OPTIONS -cp "$LAUNCH_CLASSPATH" org.example.Main "$@"
  printf "%d\0" $?
}
set +o posix
CMD=()
DELIM=$'\n'
while IFS= read -d "$DELIM" -r _ARG; do
  ARG=${_ARG//$'\r'}
  CMD+=("$ARG")
done < <(build_command "$@")
LAST=$((${#CMD[@]} - 1))
if ! [[ ${CMD[$LAST]} =~ ^[0-9]+$ ]]; then
  exit 1
fi
CMD=("${CMD[@]:0:$LAST}")
exec "${CMD[@]}"
"#;
    let expected = ["/opt/app/home.sh", "/opt/jdk/bin/java", "/opt/app/jars/one.jar", "/opt/app/jars/two.jar"];
    assert_eq!(run_by(script, &["x"], &["JAVA_HOME=/opt/jdk"]), expected);
    assert_eq!(run_by(script, &["x"], &["PATH=/opt/jdk/bin:/bin"]), expected);
    assert_eq!(run_by(script, &["x"], &[]), ["/opt/app/home.sh"]);
}

#[test]
fn scripts_are_walked_as_a_shell_walks_them() {
    let cases: [(&str, &[&str], &[&str]); 27] = [
        ("if [ \"${1#-}\" != \"$1\" ]; then set -- a \"$@\"; fi; exec \"$@\"", &["-x"], &["/bin/a"]),
        ("if [ \"${1#-}\" != \"$1\" ]; then set -- a \"$@\"; fi; exec \"$@\"", &["b"], &["/bin/b"]),
        ("if [ \"${1:0:1}\" = '-' ]; then set -- a \"$@\"; fi\nexec \"$@\"", &["-x"], &["/bin/a"]),
        ("case \"$1\" in -*|'') a;; [c-x]) b ;; *) c; esac", &["--x"], &["/bin/a"]),
        ("case \"$1\" in -*|'') a;; [c-x]) b ;; *) c; esac", &["d"], &["/bin/b"]),
        ("case \"$(unknown)\" in x) a;; y) b ;; esac; c", &[], &["/bin/a", "/bin/b", "/bin/c"]),
        ("for f in /conf.d/*.sh; do . \"$f\"; done", &[], &["/conf.d/1.sh", "/conf.d/2.sh", "/bin/a", "/bin/b"]),
        ("for f in /conf.d/*.sh; do . \"$f\"; break; done", &[], &["/conf.d/1.sh", "/bin/a"]),
        ("if unknown; then X=a; else X=b; fi; $X", &[], &["/bin/a"]),
        ("if unknown; then exit 1; else X=b; fi; $X", &[], &["/bin/b"]),
        ("unknown || exit 1; X=$(unknown) b", &[], &["/bin/b"]),
        ("true && a; true || b; false && b || c", &[], &["/bin/a", "/bin/c"]),
        ("exec a; b", &[], &["/bin/a"]),
        ("f() { a; return; b; }; f; c", &[], &["/bin/a", "/bin/c"]),
        ("function f {\n \"$1\"; }\nf b", &[], &["/bin/b"]),
        ("[[ $X == *y* && -f /bin/a ]] && b", &[], &[]),
        ("X=xyz; [[ $X == *y* && -f /bin/a ]] && b", &[], &["/bin/b"]),
        ("cd /bin && ./a; (cd /opt; ./a); cd /; D=`pwd`; ${D}bin/b", &[], &["/bin/a", "/bin/b"]),
        (
            "D=$(cd \"$(dirname \"${BASH_SOURCE[0]}\")\" >/dev/null 2>&1 && pwd); . $D/home.sh; c",
            &[],
            &["/opt/app/home.sh", "/bin/c"],
        ),
        ("cat <<EOF\nb\n'\nEOF\nC=(a 1); C+=(\"$@\"); exec \"${C[@]}\"", &["b"], &["/bin/a"]),
        ("X=a; X+=; ${X:-b}; ${Y:-b}; : ${Z:=c}; $Z; ${X:+$Y}", &[], &["/bin/a", "/bin/b", "/bin/c"]),
        ("P=/opt/a; ${P##*/}; Q=b.x; ${Q%.*}", &[], &["/bin/a", "/bin/b"]),
        ("a | b &\nwait; c > /x < /conf.d/1.sh", &[], &["/conf.d/1.sh", "/bin/a", "/bin/b", "/bin/c"]),
        ("while [ $# -gt 0 ]; do case $1 in x) a;; esac; shift; done; c", &["x"], &["/bin/a", "/bin/c"]),
        (")\n;;\nfi \"\na\nb\" ; }\nb", &[], &["/bin/b"]),
        ("eval \"a; b\"; command c", &[], &["/bin/a", "/bin/b", "/bin/c"]),
        (
            "test -e /nothing -o -d /opt && ! [ a = b ] && c; let i=1; (( i++ )); for ((i=0;i<3;i++)); do b; done",
            &[],
            &["/bin/c", "/bin/b"],
        ),
    ];
    for (script, arguments, expected) in cases {
        assert_eq!(run_by(script, arguments, &[]), expected, "{script}");
    }
}

#[test]
fn exports_reach_what_is_run() {
    let library = || file(elf(None, &[]));
    let sample = Sample::new(vec![
        ("/bin/sh", file(elf(None, &[]))),
        (
            "/start",
            file("#!/bin/sh\nPLAIN=/no\nexport LD_LIBRARY_PATH=/one\n/tool\nLD_LIBRARY_PATH=/two exec /other\n"),
        ),
        ("/tool", file(elf(None, &[(1, "liba.so")]))),
        ("/other", file(elf(None, &[(1, "liba.so")]))),
        ("/one/liba.so", library()),
        ("/two/liba.so", library()),
    ]);
    let guess = sample.guess(&command(&["/start"], &[]));
    assert_eq!(paths(&guess), ["/start", "/bin/sh", "/tool", "/other", "/one/liba.so", "/two/liba.so"]);
}

/// Counts how often somebody who fetches waits for the next answer.
#[derive(Default)]
struct Waits<'a> {
    layer: &'a [u8],
    now: u32,
    /// When each block of 512 bytes, of which no file shares one, is there.
    due: BTreeMap<u64, u32>,
}

impl Waits<'_> {
    fn ask(&mut self, range: &Range<u64>) {
        for block in range.start / 512..range.end.div_ceil(512) {
            self.due.entry(block).or_insert(self.now + 1);
        }
    }
}

impl Source for Waits<'_> {
    fn read(&mut self, _: u16, range: Range<u64>) -> Option<Vec<u8>> {
        self.ask(&range);
        for block in range.start / 512..range.end.div_ceil(512) {
            self.now = self.now.max(self.due[&block]);
        }
        Some(self.layer[range.start as usize..range.end as usize].to_vec())
    }

    fn ahead(&mut self, parts: &[(u16, Range<u64>)]) {
        parts.iter().for_each(|(_, range)| self.ask(range));
    }

    fn found(&mut self, file: &GuessedFile) {
        file.pieces.iter().for_each(|(_, range)| self.ask(range));
    }
}

#[test]
fn what_is_known_is_read_side_by_side() {
    let names = |of: &str, ending: &str| (0..40).map(|no| format!("{of}{no}{ending}")).collect::<Vec<_>>();
    let needed = names("lib", ".so");
    let needs: Vec<(u64, &str)> = needed.iter().map(|name| (1, name.as_str())).collect();
    let imports: String = names("import m", "\n").concat();
    let requires: String = names("require('p", "');").concat();
    let mut nodes = vec![
        ("/usr/bin/python3.11".to_owned(), file(elf(None, &needs))),
        ("/usr/bin/node".to_owned(), file(elf(None, &[]))),
        ("/usr/lib/python3.11/os.py".to_owned(), file("")),
        ("/srv/app.py".to_owned(), file(imports)),
        ("/srv/app.js".to_owned(), file(requires)),
    ];
    nodes.extend(needed.iter().map(|name| (format!("/lib/{name}"), file(elf(None, &[])))));
    nodes.extend(names("/srv/m", ".py").into_iter().map(|path| (path, file("import last"))));
    for package in names("/srv/node_modules/p", "") {
        nodes.push((format!("{package}/package.json"), file(r#"{"main": "it.js"}"#)));
        nodes.push((format!("{package}/it.js"), file("require('./last.json')")));
        nodes.push((format!("{package}/last.json"), file("{}")));
    }
    let sample =
        Sample::new(nodes.iter_mut().map(|(path, node)| (path.as_str(), std::mem::replace(node, file("")))).collect());
    let waits = |words: &[&str]| {
        let mut waits = Waits { layer: &sample.layer, ..Waits::default() };
        let guess = guess(&sample.image, &command(words, &[]), LIMITS, &mut waits);
        (guess.files.len(), waits.now)
    };
    // The program; its libraries and the first modules; the script; what it imports.
    assert_eq!(waits(&["/usr/bin/python3.11", "/srv/app.py"]), (83, 4));
    // The program; the script; the packages' manifests; their scripts.
    assert_eq!(waits(&["/usr/bin/node", "/srv/app.js"]), (122, 4));
}

#[test]
fn python_follows_imports() {
    let base = "/usr/lib/python3.11";
    let at = |name: &str| format!("{base}/{name}");
    let (os, site, json, abc) =
        (at("os.py"), at("site.py"), at("json/__init__.py"), at("__pycache__/abc.cpython-311.pyc"));
    let (abc_source, numbers) = (at("abc.py"), at("site-packages/numbers_fast/__init__.py"));
    let core = at("site-packages/numbers_fast/_core.cpython-311-x86_64-linux-gnu.so");
    let lib = at("site-packages/numbers_fast.libs/libblas.so");
    let sample = Sample::new(vec![
        ("/usr/bin/python3.11", file(elf(None, &[]))),
        ("/usr/bin/python3", Node::Link("python3.11")),
        (os.as_str(), file("import abc\n")),
        (site.as_str(), file("import os\n")),
        (abc_source.as_str(), file("\n")),
        (abc.as_str(), file("compiled")),
        (json.as_str(), file("")),
        (numbers.as_str(), file("from . import _core\n")),
        (core.as_str(), file(elf(None, &[(1, "libblas.so"), (29, "$ORIGIN/../numbers_fast.libs")]))),
        (lib.as_str(), file(elf(None, &[]))),
        ("/srv/app.py", file("import json\nimport helper\n")),
        ("/srv/helper.py", file("import numbers_fast as nf\n")),
    ]);
    let guess = sample.guess(&command(&["/usr/bin/python3", "-u", "/srv/app.py"], &[]));
    let found = paths(&guess);
    for path in [&os, &site, &abc, &json, &numbers, &core, &lib] {
        assert!(found.contains(&path.as_str()), "{path} is missing: {found:?}");
    }
    assert!(found.contains(&"/srv/helper.py") && !found.contains(&abc_source.as_str()), "{found:?}");
    let module = sample.guess(&Command { working_dir: "/srv".into(), ..command(&["python3", "-m", "helper"], &[]) });
    assert!(paths(&module).contains(&core.as_str()), "{module:#?}");
}

#[test]
fn a_virtual_machine_and_node_are_known() {
    let sample = Sample::new(vec![
        ("/usr/bin/java", Node::Link("/usr/lib/jvm/17/bin/java")),
        ("/usr/lib/jvm/17/bin/java", file(elf(None, &[]))),
        ("/usr/lib/jvm/17/lib/server/libjvm.so", file(elf(None, &[]))),
        ("/usr/lib/jvm/17/lib/modules", file(vec![7; 4 << 20])),
        ("/app/lib/a.jar", file(vec![1; 200_000])),
        ("/app/lib/b.jar", file("b")),
        ("/app/conf/x", file("x")),
        ("/usr/bin/node", file(elf(None, &[]))),
        ("/web/server.js", file("const e = require('express');\nrequire('./routes')")),
        ("/web/routes/index.js", file("import 'fs'")),
        ("/web/node_modules/express/package.json", file(r#"{"main": "lib/express"}"#)),
        ("/web/node_modules/express/lib/express.js", file("require('../package.json')")),
    ]);
    let java = sample.guess(&command(&["java", "-Xmx1g", "-cp", "/app/conf:/app/lib/*", "Main"], &[]));
    let found = paths(&java);
    for path in ["/usr/lib/jvm/17/lib/server/libjvm.so", "/app/lib/a.jar", "/app/lib/b.jar"] {
        assert!(found.contains(&path), "{path} is missing: {found:?}");
    }
    let len = |name: &str| java.files.iter().find(|file| file.path.ends_with(name)).map(GuessedFile::len_bytes);
    assert_eq!((len("lib/modules"), len("a.jar")), (Some(3 << 19), Some((4 << 10) + 8000)));

    let node = sample.guess(&command(&["node", "/web/server.js"], &[]));
    let expected = [
        "/usr/bin/node",
        "/web/server.js",
        "/web/node_modules/express/package.json",
        "/web/node_modules/express/lib/express.js",
        "/web/routes/index.js",
    ];
    let mut found = paths(&node);
    found.sort_unstable();
    let mut sorted = expected.to_vec();
    sorted.sort_unstable();
    assert_eq!(found, sorted);
}

#[test]
fn circles_and_bounds_end_it() {
    let sample = Sample::new(vec![
        ("/bin/sh", file("#!/bin/loop\n")),
        ("/bin/loop", file("#!/bin/sh\n")),
        ("/self", Node::Link("/self")),
        ("/bin/big", file(vec![1; 100_000])),
        ("/bin/a.so", file(elf(None, &[(1, "/bin/b.so")]))),
        ("/bin/b.so", file(elf(None, &[(1, "/bin/a.so")]))),
    ]);
    assert_eq!(paths(&sample.guess(&command(&["/bin/loop"], &[]))), ["/bin/loop", "/bin/sh"]);
    assert_eq!(paths(&sample.guess(&command(&["/self"], &[]))), [""; 0]);
    assert_eq!(paths(&sample.guess(&command(&["/bin/a.so"], &[]))), ["/bin/a.so", "/bin/b.so"]);
    let cut = sample.guess_within(&command(&["/bin/big"], &[]), Limits { bytes: 1000, ..LIMITS });
    assert_eq!(cut.files[0].len_bytes(), 1000);
    let none = sample.guess_within(&command(&["/bin/big"], &[]), Limits { files: 0, ..LIMITS });
    assert!(none.files.is_empty() && none.is_cut);
    let blind = sample.guess_within(&command(&["/bin/loop"], &[]), Limits { read_bytes: 0, ..LIMITS });
    assert!(blind.is_cut, "{blind:?}");
}

#[test]
fn configurations_say_what_is_run() {
    let config = br#"{"config": {"Entrypoint": null, "Cmd": ["a"], "Env": ["PATH=/x"], "Labels": {}}}"#;
    let command = Command::of_config(config).expect("a command");
    assert_eq!((command.cmd, command.env.len()), (vec!["a".to_owned()], 1));
    assert_eq!(Command::of_config(br#"{"config": {}}"#), None);
    assert_eq!(Command::of_config(b"nonsense"), None);
}

proptest! {
    #[test]
    fn hostile_elf_files_end(at in 0_usize..400, bytes in proptest::collection::vec(any::<u8>(), 1..64)) {
        let mut hostile = elf(Some("/lib/ld"), &[(1, "liba.so"), (15, "$ORIGIN"), (1, "libb.so")]);
        for (place, byte) in hostile.iter_mut().skip(at).zip(bytes) {
            *place = byte;
        }
        let sample = Sample::new(vec![("/a", file(&hostile)), ("/liba.so", file(&hostile))]);
        let guess = sample.guess(&command(&["/a"], &["LD_LIBRARY_PATH=/"]));
        prop_assert!(guess.files.len() <= 2);
    }

    #[test]
    fn hostile_scripts_end(text in "[ -~\n]{0,400}", name in "(sh|python3|node|java)") {
        let script = format!("#!/bin/{name}\n{text}");
        let path = format!("/bin/{name}");
        let sample = Sample::new(vec![
            (path.as_str(), file("x")),
            ("/usr/lib/python3.11/os.py", file(&text)),
            ("/script", file(script)),
        ]);
        let guess = sample.guess(&command(&["/script"], &[]));
        prop_assert!(guess.files.iter().any(|file| file.path == "/script"));
    }
}
