//! Who leads: whoever created the leader's key, as long as the lease lives under which it was written. A leader that does
//! not reach the store leads on, since nobody can be sure of anything then, and what it writes later is fenced by the key's
//! revision. Every coordinator also keeps a key that says that it is there.

use crate::cluster::ledger::LEADER_KEY;
use crate::cluster::store::{Entry, Expect, Lease, Revision, Store, StoreError};
use crate::metrics;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// A leader that did not renew for so long is gone.
pub const TTL: Duration = Duration::from_secs(2);

/// Between two looks at the store, each of which renews the lease.
pub const LOOK: Duration = Duration::from_millis(300);

/// Keys of those that are there; the value is the address of the node plane.
const MEMBERS: &str = "coordinators/";

/// Who leads, as far as this coordinator knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Nobody, or the store did not say yet, with the reason.
    Unknown(String),
    /// This coordinator. The revision fences its writes; none where the store is its own.
    Leads(Option<Revision>),
    /// The one whose node plane is at this address.
    Follows { address: String, term: Revision },
}

/// What a coordinator wants of the election.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    Lead,
    /// Once others are there it leads no more, and only watches who does.
    Resign,
    /// It is there no more.
    End,
}

/// Said by the one that leads now, in case the store can't be asked: its address and term.
pub type Deposed = (String, Revision);

/// One coordinator's part in the election.
pub struct Campaign<S> {
    store: Arc<S>,
    /// Where others reach this one's node plane.
    address: String,
    /// Tells this process from an earlier one at the same address.
    id: String,
    lease: Option<Lease>,
    resigned: bool,
    standing: watch::Sender<Standing>,
}

impl<S: Store> Campaign<S> {
    pub fn new(store: Arc<S>, address: String, id: String) -> (Campaign<S>, watch::Receiver<Standing>) {
        let (standing, watched) = watch::channel(Standing::Unknown("the store was not read yet".into()));
        (Campaign { store, address, id, lease: None, resigned: false, standing }, watched)
    }

    /// Runs until it shall end, or nobody wishes any more.
    pub async fn run(mut self, mut deposed: mpsc::Receiver<Deposed>, mut wish: watch::Receiver<Wish>) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut said = String::new();
        loop {
            tokio::select! {
                _ = look.tick() => {}
                Some((address, term)) = deposed.recv() => self.depose(address, term),
                changed = wish.changed() => if changed.is_err() { return },
            }
            let wish = *wish.borrow_and_update();
            if wish == Wish::End {
                // Others need not wait for it to lapse; if the store can't be asked they do.
                if let Some(lease) = self.lease.take() {
                    let _ = self.store.revoke(&lease).await;
                }
                return;
            }
            let resigns = wish == Wish::Resign && !self.resigned;
            let looked = async {
                if resigns {
                    self.resign().await?;
                }
                self.look().await
            };
            let looked = looked.await;
            metrics::store(looked.is_ok());
            match looked {
                Ok(()) => said.clear(),
                Err(error) => {
                    let error = error.to_string();
                    if matches!(*self.standing.borrow(), Standing::Unknown(_)) {
                        self.stand(Standing::Unknown(error.clone()));
                    }
                    if said != error {
                        tracing::warn!("who leads can't be asked: {error}");
                        said = error;
                    }
                }
            }
        }
    }

    /// One look: the lease is renewed, and leadership taken where nobody has it.
    async fn look(&mut self) -> Result<(), StoreError> {
        if !self.resigned {
            self.attend().await?;
        }
        let found = self.store.get(LEADER_KEY).await?;
        let standing = match (&found, self.lease) {
            (Some(entry), _) => self.understand(entry),
            (None, Some(lease)) => match self.take(&lease).await {
                Ok(revision) => Standing::Leads(Some(revision)),
                // Somebody was faster; the next look says who.
                Err(StoreError::Conflict { .. }) => return Ok(()),
                Err(error) => return Err(error),
            },
            (None, None) => Standing::Unknown("nobody took the lead yet".into()),
        };
        self.stand(standing);
        Ok(())
    }

    /// Keeps the lease, or takes a new one, and says under it that this coordinator is there.
    async fn attend(&mut self) -> Result<(), StoreError> {
        if let Some(lease) = self.lease {
            match self.store.renew(&lease).await {
                Err(StoreError::LeaseLapsed(_)) => self.lease = None,
                renewed => return renewed,
            }
        }
        let lease = self.store.lease(TTL).await?;
        let key = format!("{MEMBERS}{}", self.id);
        self.store.put_if_leased(&key, self.address.as_bytes(), Expect::Absent, &lease).await?;
        self.lease = Some(lease);
        Ok(())
    }

    async fn take(&self, lease: &Lease) -> Result<Revision, StoreError> {
        let value = format!("{} {}", self.address, self.id);
        self.store.put_if_leased(LEADER_KEY, value.as_bytes(), Expect::Absent, lease).await
    }

    fn understand(&self, entry: &Entry) -> Standing {
        let value = String::from_utf8_lossy(&entry.value);
        match value.split_once(' ') {
            // A key of a lease that was given up a moment ago may still be there.
            Some((_, id)) if id == self.id && self.resigned => Standing::Unknown("this one gave the lead up".into()),
            Some((_, id)) if id == self.id => Standing::Leads(Some(entry.revision)),
            Some((address, _)) => Standing::Follows { address: address.into(), term: entry.revision },
            None => Standing::Unknown(format!("{LEADER_KEY} holds {value:?}")),
        }
    }

    /// Gives leadership up at once, where there is somebody to take it.
    async fn resign(&mut self) -> Result<(), StoreError> {
        let own = format!("{MEMBERS}{}", self.id);
        let members = self.store.list(MEMBERS).await?.entries;
        if members.iter().all(|entry| entry.key == own) {
            return Ok(());
        }
        self.resigned = true;
        match self.lease.take() {
            Some(lease) => self.store.revoke(&lease).await,
            None => Ok(()),
        }
    }

    /// Another says that it leads: believed where its term is the later one.
    fn depose(&self, address: String, term: Revision) {
        let later = match &*self.standing.borrow() {
            Standing::Unknown(_) => true,
            Standing::Leads(own) => own.is_none_or(|own| own < term),
            Standing::Follows { term: known, .. } => *known < term,
        };
        if later {
            self.stand(Standing::Follows { address, term });
        }
    }

    fn stand(&self, standing: Standing) {
        self.standing.send_if_modified(|current| {
            if *current == standing {
                return false;
            }
            match &standing {
                Standing::Unknown(why) => tracing::info!("nobody leads: {why}"),
                Standing::Leads(_) => tracing::info!("this coordinator leads"),
                Standing::Follows { address, .. } => tracing::info!("the coordinator at {address} leads"),
            }
            *current = standing;
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::store::memory::MemoryStore;
    use std::time::Instant;

    /// Two candidates over one store whose clock the test moves with tokio's.
    struct Election {
        store: Arc<MemoryStore>,
    }

    struct Candidate {
        standing: watch::Receiver<Standing>,
        wish: watch::Sender<Wish>,
        deposed: mpsc::Sender<Deposed>,
        task: tokio::task::JoinHandle<()>,
    }

    impl Election {
        fn new() -> Election {
            let (began, ticks) = (Instant::now(), tokio::time::Instant::now());
            Election { store: Arc::new(MemoryStore::new(move || began + ticks.elapsed())) }
        }

        fn candidate(&self, name: &str) -> Candidate {
            let (campaign, standing) = Campaign::new(self.store.clone(), format!("{name}:1"), name.into());
            let (wish, wished) = watch::channel(Wish::Lead);
            let (deposed, told) = mpsc::channel(1);
            Candidate { standing, wish, deposed, task: tokio::spawn(campaign.run(told, wished)) }
        }
    }

    impl Candidate {
        async fn until(&mut self, what: impl FnMut(&Standing) -> bool) -> Standing {
            let waited = tokio::time::timeout(Duration::from_secs(60), self.standing.wait_for(what));
            waited.await.expect("in time").expect("it runs").clone()
        }

        async fn leads(&mut self) -> Revision {
            match self.until(|s| matches!(s, Standing::Leads(_))).await {
                Standing::Leads(Some(term)) => term,
                other => panic!("{other:?}"),
            }
        }

        async fn follows(&mut self, leader: &str) -> Revision {
            match self.until(|s| matches!(s, Standing::Follows { address, .. } if address == leader)).await {
                Standing::Follows { term, .. } => term,
                other => panic!("{other:?}"),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_leads_and_after_its_death_the_other_within_a_lease_and_a_look() {
        let election = Election::new();
        let mut one = election.candidate("one");
        let term = one.leads().await;
        let mut two = election.candidate("two");
        assert_eq!(two.follows("one:1").await, term);
        tokio::time::sleep(TTL * 10).await;
        assert_eq!(*one.standing.borrow(), Standing::Leads(Some(term)), "a lease that is renewed lasts");
        one.task.abort();
        let began = tokio::time::Instant::now();
        assert!(two.leads().await > term);
        assert!(began.elapsed() <= TTL + 2 * LOOK, "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn who_resigns_hands_over_at_once_and_watches() {
        let election = Election::new();
        let (mut one, mut two) = (election.candidate("one"), election.candidate("two"));
        let leader = one.until(|s| !matches!(s, Standing::Unknown(_))).await;
        if !matches!(leader, Standing::Leads(_)) {
            std::mem::swap(&mut one, &mut two);
        }
        let before = one.leads().await;
        let began = tokio::time::Instant::now();
        one.wish.send(Wish::Resign).expect("it runs");
        assert!(two.leads().await > before);
        assert!(began.elapsed() <= 2 * LOOK, "{:?}", began.elapsed());
        one.until(|s| matches!(s, Standing::Follows { .. })).await;
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_alone_does_not_resign() {
        let election = Election::new();
        let mut one = election.candidate("one");
        let term = one.leads().await;
        one.wish.send(Wish::Resign).expect("it runs");
        tokio::time::sleep(TTL * 3).await;
        assert_eq!(*one.standing.borrow(), Standing::Leads(Some(term)));
    }

    #[tokio::test(start_paused = true)]
    async fn who_ends_keeps_nobody_waiting() {
        let election = Election::new();
        let mut one = election.candidate("one");
        one.leads().await;
        one.wish.send(Wish::End).expect("it runs");
        one.task.await.expect("it ended");
        assert!(election.store.get(LEADER_KEY).await.unwrap().is_none());
        let began = tokio::time::Instant::now();
        election.candidate("two").leads().await;
        assert!(began.elapsed() < LOOK, "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_later_term_deposes_and_an_earlier_one_does_not() {
        let election = Election::new();
        let mut one = election.candidate("one");
        let term = one.leads().await;
        let earlier = Revision(term.0 - 1);
        one.deposed.send(("old:1".into(), earlier)).await.expect("it runs");
        tokio::time::sleep(LOOK * 3).await;
        assert_eq!(*one.standing.borrow(), Standing::Leads(Some(term)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_whose_lease_lapsed_while_it_slept_follows_the_next() {
        let election = Election::new();
        let mut one = election.candidate("one");
        let term = one.leads().await;
        // The store forgets it, as after a long stop; another is faster.
        let lease = election.store.lease(Duration::from_secs(600)).await.unwrap();
        let leader = election.store.get(LEADER_KEY).await.unwrap().unwrap();
        election.store.delete(LEADER_KEY).await.unwrap();
        assert_eq!(leader.revision, term);
        let taken = election.store.put_if_leased(LEADER_KEY, b"two:1 two", Expect::Absent, &lease).await.unwrap();
        assert_eq!(one.follows("two:1").await, taken);
    }
}
