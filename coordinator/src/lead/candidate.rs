//! The core of one coordinator's part in the election: which question the store is asked next, and who leads by its
//! answers. Pure; [`super::campaign`] asks.
//!
//! Processes of another build refuse each other, so a leader of another build than the last one's has no workers. While an
//! upgrade replaces coordinators one by one, those of the new build therefore stand back for a while when a leader is lost, for
//! one of the old build to take the lead; not for ever, since there may be none left.

use crate::cluster::ledger::LEADER_KEY;
use crate::cluster::store::{Entry, Expect, Lease, Revision, Store, StoreError};
use std::time::Duration;

/// A leader that did not renew for so long is gone.
pub const TTL: Duration = Duration::from_secs(2);

/// Looks at a store where nobody leads that a coordinator of another build lets pass: two leases of a leader, so that one of
/// the leader's build that is only just starting is waited for too.
const STANDS_BACK: u32 = 14;

/// The same of one that has just started, knows of no leader before and sees another build there: long enough for whoever knows
/// better, and shorter than whoever knows that it had better wait.
const STANDS_BACK_NEW: u32 = 3;

/// Keys of those that are there; the value is the address of the node plane and the build.
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

/// A question to the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    Lease,
    /// Say under the lease that this coordinator is there.
    Attend {
        lease: Lease,
        key: String,
        value: String,
    },
    Renew(Lease),
    /// Who has the leader's key.
    Look,
    /// Take the leader's key, which nobody has.
    Take {
        lease: Lease,
        value: String,
    },
    /// Who is there, asked by one that resigns.
    Members,
    /// Which builds are there, asked by one that knows of no leader before.
    Builds(Lease),
    Revoke(Lease),
}

/// The store's answer to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    Leased(Lease),
    Found(Option<Entry>),
    Took(Revision),
    /// Keys and values.
    Members(Vec<(String, String)>),
    Done,
}

/// One coordinator's part in the election.
#[derive(Debug)]
pub struct Candidate {
    /// Where others reach this one's node plane.
    address: String,
    /// Tells this process from an earlier one at the same address.
    id: String,
    build: String,
    /// The last leader's, as far as known.
    led_by: Option<String>,
    /// Looks that it still lets pass for the sake of another build.
    patience: u32,
    lease: Option<Lease>,
    resigned: bool,
    standing: Standing,
}

impl Candidate {
    /// `id` and `address` hold no spaces; `build` may.
    pub fn new(address: String, id: String, build: String) -> Candidate {
        let standing = Standing::Unknown("the store was not read yet".into());
        Candidate {
            address,
            id,
            build,
            led_by: None,
            patience: STANDS_BACK_NEW,
            lease: None,
            resigned: false,
            standing,
        }
    }

    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// It is there no more: the lease that is to be revoked.
    pub fn end(&mut self) -> Option<Lease> {
        self.lease.take()
    }

    /// Begins a look: the lease is renewed, and leadership taken where nobody has it. One that is to resign first gives
    /// leadership up, where there is somebody to take it, and from then on only watches.
    pub fn look(&self, resigns: bool) -> Ask {
        match (self.resigned, self.lease) {
            (true, _) => Ask::Look,
            (false, _) if resigns => Ask::Members,
            (false, Some(lease)) => Ask::Renew(lease),
            (false, None) => Ask::Lease,
        }
    }

    /// The next question of a look; `None` when it is over. An error ends it too.
    pub fn told(&mut self, ask: Ask, told: Result<Told, StoreError>) -> Result<Option<Ask>, StoreError> {
        let next = match (ask, told) {
            (Ask::Renew(_), Err(StoreError::LeaseLapsed(_))) => {
                self.lease = None;
                Ask::Lease
            }
            // Somebody was faster; the next look says who.
            (Ask::Take { .. }, Err(StoreError::Conflict { .. })) => return Ok(None),
            (_, Err(error)) => {
                if matches!(self.standing, Standing::Unknown(_)) {
                    self.standing = Standing::Unknown(error.to_string());
                }
                return Err(error);
            }
            (Ask::Lease, Ok(Told::Leased(lease))) => {
                Ask::Attend { lease, key: self.key(), value: format!("{} {}", self.address, self.build) }
            }
            (Ask::Attend { lease, .. }, Ok(_)) => {
                self.lease = Some(lease);
                Ask::Look
            }
            (Ask::Members, Ok(Told::Members(keys))) => {
                let own = self.key();
                if keys.iter().all(|(key, _)| *key == own) {
                    return Ok(Some(self.look(false)));
                }
                self.resigned = true;
                self.lease.take().map_or(Ask::Look, Ask::Revoke)
            }
            (Ask::Look, Ok(Told::Found(found))) => match (found, self.lease) {
                (Some(entry), _) => return Ok(self.follow(&entry)),
                (None, Some(lease)) => match self.led_by.clone() {
                    Some(build) if build == self.build => self.take(lease),
                    Some(build) => return Ok(self.stand_back(lease, &build)),
                    None => Ask::Builds(lease),
                },
                (None, None) => return Ok(self.stand(Standing::Unknown("nobody took the lead yet".into()))),
            },
            (Ask::Builds(lease), Ok(Told::Members(members))) => {
                let builds = members.iter().filter_map(|(_, value)| Some(value.split_once(' ')?.1));
                match builds.into_iter().find(|build| *build != self.build) {
                    Some(other) => return Ok(self.stand_back(lease, other)),
                    None => self.take(lease),
                }
            }
            (Ask::Take { .. }, Ok(Told::Took(revision))) => {
                self.heard_of(self.build.clone());
                return Ok(self.stand(Standing::Leads(Some(revision))));
            }
            (Ask::Renew(_) | Ask::Revoke(_), Ok(_)) => Ask::Look,
            (ask, Ok(told)) => unreachable!("{told:?} is no answer to {ask:?}"),
        };
        Ok(Some(next))
    }

    /// Another says that it leads: believed where its term is the later one.
    pub fn depose(&mut self, address: String, term: Revision) {
        let later = match &self.standing {
            Standing::Unknown(_) => true,
            Standing::Leads(own) => own.is_none_or(|own| own < term),
            Standing::Follows { term: known, .. } => *known < term,
        };
        if later {
            self.standing = Standing::Follows { address, term };
        }
    }

    fn stand(&mut self, standing: Standing) -> Option<Ask> {
        self.standing = standing;
        None
    }

    fn take(&self, lease: Lease) -> Ask {
        Ask::Take { lease, value: format!("{} {} {}", self.address, self.id, self.build) }
    }

    /// Nobody leads: one of `build` is to, unless none does for long.
    fn stand_back(&mut self, lease: Lease, build: &str) -> Option<Ask> {
        if self.patience == 0 {
            return Some(self.take(lease));
        }
        self.patience -= 1;
        self.stand(Standing::Unknown(format!(
            "this one, of build {}, stands back for one of build {build}",
            self.build
        )))
    }

    fn heard_of(&mut self, build: String) {
        (self.led_by, self.patience) = (Some(build), STANDS_BACK);
    }

    fn follow(&mut self, entry: &Entry) -> Option<Ask> {
        if let Some(build) = String::from_utf8_lossy(&entry.value).splitn(3, ' ').nth(2) {
            self.heard_of(build.into());
        }
        self.stand(self.understand(entry))
    }

    fn key(&self) -> String {
        format!("{MEMBERS}{}", self.id)
    }

    fn understand(&self, entry: &Entry) -> Standing {
        let value = String::from_utf8_lossy(&entry.value);
        let mut words = value.splitn(3, ' ');
        match (words.next(), words.next()) {
            // A key of a lease that was given up a moment ago may still be there.
            (_, Some(id)) if id == self.id && self.resigned => Standing::Unknown("this one gave the lead up".into()),
            (_, Some(id)) if id == self.id => Standing::Leads(Some(entry.revision)),
            (Some(address), Some(_)) => Standing::Follows { address: address.into(), term: entry.revision },
            _ => Standing::Unknown(format!("{LEADER_KEY} holds {value:?}")),
        }
    }
}

/// Asks a store.
pub async fn perform<S: Store>(store: &S, ask: &Ask) -> Result<Told, StoreError> {
    Ok(match ask {
        Ask::Lease => Told::Leased(store.lease(TTL).await?),
        Ask::Attend { lease, key, value } => {
            store.put_if_leased(key, value.as_bytes(), Expect::Absent, lease).await?;
            Told::Done
        }
        Ask::Renew(lease) => store.renew(lease).await.map(|()| Told::Done)?,
        Ask::Look => Told::Found(store.get(LEADER_KEY).await?),
        Ask::Take { lease, value } => {
            Told::Took(store.put_if_leased(LEADER_KEY, value.as_bytes(), Expect::Absent, lease).await?)
        }
        Ask::Members | Ask::Builds(_) => {
            let text = |entry: Entry| (entry.key, String::from_utf8_lossy(&entry.value).into_owned());
            Told::Members(store.list(MEMBERS).await?.entries.into_iter().map(text).collect())
        }
        Ask::Revoke(lease) => store.revoke(lease).await.map(|()| Told::Done)?,
    })
}
