//! The bounds of the queue's header, for random weights, lengths, arrivals, preemptions and ends.

use super::age;
use crate::schedule::queue::{Queue, TOKEN, Turn, WEIGHT_MAX};
use crate::schedule::sequence::{Roster, Slot};
use proptest::prelude::*;
use std::collections::BTreeMap;

const TENANTS: usize = 4;
const JOBS_MAX: usize = 2000;

/// Counters are cut to a whole unit: where a window begins, where a tenant comes to wait in it, and where it ends.
const ROUNDED: i128 = 3;

#[derive(Debug, Clone, Copy)]
enum Event {
    Come {
        who: usize,
        jobs: usize,
        cost: u64,
        priority: i32,
    },
    /// Whoever is next gets a place, where one is free.
    Admit,
    /// A job that runs gets tokens; one that has all ends.
    Serve {
        which: usize,
        tokens: u64,
    },
    Preempt {
        which: usize,
    },
    /// A job that waits or runs is cancelled.
    Cancel {
        which: usize,
    },
}

fn event() -> impl Strategy<Value = Event> {
    let which = 0..JOBS_MAX;
    let come = (0..TENANTS, 1..30usize, 1..50u64, -1..2i32);
    prop_oneof![
        3 => come.prop_map(|(who, jobs, cost, priority)| Event::Come { who, jobs, cost, priority }),
        8 => Just(Event::Admit),
        8 => (which.clone(), 1..600u64).prop_map(|(which, tokens)| Event::Serve { which, tokens }),
        1 => which.clone().prop_map(|which| Event::Preempt { which }),
        1 => which.prop_map(|which| Event::Cancel { which }),
    ]
}

/// How a tenant asks: now and then a job or many at once, short ones or long ones.
#[derive(Debug, Clone, Copy)]
struct Habit {
    weight: u32,
    jobs_max: usize,
    length: u64,
}

fn habit() -> impl Strategy<Value = Habit> {
    let weight = prop_oneof![3 => 1..=5u32, 1 => 1..=WEIGHT_MAX];
    let (jobs_max, length) = (prop::sample::select(vec![1, 30]), prop::sample::select(vec![1, 4, 20]));
    (weight, jobs_max, length).prop_map(|(weight, jobs_max, length)| Habit { weight, jobs_max, length })
}

struct Job {
    turn: Turn,
    left: u64,
    began: bool,
    runs: bool,
}

struct Tenant {
    habit: Habit,
    weight: i128,
    served: i128,
    /// The largest cost of its jobs so far.
    cost_max: i128,
    waiting: usize,
}

/// A queue, and places where its jobs run.
struct Shop {
    queue: Queue,
    places: usize,
    slots: Vec<Slot>,
    came: usize,
    /// By number; those that ended are gone.
    jobs: BTreeMap<usize, Job>,
    tenants: [Tenant; TENANTS],
    /// For each two, the least that the second was ahead since both wait without a break, and since the first does.
    spans: [[(Option<i128>, Option<i128>); TENANTS]; TENANTS],
}

impl Shop {
    fn new(habits: [Habit; TENANTS], places: usize) -> Shop {
        let fresh = |habit: Habit| Tenant { habit, weight: habit.weight.into(), served: 0, cost_max: 0, waiting: 0 };
        let tenants = habits.map(fresh);
        let (queue, slots) = (Queue::default(), Roster::numbered(JOBS_MAX));
        Shop { queue, places, slots, came: 0, jobs: BTreeMap::new(), tenants, spans: Default::default() }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Come { who, jobs, cost, priority } => {
                let Habit { jobs_max, length, .. } = self.tenants[who].habit;
                (0..jobs.min(jobs_max)).for_each(|_| self.come(who, cost * length, priority));
            }
            Event::Admit => self.admit(),
            Event::Serve { which, tokens } => {
                let Some(number) = self.pick(which, |job| job.runs) else { return };
                let job = self.jobs.get_mut(&number).unwrap();
                let tokens = tokens.min(job.left);
                job.left -= tokens;
                let drawn = tokens / 3;
                self.queue.charge(job.turn.tenant, (tokens - 2 * drawn) as usize, drawn as usize);
                self.tenants[job.turn.tenant as usize].served += i128::from(tokens);
                if job.left == 0 {
                    self.end(number);
                }
            }
            Event::Preempt { which } => {
                let Some(number) = self.pick(which, |job| job.runs) else { return };
                let job = self.jobs.get_mut(&number).unwrap();
                job.runs = false;
                self.queue.insert((age(number), job.turn), true, self.slots[number]);
            }
            Event::Cancel { which } => {
                if let Some(number) = self.pick(which, |_| true) {
                    self.end(number);
                }
            }
        }
    }

    fn come(&mut self, who: usize, cost: u64, priority: i32) {
        let (number, tenant) = (self.came, &mut self.tenants[who]);
        if number == JOBS_MAX {
            return;
        }
        let turn = Turn { tenant: who as u64, priority, weight: tenant.habit.weight };
        tenant.cost_max = tenant.cost_max.max(cost.into());
        tenant.waiting += 1;
        self.came += 1;
        self.queue.enter(turn);
        self.queue.insert((age(number), turn), false, self.slots[number]);
        self.jobs.insert(number, Job { turn, left: cost, began: false, runs: false });
    }

    fn admit(&mut self) {
        let next = self.queue.first(None);
        let begun = self.jobs.iter().find(|(_, job)| job.began && !job.runs).map(|(number, _)| self.slots[*number]);
        assert_eq!(next, begun.or_else(|| searched(&self.queue)), "heads are filed as a search of all finds them");
        let running = self.jobs.values().filter(|job| job.runs).count();
        let Some(next) = next.filter(|_| running < self.places) else { return };
        let number = self.slots.iter().position(|slot| *slot == next).unwrap();
        let job = self.jobs.get_mut(&number).unwrap();
        self.queue.remove((age(number), job.turn));
        if !job.began {
            self.queue.begin(job.turn.tenant);
            self.tenants[job.turn.tenant as usize].waiting -= 1;
        }
        (job.began, job.runs) = (true, true);
    }

    fn end(&mut self, number: usize) {
        let job = self.jobs.remove(&number).unwrap();
        self.queue.remove((age(number), job.turn));
        self.queue.leave(job.turn.tenant, job.began);
        self.tenants[job.turn.tenant as usize].waiting -= usize::from(!job.began);
    }

    fn pick(&self, which: usize, among: impl Fn(&Job) -> bool) -> Option<usize> {
        let numbers: Vec<usize> = self.jobs.iter().filter(|(_, job)| among(job)).map(|(number, _)| *number).collect();
        (!numbers.is_empty()).then(|| numbers[which % numbers.len()])
    }

    /// All in a token's units, times both weights.
    fn check(&mut self) {
        let places = self.places as i128;
        let unit = i128::from(TOKEN);
        for (first, second) in (0..TENANTS * TENANTS).map(|pair| (pair / TENANTS, pair % TENANTS)) {
            let (a, b) = (&self.tenants[first], &self.tenants[second]);
            let ahead = unit * (b.served * a.weight - a.served * b.weight);
            let (of_a, of_b) = (unit * places * a.cost_max * b.weight, unit * places * b.cost_max * a.weight);
            let rounded = ROUNDED * a.weight * b.weight;
            let (both, alone) = &mut self.spans[first][second];
            for (span, holds, bound) in
                [(both, a.waiting > 0 && b.waiting > 0, of_a + of_b), (alone, a.waiting > 0, of_a + 2 * of_b)]
            {
                *span = holds.then(|| span.map_or(ahead, |least| least.min(ahead)));
                let gained = span.map_or(0, |least| ahead - least);
                assert!(gained <= bound + rounded, "{second} gained {gained} on {first}, more than {bound}");
            }
            if a.waiting > 0 && b.waiting > 0 {
                let [a_counts, b_counts] =
                    [first, second].map(|who| i128::from(self.queue.tenants[&(who as u64)].served));
                let apart = (b_counts - a_counts) * a.weight * b.weight;
                assert!(apart <= of_b + rounded, "{second} stands {apart} before {first}, more than {of_b}");
            }
        }
        let waiting = self.tenants.iter().filter(|tenant| tenant.waiting > 0).count();
        let counted = (self.queue.tenants_waiting(), self.queue.idle.len() + self.queue.tenants());
        assert_eq!(counted, (waiting, self.queue.tenants.len()));
    }
}

/// The head of the line that a search of all lines finds.
fn searched(queue: &Queue) -> Option<Slot> {
    let heads = queue.tenants.values().filter_map(|line| {
        let ((_, age), slot) = line.waiting.first_key_value()?;
        Some((line.served, *age, *slot))
    });
    heads.min_by_key(|(served, age, _)| (*served, *age)).map(|(.., slot)| slot)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whoever_waits_is_served_by_weight_but_for_what_runs_at_a_time(
        habits in prop::array::uniform4(habit()),
        places in 1..=4usize,
        events in prop::collection::vec(event(), 100..600),
    ) {
        let mut shop = Shop::new(habits, places);
        for event in events {
            shop.handle(event);
            shop.check();
        }
    }
}
