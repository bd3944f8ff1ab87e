//! What `conclave serve` and `conclave plan` say of a model before it is served.

use anyhow::{Result, ensure};
use conclave_tests::process::{Served, golden};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

/// A copy of a fixture, removed when dropped.
struct Copy(PathBuf);

impl Copy {
    fn of(name: &str) -> Result<Copy> {
        let folder = std::env::temp_dir().join(format!("conclave-models-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&folder)?;
        for entry in std::fs::read_dir(golden(name))? {
            let entry = entry?;
            std::fs::copy(entry.path(), folder.join(entry.file_name()))?;
        }
        Ok(Copy(folder))
    }

    fn weights(&self) -> PathBuf {
        self.0.join("model.safetensors")
    }

    fn write_sums(&self) -> Result<()> {
        let digest = Sha256::digest(std::fs::read(self.weights())?);
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(std::fs::write(self.0.join("SHA256SUMS"), format!("{hex}  model.safetensors\n"))?)
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs a command that ends by itself.
fn run(command: &str, model: &Path) -> Result<Output> {
    let devices: &[&str] = if command == "plan" { &["--devices", "1x8GiB"] } else { &["--listen", "127.0.0.1:0"] };
    Ok(Command::new(PROGRAM).arg(command).arg(model).arg("--verify-checksums").args(devices).output()?)
}

fn refused(command: &str, model: &Path, parts: &[&str]) -> Result<()> {
    let output = run(command, model)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success(), "{command} went on: {said}");
    ensure!(parts.iter().all(|part| said.contains(part)), "{command}: {said}");
    ensure!(!String::from_utf8_lossy(&output.stdout).contains("serving on"), "{command} served");
    Ok(())
}

#[test]
fn a_flipped_byte_is_found_and_named_before_serving() -> Result<()> {
    let copy = Copy::of("qwen3")?;
    for command in ["serve", "plan"] {
        refused(command, &copy.0, &["SHA256SUMS", "nothing to compare"])?;
    }
    copy.write_sums()?;
    let right = run("plan", &copy.0)?;
    ensure!(right.status.success(), "{}", String::from_utf8_lossy(&right.stderr));
    drop(Served::start(PROGRAM, &copy.0, &["--verify-checksums"])?);
    // The last byte is a weight's: nothing but the checksum tells.
    let mut bytes = std::fs::read(copy.weights())?;
    *bytes.last_mut().expect("a file of weights") ^= 1;
    std::fs::write(copy.weights(), bytes)?;
    for command in ["serve", "plan"] {
        refused(command, &copy.0, &["model.safetensors: its sha256 is", "the manifest has"])?;
    }
    drop(Served::start(PROGRAM, &copy.0, &[])?);
    Ok(())
}

#[test]
fn of_a_model_with_pictures_the_language_part_is_said_to_be_loaded() -> Result<()> {
    let line = |said: &[String]| said.iter().filter(|line| line.starts_with("only the language part of")).count();
    let served = Served::start(PROGRAM, &golden("qwen25_vl"), &[])?;
    ensure!(line(&served.said) == 1, "{:?}", served.said);
    let served = Served::start(PROGRAM, &golden("qwen3"), &[])?;
    ensure!(line(&served.said) == 0, "{:?}", served.said);
    Ok(())
}
