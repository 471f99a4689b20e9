//! Words: variables and outputs replaced, cut into fields, patterns become files.

use super::syntax::{Change, Part, Word};
use super::{Field, Guesser, Shell, Status, VALUE_MAX_BYTES, WORDS_MAX, pattern};

/// Fields in the making.
#[derive(Default)]
struct Fields {
    done: Vec<Field>,
    text: String,
    is_unknown: bool,
    /// Whether there is a field even when it has no text.
    is_field: bool,
    /// Whether an unquoted part has the characters of a pattern.
    is_pattern: bool,
}

impl Fields {
    fn push(&mut self, text: &str) {
        self.is_field = true;
        if self.text.len() + text.len() > VALUE_MAX_BYTES {
            self.is_unknown = true;
        } else {
            self.text.push_str(text);
        }
    }

    fn unknown(&mut self) {
        (self.is_unknown, self.is_field) = (true, true);
    }

    /// What stands there without quotes is cut at white space.
    fn split(&mut self, value: &str) {
        self.is_pattern |= pattern::is_pattern(value);
        if value.starts_with(char::is_whitespace) {
            self.end();
        }
        for (at, word) in value.split_whitespace().enumerate() {
            if at > 0 {
                self.end();
            }
            self.push(word);
        }
        if value.ends_with(char::is_whitespace) {
            self.end();
        }
    }

    fn end(&mut self) {
        if self.is_field && self.done.len() < WORDS_MAX {
            let text = std::mem::take(&mut self.text);
            self.done.push((!self.is_unknown).then_some(text));
        }
        self.text.clear();
        (self.is_unknown, self.is_field) = (false, false);
    }
}

impl<B: AsRef<[u8]>> Guesser<'_, '_, B> {
    /// The fields of words.
    pub(super) fn fields(&mut self, shell: &mut Shell, words: &[Word]) -> Vec<Field> {
        let mut all = Vec::new();
        for word in words {
            let mut fields = Fields::default();
            self.parts(shell, word, &mut fields);
            fields.end();
            for field in fields.done {
                match field {
                    Some(pattern) if fields.is_pattern && pattern::is_pattern(&pattern) => {
                        let found = self.files_of(shell, &pattern);
                        if found.is_empty() {
                            all.push(Some(pattern));
                        }
                        all.extend(found.into_iter().map(Some));
                    }
                    other => all.push(other),
                }
            }
            all.truncate(WORDS_MAX);
        }
        all
    }

    /// A word as one value, as in assignments.
    pub(super) fn value(&mut self, shell: &mut Shell, word: &Word) -> Field {
        let mut fields = Fields::default();
        self.parts(shell, word, &mut fields);
        fields.end();
        fields.done.into_iter().collect::<Option<Vec<String>>>().map(|fields| fields.join(" "))
    }

    fn parts(&mut self, shell: &mut Shell, word: &Word, fields: &mut Fields) {
        for part in word {
            if !self.work(0) {
                return fields.unknown();
            }
            match part {
                Part::Text { text, is_quoted } => {
                    fields.is_pattern |= !is_quoted && pattern::is_pattern(text);
                    // The home folder is of a user that nobody knows here.
                    fields.push(text);
                }
                Part::Variable { name, is_list, change, is_quoted } => {
                    self.variable(shell, name, *is_list, change, *is_quoted, fields);
                }
                Part::Output { script, is_quoted } => match self.output(shell, script) {
                    Some(output) if *is_quoted => fields.push(&output),
                    Some(output) => fields.split(&output),
                    None => fields.unknown(),
                },
                Part::Process(script) => {
                    self.output(shell, script);
                    fields.unknown();
                }
                Part::Unknown => fields.unknown(),
            }
        }
    }

    /// What a script prints that runs beside.
    fn output(&mut self, shell: &mut Shell, script: &str) -> Field {
        let mut inner = Shell { output: Some(Some(String::new())), ..shell.clone() };
        // Whatever it ends with, it ends there.
        let _: Status = self.walk(&mut inner, script);
        inner.output.flatten().map(|output| output.trim_end_matches('\n').to_owned())
    }

    fn variable(
        &mut self,
        shell: &mut Shell,
        name: &str,
        is_list: bool,
        change: &Change,
        is_quoted: bool,
        fields: &mut Fields,
    ) {
        let values = match name.parse::<usize>() {
            Ok(at) if at > 0 => {
                let argument = shell.get("@").and_then(|values| values.get(at - 1)).cloned();
                argument.map(|argument| vec![argument])
            }
            _ => shell.get(name).map(|values| values.to_vec()),
        };
        let is_empty = values.as_ref().is_none_or(|values| match values.as_slice() {
            [] => true,
            [Some(value)] => value.is_empty(),
            _ => false,
        });
        let mut values = values.unwrap_or_default();
        if !is_list {
            values.truncate(1);
        }
        match change {
            Change::None => {}
            Change::Default { word, is_assigned } => {
                if is_empty {
                    if *is_assigned {
                        let value = self.value(shell, word);
                        shell.set(name, vec![value]);
                    }
                    return self.parts(shell, word, fields);
                }
            }
            Change::Alternative(word) => {
                if !is_empty {
                    self.parts(shell, word, fields);
                }
                return;
            }
            Change::Cut { pattern, is_at_end, is_longest } => {
                let pattern = self.value(shell, pattern);
                for value in &mut values {
                    // Every length is tried.
                    let len = value.as_ref().map_or(0, String::len) as u64;
                    if !self.work(len * len / 4096) {
                        return fields.unknown();
                    }
                    let known = value.take().zip(pattern.as_ref());
                    *value = known.and_then(|(value, pattern)| pattern::cut(&value, pattern, *is_at_end, *is_longest));
                }
            }
            Change::Slice { offset, len } => {
                let len = len.unwrap_or(usize::MAX);
                if is_list {
                    // The first of the arguments has the number one.
                    let skipped = if name == "@" { offset.saturating_sub(1) } else { *offset };
                    values = values.into_iter().skip(skipped).take(len).collect();
                } else {
                    let cut = |value: String| value.chars().skip(*offset).take(len).collect();
                    values = values.into_iter().map(|value| value.map(cut)).collect();
                }
            }
            Change::Count => {
                let count = if is_list { Some(values.len()) } else { None };
                let len = || values.first().map_or(Some(0), |value| Some(value.as_ref()?.chars().count()));
                return match count.or_else(len) {
                    Some(count) => fields.push(&count.to_string()),
                    None => fields.unknown(),
                };
            }
            Change::Unknown => return fields.unknown(),
        }
        if is_quoted && !is_list {
            fields.is_field = true;
        }
        for (at, value) in values.into_iter().enumerate() {
            if at > 0 {
                fields.end();
            }
            match value {
                Some(value) if is_quoted => fields.push(&value),
                Some(value) => fields.split(&value),
                None => fields.unknown(),
            }
        }
    }

    /// The files that a pattern means, in order.
    fn files_of(&mut self, shell: &Shell, pattern: &str) -> Vec<String> {
        let mut found = vec![if pattern.starts_with('/') { String::new() } else { shell.working_dir.clone() }];
        for part in pattern.split('/').filter(|part| !part.is_empty()) {
            let mut next = Vec::new();
            for folder in found {
                if !pattern::is_pattern(part) {
                    next.push(format!("{folder}/{part}"));
                    continue;
                }
                let names = self.files.names(&folder);
                if !self.work(names.len() as u64 / 16) {
                    return Vec::new();
                }
                let names = names.into_iter().filter(|name| !name.starts_with('.') && pattern::matches(part, name));
                next.extend(names.map(|name| format!("{folder}/{name}")));
                next.truncate(WORDS_MAX);
            }
            found = next;
        }
        found.retain(|path| self.files.regular(path).is_some() || self.files.is_folder(path));
        found
    }
}
