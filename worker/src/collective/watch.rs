//! Notices the death of the other processes that share a communicator's memory: the kernel closes their connections.

use super::shared::Seats;
use super::sockets::{Interest, poll};
use model::fault::{Fault, FaultKind};
use std::io::Read;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const POLL_MAX: Duration = Duration::from_millis(500);

/// Another process of the communicator: the connection to it, and its ranks' seats.
pub struct Lifeline {
    pub stream: TcpStream,
    pub seats: Vec<usize>,
}

/// Kept by the members of this process; the watch, and the connections, end with the last of them.
pub struct Watch {
    ended: Arc<AtomicBool>,
    streams: Vec<TcpStream>,
}

impl Watch {
    /// From now on the communicator is lost as soon as a process on the other end of a lifeline is.
    pub fn start(seats: Arc<Seats>, lifelines: Vec<Lifeline>) -> Result<Watch, Fault> {
        let failed = |error: std::io::Error| Fault::new(FaultKind::Internal, format!("watching peers: {error}"));
        let ended = Arc::new(AtomicBool::new(false));
        let streams: Result<Vec<_>, _> = lifelines.iter().map(|line| line.stream.try_clone()).collect();
        let watch = Watch { ended: ended.clone(), streams: streams.map_err(failed)? };
        std::thread::Builder::new()
            .name("data-watch".into())
            .spawn(move || run(&seats, lifelines, &ended))
            .map_err(failed)?;
        Ok(watch)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
        for stream in &self.streams {
            // Wakes this process's watch, and tells the others'.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn run(seats: &Seats, mut lifelines: Vec<Lifeline>, ended: &AtomicBool) {
    while !lifelines.is_empty() {
        let interest = |line: &Lifeline| line.stream.set_nonblocking(true);
        if lifelines.iter().any(|line| interest(line).is_err()) {
            seats.lose(lifelines[0].seats[0]);
            return;
        }
        let mut interests: Vec<_> = lifelines
            .iter()
            .map(|line| Interest { socket: line.stream.as_fd(), read: true, write: false, ready: false })
            .collect();
        poll(&mut interests, POLL_MAX);
        if ended.load(Ordering::Acquire) {
            return;
        }
        lifelines.retain(|line| {
            if is_open(&line.stream) {
                return true;
            }
            if let Some(lost) = line.seats.iter().find(|seat| !seats.has_left(**seat))
                && !ended.load(Ordering::Acquire)
            {
                seats.lose(*lost);
            }
            false
        });
    }
}

/// Nothing is ever said on a lifeline once it is one.
fn is_open(mut stream: &TcpStream) -> bool {
    match stream.read(&mut [0; 8]) {
        Ok(0) => false,
        Ok(_) => true,
        Err(error) => matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted),
    }
}
