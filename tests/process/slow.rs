//! A worker that is much slower than its peer is named, then planned around, and no answer changes.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::Place;
use conclave_tests::load::asking;
use conclave_tests::process::{Served, demo, kill, until};
use serde_json::{Value, json};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

/// The worker stands still for so long, runs for so long, and so on: a small part of its speed, as a signal takes some milliseconds too.
const STANDS: Duration = Duration::from_millis(24);
const RUNS: Duration = Duration::from_millis(3);

fn ask(served: &Served) -> Result<Value> {
    let question = json!({"model": "m", "prompt": "Tell me a story about a fox.", "max_tokens": 200, "temperature": 0.8,
                          "seed": 3, "return_token_ids": true});
    Ok(served.ask("/v1/completions", &question)?["choices"].clone())
}

fn member(served: &Served, name: &str) -> Result<Value> {
    let status = served.get("/status")?.json()?;
    let found = status["members"].as_array().into_iter().flatten().find(|m| m["id"] == name).cloned();
    found.with_context(|| format!("no {name} in {status}"))
}

/// Stops and continues a process again and again while `watch` goes on.
fn braked(process: u32, watch: impl FnOnce() -> Result<()>) -> Result<()> {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let brake = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                kill(process, "STOP")?;
                std::thread::sleep(STANDS);
                kill(process, "CONT")?;
                std::thread::sleep(RUNS);
            }
            Ok(())
        });
        let watched = watch();
        done.store(true, Ordering::Relaxed);
        brake.join().map_err(|_| anyhow::anyhow!("the brake panicked"))??;
        watched
    })
}

#[test]
fn a_slow_worker_is_named_and_then_planned_around() -> Result<()> {
    let place = Place::new(PROGRAM, "slow", &demo(), "workers = 1\nkv_cache_memory_bytes = 8388608\n")?;
    let served = place.coordinator()?;
    let (_quick, slow) = (place.worker("w0")?, place.worker("w1")?);
    let ranks = |name: &str| member(&served, name).map_or(0, |m| m["ranks"].as_array().map_or(0, Vec::len));
    until("both serve", || {
        served.get("/readyz").is_ok_and(|a| a.status == 200) && ranks("w0") == 1 && ranks("w1") == 1
    })?;
    let (expected, process) = (ask(&served)?, slow.id());
    let mut report = String::new();
    let asked = |_, count: usize| -> Result<Duration> {
        let found = ask(&served)?;
        ensure!(found == expected, "answer {count} differs: {found}");
        Ok(Duration::ZERO)
    };
    let tally = asking(1, asked, |_| {
        braked(process, || {
            let began = Instant::now();
            let phase = |name: &str, start: &str| {
                member(&served, name).is_ok_and(|m| m["phase"].as_str().is_some_and(|p| p.starts_with(start)))
            };
            until("it is named", || phase("w1", "slow: "))?;
            let named = began.elapsed();
            ensure!(!phase("w0", "slow"), "the other one was named too");
            let metrics = String::from_utf8(served.get("/metrics")?.body)?;
            ensure!(metrics.contains("conclave_slow_workers{"), "no metric says so");
            until("it is planned around", || ranks("w1") == 0 && ranks("w0") == 1)?;
            let around = began.elapsed();
            until("its state says why", || phase("w1", "avoided: it was slow"))?;
            report = format!("named after {named:?}, planned around after {around:?}");
            Ok(())
        })
    })?;
    report += &format!("; {} answers, none changed\n", tally.answers());
    std::io::stderr().write_all(report.as_bytes())?;
    Ok(())
}
