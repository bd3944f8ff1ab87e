//! The listener of a worker's data plane: takes peers' connections, hears who they are, and keeps each until its
//! communicator claims it. Everything a stranger can make it hold is bounded.

use super::hello::{Answer, HELLO, Hello, Key};
use super::sockets::{Interest, poll};
use model::fault::{Fault, FaultKind};
use model::plan::Epoch;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Connections that have not said hello yet; the oldest makes room.
const STRANGERS_MAX: usize = 64;

/// How long a connection may take over its hello.
const HELLO_MAX: Duration = Duration::from_secs(2);

/// Connections that wait to be claimed.
const PARKED_MAX: usize = 4096;

const POLL_MAX: Duration = Duration::from_millis(500);

/// The listening side of the data plane. Dropping it ends its thread.
pub struct Door {
    address: SocketAddr,
    lobby: Arc<Lobby>,
    /// Its other end wakes the thread when this one is dropped.
    _bell: UnixStream,
}

/// Connections that said hello, and which epochs are over.
struct Lobby {
    inner: Mutex<Parked>,
    arrived: Condvar,
}

#[derive(Default)]
struct Parked {
    /// Epochs before this one are refused.
    floor: Epoch,
    streams: BTreeMap<Key, (u64, TcpStream)>,
}

struct Stranger {
    stream: TcpStream,
    bytes: [u8; HELLO],
    filled: usize,
    since: Instant,
}

impl Door {
    /// Listens at `address` (`ip:port`, port 0 for any).
    pub fn bind(address: &str) -> Result<Door, Fault> {
        let open = || -> std::io::Result<(TcpListener, SocketAddr, UnixStream, UnixStream)> {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            let local = listener.local_addr()?;
            let (bell, hears) = UnixStream::pair()?;
            Ok((listener, local, bell, hears))
        };
        let failed = |error: std::io::Error| {
            Fault::new(FaultKind::Internal, format!("data plane cannot listen at {address}: {error}"))
        };
        let (listener, local, bell, hears) = open().map_err(failed)?;
        let lobby = Arc::new(Lobby { inner: Mutex::default(), arrived: Condvar::new() });
        let shared = lobby.clone();
        std::thread::Builder::new()
            .name("data-door".into())
            .spawn(move || serve(&listener, &hears, &shared))
            .map_err(failed)?;
        Ok(Door { address: local, lobby, _bell: bell })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for the connection `key`, and welcomes it. `plan` is what this process acts on.
    pub fn claim(&self, key: &Key, plan: u64, deadline: Instant, who: &str) -> Result<TcpStream, Fault> {
        let mut parked = self.lobby.lock();
        loop {
            if let Some(fault) = ended(&parked, key.epoch) {
                return Err(fault);
            }
            if let Some((theirs, stream)) = parked.streams.remove(key) {
                drop(parked);
                let answer = if theirs == plan { Answer::Welcome } else { Answer::OtherPlan };
                let told = stream.set_nonblocking(false).and_then(|()| (&stream).write_all(&[answer as u8]));
                told.map_err(|error| Fault::new(FaultKind::RankLost, format!("{who}: {error}")))?;
                if theirs != plan {
                    let text =
                        format!("{who}: acts on another plan ({theirs:x}, here {plan:x}) of epoch {}", key.epoch.0);
                    return Err(Fault::new(FaultKind::Incompatible, text));
                }
                return Ok(stream);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Fault::new(FaultKind::Timeout, format!("{who}: did not connect in time")));
            }
            parked = self.lobby.arrived.wait_timeout(parked, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Why nothing of `epoch` may go on, if so.
    pub fn ended(&self, epoch: Epoch) -> Option<Fault> {
        ended(&self.lobby.lock(), epoch)
    }

    /// Refuses every epoch before `floor` from now on, and lets go of what waits for one.
    pub fn raise(&self, floor: Epoch) {
        let mut parked = self.lobby.lock();
        parked.floor = parked.floor.max(floor);
        let floor = parked.floor;
        parked.streams.retain(|key, (_, stream)| {
            let stays = key.epoch >= floor;
            if !stays {
                refuse(stream, Answer::Stale);
            }
            stays
        });
        self.lobby.arrived.notify_all();
    }
}

fn ended(parked: &Parked, epoch: Epoch) -> Option<Fault> {
    (epoch < parked.floor).then(|| {
        let text = format!("epoch {} is over, the data plane is at {}", epoch.0, parked.floor.0);
        Fault::new(FaultKind::StaleEpoch, text)
    })
}

/// Tells a peer why it is closed; one that does not listen need not know.
fn refuse(mut stream: &TcpStream, answer: Answer) {
    let _ = stream.write(&[answer as u8]);
}

impl Lobby {
    fn lock(&self) -> MutexGuard<'_, Parked> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn park(&self, hello: Hello, stream: TcpStream) {
        let mut parked = self.lock();
        let refused = if hello.key.epoch < parked.floor {
            Some(Answer::Stale)
        } else if parked.streams.len() >= PARKED_MAX {
            Some(Answer::Full)
        } else {
            None
        };
        match refused {
            Some(answer) => refuse(&stream, answer),
            // A second connection of the same name takes the first one's place: its process tries again.
            None => {
                parked.streams.insert(hello.key, (hello.plan, stream));
                self.arrived.notify_all();
            }
        }
    }
}

fn serve(listener: &TcpListener, bell: &UnixStream, lobby: &Lobby) {
    let mut strangers: Vec<Stranger> = Vec::new();
    loop {
        let sockets = [bell.as_fd(), listener.as_fd()].into_iter().chain(strangers.iter().map(|s| s.stream.as_fd()));
        let mut interests: Vec<_> =
            sockets.map(|socket| Interest { socket, read: true, write: false, ready: false }).collect();
        poll(&mut interests, POLL_MAX);
        if interests[0].ready {
            return;
        }
        let now = Instant::now();
        strangers = strangers.into_iter().filter_map(|stranger| hear(stranger, now, lobby)).collect();
        accept(listener, &mut strangers, now);
    }
}

fn accept(listener: &TcpListener, strangers: &mut Vec<Stranger>, now: Instant) {
    while let Ok((stream, _)) = listener.accept() {
        if stream.set_nonblocking(true).is_err() {
            continue;
        }
        if strangers.len() >= STRANGERS_MAX {
            strangers.remove(0);
        }
        strangers.push(Stranger { stream, bytes: [0; HELLO], filled: 0, since: now });
    }
}

/// Reads on; gives the connection back while its hello is not whole.
fn hear(mut stranger: Stranger, now: Instant, lobby: &Lobby) -> Option<Stranger> {
    match stranger.stream.read(&mut stranger.bytes[stranger.filled..]) {
        Ok(0) => return None,
        Ok(count) => stranger.filled += count,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
        Err(_) => return None,
    }
    if stranger.filled < HELLO {
        return (now.duration_since(stranger.since) < HELLO_MAX).then_some(stranger);
    }
    match Hello::decode(&stranger.bytes) {
        Some(Ok(hello)) => lobby.park(hello, stranger.stream),
        Some(Err(answer)) => refuse(&stranger.stream, answer),
        None => {}
    }
    None
}
