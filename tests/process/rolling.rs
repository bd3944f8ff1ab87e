//! Every process of a cluster is ended and started again, one after another, as a roll of a new version does, while clients
//! ask whichever coordinator is ready: no answer fails, none changes.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::{Ending, Place, free_address};
use conclave_tests::etcd;
use conclave_tests::load::asking;
use conclave_tests::process::{Served, demo, get, until};
use conclave_tests::stream::{self, Said};
use serde_json::{Value, json};
use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

const CLIENTS: usize = 3;

fn question(seed: u64) -> Value {
    json!({
        "model": "m", "messages": [{"role": "user", "content": "Tell me a story about a fox."}], "seed": seed,
        "temperature": if seed.is_multiple_of(2) { 0.0 } else { 0.8 }, "max_tokens": 120, "stream": true,
        "stream_options": {"include_usage": true},
    })
}

/// Asks a ready coordinator, as a balancer would choose one. A connection that it no longer takes, or a refusal with a time to
/// come again, before anything was answered, is no failure: the next one is asked, as every client of this protocol does.
fn ask(doors: &[String], turn: &AtomicUsize, again: &AtomicUsize, seed: u64) -> Result<(Said, Duration)> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let body = question(seed).to_string();
    loop {
        ensure!(Instant::now() < deadline, "no coordinator is ready");
        let door = &doors[turn.fetch_add(1, Ordering::Relaxed) % doors.len()];
        if !get(door, "/readyz").is_ok_and(|answer| answer.status == 200) {
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        let Ok(mut stream) = TcpStream::connect(door) else { continue };
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        let head = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {door}\r\ncontent-type: application/json\r\n\
             content-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        );
        if stream.write_all(head.as_bytes()).is_err() {
            continue;
        }
        match stream::read(stream) {
            Err(error) if error.to_string().starts_with("503: ") || error.to_string().starts_with("no HTTP head") => {
                again.fetch_add(1, Ordering::Relaxed);
            }
            other => return other,
        }
    }
}

fn serving(served: &Served, workers: &[&str]) -> bool {
    let members = || -> Option<bool> {
        let status = served.get("/status").ok()?.json().ok()?;
        let members = status["members"].as_array()?;
        let here = |name: &&str| members.iter().any(|m| m["id"] == **name && m["phase"] != "idle");
        Some(status["phase"] == "serving" && workers.iter().all(here))
    };
    served.get("/readyz").is_ok_and(|answer| answer.status == 200) && members().unwrap_or(false)
}

#[test]
fn every_process_is_rolled_and_no_answer_fails() -> Result<()> {
    let address = free_address()?;
    let settings = format!(
        "workers = 1\nsettle_ms = 100\nkv_cache_memory_bytes = 8388608\n[store]\nkind = \"etcd\"\nendpoints = [{address:?}]\n"
    );
    let places =
        [Place::new(PROGRAM, "rolling-0", &demo(), &settings)?, Place::new(PROGRAM, "rolling-1", &demo(), &settings)?];
    let Some(_store) = etcd::start(&address, &places[0].folder().join("etcd"))? else { return Ok(()) };
    let mut coordinators = [places[0].coordinator()?, places[1].coordinator()?];
    let both = format!("{},{}", places[0].node(), places[1].node());
    let names = ["w0", "w1"];
    let mut workers =
        names.map(|name| places[0].worker_at(name, &both)).into_iter().collect::<Result<Vec<Ending>>>()?;
    until("all serve", || coordinators.iter().all(|c| serving(c, &names)))?;

    let doors = places.each_ref().map(|place| place.api().to_string());
    let (turn, again) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let expected = (0..4).map(|seed| Ok(ask(&doors, &turn, &again, seed)?.0)).collect::<Result<Vec<Said>>>()?;
    let began = Instant::now();
    let ask = |asker: usize, count: usize| -> Result<Duration> {
        let seed = (asker + count) % expected.len();
        let (said, pause) = ask(&doors, &turn, &again, seed as u64).with_context(|| format!("answer {count}"))?;
        ensure!(said == expected[seed], "answer {count} to {seed}: {said:?}");
        Ok(pause)
    };
    let tally = asking(CLIENTS, ask, |_| {
        for (index, name) in names.iter().enumerate() {
            workers[index].signal("TERM")?;
            ensure!(workers[index].wait()? == Some(0), "{name} did not end well");
            workers[index] = places[0].worker_at(name, &both)?;
            until("it serves again", || coordinators.iter().all(|c| serving(c, &names)))?;
        }
        for index in 0..coordinators.len() {
            coordinators[index].signal("TERM")?;
            ensure!(coordinators[index].wait()? == Some(0), "coordinator {index} did not end well");
            coordinators[index] = places[index].coordinator()?;
            until("it serves again", || coordinators.iter().all(|c| serving(c, &names)))?;
        }
        Ok(())
    })?;
    let report = format!(
        "two workers and two coordinators rolled in {:?}: {} answers, none failed or changed, {} asked again elsewhere; \
         longest pause {:?}\n",
        began.elapsed(),
        tally.answers(),
        again.load(Ordering::Relaxed),
        tally.longest()
    );
    std::io::stderr().write_all(report.as_bytes())?;
    Ok(())
}
