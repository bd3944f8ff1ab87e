//! The shell's dealings with the store: one at a time, and never in the shell's way. It says which epoch the store
//! knows, commits plans by compare-and-swap, and notices when the store goes and comes back; serving goes on without.
//! [`Book`] decides; this asks the store.

use super::book::{Answer, Ask, Book, perform};
use super::event::Event;
use super::store::{Revision, Store};
use crate::metrics;
use model::plan::Epoch;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// Where the store keeps a group's plan: its epoch, eight bytes, little-endian.
pub fn plan_key(group: usize) -> String {
    format!("groups/{group}/plan")
}

/// Who leads: a leased key, see [`crate::lead`].
pub const LEADER_KEY: &str = "leader";

pub struct Ledger<S> {
    store: Arc<S>,
    group: usize,
    /// Of several coordinators the one that leads writes, while this key stands as it was written.
    leads: watch::Receiver<Option<Revision>>,
    book: Book,
    began: Instant,
    pending: Option<Pending>,
}

struct Pending {
    ask: Ask,
    answer: Pin<Box<dyn Future<Output = Answer> + Send>>,
}

impl<S: Store> Ledger<S> {
    /// `leads`: the revision of the key [`LEADER_KEY`], where several coordinators share the store. `committed`: whether
    /// the cluster served under the leader before.
    pub fn new(store: Arc<S>, leads: watch::Receiver<Option<Revision>>, committed: bool) -> Ledger<S> {
        let book = Book::new(Duration::ZERO, committed);
        Ledger { store, group: 0, leads, book, began: Instant::now(), pending: None }
    }

    /// The same for another group than the first.
    pub fn of_group(self, group: usize) -> Ledger<S> {
        Ledger { group, ..self }
    }

    pub fn has_committed(&self) -> bool {
        self.book.has_committed()
    }

    /// Commits the plan of an epoch; `Committed`, `CommitFailed` or `StoreLost` will follow. Of two, the later one counts.
    pub fn commit(&mut self, epoch: Epoch) {
        self.book.commit(epoch);
        // A look can be taken later; a write that is on its way is waited for, or nobody knew what it did.
        self.pending.take_if(|p| p.ask == Ask::Read);
    }

    /// The next thing that the core must know. May be dropped and called again: nothing is lost.
    pub async fn next(&mut self) -> Event {
        loop {
            let pending = match &mut self.pending {
                Some(pending) => pending,
                None => {
                    tokio::time::sleep_until(self.began + self.book.due()).await;
                    let next = self.begin();
                    self.pending.insert(next)
                }
            };
            let (answer, ask) = (pending.answer.as_mut().await, pending.ask);
            self.pending = None;
            if let Some(event) = self.understand(ask, answer) {
                return event;
            }
        }
    }

    fn begin(&mut self) -> Pending {
        let (store, group, ask, term) = (self.store.clone(), self.group, self.book.ask(), *self.leads.borrow());
        Pending { ask, answer: Box::pin(async move { perform(&*store, group, ask, term).await }) }
    }

    fn understand(&mut self, ask: Ask, answer: Answer) -> Option<Event> {
        metrics::store(!matches!(answer, Answer::Failed(_)));
        let (was_down, was_asked) = (self.book.down().is_some(), self.book.was_asked());
        let event = self.book.answered(self.began.elapsed(), ask, answer);
        match (was_down, self.book.down()) {
            (false, Some(why)) => tracing::warn!("{why}; serving goes on, planning waits"),
            (true, None) => tracing::info!("the store answers again"),
            (false, None) if was_asked => {
                if let Some(Event::StoreRead { epoch }) = event {
                    tracing::warn!("somebody else wrote a plan, of epoch {}", epoch.0);
                }
            }
            _ => {}
        }
        event
    }
}

#[cfg(test)]
mod tests {
    use super::super::book::{LOOK_AGAIN, epoch_of};
    use super::super::store::memory::MemoryStore;
    use super::super::store::{Change, Entry, Expect, Lease, Listing, StoreError, Write};
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
        assert_eq!(store.memory.get(&plan_key(0)).await.unwrap().unwrap().revision, Revision(2), "both were written");
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
        let kept = store.memory.get(&plan_key(0)).await.unwrap().unwrap();
        assert_eq!(epoch_of(&kept), Epoch(1));
    }
}
