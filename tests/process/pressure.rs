//! More than a server can do, and clients that leave: the short forms of the programs `overload` and `cancels`.

use anyhow::{Result, ensure};
use conclave_tests::cancels::{self, plain, until_nothing_is_held};
use conclave_tests::overload;
use conclave_tests::process::{Served, demo};
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

#[test]
fn ten_times_too_much_is_refused_with_a_time_to_come_again_and_the_rest_is_answered() -> Result<()> {
    let served = Served::start(PROGRAM, &demo(), &[])?;
    let report = overload::run(&served, Duration::from_secs(6), 10.0, 32)?;
    println!("{report}");
    ensure!(report.wrong.is_empty(), "{}", report.wrong[0]);
    ensure!(report.refused > 0 && report.answered > 0, "nothing was refused, or nothing answered:\n{report}");
    Ok(())
}

#[test]
fn clients_that_leave_at_any_moment_leave_nothing_behind() -> Result<()> {
    let served = Served::start(PROGRAM, &demo(), &["--tp", "2"])?;
    let before = plain(&served)?;
    let left = cancels::run(&served, 1_000, 7)?;
    ensure!(left.asking > 0 && left.waiting > 0 && left.reading > 0, "not every moment was met: {left:?}");
    until_nothing_is_held(&served)?;
    ensure!(plain(&served)? == before, "the answer changed");
    ensure!(served.get("/status")?.json()?["epoch"] == 1, "a client that left ended the epoch");
    Ok(())
}
