//! Words: quotes, variables and substitutions, up to where the word ends.

use super::{Change, Parser, Part, Word, is_name};

/// Where a word ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// At white space and operators.
    Word,
    /// At white space: within `[[ ]]`.
    Test,
    /// At the second quote.
    Quote,
    /// At the closing brace, within quotes or not.
    Brace { is_quoted: bool },
}

impl Parser<'_> {
    /// A word of at least one character.
    pub(super) fn word(&mut self, end: End) -> Option<Word> {
        let begin = self.at;
        let word = self.word_or_nothing(end)?;
        (self.at > begin).then_some(word)
    }

    pub(super) fn word_or_nothing(&mut self, end: End) -> Option<Word> {
        self.nested(|parser| parser.parts(end))
    }

    pub(super) fn parts(&mut self, end: End) -> Option<Word> {
        let is_quoted = matches!(end, End::Quote | End::Brace { is_quoted: true });
        let (mut parts, mut text) = (Word::new(), String::new());
        loop {
            let next = self.peek();
            let is_end = match (end, next) {
                (End::Word, Some(next)) => next.is_ascii_whitespace() || ";&|()<>".contains(next),
                (End::Test, Some(next)) => next.is_ascii_whitespace(),
                (End::Quote, Some(next)) => next == '"',
                (End::Brace { .. }, Some(next)) => next == '}',
                (End::Word | End::Test, None) => true,
                (End::Quote | End::Brace { .. }, None) => return None,
            };
            let process = end == End::Word && parts.is_empty() && text.is_empty();
            if process && (self.eat("<(") || self.eat(">(")) {
                parts.push(Part::Process(self.parenthesized()?));
                continue;
            }
            if is_end {
                flush(&mut parts, &mut text, is_quoted);
                return Some(parts);
            }
            match next? {
                '\\' => {
                    self.next();
                    match self.next() {
                        Some('\n') | None => {}
                        Some(escaped) if end == End::Quote && !"$`\"\\".contains(escaped) => {
                            text.extend(['\\', escaped]);
                        }
                        Some(escaped) => {
                            flush(&mut parts, &mut text, is_quoted);
                            parts.push(Part::Text { text: escaped.to_string(), is_quoted: true });
                        }
                    }
                }
                '\'' if !is_quoted => {
                    self.next();
                    flush(&mut parts, &mut text, false);
                    let quoted = self.take_while(|character| character != '\'');
                    self.eat("'").then_some(())?;
                    parts.push(Part::Text { text: quoted, is_quoted: true });
                }
                '"' => {
                    self.next();
                    flush(&mut parts, &mut text, is_quoted);
                    let inner = self.nested(|parser| parser.parts(End::Quote))?;
                    self.eat("\"").then_some(())?;
                    if inner.is_empty() {
                        parts.push(Part::Text { text: String::new(), is_quoted: true });
                    }
                    parts.extend(inner);
                }
                '`' => {
                    self.next();
                    flush(&mut parts, &mut text, is_quoted);
                    let script = self.backquoted()?;
                    parts.push(Part::Output { script, is_quoted });
                }
                '$' => {
                    self.next();
                    flush(&mut parts, &mut text, is_quoted);
                    let part = self.dollar(is_quoted)?;
                    parts.push(part);
                }
                other => {
                    self.next();
                    text.push(other);
                }
            }
        }
    }

    fn backquoted(&mut self) -> Option<String> {
        let mut script = String::new();
        loop {
            match self.next()? {
                '`' => return Some(script),
                '\\' => match self.next()? {
                    escaped @ ('`' | '\\' | '$') => script.push(escaped),
                    other => script.extend(['\\', other]),
                },
                other => script.push(other),
            }
        }
    }

    /// The text up to the parenthesis that closes, which is taken; the opening one was.
    fn parenthesized(&mut self) -> Option<String> {
        let begin = self.at;
        let (mut depth, mut quotes) = (1_u32, Vec::new());
        loop {
            match (quotes.last(), self.next()?) {
                (Some('\''), '\'') | (Some('"'), '"') => {
                    quotes.pop();
                }
                (Some('\''), _) => {}
                (_, '\\') => {
                    self.next();
                }
                // A quote within a substitution within quotes is its own.
                (_, '$') if self.peek() == Some('(') => {
                    self.next();
                    quotes.push('(');
                }
                (Some('('), ')') => {
                    quotes.pop();
                }
                (None | Some('('), quote @ ('"' | '\'')) => quotes.push(quote),
                (None, '(') => depth += 1,
                (None, ')') => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                return Some(self.text[begin..self.at - 1].to_owned());
            }
        }
    }

    /// What follows a dollar sign.
    fn dollar(&mut self, is_quoted: bool) -> Option<Part> {
        let variable = |name: String, is_list, change| Part::Variable { name, is_list, change, is_quoted };
        let next = self.peek();
        match next {
            Some('(') => {
                self.next();
                let script = self.parenthesized()?;
                Some(match script.starts_with('(') && script.ends_with(')') {
                    true => Part::Unknown,
                    false => Part::Output { script, is_quoted },
                })
            }
            Some('{') => {
                self.next();
                let part = self.nested(|parser| parser.braced(is_quoted))?;
                self.eat("}").then_some(part)
            }
            Some('\'') if !is_quoted => {
                self.next();
                let text = self.take_while(|character| character != '\'');
                self.eat("'").then_some(Part::Text { text, is_quoted: true })
            }
            Some('"') if !is_quoted => Some(Part::Text { text: String::new(), is_quoted: true }),
            Some('@' | '*') => {
                self.next();
                Some(variable("@".to_owned(), true, Change::None))
            }
            Some('#') => {
                self.next();
                Some(variable("@".to_owned(), true, Change::Count))
            }
            Some('?' | '$' | '!' | '-') => {
                self.next();
                Some(Part::Unknown)
            }
            Some(digit) if digit.is_ascii_digit() => {
                self.next();
                Some(variable(digit.to_string(), false, Change::None))
            }
            Some(character) if is_name(character) => {
                let name = self.take_while(is_name);
                Some(variable(name, false, Change::None))
            }
            _ => Some(Part::Text { text: "$".to_owned(), is_quoted }),
        }
    }

    /// What follows `${`, up to the brace that closes it, which stays.
    fn braced(&mut self, is_quoted: bool) -> Option<Part> {
        let is_count = self.rest().starts_with('#') && !self.rest().starts_with("#}");
        if is_count {
            self.next();
        }
        let mut name = self.take_while(is_name);
        if name.is_empty() {
            name = match self.next()? {
                '@' | '*' => "@".to_owned(),
                '#' => {
                    return Some(Part::Variable { name: "@".into(), is_list: true, change: Change::Count, is_quoted });
                }
                _ => return self.unknown(is_quoted),
            };
        }
        let mut is_list = name == "@";
        if self.eat("[@]") || self.eat("[*]") {
            is_list = true;
        } else if self.rest().starts_with('[') && !self.eat("[0]") {
            return self.unknown(is_quoted);
        }
        if is_count {
            return match self.peek() == Some('}') {
                true => Some(Part::Variable { name, is_list, change: Change::Count, is_quoted }),
                false => self.unknown(is_quoted),
            };
        }
        let end = End::Brace { is_quoted };
        let change = if self.peek() == Some('}') {
            Change::None
        } else if self.eat(":-") || self.eat("-") {
            Change::Default { word: self.parts(end)?, is_assigned: false }
        } else if self.eat(":=") || self.eat("=") {
            Change::Default { word: self.parts(end)?, is_assigned: true }
        } else if self.eat(":+") || self.eat("+") {
            Change::Alternative(self.parts(end)?)
        } else if self.eat(":?") || self.eat("?") {
            self.parts(end)?;
            Change::None
        } else if let Some((is_at_end, is_longest)) = self.cut() {
            // Quotes are quotes in patterns, whatever is around the braces.
            Change::Cut { pattern: self.parts(End::Brace { is_quoted: false })?, is_at_end, is_longest }
        } else if self.eat(":") {
            self.slice()?
        } else {
            return self.unknown(is_quoted);
        };
        Some(Part::Variable { name, is_list, change, is_quoted })
    }

    fn cut(&mut self) -> Option<(bool, bool)> {
        let known = [("##", (false, true)), ("#", (false, false)), ("%%", (true, true)), ("%", (true, false))];
        known.into_iter().find(|(operator, _)| self.eat(operator)).map(|(_, meaning)| meaning)
    }

    fn slice(&mut self) -> Option<Change> {
        let inner = self.parts(End::Brace { is_quoted: false })?;
        let [Part::Text { text, .. }] = inner.as_slice() else { return Some(Change::Unknown) };
        let (offset, len) = text.split_once(':').map_or((text.as_str(), None), |(offset, len)| (offset, Some(len)));
        let len = len.map(|len| len.trim().parse());
        Some(match (offset.trim().parse(), len) {
            (Ok(offset), None) => Change::Slice { offset, len: None },
            (Ok(offset), Some(Ok(len))) => Change::Slice { offset, len: Some(len) },
            _ => Change::Unknown,
        })
    }

    /// What is not understood within braces.
    fn unknown(&mut self, is_quoted: bool) -> Option<Part> {
        self.parts(End::Brace { is_quoted })?;
        Some(Part::Unknown)
    }
}

fn flush(parts: &mut Word, text: &mut String, is_quoted: bool) {
    if !text.is_empty() {
        parts.push(Part::Text { text: std::mem::take(text), is_quoted });
    }
}
