//! A node plane under mutual TLS: who does not belong stays outside, and is told why.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::{Place, free_address, hosts_apart};
use conclave_tests::process::{Answer, Served, demo, until};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::Receiver;
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

fn certificates(directory: &Path) -> Result<()> {
    let made = Command::new(PROGRAM).args(["certs", "init"]).arg(directory).output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}

fn tls(authority: &Path, own: &Path, role: &str) -> String {
    let file = |directory: &Path, name: String| directory.join(name).display().to_string();
    format!(
        "tls = {{ ca = {:?}, certificate = {:?}, key = {:?} }}\n",
        file(authority, "ca.crt".into()),
        file(own, format!("{role}.crt")),
        file(own, format!("{role}.key")),
    )
}

/// Waits for a line with one of `texts`.
fn says(lines: &Receiver<String>, texts: &[&str]) -> Result<String> {
    let mut said = Vec::new();
    loop {
        let line = lines.recv_timeout(Duration::from_secs(60)).with_context(|| format!("{texts:?} in {said:?}"))?;
        if texts.iter().any(|text| line.contains(text)) {
            return Ok(line);
        }
        said.push(line);
    }
}

#[test]
fn only_those_whom_the_authority_vouches_for_come_in() -> Result<()> {
    let folder = std::env::temp_dir().join(format!("conclave-authorities-{}", std::process::id()));
    let (ours, strange) = (folder.join("ours"), folder.join("strange"));
    certificates(&ours)?;
    certificates(&strange)?;
    let place = Place::new(PROGRAM, "secure", &demo(), &tls(&ours, &ours, "coordinator"))?;
    let served = place.coordinator()?;
    // In the clear; by another authority; that trusts another authority; with another's token.
    let (_clear, clear) = place.worker_with("clear", "")?;
    let (_forged, forged) = place.worker_with("forged", &tls(&ours, &strange, "worker"))?;
    let (_misled, misled) = place.worker_with("misled", &tls(&strange, &ours, "worker"))?;
    says(&clear, &["waiting for the coordinator", "stream ended"])?;
    says(&forged, &["waiting for the coordinator", "stream ended"])?;
    says(&misled, &["UnknownIssuer", "certificate"])?;
    let (_right, right) = place.worker_with("right", &tls(&ours, &ours, "worker"))?;
    says(&right, &["loading epoch 1"])?;
    until("it serves", || served.get("/readyz").is_ok_and(|answer| answer.status == 200))?;
    let status = served.get("/status")?.json()?;
    let names: Vec<&str> =
        status["members"].as_array().context("members")?.iter().flat_map(|m| m["id"].as_str()).collect();
    ensure!(names == ["right"], "{names:?}");
    std::fs::remove_dir_all(folder)?;
    Ok(())
}

#[test]
fn a_worker_speaks_to_no_coordinator_with_a_workers_certificate() -> Result<()> {
    let ours = std::env::temp_dir().join(format!("conclave-authority-{}", std::process::id()));
    certificates(&ours)?;
    let place = Place::new(PROGRAM, "stolen", &demo(), &tls(&ours, &ours, "worker"))?;
    let served = place.coordinator()?;
    let (_worker, lines) = place.worker_with("w", &tls(&ours, &ours, "worker"))?;
    says(&lines, &["waiting for the coordinator"])?;
    ensure!(served.get("/readyz")?.status == 503);
    std::fs::remove_dir_all(ours)?;
    Ok(())
}

/// A story by two workers of different hosts, sampled.
fn told(served: &Served) -> Result<Value> {
    until("it serves", || served.get("/readyz").is_ok_and(|answer: Answer| answer.status == 200))?;
    let question = json!({"model": "m", "messages": [{"role": "user", "content": "Tell me a story about an owl."}],
        "seed": 7, "temperature": 0.8, "max_tokens": 60, "logprobs": true});
    let reply = served.ask("/v1/chat/completions", &question)?;
    Ok(reply["choices"].clone())
}

#[test]
fn ranks_of_two_hosts_speak_encrypted_and_give_the_same_answer() -> Result<()> {
    if !hosts_apart() {
        return Ok(());
    }
    let ours = std::env::temp_dir().join(format!("conclave-authority-ranks-{}", std::process::id()));
    certificates(&ours)?;
    let two = "workers = 2\ntensor_parallel_size = 2\n";
    let clear = {
        let place = Place::new(PROGRAM, "ranks-clear", &demo(), two)?;
        let served = place.coordinator()?;
        let _workers = [place.worker_apart("w0", "")?, place.worker_apart("w1", "")?];
        told(&served)?
    };
    let place = Place::new(PROGRAM, "ranks", &demo(), &format!("{two}{}", tls(&ours, &ours, "coordinator")))?;
    let served = place.coordinator()?;
    let door = free_address()?;
    // Peers dial a name that is not the address listened at.
    let port = door.rsplit(':').next().context("a port")?;
    let settings = format!(
        "data_listen = \"0.0.0.0:{port}\"\ndata_advertise = \"localhost:{port}\"\n{}",
        tls(&ours, &ours, "worker")
    );
    let (_w0, lines) = place.worker_apart("w0", &settings)?;
    let _w1 = place.worker_apart("w1", &tls(&ours, &ours, "worker"))?;
    ensure!(told(&served)? == clear, "encryption changed the answer");
    // Nothing but TLS is spoken there.
    let mut stranger = TcpStream::connect(&door)?;
    stranger.write_all(&[b'c'; 64])?;
    let mut said = Vec::new();
    let _ = stranger.read_to_end(&mut said);
    ensure!(said.first().is_none_or(|byte| *byte == 21), "no alert of TLS: {said:?}");
    says(&lines, &["a peer at 127.0.0.1 was refused: it does not speak TLS"])?;
    ensure!(told(&served)? == clear, "a stranger changed the answer");
    std::fs::remove_dir_all(ours)?;
    Ok(())
}

#[test]
fn a_coordinators_certificate_joins_no_ranks() -> Result<()> {
    let ours = std::env::temp_dir().join(format!("conclave-authority-posing-{}", std::process::id()));
    certificates(&ours)?;
    let settings = format!("workers = 2\ntensor_parallel_size = 2\n{}", tls(&ours, &ours, "coordinator"));
    let place = Place::new(PROGRAM, "posing", &demo(), &settings)?;
    let served = place.coordinator()?;
    let (_right, right) = place.worker_with("right", &tls(&ours, &ours, "worker"))?;
    let (_posing, posing) = place.worker_with("posing", &tls(&ours, &ours, "coordinator"))?;
    let named = "a certificate for coordinator.conclave instead of worker.conclave";
    says(&right, &[named])?;
    says(&posing, &["refuses this worker's certificate: it is not for worker.conclave"])?;
    ensure!(served.get("/readyz")?.status == 503);
    std::fs::remove_dir_all(ours)?;
    Ok(())
}

#[test]
fn what_other_hosts_can_reach_must_be_guarded() -> Result<()> {
    let place = Place::new(PROGRAM, "exposed", &demo(), "")?;
    let ours = place.folder().join("authority");
    certificates(&ours)?;
    let guarded =
        format!("data_listen = \"0.0.0.0:0\"\ndata_advertise = \"localhost:0\"\n{}", tls(&ours, &ours, "worker"));
    for (settings, text) in [
        ("data_listen = \"0.0.0.0:0\"\n", "the ranks' data on 0.0.0.0:0 would be open to other hosts"),
        ("data_listen = \"0.0.0.0:0\"\ninsecure = true\n", "data_listen = \"0.0.0.0:0\" can't be dialled by peers"),
        (
            "data_listen = \"0.0.0.0:0\"\ndata_advertise = \"localhost:0\"\ninsecure = true\n",
            "waiting for the coordinator",
        ),
        (guarded.as_str(), "waiting for the coordinator"),
    ] {
        let (_worker, lines) = place.worker_with("w", settings)?;
        says(&lines, &[text])?;
    }
    let settings = std::fs::read_to_string(place.settings())?;
    let settings = settings.lines().map(|line| match line.starts_with("node_listen") {
        true => "node_listen = \"0.0.0.0:0\"\n".to_string(),
        false => format!("{line}\n"),
    });
    std::fs::write(place.settings(), settings.collect::<String>())?;
    let refused = Command::new(PROGRAM).args(["coordinator", "--config"]).arg(place.settings()).output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(!refused.status.success() && said.contains("would be open to other hosts"), "{said}");
    Ok(())
}
