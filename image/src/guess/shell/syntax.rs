//! What a shell script says, as a tree: that part of the grammar of sh and bash which start scripts are written in.
//!
//! Nothing is refused: a line that is not understood is left out, and what follows is read on. Nesting is bounded by
//! [`NESTING_MAX`], so that neither this nor what walks the tree runs out of stack.

mod words;

use std::rc::Rc;

use self::words::End;

/// How deep statements and words may be nested in one script. Those of official images reach 6.
const NESTING_MAX: u32 = 24;
/// Lines that are left out before the rest is: each may have been read up to the end of the script.
const FAILURES_MAX: u32 = 64;

/// A word before its variables are replaced.
pub(super) type Word = Vec<Part>;

/// A piece of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part {
    Text {
        text: String,
        is_quoted: bool,
    },
    Variable {
        name: String,
        /// Whether all elements are meant: `$@`, `${X[@]}`.
        is_list: bool,
        change: Change,
        is_quoted: bool,
    },
    /// What a script prints: `$(...)`.
    Output {
        script: String,
        is_quoted: bool,
    },
    /// A script that runs beside: `<(...)`.
    Process(String),
    /// What only running tells: `$((...))`.
    Unknown,
}

/// What `${NAME...}` makes of a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    None,
    /// `:-` and `:=`.
    Default {
        word: Word,
        is_assigned: bool,
    },
    /// `:+`.
    Alternative(Word),
    /// `#`, `##`, `%`, `%%`.
    Cut {
        pattern: Word,
        is_at_end: bool,
        is_longest: bool,
    },
    /// `:OFFSET:LEN`, in characters or elements.
    Slice {
        offset: usize,
        len: Option<usize>,
    },
    /// `${#NAME}`, `$#`.
    Count,
    Unknown,
}

/// What may stand where a command stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Statement {
    Simple(Simple),
    If {
        arms: Vec<(List, List)>,
        otherwise: List,
    },
    /// `while` and `until`.
    Loop {
        condition: List,
        body: List,
    },
    /// `None` goes through the arguments.
    For {
        name: String,
        words: Option<Vec<Word>>,
        body: List,
    },
    Case {
        word: Word,
        arms: Vec<(Vec<Word>, List)>,
    },
    Group(List),
    Subshell(List),
    Function {
        name: String,
        body: Rc<Statement>,
    },
    /// `[[ ... ]]`
    Test(Vec<Word>),
    /// `(( ... ))`
    Arithmetic,
    /// A compound statement with files or scripts to read from.
    Redirected {
        statement: Box<Statement>,
        inputs: Vec<Word>,
    },
}

/// Assignments, a command, and what it reads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Simple {
    pub(super) assignments: Vec<Assignment>,
    pub(super) words: Vec<Word>,
    pub(super) inputs: Vec<Word>,
    /// Whether its output goes to a file.
    pub(super) is_silent: bool,
}

/// `NAME=VALUE`, `NAME+=VALUE`, `NAME=(VALUES)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Assignment {
    pub(super) name: String,
    pub(super) values: Vec<Word>,
    pub(super) is_list: bool,
    pub(super) is_added: bool,
}

/// Statements one after another.
pub(super) type List = Vec<Step>;

/// One pipeline of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    /// How it hangs on the one before.
    pub(super) join: Join,
    pub(super) is_negated: bool,
    pub(super) pipeline: Vec<Statement>,
}

/// When a pipeline runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Join {
    Always,
    /// `&&`
    IfTrue,
    /// `||`
    IfFalse,
}

/// Commands whose arguments may be assignments.
const DECLARATIONS: [&str; 5] = ["export", "local", "readonly", "declare", "typeset"];

/// Reads a script.
pub(super) fn parse(text: &str) -> List {
    let mut parser = Parser { text, at: 0, nesting: 0, here_documents: Vec::new() };
    let mut all = List::new();
    for _ in 0..FAILURES_MAX {
        if parser.list(&[], &mut all).is_some() && parser.is_at_end() {
            break;
        }
        parser.nesting = 0;
        parser.skip_line();
    }
    all
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
    nesting: u32,
    /// Ends of here-documents that begin on the next line.
    here_documents: Vec<String>,
}

fn is_name(character: char) -> bool {
    character.is_ascii_alphanumeric() || character == '_'
}

impl<'t> Parser<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn is_at_end(&self) -> bool {
        self.at >= self.text.len()
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let character = self.peek()?;
        self.at += character.len_utf8();
        Some(character)
    }

    fn eat(&mut self, text: &str) -> bool {
        let is_next = self.rest().starts_with(text);
        if is_next {
            self.at += text.len();
        }
        is_next
    }

    fn take_while(&mut self, is_part: impl Fn(char) -> bool) -> String {
        let len = self.rest().find(|character| !is_part(character)).unwrap_or(self.rest().len());
        let taken = self.rest()[..len].to_owned();
        self.at += len;
        taken
    }

    /// Blanks, continued lines and comments.
    fn skip_blanks(&mut self) {
        loop {
            self.take_while(|character| matches!(character, ' ' | '\t' | '\r'));
            if self.eat("\\\n") {
                continue;
            }
            if self.peek() == Some('#') {
                self.take_while(|character| character != '\n');
            }
            return;
        }
    }

    fn skip_line(&mut self) {
        self.take_while(|character| character != '\n');
        self.newline();
    }

    /// The end of a line, with the here-documents that follow it.
    fn newline(&mut self) -> bool {
        if !self.eat("\n") {
            return false;
        }
        for end in std::mem::take(&mut self.here_documents) {
            while !self.is_at_end() {
                let line = self.take_while(|character| character != '\n');
                self.eat("\n");
                if line.trim_start_matches('\t') == end {
                    break;
                }
            }
        }
        true
    }

    fn skip_newlines(&mut self) {
        self.skip_blanks();
        while self.newline() {
            self.skip_blanks();
        }
    }

    /// The unquoted word that is next, which may be a reserved one.
    fn reserved(&self) -> &'t str {
        let rest = self.rest();
        let is_part = |character: char| is_name(character) || matches!(character, '!' | '{' | '}' | '[' | ']');
        let word = &rest[..rest.find(|character| !is_part(character)).unwrap_or(rest.len())];
        let ends =
            rest[word.len()..].chars().next().is_none_or(|next| next.is_whitespace() || ";&|()<>".contains(next));
        if ends { word } else { "" }
    }

    fn eat_reserved(&mut self, word: &str) -> bool {
        let is_next = self.reserved() == word;
        if is_next {
            self.at += word.len();
        }
        is_next
    }

    /// One level deeper.
    fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Option<T>) -> Option<T> {
        (self.nesting < NESTING_MAX).then_some(())?;
        self.nesting += 1;
        let parsed = parse(self);
        self.nesting -= 1;
        parsed
    }

    /// Statements up to a reserved word of `ends`, a closing parenthesis or `;;`, which stay.
    fn list(&mut self, ends: &[&str], list: &mut List) -> Option<()> {
        let mut join = Join::Always;
        loop {
            self.skip_newlines();
            let Some(next) = self.peek() else { return Some(()) };
            let rest = self.rest();
            if next == ')' || rest.starts_with(";;") || ends.contains(&self.reserved()) {
                return Some(());
            }
            if matches!(next, ';' | '&') {
                self.next();
                continue;
            }
            let step = self.pipeline(join)?;
            list.push(step);
            self.skip_blanks();
            join = if self.eat("&&") {
                Join::IfTrue
            } else if self.eat("||") {
                Join::IfFalse
            } else {
                match self.peek() {
                    None | Some(')' | '\n') => {}
                    Some(';' | '&') if !self.rest().starts_with(";;") => {
                        self.next();
                    }
                    Some(';') => {}
                    // Compound statements need nothing between them and the word that ends the list.
                    Some(_) if ends.contains(&self.reserved()) => {}
                    Some(_) => return None,
                }
                Join::Always
            };
        }
    }

    /// The list up to the reserved word `end`, which is taken.
    fn list_to(&mut self, end: &str) -> Option<List> {
        let mut list = List::new();
        self.list(&[end], &mut list)?;
        self.eat_reserved(end).then_some(list)
    }

    fn pipeline(&mut self, join: Join) -> Option<Step> {
        let mut is_negated = false;
        while self.eat_reserved("!") {
            is_negated = !is_negated;
            self.skip_blanks();
        }
        let mut pipeline = vec![self.nested(Self::command)?];
        loop {
            self.skip_blanks();
            if self.rest().starts_with("||") || !self.eat("|") {
                return Some(Step { join, is_negated, pipeline });
            }
            self.eat("&");
            self.skip_newlines();
            pipeline.push(self.nested(Self::command)?);
        }
    }

    fn command(&mut self) -> Option<Statement> {
        let statement = match self.reserved() {
            "if" => self.conditional()?,
            "while" | "until" => {
                self.take_while(is_name);
                Statement::Loop { condition: self.list_to("do")?, body: self.list_to("done")? }
            }
            "for" | "select" => self.iteration()?,
            "case" => self.cases()?,
            "function" => {
                self.take_while(is_name);
                self.skip_blanks();
                let name = self.take_while(|character| !character.is_whitespace() && !"(){};".contains(character));
                return self.function(name);
            }
            "{" => {
                self.next();
                Statement::Group(self.list_to("}")?)
            }
            "[[" => {
                self.at += 2;
                self.test()?
            }
            _ if self.eat("((") => {
                let end = self.rest().find("))")?;
                self.at += end + 2;
                Statement::Arithmetic
            }
            _ if self.eat("(") => {
                let mut list = List::new();
                self.list(&[], &mut list)?;
                self.eat(")").then_some(())?;
                Statement::Subshell(list)
            }
            _ => return self.simple(),
        };
        let mut inputs = Vec::new();
        loop {
            self.skip_blanks();
            if !self.redirection(&mut inputs, &mut false)? {
                break;
            }
        }
        Some(match inputs.is_empty() {
            true => statement,
            false => Statement::Redirected { statement: Box::new(statement), inputs },
        })
    }

    fn function(&mut self, name: String) -> Option<Statement> {
        self.skip_blanks();
        if self.eat("(") {
            self.skip_blanks();
            self.eat(")").then_some(())?;
        }
        self.skip_newlines();
        let body = Rc::new(self.nested(Self::command)?);
        Some(Statement::Function { name, body })
    }

    fn conditional(&mut self) -> Option<Statement> {
        self.at += 2;
        let mut arms = Vec::new();
        loop {
            let condition = self.list_to("then")?;
            let mut body = List::new();
            self.list(&["elif", "else", "fi"], &mut body)?;
            arms.push((condition, body));
            if !self.eat_reserved("elif") {
                break;
            }
        }
        let mut otherwise = List::new();
        if self.eat_reserved("else") {
            self.list(&["fi"], &mut otherwise)?;
        }
        self.eat_reserved("fi").then_some(Statement::If { arms, otherwise })
    }

    fn iteration(&mut self) -> Option<Statement> {
        self.take_while(is_name);
        self.skip_blanks();
        if self.eat("((") {
            let end = self.rest().find("))")?;
            self.at += end + 2;
            self.skip_separators();
            self.eat_reserved("do").then_some(())?;
            return Some(Statement::Loop { condition: List::new(), body: self.list_to("done")? });
        }
        let name = self.take_while(is_name);
        self.skip_newlines();
        let mut words = None;
        if self.eat_reserved("in") {
            let mut all = Vec::new();
            loop {
                self.skip_blanks();
                match self.peek() {
                    None | Some(';' | '\n') => break,
                    Some(_) => all.push(self.word(End::Word)?),
                }
            }
            words = Some(all);
        }
        self.skip_separators();
        self.eat_reserved("do").then_some(())?;
        Some(Statement::For { name, words, body: self.list_to("done")? })
    }

    fn skip_separators(&mut self) {
        self.skip_newlines();
        while self.eat(";") {
            self.skip_newlines();
        }
    }

    fn cases(&mut self) -> Option<Statement> {
        self.at += 4;
        self.skip_blanks();
        let word = self.word(End::Word)?;
        self.skip_newlines();
        self.eat_reserved("in").then_some(())?;
        let mut arms = Vec::new();
        loop {
            self.skip_newlines();
            if self.eat_reserved("esac") {
                return Some(Statement::Case { word, arms });
            }
            self.eat("(");
            let mut patterns = Vec::new();
            loop {
                self.skip_blanks();
                patterns.push(self.word(End::Word)?);
                self.skip_blanks();
                if !self.eat("|") {
                    break;
                }
            }
            self.eat(")").then_some(())?;
            let mut body = List::new();
            self.list(&["esac"], &mut body)?;
            arms.push((patterns, body));
            if self.eat(";;") {
                self.eat("&");
            } else if self.reserved() != "esac" {
                return None;
            }
        }
    }

    fn test(&mut self) -> Option<Statement> {
        let mut words = Vec::new();
        loop {
            self.skip_blanks();
            if self.eat_reserved("]]") {
                return Some(Statement::Test(words));
            }
            match self.peek()? {
                '\n' => {
                    self.newline();
                }
                _ => words.push(self.word(End::Test)?),
            }
        }
    }

    fn simple(&mut self) -> Option<Statement> {
        let mut simple = Simple::default();
        let mut is_declaration = false;
        loop {
            self.skip_blanks();
            match self.peek() {
                None | Some('\n' | ';' | '|' | ')') => break,
                Some('&') if !self.rest().starts_with("&>") => break,
                Some('(') => {
                    let [word] = simple.words.as_slice() else { return None };
                    let [Part::Text { text, is_quoted: false }] = word.as_slice() else { return None };
                    let name = text.clone();
                    return self.function(name);
                }
                Some(_) => {}
            }
            if self.redirection(&mut simple.inputs, &mut simple.is_silent)? {
                continue;
            }
            let is_assigning = simple.words.is_empty() || is_declaration;
            if let Some(assignment) = if is_assigning { self.assignment()? } else { None } {
                simple.assignments.push(assignment);
                continue;
            }
            let word = self.word(End::Word)?;
            if let (true, [Part::Text { text, is_quoted: false }]) = (simple.words.is_empty(), word.as_slice()) {
                is_declaration = DECLARATIONS.contains(&text.as_str());
            }
            simple.words.push(word);
        }
        (!simple.words.is_empty() || !simple.assignments.is_empty() || !simple.inputs.is_empty() || simple.is_silent)
            .then_some(Statement::Simple(simple))
    }

    /// An assignment, if one is next.
    fn assignment(&mut self) -> Option<Option<Assignment>> {
        let rest = self.rest();
        let len = rest.find(|character| !is_name(character)).unwrap_or(rest.len());
        let name = rest[..len].to_owned();
        let after = &rest[len..];
        let is_added = after.starts_with("+=");
        let starts = name.starts_with(|character: char| !character.is_ascii_digit());
        if !starts || !(is_added || after.starts_with('=')) {
            return Some(None);
        }
        self.at += len + 1 + usize::from(is_added);
        let mut values = Vec::new();
        let is_list = self.eat("(");
        if is_list {
            loop {
                self.skip_newlines();
                match self.peek()? {
                    ')' => break,
                    _ => values.push(self.word(End::Word)?),
                }
            }
            self.next();
        } else {
            values.push(self.word_or_nothing(End::Word)?);
        }
        Some(Some(Assignment { name, values, is_list, is_added }))
    }

    /// Takes a redirection, if one is next. What is read goes to `inputs`.
    fn redirection(&mut self, inputs: &mut Vec<Word>, is_silent: &mut bool) -> Option<bool> {
        let rest = self.rest();
        let digits = rest.len() - rest.trim_start_matches(|character: char| character.is_ascii_digit()).len();
        let descriptor = rest[..digits].to_owned();
        let operator = &rest[digits..];
        let operators = ["&>>", "&>", "<<<", "<<-", "<<", "<>", "<&", "<", ">>", ">&", ">|", ">"];
        let Some(operator) = operators.into_iter().find(|known| operator.starts_with(known)) else {
            return Some(false);
        };
        let is_process = digits == 0 && (rest.starts_with("<(") || rest.starts_with(">("));
        if is_process || (digits > 0 && operator.starts_with('&')) {
            return Some(false);
        }
        self.at += digits + operator.len();
        self.skip_blanks();
        if operator == "<<" || operator == "<<-" {
            let end = self.take_while(|character| !character.is_whitespace() && !";&|()<>".contains(character));
            self.here_documents.push(end.replace(['"', '\'', '\\'], ""));
            return Some(true);
        }
        let word = self.word(End::Word)?;
        match operator {
            "<" => inputs.push(word),
            ">" | ">>" | ">|" | "&>" | "&>>" => *is_silent |= descriptor.is_empty() || descriptor == "1",
            _ => {}
        }
        Some(true)
    }
}
