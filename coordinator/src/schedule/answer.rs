//! Taking a step's answer: checked as a whole first, since it comes from another machine, then applied.

use std::time::Instant;

use model::fault::{Fault, FaultKind};
use model::step::{LaneResult, PromptScores, Sample, StepId, StepResult};

use super::job::{DoneReason, Output};
use super::lane::Flown;
use super::scheduler::{Delivery, Scheduler};
use super::sequence::{Age, Fate, Slot};
use model::plan::BLOCK_TOKENS;

impl Scheduler {
    /// Applies the answer of the oldest step in flight. An answer that does not fit what was asked is a fault of the group
    /// and changes nothing.
    pub fn complete(&mut self, now: Instant, step: StepId, result: StepResult) -> Result<Vec<Delivery>, Fault> {
        self.check_answer(step, &result)?;
        let flight = self.flights.pop_front().expect("a checked answer has its step");
        let since = self.answered.map_or(flight.since, |answered| answered.max(flight.since));
        self.load.stepping += now.saturating_duration_since(since);
        self.answered = Some(now);
        let mut deliveries = Vec::new();
        for (lane, (flown, answer)) in flight.lanes.into_iter().zip(result.lanes).enumerate() {
            for scores in answer.prompt_scores {
                self.collect_scores(&flown, scores);
            }
            let mut samples = answer.samples.as_slice();
            let mut guesses = answer.guesses.into_iter().peekable();
            for chunk in flown {
                let guessed = guesses.next_if(|guesses| guesses.seq == chunk.seq).map(|guesses| guesses.tokens);
                let (own, others) =
                    samples.split_at(chunk.draws(samples).expect("a checked answer has what was asked"));
                samples = others;
                self.land(lane, &chunk, (own, guessed.unwrap_or_default()), &mut deliveries);
            }
        }
        Ok(deliveries)
    }

    fn check_answer(&self, step: StepId, result: &StepResult) -> Result<(), Fault> {
        let diverged = |text: String| Err(Fault::new(FaultKind::Diverged, text));
        let Some(flight) = self.flights.front() else {
            return diverged(format!("step {} is answered, none is in flight", step.0));
        };
        if flight.step != step || flight.lanes.len() != result.lanes.len() {
            let (lanes, answered) = (flight.lanes.len(), result.lanes.len());
            let asked = flight.step.0;
            return diverged(format!("step {asked} of {lanes} lanes is answered by step {} of {answered}", step.0));
        }
        for (lane, (flown, answer)) in flight.lanes.iter().zip(&result.lanes).enumerate() {
            let rest = flown.iter().try_fold(answer.samples.as_slice(), |samples, chunk| {
                chunk.draws(samples).map(|count| &samples[count..])
            });
            if !rest.is_some_and(<[Sample]>::is_empty) {
                return diverged(format!("step {}, lane {lane}: the samples are not those that were asked", step.0));
            }
            let mut drawn = flown.iter().filter(|chunk| chunk.sample);
            for guesses in &answer.guesses {
                let (seq, count, most) = (guesses.seq, guesses.tokens.len(), flight.guesses);
                if count > most || !drawn.any(|chunk| chunk.seq == seq) {
                    return diverged(format!(
                        "sequence {} has {count} guesses that nobody asked for, {most} were",
                        seq.0
                    ));
                }
            }
            self.check_scores(flown, answer)?;
        }
        Ok(())
    }

    /// Prompt scores continue those before without a gap, and are all there when the prompt is.
    fn check_scores(&self, flown: &[Flown], answer: &LaneResult) -> Result<(), Fault> {
        let diverged = |text: String| Err(Fault::new(FaultKind::Diverged, text));
        for scores in &answer.prompt_scores {
            if !flown.iter().any(|chunk| chunk.seq == scores.seq) {
                return diverged(format!("sequence {} has prompt scores but no chunk", scores.seq.0));
            }
        }
        for chunk in flown {
            let Some(sequence) = self.roster.wanted(chunk.slot, chunk.seq) else { continue };
            // Only a prompt in work can be scored; a plain decode is through here at once.
            if sequence.place().computed >= sequence.prompt_len {
                continue;
            }
            let request = self.requests.get(&sequence.age.job).expect("a wanted sequence has a request");
            let mut known = request.scores.len();
            for scores in answer.prompt_scores.iter().filter(|scores| scores.seq == chunk.seq) {
                if scores.start as usize != known + 1 || known + scores.scores.len() >= sequence.prompt_len {
                    let (start, count) = (scores.start, scores.scores.len());
                    return diverged(format!("{count} prompt scores from {start} follow {known} others"));
                }
                known += scores.scores.len();
            }
            let owed = request.scored_choice() == Some(sequence.age.choice) && chunk.end >= sequence.prompt_len;
            if owed && known + 1 != sequence.prompt_len {
                return diverged(format!("{known} prompt scores came for {} tokens", sequence.prompt_len));
            }
        }
        Ok(())
    }

    fn collect_scores(&mut self, flown: &[Flown], scores: PromptScores) {
        let chunk = flown.iter().find(|chunk| chunk.seq == scores.seq).expect("a checked score has its chunk");
        let Some(sequence) = self.roster.wanted(chunk.slot, chunk.seq) else { return };
        let request = self.requests.get_mut(&sequence.age.job).expect("a wanted sequence has a request");
        if request.scored_choice() == Some(sequence.age.choice) {
            request.scores.extend(scores.scores);
        }
    }

    /// A chunk was computed: its blocks may be shared, its token goes out, and the sequence goes on, ends or leaves.
    fn land(
        &mut self,
        lane: usize,
        chunk: &Flown,
        (samples, guesses): (&[Sample], Vec<u32>),
        deliveries: &mut Vec<Delivery>,
    ) {
        let slot = chunk.slot;
        let sequence = self.roster.get_mut(slot);
        let place = sequence.place.as_mut().expect("a chunk in flight keeps its sequence in its lane");
        assert_eq!(place.seq, chunk.seq, "a sequence with chunks in flight keeps its slot");
        place.chunks_in_flight -= 1;
        // Of a forgotten sequence the last tokens are not known.
        place.computed = chunk.end.min(sequence.tokens.len());
        let (fate, landed) = (place.fate, place.chunks_in_flight == 0);
        if chunk.end / BLOCK_TOKENS > place.offered && self.settings.prefix_cache {
            sequence.extend_hashes(self.settings.block_hash);
            self.lanes[lane].offer(sequence);
        }
        if fate == Fate::Dropped {
            if landed {
                self.lanes[lane].vacate(sequence);
                self.roster.remove(slot);
            }
            return;
        }
        if chunk.end >= sequence.prompt_len && chunk.end == sequence.tokens.len() {
            // Only the chunk that completes the prompt, not each decode, can be the first to get here.
            if sequence.tokens.len() == sequence.prompt_len {
                self.start(slot, deliveries);
            }
            // Draws behind the last token of an answer count for nothing; an answer of no tokens ends without any.
            let ended = match samples {
                [] => self.extend(slot, None, deliveries),
                drawn => drawn.iter().any(|sample| self.extend(slot, Some(sample), deliveries)),
            };
            let sequence = self.roster.get_mut(slot);
            let guessed = (sequence.tokens.len() - chunk.end).saturating_sub(1);
            self.load.drafts_accepted += guessed as u64;
            if ended {
                self.retire(lane, slot);
                return;
            }
            let place = sequence.place_mut();
            (place.computed, place.scheduled) = (place.computed + guessed, place.scheduled + guessed);
            place.drafting.learn((chunk.drafts.len(), guessed), guesses, self.settings.drafts_max);
        }
        let sequence = self.roster.get_mut(slot);
        if fate == Fate::Preempted {
            if landed {
                self.lanes[lane].vacate(sequence);
                self.requeue(slot);
            }
        } else if chunk.sample && landed {
            self.lanes[lane].ready.push_back((slot, chunk.seq));
        }
    }

    /// The prompt was computed: tells so once a job, and lets the choices go that waited for its blocks.
    fn start(&mut self, slot: Slot, deliveries: &mut Vec<Delivery>) {
        let job = self.roster.get(slot).age.job;
        let request = self.requests.get_mut(&job).expect("a wanted sequence has a request");
        if request.started {
            return;
        }
        request.started = true;
        let mut deliver = |output| deliveries.push(Delivery { job, output, last: false });
        deliver(Output::Started { cached_tokens: request.cached_tokens });
        if request.sampling.prompt_logprobs.is_some() {
            deliver(Output::PromptScores(std::mem::take(&mut request.scores)));
        }
        for held in std::mem::take(&mut request.held) {
            // They take turns as jobs do: a few requests of many choices would else hold up everyone.
            self.queue.insert(self.roster.get(held).waits(), false, held);
        }
    }

    /// Adds a token, if one was drawn, and says whether the answer has ended.
    fn extend(&mut self, slot: Slot, sample: Option<&Sample>, deliveries: &mut Vec<Delivery>) -> bool {
        let sequence = self.roster.get_mut(slot);
        let Age { job, choice } = sequence.age;
        let mut reason = None;
        if let Some(&Sample { token, ref score, .. }) = sample {
            let score = score.clone();
            sequence.tokens.push(token);
            sequence.charge(0, sequence.tokens.len());
            self.queue.charge(sequence.turn.tenant, 0, 1);
            self.load.tokens_generated += 1;
            let suspect = self.requests.get(&job).is_some_and(|request| request.deaths.count > 0);
            deliveries.push(Delivery { job, output: Output::Token { choice, token, score }, last: false });
            if sequence.end_tokens.contains(&token) {
                reason = Some(DoneReason::End);
            }
            if suspect {
                self.clear(job);
            }
        }
        let sequence = self.roster.get(slot);
        if reason.is_none() && sequence.tokens.len() >= sequence.len_max {
            reason = Some(DoneReason::Length);
        }
        let Some(reason) = reason else { return false };
        let done = |choice| Delivery { job, output: Output::Done { choice, reason }, last: false };
        if sequence.len_max == sequence.prompt_len {
            // Nothing was to be drawn: the other choices never ran.
            let choices = self.requests[&job].choices;
            deliveries.extend((0..choices).map(done));
        } else {
            deliveries.push(done(choice));
        }
        let request = self.requests.get_mut(&job).expect("a wanted sequence has a request");
        request.slots.retain(|other| *other != slot);
        if request.slots.is_empty() {
            let request = self.requests.remove(&job).expect("it was just read");
            self.queue.leave(request.turn.tenant, request.admitted);
            self.suspects.remove(&job);
            self.load.jobs_finished += 1;
            deliveries.last_mut().expect("a choice was just done").last = true;
        }
        true
    }

    /// An answer has ended: its sequence leaves, once what the group computed of it in vain has landed.
    fn retire(&mut self, lane: usize, slot: Slot) {
        let sequence = self.roster.get_mut(slot);
        if sequence.place().chunks_in_flight > 0 {
            self.lanes[lane].dismiss(sequence, Fate::Dropped);
            return;
        }
        self.lanes[lane].vacate(sequence);
        self.roster.remove(slot);
    }
}
