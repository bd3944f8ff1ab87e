//! Several coordinators over one etcd: one leads, the others forward. A leader that is killed, stopped or asked to end
//! takes no request with it that another coordinator holds.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::{Place, free_address};
use conclave_tests::etcd;
use conclave_tests::load::{Tally, asking};
use conclave_tests::process::{Served, demo, until};
use conclave_tests::stream::{self, Said};
use serde_json::{Value, json};
use std::io::Write;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

fn question(seed: u64) -> Value {
    let temperature = if seed.is_multiple_of(2) { 0.0 } else { 0.8 };
    json!({
        "model": "m", "messages": [{"role": "user", "content": "Tell me a story about a fox."}], "seed": seed,
        "temperature": temperature, "max_tokens": 120, "stream": true, "n": 1 + seed % 3, "logprobs": seed % 4 == 1,
        "stream_options": {"include_usage": true},
    })
}

/// What a whole stream said, and its longest pause.
fn streamed(served: &Served, seed: u64) -> Result<(Said, Duration)> {
    stream::read(served.open("POST", "/v1/chat/completions", question(seed).to_string().as_bytes())?)
}

/// Asks through all of `doors`, two at a time each, while `change` goes on, and for a while after: every answer is the one given
/// before.
fn under_load(doors: &[&Served], change: impl FnOnce() -> Result<()>) -> Result<Tally> {
    let expected: Vec<_> = (0..4).map(|seed| Ok(streamed(doors[0], seed)?.0)).collect::<Result<Vec<_>>>()?;
    let ask = |asker: usize, count: usize| -> Result<Duration> {
        let seed = (asker % 2 + count) % 4;
        let (said, pause) = streamed(doors[asker / 2], seed as u64).with_context(|| format!("answer {count}"))?;
        ensure!(said == expected[seed], "answer {count} to {seed}: {said:?}, not {:?}", expected[seed]);
        Ok(pause)
    };
    asking(2 * doors.len(), ask, |_| {
        std::thread::sleep(Duration::from_millis(300));
        change()?;
        std::thread::sleep(Duration::from_millis(500));
        Ok(())
    })
}

fn ready(served: &Served) -> bool {
    served.get("/readyz").is_ok_and(|answer| answer.status == 200)
}

fn leads(served: &Served) -> Result<bool> {
    let status = served.get("/status")?.json()?;
    Ok(status["stands_by"] == false && status["phase"] == "serving")
}

/// Which of two leads, once both are ready.
fn leader(pair: &[Served; 2]) -> Result<usize> {
    until("both are ready", || pair.iter().all(ready))?;
    Ok(usize::from(!leads(&pair[0])?))
}

#[test]
fn whoever_leads_dies_and_no_request_of_another_coordinator_notices() -> Result<()> {
    let address = free_address()?;
    let settings = format!(
        "workers = 2\nsettle_ms = 100\nkv_cache_memory_bytes = 8388608\n[store]\nkind = \"etcd\"\nendpoints = [{address:?}]\n"
    );
    let places =
        [Place::new(PROGRAM, "leaders-0", &demo(), &settings)?, Place::new(PROGRAM, "leaders-1", &demo(), &settings)?];
    let Some(mut store) = etcd::start(&address, &places[0].folder().join("etcd"))? else { return Ok(()) };
    let mut pair = [places[0].coordinator()?, places[1].coordinator()?];
    let both = format!("{},{}", places[0].node(), places[1].node());
    let _workers = [places[0].worker_at("w0", &both)?, places[0].worker_at("w1", &both)?];
    let mut report = String::new();

    for round in 0..4 {
        let leading = leader(&pair)?;
        let standing = 1 - leading;
        let before = pair[leading].get("/status")?.json()?;
        let shown = pair[standing].get("/status")?.json()?;
        ensure!(shown["stands_by"] == true && shown["epoch"] == before["epoch"], "{shown}");
        ensure!(shown["leader"] == before["leader"] && shown["leader"] == places[leading].node(), "{shown}");
        let mut since = None;
        let mut regained = Duration::ZERO;
        // Killed, stopped for a while, and asked to end; that one finishes what its own clients wait for.
        let (how, doors) = match round {
            0 | 3 => ("killed", vec![&pair[standing]]),
            1 => ("stopped", vec![&pair[standing]]),
            _ => ("asked to end", vec![&pair[standing]]),
        };
        let signal = ["KILL", "STOP", "TERM", "KILL"][round];
        let tally = under_load(&doors, || {
            since = Some(Instant::now());
            pair[leading].signal(signal)?;
            until("the other one leads", || leads(&pair[standing]).unwrap_or(false))?;
            regained = since.map(|s| s.elapsed()).unwrap_or_default();
            Ok(())
        })?;
        report += &format!(
            "{how}: another serves after {regained:?}; {} answers, longest pause {:?}\n",
            tally.answers(),
            tally.longest()
        );
        match round {
            1 => {
                pair[leading].signal("CONT")?;
                until("the old one stands by", || {
                    pair[leading].get("/status").and_then(|a| a.json()).is_ok_and(|s| s["stands_by"] == true)
                })?;
                ensure!(leads(&pair[standing])?, "the one that was stopped took the lead back");
            }
            _ => {
                pair[leading].wait()?;
                pair[leading] = places[leading].coordinator()?;
            }
        }
    }

    // The store goes: the lead stays where it is, and comes to no harm when the store is back.
    let leading = leader(&pair)?;
    let epoch = pair[leading].get("/status")?.json()?["epoch"].clone();
    let tally = under_load(&[&pair[0], &pair[1]], || {
        store.kill()?;
        std::thread::sleep(Duration::from_secs(4));
        let again = etcd::start(&address, &places[0].folder().join("etcd"))?.context("it was there before")?;
        std::thread::sleep(Duration::from_secs(4));
        store = again;
        Ok(())
    })?;
    report += &format!("etcd gone for 4 s: {} answers, longest pause {:?}\n", tally.answers(), tally.longest());
    ensure!(leader(&pair)? == leading, "the lead changed");
    ensure!(pair[leading].get("/status")?.json()?["epoch"] == epoch, "the epoch changed");
    std::io::stderr().write_all(report.as_bytes())?;
    Ok(())
}
