//! Shell scripts: the commands at their top level, and the files that they read.
//!
//! Nothing is run. Lines are cut into words, variables that are known replaced, and what stands where a command stands is
//! looked for along `PATH`. A script that does more than that (loops over files, commands in variables) is guessed in part.

use super::{Guesser, SCRIPT_MAX_BYTES};

/// Lines of a script that are looked at.
const LINES_MAX: usize = 4000;
/// Length at which a word is replaced no further: a script may double a variable line by line.
const WORD_MAX_BYTES: usize = 16 << 10;
/// Words that stand before a command and are none.
const KEYWORDS: [&str; 16] = [
    "if", "then", "else", "elif", "do", "while", "until", "!", "{", "(", "time", "exec", "command", "builtin", "eval",
    "&&",
];

impl<B: AsRef<[u8]>> Guesser<'_, '_, B> {
    /// What a shell does with its arguments.
    pub(super) fn shell(&mut self, arguments: &[String], depth: u32) {
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            if argument.starts_with('-') && argument.contains('c') && !argument.starts_with("--") {
                if let Some(script) = rest.next() {
                    self.script(&script.clone(), "sh -c", depth);
                }
                return;
            }
            if argument.starts_with(['-', '+']) {
                continue;
            }
            // The script; what follows is for it.
            let path = self.absolute(argument);
            let positional: Vec<String> = rest.cloned().collect();
            for (at, value) in positional.iter().enumerate().take(9) {
                self.env.insert((at + 1).to_string(), value.clone());
            }
            self.env.insert("@".to_owned(), positional.join(" "));
            return self.script_file(&path, "the shell runs it", depth);
        }
    }

    fn script_file(&mut self, path: &str, reason: &str, depth: u32) {
        let Some(file) = self.files.regular(path) else { return };
        if depth > self.limits.depth {
            self.guess.is_cut = true;
            return;
        }
        self.add(path, reason);
        let Some(text) = self.files.text(&file, SCRIPT_MAX_BYTES) else { return };
        let outer = self.env.insert("0".to_owned(), path.to_owned());
        self.script(&text, path, depth);
        match outer {
            Some(outer) => self.env.insert("0".to_owned(), outer),
            None => self.env.remove("0"),
        };
    }

    fn script(&mut self, text: &str, name: &str, depth: u32) {
        let joined = text.replace("\\\n", " ");
        for line in joined.lines().take(LINES_MAX) {
            for command in commands(line) {
                if self.is_full() {
                    return;
                }
                self.script_command(&command, name, depth);
            }
        }
    }

    fn script_command(&mut self, words: &[String], name: &str, depth: u32) {
        let mut words = words.iter().map(|word| self.expand(word)).collect::<Vec<_>>();
        loop {
            let Some(first) = words.first() else { return };
            if KEYWORDS.contains(&first.as_str()) {
                words.remove(0);
                continue;
            }
            let Some((variable, value)) = assignment(first) else { break };
            let is_alone = words.len() == 1;
            if is_alone && !value.contains('$') {
                self.env.insert(variable.to_owned(), value.to_owned());
            }
            words.remove(0);
        }
        let (first, rest) = (words[0].clone(), &words[1..]);
        match first.as_str() {
            "export" | "local" | "readonly" | "declare" => {
                let set = rest.iter().filter_map(|word| assignment(word)).filter(|(_, value)| !value.contains('$'));
                let set: Vec<_> = set.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
                self.env.extend(set);
            }
            "." | "source" => {
                if let Some(file) = rest.first() {
                    let path = self.absolute(file);
                    self.script_file(&path, &format!("{name} reads it"), depth + 1);
                }
            }
            "cd" => {}
            _ if first.contains('$') || first.is_empty() => {}
            _ if self.find_command(&first).is_some() => {
                // What has variables that nobody knows is no argument.
                let known = words.into_iter().filter(|word| !word.contains('$') && !word.is_empty());
                self.run(known.flat_map(|word| split_list(&word)).collect(), &format!("{name} runs it"), depth + 1);
            }
            _ => {}
        }
    }

    /// A word with the variables that are known, and with the folder of the script where it asks for it.
    fn expand(&self, word: &str) -> String {
        let own = self.env.get("0").map_or("", String::as_str);
        let folder = own.rsplit_once('/').map_or("", |(folder, _)| folder);
        let mut word = word.to_owned();
        for form in [
            "$(dirname \"$0\")",
            "$(dirname $0)",
            "`dirname \"$0\"`",
            "`dirname $0`",
            "$(dirname \"${BASH_SOURCE[0]}\")",
        ] {
            word = word.replace(form, folder);
        }
        for (open, close) in [("$(cd \"", ")"), ("$(cd ", ")")] {
            if let Some(inner) = word.strip_prefix(open).and_then(|rest| rest.strip_suffix(close)) {
                word = inner.split([';', '&']).next().unwrap_or_default().trim().replace('"', "");
            }
        }
        let mut out = String::with_capacity(word.len());
        let mut rest = word.as_str();
        while let Some(at) = rest.find('$').filter(|_| out.len() < WORD_MAX_BYTES) {
            out.push_str(&rest[..at]);
            let (variable, default, after) = variable(&rest[at + 1..]);
            match (self.env.get(variable), default) {
                (Some(value), _) => out.push_str(value),
                (None, Some(default)) => out.push_str(default),
                (None, None) => out.push_str(&rest[at..rest.len() - after.len()]),
            }
            rest = after;
        }
        out.push_str(rest);
        out
    }
}

/// The name behind a dollar sign, what `:-` says it is otherwise, and what follows.
fn variable(rest: &str) -> (&str, Option<&str>, &str) {
    let is_name = |character: char| character.is_ascii_alphanumeric() || character == '_' || character == '@';
    if let Some(inner) = rest.strip_prefix('{') {
        let Some((inner, after)) = inner.split_once('}') else { return ("", None, rest) };
        let end = inner.find(|character| !is_name(character)).unwrap_or(inner.len());
        let default = inner[end..].strip_prefix(":-").or_else(|| inner[end..].strip_prefix('-'));
        return (&inner[..end], default, after);
    }
    let end = rest.find(|character| !is_name(character)).unwrap_or(rest.len());
    (&rest[..end], None, &rest[end..])
}

fn assignment(word: &str) -> Option<(&str, &str)> {
    let (name, value) = word.split_once('=')?;
    let is_name = |character: char| character.is_ascii_alphanumeric() || character == '_';
    let starts = name.starts_with(|character: char| character.is_ascii_alphabetic() || character == '_');
    (starts && name.chars().all(is_name)).then_some((name, value))
}

/// What an unquoted list such as `$@` has become.
fn split_list(word: &str) -> Vec<String> {
    word.split(' ').filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

/// The simple commands of a line, as words without quotes.
fn commands(line: &str) -> Vec<Vec<String>> {
    let (mut commands, mut words, mut word) = (Vec::new(), Vec::new(), String::new());
    let (mut quote, mut depth, mut is_word) = (None, 0_u32, false);
    let mut characters = line.chars().peekable();
    while let Some(character) = characters.next() {
        match (quote, character) {
            (Some('\''), '\'') | (Some('"'), '"') if depth == 0 => quote = None,
            (None, '\'' | '"') if depth == 0 => (quote, is_word) = (Some(character), true),
            (None | Some('"'), '\\') => word.extend(characters.next()),
            (None | Some('"'), '$') if characters.peek() == Some(&'(') => {
                (depth, is_word) = (depth + 1, true);
                word.push(character);
            }
            (_, ')') if depth > 0 => {
                depth -= 1;
                word.push(character);
            }
            (None, '#') if !is_word && depth == 0 => break,
            (None, ' ' | '\t') if depth == 0 => {
                if is_word {
                    words.push(std::mem::take(&mut word));
                }
                is_word = false;
            }
            (None, ';' | '|' | '&') if depth == 0 => {
                if is_word {
                    words.push(std::mem::take(&mut word));
                }
                is_word = false;
                commands.push(std::mem::take(&mut words));
            }
            (_, character) => {
                is_word = true;
                word.push(character);
            }
        }
    }
    if is_word {
        words.push(word);
    }
    commands.push(words);
    commands.retain(|words| !words.is_empty());
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_into_commands() {
        let words = |line| commands(line).into_iter().map(|words| words.join("|")).collect::<Vec<_>>();
        assert_eq!(words("a 'b c' \"d e\" # f"), ["a|b c|d e"]);
        assert_eq!(words("a && b; c | d"), ["a", "b", "c", "d"]);
        assert_eq!(words("x=\"$(dirname \"$0\")\" y"), ["x=$(dirname \"$0\")|y"]);
        assert_eq!(words("  # nothing"), Vec::<String>::new());
    }

    #[test]
    fn variables_are_found() {
        assert_eq!(variable("HOME/bin"), ("HOME", None, "/bin"));
        assert_eq!(variable("{HOME:-/root}/bin"), ("HOME", Some("/root"), "/bin"));
        assert_eq!(variable("{broken"), ("", None, "{broken"));
        assert_eq!(assignment("A_1=x=y"), Some(("A_1", "x=y")));
        assert_eq!(assignment("--a=b"), None);
    }
}
