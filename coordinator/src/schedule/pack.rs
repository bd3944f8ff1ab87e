//! Packing a step: decodes first, then prompts already begun, then new sequences, within the token budget.

use std::time::Instant;

use model::plan::BLOCK_TOKENS;
use model::step::{Begin, BlockId, Sampling, SeqId, StepBatch, StepId};

use super::blocks::Parent;
use super::draft::Drafting;
use super::lane::{Pack, Room};
use super::scheduler::{Flight, JobId, Scheduler};
use super::sequence::{Fate, Place, Slot};

/// What one more sequence costs a lane, in tokens to prefill: a prefix hit draws a sequence to its lane, but not past
/// this many tokens a sequence that the lane has more than the others.
const SEQUENCE_COST_TOKENS: usize = BLOCK_TOKENS;

/// Prompt tokens that a step takes whole, even where other steps could fly beside it: fewer would not keep a stage busy
/// for longer than reading its weights takes.
const SHARED_TOKENS_LEAST: usize = 64;

/// A lane that can take a sequence, and the part of its prompt found there.
struct Offer {
    lane: usize,
    cached: Vec<BlockId>,
    chain: Parent,
}

impl Scheduler {
    /// The next step, if there is anything to compute and a step may be added to those in flight. With no step in flight
    /// and any job in work there always is.
    pub fn next(&mut self, now: Instant) -> Option<(StepId, StepBatch)> {
        if self.flights.len() >= self.settings.steps_in_flight_max + self.settings.steps_ahead {
            return None;
        }
        let alone = self.alone();
        if alone.is_some_and(|job| self.flies_beside(job)) {
            return None;
        }
        let mut packs = self.pack(now, alone);
        // A suspect that finds no room waits until others have left some.
        if alone.is_some() && self.flights.is_empty() && packs.iter().all(|pack| pack.flown.is_empty()) {
            packs = self.pack(now, None);
        }
        if packs.iter().all(|pack| pack.flown.is_empty()) {
            return None;
        }
        let step = StepId(self.steps_next);
        self.steps_next += 1;
        self.load.steps += 1;
        let guesses = self.guesses(&packs);
        let mut flight = Flight { step, since: now, guesses, lanes: Vec::with_capacity(packs.len()) };
        let mut batch = StepBatch { lanes: Vec::with_capacity(packs.len()) };
        for (lane, mut pack) in self.lanes.iter_mut().zip(packs) {
            pack.batch.ended = std::mem::take(&mut lane.ended);
            pack.batch.guesses = guesses as u32;
            batch.lanes.push(pack.batch);
            flight.lanes.push(pack.flown);
        }
        self.flights.push_back(flight);
        Some((step, batch))
    }

    /// Tokens that the group shall guess behind each that a step draws: as many as any of its sequences would have for drafts.
    fn guesses(&self, packs: &[Pack]) -> usize {
        if !self.settings.predicts {
            return 0;
        }
        let drawn = packs.iter().flat_map(|pack| &pack.flown).filter(|flown| flown.sample);
        let wanted = drawn.filter_map(|flown| self.roster.running(flown.slot, flown.seq));
        wanted.map(|sequence| sequence.place().drafting.most()).max().unwrap_or(0)
    }

    /// Each lane's part of a step, of one job alone where one is given.
    fn pack(&mut self, now: Instant, only: Option<JobId>) -> Vec<Pack> {
        let mut packs: Vec<Pack> = self.lanes.iter().map(|_| Pack::default()).collect();
        for (lane, pack) in packs.iter_mut().enumerate() {
            self.pack_decodes(lane, pack, only);
            if self.flights.len() >= self.settings.steps_in_flight_max {
                self.pack_fed(lane, pack, only);
            }
            pack.tokens_max = self.tokens_max(lane, pack.tokens);
            self.pack_prefills(lane, pack, only);
        }
        self.admit(now, &mut packs, only);
        packs
    }

    /// One token for each sequence that is ready, the longest waiting first. With several steps in flight each gets its
    /// share, so that no pipeline stage runs dry while another has everything.
    fn pack_decodes(&mut self, lane: usize, pack: &mut Pack, only: Option<JobId>) {
        let share = self.lanes[lane].decoding().div_ceil(self.settings.steps_in_flight_max);
        let rows_max = share.min(self.settings.limits.step_sequences_max).min(self.settings.limits.step_tokens_max);
        let mut preempted = Vec::new();
        let mut stalled = Vec::new();
        while pack.flown.len() < rows_max {
            let Some((slot, seq)) = self.lanes[lane].ready.pop_front() else { break };
            let Some(sequence) = self.roster.running(slot, seq) else { continue };
            if only.is_some_and(|job| sequence.age.job != job) {
                stalled.push((slot, seq));
                continue;
            }
            if sequence.tokens.len() > sequence.place().blocks.len() * BLOCK_TOKENS {
                match self.lanes[lane].make_room(&mut self.roster, slot, &mut preempted) {
                    Room::Made => {}
                    Room::Later => {
                        stalled.push((slot, seq));
                        continue;
                    }
                    Room::PreemptedItself => continue,
                }
            }
            // Whoever comes after it in this step has a row all the same, and prompts have some.
            let left = self.settings.limits.step_tokens_max - pack.tokens - (rows_max - pack.flown.len());
            let sequence = self.roster.get_mut(slot);
            // Nobody makes room for guesses, but where a block is free they need not end with the one before it.
            if sequence.reach() > sequence.place().blocks.len() * BLOCK_TOKENS
                && let Some(block) = self.lanes[lane].pool.allocate()
            {
                sequence.place_mut().blocks.push(block);
            }
            let drafts = sequence.drafts(left / 2);
            self.load.tokens_drafted += drafts.len() as u64;
            self.lanes[lane].fly(sequence, slot, 1, drafts, pack);
        }
        for entry in stalled.into_iter().rev() {
            self.lanes[lane].ready.push_front(entry);
        }
        for slot in preempted {
            self.requeue(slot);
        }
    }

    /// A row for each sequence whose last token is still to be drawn by a step in flight: the group feeds it to itself. Nobody is
    /// preempted for a token that may turn out to be behind an answer's end.
    fn pack_fed(&mut self, lane: usize, pack: &mut Pack, only: Option<JobId>) {
        let rows_max = self.settings.limits.step_sequences_max.min(self.settings.limits.step_tokens_max);
        let flown = self.flights.iter().flat_map(|flight| &flight.lanes[lane]);
        let drawing = flown.filter(|flown| flown.sample && flown.drafts.is_empty());
        for (slot, seq, end) in drawing.map(|flown| (flown.slot, flown.seq, flown.end)).collect::<Vec<_>>() {
            if pack.flown.len() >= rows_max {
                break;
            }
            let Some(sequence) = self.roster.running(slot, seq) else { continue };
            let of_another = only.is_some_and(|job| sequence.age.job != job);
            let place = sequence.place();
            if of_another || place.scheduled != end || end + 1 >= sequence.len_max {
                continue;
            }
            let full = end == place.blocks.len() * BLOCK_TOKENS;
            let sequence = self.roster.get_mut(slot);
            if full {
                let Some(block) = self.lanes[lane].pool.allocate() else { continue };
                sequence.place_mut().blocks.push(block);
            }
            self.lanes[lane].fly(sequence, slot, 1, Vec::new(), pack);
        }
    }

    /// Tokens of a lane's part of a step that has `decodes`: all that fit, or, where further steps can fly at once, prompts
    /// up to this step's share of what waits, so that every pipeline stage works on some of it.
    fn tokens_max(&self, lane: usize, decodes: usize) -> usize {
        let most = self.settings.limits.step_tokens_max;
        let free = self.settings.steps_in_flight_max.saturating_sub(self.flights.len());
        if free <= 1 {
            return most;
        }
        let left = |slot: &Slot| {
            let sequence = self.roster.get(*slot);
            sequence.tokens.len() - sequence.place.as_ref().map_or(0, |place| place.scheduled)
        };
        let begun: usize = self.lanes[lane].prefilling.values().map(left).sum();
        let (mut waiting, enough) = (0, most * free * self.lanes.len());
        for slot in self.queue.slots() {
            waiting += left(&slot);
            if waiting >= enough {
                return most;
            }
        }
        let share = (begun + waiting.div_ceil(self.lanes.len())).div_ceil(free).max(SHARED_TOKENS_LEAST);
        most.min(decodes + share)
    }

    /// Chunks of prompts that were begun before, the oldest first.
    fn pack_prefills(&mut self, lane: usize, pack: &mut Pack, only: Option<JobId>) {
        while let Some(slot) = Scheduler::oldest(&self.lanes[lane].prefilling, only)
            && pack.has_room(self.settings.limits.step_sequences_max)
        {
            self.prefill(lane, slot, pack);
        }
    }

    /// Admits waiting sequences strictly in turn: where the head does not fit nobody passes it.
    fn admit(&mut self, now: Instant, packs: &mut [Pack], only: Option<JobId>) {
        let turn = |job| Some((job, self.requests.get(&job)?.turn));
        let only = only.and_then(turn);
        while let Some(slot) = self.queue.first(only) {
            let Some(offer) = self.best_lane(slot, packs) else { break };
            let lane = offer.lane;
            self.place(now, slot, offer, &mut packs[lane]);
            self.prefill(lane, slot, &mut packs[lane]);
        }
    }

    /// The lane where a sequence costs least: tokens left to prefill, and sequences already there.
    fn best_lane(&mut self, slot: Slot, packs: &[Pack]) -> Option<Offer> {
        let sequence = self.roster.get(slot);
        let request = self.requests.get(&sequence.age.job).expect("a waiting sequence has a request");
        let computes_all = request.scored_choice() == Some(sequence.age.choice);
        let blocks = sequence.tokens.len().div_ceil(BLOCK_TOKENS);
        let sequences_max = self.settings.limits.step_sequences_max;
        let mut best: Option<((usize, usize), Offer)> = None;
        for (number, lane) in self.lanes.iter_mut().enumerate() {
            let full = lane.running.len() >= self.settings.lane_sequences_max();
            if full || !packs[number].has_room(sequences_max) || lane.too_full_for == Some(sequence.age) {
                continue;
            }
            let (cached, chain) = if self.settings.prefix_cache && !computes_all {
                let hashes = &sequence.hashes[..sequence.blocks_reusable()];
                lane.pool.longest_prefix(sequence.salt, hashes, &sequence.tokens)
            } else {
                (Vec::new(), Parent::Root { salt: sequence.salt })
            };
            let needed = blocks - cached.len() + lane.pool.unheld(&cached) + lane.headroom();
            if needed > lane.pool.available() {
                lane.too_full_for = Some(sequence.age);
                continue;
            }
            let tokens = sequence.tokens.len() - cached.len() * BLOCK_TOKENS;
            let cost = (tokens + lane.running.len() * SEQUENCE_COST_TOKENS, lane.pool.used());
            if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                best = Some((cost, Offer { lane: number, cached, chain }));
            }
        }
        best.map(|(_, offer)| offer)
    }

    /// Moves a sequence from the queue to a lane: takes the blocks of all its tokens and announces it to the ranks.
    fn place(&mut self, now: Instant, slot: Slot, offer: Offer, pack: &mut Pack) {
        let sequence = self.roster.get_mut(slot);
        let lane = &mut self.lanes[offer.lane];
        let request = self.requests.get_mut(&sequence.age.job).expect("a waiting sequence has a request");
        self.queue.remove(sequence.waits());
        let hits = offer.cached.len();
        let mut blocks = offer.cached;
        blocks.iter().for_each(|block| lane.pool.share(*block));
        for _ in hits..sequence.tokens.len().div_ceil(BLOCK_TOKENS) {
            blocks.push(lane.pool.allocate().expect("an offer counts the blocks"));
        }
        let start = hits * BLOCK_TOKENS;
        let seq = SeqId(self.seqs_next);
        self.seqs_next += 1;

        self.load.prefix_queried_tokens += sequence.tokens.len() as u64;
        self.load.prefix_hits_tokens += start as u64;
        if !request.admitted {
            request.admitted = true;
            self.queue.begin(sequence.turn.tenant);
            request.cached_tokens = start.min(sequence.prompt_len) as u32;
            self.load.jobs_waiting -= 1;
            self.load.queued += now.saturating_duration_since(request.added);
        }
        let choice = sequence.age.choice;
        let mut sampling = Sampling { choice, ..request.sampling.clone() };
        if request.scored_choice() == Some(choice) {
            request.scores.clear();
        } else {
            sampling.prompt_logprobs = None;
        }
        let history = if sampling.needs_history() { sequence.tokens[..start].to_vec() } else { Vec::new() };
        pack.batch.begun.push(Begin { seq, sampling, prompt_len: sequence.prompt_len as u32, history });
        sequence.place = Some(Place {
            lane: offer.lane,
            seq,
            blocks,
            sent: 0,
            scheduled: start,
            computed: start,
            chunks_in_flight: 0,
            offered: hits,
            chain: self.settings.prefix_cache.then_some(offer.chain),
            drafting: Drafting::new(self.settings.drafts_max),
            fate: Fate::Runs,
        });
        lane.running.insert(sequence.age, slot);
        lane.prefilling.insert(sequence.age, slot);
    }

    /// As much of a prompt as the step has room for.
    fn prefill(&mut self, lane: usize, slot: Slot, pack: &mut Pack) {
        let sequence = self.roster.get_mut(slot);
        let scheduled = sequence.place().scheduled;
        let count = (sequence.tokens.len() - scheduled).min(pack.tokens_max - pack.tokens);
        self.load.tokens_prefilled += count as u64;
        let computed = sequence.charge(scheduled, scheduled + count);
        self.queue.charge(sequence.turn.tenant, computed, 0);
        self.lanes[lane].fly(sequence, slot, count, Vec::new(), pack);
    }

    /// Puts a preempted sequence that has left its lane back into the queue, before everyone younger.
    pub(super) fn requeue(&mut self, slot: Slot) {
        let sequence = self.roster.get_mut(slot);
        assert!(sequence.place.is_none(), "a sequence in a lane does not wait");
        if self.settings.prefix_cache {
            sequence.extend_hashes(self.settings.block_hash);
        }
        self.queue.insert(sequence.waits(), true, slot);
        self.load.preemptions += 1;
    }
}
