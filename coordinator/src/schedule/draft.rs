//! Guesses of what a sequence goes on with: by the group's predictors where its plan has any, and by what followed the last
//! tokens when they were there before (prompt lookup decoding): answers repeat prompts, and themselves. A step checks them at once,
//! for hardly more than the reading of weights that it does anyway. A guess changes no answer: each token is drawn as it would be
//! without.

use model::plan::BLOCK_TOKENS;

use super::sequence::Sequence;

/// Tokens that must be the same for what followed them to be a guess: fewer guess often and badly.
const ALIKE: usize = 3;

/// How far back to look: a bound on the time that a step's packing takes.
const REACH: usize = 8192;

/// What is known of a running sequence's guesses.
#[derive(Debug)]
pub struct Drafting {
    /// Drafts of its next chunk, at most: one more than were right the last time, and twice as many where all were.
    most: usize,
    /// What the group's predictors guess behind its last token.
    guesses: Vec<u32>,
}

impl Drafting {
    pub fn new(most: usize) -> Drafting {
        Drafting { most, guesses: Vec::new() }
    }

    pub fn most(&self) -> usize {
        self.most
    }

    /// Of so many drafts so many were right; and what the group guesses now.
    pub fn learn(&mut self, (drafts, right): (usize, usize), guesses: Vec<u32>, drafts_max: usize) {
        self.guesses = guesses;
        if drafts > 0 {
            let most = if right == drafts { self.most.max(2 * drafts) } else { right + 1 };
            self.most = most.min(drafts_max);
        }
    }
}

impl Sequence {
    /// Positions that a running sequence's next chunk may come to with its drafts, and the guesses behind them.
    pub fn reach(&self) -> usize {
        let most = self.place().drafting.most;
        if most == 0 { 0 } else { (self.tokens.len() + 2 * most).min(self.len_max.saturating_sub(1)) }
    }

    /// Up to `most` drafts behind the last token of a running sequence: as many as its blocks and its answer have room for.
    pub fn drafts(&self, most: usize) -> Vec<u32> {
        let (place, len) = (self.place(), self.tokens.len());
        // Behind the last draft a token is drawn.
        let room = (place.blocks.len() * BLOCK_TOKENS).saturating_sub(len);
        let most = most.min(place.drafting.most).min(room).min(self.len_max.saturating_sub(len + 1));
        let found = lookup(&self.tokens[len.saturating_sub(REACH)..], most);
        let guesses = &place.drafting.guesses[..most.min(place.drafting.guesses.len())];
        // What was there before is longer, where the group guesses the same.
        let agreed = guesses.is_empty() || found.len() > guesses.len() && found.starts_with(guesses);
        if agreed { found.to_vec() } else { guesses.to_vec() }
    }
}

/// What followed the last tokens where they were last before, up to `most` tokens.
fn lookup(tokens: &[u32], most: usize) -> &[u32] {
    if most == 0 || tokens.len() <= ALIKE {
        return &[];
    }
    let (before, last) = tokens.split_at(tokens.len() - ALIKE);
    // Occurrences that overlap the last tokens count too: something repeats at a short distance.
    let found = (0..before.len()).rev().find(|&at| tokens[at..at + ALIKE] == *last);
    found.map_or(&[], |at| {
        let from = at + ALIKE;
        &tokens[from..tokens.len().min(from + most)]
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_guessed_as_were_right() {
        let mut drafting = Drafting::new(8);
        for (drafts, right, most) in
            [(8, 8, 8), (8, 0, 1), (0, 0, 1), (1, 1, 2), (2, 2, 4), (1, 1, 4), (4, 4, 8), (8, 2, 3)]
        {
            drafting.learn((drafts, right), vec![], 8);
            assert_eq!(drafting.most(), most, "{right} of {drafts}");
        }
    }

    #[test]
    fn what_followed_last_is_guessed() {
        let tokens = [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9, 1, 2, 3];
        assert_eq!(lookup(&tokens, 3), [6, 7, 8]);
        assert_eq!(lookup(&tokens, 100), [6, 7, 8, 9, 1, 2, 3]);
        assert!(lookup(&tokens, 0).is_empty());
        assert!(lookup(&tokens[..7], 3).is_empty(), "two tokens alike are too few");
        assert_eq!(lookup(&[5; 4], 3), [5], "a repetition goes on, as far as it is known");
        assert!(lookup(&[5; 3], 3).is_empty() && lookup(&[], 3).is_empty());
    }
}
