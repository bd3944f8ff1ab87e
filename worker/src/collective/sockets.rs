//! What the sockets of the data plane need beyond the standard library: waiting for several, noticing silence.

use super::link::{GLANCE, Link};
use model::fault::{Fault, FaultKind};
use std::io::ErrorKind;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

/// Silence on an open connection that ends it: probes go after a second, and after this an unanswered one is a loss.
const SILENCE_MS: libc::c_uint = 1500;

/// A connection to wait for.
pub struct Interest<'a> {
    pub socket: BorrowedFd<'a>,
    pub read: bool,
    pub write: bool,
    /// Set by [`poll`]: something can be done, or the other side has closed.
    pub ready: bool,
}

/// Waits until something can be done on one of the sockets, or `limit` has passed. May return early.
pub fn poll(interests: &mut [Interest<'_>], limit: Duration) {
    let events = |i: &Interest<'_>| if i.read { libc::POLLIN } else { 0 } | if i.write { libc::POLLOUT } else { 0 };
    let mut list: Vec<libc::pollfd> =
        interests.iter().map(|i| libc::pollfd { fd: i.socket.as_raw_fd(), events: events(i), revents: 0 }).collect();
    // SAFETY: the list has the length given and its descriptors are borrowed, so open.
    unsafe { libc::poll(list.as_mut_ptr(), list.len() as libc::nfds_t, limit.as_millis() as libc::c_int) };
    for (interest, polled) in interests.iter_mut().zip(list) {
        interest.ready = polled.revents != 0;
    }
}

/// Small messages go at once, and a peer that fell silent without closing is noticed.
pub fn tune(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    option(stream, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    option(stream, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 1)?;
    option(stream, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 1)?;
    option(stream, libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, SILENCE_MS)
}

/// Sets an option whose value is a 4-byte integer.
pub fn option(stream: &TcpStream, level: i32, name: i32, value: libc::c_uint) -> std::io::Result<()> {
    // SAFETY: the option's value is a 4-byte integer that outlives the call.
    let result = unsafe {
        libc::setsockopt(stream.as_raw_fd(), level, name, (&raw const value).cast(), size_of_val(&value) as u32)
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets every other thread of the process go before the one that calls: for work that can wait.
pub fn step_back() {
    // SAFETY: only a number is passed; on Linux it is the calling thread's alone. Where it fails, it fails.
    unsafe { libc::nice(10) };
}

/// The fault of a connection that broke; `who` is for the text.
pub fn lost(who: &str, error: &std::io::Error) -> Fault {
    let kind = match error.kind() {
        // Trying again helps nobody whose certificates are wrong.
        ErrorKind::InvalidData => FaultKind::Incompatible,
        ErrorKind::TimedOut => FaultKind::Timeout,
        ErrorKind::UnexpectedEof => return Fault::new(FaultKind::RankLost, format!("{who}: closed its connection")),
        _ => FaultKind::RankLost,
    };
    Fault::new(kind, format!("{who}: {error}"))
}

/// Fills `bytes` from a blocking link before `deadline`, unless `cancelled` says why not. `who` is for the text.
pub fn read_exact(
    link: &mut Link,
    bytes: &mut [u8],
    deadline: Instant,
    cancelled: impl Fn() -> Option<Fault>,
    who: &str,
) -> Result<(), Fault> {
    link.socket.set_read_timeout(Some(GLANCE)).map_err(|error| lost(who, &error))?;
    let mut filled = 0;
    while filled < bytes.len() {
        if let Some(fault) = cancelled() {
            return Err(fault);
        }
        match link.read(&mut bytes[filled..]) {
            Ok(0) => return Err(lost(who, &ErrorKind::UnexpectedEof.into())),
            Ok(count) => filled += count,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if Instant::now() >= deadline {
                    let text = format!("{who}: {filled} of {} bytes of its answer came in time", bytes.len());
                    return Err(Fault::new(FaultKind::Timeout, text));
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(lost(who, &error)),
        }
    }
    Ok(())
}
