//! The commands that a shell has itself, and those whose output follows from their arguments.

use super::super::{PATH_DEFAULT, Place};
use super::{Field, Flow, Guesser, Shell, Status, VALUE_MAX_BYTES, WORDS_MAX};

/// Builtins that are assignments.
pub(super) fn declares(words: &[Field]) -> bool {
    let name = words.first().and_then(Option::as_deref);
    matches!(name, Some("export" | "local" | "readonly" | "declare" | "typeset"))
}

impl<B: AsRef<[u8]>> Guesser<'_, '_, B> {
    /// A command that is known by its first word.
    pub(super) fn command(&mut self, shell: &mut Shell, words: Vec<Field>, own: &[(String, String)]) -> Status {
        let Some(Some(name)) = words.first().cloned() else { return None };
        let rest = &words[1..];
        if let Some(body) = shell.functions.get(&name).cloned() {
            let outer = shell.get("@").cloned();
            shell.set("@", rest.to_vec());
            let status = self.statement(shell, &body);
            if shell.flow == Flow::Return {
                shell.flow = Flow::Next;
            }
            if let Some(outer) = outer {
                shell.variables.insert("@".to_owned(), outer);
            }
            return status;
        }
        let text = |at: usize| rest.get(at).and_then(Option::as_deref);
        match name.as_str() {
            ":" | "true" => Some(true),
            "false" => Some(false),
            "exit" => self.leave(shell, Flow::Exit),
            "return" => self.leave(shell, Flow::Return),
            "break" => self.leave(shell, Flow::Turn { is_last: true }),
            "continue" => self.leave(shell, Flow::Turn { is_last: false }),
            "[" => self.test(shell, rest.strip_suffix(&[Some("]".to_owned())]).unwrap_or_default()),
            "test" => self.test(shell, rest),
            "export" => {
                shell.exported.extend(rest.iter().flatten().take(WORDS_MAX).cloned());
                Some(true)
            }
            "local" | "readonly" | "declare" | "typeset" => Some(true),
            "unset" => {
                for name in rest.iter().flatten() {
                    shell.variables.remove(name);
                }
                Some(true)
            }
            "set" => {
                if let Some(at) = rest.iter().position(|word| word.as_deref() == Some("--")) {
                    shell.set("@", rest[at + 1..].to_vec());
                }
                match text(0) {
                    Some("-a") => shell.exports_all = true,
                    Some("+a") => shell.exports_all = false,
                    _ => {}
                }
                Some(true)
            }
            "shift" => {
                let count = text(0).map_or(Some(1), |count| count.parse().ok()).unwrap_or(1);
                let left = shell.get("@").map(|values| values.iter().skip(count).cloned().collect());
                shell.set("@", left.unwrap_or_default());
                Some(true)
            }
            "read" | "getopts" | "mapfile" | "readarray" | "let" => {
                for name in rest.iter().flatten().filter(|word| !word.starts_with('-')) {
                    shell.set(name, vec![None]);
                }
                None
            }
            "cd" => {
                let place = rest.iter().flatten().find(|word| !word.starts_with('-'))?;
                let place = shell.absolute(place);
                let is_there = self.files.is_folder(&place);
                if is_there && place.len() <= VALUE_MAX_BYTES {
                    shell.working_dir = place;
                }
                Some(is_there)
            }
            "." | "source" => {
                let path = self.sourced(shell, text(0)?)?;
                shell.depth += 1;
                let reason = format!("{} reads it", shell.script());
                let outer = shell.get("@").cloned();
                if rest.len() > 1 {
                    shell.set("@", rest[1..].to_vec());
                }
                self.script_file(shell, &path, &reason);
                shell.depth -= 1;
                if shell.flow == Flow::Return {
                    shell.flow = Flow::Next;
                }
                if let Some(outer) = outer.filter(|_| rest.len() > 1) {
                    shell.variables.insert("@".to_owned(), outer);
                }
                None
            }
            "eval" => {
                let script: Option<Vec<&str>> = rest.iter().map(Option::as_deref).collect();
                self.walk(shell, &script?.join(" "))
            }
            "exec" => {
                let skipped = rest.iter().take_while(|word| word.as_ref().is_some_and(|word| word.starts_with('-')));
                let rest = rest[skipped.count()..].to_vec();
                if !rest.is_empty() {
                    // It is no function, whatever its name.
                    self.program_of(shell, &rest, own);
                    shell.flow = Flow::Exit;
                }
                None
            }
            "command" | "type" | "hash" if matches!(text(0), Some("-v" | "-V" | "-p")) || name != "command" => {
                self.located(shell, rest)
            }
            "command" | "builtin" | "time" => self.command(shell, rest.to_vec(), own),
            "trap" | "umask" | "ulimit" | "wait" | "shopt" | "alias" | "jobs" | "kill" | "times" => None,
            _ => self.told(shell, &name, &words, own),
        }
    }

    fn leave(&mut self, shell: &mut Shell, flow: Flow) -> Status {
        shell.flow = flow;
        None
    }

    /// The file that `.` means.
    fn sourced(&self, shell: &Shell, name: &str) -> Option<String> {
        let here = shell.absolute(name);
        if name.contains('/') || self.files.regular(&here).is_some() {
            return Some(here);
        }
        self.find_in(&self.search_path(shell)?, name, &shell.working_dir)
    }

    /// `PATH`, when it is known.
    fn search_path(&self, shell: &Shell) -> Option<String> {
        match shell.get("PATH").and_then(|values| values.first()) {
            Some(path) => path.clone(),
            None => Some(PATH_DEFAULT.to_owned()),
        }
    }

    /// `command -v` and its like.
    fn located(&mut self, shell: &mut Shell, words: &[Field]) -> Status {
        let name = words.iter().flatten().find(|word| !word.starts_with('-'))?;
        let found = match shell.functions.contains_key(name) {
            true => Some(name.clone()),
            false => self.find_in(&self.search_path(shell)?, name, &shell.working_dir),
        };
        shell.print(found.as_ref().map(|found| format!("{found}\n")).or(Some(String::new())));
        Some(found.is_some())
    }

    /// A program, or a builtin that prints.
    fn told(&mut self, shell: &mut Shell, name: &str, words: &[Field], own: &[(String, String)]) -> Status {
        let known: Option<Vec<&str>> = words[1..].iter().map(Option::as_deref).collect();
        let (text, status) = match known {
            Some(arguments) => self.output_of(shell, name, &arguments),
            None => (None, None),
        };
        if !matches!(name, "echo" | "printf" | "pwd") {
            self.program_of(shell, words, own);
        }
        shell.print(text);
        status
    }

    /// What a command prints, and whether it succeeds.
    fn output_of(&mut self, shell: &Shell, name: &str, arguments: &[&str]) -> (Field, Status) {
        let operand = || arguments.iter().find(|word| !word.starts_with('-')).copied();
        let text = match name {
            "echo" => {
                let is_bare = arguments.first() == Some(&"-n");
                let words = if is_bare { &arguments[1..] } else { arguments };
                let end = if is_bare { "" } else { "\n" };
                return (Some(format!("{}{end}", words.join(" "))), Some(true));
            }
            "printf" => {
                let (format, values) = arguments.split_first().unwrap_or((&"", &[]));
                let text = match (*format, values) {
                    ("%s", [value]) => Some((*value).to_owned()),
                    ("%s\\n", [value]) => Some(format!("{value}\n")),
                    (format, []) if !format.contains(['%', '\\']) => Some(format.to_owned()),
                    _ => None,
                };
                return (text, Some(true));
            }
            "pwd" => Some(shell.working_dir.clone()),
            "dirname" => operand().map(|path| match path.trim_end_matches('/').rsplit_once('/') {
                Some(("", _)) => "/".to_owned(),
                Some((folder, _)) => folder.to_owned(),
                None if path.starts_with('/') => "/".to_owned(),
                None => ".".to_owned(),
            }),
            "basename" => match arguments {
                [path] => path.trim_end_matches('/').rsplit('/').next().map(str::to_owned),
                [path, ending] => {
                    let name = path.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
                    Some(name.strip_suffix(ending).unwrap_or(name).to_owned())
                }
                _ => None,
            },
            "readlink" | "realpath"
                if name == "realpath" || arguments.first().is_some_and(|it| it.starts_with('-')) =>
            {
                operand().and_then(|path| self.files.real_path(&shell.absolute(path)))
            }
            "which" => {
                let found = operand().zip(self.search_path(shell));
                let found = found.and_then(|(word, path)| self.find_in(&path, word, &shell.working_dir));
                let status = Some(found.is_some());
                return (Some(found.map(|found| format!("{found}\n")).unwrap_or_default()), status);
            }
            "cat" => operand().and_then(|path| {
                let file = self.files.regular(&shell.absolute(path))?;
                self.add(&file.path, &format!("{} reads it", shell.script()));
                (file.size_bytes <= VALUE_MAX_BYTES as u64).then(|| self.files.text(&file, file.size_bytes)).flatten()
            }),
            _ => None,
        };
        (text.map(|text| format!("{text}\n")), None)
    }

    /// Puts a program into the queue, without the arguments that nobody knows.
    fn program_of(&mut self, shell: &Shell, words: &[Field], own: &[(String, String)]) {
        let Some(path) = self.search_path(shell) else { return };
        let Some(Some(name)) = words.first() else { return };
        if self.find_in(&path, name, &shell.working_dir).is_none() {
            return;
        }
        let known: Vec<String> = words.iter().flatten().filter(|word| !word.is_empty()).cloned().collect();
        let place = Place { environment: shell.environment_with(own), working_dir: shell.working_dir.clone() };
        self.run(known, &format!("{} runs it", shell.script()), shell.depth + 1, place);
    }
}
