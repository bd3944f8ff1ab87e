//! A cluster that is reshaped while it serves: workers come, drain and are restarted one after another, and nobody who
//! asks it anything notices.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::{Ending, Place};
use conclave_tests::process::{Served, answer, demo, until};
use serde_json::{Value, json};
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

const SETTINGS: &str = "workers = 1\nsettle_ms = 100\nkv_cache_memory_bytes = 8388608\n";

fn question(seed: u64, stream: bool) -> Value {
    let temperature = if seed.is_multiple_of(2) { 0.0 } else { 0.8 };
    json!({
        "model": "m", "messages": [{"role": "user", "content": "Tell me a story about a fox."}], "seed": seed,
        "temperature": temperature, "max_tokens": 120, "stream": stream,
    })
}

/// The text of a whole stream, and the longest that it paused.
fn streamed(served: &Served, seed: u64) -> Result<(String, Duration)> {
    let body = question(seed, true).to_string();
    let mut stream = served.open("POST", "/v1/chat/completions", body.as_bytes())?;
    let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
    let (mut last, mut pause) = (Instant::now(), Duration::ZERO);
    loop {
        let count = stream.read(&mut part)?;
        pause = pause.max(last.elapsed());
        last = Instant::now();
        if count == 0 {
            break;
        }
        bytes.extend_from_slice(&part[..count]);
    }
    let answer = answer(&bytes)?;
    ensure!(answer.status == 200, "{}: {}", answer.status, String::from_utf8_lossy(&answer.body));
    let mut text = String::new();
    for line in std::str::from_utf8(&answer.body)?.lines().filter_map(|line| line.strip_prefix("data: ")) {
        if line == "[DONE]" {
            return Ok((text, pause));
        }
        let event: Value = serde_json::from_str(line)?;
        ensure!(event.get("error").is_none(), "{event}");
        text += event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
    }
    anyhow::bail!("the stream ended without [DONE]")
}

/// Asks again and again, in two threads, while `change` goes on: answers are the ones that were given before. How many,
/// and the longest pause of any.
fn under_load(served: &Served, change: impl FnOnce() -> Result<()>) -> Result<(usize, Duration)> {
    let whole = |seed| -> Result<String> {
        let reply = served.ask("/v1/chat/completions", &question(seed, false))?;
        Ok(reply["choices"][0]["message"]["content"].as_str().context("an answer")?.to_string())
    };
    let expected: Vec<String> = (0..4).map(whole).collect::<Result<_>>()?;
    let done = AtomicBool::new(false);
    let ask = |first: u64| -> Result<(usize, Duration)> {
        let (mut count, mut longest) = (0, Duration::ZERO);
        while !done.load(Ordering::Relaxed) {
            let seed = (first + count as u64) % 4;
            let (text, pause) = streamed(served, seed).with_context(|| format!("answer {count}"))?;
            ensure!(text == expected[seed as usize], "answer {count} to {seed} is {text:?}");
            (count, longest) = (count + 1, longest.max(pause));
        }
        Ok((count, longest))
    };
    std::thread::scope(|scope| {
        let askers = [0, 1].map(|first| scope.spawn(move || ask(first)));
        let changed = change();
        done.store(true, Ordering::Relaxed);
        let (mut count, mut longest) = (0, Duration::ZERO);
        for asker in askers {
            let (asked, pause) = asker.join().map_err(|_| anyhow::anyhow!("an asker panicked"))??;
            (count, longest) = (count + asked, longest.max(pause));
        }
        changed.map(|()| (count, longest))
    })
}

fn members(served: &Served) -> Result<Vec<(String, usize)>> {
    let status = served.get("/status")?.json()?;
    let serving = status["phase"] == "serving";
    let ranks = |member: &Value| if serving { member["ranks"].as_array().map_or(0, Vec::len) } else { 0 };
    let all = status["members"].as_array().context("members")?.iter();
    Ok(all.map(|m| (m["id"].as_str().unwrap_or_default().to_string(), ranks(m))).collect())
}

/// Waits until exactly these workers hold ranks and serve.
fn until_served_by(served: &Served, names: &[&str]) -> Result<()> {
    until(&format!("{names:?} serve"), || {
        members(served).is_ok_and(|all| {
            let holders: Vec<&str> = all.iter().filter(|(_, ranks)| *ranks > 0).map(|(id, _)| id.as_str()).collect();
            holders == names
        })
    })
}

#[test]
fn a_cluster_grows_and_shrinks_under_load() -> Result<()> {
    let place = Place::new(PROGRAM, "elastic", &demo(), SETTINGS)?;
    let served = place.coordinator()?;
    let (mut a, _b) = (place.worker("a")?, place.worker("b")?);
    until_served_by(&served, &["a", "b"])?;
    let mut later: Vec<Ending> = Vec::new();
    let (count, pause) = under_load(&served, || {
        later.extend([place.worker("c")?, place.worker("d")?]);
        until_served_by(&served, &["a", "b", "c", "d"])?;
        let drained = served.send("POST", "/drain/c", b"")?;
        ensure!(drained.status == 202, "{}", String::from_utf8_lossy(&drained.body));
        ensure!(later[0].wait()? == Some(0), "a drained worker ends well");
        a.signal("TERM")?;
        ensure!(a.wait()? == Some(0), "a worker that was asked to end drains first");
        until_served_by(&served, &["b", "d"])
    })?;
    let status = served.get("/status")?.json()?;
    let epoch = format!("epoch {}", status["epoch"]);
    let plan = status["plan"].as_str().context("a plan")?;
    ensure!(plan.contains(&epoch) && plan.contains(" b ") && !plan.contains(" c "), "not of {epoch}: {plan}");
    println!("2 to 4 to 3 to 2 workers: {count} answers, none changed; the longest pause {} ms", pause.as_millis());
    let unknown = served.send("POST", "/drain/nobody", b"")?;
    let said = String::from_utf8_lossy(&unknown.body).into_owned();
    ensure!(unknown.status == 400 && said.contains("members: b, d"), "{}: {said}", unknown.status);
    Ok(())
}

#[test]
fn every_worker_can_be_restarted_under_load() -> Result<()> {
    let place = Place::new(PROGRAM, "rolling", &demo(), SETTINGS)?;
    let served = place.coordinator()?;
    let names = ["a", "b"];
    let mut workers: Vec<Ending> = names.iter().map(|name| place.worker(name)).collect::<Result<_>>()?;
    until_served_by(&served, &names)?;
    let (count, pause) = under_load(&served, || {
        for (index, name) in names.iter().enumerate() {
            workers[index].signal("TERM")?;
            ensure!(workers[index].wait()? == Some(0), "it drains first");
            until_served_by(&served, &[names[1 - index]])?;
            workers[index] = place.worker(name)?;
            until_served_by(&served, &names)?;
        }
        Ok(())
    })?;
    println!(
        "each of two workers restarted: {count} answers, none changed; the longest pause {} ms",
        pause.as_millis()
    );
    Ok(())
}

#[test]
fn the_last_worker_serves_until_it_is_replaced() -> Result<()> {
    let place = Place::new(PROGRAM, "last", &demo(), SETTINGS)?;
    let served = place.coordinator()?;
    let mut only = place.worker("a")?;
    until_served_by(&served, &["a"])?;
    let mut next = None;
    under_load(&served, || {
        only.signal("TERM")?;
        until("it says why it can't end yet", || {
            served.get("/status").is_ok_and(|status| String::from_utf8_lossy(&status.body).contains("draining: "))
        })?;
        next = Some(place.worker("b")?);
        ensure!(only.wait()? == Some(0), "it is replaced");
        until_served_by(&served, &["b"])
    })?;
    Ok(())
}
