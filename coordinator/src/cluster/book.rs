//! The ledger's core: what is asked of the store next, and what its answers mean. Pure; [`super::ledger`] asks.

use super::event::Event;
use super::ledger::{LEADER_KEY, plan_key};
use super::store::{Entry, Expect, Fence, Revision, Store, StoreError, Write};
use model::plan::Epoch;
use std::time::Duration;

/// Between two looks at the store while it answers, and while it does not.
pub const LOOK: Duration = Duration::from_secs(2);
pub const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A question to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Read,
    /// Commit this epoch's plan.
    Commit {
        epoch: Epoch,
        expect: Expect,
    },
}

/// What the store said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Read(Option<Entry>),
    Committed(Epoch, Revision),
    /// Another plan was there.
    Lost(Epoch, Option<Entry>),
    Failed(StoreError),
}

/// What is known of the store, and what is wanted of it. One question is open at a time.
#[derive(Debug)]
pub struct Book {
    /// Which revision wrote the plan, as far as known.
    at: Option<Revision>,
    /// Whether this coordinator, or the one that led before, ever committed a plan.
    committed: bool,
    /// To be committed once what is open is answered.
    wanted: Option<Epoch>,
    /// Why the store is not there; none before the first answer too.
    down: Option<String>,
    asked: bool,
    look_at: Duration,
}

impl Book {
    /// `committed`: whether the cluster served under the leader before.
    pub fn new(now: Duration, committed: bool) -> Book {
        Book { at: None, committed, wanted: None, down: None, asked: false, look_at: now }
    }

    pub fn has_committed(&self) -> bool {
        self.committed
    }

    /// Why the store does not answer, if it does not.
    pub fn down(&self) -> Option<&str> {
        self.down.as_deref()
    }

    /// Whether the store ever answered, or failed to.
    pub fn was_asked(&self) -> bool {
        self.asked
    }

    /// Wants a plan's epoch committed. Of two, the later one counts.
    pub fn commit(&mut self, epoch: Epoch) {
        self.wanted = Some(epoch);
    }

    /// When the next question is due.
    pub fn due(&self) -> Duration {
        if self.wanted.is_some() { Duration::ZERO } else { self.look_at }
    }

    /// The next question; to be asked when it is due.
    pub fn ask(&mut self) -> Ask {
        let expect = self.at.map_or(Expect::Absent, Expect::At);
        self.wanted.take().map_or(Ask::Read, |epoch| Ask::Commit { epoch, expect })
    }

    /// Takes the answer to the open question, and says what the cluster's core must know.
    pub fn answered(&mut self, now: Duration, ask: Ask, answer: Answer) -> Option<Event> {
        let answers = !matches!(answer, Answer::Failed(_));
        self.look_at = now + if answers { LOOK } else { LOOK_AGAIN };
        let back = answers && (self.down.take().is_some() || !self.asked);
        self.asked = true;
        match answer {
            Answer::Read(entry) => {
                let at = entry.as_ref().map(|e| e.revision);
                let moved = at != self.at;
                self.at = at;
                (moved || back).then(|| Event::StoreRead { epoch: entry.map_or(Epoch(0), |e| epoch_of(&e)) })
            }
            Answer::Committed(epoch, revision) => {
                (self.at, self.committed) = (Some(revision), true);
                self.wanted.is_none().then_some(Event::Committed { epoch })
            }
            Answer::Lost(epoch, entry) => {
                self.at = entry.as_ref().map(|e| e.revision);
                let (found, why) = match entry {
                    Some(entry) => (epoch_of(&entry), format!("another plan is at revision {}", entry.revision.0)),
                    None => (epoch, "another plan was there and is gone".to_string()),
                };
                self.wanted = None;
                Some(Event::CommitFailed { found, why })
            }
            Answer::Failed(error) => {
                let why = error.to_string();
                let known = self.down.replace(why.clone());
                // Planning waits for the store: whatever was to be committed is planned again.
                let dropped = self.wanted.take().is_some() || ask != Ask::Read;
                (dropped || known.as_ref() != Some(&why)).then_some(Event::StoreLost { why })
            }
        }
    }
}

/// Asks a store about a group's plan. Of several coordinators the one that leads writes, while the leader's key stands as it was written:
/// `term`.
pub async fn perform<S: Store>(store: &S, group: usize, ask: Ask, term: Option<Revision>) -> Answer {
    let key = plan_key(group);
    let Ask::Commit { epoch, expect } = ask else {
        return store.get(&key).await.map_or_else(Answer::Failed, Answer::Read);
    };
    let value = epoch.0.to_le_bytes();
    let fence = term.map(|revision| Fence { key: LEADER_KEY, revision });
    let write = Write { key: &key, value: &value, expect, lease: None, fence };
    match store.write(write).await {
        Ok(revision) => Answer::Committed(epoch, revision),
        Err(StoreError::Conflict { .. }) => match store.get(&key).await {
            Ok(entry) => Answer::Lost(epoch, entry),
            Err(error) => Answer::Failed(error),
        },
        Err(error) => Answer::Failed(error),
    }
}

pub fn epoch_of(entry: &Entry) -> Epoch {
    Epoch(u64::from_le_bytes(entry.value.as_slice().try_into().unwrap_or_default()))
}
