use super::*;
use crate::load::remote::{Lender, Take};
use model::catalog::Role;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// One file whose bytes follow from their places, lent by a thread of this process.
struct Made {
    files: Vec<(String, u64)>,
    reads: AtomicUsize,
    broken: AtomicBool,
}

fn byte(at: u64) -> u8 {
    (at % 251) as u8
}

impl Lender for Made {
    fn files(&self) -> &[(String, u64)] {
        &self.files
    }

    fn read(&self, _: usize, strip: &Strip, take: Take<'_>) -> Result<(), Fault> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        if self.broken.load(Ordering::Relaxed) {
            return Err(Fault::new(FaultKind::RankLost, "all are gone"));
        }
        assert!(strip.bytes().unwrap() <= PART);
        let bytes: Vec<u8> = (0..strip.bytes().unwrap()).map(|at| byte(strip.place(at).start)).collect();
        let (first, rest) = bytes.split_at(bytes.len() / 3);
        take(0, first)?;
        take(first.len() as u64, rest)
    }
}

const EACH: u64 = 3 << 20;

fn id(layer: usize) -> TensorId {
    TensorId { layer: Some(layer), role: Role::Query, expert: None }
}

/// A window a layer, of equal bytes.
fn windows(layers: usize, each: u64) -> (Arc<Made>, Remote, Vec<Wanted>) {
    let files = vec![("weights".to_owned(), layers as u64 * each)];
    let made = Arc::new(Made { files, reads: AtomicUsize::new(0), broken: AtomicBool::new(false) });
    let remote = Remote::new(made.clone(), 0).unwrap();
    let wanted = |layer: usize| {
        let strip = Strip::of(layer as u64 * each..(layer as u64 + 1) * each);
        Wanted { id: id(layer), ahead: true, strips: vec![(remote.clone(), strip)] }
    };
    let all = (0..layers).map(wanted).collect();
    (made, remote, all)
}

fn check(remote: &Remote, layer: usize, each: u64) {
    let from = layer as u64 * each;
    let bytes = &remote.map()[from as usize..(from + each) as usize];
    assert!(bytes.iter().zip(from..).all(|(got, at)| *got == byte(at)), "layer {layer}");
}

#[test]
fn windows_come_in_any_order_whole_and_memory_stays_bounded() {
    let (_, remote, all) = windows(60, EACH);
    let fetch = Fetch::new(all).unwrap();
    let mut most = 0;
    for layer in (0..60).map(|n| if n % 2 == 0 { (n + 1).min(59) } else { n - 1 }) {
        let held = fetch.take(id(layer)).unwrap();
        check(&remote, layer, EACH);
        most = most.max(remote.taken());
        drop(held);
    }
    assert!(most <= AHEAD_BYTES + 3 * EACH, "{most} bytes");
    let again = fetch.take(id(5)).unwrap();
    check(&remote, 5, EACH);
    drop((again, fetch));
    assert_eq!(remote.taken(), 0);
}

#[test]
fn a_window_larger_than_what_may_be_ahead_comes_all_the_same() {
    let (_, remote, mut all) = windows(3, AHEAD_BYTES + 5);
    all[2].ahead = false;
    let fetch = Fetch::new(all).unwrap();
    for layer in 0..3 {
        let _held = fetch.take(id(layer)).unwrap();
        let from = layer as u64 * (AHEAD_BYTES + 5);
        for at in (from..from + AHEAD_BYTES + 5).step_by(4093) {
            assert_eq!(remote.map()[at as usize], byte(at));
        }
    }
}

#[test]
fn what_nobody_asks_for_holds_nothing_up() {
    let (_, remote, all) = windows(80, EACH);
    let fetch = Fetch::new(all).unwrap();
    for layer in (0..80).step_by(7) {
        let _held = fetch.take(id(layer)).unwrap();
        check(&remote, layer, EACH);
    }
    drop(fetch);
    // Windows that were brought and never taken go with the image.
}

#[test]
fn who_waits_hears_why_nothing_comes() {
    let (made, _, all) = windows(60, EACH);
    let fetch = Fetch::new(all).unwrap();
    drop(fetch.take(id(0)).unwrap());
    made.broken.store(true, Ordering::Relaxed);
    let said = (1..60).find_map(|layer| fetch.take(id(layer)).err()).unwrap();
    assert_eq!(said.text, "all are gone");
    assert_eq!(fetch.take(id(59)).err().unwrap().text, "all are gone");
    let other = TensorId { layer: None, role: Role::Head, expert: None };
    assert!(fetch.take(other).err().unwrap().text.contains("nobody was asked for"));
}
