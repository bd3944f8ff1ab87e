//! What ranks prove of their weights keeps wrong ones out, and `conclave verify` compares a cluster with one rank.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::Place;
use conclave_tests::process::{Served, demo, until};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

/// A folder `model` with the demo model in it, in a folder of its own.
fn copy(name: &str) -> Result<PathBuf> {
    let folder = std::env::temp_dir().join(format!("conclave-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    let model = folder.join("model");
    std::fs::create_dir_all(&model)?;
    for entry in std::fs::read_dir(demo())? {
        let entry = entry?;
        std::fs::copy(entry.path(), model.join(entry.file_name()))?;
    }
    Ok(model)
}

fn remove(model: &Path) -> Result<()> {
    Ok(std::fs::remove_dir_all(model.parent().unwrap_or(model))?)
}

/// Flips so many bits of weights, evenly spread.
fn corrupt(model: &Path, bits: usize) -> Result<()> {
    let file = model.join("model.safetensors");
    let mut bytes = std::fs::read(&file)?;
    let each = bytes.len() / (bits + 1);
    (1..=bits).for_each(|n| bytes[n * each] ^= 1);
    Ok(std::fs::write(&file, bytes)?)
}

fn verify(model: &Path, arguments: &[&str]) -> Result<Output> {
    Ok(Command::new(PROGRAM).arg("verify").arg(model).args(arguments).output()?)
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_cluster_is_verified_against_one_rank_and_other_files_are_not() -> Result<()> {
    let served = Served::start(PROGRAM, &demo(), &["--tp", "2", "--dp", "2", "--ep", "4"])?;
    let url = format!("http://{}", served.address);
    let good = verify(&demo(), &["--url", &url])?;
    ensure!(good.status.success(), "{}", said(&good));
    for part in ["weights: the same in all", "answers: the same tokens and log-probabilities"] {
        ensure!(said(&good).contains(part), "{}", said(&good));
    }
    let other = copy("verified")?;
    corrupt(&other, 1)?;
    let bad = verify(&other, &["--url", &url])?;
    ensure!(bad.status.code() == Some(1) && said(&bad).contains("the weights differ"), "{}", said(&bad));
    remove(&other)?;
    Ok(())
}

#[test]
fn a_list_of_digests_keeps_a_flipped_bit_from_being_served() -> Result<()> {
    let model = copy("listed")?;
    let written = verify(&model, &["--write-list"])?;
    ensure!(written.status.success() && said(&written).contains("conclave.segments"), "{}", said(&written));
    corrupt(&model, 1)?;
    let refused =
        Command::new(PROGRAM).arg("serve").arg(&model).args(["--tp", "2", "--listen", "127.0.0.1:0"]).output()?;
    ensure!(refused.status.code() == Some(1), "{}", said(&refused));
    let text = said(&refused);
    ensure!(text.contains("not those of the model's list of digests"), "{text}");
    std::fs::write(model.join("conclave.segments"), "nonsense")?;
    let refused = Command::new(PROGRAM).arg("serve").arg(&model).args(["--listen", "127.0.0.1:0"]).output()?;
    ensure!(said(&refused).contains("conclave.segments: line 1"), "{}", said(&refused));
    remove(&model)?;
    Ok(())
}

/// A second worker whose disk holds other weights under the same names and sizes is set aside; the first serves on.
#[test]
fn a_newcomer_with_other_weights_is_set_aside_and_nobody_notices() -> Result<()> {
    let model = copy("newcomer")?;
    let place = Place::new(PROGRAM, "newcomer-place", &model, "")?;
    let served = place.coordinator()?;
    let _first = place.worker("w0")?;
    until("it is ready", || served.get("/readyz").is_ok_and(|a| a.status == 200))?;
    let question = json!({"model": "m", "prompt": "Once upon a time", "max_tokens": 24, "temperature": 0});
    let before = served.ask("/v1/completions", &question)?["choices"].clone();
    let other = copy("newcomer-other")?;
    corrupt(&other, 40)?;
    let root = other.parent().context("it has one")?;
    let (_second, _lines) = place.worker_with("w1", &format!("threads = 1\nmodel_root = {root:?}\n"))?;
    until("the newcomer is set aside", || {
        let status = served.get("/status").and_then(|a| a.json());
        status.is_ok_and(|s| {
            s["phase"] == "serving" && s["members"].to_string().contains("set aside: its weights are not those of w0")
        })
    })?;
    ensure!(served.ask("/v1/completions", &question)?["choices"] == before);
    remove(&model)?;
    remove(&other)?;
    Ok(())
}
