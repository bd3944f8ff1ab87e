//! Medians of the collectives between threads of this process, and over loopback sockets in the clear and, with a folder that
//! `conclave certs init` made, under TLS: `cargo run --release -p worker --example collective [ranks [folder]]`.

use proto::tls::Tls;
use std::path::PathBuf;
use std::time::Instant;
use worker::collective::{Collective, local, tcp};

const WARM_UP: usize = 200;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let ranks: usize = std::env::args().nth(1).map_or(Ok(2), |text| text.parse())?;
    let tls = std::env::args().nth(2).map(PathBuf::from).map(|folder| Tls {
        ca: folder.join("ca.crt"),
        certificate: folder.join("worker.crt"),
        key: folder.join("worker.key"),
    });
    println!("{ranks} ranks, {} cores", std::thread::available_parallelism()?);
    println!("{:<8} {:<14} {:>10} {:>10} {:>10} {:>9}", "by", "operation", "bytes", "p50 us", "p99 us", "GB/s");
    for bytes in [64, 1 << 10, 16 << 10, 64 << 10, 1 << 20, 16 << 20] {
        report("local", "sum", bytes, local::members(ranks)?, |member, values| member.sum(values))?;
    }
    for bytes in [64, 16 << 10, 1 << 20] {
        report("local", "gather", bytes, local::members(ranks)?, gather)?;
        report("local", "ping-pong", bytes, local::members(ranks)?, ping_pong)?;
    }
    for bytes in [64, 16 << 10, 1 << 20, 16 << 20, 64 << 20] {
        for (by, tls) in [("tcp", None), ("tls", tls.clone())] {
            if by == "tls" && tls.is_none() {
                continue;
            }
            report(by, "sum", bytes, tcp::loopback(ranks, tls.clone())?, |member, values| member.sum(values))?;
            report(by, "ping-pong", bytes, tcp::loopback(ranks, tls)?, ping_pong)?;
        }
    }
    Ok(())
}

type Outcome = Result<(), model::fault::Fault>;

fn gather(member: &mut dyn Collective, values: &mut [f32]) -> Outcome {
    thread_local! { static ALL: std::cell::RefCell<Vec<Vec<u8>>> = const { std::cell::RefCell::new(Vec::new()) }; }
    ALL.with_borrow_mut(|all| member.gather(bytemuck::cast_slice(values), all))
}

/// There and back between ranks 0 and 1; the others wait for the end.
fn ping_pong(member: &mut dyn Collective, values: &mut [f32]) -> Outcome {
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

fn report<C: Collective + 'static>(
    by: &str,
    name: &str,
    bytes: usize,
    members: Vec<C>,
    operation: fn(&mut dyn Collective, &mut [f32]) -> Outcome,
) -> Outcome {
    let turns = (1_000_000_000 / (bytes + 20_000)).clamp(30, 20_000);
    let measure = move |mut member: C| -> Result<Vec<f64>, model::fault::Fault> {
        let mut values = vec![0f32; bytes / 4];
        let mut times = Vec::with_capacity(turns);
        for turn in 0..turns + WARM_UP.min(turns) {
            let start = Instant::now();
            operation(&mut member, &mut values)?;
            if turn >= WARM_UP.min(turns) {
                times.push(start.elapsed().as_secs_f64() * 1e6);
            }
        }
        // Nobody leaves while others still measure.
        member.gather(&[], &mut Vec::new())?;
        Ok(times)
    };
    let threads: Vec<_> = members.into_iter().map(|member| std::thread::spawn(move || measure(member))).collect();
    let results: Vec<_> = threads.into_iter().map(|thread| thread.join().expect("a measuring thread")).collect();
    let mut times = results.into_iter().next().expect("at least one rank")?;
    times.sort_by(f64::total_cmp);
    let (p50, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    println!("{by:<8} {name:<14} {bytes:>10} {p50:>10.2} {p99:>10.2} {:>9.2}", bytes as f64 / p50 / 1e3);
    Ok(())
}
