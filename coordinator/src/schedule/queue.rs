//! Who is admitted next. Jobs that ran before go first, the oldest of them: their clients have a part already. Then tenants take
//! turns by what they were served (virtual token counters: Sheng et al., "Fairness in Serving Large Language Models", 2024):
//!
//! * Each tenant has a counter of tokens computed and drawn for it; whoever has least is next, and among its jobs the most urgent,
//!   then the oldest. So a flood of one tenant holds up no other; urgency reaches over nobody else's jobs.
//! * A tenant that comes to wait starts at the least of those that wait already, or, where nobody does, at the counter of who waited
//!   last: neither idleness nor a trickle of small jobs saves anything up.
//!
//! Of two tenants that always have jobs waiting, neither is served more than the other by over two times the cost of what one step
//! admits and of what runs. A job waits while tenants with smaller counters are served, which they outgrow. With one tenant the order is
//! that of arrival.

use std::collections::BTreeMap;

use super::scheduler::JobId;
use super::sequence::{Age, Slot};

/// What a drawn token counts, where a computed one of a prompt counts 1 (as in the paper): a step that prefills computes hundreds.
const DRAWN: u64 = 2;

/// Of what is left in the queue, how many times as much a tenant may have there. So one alone has eight ninths of it, and
/// there always is room for another one's first job.
const SHARE: usize = 8;

/// Who a job is for, and how urgent that is for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Turn {
    /// 0 where nobody is told apart.
    pub tenant: u64,
    /// Lower goes first among a tenant's own.
    pub priority: i32,
}

/// Sequences that may be admitted, and how much each tenant was served.
#[derive(Debug, Default)]
pub struct Queue {
    /// Of jobs that ran before.
    begun: BTreeMap<Age, Slot>,
    tenants: BTreeMap<u64, Line>,
    /// The counter of the tenant whose line was the last to become empty, as it was then.
    floor: u64,
}

/// One tenant's.
#[derive(Debug, Default)]
struct Line {
    served: u64,
    /// Jobs in work, and those among them that did not run yet.
    jobs: usize,
    jobs_waiting: usize,
    waiting: BTreeMap<(i32, Age), Slot>,
}

impl Queue {
    /// A job is taken in.
    pub fn enter(&mut self, tenant: u64) {
        let line = self.tenants.entry(tenant).or_default();
        line.jobs += 1;
        line.jobs_waiting += 1;
    }

    /// A job runs for the first time.
    pub fn begin(&mut self, tenant: u64) {
        self.line(tenant).jobs_waiting -= 1;
    }

    /// A job is over. Counters of tenants without jobs are kept while somebody could gain by coming back without one.
    pub fn leave(&mut self, tenant: u64, began: bool) {
        let line = self.line(tenant);
        line.jobs -= 1;
        line.jobs_waiting -= usize::from(!began);
        if line.jobs == 0 {
            let least = self.least(|line| line.jobs > 0);
            self.tenants.retain(|_, line| line.jobs > 0 || least.is_some_and(|least| line.served > least));
            if self.tenants.is_empty() {
                self.floor = 0;
            }
        }
    }

    /// Tokens of a prompt were computed, and others drawn, for the first time.
    pub fn charge(&mut self, tenant: u64, computed: usize, drawn: usize) {
        self.line(tenant).served += computed as u64 + DRAWN * drawn as u64;
    }

    /// How many jobs of a tenant may wait before more are refused, where `waiting` of `waiting_max` places are taken.
    pub fn room(&self, tenant: u64, (waiting, waiting_max): (usize, usize)) -> Result<(), (usize, usize)> {
        let own = self.tenants.get(&tenant).map_or(0, |line| line.jobs_waiting);
        let own_max = SHARE * waiting_max.saturating_sub(waiting);
        if waiting >= waiting_max {
            return Err((waiting, waiting_max));
        }
        if tenant != 0 && own >= own_max { Err((own, own_max)) } else { Ok(()) }
    }

    /// A sequence waits; `began`: its job ran before.
    pub fn insert(&mut self, (age, turn): (Age, Turn), began: bool, slot: Slot) {
        if began {
            self.begun.insert(age, slot);
            return;
        }
        let least = self.least(|line| !line.waiting.is_empty()).unwrap_or(self.floor);
        let line = self.line(turn.tenant);
        if line.waiting.is_empty() {
            line.served = line.served.max(least);
        }
        line.waiting.insert((turn.priority, age), slot);
    }

    /// It waits no longer, if it did.
    pub fn remove(&mut self, (age, turn): (Age, Turn)) {
        if self.begun.remove(&age).is_none()
            && let Some(line) = self.tenants.get_mut(&turn.tenant)
        {
            line.waiting.remove(&(turn.priority, age));
            if line.waiting.is_empty() {
                self.floor = self.floor.max(line.served);
            }
        }
    }

    pub fn contains(&self, (age, turn): (Age, Turn)) -> bool {
        let waits = |line: &Line| line.waiting.contains_key(&(turn.priority, age));
        self.begun.contains_key(&age) || self.tenants.get(&turn.tenant).is_some_and(waits)
    }

    /// Who is next; of this job, where one is given.
    pub fn first(&self, only: Option<(JobId, Turn)>) -> Option<Slot> {
        if let Some((job, turn)) = only {
            let from = Age { job, choice: 0 };
            let begun = self.begun.range(from..).next().filter(|(age, _)| age.job == job).map(|(_, slot)| *slot);
            let new = || {
                let line = self.tenants.get(&turn.tenant)?;
                let ((_, age), slot) = line.waiting.range((turn.priority, from)..).next()?;
                (age.job == job).then_some(*slot)
            };
            return begun.or_else(new);
        }
        let heads = self.tenants.values().filter_map(|line| {
            let ((_, age), slot) = line.waiting.first_key_value()?;
            Some((line.served, *age, *slot))
        });
        let new = || heads.min_by_key(|(served, age, _)| (*served, *age)).map(|(.., slot)| slot);
        self.begun.first_key_value().map(|(_, slot)| *slot).or_else(new)
    }

    /// All that wait, in no order that matters.
    pub fn slots(&self) -> impl Iterator<Item = Slot> {
        let new = self.tenants.values().flat_map(|line| line.waiting.values());
        self.begun.values().chain(new).copied()
    }

    #[cfg(test)]
    pub fn served(&self, tenant: u64) -> u64 {
        self.tenants[&tenant].served
    }

    /// Tenants that have jobs.
    pub fn tenants(&self) -> usize {
        self.tenants.values().filter(|line| line.jobs > 0).count()
    }

    /// The least counter of some tenants.
    fn least(&self, among: impl Fn(&Line) -> bool) -> Option<u64> {
        self.tenants.values().filter(|line| among(line)).map(|line| line.served).min()
    }

    fn line(&mut self, tenant: u64) -> &mut Line {
        self.tenants.get_mut(&tenant).expect("a tenant with jobs has a line")
    }
}

#[cfg(test)]
mod tests {
    use super::super::sequence::Roster;
    use super::*;

    const A: Turn = Turn { tenant: 1, priority: 0 };
    const B: Turn = Turn { tenant: 2, priority: 0 };

    /// Jobs of one choice, numbered as they come.
    struct Line {
        queue: Queue,
        slots: Vec<Slot>,
    }

    impl Line {
        fn new(turns: &[Turn]) -> Line {
            let mut line = Line { queue: Queue::default(), slots: Roster::numbered(200) };
            turns.iter().enumerate().for_each(|(number, turn)| line.join(number, *turn));
            line
        }

        fn join(&mut self, number: usize, turn: Turn) {
            self.queue.enter(turn.tenant);
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
        assert_eq!(line.queue.tenants[&A.tenant].served, 1200, "as the other");
        line.queue.remove((age(4), A));
        line.queue.charge(A.tenant, 500, 0);
        line.queue.leave(A.tenant, false);
        line.join(4, A);
        assert_eq!(line.queue.tenants[&A.tenant].served, 1700, "it was ahead");
        line.queue.remove((age(4), A));
        line.queue.leave(A.tenant, false);
        line.queue.remove((age(5), B));
        [false, true, true].into_iter().for_each(|began| line.queue.leave(B.tenant, began));
        assert!(line.queue.tenants.is_empty(), "nobody could gain");
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
        assert_eq!(line.queue.tenants[&B.tenant].served, 1000);
        assert_eq!([line.run(&turns), line.run(&turns)], [2, 3]);
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
            queue.enter(A.tenant);
            waiting += 1;
        }
        assert_eq!((waiting, queue.room(A.tenant, (waiting, 90))), (80, Err((80, 80))));
        while queue.room(B.tenant, (waiting, 90)).is_ok() {
            queue.enter(B.tenant);
            waiting += 1;
        }
        assert_eq!(waiting, 89, "there is room for a third one");
        assert!(queue.room(3, (waiting, 90)).is_ok());
        assert_eq!(queue.room(0, (90, 90)), Err((90, 90)));
    }
}
