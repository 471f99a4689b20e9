//! containerd's filters, as far as snapshots have fields: which of them a list is to hold.
//!
//! ```text
//! filter    := selector ("," selector)*            all of them must hold
//! selector  := fieldpath (("==" | "!=" | "~=") value)?     without a value: the field is there
//! fieldpath := field ("." field)*
//! field     := quoted | [A-Za-z0-9_-]+
//! value     := quoted | anything without blanks and commas
//! quoted    := "…" with Go's escapes; after "~=" also /…/ and |…|
//! ```
//!
//! The fields are `name`, `parent`, `kind` and `labels.KEY`, whose key may have dots. Of several filters one has to
//! hold. Blanks between the parts do not count.

use hermes_store::{SnapshotKind, SnapshotRecord};
use regex::{Regex, RegexBuilder};
use thiserror::Error;

/// Most filters of one request, and most selectors of one filter.
const PARTS_MAX: usize = 64;
/// Memory that a compiled expression may take; RE2, which containerd's grammar is of, has no such patterns either.
const REGEX_MAX_BYTES: usize = 1 << 20;

/// A filter that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("filter '{filter}' cannot be read at byte {at}: {reason}")]
pub(super) struct FilterError {
    /// The filter, cut at 256 characters.
    filter: String,
    /// Where.
    at: usize,
    /// What is wrong.
    reason: String,
}

/// Several filters, of which one has to hold; none at all holds for everything.
#[derive(Debug)]
pub(super) struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    condition: Condition,
}

#[derive(Debug)]
enum Condition {
    Present,
    Equal(String),
    NotEqual(String),
    Matches(Regex),
}

impl Filters {
    /// Reads filters.
    pub(super) fn parse(filters: &[String]) -> Result<Self, FilterError> {
        if filters.len() > PARTS_MAX {
            let reason = format!("there are more than {PARTS_MAX} filters");
            return Err(FilterError { filter: String::new(), at: 0, reason });
        }
        filters.iter().map(|filter| Parser { text: filter, at: 0 }.filter()).collect::<Result<_, _>>().map(Self)
    }

    /// Whether one of them holds for `record`.
    pub(super) fn holds(&self, record: &SnapshotRecord) -> bool {
        self.0.is_empty() || self.0.iter().any(|filter| filter.iter().all(|selector| selector.holds(record)))
    }
}

impl Selector {
    fn holds(&self, record: &SnapshotRecord) -> bool {
        let value = field(record, &self.path);
        match &self.condition {
            Condition::Present => value.is_some(),
            Condition::Equal(wanted) => value.is_some_and(|value| value == wanted),
            Condition::NotEqual(wanted) => value.is_none_or(|value| value != wanted),
            Condition::Matches(expression) => value.is_some_and(|value| expression.is_match(value)),
        }
    }
}

fn field<'a>(record: &'a SnapshotRecord, path: &[String]) -> Option<&'a str> {
    let (first, rest) = path.split_first()?;
    match (first.as_str(), rest) {
        ("name", []) => Some(&record.name),
        // A snapshot without a parent has an empty one, which `parent!=""` relies on.
        ("parent", []) => Some(record.parent.as_deref().unwrap_or_default()),
        ("kind", []) => Some(match record.kind {
            SnapshotKind::View => "view",
            SnapshotKind::Active => "active",
            SnapshotKind::Committed => "committed",
        }),
        ("labels", [_, ..]) => record.labels.get(&rest.join(".")).map(String::as_str),
        _ => None,
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
}

impl Parser<'_> {
    fn wrong(&self, reason: impl Into<String>) -> FilterError {
        FilterError { filter: self.text.chars().take(256).collect(), at: self.at, reason: reason.into() }
    }

    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    fn skip_blanks(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.next();
        }
    }

    fn take_while(&mut self, wanted: impl Fn(char) -> bool) -> String {
        let start = self.at;
        while self.peek().is_some_and(&wanted) {
            self.next();
        }
        self.text[start..self.at].to_owned()
    }

    fn filter(mut self) -> Result<Vec<Selector>, FilterError> {
        let mut selectors = Vec::new();
        // An empty filter holds for everything.
        if self.text.is_empty() {
            return Ok(selectors);
        }
        loop {
            selectors.push(self.selector()?);
            if selectors.len() > PARTS_MAX {
                return Err(self.wrong(format!("it has more than {PARTS_MAX} parts")));
            }
            self.skip_blanks();
            match self.next() {
                None => return Ok(selectors),
                Some(',') => {}
                Some(_) => return Err(self.wrong("a comma or the end is expected")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let mut path = vec![self.field()?];
        while self.peek() == Some('.') {
            self.next();
            path.push(self.field()?);
        }
        self.skip_blanks();
        let operator = self.take_while(|c| matches!(c, '=' | '!' | '~'));
        let condition = match operator.as_str() {
            "" => Condition::Present,
            "==" => Condition::Equal(self.value(false)?),
            "!=" => Condition::NotEqual(self.value(false)?),
            "~=" => {
                let expression = self.value(true)?;
                let built = RegexBuilder::new(&expression).size_limit(REGEX_MAX_BYTES).build();
                Condition::Matches(built.map_err(|error| self.wrong(format!("no regular expression: {error}")))?)
            }
            other => return Err(self.wrong(format!("'{other}' is no operator; use ==, != or ~="))),
        };
        Ok(Selector { path, condition })
    }

    fn field(&mut self) -> Result<String, FilterError> {
        self.skip_blanks();
        if self.peek() == Some('"') {
            return self.quoted();
        }
        let field = self.take_while(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-');
        if field.is_empty() { Err(self.wrong("a field is expected")) } else { Ok(field) }
    }

    fn value(&mut self, expression: bool) -> Result<String, FilterError> {
        self.skip_blanks();
        match self.peek() {
            Some('"') => self.quoted(),
            Some('/' | '|') if expression => self.quoted(),
            Some('/' | '|') => Err(self.wrong("a value that begins so has to stand in double quotes")),
            _ => {
                let value = self.take_while(|c| c != ',' && !c.is_whitespace() && !c.is_control());
                if value.is_empty() { Err(self.wrong("a value is expected")) } else { Ok(value) }
            }
        }
    }

    /// A quoted text; the next character is the quote.
    fn quoted(&mut self) -> Result<String, FilterError> {
        let quote = self.next();
        let mut bytes = Vec::new();
        loop {
            match self.next() {
                None | Some('\n') => return Err(self.wrong("the quote does not end")),
                end if end == quote => break,
                Some('\\') => self.escape(quote, &mut bytes)?,
                Some(c) => bytes.extend(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        String::from_utf8(bytes).map_err(|_| self.wrong("the quoted bytes are no text"))
    }

    /// One of Go's escapes; the backslash is behind.
    fn escape(&mut self, quote: Option<char>, bytes: &mut Vec<u8>) -> Result<(), FilterError> {
        let escape = self.next();
        let byte = match escape {
            Some('a') => 0x07,
            Some('b') => 0x08,
            Some('f') => 0x0c,
            Some('n') => b'\n',
            Some('r') => b'\r',
            Some('t') => b'\t',
            Some('v') => 0x0b,
            Some('\\') => b'\\',
            Some(c) if Some(c) == quote && c.is_ascii() => c as u8,
            Some('x') => self.number(16, 2)? as u8,
            Some('0'..='7') => {
                self.at -= 1;
                u8::try_from(self.number(8, 3)?).map_err(|_| self.wrong("no such byte"))?
            }
            Some(kind @ ('u' | 'U')) => {
                let number = self.number(16, if kind == 'u' { 4 } else { 8 })?;
                let c = char::from_u32(number).ok_or_else(|| self.wrong("no such character"))?;
                bytes.extend(c.encode_utf8(&mut [0; 4]).as_bytes());
                return Ok(());
            }
            _ => return Err(self.wrong("no such escape")),
        };
        bytes.push(byte);
        Ok(())
    }

    fn number(&mut self, base: u32, digits: usize) -> Result<u32, FilterError> {
        (0..digits).try_fold(0_u32, |number, _| {
            let digit = self.next().and_then(|c| c.to_digit(base)).ok_or_else(|| self.wrong("a digit is expected"))?;
            // At most eight hexadecimal digits: 32 bits.
            Ok(number * base + digit)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use hermes_store::SnapshotUsage;
    use proptest::prelude::*;

    use super::*;

    fn record() -> SnapshotRecord {
        SnapshotRecord {
            id: 1,
            name: "default/7/sha256:ab".to_owned(),
            kind: SnapshotKind::Committed,
            parent: None,
            labels: BTreeMap::from([
                ("containerd.io/snapshot.ref".to_owned(), "sha256:ab".to_owned()),
                ("plain".to_owned(), "a,b c\"".to_owned()),
            ]),
            created_ns: 0,
            updated_ns: 0,
            usage: SnapshotUsage::default(),
            remote: None,
        }
    }

    fn holds(filters: &[&str]) -> bool {
        let filters: Vec<String> = filters.iter().map(|filter| (*filter).to_owned()).collect();
        Filters::parse(&filters).expect("a filter").holds(&record())
    }

    #[test]
    fn what_holds() {
        let cases: [&[&str]; 17] = [
            &[],
            &[""],
            &["name==default/7/sha256:ab"],
            &["name == default/7/sha256:ab , kind==committed"],
            &["name==\"default/7/sha256:ab\""],
            &["kind==active", "kind==committed"],
            &["labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent==\"\""],
            &["labels.containerd.\"io/snapshot\".ref"],
            &["labels.plain==\"a,b c\\\"\""],
            &["labels.missing!=x"],
            &["parent!=x"],
            &["name~=^default/"],
            &["name~=\"^default/[0-9]+/\""],
            &["name~=|/7/|"],
            &["name~=/sha256:a./"],
            &["name==\"default\\x2f7\\057sha256\\u003aab\""],
            &["kind~=comm.*"],
        ];
        for case in cases {
            assert!(holds(case), "{case:?}");
        }
    }

    #[test]
    fn what_does_not_hold() {
        for case in
            ["name==x", "kind==view", "labels.missing", "labels", "size==0", "parent~=.", "name!=default/7/sha256:ab"]
        {
            assert!(!holds(&[case]), "{case}");
        }
        assert!(!holds(&["kind==committed,name==x"]));
    }

    #[test]
    fn what_cannot_be_read() {
        for case in [
            "==x",
            "name=x",
            "name==",
            "name===x",
            "name~=(",
            "name==\"x",
            "name==/x/",
            "name==x,",
            ",",
            "name==\"\\q\"",
            "a.",
            "name x",
        ] {
            assert!(Filters::parse(&[case.to_owned()]).is_err(), "{case}");
        }
        assert!(Filters::parse(&vec![String::new(); PARTS_MAX + 1]).is_err());
    }

    proptest! {
        #[test]
        fn nothing_panics(filter in "[ -~\\n\u{e4}]{0,40}") {
            if let Ok(filters) = Filters::parse(&[filter]) {
                filters.holds(&record());
            }
        }

        #[test]
        fn a_quoted_value_is_read_back(value in "[ -~\u{e4}]{0,20}") {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let filters = Filters::parse(&[format!("name==\"{quoted}\"")]).expect("a filter");
            let named = SnapshotRecord { name: value, ..record() };
            prop_assert!(filters.holds(&named));
        }
    }
}
