use super::*;
use crate::cluster::pace::Toll;
use model::fault::FaultKind;
use model::mesh::{Mesh, RankId};
use model::plan::{Guesser, KernelFamily, Limits, Member};
use model::quant::Dtype;

/// One rank a worker; refuses when `refuse` is set.
pub(super) struct OneEach {
    pub(super) refuse: bool,
}

impl Planner for OneEach {
    fn plan(&self, epoch: Epoch, members: &[Offer], _: Option<&Plan>) -> Result<Plan, String> {
        if self.refuse {
            return Err("rank 0 needs 2 GiB, has 1 GiB".into());
        }
        let n = members.len();
        Ok(Plan {
            epoch,
            mesh: Mesh::new(n, 1, 1, 1).unwrap(),
            dtype: Dtype::F32,
            family: KernelFamily::Vector,
            stages: (0..n).map(|i| i..i + 1).collect(),
            members: (0..n)
                .map(|i| Member {
                    worker: members[i].worker.clone(),
                    host: String::new(),
                    data_address: String::new(),
                    ranks: vec![RankId(i as u32)],
                    threads: 1,
                })
                .collect(),
            limits: Limits { model_len_max: 1, step_tokens_max: 1, step_sequences_max: 1, blocks: 1 },
            guesser: Guesser::Nobody,
        })
    }
}

pub(super) fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub(super) fn id(n: usize) -> WorkerId {
    WorkerId(format!("w{n}"))
}

fn cluster(workers: usize, settle: Option<Duration>) -> Cluster<OneEach> {
    let rules = Rules { workers, settle, silence: ms(1000), retry: ms(100), grow: ms(500) };
    Cluster::new(rules, OneEach { refuse: false }, Epoch(0))
}

pub(super) fn join<P: Planner>(c: &mut Cluster<P>, now: u64, n: usize) -> Vec<Action> {
    let offer = Offer {
        worker: id(n),
        host: "h".into(),
        data_address: "127.0.0.1:1".into(),
        devices: Vec::new(),
        families: vec![KernelFamily::Vector],
    };
    c.handle(ms(now), Event::Joined { offer })
}

pub(super) fn serve<P: Planner>(c: &mut Cluster<P>, now: u64) -> Vec<Action> {
    let epoch = c.epoch();
    let members = c.plan().expect("a plan").members.clone();
    let mut last = c.handle(ms(now), Event::Committed { epoch });
    for m in members {
        last = c.handle(ms(now), Event::Ready { worker: m.worker, epoch });
    }
    last
}

#[test]
fn it_serves_when_all_are_ready_and_not_before() {
    let mut c = cluster(2, None);
    assert!(join(&mut c, 0, 0).is_empty());
    assert!(matches!(join(&mut c, 1, 1)[..], [Action::Commit { .. }]));
    let loads = c.handle(ms(2), Event::Committed { epoch: Epoch(1) });
    assert!(matches!(loads[..], [Action::Load { .. }, Action::Load { .. }]));
    assert!(c.handle(ms(3), Event::Ready { worker: id(0), epoch: Epoch(1) }).is_empty());
    assert!(!c.reason().is_empty());
    let last = c.handle(ms(4), Event::Ready { worker: id(1), epoch: Epoch(1) });
    assert!(matches!(last[..], [Action::Serve { .. }]));
    assert_eq!(c.reason(), "");
}

fn prepare(c: &mut Cluster<OneEach>, now: u64) -> Vec<Action> {
    let plan = c.reshape.clone().expect("a plan to come").plan;
    let mut last = Vec::new();
    for m in &plan.members {
        last = c.handle(ms(now), Event::Prepared { worker: m.worker.clone(), epoch: plan.epoch });
    }
    last
}

pub(super) fn served_by(n: usize) -> Cluster<OneEach> {
    let mut c = cluster(n, None);
    (0..n).for_each(|i| drop(join(&mut c, 0, i)));
    serve(&mut c, 1);
    assert!(matches!(c.phase(), Phase::Serving(_)));
    c
}

#[test]
fn each_worker_is_told_of_all_others_from_another_one_on() {
    let mut c = cluster(4, None);
    for n in 0..4 {
        let (host, data_address) = ("h".into(), format!("a{n}"));
        let offer = Offer { worker: id(n), host, data_address, devices: Vec::new(), families: Vec::new() };
        c.handle(ms(0), Event::Joined { offer });
    }
    for (n, told) in [(0, ["a1", "a2", "a3"]), (1, ["a2", "a3", "a0"]), (3, ["a0", "a1", "a2"])] {
        assert_eq!(c.lenders(&id(n)), told);
    }
    let fault = Fault::new(FaultKind::Incompatible, "other weights");
    let epoch = c.epoch();
    c.handle(ms(1), Event::Committed { epoch });
    c.handle(ms(2), Event::LoadFailed { worker: id(1), epoch, fault });
    assert_eq!(c.lenders(&id(0)), ["a2", "a3"], "whose weights are others has none to lend");
}

#[test]
fn a_newcomer_is_loaded_before_the_switch() {
    let mut c = served_by(1);
    assert!(join(&mut c, 10, 1).is_empty());
    let actions = c.handle(ms(510), Event::Tick);
    assert!(matches!(&actions[..], [Action::Prepare { .. }, Action::Prepare { .. }]), "{actions:?}");
    assert!(c.handle(ms(511), Event::Tick).is_empty() && c.prepares(&id(1)));
    let actions = prepare(&mut c, 600);
    assert!(matches!(&actions[..], [Action::Commit { plan }] if plan.epoch == Epoch(2)));
    assert!(matches!(c.phase(), Phase::Serving(p) if p.epoch == Epoch(1)), "it serves until the store has taken it");
    let actions = c.handle(ms(601), Event::Committed { epoch: Epoch(2) });
    assert!(matches!(&actions[..], [Action::Halt { epoch: Epoch(1), .. }, Action::Load { .. }, Action::Load { .. }]));
    for n in 0..2 {
        c.handle(ms(602), Event::Ready { worker: id(n), epoch: Epoch(2) });
    }
    assert!(matches!(c.phase(), Phase::Serving(p) if p.mesh.ranks() == 2) && c.reason().is_empty());
}

#[test]
fn a_draining_worker_serves_until_others_do_and_is_then_let_go() {
    let mut c = served_by(2);
    let actions = c.handle(ms(10), Event::Drain { worker: id(1) });
    assert!(matches!(&actions[..], [Action::Prepare { worker, .. }] if *worker == id(0)), "{actions:?}");
    assert!(matches!(&prepare(&mut c, 20)[..], [Action::Commit { .. }]));
    let actions = c.handle(ms(21), Event::Committed { epoch: Epoch(2) });
    assert!(
        matches!(&actions[..], [
        Action::Halt { .. },
        Action::Release { worker: released, .. },
        Action::Load { worker: loads, .. },
    ] if *released == id(1) && *loads == id(0)),
        "{actions:?}"
    );
    assert_eq!(c.lenders(&id(0)).len(), 1, "it may lend its files yet");
    let actions = c.handle(ms(22), Event::Ready { worker: id(0), epoch: Epoch(2) });
    assert!(
        matches!(&actions[..], [Action::Serve { .. }, Action::Dismiss { worker }] if *worker == id(1)),
        "{actions:?}"
    );
    // What a closed stream says afterwards is no death.
    assert!(c.handle(ms(23), Event::Lost { worker: id(1), why: "closed".into() }).is_empty());
}

#[test]
fn a_spare_that_drains_is_let_go_at_once_and_the_last_worker_never() {
    let mut c = served_by(1);
    join(&mut c, 10, 1);
    assert!(matches!(&c.handle(ms(11), Event::Drain { worker: id(1) })[..], [Action::Dismiss { .. }]));
    c.planner.refuse = true;
    assert!(c.handle(ms(12), Event::Drain { worker: id(0) }).is_empty());
    assert!(matches!(c.phase(), Phase::Serving(_)));
    assert!(c.workers()[&id(0)].drain.as_ref().is_some_and(|why| why.contains("2 GiB")));
    c.planner.refuse = false;
    let actions = join(&mut c, 13, 2);
    assert!(matches!(&actions[..], [Action::Prepare { worker, .. }] if *worker == id(2)), "{actions:?}");
}

#[test]
fn a_death_ends_what_was_to_follow() {
    for victim in [0, 1] {
        let mut c = served_by(1);
        join(&mut c, 10, 1);
        c.handle(ms(510), Event::Tick);
        let actions = c.handle(ms(520), Event::Lost { worker: id(victim), why: "closed".into() });
        assert!(c.reshape.is_none());
        assert_eq!(matches!(c.phase(), Phase::Serving(_)), victim == 1, "{actions:?}");
        assert!(c.handle(ms(521), Event::Prepared { worker: id(1 - victim), epoch: Epoch(2) }).is_empty());
    }
}

#[test]
fn a_store_that_refuses_the_next_epoch_leaves_the_old_one_serving() {
    for lost in [true, false] {
        let mut c = served_by(1);
        join(&mut c, 10, 1);
        c.handle(ms(510), Event::Tick);
        prepare(&mut c, 520);
        let event = match lost {
            true => Event::StoreLost { why: "gone".into() },
            false => Event::CommitFailed { found: Epoch(9), why: "at revision 9".into() },
        };
        assert!(c.handle(ms(530), event).is_empty());
        assert!(matches!(c.phase(), Phase::Serving(p) if p.epoch == Epoch(1)));
        let mut actions = c.handle(ms(540), Event::StoreRead { epoch: Epoch(9) });
        actions.extend(c.handle(ms(700), Event::Tick));
        assert!(matches!(&actions[..], [Action::Prepare { plan, .. }, _] if plan.epoch == Epoch(10)));
    }
}

#[test]
fn a_member_that_dropped_its_ranks_is_no_member_though_it_beats() {
    let mut c = served_by(1);
    join(&mut c, 1, 1);
    let beat = |epoch| Beat { epoch: Epoch(epoch), ..Beat::default() };
    assert!(c.handle(ms(2), Event::Beat { worker: id(0), beat: beat(1) }).is_empty());
    assert!(c.handle(ms(3), Event::Beat { worker: id(1), beat: beat(0) }).is_empty(), "a spare has none");
    let actions = c.handle(ms(4), Event::Beat { worker: id(0), beat: beat(0) });
    assert!(
        matches!(&actions[..], [Action::Halt { .. }, Action::Release { .. }, Action::Commit { .. }]),
        "{actions:?}"
    );
    assert!(c.reason().contains("w0 has dropped its ranks"));
}

#[test]
fn the_first_plan_is_above_what_a_worker_has_seen() {
    let mut c = cluster(1, None);
    // The store is new, the worker is not.
    assert!(c.handle(ms(0), Event::Seen { epoch: Epoch(6) }).is_empty());
    assert!(matches!(&join(&mut c, 0, 0)[..], [Action::Commit { plan }] if plan.epoch == Epoch(7)));
}

#[test]
fn a_stale_ready_is_ignored() {
    let mut c = cluster(1, None);
    join(&mut c, 0, 0);
    c.handle(ms(1), Event::Committed { epoch: Epoch(1) });
    assert!(c.handle(ms(2), Event::Ready { worker: id(0), epoch: Epoch(0) }).is_empty());
}

#[test]
fn a_death_halts_releases_the_survivors_and_waits_for_the_newcomer() {
    let mut c = cluster(2, Some(ms(5000)));
    join(&mut c, 0, 0);
    join(&mut c, 0, 1);
    serve(&mut c, 1);
    let actions = c.handle(ms(10), Event::Lost { worker: id(0), why: "closed".into() });
    assert!(matches!(&actions[..], [
        Action::Expel { .. },
        Action::Halt { .. },
        Action::Release { worker, .. },
    ] if *worker == id(1)));
    assert!(matches!(&join(&mut c, 20, 2)[..], [Action::Commit { plan }] if plan.epoch == Epoch(2)));
    assert!(matches!(serve(&mut c, 30)[..], [Action::Serve { .. }]));
}

#[test]
fn after_settling_it_plans_on_fewer() {
    let mut c = cluster(2, Some(ms(5000)));
    join(&mut c, 0, 0);
    join(&mut c, 0, 1);
    serve(&mut c, 1);
    c.handle(ms(10), Event::Lost { worker: id(0), why: "closed".into() });
    for t in [1000, 3000] {
        c.handle(ms(t), Event::Beat { worker: id(1), beat: Beat::default() });
    }
    c.handle(ms(4900), Event::Beat { worker: id(1), beat: Beat::default() });
    assert!(c.handle(ms(5009), Event::Tick).is_empty());
    assert!(matches!(&c.handle(ms(5011), Event::Tick)[..], [Action::Commit { plan }] if plan.mesh.ranks() == 1));
}

#[test]
fn silence_is_a_death() {
    let mut c = cluster(1, None);
    join(&mut c, 0, 0);
    serve(&mut c, 1);
    assert!(c.handle(ms(900), Event::Tick).is_empty());
    assert!(matches!(c.handle(ms(1100), Event::Tick)[..], [Action::Expel { .. }, Action::Halt { .. }]));
    assert!(c.workers().is_empty());
}

#[test]
fn a_plan_that_does_not_fit_is_retried_with_growing_pauses_and_a_reason() {
    let mut c = cluster(1, None);
    c.planner.refuse = true;
    join(&mut c, 0, 0);
    assert_eq!(c.reason(), "rank 0 needs 2 GiB, has 1 GiB");
    c.planner.refuse = false;
    assert!(c.handle(ms(99), Event::Tick).is_empty());
    assert!(matches!(c.handle(ms(100), Event::Tick)[..], [Action::Commit { .. }]));
}

#[test]
fn a_pause_never_gets_longer_than_eight_times_the_first() {
    let mut c = cluster(1, None);
    c.planner.refuse = true;
    join(&mut c, 0, 0);
    let beat = |now| Event::Beat { worker: id(0), beat: Beat { epoch: Epoch(now), ..Beat::default() } };
    for now in (0..60_000).step_by(50) {
        c.handle(ms(now), beat(now));
        c.handle(ms(now), Event::Tick);
    }
    assert!(c.failures() > 60_000 / 850, "{} tries in a minute", c.failures());
}

#[test]
fn a_failed_load_releases_everyone_and_says_why() {
    let mut c = cluster(2, None);
    join(&mut c, 0, 0);
    join(&mut c, 0, 1);
    c.handle(ms(1), Event::Committed { epoch: Epoch(1) });
    let fault = Fault::new(FaultKind::BadCheckpoint, "model.safetensors is 10 bytes short");
    let actions = c.handle(ms(2), Event::LoadFailed { worker: id(0), epoch: Epoch(1), fault });
    assert!(matches!(actions[..], [Action::Release { .. }, Action::Release { .. }]));
    assert!(c.reason().contains("10 bytes short"));
}

#[test]
fn a_lost_race_takes_a_higher_epoch() {
    let mut c = cluster(1, None);
    join(&mut c, 0, 0);
    c.handle(ms(1), Event::CommitFailed { found: Epoch(9), why: "at revision 9".into() });
    let again = c.handle(ms(200), Event::Tick);
    assert!(matches!(&again[..], [Action::Commit { plan }] if plan.epoch == Epoch(10)));
}

#[test]
fn nothing_is_planned_before_the_store_is_read_and_the_reason_is_said() {
    let mut c = cluster(1, None);
    c.handle(ms(0), Event::StoreLost { why: "the store is unreachable: refused".into() });
    assert_eq!(c.reason(), "waiting for 1 workers, 0 joined; the store is unreachable: refused");
    assert!(join(&mut c, 1, 0).is_empty());
    assert_eq!(c.reason(), "the store is unreachable: refused");
    assert!(c.handle(ms(5000), Event::Beat { worker: id(0), beat: Beat::default() }).is_empty());
    let actions = c.handle(ms(5001), Event::StoreRead { epoch: Epoch(41) });
    assert!(matches!(&actions[..], [Action::Commit { plan }] if plan.epoch == Epoch(42)));
    assert_eq!(c.failures(), 0);
}

#[test]
fn a_store_that_goes_while_serving_changes_nothing_until_a_plan_is_needed() {
    let mut c = cluster(1, None);
    join(&mut c, 0, 0);
    serve(&mut c, 1);
    assert!(c.handle(ms(2), Event::StoreLost { why: "gone".into() }).is_empty());
    assert!(matches!(c.phase(), Phase::Serving(_)));
    assert_eq!(c.reason(), "");
    c.handle(ms(3), Event::Lost { worker: id(0), why: "closed".into() });
    assert!(join(&mut c, 4, 0).is_empty());
    assert!(c.reason().contains("closed") && c.reason().ends_with("; gone"), "{}", c.reason());
    let actions = c.handle(ms(5), Event::StoreRead { epoch: Epoch(1) });
    assert!(matches!(&actions[..], [Action::Commit { plan }] if plan.epoch == Epoch(2)));
}

#[test]
fn a_commit_that_got_no_answer_is_planned_again_above_what_the_store_then_says() {
    let mut c = cluster(1, None);
    join(&mut c, 0, 0);
    assert!(c.handle(ms(1), Event::StoreLost { why: "no answer".into() }).is_empty());
    // It had been written after all.
    let actions = c.handle(ms(2), Event::StoreRead { epoch: Epoch(1) });
    assert!(matches!(&actions[..], [Action::Commit { plan }] if plan.epoch == Epoch(2)));
    assert!(c.handle(ms(3), Event::Committed { epoch: Epoch(1) }).is_empty(), "the first one comes late");
    assert_eq!(c.failures(), 0);
}

#[test]
fn a_fault_of_an_older_epoch_changes_nothing() {
    let mut c = cluster(1, None);
    join(&mut c, 0, 0);
    serve(&mut c, 1);
    let fault = Fault::new(FaultKind::Internal, "x");
    assert!(c.handle(ms(2), Event::GroupFault { epoch: Epoch(0), fault: fault.clone() }).is_empty());
    let actions = c.handle(ms(3), Event::GroupFault { epoch: Epoch(1), fault });
    assert!(matches!(actions[..], [Action::Halt { .. }, Action::Release { .. }, Action::Commit { .. }]));
}

#[test]
fn a_worker_with_another_model_is_set_aside_and_the_others_serve_on() {
    let mut c = served_by(1);
    join(&mut c, 10, 1);
    c.handle(ms(510), Event::Tick);
    prepare(&mut c, 520);
    let epoch = c.epoch();
    c.handle(ms(530), Event::Committed { epoch });
    let fault = Fault::new(FaultKind::Incompatible, "its weights are not those of w0");
    let actions = c.handle(ms(540), Event::LoadFailed { worker: id(1), epoch, fault: fault.clone() });
    let commits =
        |actions: &[Action]| actions.iter().any(|a| matches!(a, Action::Commit { plan } if plan.members.len() == 1));
    assert!(commits(&actions), "at once, without it: {actions:?}");
    serve(&mut c, 550);
    let beat = Beat { epoch: c.epoch(), ..Beat::default() };
    (0..2).for_each(|n| drop(c.handle(ms(1000), Event::Beat { worker: id(n), beat: beat.clone() })));
    assert!(
        c.handle(ms(1900), Event::Tick).iter().all(|a| !matches!(a, Action::Prepare { .. })),
        "nor is it grown onto"
    );
    // Alone it is not taken either, and the reason names it.
    c.handle(ms(1901), Event::Lost { worker: id(0), why: "killed".into() });
    assert!(c.reason().contains("w1 is set aside: its weights are not those of w0"), "{}", c.reason());
    assert!(commits(&join(&mut c, 1902, 1)), "anew it is given another chance");
}

#[test]
fn an_answer_to_a_commit_tells_that_the_store_is_back() {
    for answer in [Event::Committed { epoch: Epoch(9) }, Event::CommitFailed { found: Epoch(0), why: "other".into() }] {
        let mut c = served_by(2);
        c.handle(ms(10), Event::StoreLost { why: "no answer".into() });
        c.handle(ms(11), answer);
        c.handle(ms(12), Event::Lost { worker: id(0), why: "killed".into() });
        let actions = join(&mut c, 13, 0);
        assert!(actions.iter().any(|a| matches!(a, Action::Commit { .. })), "{}", c.reason());
    }
}

/// Serves with two ranks cut by tensor, the second at `factor` times the first one's pace, for `seconds`.
fn paced(factor: u64, seconds: u64) -> (Cluster<TensorEach>, Vec<Action>) {
    let rules = Rules { workers: 2, settle: None, silence: ms(1000), retry: ms(100), grow: ms(500) };
    let mut c = Cluster::new(rules, TensorEach, Epoch(0));
    for n in 0..2 {
        let (host, data_address) = ("h".into(), "127.0.0.1:1".into());
        let offer = Offer { worker: id(n), host, data_address, devices: Vec::new(), families: Vec::new() };
        c.handle(ms(0), Event::Joined { offer });
    }
    let epoch = c.epoch();
    c.handle(ms(1), Event::Committed { epoch });
    (0..2).for_each(|n| drop(c.handle(ms(2), Event::Ready { worker: id(n), epoch })));
    let mut actions = Vec::new();
    for beat in 1..seconds * 1000 / 300 {
        let now = ms(beat * 300);
        for n in 0..2u64 {
            let entered = beat * 100;
            let toll =
                Toll { entered, computing: Duration::from_micros(entered * if n == 1 { 50 * factor } else { 50 }) };
            let tolls = vec![(RankId(n as u32), toll)];
            let beat = Beat { epoch: c.plan().map_or(epoch, |p| p.epoch), tolls, ..Beat::default() };
            c.handle(now, Event::Beat { worker: id(n as usize), beat });
        }
        actions.extend(c.handle(now, Event::Tick));
    }
    (c, actions)
}

/// As many ranks as members, all in one tensor group.
struct TensorEach;

impl Planner for TensorEach {
    fn plan(&self, epoch: Epoch, members: &[Offer], previous: Option<&Plan>) -> Result<Plan, String> {
        let plan = OneEach { refuse: false }.plan(epoch, members, previous)?;
        let mesh = Mesh::new(1, 1, members.len(), 1).unwrap();
        Ok(Plan { mesh, stages: std::iter::once(0..members.len()).collect(), ..plan })
    }
}

#[test]
fn a_slow_worker_is_named_and_then_planned_around() {
    let (c, actions) = paced(3, 10);
    let slow = c.workers()[&id(1)].slow.expect("it is named within ten seconds");
    assert!((2.9..3.1).contains(&slow.0) && c.workers()[&id(0)].slow.is_none(), "{slow:?}");
    assert!(actions.is_empty(), "not planned around at once: {actions:?}");
    let (_, actions) = paced(3, 30);
    let prepared: Vec<_> = actions.iter().filter(|a| matches!(a, Action::Prepare { .. })).collect();
    assert!(matches!(&prepared[..], [Action::Prepare { worker, plan }] if *worker == id(0) && plan.members.len() == 1));
    let (c, actions) = paced(1, 30);
    assert!(actions.is_empty() && c.workers().values().all(|w| w.slow.is_none()), "{actions:?}");
}
