//! What the planner printed is what a rank takes: its process, mapped files apart, stays within the plan's total while
//! steps and cache are full, and is no emptier than its weights and cache.

use anyhow::{Context, Result, ensure};
use conclave_tests::process::{Served, answer, demo, golden};
use serde_json::{Value, json};
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

/// What a process may take beyond a plan's total, which small models do not reach by a tenth: the program itself.
const SLACK: u64 = 64 << 20;

/// Requests at once.
const STREAMS: u64 = 12;

/// The plan of one device or more, as the command prints it.
fn planned(model: &Path, flags: &[&str], devices: &str) -> Result<Value> {
    let output = std::process::Command::new(PROGRAM)
        .arg("plan")
        .arg(model)
        .args(["--json", "--devices", devices])
        .args(flags)
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Bytes of a process, mapped file pages apart.
fn resident(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let field = |name: &str| {
        let value = status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("0");
        value.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap_or(0) * 1024
    };
    field("RssAnon:") + field("RssShmem:")
}

/// Long prompts that no two requests share, all at once: steps are full, and the cache turns over.
fn load(served: &Served, name: &str, length: u64) -> Result<()> {
    let mut answers = Vec::new();
    for stream in 0..STREAMS {
        let prompt: Vec<u64> = (0..length).map(|i| (i * 7919 + stream * 31) % 400 + 3).collect();
        let body = json!({
            "model": name, "prompt": prompt, "max_tokens": 16, "ignore_eos": true, "temperature": 1, "seed": stream,
            "logprobs": 5,
        });
        answers.push(served.open("POST", "/v1/completions", body.to_string().as_bytes())?);
    }
    for mut stream in answers {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes)?;
        let answer = answer(&bytes)?;
        ensure!(answer.status == 200, "{}: {}", answer.status, String::from_utf8_lossy(&answer.body));
    }
    Ok(())
}

/// The peak of each worker while `work` runs.
fn peaks(workers: &[u32], work: impl FnOnce() -> Result<()>) -> Result<Vec<u64>> {
    let (done, found): (_, Vec<AtomicU64>) =
        (AtomicBool::new(false), workers.iter().map(|_| AtomicU64::new(0)).collect());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for (&worker, peak) in workers.iter().zip(&found) {
                    peak.fetch_max(resident(worker), Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let outcome = work();
        done.store(true, Ordering::Relaxed);
        outcome
    })?;
    // Pools give nothing back, so what is there now was there at the peak.
    Ok(workers.iter().zip(found).map(|(&w, peak)| peak.into_inner().max(resident(w))).collect())
}

fn check(model: &Path, name: &str, flags: &[&str], devices: &str) -> Result<()> {
    let plan = planned(model, flags, devices)?;
    let ranks = plan["ranks"].as_array().context("ranks")?;
    let served = Served::start(PROGRAM, model, flags)?;
    let workers = served.workers()?;
    ensure!(workers.len() == ranks.len(), "{} workers for {} ranks", workers.len(), ranks.len());
    let longest = plan["max_model_len"].as_u64().context("max_model_len")? - 16;
    let cache_tokens = plan["lane_cache_tokens"].as_u64().context("lane_cache_tokens")?;
    let length = longest.min(500);
    ensure!(STREAMS * length > cache_tokens, "{cache_tokens} positions would not all be written");
    let peaks = peaks(&workers, || load(&served, name, length))?;
    let bytes = |rank: &Value, key: &str| rank[key].as_u64().context(key.to_string());
    // Equal ranks: the cut is even, so which worker has which does not matter.
    for (rank, peak) in ranks.iter().zip(peaks) {
        let total = bytes(rank, "total_bytes")?;
        let held = bytes(rank, "weights_bytes")? + bytes(rank, "cache_bytes")?;
        println!("{name} {flags:?}: {peak} bytes at most, {total} were planned, {held} of them weights and cache");
        ensure!(peak <= total + SLACK.max(total / 10), "{name} {flags:?}: {peak} bytes, {total} were planned");
        ensure!(peak >= held, "{name} {flags:?}: {peak} bytes, weights and a full cache alone are {held}");
    }
    Ok(())
}

#[test]
fn a_rank_takes_what_the_plan_says() -> Result<()> {
    let long = ["--max-model-len", "1024", "--dtype"];
    check(&demo(), "model", &[&long[..], &["bf16", "--kv-cache-memory", "8MiB"]].concat(), "1x8GiB")?;
    check(&demo(), "model", &[&long[..], &["f32", "--tp", "2", "--kv-cache-memory", "8MiB"]].concat(), "2x8GiB")?;
    let fixture = golden("deepseek_v3");
    check(&fixture, "deepseek_v3", &[&long[..], &["f32", "--kv-cache-memory", "3MiB"]].concat(), "1x8GiB")
}
