//! What must outlive a coordinator: the epoch's plan, membership, leadership. Two implementations, one contract suite:
//! the embedded store ([`super::memory`]) and etcd (to come).

use std::time::Duration;
use tokio::sync::mpsc;

/// A number that grows with every change of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Revision(pub u64);

/// A value and the revision that wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub value: Vec<u8>,
    pub revision: Revision,
}

/// What a conditional write expects to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// No such key.
    Absent,
    /// The key as this revision wrote it.
    At(Revision),
}

/// Keys written under a lease vanish when it is not renewed in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease(pub u64);

/// A change seen by a watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Put(Entry),
    Deleted { key: String, revision: Revision },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Somebody else wrote first; read again.
    #[error("{key} is not as expected: it is at {found:?}")]
    Conflict { key: String, found: Option<Revision> },
    #[error("lease {0} is unknown or has lapsed")]
    LeaseLapsed(u64),
    /// The store can't be reached; serving goes on from the last view.
    #[error("the store is unreachable: {0}")]
    Unreachable(String),
}

/// A small, consistent, watched map.
pub trait Store: Send + Sync + 'static {
    fn get(&self, key: &str) -> impl Future<Output = Result<Option<Entry>, StoreError>> + Send;

    /// All keys that begin with `prefix`, ascending.
    fn list(&self, prefix: &str) -> impl Future<Output = Result<Vec<Entry>, StoreError>> + Send;

    /// Writes if the key is as expected; the compare-and-swap that plans go through.
    fn put_if(
        &self,
        key: &str,
        value: &[u8],
        expect: Expect,
    ) -> impl Future<Output = Result<Revision, StoreError>> + Send;

    /// The same; the key vanishes with the lease.
    fn put_if_leased(
        &self,
        key: &str,
        value: &[u8],
        expect: Expect,
        lease: &Lease,
    ) -> impl Future<Output = Result<Revision, StoreError>> + Send;

    /// Deletes a key; absent is no error.
    fn delete(&self, key: &str) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// A lease that lapses `ttl` after its last renewal.
    fn lease(&self, ttl: Duration) -> impl Future<Output = Result<Lease, StoreError>> + Send;

    fn renew(&self, lease: &Lease) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Changes under `prefix` with a revision above `from`, in order, none left out. The channel closes when the store
    /// is gone or the watcher lags beyond the channel's bound: list again and watch from there.
    fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> impl Future<Output = Result<mpsc::Receiver<Change>, StoreError>> + Send;
}
