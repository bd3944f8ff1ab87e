//! A network that misbehaves: a relay on loopback that cuts, stalls, slows or garbles what crosses it, as a test says.
//!
//! ```text
//! whoever dials ── Way::Up ──> proxy ──> target
//!               <─ Way::Down ─
//! ```
//!
//! A stall is what a middlebox or a hung host does: connections stay open, the kernels on both sides answer each other, and
//! nothing arrives. What was sent meanwhile arrives when the stall ends.

use anyhow::Result;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// Bytes taken at once.
const PART: usize = 16 << 10;

/// A direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Up = 0,
    Down = 1,
}

/// How bytes cross, each way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    Pass,
    /// Nothing arrives, nothing is closed.
    Stall,
    /// Each part so much later; at most 16 KiB are on their way at once.
    Delay(Duration),
    /// So many bytes a millisecond.
    Trickle(usize),
}

/// How connections are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// As by a process that ends: FIN.
    Close,
    /// As by a firewall that forgot: RST.
    Reset,
}

#[derive(Debug, Clone, Copy)]
struct Rules {
    manners: [Manner; 2],
    /// Grows with every cut, which ends all connections of before.
    cuts: u64,
    cut: Cut,
}

/// What crossed, and what is still to be spoiled, each way.
#[derive(Debug, Default)]
struct Counts {
    bytes: [AtomicU64; 2],
    flips: [AtomicU64; 2],
    connections: AtomicU64,
}

/// A relay to one address. Dropping it closes all its connections.
pub struct Proxy {
    address: SocketAddr,
    rules: watch::Sender<Rules>,
    counts: Arc<Counts>,
    _runtime: Runtime,
}

impl Proxy {
    /// Relays to `target` (`ip:port`), which need not be there yet.
    pub fn start(target: &str) -> Result<Proxy> {
        let target: SocketAddr = target.parse()?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let address = listener.local_addr()?;
        let (rules, watched) = watch::channel(Rules { manners: [Manner::Pass; 2], cuts: 0, cut: Cut::Close });
        let counts = Arc::new(Counts::default());
        runtime.spawn(accept(listener, target, watched, counts.clone()));
        Ok(Proxy { address, rules, counts, _runtime: runtime })
    }

    /// `ip:port` to dial instead of the target's.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// From now on both ways.
    pub fn set(&self, manner: Manner) {
        self.rules.send_modify(|rules| rules.manners = [manner; 2]);
    }

    /// From now on one way.
    pub fn set_way(&self, way: Way, manner: Manner) {
        self.rules.send_modify(|rules| rules.manners[way as usize] = manner);
    }

    /// Ends every connection; new ones are taken.
    pub fn cut(&self, cut: Cut) {
        self.rules.send_modify(|rules| (rules.cuts, rules.cut) = (rules.cuts + 1, cut));
    }

    /// Changes a bit of each of the next `count` parts that cross this way, at most one a part.
    pub fn flip(&self, way: Way, count: u64) {
        self.counts.flips[way as usize].store(count, Ordering::Relaxed);
    }

    /// Parts that are still to be spoiled this way.
    pub fn flips_left(&self, way: Way) -> u64 {
        self.counts.flips[way as usize].load(Ordering::Relaxed)
    }

    /// Bytes that have crossed this way.
    pub fn crossed(&self, way: Way) -> u64 {
        self.counts.bytes[way as usize].load(Ordering::Relaxed)
    }

    /// Connections that reached the target.
    pub fn connections(&self) -> u64 {
        self.counts.connections.load(Ordering::Relaxed)
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, rules: watch::Receiver<Rules>, counts: Arc<Counts>) {
    // Connections end with the runtime; a test makes few.
    while let Ok((near, _)) = listener.accept().await {
        tokio::spawn(relay(near, target, rules.clone(), counts.clone()));
    }
}

async fn relay(mut near: TcpStream, target: SocketAddr, mut rules: watch::Receiver<Rules>, counts: Arc<Counts>) {
    let cuts = rules.borrow().cuts;
    // While nothing arrives, the target hears of no new connection either.
    if rules.wait_for(|rules| rules.manners[Way::Up as usize] != Manner::Stall).await.is_err() {
        return;
    }
    let Ok(mut far) = TcpStream::connect(target).await else { return };
    counts.connections.fetch_add(1, Ordering::Relaxed);
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let mut watched = rules.clone();
    let (near_read, near_write) = near.split();
    let (far_read, far_write) = far.split();
    let crossing = async {
        tokio::try_join!(
            cross(near_read, far_write, Way::Up, rules.clone(), &counts),
            cross(far_read, near_write, Way::Down, rules.clone(), &counts),
        )
    };
    let cut = tokio::select! {
        _ = crossing => Cut::Close,
        cut = watched.wait_for(|rules| rules.cuts > cuts) => cut.map_or(Cut::Close, |rules| rules.cut),
    };
    if cut == Cut::Reset {
        let _ = (near.set_zero_linger(), far.set_zero_linger());
    }
}

async fn cross(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    way: Way,
    mut rules: watch::Receiver<Rules>,
    counts: &Counts,
) -> std::io::Result<()> {
    let lane = way as usize;
    let mut part = vec![0; PART];
    loop {
        let count = from.read(&mut part).await?;
        let passes = rules.wait_for(|rules| rules.manners[lane] != Manner::Stall).await;
        let Ok(manner) = passes.map(|rules| rules.manners[lane]) else { return Ok(()) };
        if count == 0 {
            return to.shutdown().await;
        }
        let part = &mut part[..count];
        if counts.flips[lane].fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            part[count / 2] ^= 0x10;
        }
        // Before they are there, so that whoever has them finds them counted.
        counts.bytes[lane].fetch_add(count as u64, Ordering::Relaxed);
        match manner {
            Manner::Delay(time) => tokio::time::sleep(time).await,
            Manner::Trickle(bytes) => {
                for few in part.chunks(bytes.max(1)) {
                    to.write_all(few).await?;
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
            Manner::Pass | Manner::Stall => {}
        }
        if !matches!(manner, Manner::Trickle(_)) {
            to.write_all(part).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::DEADLINE;
    use std::io::{ErrorKind, Read, Write};

    /// A target that says back what it hears, and a connection to it through a proxy.
    fn echo() -> (Proxy, std::net::TcpStream) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Proxy::start(&listener.local_addr().unwrap().to_string()).unwrap();
        std::thread::spawn(move || {
            while let Ok((mut socket, _)) = listener.accept() {
                let mut bytes = [0; 64];
                while let Ok(count @ 1..) = socket.read(&mut bytes) {
                    let _ = socket.write_all(&bytes[..count]);
                }
            }
        });
        let socket = std::net::TcpStream::connect(proxy.address()).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        (proxy, socket)
    }

    fn said(socket: &mut std::net::TcpStream, word: &[u8]) -> Vec<u8> {
        socket.write_all(word).unwrap();
        let mut back = vec![0; word.len()];
        socket.read_exact(&mut back).unwrap();
        back
    }

    #[test]
    fn what_passes_is_whole_and_what_is_flipped_is_not() {
        let (proxy, mut socket) = echo();
        assert_eq!(said(&mut socket, b"hello"), b"hello");
        proxy.flip(Way::Down, 1);
        assert_eq!(said(&mut socket, b"hello"), b"he|lo");
        proxy.set(Manner::Trickle(2));
        assert_eq!(said(&mut socket, b"hello"), b"hello");
        assert_eq!((proxy.crossed(Way::Up), proxy.crossed(Way::Down), proxy.flips_left(Way::Down)), (15, 15, 0));
    }

    #[test]
    fn what_stalls_comes_later_and_what_is_cut_never() {
        let (proxy, mut socket) = echo();
        assert_eq!(said(&mut socket, b"a"), b"a");
        proxy.set_way(Way::Down, Manner::Stall);
        socket.write_all(b"b").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        assert_eq!(socket.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        proxy.set(Manner::Delay(Duration::from_millis(5)));
        let mut late = [0];
        socket.read_exact(&mut late).unwrap();
        assert_eq!(late, *b"b");
        proxy.cut(Cut::Reset);
        assert_eq!(socket.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        let mut again = std::net::TcpStream::connect(proxy.address()).unwrap();
        assert_eq!(said(&mut again, b"c"), b"c");
        proxy.cut(Cut::Close);
        assert_eq!(again.read(&mut [0]).unwrap(), 0);
        assert_eq!(proxy.connections(), 2);
    }
}
