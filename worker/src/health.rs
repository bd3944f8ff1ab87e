//! Health that tells the truth about one worker, each answer with its reasons.
//!
//! ```text
//! livez      the engine moves, or the agent turns and no step waits in vain
//! readyz     the group of its ranks serves, a coordinator that leads is there, and steps complete; a spare: the group
//!            serves without it
//! startupz   a coordinator has taken this worker once
//! ```
//!
//! The agent tells what it does ([`Pulse`]); whoever asks sees it through another thread, so that an agent that stands still
//! can't hide it.

pub mod server;

use crate::agent::rank::Counters;
use crate::collective::refused::Refused;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Steps that wait while nothing moves for so long are not served. A layer takes far less.
const READY_STILL_MAX: Duration = Duration::from_secs(1);

/// Likewise of the agent, which turns four times a second.
const READY_TURN_MAX: Duration = Duration::from_millis(1500);

/// After so long nothing will move again by itself.
const LIVE_STILL_MAX: Duration = Duration::from_secs(15);

/// How often the agent has to turn.
pub const TURN: Duration = Duration::from_millis(250);

/// What a worker's ranks are at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stage {
    #[default]
    Idle,
    Loading,
    Ready,
}

impl Stage {
    pub const ALL: [Stage; 3] = [Stage::Idle, Stage::Loading, Stage::Ready];

    pub fn word(self) -> &'static str {
        match self {
            Stage::Idle => "idle",
            Stage::Loading => "loading",
            Stage::Ready => "ready",
        }
    }
}

/// What the agent says of itself at each turn within a session.
#[derive(Debug, Clone, Default)]
pub struct Turn {
    /// A coordinator that leads has taken this worker.
    pub joined: bool,
    pub stage: Stage,
    /// Of the ranks; 0 without any.
    pub epoch: u64,
    /// All members of the group have loaded.
    pub serving: bool,
    /// The group serves without this worker, which is fit for the next plan.
    pub spare: bool,
    /// Steps that ranks have not finished.
    pub pending: Option<Arc<AtomicU32>>,
}

/// What a worker does, told by its agent, read by whoever asks.
pub struct Pulse {
    counters: Counters,
    refused: Arc<Refused>,
    watched: Mutex<Watched>,
}

struct Watched {
    turn: Turn,
    turned: Instant,
    started: bool,
    /// The progress that was last seen, and when a step last had moved or none waited.
    progress: u64,
    moved: Instant,
}

/// How a worker is at one moment.
#[derive(Debug, Clone)]
pub struct Facts {
    pub joined: bool,
    pub started: bool,
    pub stage: Stage,
    pub epoch: u64,
    pub serving: bool,
    pub spare: bool,
    pub steps_pending: u32,
    pub progress: u64,
    pub bytes_done: u64,
    pub bytes_total: u64,
    /// Between steps, see [`crate::agent::rank::Gaps`].
    pub gaps: (u64, Duration),
    /// How long steps have waited without that anything moved.
    pub still: Duration,
    /// Since the agent's last turn.
    pub turned: Duration,
}

impl Pulse {
    pub fn new(counters: Counters, refused: Arc<Refused>, now: Instant) -> Pulse {
        let watched = Watched { turn: Turn::default(), turned: now, started: false, progress: 0, moved: now };
        Pulse { counters, refused, watched: Mutex::new(watched) }
    }

    pub fn refused(&self) -> &Refused {
        &self.refused
    }

    /// The agent turned within a session.
    pub fn turn(&self, turn: Turn, now: Instant) {
        let mut watched = self.lock();
        watched.started |= turn.joined;
        (watched.turn, watched.turned) = (turn, now);
    }

    /// The agent turned without a session.
    pub fn alone(&self, now: Instant) {
        self.turn(Turn::default(), now);
    }

    /// Looks whether anything moved. To be called several times within [`READY_STILL_MAX`].
    pub fn look(&self, now: Instant) -> Facts {
        let mut watched = self.lock();
        let progress = self.counters.progress.load(Ordering::Relaxed);
        let steps_pending = watched.turn.pending.as_ref().map_or(0, |pending| pending.load(Ordering::Relaxed));
        if progress != watched.progress || steps_pending == 0 {
            (watched.progress, watched.moved) = (progress, now);
        }
        Facts {
            joined: watched.turn.joined,
            started: watched.started,
            stage: watched.turn.stage,
            epoch: watched.turn.epoch,
            serving: watched.turn.serving,
            spare: watched.turn.spare,
            steps_pending,
            progress,
            gaps: self.counters.gaps.read(),
            bytes_done: self.counters.bytes_done.load(Ordering::Relaxed),
            bytes_total: self.counters.bytes_total.load(Ordering::Relaxed),
            still: now.saturating_duration_since(watched.moved),
            turned: now.saturating_duration_since(watched.turned),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Facts {
    /// Why this process should be started again; nothing while it may go on.
    pub fn deadly(&self) -> Vec<String> {
        let mut reasons = self.stopped(LIVE_STILL_MAX);
        let moves = self.steps_pending > 0 && reasons.is_empty();
        if !moves {
            reasons.extend(self.asleep(LIVE_STILL_MAX));
        }
        reasons
    }

    /// Why a step sent now would not be answered.
    pub fn obstacles(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if !self.joined {
            reasons.push("no coordinator that leads has taken this worker".to_string());
        }
        match self.stage {
            Stage::Idle if self.spare => {}
            Stage::Idle => {
                reasons.push("no plan needs this worker now, and its group does not serve without it".into())
            }
            Stage::Loading => {
                let (done, total) = (self.bytes_done, self.bytes_total);
                reasons.push(format!("loading epoch {}: {done} of {total} bytes", self.epoch));
            }
            Stage::Ready if !self.serving => {
                reasons.push(format!("epoch {} is loaded here, and its group does not serve yet", self.epoch));
            }
            Stage::Ready => {}
        }
        reasons.extend(self.stopped(READY_STILL_MAX));
        reasons.extend(self.asleep(READY_TURN_MAX));
        reasons
    }

    /// What a worker that is ready, though it serves nothing, is ready for.
    pub fn remarks(&self) -> Vec<String> {
        let spare = self.spare && self.stage == Stage::Idle;
        if spare { vec!["spare: its group serves without this worker".into()] } else { Vec::new() }
    }

    /// Why this worker has not begun.
    pub fn beginnings(&self) -> Vec<String> {
        if self.started { Vec::new() } else { vec!["no coordinator has taken this worker yet".into()] }
    }

    fn stopped(&self, most: Duration) -> Vec<String> {
        let stopped = self.steps_pending > 0 && self.still > most;
        let text =
            || format!("{} step(s) wait and nothing has moved for {} ms", self.steps_pending, self.still.as_millis());
        if stopped { vec![text()] } else { Vec::new() }
    }

    fn asleep(&self, most: Duration) -> Vec<String> {
        let text = || format!("the agent has not turned for {} ms", self.turned.as_millis());
        if self.turned > most { vec![text()] } else { Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    struct Worker {
        pulse: Pulse,
        counters: Counters,
        pending: Arc<AtomicU32>,
        start: Instant,
    }

    impl Worker {
        fn new() -> Worker {
            let (counters, start) = (Counters::default(), Instant::now());
            let pulse = Pulse::new(counters.clone(), Arc::default(), start);
            Worker { pulse, counters, pending: Arc::default(), start }
        }

        fn serves(&self, after: u32) {
            let pending = Some(self.pending.clone());
            let turn = Turn { joined: true, stage: Stage::Ready, epoch: 3, serving: true, spare: false, pending };
            self.pulse.turn(turn, self.start + after * MS);
        }

        fn at(&self, after: u32) -> Facts {
            self.pulse.look(self.start + after * MS)
        }
    }

    #[test]
    fn a_worker_is_ready_when_everything_holds_and_says_what_does_not() {
        let worker = Worker::new();
        let facts = worker.at(0);
        assert_eq!(facts.obstacles().len(), 2, "{:?}", facts.obstacles());
        assert_eq!((facts.deadly().len(), facts.beginnings().len()), (0, 1));
        worker.pulse.turn(Turn { joined: true, stage: Stage::Loading, epoch: 2, ..Turn::default() }, worker.start);
        worker.counters.bytes_total.store(77, Ordering::Relaxed);
        assert_eq!(worker.at(1).obstacles(), ["loading epoch 2: 0 of 77 bytes"]);
        worker.pulse.turn(Turn { joined: true, stage: Stage::Ready, epoch: 2, ..Turn::default() }, worker.start);
        assert_eq!(worker.at(1).obstacles(), ["epoch 2 is loaded here, and its group does not serve yet"]);
        worker.pulse.turn(Turn { joined: true, ..Turn::default() }, worker.start);
        assert!(worker.at(1).obstacles()[0].contains("no plan needs this worker"), "its group does not serve");
        worker.pulse.turn(Turn { joined: true, spare: true, ..Turn::default() }, worker.start);
        assert_eq!(worker.at(1).obstacles(), [""; 0]);
        assert!(worker.at(1).remarks()[0].starts_with("spare"), "{:?}", worker.at(1).remarks());
        worker.pulse.turn(Turn { spare: true, ..Turn::default() }, worker.start);
        assert_eq!(worker.at(1).obstacles().len(), 1, "nobody leads it");
        worker.serves(2);
        assert_eq!((worker.at(3).obstacles().len(), worker.at(3).remarks().len()), (0, 0));
        worker.pulse.alone(worker.start + 4 * MS);
        assert!(worker.at(5).obstacles()[0].contains("no coordinator"));
        assert_eq!(worker.at(5).beginnings(), [""; 0], "it has begun once");
    }

    #[test]
    fn an_engine_that_stops_is_not_ready_after_a_second_and_not_live_after_fifteen() {
        let worker = Worker::new();
        for after in (0..=60_000).step_by(200) {
            worker.serves(after);
            // Idle for long, then a step that moves for a while and stops at 30 s.
            worker.pending.store(u32::from(after >= 20_000) * 2, Ordering::Relaxed);
            if (20_000..30_000).contains(&after) {
                worker.counters.progress.fetch_add(1, Ordering::Relaxed);
            }
            let facts = worker.at(after);
            assert_eq!(facts.obstacles().is_empty(), after <= 30_800, "{after}: {facts:?}");
            assert_eq!(facts.deadly().is_empty(), after <= 44_800, "{after}: {facts:?}");
        }
        assert!(worker.at(60_000).obstacles()[0].starts_with("2 step(s) wait and nothing has moved for 30"));
        // It goes on, and all is well.
        worker.counters.progress.fetch_add(1, Ordering::Relaxed);
        assert!(worker.at(60_100).obstacles().is_empty());
    }

    #[test]
    fn an_agent_that_does_not_turn_is_found_out_unless_the_engine_moves() {
        let worker = Worker::new();
        worker.serves(0);
        assert!(worker.at(1400).obstacles().is_empty());
        assert_eq!(worker.at(1600).obstacles(), ["the agent has not turned for 1600 ms"]);
        assert!(worker.at(14_900).deadly().is_empty());
        assert_eq!(worker.at(15_100).deadly(), ["the agent has not turned for 15100 ms"]);
        worker.pending.store(1, Ordering::Relaxed);
        worker.counters.progress.fetch_add(1, Ordering::Relaxed);
        assert!(worker.at(15_200).deadly().is_empty(), "a long step is no death");
    }
}
