//! A served demo model under more than it can do, for a while: nothing that was accepted may fail, everything else is refused
//! at once, and memory stays bounded.
//!
//! `cargo build --release && cargo run --release -p conclave-tests --bin overload -- target/release/conclave [SECONDS] [FACTOR] [TOKENS]`

use anyhow::{Context, Result, ensure};
use conclave_tests::overload;
use conclave_tests::process::{Served, demo};
use std::time::Duration;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let program = arguments.first().context("the program to test is missing")?;
    let number = |index: usize, default: f64| arguments.get(index).map_or(Ok(default), |text| text.parse());
    // The shorter the answers, the more it is HTTP that is measured.
    let (seconds, factor, tokens) = (number(1, 300.0)?, number(2, 10.0)?, number(3, 32.0)? as u32);
    let served = Served::start(program, &demo(), &[])?;
    let report = overload::run(&served, Duration::from_secs_f64(seconds), factor, tokens)?;
    println!("{report}");
    ensure!(report.wrong.is_empty(), "{}", report.wrong.iter().take(5).cloned().collect::<Vec<_>>().join("\n"));
    Ok(())
}
