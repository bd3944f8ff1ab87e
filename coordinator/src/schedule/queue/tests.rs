//! The order of the queue, without a scheduler around it.

mod windows;

use super::*;
use crate::schedule::sequence::Roster;

const A: Turn = Turn { tenant: 1, priority: 0, weight: 1 };
const B: Turn = Turn { tenant: 2, priority: 0, weight: 1 };

/// Jobs of one choice, numbered as they come.
struct Line {
    queue: Queue,
    slots: Vec<Slot>,
}

impl Line {
    fn new(turns: &[Turn]) -> Line {
        let mut line = Line { queue: Queue::default(), slots: Roster::numbered(4000) };
        turns.iter().enumerate().for_each(|(number, turn)| line.join(number, *turn));
        line
    }

    fn join(&mut self, number: usize, turn: Turn) {
        self.queue.enter(turn);
        self.queue.insert((age(number), turn), false, self.slots[number]);
    }

    /// The number of the job that is next, which then runs.
    fn run(&mut self, turns: &[Turn]) -> usize {
        let slot = self.queue.first(None).unwrap();
        let number = self.slots.iter().position(|other| *other == slot).unwrap();
        self.queue.remove((age(number), turns[number]));
        self.queue.begin(turns[number].tenant);
        number
    }
}

fn age(number: usize) -> Age {
    Age { job: JobId(number as u64), choice: 0 }
}

#[test]
fn whoever_was_served_least_is_next_and_a_flood_holds_up_nobody() {
    let turns = [vec![A; 100], vec![B; 2]].concat();
    let mut line = Line::new(&turns);
    let mut order = Vec::new();
    for _ in 0..6 {
        let number = line.run(&turns);
        line.queue.charge(turns[number].tenant, 10, 5);
        order.push(number);
    }
    assert_eq!(order, [0, 100, 1, 101, 2, 3]);
}

#[test]
fn who_comes_back_has_saved_nothing_up_and_who_leaves_escapes_nothing() {
    let turns = [A, A, B, B, A, B];
    let mut line = Line::new(&turns[..4]);
    for number in [0, 2, 1, 3] {
        assert_eq!(line.run(&turns), number);
        line.queue.charge(turns[number].tenant, 100, 0);
    }
    // One tenant leaves, the other is served on and has more that waits.
    (0..2).for_each(|_| line.queue.leave(A.tenant, true));
    line.queue.charge(B.tenant, 1000, 0);
    line.join(5, B);
    line.join(4, A);
    assert_eq!(line.queue.served(A.tenant), 1200, "as the other");
    line.queue.remove((age(4), A));
    line.queue.charge(A.tenant, 500, 0);
    line.queue.leave(A.tenant, false);
    line.join(4, A);
    assert_eq!(line.queue.served(A.tenant), 1700, "it was ahead");
    line.queue.remove((age(4), A));
    line.queue.leave(A.tenant, false);
    line.queue.remove((age(5), B));
    [false, true, true].into_iter().for_each(|began| line.queue.leave(B.tenant, began));
    assert!(line.queue.tenants.is_empty(), "nobody could gain");
}

#[test]
fn who_is_ahead_of_those_that_wait_is_remembered_while_they_do() {
    let turns = [A, B, B, A, B, A];
    let mut line = Line::new(&turns[..3]);
    assert_eq!([line.run(&turns), line.run(&turns)], [0, 1]);
    line.queue.charge(A.tenant, 100, 0);
    line.queue.leave(A.tenant, true);
    line.queue.charge(B.tenant, 1000, 0);
    line.join(3, A);
    assert_eq!(line.queue.served(A.tenant), 1000, "as the other, which waits");
    assert_eq!(line.run(&turns), 2, "the oldest of equals");
    line.join(4, B);
    assert_eq!(line.run(&turns), 3);
    line.queue.charge(A.tenant, 500, 0);
    line.queue.leave(A.tenant, true);
    line.join(5, A);
    assert_eq!(line.queue.served(A.tenant), 1500, "it was ahead");
    assert_eq!([line.run(&turns), line.queue.tenants()], [4, 2]);
    assert_eq!(line.run(&turns), 5);
    line.queue.leave(A.tenant, true);
    assert_eq!((line.queue.tenants(), line.queue.tenants.len()), (1, 2), "it is ahead of who has jobs");
    (0..3).for_each(|_| line.queue.leave(B.tenant, true));
    assert!(line.queue.tenants.is_empty() && line.queue.floor == 0, "nobody could gain");
}

#[test]
fn who_is_left_behind_by_the_floor_is_forgotten() {
    let turns = [vec![A, A], (3..100).map(|tenant| Turn { tenant, ..A }).collect()].concat();
    let mut line = Line::new(&turns[..2]);
    line.run(&turns);
    for number in 2..turns.len() {
        let tenant = turns[number].tenant;
        line.join(number, turns[number]);
        // The counter of A, which waits, is behind: so this one is kept until A has caught up.
        line.queue.remove((age(number), turns[number]));
        line.queue.begin(tenant);
        line.queue.charge(tenant, 10, 0);
        line.queue.leave(tenant, true);
        line.queue.charge(A.tenant, 20, 0);
        assert!(line.queue.tenants.len() <= 2, "{}", line.queue.tenants.len());
    }
}

#[test]
fn weights_share_what_there_is_to_the_token() {
    let heavy = Turn { weight: 3, ..B };
    let turns = [vec![A; 500], vec![heavy; 500]].concat();
    let mut line = Line::new(&turns);
    let mut served = [0i64, 0];
    for _ in 0..400 {
        let number = line.run(&turns);
        line.queue.charge(turns[number].tenant, 7, 0);
        served[usize::from(number >= 500)] += 7;
        let [a, b] = served;
        assert!((3 * a - b).abs() <= 3 * 7 + 7, "{served:?}");
    }
    assert_eq!(served, [700, 2100]);
}

#[test]
fn division_by_a_weight_loses_nothing() {
    let mut queue = Queue::default();
    queue.enter(Turn { weight: WEIGHT_MAX, ..A });
    (0..10_000).for_each(|_| queue.charge(A.tenant, 1, 0));
    assert_eq!(queue.served(A.tenant), 10);
}

#[test]
fn who_keeps_a_trickle_alive_saves_nothing_up_either() {
    let turns = [vec![B], vec![A; 10], vec![B; 10]].concat();
    let mut line = Line::new(&turns[..11]);
    assert_eq!(line.run(&turns), 0, "one long answer of B's runs all the while");
    for _ in 0..5 {
        line.run(&turns);
        line.queue.charge(A.tenant, 1000, 0);
    }
    (11..21).for_each(|number| line.join(number, B));
    let mut of_b = 0;
    for _ in 0..6 {
        let number = line.run(&turns);
        line.queue.charge(turns[number].tenant, 1000, 0);
        of_b += usize::from(turns[number] == B);
    }
    assert_eq!(of_b, 3, "from now on they take turns");
}

#[test]
fn who_comes_while_nobody_waits_starts_where_the_last_one_stood() {
    let turns = [A, A, B, A];
    let mut line = Line::new(&turns[..2]);
    line.run(&turns);
    line.queue.charge(A.tenant, 1000, 0);
    line.run(&turns);
    line.join(2, B);
    line.join(3, A);
    assert_eq!(line.queue.served(B.tenant), 1000);
    assert_eq!([line.run(&turns), line.run(&turns)], [2, 3]);
}

#[test]
fn urgency_passes_so_many_and_no_more() {
    let urgent = Turn { priority: -1, ..A };
    let turns = [vec![A; 1], vec![urgent; 3000]].concat();
    let mut line = Line::new(&turns);
    let passed = (0..).find(|_| line.run(&turns) == 0).unwrap();
    assert_eq!(passed, 1023, "of equal places the older is first");
}

#[test]
fn urgency_counts_among_ones_own_and_what_ran_before_goes_first() {
    let urgent = Turn { priority: -5, ..B };
    let turns = [A, B, urgent, A];
    let mut line = Line::new(&turns);
    line.queue.insert((age(3), A), true, line.slots[3]);
    assert_eq!(line.queue.first(None), Some(line.slots[3]));
    assert_eq!(line.queue.first(Some((JobId(2), urgent))), Some(line.slots[2]));
    assert_eq!(line.queue.first(Some((JobId(1), B))), Some(line.slots[1]));
    line.queue.remove((age(3), A));
    assert!(line.queue.contains((age(3), A)), "it was there twice");
    assert_eq!(line.run(&turns), 0, "the oldest head, where nobody was served");
    line.queue.charge(A.tenant, 1, 0);
    assert_eq!([line.run(&turns), line.run(&turns)], [2, 1]);
}

#[test]
fn one_tenant_fills_eight_ninths_of_the_queue_and_the_others_find_the_rest() {
    let mut queue = Queue::default();
    let mut waiting = 0;
    while queue.room(A.tenant, (waiting, 90)).is_ok() {
        queue.enter(A);
        waiting += 1;
    }
    assert_eq!((waiting, queue.room(A.tenant, (waiting, 90))), (80, Err((80, 80))));
    while queue.room(B.tenant, (waiting, 90)).is_ok() {
        queue.enter(B);
        waiting += 1;
    }
    assert_eq!(waiting, 89, "there is room for a third one");
    assert!(queue.room(3, (waiting, 90)).is_ok());
    assert_eq!(queue.room(0, (90, 90)), Err((90, 90)));
}
