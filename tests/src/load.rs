//! Requests that go on while a test breaks something: greedy and drawn, streams and not, each with the answer that it had
//! before. Any other answer, or none, is an error.

use crate::process::Served;
use crate::stream;
use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::Duration;

/// Different requests: every second one is drawn.
const SEEDS: u64 = 4;

/// Asked at the same time.
const ASKERS: usize = 3;

/// What a load has seen, also while it runs.
#[derive(Debug, Default)]
pub struct Tally {
    answers: AtomicUsize,
    longest_ms: AtomicUsize,
}

impl Tally {
    /// Whole answers, each the one expected.
    pub fn answers(&self) -> usize {
        self.answers.load(Ordering::Relaxed)
    }

    /// The longest that any stood still, as `ask` says.
    pub fn longest(&self) -> Duration {
        Duration::from_millis(self.longest_ms.load(Ordering::Relaxed) as u64)
    }
}

fn question(seed: u64, tokens: usize, stream: bool) -> Value {
    let temperature = if seed.is_multiple_of(2) { 0.0 } else { 0.8 };
    json!({
        "model": "m", "messages": [{"role": "user", "content": "Tell me a story about a fox."}], "seed": seed,
        "temperature": temperature, "max_tokens": tokens, "stream": stream,
    })
}

/// What an answer says that comes at once: its text and why it ended.
pub fn whole(served: &Served, seed: u64, tokens: usize) -> Result<String> {
    let reply = served.ask("/v1/chat/completions", &question(seed, tokens, false))?;
    let (choice, missing) = (&reply["choices"][0], || format!("no answer in {reply}"));
    let text = choice["message"]["content"].as_str().with_context(missing)?;
    Ok(format!("{text}{}", choice["finish_reason"].as_str().with_context(missing)?))
}

/// The same of a stream, and the longest that it paused.
pub fn streamed(served: &Served, seed: u64, tokens: usize) -> Result<(String, Duration)> {
    let body = question(seed, tokens, true).to_string();
    let (said, pause) = stream::read(served.open("POST", "/v1/chat/completions", body.as_bytes())?)?;
    Ok((said.into_iter().next().context("a first choice")?, pause))
}

/// Asks `served`, which is to be whole at first, again and again while `change` goes on.
pub fn under_load(served: &Served, tokens: usize, change: impl FnOnce(&Tally) -> Result<()>) -> Result<Tally> {
    let expected: Vec<String> = (0..SEEDS).map(|seed| whole(served, seed, tokens)).collect::<Result<_>>()?;
    let ask = |asker: usize, count: usize| -> Result<Duration> {
        let count = (asker + count) as u64;
        let (seed, stream) = (count % SEEDS, (count / SEEDS).is_multiple_of(2));
        let (text, pause) = match stream {
            true => streamed(served, seed, tokens),
            false => whole(served, seed, tokens).map(|text| (text, Duration::ZERO)),
        }
        .with_context(|| format!("request {count} of asker {asker}, stream: {stream}"))?;
        ensure!(text == expected[seed as usize], "the answer to {seed}, stream: {stream}, is {text:?}");
        Ok(pause)
    };
    asking(ASKERS, ask, change)
}

/// Calls `ask(asker, count)` again and again in `askers` threads while `change` goes on; it checks an answer, and says how long
/// its stream stood still at most.
pub fn asking(
    askers: usize,
    ask: impl Fn(usize, usize) -> Result<Duration> + Sync,
    change: impl FnOnce(&Tally) -> Result<()>,
) -> Result<Tally> {
    let (tally, done) = (Tally::default(), AtomicBool::new(false));
    let asks = |asker: usize| -> Result<()> {
        for count in 0.. {
            if done.load(Ordering::Relaxed) {
                break;
            }
            let pause = ask(asker, count)?;
            tally.longest_ms.fetch_max(pause.as_millis() as usize, Ordering::Relaxed);
            tally.answers.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let asks = &asks;
        let threads: Vec<_> = (0..askers).map(|asker| scope.spawn(move || asks(asker))).collect();
        let changed = change(&tally);
        done.store(true, Ordering::Relaxed);
        let join = |asker: ScopedJoinHandle<'_, Result<()>>| asker.join().map_err(|_| anyhow!("an asker panicked"))?;
        let asked: Vec<Result<()>> = threads.into_iter().map(join).collect();
        // A change that failed may well be why answers did not come.
        changed.and(asked.into_iter().collect::<Result<()>>())
    })?;
    Ok(tally)
}
