//! The embedded stores' core: entries, leases, history, watchers. Pure but for its watchers' channels; time is an
//! argument. Every operation first says what it would do ([`Edit`]), so that a store on disk can make that durable
//! before it is applied and seen.

use super::{Change, Entry, Expect, Lease, Listing, Revision, StoreError, Write};
use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

/// Changes kept for watchers that begin in the past, and buffered for one that lags.
const HISTORY_MAX: usize = 1024;

/// One step of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    Put { entry: Entry, lease: Option<u64> },
    Delete { key: String, revision: Revision },
    Grant { lease: u64, ttl: Duration },
    Revoke { lease: u64 },
}

#[derive(Default)]
pub struct Map {
    revision: u64,
    entries: BTreeMap<String, (Entry, Option<u64>)>,
    /// Time to live and end.
    leases: BTreeMap<u64, (Duration, Instant)>,
    leases_made: u64,
    history: VecDeque<Change>,
    /// Every change above it is in `history`.
    history_from: u64,
    watchers: Vec<(String, mpsc::Sender<Change>)>,
}

/// What a map is made of again.
#[derive(Default)]
pub struct Saved {
    pub revision: u64,
    pub leases_made: u64,
    pub entries: Vec<(Entry, Option<u64>)>,
    pub leases: Vec<(u64, Duration)>,
}

impl Map {
    /// A map as it was saved. Leases begin anew: nobody could renew them meanwhile.
    pub fn restore(saved: Saved, now: Instant) -> Map {
        Map {
            revision: saved.revision,
            entries: saved.entries.into_iter().map(|(e, lease)| (e.key.clone(), (e, lease))).collect(),
            leases: saved.leases.into_iter().map(|(id, ttl)| (id, (ttl, now + ttl))).collect(),
            leases_made: saved.leases_made,
            history_from: saved.revision,
            ..Map::default()
        }
    }

    pub fn revision(&self) -> Revision {
        Revision(self.revision)
    }

    pub fn get(&self, key: &str) -> Option<Entry> {
        self.entries.get(key).map(|(e, _)| e.clone())
    }

    pub fn list(&self, prefix: &str) -> Listing {
        Listing { entries: self.under(prefix).cloned().collect(), revision: Revision(self.revision) }
    }

    fn under(&self, prefix: &str) -> impl Iterator<Item = &Entry> {
        let from = self.entries.range(prefix.to_string()..);
        from.take_while(move |(k, _)| k.starts_with(prefix)).map(|(_, (e, _))| e)
    }

    /// The leases whose time is over, with their keys.
    pub fn lapsed(&self, now: Instant) -> Vec<Edit> {
        let mut edits = Vec::new();
        for (&lease, _) in self.leases.iter().filter(|(_, (_, end))| *end <= now) {
            self.end_lease(lease, &mut edits);
        }
        edits
    }

    pub fn write(&self, write: &Write<'_>) -> Result<Edit, StoreError> {
        let lease = write.lease.map(|l| l.0);
        if let Some(lease) = lease.filter(|l| !self.leases.contains_key(l)) {
            return Err(StoreError::LeaseLapsed(lease));
        }
        let at = |key: &str| self.entries.get(key).map(|(e, _)| e.revision);
        if let Some(fence) = write.fence
            && at(fence.key) != Some(fence.revision)
        {
            return Err(StoreError::Fenced { key: fence.key.into(), expected: fence.revision });
        }
        let found = at(write.key);
        let fits = match write.expect {
            Expect::Absent => found.is_none(),
            Expect::At(revision) => found == Some(revision),
        };
        if !fits {
            return Err(StoreError::Conflict { key: write.key.into(), found });
        }
        let entry = Entry { key: write.key.into(), value: write.value.into(), revision: Revision(self.revision + 1) };
        Ok(Edit::Put { entry, lease })
    }

    pub fn delete(&self, key: &str) -> Option<Edit> {
        let there = self.entries.contains_key(key);
        there.then(|| Edit::Delete { key: key.into(), revision: Revision(self.revision + 1) })
    }

    pub fn grant(&self, ttl: Duration) -> (Lease, Edit) {
        let lease = self.leases_made + 1;
        (Lease(lease), Edit::Grant { lease, ttl })
    }

    pub fn revoke(&self, lease: &Lease) -> Vec<Edit> {
        let mut edits = Vec::new();
        if self.leases.contains_key(&lease.0) {
            self.end_lease(lease.0, &mut edits);
        }
        edits
    }

    /// Adds the end of a lease and of its keys to edits that come before.
    fn end_lease(&self, lease: u64, edits: &mut Vec<Edit>) {
        let before = edits.iter().filter(|e| matches!(e, Edit::Delete { .. })).count() as u64;
        let keys = self.entries.iter().filter(|(_, (_, l))| *l == Some(lease)).map(|(key, _)| key.clone());
        edits.extend(
            keys.zip(self.revision + before + 1..)
                .map(|(key, revision)| Edit::Delete { key, revision: Revision(revision) }),
        );
        edits.push(Edit::Revoke { lease });
    }

    pub fn renew(&mut self, lease: &Lease, now: Instant) -> Result<(), StoreError> {
        let (ttl, end) = self.leases.get_mut(&lease.0).ok_or(StoreError::LeaseLapsed(lease.0))?;
        *end = now + *ttl;
        Ok(())
    }

    /// Does what was said; the map has not changed since.
    pub fn apply(&mut self, edit: Edit, now: Instant) {
        match edit {
            Edit::Put { entry, lease } => {
                self.revision = entry.revision.0;
                self.entries.insert(entry.key.clone(), (entry.clone(), lease));
                self.publish(Change::Put(entry));
            }
            Edit::Delete { key, revision } => {
                self.revision = revision.0;
                self.entries.remove(&key);
                self.publish(Change::Deleted { key, revision });
            }
            Edit::Grant { lease, ttl } => {
                self.leases_made = lease;
                self.leases.insert(lease, (ttl, now + ttl));
            }
            Edit::Revoke { lease } => {
                self.leases.remove(&lease);
            }
        }
    }

    fn publish(&mut self, change: Change) {
        // A watcher that is gone or lags is dropped: its channel closes, and it lists again.
        let concerns = |prefix: &str| change.key().starts_with(prefix);
        self.watchers.retain(|(prefix, sender)| {
            if concerns(prefix) { sender.try_send(change.clone()).is_ok() } else { !sender.is_closed() }
        });
        if self.history.len() == HISTORY_MAX {
            let oldest = self.history.pop_front();
            self.history_from = oldest.map_or(self.history_from, |c| c.revision().0);
        }
        self.history.push_back(change);
    }

    pub fn watch(&mut self, prefix: &str, from: Revision) -> Result<mpsc::Receiver<Change>, StoreError> {
        let past: Vec<Change> = if (self.history_from..=self.revision).contains(&from.0) {
            let past = self.history.iter().filter(|c| c.revision() > from && c.key().starts_with(prefix));
            past.cloned().collect()
        } else if from == Revision(0) {
            let mut standing: Vec<Entry> = self.under(prefix).cloned().collect();
            standing.sort_by_key(|e| e.revision);
            standing.into_iter().map(Change::Put).collect()
        } else {
            return Err(StoreError::Forgotten(from));
        };
        let (sender, receiver) = mpsc::channel(HISTORY_MAX + past.len());
        for change in past {
            sender.try_send(change).expect("the channel holds all of the past");
        }
        self.watchers.push((prefix.into(), sender));
        Ok(receiver)
    }
}
