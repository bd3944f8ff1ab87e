//! The contract of every store. Each case keeps to keys of its own, so that all may run on one store; `a` and `b` are
//! two clients of it; `pass` lets time pass for the store.

use super::{Change, Expect, Fence, Revision, Store, StoreError, Write};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::mpsc;

/// Bounds every wait.
const DEADLINE: Duration = Duration::from_secs(20);

pub async fn all(a: &impl Store, b: &impl Store, pass: impl AsyncFn(Duration)) {
    one_of_two_writers_loses(a, b).await;
    of_many_racing_increments_none_is_lost(a, b).await;
    deleting_needs_nothing_and_frees_the_key(a, b).await;
    a_list_is_a_prefix_in_order_at_one_revision(a, b).await;
    keys_vanish_with_their_lease(a, b, &pass).await;
    a_revoked_lease_takes_its_keys_at_once(a, b).await;
    a_key_outlives_the_lease_that_it_was_taken_from(a).await;
    a_fence_holds_back_who_leads_no_more(a, b).await;
    a_watch_misses_nothing_from_its_revision(a, b).await;
    a_watch_goes_on_from_any_revision_it_saw(a, b).await;
    a_watch_from_the_beginning_starts_with_what_stands(a, b).await;
    a_lagging_watcher_loses_nothing(a, 300).await;
}

pub async fn next(changes: &mut mpsc::Receiver<Change>) -> Change {
    let change = tokio::time::timeout(DEADLINE, changes.recv()).await;
    change.expect("a change comes in time").expect("the watch goes on")
}

async fn one_of_two_writers_loses(a: &impl Store, b: &impl Store) {
    assert_eq!(a.get("cas/plan").await, Ok(None));
    let conflict = |found| Err(StoreError::Conflict { key: "cas/plan".into(), found });
    let unseen = Revision(1 << 40);
    assert_eq!(a.put_if("cas/plan", b"0", Expect::At(unseen)).await, conflict(None));
    let first = a.put_if("cas/plan", b"1", Expect::Absent).await.unwrap();
    assert_eq!(b.put_if("cas/plan", b"2", Expect::Absent).await, conflict(Some(first)));
    let second = b.put_if("cas/plan", b"2", Expect::At(first)).await.unwrap();
    assert!(second > first);
    assert_eq!(a.put_if("cas/plan", b"3", Expect::At(first)).await, conflict(Some(second)));
    let entry = a.get("cas/plan").await.unwrap().unwrap();
    assert_eq!((entry.key.as_str(), &entry.value[..], entry.revision), ("cas/plan", &b"2"[..], second));
}

/// Adds one to a number `times`, by compare-and-swap.
async fn count_up(store: &impl Store, times: usize) -> usize {
    let mut lost = 0;
    for _ in 0..times {
        loop {
            let entry = store.get("race/n").await.unwrap().unwrap();
            let number: u64 = std::str::from_utf8(&entry.value).unwrap().parse().unwrap();
            // Whoever else has read the same number now may write it.
            tokio::task::yield_now().await;
            let value = (number + 1).to_string();
            match store.put_if("race/n", value.as_bytes(), Expect::At(entry.revision)).await {
                Ok(_) => break,
                Err(StoreError::Conflict { .. }) => lost += 1,
                Err(other) => panic!("{other}"),
            }
        }
    }
    lost
}

async fn of_many_racing_increments_none_is_lost(a: &impl Store, b: &impl Store) {
    a.put_if("race/n", b"0", Expect::Absent).await.unwrap();
    let (from_a, from_b) = tokio::join!(count_up(a, 25), count_up(b, 25));
    assert_eq!(a.get("race/n").await.unwrap().unwrap().value, b"50");
    assert!(from_a + from_b > 0, "the two never met");
}

async fn deleting_needs_nothing_and_frees_the_key(a: &impl Store, b: &impl Store) {
    a.delete("gone/x").await.unwrap();
    let first = a.put_if("gone/x", b"1", Expect::Absent).await.unwrap();
    b.delete("gone/x").await.unwrap();
    assert_eq!(a.get("gone/x").await, Ok(None));
    assert!(a.put_if("gone/x", b"2", Expect::At(first)).await.is_err());
    assert!(a.put_if("gone/x", b"2", Expect::Absent).await.unwrap() > first);
}

async fn a_list_is_a_prefix_in_order_at_one_revision(a: &impl Store, b: &impl Store) {
    assert!(a.list("list/").await.unwrap().entries.is_empty());
    let mut last = Revision(0);
    for key in ["list/b", "list/a", "listing", "list/c/d", "list0"] {
        last = a.put_if(key, key.as_bytes(), Expect::Absent).await.unwrap();
    }
    let listing = b.list("list/").await.unwrap();
    let keys: Vec<&str> = listing.entries.iter().map(|e| e.key.as_str()).collect();
    assert_eq!(keys, ["list/a", "list/b", "list/c/d"]);
    assert!(listing.entries.iter().all(|e| e.value == e.key.as_bytes()));
    assert!(listing.revision >= last, "a write before the list is at or below its revision");
    let after = b.put_if("list/e", b"", Expect::Absent).await.unwrap();
    assert!(after > listing.revision);
}

async fn keys_vanish_with_their_lease(a: &impl Store, b: &impl Store, pass: impl AsyncFn(Duration)) {
    let lease = a.lease(Duration::from_secs(3)).await.unwrap();
    let written = a.put_if_leased("lease/w", b"w", Expect::Absent, &lease).await.unwrap();
    let mut changes = b.watch("lease/", written).await.unwrap();
    for _ in 0..2 {
        pass(Duration::from_millis(2000)).await;
        a.renew(&lease).await.unwrap();
    }
    assert!(b.get("lease/w").await.unwrap().is_some(), "a renewed lease lapsed");
    // No store is late by more than a few seconds, and etcd looks only twice a second.
    let mut waited = Duration::ZERO;
    while b.get("lease/w").await.unwrap().is_some() {
        assert!(waited < Duration::from_secs(15), "the lease does not lapse");
        pass(Duration::from_millis(100)).await;
        waited += Duration::from_millis(100);
    }
    assert!(waited >= Duration::from_millis(2000), "it lapsed {waited:?} after its renewal");
    assert!(
        matches!(next(&mut changes).await, Change::Deleted { key, revision } if key == "lease/w" && revision > written)
    );
    let lapsed = StoreError::LeaseLapsed(lease.0);
    assert_eq!(a.renew(&lease).await, Err(lapsed.clone()));
    assert_eq!(a.put_if_leased("lease/w", b"w", Expect::Absent, &lease).await, Err(lapsed));
    a.revoke(&lease).await.unwrap();
}

async fn a_revoked_lease_takes_its_keys_at_once(a: &impl Store, b: &impl Store) {
    let (lease, other) = (a.lease(DEADLINE).await.unwrap(), b.lease(DEADLINE).await.unwrap());
    assert_ne!(lease, other);
    for key in ["revoke/1", "revoke/2"] {
        a.put_if_leased(key, b"", Expect::Absent, &lease).await.unwrap();
    }
    b.put_if_leased("revoke/3", b"", Expect::Absent, &other).await.unwrap();
    let from = b.list("revoke/").await.unwrap().revision;
    let mut changes = b.watch("revoke/", from).await.unwrap();
    a.revoke(&lease).await.unwrap();
    let keys: Vec<String> = b.list("revoke/").await.unwrap().entries.into_iter().map(|e| e.key).collect();
    assert_eq!(keys, ["revoke/3"]);
    let mut gone = [next(&mut changes).await.key().to_string(), next(&mut changes).await.key().to_string()];
    gone.sort();
    assert_eq!(gone, ["revoke/1", "revoke/2"]);
}

async fn a_key_outlives_the_lease_that_it_was_taken_from(store: &impl Store) {
    let lease = store.lease(DEADLINE).await.unwrap();
    let leased = store.put_if_leased("taken/k", b"1", Expect::Absent, &lease).await.unwrap();
    store.put_if("taken/k", b"2", Expect::At(leased)).await.unwrap();
    store.revoke(&lease).await.unwrap();
    assert_eq!(store.get("taken/k").await.unwrap().unwrap().value, b"2");
}

/// Leadership: a leased key whose revision fences what its holder writes.
async fn a_fence_holds_back_who_leads_no_more(a: &impl Store, b: &impl Store) {
    let write = |value, expect, revision| {
        let fence = Some(Fence { key: "fence/leader", revision });
        Write { key: "fence/plan", value, expect, lease: None, fence }
    };
    let of_a = a.lease(DEADLINE).await.unwrap();
    let a_leads = a.put_if_leased("fence/leader", b"a", Expect::Absent, &of_a).await.unwrap();
    let first = a.write(write(b"by a", Expect::Absent, a_leads)).await.unwrap();
    a.revoke(&of_a).await.unwrap();
    let fenced = |expected| Err(StoreError::Fenced { key: "fence/leader".into(), expected });
    assert_eq!(a.write(write(b"late", Expect::At(first), a_leads)).await, fenced(a_leads));
    let of_b = b.lease(DEADLINE).await.unwrap();
    let b_leads = b.put_if_leased("fence/leader", b"b", Expect::Absent, &of_b).await.unwrap();
    assert_eq!(a.write(write(b"late", Expect::At(first), a_leads)).await, fenced(a_leads));
    let second = b.write(write(b"by b", Expect::At(first), b_leads)).await.unwrap();
    assert_eq!(b.get("fence/plan").await.unwrap().unwrap().value, b"by b");
    // Who leads and is late all the same learns that, not that it was fenced off.
    let conflict = StoreError::Conflict { key: "fence/plan".into(), found: Some(second) };
    assert_eq!(b.write(write(b"again", Expect::At(first), b_leads)).await, Err(conflict));
    b.revoke(&of_b).await.unwrap();
}

async fn a_watch_misses_nothing_from_its_revision(a: &impl Store, b: &impl Store) {
    let first = a.put_if("watch/1", b"a", Expect::Absent).await.unwrap();
    let second = a.put_if("watch/2", b"b", Expect::Absent).await.unwrap();
    a.put_if("watching", b"x", Expect::Absent).await.unwrap();
    let mut changes = b.watch("watch/", first).await.unwrap();
    a.delete("watch/1").await.unwrap();
    a.delete("watch/1").await.unwrap();
    let third = a.put_if("watch/2", b"c", Expect::At(second)).await.unwrap();
    let put = next(&mut changes).await;
    assert!(matches!(&put, Change::Put(e) if e.key == "watch/2" && e.value == b"b" && e.revision == second));
    let deleted = next(&mut changes).await;
    assert!(matches!(&deleted, Change::Deleted { key, revision } if key == "watch/1" && *revision > second));
    let put = next(&mut changes).await;
    assert!(matches!(&put, Change::Put(e) if e.key == "watch/2" && e.value == b"c" && e.revision == third));
    assert!(deleted.revision() < third);
}

async fn a_watch_goes_on_from_any_revision_it_saw(a: &impl Store, b: &impl Store) {
    let from = a.list("old/").await.unwrap().revision;
    for i in 0..20 {
        a.put_if(&format!("old/{i:02}"), b"", Expect::Absent).await.unwrap();
    }
    let mut whole = b.watch("old/", from).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..20 {
        seen.push(next(&mut whole).await);
    }
    assert!(seen.windows(2).all(|w| w[0].revision() < w[1].revision()));
    for cut in [0, 7, 18] {
        let mut rest = b.watch("old/", seen[cut].revision()).await.unwrap();
        for expected in &seen[cut + 1..] {
            assert_eq!(next(&mut rest).await, *expected);
        }
    }
}

async fn a_watch_from_the_beginning_starts_with_what_stands(a: &impl Store, b: &impl Store) {
    a.put_if("start/1", b"a", Expect::Absent).await.unwrap();
    let mut changes = b.watch("start/", Revision(0)).await.unwrap();
    assert_eq!(next(&mut changes).await.key(), "start/1");
    a.put_if("start/2", b"b", Expect::Absent).await.unwrap();
    assert_eq!(next(&mut changes).await.key(), "start/2");
}

/// A watcher that reads nothing while `changes` are made sees all of them, if need be in several goes.
pub async fn a_lagging_watcher_loses_nothing(store: &impl Store, changes: usize) {
    let prefix = format!("lag/{changes}/");
    let mut from = store.list(&prefix).await.unwrap().revision;
    let mut watch = store.watch(&prefix, from).await.unwrap();
    let mut at: BTreeMap<String, Revision> = BTreeMap::new();
    for i in 0..changes {
        let key = format!("{prefix}{}", i % 7);
        let expect = at.get(&key).map_or(Expect::Absent, |r| Expect::At(*r));
        at.insert(key.clone(), store.put_if(&key, i.to_string().as_bytes(), expect).await.unwrap());
    }
    for i in 0..changes {
        let change = loop {
            match tokio::time::timeout(DEADLINE, watch.recv()).await.expect("a change comes in time") {
                Some(change) => break change,
                None => watch = store.watch(&prefix, from).await.unwrap(),
            }
        };
        from = change.revision();
        assert!(matches!(change, Change::Put(e) if e.value == i.to_string().as_bytes()), "change {i}");
    }
}
