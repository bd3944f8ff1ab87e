//! Many requests whose clients leave, at any moment: afterwards nothing runs, no block of the cache is held, and answers are
//! as before.
//!
//! `cargo build --release && cargo run --release -p conclave-tests --bin cancels -- target/release/conclave [COUNT] [SEED]`

use anyhow::{Context, Result, ensure};
use conclave_tests::cancels::{plain, run, until_nothing_is_held};
use conclave_tests::process::{Served, demo, memory_peak};
use std::time::Instant;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let program = arguments.first().context("the program to test is missing")?;
    let number = |index: usize, default: u64| arguments.get(index).map_or(Ok(default), |text| text.parse());
    let (count, seed) = (number(1, 100_000)?, number(2, 1)?);
    let served = Served::start(program, &demo(), &["--tp", "2"])?;
    let (before, began) = (plain(&served)?, Instant::now());
    let left = run(&served, count as usize, seed)?;
    let took = began.elapsed();
    until_nothing_is_held(&served)?;
    ensure!(plain(&served)? == before, "the answer changed");
    ensure!(served.get("/status")?.json()?["epoch"] == 1, "a client that left ended the epoch");
    let memory = memory_peak(served.id())? >> 20;
    println!(
        "{count} requests left in {:.0} s: {left:?}; no block is held, answers are as before; the coordinator had {memory} MiB at most",
        took.as_secs_f64()
    );
    Ok(())
}
