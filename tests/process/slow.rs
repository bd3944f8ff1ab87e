//! A worker that is much slower than its peer is named, and no answer changes. (That plans do without it is held by the unit tests of
//! `coordinator/src/cluster/state`: a stopped and started process is too uneven a brake.)

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::Place;
use conclave_tests::process::{Served, demo, kill, until};
use serde_json::{Value, json};
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

/// The worker stands still for so long, runs for so long, and so on. Half of the stops fall into its waiting for the other.
const STANDS: Duration = Duration::from_millis(120);
const RUNS: Duration = Duration::from_millis(20);

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

#[test]
fn a_slow_worker_is_named() -> Result<()> {
    let place = Place::new(PROGRAM, "slow", &demo(), "workers = 2\nkv_cache_memory_bytes = 8388608\n")?;
    let served = place.coordinator()?;
    let (_quick, slow) = (place.worker("w0")?, place.worker("w1")?);
    until("both serve", || served.get("/readyz").is_ok_and(|a| a.status == 200))?;
    let (expected, done) = (ask(&served)?, AtomicBool::new(false));
    let process = slow.id();
    let until_done = || !done.load(Ordering::Relaxed);
    let report = std::thread::scope(|scope| -> Result<String> {
        let asker = scope.spawn(|| -> Result<usize> {
            let mut count = 0;
            while until_done() {
                let found = ask(&served)?;
                ensure!(found == expected, "answer {count} differs: {found}");
                count += 1;
            }
            Ok(count)
        });
        let slowed = scope.spawn(|| -> Result<()> {
            while until_done() {
                kill(process, "STOP")?;
                std::thread::sleep(STANDS);
                kill(process, "CONT")?;
                std::thread::sleep(RUNS);
            }
            Ok(())
        });
        let watch = || -> Result<String> {
            let began = Instant::now();
            until("it is named", || {
                member(&served, "w1").is_ok_and(|m| m["phase"].as_str().is_some_and(|p| p.starts_with("slow: ")))
            })?;
            let named = began.elapsed();
            ensure!(member(&served, "w0")?["phase"] != "slow", "the other one was named too");
            let metrics = String::from_utf8(served.get("/metrics")?.body)?;
            ensure!(metrics.contains("conclave_slow_workers{"), "no metric says so");
            Ok(format!("named after {named:?}"))
        };
        let watched = watch();
        done.store(true, Ordering::Relaxed);
        slowed.join().map_err(|_| anyhow::anyhow!("the brake panicked"))??;
        let count = asker.join().map_err(|_| anyhow::anyhow!("the asker panicked"))??;
        watched.map(|report| format!("{report}; {count} answers, none changed\n"))
    })?;
    std::io::stderr().write_all(report.as_bytes())?;
    Ok(())
}
