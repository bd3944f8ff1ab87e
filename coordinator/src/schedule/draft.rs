//! Guesses of what a sequence goes on with, by what followed its last tokens when they were there before (prompt lookup
//! decoding): answers repeat prompts, and themselves. A step checks them at once, for hardly more than the reading of weights that
//! it does anyway. A guess changes no answer: each token is drawn as it would be without.

use model::plan::BLOCK_TOKENS;

use super::sequence::Sequence;

/// Tokens that must be the same for what followed them to be a guess: fewer guess often and badly.
const ALIKE: usize = 3;

/// How far back to look: a bound on the time that a step's packing takes.
const REACH: usize = 8192;

/// Up to `most` drafts behind the last token of a running sequence: as many as its blocks and its answer have room for.
pub fn of(sequence: &Sequence, most: usize) -> Vec<u32> {
    let len = sequence.tokens.len();
    let (blocks, answer) = (sequence.place().blocks.len() * BLOCK_TOKENS, sequence.len_max);
    // Behind the last draft a token is drawn.
    let most = most.min(blocks.saturating_sub(len)).min(answer.saturating_sub(len + 1));
    lookup(&sequence.tokens[len.saturating_sub(REACH)..], most).to_vec()
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
    use super::lookup;

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
