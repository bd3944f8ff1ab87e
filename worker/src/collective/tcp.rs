//! Ranks in processes of several hosts: a socket between each two of them.
//!
//! There is no thread: the calling rank reads and writes all its sockets in turn until its operation is done, so that
//! large payloads cross without waiting for each other. Two frames' channels keep messages and collectives apart. Under TLS
//! the same rank encrypts and decrypts, in the same loop.

use super::credentials::Credentials;
use super::inbox::{Channel, HEADER, Inbox, header};
use super::link::Link;
use super::session::Session;
use super::sockets::{Interest, poll, tune};
use super::{Abort, Collective, reset};
use model::fault::{Fault, FaultKind};
use proto::tls::Tls;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Up to here all numbers go to each partner, `log2(size)` times; above, halves, quarters and so on go and come back.
const WHOLE_MAX: usize = 16 << 10;

/// Numbers summed before the next part is begun: bounds the memory that a sum takes.
const PART: usize = 1 << 20;

/// Bytes read from a socket at once.
const READ: usize = 256 << 10;

const POLL_MAX: Duration = Duration::from_millis(500);

/// A member whose peers are reached by sockets.
pub struct Tcp {
    rank: usize,
    links: Arc<Links>,
    /// What guards each peer's socket; none in the clear.
    sessions: Vec<Option<Box<Session>>>,
    inboxes: Vec<Inbox>,
    closed: Vec<bool>,
    /// Looks at the sockets before waiting in the kernel.
    spin: u32,
    scratch: Vec<u8>,
    /// Moves with every byte that comes or goes.
    flow: Arc<AtomicU64>,
    failed: bool,
}

/// The sockets, by rank; none to oneself.
struct Links {
    streams: Vec<Option<TcpStream>>,
    aborted: AtomicBool,
}

impl Links {
    fn stream(&self, peer: usize) -> &TcpStream {
        self.streams[peer].as_ref().expect("a rank has a socket to every other")
    }

    fn close(&self) {
        for stream in self.streams.iter().flatten() {
            // Already closed is as good.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Abort for Links {
    fn abort(&self) {
        self.aborted.store(true, Ordering::Release);
        self.close();
    }
}

/// A frame on its way to a peer.
struct Outgoing<'a> {
    to: usize,
    header: [u8; HEADER],
    body: &'a [u8],
    written: usize,
}

impl<'a> Outgoing<'a> {
    fn new(to: usize, channel: Channel, body: &'a [u8]) -> Outgoing<'a> {
        Outgoing { to, header: header(channel, body.len()), body, written: 0 }
    }

    fn is_done(&self) -> bool {
        self.written == HEADER + self.body.len()
    }

    /// Writes once; how much went.
    fn write(&mut self, mut stream: &TcpStream, session: Option<&mut Session>) -> std::io::Result<usize> {
        let head = &self.header[self.written.min(HEADER)..];
        let body = &self.body[self.written.saturating_sub(HEADER)..];
        let count = match session {
            None => stream.write_vectored(&[IoSlice::new(head), IoSlice::new(body)])?,
            Some(session) => session.write(stream, head, body)?,
        };
        self.written += count;
        Ok(count)
    }
}

impl Tcp {
    /// The member `rank`, given a connected socket to every other rank.
    pub fn new(rank: usize, links: Vec<Option<Link>>, spin: u32) -> Result<Tcp, Fault> {
        let size = links.len();
        for (peer, link) in links.iter().enumerate() {
            assert_eq!(link.is_none(), peer == rank, "rank {rank} of {size} needs a socket to each other rank");
            let Some(Link { socket, .. }) = link else { continue };
            tune(socket).and_then(|()| socket.set_nonblocking(true)).map_err(|error| {
                Fault::new(FaultKind::RankLost, format!("rank {rank} of {size}: socket of rank {peer}: {error}"))
            })?;
        }
        let parts = |link: Option<Link>| link.map_or((None, None), |link| (Some(link.socket), link.session));
        let (streams, sessions) = links.into_iter().map(parts).unzip();
        Ok(Tcp {
            rank,
            links: Arc::new(Links { streams, aborted: AtomicBool::new(false) }),
            sessions,
            inboxes: (0..size).map(|_| Inbox::default()).collect(),
            closed: vec![false; size],
            // A look at a socket is a system call: some tens of idle turns.
            spin: spin / 32,
            scratch: vec![0; READ],
            flow: Arc::default(),
            failed: false,
        })
    }

    /// Also moves `flow` whenever a byte comes or goes.
    pub fn moving(mut self, flow: Arc<AtomicU64>) -> Tcp {
        self.flow = flow;
        self
    }

    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.rank;
        (0..self.closed.len()).filter(move |peer| *peer != rank)
    }

    fn lost(&self, peer: usize, why: &str) -> Fault {
        if self.links.aborted.load(Ordering::Acquire) {
            let text = format!("rank {} of {}: its communicator was aborted", self.rank, self.closed.len());
            return Fault::new(FaultKind::Aborted, text);
        }
        let text = format!("rank {} of {}: rank {peer} {why}", self.rank, self.closed.len());
        Fault::new(FaultKind::RankLost, text)
    }

    /// Runs one operation; a fault in it closes all sockets, which every other member notices.
    fn enter<T>(&mut self, operation: impl FnOnce(&mut Tcp) -> Result<T, Fault>) -> Result<T, Fault> {
        let gone = self.failed || self.links.aborted.load(Ordering::Acquire);
        let result = if gone { Err(self.lost(self.rank, "has failed before")) } else { operation(self) };
        if result.is_err() {
            self.failed = true;
            self.links.close();
        }
        result
    }

    /// Reads and writes until all of `outgoing` is in the kernel's hands and each of `needed` has a message.
    fn drive(&mut self, outgoing: &mut [Outgoing<'_>], needed: &[(usize, Channel)]) -> Result<(), Fault> {
        let mut idle = 0;
        loop {
            let mut moved = false;
            for frame in outgoing.iter_mut() {
                if self.is_open(frame) {
                    moved |= self.write(frame)?;
                }
            }
            let sent = !outgoing.iter().any(|frame| self.is_open(frame));
            if sent && needed.iter().all(|(peer, channel)| self.inboxes[*peer].has(*channel)) {
                return Ok(());
            }
            for peer in self.peers() {
                moved |= self.read(peer)?;
            }
            if moved {
                self.flow.fetch_add(1, Ordering::Relaxed);
                idle = 0;
                continue;
            }
            self.check(outgoing, needed)?;
            idle += 1;
            if idle > self.spin {
                self.sleep(outgoing);
            }
        }
    }

    /// Whether the kernel lacks some of a frame.
    fn is_open(&self, frame: &Outgoing<'_>) -> bool {
        !frame.is_done() || self.sessions[frame.to].as_ref().is_some_and(|session| session.owes())
    }

    fn write(&mut self, frame: &mut Outgoing<'_>) -> Result<bool, Fault> {
        match frame.write(self.links.stream(frame.to), self.sessions[frame.to].as_deref_mut()) {
            Ok(count) => Ok(count > 0),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
            Err(error) => Err(self.lost(frame.to, &format!("takes no more: {error}"))),
        }
    }

    fn read(&mut self, peer: usize) -> Result<bool, Fault> {
        if self.closed[peer] {
            return Ok(false);
        }
        let mut stream = self.links.stream(peer);
        let read = match &mut self.sessions[peer] {
            None => stream.read(&mut self.scratch),
            Some(session) => session.read(stream, &mut self.scratch),
        };
        match read {
            Ok(0) => {
                self.closed[peer] = true;
                Ok(true)
            }
            Ok(count) => {
                self.inboxes[peer].feed(&self.scratch[..count])?;
                Ok(true)
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(false),
            Err(error) => Err(self.lost(peer, &format!("is lost: {error}"))),
        }
    }

    /// A closed socket is a loss for whoever waits, unless its rank said goodbye and is not the one waited for.
    fn check(&self, outgoing: &[Outgoing<'_>], needed: &[(usize, Channel)]) -> Result<(), Fault> {
        for peer in self.peers().filter(|peer| self.closed[*peer]) {
            let waited_for = needed.iter().any(|(from, channel)| *from == peer && !self.inboxes[peer].has(*channel))
                || outgoing.iter().any(|frame| frame.to == peer && self.is_open(frame));
            if !self.inboxes[peer].has(Channel::Goodbye) {
                return Err(self.lost(peer, "closed its socket"));
            }
            if waited_for {
                return Err(self.lost(peer, "has left"));
            }
        }
        Ok(())
    }

    fn sleep(&self, outgoing: &[Outgoing<'_>]) {
        let writes = |peer: usize| outgoing.iter().any(|frame| frame.to == peer && self.is_open(frame));
        let mut interests: Vec<Interest<'_>> = self
            .peers()
            .filter(|peer| !self.closed[*peer])
            .map(|peer| Interest {
                socket: self.links.stream(peer).as_fd(),
                read: true,
                write: writes(peer),
                ready: false,
            })
            .collect();
        poll(&mut interests, POLL_MAX);
    }

    fn taken(&mut self, from: usize, channel: Channel) -> Vec<u8> {
        self.inboxes[from].take(channel).expect("driven until it came")
    }

    /// Sends `mine` to a partner and calls `with` for each of its numbers, which are as many as `expected`.
    fn swap(
        &mut self,
        partner: usize,
        mine: &[f32],
        expected: usize,
        with: impl FnOnce(&mut dyn Iterator<Item = f32>),
    ) -> Result<(), Fault> {
        let body = bytemuck::cast_slice(mine);
        self.drive(&mut [Outgoing::new(partner, Channel::Collective, body)], &[(partner, Channel::Collective)])?;
        let theirs = self.taken(partner, Channel::Collective);
        if theirs.len() != expected * 4 {
            let text = format!(
                "rank {} of {} sums {expected} numbers, rank {partner} sent {} bytes",
                self.rank,
                self.closed.len(),
                theirs.len()
            );
            return Err(Fault::new(FaultKind::Diverged, text));
        }
        let (words, _) = theirs.as_chunks::<4>();
        with(&mut words.iter().map(|word| f32::from_le_bytes(*word)));
        self.inboxes[partner].lend(theirs);
        Ok(())
    }

    /// Partners at distance 1, 2, 4..: each step joins two neighbouring subtrees of the canonical tree.
    fn sum_whole(&mut self, values: &mut [f32]) -> Result<(), Fault> {
        let mut distance = 1;
        while distance < self.closed.len() {
            let mut sums = Vec::with_capacity(values.len());
            let mine = &*values;
            self.swap(self.rank ^ distance, mine, mine.len(), |theirs| {
                sums.extend(mine.iter().zip(theirs).map(|(mine, theirs)| mine + theirs));
            })?;
            values.copy_from_slice(&sums);
            distance *= 2;
        }
        Ok(())
    }

    /// As [`Tcp::sum_whole`], but at each step a rank keeps one half of its range, and in the end the halves are
    /// gathered the same way back.
    fn sum_halves(&mut self, values: &mut [f32]) -> Result<(), Fault> {
        let whole = 0..values.len();
        let mut kept = vec![whole];
        let mut distance = 1;
        while distance < self.closed.len() {
            let (mine, theirs) = self.halves(kept.last().expect("never empty"), distance);
            let (keep, give) = two(values, &mine, &theirs);
            self.swap(self.rank ^ distance, give, keep.len(), |theirs| {
                keep.iter_mut().zip(theirs).for_each(|(keep, theirs)| *keep += theirs);
            })?;
            kept.push(mine);
            distance *= 2;
        }
        while distance > 1 {
            distance /= 2;
            kept.pop();
            let (mine, theirs) = self.halves(kept.last().expect("as many as distances"), distance);
            let (have, want) = two(values, &mine, &theirs);
            self.swap(self.rank ^ distance, have, want.len(), |theirs| {
                want.iter_mut().zip(theirs).for_each(|(want, theirs)| *want = theirs);
            })?;
        }
        Ok(())
    }

    /// The halves of `range` that this rank and its partner keep.
    fn halves(
        &self,
        range: &std::ops::Range<usize>,
        distance: usize,
    ) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let middle = range.start + range.len() / 2;
        let (low, high) = (range.start..middle, middle..range.end);
        if self.rank & distance == 0 { (low, high) } else { (high, low) }
    }

    fn everyone(&mut self, parts: &[&[u8]], received: &mut [Vec<u8>]) -> Result<(), Fault> {
        let mut outgoing: Vec<_> = self.peers().map(|to| Outgoing::new(to, Channel::Collective, parts[to])).collect();
        let needed: Vec<_> = self.peers().map(|from| (from, Channel::Collective)).collect();
        self.drive(&mut outgoing, &needed)?;
        for from in self.peers() {
            let theirs = self.taken(from, Channel::Collective);
            let spare = std::mem::replace(&mut received[from], theirs);
            self.inboxes[from].lend(spare);
        }
        received[self.rank].extend_from_slice(parts[self.rank]);
        Ok(())
    }
}

/// Two neighbouring ranges of one slice, in the order given.
fn two<'a>(
    values: &'a mut [f32],
    first: &std::ops::Range<usize>,
    second: &std::ops::Range<usize>,
) -> (&'a mut [f32], &'a mut [f32]) {
    let middle = first.start.max(second.start);
    let (low, high) = values[first.start.min(second.start)..first.end.max(second.end)]
        .split_at_mut(middle - first.start.min(second.start));
    if first.start <= second.start && first.end <= second.start { (low, high) } else { (high, low) }
}

impl Collective for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.closed.len()
    }

    fn sum(&mut self, values: &mut [f32]) -> Result<(), Fault> {
        assert!(self.closed.len().is_power_of_two(), "a sum over {} ranks has no balanced tree", self.closed.len());
        self.enter(|me| {
            values
                .chunks_mut(PART)
                .try_for_each(|part| if part.len() * 4 <= WHOLE_MAX { me.sum_whole(part) } else { me.sum_halves(part) })
        })
    }

    fn gather(&mut self, mine: &[u8], all: &mut Vec<Vec<u8>>) -> Result<(), Fault> {
        reset(all, self.closed.len());
        let parts = vec![mine; self.closed.len()];
        self.enter(|me| me.everyone(&parts, all))
    }

    fn exchange(&mut self, parts: &[Vec<u8>], received: &mut Vec<Vec<u8>>) -> Result<(), Fault> {
        assert_eq!(parts.len(), self.closed.len(), "one part a member");
        reset(received, self.closed.len());
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        self.enter(|me| me.everyone(&parts, received))
    }

    fn send(&mut self, to: usize, bytes: &[u8]) -> Result<(), Fault> {
        assert!(to < self.closed.len() && to != self.rank, "rank {} sends to {to}", self.rank);
        self.enter(|me| me.drive(&mut [Outgoing::new(to, Channel::Message, bytes)], &[]))
    }

    fn receive(&mut self, from: usize, bytes: &mut Vec<u8>) -> Result<(), Fault> {
        assert!(from < self.closed.len() && from != self.rank, "rank {} receives from {from}", self.rank);
        self.enter(|me| {
            me.inboxes[from].lend(std::mem::take(bytes));
            me.drive(&mut [], &[(from, Channel::Message)])?;
            *bytes = me.taken(from, Channel::Message);
            Ok(())
        })
    }

    fn abort_handle(&self) -> Arc<dyn Abort> {
        self.links.clone()
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        if !self.failed && !std::thread::panicking() {
            for peer in self.peers().filter(|peer| !self.closed[*peer]) {
                // Eight bytes that do not fit leave a peer that reads nothing; it will see the close.
                let session = self.sessions[peer].as_deref_mut();
                let _ = Outgoing::new(peer, Channel::Goodbye, &[]).write(self.links.stream(peer), session);
                let _ = self.links.stream(peer).shutdown(Shutdown::Write);
            }
        } else {
            self.links.close();
        }
    }
}

/// The members of a communicator over this machine's loopback, in rank order: for tests and measurements. With `tls` they
/// speak as workers that hold those files.
pub fn loopback(size: usize, tls: Option<Tls>) -> Result<Vec<Tcp>, Fault> {
    let credentials = tls.map(Credentials::read).transpose()?;
    let mesh = || -> std::io::Result<Vec<Vec<Option<Link>>>> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let mut links: Vec<Vec<Option<Link>>> = (0..size).map(|_| (0..size).map(|_| None).collect()).collect();
        for from in 0..size {
            for to in 0..from {
                let dialling = TcpStream::connect(listener.local_addr()?)?;
                let (dialled, accepted) = Link::pair(dialling, listener.accept()?.0, credentials.as_ref())?;
                links[from][to] = Some(dialled);
                links[to][from] = Some(accepted);
            }
        }
        Ok(links)
    };
    let links = mesh()
        .map_err(|error| Fault::new(FaultKind::RankLost, format!("loopback sockets of {size} ranks: {error}")))?;
    let spin = super::wait::spin_for(size);
    links.into_iter().enumerate().map(|(rank, links)| Tcp::new(rank, links, spin)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::authority::Authority;
    use crate::collective::sockets::option;
    use crate::collective::suite::{Members, contract};

    fn boxed(size: usize, tls: Option<Tls>) -> Members {
        loopback(size, tls).unwrap().into_iter().map(|member| Box::new(member) as Box<dyn Collective>).collect()
    }

    mod clear {
        super::contract!(|size| super::boxed(size, None));
    }

    mod encrypted {
        use super::*;

        contract!(|size| boxed(size, Some(Authority::new().worker())));

        #[test]
        fn a_frame_is_sent_when_the_kernel_has_all_of_it() {
            // A kernel that takes less at once than the session does, whose last part then has to wait there; not so much less
            // that acknowledgements are waited for.
            let narrow = |size| {
                let members = loopback(size, Some(Authority::new().worker())).unwrap();
                for stream in members.iter().flat_map(|member| member.links.streams.iter().flatten()) {
                    option(stream, libc::SOL_SOCKET, libc::SO_SNDBUF, 64 << 10).unwrap();
                }
                members.into_iter().map(|member| Box::new(member) as Box<dyn Collective>).collect()
            };
            crate::collective::suite::sent_messages(narrow, 20, 500_000);
        }
    }
}
