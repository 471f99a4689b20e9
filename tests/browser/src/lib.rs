//! A headless Chromium, driven by its DevTools protocol over two pipes.
//!
//! With `--remote-debugging-pipe` the browser reads commands from descriptor 3 and writes answers to descriptor 4, each a
//! JSON document that a zero byte ends; so nothing listens on a port, and no WebSocket is needed. A shell puts the pipes of
//! this process there. Everything that the browser writes is in a folder of its own, which goes with it.
//!
//! What goes wrong in the page (exceptions, errors of the console, what its content security policy has stopped) is
//! collected as it is told, see [`Browser::problems`].

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use base64::Engine as _;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use tempfile::TempDir;

/// How long the browser may take to answer, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a page is looked at for what is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Messages of the browser that wait to be read.
const MESSAGES_MAX: usize = 4096;
/// Names of the program, the first that is there is taken.
const PROGRAMS: [&str; 3] = ["chromium", "chromium-browser", "google-chrome"];

/// Sums what moves on the page without anybody having touched it, and notes what its policy stops.
const OBSERVE: &str = "window.observed = { shift: 0, stopped: [] };
new PerformanceObserver((list) => { for (const entry of list.getEntries()) {
  if (!entry.hadRecentInput) { window.observed.shift += entry.value; }
} }).observe({ type: 'layout-shift', buffered: true });
addEventListener('securitypolicyviolation', (event) => window.observed.stopped.push(`${event.violatedDirective} ${event.blockedURI}`));";

/// A key, as the protocol calls it.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    name: &'static str,
    code: u32,
    text: &'static str,
}

impl Key {
    /// Moves the focus on.
    pub const TAB: Self = Self { name: "Tab", code: 9, text: "" };
    /// Presses what has the focus.
    pub const ENTER: Self = Self { name: "Enter", code: 13, text: "\r" };
    /// To the left.
    pub const LEFT: Self = Self { name: "ArrowLeft", code: 37, text: "" };
    /// To the right.
    pub const RIGHT: Self = Self { name: "ArrowRight", code: 39, text: "" };
    /// Down.
    pub const DOWN: Self = Self { name: "ArrowDown", code: 40, text: "" };
    /// To the end.
    pub const END: Self = Self { name: "End", code: 35, text: "" };
    /// Larger.
    pub const PLUS: Self = Self { name: "+", code: 187, text: "+" };
}

/// A browser with one tab. It ends, with all its processes, when this is dropped.
#[derive(Debug)]
pub struct Browser {
    child: Child,
    commands: ChildStdin,
    messages: Receiver<Value>,
    next: u64,
    session: String,
    problems: Vec<String>,
    _profile: TempDir,
}

impl Drop for Browser {
    fn drop(&mut self) {
        if let Some(group) = Pid::from_raw(self.child.id().cast_signed()) {
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

impl Browser {
    /// Starts one, in a window of `width` x `height` pixels, that takes any certificate.
    ///
    /// # Errors
    /// When there is none, or it does not start.
    pub fn start(width: u32, height: u32) -> Result<Self> {
        let program = PROGRAMS.iter().find(|name| {
            std::env::var_os("PATH")
                .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(name).is_file()))
        });
        let program = program.context("no Chromium is installed; tools/setup test installs it")?;
        let profile = tempfile::tempdir()?;
        let log = std::fs::File::create(profile.path().join("log"))?;
        // The shell gives the browser its pipes as descriptors 3 and 4, and becomes the browser.
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null", "sh", program]);
        command.args([
            "--headless",
            "--remote-debugging-pipe",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--disable-extensions",
            "--disable-breakpad",
            "--no-first-run",
            "--ignore-certificate-errors",
            // It has no business anywhere else.
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        ]);
        if rustix::process::geteuid().is_root() {
            command.arg("--no-sandbox");
        }
        command.arg(format!("--user-data-dir={}", profile.path().display()));
        command.arg(format!("--window-size={width},{height}"));
        command.env("HOME", profile.path()).process_group(0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn()?;
        let commands = child.stdin.take().context("its input is a pipe")?;
        let output = child.stdout.take().context("its output is a pipe")?;
        let (tell, messages) = sync_channel(MESSAGES_MAX);
        std::thread::Builder::new().name("browser".to_owned()).spawn(move || read(output, &tell))?;
        let (session, problems) = (String::new(), Vec::new());
        let mut browser = Self { child, commands, messages, next: 1, session, problems, _profile: profile };
        let tab = browser.call("Target.createTarget", json!({"url": "about:blank"}))?;
        let attach = json!({"targetId": tab["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", attach)?;
        browser.session = attached["sessionId"].as_str().context("a session has a name")?.to_owned();
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        browser.call("Page.addScriptToEvaluateOnNewDocument", json!({"source": OBSERVE}))?;
        browser.resize(width, height, 1.0)?;
        Ok(browser)
    }

    /// Sends one command of the protocol and waits for its answer.
    ///
    /// # Errors
    /// When the browser refuses it, ends, or says nothing for a minute.
    pub fn call(&mut self, method: &str, parameters: Value) -> Result<Value> {
        let id = self.next;
        self.next += 1;
        let mut message = json!({"id": id, "method": method, "params": parameters});
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        self.commands.write_all(&bytes).context("the browser has ended")?;
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let mut message = match self.messages.recv_timeout(left) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => bail!("the browser does not answer to {method}"),
                Err(RecvTimeoutError::Disconnected) => bail!("the browser has ended"),
            };
            if message["id"] == json!(id) {
                ensure!(message["error"].is_null(), "{method}: {}", message["error"]);
                return Ok(message["result"].take());
            }
            self.note(&message);
        }
    }

    /// Collects what is told of things that went wrong.
    fn note(&mut self, message: &Value) {
        let said = &message["params"];
        let problem = match message["method"].as_str() {
            Some("Runtime.exceptionThrown") => said["exceptionDetails"].to_string(),
            Some("Runtime.consoleAPICalled") if said["type"] == "error" || said["type"] == "warning" => {
                said["args"].to_string()
            }
            Some("Log.entryAdded") if said["entry"]["level"] != "info" => {
                format!("{} {}", said["entry"]["text"], said["entry"]["url"])
            }
            _ => return,
        };
        self.problems.push(problem);
    }

    /// What went wrong in the page since this was asked last.
    ///
    /// # Errors
    /// When the browser does not answer.
    pub fn problems(&mut self) -> Result<Vec<String>> {
        // Whatever was told before this answer has been read with it.
        let stopped = self.evaluate("window.observed?.stopped ?? []")?;
        let mut problems = std::mem::take(&mut self.problems);
        problems.extend(stopped.as_array().into_iter().flatten().map(Value::to_string));
        Ok(problems)
    }

    /// Goes to `url` and waits until it is loaded.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub fn go(&mut self, url: &str) -> Result<()> {
        let gone = self.call("Page.navigate", json!({"url": url}))?;
        ensure!(gone["errorText"].is_null(), "{url}: {}", gone["errorText"]);
        self.wait("the document", "document.readyState === 'complete' && location.href !== 'about:blank'")
    }

    /// The value of an expression in the page; a promise is waited for.
    ///
    /// # Errors
    /// When it throws.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let parameters = json!({"expression": expression, "awaitPromise": true, "returnByValue": true});
        let mut answer = self.call("Runtime.evaluate", parameters)?;
        let thrown = &answer["exceptionDetails"];
        ensure!(thrown.is_null(), "{expression} throws {}", thrown["exception"]["description"]);
        Ok(answer["result"]["value"].take())
    }

    /// Waits until an expression is true.
    ///
    /// # Errors
    /// When it is not within a minute.
    pub fn wait(&mut self, what: &str, expression: &str) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            // A page that is being left has no answers for a moment.
            let last = self.evaluate(&format!("Boolean({expression})"));
            if matches!(last, Ok(Value::Bool(true))) {
                return Ok(());
            }
            if Instant::now() >= end {
                let text = self.evaluate("document.body.innerText.slice(0, 2000)").unwrap_or_default();
                bail!("{what} does not come: {expression} is {last:?} in {text}");
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Presses and lets go a key.
    ///
    /// # Errors
    /// When the browser does not answer.
    pub fn press(&mut self, key: Key) -> Result<()> {
        for kind in ["keyDown", "keyUp"] {
            let mut parameters = json!({"type": kind, "key": key.name, "windowsVirtualKeyCode": key.code});
            if kind == "keyDown" && !key.text.is_empty() {
                parameters["text"] = json!(key.text);
            }
            self.call("Input.dispatchKeyEvent", parameters)?;
        }
        Ok(())
    }

    /// Writes `text` where the focus is.
    ///
    /// # Errors
    /// When the browser does not answer.
    pub fn write(&mut self, text: &str) -> Result<()> {
        self.call("Input.insertText", json!({"text": text})).map(drop)
    }

    /// Makes the window as large, with `scale` pixels of the screen for each of the page.
    ///
    /// # Errors
    /// When the browser does not answer.
    pub fn resize(&mut self, width: u32, height: u32, scale: f64) -> Result<()> {
        let parameters = json!({"width": width, "height": height, "deviceScaleFactor": scale, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", parameters).map(drop)
    }

    /// Pretends that the user wants a dark page, or a light one.
    ///
    /// # Errors
    /// When the browser does not answer.
    pub fn set_dark(&mut self, is_dark: bool) -> Result<()> {
        let value = if is_dark { "dark" } else { "light" };
        let features = json!({"features": [{"name": "prefers-color-scheme", "value": value}]});
        self.call("Emulation.setEmulatedMedia", features).map(drop)
    }

    /// Writes what the window shows, as PNG.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn screenshot(&mut self, path: &Path) -> Result<()> {
        let shot = self.call("Page.captureScreenshot", json!({"format": "png"}))?;
        let data = shot["data"].as_str().context("a picture has data")?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(data)?;
        std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
    }

    /// When the first pixel was painted, and the first of any content, in milliseconds since the page was asked for.
    ///
    /// # Errors
    /// When nothing was painted.
    pub fn first_paint_ms(&mut self) -> Result<(f64, f64)> {
        let paints =
            self.evaluate("performance.getEntriesByType('paint').map((entry) => [entry.name, entry.startTime])")?;
        let named = |name: &str| {
            let all = paints.as_array().into_iter().flatten();
            all.filter(|paint| paint[0] == name).find_map(|paint| paint[1].as_f64())
        };
        let (first, content) = (named("first-paint"), named("first-contentful-paint"));
        Ok((first.context("nothing was painted")?, content.context("no content was painted")?))
    }

    /// How much has moved on the page that nobody has touched: the sum of its layout shifts.
    ///
    /// # Errors
    /// When the browser does not answer.
    pub fn layout_shift(&mut self) -> Result<f64> {
        // Entries are told of in a task of their own.
        let sum = self.evaluate(
            "new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(window.observed.shift), 50)))",
        )?;
        sum.as_f64().context("a sum is a number")
    }
}

/// Hands on what the browser says, until it ends.
fn read(output: ChildStdout, tell: &SyncSender<Value>) {
    let mut output = BufReader::new(output);
    let mut message = Vec::new();
    while output.read_until(0, &mut message).is_ok_and(|length| length > 0) {
        message.pop();
        let parsed = serde_json::from_slice(&message);
        message.clear();
        if parsed.is_ok_and(|value| tell.send(value).is_err()) {
            return;
        }
    }
}
