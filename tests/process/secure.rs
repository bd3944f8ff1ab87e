//! A node plane under mutual TLS: who does not belong stays outside, and is told why.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::Place;
use conclave_tests::process::{demo, until};
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

#[test]
fn what_other_hosts_can_reach_must_be_guarded() -> Result<()> {
    let place = Place::new(PROGRAM, "exposed", &demo(), "")?;
    for (settings, text) in [
        ("data_listen = \"0.0.0.0:0\"\n", "the ranks' data on 0.0.0.0:0 would be open to other hosts"),
        ("data_listen = \"0.0.0.0:0\"\ninsecure = true\n", "waiting for the coordinator"),
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
