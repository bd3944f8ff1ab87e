//! What the scheduler counts; another module exports it.

use std::time::Duration;

/// A picture of the scheduler. Counters only grow, also over faults; the rest is of the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// Sequences in lanes, and those that are not: new, preempted, or choices that wait for their job's prompt.
    pub running: usize,
    pub waiting: usize,
    /// Jobs of which nothing ran yet: what the queue's bound counts.
    pub jobs_waiting: usize,
    /// Those who have jobs, and those among them who wait for some to be admitted.
    pub tenants: usize,
    pub tenants_waiting: usize,
    pub steps_in_flight: usize,
    /// Cache blocks of all lanes; used ones are held by sequences.
    pub blocks_used: usize,
    pub blocks_total: usize,

    /// Tokens of admitted sequences looked up in the prefix cache, and those found.
    pub prefix_queried_tokens: u64,
    pub prefix_hits_tokens: u64,
    pub preemptions: u64,
    /// Sequences put back after a group's fault.
    pub requeues: u64,
    /// Tokens computed to fill the cache (recomputed ones count again), and tokens drawn.
    pub tokens_prefilled: u64,
    pub tokens_generated: u64,
    /// Tokens guessed and checked, and those drawn as guessed.
    pub tokens_drafted: u64,
    pub drafts_accepted: u64,
    pub steps: u64,
    pub jobs_accepted: u64,
    pub jobs_refused: u64,
    pub jobs_finished: u64,
    pub jobs_cancelled: u64,
    /// Sum over jobs of the time from acceptance to the first admission to a lane.
    pub queued: Duration,
    /// The time during which steps were in flight.
    pub stepping: Duration,
}
