//! Collectives of devices, a process each rank: NCCL's member and its host-staged twin keep one contract, and whatever happens to one
//! rank is a clear fault on all others within a deadline. The driver and the library are fake (`tests/cuda`).

#![allow(clippy::unwrap_used)] // all of this file is a test

use conclave_tests::gpp::{Stack, case};
use conclave_tests::ranks::{Ended, Seat, run};
use model::fault::{Fault, FaultKind};
use model::plan::KernelFamily;
use model::quant::Dtype;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use worker::backend::cuda::{CudaBackend, CudaConfig, Device};
use worker::backend::{Backend, Kind};
use worker::collective::device::{Address, DeviceCollective, Devices};
use worker::collective::nccl::{CudaQueue, DeviceMemory, Library, Nccl, Options};
use worker::collective::staged::Staged;
use worker::collective::timed::Stopwatch;
use worker::collective::{Collective, local};
use worker::engine::batch::Batch;
use worker::engine::comm::{self, Communicators};
use worker::engine::pass::{Pass, Pool};

/// Of each rank's device.
const ROOM: usize = 4 << 20;
/// A collective may last so long where one stands still, and connecting where one never comes: longer than a crowded machine lets a
/// rank wait for its turn.
const STALL: Duration = Duration::from_secs(5);
/// The same where neither shall be why a rank fails.
const NEVER: Duration = Duration::from_secs(600);
/// All that a rank waits for is over by then.
const LATE: Duration = Duration::from_secs(60);

fn stack() -> Option<&'static Stack> {
    static STACK: OnceLock<Option<Stack>> = OnceLock::new();
    let build =
        || Stack::build(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("fake-cuda"), "collectives of devices").unwrap();
    STACK.get_or_init(build).as_ref()
}

/// A member with some memory of its device.
struct Rank {
    member: Box<dyn DeviceCollective>,
    at: Address,
    _memory: DeviceMemory,
    /// Others may still need it to connect.
    _host: Option<Seat>,
}

impl Rank {
    fn nccl(mut seat: Seat, options: &Options) -> Result<Rank, Fault> {
        let queue = CudaQueue::open(seat.rank)?;
        let memory = DeviceMemory::new(&queue, ROOM)?;
        let member = Box::new(Nccl::connect(&Library::open()?, &mut seat.host, queue, options)?);
        Ok(Rank { member, at: memory.at, _memory: memory, _host: Some(seat) })
    }

    /// All ranks on one device.
    fn staged(seat: Seat) -> Result<Rank, Fault> {
        let queue = CudaQueue::open(0)?;
        let memory = DeviceMemory::new(&queue, ROOM)?;
        Ok(Rank { member: Box::new(Staged::new(seat.host, queue)), at: memory.at, _memory: memory, _host: None })
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        let to = self.at + offset as Address;
        let queue = self.member.queue();
        queue.staging(bytes.len()).unwrap()[..bytes.len()].copy_from_slice(bytes);
        queue.store(0, to, bytes.len()).unwrap();
    }

    fn get(&mut self, offset: usize, bytes: usize) -> Vec<u8> {
        self.member.settle().unwrap();
        let from = self.at + offset as Address;
        let queue = self.member.queue();
        queue.staging(bytes).unwrap();
        queue.fetch(from, 0, bytes).unwrap();
        queue.staging(bytes).unwrap()[..bytes].to_vec()
    }

    fn put_numbers(&mut self, numbers: &[f32]) {
        self.put(0, &numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<_>>());
    }

    fn get_numbers(&mut self, count: usize) -> Vec<f32> {
        let bytes = self.get(0, count * 4);
        bytes.chunks_exact(4).map(|n| f32::from_le_bytes(n.try_into().unwrap())).collect()
    }

    fn sum(&mut self) -> Result<(), Fault> {
        self.member.sum(self.at, 1000)?;
        self.member.settle()
    }
}

/// Bytes of a message that tell where it comes from, where it goes and which one it is.
fn letter(from: usize, to: usize, which: usize, length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251 + from * 31 + to * 57 + which * 91) as u8).collect()
}

fn contract(mut rank: Rank) {
    let (me, size) = (rank.member.rank(), rank.member.size());
    for length in [1, 3, 255, 4097, 100_003] {
        let value = |rank: usize, i: usize| ((rank + 1) * (i % 100)) as f32;
        rank.put_numbers(&(0..length).map(|i| value(me, i)).collect::<Vec<_>>());
        rank.member.sum(rank.at, length).unwrap();
        let expected: Vec<f32> = (0..length).map(|i| (0..size).map(|r| value(r, i)).sum()).collect();
        assert!(rank.get_numbers(length) == expected, "{length} numbers");
    }
    // Numbers whose sum depends on the order: whatever it is, it is the same for all.
    let odd = |i: usize| [1e8f32, 1.0, -1e8, 0.1][(i * 7 + me * 5) % 4] * (i + me + 1) as f32;
    rank.put_numbers(&(0..500).map(odd).collect::<Vec<_>>());
    rank.member.sum(rank.at, 500).unwrap();
    rank.member.gather(rank.at, 2000, rank.at + 4096).unwrap();
    let all = rank.get(4096, 2000 * size);
    assert!(all.chunks(2000).all(|theirs| *theirs == all[..2000]), "members have different sums");
    // Many, put on the queue ahead of it: a power of two of ones grows to a power of it.
    rank.put_numbers(&[1.0; 64]);
    (0..30).for_each(|_| rank.member.sum(rank.at, 64).unwrap());
    assert_eq!(rank.get_numbers(64), [(size as f32).powi(30); 64]);
    for (which, length) in [4, 1000, 200_001].into_iter().enumerate() {
        rank.put(0, &letter(me, 0, which, length));
        rank.member.gather(rank.at, length, rank.at + (1 << 20)).unwrap();
        let expected: Vec<u8> = (0..size).flat_map(|from| letter(from, 0, which, length)).collect();
        assert!(rank.get(1 << 20, length * size) == expected, "{length} bytes of each");
    }
    exchanges(&mut rank);
    // A pipeline whose last stage answers the first.
    for which in 0..if size > 1 { 20 } else { 0 } {
        let length = [1, 4096, 70_000][which % 3];
        if me == 0 {
            rank.put(0, &letter(0, 0, which, length));
        } else {
            rank.member.receive(me - 1, rank.at, length).unwrap();
        }
        rank.member.send((me + 1) % size, rank.at, length).unwrap();
        if me == 0 {
            rank.member.receive(size - 1, rank.at + (1 << 20), length).unwrap();
            assert!(rank.get(1 << 20, length) == letter(0, 0, which, length), "message {which}");
        }
    }
    rank.member.settle().unwrap();
}

fn exchanges(rank: &mut Rank) {
    let (me, size) = (rank.member.rank(), rank.member.size());
    for which in 0..3 {
        let length = |from: usize, to: usize| match which {
            0 => 0,
            1 => (from * 7 + to * 3) % 5 * 20_001,
            _ => [0, 17][(from + to) % 2],
        };
        let ranges = |length: &dyn Fn(usize) -> usize| -> Vec<Range<usize>> {
            let mut end = 0;
            let mut next = |bytes: usize| {
                // A gap before each.
                end += 3 + bytes;
                end - bytes..end
            };
            (0..size).map(|r| next(length(r))).collect()
        };
        let (sent, received) = (ranges(&|to| length(me, to)), ranges(&|from| length(from, me)));
        for (to, range) in sent.iter().enumerate() {
            rank.put(range.start, &letter(me, to, which, range.len()));
        }
        let into = 2 << 20;
        rank.member.exchange(rank.at, &sent, rank.at + into, &received).unwrap();
        for (from, range) in received.iter().enumerate() {
            let got = rank.get(into as usize + range.start, range.len());
            assert!(got == letter(from, me, which, range.len()), "exchange {which}: {from} to {me}");
        }
    }
}

const GPUS: (&str, &str) = ("FAKE_CUDA_DEVICES", "8");

fn plain(_: usize) -> Vec<(&'static str, String)> {
    vec![(GPUS.0, GPUS.1.into())]
}

#[test]
fn nccl_and_its_twin_keep_one_contract() {
    const SELF: &str = "nccl_and_its_twin_keep_one_contract";
    match case().as_deref() {
        Some("nccl") => contract(Rank::nccl(Seat::take().unwrap(), &Options::default()).unwrap()),
        Some(_) => contract(Rank::staged(Seat::take().unwrap()).unwrap()),
        None => {
            let Some(stack) = stack() else { return };
            for size in [1, 2, 4, 8] {
                for case in ["nccl", "staged"] {
                    for ended in run(stack, (SELF, case), size, &plain, &[]).unwrap() {
                        assert!(ended.code == Some(0), "{case} {size}: {}", ended.said);
                    }
                }
            }
        }
    }
}

/// An engine's sums over the devices of all ranks and of the first or the last half of them, in one piece and in slices.
fn sums() {
    let mut seat = Seat::take().unwrap();
    let (me, size) = (seat.rank, seat.size);
    let device = Device::open(me, Some(256 << 20)).unwrap();
    let mut backend =
        CudaBackend::new(device.clone(), &CudaConfig { dtype: Dtype::F32, family: KernelFamily::Vector, threads: 1 })
            .unwrap();
    let options = Options { stall: NEVER, ..Options::default() };
    let members = Nccl::connect(&Library::open().unwrap(), &mut seat.host, device.queue().unwrap(), &options).unwrap();
    let alone = || Box::new(local::members(1).unwrap().remove(0));
    let devices = Devices { tensor: Some(Box::new(members)), ..Devices::default() };
    let mut communicators = Communicators { tensor: Box::new(seat.host), lane: alone(), pipe: alone(), devices };
    let (mut pool, meta) = (Pool::default(), backend.meta(&Batch::default()).unwrap());
    let value =
        |rank: usize, at: usize| [1e8f32, 1.0, -1e8, 0.1, 3e-5][(at * 7 + rank * 3) % 5] * (at % 91 + rank) as f32;
    let half = size / 2;
    let parts = [0..size, if me < half { 0..half } else { half..size }];
    for (rows, cols) in [(0, 8), (1, 40), (7, 129), (4099, 65), (263, 1024)] {
        for part in &parts {
            let mut buffer = backend.buffer(rows.max(1), cols, Kind::Full).unwrap();
            let mut terms: Vec<Vec<f32>> =
                part.clone().map(|rank| (0..rows * cols).map(|at| value(rank, at)).collect()).collect();
            comm::full(&mut backend, &mut buffer, rows).unwrap().copy_from_slice(&terms[me - part.start]);
            backend.host_done(&mut buffer, rows).unwrap();
            let mut pass = Pass {
                backend: &mut backend,
                communicators: &mut communicators,
                pool: &mut pool,
                meta: &meta,
                rows,
                hidden: cols,
            };
            comm::sum_part(&mut pass, part.clone(), &mut buffer, (rows, cols)).unwrap();
            communicators.devices.settle().unwrap();
            while terms.len() > 1 {
                terms =
                    terms.chunks(2).map(|pair| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect()).collect();
            }
            let got = comm::full(&mut backend, &mut buffer, rows).unwrap();
            let differs = got.iter().zip(&terms[0]).position(|(got, want)| got.to_bits() != want.to_bits());
            assert!(differs.is_none(), "rank {me}, {rows} x {cols} over {part:?}: value {differs:?}");
        }
    }
}

#[test]
fn devices_sum_in_the_canonical_order() {
    const SELF: &str = "devices_sum_in_the_canonical_order";
    if case().is_some() {
        return sums();
    }
    let Some(stack) = stack() else { return };
    for size in [2, 4, 8] {
        for ended in run(stack, (SELF, "sums"), size, &plain, &[]).unwrap() {
            assert!(ended.code == Some(0), "{size}: {}", ended.said);
        }
    }
}

/// What a rank of the tests of faults does, and how it may end.
fn faulty(case: &str) {
    let seat = Seat::take().unwrap();
    let (me, began) = (seat.rank, Instant::now());
    let stopwatch = Arc::<Stopwatch>::default();
    stopwatch.begin();
    let linger = if case.starts_with("shrink") || case == "kept" { NEVER } else { Duration::ZERO };
    let deadline = if ["joins", "absent"].contains(&case) { STALL } else { NEVER };
    let stall = if ["stops", "hangs", "shrink a hung one"].contains(&case) { STALL } else { NEVER };
    let options = Options { deadline, stall, linger, stopwatch: stopwatch.clone(), ..Options::default() };
    let outcome = match (case, me) {
        ("absent", 2) => return,
        ("one gpu", _) => CudaQueue::open(0).and_then(|queue| {
            let mut seat = seat;
            Nccl::connect(&Library::open()?, &mut seat.host, queue, &options).map(|_| ())
        }),
        _ => Rank::nccl(seat, &options).and_then(|rank| goes_on(case, rank)),
    };
    let fault = match outcome {
        Ok(()) => return println!("\nENDED {} {}", stopwatch.read().0, stopwatch.read().1),
        Err(fault) => fault,
    };
    assert!(began.elapsed() < LATE, "{fault} after {:?}", began.elapsed());
    println!("\nFAULT {:?} {}", fault.kind, fault.text);
}

fn goes_on(case: &str, mut rank: Rank) -> Result<(), Fault> {
    let me = rank.member.rank();
    for _ in 0..3 {
        rank.sum()?;
    }
    match (case, me) {
        ("abort", 0) => rank.member.abort_handle().abort(),
        ("leaves", 2) => return Ok(()),
        ("panics", 2) => panic!("this rank panics on purpose"),
        _ => {}
    }
    for _ in 0..10 {
        if case == "blind" {
            // Waits where nobody looks: in the driver. What it gets then is no result.
            rank.member.sum(rank.at, 1000)?;
            let from = rank.at;
            rank.member.queue().staging(4)?;
            rank.member.queue().fetch(from, 0, 4)?;
        }
        if let Err(fault) = rank.sum() {
            if case.starts_with("shrink") {
                println!("\nFIRST {fault}");
                return shrunk(rank);
            }
            let again = rank.member.sum(rank.at, 8).and_then(|()| rank.member.settle());
            assert_eq!(again.unwrap_err(), fault, "the first fault stays");
            return Err(fault);
        }
    }
    Ok(())
}

fn shrunk(rank: Rank) -> Result<(), Fault> {
    let Rank { member, at, _memory, _host } = rank;
    let mut rank = Rank { member: member.shrink(&[2])?, at, _memory, _host };
    assert_eq!(rank.member.size(), 3);
    rank.put_numbers(&[(rank.member.rank() + 1) as f32; 5]);
    rank.member.sum(rank.at, 5)?;
    assert_eq!(rank.get_numbers(5), [6.0; 5]);
    for _ in 0..20 {
        rank.sum()?;
    }
    Ok(())
}

const FAULTS: &str = "what_happens_to_one_rank_is_a_clear_fault_on_all";

/// Runs a case as four ranks of which rank 2 is the odd one: what the others came to.
fn others(case: &str, injected: &str, forgiven: &[usize]) -> Vec<Ended> {
    let settings = |_: usize| vec![(GPUS.0, GPUS.1.into()), ("FAKE_NCCL_FAULT", injected.to_string())];
    let mut ended = run(stack().unwrap(), (FAULTS, case), 4, &settings, forgiven).unwrap();
    ended.remove(2);
    ended
}

/// All have a fault of one of the kinds with one of the texts.
fn all_fail(case: &str, ended: &[Ended], kinds: &[FaultKind], texts: &[&str]) {
    for one in ended {
        let fault = one.after("FAULT ").unwrap_or_else(|| panic!("{case}: no fault: {}", one.said));
        assert!(kinds.iter().any(|kind| fault.starts_with(&format!("{kind:?} "))), "{case}: {fault}");
        assert!(texts.iter().any(|text| fault.contains(text)), "{case}: {fault}");
    }
}

#[test]
fn what_happens_to_one_rank_is_a_clear_fault_on_all() {
    use FaultKind::{Aborted, Incompatible, RankLost, Timeout};
    if let Some(case) = case() {
        return faulty(&case);
    }
    if stack().is_none() {
        return;
    }
    // Kept for a shrink that nobody asks for: whoever drops it waits no longer than otherwise.
    for case in ["dies", "blind", "kept"] {
        all_fail(case, &others(case, "die:2:5", &[2]), &[RankLost, Aborted], &["rank 2 (process "]);
    }
    let behind = ["rank 2 is at work behind call 4", "rank 2 is in call 5", "nccl at rank 2 of 4: putting call 5"];
    // A thread of a process that is to stand still may come a little further.
    let further = [&behind[..], &["rank 2 is at work behind call 5"]].concat();
    all_fail("stops", &others("stops", "stop:2:5", &[2]), &[Timeout, Aborted], &further);
    all_fail("hangs", &others("hangs", "hang:2:5", &[]), &[Timeout, Aborted], &behind);
    all_fail(
        "fails",
        &others("fails", "fail:2:5", &[]),
        &[Aborted],
        &["rank 2 gave up: nccl at rank 2 of 4: ncclAllReduce: ncclInternalError (fake nccl: asked to fail)"],
    );
    let text = ["rank 2 gave up: nccl at rank 2 of 4: asynchronous error: ncclRemoteError"];
    all_fail("errs", &others("errs", "async:2:5", &[]), &[Aborted], &text);
    all_fail("early", &others("early", "early:2:0", &[2]), &[RankLost, Aborted], &["rank 2 (process "]);
    let text = ["connecting is not over after 5.0 s: ", "rank 2 has begun to connect"];
    all_fail("joins", &others("joins", "init:2:0", &[]), &[Timeout, Aborted], &text);
    all_fail("absent", &others("absent", "", &[]), &[Aborted, RankLost], &["rank"]);
    all_fail("leaves", &others("leaves", "", &[]), &[RankLost, Aborted], &["rank 2 has left"]);
    all_fail("panics", &others("panics", "", &[]), &[Aborted], &["nccl at rank 2 of 4: this rank panicked"]);
    all_fail("abort", &others("abort", "", &[]), &[Aborted], &["nccl at rank 0 of 4: aborted"]);
    let text = ["ranks 0 and 1 are on one GPU of host "];
    all_fail("one gpu", &others("one gpu", "", &[]), &[Incompatible], &text);
}

#[test]
fn the_others_shrink_and_go_on() {
    if stack().is_none() {
        return;
    }
    for (case, injected, first) in
        [("shrink", "die:2:5", "rank 2 (process "), ("shrink a hung one", "hang:2:5", "rank 2")]
    {
        for ended in others(case, injected, &[2]) {
            assert!(ended.after("FIRST ").is_some_and(|text| text.contains(first)), "{injected}: {}", ended.said);
            assert!(ended.after("ENDED ").is_some(), "{injected}: {}", ended.said);
        }
    }
}

#[test]
fn a_slow_rank_is_told_apart_though_all_wait_equally_long() {
    let Some(stack) = stack() else { return };
    let settings = |_: usize| vec![(GPUS.0, GPUS.1.into()), ("FAKE_NCCL_FAULT", "slow:1:1".to_string())];
    let ended = run(stack, (FAULTS, "slow"), 2, &settings, &[]).unwrap();
    let read = |ended: &Ended| {
        let text = ended.after("ENDED ").unwrap_or_else(|| panic!("{}", ended.said));
        let (entered, computing) = text.split_once(' ').unwrap();
        (entered.parse::<u64>().unwrap(), computing.trim().parse::<u64>().unwrap())
    };
    let [(_, fast), (_, slow)] = [read(&ended[0]), read(&ended[1])];
    // 13 calls of 50 ms, less what the looks miss. The other waits as long.
    assert!(slow >= 400_000_000 && fast < slow / 2, "{fast} ns against {slow} ns");
}

#[test]
fn what_a_host_lacks_is_one_clear_fault() {
    const SELF: &str = "what_a_host_lacks_is_one_clear_fault";
    let refused = |text: &str| {
        let fault = Library::open().map(|_| ()).unwrap_err();
        assert_eq!((fault.kind, fault.text.as_str()), (FaultKind::Incompatible, text));
    };
    match case().as_deref() {
        Some("missing") => refused("no NCCL (libnccl.so.2, libnccl.so) on this host"),
        Some("old") => refused("NCCL is 2.14.0, 2.18.0 is needed"),
        Some("mixed") => {
            let mut seat = Seat::take().unwrap();
            let queue = CudaQueue::open(seat.rank).unwrap();
            let options = Options::default();
            let fault =
                Nccl::connect(&Library::open().unwrap(), &mut seat.host, queue, &options).map(|_| ()).unwrap_err();
            assert_eq!(fault.text, "rank 0 has NCCL 2.32.3, rank 1 has 2.27.7");
            // Nobody leaves before all have heard it.
            let _ = seat.host.gather(&[], &mut Vec::new());
        }
        Some(other) => panic!("no case {other}"),
        None => {
            let Some(stack) = stack() else { return };
            let here =
                |rank: usize| [("FAKE_NCCL_VERSION", ["23203", "22707"][rank].to_string()), (GPUS.0, GPUS.1.into())];
            let mut ended = run(stack, (SELF, "mixed"), 2, &|rank| here(rank).into(), &[]).unwrap();
            let old = |_: usize| vec![("FAKE_NCCL_VERSION", "21400".to_string())];
            ended.extend(run(stack, (SELF, "old"), 1, &old, &[]).unwrap());
            if Library::open().is_err() {
                let nowhere = |_: usize| vec![("LD_LIBRARY_PATH", "/nowhere".to_string())];
                ended.extend(run(stack, (SELF, "missing"), 1, &nowhere, &[]).unwrap());
            }
            assert!(ended.iter().all(|ended| ended.code == Some(0)), "{ended:?}");
        }
    }
}
