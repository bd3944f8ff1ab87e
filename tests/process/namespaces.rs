//! A cluster over several hosts, each a network namespace with an address of its own, under mutual TLS. Cables are pulled, packets
//! vanish one way or the other, and nobody who asks anything notices more than a pause.

use anyhow::{Context, Result, ensure};
use conclave_tests::cluster::Ending;
use conclave_tests::hosts::{Host, Hosts};
use conclave_tests::load::{Tally, under_load};
use conclave_tests::process::{DEADLINE, Served, demo, until};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_conclave");

const TOKENS: usize = 60;

/// The promise is full service 10 s after a fault, with no human action; machines that are shared may take twice that.
const WHOLE_AGAIN: Duration = Duration::from_secs(20);

/// Longer than any silence is borne.
const LASTING: Duration = Duration::from_secs(4);

/// A coordinator and two workers that need each other, and where they are.
struct Cluster {
    folder: PathBuf,
    served: Served,
    _workers: [Ending; 2],
}

impl Cluster {
    /// `at` is how a host is addressed, without brackets, and `every` stands for all addresses.
    fn start(name: &str, hosts: &Hosts, at: impl Fn(&Host) -> String, every: &str) -> Result<Cluster> {
        let folder = std::env::temp_dir().join(format!("conclave-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder)?;
        let certificates = folder.join("certificates");
        let made = Command::new(PROGRAM).args(["certs", "init"]).arg(&certificates).output()?;
        ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let head = hosts.host(0);
        // As an orchestrator joins an address and a port: without brackets.
        let node = format!("{}:7070", at(head));
        let settings = folder.join("coordinator.toml");
        let said = format!(
            "model = {:?}\nserved_model_name = \"m\"\nlisten = \"{every}:8080\"\nnode_listen = \"{every}:7070\"\n\
             token = \"t\"\nworkers = 2\ntensor_parallel_size = 2\nkv_cache_memory_bytes = 8388608\n{}",
            demo(),
            tls(&certificates, "coordinator"),
        );
        std::fs::write(&settings, said)?;
        let mut command = head.command(PROGRAM);
        command.arg("coordinator").arg("--config").arg(&settings).env("CONCLAVE_NODE_ADVERTISE", &node);
        let api = match at(head) {
            v6 if v6.contains(':') => format!("[{v6}]:8080"),
            v4 => format!("{v4}:8080"),
        };
        let served = Served::of(command, api)?;
        until("the API listens", || served.get("/livez").is_ok_and(|answer| answer.status == 200))?;
        let worker = |index: usize| -> Result<Ending> {
            let host = hosts.host(index);
            let file = folder.join(format!("w{index}.toml"));
            let said = format!(
                "coordinator = {node:?}\nname = \"w{index}\"\ntoken = \"t\"\nmemory_bytes = 268435456\nthreads = 1\n\
                 data_listen = \"{every}:7071\"\n{}",
                tls(&certificates, "worker"),
            );
            std::fs::write(&file, said)?;
            let mut command = host.command(PROGRAM);
            command.arg("worker").arg("--config").arg(file);
            Ending::spawn(command.env("CONCLAVE_DATA_ADVERTISE", format!("{}:7071", at(host))))
        };
        let workers = [worker(1)?, worker(2)?];
        until("it is ready", || ready(&served))?;
        Ok(Cluster { folder, served, _workers: workers })
    }

    /// One fault of some seconds, and what followed.
    fn suffer(
        &self,
        tally: &Tally,
        name: &str,
        begin: impl FnOnce() -> Result<()>,
        end: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let began = Instant::now();
        begin()?;
        let mut noticed = None;
        while began.elapsed() < LASTING || noticed.is_none() {
            ensure!(began.elapsed() < DEADLINE, "{name}: nobody noticed");
            if noticed.is_none() && !ready(&self.served) {
                noticed = Some(began.elapsed());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        end()?;
        let ended = Instant::now();
        until("it is ready again", || ready(&self.served))?;
        let answers = tally.answers();
        until("answers come again", || tally.answers() >= answers + 2)?;
        let whole = ended.elapsed();
        eprintln!("{name}: noticed after {noticed:?}, whole again after {whole:?}");
        ensure!(whole <= WHOLE_AGAIN, "{name}: whole again only after {whole:?}");
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn tls(certificates: &Path, role: &str) -> String {
    let file = |name: &str| certificates.join(name).display().to_string();
    let (certificate, key) = (file(&format!("{role}.crt")), file(&format!("{role}.key")));
    format!("tls = {{ ca = {:?}, certificate = {certificate:?}, key = {key:?} }}\n", file("ca.crt"))
}

fn ready(served: &Served) -> bool {
    served.get("/readyz").is_ok_and(|answer| answer.status == 200)
}

#[test]
fn hosts_that_are_cut_off_come_back_and_nobody_notices() -> Result<()> {
    let Some(hosts) = Hosts::new(&["c", "a", "b"])? else { return Ok(()) };
    let cluster = Cluster::start("hosts", &hosts, |host| host.v4.clone(), "0.0.0.0")?;
    let (a, b) = (hosts.host(1), hosts.host(2));
    let between = format!("ip saddr {}", a.v4);
    let tally = under_load(&cluster.served, TOKENS, |tally| {
        cluster.suffer(tally, "a worker's cable is out", || b.plug(false), || b.plug(true))?;
        cluster.suffer(tally, "a worker hears nothing", || b.deafen("input", ""), || b.hear())?;
        cluster.suffer(tally, "a worker is not heard", || b.deafen("output", ""), || b.hear())?;
        cluster.suffer(tally, "a worker does not hear its peer", || b.deafen("input", &between), || b.hear())
    })?;
    let (answers, pause) = (tally.answers(), tally.longest());
    eprintln!("hosts cut off: {answers} answers, none changed; longest pause {pause:?}");
    Ok(())
}

#[test]
fn a_network_of_ipv6_alone_takes_addresses_without_brackets() -> Result<()> {
    let Some(hosts) = Hosts::new(&["c", "a", "b"])? else { return Ok(()) };
    let cluster = Cluster::start("hosts-v6", &hosts, |host| host.v6.clone(), "[::]")?;
    let tally = under_load(&cluster.served, TOKENS, |tally| {
        let b = hosts.host(2);
        cluster.suffer(tally, "a worker's cable is out", || b.plug(false), || b.plug(true))
    })?;
    eprintln!("IPv6 alone: {} answers, none changed", tally.answers());
    let status = cluster.served.get("/status")?.json()?;
    ensure!(status["members"].as_array().context("members")?.len() == 2, "{status}");
    Ok(())
}
