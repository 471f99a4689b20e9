//! Patterns of the shell: `*`, `?`, `[...]`.

/// Longest text of which a part is cut by a pattern, in bytes: every length is tried.
const CUT_MAX_BYTES: usize = 256;

/// Whether all of `text` is what `pattern` says.
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut at, mut place) = (0, 0);
    // Where the last star is, and what it has taken so far.
    let mut star: Option<(usize, usize)> = None;
    while place < text.len() {
        let next = match pattern.get(at) {
            Some('*') => {
                star = Some((at, place));
                at += 1;
                continue;
            }
            Some('?') => Some(at + 1),
            Some('[') => class(&pattern[at..], text[place]).map(|len| at + len),
            Some(character) if *character == text[place] => Some(at + 1),
            _ => None,
        };
        match (next, star) {
            (Some(next), _) => (at, place) = (next, place + 1),
            (None, Some((star_at, taken))) => {
                star = Some((star_at, taken + 1));
                (at, place) = (star_at + 1, taken + 1);
            }
            (None, None) => return false,
        }
    }
    pattern[at..].iter().all(|character| *character == '*')
}

/// The length of the class that `pattern` begins with, if `character` is in it.
fn class(pattern: &[char], character: char) -> Option<usize> {
    let is_negated = matches!(pattern.get(1), Some('!' | '^'));
    let begin = 1 + usize::from(is_negated);
    // A bracket that comes first is one of the class.
    let end = begin + 1 + pattern.get(begin + 1..)?.iter().position(|it| *it == ']')?;
    let members = &pattern[begin..end];
    let is_range = |range: &[char]| range[1] == '-' && (range[0]..=range[2]).contains(&character);
    let is_in = members.contains(&character) || members.windows(3).any(is_range);
    (is_in != is_negated).then_some(end + 1)
}

/// `text` without what `pattern` means at its start or end; `None` when it is too long to say.
pub(super) fn cut(text: &str, pattern: &str, is_at_end: bool, is_longest: bool) -> Option<String> {
    (text.len() <= CUT_MAX_BYTES && pattern.len() <= CUT_MAX_BYTES).then_some(())?;
    let mut places: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
    // The shortest part first, unless the longest is wanted.
    if is_at_end != is_longest {
        places.reverse();
    }
    let place = places.into_iter().find(|place| {
        let (start, end) = text.split_at(*place);
        matches(pattern, if is_at_end { end } else { start })
    });
    Some(match place {
        Some(place) if is_at_end => text[..place].to_owned(),
        Some(place) => text[place..].to_owned(),
        None => text.to_owned(),
    })
}

/// Whether a word has a pattern in it.
pub(super) fn is_pattern(word: &str) -> bool {
    word.contains(['*', '?', '['])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_in_the_shell() {
        for (pattern, text) in
            [("*", ""), ("*.sh", "a.sh"), ("a?c", "abc"), ("[a-c]x", "bx"), ("[!a]*", "b"), ("*a*b", "xaab")]
        {
            assert!(matches(pattern, text), "{pattern} {text}");
        }
        for (pattern, text) in [("*.sh", "a.s"), ("?", ""), ("[a-c]", "d"), ("[!a]", "a"), ("[", "a"), ("-*", "a-")] {
            assert!(!matches(pattern, text), "{pattern} {text}");
        }
    }

    #[test]
    fn parts_are_cut() {
        let cut = |text, pattern, is_at_end, is_longest| cut(text, pattern, is_at_end, is_longest).expect("short");
        assert_eq!(cut("/a/b/c", "*/", false, true), "c");
        assert_eq!(cut("/a/b/c", "*/", false, false), "a/b/c");
        assert_eq!(cut("/a/b/c", "/*", true, false), "/a/b");
        assert_eq!(cut("/a/b/c", "/*", true, true), "");
        assert_eq!(cut("-x", "-", false, false), "x");
        assert_eq!(cut("abc", "x", true, true), "abc");
    }
}
