//! Every fixture on every mesh of up to eight ranks that its model can be cut to, in f32 and bf16, against one rank:
//! logits and tokens must be the same bits. `cargo run --release -p conclave-tests --bin product [-- FIXTURE...]`
//!
//! Chunk sizes are sampled: each mesh gets whole prompts or small chunks in turn and one odd size; each run is made alone
//! and in a batch. Exits with 1 on any difference.

use anyhow::{Result, ensure};
use conclave_tests::requests::{self, Request};
use conclave_tests::ring::{Setting, fixture, fixtures};
use model::cut;
use model::mesh::Mesh;
use model::quant::Dtype;
use model::spec::ModelSpec;
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use worker::load::checkpoint::Checkpoint;

/// Ranks of the largest mesh.
const RANKS_MAX: usize = 8;

/// Chunk sizes of the odd run, taken in turn.
const CHUNKS: [usize; 6] = [7, 1, 31, 13, 32, 20];

/// One line of the final table.
#[derive(Default)]
struct Tally {
    fixture: String,
    meshes: usize,
    runs: usize,
    differences: Vec<String>,
    time: Duration,
}

fn main() -> Result<ExitCode> {
    let asked: Vec<String> = std::env::args().skip(1).collect();
    let known = fixtures();
    for name in &asked {
        ensure!(known.contains(name), "{name} is no fixture; known: {}", known.join(", "));
    }
    let mut tallies = Vec::new();
    for name in known.into_iter().filter(|name| asked.is_empty() || asked.contains(name)) {
        tallies.push(check(name)?);
    }
    print!("{}", table(&tallies));
    let differs = tallies.iter().any(|t| !t.differences.is_empty());
    Ok(if differs { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// One fixture on all of its meshes.
fn check(name: String) -> Result<Tally> {
    let (path, began) = (fixture(&name), Instant::now());
    let meshes = meshes(&Checkpoint::open(&path).and_then(|c| c.spec()).map_err(|f| anyhow::anyhow!(f.text))?);
    let mut tally = Tally { meshes: meshes.len(), ..Tally::default() };
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let expected = requests::reference(&path, Setting::new(Mesh::ONE, dtype), &Request::new(1, 45))?;
        for (index, &mesh) in meshes.iter().enumerate() {
            progress(&format!("{name} {dtype} {mesh}, {} of {}", index + 1, meshes.len()));
            let chunks = [usize::MAX, CHUNKS[index % CHUNKS.len()]];
            match requests::check_mesh(&path, Setting::new(mesh, dtype), &chunks, &expected) {
                Ok(runs) => tally.runs += runs,
                Err(e) => {
                    progress("");
                    eprintln!("{name}: {e:#}");
                    tally.differences.push(format!("{e:#}"));
                }
            }
        }
    }
    progress("");
    Ok(Tally { fixture: name, time: began.elapsed(), ..tally })
}

/// Every mesh of at most [`RANKS_MAX`] ranks that `spec` can be cut to.
fn meshes(spec: &ModelSpec) -> Vec<Mesh> {
    let mut found = Vec::new();
    for pipeline in 1..=RANKS_MAX {
        for data in 1..=RANKS_MAX / pipeline {
            for tensor in 1..=RANKS_MAX / pipeline / data {
                for expert in 1..=data * tensor {
                    // What is no mesh, or none for this model, is refused in words; here it is left out.
                    if let Ok(mesh) = Mesh::new(pipeline, data, tensor, expert)
                        && cut::check(spec, &mesh).is_ok()
                    {
                        found.push(mesh);
                    }
                }
            }
        }
    }
    found
}

/// One line on a terminal, overwritten by the next.
fn progress(text: &str) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        let _ = write!(stderr, "\r\x1b[K{text}");
        let _ = stderr.flush();
    }
}

fn table(tallies: &[Tally]) -> String {
    let mut out = format!("{:<16} {:>7} {:>7} {:>12} {:>9}\n", "fixture", "meshes", "runs", "differences", "time");
    let mut line = |name: &str, meshes: usize, runs: usize, differences: usize, time: Duration| {
        out += &format!("{name:<16} {meshes:>7} {runs:>7} {differences:>12} {:>8.1}s\n", time.as_secs_f64());
    };
    for t in tallies {
        line(&t.fixture, t.meshes, t.runs, t.differences.len(), t.time);
    }
    let sum = |of: fn(&Tally) -> usize| tallies.iter().map(of).sum();
    let time = tallies.iter().map(|t| t.time).sum();
    line("all", sum(|t| t.meshes), sum(|t| t.runs), sum(|t| t.differences.len()), time);
    out
}
