//! Clients that take their time before a real server: each is cut at its limit, and none hurts another.

use anyhow::{Context, Result, ensure};
use conclave_tests::cancels::{plain, until_nothing_is_held};
use conclave_tests::process::{Served, answer, demo};
use serde_json::json;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

/// Twice the longest limit.
const PATIENCE: Duration = Duration::from_secs(120);

const HEAD: &str = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";

/// Sends `first`, then a byte now and then, until the server ends the connection; what it said until then.
fn trickle(served: &Served, first: &str, byte: &[u8]) -> Result<Vec<u8>> {
    let mut socket = TcpStream::connect(&served.address)?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    socket.write_all(first.as_bytes())?;
    let (began, mut said, mut part) = (Instant::now(), Vec::new(), [0; 4096]);
    while began.elapsed() < PATIENCE {
        // What the server says of it may come before it closes.
        let _ = socket.write_all(byte);
        match socket.read(&mut part) {
            Ok(0) => return Ok(said),
            Ok(count) => said.extend_from_slice(&part[..count]),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return Ok(said),
        }
    }
    anyhow::bail!("not ended within {PATIENCE:?}: {:?}", String::from_utf8_lossy(&said))
}

/// Sends chunks of a body as fast as it can for ever; how many bytes were taken.
fn endless(served: &Served) -> Result<usize> {
    let mut socket = TcpStream::connect(&served.address)?;
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.write_all(format!("{HEAD}transfer-encoding: chunked\r\n\r\n").as_bytes())?;
    let (chunk, mut sent) = (format!("10000\r\n{}\r\n", " ".repeat(0x10000)), 0);
    while socket.write_all(chunk.as_bytes()).is_ok() {
        sent += chunk.len();
        ensure!(sent < 64 << 20, "{sent} bytes of a body were taken");
    }
    Ok(sent)
}

/// Whether the system still has this connection.
fn is_open(port: u16) -> Result<bool> {
    let table = std::fs::read_to_string("/proc/net/tcp")?;
    let local = format!(":{port:04X}");
    let mut lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    Ok(lines.any(|words| words.get(1).is_some_and(|w| w.ends_with(&local)) && words.get(3) == Some(&"01")))
}

/// Asks for far more than the system keeps for a client, reads its beginning and then nothing more, until it is cut.
fn stop_reading(served: &Served) -> Result<()> {
    let body = json!({
        "messages": [{"role": "user", "content": "Tell me a story."}], "n": 16, "max_tokens": 900, "ignore_eos": true,
        "stream": true, "logprobs": true, "top_logprobs": 20,
    });
    let mut socket = served.open("POST", "/v1/chat/completions", body.to_string().as_bytes())?;
    let mut begin = [0; 64];
    socket.read_exact(&mut begin)?;
    ensure!(begin.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&begin));
    let (began, port) = (Instant::now(), socket.local_addr()?.port());
    while is_open(port)? {
        ensure!(began.elapsed() < PATIENCE, "it was not cut within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(200));
    }
    let mut rest = Vec::new();
    let _ = socket.read_to_end(&mut rest);
    ensure!(!String::from_utf8_lossy(&rest).contains("[DONE]"), "all of it was kept: {} bytes", rest.len());
    Ok(())
}

#[test]
fn whoever_takes_too_long_is_cut_and_hurts_nobody() -> Result<()> {
    let served = Served::start(PROGRAM, &demo(), &[])?;
    let (expected, done) = (plain(&served)?, AtomicBool::new(false));
    let slow_body = format!("{HEAD}content-length: 1000\r\n\r\n");
    let (count, longest) = std::thread::scope(|scope| {
        let others = scope.spawn(|| -> Result<(usize, Duration)> {
            let (mut count, mut longest) = (0, Duration::ZERO);
            while !done.load(Ordering::Relaxed) {
                let began = Instant::now();
                ensure!(plain(&served)? == expected, "the answer changed");
                (count, longest) = (count + 1, longest.max(began.elapsed()));
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok((count, longest))
        });
        let silent = scope.spawn(|| trickle(&served, "", b""));
        let head = scope.spawn(|| trickle(&served, "POST /v1/completions HTTP/1.1\r\nh", b"h"));
        let body = scope.spawn(|| trickle(&served, &slow_body, b" "));
        let endless = scope.spawn(|| endless(&served));
        let stopped = scope.spawn(|| stop_reading(&served));
        let outcome = || -> Result<()> {
            let panicked = |_| anyhow::anyhow!("a client panicked");
            let said = silent.join().map_err(panicked)?.context("a silent connection")?;
            ensure!(said.is_empty(), "{}", String::from_utf8_lossy(&said));
            let said = head.join().map_err(panicked)?.context("a head that trickles")?;
            ensure!(!said.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&said));
            let said = body.join().map_err(panicked)?.context("a body that trickles")?;
            let told = answer(&said)?;
            ensure!(told.status == 408 && told.json()?["error"]["code"] == "request_timeout", "{told:?}");
            endless.join().map_err(panicked)?.context("a body without end")?;
            stopped.join().map_err(panicked)?.context("a client that stops reading")
        };
        let outcome = outcome();
        done.store(true, Ordering::Relaxed);
        let others = others.join().map_err(|_| anyhow::anyhow!("a client panicked"))?;
        outcome.and(others)
    })?;
    until_nothing_is_held(&served)?;
    println!("{count} answers beside them, none changed, the slowest after {} ms", longest.as_millis());
    Ok(())
}
