//! Running a helper or plugin: one question on its standard input, one answer on its standard output.
//!
//! Everything is bounded: the time, the length of the answer, what is kept of standard error. The program runs in a
//! process group of its own, which is ended as a whole when the time is over or the caller goes away, so that no child of
//! a script stays behind.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout_at};
use zeroize::Zeroizing;

use super::error::CredentialsError;
use super::printable;

/// Bytes: the longest answer that is taken, as the kubelet's own limit for what it reads of a plugin (1 MiB).
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// Bytes of standard error that are kept for a message.
const MAX_MESSAGE_BYTES: u64 = 4 << 10;

/// What to run.
#[derive(Debug)]
pub(super) struct Program {
    /// For messages.
    pub(super) name: String,
    /// A path, or a name that `PATH` leads to.
    pub(super) path: PathBuf,
    pub(super) arguments: Vec<String>,
    /// Added to this process's own environment.
    pub(super) environment: Vec<(String, String)>,
}

/// How it ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) success: bool,
    pub(super) status: String,
    pub(super) answer: Zeroizing<Vec<u8>>,
    /// The first line of standard error, fit for a message.
    pub(super) message: String,
}

/// Ends a whole process group unless it has ended by itself.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // It may have ended this very moment, which is as well.
            let _ = kill_process_group(group, Signal::KILL);
        }
    }
}

impl Program {
    /// Runs it with `question`, for at most `limit` and not past `deadline`. Cancel safe: it is ended when dropped.
    pub(super) async fn run(
        &self,
        question: &[u8],
        limit: Duration,
        deadline: Instant,
    ) -> Result<Ended, CredentialsError> {
        let begun = Instant::now();
        let until = deadline.min(begun + limit);
        let mut command = Command::new(&self.path);
        command.args(&self.arguments).envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0).kill_on_drop(true);
        let start = |source| CredentialsError::Start { program: self.name.clone(), source };
        let mut child = command.spawn().map_err(start)?;
        let mut group = Group(child.id().and_then(|id| Pid::from_raw(id.cast_signed())));
        let ended = timeout_at(until, self.talk(&mut child, question)).await;
        let timeout = |_| CredentialsError::Timeout { program: self.name.clone(), waited: begun.elapsed() };
        let ended = ended.map_err(timeout)??;
        group.0 = None;
        Ok(ended)
    }

    async fn talk(&self, child: &mut Child, question: &[u8]) -> Result<Ended, CredentialsError> {
        let broken = |source| CredentialsError::Start { program: self.name.clone(), source };
        let missing = || broken(std::io::Error::other("its pipes are missing"));
        let mut input = child.stdin.take().ok_or_else(missing)?;
        let output = child.stdout.take().ok_or_else(missing)?;
        let errors = child.stderr.take().ok_or_else(missing)?;
        let asking = async move {
            // A program that answers without reading the question has closed its end already.
            let _ = input.write_all(question).await;
            drop(input);
            Ok(())
        };
        let answering = async {
            let mut answer = Zeroizing::new(Vec::new());
            output.take(MAX_ANSWER_BYTES + 1).read_to_end(&mut answer).await.map_err(broken)?;
            if answer.len() as u64 > MAX_ANSWER_BYTES {
                let reason = format!("it is longer than {MAX_ANSWER_BYTES} bytes");
                return Err(CredentialsError::Answer { program: self.name.clone(), reason });
            }
            Ok(answer)
        };
        let complaining = async {
            let (mut message, mut errors) = (Vec::new(), errors);
            (&mut errors).take(MAX_MESSAGE_BYTES).read_to_end(&mut message).await.map_err(broken)?;
            // The rest is read too, or the program would wait for ever for somebody to do so.
            tokio::io::copy(&mut errors, &mut tokio::io::sink()).await.map_err(broken)?;
            Ok(message)
        };
        let ((), answer, message) = tokio::try_join!(asking, answering, complaining)?;
        let status = child.wait().await.map_err(broken)?;
        let message = String::from_utf8_lossy(&message);
        let message = printable(message.lines().next().unwrap_or_default());
        Ok(Ended { success: status.success(), status: status.to_string(), answer, message })
    }
}
