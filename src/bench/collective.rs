//! `conclave bench collective`: how long ranks of this host need to exchange numbers, through memory that they share and through
//! loopback sockets, in the clear and under TLS.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use model::fault::Fault;
use proto::tls::Tls;
use serde::Serialize;
use worker::collective::{Collective, local, tcp};

/// Turns before the measured ones.
const WARM_UP: usize = 200;

/// Measures what ranks of one host exchange.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Ranks, a thread each; sums need a power of two
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(2..=64))]
    ranks: u32,
    /// A folder made by `conclave certs init`: measure under TLS too
    #[arg(long)]
    tls: Option<PathBuf>,
    /// Also write the rows as JSON to this file
    #[arg(long)]
    json: Option<PathBuf>,
}

/// One row of the report.
#[derive(Debug, Clone, Serialize)]
struct Row {
    by: &'static str,
    operation: &'static str,
    /// Of one rank.
    bytes: usize,
    p50_us: f64,
    p99_us: f64,
}

impl Row {
    fn line(&self) -> String {
        let Row { by, operation, bytes, p50_us, p99_us } = self;
        let rate = *bytes as f64 / p50_us / 1e3;
        format!("{by:<8} {operation:<12} {bytes:>10} {p50_us:>11.2} {p99_us:>11.2} {rate:>8.2}")
    }
}

type Operation = fn(&mut dyn Collective, &mut [f32]) -> Result<(), Fault>;

/// Measures all, printing each row as it comes.
pub fn collective(args: &Args) -> Result<()> {
    let ranks = args.ranks as usize;
    if !ranks.is_power_of_two() {
        return Err(anyhow!("--ranks {ranks} is no power of two"));
    }
    let tls = args.tls.as_ref().map(|folder| Tls {
        ca: folder.join("ca.crt"),
        certificate: folder.join("worker.crt"),
        key: folder.join("worker.key"),
    });
    let cores = std::thread::available_parallelism().context("how many cores there are")?;
    println!("{ranks} ranks on {cores} cores; times of rank 0 in microseconds, GB/s of its bytes");
    println!("{:<8} {:<12} {:>10} {:>11} {:>11} {:>8}", "by", "operation", "bytes", "p50", "p99", "GB/s");
    let mut rows = Vec::new();
    let mut add = |row: Result<Row>| -> Result<()> {
        let row = row?;
        println!("{}", row.line());
        rows.push(row);
        Ok(())
    };
    for (operation, run, sizes) in [
        ("sum", sum as Operation, &[64, 1 << 10, 16 << 10, 64 << 10, 1 << 20, 16 << 20][..]),
        ("gather", gather, &[64, 16 << 10, 1 << 20]),
        ("ping-pong", ping_pong, &[64, 16 << 10, 1 << 20]),
    ] {
        for &bytes in sizes {
            add(measure("memory", (operation, run), bytes, fault(local::members(ranks))?))?;
        }
    }
    for (by, tls) in [("tcp", Some(None)), ("tls", tls.map(Some))] {
        let Some(tls) = tls else { continue };
        for (operation, run) in [("sum", sum as Operation), ("ping-pong", ping_pong)] {
            for bytes in [64, 16 << 10, 1 << 20, 16 << 20] {
                add(measure(by, (operation, run), bytes, fault(tcp::loopback(ranks, tls.clone()))?))?;
            }
        }
    }
    if let Some(path) = &args.json {
        crate::whole::write_json(path, &rows)?;
    }
    Ok(())
}

fn fault<T>(result: Result<T, Fault>) -> Result<T> {
    result.map_err(|fault| anyhow!("{fault}"))
}

fn sum(member: &mut dyn Collective, values: &mut [f32]) -> Result<(), Fault> {
    member.sum(values)
}

fn gather(member: &mut dyn Collective, values: &mut [f32]) -> Result<(), Fault> {
    thread_local! { static ALL: std::cell::RefCell<Vec<Vec<u8>>> = const { std::cell::RefCell::new(Vec::new()) }; }
    ALL.with_borrow_mut(|all| member.gather(bytemuck::cast_slice(values), all))
}

/// There and back between ranks 0 and 1; the others wait for the end.
fn ping_pong(member: &mut dyn Collective, values: &mut [f32]) -> Result<(), Fault> {
    thread_local! { static BYTES: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) }; }
    let rank = member.rank();
    if rank == 0 {
        member.send(1, bytemuck::cast_slice(values))?;
    }
    if rank < 2 {
        BYTES.with_borrow_mut(|bytes| member.receive(1 - rank, bytes))?;
    }
    if rank == 1 { member.send(0, bytemuck::cast_slice(values)) } else { Ok(()) }
}

fn measure<C: Collective + 'static>(
    by: &'static str,
    (operation, run): (&'static str, Operation),
    bytes: usize,
    members: Vec<C>,
) -> Result<Row> {
    let turns = (1_000_000_000 / (bytes + 20_000)).clamp(30, 20_000);
    let time = move |mut member: C| -> Result<Vec<f64>, Fault> {
        let mut values = vec![0f32; bytes / 4];
        let mut times = Vec::with_capacity(turns);
        for turn in 0..turns + WARM_UP.min(turns) {
            let start = Instant::now();
            run(&mut member, &mut values)?;
            if turn >= WARM_UP.min(turns) {
                times.push(start.elapsed().as_secs_f64() * 1e6);
            }
        }
        // Nobody leaves while others still measure.
        member.gather(&[], &mut Vec::new())?;
        Ok(times)
    };
    let threads: Vec<_> = members.into_iter().map(|member| std::thread::spawn(move || time(member))).collect();
    let results: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
    let first = results.into_iter().next().context("at least one rank")?;
    let mut times = fault(first.map_err(|_| anyhow!("a measuring thread panicked"))?)?;
    times.sort_by(f64::total_cmp);
    let (p50_us, p99_us) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    Ok(Row { by, operation, bytes, p50_us, p99_us })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_operation_is_timed_by_memory_and_by_sockets() {
        for operation in [("sum", sum as Operation), ("gather", gather), ("ping-pong", ping_pong)] {
            // Large enough for few turns.
            let bytes = 8 << 20;
            for row in [
                measure("memory", operation, bytes, local::members(2).unwrap()).unwrap(),
                measure("tcp", operation, bytes, tcp::loopback(2, None).unwrap()).unwrap(),
            ] {
                assert!(row.p50_us > 0.0 && row.p50_us <= row.p99_us, "{row:?}");
                assert!(row.line().contains(operation.0), "{}", row.line());
            }
        }
    }

    #[test]
    fn sums_are_of_a_power_of_two() {
        let error = collective(&Args { ranks: 6, tls: None, json: None }).unwrap_err();
        assert_eq!(error.to_string(), "--ranks 6 is no power of two");
    }
}
