//! What must outlive a coordinator: the epoch's plan, membership, leadership. A small map with revisions, leases and
//! watches; [`memory`] and [`file`] are embedded, [`etcd`] is shared by several coordinators, [`any`] is what the
//! settings ask for. All keep one contract (`conformance`).
//!
//! Leadership is a leased key: whoever created it leads while it stands, and fences its writes by the key's revision
//! ([`Write::fence`]), so that one whose lease lapsed unnoticed changes nothing.

pub mod any;
#[cfg(test)]
mod conformance;
pub mod etcd;
pub mod file;
mod map;
pub mod memory;

use std::time::Duration;
use tokio::sync::mpsc;

/// A number that grows with every change of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Revision(pub u64);

/// A value and the revision that wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: String,
    pub value: Vec<u8>,
    pub revision: Revision,
}

/// Entries as they stood together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Ascending by key.
    pub entries: Vec<Entry>,
    /// The store's revision then: a watch from here sees every later change.
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

/// Another key that must stand as this revision wrote it, or nothing is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fence<'a> {
    pub key: &'a str,
    pub revision: Revision,
}

/// One conditional write.
#[derive(Debug, Clone, Copy)]
pub struct Write<'a> {
    pub key: &'a str,
    pub value: &'a [u8],
    pub expect: Expect,
    /// The key vanishes with it.
    pub lease: Option<Lease>,
    pub fence: Option<Fence<'a>>,
}

/// A change seen by a watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    Put(Entry),
    Deleted { key: String, revision: Revision },
}

impl Change {
    pub fn key(&self) -> &str {
        match self {
            Change::Put(entry) => &entry.key,
            Change::Deleted { key, .. } => key,
        }
    }

    pub fn revision(&self) -> Revision {
        match self {
            Change::Put(entry) => entry.revision,
            Change::Deleted { revision, .. } => *revision,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Somebody else wrote first; read again.
    #[error("{key} is not as expected: it is at {found:?}")]
    Conflict { key: String, found: Option<Revision> },
    /// The fence's key is gone or was written anew: who held it leads no more.
    #[error("{key} is not at {expected:?} any more: the write is fenced off")]
    Fenced { key: String, expected: Revision },
    #[error("lease {0} is unknown or has lapsed")]
    LeaseLapsed(u64),
    /// List again and watch from there.
    #[error("the changes since {0:?} are not kept any more")]
    Forgotten(Revision),
    /// It answers, and says no: a wrong password, no permission, no space. Retrying helps only once somebody acted.
    #[error("the store refuses: {0}")]
    Refused(String),
    /// The store can't be reached; serving goes on from the last view. A write may or may not have happened: read again.
    #[error("the store is unreachable: {0}")]
    Unreachable(String),
}

/// A small, consistent, watched map. Every call ends within seconds, reachable or not.
pub trait Store: Send + Sync + 'static {
    /// The key as of now: a store of several machines asks their majority.
    fn get(&self, key: &str) -> impl Future<Output = Result<Option<Entry>, StoreError>> + Send;

    /// All keys that begin with `prefix`.
    fn list(&self, prefix: &str) -> impl Future<Output = Result<Listing, StoreError>> + Send;

    /// Writes if everything is as expected, all of it at one revision.
    fn write(&self, write: Write<'_>) -> impl Future<Output = Result<Revision, StoreError>> + Send;

    /// Writes if the key is as expected; the compare-and-swap that plans go through.
    fn put_if(
        &self,
        key: &str,
        value: &[u8],
        expect: Expect,
    ) -> impl Future<Output = Result<Revision, StoreError>> + Send {
        async move { self.write(Write { key, value, expect, lease: None, fence: None }).await }
    }

    /// The same; the key vanishes with the lease.
    fn put_if_leased(
        &self,
        key: &str,
        value: &[u8],
        expect: Expect,
        lease: &Lease,
    ) -> impl Future<Output = Result<Revision, StoreError>> + Send {
        let lease = Some(*lease);
        async move { self.write(Write { key, value, expect, lease, fence: None }).await }
    }

    /// Deletes a key; absent is no error.
    fn delete(&self, key: &str) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// A lease that lapses `ttl` after its last renewal. A store may round up to whole seconds and to a least time of
    /// its own; none lapses early.
    fn lease(&self, ttl: Duration) -> impl Future<Output = Result<Lease, StoreError>> + Send;

    fn renew(&self, lease: &Lease) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Ends a lease and its keys now; one that has lapsed is no error.
    fn revoke(&self, lease: &Lease) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Changes under `prefix` with a revision above `from`, ascending, none left out and none twice. From `Revision(0)`
    /// it begins with what stands, whatever came before that; from a revision that history no longer reaches back to,
    /// it is an error. A put that was overwritten while the store forgot its history during a cut is left out.
    ///
    /// The channel closes when the store is gone for good or the watcher lags beyond the channel's bound: list again
    /// and watch from there.
    fn watch(
        &self,
        prefix: &str,
        from: Revision,
    ) -> impl Future<Output = Result<mpsc::Receiver<Change>, StoreError>> + Send;
}
