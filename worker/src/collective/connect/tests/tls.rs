//! The same data plane under TLS: who comes in, who does not and hears why, and certificates that are renewed.

use super::*;
use crate::collective::authority::Says;
use crate::collective::hello::HELLO;
use proto::tls::COORDINATOR_NAME;
use rcgen::ExtendedKeyUsagePurpose::ClientAuth;
use std::io::Read;
use std::net::{Shutdown, TcpListener};

/// A pipe of one rank a worker, all of one authority.
fn pipe(size: usize, host: impl Fn(usize) -> String) -> Members {
    let authority = Authority::new();
    let (planes, members) = planes_with(|i| Some(authority.sign(&format!("w{i}"), &Says::default())), size, 1, host);
    let plan = plan(1, Mesh::new(size, 1, 1, 1).unwrap(), members);
    connect_all(&planes, &plan).into_iter().map(|(_, communicators)| communicators.pipe).collect()
}

mod memory {
    use super::*;
    contract!(|size| super::pipe(size, |_| "one".into()));
}

mod sockets {
    use super::*;
    contract!(|size| super::pipe(size, |worker| format!("host {worker}")));
}

fn two(epoch: u64, members: &[Member]) -> Plan {
    plan(epoch, Mesh::new(1, 1, 2, 1).unwrap(), members.to_vec())
}

/// Lets worker 1 dial worker 0, which ends as soon as worker 1 has its fault: that fault, and what worker 0 said of it.
fn refusal(tls: [Option<Tls>; 2], host: &str) -> (Fault, String, u64) {
    let (planes, mut members) = planes_with(|i| tls[i].clone(), 2, 1, |_| "one".into());
    members[1].host = host.into();
    let plan = two(1, &members);
    let fault = std::thread::scope(|scope| {
        let listener = scope.spawn(|| planes[0].connect(&plan, &WorkerId("w0".into()), &OPTIONS).err().unwrap());
        let fault = planes[1].connect(&plan, &WorkerId("w1".into()), &OPTIONS).err().unwrap();
        // The door hears of a dialler's refusal only after it.
        let deadline = Instant::now() + OPTIONS.deadline;
        while planes[0].refused().count(Reason::Certificate) + planes[0].refused().count(Reason::Stranger) == 0 {
            assert!(Instant::now() < deadline, "worker 0 noticed nothing of: {fault}");
            std::thread::yield_now();
        }
        planes[0].abort_all(Epoch(1));
        assert_eq!(listener.join().unwrap().kind, FaultKind::StaleEpoch);
        fault
    });
    let refused = planes[0].refused();
    (fault, refused.last(), refused.count(Reason::Certificate))
}

#[test]
fn a_certificate_that_is_wrong_is_refused_by_either_end_with_its_reason() {
    let (ours, other) = (Authority::new(), Authority::new());
    let says = Says::default;
    let stranger = Tls { ca: ours.worker().ca, ..other.worker() };
    let expired = ours.sign("expired", &Says { valid: Err(Duration::from_secs(600)), ..says() });
    let coordinator = ours.sign("coordinator", &Says { name: COORDINATOR_NAME, ..says() });
    for (wrong, shown, told) in [
        (&stranger, "shows a certificate of another authority", "it is of another authority"),
        (&expired, "shows a certificate that has expired 6", "it has expired"),
        (
            &coordinator,
            "shows a certificate for coordinator.conclave instead of worker.conclave",
            "it is not for worker.conclave",
        ),
    ] {
        for host in ["one", "other"] {
            let (fault, said, count) = refusal([Some(ours.worker()), Some(wrong.clone())], host);
            assert_eq!((fault.kind, count), (FaultKind::Incompatible, 1), "{fault}; {said}");
            assert!(said.contains(shown) && said.contains("127.0.0.1"), "the listener: {said}");
            assert!(fault.text.contains(told) && fault.text.contains("worker w0"), "the dialler: {fault}");
            let (fault, said, count) = refusal([Some(wrong.clone()), Some(ours.worker())], host);
            assert_eq!((fault.kind, count), (FaultKind::Incompatible, 1), "{fault}; {said}");
            assert!(fault.text.contains(shown) && fault.text.contains("worker w0"), "the dialler: {fault}");
            assert!(said.contains(told), "the listener: {said}");
        }
    }
    // What serves must be allowed to.
    let client = ours.sign("client", &Says { uses: vec![ClientAuth], ..says() });
    let (fault, said, _) = refusal([Some(client), Some(ours.worker())], "other");
    assert!(fault.text.contains("may not be used by clients and servers both"), "{fault}");
    assert!(said.contains("it may not be used by clients and servers both"), "{said}");
}

#[test]
fn nobody_is_spoken_to_in_the_clear() {
    let ours = Authority::new();
    let (fault, said, count) = refusal([Some(ours.worker()), None], "other");
    assert!(said.contains("does not speak TLS") && count == 1, "{said}");
    assert!(fault.text.contains("worker w0"), "{fault}");
    let (fault, _, count) = refusal([None, Some(ours.worker())], "other");
    assert!(fault.text.contains("worker w0") && count == 0, "{fault}");
}

/// Set aside is whoever is incompatible, so that what a network did to a handshake must not look like it.
#[test]
fn a_bit_that_is_flipped_in_a_handshake_is_no_certificate_s_fault() {
    let ours = Authority::new();
    // Of the first words of either end, which cross in the clear and within the first answer.
    for at in [0, 1, 5, 6, 9, 40, 80, 200, 600] {
        let (planes, mut members) = planes_with(|_| Some(ours.worker()), 2, 1, |worker| format!("host {worker}"));
        let flips = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = planes[0].address();
        members[0].data_address = flips.local_addr().unwrap().to_string();
        let plan = two(1, &members);
        let options = Options { deadline: Duration::from_millis(500), checked: false };
        let faults = std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut near, mut far) = (flips.accept().unwrap().0, TcpStream::connect(target).unwrap());
                let (mut back, mut forth) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                scope.spawn(move || std::io::copy(&mut back, &mut forth).map(|_| forth.shutdown(Shutdown::Both)));
                let mut bytes = vec![0; 16 << 10];
                let mut passed = 0;
                while let Ok(count @ 1..) = near.read(&mut bytes) {
                    if (passed..passed + count).contains(&at) {
                        bytes[at - passed] ^= 0x10;
                    }
                    passed += count;
                    if far.write_all(&bytes[..count]).is_err() {
                        break;
                    }
                }
                let _ = (near.shutdown(Shutdown::Both), far.shutdown(Shutdown::Both));
            });
            let connect = |i: usize| planes[i].connect(&plan, &WorkerId(format!("w{i}")), &options).err();
            let listener = scope.spawn(move || connect(0));
            let dialler = connect(1);
            [dialler, listener.join().unwrap()]
        });
        for fault in faults.into_iter().flatten() {
            assert_ne!(fault.kind, FaultKind::Incompatible, "a bit of byte {at}: {fault}");
        }
    }
}

#[test]
fn strangers_do_not_keep_others_out() {
    let ours = Authority::new();
    let (planes, members) = planes_with(|_| Some(ours.worker()), 2, 1, |worker| format!("host {worker}"));
    let dial = || TcpStream::connect(planes[0].address()).unwrap();
    let idle: Vec<_> = (0..STRANGERS_MAX + 40).map(|_| dial()).collect();
    // The head of a handshake that never goes on; noise; a hello in the clear.
    let mut half = dial();
    half.write_all(&[22, 3, 1, 2, 0, 1]).unwrap();
    let communicator = CommunicatorId { kind: Kind::Tensor, first: 0 };
    let key = Key { epoch: Epoch(1), communicator, purpose: Purpose::Pair, from: 1, to: 0 };
    let clear = Hello { key, plan: fingerprint(&two(1, &members)) }.encode();
    for said in [[b'G'; HELLO], clear] {
        let mut stranger = dial();
        stranger.write_all(&said).unwrap();
        let mut answer = Vec::new();
        let _ = stranger.read_to_end(&mut answer);
        // An alert of TLS, and no answer to a hello.
        assert!(answer.first().is_none_or(|byte| *byte == 21), "{answer:?}");
    }
    assert_eq!(connect_all(&planes, &two(1, &members)).len(), 2);
    assert_eq!(planes[0].refused().count(Reason::Certificate), 2);
    drop((idle, half));
}

#[test]
fn an_abort_ends_a_handshake_that_nobody_answers() {
    let ours = Authority::new();
    let (planes, mut members) = planes_with(|_| Some(ours.worker()), 2, 1, |worker| format!("host {worker}"));
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    members[0].data_address = silent.local_addr().unwrap().to_string();
    let options = Options { deadline: Duration::from_secs(3600), checked: false };
    std::thread::scope(|scope| {
        let waiting =
            scope.spawn(|| planes[1].connect(&two(1, &members), &WorkerId("w1".into()), &options).err().unwrap());
        let held = silent.accept().unwrap();
        planes[1].abort_all(Epoch(1));
        assert_eq!(waiting.join().unwrap().kind, FaultKind::StaleEpoch);
        drop(held);
    });
    let options = Options { deadline: Duration::from_millis(80), checked: false };
    let fault = planes[1].connect(&two(2, &members), &WorkerId("w1".into()), &options).err().unwrap();
    assert!(fault.kind == FaultKind::Timeout && fault.text.contains("worker w0"), "{fault}");
}

#[test]
fn each_epoch_reads_the_certificates_anew() {
    let (ours, next) = (Authority::new(), Authority::new());
    let worker = ours.worker();
    let (planes, members) = planes_with(|_| Some(worker.clone()), 2, 1, |worker| format!("host {worker}"));
    assert_eq!(connect_all(&planes, &two(1, &members)).len(), 2);
    // Everything is renewed, authority and all: who still held what was read before would be refused.
    let renewed = next.worker();
    for (from, to) in [(&renewed.ca, &worker.ca), (&renewed.certificate, &worker.certificate)] {
        std::fs::copy(from, to).unwrap();
    }
    // Half a renewal, a key of another certificate, is no reason to stop.
    assert_eq!(connect_all(&planes, &two(2, &members)).len(), 2);
    std::fs::copy(&renewed.key, &worker.key).unwrap();
    assert_eq!(connect_all(&planes, &two(3, &members)).len(), 2);
    // An outsider who has only the new authority's certificates comes in now.
    let (outsider, _) = planes_with(|_| Some(renewed.clone()), 1, 1, |_| "other".into());
    let mut members = members;
    members[1].data_address = outsider[0].address().to_string();
    let planes = [planes.into_iter().next().unwrap(), outsider.into_iter().next().unwrap()];
    assert_eq!(connect_all(&planes, &two(4, &members)).len(), 2);
}
