//! The simulated network and clock: a seeded heap of (time, message), processes that live, pause and die, and streams
//! between them, each in order and independent of the others, as gRPC's are.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use super::message::{Rpc, Task, Word};
use super::tally::Tally;
use crate::sim::random::Random;

/// Simulated microseconds.
pub const MS: u64 = 1_000;
pub const SECOND: u64 = 1_000_000;

/// Base delay of a message.
const DELAY_MAX_US: usize = 600;

/// Pings of a connection, and how long none may be answered: as `worker/src/agent/door.rs` and
/// `coordinator/src/lead/peer.rs` say.
const PING: u64 = 500 * MS;
const SILENCE_OF_COORDINATOR: u64 = 2 * SECOND;
const SILENCE_OF_PEER: u64 = 3 * SECOND;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    Coordinator(usize),
    Worker(usize),
    Store,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamId(u64);

impl StreamId {
    /// Unlike any other's.
    pub fn number(self) -> u64 {
        self.0
    }
}

/// Which end of a stream: who opened it, or who answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Client = 0,
    Server = 1,
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        }
    }
}

#[derive(Debug)]
struct Stream {
    ends: [End; 2],
    /// Nothing that is under way arrives any more.
    reset: bool,
    /// It breaks instead of the word after so many more.
    breaks_in: Option<usize>,
    pinged: u64,
}

#[derive(Debug)]
struct End {
    node: Node,
    life: u64,
    open: bool,
    /// It says nothing more, and still hears.
    said_all: bool,
    /// When the last word towards this end arrives.
    last: u64,
}

/// A process.
#[derive(Default)]
struct Process {
    /// Counts its starts.
    life: u64,
    born: u64,
    alive: bool,
    paused_until: u64,
    /// What waits for it to go on, in order.
    waiting: VecDeque<Event>,
    /// Its host is gone: nothing answers in its stead.
    silent: bool,
}

/// What is done at a time.
#[derive(Debug)]
pub enum Event {
    Task {
        node: Node,
        life: u64,
        task: Task,
    },
    Deliver {
        stream: StreamId,
        to: Side,
        word: Word,
    },
    Ping {
        stream: StreamId,
    },
    /// A process that was paused goes on.
    Wake {
        node: Node,
    },
    World(Rpc),
}

struct Timed {
    at: u64,
    made: u64,
    event: Event,
}

impl PartialEq for Timed {
    fn eq(&self, other: &Timed) -> bool {
        (self.at, self.made) == (other.at, other.made)
    }
}

impl Eq for Timed {}

impl PartialOrd for Timed {
    fn partial_cmp(&self, other: &Timed) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timed {
    /// The earliest first, out of a heap that gives the greatest.
    fn cmp(&self, other: &Timed) -> Ordering {
        (other.at, other.made).cmp(&(self.at, self.made))
    }
}

pub struct Net {
    pub random: Random,
    pub tally: Tally,
    /// Whether what happens is printed: `TRACE=1`.
    trace: bool,
    now: u64,
    begin: Instant,
    heap: BinaryHeap<Timed>,
    /// Goes before all that is in the heap.
    ready: VecDeque<Event>,
    made: u64,
    processes: BTreeMap<Node, Process>,
    streams: BTreeMap<StreamId, Stream>,
    streams_made: u64,
    /// Until when nothing comes through, in this direction.
    cuts: BTreeMap<(Node, Node), u64>,
    /// Until when each message takes up to so much longer.
    slow: BTreeMap<(Node, Node), (u64, u64)>,
}

impl Net {
    pub fn new(random: Random) -> Net {
        let processes = [(Node::Store, Process { alive: true, ..Process::default() })].into();
        Net {
            random,
            tally: Tally::default(),
            trace: std::env::var_os("TRACE").is_some(),
            now: 0,
            begin: Instant::now(),
            heap: BinaryHeap::new(),
            ready: VecDeque::new(),
            made: 0,
            processes,
            streams: BTreeMap::new(),
            streams_made: 0,
            cuts: BTreeMap::new(),
            slow: BTreeMap::new(),
        }
    }

    pub fn traces(&self) -> bool {
        self.trace
    }

    /// Says what happens, to whoever replays a seed.
    pub fn say(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:10.4} {}", self.now as f64 / SECOND as f64, what());
        }
    }

    pub fn now(&self) -> u64 {
        self.now
    }

    /// Since the beginning.
    pub fn elapsed(&self) -> Duration {
        Duration::from_micros(self.now)
    }

    pub fn instant(&self) -> Instant {
        self.begin + self.elapsed()
    }

    /// Starts a process.
    pub fn spawn(&mut self, node: Node) {
        let process = self.processes.entry(node).or_default();
        *process = Process { life: process.life + 1, born: self.now, alive: true, ..Process::default() };
    }

    /// How long the process has lived.
    pub fn age(&self, node: Node) -> u64 {
        self.now - self.processes.get(&node).map_or(0, |p| p.born)
    }

    pub fn is_alive(&self, node: Node) -> bool {
        self.processes.get(&node).is_some_and(|p| p.alive)
    }

    pub fn life(&self, node: Node) -> u64 {
        self.processes.get(&node).map_or(0, |p| p.life)
    }

    pub fn pause(&mut self, node: Node, time: u64) {
        let until = self.now + time;
        if let Some(process) = self.processes.get_mut(&node) {
            process.paused_until = process.paused_until.max(until);
        }
        self.push(until, Event::Wake { node });
    }

    /// Ends a process. Its kernel closes its streams, unless the whole host is gone.
    pub fn end(&mut self, node: Node, silent: bool) {
        let process = self.processes.get_mut(&node).expect("only what lives ends");
        (process.alive, process.silent) = (false, silent);
        let life = process.life;
        let of = |end: &End| end.node == node && end.life == life && end.open;
        let ids: Vec<StreamId> =
            self.streams.iter().filter(|(_, s)| s.ends.iter().any(of)).map(|(id, _)| *id).collect();
        for id in ids {
            let side = if of(&self.streams[&id].ends[0]) { Side::Client } else { Side::Server };
            if silent {
                self.streams.get_mut(&id).expect("it was found").ends[side as usize].open = false;
            } else {
                self.close(id, side);
            }
        }
    }

    /// Nothing comes from `a` to `b` for so long.
    pub fn cut(&mut self, a: Node, b: Node, time: u64) {
        self.cuts.insert((a, b), self.now + time);
    }

    /// Until when nothing comes through, if that is so.
    pub fn cut_until(&self, a: Node, b: Node) -> Option<u64> {
        self.cuts.get(&(a, b)).copied().filter(|until| *until > self.now)
    }

    /// Messages between two take up to `extra` longer for so long.
    pub fn slow(&mut self, a: Node, b: Node, time: u64, extra: u64) {
        self.slow.insert((a, b), (self.now + time, extra));
        self.slow.insert((b, a), (self.now + time, extra));
    }

    /// Faults end: whatever is cut, slow or paused goes on.
    pub fn heal(&mut self) {
        self.cuts.clear();
        self.slow.clear();
        self.streams.values_mut().for_each(|stream| stream.breaks_in = None);
        for process in self.processes.values_mut() {
            process.paused_until = process.paused_until.min(self.now);
            self.ready.extend(std::mem::take(&mut process.waiting));
        }
    }

    /// When a message sent now from `a` arrives at `b`.
    pub fn arrival(&mut self, a: Node, b: Node) -> u64 {
        let mut delay = self.random.within(20..=DELAY_MAX_US) as u64;
        if let Some((until, extra)) = self.slow.get(&(a, b)).copied()
            && until > self.now
        {
            let extra = self.random.within(0..=extra as usize) as u64;
            self.tally.delays += u64::from(extra > 10 * MS);
            delay += extra;
        }
        self.cut_until(a, b).unwrap_or(self.now) + delay
    }

    fn push(&mut self, at: u64, event: Event) {
        self.made += 1;
        self.heap.push(Timed { at: at.max(self.now), made: self.made, event });
    }

    /// To be done by a process, if it still lives then.
    pub fn later(&mut self, delay: u64, node: Node, task: Task) {
        let (at, life) = (self.now + delay, self.life(node));
        self.push(at, Event::Task { node, life, task });
    }

    /// The same at a time.
    pub fn task_at(&mut self, at: u64, node: Node, task: Task) {
        self.later(at.saturating_sub(self.now), node, task);
    }

    pub fn world(&mut self, at: u64, rpc: Rpc) {
        self.push(at, Event::World(rpc));
    }

    /// A message to a process, no part of a stream.
    pub fn tell(&mut self, from: Node, to: Node, task: Task) {
        let at = self.arrival(from, to);
        self.task_at(at, to, task);
    }

    pub fn open(&mut self, client: Node, server: Node) -> StreamId {
        self.streams_made += 1;
        let id = StreamId(self.streams_made);
        let end = |node, life| End { node, life, open: true, said_all: false, last: 0 };
        let ends = [end(client, self.life(client)), end(server, self.life(server))];
        self.streams.insert(id, Stream { ends, reset: false, breaks_in: None, pinged: self.now });
        self.push(self.now + PING, Event::Ping { stream: id });
        id
    }

    pub fn is_open(&self, id: StreamId, side: Side) -> bool {
        self.streams.get(&id).is_some_and(|s| s.ends[side as usize].open)
    }

    /// Says a word to the other end, unless this one is closed.
    pub fn send(&mut self, id: StreamId, from: Side, word: Word) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let end = &stream.ends[from as usize];
        if !end.open || end.said_all {
            return;
        }
        match &mut stream.breaks_in {
            Some(0) => {
                stream.breaks_in = None;
                return self.finish(id, from);
            }
            Some(words) => *words -= 1,
            None => {}
        }
        self.put(id, from, word);
    }

    /// Says nothing more; what the other end says still comes until it closes.
    pub fn finish(&mut self, id: StreamId, side: Side) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let end = &mut stream.ends[side as usize];
        if end.open && !std::mem::replace(&mut end.said_all, true) {
            self.put(id, side, Word::Closed("closed".into()));
        }
    }

    fn put(&mut self, id: StreamId, from: Side, word: Word) {
        let Some(stream) = self.streams.get(&id) else { return };
        let to = from.other();
        let (a, b) = (stream.ends[from as usize].node, stream.ends[to as usize].node);
        let arrival = self.arrival(a, b);
        let end = &mut self.streams.get_mut(&id).expect("it was just found").ends[to as usize];
        end.last = end.last.max(arrival);
        let at = end.last;
        self.push(at, Event::Deliver { stream: id, to, word });
    }

    /// Closes one end; the other learns of it after what was said before.
    pub fn close(&mut self, id: StreamId, side: Side) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let end = &mut stream.ends[side as usize];
        if std::mem::replace(&mut end.open, false) && !end.said_all {
            self.put(id, side, Word::Closed("closed".into()));
        }
    }

    /// Streams that are open on both ends.
    pub fn streams(&self) -> Vec<(StreamId, Node, Node)> {
        let open = self.streams.iter().filter(|(_, s)| s.ends[0].open && s.ends[1].open);
        open.map(|(id, s)| (*id, s.ends[0].node, s.ends[1].node)).collect()
    }

    /// The connection is to break after so many more words, which still arrive.
    pub fn break_in(&mut self, id: StreamId, words: usize) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.breaks_in = Some(words);
        }
    }

    /// The connection breaks: what is under way is lost, and both ends learn of it.
    pub fn reset(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        (stream.reset, stream.breaks_in) = (true, None);
        for side in [Side::Client, Side::Server] {
            self.put(id, side, Word::Closed("connection reset".into()));
        }
    }

    /// The next event that is for somebody, with time moved on to it.
    pub fn next(&mut self) -> Option<Event> {
        loop {
            let event = match self.ready.pop_front() {
                Some(event) => event,
                None => {
                    let Timed { at, event, .. } = self.heap.pop()?;
                    self.now = at;
                    event
                }
            };
            let node = match &event {
                Event::World(_) => return Some(event),
                Event::Wake { node } => {
                    let process = self.processes.get_mut(node).expect("only a process pauses");
                    if process.paused_until <= self.now {
                        self.ready.extend(std::mem::take(&mut process.waiting));
                    }
                    continue;
                }
                Event::Ping { stream } => {
                    let stream = *stream;
                    if let Some(event) = self.ping(stream) {
                        return Some(event);
                    }
                    continue;
                }
                Event::Task { node, life, .. } => {
                    if *life != self.life(*node) || !self.is_alive(*node) {
                        continue;
                    }
                    *node
                }
                Event::Deliver { stream, to, word } => {
                    let Some(known) = self.streams.get(stream) else { continue };
                    let end = &known.ends[*to as usize];
                    let (node, life) = (end.node, end.life);
                    if !end.open || known.reset && !matches!(word, Word::Closed(_)) {
                        continue;
                    }
                    if !self.is_alive(node) || life != self.life(node) {
                        // Nobody is there; its host says so, if there is one.
                        let (id, to) = (*stream, *to);
                        self.streams.get_mut(&id).expect("it was just found").ends[to as usize].open = false;
                        if !self.processes[&node].silent {
                            self.put(id, to, Word::Closed("refused".into()));
                        }
                        continue;
                    }
                    node
                }
            };
            let process = self.processes.get_mut(&node).expect("it is alive");
            if process.paused_until > self.now {
                process.waiting.push_back(event);
                continue;
            }
            if let Event::Deliver { stream, to, word: Word::Closed(_) } = &event {
                let (id, to) = (*stream, *to);
                self.close(id, to);
            }
            return Some(event);
        }
    }

    /// Whoever opened a stream closes it when nothing answers any more.
    fn ping(&mut self, id: StreamId) -> Option<Event> {
        let stream = self.streams.get(&id)?;
        let [client, server] = &stream.ends;
        if !client.open && !server.open {
            self.streams.remove(&id);
            return None;
        }
        let (a, b) = (client.node, server.node);
        let there = self.is_alive(b) && self.life(b) == server.life && self.processes[&b].paused_until <= self.now;
        let answered = there && self.cut_until(a, b).is_none() && self.cut_until(b, a).is_none();
        let paused = self.processes[&a].paused_until > self.now;
        let (open, pinged) = (client.open, stream.pinged);
        if answered || paused {
            self.streams.get_mut(&id).expect("it was just found").pinged = self.now;
        }
        let silence = if matches!(a, Node::Worker(_)) { SILENCE_OF_COORDINATOR } else { SILENCE_OF_PEER };
        self.push(self.now + PING, Event::Ping { stream: id });
        if !open || answered || paused || self.now - pinged < silence {
            return None;
        }
        self.tally.silent_coordinators += 1;
        self.close(id, Side::Client);
        Some(Event::Deliver { stream: id, to: Side::Client, word: Word::Closed("silent".into()) })
    }

    /// Whose end this is.
    pub fn node(&self, id: StreamId, side: Side) -> Node {
        self.streams[&id].ends[side as usize].node
    }
}
