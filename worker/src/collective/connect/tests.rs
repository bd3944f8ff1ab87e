//! Workers as threads with a data plane each, and as real processes that can be killed.

use super::*;
use crate::collective::authority::Authority;
use crate::collective::door::STRANGERS_MAX;
use crate::collective::refused::Reason;
use crate::collective::suite::{Members, contract};
use crate::collective::tree;
use model::mesh::Mesh;
use model::plan::{Guesser, KernelFamily, Limits};
use model::quant::Dtype;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

mod tls;

const OPTIONS: Options = Options { deadline: Duration::from_secs(20), checked: false };

fn plan(epoch: u64, mesh: Mesh, members: Vec<Member>) -> Plan {
    let limits = Limits { model_len_max: 128, step_tokens_max: 64, step_sequences_max: 4, blocks: 8 };
    let stages = (0..mesh.pipeline).map(|stage| stage..stage + 1).collect();
    let (dtype, family) = (Dtype::F32, KernelFamily::Vector);
    Plan { epoch: Epoch(epoch), mesh, dtype, family, stages, members, limits, guesser: Guesser::Nobody }
}

/// Worker `i` with `each` ranks, the ranks in order.
fn member(i: usize, each: usize, host: &str, address: &str) -> Member {
    let ranks = (i * each..(i + 1) * each).map(|rank| RankId(rank as u32)).collect();
    let worker = WorkerId(format!("w{i}"));
    Member { worker, host: host.into(), data_address: address.into(), ranks, threads: 1 }
}

/// One data plane a worker, `each` ranks on it, in this process; hosts by `host(worker)`.
fn planes(workers: usize, each: usize, host: impl Fn(usize) -> String) -> (Vec<DataPlane>, Vec<Member>) {
    planes_with(|_| None, workers, each, host)
}

/// The same, each worker with what `tls(worker)` says.
fn planes_with(
    tls: impl Fn(usize) -> Option<Tls>,
    workers: usize,
    each: usize,
    host: impl Fn(usize) -> String,
) -> (Vec<DataPlane>, Vec<Member>) {
    let planes: Vec<_> = (0..workers).map(|i| DataPlane::bind("127.0.0.1:0", tls(i)).unwrap()).collect();
    let address = |i: usize| planes[i].address().to_string();
    let members = (0..workers).map(|i| member(i, each, &host(i), &address(i))).collect();
    (planes, members)
}

fn connect_all(planes: &[DataPlane], plan: &Plan) -> Vec<(RankId, Communicators)> {
    std::thread::scope(|scope| {
        let connect = |(plane, member): (&DataPlane, &Member)| plane.connect(plan, &member.worker, &OPTIONS).unwrap();
        let threads: Vec<_> = planes.iter().zip(&plan.members).map(|pair| scope.spawn(move || connect(pair))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    })
}

/// A pipe of one rank a worker: any size.
fn pipe(size: usize, host: impl Fn(usize) -> String) -> Members {
    let (planes, members) = planes(size, 1, host);
    let plan = plan(1, Mesh::new(size, 1, 1, 1).unwrap(), members);
    connect_all(&planes, &plan).into_iter().map(|(_, communicators)| communicators.pipe).collect()
}

mod memory {
    super::contract!(|size| super::pipe(size, |_| "one".into()));
}

mod sockets {
    super::contract!(|size| super::pipe(size, |worker| format!("host {worker}")));
}

mod two_ranks_a_process {
    use super::*;
    contract!(|size: usize| {
        let each = if size.is_multiple_of(2) { 2 } else { 1 };
        let (planes, members) = planes(size / each, each, |_| "one".into());
        let plan = plan(1, Mesh::new(size, 1, 1, 1).unwrap(), members);
        connect_all(&planes, &plan).into_iter().map(|(_, communicators)| communicators.pipe).collect()
    });
}

#[test]
fn every_rank_gets_the_groups_of_its_mesh() {
    // Tensor within a worker, lanes between workers of a host, pipe between hosts.
    let (planes, members) = planes(4, 2, |worker| format!("host {}", worker / 2));
    let plan = plan(3, Mesh::new(2, 2, 2, 4).unwrap(), members);
    let ranks = connect_all(&planes, &plan);
    let threads: Vec<_> = ranks
        .into_iter()
        .map(|(rank, mut communicators)| {
            let mesh = plan.mesh;
            std::thread::spawn(move || {
                let mine = rank.0.to_le_bytes();
                let mut all = Vec::new();
                let mut check = |communicator: &mut dyn Collective, expected: Vec<RankId>| {
                    communicator.gather(&mine, &mut all).unwrap();
                    assert_eq!(all, expected.iter().map(|r| r.0.to_le_bytes().to_vec()).collect::<Vec<_>>());
                    assert_eq!(expected[communicator.rank()], rank);
                };
                check(&mut *communicators.tensor, mesh.tensor_group(rank));
                check(&mut *communicators.lane, mesh.lane_group(rank));
                check(&mut *communicators.pipe, mesh.pipe_group(rank));
                communicators
            })
        })
        .collect();
    assert_eq!(threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>().len(), 8);
}

#[test]
fn a_peer_that_never_comes_is_a_timeout_with_its_name() {
    for host in ["one", "other"] {
        let (planes, mut members) = planes(2, 1, |_| "one".into());
        members[1].host = host.into();
        let plan = plan(7, Mesh::new(1, 1, 2, 1).unwrap(), members);
        let options = Options { deadline: Duration::from_millis(80), checked: false };
        for (plane, worker, peer) in [(&planes[0], "w0", "w1"), (&planes[1], "w1", "w0")] {
            let fault = plane.connect(&plan, &WorkerId(worker.into()), &options).err().unwrap();
            assert_eq!(fault.kind, FaultKind::Timeout, "{fault}");
            assert!(fault.text.contains(peer) && fault.text.contains("epoch 7"), "{fault}");
        }
    }
}

#[test]
fn a_worker_may_try_again_after_a_timeout() {
    for host in ["one", "other"] {
        let (planes, mut members) = planes(2, 1, |_| "one".into());
        members[1].host = host.into();
        let plan = plan(7, Mesh::new(1, 1, 2, 1).unwrap(), members);
        let options = Options { deadline: Duration::from_millis(50), checked: true };
        assert!(planes[1].connect(&plan, &WorkerId("w1".into()), &options).is_err());
        assert_eq!(connect_all(&planes, &plan).len(), 2);
    }
}

#[test]
fn an_older_epoch_is_refused() {
    let (planes, members) = planes(2, 1, |worker| format!("host {worker}"));
    planes[0].abort_all(Epoch(4));
    let plan = plan(4, Mesh::new(1, 1, 2, 1).unwrap(), members);
    for (plane, worker) in [(&planes[1], "w1"), (&planes[0], "w0")] {
        let fault = plane.connect(&plan, &WorkerId(worker.into()), &OPTIONS).err().unwrap();
        assert_eq!(fault.kind, FaultKind::StaleEpoch, "{fault}");
    }
}

#[test]
fn workers_of_different_plans_do_not_join() {
    let (planes, members) = planes(2, 1, |worker| format!("host {worker}"));
    let mesh = Mesh::new(1, 1, 2, 1).unwrap();
    let first = plan(4, mesh, members.clone());
    let second = Plan { dtype: Dtype::Bf16, ..plan(4, mesh, members) };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| planes[1].connect(&second, &WorkerId("w1".into()), &OPTIONS).err().unwrap());
        let fault = planes[0].connect(&first, &WorkerId("w0".into()), &OPTIONS).err().unwrap();
        assert_eq!((fault.kind, other.join().unwrap().kind), (FaultKind::Incompatible, FaultKind::Incompatible));
    });
}

#[test]
fn an_abort_ends_a_connect_under_way_and_what_was_built() {
    let (planes, members) = planes(2, 1, |worker| format!("host {worker}"));
    let mesh = Mesh::new(1, 1, 2, 1).unwrap();
    let built = plan(1, mesh, members.clone());
    let mut ranks = connect_all(&planes, &built);
    std::thread::scope(|scope| {
        let next = plan(2, mesh, members);
        let waiting = scope.spawn({
            let planes = &planes;
            move || planes[0].connect(&next, &WorkerId("w0".into()), &OPTIONS).err().unwrap()
        });
        planes[0].abort_all(Epoch(2));
        assert_eq!(waiting.join().unwrap().kind, FaultKind::StaleEpoch);
    });
    for (_, communicators) in &mut ranks {
        assert!(communicators.tensor.sum(&mut [1.0]).is_err());
    }
}

#[test]
fn garbage_is_closed_and_does_not_keep_others_out() {
    let (planes, members) = planes(2, 1, |worker| format!("host {worker}"));
    let dial = || TcpStream::connect(planes[0].address()).unwrap();
    let idle: Vec<_> = (0..STRANGERS_MAX + 40).map(|_| dial()).collect();
    let mut stranger = dial();
    stranger.write_all(&[b'G'; 64]).unwrap();
    assert_eq!(stranger.read(&mut [0; 8]).unwrap_or(0), 0, "closed without a word");
    let mut newer = [0u8; 64];
    newer[..8].copy_from_slice(b"conclave");
    newer[8] = 99;
    let mut stranger = dial();
    stranger.write_all(&newer).unwrap();
    let mut answer = [0; 1];
    stranger.read_exact(&mut answer).unwrap();
    assert_eq!(Answer::decode(answer[0]), Some(Answer::OtherWire));
    assert_eq!(planes[0].refused().count(Reason::OtherWire), 1);
    assert!(planes[0].refused().count(Reason::Stranger) > 40, "those that made room, and the one of another kind");
    let plan = plan(1, Mesh::new(1, 1, 2, 1).unwrap(), members);
    assert_eq!(connect_all(&planes, &plan).len(), 2);
    drop(idle);
}

// Real processes: the test binary starts itself, told by an environment variable to be one worker.

const ROLE: &str = "CONCLAVE_TEST_WORKER";

/// A line of the test's own among those of the test runner.
const MARK: &str = "@ ";

struct Process {
    child: Child,
    lines: Receiver<String>,
}

impl Process {
    fn start() -> Process {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["collective::connect::tests::worker_process", "--exact", "--nocapture", "--test-threads=1"])
            .env(ROLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if let Some((_, line)) = line.split_once(MARK) {
                    let _ = sender.send(line.to_owned());
                }
            }
        });
        Process { child, lines }
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(Duration::from_secs(30)).expect("a process says its next line")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts worker processes on hosts of these names, one rank each, and tells them of each other.
fn start(hosts: &[&str]) -> Vec<Process> {
    let mut processes: Vec<_> = hosts.iter().map(|_| Process::start()).collect();
    let addresses: Vec<_> = processes.iter().map(Process::line).collect();
    for (i, process) in processes.iter_mut().enumerate() {
        let mut text = format!("{i}");
        hosts.iter().zip(&addresses).for_each(|(host, address)| text += &format!(" {host} {address}"));
        writeln!(process.child.stdin.take().unwrap(), "{text}").unwrap();
    }
    processes
}

/// Not a test of its own: what a worker process does. Sums for ever, until a fault, and says which.
#[test]
fn worker_process() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let plane = DataPlane::bind("127.0.0.1:0", None).unwrap();
    println!("\n{MARK}{}", plane.address());
    let mut text = String::new();
    std::io::stdin().read_line(&mut text).unwrap();
    let words: Vec<&str> = text.split_whitespace().collect();
    let rank: usize = words[0].parse().unwrap();
    let members: Vec<_> = words[1..].chunks(2).enumerate().map(|(i, pair)| member(i, 1, pair[0], pair[1])).collect();
    let size = members.len();
    let plan = plan(5, Mesh::new(1, 1, size, 1).unwrap(), members);
    let ranks = plane.connect(&plan, &WorkerId(format!("w{rank}")), &OPTIONS).unwrap();
    let mut tensor = ranks.into_iter().next().unwrap().1.tensor;
    let inputs: Vec<Vec<f32>> =
        (0..size).map(|r| (0..50_000).map(|i| 1.0 / (i + r * 7 + 1) as f32).collect()).collect();
    let mut expected = vec![0.0; 50_000];
    tree::add(&inputs.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut expected);
    let mut turns = 0;
    let fault = loop {
        let mut values = inputs[rank].clone();
        if let Err(fault) = tensor.sum(&mut values) {
            break fault;
        }
        assert!(values == expected);
        turns += 1;
        if turns == 20 {
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            println!("{MARK}summed over {}", if maps.contains("memfd:conclave") { "memory" } else { "sockets" });
        }
    };
    println!("{MARK}{:?}: {}", fault.kind, fault.text);
}

fn leftovers() -> Vec<String> {
    let Ok(entries) = std::fs::read_dir("/dev/shm") else { return Vec::new() };
    let names = entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.contains("conclave")).collect()
}

fn kill_one(hosts: &[&str], victim: usize, transport: &str) {
    let mut processes = start(hosts);
    for process in &processes {
        assert_eq!(process.line(), format!("summed over {transport}"));
    }
    let killed = Instant::now();
    processes[victim].child.kill().unwrap();
    for (i, process) in processes.iter().enumerate().filter(|(i, _)| *i != victim) {
        let line = process.line();
        assert!(line.starts_with("RankLost") || line.starts_with("Aborted"), "worker {i}: {line}");
    }
    let took = killed.elapsed();
    println!("{} processes over {transport}: noticed in {took:?}", hosts.len());
    assert!(took < Duration::from_secs(1), "noticed after {took:?}");
    drop(processes);
    assert_eq!(leftovers(), Vec::<String>::new());
}

#[test]
fn a_killed_process_fails_the_others_of_its_host_at_once() {
    for victim in [0, 1, 3] {
        kill_one(&["one"; 4], victim, "memory");
    }
}

#[test]
fn a_killed_process_fails_the_other_hosts_at_once() {
    for victim in [0, 3] {
        kill_one(&["one", "one", "two", "three"], victim, "sockets");
    }
}
