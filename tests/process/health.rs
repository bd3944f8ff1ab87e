//! A worker's own health: it says what is true, with its reasons, also while its engine or its coordinator stands still.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::{Place, free_address};
use conclave_tests::process::{demo, get, until};
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

const TWO: &str = "workers = 2\ntensor_parallel_size = 2\n";

/// The code of a probe, and its reasons.
fn probe(address: &str, path: &str) -> Result<(u16, String)> {
    let answer = get(address, path)?;
    let body = answer.json()?;
    ensure!(body["phase"].is_string() && body["epoch"].is_u64() && body["status"].is_string(), "{body}");
    Ok((answer.status, body["reasons"].to_string()))
}

fn is(address: &str, path: &str, code: u16) -> bool {
    probe(address, path).is_ok_and(|(status, _)| status == code)
}

/// A metric without labels.
fn metric(address: &str, name: &str) -> Result<f64> {
    let text = String::from_utf8(get(address, "/metrics")?.body)?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    Ok(value.with_context(|| format!("{name} in {text}"))?.parse()?)
}

#[test]
fn a_worker_is_ready_only_while_its_group_serves() -> Result<()> {
    let place = Place::new(PROGRAM, "health", &demo(), TWO)?;
    let health = free_address()?;
    // As an orchestrator would tell it: one file for all, and variables of its own.
    let variables = [
        ("CONCLAVE_HEALTH_LISTEN", health.as_str()),
        ("CONCLAVE_WORKER_NAME", "ordinal-0"),
        ("CONCLAVE_DATA_ADVERTISE", "127.0.0.1:0"),
    ];
    let (_w0, _lines) = place.worker_told(&variables, "all", "data_listen = \"0.0.0.0:0\"\ninsecure = true\n")?;
    until("it lives", || is(&health, "/livez", 200))?;
    ensure!(is(&health, "/startupz", 503), "it has joined nobody");
    let (code, reasons) = probe(&health, "/readyz")?;
    ensure!(code == 503 && reasons.contains("no coordinator"), "{code}: {reasons}");
    let served = place.coordinator()?;
    until("it has joined", || is(&health, "/startupz", 200))?;
    let (code, reasons) = probe(&health, "/readyz")?;
    ensure!(code == 503 && reasons.contains("no plan needs this worker"), "{code}: {reasons}");
    let (mut w1, _lines) = place.worker_with("w1", "")?;
    until("it is ready", || is(&health, "/readyz", 200))?;
    until("so is the group", || served.get("/readyz").is_ok_and(|answer| answer.status == 200))?;
    ensure!(metric(&health, "conclave_worker_ready")? == 1.0 && metric(&health, "conclave_worker_epoch")? >= 1.0);
    ensure!(metric(&health, "conclave_worker_loaded_bytes")? > 0.0);
    let names = served.get("/status")?.json()?["members"].to_string();
    ensure!(names.contains("\"ordinal-0\""), "{names}");
    // A mesh of two ranks needs no third worker: it stands by, ready, and says so.
    let spare = free_address()?;
    let (w2, _lines) = place.worker_with("w2", &format!("health_listen = {spare:?}\n"))?;
    until("the spare has joined", || is(&spare, "/startupz", 200))?;
    until("the spare is ready", || is(&spare, "/readyz", 200))?;
    let (_, reasons) = probe(&spare, "/readyz")?;
    ensure!(reasons.contains("spare") && metric(&spare, "conclave_worker_ready")? == 1.0, "{reasons}");
    ensure!(metric(&spare, "conclave_worker_epoch")? == 0.0, "no plan has it");
    drop(w2);
    until("it is missed", || served.get("/status").is_ok_and(|s| !String::from_utf8_lossy(&s.body).contains("w2")))?;
    w1.kill()?;
    until("it is not ready alone", || is(&health, "/readyz", 503))?;
    drop(served);
    until("it sees that nobody leads", || {
        probe(&health, "/readyz").is_ok_and(|(_, reasons)| reasons.contains("no coordinator"))
    })?;
    ensure!(is(&health, "/livez", 200) && is(&health, "/startupz", 200), "neither is this worker's fault");
    Ok(())
}

#[test]
fn a_rank_whose_step_stands_still_is_not_ready_within_two_seconds() -> Result<()> {
    let place = Place::new(PROGRAM, "still", &demo(), TWO)?;
    let health = free_address()?;
    let served = place.coordinator()?;
    let (_w0, _lines) = place.worker_with("w0", &format!("health_listen = {health:?}\n"))?;
    let (w1, _more) = place.worker_with("w1", "")?;
    until("it is ready", || is(&health, "/readyz", 200))?;
    let done = AtomicBool::new(false);
    let question = json!({"model": "m", "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": 100, "ignore_eos": true});
    std::thread::scope(|scope| {
        let asker = scope.spawn(|| {
            let mut answers = 0;
            while !done.load(Ordering::Relaxed) && served.ask("/v1/chat/completions", &question).is_ok() {
                answers += 1;
            }
            answers
        });
        let stop = || -> Result<()> {
            until("steps run", || metric(&health, "conclave_worker_progress_total").is_ok_and(|layers| layers > 0.0))?;
            ensure!(is(&health, "/readyz", 200), "it serves");
            // The other rank stops, so that this one waits inside a sum; nobody is left to end the epoch.
            w1.signal("STOP")?;
            let stopped = Instant::now();
            until("a step waits", || metric(&health, "conclave_worker_steps_pending").is_ok_and(|steps| steps > 0.0))?;
            served.signal("STOP")?;
            let mut heard = None;
            until("it says so", || {
                heard = probe(&health, "/readyz").ok().filter(|(code, _)| *code == 503);
                heard.is_some()
            })?;
            let (took, (_, reasons)) = (stopped.elapsed(), heard.context("heard above")?);
            eprintln!("not ready after {took:?}: {reasons}");
            ensure!(reasons.contains("nothing has moved for"), "{reasons}");
            ensure!(took <= Duration::from_secs(2), "not ready only after {took:?}");
            ensure!(is(&health, "/livez", 200), "a second is no death");
            Ok(())
        };
        let outcome = stop();
        let resumed = w1.signal("CONT").and(served.signal("CONT"));
        done.store(true, Ordering::Relaxed);
        let answers = asker.join().map_err(|_| anyhow::anyhow!("the asker panicked"))?;
        outcome.and(resumed)?;
        ensure!(answers > 0, "no request was answered");
        until("it is ready again", || is(&health, "/readyz", 200))
    })
}
