//! The contract that every collective is held to. A transport's test module says `contract!(make)`, where `make(size)`
//! gives the members of a new communicator.

use super::{Collective, tree};
use model::fault::{Fault, FaultKind};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

/// The members of one communicator.
pub type Members = Vec<Box<dyn Collective>>;

/// Longer than anything here takes on a busy machine: passing it means a hang.
const HANG: Duration = Duration::from_secs(60);

/// Runs `body` for each member in a thread of its own; results in rank order. A member that hangs fails the test.
pub fn each<T: Send + 'static>(
    members: Members,
    body: impl Fn(Box<dyn Collective>) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let body = Arc::new(body);
    let receivers: Vec<_> = members
        .into_iter()
        .map(|member| {
            let (body, (sender, receiver)) = (body.clone(), channel());
            std::thread::spawn(move || sender.send(body(member)));
            receiver
        })
        .collect();
    let result = |(rank, receiver): (usize, std::sync::mpsc::Receiver<T>)| {
        receiver.recv_timeout(HANG).unwrap_or_else(|error| panic!("rank {rank} gave no result: {error}"))
    };
    receivers.into_iter().enumerate().map(result).collect()
}

/// Numbers whose sum depends on the order.
fn number(rank: usize, index: usize) -> f32 {
    let mut bits =
        (rank as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (index as u64).wrapping_mul(0xd134_2543_de82_ef95);
    bits = (bits ^ (bits >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let scale = [1e-3, 1.0, 1e3, 1e6][(bits & 3) as usize];
    ((bits >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale
}

fn numbers(rank: usize, length: usize) -> Vec<f32> {
    (0..length).map(|index| number(rank, index)).collect()
}

/// Bytes of a message that tell where it comes from, where it goes and which one it is.
fn letter(from: usize, to: usize, which: usize, length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251 + from * 31 + to * 57 + which * 91) as u8).collect()
}

pub fn sums(make: impl Fn(usize) -> Members) {
    for size in [1, 2, 4, 8] {
        let lengths = [0, 1, 3, 255, 4096, 4097, 32768, 32769, 100_003, 1_250_001];
        let results = each(make(size), move |mut member| {
            lengths.map(|length| {
                let mut values = numbers(member.rank(), length);
                member.sum(&mut values).unwrap();
                values
            })
        });
        for (which, length) in lengths.into_iter().enumerate() {
            let inputs: Vec<_> = (0..size).map(|rank| numbers(rank, length)).collect();
            let mut expected = vec![0.0; length];
            tree::add(&inputs.iter().map(Vec::as_slice).collect::<Vec<_>>(), &mut expected);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            for (rank, result) in results.iter().enumerate() {
                assert!(bits(&result[which]) == bits(&expected), "{length} numbers at rank {rank} of {size}");
            }
        }
    }
}

pub fn gathers(make: impl Fn(usize) -> Members) {
    for size in [1, 2, 3, 5, 8] {
        let length = |rank: usize, which: usize| [0, rank, 1000 * rank, 300_000 * (rank % 2), 131_064 + rank][which];
        each(make(size), move |mut member| {
            let mut all = vec![vec![9; 3]; 11];
            for which in 0..5 {
                let mine = letter(member.rank(), 0, which, length(member.rank(), which));
                member.gather(&mine, &mut all).unwrap();
                assert_eq!(all.len(), size);
                for (from, theirs) in all.iter().enumerate() {
                    assert!(*theirs == letter(from, 0, which, length(from, which)), "gather {which} from {from}");
                }
            }
        });
    }
}

pub fn exchanges(make: impl Fn(usize) -> Members) {
    for size in [1, 2, 3, 5, 8] {
        let length = |from: usize, to: usize, which: usize| match which {
            0 => 0,
            1 => from * 10 + to,
            2 => 1 + (from + to) % 3 * 200_000,
            _ => [0, 17][(from + to) % 2],
        };
        each(make(size), move |mut member| {
            let (rank, mut received) = (member.rank(), Vec::new());
            for which in 0..4 {
                let parts: Vec<_> = (0..size).map(|to| letter(rank, to, which, length(rank, to, which))).collect();
                member.exchange(&parts, &mut received).unwrap();
                assert_eq!(received.len(), size);
                for (from, theirs) in received.iter().enumerate() {
                    assert!(
                        *theirs == letter(from, rank, which, length(from, rank, which)),
                        "{from} to {rank}: {which}"
                    );
                }
            }
        });
    }
}

pub fn pipelines(make: impl Fn(usize) -> Members) {
    for size in [2, 3, 5] {
        const IN_FLIGHT: usize = 40;
        each(make(size), move |mut member| {
            let rank = member.rank();
            let length = |which: usize| [0, 1, 4096, 70_000][which % 4];
            let mut bytes = vec![1, 2, 3];
            // The first stage runs ahead; the last one answers it, as sampled tokens travel back.
            for which in 0..IN_FLIGHT {
                if rank > 0 {
                    member.receive(rank - 1, &mut bytes).unwrap();
                    assert!(bytes == letter(0, 0, which, length(which)), "message {which} at {rank}");
                } else {
                    bytes = letter(0, 0, which, length(which));
                }
                if rank + 1 < size {
                    member.send(rank + 1, &bytes).unwrap();
                } else {
                    member.send(0, &which.to_le_bytes()).unwrap();
                }
            }
            for which in 0..if rank == 0 { IN_FLIGHT } else { 0 } {
                member.receive(size - 1, &mut bytes).unwrap();
                assert_eq!(bytes, which.to_le_bytes());
            }
        });
    }
}

pub fn crossing_messages(make: impl Fn(usize) -> Members) {
    // All send 3 MB to all before anyone receives, twice; then collectives go on.
    for size in [2, 4] {
        each(make(size), move |mut member| {
            let rank = member.rank();
            let peers = || (0..size).filter(move |peer| *peer != rank);
            for which in 0..2 {
                peers().for_each(|to| member.send(to, &letter(rank, to, which, 3_000_001)).unwrap());
                let mut ones = [1.0; 9];
                member.sum(&mut ones).unwrap();
                assert_eq!(ones, [size as f32; 9]);
                let mut bytes = Vec::new();
                for from in peers() {
                    member.receive(from, &mut bytes).unwrap();
                    assert!(bytes == letter(from, rank, which, 3_000_001));
                }
            }
        });
    }
}

/// Whoever has sent may turn to other things for as long as it likes: what it sent, `count` messages of `least` bytes and
/// somewhat more, arrives without it.
pub fn sent_messages(make: impl Fn(usize) -> Members, count: usize, least: usize) {
    let (came, all_came) = channel();
    let (came, all_came) = (std::sync::Mutex::new(came), std::sync::Mutex::new(all_came));
    each(make(2), move |mut member| {
        let mut bytes = Vec::new();
        for which in 0..count {
            let length = least + which * 7_777;
            if member.rank() == 0 {
                member.send(1, &letter(0, 1, which, length)).unwrap();
                all_came.lock().unwrap().recv_timeout(HANG).unwrap();
            } else {
                member.receive(0, &mut bytes).unwrap();
                assert!(bytes == letter(0, 1, which, length), "message {which}");
                came.lock().unwrap().send(()).unwrap();
            }
        }
    });
}

pub fn small_operations(make: impl Fn(usize) -> Members) {
    for (size, turns) in [(2, 3000), (4, 500), (8, 100)] {
        each(make(size), move |mut member| {
            let (rank, mut all) = (member.rank(), Vec::new());
            for turn in 0..turns {
                let mut values = [rank as f32, turn as f32];
                member.sum(&mut values).unwrap();
                assert_eq!(values, [(size * (size - 1) / 2) as f32, (turn * size) as f32]);
                member.gather(&[rank as u8, turn as u8], &mut all).unwrap();
                assert_eq!(all[size - 1], [(size - 1) as u8, turn as u8]);
                member.send((rank + 1) % size, &[turn as u8]).unwrap();
                member.receive((rank + size - 1) % size, &mut all[0]).unwrap();
                assert_eq!(all[0], [turn as u8]);
            }
        });
    }
}

/// What a member can be stuck in.
const STUCK: [&str; 5] = ["sum", "gather", "exchange", "receive", "send"];

/// Calls `operation`, which waits for rank 0, until it fails.
fn until_fault(member: &mut dyn Collective, operation: &str) -> Fault {
    let size = member.size();
    let (mut list, mut bytes) = (Vec::new(), Vec::new());
    let big = vec![0; 1 << 20];
    loop {
        let result = match operation {
            "sum" => member.sum(&mut [1.0; 100]),
            "gather" => member.gather(b"abc", &mut list),
            "exchange" => member.exchange(&vec![vec![1]; size], &mut list),
            "receive" => member.receive(0, &mut bytes),
            _ => member.send(0, &big),
        };
        if let Err(fault) = result {
            return fault;
        }
    }
}

fn assert_ended(fault: &Fault) {
    assert!(matches!(fault.kind, FaultKind::Aborted | FaultKind::RankLost), "{fault:?}");
    assert!(fault.text.contains("rank"), "{fault}");
}

pub fn aborts(make: impl Fn(usize) -> Members) {
    for operation in STUCK {
        let members = make(4);
        let handle = members[0].abort_handle();
        let (ready, all_ready) = channel();
        let aborter = std::thread::spawn(move || {
            // Everyone is in a call by now or soon: an abort holds for calls to come as well.
            (0..3).for_each(|_| all_ready.recv_timeout(HANG).unwrap());
            handle.abort();
            handle.abort();
        });
        let ready = std::sync::Mutex::new(ready);
        each(members, move |mut member| {
            if member.rank() > 0 {
                let ready = ready.lock().unwrap().clone();
                ready.send(()).unwrap();
                assert_ended(&until_fault(&mut *member, operation));
            } else if operation != "send" {
                // Rank 0 is stuck in a receive that nobody answers.
                assert_ended(&until_fault_receiving(&mut *member));
            }
            if member.rank() > 0 || operation != "send" {
                for later in STUCK {
                    assert_ended(&later_call(&mut *member, later));
                }
            }
            member
        });
        aborter.join().unwrap();
    }
}

fn until_fault_receiving(member: &mut dyn Collective) -> Fault {
    let mut bytes = Vec::new();
    member.receive(1, &mut bytes).unwrap_err()
}

fn later_call(member: &mut dyn Collective, operation: &str) -> Fault {
    let (size, to) = (member.size(), (member.rank() + 1) % member.size());
    let (mut list, mut bytes) = (Vec::new(), Vec::new());
    match operation {
        "sum" => member.sum(&mut [1.0; 100]),
        "gather" => member.gather(b"abc", &mut list),
        "exchange" => member.exchange(&vec![vec![1]; size], &mut list),
        "receive" => member.receive(to, &mut bytes),
        _ => member.send(to, b"abc"),
    }
    .unwrap_err()
}

pub fn losses(make: impl Fn(usize) -> Members) {
    for operation in STUCK {
        for panics in [false, true] {
            each(make(4), move |mut member| {
                if member.rank() == 0 {
                    // A good operation first, so that the others are under way.
                    let panic = move || {
                        let _member = member;
                        assert!(!panics, "this rank dies on purpose");
                    };
                    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(panic));
                } else {
                    assert_ended(&until_fault(&mut *member, operation));
                }
            });
        }
    }
}

/// A rank that only waits for a live one hears of it when that one fails: here 3 waits for 2, 2 for 1, 1 for 0.
pub fn chains_of_losses(make: impl Fn(usize) -> Members) {
    each(make(4), |mut member| {
        if let Some(before) = member.rank().checked_sub(1) {
            let mut bytes = Vec::new();
            assert_ended(&member.receive(before, &mut bytes).unwrap_err());
        }
    });
}

/// Members may leave after their last operation while others are still busy with it.
pub fn peaceful_ends(make: impl Fn(usize) -> Members) {
    for turn in 0..20 {
        each(make(3), move |mut member| {
            let mut all = Vec::new();
            member.gather(&vec![turn; 200_000], &mut all).unwrap();
            if member.rank() == 0 {
                member.send(2, &[turn; 10]).unwrap();
            } else if member.rank() == 2 {
                member.receive(0, &mut all[0]).unwrap();
                assert_eq!(all[0], [turn; 10]);
            }
        });
    }
}

macro_rules! contract {
    ($make:expr) => {
        #[test]
        fn sums_are_the_balanced_tree_bit_for_bit() {
            $crate::collective::suite::sums($make);
        }

        #[test]
        fn gathers_bring_every_length_in_rank_order() {
            $crate::collective::suite::gathers($make);
        }

        #[test]
        fn exchanges_deliver_each_part_to_its_member() {
            $crate::collective::suite::exchanges($make);
        }

        #[test]
        fn messages_keep_their_order_in_a_pipeline() {
            $crate::collective::suite::pipelines($make);
        }

        #[test]
        fn large_messages_may_cross() {
            $crate::collective::suite::crossing_messages($make);
        }

        #[test]
        fn what_was_sent_arrives_while_its_sender_does_other_things() {
            $crate::collective::suite::sent_messages($make, 40, 2_000_000);
        }

        #[test]
        fn many_small_operations_run_back_to_back() {
            $crate::collective::suite::small_operations($make);
        }

        #[test]
        fn an_abort_ends_every_call_on_every_member() {
            $crate::collective::suite::aborts($make);
        }

        #[test]
        fn a_lost_member_fails_the_others() {
            $crate::collective::suite::losses($make);
            $crate::collective::suite::chains_of_losses($make);
        }

        #[test]
        fn members_may_leave_after_their_last_operation() {
            $crate::collective::suite::peaceful_ends($make);
        }
    };
}
pub(super) use contract;
