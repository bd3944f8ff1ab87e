//! A watch that outlives connections. After a cut it goes on from the revision after the last one it told; where etcd
//! has forgotten that (compaction), it lists and tells the difference to what its reader knows.

use super::super::{Change, Listing, Revision, StoreError};
use super::link::{CALL, Failure, explain};
use super::{EtcdStore, WATCH_MAX, entry, range_end, range_start, refused, wire};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};
use wire::event::EventType;
use wire::watch_request::RequestUnion;

/// Before the next try after a cut; doubles up to 16 times itself.
const PAUSE: Duration = Duration::from_millis(50);

/// Why a stream is not followed any further.
enum End {
    /// Nobody listens, or the store is another one: the channel closes.
    Over,
    /// To be opened again at once: the difference was told.
    CaughtUp,
    Cut(String),
}

struct Follower {
    store: EtcdStore,
    prefix: String,
    sender: mpsc::Sender<Change>,
    /// The keys that the reader believes to stand.
    known: BTreeSet<String>,
    /// The first revision that was not told.
    next: u64,
    cuts: u32,
}

/// Reads what the watch begins from, then follows in a task that ends with the receiver.
pub async fn start(store: &EtcdStore, prefix: &str, from: Revision) -> Result<mpsc::Receiver<Change>, StoreError> {
    let (sender, receiver) = mpsc::channel(WATCH_MAX);
    let mut follower = Follower {
        store: store.clone(),
        prefix: prefix.into(),
        sender,
        known: BTreeSet::new(),
        next: from.0 + 1,
        cuts: 0,
    };
    let first = if from == Revision(0) { Some(follower.listing(None).await?) } else { None };
    if first.is_none() {
        let then = follower.listing(Some(from)).await?;
        follower.known = then.entries.into_iter().map(|e| e.key).collect();
    }
    tokio::spawn(follower.run(first));
    Ok(receiver)
}

impl Follower {
    /// What stands now, or the keys that stood at a revision.
    async fn listing(&self, at: Option<Revision>) -> Result<Listing, StoreError> {
        let (key, range_end) = self.range();
        let revision = at.map_or(0, |r| r.0 as i64);
        let request = wire::RangeRequest { key, range_end, revision, keys_only: at.is_some() };
        let store = &self.store;
        let response = store.links.call(super::Repeat::Safe, |link| {
            let request = request.clone();
            async move { link.kv().range(link.request(request)).await }
        });
        match response.await {
            Ok(response) => Ok(Listing {
                revision: Revision(response.header.map_or(0, |h| h.revision as u64)),
                entries: response.kvs.into_iter().map(|kv| store.entry(kv)).collect(),
            }),
            // Compacted, or from a store that was further.
            Err(Failure::Answer { status, .. }) if status.code() == Code::OutOfRange => {
                Err(StoreError::Forgotten(at.unwrap_or_default()))
            }
            Err(other) => Err(refused(other)),
        }
    }

    fn range(&self) -> (Vec<u8>, Vec<u8>) {
        let key = self.store.full(&self.prefix);
        let end = range_end(&key);
        (range_start(key), end)
    }

    async fn run(mut self, first: Option<Listing>) {
        if let Some(listing) = first
            && self.tell_difference(listing).await.is_err()
        {
            return;
        }
        loop {
            match self.follow().await {
                End::Over => return,
                End::CaughtUp => continue,
                End::Cut(why) => {
                    tracing::debug!("the watch of {} was cut: {why}", self.prefix);
                    let pause = PAUSE * (1 << self.cuts.min(4));
                    self.cuts += 1;
                    tokio::select! {
                        () = self.sender.closed() => return,
                        () = tokio::time::sleep(pause) => {}
                    }
                }
            }
        }
    }

    /// One stream, from its opening to its end.
    async fn follow(&mut self) -> End {
        let link = match self.store.links.link(Instant::now() + CALL).await {
            Ok(link) => link,
            Err(failure) => return End::Cut(refused(failure).to_string()),
        };
        let (key, range_end) = self.range();
        let create = wire::WatchCreateRequest { key, range_end, start_revision: self.next as i64 };
        // The sender stays until the stream is over: its end would end the watch.
        let (requests, queue) = mpsc::channel(1);
        let create = wire::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) };
        requests.try_send(create).expect("the channel is empty");
        let mut request = link.request(ReceiverStream::new(queue));
        // A member without a leader, cut off from the others, ends the stream instead of keeping silent.
        request.metadata_mut().insert("hasleader", tonic::metadata::AsciiMetadataValue::from_static("true"));
        let mut stream = match timeout(CALL, link.watches().watch(request)).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => {
                self.store.links.leave(&link);
                return End::Cut(format!("{}: {}", link.endpoint, explain(&status)));
            }
            Err(_) => {
                self.store.links.leave(&link);
                return End::Cut(format!("{}: no answer to a watch", link.endpoint));
            }
        };
        let end = self.read(&mut stream).await;
        if let End::Cut(_) = end {
            self.store.links.leave(&link);
        }
        end
    }

    async fn read(&mut self, stream: &mut Streaming<wire::WatchResponse>) -> End {
        // The first answer confirms the watch and must come soon; later ones when there is something to tell.
        let mut confirmed = false;
        loop {
            let sender = self.sender.clone();
            let patience =
                async { if confirmed { std::future::pending().await } else { tokio::time::sleep(CALL).await } };
            let response = tokio::select! {
                () = sender.closed() => return End::Over,
                () = patience => return End::Cut("the watch was not confirmed".into()),
                message = stream.message() => match message {
                    Ok(Some(response)) => response,
                    Ok(None) => return End::Cut("the stream ended".into()),
                    Err(status) => return End::Cut(explain(&status)),
                },
            };
            if response.compact_revision != 0 {
                return self.catch_up().await;
            }
            if response.canceled {
                return End::Cut(response.cancel_reason);
            }
            (confirmed, self.cuts) = (true, 0);
            if self.tell(response.events).await.is_err() {
                return End::Over;
            }
        }
    }

    /// An answer holds whole revisions, so the next one begins after its last.
    async fn tell(&mut self, events: Vec<wire::Event>) -> Result<(), End> {
        let mut last = self.next - 1;
        for event in events {
            let deleted = event.r#type() == EventType::Delete;
            let entry = entry(&self.store.prefix, event.kv.unwrap_or_default());
            if entry.revision.0 < self.next {
                continue;
            }
            last = entry.revision.0;
            let change = if deleted {
                self.known.remove(&entry.key);
                Change::Deleted { key: entry.key, revision: entry.revision }
            } else {
                self.known.insert(entry.key.clone());
                Change::Put(entry)
            };
            self.send(change).await?;
        }
        self.next = last + 1;
        Ok(())
    }

    async fn send(&self, change: Change) -> Result<(), End> {
        self.sender.send(change).await.map_err(|_| End::Over)
    }

    async fn catch_up(&mut self) -> End {
        match self.listing(None).await {
            Ok(listing) if listing.revision.0 + 1 < self.next => {
                tracing::error!("etcd went back from revision {} to {}", self.next - 1, listing.revision.0);
                End::Over
            }
            Ok(listing) => self.tell_difference(listing).await.err().unwrap_or(End::CaughtUp),
            Err(error) => End::Cut(error.to_string()),
        }
    }

    /// What was written since, oldest first, then what is gone: when, nobody knows any more.
    async fn tell_difference(&mut self, listing: Listing) -> Result<(), End> {
        let mut written = listing.entries;
        let standing: BTreeSet<String> = written.iter().map(|e| e.key.clone()).collect();
        written.retain(|e| e.revision.0 >= self.next);
        written.sort_by_key(|e| e.revision);
        for entry in written {
            self.send(Change::Put(entry)).await?;
        }
        for key in self.known.difference(&standing) {
            self.send(Change::Deleted { key: key.clone(), revision: listing.revision }).await?;
        }
        (self.known, self.next) = (standing, listing.revision.0 + 1);
        Ok(())
    }
}
