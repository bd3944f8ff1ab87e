//! `conclave preflight` on this host, and on one with GPUs that are fake: a line each, and an exit status that scripts can trust.

use anyhow::{Context, Result, ensure};
use conclave_tests::gpp::Stack;
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn command(flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_conclave"));
    command.arg("preflight").args(flags);
    command
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The one line about `what`.
fn line<'a>(text: &'a str, what: &str) -> Result<&'a str> {
    let columns = |line: &'a str| (line.get(..6).map(str::trim), line.get(7..23).map(str::trim), line.get(24..));
    let mut found = text.lines().filter(|line| columns(line).1 == Some(what));
    let line = found.next().with_context(|| format!("nothing about {what} in\n{text}"))?;
    ensure!(found.next().is_none(), "{what} is told twice in\n{text}");
    Ok(line)
}

#[test]
fn a_host_without_a_driver_says_so_in_one_line() -> Result<()> {
    let plain = command(&[]).env("LD_LIBRARY_PATH", "/nowhere").output()?;
    let text = stdout(&plain);
    ensure!(plain.status.success(), "{plain:?}");
    for what in ["cpu", "cores", "memory", "huge pages", "locked memory"] {
        line(&text, what)?;
    }
    if !text.contains("no CUDA driver") {
        eprintln!("SKIPPED: this host has a CUDA driver, so its absence is not tested");
        return Ok(());
    }
    ensure!(line(&text, "cuda")?.ends_with("no CUDA driver (libcuda.so) on this host"), "{text}");
    ensure!(!text.contains("nccl") && !text.contains("nvrtc"), "one line is enough:\n{text}");
    ensure!(text.ends_with("ranks can run on this host's cores, not on GPUs\n"), "{text}");
    for (backend, code) in [("auto", 0), ("cpu", 0), ("cuda", 1), ("tpu", 2)] {
        let asked = command(&["--backend", backend]).env("LD_LIBRARY_PATH", "/nowhere").output()?;
        ensure!(asked.status.code() == Some(code), "{backend}: {asked:?}");
        let said = String::from_utf8_lossy(&asked.stderr);
        let why = "error: no rank can run on a GPU here: cuda: no CUDA driver (libcuda.so) on this host\n";
        ensure!(code != 1 || said == why, "{said}");
    }
    Ok(())
}

#[test]
fn gpus_and_libraries_are_told_with_their_versions() -> Result<()> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda");
    let Some(stack) = Stack::build(&folder, "preflight with GPUs")? else { return Ok(()) };
    let run = |settings: &[(&str, &str)], flags: &[&str]| -> Result<Output> {
        let mut command = command(flags);
        Ok(stack.around(&mut command).envs(settings.iter().copied()).output()?)
    };
    let eight = run(&[("FAKE_CUDA_DEVICES", "8")], &["--backend", "cuda"])?;
    let text = stdout(&eight);
    ensure!(eight.status.success(), "{eight:?}");
    for (what, ends) in [
        ("driver", "CUDA 13.0"),
        ("nvrtc", "13.5"),
        ("nccl", "2.32.3 (libnccl.so.2)"),
        ("gpu 7", "Fake GPU, 1.0 GiB, compute capability 9.0, ECC on"),
        ("peers", "12 of 28 pairs of GPUs reach each other's memory, 12 with atomics, as over NVLink"),
    ] {
        ensure!(line(&text, what)?.ends_with(ends), "{what}: {text}");
    }
    ensure!(line(&text, "peers")?.starts_with("note"), "{text}");
    let json: Value = serde_json::from_slice(&run(&[], &["--json"])?.stdout)?;
    ensure!(json["ok"] == true && json["runs"]["cuda"] == true, "{json}");
    let lines = json["lines"].as_array().context("lines")?;
    ensure!(lines.iter().any(|line| line["what"] == "gpu 0" && line["standing"] == "has"), "{json}");

    for (settings, why) in [
        (("FAKE_CUDA_VERSION", "11080"), "cuda: the driver is for CUDA 11.8, 12.0 is needed"),
        (("FAKE_CUDA_DEVICES", "0"), "cuda: cuInit: CUDA_ERROR_NO_DEVICE"),
        (("FAKE_CUDA_FAIL", "cuDeviceGetCount:1:999"), "cuda: cuDeviceGetCount: CUDA_ERROR_UNKNOWN"),
    ] {
        let lacking = run(&[settings], &["--backend", "cuda"])?;
        let said = String::from_utf8_lossy(&lacking.stderr);
        ensure!(lacking.status.code() == Some(1), "{lacking:?}");
        ensure!(said == format!("error: no rank can run on a GPU here: {why}\n"), "{said}");
    }
    let old = stdout(&run(&[("FAKE_NCCL_VERSION", "21400")], &[])?);
    let text = "NCCL is 2.14.0, 2.18.0 is needed: several GPUs exchange through host memory";
    ensure!(line(&old, "nccl")?.ends_with(text), "{old}");
    Ok(())
}
