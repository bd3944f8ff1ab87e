//! Answers under deaths: clients stream from a served demo model without pause while its workers are killed one after
//! another, in turn by a signal, by stopping them, and by asking them to end. No answer may fail or differ.
//!
//! `cargo build --release && cargo run --release -p conclave-tests --bin kills -- target/release/conclave [KILLS] [CLIENTS]`

use anyhow::{Context, Result, ensure};
use conclave_tests::process::{Served, answer, demo, kill, until};
use serde_json::{Value, json};
use std::io::Read;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const WORKERS: usize = 2;

/// What a worker must have lived not to count as one that can't live.
const LIFE: Duration = Duration::from_millis(5_500);

/// Different requests; half of them sample.
const KINDS: u64 = 16;

fn request(kind: u64, stream: bool) -> Value {
    json!({
        "model": "model", "messages": [{"role": "user", "content": format!("Tell me a story about a fox. {kind}")}],
        "seed": kind, "temperature": if kind.is_multiple_of(2) { 0.0 } else { 0.9 }, "max_tokens": 20 + 10 * kind,
        "stream": stream, "return_token_ids": true,
    })
}

/// The ids of an answer, and the longest that a stream paused.
fn ask(served: &Served, kind: u64, stream: bool) -> Result<(Vec<u64>, Duration)> {
    let ids =
        |value: &Value| -> Vec<u64> { value.as_array().into_iter().flatten().filter_map(Value::as_u64).collect() };
    if !stream {
        let reply = served.ask("/v1/chat/completions", &request(kind, false))?;
        return Ok((ids(&reply["choices"][0]["token_ids"]), Duration::ZERO));
    }
    let mut socket = served.open("POST", "/v1/chat/completions", request(kind, true).to_string().as_bytes())?;
    let (mut bytes, mut part, mut last, mut pause) = (Vec::new(), [0; 8192], Instant::now(), Duration::ZERO);
    loop {
        let count = socket.read(&mut part)?;
        pause = pause.max(last.elapsed());
        last = Instant::now();
        if count == 0 {
            break;
        }
        bytes.extend_from_slice(&part[..count]);
    }
    let answer = answer(&bytes)?;
    let text = String::from_utf8(answer.body)?;
    ensure!(answer.status == 200, "{}: {text}", answer.status);
    let mut all = Vec::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("data: ")) {
        if line == "[DONE]" {
            return Ok((all, pause));
        }
        let event: Value = serde_json::from_str(line)?;
        ensure!(event.get("error").is_none(), "{event}");
        all.extend(ids(&event["choices"][0]["token_ids"]));
    }
    anyhow::bail!("the stream ended without [DONE]: {text}")
}

#[derive(Default)]
struct Seen {
    answers: usize,
    pauses: Vec<Duration>,
    wrong: Vec<String>,
}

fn client(served: &Served, expected: &[Vec<u64>], first: u64, done: &AtomicBool, seen: &Mutex<Seen>) {
    for number in 0.. {
        if done.load(Ordering::Relaxed) {
            return;
        }
        let kind = (first + number) % KINDS;
        let found = ask(served, kind, (first + number / KINDS).is_multiple_of(2));
        let mut seen = seen.lock().expect("no client panics holding it");
        seen.answers += 1;
        match found {
            Ok((ids, pause)) if ids == expected[kind as usize] => seen.pauses.push(pause),
            Ok((ids, _)) => seen.wrong.push(format!("{kind}: {ids:?}, not {:?}", expected[kind as usize])),
            Err(error) => seen.wrong.push(format!("{kind}: {error:#}")),
        }
    }
}

fn status(served: &Served) -> Result<Value> {
    served.get("/status")?.json()
}

/// Kills one worker and waits until all serve under a later epoch.
fn kill_one(served: &Served, number: usize) -> Result<Duration> {
    let (workers, epoch) = (served.workers()?, status(served)?["epoch"].as_u64());
    ensure!(workers.len() == WORKERS, "{workers:?}");
    let victim = workers[number % WORKERS];
    let began = Instant::now();
    let signal = ["KILL", "STOP", "ABRT"][number % 3];
    kill(victim, signal)?;
    if signal == "STOP" {
        // Silence is a death; what would wake up afterwards is a stranger.
        until("its silence is noticed", || {
            status(served).is_ok_and(|status| status["members"].as_array().is_some_and(|m| m.len() < WORKERS))
        })?;
        kill(victim, "KILL")?;
    }
    until("all serve again", || {
        status(served).is_ok_and(|status| {
            let ranks = |member: &Value| member["ranks"].as_array().is_some_and(|ranks| !ranks.is_empty());
            let serving = status["members"].as_array().map_or(0, |all| all.iter().filter(|m| ranks(m)).count());
            status["phase"] == "serving" && status["epoch"].as_u64() > epoch && serving == WORKERS
        })
    })?;
    until("the dead are gone", || served.workers().is_ok_and(|now| now.len() == WORKERS && !now.contains(&victim)))?;
    Ok(began.elapsed())
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let program = arguments.first().context("the program to test is missing")?;
    let number = |index: usize, default: usize| arguments.get(index).map_or(Ok(default), |text| text.parse());
    let (kills, clients) = (number(1, 200)?, number(2, 8)?);
    let served = Served::start(program, &demo(), &["--tp", "2", "--workers", "2"])?;
    let expected: Vec<Vec<u64>> = (0..KINDS).map(|kind| Ok(ask(&served, kind, false)?.0)).collect::<Result<_>>()?;
    ensure!(expected.iter().all(|ids| !ids.is_empty()), "no ids to compare");
    let (done, seen) = (AtomicBool::new(false), Mutex::new(Seen::default()));
    let killed = std::thread::scope(|scope| {
        for first in 0..clients as u64 {
            let (served, expected, done, seen) = (&served, &expected, &done, &seen);
            scope.spawn(move || client(served, expected, first, done, seen));
        }
        let next = |kill| {
            std::thread::sleep(LIFE / WORKERS as u32);
            kill_one(&served, kill)
        };
        let killed: Result<Vec<Duration>> = (0..kills).map(next).collect();
        done.store(true, Ordering::Relaxed);
        killed
    });
    let mut seen = seen.into_inner().expect("no client panicked");
    let mut killed = killed?;
    let at = |of: &mut Vec<Duration>, part: f64| {
        of.sort_unstable();
        of.get(((of.len().max(1) - 1) as f64 * part) as usize).map_or(0, |d| d.as_millis())
    };
    let pauses = &mut seen.pauses;
    println!(
        "{} answers over {kills} deaths, {} lost or changed; longest pause of a stream ms: p50 {}, p99 {}, max {}; whole again after ms: p50 {}, max {}",
        seen.answers,
        seen.wrong.len(),
        at(pauses, 0.5),
        at(pauses, 0.99),
        at(pauses, 1.0),
        at(&mut killed, 0.5),
        at(&mut killed, 1.0)
    );
    ensure!(seen.wrong.is_empty(), "{}", seen.wrong.iter().take(5).cloned().collect::<Vec<_>>().join("\n"));
    Ok(())
}
