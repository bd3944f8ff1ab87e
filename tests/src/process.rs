//! Real processes on loopback: a `conclave serve` with its workers, spoken to over HTTP, killed as tests please.
//! Every wait has a deadline.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

/// Generous, for machines whose cores are shared.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A running `conclave serve`.
pub struct Served {
    child: Child,
    /// `ip:port` of the API.
    pub address: String,
    /// What it said before it served.
    pub said: Vec<String>,
    lines: Mutex<mpsc::Receiver<String>>,
}

/// An HTTP answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn json(&self) -> Result<Value> {
        serde_json::from_slice(&self.body).with_context(|| String::from_utf8_lossy(&self.body).into_owned())
    }
}

/// A checkpoint kept in the repository.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

/// The demo model.
pub fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo/model")
}

impl Served {
    /// Starts the program and waits until the API is served.
    pub fn start(program: &str, model: &Path, flags: &[&str]) -> Result<Served> {
        Served::spawn(program, model, flags)?.serving()
    }

    /// Waits until it says where it serves the API.
    pub fn serving(mut self) -> Result<Served> {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self
                .lines
                .lock()
                .expect("no holder panics")
                .recv_timeout(left)
                .context("the server did not become ready")?;
            if let Some(rest) = line.strip_prefix("serving on http://") {
                self.address = rest.split_whitespace().next().context("an address")?.to_string();
                return Ok(self);
            }
            self.said.push(line);
        }
    }

    /// Starts the program without waiting.
    pub fn spawn(program: &str, model: &Path, flags: &[&str]) -> Result<Served> {
        let mut command = Command::new(program);
        command.arg("serve").arg(model).args(["--listen", "127.0.0.1:0"]).args(flags);
        Served::of(command, String::new())
    }

    /// Starts any subcommand that will serve the API at `address`, without waiting.
    pub fn command(program: &str, arguments: &[&str], address: &str) -> Result<Served> {
        let mut command = Command::new(program);
        command.args(arguments);
        Served::of(command, address.to_string())
    }

    /// Starts a command that will serve the API at `address`, without waiting.
    pub fn of(mut command: Command, address: String) -> Result<Served> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        let mut child = child.with_context(|| format!("{command:?} can't be started"))?;
        let stdout = BufReader::new(child.stdout.take().context("piped")?);
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(std::result::Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Served { child, address, said: Vec::new(), lines: Mutex::new(lines) })
    }

    /// Sends a request and reads the whole answer.
    pub fn send(&self, method: &str, path: &str, body: &[u8]) -> Result<Answer> {
        let mut stream = self.open(method, path, body)?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        answer(&bytes)
    }

    pub fn get(&self, path: &str) -> Result<Answer> {
        self.send("GET", path, b"")
    }

    /// Posts JSON, expects JSON and success.
    pub fn ask(&self, path: &str, body: &Value) -> Result<Value> {
        let answer = self.send("POST", path, body.to_string().as_bytes())?;
        ensure!(answer.status == 200, "{}: {}", answer.status, String::from_utf8_lossy(&answer.body));
        answer.json()
    }

    /// Sends a request with an API key and reads the whole answer.
    pub fn send_as(&self, key: &str, method: &str, path: &str, body: &[u8]) -> Result<Answer> {
        let mut bytes = Vec::new();
        self.open_with(&format!("authorization: Bearer {key}\r\n"), method, path, body)?.read_to_end(&mut bytes)?;
        answer(&bytes)
    }

    /// Sends a request and hands back the socket: what comes is the answer, and dropping it is a client that leaves.
    pub fn open(&self, method: &str, path: &str, body: &[u8]) -> Result<TcpStream> {
        self.open_with("", method, path, body)
    }

    /// The same with further `headers`, whole lines.
    pub fn open_with(&self, headers: &str, method: &str, path: &str, body: &[u8]) -> Result<TcpStream> {
        let mut stream = TcpStream::connect(&self.address)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{headers}\r\n"
        )?;
        // A server may refuse early and close; what it said is still to be read.
        let _ = stream.write_all(body);
        Ok(stream)
    }

    /// A metric now, summed over its labels, or over those lines whose labels have `label` in them.
    pub fn metric(&self, name: &str, label: &str) -> Result<f64> {
        let text = String::from_utf8(self.get("/metrics")?.body)?;
        let named = |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        let mut lines = text.lines().filter(named).filter(|line| line.contains(label)).peekable();
        ensure!(lines.peek().is_some(), "no {name} with {label} in {text}");
        lines.map(|line| Ok(line.rsplit(' ').next().unwrap_or_default().parse::<f64>()?)).sum()
    }

    /// Process ids of the workers.
    pub fn workers(&self) -> Result<Vec<u32>> {
        children(self.child.id())
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the server.
    pub fn signal(&self, signal: &str) -> Result<()> {
        kill(self.child.id(), signal)
    }

    /// Waits for the server's end; its exit code, if it has one.
    pub fn wait(&mut self) -> Result<Option<i32>> {
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.code());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("the server did not end in {DEADLINE:?}")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks any process that speaks HTTP at `address`.
pub fn get(address: &str, path: &str) -> Result<Answer> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    answer(&bytes)
}

/// Sends `signal` (a name as kill takes it) to a process.
pub fn kill(process: u32, signal: &str) -> Result<()> {
    let status = Command::new("kill").args([&format!("-{signal}"), &process.to_string()]).status()?;
    ensure!(status.success(), "kill -{signal} {process} failed");
    Ok(())
}

/// Whether a process is there and no zombie.
pub fn alive(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

/// Process ids of `parent`'s children.
pub fn children(parent: u32) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((_, rest)) = stat.rsplit_once(") ") else { continue };
        if rest.split(' ').nth(1) == Some(&parent.to_string()) && alive(id) {
            found.push(id);
        }
    }
    Ok(found)
}

/// Bytes of memory that a process had at most.
pub fn memory_peak(process: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? << 10)
}

/// Waits until `done` holds; fails with `what` after the deadline.
pub fn until(what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    while !done() {
        ensure!(Instant::now() < deadline, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Splits an HTTP/1.1 answer, undoing chunked transfer.
pub fn answer(bytes: &[u8]) -> Result<Answer> {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").context("no HTTP head in the answer")?;
    let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).context("no status in the answer")?;
    let mut rest = &bytes[end + 4..];
    if !head.contains("transfer-encoding: chunked") {
        return Ok(Answer { status, head, body: rest.to_vec() });
    }
    let mut body = Vec::new();
    loop {
        let line = rest.windows(2).position(|w| w == b"\r\n").context("a chunk without its length")?;
        let length = usize::from_str_radix(std::str::from_utf8(&rest[..line])?.trim(), 16)?;
        rest = &rest[line + 2..];
        if length == 0 {
            return Ok(Answer { status, head, body });
        }
        ensure!(rest.len() >= length + 2, "the answer broke off inside a chunk");
        body.extend_from_slice(&rest[..length]);
        rest = &rest[length + 2..];
    }
}
