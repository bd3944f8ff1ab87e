//! The store that the settings ask for.

use super::etcd::{self, EtcdStore};
use super::file::FileStore;
use super::memory::MemoryStore;
use super::{Change, Entry, Lease, Listing, Revision, Store, StoreError, Write};
use crate::config::{StoreKind, StoreSettings};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;

pub enum AnyStore {
    Memory(MemoryStore),
    File(FileStore),
    Etcd(EtcdStore),
}

impl AnyStore {
    /// Fails on settings that can't work: files that can't be read, a directory that is in use. An etcd that does not
    /// answer is no failure: it may come.
    pub fn open(settings: &StoreSettings) -> Result<AnyStore, String> {
        let cloned = settings.clone();
        Ok(match settings.kind {
            StoreKind::Memory => AnyStore::Memory(MemoryStore::default()),
            StoreKind::File => {
                let directory = cloned.data_dir.ok_or("a file store needs data_dir")?;
                AnyStore::File(FileStore::open(&directory, Instant::now).map_err(|e| e.to_string())?)
            }
            StoreKind::Etcd => {
                let identity = match (cloned.certificate, cloned.key) {
                    (Some(certificate), Some(key)) => Some(etcd::Identity { certificate, key }),
                    (None, None) => None,
                    _ => return Err("certificate and key go together".into()),
                };
                let login = cloned.user.map(|user| etcd::Login { user, password: cloned.password });
                let (endpoints, prefix, ca) = (cloned.endpoints, cloned.prefix, cloned.ca);
                AnyStore::Etcd(EtcdStore::new(etcd::Settings { endpoints, prefix, ca, identity, login })?)
            }
        })
    }
}

impl AnyStore {
    /// Whether other coordinators may write there too.
    pub fn is_shared(&self) -> bool {
        matches!(self, AnyStore::Etcd(_))
    }
}

/// The same call on whichever it is.
macro_rules! each {
    ($self:ident, $store:ident => $call:expr) => {
        match $self {
            AnyStore::Memory($store) => $call,
            AnyStore::File($store) => $call,
            AnyStore::Etcd($store) => $call,
        }
    };
}

impl Store for AnyStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        each!(self, store => store.get(key).await)
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        each!(self, store => store.list(prefix).await)
    }

    async fn write(&self, write: Write<'_>) -> Result<Revision, StoreError> {
        each!(self, store => store.write(write).await)
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        each!(self, store => store.delete(key).await)
    }

    async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        each!(self, store => store.lease(ttl).await)
    }

    async fn renew(&self, lease: &Lease) -> Result<(), StoreError> {
        each!(self, store => store.renew(lease).await)
    }

    async fn revoke(&self, lease: &Lease) -> Result<(), StoreError> {
        each!(self, store => store.revoke(lease).await)
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<mpsc::Receiver<Change>, StoreError> {
        each!(self, store => store.watch(prefix, from).await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_can_not_work_are_refused_with_the_reason() {
        let check = |text: &str, expected: &str| {
            let why = AnyStore::open(&toml::from_str(text).unwrap()).map(|_| ()).unwrap_err();
            assert!(why.contains(expected), "{text}: {why}");
        };
        check("kind = 'file'", "needs data_dir");
        check("kind = 'file'\ndata_dir = '/proc/nowhere'", "/proc/nowhere");
        check("kind = 'etcd'", "at least one endpoint");
        check("kind = 'etcd'\nendpoints = ['https://a:2379']", "no ca is given");
        check("kind = 'etcd'\nendpoints = ['http://a:2379']\nca = '/none.pem'", "a ca is given");
        check("kind = 'etcd'\nendpoints = ['a:2379']\nca = '/none.pem'", "/none.pem");
        check("kind = 'etcd'\nendpoints = ['a:2379']\ncertificate = '/c.pem'", "go together");
        check("kind = 'etcd'\nendpoints = ['a:2379']\ncertificate = 'c'\nkey = 'k'", "needs a ca");
        check("kind = 'etcd'\nendpoints = ['http://a b']", "is no address");
    }

    #[test]
    fn settings_that_can_work_are_taken_though_nobody_answers() {
        for text in ["", "kind = 'memory'", "kind = 'etcd'\nendpoints = ['127.0.0.1:1', 'http://[::1]:2']"] {
            assert!(AnyStore::open(&toml::from_str(text).unwrap()).is_ok(), "{text}");
        }
    }
}
