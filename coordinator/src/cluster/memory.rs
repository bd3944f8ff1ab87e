//! The embedded store without a data directory: for one coordinator and for tests. It lives and dies with its process.

use super::store::{Change, Entry, Expect, Lease, Revision, Store, StoreError};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Changes kept for watchers that begin in the past, and buffered for one that lags.
const HISTORY_MAX: usize = 1024;

#[derive(Default)]
pub struct MemoryStore {
    // A std mutex: no await happens while it is held.
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    revision: u64,
    entries: BTreeMap<String, (Entry, Option<u64>)>,
    leases: BTreeMap<u64, (Duration, Instant)>,
    leases_made: u64,
    history: Vec<Change>,
    watchers: Vec<(String, mpsc::Sender<Change>)>,
}

impl MemoryStore {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.inner.lock().expect("no holder of the store's lock panics");
        inner.expire(Instant::now());
        inner
    }

    fn put(&self, key: &str, value: &[u8], expect: Expect, lease: Option<u64>) -> Result<Revision, StoreError> {
        let mut inner = self.lock();
        if let Some(lease) = lease
            && !inner.leases.contains_key(&lease)
        {
            return Err(StoreError::LeaseLapsed(lease));
        }
        let found = inner.entries.get(key).map(|(e, _)| e.revision);
        let fits = match expect {
            Expect::Absent => found.is_none(),
            Expect::At(revision) => found == Some(revision),
        };
        if !fits {
            return Err(StoreError::Conflict { key: key.into(), found });
        }
        inner.revision += 1;
        let revision = Revision(inner.revision);
        let entry = Entry { key: key.into(), value: value.into(), revision };
        inner.entries.insert(key.into(), (entry.clone(), lease));
        inner.publish(Change::Put(entry));
        Ok(revision)
    }
}

impl Inner {
    fn expire(&mut self, now: Instant) {
        let lapsed: Vec<u64> = self.leases.iter().filter(|(_, (_, end))| *end <= now).map(|(&id, _)| id).collect();
        for lease in lapsed {
            self.leases.remove(&lease);
            let keys: Vec<String> =
                self.entries.iter().filter(|(_, (_, l))| *l == Some(lease)).map(|(k, _)| k.clone()).collect();
            keys.iter().for_each(|key| self.remove(key));
        }
    }

    fn remove(&mut self, key: &str) {
        if self.entries.remove(key).is_some() {
            self.revision += 1;
            self.publish(Change::Deleted { key: key.into(), revision: Revision(self.revision) });
        }
    }

    fn publish(&mut self, change: Change) {
        let key = match &change {
            Change::Put(entry) => &entry.key,
            Change::Deleted { key, .. } => key,
        };
        // A watcher that is gone or lags is dropped: its channel closes, and it lists again.
        self.watchers.retain(|(prefix, sender)| !key.starts_with(prefix) || sender.try_send(change.clone()).is_ok());
        if self.history.len() == HISTORY_MAX {
            self.history.remove(0);
        }
        self.history.push(change);
    }
}

impl Store for MemoryStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        Ok(self.lock().entries.get(key).map(|(e, _)| e.clone()))
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Entry>, StoreError> {
        let inner = self.lock();
        let from = inner.entries.range(prefix.to_string()..);
        Ok(from.take_while(|(k, _)| k.starts_with(prefix)).map(|(_, (e, _))| e.clone()).collect())
    }

    async fn put_if(&self, key: &str, value: &[u8], expect: Expect) -> Result<Revision, StoreError> {
        self.put(key, value, expect, None)
    }

    async fn put_if_leased(
        &self,
        key: &str,
        value: &[u8],
        expect: Expect,
        lease: &Lease,
    ) -> Result<Revision, StoreError> {
        self.put(key, value, expect, Some(lease.0))
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.lock().remove(key);
        Ok(())
    }

    async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let mut inner = self.lock();
        inner.leases_made += 1;
        let id = inner.leases_made;
        inner.leases.insert(id, (ttl, Instant::now() + ttl));
        Ok(Lease(id))
    }

    async fn renew(&self, lease: &Lease) -> Result<(), StoreError> {
        let mut inner = self.lock();
        let (ttl, end) = inner.leases.get_mut(&lease.0).ok_or(StoreError::LeaseLapsed(lease.0))?;
        *end = Instant::now() + *ttl;
        Ok(())
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<mpsc::Receiver<Change>, StoreError> {
        let mut inner = self.lock();
        let (sender, receiver) = mpsc::channel(HISTORY_MAX);
        for change in &inner.history {
            let (key, revision) = match change {
                Change::Put(entry) => (&entry.key, entry.revision),
                Change::Deleted { key, revision } => (key, *revision),
            };
            if revision > from && key.starts_with(prefix) {
                sender.try_send(change.clone()).expect("the channel holds the whole history");
            }
        }
        inner.watchers.push((prefix.into(), sender));
        Ok(receiver)
    }
}

/// The contract of every [`Store`]; time is tokio's, which tests pause.
#[cfg(test)]
pub mod suite {
    use super::*;

    /// A plan is written by compare-and-swap: of two writers one learns that it lost.
    pub async fn one_of_two_writers_loses(store: &impl Store) {
        let first = store.put_if("plan/a", b"1", Expect::Absent).await.unwrap();
        assert!(matches!(store.put_if("plan/a", b"2", Expect::Absent).await, Err(StoreError::Conflict { .. })));
        let second = store.put_if("plan/a", b"2", Expect::At(first)).await.unwrap();
        assert!(second > first);
        assert!(store.put_if("plan/a", b"3", Expect::At(first)).await.is_err());
        assert_eq!(store.get("plan/a").await.unwrap().unwrap().value, b"2");
    }

    pub async fn keys_vanish_with_their_lease(store: &impl Store) {
        let lease = store.lease(Duration::from_secs(2)).await.unwrap();
        store.put_if_leased("member/w", b"w", Expect::Absent, &lease).await.unwrap();
        tokio::time::advance(Duration::from_millis(1500)).await;
        store.renew(&lease).await.unwrap();
        tokio::time::advance(Duration::from_millis(1500)).await;
        assert!(store.get("member/w").await.unwrap().is_some());
        tokio::time::advance(Duration::from_millis(600)).await;
        assert!(store.get("member/w").await.unwrap().is_none());
        assert_eq!(store.renew(&lease).await, Err(StoreError::LeaseLapsed(lease.0)));
    }

    pub async fn a_watch_misses_nothing_from_its_revision(store: &impl Store) {
        let first = store.put_if("w/1", b"a", Expect::Absent).await.unwrap();
        store.put_if("w/2", b"b", Expect::Absent).await.unwrap();
        store.put_if("elsewhere", b"x", Expect::Absent).await.unwrap();
        let mut changes = store.watch("w/", first).await.unwrap();
        store.delete("w/1").await.unwrap();
        assert!(matches!(changes.recv().await, Some(Change::Put(e)) if e.key == "w/2"));
        assert!(matches!(changes.recv().await, Some(Change::Deleted { key, .. }) if key == "w/1"));
        assert_eq!(store.list("w/").await.unwrap().len(), 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_embedded_store_keeps_the_contract() {
        suite::one_of_two_writers_loses(&MemoryStore::default()).await;
        suite::keys_vanish_with_their_lease(&MemoryStore::default()).await;
        suite::a_watch_misses_nothing_from_its_revision(&MemoryStore::default()).await;
    }
}
