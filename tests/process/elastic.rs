//! A cluster that is reshaped while it serves: workers come, drain and are restarted one after another, and nobody who
//! asks it anything notices.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::{Ending, Place};
use conclave_tests::load::under_load;
use conclave_tests::process::{Served, demo, until};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

const SETTINGS: &str = "workers = 1\nsettle_ms = 100\nkv_cache_memory_bytes = 8388608\n";

/// Tokens of an answer that is asked for while workers come and go.
const TOKENS: usize = 120;

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
    let tally = under_load(&served, TOKENS, |_| {
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
    let (count, pause) = (tally.answers(), tally.longest());
    println!("2 to 4 to 3 to 2 workers: {count} answers, none changed; the longest pause {pause:?}");
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
    let tally = under_load(&served, TOKENS, |_| {
        for (index, name) in names.iter().enumerate() {
            workers[index].signal("TERM")?;
            ensure!(workers[index].wait()? == Some(0), "it drains first");
            until_served_by(&served, &[names[1 - index]])?;
            workers[index] = place.worker(name)?;
            until_served_by(&served, &names)?;
        }
        Ok(())
    })?;
    let (count, pause) = (tally.answers(), tally.longest());
    println!("each of two workers restarted: {count} answers, none changed; the longest pause {pause:?}");
    Ok(())
}

#[test]
fn the_last_worker_serves_until_it_is_replaced() -> Result<()> {
    let place = Place::new(PROGRAM, "last", &demo(), SETTINGS)?;
    let served = place.coordinator()?;
    let mut only = place.worker("a")?;
    until_served_by(&served, &["a"])?;
    let mut next = None;
    under_load(&served, TOKENS, |_| {
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
