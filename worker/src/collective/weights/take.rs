//! The side that needs the files: connections to workers that may have them, as many as threads read; each read goes to
//! one that is idle, or to the next worker in turn, and on to another when a worker is lost.

use super::words::{Ask, Greeting, HEAD, Head, decode_list, proof};
use crate::collective::credentials::Credentials;
use crate::collective::door::Fence;
use crate::collective::hello::Answer;
use crate::collective::link::Link;
use crate::collective::sockets::{lost, read_exact, tune};
use crate::load::remote::{Lender, Take};
use crate::load::strip::Strip;
use model::fault::{Fault, FaultKind};
use model::plan::Epoch;
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A worker that can't be reached, or does not greet, within this time has no part.
const REACH: Duration = Duration::from_secs(1);

/// A worker that says nothing for so long, asked for little, is lost.
const SILENCE: Duration = Duration::from_secs(3);

/// Where all that are left lend to others already: how long to wait between two rounds, and in all.
const AGAIN: Duration = Duration::from_millis(50);
const BUSY_MAX: Duration = Duration::from_secs(120);

/// Bytes heard at a time.
const CHUNK: usize = 256 << 10;

/// Workers that lend the files of one model.
pub struct Peers {
    greeting: Greeting,
    credentials: Option<Arc<Credentials>>,
    fence: Fence,
    files: Vec<(String, u64)>,
    inner: Mutex<Inner>,
}

struct Inner {
    peers: Vec<Peer>,
    /// Whose turn it is to be asked first.
    next: usize,
    idle: Vec<Stream>,
}

struct Peer {
    address: String,
    /// Why it has no part any more.
    lost: Option<String>,
}

struct Stream {
    peer: usize,
    link: Link,
    buffer: Vec<u8>,
}

/// Why a connection came to nothing.
enum Missed {
    /// It lends to as many as it may.
    Busy,
    Lost(String),
    /// The bytes are not wanted any more, or can't be kept.
    Over(Fault),
}

impl Peers {
    /// Asks workers at `addresses`, in this order, for the model with this identity.
    pub fn find(
        addresses: &[String],
        (identity, token): (&[u8; 32], &str),
        epoch: Epoch,
        credentials: Option<Arc<Credentials>>,
        fence: Fence,
    ) -> Result<Peers, Fault> {
        let peer = |address: &String| Peer { address: address.clone(), lost: None };
        let inner = Inner { peers: addresses.iter().map(peer).collect(), next: 0, idle: Vec::new() };
        let greeting = Greeting { epoch, proof: proof(token, epoch, identity), identity: *identity };
        let mut peers = Peers { greeting, credentials, fence, files: Vec::new(), inner: Mutex::new(inner) };
        let (stream, files) = peers.dial_any()?;
        let address = peers.lock().peers[stream.peer].address.clone();
        tracing::info!("{address} lends the model's {} files", files.len());
        peers.lock().idle.push(stream);
        peers.files = files;
        Ok(peers)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new connection to the next peer that takes one, and what it lists.
    fn dial_any(&self) -> Result<(Stream, Vec<(String, u64)>), Fault> {
        let began = Instant::now();
        loop {
            let mut busy = 0;
            let mut inner = self.lock();
            let (first, count) = (inner.next, inner.peers.len());
            inner.next = (first + 1) % count.max(1);
            drop(inner);
            for peer in (first..first + count).map(|peer| peer % count) {
                let inner = self.lock();
                if inner.peers[peer].lost.is_some() {
                    continue;
                }
                let address = inner.peers[peer].address.clone();
                drop(inner);
                match self.dial(peer, &address) {
                    Ok(dialled) => return Ok(dialled),
                    Err(Missed::Busy) => busy += 1,
                    Err(Missed::Lost(why)) => self.lose(peer, why),
                    Err(Missed::Over(fault)) => return Err(fault),
                }
            }
            if busy == 0 {
                return Err(self.none_left());
            }
            if began.elapsed() > BUSY_MAX {
                let text =
                    format!("{busy} peers have the model's files and lent to others for {} s", BUSY_MAX.as_secs());
                return Err(Fault::new(FaultKind::Timeout, text));
            }
            std::thread::sleep(AGAIN);
        }
    }

    fn lose(&self, peer: usize, why: String) {
        let mut inner = self.lock();
        inner.idle.retain(|stream| stream.peer != peer);
        if inner.peers[peer].lost.is_none() {
            tracing::info!("{} lends no weights: {why}", inner.peers[peer].address);
            inner.peers[peer].lost = Some(why);
        }
    }

    fn none_left(&self) -> Fault {
        let inner = self.lock();
        let each: Vec<String> = inner
            .peers
            .iter()
            .filter_map(|peer| Some(format!("{}: {}", peer.address, peer.lost.as_ref()?)))
            .take(5)
            .collect();
        let text = format!("none of {} peers lends the model's files: {}", inner.peers.len(), each.join("; "));
        Fault::new(FaultKind::RankLost, text)
    }

    fn dial(&self, peer: usize, address: &str) -> Result<(Stream, Vec<(String, u64)>), Missed> {
        let deadline = Instant::now() + REACH;
        let over = || self.fence.ended();
        let said = |error: std::io::Error| over().map_or_else(|| Missed::Lost(error.to_string()), Missed::Over);
        let reach = || -> std::io::Result<Link> {
            let socket = connection(address)?;
            tune(&socket)?;
            let greeting = self.greeting.encode();
            Link::dialled(socket, self.credentials.as_deref(), &greeting, deadline, || over().is_some())
        };
        let link = reach().map_err(said)?;
        let mut stream = Stream { peer, link, buffer: vec![0; CHUNK] };
        let mut byte = [0];
        self.hear(&mut stream, &mut byte)?;
        let lost = |why: &str| Err(Missed::Lost(why.into()));
        match Answer::decode(byte[0]) {
            Some(Answer::Welcome) => {}
            Some(Answer::Busy) => return Err(Missed::Busy),
            Some(Answer::Lacks) => return lost("it has not all of the model's files"),
            Some(Answer::Stale) => return lost("it has a newer epoch"),
            Some(Answer::OtherWire) => return lost("it speaks another version"),
            Some(Answer::OtherPlan | Answer::Full) | None => return lost("it does not answer as a lender does"),
        }
        let mut list = Vec::new();
        self.ask(&mut stream, &Ask::List, &mut |_, bytes| {
            list.extend_from_slice(bytes);
            Ok(())
        })?;
        match decode_list(&list) {
            Some(files) if self.files.is_empty() || self.files == files => Ok((stream, files)),
            Some(_) => lost("its files are others than its peers'"),
            None => lost("it lists no files"),
        }
    }

    fn hear(&self, stream: &mut Stream, bytes: &mut [u8]) -> Result<(), Missed> {
        let heard = read_exact(&mut stream.link, bytes, Instant::now() + SILENCE, || self.fence.ended(), "");
        heard.map_err(|fault| match self.fence.ended() {
            Some(over) => Missed::Over(over),
            None => Missed::Lost(fault.text.trim_start_matches(": ").into()),
        })
    }

    /// Asks once, and hands on what comes.
    fn ask(&self, stream: &mut Stream, ask: &Ask, take: Take<'_>) -> Result<(), Missed> {
        let failed = |error| Missed::Lost(lost("asked", &error).text);
        stream.link.write_all(&ask.encode()).map_err(failed)?;
        let mut head = [0; HEAD];
        self.hear(stream, &mut head)?;
        let head = Head::decode(&head).ok_or(Missed::Lost("it does not answer as a lender does".into()))?;
        let wanted = match ask {
            Ask::Read { strip, .. } => strip.bytes(),
            Ask::List => None,
        };
        if head.given && wanted.is_some_and(|wanted| wanted != head.bytes) {
            return Err(Missed::Lost(format!("it answers {} bytes to a question for {wanted:?}", head.bytes)));
        }
        let mut buffer = std::mem::take(&mut stream.buffer);
        let (mut at, mut why) = (0, Vec::new());
        let mut outcome = Ok(());
        while at < head.bytes && outcome.is_ok() {
            let chunk = &mut buffer[..CHUNK.min((head.bytes - at) as usize)];
            outcome = self.hear(stream, chunk);
            if outcome.is_ok() && head.given {
                outcome = take(at, chunk).map_err(Missed::Over);
            } else if outcome.is_ok() {
                why.extend_from_slice(chunk);
            }
            at += chunk.len() as u64;
        }
        stream.buffer = buffer;
        outcome?;
        if head.given { Ok(()) } else { Err(Missed::Lost(String::from_utf8_lossy(&why).into_owned())) }
    }
}

impl Lender for Peers {
    fn files(&self) -> &[(String, u64)] {
        &self.files
    }

    fn read(&self, file: usize, strip: &Strip, take: Take<'_>) -> Result<(), Fault> {
        let ask = Ask::Read { file: file as u32, strip: *strip };
        loop {
            let idle = self.lock().idle.pop();
            let (mut stream, fresh) = match idle {
                Some(stream) => (stream, false),
                None => (self.dial_any()?.0, true),
            };
            match self.ask(&mut stream, &ask, take) {
                Ok(()) => {
                    self.lock().idle.push(stream);
                    return Ok(());
                }
                Err(Missed::Over(fault)) => return Err(fault),
                // One that lay idle may have been let go: whether its worker is lost shows when it is dialled.
                Err(Missed::Lost(_) | Missed::Busy) if !fresh => {}
                Err(Missed::Lost(why)) => self.lose(stream.peer, why),
                Err(Missed::Busy) => {}
            }
        }
    }
}

/// To the first that answers of all the addresses that `name` stands for.
fn connection(name: &str) -> std::io::Result<TcpStream> {
    let mut outcome = Err(std::io::Error::other("no such address"));
    for address in name.to_socket_addrs()? {
        outcome = TcpStream::connect_timeout(&address, REACH);
        if outcome.is_ok() {
            break;
        }
    }
    outcome
}
