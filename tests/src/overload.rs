//! More requests than a server can answer: they come at their own pace, whatever becomes of those before. Each must be
//! answered rightly or refused at once, with a word on when to come again.

use crate::client::Client;
use crate::process::{Answer, Served, memory_peak};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

const PATH: &str = "/v1/completions";

/// Different requests.
const KINDS: usize = 16;

/// Clients that ask without pause while the capacity is measured: more than a step has room for.
const CLIENTS: usize = 192;

/// Requests without an answer at a time, above what a server may keep waiting and running; more are not sent.
const OPEN_MAX: usize = 4096;

/// What became of the requests.
#[derive(Default)]
pub struct Report {
    /// Answers in a second that were measured before.
    pub capacity: f64,
    pub sent: usize,
    /// Due, and not sent because too many were open: the load was less than asked for.
    pub unsent: usize,
    pub answered: usize,
    pub refused: usize,
    /// Neither answered rightly nor refused as promised.
    pub wrong: Vec<String>,
    /// How long refusals and answers took.
    pub refusals: Vec<Duration>,
    pub answers: Vec<Duration>,
    /// Bytes that each process had at most.
    pub memory: Vec<u64>,
}

/// Asks for an answer of so many tokens.
fn request(kind: usize, tokens: u32) -> String {
    json!({"prompt": format!("Story {kind}:"), "max_tokens": tokens, "temperature": 0, "ignore_eos": true}).to_string()
}

fn text(answer: &Answer) -> Result<String> {
    Ok(answer.json()?["choices"][0]["text"].as_str().context("a text")?.to_string())
}

/// Offers `factor` times what the server can do for `length`, by requests of `tokens` each.
pub fn run(served: &Served, length: Duration, factor: f64, tokens: u32) -> Result<Report> {
    let ask = |kind| served.ask(PATH, &serde_json::from_str(&request(kind, tokens))?);
    let expected = |reply: Value| reply["choices"][0]["text"].as_str().map(str::to_string).context("a text");
    let expected: Vec<String> = (0..KINDS).map(|kind| expected(ask(kind)?)).collect::<Result<_>>()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = Arc::new(Client::new(&served.address));
    let measured = (length / 4).clamp(Duration::from_secs(1), Duration::from_secs(10));
    let capacity = runtime.block_on(capacity(&client, measured, tokens))?;
    ensure!(capacity > 0.0, "nothing was answered within {measured:?}");
    let seen = Arc::new(Mutex::new(Report { capacity, ..Report::default() }));
    runtime.block_on(offer(&client, &expected, &seen, length, (capacity * factor, tokens)))?;
    drop(runtime);
    let mut report = std::mem::take(&mut *seen.lock().expect("no holder panics"));
    report.refusals.sort_unstable();
    report.answers.sort_unstable();
    let processes = std::iter::once(served.id()).chain(served.workers()?);
    report.memory = processes.map(memory_peak).collect::<Result<_>>()?;
    Ok(report)
}

/// Answers in a second while many ask without pause.
async fn capacity(client: &Arc<Client>, length: Duration, tokens: u32) -> Result<f64> {
    let (done, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut clients = JoinSet::new();
    for first in 0..CLIENTS {
        let (client, done, count) = (client.clone(), done.clone(), count.clone());
        clients.spawn(async move {
            let mut kind = first;
            while !done.load(Ordering::Relaxed) {
                let answer = client.post(PATH, &request(kind % KINDS, tokens)).await?;
                ensure!(answer.status == 200, "{}", answer.status);
                count.fetch_add(1, Ordering::Relaxed);
                kind += 1;
            }
            Ok(())
        });
    }
    // What is warm by then is measured.
    tokio::time::sleep(length / 2).await;
    let (before, began) = (count.load(Ordering::Relaxed), Instant::now());
    tokio::time::sleep(length).await;
    let rate = (count.load(Ordering::Relaxed) - before) as f64 / began.elapsed().as_secs_f64();
    done.store(true, Ordering::Relaxed);
    while let Some(ended) = clients.join_next().await {
        ended??;
    }
    Ok(rate)
}

/// Sends `rate` requests a second, then waits for what is open.
async fn offer(
    client: &Arc<Client>,
    expected: &[String],
    seen: &Arc<Mutex<Report>>,
    length: Duration,
    (rate, tokens): (f64, u32),
) -> Result<()> {
    let (began, mut due) = (Instant::now(), 0);
    let mut open = JoinSet::new();
    while began.elapsed() < length {
        let now_due = (began.elapsed().as_secs_f64() * rate) as usize;
        for number in due..now_due {
            if open.len() >= OPEN_MAX {
                seen.lock().expect("no holder panics").unsent += now_due - number;
                break;
            }
            let (client, seen, kind) = (client.clone(), seen.clone(), number % KINDS);
            let expected = expected[kind].clone();
            open.spawn(async move {
                let began = Instant::now();
                let answer = client.post(PATH, &request(kind, tokens)).await;
                seen.lock().expect("no holder panics").take(kind, answer, began.elapsed(), &expected);
            });
        }
        due = now_due;
        while open.try_join_next().is_some() {}
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let rest = async { while open.join_next().await.is_some() {} };
    tokio::time::timeout(Duration::from_secs(120), rest).await.context("what was accepted did not finish")
}

impl Report {
    fn take(&mut self, kind: usize, answer: Result<Answer>, after: Duration, expected: &str) {
        self.sent += 1;
        let wrong = match answer {
            Err(error) => format!("{error:#}"),
            Ok(answer) if answer.status == 200 => match text(&answer) {
                Ok(text) if text == expected => {
                    self.answered += 1;
                    return self.answers.push(after);
                }
                other => format!("{other:?}, not {expected:?}"),
            },
            Ok(answer) if matches!(answer.status, 429 | 503) && answer.head.contains("\r\nretry-after: ") => {
                self.refused += 1;
                return self.refusals.push(after);
            }
            Ok(answer) => format!("{}: {}", answer.status, String::from_utf8_lossy(&answer.body)),
        };
        self.wrong.push(format!("request {kind}: {wrong}"));
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = |all: &[Duration], part: f64| {
            all.get(((all.len().max(1) - 1) as f64 * part) as usize).map_or(0.0, |d| d.as_secs_f64() * 1e3)
        };
        let times =
            |all: &[Duration]| format!("p50 {:.1}, p99 {:.1}, max {:.1}", at(all, 0.5), at(all, 0.99), at(all, 1.0));
        let memory: Vec<String> = self.memory.iter().map(|bytes| (bytes >> 20).to_string()).collect();
        writeln!(f, "capacity {:.0}/s; {} sent, {} not sent", self.capacity, self.sent, self.unsent)?;
        writeln!(f, "{} refused with Retry-After, after ms: {}", self.refused, times(&self.refusals))?;
        writeln!(f, "{} answered rightly, after ms: {}", self.answered, times(&self.answers))?;
        write!(f, "{} wrong; memory at most, MiB: {}", self.wrong.len(), memory.join(" "))
    }
}
