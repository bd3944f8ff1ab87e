//! A coordinator and its store as processes: epochs outlive the coordinator; a store that is gone ends no service, one
//! that comes late is waited for with the reason shown.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::{Ending, Place, free_address};
use conclave_tests::process::{Served, golden, until};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

const MODEL: &str = "llama32_1b";

fn place(name: &str, store: &str) -> Result<Place> {
    Place::new(PROGRAM, name, &golden(MODEL), &format!("[store]\n{store}\n"))
}

/// `/readyz`: the status and what it says.
fn readiness(served: &Served) -> Result<(u16, Value)> {
    let answer = served.get("/readyz")?;
    Ok((answer.status, answer.json()?))
}

/// A plan whose commit nobody heard of takes a number too: the epoch is this one or a later one.
fn until_ready(served: &Served, epoch: u64) -> Result<()> {
    until("the cluster is ready", || readiness(served).is_ok_and(|(status, _)| status == 200))?;
    let (_, said) = readiness(served)?;
    ensure!(said["epoch"].as_u64() >= Some(epoch), "epoch {epoch} was expected: {said}");
    Ok(())
}

/// Waits for a reason that holds `text`.
fn until_reason(served: &Served, text: &str) -> Result<()> {
    until(text, || readiness(served).is_ok_and(|(status, said)| status == 503 && said.to_string().contains(text)))
}

fn tokens(served: &Served) -> Result<Value> {
    let body = json!({
        "model": "m", "prompt": [1, 5, 9, 13], "max_tokens": 8, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true,
    });
    Ok(served.ask("/v1/completions", &body)?["choices"][0]["token_ids"].clone())
}

fn store_up(served: &Served) -> Result<bool> {
    let text = String::from_utf8(served.get("/metrics")?.body)?;
    let line = text.lines().find(|l| l.starts_with("conclave_store_up")).context("conclave_store_up is missing")?;
    Ok(line.ends_with(" 1"))
}

#[test]
fn epochs_in_a_file_outlive_a_killed_coordinator() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("conclave-data-{}", std::process::id()));
    let place = place("file", &format!("kind = \"file\"\ndata_dir = {folder:?}"))?;
    let mut before = None;
    for epoch in 1..4 {
        let mut served = place.coordinator()?;
        let _worker = place.worker("w")?;
        until_ready(&served, epoch)?;
        let now = tokens(&served)?;
        ensure!(*before.get_or_insert_with(|| now.clone()) == now, "{now}");
        served.signal("KILL")?;
        served.wait()?;
    }
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

fn etcd(address: &str, peer: &str, data: &Path) -> Result<Ending> {
    let (client, peer) = (format!("http://{address}"), format!("http://{peer}"));
    let cluster = format!("n={peer}");
    Ending::spawn(
        Command::new("etcd")
            .args(["--name", "n", "--initial-cluster", &cluster, "--initial-advertise-peer-urls", &peer])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client, "--listen-peer-urls", &peer])
            .arg("--data-dir")
            .arg(data)
            .stderr(Stdio::null()),
    )
}

#[test]
fn serving_goes_on_without_etcd_and_planning_waits_for_it() -> Result<()> {
    if Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_err() {
        let line = b"SKIPPED: no etcd in PATH (Debian, Ubuntu: apt-get install etcd-server)\n";
        std::io::stderr().write_all(line)?;
        return Ok(());
    }
    let (address, peer) = (free_address()?, free_address()?);
    let place = place("etcd", &format!("kind = \"etcd\"\nendpoints = [{address:?}]"))?;
    let data = place.folder().join("etcd");

    // The coordinator is there first.
    let served = place.coordinator()?;
    let mut worker = place.worker("w")?;
    until_reason(&served, "the store is unreachable")?;
    until_reason(&served, &address)?;
    until("the store counts as down", || store_up(&served).is_ok_and(|up| !up))?;
    let mut store = etcd(&address, &peer, &data)?;
    until_ready(&served, 1)?;
    ensure!(store_up(&served)?, "the store counts as down");
    let expected = tokens(&served)?;

    // It goes: nothing changes for clients.
    store.kill()?;
    until("the outage is noticed", || store_up(&served).is_ok_and(|up| !up))?;
    for _ in 0..20 {
        ensure!(tokens(&served)? == expected, "an answer changed");
    }
    ensure!(readiness(&served)?.0 == 200, "{}", readiness(&served)?.1);

    // Only a new plan needs it.
    worker.kill()?;
    let _worker = place.worker("w")?;
    until_reason(&served, "the store is unreachable")?;
    let _store = etcd(&address, &peer, &data)?;
    until_ready(&served, 2)?;
    ensure!(tokens(&served)? == expected, "an answer changed");
    ensure!(store_up(&served)?, "the store counts as down");
    Ok(())
}
