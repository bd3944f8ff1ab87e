//! Stamps the program with its commit, where git knows one: workers of another build are refused at the door. Where the
//! tree comes without its history, as into a container, `CONCLAVE_COMMIT` says it.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=.git/HEAD");
    println!("cargo::rerun-if-changed=.git/logs/HEAD");
    println!("cargo::rerun-if-env-changed=CONCLAVE_COMMIT");
    let commit = std::env::var("CONCLAVE_COMMIT").ok().or_else(from_git);
    println!("cargo::rustc-env=CONCLAVE_COMMIT={}", commit.as_deref().map_or("unknown", str::trim));
}

fn from_git() -> Option<String> {
    let output = Command::new("git").args(["rev-parse", "--short=12", "HEAD"]).output().ok()?;
    output.status.success().then(|| String::from_utf8(output.stdout).ok())?
}
