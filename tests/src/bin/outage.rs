//! Serving without a store: two coordinators over one etcd, which is killed for a while under steady requests through both.
//! No request may fail or differ, nobody may become unready, and what leads and serves stays.
//!
//! `cargo build --release && cargo run --release -p conclave-tests --bin outage -- target/release/conclave [SECONDS]`

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::{Place, free_address};
use conclave_tests::etcd;
use conclave_tests::process::{Served, demo, until};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Between two requests of a client, and between two looks at readiness.
const PAUSE: Duration = Duration::from_millis(250);

fn question(kind: usize) -> Value {
    let temperature = if kind.is_multiple_of(2) { 0.0 } else { 0.9 };
    json!({"model": "m", "prompt": format!("Tell me a story about a fox. {kind}"), "max_tokens": 40, "seed": kind,
           "temperature": temperature, "return_token_ids": true})
}

fn ask(served: &Served, kind: usize) -> Result<Value> {
    Ok(served.ask("/v1/completions", &question(kind))?["choices"].clone())
}

fn ready(served: &Served) -> bool {
    served.get("/readyz").is_ok_and(|answer| answer.status == 200)
}

/// Ready, and the store answers.
fn whole(served: &Served) -> bool {
    let up = |text: String| text.lines().any(|line| line.starts_with("conclave_store_up") && line.ends_with(" 1"));
    ready(served) && served.get("/metrics").is_ok_and(|a| String::from_utf8(a.body).is_ok_and(up))
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let program = arguments.first().context("the program to test is missing")?;
    let seconds: u64 = arguments.get(1).map_or(Ok(600), |text| text.parse())?;
    let address = free_address()?;
    let settings = format!(
        "workers = 2\nkv_cache_memory_bytes = 8388608\n[store]\nkind = \"etcd\"\nendpoints = [\"http://{address}\"]\n"
    );
    let places =
        [Place::new(program, "outage-0", &demo(), &settings)?, Place::new(program, "outage-1", &demo(), &settings)?];
    let data = places[0].folder().join("etcd");
    let mut store = etcd::start(&address, &data)?.context("this needs etcd")?;
    let pair = [places[0].coordinator()?, places[1].coordinator()?];
    let both = format!("{},{}", places[0].node(), places[1].node());
    let workers = [places[0].worker_at("w0", &both)?, places[0].worker_at("w1", &both)?];
    until("both are ready", || pair.iter().all(whole))?;
    let status = |served: &Served| -> Result<Value> {
        let status = served.get("/status")?.json()?;
        Ok(json!([status["epoch"], status["leader"], status["stands_by"]]))
    };
    let before = [status(&pair[0])?, status(&pair[1])?];
    let expected = (0..16).map(|kind| ask(&pair[0], kind)).collect::<Result<Vec<_>>>()?;
    let (done, answers, looks) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let client = |served: &Served| -> Result<()> {
        while !done.load(Ordering::Relaxed) {
            let number = answers.fetch_add(1, Ordering::Relaxed);
            let found = ask(served, number % 16).with_context(|| format!("answer {number}"))?;
            ensure!(found == expected[number % 16], "answer {number} differs: {found}");
            ensure!(ready(served), "not ready at answer {number}: {:?}", served.get("/readyz")?);
            looks.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(PAUSE);
        }
        Ok(())
    };
    let back = std::thread::scope(|scope| -> Result<Duration> {
        let clients: Vec<_> = pair.iter().map(|served| scope.spawn(|| client(served))).collect();
        let mut outage = || -> Result<Duration> {
            std::thread::sleep(Duration::from_secs(1));
            store.kill()?;
            let gone = Instant::now();
            while gone.elapsed() < Duration::from_secs(seconds) && !clients.iter().any(|c| c.is_finished()) {
                std::thread::sleep(PAUSE);
            }
            store = etcd::start(&address, &data)?.context("it was there before")?;
            let since = Instant::now();
            until("all is whole again", || pair.iter().all(whole))?;
            Ok(since.elapsed())
        };
        let back = outage();
        done.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("a client panicked"))??;
        }
        back
    })?;
    ensure!([status(&pair[0])?, status(&pair[1])?] == before, "the lead or the epoch changed");
    drop(workers);
    println!(
        "etcd gone for {seconds} s: {} answers, 0 failed, 0 changed, ready at all of {} looks; whole {:.1} s after its return",
        answers.load(Ordering::Relaxed),
        looks.load(Ordering::Relaxed),
        back.as_secs_f64()
    );
    Ok(())
}
