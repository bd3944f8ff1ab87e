//! The store on etcd against real servers. Where no etcd is installed, each of these says so and passes.

use super::super::{Change, Expect, Revision, Store, StoreError, conformance};
use super::harness::{Authority, DEADLINE, Directory, Etcd, Road, is_installed, ready, store, store_as};
use super::{EtcdStore, Identity, Settings, wire};
use std::time::Duration;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};

fn unreachable(error: &StoreError) -> &str {
    match error {
        StoreError::Unreachable(why) => why,
        other => panic!("{other:?}"),
    }
}

fn refused(error: &StoreError) -> &str {
    match error {
        StoreError::Refused(why) => why,
        other => panic!("{other:?}"),
    }
}

/// Asks until it is answered, for as long as a restart or an election may last.
async fn patient<T>(ask: impl AsyncFn() -> Result<T, StoreError>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(StoreError::Unreachable(why)) => assert!(Instant::now() < deadline, "{why}"),
            Err(other) => panic!("{other}"),
        }
    }
}

/// Writes a number by compare-and-swap, through outages: a write without an answer is looked up.
async fn write_number(store: &EtcdStore, key: &str, number: u64) -> Revision {
    let value = number.to_string();
    loop {
        let found = patient(async || store.get(key).await).await;
        if let Some(entry) = found.as_ref().filter(|e| e.value == value.as_bytes()) {
            return entry.revision;
        }
        match store.put_if(key, value.as_bytes(), found.map_or(Expect::Absent, |e| Expect::At(e.revision))).await {
            Ok(revision) => return revision,
            Err(StoreError::Unreachable(_) | StoreError::Conflict { .. }) => continue,
            Err(other) => panic!("{other}"),
        }
    }
}

/// What etcd itself is asked by tests.
async fn channel(address: &str) -> Channel {
    Endpoint::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

async fn compact(address: &str, revision: Revision) {
    let mut kv = wire::kv_client::KvClient::new(channel(address).await);
    kv.compact(wire::CompactionRequest { revision: revision.0 as i64 }).await.unwrap();
}

#[tokio::test]
async fn the_store_on_etcd_keeps_the_contract() {
    if !is_installed() {
        return;
    }
    let etcd = Etcd::single().await;
    conformance::all(&etcd.store(), &etcd.store(), tokio::time::sleep).await;
    conformance::a_lagging_watcher_loses_nothing(&etcd.store(), 1500).await;
}

#[tokio::test]
async fn prefixes_keep_clusters_apart() {
    if !is_installed() {
        return;
    }
    let etcd = Etcd::single().await;
    let with = |prefix: &str| {
        let (endpoints, prefix) = (etcd.endpoints(), prefix.to_string());
        EtcdStore::new(Settings { endpoints, prefix, ..Settings::default() }).unwrap()
    };
    let (one, two, all) = (with("one/"), with("two/"), with(""));
    let first = one.put_if("k", b"1", Expect::Absent).await.unwrap();
    let mut changes = two.watch("", first).await.unwrap();
    two.put_if("k", b"2", Expect::Absent).await.unwrap();
    assert_eq!(one.get("k").await.unwrap().unwrap().value, b"1");
    assert_eq!(one.list("").await.unwrap().entries.len(), 1);
    assert_eq!(conformance::next(&mut changes).await.key(), "k");
    let keys: Vec<String> = all.list("").await.unwrap().entries.into_iter().map(|e| e.key).collect();
    assert_eq!(keys, ["one/k", "two/k"]);
}

#[tokio::test]
async fn a_watch_goes_on_when_etcd_is_killed_and_started_again() {
    if !is_installed() {
        return;
    }
    let mut etcd = Etcd::single().await;
    let store = etcd.store();
    let lease = store.lease(Duration::from_secs(60)).await.unwrap();
    let mut last = store.put_if_leased("r/leased", b"", Expect::Absent, &lease).await.unwrap();
    let mut changes = store.watch("r/", last).await.unwrap();
    for round in 0..3 {
        let mut made = vec![write_number(&store, "r/n", 2 * round).await];
        assert_eq!(conformance::next(&mut changes).await.revision(), made[0]);
        etcd.members[0].kill();
        let error = store.get("r/n").await.unwrap_err();
        assert!(unreachable(&error).contains(&etcd.members[0].address), "{error}");
        etcd.members[0].start();
        made.push(write_number(&store, "r/n", 2 * round + 1).await);
        let change = conformance::next(&mut changes).await;
        assert!(matches!(&change, Change::Put(e) if e.value == (2 * round + 1).to_string().as_bytes()), "{change:?}");
        assert_eq!(change.revision(), made[1]);
        assert!(made[0] > last && made[1] > made[0]);
        last = made[1];
    }
    store.renew(&lease).await.unwrap();
    store.revoke(&lease).await.unwrap();
    assert!(matches!(conformance::next(&mut changes).await, Change::Deleted { key, .. } if key == "r/leased"));
}

#[tokio::test]
async fn a_watch_that_was_cut_while_etcd_forgot_tells_the_difference() {
    if !is_installed() {
        return;
    }
    let etcd = Etcd::single().await;
    let (near, road) = (etcd.store(), Road::to(&etcd.members[0].address).await);
    let far = store(vec![road.address.clone()]);
    let mut at = Vec::new();
    for key in ["c/kept", "c/gone", "c/changed", "elsewhere"] {
        at.push(near.put_if(key, b"1", Expect::Absent).await.unwrap());
    }
    let mut whole = far.watch("c/", Revision(0)).await.unwrap();
    let mut part = far.watch("c/", at[1]).await.unwrap();
    for key in ["c/kept", "c/gone", "c/changed"] {
        assert_eq!(conformance::next(&mut whole).await.key(), key);
    }
    assert_eq!(conformance::next(&mut part).await.key(), "c/changed");
    road.cut();
    let created = near.put_if("c/created", b"1", Expect::Absent).await.unwrap();
    near.put_if("c/fleeting", b"1", Expect::Absent).await.unwrap();
    near.delete("c/fleeting").await.unwrap();
    near.delete("c/gone").await.unwrap();
    let between = near.put_if("c/changed", b"2", Expect::At(at[2])).await.unwrap();
    let changed = near.put_if("c/changed", b"3", Expect::At(between)).await.unwrap();
    let end = near.put_if("elsewhere", b"2", Expect::At(at[3])).await.unwrap();
    compact(&etcd.members[0].address, end).await;
    assert_eq!(near.watch("c/", at[3]).await.err(), Some(StoreError::Forgotten(at[3])), "nothing was forgotten");
    road.mend();
    for changes in [&mut whole, &mut part] {
        let (one, two, three) =
            (conformance::next(changes).await, conformance::next(changes).await, conformance::next(changes).await);
        assert!(matches!(one, Change::Put(e) if e.key == "c/created" && e.revision == created));
        assert!(matches!(two, Change::Put(e) if e.key == "c/changed" && e.value == b"3" && e.revision == changed));
        assert!(matches!(three, Change::Deleted { key, revision } if key == "c/gone" && revision >= end));
    }
    let live = near.put_if("c/live", b"1", Expect::Absent).await.unwrap();
    for changes in [&mut whole, &mut part] {
        assert!(matches!(conformance::next(changes).await, Change::Put(e) if e.key == "c/live" && e.revision == live));
        assert!(changes.try_recv().is_err(), "something was told twice");
    }
}

#[tokio::test]
async fn a_watch_whose_connection_falls_silent_goes_on_by_another() {
    if !is_installed() {
        return;
    }
    let etcd = Etcd::single().await;
    let (near, road) = (etcd.store(), Road::to(&etcd.members[0].address).await);
    let far = store(vec![road.address.clone(), etcd.members[0].address.clone()]);
    let first = far.put_if("s/1", b"", Expect::Absent).await.unwrap();
    let mut changes = far.watch("s/", Revision(0)).await.unwrap();
    assert_eq!(conformance::next(&mut changes).await.revision(), first);
    road.silence();
    for key in ["s/2", "s/3"] {
        near.put_if(key, b"", Expect::Absent).await.unwrap();
    }
    assert!(changes.try_recv().is_err(), "the connection is not silent");
    for key in ["s/2", "s/3"] {
        assert_eq!(conformance::next(&mut changes).await.key(), key);
    }
}

#[tokio::test]
async fn of_three_members_one_may_die_and_come_back_and_another_die() {
    if !is_installed() {
        return;
    }
    let flags = ["--heartbeat-interval", "50", "--election-timeout", "500"].map(String::from);
    let mut etcd = Etcd::start(3, "http", Directory::new(), &flags);
    let (writer, reader) = (etcd.store(), etcd.store());
    ready(&writer).await;
    let from = patient(async || reader.list("three/").await).await.revision;
    let mut changes = patient(async || reader.watch("three/", from).await).await;
    let (mut number, mut writes) = (0, Vec::new());
    for dies in [0, 1, 2] {
        etcd.members[dies].kill();
        for _ in 0..10 {
            number += 1;
            writes.push(write_number(&writer, "three/n", number).await);
        }
        etcd.members[dies].start();
        // The next one may die only when this one is back, or there is no majority.
        let only = store(vec![etcd.members[dies].address.clone()]);
        ready(&only).await;
    }
    for (i, revision) in writes.iter().enumerate() {
        let change = conformance::next(&mut changes).await;
        assert!(matches!(&change, Change::Put(e) if e.value == (i + 1).to_string().as_bytes()), "{i}: {change:?}");
        assert_eq!(change.revision(), *revision);
    }
}

#[tokio::test]
async fn endpoints_that_are_closed_or_silent_are_passed_over() {
    if !is_installed() {
        return;
    }
    let etcd = Etcd::single().await;
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let real = etcd.members[0].address.clone();
    let behind_closed = store(vec![closed.clone(), real.clone()]);
    behind_closed.put_if("e/closed", b"", Expect::Absent).await.unwrap();

    // Takes connections and never says a word.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent_address = silent.local_addr().unwrap().to_string();
    let began = Instant::now();
    let behind_silent = store(vec![silent_address.clone(), real]);
    assert!(behind_silent.get("e/closed").await.unwrap().is_some());
    let only_silent = store(vec![silent_address.clone()]);
    let error = only_silent.put_if("e/silent", b"", Expect::Absent).await.unwrap_err();
    assert!(unreachable(&error).contains(&silent_address) && error.to_string().contains("no answer within"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());

    let error = store(vec![closed.clone()]).get("k").await.unwrap_err();
    assert!(unreachable(&error).contains(&closed) && error.to_string().contains("refused"), "{error}");
}

#[tokio::test]
async fn tls_asks_both_sides_for_certificates() {
    if !is_installed() {
        return;
    }
    let directory = Directory::new();
    let files = directory.0.clone();
    let (ours, strange) = (Authority::new(&files, "ours"), Authority::new(&files, "strange"));
    let server = ours.sign(&files, "server");
    let text = |path: &std::path::Path| path.display().to_string();
    let flags = [
        "--client-cert-auth".to_string(),
        "--trusted-ca-file".into(),
        text(&ours.ca),
        "--cert-file".into(),
        text(&server.certificate),
        "--key-file".into(),
        text(&server.key),
    ];
    let etcd = Etcd::start(1, "https", directory, &flags);
    let with = |ca: &Authority, identity: Option<Identity>| {
        let (endpoints, prefix, ca) = (etcd.endpoints(), "test/".into(), Some(ca.ca.clone()));
        EtcdStore::new(Settings { endpoints, prefix, ca, identity, login: None }).unwrap()
    };
    let client = ours.sign(&files, "client");
    let store = with(&ours, Some(client.clone()));
    ready(&store).await;
    store.put_if("tls", b"1", Expect::Absent).await.unwrap();
    let error = with(&strange, Some(client.clone())).get("tls").await.unwrap_err();
    let why = unreachable(&error);
    assert!(why.contains(&etcd.members[0].address) && why.contains("certificate"), "{why}");
    let error = with(&ours, None).get("tls").await.unwrap_err();
    assert!(unreachable(&error).contains(&etcd.members[0].address), "{error}");
    let error = with(&ours, Some(strange.sign(&files, "stranger"))).get("tls").await.unwrap_err();
    unreachable(&error);
    assert_eq!(store.get("tls").await.unwrap().unwrap().value, b"1");

    // A client whose certificate was replaced is let in with the new one at its next connection.
    let renewed = with(&ours, Some(strange.sign(&files, "renewed")));
    unreachable(&renewed.get("tls").await.unwrap_err());
    ours.sign(&files, "renewed");
    assert_eq!(renewed.get("tls").await.unwrap().unwrap().value, b"1");
}

/// Makes `root` with a password of the same text, and asks for it.
async fn enable_login(address: &str) -> wire::auth_client::AuthClient<Channel> {
    let mut auth = wire::auth_client::AuthClient::new(channel(address).await);
    let (name, password) = ("root".to_string(), "root".to_string());
    auth.role_add(wire::RoleAddRequest { name: name.clone() }).await.unwrap();
    auth.user_add(wire::UserAddRequest { name: name.clone(), password }).await.unwrap();
    auth.user_grant_role(wire::UserGrantRoleRequest { user: name.clone(), role: name }).await.unwrap();
    auth.auth_enable(wire::AuthEnableRequest {}).await.unwrap();
    auth
}

#[tokio::test]
async fn who_logs_in_is_let_in_and_nobody_else() {
    if !is_installed() {
        return;
    }
    let mut etcd = Etcd::single().await;
    let before = store_as(etcd.endpoints(), "root", "root");
    let first = before.put_if("auth/k", b"1", Expect::Absent).await.expect("nobody is asked yet");
    let mut auth = enable_login(&etcd.members[0].address).await;
    let store = store_as(etcd.endpoints(), "root", "root");
    let mut changes = store.watch("auth/", first).await.unwrap();
    let second = store.put_if("auth/k", b"2", Expect::At(first)).await.unwrap();
    assert_eq!(conformance::next(&mut changes).await.revision(), second);

    let error = store_as(etcd.endpoints(), "root", "wrong").get("auth/k").await.unwrap_err();
    assert!(refused(&error).contains("user root") && error.to_string().contains("password"), "{error}");
    refused(&store_as(etcd.endpoints(), "nobody", "root").get("auth/k").await.unwrap_err());
    refused(&etcd.store().get("auth/k").await.unwrap_err());

    // Tokens die with the setting and with the server; the connection, or the next one, logs in anew.
    let mut disable = tonic::Request::new(wire::AuthDisableRequest {});
    let login = wire::AuthenticateRequest { name: "root".into(), password: "root".into() };
    let token = auth.authenticate(login).await.unwrap().into_inner().token;
    disable.metadata_mut().insert("token", token.parse().unwrap());
    auth.auth_disable(disable).await.unwrap();
    auth.auth_enable(wire::AuthEnableRequest {}).await.unwrap();
    let third = store.put_if("auth/k", b"3", Expect::At(second)).await.unwrap();
    assert_eq!(conformance::next(&mut changes).await.revision(), third);
    etcd.members[0].kill();
    etcd.members[0].start();
    write_number(&store, "auth/n", 4).await;
    assert_eq!(conformance::next(&mut changes).await.key(), "auth/n");
}
