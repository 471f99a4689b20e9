//! Shell scripts: what they run, and the files that they read.
//!
//! Nothing is run. The script's tree ([`syntax`]) is walked as a shell walks it: assignments, functions, files that are
//! sourced, tests of strings and files, the output of commands that only work on paths. A value that only running would
//! tell is unknown, and so is every word with it; a condition that is unknown takes all branches, of which an earlier one's
//! assignments win. What stands where a command stands is looked for along `PATH`, and goes with the exported environment
//! into the queue of commands. What a script does not set and the image's configuration neither is empty, as it is in a
//! container that is started by that configuration alone.

mod commands;
mod expand;
mod pattern;
mod syntax;
mod test;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use self::commands::declares;
use self::syntax::{Assignment, Join, List, Simple, Statement, Step, Word};
use super::{Environment, Guesser, SCRIPT_MAX_BYTES};

/// Statements and words of all scripts of one guess. Official images' scripts take some 1,000.
pub(super) const WORK_MAX: u64 = 20_000;
/// How deep statements, functions, sourced files and substitutions may be nested.
const NESTING_MAX: u32 = 48;
/// Elements of a list, words of a command, and files that a pattern means.
const WORDS_MAX: usize = 256;
/// Turns of a loop over known words.
const TURNS_MAX: usize = 64;
/// Variables of a script.
const VARIABLES_MAX: usize = 1024;
/// Longest value and longest output: a script may double a variable line by line.
const VALUE_MAX_BYTES: usize = 4 << 10;
/// Longest environment that commands take over; they get the script's own instead.
const ENVIRONMENT_MAX_BYTES: usize = 16 << 10;

/// A word after its variables are replaced; nobody knows `None`.
type Field = Option<String>;
/// Whether a command succeeds; nobody knows `None`.
type Status = Option<bool>;

/// What a shell knows while it runs a script. A copy is a subshell.
#[derive(Clone)]
struct Shell {
    /// Values, lists of one element most of them. `0` is the script, `@` its arguments.
    variables: BTreeMap<String, Rc<Vec<Field>>>,
    exported: BTreeSet<String>,
    /// Whether whatever is assigned is exported (`set -a`).
    exports_all: bool,
    functions: BTreeMap<String, Rc<Statement>>,
    environment: Rc<Environment>,
    working_dir: String,
    flow: Flow,
    /// What was printed, where somebody wants it.
    output: Option<Field>,
    nesting: u32,
    depth: u32,
}

/// What comes after a statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    Next,
    /// The end of the loop, or its next turn.
    Turn {
        is_last: bool,
    },
    Return,
    Exit,
}

impl Shell {
    fn get(&self, name: &str) -> Option<&Rc<Vec<Field>>> {
        self.variables.get(name)
    }

    fn set(&mut self, name: &str, values: Vec<Field>) {
        if self.variables.len() >= VARIABLES_MAX && !self.variables.contains_key(name) {
            return;
        }
        let values = values.into_iter().take(WORDS_MAX).map(|value| value.filter(|it| it.len() <= VALUE_MAX_BYTES));
        self.variables.insert(name.to_owned(), Rc::new(values.collect()));
        if self.exports_all {
            self.exported.insert(name.to_owned());
        }
    }

    fn script(&self) -> &str {
        self.get("0").and_then(|value| value.first()?.as_deref()).unwrap_or("sh")
    }

    fn absolute(&self, path: &str) -> String {
        if path.starts_with('/') { path.to_owned() } else { format!("{}/{path}", self.working_dir) }
    }

    /// What a command takes over, with assignments of its own.
    fn environment_with(&self, own: &[(String, String)]) -> Rc<Environment> {
        let mut of_command: Environment = (*self.environment).clone();
        for name in &self.exported {
            match self.get(name).and_then(|values| values.first()) {
                Some(Some(value)) => of_command.insert(name.clone(), value.clone()),
                Some(None) => of_command.remove(name),
                None => None,
            };
        }
        of_command.extend(own.iter().cloned());
        let len: usize = of_command.iter().map(|(name, value)| name.len() + value.len()).sum();
        if len > ENVIRONMENT_MAX_BYTES || of_command == *self.environment {
            return Rc::clone(&self.environment);
        }
        Rc::new(of_command)
    }

    /// What `self` knows where one of these two ran, of which nobody knows which: what the first one changed wins.
    fn join(&mut self, first: Self, second: Self) {
        let both_end = first.flow != Flow::Next && second.flow != Flow::Next;
        let flow = if both_end { first.flow } else { self.flow };
        let before = std::mem::take(&mut self.variables);
        let is_changed = |name: &String, value: &Rc<Vec<Field>>| {
            before.get(name).is_none_or(|old| !Rc::ptr_eq(old, value)) && value.iter().any(Option::is_some)
        };
        // A branch that ends leaves nothing to what follows.
        let (mut winner, other) = match first.flow == Flow::Next || both_end {
            true => (first, second),
            false => (second, first),
        };
        if other.flow == Flow::Next || both_end {
            for (name, value) in &other.variables {
                let is_taken = winner.variables.get(name).is_some_and(|value| is_changed(name, value));
                if !is_taken && is_changed(name, value) && winner.variables.len() < VARIABLES_MAX {
                    winner.variables.insert(name.clone(), Rc::clone(value));
                }
            }
            winner.exported.extend(other.exported);
            winner.functions.extend(other.functions);
        }
        *self = Self { flow, output: self.output.as_ref().map(|_| None), ..winner };
    }

    fn print(&mut self, text: Field) {
        let Some(output) = &mut self.output else { return };
        *output = match (output.take(), text) {
            (Some(so_far), Some(text)) if so_far.len() + text.len() <= VALUE_MAX_BYTES => Some(so_far + &text),
            _ => None,
        };
    }
}

impl<B: AsRef<[u8]>> Guesser<'_, '_, B> {
    /// What a shell does with its arguments.
    pub(super) fn shell(&mut self, arguments: &[String], depth: u32) {
        let environment = Rc::clone(&self.environment);
        let value = |value: &String| Rc::new(vec![Some(value.clone())]);
        let mut shell = Shell {
            variables: environment.iter().take(VARIABLES_MAX).map(|(name, it)| (name.clone(), value(it))).collect(),
            exported: environment.keys().take(VARIABLES_MAX).cloned().collect(),
            exports_all: false,
            functions: BTreeMap::new(),
            environment,
            working_dir: self.working_dir.clone(),
            flow: Flow::Next,
            output: None,
            nesting: 0,
            depth,
        };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            if argument.starts_with('-') && argument.contains('c') && !argument.starts_with("--") {
                let Some(script) = rest.next() else { return };
                shell.set("0", vec![Some(rest.next().cloned().unwrap_or_else(|| "sh".to_owned()))]);
                shell.set("@", rest.cloned().map(Some).collect());
                self.walk(&mut shell, script);
                return;
            }
            if argument.starts_with(['-', '+']) {
                continue;
            }
            // The script; what follows is for it.
            shell.set("0", vec![Some(argument.clone())]);
            shell.set("@", rest.cloned().map(Some).collect());
            let path = self.absolute(argument);
            self.script_file(&mut shell, &path, "the shell runs it");
            return;
        }
    }

    /// A file of statements.
    fn script_file(&mut self, shell: &mut Shell, path: &str, reason: &str) {
        let Some(file) = self.files.regular(path) else { return };
        if shell.depth > self.limits.depth {
            self.guess.is_cut = true;
            return;
        }
        self.add(path, reason);
        let Some(text) = self.files.text(&file, SCRIPT_MAX_BYTES) else { return };
        let outer = shell.get("BASH_SOURCE").cloned();
        shell.set("BASH_SOURCE", vec![Some(path.to_owned())]);
        self.walk(shell, &text);
        if let Some(outer) = outer {
            shell.variables.insert("BASH_SOURCE".to_owned(), outer);
        }
    }

    fn walk(&mut self, shell: &mut Shell, text: &str) -> Status {
        if !self.work(text.len() as u64 / 256) {
            return None;
        }
        self.deeper(shell, |guesser, shell| guesser.list(shell, &syntax::parse(text)))
    }

    /// Whether so much more may be done.
    fn work(&mut self, amount: u64) -> bool {
        self.work_left = self.work_left.saturating_sub(amount + 1);
        if self.work_left == 0 || self.is_full() {
            self.guess.is_cut = true;
            return false;
        }
        true
    }

    /// One level deeper.
    fn deeper(&mut self, shell: &mut Shell, walk: impl FnOnce(&mut Self, &mut Shell) -> Status) -> Status {
        if shell.nesting >= NESTING_MAX {
            self.guess.is_cut = true;
            return None;
        }
        shell.nesting += 1;
        let status = walk(self, shell);
        shell.nesting -= 1;
        status
    }

    fn list(&mut self, shell: &mut Shell, list: &[Step]) -> Status {
        let mut status = Some(true);
        for step in list {
            if shell.flow != Flow::Next {
                break;
            }
            let is_skipped = match step.join {
                Join::Always => false,
                Join::IfTrue => status == Some(false),
                Join::IfFalse => status == Some(true),
            };
            if is_skipped {
                continue;
            }
            if step.join != Join::Always && status.is_none() {
                // Whether it runs is unknown, and so is how the whole ends.
                let mut taken = shell.clone();
                self.pipeline(&mut taken, step);
                let untaken = shell.clone();
                shell.join(taken, untaken);
                continue;
            }
            status = self.pipeline(shell, step);
        }
        status
    }

    fn pipeline(&mut self, shell: &mut Shell, step: &Step) -> Status {
        let status = match step.pipeline.as_slice() {
            [statement] => self.statement(shell, statement),
            all => {
                for statement in all {
                    let mut part = Shell { output: None, ..shell.clone() };
                    self.statement(&mut part, statement);
                }
                shell.print(None);
                None
            }
        };
        status.map(|status| status != step.is_negated)
    }

    fn statement(&mut self, shell: &mut Shell, statement: &Statement) -> Status {
        if !self.work(0) {
            return None;
        }
        self.deeper(shell, |guesser, shell| match statement {
            Statement::Simple(simple) => guesser.simple(shell, simple),
            Statement::If { arms, otherwise } => guesser.conditional(shell, arms, otherwise),
            Statement::Loop { condition, body } => {
                guesser.list(shell, condition);
                guesser.perhaps(shell, body);
                None
            }
            Statement::For { name, words, body } => guesser.iteration(shell, name, words.as_deref(), body),
            Statement::Case { word, arms } => guesser.case(shell, word, arms),
            Statement::Group(list) => guesser.list(shell, list),
            Statement::Subshell(list) => {
                let mut inner = shell.clone();
                let status = guesser.list(&mut inner, list);
                shell.output = inner.output;
                status
            }
            Statement::Function { name, body } => {
                if shell.functions.len() < VARIABLES_MAX {
                    shell.functions.insert(name.clone(), Rc::clone(body));
                }
                Some(true)
            }
            Statement::Test(words) => {
                let words: Vec<Field> = words.iter().map(|word| guesser.value(shell, word)).collect();
                guesser.test(shell, &words)
            }
            Statement::Arithmetic => None,
            Statement::Redirected { statement, inputs } => {
                guesser.inputs(shell, inputs);
                guesser.statement(shell, statement)
            }
        })
    }

    /// What is run once or not at all.
    fn perhaps(&mut self, shell: &mut Shell, list: &List) {
        let mut taken = shell.clone();
        self.list(&mut taken, list);
        taken.flow = Flow::Next;
        let untaken = shell.clone();
        shell.join(taken, untaken);
    }

    fn conditional(&mut self, shell: &mut Shell, arms: &[(List, List)], otherwise: &List) -> Status {
        let Some(((condition, body), rest)) = arms.split_first() else { return self.list(shell, otherwise) };
        match self.list(shell, condition) {
            Some(true) => self.list(shell, body),
            Some(false) => self.conditional(shell, rest, otherwise),
            None => {
                let mut taken = shell.clone();
                self.list(&mut taken, body);
                let mut untaken = shell.clone();
                self.conditional(&mut untaken, rest, otherwise);
                shell.join(taken, untaken);
                None
            }
        }
    }

    fn iteration(&mut self, shell: &mut Shell, name: &str, words: Option<&[Word]>, body: &List) -> Status {
        let values = match words {
            Some(words) => self.fields(shell, words),
            None => shell.get("@").map(|values| values.to_vec()).unwrap_or_default(),
        };
        for value in values.into_iter().take(TURNS_MAX) {
            let is_known = value.is_some();
            shell.set(name, vec![value]);
            if is_known {
                self.list(shell, body);
            } else {
                self.perhaps(shell, body);
            }
            match shell.flow {
                Flow::Next => {}
                Flow::Turn { is_last } => {
                    shell.flow = Flow::Next;
                    if is_last {
                        break;
                    }
                }
                Flow::Return | Flow::Exit => break,
            }
        }
        None
    }

    fn case(&mut self, shell: &mut Shell, word: &Word, arms: &[(Vec<Word>, List)]) -> Status {
        let value = self.value(shell, word);
        for (patterns, body) in arms {
            let is_match = |pattern: Field| Some(pattern::matches(&pattern?, value.as_deref()?));
            let mut status = Some(false);
            for pattern in patterns {
                let pattern = self.value(shell, pattern);
                if !self.work(pattern.as_ref().map_or(0, |pattern| pattern.len() as u64 / 64)) {
                    return None;
                }
                status = match (status, is_match(pattern)) {
                    (Some(true), _) | (_, Some(true)) => Some(true),
                    (Some(false), Some(false)) => Some(false),
                    _ => None,
                };
            }
            match status {
                Some(true) => return self.list(shell, body),
                Some(false) => {}
                None => self.perhaps(shell, body),
            }
        }
        None
    }

    /// What is read from: files, and scripts that run beside.
    fn inputs(&mut self, shell: &mut Shell, inputs: &[Word]) {
        for input in inputs {
            if let Some(path) = self.value(shell, input) {
                self.add(&shell.absolute(&path), &format!("{} reads it", shell.script()));
            }
        }
    }

    fn assign(&mut self, shell: &mut Shell, assignment: &Assignment) -> Vec<Field> {
        let mut values = match assignment.is_list {
            true => self.fields(shell, &assignment.values),
            false => assignment.values.iter().map(|word| self.value(shell, word)).collect(),
        };
        if assignment.is_added {
            let mut so_far = shell.get(&assignment.name).map(|values| values.to_vec()).unwrap_or_default();
            match (assignment.is_list, so_far.first_mut()) {
                (true, _) => so_far.append(&mut values),
                (false, Some(first)) => {
                    *first = first.take().zip(values.pop().flatten()).map(|(first, more)| first + &more);
                }
                (false, None) => so_far = values,
            }
            values = so_far;
        }
        values
    }

    fn simple(&mut self, shell: &mut Shell, simple: &Simple) -> Status {
        self.inputs(shell, &simple.inputs);
        let is_silent = simple.is_silent && shell.output.is_some();
        let outer = if is_silent { shell.output.take() } else { None };
        let words = self.fields(shell, &simple.words);
        let mut own = Vec::new();
        for assignment in &simple.assignments {
            let values = self.assign(shell, assignment);
            if words.is_empty() || declares(&words) {
                shell.set(&assignment.name, values);
                if words.first().is_some_and(|word| word.as_deref() == Some("export")) {
                    shell.exported.insert(assignment.name.clone());
                }
            } else if let Some(Some(value)) = values.into_iter().next() {
                own.push((assignment.name.clone(), value));
            }
        }
        let status = match words.first() {
            None => Some(true),
            // Nobody knows what is run.
            Some(None) => {
                shell.print(None);
                None
            }
            Some(Some(_)) => self.command(shell, words, &own),
        };
        if is_silent {
            shell.output = outer;
        }
        status
    }
}
