//! The listener of a worker's data plane: takes peers' connections, hears who they are, and keeps each until its
//! communicator claims it; those that ask for weights go to the giver. Everything a stranger can make it hold is bounded.

use super::credentials::Credentials;
use super::hello::{Answer, HELLO, Hello, Key};
use super::link::Link;
use super::refused::{Reason, Refused};
use super::sockets::{Interest, poll};
use super::weights::give::Giver;
use super::weights::words::Greeting;
use model::fault::{Fault, FaultKind};
use model::plan::Epoch;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Connections that have not said hello yet; the oldest makes room. More than the processes of any cluster that greet at
/// once.
pub const STRANGERS_MAX: usize = 256;

/// How long a connection may take over its hello, and over its handshake before.
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
#[derive(Default)]
struct Lobby {
    inner: Mutex<Parked>,
    arrived: Condvar,
    refused: Arc<Refused>,
    giver: Giver,
}

/// Tells when an epoch is over.
pub struct Fence {
    lobby: Arc<Lobby>,
    epoch: Epoch,
}

impl Fence {
    /// Why nothing of the epoch may go on, if so.
    pub fn ended(&self) -> Option<Fault> {
        ended(&self.lobby.lock(), self.epoch)
    }
}

#[derive(Default)]
struct Parked {
    /// Epochs before this one are refused.
    floor: Epoch,
    links: BTreeMap<Key, (u64, Link)>,
}

struct Stranger {
    link: Link,
    bytes: [u8; HELLO],
    filled: usize,
    since: Instant,
}

impl Door {
    /// Listens at `address` (`ip:port`, port 0 for any); with `credentials` nothing is heard before both sides have shown
    /// theirs.
    pub fn bind(address: &str, credentials: Option<Arc<Credentials>>) -> Result<Door, Fault> {
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
        let lobby = Arc::new(Lobby::default());
        let shared = lobby.clone();
        std::thread::Builder::new()
            .name("data-door".into())
            .spawn(move || serve(&listener, &hears, credentials.as_deref(), &shared))
            .map_err(failed)?;
        Ok(Door { address: local, lobby, _bell: bell })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Who was turned away since the start.
    pub fn refused(&self) -> &Arc<Refused> {
        &self.lobby.refused
    }

    /// Waits for the connection `key`, and welcomes it. `plan` is what this process acts on.
    pub fn claim(&self, key: &Key, plan: u64, deadline: Instant, who: &str) -> Result<Link, Fault> {
        let mut parked = self.lobby.lock();
        loop {
            if let Some(fault) = ended(&parked, key.epoch) {
                return Err(fault);
            }
            // One whose process gave up meanwhile is not taken: it may come again.
            if let Some((theirs, mut link)) = parked.links.remove(key).filter(|(_, link)| is_waiting(&link.socket)) {
                drop(parked);
                let answer = if theirs == plan { Answer::Welcome } else { Answer::OtherPlan };
                let told = link.socket.set_nonblocking(false).and_then(|()| link.write_all(&[answer as u8]));
                told.map_err(|error| Fault::new(FaultKind::RankLost, format!("{who}: {error}")))?;
                if theirs != plan {
                    self.lobby.refused.add(Reason::OtherPlan);
                    let text =
                        format!("{who}: acts on another plan ({theirs:x}, here {plan:x}) of epoch {}", key.epoch.0);
                    return Err(Fault::new(FaultKind::Incompatible, text));
                }
                return Ok(link);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Fault::new(FaultKind::Timeout, format!("{who}: did not connect in time")));
            }
            parked = self.lobby.arrived.wait_timeout(parked, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// What this worker lends to others.
    pub fn giver(&self) -> &Giver {
        &self.lobby.giver
    }

    pub fn fence(&self, epoch: Epoch) -> Fence {
        Fence { lobby: self.lobby.clone(), epoch }
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
        parked.links.retain(|key, (_, link)| {
            let stays = key.epoch >= floor;
            if !stays {
                self.lobby.refuse(link, Answer::Stale);
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

/// A peer that waits for its answer says nothing after its hello. The stream does not block.
fn is_waiting(stream: &TcpStream) -> bool {
    stream.peek(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

impl Lobby {
    fn lock(&self) -> MutexGuard<'_, Parked> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells a peer why it is closed; one that does not listen need not know.
    fn refuse(&self, link: &mut Link, answer: Answer) {
        if let Some(reason) = Reason::of(answer) {
            self.refused.add(reason);
        }
        let _ = link.write_all(&[answer as u8]);
    }

    fn park(&self, hello: Hello, mut link: Link) {
        let mut parked = self.lock();
        let refused = if hello.key.epoch < parked.floor {
            Some(Answer::Stale)
        } else if parked.links.len() >= PARKED_MAX {
            Some(Answer::Full)
        } else {
            None
        };
        match refused {
            Some(answer) => self.refuse(&mut link, answer),
            // A second connection of the same name takes the first one's place: its process tries again.
            None => {
                parked.links.insert(hello.key, (hello.plan, link));
                self.arrived.notify_all();
            }
        }
    }
}

fn serve(listener: &TcpListener, bell: &UnixStream, credentials: Option<&Credentials>, lobby: &Lobby) {
    let mut strangers: Vec<Stranger> = Vec::new();
    loop {
        let opened = |socket| Interest { socket, read: true, write: false, ready: false };
        let mut interests = vec![opened(bell.as_fd()), opened(listener.as_fd())];
        interests.extend(strangers.iter().map(|stranger| stranger.link.interest()));
        poll(&mut interests, POLL_MAX);
        if interests[0].ready {
            return;
        }
        let now = Instant::now();
        strangers = strangers.into_iter().filter_map(|stranger| hear(stranger, now, lobby)).collect();
        accept(listener, credentials, lobby, &mut strangers, now);
    }
}

fn accept(
    listener: &TcpListener,
    credentials: Option<&Credentials>,
    lobby: &Lobby,
    strangers: &mut Vec<Stranger>,
    now: Instant,
) {
    while let Ok((socket, _)) = listener.accept() {
        let Ok(link) = socket.set_nonblocking(true).and_then(|()| Link::accepted(socket, credentials)) else {
            continue;
        };
        if strangers.len() >= STRANGERS_MAX {
            strangers.remove(0);
            lobby.refused.add(Reason::Stranger);
        }
        strangers.push(Stranger { link, bytes: [0; HELLO], filled: 0, since: now });
    }
}

/// Reads on; gives the connection back while its hello is not whole.
fn hear(mut stranger: Stranger, now: Instant, lobby: &Lobby) -> Option<Stranger> {
    while stranger.filled < HELLO {
        match stranger.link.read(&mut stranger.bytes[stranger.filled..]) {
            Ok(0) => {
                lobby.refused.add(Reason::Stranger);
                return None;
            }
            Ok(count) => stranger.filled += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let waits = now.duration_since(stranger.since) < HELLO_MAX;
                if !waits {
                    lobby.refused.add(Reason::Stranger);
                }
                return waits.then_some(stranger);
            }
            Err(error) => {
                turn_away(&stranger.link, &error, lobby);
                return None;
            }
        }
    }
    match Hello::decode(&stranger.bytes) {
        Some(Ok(hello)) => lobby.park(hello, stranger.link),
        Some(Err(answer)) => lobby.refuse(&mut stranger.link, answer),
        None => match Greeting::decode(&stranger.bytes) {
            Some(Ok(greeting)) => {
                let floor = lobby.lock().floor;
                lobby.giver.serve(greeting, stranger.link, floor, &lobby.refused);
            }
            Some(Err(_)) => lobby.refuse(&mut stranger.link, Answer::OtherWire),
            None => lobby.refused.add(Reason::Stranger),
        },
    }
    None
}

/// Counts one whose handshake failed; the session has told it why.
fn turn_away(link: &Link, error: &std::io::Error, lobby: &Lobby) {
    match error.kind() {
        ErrorKind::InvalidData | ErrorKind::ConnectionAborted => {
            let peer = link.socket.peer_addr().ok();
            lobby.refused.say(Reason::Certificate, peer, &error.to_string());
        }
        _ => lobby.refused.add(Reason::Stranger),
    }
}
