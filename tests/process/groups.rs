//! Two groups behind one coordinator: the death of one moves its requests to the other, which has them go on where they were.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::Place;
use conclave_tests::load::asking;
use conclave_tests::process::{Served, demo, until};
use serde_json::{Value, json};
use std::io::Write;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

/// Eight beginnings, each shared by many requests, with ends of their own.
fn question(number: usize) -> Value {
    let name = ["Ruby", "Milo", "Ada", "Otto", "Nora", "Finn", "Iris", "Hugo"][number % 8];
    let prompt = format!("Tell me a story about a fox named {name}. ").repeat(4) + &format!("Chapter {}.", number / 8);
    let temperature = if number.is_multiple_of(2) { 0.0 } else { 0.9 };
    json!({"model": "m", "prompt": prompt, "max_tokens": 60, "temperature": temperature, "seed": number, "logprobs": 1,
           "n": 1 + number % 2, "return_token_ids": true})
}

fn answers(served: &Served, numbers: std::ops::Range<usize>) -> Result<Vec<Value>> {
    numbers.map(|n| Ok(served.ask("/v1/completions", &question(n))?["choices"].clone())).collect()
}

fn groups(served: &Served) -> Result<Vec<String>> {
    let status = served.get("/status")?.json()?;
    let groups = status["groups"].as_array().context("several groups")?;
    Ok(groups.iter().map(|g| g["phase"].as_str().unwrap_or_default().to_string()).collect())
}

fn metric(served: &Served, name: &str, group: usize) -> Result<f64> {
    let text = String::from_utf8(served.get("/metrics")?.body)?;
    let label = format!("group=\"{group}\"");
    let line = text.lines().find(|line| line.starts_with(name) && line.contains(&label));
    let line = line.with_context(|| format!("no {name} of group {group}"))?;
    Ok(line.rsplit(' ').next().context("a value")?.parse()?)
}

#[test]
fn a_groups_death_moves_its_requests_to_the_other() -> Result<()> {
    let settings = "groups = 2\nworkers = 1\nkv_cache_memory_bytes = 8388608\n";
    let place = Place::new(PROGRAM, "groups", &demo(), settings)?;
    let served = place.coordinator()?;
    let mut workers = [place.worker("w0")?, place.worker("w1")?];
    let both = || groups(&served).is_ok_and(|phases| phases == ["serving", "serving"]);
    until("both groups serve", both)?;

    // What shares a beginning goes where that was computed: the groups together compute each once, about.
    let expected = answers(&served, 0..64)?;
    let (queried, hit) = ("conclave_prefix_cache_queries_total", "conclave_prefix_cache_hits_total");
    let sum = |name| Ok::<f64, anyhow::Error>(metric(&served, name, 0)? + metric(&served, name, 1)?);
    let share = sum(hit)? / sum(queried)?;
    ensure!(share > 0.5, "{share} of the prompts' tokens were found");
    for group in 0..2 {
        ensure!(metric(&served, "conclave_steps_total", group)? > 100.0, "group {group} did hardly anything");
    }

    let ask = |asker: usize, count: usize| -> Result<Duration> {
        let number = (asker * 8 + count) % 64;
        let began = Instant::now();
        let found = answers(&served, number..number + 1)?.remove(0);
        ensure!(found == expected[number], "answer {count} to {number}: {found}, not {}", expected[number]);
        Ok(began.elapsed())
    };
    let tally = asking(8, ask, |_| {
        for round in 0..6 {
            std::thread::sleep(Duration::from_millis(200));
            let victim = round % 2;
            workers[victim].kill()?;
            until("the other alone serves", || served.get("/readyz").is_ok_and(|a| a.status == 200) && !both())?;
            std::thread::sleep(Duration::from_millis(300));
            workers[victim] = place.worker(&format!("w{victim}"))?;
            until("both groups serve again", both)?;
        }
        Ok(())
    })?;
    let (count, longest) = (tally.answers(), tally.longest());
    ensure!(count > 100, "{count} answers under six deaths");
    let line = format!("six deaths of one of two groups: {count} answers, none changed, the slowest {longest:?}\n");
    std::io::stderr().write_all(line.as_bytes())?;
    Ok(())
}
