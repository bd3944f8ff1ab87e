//! Networks that misbehave between real processes: connections cut, stalled, slowed, between workers and coordinator, between
//! ranks, between coordinator and store, between coordinators. Under load: no answer lost, none changed, and all is served
//! again soon after the fault, by itself.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::{Ending, Place, free_address, hosts_apart};
use conclave_tests::etcd;
use conclave_tests::load::{Tally, under_load};
use conclave_tests::process::{DEADLINE, Served, demo, until};
use conclave_tests::proxy::{Cut, Manner, Proxy, Way};

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

/// Both workers are needed, so that every fault is one.
const TWO: &str = "workers = 2\ntensor_parallel_size = 2\nkv_cache_memory_bytes = 8388608\n";

const TOKENS: usize = 60;

/// The promise is full service 10 s after a fault, with no human action; machines that are shared may take twice that.
const WHOLE_AGAIN: Duration = Duration::from_secs(20);

/// How long faults that last do: longer than any silence is borne.
const LASTING: Duration = Duration::from_secs(3);
const AT_ONCE: Duration = Duration::ZERO;

/// A fault: its name, how it begins, how long it lasts, and whether what crosses is lost.
type Fault<'a> = (&'static str, &'a dyn Fn(&Proxy), Duration, bool);

const FAULTS: [Fault<'static>; 7] = [
    ("closed", &|proxy| proxy.cut(Cut::Close), AT_ONCE, true),
    ("reset", &|proxy| proxy.cut(Cut::Reset), AT_ONCE, true),
    ("stalled", &|proxy| proxy.set(Manner::Stall), LASTING, true),
    ("stalled up", &|proxy| proxy.set_way(Way::Up, Manner::Stall), LASTING, true),
    ("stalled down", &|proxy| proxy.set_way(Way::Down, Manner::Stall), LASTING, true),
    ("delayed by 20 ms", &|proxy| proxy.set(Manner::Delay(Duration::from_millis(20))), LASTING, false),
    ("64 bytes a millisecond", &|proxy| proxy.set(Manner::Trickle(64)), LASTING, false),
];

fn epoch(served: &Served) -> Result<u64> {
    served.get("/status")?.json()?["epoch"].as_u64().context("an epoch")
}

fn ready(served: &Served) -> bool {
    served.get("/readyz").is_ok_and(|answer| answer.status == 200)
}

/// One fault after another; a line about each.
fn suffer(served: &Served, proxy: &Proxy, faults: &[Fault<'_>], tally: &Tally) -> Result<()> {
    for (name, begin, lasts, loses) in faults {
        let (before, crossed) = (epoch(served)?, proxy.crossed(Way::Up));
        until("something crosses", || proxy.crossed(Way::Up) > crossed)?;
        let began = Instant::now();
        let mut noticed = None;
        let mut look = || {
            let over = !ready(served) || epoch(served).is_ok_and(|epoch| epoch > before);
            noticed = noticed.or(over.then(|| began.elapsed()));
            noticed
        };
        begin(proxy);
        // One that loses what crosses goes on until it is noticed: a machine may be slow, not a fault missed.
        while began.elapsed() < *lasts || *lasts > AT_ONCE && *loses && look().is_none() {
            ensure!(began.elapsed() < DEADLINE, "{name}: nobody noticed");
            look();
            std::thread::sleep(Duration::from_millis(10));
        }
        proxy.set(Manner::Pass);
        let ended = Instant::now();
        if *loses {
            until("it is noticed", || look().is_some())?;
        }
        until("it is ready again", || ready(served))?;
        let answers = tally.answers();
        until("answers come again", || tally.answers() >= answers + 2)?;
        let (whole, noticed) = (ended.elapsed(), look());
        eprintln!("{name}: noticed after {noticed:?}, whole again {whole:?} after its end, epoch {}", epoch(served)?);
        ensure!(whole <= WHOLE_AGAIN, "{name}: whole again only after {whole:?}");
    }
    Ok(())
}

fn told(what: &str, tally: &Tally) {
    eprintln!("{what}: {} answers, none changed; longest pause {:?}", tally.answers(), tally.longest());
}

#[test]
fn between_worker_and_coordinator() -> Result<()> {
    let place = Place::new(PROGRAM, "cuts-control", &demo(), TWO)?;
    let served = place.coordinator()?;
    let proxy = Proxy::start(place.node())?;
    let _workers = [place.worker("a")?, place.worker_at("b", &proxy.address())?];
    until("it is ready", || ready(&served))?;
    let tally = under_load(&served, TOKENS, |tally| suffer(&served, &proxy, &FAULTS, tally))?;
    told("between worker and coordinator", &tally);
    Ok(())
}

/// Two workers on hosts of their own, whose ranks meet through a proxy.
fn apart(place: &Place, settings: &str) -> Result<(Proxy, [Ending; 2])> {
    let listens = free_address()?;
    let proxy = Proxy::start(&listens)?;
    // The first place is dialled.
    let first = format!("data_listen = {listens:?}\ndata_advertise = {:?}\nthreads = 1\n{settings}", proxy.address());
    let (a, _) = place.worker_apart("a", &first)?;
    let (b, _) = place.worker_apart("b", &format!("threads = 1\n{settings}"))?;
    Ok((proxy, [a, b]))
}

#[test]
fn between_ranks() -> Result<()> {
    if !hosts_apart() {
        return Ok(());
    }
    let place = Place::new(PROGRAM, "cuts-data", &demo(), TWO)?;
    let served = place.coordinator()?;
    let (proxy, _workers) = apart(&place, "")?;
    until("it is ready", || ready(&served))?;
    let tally = under_load(&served, TOKENS, |tally| suffer(&served, &proxy, &FAULTS, tally))?;
    told("between ranks", &tally);
    Ok(())
}

/// Files of one authority, for a coordinator and for workers.
fn certificates(folder: &Path) -> Result<impl Fn(&str) -> String> {
    let directory = folder.join("certificates");
    let made = Command::new(PROGRAM).args(["certs", "init"]).arg(&directory).output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Ok(move |role: &str| {
        let file = |name: &str| directory.join(name).display().to_string();
        let (certificate, key) = (file(&format!("{role}.crt")), file(&format!("{role}.key")));
        format!("tls = {{ ca = {:?}, certificate = {certificate:?}, key = {key:?} }}\n", file("ca.crt"))
    })
}

/// In the clear TCP's own checksum is all that stands between a flipped bit and an answer; under TLS a proxy may flip what it likes.
#[test]
fn bits_flipped_under_tls_change_nothing() -> Result<()> {
    if !hosts_apart() {
        return Ok(());
    }
    let folder = std::env::temp_dir().join(format!("conclave-flips-{}", std::process::id()));
    std::fs::create_dir_all(&folder)?;
    let tls = certificates(&folder)?;
    let place = Place::new(PROGRAM, "cuts-flips", &demo(), &format!("{TWO}{}", tls("coordinator")))?;
    let served = place.coordinator()?;
    let (data, _workers) = apart(&place, &tls("worker"))?;
    until("it is ready", || ready(&served))?;
    let flips: [Fault<'_>; 3] = [
        ("a bit flipped up", &|proxy| proxy.flip(Way::Up, 1), AT_ONCE, true),
        ("a bit flipped down", &|proxy| proxy.flip(Way::Down, 1), AT_ONCE, true),
        ("three bits flipped", &|proxy| proxy.flip(Way::Up, 3), AT_ONCE, true),
    ];
    let tally = under_load(&served, TOKENS, |tally| suffer(&served, &data, &flips, tally))?;
    ensure!(data.flips_left(Way::Down) == 0, "{} bits were not flipped", data.flips_left(Way::Down));
    told("flipped bits under TLS", &tally);
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

/// Whether the store counts as reached.
fn store_up(served: &Served) -> bool {
    served.metric("conclave_store_up", "").is_ok_and(|up| up == 1.0)
}

#[test]
fn between_coordinators_and_their_store() -> Result<()> {
    let address = free_address()?;
    let proxy = Proxy::start(&address)?;
    let store = format!("[store]\nkind = \"etcd\"\nendpoints = [{:?}]\n", proxy.address());
    let place = Place::new(PROGRAM, "cuts-store", &demo(), &format!("{TWO}{store}"))?;
    let Some(_store) = etcd::start(&address, &place.folder().join("etcd"))? else { return Ok(()) };
    let served = place.coordinator()?;
    let _workers = [place.worker("a")?, place.worker("b")?];
    until("it is ready", || ready(&served))?;
    let before = epoch(&served)?;
    let tally = under_load(&served, TOKENS, |tally| {
        for (name, begin, lasts, _) in FAULTS {
            let began = Instant::now();
            let (answers, connections, mut down) = (tally.answers(), proxy.connections(), None);
            begin(&proxy);
            while began.elapsed() < lasts * 2 {
                ensure!(ready(&served), "{name}: not ready after {:?}", began.elapsed());
                down = down.or((!store_up(&served)).then(|| began.elapsed()));
                std::thread::sleep(Duration::from_millis(20));
            }
            proxy.set(Manner::Pass);
            let ended = Instant::now();
            let cut = lasts == AT_ONCE;
            until("it connects again", || !cut || proxy.connections() > connections)?;
            until("the store is reached again", || store_up(&served))?;
            until("answers go on", || tally.answers() >= answers + 2)?;
            let whole = ended.elapsed();
            eprintln!("{name}: the store was missed after {down:?}, reached again {whole:?} after the end");
            ensure!(whole <= WHOLE_AGAIN, "{name}: reached again only after {whole:?}");
        }
        Ok(())
    })?;
    ensure!(epoch(&served)? == before && ready(&served), "epoch {} followed {before}", epoch(&served)?);
    told("between coordinator and store", &tally);
    Ok(())
}

/// A standby forwards what it is asked through its own connection to the leader.
#[test]
fn between_coordinators() -> Result<()> {
    let address = free_address()?;
    let settings = format!("{TWO}[store]\nkind = \"etcd\"\nendpoints = [{address:?}]\n");
    let place = |name: &str| -> Result<(Place, Proxy)> {
        let place = Place::new(PROGRAM, name, &demo(), "")?;
        let proxy = Proxy::start(place.node())?;
        // Other coordinators come through the proxy, workers do not.
        place.configure(&demo(), &format!("node_advertise = {:?}\n{settings}", proxy.address()))?;
        Ok((place, proxy))
    };
    let places = [place("cuts-peer-0")?, place("cuts-peer-1")?];
    let Some(_store) = etcd::start(&address, &places[0].0.folder().join("etcd"))? else { return Ok(()) };
    let pair = [places[0].0.coordinator()?, places[1].0.coordinator()?];
    let both = format!("{},{}", places[0].0.node(), places[1].0.node());
    let _workers = [places[0].0.worker_at("a", &both)?, places[0].0.worker_at("b", &both)?];
    until("both are ready", || pair.iter().all(ready))?;
    let stands_by = |served: &Served| -> Result<bool> { Ok(served.get("/status")?.json()?["stands_by"] == true) };
    let standing = usize::from(!stands_by(&pair[0])?);
    let (standby, proxy) = (&pair[standing], &places[1 - standing].1);
    let mut struck = 0;
    let tally = under_load(standby, TOKENS, |tally| {
        for (name, begin, lasts, _) in FAULTS {
            struck += usize::from(stands_by(standby)?);
            let (began, crossed) = (Instant::now(), proxy.crossed(Way::Down));
            until("answers cross", || proxy.crossed(Way::Down) > crossed || !stands_by(standby).unwrap_or(true))?;
            begin(proxy);
            while began.elapsed() < lasts {
                std::thread::sleep(Duration::from_millis(20));
            }
            proxy.set(Manner::Pass);
            let ended = Instant::now();
            until("the standby is ready", || ready(standby))?;
            let answers = tally.answers();
            until("answers come again", || tally.answers() >= answers + 2)?;
            let whole = ended.elapsed();
            eprintln!("{name}: whole again {whole:?} after its end");
            ensure!(whole <= WHOLE_AGAIN, "{name}: whole again only after {whole:?}");
        }
        Ok(())
    })?;
    // On a machine so busy that a lease lapses the lead moves, and then nothing crosses any more.
    ensure!(struck > 0, "the lead moved at once, so that no fault struck anything");
    told(&format!("between coordinators, {struck} of {} faults", FAULTS.len()), &tally);
    Ok(())
}
