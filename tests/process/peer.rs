//! Workers whose hosts have no copy of the model load it from those that have one, and answer as they do.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::{Ending, Place};
use conclave_tests::process::{Served, demo, until};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::mpsc::Receiver;
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

/// A folder of a test's own, with the demo model in `full/model` and nothing in `empty`.
struct Roots(PathBuf);

impl Roots {
    fn new(name: &str) -> Result<Roots> {
        let folder = std::env::temp_dir().join(format!("conclave-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(folder.join("full/model"))?;
        std::fs::create_dir_all(folder.join("empty"))?;
        for entry in std::fs::read_dir(demo())? {
            let entry = entry?;
            std::fs::copy(entry.path(), folder.join("full/model").join(entry.file_name()))?;
        }
        Ok(Roots(folder))
    }

    fn model(&self) -> PathBuf {
        self.0.join("full/model")
    }

    fn worker(&self, place: &Place, name: &str, root: &str) -> Result<(Ending, Receiver<String>)> {
        place.worker_with(name, &format!("threads = 1\nmodel_root = {:?}\n", self.0.join(root)))
    }
}

impl Drop for Roots {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn says(lines: &Receiver<String>, text: &str) -> Result<String> {
    let mut said = Vec::new();
    loop {
        let line = lines.recv_timeout(Duration::from_secs(60)).with_context(|| format!("{text:?} in {said:?}"))?;
        if line.contains(text) {
            return Ok(line);
        }
        said.push(line);
    }
}

/// Waits until exactly these workers hold ranks of what is served.
fn serve(served: &Served, names: &[&str]) -> Result<()> {
    until(&format!("{names:?} serve"), || {
        let Ok(status) = served.get("/status").and_then(|a| a.json()) else { return false };
        let members = status["members"].as_array().cloned().unwrap_or_default();
        let holds = |m: &&Value| m["ranks"].as_array().is_some_and(|ranks| !ranks.is_empty());
        let mut found: Vec<&str> = members.iter().filter(holds).filter_map(|m| m["id"].as_str()).collect();
        found.sort_unstable();
        status["phase"] == "serving" && found == names
    })
}

fn answer(served: &Served) -> Result<Value> {
    let question = json!({"model": "m", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0});
    Ok(served.ask("/v1/completions", &question)?["choices"].clone())
}

#[test]
fn a_worker_without_the_model_is_lent_it_and_serves_on_alone() -> Result<()> {
    let roots = Roots::new("lent")?;
    let place = Place::new(PROGRAM, "lent-place", &roots.model(), "")?;
    let served = place.coordinator()?;
    let (mut first, _lines) = roots.worker(&place, "w0", "full")?;
    serve(&served, &["w0"])?;
    let before = answer(&served)?;
    let (_second, lines) = roots.worker(&place, "w1", "empty")?;
    says(&lines, "lends the model's")?;
    serve(&served, &["w0", "w1"])?;
    ensure!(answer(&served)? == before, "on both");
    // What drains hands over to one that has no files.
    first.signal("TERM")?;
    ensure!(first.wait()? == Some(0), "it was let go");
    serve(&served, &["w1"])?;
    ensure!(answer(&served)? == before, "on the one that was lent all of it");
    Ok(())
}

#[test]
fn a_lender_that_is_killed_leaves_the_load_to_the_next() -> Result<()> {
    let roots = Roots::new("killed")?;
    let place = Place::new(PROGRAM, "killed-place", &roots.model(), "")?;
    let served = place.coordinator()?;
    let (_keeps, _lines) = roots.worker(&place, "w1", "full")?;
    serve(&served, &["w1"])?;
    let before = answer(&served)?;
    for round in 0..3 {
        let (mut lender, _lines) = roots.worker(&place, "w0", "full")?;
        serve(&served, &["w0", "w1"])?;
        let name = format!("x{round}");
        let (mut taker, lines) = roots.worker(&place, &name, "empty")?;
        says(&lines, "lends the model's")?;
        lender.kill()?;
        // Two ranks are what three workers and two make of this model.
        until("it serves again", || served.get("/readyz").is_ok_and(|a| a.status == 200))?;
        serve(&served, &["w1", &name])?;
        ensure!(answer(&served)? == before, "round {round}");
        taker.kill()?;
        serve(&served, &["w1"])?;
    }
    Ok(())
}

#[test]
fn where_nobody_has_the_model_the_reason_says_what_is_missing() -> Result<()> {
    let roots = Roots::new("nobody")?;
    let place = Place::new(PROGRAM, "nobody-place", &roots.model(), "workers = 2\n")?;
    let served = place.coordinator()?;
    let (_one, lines) = roots.worker(&place, "w0", "empty")?;
    let (_two, _lines) = roots.worker(&place, "w1", "empty")?;
    let line = says(&lines, "none of 1 peers lends the model's files")?;
    // Whether the other had no files, or had given up the epoch for that already, is a matter of who was first.
    ensure!(line.contains("config.json"), "{line}");
    until("the coordinator says so", || {
        served.get("/readyz").is_ok_and(|a| a.status == 503 && String::from_utf8_lossy(&a.body).contains("config.json"))
    })?;
    Ok(())
}
