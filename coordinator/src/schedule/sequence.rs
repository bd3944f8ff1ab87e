//! One answer in the making: its tokens and, while it is admitted to a lane, its place there.

use std::sync::Arc;

use model::plan::BLOCK_TOKENS;
use model::step::{BlockId, SeqId};

use super::blocks::{BlockHash, Parent};
use super::draft::Drafting;
use super::queue::Turn;

/// A job as the scheduler numbers it, in the order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(pub u64);

/// Names a sequence for its whole life and says who came first: the queue and preemption go by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Age {
    pub job: JobId,
    pub choice: u32,
}

/// One choice of a job.
#[derive(Debug)]
pub struct Sequence {
    pub age: Age,
    pub turn: Turn,
    pub salt: u64,
    /// Prompt and answer so far.
    pub tokens: Vec<u32>,
    pub prompt_len: usize,
    /// Tokens that were asked for, and those, prompt included, at which the answer ends.
    pub tokens_max: u32,
    pub len_max: usize,
    pub end_tokens: Arc<[u32]>,
    /// Chained hashes of the leading full blocks; see [`Self::extend_hashes`].
    pub hashes: Vec<u64>,
    /// Tokens that its tenant was charged for: what is computed again is the server's loss.
    pub charged: usize,
    /// `None` while it waits.
    pub place: Option<Place>,
}

/// Where an admitted sequence stands.
#[derive(Debug)]
pub struct Place {
    pub lane: usize,
    pub seq: SeqId,
    /// Its block table; the ranks know the first `sent` entries.
    pub blocks: Vec<BlockId>,
    pub sent: usize,
    /// Tokens whose cache entries were asked for, and those for which a step answered: `computed <= scheduled`.
    pub scheduled: usize,
    pub computed: usize,
    /// Chunks in unanswered steps. While there are any, the blocks must stay.
    pub chunks_in_flight: u32,
    /// Full blocks that were offered to the prefix cache, and the last of them; `None` once the chain was cut.
    pub offered: usize,
    pub chain: Option<Parent>,
    pub drafting: Drafting,
    pub fate: Fate,
}

/// What becomes of an admitted sequence once its chunks in flight are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Runs,
    /// Back to the queue; a token still in flight counts.
    Preempted,
    /// Forgotten.
    Dropped,
}

impl Sequence {
    /// Hashes the full blocks that have no hash yet.
    pub fn extend_hashes(&mut self, hash: BlockHash) {
        let mut parent = self.hashes.last().copied().unwrap_or_else(|| hash(self.salt, &[]));
        for tokens in self.tokens.chunks_exact(BLOCK_TOKENS).skip(self.hashes.len()) {
            parent = hash(parent, tokens);
            self.hashes.push(parent);
        }
    }

    /// How the queue knows it.
    pub fn waits(&self) -> (Age, Turn) {
        (self.age, self.turn)
    }

    /// Tokens up to `end` that nobody was charged for yet; they are from now on.
    pub fn charge(&mut self, from: usize, end: usize) -> usize {
        let computed = end.saturating_sub(from.max(self.charged));
        self.charged = self.charged.max(end);
        computed
    }

    /// Leading full blocks that may come from the prefix cache: the last token is always computed, to draw from.
    pub fn blocks_reusable(&self) -> usize {
        (self.tokens.len() - 1) / BLOCK_TOKENS
    }

    pub fn place(&self) -> &Place {
        self.place.as_ref().expect("the sequence is admitted")
    }

    pub fn place_mut(&mut self) -> &mut Place {
        self.place.as_mut().expect("the sequence is admitted")
    }
}

/// Where a sequence is kept; reused after its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot(u32);

/// All sequences, by slot.
#[derive(Debug, Default)]
pub struct Roster {
    slots: Vec<Option<Sequence>>,
    empty: Vec<Slot>,
}

impl Roster {
    pub fn insert(&mut self, sequence: Sequence) -> Slot {
        match self.empty.pop() {
            Some(slot) => {
                self.slots[slot.0 as usize] = Some(sequence);
                slot
            }
            None => {
                self.slots.push(Some(sequence));
                Slot(u32::try_from(self.slots.len() - 1).expect("fewer than 2^32 sequences"))
            }
        }
    }

    pub fn remove(&mut self, slot: Slot) {
        assert!(self.slots[slot.0 as usize].take().is_some(), "slot {} was empty", slot.0);
        self.empty.push(slot);
    }

    pub fn get(&self, slot: Slot) -> &Sequence {
        self.slots[slot.0 as usize].as_ref().expect("the slot is taken")
    }

    pub fn get_mut(&mut self, slot: Slot) -> &mut Sequence {
        self.slots[slot.0 as usize].as_mut().expect("the slot is taken")
    }

    /// The sequence in a slot if it is still the one that ranks know as `seq` and its job was not forgotten.
    pub fn wanted(&self, slot: Slot, seq: SeqId) -> Option<&Sequence> {
        let sequence = self.slots[slot.0 as usize].as_ref()?;
        let place = sequence.place.as_ref()?;
        (place.seq == seq && place.fate != Fate::Dropped).then_some(sequence)
    }

    /// The same, unless it is about to leave its lane.
    pub fn running(&self, slot: Slot, seq: SeqId) -> Option<&Sequence> {
        self.wanted(slot, seq).filter(|sequence| sequence.place().fate == Fate::Runs)
    }

    /// Places for as many, for tests of what only names them.
    #[cfg(test)]
    pub fn numbered(count: usize) -> Vec<Slot> {
        (0..count as u32).map(Slot).collect()
    }

    pub fn len(&self) -> usize {
        self.slots.len() - self.empty.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (Slot, &Sequence)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(number, sequence)| Some((Slot(number as u32), sequence.as_ref()?)))
    }
}
