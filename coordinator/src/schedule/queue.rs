//! Who is admitted next. Jobs that ran before go first, the oldest of them: their clients have a part already. Then tenants take
//! turns by what they were served (virtual token counters: Sheng et al., "Fairness in Serving Large Language Models", 2024):
//!
//! * Each tenant has a counter of tokens computed and drawn for it, divided by its weight; whoever has least is next. So a flood of
//!   one tenant holds up no other.
//! * A tenant that comes to wait starts at the least of those that wait, or, where nobody does, at the counter of who waited last:
//!   neither idleness nor a trickle of small jobs saves anything up.
//! * Among a tenant's jobs the most urgent is next, then the oldest; urgency reaches over nobody else's jobs. A step of priority is
//!   worth [`PASSED`] places, so a job is passed only by those that came fewer jobs after it than that: none starves.
//!
//! While two tenants wait, neither's counter is before the other's by more than one answer of its own, the largest, costs by its weight,
//! prompt included; or as many of them as run at a time (what was begun by another coordinator comes on top). So over any window in
//! which both always wait, what they were served by their weights differs by at most that of the one and that of the other. Whoever
//! comes and goes beside one that always waits gains no more, but for what it had running when the window began.
//!
//! A job waits while tenants with smaller counters are served, which they outgrow. With one tenant and one priority the order is that
//! of arrival, but that what was preempted goes before further choices of older jobs.
//!
//! A decision costs the logarithm of those that wait; counters that grew meanwhile are filed anew when the next one is made.

use std::collections::{BTreeMap, BTreeSet};

use super::scheduler::JobId;
use super::sequence::{Age, Slot};

/// What a drawn token counts, where a computed one of a prompt counts 1 (as in the paper): a step that prefills computes hundreds.
const DRAWN: u64 = 2;

/// What a token counts for a tenant of weight 1. Rests are kept, so nothing is lost by division; a counter lasts 500 years at a
/// million tokens a second.
const TOKEN: u64 = 1 << 10;

/// How many younger jobs a job passes for each step that it is more urgent: as many as wait by default, so that one step reaches
/// over all of a full queue.
const PASSED: i64 = 1024;

/// Of what is left in the queue, how many times as much a tenant may have there. So one alone has eight ninths of it, and
/// there always is room for another one's first job.
const SHARE: usize = 8;

/// The greatest weight of a tenant.
pub const WEIGHT_MAX: u32 = 1000;

/// Who a job is for, and how urgent that is for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Turn {
    /// 0 where nobody is told apart.
    pub tenant: u64,
    /// Lower goes first among a tenant's own.
    pub priority: i32,
    /// The tenant's share where others wait too, beside their weights; 1 to [`WEIGHT_MAX`].
    pub weight: u32,
}

impl Default for Turn {
    fn default() -> Turn {
        Turn { tenant: 0, priority: 0, weight: 1 }
    }
}

/// Sequences that may be admitted, and how much each tenant was served.
#[derive(Debug, Default)]
pub struct Queue {
    /// Of jobs that ran before.
    begun: BTreeMap<Age, Slot>,
    tenants: BTreeMap<u64, Line>,
    /// The heads of all lines, whoever is next first; exact but for the lines of those in `stale`.
    heads: BTreeSet<Head>,
    stale: Vec<u64>,
    /// Counters of tenants that have no jobs.
    idle: BTreeSet<(u64, u64)>,
    /// Nobody comes to wait with less. It only grows while there are jobs.
    floor: u64,
    /// Whose line was the last to become empty.
    last: Option<u64>,
    lines: usize,
}

/// A tenant's counter, the age of the first in its line, and the tenant.
type Head = (u64, Age, u64);

/// One tenant's.
#[derive(Debug, Default)]
struct Line {
    served: u64,
    /// What division by the weight left over.
    rest: u64,
    weight: u64,
    /// Jobs in work, and those among them that did not run yet.
    jobs: usize,
    jobs_waiting: usize,
    waiting: BTreeMap<(i64, Age), Slot>,
    filed: Option<Head>,
    stale: bool,
}

impl Queue {
    /// A job is taken in.
    pub fn enter(&mut self, turn: Turn) {
        let line = self.tenants.entry(turn.tenant).or_default();
        if line.jobs == 0 {
            self.idle.remove(&(line.served, turn.tenant));
        }
        line.weight = turn.weight.clamp(1, WEIGHT_MAX).into();
        line.jobs += 1;
        line.jobs_waiting += 1;
    }

    /// A job runs for the first time.
    pub fn begin(&mut self, tenant: u64) {
        self.line(tenant).jobs_waiting -= 1;
    }

    /// A job is over; nothing of it waits. The counter of a tenant without jobs is kept while it could gain by coming back
    /// without one; where nobody has jobs nobody does.
    pub fn leave(&mut self, tenant: u64, began: bool) {
        let line = self.line(tenant);
        line.jobs -= 1;
        line.jobs_waiting -= usize::from(!began);
        if line.jobs > 0 {
            return;
        }
        assert!(line.waiting.is_empty(), "a tenant without jobs does not wait");
        let served = line.served;
        self.settle();
        self.idle.insert((served, tenant));
        self.forget();
        if self.tenants() == 0 {
            *self = Queue::default();
        }
    }

    /// Tokens of a prompt were computed, and others drawn, for the first time.
    pub fn charge(&mut self, tenant: u64, computed: usize, drawn: usize) {
        let line = self.line(tenant);
        let cost = (computed as u64 + DRAWN * drawn as u64) * TOKEN + line.rest;
        line.served += cost / line.weight;
        line.rest = cost % line.weight;
        if line.filed.is_some() {
            self.touch(tenant);
        }
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

    /// A sequence waits; `began`: it ran before, here or elsewhere.
    pub fn insert(&mut self, (age, turn): (Age, Turn), began: bool, slot: Slot) {
        if began {
            self.begun.insert(age, slot);
            return;
        }
        if self.line(turn.tenant).waiting.is_empty() {
            self.lift(turn.tenant);
            self.lines += 1;
        }
        self.line(turn.tenant).waiting.insert((rank(age, turn), age), slot);
        self.touch(turn.tenant);
    }

    /// It waits no longer, if it did.
    pub fn remove(&mut self, (age, turn): (Age, Turn)) {
        if self.begun.remove(&age).is_some() {
            return;
        }
        let Some(line) = self.tenants.get_mut(&turn.tenant) else { return };
        if line.waiting.remove(&(rank(age, turn), age)).is_some() {
            if line.waiting.is_empty() {
                self.last = Some(turn.tenant);
                self.lines -= 1;
            }
            self.touch(turn.tenant);
        }
    }

    pub fn contains(&self, (age, turn): (Age, Turn)) -> bool {
        let waits = |line: &Line| line.waiting.contains_key(&(rank(age, turn), age));
        self.begun.contains_key(&age) || self.tenants.get(&turn.tenant).is_some_and(waits)
    }

    /// Who is next; of this job, where one is given.
    pub fn first(&mut self, only: Option<(JobId, Turn)>) -> Option<Slot> {
        if let Some((job, turn)) = only {
            let from = Age { job, choice: 0 };
            let begun = self.begun.range(from..).next().filter(|(age, _)| age.job == job).map(|(_, slot)| *slot);
            let new = || {
                let line = self.tenants.get(&turn.tenant)?;
                let ((_, age), slot) = line.waiting.range((rank(from, turn), from)..).next()?;
                (age.job == job).then_some(*slot)
            };
            return begun.or_else(new);
        }
        if let Some((_, slot)) = self.begun.first_key_value() {
            return Some(*slot);
        }
        self.settle();
        let (.., tenant) = self.heads.first()?;
        self.tenants[tenant].waiting.first_key_value().map(|(_, slot)| *slot)
    }

    /// All that wait, in no order that matters.
    pub fn slots(&self) -> impl Iterator<Item = Slot> {
        let new = self.tenants.values().flat_map(|line| line.waiting.values());
        self.begun.values().chain(new).copied()
    }

    #[cfg(test)]
    pub fn served(&self, tenant: u64) -> u64 {
        self.tenants[&tenant].served / TOKEN
    }

    /// Tenants that have jobs, and those among them that have sequences in line.
    pub fn tenants(&self) -> usize {
        self.tenants.len() - self.idle.len()
    }

    pub fn tenants_waiting(&self) -> usize {
        self.lines
    }

    /// The tenant comes to wait: it starts at the least of those that do.
    fn lift(&mut self, tenant: u64) {
        self.settle();
        let last = || self.tenants.get(&self.last?).map(|line| line.served);
        let least = self.heads.first().map(|(served, ..)| *served).or_else(last);
        self.floor = self.floor.max(least.unwrap_or(0));
        let floor = self.floor;
        let line = self.line(tenant);
        line.served = line.served.max(floor);
        self.forget();
    }

    /// Whoever comes back starts at the floor whether it is remembered or not.
    fn forget(&mut self) {
        while let Some((_, tenant)) = self.idle.first().copied().filter(|(served, _)| *served <= self.floor) {
            self.idle.pop_first();
            self.tenants.remove(&tenant);
        }
    }

    /// A tenant's head or counter is not as filed any more.
    fn touch(&mut self, tenant: u64) {
        if !std::mem::replace(&mut self.line(tenant).stale, true) {
            self.stale.push(tenant);
        }
    }

    /// Files heads anew where that changed.
    fn settle(&mut self) {
        while let Some(tenant) = self.stale.pop() {
            let Some(line) = self.tenants.get_mut(&tenant) else { continue };
            line.stale = false;
            let head = line.waiting.first_key_value().map(|((_, age), _)| (line.served, *age, tenant));
            let filed = std::mem::replace(&mut line.filed, head);
            if filed != head {
                filed.map(|filed| self.heads.remove(&filed));
                self.heads.extend(head);
            }
        }
    }

    fn line(&mut self, tenant: u64) -> &mut Line {
        self.tenants.get_mut(&tenant).expect("a tenant with jobs has a line")
    }
}

/// A job's place among its tenant's: that of its arrival, moved by its priority. It never changes, so whoever comes
/// [`PASSED`] jobs later for each step of priority is behind it for good.
fn rank(age: Age, turn: Turn) -> i64 {
    age.job.0 as i64 + PASSED * i64::from(turn.priority)
}

#[cfg(test)]
mod tests;
