//! One data rank's share of the scheduler: its block pool and the sequences admitted to it, each list in the order in
//! which it is served.

use std::collections::{BTreeMap, VecDeque};

use model::plan::BLOCK_TOKENS;
use model::step::{BlockId, Chunk, LaneBatch, Sample, SeqId, guessed};

use super::blocks::BlockPool;
use super::sequence::{Age, Fate, Roster, Sequence, Slot};

#[derive(Debug)]
pub struct Lane {
    pub pool: BlockPool,
    /// All admitted sequences: whoever holds blocks. The last is the youngest.
    pub running: BTreeMap<Age, Slot>,
    /// Those with tokens left to prefill.
    pub prefilling: BTreeMap<Age, Slot>,
    /// Those that wait for their next decode, the longest waiting first. Entries of sequences that left are skipped.
    pub ready: VecDeque<(Slot, SeqId)>,
    /// Sequences that leave as soon as their chunks in flight are answered.
    pub leaving: usize,
    /// To be told to the ranks with the next step.
    pub ended: Vec<SeqId>,
    /// The head of the queue that found too few blocks here; not tried again before some are released.
    pub too_full_for: Option<Age>,
}

/// A lane's part of a step being packed, and what the scheduler must remember of it until the answer.
#[derive(Debug, Default)]
pub struct Pack {
    pub batch: LaneBatch,
    pub flown: Vec<Flown>,
    pub tokens: usize,
    pub tokens_max: usize,
}

impl Pack {
    /// Whether a chunk of a prompt finds room.
    pub fn has_room(&self, sequences_max: usize) -> bool {
        self.tokens < self.tokens_max && self.flown.len() < sequences_max
    }
}

/// One chunk in flight.
#[derive(Debug)]
pub struct Flown {
    pub slot: Slot,
    pub seq: SeqId,
    /// The position after its last token that is none of the drafts.
    pub end: usize,
    pub sample: bool,
    pub drafts: Vec<u32>,
}

impl Flown {
    /// How many of the samples, an answer's from some place on, are this chunk's. `None` where what comes there is not its.
    pub fn draws(&self, samples: &[Sample]) -> Option<usize> {
        if !self.sample {
            return Some(0);
        }
        let own = samples.get(..=guessed(&self.drafts, samples))?;
        own.iter().all(|sample| sample.seq == self.seq).then_some(own.len())
    }
}

/// Whether a block could be found for a decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    Made,
    /// Sequences in flight must leave first.
    Later,
    /// The sequence that asked was itself the youngest.
    PreemptedItself,
}

impl Lane {
    pub fn new(blocks: usize) -> Lane {
        Lane {
            pool: BlockPool::new(blocks),
            running: BTreeMap::new(),
            prefilling: BTreeMap::new(),
            ready: VecDeque::new(),
            leaving: 0,
            ended: Vec::new(),
            too_full_for: None,
        }
    }

    /// Sequences whose prompt is computed or in flight.
    pub fn decoding(&self) -> usize {
        self.running.len() - self.prefilling.len()
    }

    /// Blocks to leave free at an admission, so that those already running can grow without preempting at once.
    pub fn headroom(&self) -> usize {
        if self.running.is_empty() { 0 } else { (self.pool.total() / 100).max(1) }
    }

    /// Appends a chunk of `count` tokens of an admitted sequence to a step, and `drafts` behind them: only where those are its last
    /// ones, a token may be drawn behind each, and its blocks hold them. Where all its tokens are scheduled, the one is meant that a
    /// step in flight draws.
    pub fn fly(&mut self, sequence: &mut Sequence, slot: Slot, count: usize, drafts: Vec<u32>, pack: &mut Pack) {
        let place = sequence.place.as_mut().expect("only an admitted sequence is packed");
        assert_eq!(place.fate, Fate::Runs, "a leaving sequence is not packed");
        let start = place.scheduled;
        let end = start + count;
        let complete = end >= sequence.tokens.len();
        // Who guesses behind a draw wants what it has further on too.
        let sent = match complete && place.drafting.most() > 0 {
            true => place.blocks.len(),
            false => (end + drafts.len()).div_ceil(BLOCK_TOKENS),
        };
        assert!(drafts.is_empty() || complete && end + drafts.len() < sequence.len_max, "a draft has a draw behind it");
        let sample = complete && end < sequence.len_max;
        pack.batch.chunks.push(Chunk {
            seq: place.seq,
            start: start as u32,
            tokens: [sequence.tokens.get(start..end).unwrap_or_default(), &drafts].concat(),
            blocks: place.blocks[place.sent..sent].to_vec(),
            sample,
            drafts: drafts.len() as u32,
        });
        pack.tokens += count + drafts.len();
        pack.flown.push(Flown { slot, seq: place.seq, end, sample, drafts });
        place.sent = sent;
        place.scheduled = end;
        place.chunks_in_flight += 1;
        if complete {
            self.prefilling.remove(&sequence.age);
        }
    }

    /// Marks a running sequence to leave after its chunks in flight; the caller vacates it if there are none.
    pub fn dismiss(&mut self, sequence: &mut Sequence, fate: Fate) {
        let place = sequence.place.as_mut().expect("only an admitted sequence leaves");
        if place.fate == Fate::Runs {
            self.leaving += 1;
        }
        place.fate = fate;
        self.prefilling.remove(&sequence.age);
    }

    /// Takes a sequence's blocks back, the last first: a prefix loses its tail before its head.
    pub fn vacate(&mut self, sequence: &mut Sequence) {
        let place = sequence.place.take().expect("only an admitted sequence is vacated");
        assert_eq!(place.chunks_in_flight, 0, "steps in flight still use the blocks");
        if place.fate != Fate::Runs {
            self.leaving -= 1;
        }
        for block in place.blocks.iter().rev() {
            self.pool.release(*block);
        }
        self.running.remove(&sequence.age);
        self.prefilling.remove(&sequence.age);
        self.ended.push(place.seq);
        self.too_full_for = None;
    }

    /// Offers the full blocks that were computed since the last time to the prefix cache.
    pub fn offer(&mut self, sequence: &mut Sequence) {
        let Sequence { tokens, hashes, place, .. } = sequence;
        let place = place.as_mut().expect("only an admitted sequence computes");
        let full = place.computed / BLOCK_TOKENS;
        for number in place.offered..full {
            let tokens = &tokens[number * BLOCK_TOKENS..][..BLOCK_TOKENS];
            let block = place.blocks[number];
            place.chain = place.chain.and_then(|parent| self.pool.register(block, parent, hashes[number], tokens));
        }
        place.offered = full;
    }

    /// Finds one block for the sequence in `slot`, preempting the youngest where none is free. Preempted sequences that
    /// left at once are added to `preempted`.
    pub fn make_room(&mut self, roster: &mut Roster, slot: Slot, preempted: &mut Vec<Slot>) -> Room {
        loop {
            if let Some(block) = self.pool.allocate() {
                roster.get_mut(slot).place_mut().blocks.push(block);
                return Room::Made;
            }
            if self.leaving > 0 {
                return Room::Later;
            }
            let (_, &youngest) = self.running.last_key_value().expect("whoever asks is running");
            let sequence = roster.get_mut(youngest);
            self.dismiss(sequence, Fate::Preempted);
            if sequence.place().chunks_in_flight == 0 {
                self.vacate(sequence);
                preempted.push(youngest);
            }
            if youngest == slot {
                return Room::PreemptedItself;
            }
        }
    }

    /// The tables of all sequences here.
    pub fn tables<'a>(&self, roster: &'a Roster) -> Vec<&'a [BlockId]> {
        self.running.values().map(|slot| roster.get(*slot).place().blocks.as_slice()).collect()
    }
}
