//! The embedded store without a data directory: for one coordinator and for tests. It lives and dies with its process.

use super::map::{Edit, Map};
use super::{Change, Entry, Lease, Listing, Revision, Store, StoreError, Write};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

pub struct MemoryStore {
    // A std mutex: no await happens while it is held.
    map: Mutex<Map>,
    clock: Box<dyn Fn() -> Instant + Send + Sync>,
}

impl Default for MemoryStore {
    fn default() -> MemoryStore {
        MemoryStore::new(Instant::now)
    }
}

impl MemoryStore {
    /// A store whose leases lapse by `clock`: `Instant::now` but in tests.
    pub fn new(clock: impl Fn() -> Instant + Send + Sync + 'static) -> MemoryStore {
        MemoryStore { map: Mutex::default(), clock: Box::new(clock) }
    }

    /// The map as of now.
    fn lock(&self) -> (MutexGuard<'_, Map>, Instant) {
        let (mut map, now) = (self.map.lock().expect("no holder of the store's lock panics"), (self.clock)());
        for edit in map.lapsed(now) {
            map.apply(edit, now);
        }
        (map, now)
    }
}

impl Store for MemoryStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        Ok(self.lock().0.get(key))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        Ok(self.lock().0.list(prefix))
    }

    async fn write(&self, write: Write<'_>) -> Result<Revision, StoreError> {
        let (mut map, now) = self.lock();
        let edit = map.write(&write)?;
        map.apply(edit, now);
        Ok(map.revision())
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let (mut map, now) = self.lock();
        if let Some(edit) = map.delete(key) {
            map.apply(edit, now);
        }
        Ok(())
    }

    async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let (mut map, now) = self.lock();
        let (lease, edit) = map.grant(ttl);
        map.apply(edit, now);
        Ok(lease)
    }

    async fn renew(&self, lease: &Lease) -> Result<(), StoreError> {
        let (mut map, now) = self.lock();
        map.renew(lease, now)
    }

    async fn revoke(&self, lease: &Lease) -> Result<(), StoreError> {
        let (mut map, now) = self.lock();
        let edits: Vec<Edit> = map.revoke(lease);
        edits.into_iter().for_each(|edit| map.apply(edit, now));
        Ok(())
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<mpsc::Receiver<Change>, StoreError> {
        self.lock().0.watch(prefix, from)
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance;
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn the_store_in_memory_keeps_the_contract() {
        let (began, passed) = (Instant::now(), Arc::new(Mutex::new(Duration::ZERO)));
        let clock = passed.clone();
        let store = MemoryStore::new(move || began + *clock.lock().unwrap());
        conformance::all(&store, &store, async |time| *passed.lock().unwrap() += time).await;
    }

    #[tokio::test]
    async fn a_watcher_that_lags_is_cut_off_and_goes_on_from_what_it_saw() {
        conformance::a_lagging_watcher_loses_nothing(&MemoryStore::default(), 1500).await;
    }

    #[tokio::test]
    async fn what_history_does_not_hold_is_not_pretended() {
        let store = MemoryStore::default();
        let first = store.put_if("a", b"", super::super::Expect::Absent).await.unwrap();
        for i in 0..2000 {
            store.put_if(&format!("k/{i:04}"), b"", super::super::Expect::Absent).await.unwrap();
        }
        assert_eq!(store.watch("a", first).await.err(), Some(StoreError::Forgotten(first)));
        assert_eq!(store.watch("a", Revision(1 << 40)).await.err(), Some(StoreError::Forgotten(Revision(1 << 40))));
        let mut all = store.watch("k/", Revision(0)).await.unwrap();
        for i in 0..2000 {
            assert_eq!(all.recv().await.unwrap().key(), format!("k/{i:04}"));
        }
    }
}
