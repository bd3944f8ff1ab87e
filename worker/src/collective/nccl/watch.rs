//! Looks at a communicator while its rank's thread does other things: errors behind calls, neighbours that fail, end or leave, and
//! collectives that are not over in time. Whatever it finds ends the communicator, which frees the queue; so nobody waits for ever,
//! not even in a wait of the driver. It also tells the rank's stopwatch what the queue is at.

use super::board::{Process, Seat, State, is_within};
use super::comm::Comm;
use crate::collective::device::Word;
use crate::collective::hello::Kind;
use crate::collective::timed::Stopwatch;
use model::fault::{Fault, FaultKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between looks while something is on the queue, and while nothing is.
const BUSY: Duration = Duration::from_millis(1);
const IDLE: Duration = Duration::from_millis(10);

/// What a neighbour that left had sent before has come after so long.
const LEFT_MAX: Duration = Duration::from_millis(200);

const EVERYONE: usize = usize::MAX;

/// What a rank's thread, its watch and its abort handles share.
pub struct Link {
    pub comm: Arc<Comm>,
    pub seat: Seat,
    pub word: Arc<dyn Word>,
    pub stopwatch: Arc<Stopwatch>,
    pub kind: Kind,
    pub stall: Duration,
    pub linger: Duration,
    /// The mark behind the last call that was put on the queue.
    issued: AtomicU32,
    waits_for: AtomicUsize,
    stop: AtomicBool,
}

impl Link {
    pub fn new(comm: Arc<Comm>, seat: Seat, word: Arc<dyn Word>, options: &super::Options) -> Link {
        let issued = AtomicU32::new(word.read());
        Link {
            comm,
            seat,
            word,
            stopwatch: options.stopwatch.clone(),
            kind: options.kind,
            stall: options.stall,
            linger: options.linger,
            issued,
            waits_for: AtomicUsize::new(EVERYONE),
            stop: AtomicBool::new(false),
        }
    }

    /// The communicator's end, whose first fault is returned: neighbours hear of it, and the queue is freed, at once or, where the
    /// members may want to shrink it, in a while.
    pub fn end(&self, fault: Fault) -> Fault {
        if self.comm.end(fault.clone()) {
            self.seat.fail(&fault);
            if self.linger.is_zero() {
                self.comm.abort();
            }
        }
        self.comm.fault().unwrap_or(fault)
    }

    /// A call that waits for `peer`, or for everyone, is put on the queue.
    pub fn begins(&self, peer: Option<usize>) {
        self.waits_for.store(peer.unwrap_or(EVERYONE), Ordering::Relaxed);
    }

    /// Tells neighbours where the queue is now, between the watch's looks.
    pub fn tell(&self) {
        self.seat.set_mark(self.word.read());
    }

    /// It is, and `mark` behind it.
    pub fn issued(&self, mark: u32) {
        self.issued.store(mark, Ordering::Release);
    }

    fn peer(&self) -> Option<usize> {
        Some(self.waits_for.load(Ordering::Relaxed)).filter(|peer| *peer != EVERYONE)
    }

    /// That something waits in vain since `waited`, and for whom.
    pub fn late(&self, what: &str, waited: Duration, mark: u32) -> Fault {
        let behind = self.seat.behind(mark, self.peer());
        let elsewhere = self.seat.lines.iter().filter(|line| line.is_none()).count();
        let others = match (behind.is_empty(), elsewhere) {
            (false, _) => behind.join(", "),
            (true, 0) => "every rank has come to it, one of them or what connects them stands still".into(),
            (true, _) => format!("every rank of this host has come to it, {elsewhere} are on other hosts"),
        };
        let text = format!("{}: {what} is not over after {:.1} s: {others}", self.comm.who(), waited.as_secs_f64());
        Fault::new(FaultKind::Timeout, text)
    }
}

/// Ends with the members' own end.
pub struct Watch {
    link: Arc<Link>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub fn start(link: &Arc<Link>) -> Result<Watch, Fault> {
        let watched = link.clone();
        let thread = std::thread::Builder::new().name("nccl-watch".into()).spawn(move || run(&watched));
        let thread = thread.map_err(|e| Fault::new(FaultKind::Internal, format!("no thread to watch NCCL: {e}")))?;
        Ok(Watch { link: link.clone(), thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.link.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It ends at once; a panic of its own has been said.
            let _ = thread.join();
        }
    }
}

fn run(link: &Link) {
    let mut neighbours: Vec<Neighbour> =
        link.seat.neighbours().map(|(rank, line)| Neighbour { rank, line, process: None }).collect();
    let mut looks = Looks { mark: link.word.read(), since: Instant::now(), at: Instant::now() };
    let mut ended: Option<Instant> = None;
    while !link.stop.load(Ordering::Acquire) {
        if link.comm.fault().is_none() {
            if let Err(fault) = look(link, &mut neighbours, &mut looks) {
                link.end(fault);
            }
        } else if !link.linger.is_zero() && ended.get_or_insert_with(Instant::now).elapsed() > link.linger {
            return link.comm.abort();
        }
        let idle = link.issued.load(Ordering::Acquire) == looks.mark;
        std::thread::park_timeout(if idle { IDLE } else { BUSY });
    }
}

struct Neighbour {
    rank: usize,
    line: usize,
    process: Option<Process>,
}

impl Neighbour {
    fn has_ended(&mut self, link: &Link) -> Option<u32> {
        let id = link.seat.board.process(self.line);
        if id == 0 || id == std::process::id() {
            return None;
        }
        let process = self.process.get_or_insert_with(|| Process::watch(id));
        process.has_ended().then_some(id)
    }
}

/// What the last look at the queue showed.
struct Looks {
    mark: u32,
    /// When it came there.
    since: Instant,
    at: Instant,
}

impl Looks {
    fn take(&mut self, link: &Link) {
        let (mark, now) = (link.word.read(), Instant::now());
        let entered = u64::from((mark / 2).abs_diff(self.mark / 2));
        // While the rank still puts the call there, the others wait for this one.
        let put = link.issued.load(Ordering::Acquire).wrapping_sub(mark) as i32 > 0;
        link.stopwatch.look(link.kind, is_within(mark) && put, entered, now - self.at);
        self.at = now;
        link.seat.set_mark(mark);
        if mark != self.mark {
            (self.mark, self.since) = (mark, now);
        }
    }
}

fn look(link: &Link, neighbours: &mut [Neighbour], looks: &mut Looks) -> Result<(), Fault> {
    looks.take(link);
    link.comm.is_ready()?;
    let (within, waited) = (is_within(looks.mark), looks.since.elapsed());
    for neighbour in neighbours {
        let (rank, line) = (neighbour.rank, neighbour.line);
        match link.seat.state(line) {
            State::Failed => return Err(link.seat.passed_on(rank, line)),
            State::Left => {
                let waited_for = link.peer().is_none_or(|peer| peer == rank);
                if within && waited_for && waited > LEFT_MAX && link.seat.board.mark(line) != looks.mark {
                    return Err(link.gone(rank, "has left"));
                }
            }
            State::Absent | State::Joins | State::Ready => {
                if let Some(id) = neighbour.has_ended(link) {
                    return Err(link.gone(rank, &format!("(process {id}) is gone")));
                }
            }
        }
    }
    match within && waited > link.stall {
        true => Err(link.late(&format!("call {}", looks.mark / 2), waited, looks.mark)),
        false => Ok(()),
    }
}

impl Link {
    fn gone(&self, rank: usize, how: &str) -> Fault {
        Fault::new(FaultKind::RankLost, format!("{}: rank {rank} {how}", self.comm.who()))
    }
}
