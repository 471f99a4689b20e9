//! `test`, `[ ]` and `[[ ]]`, as far as strings and the image's files decide them.

use super::pattern;
use super::{Field, Guesser, Shell, Status};

impl<B: AsRef<[u8]>> Guesser<'_, '_, B> {
    /// Whether a condition holds.
    pub(super) fn test(&mut self, shell: &mut Shell, words: &[Field]) -> Status {
        // `or` binds least. What has two or three words has no operator between conditions.
        let is = |word: &Field, operators: [&str; 2]| word.as_deref().is_some_and(|word| operators.contains(&word));
        if words.len() > 3 {
            for (operators, decisive) in [(["||", "-o"], true), (["&&", "-a"], false)] {
                let Some(at) = words.iter().position(|word| is(word, operators)) else { continue };
                let (left, right) = (self.test(shell, &words[..at]), self.deep_test(shell, &words[at + 1..]));
                return match (left, right) {
                    (Some(left), _) if left == decisive => Some(decisive),
                    (_, Some(right)) if right == decisive => Some(decisive),
                    (Some(_), Some(_)) => Some(!decisive),
                    _ => None,
                };
            }
        }
        match words {
            [] => Some(false),
            [word] => Some(!word.as_ref()?.is_empty()),
            [not, rest @ ..] if not.as_deref() == Some("!") => self.deep_test(shell, rest).map(|holds| !holds),
            [operator, word] => self.test_one(shell, operator.as_deref()?, word.as_deref()?),
            [left, operator, right] => self.test_two(left.as_deref()?, operator.as_deref()?, right.as_deref()?),
            _ => None,
        }
    }

    fn deep_test(&mut self, shell: &mut Shell, words: &[Field]) -> Status {
        if !self.work(words.len() as u64) {
            return None;
        }
        self.deeper(shell, |guesser, shell| guesser.test(shell, words))
    }

    fn test_one(&self, shell: &Shell, operator: &str, word: &str) -> Status {
        let path = shell.absolute(word);
        let file = self.files.regular(&path).filter(|_| !word.is_empty());
        let is_folder = || !word.is_empty() && self.files.is_folder(&path);
        Some(match operator {
            "-n" => !word.is_empty(),
            "-z" => word.is_empty(),
            "-f" => file.is_some(),
            "-d" => is_folder(),
            "-e" | "-a" | "-x" | "-r" => file.is_some() || is_folder(),
            "-s" => file.is_some_and(|file| file.size_bytes > 0) || is_folder(),
            "-v" => shell.get(word).is_some(),
            _ => return None,
        })
    }

    fn test_two(&mut self, left: &str, operator: &str, right: &str) -> Status {
        if !self.work((left.len() * right.len()) as u64 / 4096) {
            return None;
        }
        let numbers = || left.trim().parse::<i64>().ok().zip(right.trim().parse::<i64>().ok());
        Some(match operator {
            "=" | "==" => left == right || pattern::matches(right, left),
            "!=" => left != right && !pattern::matches(right, left),
            "-eq" => numbers().map(|(left, right)| left == right)?,
            "-ne" => numbers().map(|(left, right)| left != right)?,
            "-lt" => numbers().map(|(left, right)| left < right)?,
            "-le" => numbers().map(|(left, right)| left <= right)?,
            "-gt" => numbers().map(|(left, right)| left > right)?,
            "-ge" => numbers().map(|(left, right)| left >= right)?,
            _ => return None,
        })
    }
}
