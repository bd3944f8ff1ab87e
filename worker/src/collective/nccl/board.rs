//! What the ranks of one host know of each other while the library says nothing: a line each in shared memory.
//!
//! ```text
//! state     generation << 8 | absent, joins, ready, left, failed     process   whose line it is
//! mark      where its device's queue is: 2n within collective n, 2n + 1 behind it
//! text      why it failed, written before the state says so
//! ```
//! Lines are written by their owners alone. Ranks of other hosts have none: of them the coordinator hears through beats.

use crate::collective::memfd::{Mapped, Offer};
use model::fault::{Fault, FaultKind};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

/// Bytes of a line.
const LINE: usize = 512;
const STATE: usize = 8;
const PROCESS: usize = 12;
const MARK: usize = 16;
const LENGTH: usize = 20;
const TEXT: usize = 24;
/// Generations that a communicator may shrink through.
const GENERATIONS: u32 = 1 << 20;

const GAVE_UP: &str = " gave up: ";

/// What a rank is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It has not come.
    Absent,
    /// It waits for the library to connect it.
    Joins,
    Ready,
    /// It was dropped after its last call.
    Left,
    Failed,
}

impl State {
    const ALL: [State; 5] = [State::Absent, State::Joins, State::Ready, State::Left, State::Failed];
}

/// Whether a queue at `mark` is within a collective.
pub fn is_within(mark: u32) -> bool {
    mark != 0 && mark.is_multiple_of(2)
}

/// The lines of one host's ranks.
pub struct Board {
    memory: Mapped,
    size: usize,
}

impl Board {
    /// A new one for `size` ranks, and how others of the host find it; the mark is in its first eight bytes.
    pub fn create(size: usize, mark: u64) -> Result<(Board, Offer), Fault> {
        let (memory, offer) = Mapped::create(size * LINE, mark)?;
        Ok((Board { memory, size }, offer))
    }

    pub fn open(offer: &Offer, size: usize) -> Result<Board, Fault> {
        Ok(Board { memory: Mapped::open(offer, size * LINE)?, size })
    }

    fn at(&self, rank: usize, what: usize) -> usize {
        assert!(rank < self.size);
        rank * LINE + what
    }

    /// Whether `rank` is at `state` in `generation` or has been further; a later generation's state is [`State::Ready`] of
    /// this one, an earlier one's is [`State::Absent`].
    pub fn state(&self, rank: usize, generation: u32) -> State {
        let word = self.memory.region().word(self.at(rank, STATE)).load(Acquire);
        match (word >> 8).cmp(&generation) {
            std::cmp::Ordering::Less => State::Absent,
            std::cmp::Ordering::Greater => State::Ready,
            std::cmp::Ordering::Equal => State::ALL.get((word & 255) as usize).copied().unwrap_or(State::Absent),
        }
    }

    /// Only for the line of the caller's rank.
    pub fn set_state(&self, rank: usize, generation: u32, state: State) {
        assert!(generation < GENERATIONS);
        self.memory.region().word(self.at(rank, PROCESS)).store(std::process::id(), Relaxed);
        self.memory.region().word(self.at(rank, STATE)).store(generation << 8 | state as u32, Release);
    }

    /// The caller's rank has failed, and why.
    pub fn fail(&self, rank: usize, generation: u32, fault: &Fault) {
        let bytes = &fault.text.as_bytes()[..fault.text.len().min(LINE - TEXT)];
        // SAFETY: nobody reads a text before the state says that it is there, and it is written once a generation.
        unsafe { self.memory.region().write(self.at(rank, TEXT), bytes) };
        self.memory.region().word(self.at(rank, LENGTH)).store(bytes.len() as u32, Relaxed);
        self.set_state(rank, generation, State::Failed);
    }

    /// Why `rank` failed, once it says that it did.
    pub fn text(&self, rank: usize) -> String {
        let length = self.memory.region().word(self.at(rank, LENGTH)).load(Relaxed) as usize;
        let at = self.at(rank, TEXT);
        // SAFETY: written before the state said so, and not again in this generation.
        let bytes = unsafe { self.memory.region().read(at..at + length.min(LINE - TEXT)) };
        String::from_utf8_lossy(bytes).into_owned()
    }

    pub fn process(&self, rank: usize) -> u32 {
        self.memory.region().word(self.at(rank, PROCESS)).load(Relaxed)
    }

    pub fn mark(&self, rank: usize) -> u32 {
        self.memory.region().word(self.at(rank, MARK)).load(Relaxed)
    }

    pub fn set_mark(&self, rank: usize, mark: u32) {
        self.memory.region().word(self.at(rank, MARK)).store(mark, Relaxed);
    }
}

/// A process of the same namespace that is watched; the kernel says when it has ended.
pub enum Process {
    Watched(OwnedFd),
    Ended,
    /// By an old kernel.
    Unwatched,
}

impl Process {
    pub fn watch(id: u32) -> Process {
        // SAFETY: a plain call; a result from 0 on is a descriptor that nobody else owns.
        let found = unsafe { libc::syscall(libc::SYS_pidfd_open, id as libc::pid_t, 0) };
        if found >= 0 {
            // SAFETY: as above.
            return Process::Watched(unsafe { OwnedFd::from_raw_fd(found as i32) });
        }
        let gone = std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH);
        if gone { Process::Ended } else { Process::Unwatched }
    }

    pub fn has_ended(&self) -> bool {
        let Process::Watched(descriptor) = self else { return matches!(self, Process::Ended) };
        let mut poll = libc::pollfd { fd: descriptor.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one live entry; no wait.
        unsafe { libc::poll(&mut poll, 1, 0) > 0 }
    }
}

/// A rank's place: the board of its host and whose lines are on it.
#[derive(Clone)]
pub struct Seat {
    pub board: Arc<Board>,
    pub generation: u32,
    /// For each member: its line, if it is of this host.
    pub lines: Vec<Option<usize>>,
    pub rank: usize,
}

impl Seat {
    fn line(&self) -> usize {
        self.lines[self.rank].expect("a rank is of its own host")
    }

    /// The other members of this host: rank and line.
    pub fn neighbours(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        let others = self.lines.iter().enumerate().filter(|(rank, _)| *rank != self.rank);
        others.filter_map(|(rank, line)| line.map(|line| (rank, line)))
    }

    pub fn set_state(&self, state: State) {
        self.board.set_state(self.line(), self.generation, state);
    }

    pub fn state(&self, line: usize) -> State {
        self.board.state(line, self.generation)
    }

    pub fn fail(&self, fault: &Fault) {
        self.board.fail(self.line(), self.generation, fault);
    }

    pub fn set_mark(&self, mark: u32) {
        self.board.set_mark(self.line(), mark);
    }

    /// Who of this host has not come to where the caller is, and where each of them is. `peer`: only that one is waited for.
    pub fn behind(&self, mark: u32, peer: Option<usize>) -> Vec<String> {
        let waited = self.neighbours().filter(|(rank, _)| peer.is_none_or(|peer| peer == *rank));
        let place = |(rank, line): (usize, usize)| {
            let theirs = self.board.mark(line);
            match (self.state(line), theirs == mark) {
                (State::Absent, _) => Some(format!("rank {rank} has not come")),
                (State::Joins, _) => Some(format!("rank {rank} has begun to connect")),
                (State::Left, _) => Some(format!("rank {rank} has left behind call {}", theirs / 2)),
                (State::Failed, _) => Some(format!("rank {rank} has failed")),
                (State::Ready, true) => None,
                (State::Ready, false) if !is_within(theirs) => {
                    Some(format!("rank {rank} is at work behind call {}", theirs / 2))
                }
                (State::Ready, false) => Some(format!("rank {rank} is in call {}", theirs / 2)),
            }
        };
        waited.filter_map(place).collect()
    }

    /// What a neighbour's failure is to the caller.
    pub fn passed_on(&self, rank: usize, line: usize) -> Fault {
        let text = self.board.text(line);
        // One's own words about a third rank are passed on as they are.
        let passed = text.contains(GAVE_UP);
        Fault::new(FaultKind::Aborted, if passed { text } else { format!("rank {rank}{GAVE_UP}{text}") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seats(size: usize) -> Vec<Seat> {
        let (board, _) = Board::create(size, 7).unwrap();
        let board = Arc::new(board);
        let lines: Vec<_> = (0..size).map(Some).collect();
        (0..size).map(|rank| Seat { board: board.clone(), generation: 1, lines: lines.clone(), rank }).collect()
    }

    #[test]
    fn whoever_is_not_in_the_same_call_is_named_with_its_place() {
        let seats = seats(4);
        seats[..3].iter().for_each(|seat| seat.set_state(State::Ready));
        seats[0].set_mark(8);
        seats[1].set_mark(8);
        seats[2].set_mark(7);
        assert_eq!(seats[0].behind(8, None), ["rank 2 is at work behind call 3", "rank 3 has not come"]);
        assert_eq!(seats[0].behind(8, Some(1)), Vec::<String>::new());
    }

    #[test]
    fn a_failure_is_of_its_generation_alone() {
        let seats = seats(2);
        seats[1].fail(&Fault::new(FaultKind::Internal, "of \u{e9}ther"));
        assert_eq!(seats[0].state(1), State::Failed);
        assert_eq!(seats[0].passed_on(1, 1).text, "rank 1 gave up: of \u{e9}ther");
        let later = Seat { generation: 2, ..seats[0].clone() };
        assert_eq!(later.state(1), State::Absent);
    }

    #[test]
    fn the_kernel_says_that_a_process_has_ended() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::watch(child.id());
        assert!(!process.has_ended());
        child.kill().unwrap();
        if matches!(process, Process::Unwatched) {
            child.wait().unwrap();
            return;
        }
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !process.has_ended() {
            assert!(std::time::Instant::now() < end, "not noticed");
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(Process::watch(child.id()).has_ended(), "one that is gone already");
    }
}
