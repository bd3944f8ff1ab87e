//! The store on etcd (v3 API, 3.4 and later): what several coordinators and restarts share. Spoken through a small
//! client of our own ([`link`], [`watch`]), so that building needs no protobuf compiler.

#[cfg(test)]
mod harness;
mod link;
#[cfg(test)]
mod tests;
mod watch;

pub use link::{Identity, Login, Settings};

use super::{Change, Entry, Expect, Lease, Listing, Revision, Store, StoreError, Write};
use link::{Links, Repeat};
use proto::etcd::v3 as wire;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use wire::compare::{CompareResult, CompareTarget, TargetUnion};
use wire::request_op::Request;
use wire::response_op::Response;

/// Answers on their way to a watcher.
const WATCH_MAX: usize = 1024;

#[derive(Clone)]
pub struct EtcdStore {
    links: Arc<Links>,
    /// Before every key.
    prefix: Arc<str>,
}

impl EtcdStore {
    /// Checks the settings; connects with the first call.
    pub fn new(settings: Settings) -> Result<EtcdStore, String> {
        let prefix = settings.prefix.as_str().into();
        Ok(EtcdStore { links: Arc::new(Links::new(settings)?), prefix })
    }

    fn full(&self, key: &str) -> Vec<u8> {
        [self.prefix.as_bytes(), key.as_bytes()].concat()
    }

    fn entry(&self, kv: wire::KeyValue) -> Entry {
        entry(&self.prefix, kv)
    }

    async fn range(&self, request: wire::RangeRequest) -> Result<Listing, StoreError> {
        let response = self.links.call(Repeat::Safe, |link| {
            let request = request.clone();
            async move { link.kv().range(link.request(request)).await }
        });
        let response = response.await.map_err(refused)?;
        let revision = Revision(response.header.map_or(0, |h| h.revision as u64));
        Ok(Listing { entries: response.kvs.into_iter().map(|kv| self.entry(kv)).collect(), revision })
    }

    /// The transaction that a write is: what does not hold is read in the same one.
    fn transaction(&self, write: &Write<'_>) -> wire::TxnRequest {
        let at = |key: &str, revision: i64| wire::Compare {
            result: CompareResult::Equal.into(),
            target: CompareTarget::Mod.into(),
            key: self.full(key),
            target_union: Some(TargetUnion::ModRevision(revision)),
        };
        let read = |key: &str| wire::RequestOp {
            request: Some(Request::RequestRange(wire::RangeRequest { key: self.full(key), ..Default::default() })),
        };
        let expected = match write.expect {
            Expect::Absent => 0,
            Expect::At(revision) => revision.0 as i64,
        };
        let put = wire::PutRequest {
            key: self.full(write.key),
            value: write.value.into(),
            lease: write.lease.map_or(0, |l| l.0 as i64),
        };
        let fence = write.fence.iter();
        wire::TxnRequest {
            compare: fence.clone().map(|f| at(f.key, f.revision.0 as i64)).chain([at(write.key, expected)]).collect(),
            success: vec![wire::RequestOp { request: Some(Request::RequestPut(put)) }],
            failure: [read(write.key)].into_iter().chain(fence.map(|f| read(f.key))).collect(),
        }
    }
}

/// Where a range ends that holds every key beginning with `prefix`.
fn range_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    // etcd's word for "to the last key".
    vec![0]
}

/// etcd has no empty key: a range over all begins at the least one.
fn range_start(prefix: Vec<u8>) -> Vec<u8> {
    if prefix.is_empty() { vec![0] } else { prefix }
}

fn entry(prefix: &str, kv: wire::KeyValue) -> Entry {
    let key = kv.key.get(prefix.len()..).unwrap_or_default();
    Entry {
        key: String::from_utf8_lossy(key).into_owned(),
        value: kv.value,
        revision: Revision(kv.mod_revision as u64),
    }
}

/// What an answer of etcd's means that the caller expected no error from.
fn refused(failure: link::Failure) -> StoreError {
    match failure {
        link::Failure::Store(error) => error,
        link::Failure::Answer { endpoint, status } => StoreError::Refused(format!("{endpoint}: {}", status.message())),
    }
}

/// The same where an unknown lease is to be expected.
fn lapsed(lease: u64) -> impl FnOnce(link::Failure) -> StoreError {
    move |failure| match &failure {
        link::Failure::Answer { status, .. } if status.code() == tonic::Code::NotFound => {
            StoreError::LeaseLapsed(lease)
        }
        _ => refused(failure),
    }
}

impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let key = self.full(key);
        let listing = self.range(wire::RangeRequest { key, ..Default::default() }).await?;
        Ok(listing.entries.into_iter().next())
    }

    async fn list(&self, prefix: &str) -> Result<Listing, StoreError> {
        let prefix = self.full(prefix);
        let range_end = range_end(&prefix);
        self.range(wire::RangeRequest { key: range_start(prefix), range_end, ..Default::default() }).await
    }

    async fn write(&self, write: Write<'_>) -> Result<Revision, StoreError> {
        let request = self.transaction(&write);
        let response = self.links.call(Repeat::Never, |link| {
            let request = request.clone();
            async move { link.kv().txn(link.request(request)).await }
        });
        let response = response.await.map_err(lapsed(write.lease.map_or(0, |l| l.0)))?;
        if response.succeeded {
            return Ok(Revision(response.header.map_or(0, |h| h.revision as u64)));
        }
        let mut found = response.responses.into_iter().map(|r| match r.response {
            Some(Response::ResponseRange(range)) => {
                range.kvs.into_iter().next().map(|kv| Revision(kv.mod_revision as u64))
            }
            _ => None,
        });
        let own = found.next().flatten();
        match write.fence {
            Some(fence) if found.next().flatten() != Some(fence.revision) => {
                Err(StoreError::Fenced { key: fence.key.into(), expected: fence.revision })
            }
            _ => Err(StoreError::Conflict { key: write.key.into(), found: own }),
        }
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let request = wire::DeleteRangeRequest { key: self.full(key), ..Default::default() };
        let response = self.links.call(Repeat::Never, |link| {
            let request = request.clone();
            async move { link.kv().delete_range(link.request(request)).await }
        });
        response.await.map(|_| ()).map_err(refused)
    }

    async fn lease(&self, ttl: Duration) -> Result<Lease, StoreError> {
        let request = wire::LeaseGrantRequest { ttl: ttl.as_millis().div_ceil(1000).max(1) as i64 };
        // A lease that nobody heard of lapses by itself.
        let response =
            self.links.call(Repeat::Safe, |link| async move { link.leases().lease_grant(link.request(request)).await });
        Ok(Lease(response.await.map_err(refused)?.id as u64))
    }

    async fn renew(&self, lease: &Lease) -> Result<(), StoreError> {
        let request = wire::LeaseKeepAliveRequest { id: lease.0 as i64 };
        let response = self.links.call(Repeat::Safe, |link| async move {
            let request = link.request(tokio_stream::once(request));
            let mut answers = link.leases().lease_keep_alive(request).await?;
            let answer = answers.get_mut().message().await?;
            let answer = answer.ok_or_else(|| tonic::Status::unavailable("no answer to a keep-alive"))?;
            Ok(tonic::Response::new(answer))
        });
        let left = response.await.map_err(lapsed(lease.0))?.ttl;
        if left > 0 { Ok(()) } else { Err(StoreError::LeaseLapsed(lease.0)) }
    }

    async fn revoke(&self, lease: &Lease) -> Result<(), StoreError> {
        let request = wire::LeaseRevokeRequest { id: lease.0 as i64 };
        let response = self
            .links
            .call(Repeat::Safe, |link| async move { link.leases().lease_revoke(link.request(request)).await });
        match response.await.map_err(lapsed(lease.0)) {
            Err(StoreError::LeaseLapsed(_)) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<mpsc::Receiver<Change>, StoreError> {
        watch::start(self, prefix, from).await
    }
}
