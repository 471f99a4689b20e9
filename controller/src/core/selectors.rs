//! The regular expressions of a policy, which anybody may write.
//!
//! They are Rust's: no backtracking, so matching takes time in proportion to the name, whatever the expression. What an
//! expression may cost is bounded before and while it is compiled.

use regex::{Regex, RegexBuilder};

use crate::crd::ImageSelector;

/// Selectors of one policy that are looked at.
const SELECTORS_MAX: usize = 256;
/// Longest expression, in bytes: longer than a list of 200 names with their hosts.
const TEXT_LEN_MAX_BYTES: usize = 16 * 1024;
/// Bytes that a compiled expression may take, and as many that matching may keep: a tenth of the library's own default.
const COMPILED_LEN_MAX_BYTES: usize = 1 << 20;
/// Groups that may lie in each other.
const NEST_MAX: u32 = 64;
/// Characters of an expression that are shown in a message.
const SHOWN_CHARACTERS: usize = 60;

/// The selectors of a policy that could be compiled.
#[derive(Debug, Default)]
pub(super) struct Selectors {
    expressions: Vec<Regex>,
    /// What is wrong with the others: place, position and reason.
    pub(super) problems: Vec<String>,
}

impl Selectors {
    pub(super) fn compile(selectors: &[ImageSelector]) -> Self {
        let mut compiled = Self::default();
        for (number, selector) in selectors.iter().take(SELECTORS_MAX).enumerate() {
            match compile(&selector.image_regex) {
                Ok(expression) => compiled.expressions.push(expression),
                Err(reason) => compiled.problems.push(format!("imageSelectors[{number}].imageRegex {reason}")),
            }
        }
        if selectors.len() > SELECTORS_MAX {
            let count = selectors.len();
            compiled
                .problems
                .push(format!("there are {count} imageSelectors, of which the first {SELECTORS_MAX} are used"));
        }
        compiled
    }

    /// Whether one of them matches anywhere in `text`, as it is written.
    pub(super) fn match_text(&self, text: &str) -> bool {
        self.expressions.iter().any(|expression| expression.is_match(text))
    }
}

fn compile(text: &str) -> Result<Regex, String> {
    if text.len() > TEXT_LEN_MAX_BYTES {
        return Err(format!("has {} bytes, more than the {TEXT_LEN_MAX_BYTES} allowed", text.len()));
    }
    let mut builder = RegexBuilder::new(text);
    builder.size_limit(COMPILED_LEN_MAX_BYTES).dfa_size_limit(COMPILED_LEN_MAX_BYTES).nest_limit(NEST_MAX);
    builder.build().map_err(|error| match error {
        regex::Error::CompiledTooBig(limit) => {
            format!("('{}') takes more than {limit} bytes when compiled; write fewer repetitions", shown(text))
        }
        _ => describe(text),
    })
}

/// Where an expression is wrong, and why.
fn describe(text: &str) -> String {
    let mut parser = regex_syntax::ParserBuilder::new();
    let parsed = parser.nest_limit(NEST_MAX).build().parse(text);
    let (position, reason) = match parsed {
        Err(regex_syntax::Error::Parse(error)) => (error.span().start.offset, error.kind().to_string()),
        Err(regex_syntax::Error::Translate(error)) => (error.span().start.offset, error.kind().to_string()),
        _ => return format!("('{}') cannot be compiled", shown(text)),
    };
    // People count characters, from one.
    let position = text.get(..position).map_or(position, |before| before.chars().count()) + 1;
    format!("('{}') is wrong at character {position}: {reason}", shown(text))
}

fn shown(text: &str) -> String {
    let shown: String = text.chars().filter(|c| !c.is_control()).take(SHOWN_CHARACTERS).collect();
    if text.chars().count() > SHOWN_CHARACTERS { shown + "..." } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(texts: &[&str]) -> Selectors {
        let selector = |text: &&str| ImageSelector { image_regex: (*text).to_owned() };
        Selectors::compile(&texts.iter().map(selector).collect::<Vec<_>>())
    }

    #[test]
    fn expressions_are_looked_for_anywhere() {
        let selectors = of(&["vllm", "^nginx(:|$)"]);
        assert!(selectors.problems.is_empty());
        for (text, expected) in [("docker.io/vllm/vllm-openai:v1", true), ("nginx", true), ("docker.io/nginx", false)] {
            assert_eq!(selectors.match_text(text), expected, "{text}");
        }
        assert!(!of(&[]).match_text("anything"), "none matches nothing");
        assert!(of(&[""]).match_text("anything"), "an empty expression is found everywhere");
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place_and_the_others_stay_in_use() {
        let selectors = of(&["redis", "a(b", "é[z-a]"]);
        assert!(selectors.match_text("redis:7"));
        let [first, second] = selectors.problems.as_slice() else { panic!("{:?}", selectors.problems) };
        assert!(
            first.starts_with("imageSelectors[1].imageRegex ('a(b') is wrong at character 2: unclosed group"),
            "{first}"
        );
        assert!(second.contains("character 3"), "{second}");
    }

    #[test]
    fn what_would_cost_too_much_is_refused() {
        let (long, nested) = ("a".repeat(1 << 20), "(".repeat(10_000) + &")".repeat(10_000));
        let cases: [(&str, &str); 4] = [
            (&long, "more than the"),
            (&nested, "more than the"),
            (r"(((a{1000}){1000}){1000}){1000}", "when compiled"),
            (&"(".repeat(200), "character"),
        ];
        for (text, expected) in cases {
            let selectors = of(&[text]);
            assert!(selectors.problems[0].contains(expected), "{}", selectors.problems[0]);
            assert!(selectors.problems[0].len() < 300);
        }
    }
}
