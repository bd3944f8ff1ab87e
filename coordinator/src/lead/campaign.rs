//! Who leads: whoever created the leader's key, as long as the lease lives under which it was written. A leader that does
//! not reach the store leads on, since nobody can be sure of anything then, and what it writes later is fenced by the key's
//! revision. Every coordinator also keeps a key that says that it is there. [`Candidate`] decides; this asks the store.

use super::candidate::{Candidate, perform};
pub use super::candidate::{Standing, TTL};
use crate::cluster::store::{Revision, Store, StoreError};
use crate::metrics;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// Between two looks at the store, each of which renews the lease.
pub const LOOK: Duration = Duration::from_millis(300);

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

/// One coordinator's campaign.
pub struct Campaign<S> {
    store: Arc<S>,
    candidate: Candidate,
    standing: watch::Sender<Standing>,
}

impl<S: Store> Campaign<S> {
    /// `address`: where others reach this one's node plane; `id` tells this process from an earlier one there.
    pub fn new(store: Arc<S>, address: String, id: String, build: String) -> (Campaign<S>, watch::Receiver<Standing>) {
        let candidate = Candidate::new(address, id, build);
        let (standing, watched) = watch::channel(candidate.standing().clone());
        (Campaign { store, candidate, standing }, watched)
    }

    /// Runs until it shall end, or nobody wishes any more.
    pub async fn run(mut self, mut deposed: mpsc::Receiver<Deposed>, mut wish: watch::Receiver<Wish>) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut said = String::new();
        loop {
            tokio::select! {
                _ = look.tick() => {}
                Some((address, term)) = deposed.recv() => {
                    self.candidate.depose(address, term);
                    self.publish();
                }
                changed = wish.changed() => if changed.is_err() { return },
            }
            let wish = *wish.borrow_and_update();
            if wish == Wish::End {
                // Others need not wait for it to lapse; if the store can't be asked they do.
                if let Some(lease) = self.candidate.end() {
                    let _ = self.store.revoke(&lease).await;
                }
                return;
            }
            let looked = self.look(wish == Wish::Resign).await;
            metrics::store(looked.is_ok());
            match looked {
                Ok(()) => said.clear(),
                Err(error) => {
                    let error = error.to_string();
                    if said != error {
                        tracing::warn!("who leads can't be asked: {error}");
                        said = error;
                    }
                }
            }
        }
    }

    async fn look(&mut self, resigns: bool) -> Result<(), StoreError> {
        let mut ask = self.candidate.look(resigns);
        loop {
            let told = perform(&*self.store, &ask).await;
            let next = self.candidate.told(ask, told);
            self.publish();
            match next? {
                Some(next) => ask = next,
                None => return Ok(()),
            }
        }
    }

    fn publish(&self) {
        self.standing.send_if_modified(|current| {
            let standing = self.candidate.standing();
            if current == standing {
                return false;
            }
            match standing {
                Standing::Unknown(why) => tracing::info!("nobody leads: {why}"),
                Standing::Leads(_) => tracing::info!("this coordinator leads"),
                Standing::Follows { address, .. } => tracing::info!("the coordinator at {address} leads"),
            }
            current.clone_from(standing);
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::ledger::LEADER_KEY;
    use crate::cluster::store::Expect;
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
            self.candidate_of(name, "1.0 (a)")
        }

        fn candidate_of(&self, name: &str, build: &str) -> Candidate {
            let (campaign, standing) =
                Campaign::new(self.store.clone(), format!("{name}:1"), name.into(), build.into());
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
    async fn another_build_stands_back_for_the_leaders_and_not_for_ever() {
        let election = Election::new();
        let mut old = election.candidate("old");
        let term = old.leads().await;
        let (mut new, mut newer) = (election.candidate_of("new", "1.1 (b)"), election.candidate_of("newer", "1.1 (b)"));
        assert_eq!((new.follows("old:1").await, newer.follows("old:1").await), (term, term));
        // The leader dies; one of its build starts a lease later, and leads.
        old.task.abort();
        new.until(|s| matches!(s, Standing::Unknown(why) if why.contains("stands back for one of build 1.0 (a)")))
            .await;
        tokio::time::sleep(TTL).await;
        let mut again = election.candidate("again");
        let next = again.leads().await;
        assert!(next > term);
        assert_eq!((new.follows("again:1").await, newer.follows("again:1").await), (next, next));
        // All of that build are gone for good.
        again.task.abort();
        let began = tokio::time::Instant::now();
        let led = tokio::select! { led = new.leads() => led, led = newer.leads() => led };
        assert!(led > next);
        let took = began.elapsed();
        assert!(took >= 2 * TTL && took <= 4 * TTL, "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_knows_no_leader_stands_back_only_where_another_build_is_there() {
        let election = Election::new();
        let mut alone = election.candidate("alone");
        let began = tokio::time::Instant::now();
        alone.leads().await;
        assert!(began.elapsed() < LOOK, "{:?}", began.elapsed());
        // One of another build is there, and no leader was ever seen.
        let election = Election::new();
        let lease = election.store.lease(Duration::from_secs(600)).await.unwrap();
        let other = election.store.put_if_leased("coordinators/x", b"x:1 1.0 (a)", Expect::Absent, &lease).await;
        other.expect("nobody else is there");
        let began = tokio::time::Instant::now();
        election.candidate_of("new", "1.1 (b)").leads().await;
        let took = began.elapsed();
        assert!(took >= 2 * LOOK && took <= TTL, "{took:?}");
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
        let taken =
            election.store.put_if_leased(LEADER_KEY, b"two:1 two 1.0 (a)", Expect::Absent, &lease).await.unwrap();
        assert_eq!(one.follows("two:1").await, taken);
    }
}
