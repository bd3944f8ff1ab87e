//! The shell's dealings with the store: one at a time, and never in the shell's way. It says which epoch the store
//! knows, commits plans by compare-and-swap, and notices when the store goes and comes back; serving goes on without.

use super::event::Event;
use super::store::{Entry, Expect, Fence, Revision, Store, StoreError, Write};
use crate::metrics;
use model::plan::Epoch;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Where the store keeps the group's plan: its epoch, eight bytes, little-endian.
const PLAN_KEY: &str = "groups/0/plan";

/// Who leads: a leased key, see [`crate::lead`].
pub const LEADER_KEY: &str = "leader";

/// Between two looks at the store while it answers, and while it does not.
const LOOK: Duration = Duration::from_secs(2);
const LOOK_AGAIN: Duration = Duration::from_millis(500);

pub struct Ledger<S> {
    store: Arc<S>,
    /// Of several coordinators the one that leads writes, while this key stands as it was written.
    leads: watch::Receiver<Option<Revision>>,
    /// Which revision wrote the plan, as far as known.
    at: Option<Revision>,
    /// Whether this coordinator, or the one that led before, ever committed a plan.
    committed: bool,
    /// To be committed once what is pending is over.
    wanted: Option<Epoch>,
    pending: Option<Pending>,
    /// Why the store is not there; none before the first answer too.
    down: Option<String>,
    asked: bool,
    look_at: Instant,
}

struct Pending {
    commits: bool,
    answer: Pin<Box<dyn Future<Output = Answer> + Send>>,
}

/// What the store said.
enum Answer {
    Read(Option<Entry>),
    Committed(Epoch, Revision),
    /// Another plan was there.
    Lost(Epoch, Option<Entry>),
    Failed(StoreError),
}

impl<S: Store> Ledger<S> {
    /// `leads`: the revision of the key [`LEADER_KEY`], where several coordinators share the store. `committed`: whether
    /// the cluster served under the leader before.
    pub fn new(store: Arc<S>, leads: watch::Receiver<Option<Revision>>, committed: bool) -> Ledger<S> {
        let look_at = Instant::now();
        let (at, wanted, pending, down) = (None, None, None, None);
        Ledger { store, leads, at, committed, wanted, pending, down, asked: false, look_at }
    }

    pub fn has_committed(&self) -> bool {
        self.committed
    }

    /// Commits the plan of an epoch; `Committed`, `CommitFailed` or `StoreLost` will follow. Of two, the later one counts.
    pub fn commit(&mut self, epoch: Epoch) {
        self.wanted = Some(epoch);
        // A look can be taken later; a write that is on its way is waited for, or nobody knew what it did.
        self.pending.take_if(|p| !p.commits);
    }

    /// The next thing that the core must know. May be dropped and called again: nothing is lost.
    pub async fn next(&mut self) -> Event {
        loop {
            let pending = match &mut self.pending {
                Some(pending) => pending,
                None => {
                    if self.wanted.is_none() {
                        tokio::time::sleep_until(self.look_at).await;
                    }
                    let next = self.begin();
                    self.pending.insert(next)
                }
            };
            let (answer, commits) = (pending.answer.as_mut().await, pending.commits);
            self.pending = None;
            if let Some(event) = self.understand(answer, commits) {
                return event;
            }
        }
    }

    fn begin(&mut self) -> Pending {
        let store = self.store.clone();
        let Some(epoch) = self.wanted.take() else {
            let read = async move { store.get(PLAN_KEY).await.map_or_else(Answer::Failed, Answer::Read) };
            return Pending { commits: false, answer: Box::pin(read) };
        };
        let expect = self.at.map_or(Expect::Absent, Expect::At);
        let fence = self.leads.borrow().map(|revision| Fence { key: LEADER_KEY, revision });
        let write = async move {
            let value = epoch.0.to_le_bytes();
            let write = Write { key: PLAN_KEY, value: &value, expect, lease: None, fence };
            match store.write(write).await {
                Ok(revision) => Answer::Committed(epoch, revision),
                Err(StoreError::Conflict { .. }) => match store.get(PLAN_KEY).await {
                    Ok(entry) => Answer::Lost(epoch, entry),
                    Err(error) => Answer::Failed(error),
                },
                Err(error) => Answer::Failed(error),
            }
        };
        Pending { commits: true, answer: Box::pin(write) }
    }

    fn understand(&mut self, answer: Answer, commits: bool) -> Option<Event> {
        let answers = !matches!(answer, Answer::Failed(_));
        metrics::store(answers);
        self.look_at = Instant::now() + if answers { LOOK } else { LOOK_AGAIN };
        let back = answers && (self.down.take().is_some() || !self.asked);
        if back && self.asked {
            tracing::info!("the store answers again");
        }
        self.asked = true;
        match answer {
            Answer::Read(entry) => {
                let at = entry.as_ref().map(|e| e.revision);
                let moved = at != self.at;
                if moved && !back {
                    tracing::warn!("somebody else wrote a plan at {at:?}, ours was at {:?}", self.at);
                }
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
                if known.is_none() {
                    tracing::warn!("{why}; serving goes on, planning waits");
                }
                // Planning waits for the store: whatever was to be committed is planned again.
                let dropped = self.wanted.take().is_some() || commits;
                (dropped || known.as_ref() != Some(&why)).then_some(Event::StoreLost { why })
            }
        }
    }
}

fn epoch_of(entry: &Entry) -> Epoch {
    Epoch(u64::from_le_bytes(entry.value.as_slice().try_into().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::super::store::memory::MemoryStore;
    use super::super::store::{Change, Lease, Listing, Write};
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use tokio::sync::mpsc;

    /// A store that goes and comes as it is told, and may lose its answers.
    #[derive(Default)]
    struct Flaky {
        memory: MemoryStore,
        gone: AtomicBool,
        answers_lost: AtomicBool,
        reads: AtomicUsize,
    }

    impl Flaky {
        fn here(&self) -> Result<(), StoreError> {
            let gone = self.gone.load(Ordering::Relaxed);
            if gone { Err(StoreError::Unreachable("cut".into())) } else { Ok(()) }
        }
    }

    impl Store for Arc<Flaky> {
        async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.here()?;
            self.memory.get(key).await
        }

        async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
            self.memory.list(prefix).await
        }

        async fn write(&self, write: Write<'_>) -> Result<Revision, StoreError> {
            // A real store takes its time.
            tokio::time::sleep(Duration::from_millis(5)).await;
            self.here()?;
            let written = self.memory.write(write).await;
            let lost = self.answers_lost.swap(false, Ordering::Relaxed);
            if lost { Err(StoreError::Unreachable("no answer".into())) } else { written }
        }

        async fn delete(&self, key: &str) -> Result<(), StoreError> {
            self.memory.delete(key).await
        }

        async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
            self.memory.lease(ttl).await
        }

        async fn renew(&self, lease: &Lease) -> Result<(), StoreError> {
            self.memory.renew(lease).await
        }

        async fn revoke(&self, lease: &Lease) -> Result<(), StoreError> {
            self.memory.revoke(lease).await
        }

        async fn watch(&self, prefix: &str, from: Revision) -> Result<mpsc::Receiver<Change>, StoreError> {
            self.memory.watch(prefix, from).await
        }
    }

    fn alone() -> watch::Receiver<Option<Revision>> {
        watch::channel(None).1
    }

    fn read(epoch: u64) -> Event {
        Event::StoreRead { epoch: Epoch(epoch) }
    }

    fn lost(why: &str) -> Event {
        Event::StoreLost { why: format!("the store is unreachable: {why}") }
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_store_is_read_once_and_takes_plans() {
        let store = Arc::new(Flaky::default());
        let mut ledger = Ledger::new(Arc::new(store.clone()), alone(), false);
        assert_eq!(ledger.next().await, read(0));
        for epoch in 1..4 {
            ledger.commit(Epoch(epoch));
            assert_eq!(ledger.next().await, Event::Committed { epoch: Epoch(epoch) });
        }
        // Nothing more to say, however long it looks.
        assert!(tokio::time::timeout(Duration::from_secs(60), ledger.next()).await.is_err());
        assert!(store.reads.load(Ordering::Relaxed) > 20);
        assert_eq!(
            Ledger::new(Arc::new(store), alone(), false).next().await,
            read(3),
            "who comes later learns the epoch"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_is_told_once_and_its_end_soon() {
        let store = Arc::new(Flaky::default());
        store.gone.store(true, Ordering::Relaxed);
        let mut ledger = Ledger::new(Arc::new(store.clone()), alone(), false);
        assert_eq!(ledger.next().await, lost("cut"));
        assert!(tokio::time::timeout(Duration::from_secs(600), ledger.next()).await.is_err());
        store.gone.store(false, Ordering::Relaxed);
        let began = Instant::now();
        assert_eq!(ledger.next().await, read(0));
        assert!(began.elapsed() <= LOOK_AGAIN);
    }

    #[tokio::test(start_paused = true)]
    async fn a_commit_without_an_answer_is_looked_up() {
        let store = Arc::new(Flaky::default());
        let mut ledger = Ledger::new(Arc::new(store.clone()), alone(), false);
        assert_eq!(ledger.next().await, read(0));
        store.answers_lost.store(true, Ordering::Relaxed);
        ledger.commit(Epoch(1));
        assert_eq!(ledger.next().await, lost("no answer"));
        assert_eq!(ledger.next().await, read(1), "it was written after all");
        ledger.commit(Epoch(2));
        assert_eq!(ledger.next().await, Event::Committed { epoch: Epoch(2) });
    }

    #[tokio::test(start_paused = true)]
    async fn of_two_commits_the_later_one_counts() {
        let store = Arc::new(Flaky::default());
        let mut ledger = Ledger::new(Arc::new(store.clone()), alone(), false);
        assert_eq!(ledger.next().await, read(0));
        ledger.commit(Epoch(1));
        // The shell has other things to do meanwhile; the write goes on where it was.
        assert!(tokio::time::timeout(Duration::from_millis(1), ledger.next()).await.is_err());
        ledger.commit(Epoch(2));
        assert_eq!(ledger.next().await, Event::Committed { epoch: Epoch(2) });
        assert_eq!(store.memory.get(PLAN_KEY).await.unwrap().unwrap().revision, Revision(2), "both were written");
    }

    #[tokio::test(start_paused = true)]
    async fn another_coordinators_plan_is_noticed() {
        let store = Arc::new(Flaky::default());
        let (mut one, mut two) =
            (Ledger::new(Arc::new(store.clone()), alone(), false), Ledger::new(Arc::new(store), alone(), false));
        assert_eq!(one.next().await, read(0));
        assert_eq!(two.next().await, read(0));
        one.commit(Epoch(7));
        assert_eq!(one.next().await, Event::Committed { epoch: Epoch(7) });
        two.commit(Epoch(1));
        let Event::CommitFailed { found, why } = two.next().await else { panic!("a conflict was not noticed") };
        assert_eq!((found, why.as_str()), (Epoch(7), "another plan is at revision 1"));
        two.commit(Epoch(8));
        assert_eq!(two.next().await, Event::Committed { epoch: Epoch(8) });
        assert_eq!(one.next().await, read(8), "while it looks now and then");
    }
    #[tokio::test(start_paused = true)]
    async fn who_leads_no_more_commits_nothing() {
        let store = Arc::new(Flaky::default());
        let leads = store.memory.put_if(LEADER_KEY, b"one", Expect::Absent).await.unwrap();
        let mut ledger = Ledger::new(Arc::new(store.clone()), watch::channel(Some(leads)).1, false);
        assert_eq!(ledger.next().await, read(0));
        ledger.commit(Epoch(1));
        assert_eq!(ledger.next().await, Event::Committed { epoch: Epoch(1) });
        store.memory.put_if(LEADER_KEY, b"two", Expect::At(leads)).await.unwrap();
        ledger.commit(Epoch(2));
        let Event::StoreLost { why } = ledger.next().await else { panic!("a deposed leader wrote") };
        assert!(why.contains("fenced off"), "{why}");
        let kept = store.memory.get(PLAN_KEY).await.unwrap().unwrap();
        assert_eq!(epoch_of(&kept), Epoch(1));
    }
}
