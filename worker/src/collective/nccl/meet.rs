//! What ranks say to each other before the library connects them: who they are, whether they fit, the library's id, and where the
//! board of their host is.

use super::board::{Board, Seat};
use super::library::{Library, UniqueId, Version};
use crate::collective::memfd::Offer;
use crate::collective::{Abort, Collective, connect};
use model::fault::{Fault, FaultKind};
use std::ops::Range;
use std::sync::{Arc, mpsc};
use std::time::Instant;

/// Ends a host's collective when its time is over: the words that precede the library's have a deadline too.
pub struct Guard(Option<mpsc::SyncSender<()>>);

impl Guard {
    pub fn until(deadline: Instant, abort: Arc<dyn Abort>) -> Result<Guard, Fault> {
        let (done, is_done) = mpsc::sync_channel::<()>(1);
        let wait = move || {
            let left = deadline.saturating_duration_since(Instant::now());
            if is_done.recv_timeout(left) == Err(mpsc::RecvTimeoutError::Timeout) {
                abort.abort();
            }
        };
        let spawned = std::thread::Builder::new().name("nccl-deadline".into()).spawn(wait);
        spawned.map_err(|e| Fault::new(FaultKind::Internal, format!("no thread for a deadline: {e}")))?;
        Ok(Guard(Some(done)))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0 = None;
    }
}

/// What a rank says first.
struct Hello {
    /// Zero where it has none.
    version: Version,
    device: [u8; 16],
    /// Or why it has no library.
    host: String,
}

impl Hello {
    fn of(library: &Library, device: [u8; 16]) -> Hello {
        Hello { version: library.version(), device, host: neighbourhood() }
    }

    fn encode(&self) -> Vec<u8> {
        [&self.version.0.to_le_bytes()[..], &self.device, self.host.as_bytes()].concat()
    }

    fn decode(bytes: &[u8]) -> Option<Hello> {
        let (version, rest) = bytes.split_first_chunk::<4>()?;
        let (device, host) = rest.split_first_chunk::<16>()?;
        let host = String::from_utf8_lossy(host).into_owned();
        Some(Hello { version: Version(i32::from_le_bytes(*version)), device: *device, host })
    }
}

/// Why these ranks can't be connected, in the same words on all of them: one has no library, or another version of it, or two are on
/// one device. `None` where they can.
pub fn obstacle(
    library: &Result<Arc<Library>, Fault>,
    host: &mut dyn Collective,
    device: [u8; 16],
) -> Result<Option<String>, Fault> {
    let mine = match library {
        Ok(library) => Hello::of(library, device),
        Err(fault) => Hello { version: Version(0), device, host: fault.text.clone() },
    };
    Ok(agree(&hear(host, &mine)?).err())
}

/// What everyone says.
fn hear(host: &mut dyn Collective, mine: &Hello) -> Result<Vec<Hello>, Fault> {
    let mut said = Vec::new();
    host.gather(&mine.encode(), &mut said)?;
    let heard = |(rank, bytes): (usize, &Vec<u8>)| {
        let odd = || format!("rank {rank} says {} bytes that are no NCCL rank's", bytes.len());
        Hello::decode(bytes).ok_or_else(|| Fault::new(FaultKind::Incompatible, odd()))
    };
    said.iter().enumerate().map(heard).collect()
}

/// The id of a new communicator and this rank's seat, once every rank fits to every other.
pub fn meet(library: &Arc<Library>, host: &mut dyn Collective, device: [u8; 16]) -> Result<(UniqueId, Seat), Fault> {
    let (rank, size) = (host.rank(), host.size());
    let all = hear(host, &Hello::of(library, device))?;
    agree(&all).map_err(|text| Fault::new(FaultKind::Incompatible, text))?;

    // The first rank of each host makes its board, the first of all the id.
    let first = |rank: usize| all.iter().position(|hello| hello.host == all[rank].host).unwrap_or(rank);
    let made = (first(rank) == rank).then(|| Board::create(size, mark(rank))).transpose();
    let id = (rank == 0).then(|| library.unique_id()).transpose();
    let (mut words, mut said) = (Vec::new(), Vec::new());
    if let (Ok(made), Ok(id)) = (&made, &id) {
        words.extend(made.as_ref().map(|(_, offer)| connect::encode(offer)).unwrap_or_default());
        words.extend(id.iter().flat_map(|id| id.0));
    }
    host.gather(&words, &mut said)?;
    let (made, _) = (made?, id?);
    let words = |from: usize, range: Range<usize>| {
        said[from]
            .get(range)
            .ok_or_else(|| Fault::new(FaultKind::Aborted, format!("rank {from} failed to set NCCL up")))
    };
    let board = match made {
        Some((board, _)) => board,
        None => {
            let offer: &[u8; OFFER] = words(first(rank), 0..OFFER)?.try_into().expect("so long");
            let offer: Offer = connect::decode(offer);
            Board::open(&offer, size)?
        }
    };
    let id = UniqueId(words(0, OFFER..OFFER + UniqueId::BYTES)?.try_into().expect("so long"));
    let lines = (0..size).map(|other| (all[other].host == all[rank].host).then_some(other)).collect();
    Ok((id, Seat { board: Arc::new(board), generation: 1, lines, rank }))
}

/// Ranks with the same share memory and see each other's processes; those of other containers are as on other hosts.
fn neighbourhood() -> String {
    let space = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    format!("{}/{}", crate::config::host_name(), space.display())
}

/// Bytes of an offer.
const OFFER: usize = 16;

/// A number that no other board has.
fn mark(rank: usize) -> u64 {
    connect::random() ^ rank as u64
}

/// The library's own errors for these name no rank.
fn agree(all: &[Hello]) -> Result<(), String> {
    for (rank, hello) in all.iter().enumerate() {
        if hello.version == Version(0) {
            return Err(format!("rank {rank}: {}", hello.host));
        }
        if hello.version != all[0].version {
            return Err(format!("rank 0 has NCCL {}, rank {rank} has {}", all[0].version, hello.version));
        }
        if let Some(other) = all[..rank].iter().position(|other| other.device == hello.device) {
            let host = hello.host.split('/').next().unwrap_or_default();
            return Err(format!("ranks {other} and {rank} are on one GPU of host {host}: NCCL needs one for each"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(version: i32, device: u8, host: &str) -> Hello {
        let said = Hello { version: Version(version), device: [device; 16], host: host.into() };
        Hello::decode(&said.encode()).unwrap()
    }

    #[test]
    fn ranks_that_do_not_fit_are_named() {
        let all = [hello(23203, 0, "a/1"), hello(23203, 1, "a/1"), hello(23203, 2, "b/2")];
        assert_eq!(agree(&all), Ok(()));
        let text = agree(&[hello(23203, 0, "a/1"), hello(22707, 1, "a/1")]).unwrap_err();
        assert_eq!(text, "rank 0 has NCCL 2.32.3, rank 1 has 2.27.7");
        let text = agree(&[hello(23203, 7, "b/2"), hello(23203, 0, "a/1"), hello(23203, 0, "a/1")]).unwrap_err();
        assert_eq!(text, "ranks 1 and 2 are on one GPU of host a: NCCL needs one for each");
        let text = agree(&[hello(23203, 0, "a/1"), hello(0, 1, "no NCCL")]).unwrap_err();
        assert_eq!(text, "rank 1: no NCCL");
        assert!(Hello::decode(&[0; 19]).is_none());
    }
}
