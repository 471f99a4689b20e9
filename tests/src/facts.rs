//! What a program found on two sides: lines of the form `fact: answer`, compared one by one.

use anyhow::{Result, bail, ensure};

/// Longest answer in the table, in characters; both are printed whole where they differ.
const SHOWN_MAX: usize = 60;

/// The facts of several programs, found on both sides.
#[derive(Debug, Default)]
pub struct Comparison {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    place: String,
    fact: String,
    theirs: String,
    ours: String,
}

impl Comparison {
    /// Takes what a program printed on either side. `place` says where and what it was.
    ///
    /// # Errors
    /// When one side has found other facts than the other, or nothing.
    pub fn add(&mut self, place: &str, theirs: &str, ours: &str) -> Result<()> {
        let facts = |text: &str| {
            let lines = text.lines().filter_map(|line| line.split_once(": "));
            lines.map(|(fact, answer)| (fact.to_owned(), answer.trim_end().to_owned())).collect::<Vec<_>>()
        };
        let (theirs_found, ours_found) = (facts(theirs), facts(ours));
        let names = |found: &[(String, String)]| found.iter().map(|(fact, _)| fact.clone()).collect::<Vec<_>>();
        ensure!(!ours_found.is_empty(), "{place}: nothing was found: {ours}");
        ensure!(
            names(&theirs_found) == names(&ours_found),
            "{place}: other facts were found\n--- expected\n{theirs}\n--- found\n{ours}"
        );
        self.rows.extend(theirs_found.into_iter().zip(ours_found).map(|((fact, theirs), (_, ours))| Row {
            place: place.to_owned(),
            fact,
            theirs,
            ours,
        }));
        Ok(())
    }

    /// Prints every fact, and says which differ. Those of `excepted` must differ: a documented difference that is none
    /// any more is to be taken out of the documents.
    ///
    /// # Errors
    /// With the facts that differ and should not, and those that should and do not.
    pub fn finish(self, excepted: &[&str]) -> Result<()> {
        let mut wrong = Vec::new();
        for Row { place, fact, theirs, ours } in &self.rows {
            let same = theirs == ours;
            let shown: String = ours.chars().take(SHOWN_MAX).collect();
            println!("{place:<28} {fact:<46} {} {shown}", if same { "same" } else { "DIFFERS" });
            if same == excepted.contains(&fact.as_str()) {
                wrong.push(format!("{place}: {fact}\n  expected {theirs}\n  found    {ours}"));
            }
        }
        println!("{} facts were compared", self.rows.len());
        if wrong.is_empty() {
            Ok(())
        } else {
            bail!("{} facts are not as they should be:\n{}", wrong.len(), wrong.join("\n"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compared(theirs: &str, ours: &str, excepted: &[&str]) -> Result<()> {
        let mut comparison = Comparison::default();
        comparison.add("here", theirs, ours)?;
        comparison.finish(excepted)
    }

    #[test]
    fn differences_are_found_and_exceptions_must_differ() {
        assert!(compared("a: 1\nb: 2\n", "a: 1\nb: 2 \n", &[]).is_ok());
        assert!(compared("a: 1\nb: 2\n", "a: 1\nb: 3\n", &[]).is_err());
        assert!(compared("a: 1\nb: 2\n", "a: 1\nb: 3\n", &["b"]).is_ok());
        assert!(compared("a: 1\n", "a: 1\n", &["a"]).is_err(), "no difference any more");
        assert!(compared("a: 1\n", "a: 1\nb: 2\n", &[]).is_err(), "another fact");
        assert!(compared("", "", &[]).is_err(), "nothing");
    }
}
